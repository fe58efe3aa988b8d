"""Steps learn from answers that servers sampled while others trained: how old they are, that none is lost or doubled.

Time is simulated: servers take what a script says, and nothing sleeps.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from gspo_moe.config import load_config
from gspo_moe.data.prompts import PromptPosition, PromptSource
from gspo_moe.data.rendering import Renderer
from gspo_moe.errors import Interrupted, RolloutError
from gspo_moe.observability.timers import Timers
from gspo_moe.rollout.answers import Answerer
from gspo_moe.rollout.queue import GroupQueue, Pace, lags
from gspo_moe.rollout.servers.ahead import ServerSource
from gspo_moe.rollout.servers.counters import server_metrics
from gspo_moe.rollout.servers.records import Ask
from gspo_moe.tasks.pool import Item
from gspo_moe.types import Conversation, Prompt, Reward, RolloutGroup
from tests.simulated import PROMPT, STOP, Clock, Endless, Letters, SimulatedServers, log_prob, route, token

SEED, COUNT, SAMPLES, UPDATES, LIMIT = 5, 3, 2, 4, 40  # prompts a step, answers each, updates a step, answer's tokens


class Pool:
    """Rewards an answer with its length, once it was told that each answer to its prompt is over."""

    def __init__(self) -> None:
        self.begun: dict[str, dict[int, Conversation]] = {}

    def begin(self, prompts: Sequence[Prompt]) -> Callable[[int, Conversation], None]:
        (uid,) = {prompt.uid for prompt in prompts}
        assert uid not in self.begun, "begun twice"
        told = self.begun[uid] = {}

        def over(index: int, turns: Conversation) -> None:
            assert self.begun.get(uid) is told, "an answer that was given up ended"
            assert index not in told
            told[index] = turns

        return over

    def rewards(self, items: Sequence[Item]) -> list[Reward]:
        told = self.begun.pop(items[0][0].uid)
        assert [told[number] for number in range(SAMPLES)] == [turns for _, turns in items]
        return [Reward(float(turns[-1].tokens)) for _, turns in items]

    def forget(self, prompts: Sequence[Prompt]) -> None:
        del self.begun[prompts[0].uid]


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("queue", "servers.ahead"):
        monkeypatch.setattr(f"gspo_moe.rollout.{module}.gather_objects", lambda value, group=None: [value])
    for module in ("answers", "servers.ahead"):
        monkeypatch.setattr(f"gspo_moe.rollout.{module}.raise_everywhere", raised)


def raised(error: Exception | None) -> None:
    if error is not None:
        raise error


@dataclass
class Script:
    """steps: of the whole run. length, pace, slots: see `SimulatedServers`."""

    steps: int
    max_staleness: int
    length: Callable[[str, int], int]
    pace: Callable[[Ask], float]
    stragglers: str = "wait"
    slots: int = 1000


@dataclass
class Saved:
    """What a checkpoint has."""

    step: int = 0
    position: PromptPosition = field(default_factory=PromptPosition)


@dataclass
class Run:
    """One start of a run, from where a checkpoint left it."""

    script: Script
    saved: Saved
    clock: Clock = field(default_factory=Clock)
    stop: Any = field(default_factory=lambda: SimpleNamespace(check=lambda: None))
    figures: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        script, one = self.script, SimpleNamespace(rank=lambda: 0, size=lambda: 1)
        self.servers = SimulatedServers(self.clock, script.length, script.pace, self.saved.step * UPDATES, script.slots)
        groups: Any = SimpleNamespace(data_context=one, model=one)
        engine, tokenizer, self.pool = SimpleNamespace(room=lambda params: 9), Letters(), Pool()
        answerer: Any = Answerer(engine, Renderer(tokenizer), self.pool, groups)  # type: ignore[arg-type]
        sizes = f"prompts_per_step: {COUNT}, samples_per_prompt: {SAMPLES}, max_response_tokens: {LIMIT}"
        config = load_config(None, [f"rollout={{{sizes}}}", "algorithm.mini_batches=1", f"seed={SEED}"])
        self.source = ServerSource(
            self.servers,
            answerer,
            config,
            frozenset({STOP}),
            Timers(lambda: None),
            self.stop,
            wait=lambda condition, seconds: self.clock.step(),
        )
        self.prompts = PromptSource(Endless(), "train", self.saved.position)
        drops = script.stragglers == "drop"
        pace = Pace(COUNT, script.steps, UPDATES, script.max_staleness, drops)
        self.queue = GroupQueue(self.prompts, self.source, pace, one, self.source)  # type: ignore[arg-type]
        self.step = self.saved.step

    def take(self) -> list[RolloutGroup]:
        """The groups of the next step."""
        groups = self.queue.draw(self.step, self.step * UPDATES)
        self.figures.append(self.queue.figures() | server_metrics([self.servers.take_counters()], [1]))
        return groups

    def learn(self, groups: list[RolloutGroup], seconds: float) -> Saved:
        """Trains so long, and publishes; what a checkpoint would have."""
        self.clock.run(seconds)
        self.prompts.done(group.prompt for group in groups)
        self.step += 1
        saved = Saved(self.step, self.prompts.position)
        self.servers.publish(self.step * UPDATES)
        return saved


def check_tokens(group: RolloutGroup) -> None:
    """Each token, its log-prob and its routes are those of the version that its rollout says sampled it."""
    for one in group.rollouts:
        versions = [version for version, count in one.versions for _ in range(count)]
        assert len(versions) == len(one.log_probs) == len(one.token_ids) - PROMPT
        assert all(a != b for (a, _), (b, _) in pairwise(one.versions))
        sampled = one.token_ids[PROMPT:]
        expected = [token(one.uid, one.sample_index, place, version) for place, version in enumerate(versions)]
        if one.finish == "stop":
            expected[-1] = STOP
        assert list(sampled) == expected
        found = zip(sampled, versions, strict=True)
        assert list(one.log_probs) == [log_prob(ids, place, version) for place, (ids, version) in enumerate(found)]
        assert one.routes is not None
        drawn_by = [versions[0]] * (PROMPT - 1) + versions  # row t is of the pass that token t + 1 was drawn from
        assert one.routes.tolist() == [route(t, version) for t, version in enumerate(drawn_by)]
        assert one.total_reward == len(sampled) == one.turns[0].tokens


def scripted(seed: int, max_staleness: int, stragglers: str) -> tuple[Script, random.Random]:
    """Answers of 1 to 50 tokens, some cut off at the limit, some of a prompt far slower than others."""
    drawn = random.Random(seed)

    def of(uid: str, sample: int) -> random.Random:
        return random.Random(f"{seed}/{uid}/{sample}")

    slow = drawn.choice([1.0, 5.0, 60.0])
    return (
        Script(
            steps=drawn.randint(1, 12),
            max_staleness=max_staleness,
            length=lambda uid, sample: of(uid, sample).randint(1, 50),
            pace=lambda ask: of(ask.uid, ask.sample_index).choice([0.05, 0.1, 0.1 * slow]),
            stragglers=stragglers,
            slots=drawn.choice([3, 8, 1000]),
        ),
        drawn,
    )


@pytest.mark.parametrize("stragglers", ["wait", "drop"])
@pytest.mark.parametrize("max_staleness", [1, 2, 4])
@pytest.mark.parametrize("seed", range(20))
def test_no_token_is_older_than_allowed_and_each_prompt_is_learnt_once_over_kills(
    seed: int, max_staleness: int, stragglers: str
) -> None:
    script, drawn = scripted(seed, max_staleness, stragglers)
    saved, learnt = Saved(), list[list[str]]()
    while saved.step < script.steps:
        run, kill_at = Run(script, saved), drawn.choice([None, *range(saved.step, script.steps)])
        del learnt[saved.step :]
        while run.step < script.steps:
            groups = run.take()
            if run.step == kill_at:  # in the midst of the step, whose work is lost
                break
            for group in groups:
                check_tokens(group)
            assert max(lag for lag, _ in lags(groups, run.step * UPDATES, UPDATES)) <= max_staleness
            assert min(lag for lag, _ in lags(groups, run.step * UPDATES, UPDATES)) >= 0
            assert len(groups) == COUNT
            at_hand = run.figures[-1]["queue/ready"] + run.figures[-1]["queue/running"]
            assert at_hand == COUNT * min(max_staleness, script.steps - 1 - run.step), "the buffer is bounded"
            newest = run.learn(groups, drawn.uniform(0.0, 6.0))
            learnt.append([group.prompt.uid for group in groups])
            if drawn.random() < 0.5:
                saved = newest
        else:
            saved = newest
            assert not run.pool.begun
            assert saved.position == PromptPosition(COUNT * script.steps)
            assert stragglers == "drop" or not sum(each["queue/dropped"] for each in run.figures)
    flat = [uid for step in learnt for uid in step]
    assert Counter(flat) == Counter(map(str, range(COUNT * script.steps)))
    if stragglers == "wait":
        assert flat == [str(index) for index in range(COUNT * script.steps)], "in the order of the prompts"


def steady(max_staleness: int, **more: Any) -> Script:
    """Answers of 10 tokens; what servers sample at once is one step's, which takes 5 seconds."""
    return Script(8, max_staleness, lambda uid, sample: 10, lambda ask: 0.5, slots=COUNT * SAMPLES, **more)


