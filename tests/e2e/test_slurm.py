"""launch/slurm.sbatch on a Slurm of this one machine: warned, preempted, or with its node lost, a job goes on."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import FinishedRun
from tests.e2e.faults import Job
from tests.e2e.program import ROOT

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
# Two partitions over the one node: jobs of `high` take it from those of `low`, which get a time of grace.
CONF = """
ClusterName=gspo_moe
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
NodeName={host} CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes={host} State=UP PriorityTier=10 PreemptMode=OFF
"""

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Cluster:
    folder: Path

    def call(self, *command: str | Path, **environment: str) -> str:
        given = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), **environment}
        done = subprocess.run([str(word) for word in command], env=given, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        shown = dict(word.split("=", 1) for word in self.call("scontrol", "show", "job", job).split() if "=" in word)
        return shown[name]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root and {', '.join(NEEDED)}: apt-get install slurm-wlm munge")
    folder, host = tmp_path / "slurm", socket.gethostname().partition(".")[0]
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True)
    conf = CONF.format(host=host, folder=folder, ports=free_ports(2), cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(conf)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    files = [f"--{name}={folder / 'munge' / name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    commands = (
        ["munged", "--foreground", "--force", f"--key-file={key}", *files],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-c"],
    )
    daemons = []
    with (folder / "log").open("w") as log:
        for command in commands:
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(1.0)
    try:
        made = Cluster(folder)
        wait_for(lambda: "idle" in made.call("sinfo", "--noheader", "--format=%T"), 60)
        yield made
        made.call("scancel", "--user=root")
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def wait_for(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def submit(cluster: Cluster, job: Job, log: Path) -> str:
    """The number of a Slurm job of both ranks on the one node."""
    one_node = ("--gpus-per-node=0", f"--cpus-per-task={os.cpu_count()}")
    output = (f"--output={log}", f"--export=ALL,RANK_LOGS={log.with_name('ranks')}")
    script = ("launch/slurm.sbatch", "--nproc-per-node", "2", "--", *job.arguments("logging.progress=true"))
    return cluster.call("sbatch", "--parsable", *one_node, *output, *script)


def is_on_the_node(submitted: str) -> bool:
    commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return any(command.startswith(f"slurmstepd: [{submitted}.") for command in commands)


def is_put_back(cluster: Cluster, submitted: str, restarts: int) -> None:
    """Into the queue, so many times by now; it starts again soon, and not after Slurm's two minutes."""
    wait_for(lambda: cluster.field(submitted, "Restarts") == str(restarts))
    wait_for(lambda: cluster.field(submitted, "JobState") == "PENDING")
    wait_for(lambda: not is_on_the_node(submitted))
    # Not at once: a node refuses a job that starts in the second in which it was killed.
    cluster.call("scontrol", "update", f"JobId={submitted}", "StartTime=now+3")


def test_a_job_that_is_warned_and_preempted_goes_on(cluster: Cluster, quickstart: FinishedRun, tmp_path: Path) -> None:
    job, log = Job(tmp_path / "run", quickstart), tmp_path / "job.log"
    submitted = submit(cluster, job, log)

    def warn() -> None:
        cluster.call("scancel", "--batch", "--signal=USR1", submitted)

    def preempt() -> None:
        cluster.call("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")

    def preempt_at_once() -> None:
        cluster.call("scontrol", "update", "PartitionName=low", "GraceTime=0")
        preempt()

    for restarts, (step, fault) in enumerate(((1, warn), (3, preempt), (5, preempt_at_once)), start=1):
        wait_for(lambda step=step: job.has_step(step))  # type: ignore[misc]
        fault()
        is_put_back(cluster, submitted, restarts)
    wait_for(lambda: cluster.field(submitted, "JobState") == "COMPLETED")
    job.check()
    said = log.read_text()
    assert said.count("slurm.sbatch: back into the queue, to go on from the last checkpoint") == 2
    assert said.count("] continuing from step ") == 3
    assert said.count("ended by SIGUSR1.") == 1
    assert said.count("ended by SIGTERM.") == 2  # without grace there are still the 30 s of KillWait before SIGKILL
    assert "Traceback" not in said
    written = sorted(path.parent.name for path in (tmp_path / "ranks").rglob("stderr.log"))
    assert written == ["0"] * 4 + ["1"] * 4


def test_a_job_whose_node_is_lost_goes_on(cluster: Cluster, quickstart: FinishedRun, tmp_path: Path) -> None:
    job, log = Job(tmp_path / "run", quickstart), tmp_path / "job.log"
    submitted = submit(cluster, job, log)
    wait_for(lambda: job.has_step(2))
    node = f"NodeName={cluster.field(submitted, 'NodeList')}"
    cluster.call("scontrol", "update", node, "State=DOWN", "Reason=test")
    is_put_back(cluster, submitted, 1)  # and the node, which speaks, is taken back
    wait_for(lambda: cluster.field(submitted, "JobState") == "COMPLETED")
    job.check()
    assert log.read_text().count("] continuing from step ") == 1
