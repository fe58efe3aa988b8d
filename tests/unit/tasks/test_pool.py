from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from gspo_moe.config.task import RewardConfig, TaskConfig
from gspo_moe.tasks import make_task, workers
from gspo_moe.tasks.pool import Item, TaskPool
from gspo_moe.tasks.protocol import Task, last_answer
from gspo_moe.tasks.rewards import Reward, Step
from gspo_moe.tasks.roster import State
from gspo_moe.tasks.worker import MakeTask, within
from gspo_moe.types import Conversation, Prompt, Turn
from tests.turns import answered

LIMIT = 2.0  # a machine with other work takes one for a crash
PROMPT = Prompt(uid="train/0", text="", task="trouble")
TROUBLE: dict[str, Any] = {
    "none": None,
    "text": "1.0",
    "nan": float("nan"),
    "infinite": float("-inf"),
    "complex": 1j,
    "huge": 10**400,
    "large": 1.1e6,
    "largest": -1e6,
    "digits": 10**5000,
    "negative": -2,
    "true": True,
}

# Two workers, one of which is busy when their trainer goes.
KILLED = """
import multiprocessing, os, signal, threading, time
from gspo_moe.config.task import RewardConfig, TaskConfig
from gspo_moe.tasks.pool import Item, TaskPool
from tests.unit.tasks.test_pool import answers, make_trouble

if __name__ == "__main__":
    pool = TaskPool(TaskConfig(reward=RewardConfig(workers=2, timeout_seconds=600)), seed=1, make=make_trouble)
    assert [reward.total for reward in pool.rewards(answers("1", "2"))] == [1.0, 2.0]
    threading.Thread(target=pool.rewards, args=(answers("hang"),), daemon=True).start()
    time.sleep(0.5)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}


HUGE = b"x" * 2_000_000


def _fork() -> float:
    """The child comes back from the reward too."""
    os.fork()
    return 1.0


def _close() -> float:
    sys.stdout.close()
    os.close(2)
    return 1.0


def _print() -> float:
    os.write(1, b"first\n" + HUGE)
    print("last")
    return 1.0


def _recurse(depth: int = 0) -> float:
    return _recurse(depth + 1)


def _raise(error: BaseException) -> float:
    raise error


def _leave() -> float:
    """Ends its worker, but not the child that it has started."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    os._exit(0)


def _scribble() -> float:
    """Writes a message that is none into its worker's pipe, the only socket that it has."""
    for number in map(int, os.listdir("/proc/self/fd")):
        if os.path.exists(f"/proc/self/fd/{number}") and stat.S_ISSOCK(os.fstat(number).st_mode):
            os.write(number, struct.pack("!i", 3) + b"abc")
    return 1.0


class Unsent:
    """No process can be sent it."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot be sent")


class Unread:
    """No process can read it."""

    def __reduce__(self) -> Any:
        return _raise, (TypeError("cannot be read"),)


# What a reward does, and what its error says; None where it is a reward of 1.
KINDS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "forks": (_fork, None),
    "closes": (_close, None),
    "prints": (_print, None),
    "a scalar": (lambda: np.float32(1.0), None),
    "an array": (lambda: np.ones(1), "reward gave array([1.]), which is no number"),
    "leaves": (_leave, "its worker ended with exit code 0"),
    "is killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "its worker was ended by SIGKILL"),
    "is killed without a name": (lambda: os.kill(os.getpid(), 40), "its worker was ended by signal 40"),
    "scribbles": (_scribble, "its worker said what is no message (UnpicklingError"),
    "stops": (lambda: os.kill(os.getpid(), signal.SIGSTOP), "no reward within task.reward.timeout_seconds"),
    "grows": (lambda: bytearray(1 << 30), "MemoryError\n(more than task.reward.memory_mb lets a worker have)"),
    "recurses": (_recurse, "RecursionError: maximum recursion depth"),
    "interrupts": (lambda: _raise(KeyboardInterrupt("now")), "KeyboardInterrupt: now"),
    "ends": (lambda: _raise(BaseException("at all")), "BaseException: at all"),
    "tells": (lambda: _raise(ValueError("x" * 10**6)), "characters left out"),
}


class Trouble:
    """Does what the policy says last, in the worker; a number is its own reward, and what the environment says."""

    def prompt(self, split: str, index: int) -> Prompt:
        return PROMPT

    def size(self, split: str) -> None:
        return None

    def reward(self, prompt: Prompt, turns: Conversation) -> Any:
        answer = last_answer(turns)
        if answer in KINDS:
            return KINDS[answer][0]()
        if answer == "hang":
            time.sleep(3600)
        if answer == "crash":
            os._exit(3)
        if answer == "exit":
            sys.exit(0)
        if answer == "raise":
            raise ValueError("no such luck")
        if answer == "torch":
            return float("torch" in sys.modules)
        if answer.startswith("/"):
            Path(answer).touch()
            return 1.0
        return TROUBLE[answer] if answer in TROUBLE else float(answer)

    def reset(self, prompt: Prompt) -> str:
        return f"{prompt.uid} begins"

    def step(self, prompt: Prompt, turns: Conversation) -> Any:
        said = self.reward(prompt, turns)
        return f"{len(turns)} turns, {said}" if isinstance(said, float) else said


def make_trouble(config: TaskConfig, seed: int) -> Task:
    return Task("trouble", prompts=Trouble(), rubric=Trouble(), environment=Trouble())


def make_nothing(config: TaskConfig, seed: int) -> Task:
    raise RuntimeError("this worker cannot start")


def make_slowly(config: TaskConfig, seed: int) -> Task:
    time.sleep(3600)
    raise AssertionError


def make_and_end(config: TaskConfig, seed: int) -> Task:
    os._exit(7)


@pytest.fixture(scope="module")
def bystanders() -> set[int | None]:
    """Child processes that are not the pool's: checkpoints leave a server behind."""
    return {process.pid for process in multiprocessing.active_children()}