@pytest.mark.parametrize(("training", "step"), [(5.0, 5.0), (2.0, 5.0), (9.0, 9.0)])
def test_one_step_ahead_a_step_takes_the_longer_of_generation_and_training(training: float, step: float) -> None:
    run, ends = Run(steady(1), Saved()), list[float]()
    for _ in range(8):
        run.learn(run.take(), training)
        ends.append(run.clock.now)
    assert ends[0] == 5.0 + training
    assert [after - before for before, after in pairwise(ends)] == [step] * 7
    idle = [each["queue/idle_seconds"] for each in run.figures]
    assert idle == [0.0] + [max(0.0, training - 5.0)] * 7


def test_on_policy_a_step_takes_the_sum() -> None:
    run = Run(steady(0), Saved())
    for _ in range(7):
        groups = run.take()
        assert {lag for lag, _ in lags(groups, run.step * UPDATES, UPDATES)} == {0}
        run.learn(groups, 2.0)
    assert run.clock.now == 7 * (5.0 + 2.0)
    assert run.figures[-1]["queue/idle_seconds"] == 2.0


def with_a_straggler(stragglers: str) -> tuple[Run, list[list[str]]]:
    """Six steps of 7 seconds, and whose prompts they took: the answers to prompt 1 take 80 seconds, and 5 once it is
    asked for again.
    """
    script = steady(1, stragglers=stragglers)
    script.pace = lambda ask: 8.0 if ask.uid == "1" and ask.params.seed.startswith(f"{SEED}/0") else 0.5
    run, steps = Run(script, Saved()), list[list[str]]()
    for _ in range(6):
        groups = run.take()
        steps.append([group.prompt.uid for group in groups])
        run.learn(groups, 7.0)
    return run, steps


