"""Rewards of the user's own: a function whose parameters say, by name, what it wants.

The names of verl's `compute_score(data_source, solution_str, ground_truth, extra_info)` and of TRL's
`reward(prompts, completions, **columns)` are among them, so that their functions work as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from gspo_moe.errors import ConfigError, DataError, GspoMoeError, RewardError
from gspo_moe.external import import_own
from gspo_moe.tasks.protocol import Item, Rubric, last_answer
from gspo_moe.tasks.rubrics.given import completion_of, messages_of, row_of
from gspo_moe.types import Conversation, Prompt

BATCH = ("prompts", "completions", "responses", "solution_strs")  # a parameter of these makes it the batch form
ALIASES = {"completion": "response", "solution_str": "response", "ground_truth": "answer"}
PLURALS = {
    "prompts": "prompt",
    "completions": "completion",
    "responses": "response",
    "solution_strs": "response",
    "answers": "answer",
    "ground_truths": "answer",
    "rows": "row",
    "data_sources": "data_source",
    "extra_infos": "extra_info",
}
SHOWN = (
    "prompt, response (also completion, solution_str), answer (also ground_truth), row, turns, data_source, extra_info"
    " and options, in the batch form prompts, completions and so on"
)
_NOTHING: Any = object()


def own_rubric(name: str, options: Mapping[str, Any], key: str = "task.reward") -> Rubric:
    """The function that `path/to/file.py:function` or `my_module:function` names, as a rubric.

    A class is made with the options; what comes is a rubric, or is called as a function.
    Raises ConfigError for what cannot be imported or called, and for options that it does not take.
    """
    found = import_own(name, key)
    if isinstance(found, type):
        try:
            found = found(**options)
        except GspoMoeError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{key}={name} with {key}.options={dict(options)} failed ({type(error).__name__}: {error}); correct one"
            ) from error
        options = {}
        if hasattr(found, "reward"):
            return found
    if not callable(found):
        raise ConfigError(f"{key}={name} is of type {type(found).__name__}; name a function")
    if inspect.iscoroutinefunction(found):
        raise ConfigError(f"{key}={name} is an async function; define it with def, and use asyncio.run inside")
    form = _Call(f"{key}={name}", found, options, key)
    return OwnBatch(form) if any(parameter in BATCH for parameter in form.parameters) else OwnReward(form)


class OwnReward:
    """The single form: called once a conversation."""

    def __init__(self, call: _Call) -> None:
        self._call = call

    def check(self, prompt: Prompt) -> None:
        self._call.check(prompt, one_values)

    def reward(self, prompt: Prompt, turns: Conversation) -> Any:
        return self._call.function(**self._call.arguments(prompt, one_values(prompt, turns)))


class OwnBatch:
    """The batch form: called with lists, one element a conversation, and gives a list."""

    def __init__(self, call: _Call) -> None:
        self._call = call

    def check(self, prompt: Prompt) -> None:
        self._call.check(prompt, batch_values)

    def reward(self, prompt: Prompt, turns: Conversation) -> Any:
        (given,) = self.rewards([(prompt, turns)])
        return given

    def rewards(self, items: Sequence[Item]) -> Sequence[Any]:
        call = self._call
        each = [call.arguments(prompt, batch_values(prompt, turns)) for prompt, turns in items]
        names = list(dict.fromkeys(name for one in each for name in one))
        # What some rows lack is None there, as in a data set; a parameter without a default is in all of them.
        lists = {
            name: call.options[name] if name in call.options else [one.get(name) for one in each] for name in names
        }
        whole = {"options": call.options} if "options" in lists else {}
        given = call.function(**lists | whole)
        if isinstance(given, str | Mapping) or not hasattr(given, "__len__") or len(given) != len(items):
            what = f"{len(given)} rewards" if hasattr(given, "__len__") else "no list"
            raise RewardError(
                f"{call.shown} gave {what} for {len(items)} answers ({type(given).__name__}); give a list with one for "
                "each"
            )
        return list(given)


def one_values(prompt: Prompt, turns: Conversation) -> dict[str, Any]:
    """What the single form can ask for, by name, apart from columns; what the prompt has not is left out."""
    row, reference = row_of(prompt), prompt.reference
    values = {
        "prompt": messages_of(prompt) if prompt.messages else prompt.text,
        "response": last_answer(turns),
        "row": dict(row),
        "turns": turns,
        "data_source": reference.get("source", row.get("data_source", prompt.task)),
    }
    if reference.get("answer") is not None:
        values["answer"] = reference["answer"]
    if row.get("extra_info") is not None:
        values["extra_info"] = row["extra_info"]
    return values | {alias: values[name] for alias, name in ALIASES.items() if name in values}


def batch_values(prompt: Prompt, turns: Conversation) -> dict[str, Any]:
    """As `one_values`, one element of each list; a chat's completion is its messages, as TRL has them."""
    values = one_values(prompt, turns)
    if prompt.messages:
        values["completion"] = completion_of(prompt, turns)
    return values | {plural: values[name] for plural, name in PLURALS.items() if name in values}