@pytest.fixture(scope="module")
def pool(bystanders: set[int | None]) -> Iterator[TaskPool]:
    reward = RewardConfig(workers=2, timeout_seconds=LIMIT, failure_reward=-1.0, memory_mb=256, output_kb=1)
    with TaskPool(TaskConfig(name="trouble", reward=reward), seed=1, make=make_trouble) as pool:
        yield pool


def answers(*texts: str) -> list[Item]:
    return [
        (Prompt(uid=f"train/{number}", text="", task="trouble"), answered(text)) for number, text in enumerate(texts)
    ]


def totals(rewards: list[Reward]) -> list[float]:
    return [reward.total for reward in rewards]


def failures(results: Sequence[Reward | Step]) -> list[int]:
    """Which of the results are errors."""
    return [number for number, result in enumerate(results) if result.error is not None]


def test_rewards_come_in_order_of_the_items(pool: TaskPool) -> None:
    rewards = pool.rewards(answers(*(str(number / 7) for number in range(300))))
    assert rewards == [Reward(number / 7) for number in range(300)]


def test_an_empty_batch_is_empty(pool: TaskPool) -> None:
    assert pool.rewards([]) == []
    assert pool.steps([]) == []


def test_each_kind_of_nonsense_is_an_error_and_its_neighbours_keep_their_rewards(pool: TaskPool) -> None:
    rewards = pool.rewards(answers("0.5", "raise", *TROUBLE))
    assert totals(rewards) == [0.5, *(-1.0,) * 8, -1e6, -1.0, -2.0, 1.0]
    assert failures(rewards) == [*range(1, 9), 10]
    assert not any(reward.timed_out for reward in rewards)
    assert (
        rewards[10].error == "train/10: reward gave an int of 16610 bits, which is no number from -1000000 to 1000000"
    )
    error = str(rewards[1].error)
    assert error.startswith("train/1: Traceback (most recent call last):\n")
    assert error.count('  File "') == 1
    assert error.endswith('raise ValueError("no such luck")\nValueError: no such luck')


def test_a_reward_beyond_the_largest_says_so(pool: TaskPool) -> None:
    assert "1100000.0, which is no number from -1000000 to 1000000" in str(pool.rewards(answers("large"))[0].error)


def test_an_environment_begins_answers_and_ends_a_conversation(pool: TaskPool) -> None:
    two = (*answered("1"), Turn("environment", "go on"), *answered("7"))
    (prompt, one), (_, end) = answers("3", "none")
    found = pool.steps([(prompt, ()), (prompt, one), (prompt, two), (prompt, end)])
    assert found == [Step("train/0 begins"), Step("1 turns, 3.0"), Step("3 turns, 7.0"), Step(None)]