def test_a_straggler_is_waited_for_and_keeps_its_place() -> None:
    run, steps = with_a_straggler("wait")
    assert steps[:2] == [["0", "1", "2"], ["3", "4", "5"]]
    assert run.clock.now >= 80.0
    assert not any(each["queue/dropped"] for each in run.figures)


def test_a_straggler_is_dropped_once_it_is_too_old_and_asked_for_again() -> None:
    run, steps = with_a_straggler("drop")
    assert run.clock.now < 80.0
    # Asked for with version 0, it might be learnt in step 2 at the latest; step 3 has it start over and takes others.
    assert [each["queue/dropped"] for each in run.figures] == [0, 0, 1, 0, 0, 0]
    tokens = run.figures[2]["queue/dropped_tokens"]
    assert 0 < tokens <= 2 * 10
    assert [number for number, step in enumerate(steps, start=1) if "1" in step] == [4]


def test_the_rest_of_a_broken_answer_is_asked_for_with_other_random_numbers() -> None:
    script = Script(2, 1, lambda uid, sample: 50, lambda ask: 1.0, slots=COUNT * SAMPLES)
    run = Run(script, Saved())
    run.learn(run.take(), 10.0)  # in which the second step's answers get 10 of their tokens
    (group,) = [group for group in run.take() if group.prompt.uid == "5"]
    assert [one.versions for one in group.rollouts] == [((0, 10), (UPDATES, LIMIT - 10))] * SAMPLES
    first, rest = [one for one in run.servers.asked if one.uid == "5" and one.sample_index == 1]
    assert (len(first.token_ids), first.max_tokens) == (PROMPT, LIMIT)
    assert (rest.token_ids, rest.max_tokens) == (group.rollouts[1].token_ids[: PROMPT + 10], LIMIT - 10)
    assert rest.params.seed == f"{first.params.seed}/10"


def test_what_a_server_fails_with_ends_the_run_and_a_signal_too() -> None:
    run = Run(steady(1), Saved())
    run.learn(run.take(), 1.0)
    run.servers.fail["4"] = RolloutError("no server answers")
    with pytest.raises(RolloutError, match="no server answers"):
        run.take()

    def stop() -> None:
        raise Interrupted("ended by SIGTERM")

    run = Run(steady(1), Saved(), stop=SimpleNamespace(check=stop))
    with pytest.raises(Interrupted):
        run.take()
    run.source.close()
    assert not run.pool.begun
    run.clock.run(100.0)


def test_a_prompt_that_no_server_has_room_for_is_an_error() -> None:
    run = Run(steady(1), Saved())
    with pytest.raises(RolloutError, match=r"prompt long has 10 tokens.* lower rollout\.max_response_tokens"):
        run.source.ask([Prompt("long", "0123456789", "letters")], 0)


def test_what_breaks_on_the_servers_thread_is_seen() -> None:
    run = Run(steady(0), Saved())
    run.pool.begin = lambda prompts: lambda index, turns: [][index]  # type: ignore[method-assign]
    with pytest.raises(IndexError):
        run.take()