class _Call:
    """A function and how its parameters are filled: options by their name, then what a prompt gives, then its row."""

    def __init__(self, shown: str, function: Callable[..., Any], options: Mapping[str, Any], key: str) -> None:
        try:
            signature = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{shown} does not say its parameters ({error}); wrap it in a function that does"
            ) from None
        self.shown, self.function, self.options = shown, function, dict(options)
        self.parameters = {
            one.name: one for one in signature if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        }
        self._takes_columns = any(one.kind == one.VAR_KEYWORD for one in signature)
        for one in signature:
            if one.kind == one.POSITIONAL_ONLY and one.default is one.empty:
                raise ConfigError(f"{shown} takes {one.name} by position alone; let it be given by name")
        if not self._takes_columns and "options" not in self.parameters:
            for option in options:
                if option not in self.parameters:
                    (nearest, *_) = get_close_matches(option, self.parameters, n=1, cutoff=0.0) or ["no parameter"]
                    raise ConfigError(
                        f"{key}.options.{option}={options[option]!r} is no parameter of {shown}; the nearest is "
                        f"{nearest}"
                    )

    def check(self, prompt: Prompt, values: Callable[[Prompt, Conversation], dict[str, Any]]) -> None:
        """Raises ConfigError for a parameter without a default that nothing gives for this prompt."""
        try:
            self.arguments(prompt, values(prompt, ()))
        except DataError as error:
            raise ConfigError(str(error)) from None

    def arguments(self, prompt: Prompt, values: Mapping[str, Any]) -> dict[str, Any]:
        """By name. Raises DataError for a parameter without a default that nothing gives."""
        row = row_of(prompt)
        found = {name: self._argument(name, values, row) for name in self.parameters}
        missing = [
            name
            for name, one in found.items()
            if one is _NOTHING and self.parameters[name].default is inspect.Parameter.empty
        ]
        if missing:
            columns = f"the row has {', '.join(row)}" if row else "there is no row with columns"
            raise DataError(
                f"{self.shown} wants {missing[0]}, which nothing gives for {prompt.uid}: there are {SHOWN}, and "
                f"{columns}; rename {missing[0]} or give it a default"
                + (", or name the column of answers in task.data.columns.answer" if "answer" not in values else "")
            )
        given = {name: one for name, one in found.items() if one is not _NOTHING}
        if not self._takes_columns:
            return given
        more = {"answer": values["answer"]} if "answer" in values else {}
        return {**more, **row, **self.options, **given}

    def _argument(self, name: str, values: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
        if name in self.options:
            return self.options[name]
        if name == "options":
            return self.options
        if name in values:
            return values[name]
        if name in row:
            return row[name]
        if name == "solution" and "answer" in values:  # what TRL's examples call it
            return values["answer"]
        required = self.parameters[name].default is inspect.Parameter.empty
        return {} if name in ("extra_info", "extra_infos") and required else _NOTHING
