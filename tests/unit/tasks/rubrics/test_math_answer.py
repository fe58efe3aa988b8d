"""Pairs of a reference and an answer, against what a mathematician says of them."""

from __future__ import annotations

import signal

import pytest

from gspo_moe.config.task import RewardConfig, TaskConfig
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.tasks.pool import TaskPool
from gspo_moe.tasks.rubrics.math_answer import MathAnswer, expression_of, last_box
from gspo_moe.types import Prompt, Turn
from tests.turns import answered

RUBRIC = MathAnswer({})

EQUAL = [
    ("72", r"\boxed{72}"),
    ("72", "48 / 2 = 24, and 48 + 24 = 72."),
    ("72", "That makes\n#### 72"),
    (r"\boxed{72}", "72"),
    ("The answer is $72$.", r"\boxed{72}"),
    (r"\frac{1}{2}", r"\boxed{0.5}"),
    ("1/2", r"\boxed{\frac12}"),
    ("0.5", r"\boxed{\dfrac{2}{4}}"),
    (r"1\frac{1}{2}", r"\boxed{\frac32}"),
    (r"50\%", r"\boxed{0.5}"),
    ("0.5", r"\boxed{50\%}"),
    ("1,234", r"\boxed{1234}"),
    ("1234", r"\boxed{1,234}"),
    ("0.333333", r"\boxed{1/3}"),
    (r"\{1,2\}", r"\boxed{\{2,1\}}"),
    ("1,2", r"\boxed{x=1, x=2}"),
    ("[1,2)", r"\boxed{[1,2)}"),
    (r"(-\infty, 3]", r"\boxed{(-\infty,3]}"),
    ("(3,4)", r"\boxed{(3, 4)}"),
    (r"5\text{ cm}", r"\boxed{5}"),
    ("5", r"\boxed{5 \mathrm{m}}"),
    (r"90^\circ", r"\boxed{90}"),
    (r"\$5", r"\boxed{5.00}"),
    (r"5\$", r"\boxed{5}"),
    ("x=3", r"\boxed{3}"),
    ("3", r"\boxed{x=3}"),
    (r"\text{Tuesday}", r"\boxed{Tuesday}"),
    (r"\text{(A)}", r"\boxed{A}"),
    (r"2\sqrt{2}", r"\boxed{\sqrt{8}}"),
    (r"\frac{\pi}{2}", r"\boxed{\pi/2}"),
    ("2+3i", r"\boxed{3i+2}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}"),
    ("2^{2024}", r"\boxed{4^{1012}}"),
    ("2024!", r"\boxed{2024!}"),
    ("9^{9^{9}}", r"\boxed{9^{9^{9}}}"),
    ("2", r"first \boxed{1}, no: \boxed{2}"),
    ("3", r"\boxed{\boxed{3}}"),
    ("1", r"<think>\boxed{2}</think>\boxed{1}"),
]
DIFFERENT = [
    ("72", r"\boxed{27}"),
    ("72", "I do not know"),
    ("72", ""),
    ("72", r"\boxed{}"),
    ("-1", r"\boxed{1}"),
    ("[1,2)", r"\boxed{(1,2)}"),
    ("(3,4)", r"\boxed{(4,3)}"),
    ("3", r"\boxed{3 or 4}"),
    ("3", r"\boxed{\{3,4\}}"),
    (r"\text{Tuesday}", r"\boxed{\text{Monday}}"),
    (r"\pi", r"\boxed{3.14159}"),
    ("1", r"\boxed{1.0001}"),
    ("1", r"\boxed{1}, or rather \boxed{2}"),
    ("5", r"\boxed{5"),
    ("1", r"\boxed{\frac{1}{0}}"),
    ("1", r"\boxed{1} </think> \boxed{2}"),
]
HOSTILE = [
    "9**9**9",
    r"\boxed{9**9**9}",
    r"\boxed{9^{9^{9}}}",
    r"\boxed{9^{9^9}+1}",
    r"\boxed{99999999!}",
    r"\boxed{(9!)!}",
    r"\boxed{10^{10^{8}}-10^{10^{8}}+1}",
    r"\boxed{\sin(10^{10^{10}})}",
    r"\boxed{1.5^{10^{9}}}",
    r"\boxed{2^{-10000000000}}",
    "(" * 50_000 + "1" + ")" * 50_000,
    r"\boxed{" + r"\sqrt{" * 500 + "1" + "}" * 501,
    r"\boxed{" * 5_000 + "1",
    r"\boxed{" + "1" * 100_000 + "}",
    "$" * 100_000,
    "__import__('os')._exit(1)",
    "\ud800 \x00",
]


def reward(reference: object, answer: str, rubric: MathAnswer = RUBRIC) -> float:
    return rubric.reward(Prompt("train/0", "?", "math", {"answer": reference}), answered(answer))


