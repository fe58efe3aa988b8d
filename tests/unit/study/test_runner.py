"""Jobs are small scripts here: what they are told to do is their arguments."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from gspo_moe.errors import ConfigError
from gspo_moe.study.cells import Job
from gspo_moe.study.runner import Outcome, Running, last_words, run_jobs, slots

SCRIPT = """
import os, subprocess, sys, time
done, action = sys.argv[1:]
if action == "fail":
    print("no room"); sys.exit(3)
if action == "hang":
    child = subprocess.Popen(["sleep", "60"])
    open(done + ".child", "w").write(str(child.pid))
    time.sleep(60)
open(done, "w").write(os.environ["OMP_NUM_THREADS"] if action == "make" else action)
"""


class Jobs:
    def __init__(self, folder: Path) -> None:
        self.folder, self.most = folder, 0
        self.script = folder / "script.py"
        self.script.write_text(SCRIPT)

    def job(self, name: str, action: str = "make", needs: Sequence[str] = ()) -> Job:
        product = self.folder / f"{name}.done"
        wanted = tuple(self.folder / f"{need}.done" for need in needs)
        return Job(name, (str(product), action), self.folder / name, product, wanted)

    def run(self, jobs: Sequence[Job], at_once: int) -> Outcome:
        def watch(running: Sequence[Running], _: Outcome) -> None:
            self.most = max(self.most, len(running))

        return run_jobs(jobs, 1, at_once, watch, program=(str(self.script),))


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    monkeypatch.setattr("gspo_moe.study.runner.POLL_SECONDS", 0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return Jobs(tmp_path)


def titles(jobs: Sequence[Job]) -> list[str]:
    return [job.title for job in jobs]


def test_each_runs_after_what_it_needs_and_few_at_once(jobs: Jobs) -> None:
    start = jobs.job("start")
    cells = [jobs.job(f"cell{n}", needs=("start",)) for n in range(5)]
    outcome = jobs.run([start, *cells], at_once=2)
    assert outcome.finished[0] is start
    assert sorted(titles(outcome.finished)) == sorted(titles([start, *cells]))
    assert jobs.most == 2
    assert start.product.stat().st_mtime_ns <= min(cell.product.stat().st_mtime_ns for cell in cells)


def test_finished_jobs_are_not_run_again(jobs: Jobs) -> None:
    jobs.run([jobs.job("a")], at_once=1)
    outcome = jobs.run([jobs.job("a", "second time"), jobs.job("b")], at_once=1)
    assert sorted(titles(outcome.finished)) == ["a", "b"]
    assert (jobs.folder / "a.done").read_text() != "second time"


def test_a_failure_leaves_the_others_and_skips_what_needs_it(jobs: Jobs) -> None:
    outcome = jobs.run([jobs.job("bad", "fail"), jobs.job("good"), jobs.job("after", needs=("bad",))], at_once=1)
    assert (titles(outcome.finished), titles(outcome.failed), titles(outcome.skipped)) == (["good"], ["bad"], ["after"])
    assert last_words(jobs.folder / "bad") == "no room"
    assert not (jobs.folder / "after.done").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_takes_whole_process_groups_down(
    number: signal.Signals, jobs: Jobs, request: pytest.FixtureRequest
) -> None:
    child = jobs.folder / "slow.done.child"
    if number == signal.SIGINT:  # which a shell has what it starts in its background ignore
        before = signal.signal(number, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(number, before))

    def interrupt() -> None:
        while not child.exists() or not child.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        jobs.run([jobs.job("slow", "hang")], at_once=1)
    stat = Path(f"/proc/{child.read_text()}/stat")
    deadline = time.monotonic() + 5
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the child of the job still runs"
        time.sleep(0.02)


def test_each_job_gets_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,4,5,6")
    assert slots(2, None) == [("0", "1"), ("4", "5")]
    assert slots(1, 2) == [("0",), ("1",)]
    for processes, at_once in ((2, 3), (6, None)):
        with pytest.raises(ConfigError, match="5 are visible; lower one"):
            slots(processes, at_once)