def test_steps_that_fail_are_errors_and_spare_the_rest_of_their_group(pool: TaskPool) -> None:
    texts = [str(number) for number in range(40)]
    texts[2], texts[20], texts[33], texts[34] = "hang", "crash", "raise", "negative"
    found = pool.steps(answers(*texts))
    assert failures(found) == [2, 20, 33, 34]
    assert [step.text for step in found] == [
        None if number in (2, 20, 33, 34) else f"1 turns, {number}.0" for number in range(40)
    ]
    assert found[2] == Step(None, f"train/2: no step within task.reward.timeout_seconds={LIMIT:g}", timed_out=True)
    assert str(found[33].error).endswith("ValueError: no such luck")
    assert found[34].error == "train/34: step gave -2, which is neither text nor None"


def test_no_worker_outlives_a_trainer_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(KILLED)
    trainer = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert trainer.returncode == -signal.SIGKILL
    workers = [psutil.Process(int(pid)) for pid in trainer.stdout.split() if psutil.pid_exists(int(pid))]
    assert psutil.wait_procs(workers, timeout=5)[1] == []


def test_signals_to_the_trainers_group_spare_its_workers(pool: TaskPool, bystanders: set[int | None]) -> None:
    def running() -> list[int]:
        children = {process.pid for process in multiprocessing.active_children()}
        return sorted(pid for pid in children - bystanders if pid is not None)

    assert totals(pool.rewards(answers("1", "2"))) == [1.0, 2.0]
    workers = running()
    for worker in workers:
        assert os.getsid(worker) == worker
        os.kill(worker, signal.SIGUSR1)
    assert totals(pool.rewards(answers("1", "2"))) == [1.0, 2.0]
    assert running() == workers


def test_hangs_and_crashes_spare_the_rest_of_their_group(pool: TaskPool) -> None:
    texts = [str(number) for number in range(40)]
    texts[2], texts[20], texts[21], texts[33] = "hang", "crash", "exit", "raise"
    rewards = pool.rewards(answers(*texts))
    expected = [float(number) for number in range(40)]
    for number in (2, 20, 21, 33):
        expected[number] = -1.0
    assert totals(rewards) == expected
    assert failures(rewards) == [2, 20, 21, 33]
    assert rewards[2] == Reward(
        -1.0, {}, f"train/2: no reward within task.reward.timeout_seconds={LIMIT:g}", timed_out=True
    )
    assert [number for number, reward in enumerate(rewards) if reward.timed_out] == [2]


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < deadline, f"nobody made {file}"
        time.sleep(0.01)


