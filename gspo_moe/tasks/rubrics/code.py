"""Programs in answers, judged by the tests of their prompts in the sandbox (docs/sandbox.md)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat

from gspo_moe.config.task import TaskConfig
from gspo_moe.config.validation import validated
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.tasks.protocol import last_answer
from gspo_moe.tasks.sandbox import ProgramTests, Sandbox, SandboxOptions
from gspo_moe.types import Conversation, Prompt

NAME = "code"
KEY = "task.reward.options"
PYTHON = ("python", "python3", "py")
FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[^\n`]*\n(.*?)^[ \t]*\1[ \t]*$", re.MULTILINE | re.DOTALL)


class CodeOptions(SandboxOptions):
    """The sandbox's settings, and:

    score: `all` tests or nothing, which stops at the first failure, or the `fraction` that passed.
    total_seconds: for all tests of one answer; those without time left fail.
    compare: outputs word by word (`tokens`), or line by line but for spaces at their ends.
    tolerance: between numbers written with a point or an exponent, absolute below 1 and relative above.
    without_fence: an answer without a code fence is no program, or is `whole` one itself.
    """

    score: Literal["all", "fraction"] = "all"
    total_seconds: PositiveFloat = 8.0
    compare: Literal["tokens", "lines"] = "tokens"
    tolerance: Annotated[float, Field(ge=0.0)] = 0.0
    without_fence: Literal["fail", "whole"] = "fail"


class Code:
    """Rewards the last program of an answer with 1 or 0, or with the fraction of the tests that it passes.

    Raises ConfigError as `Sandbox`, and for options that do not fit.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = validated(CodeOptions, options, prefix=f"{KEY}.")
        self._sandbox = Sandbox(self._options, KEY)

    def reward(self, prompt: Prompt, turns: Conversation) -> Mapping[str, float]:
        """The reward, and as parts the share of tests passed and what stood in the way. Raises DataError for tests
        that are none."""
        options = self._options
        tests = given_tests(prompt)
        program = program_in(last_answer(turns), options.without_fence == "whole")
        if program is None:
            return _parts(0.0, 0.0, "no_code")
        verdict = self._sandbox.judge(
            program,
            tests,
            seconds=options.total_seconds,
            stop_at_failure=options.score == "all",
            by_lines=options.compare == "lines",
            tolerance=options.tolerance,
        )
        passed = verdict.passed / verdict.total
        return _parts(passed if options.score == "fraction" else float(passed == 1.0), passed, verdict.failure)


def _parts(reward: float, passed: float, failure: str | None) -> Mapping[str, float]:
    return {
        "reward": reward,
        "tests_passed": passed,
        "no_code": float(failure == "no_code"),
        "compile_error": float(failure == "compile"),
        "timeout": float(failure in ("cpu", "wall")),
        "over_limit": float(failure in ("memory", "output", "disk")),
    }


def given_tests(prompt: Prompt) -> ProgramTests:
    """The tests in a prompt's reference, its own or those of its record. Raises DataError where there are none."""
    row = prompt.reference.get("row")
    found = prompt.reference.get("tests") or (row.get("tests") if isinstance(row, Mapping) else None)
    if found is None:
        raise DataError(
            f"prompt {prompt.uid} has no tests, which the reward `{NAME}` runs; give its record a column `tests`, or "
            "set the file's format to livecodebench or codeforces"
        )
    return ProgramTests.from_json(found, f"prompt {prompt.uid}")


def program_in(answer: str, whole: bool) -> str | None:
    """The last fenced block of Python, else the last of any kind, else the answer itself where `whole`, else None."""
    blocks = FENCE.findall(answer)
    python = [text for _, language, text in blocks if language.lower() in PYTHON]
    found = python or [text for _, _, text in blocks]
    return found[-1] if found else answer if whole else None


def refuse_longer_programs(config: TaskConfig) -> None:
    """Raises ConfigError where one answer's tests may take as long as `task.reward.timeout_seconds` or longer."""
    for key, options in _named(config):
        taken = validated(CodeOptions, options, prefix=f"{key}.").total_seconds
        if taken >= config.reward.timeout_seconds:
            raise ConfigError(
                f"{key}.total_seconds={taken:g} is not below task.reward.timeout_seconds="
                f"{config.reward.timeout_seconds:g}, so that slow programs would count as broken rewards; lower the "
                "one or raise the other"
            )


def _named(config: TaskConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every place that names this reward, and the options there."""
    if config.reward.name == NAME:
        yield KEY, config.reward.options
    for number, term in enumerate(config.reward.sum):
        if term.name == NAME:
            yield f"task.reward.sum[{number}].options", term.options
    data = config.data
    if data is not None and any(file.reward == NAME for file in (*data.train, *data.eval, *data.sft)):
        yield KEY, {}