@pytest.mark.parametrize(("reference", "answer"), EQUAL)
def test_equal_answers_are_right(reference: str, answer: str) -> None:
    assert reward(reference, answer) == 1.0


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_other_answers_are_wrong(reference: str, answer: str) -> None:
    assert reward(reference, answer) == 0.0


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda text: text[:20].encode("ascii", "replace").decode())
def test_hostile_answers_are_wrong_before_the_timer_has_to_end_them(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "setitimer", lambda *args: None)
    assert reward("17", answer) == 0.0


def test_the_timer_ends_what_takes_too_long_and_leaves_nothing_behind() -> None:
    before = signal.getsignal(signal.SIGALRM)
    rubric = MathAnswer({"seconds": 0.2, "wrong": -1})
    assert reward("17", r"\boxed{\int_0^1 e^{x^{x^x}} dx}", rubric) == -1.0
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_timer_works_in_reward_workers_and_a_wrong_reference_fails_its_own_prompt_alone() -> None:
    options = {"seconds": 0.3, "wrong": -1}
    config = TaskConfig(reward=RewardConfig(name="math", options=options, timeout_seconds=60, failure_reward=-3))
    asked = [("17", "17"), ("17", r"\boxed{\int_0^1 e^{x^{x^x}} dx}"), ("17", "9**9**9"), ("<", "17"), ("17", "17.0")]
    items = [(Prompt(f"train/{n}", "?", "t", {"answer": one}), answered(text)) for n, (one, text) in enumerate(asked)]
    with TaskPool(config, seed=1) as pool:
        rewards = pool.rewards(items)
    assert [reward.total for reward in rewards] == [1.0, -1.0, -1.0, -3.0, 1.0]
    assert [reward.error for reward in rewards if reward.error] == [
        "train/3: DataError: train/3 has the answer '<', which math-verify cannot read; mend it"
    ]


def test_options_say_what_counts() -> None:
    boxed = MathAnswer({"boxed_only": True, "right": 2, "wrong": -1})
    assert [reward("72", text, boxed) for text in ("72", r"\boxed{72}")] == [-1.0, 2.0]
    assert [reward("0.33", r"\boxed{1/3}", MathAnswer({"decimals": d})) for d in (2, 6)] == [1.0, 0.0]
    with pytest.raises(ConfigError, match=r"unknown key task\.reward\.options\.boxed=True; the nearest valid key is"):
        MathAnswer({"boxed": True})


def test_any_of_several_references_will_do_and_numbers_are_references() -> None:
    assert [reward(["1", "2"], text) for text in ("1", "2", "3")] == [1.0, 1.0, 0.0]
    assert reward(72, "72") == reward(0.5, r"\boxed{\frac12}") == reward(1e-5, r"\boxed{10^{-5}}") == 1.0


@pytest.mark.parametrize("reference", ["", "<think>", r"\text{", "(" * 100])
def test_a_reference_that_is_no_expression_is_an_error_of_the_data(reference: str) -> None:
    with pytest.raises(DataError, match=r"train/0 has the answer .*, which math-verify cannot read; mend it"):
        reward(reference, "72")


def test_a_prompt_without_an_answer_is_refused_before_a_run() -> None:
    with pytest.raises(ConfigError, match=r"train/0 has no answer to compare with; name its column in task\.data"):
        RUBRIC.check(Prompt("train/0", "?", "math"))
    with pytest.raises(ConfigError, match="True, which is neither text nor a number"):
        RUBRIC.check(Prompt("train/0", "?", "math", {"answer": True}))
    with pytest.raises(ConfigError, match="nan, which is neither text nor a number"):
        RUBRIC.check(Prompt("train/0", "?", "math", {"answer": float("nan")}))
    with pytest.raises(ConfigError, match=r"the answer of train/0 is empty"):
        RUBRIC.check(Prompt("train/0", "?", "math", {"answer": " "}))
    RUBRIC.check(Prompt("train/0", "?", "math", {"answer": "72"}))


def test_the_last_closed_box_is_what_counts() -> None:
    assert last_box(r"\boxed{1} \boxed{\frac{1}{2}} \boxed{3") == r"\frac{1}{2}"
    assert last_box(r"\boxed{\{1\}}") == r"\{1\}"
    assert last_box(r"\boxed {1} \fbox{2}") == "2"
    assert last_box("1") is None
    assert expression_of(r"\boxed{1", boxed_only=False) is None
    assert expression_of("x" * 5000 + " 1", boxed_only=False) == "x" * 1998 + " 1"


def test_the_last_turn_is_the_answer() -> None:
    turns = (*answered(r"\boxed{1}"), Turn("environment", r"\boxed{2}"), *answered(r"\boxed{3}"))
    prompt = Prompt("train/0", "?", "math", {"answer": "3"})
    assert RUBRIC.reward(prompt, turns) == 1.0
    assert RUBRIC.reward(prompt, ()) == 0.0


def test_without_the_package_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gspo_moe.packages._is_there", lambda module: False)
    with pytest.raises(ConfigError, match="pip install math-verify"):
        MathAnswer({})