def test_a_group_starts_with_its_last_conversation(pool: TaskPool, tmp_path: Path) -> None:
    marks = [str(tmp_path / str(number)) for number in range(16)]  # in groups of two for each of two workers
    items = answers(*marks)
    over = pool.begin([prompt for prompt, _ in items])
    for number in (5, 0, 4):
        over(number, items[number][1])
    wait_for(tmp_path / "5")
    wait_for(tmp_path / "4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]
    (tmp_path / "4").unlink()  # and nobody makes it again
    assert totals(pool.rewards(items)) == [1.0] * 16
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [n for n in range(16) if n != 4]


def test_conversations_told_of_early_have_the_rewards_of_those_told_of_late(pool: TaskPool) -> None:
    texts = [str(number) for number in range(24)]
    texts[2], texts[8], texts[9], texts[15] = "hang", "crash", "none", "raise"
    items = answers(*texts)
    expected = pool.rewards(items)
    over = pool.begin([prompt for prompt, _ in items])
    for number in range(20):
        over(number, items[number][1])
    found = pool.rewards(items)
    assert totals(found) == totals(expected)
    assert [one.timed_out for one in found] == [one.timed_out for one in expected]
    assert failures(found) == failures(expected) == [2, 8, 9, 15]


def test_rewards_that_were_begun_are_given_again_after_the_workers_end(pool: TaskPool) -> None:
    items = answers(*map(str, range(16)))
    over = pool.begin([prompt for prompt, _ in items])
    for number in range(8):
        over(number, items[number][1])
    pool.close()
    assert totals(pool.rewards(items)) == [float(number) for number in range(16)]


def test_several_batches_are_begun_at_a_time_and_some_of_them_forgotten(pool: TaskPool) -> None:
    items = answers(*map(str, range(12)))
    batches = [items[:4], items[4:8], items[8:]]
    overs = [pool.begin([prompt for prompt, _ in batch]) for batch in batches]
    for number in range(4):
        for over, batch in zip(overs, batches, strict=True):
            over(number, batch[number][1])
    pool.forget([prompt for prompt, _ in batches[1]])
    assert totals(pool.rewards(batches[2])) == [8.0, 9.0, 10.0, 11.0]
    assert totals(pool.rewards(batches[0])) == [0.0, 1.0, 2.0, 3.0]
    assert totals(pool.rewards(batches[1])) == [4.0, 5.0, 6.0, 7.0], "given again"


def test_a_crash_says_how_the_worker_ended(pool: TaskPool) -> None:
    assert pool.rewards(answers("crash"))[0].error == "train/0: its worker ended with exit code 3"


def test_whatever_a_reward_does_costs_itself_alone(
    pool: TaskPool, bystanders: set[int | None], capfd: pytest.CaptureFixture[str]
) -> None:
    here = psutil.Process()
    texts = [text for number, kind in enumerate(KINDS) for text in (str(number), kind)]
    rewards = pool.rewards(answers(*texts))
    for number, (kind, (_, error)) in enumerate(KINDS.items()):
        good, bad = rewards[2 * number : 2 * number + 2]
        assert (good.total, good.error) == (float(number), None), f"beside {kind}"
        assert (bad.total, bad.error is None) == ((1.0, True) if error is None else (-1.0, False)), (kind, bad.error)
        assert error is None or error in str(bad.error)
        assert len(str(bad.error)) < 11_000
    said = capfd.readouterr().err
    assert len(said) < 2_000
    assert "bytes that rewards printed are left out (task.reward.output_kb)" in said
    _, alive = psutil.wait_procs([one for one in here.children(recursive=True) if "time.sleep(3600)" in _line(one)], 5)
    assert alive == [], "what a reward starts ends with its worker"
    assert totals(pool.rewards(answers("1", "closes", "prints", "2"))) == [1.0, 1.0, 1.0, 2.0]


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_what_no_process_can_be_sent_or_can_read_costs_itself_alone(pool: TaskPool) -> None:
    def holding(value: object, text: str) -> Item:
        return Prompt(uid="train/0", text="", task="trouble", reference={"value": value}), answered(text)

    items = answers(*map(str, range(40)))
    items[2], items[20] = holding(Unsent(), "2"), holding(Unread(), "20")
    rewards = pool.rewards(items)
    assert totals(rewards) == [-1.0 if number in (2, 20) else float(number) for number in range(40)]
    assert rewards[2].error == "train/0: TypeError: cannot be sent"
    assert str(rewards[20].error).endswith("TypeError: cannot be read")
    assert failures(pool.rewards([holding(Unsent(), "1")] * 5)) == [0, 1, 2, 3, 4], "more than there are workers"


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 1_000_000])
def test_a_worker_that_is_stopped_before_it_has_read_its_items_costs_none_of_them(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in the pipe, or more than it holds."""
    others = {one.pid for one in multiprocessing.active_children()}
    monkeypatch.setattr(workers, "PIPE_TIMEOUT", (0, 300_000))
    reward = RewardConfig(workers=2, timeout_seconds=LIMIT, start_seconds=600.0)
    with TaskPool(TaskConfig(reward=reward), seed=1, make=make_trouble) as pool:
        assert totals(pool.rewards(answers("1", "2"))) == [1.0, 2.0]
        assert pool._workers is not None
        members = pool._workers._roster.members
        while any(one.state is not State.IDLE for one in list(members.values())):
            time.sleep(0.05)
        before = {one.pid for one in multiprocessing.active_children()} - others
        for pid in before:
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
        large = [(replace(prompt, text="x" * size), turns) for prompt, turns in answers("3", "4", "5")]
        assert totals(pool.rewards(large)) == [3.0, 4.0, 5.0]
        assert not before & {one.pid for one in multiprocessing.active_children()}


def test_a_pipe_whose_other_end_stops_in_a_message_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PIPE_TIMEOUT", (0, 10_000))
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        workers._limit_waits(ours)
        with pytest.raises(BlockingIOError):
            ours.send_bytes(HUGE)
        os.write(theirs.fileno(), struct.pack("!i", 3) + b"a")
        with pytest.raises(BlockingIOError):
            ours.recv_bytes()


def test_workers_do_not_import_torch(pool: TaskPool) -> None:
    assert totals(pool.rewards(answers("torch"))) == [0.0]


@pytest.mark.parametrize("seconds_to_notice", [0.0, 0.5])
def test_the_pool_survives_workers_killed_while_idle(
    pool: TaskPool, bystanders: set[int | None], seconds_to_notice: float
) -> None:
    assert totals(pool.rewards(answers("1"))) == [1.0]
    for worker in multiprocessing.active_children():
        if worker.pid not in bystanders:
            worker.kill()
    time.sleep(seconds_to_notice)
    assert pool.rewards(answers("0.25", "0.5")) == [Reward(0.25), Reward(0.5)]


def test_closing_ends_busy_workers_and_a_later_batch_starts_new_ones() -> None:
    reward = RewardConfig(timeout_seconds=LIMIT)
    pool = TaskPool(TaskConfig(reward=reward), seed=1, make=make_trouble)
    before = {process.pid for process in multiprocessing.active_children()}
    assert totals(pool.rewards(answers("1"))) == [1.0]
    pool.close()
    pool.close()
    assert {process.pid for process in multiprocessing.active_children()} == before
    assert totals(pool.rewards(answers("1"))) == [1.0]
    pool.close()


def test_workers_that_cannot_start_fail_their_items_and_end() -> None:
    more_than_a_pipe_holds = "1" * 100_000
    with TaskPool(TaskConfig(), seed=1, make=make_nothing) as pool:
        rewards = pool.rewards(answers(*[more_than_a_pipe_holds] * 3))
    assert (totals(rewards), failures(rewards)) == ([0.0] * 3, [0, 1, 2])
    assert "no worker can make its task: Traceback" in str(rewards[0].error)
    assert str(rewards[0].error).endswith("RuntimeError: this worker cannot start")


@pytest.mark.parametrize(
    ("make", "limits", "error"),
    [
        (make_and_end, {}, "its worker ended with exit code 7"),
        (make_slowly, {"start_seconds": 1.0}, "no worker has made its task within task.reward.start_seconds=1"),
        (make_slowly, {"batch_seconds": 1.0}, "no reward within task.reward.batch_seconds=1, of all 3"),
    ],
)
def test_workers_that_never_start_fail_their_items_within_a_limit(
    make: MakeTask, limits: dict[str, float], error: str
) -> None:
    reward = RewardConfig(workers=2, timeout_seconds=1.0, **limits)
    with TaskPool(TaskConfig(reward=reward), seed=1, make=make) as pool:
        rewards = pool.rewards(answers("1", "2", "3"))
    assert [error in str(one.error) for one in rewards] == [True] * 3
    assert {one.timed_out for one in rewards} == {"batch_seconds" in limits}


@pytest.mark.parametrize(("owner", "name"), [(SpawnProcess, "start"), (SpawnContext, "Pipe")])
def test_where_the_system_gives_no_process_items_fail_after_three_tries(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    tries = list[object]()

    def refuse(one: object, duplex: bool = True) -> None:
        tries.append(one)
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr(workers, "LOOK_SECONDS", 0.01)
    with TaskPool(TaskConfig(), seed=1, make=make_trouble) as pool:
        error = pool.rewards(answers("1"))[0].error
    assert error == "train/0: no process for a worker ([Errno 11] Resource temporarily unavailable)"
    assert len(tries) in (3, 4), "one may come before the first batch"


def test_a_largest_reward_of_ones_own() -> None:
    assert RewardConfig(largest=2.0, failure_reward=-2.0).largest == 2.0
    assert within(Reward(-2.0, {"words": 500.0}), 2.0) == Reward(-2.0, {"words": 500.0})
    assert within(Reward(2.5), 2.0) == "reward gave 2.5, which is larger than task.reward.largest=2 in size"
    with pytest.raises(ValueError, match=r"task\.reward\.failure_reward=-3 is larger than task\.reward\.largest=2"):
        RewardConfig(largest=2.0, failure_reward=-3.0)


def test_real_tasks_give_rewards_and_a_runaway_expression_is_cut_off() -> None:
    config = TaskConfig(name="reasoning_gym/countdown", reward=RewardConfig(timeout_seconds=LIMIT))
    task = make_task(config, seed=4)
    prompts = [task.prompts.prompt("train", index) for index in range(2)]
    items = [(prompt, answered(task.demonstration(prompt))) for prompt in prompts]
    items.append((prompts[0], answered("9**9**9**9")))
    with TaskPool(config, seed=4) as pool:
        rewards = pool.rewards(items)
    assert totals(rewards) == [1.0, 1.0, 0.0]
    assert [(reward.error is None, reward.timed_out) for reward in rewards] == [(True, False)] * 2 + [(False, True)]
