"""launch/torchrun.sh and launch/slurm.sbatch on two hosts, which are network namespaces joined by a cable."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.e2e.program import ROOT, SMALL_MODEL, SMALL_RL, Program, metrics_by_step

TORCHRUN = ROOT / "launch" / "torchrun.sh"
ONE_STEP = ("parallel.expert=4", "schedule.steps=1", "evaluation.prompts=0", "checkpoint.export_hf=false")
# Arguments, and what the message must hold: what is wrong, and the fix.
REFUSED = (
    ("", "nothing to run; end with -- train CONFIG.yaml"),
    ("--nodes 2 --", "nothing to run; end with -- train CONFIG.yaml"),
    ("train config.yaml", "unknown option train; options come first, and what to run stands behind --"),
    ("--nodes=2 -- train config.yaml", "--nodes 2 needs --rdzv-endpoint HOST:PORT, the same on every host"),
    ("--nodes=1 --max-restarts 1 --tee -- ", "nothing to run; end with -- train CONFIG.yaml"),
    ("--nodes -- train config.yaml", "--nodes stands without its value"),
    ("--nodes two -- train config.yaml", "--nodes two: give a whole number from 1 up"),
    ("--nproc-per-node 0 -- train config.yaml", "--nproc-per-node 0: give a whole number from 1 up"),
    ("--nodes 2 -- train config.yaml", "--nodes 2 needs --rdzv-endpoint HOST:PORT, the same on every host"),
    ("--nodes 2 --rdzv-endpoint 127.0.0.1 -- train config.yaml", "give HOST:PORT of one of the hosts"),
    ("--nodes 2 --rdzv-endpoint none.invalid:1 -- train config.yaml", "give HOST:PORT of one of the hosts"),
    (
        "--nodes 2 --rdzv-endpoint 127.0.0.1:1 --local-addr 198.51.100.7 -- train config.yaml",
        "--local-addr 198.51.100.7 is no address of this host; give one that `ip address` shows",
    ),
)


@dataclass(frozen=True)
class Host:
    """A namespace of that name, which is also its host name."""

    name: str
    address: str

    def command(self, *command: str | Path) -> list[str | Path]:
        named = ["unshare", "--uts", "bash", "-c", 'hostname "$0" && exec "$@"', self.name]
        return ["ip", "netns", "exec", self.name, *named, *command]


def run(command: str) -> None:
    subprocess.run(shlex.split(command), check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts, each with Debian's /etc/hosts: its own name means 127.0.1.1, the other's the other's address."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("two hosts on one machine need root, iproute2 and util-linux")
    made = [Host(f"gspo{os.getpid()}{letter}", f"10.213.7.{number}") for number, letter in ((1, "a"), (2, "b"))]
    try:
        run(f"ip netns add {made[0].name}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine makes no network namespaces: {error.stderr.strip()}")
    try:
        run(f"ip netns add {made[1].name}")
        run(f"ip link add {made[0].name} netns {made[0].name} type veth peer name {made[1].name} netns {made[1].name}")
        for host, other in (made, reversed(made)):
            for command in (
                "link set lo up",
                f"address add {host.address}/24 dev {host.name}",
                f"link set {host.name} up",
                f"route add default dev {host.name}",
            ):
                run(f"ip -n {host.name} {command}")
            folder = Path("/etc/netns") / host.name
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{other.address} {other.name}\n")
        yield made
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "delete", host.name], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns") / host.name, ignore_errors=True)


def training(folder: Path) -> list[str]:
    """Arguments of one small RL step in `folder`."""
    config = folder / "config.yaml"
    config.write_text("model: tiny\n")
    return ["train", str(config), *SMALL_MODEL, *SMALL_RL, *ONE_STEP, f"logging.run_dir={folder / 'run'}"]


def finish(programs: Sequence[Program]) -> None:
    for program in programs:
        outcome = program.finish()
        assert outcome.code == 0, outcome.stdout + outcome.stderr
        assert outcome.left_behind == ()


def check_run(path: Path) -> None:
    """`parallel.expert=4` needs the ranks of both hosts, so that the step was taken means that they worked together."""
    steps = metrics_by_step(path)
    assert list(steps) == [1]
    assert steps[1]["groups/count"] == 8
    assert steps[1]["policy_version"] == 2
    assert (path / "checkpoints" / "step_00000001").is_dir()


def test_torchrun_on_two_hosts(hosts: list[Host], tmp_path: Path) -> None:
    options = ("--nodes", "2", "--nproc-per-node", "2", "--rdzv-endpoint", f"{hosts[0].address}:29400")
    command: list[str | Path] = ["bash", TORCHRUN, *options, "--", *training(tmp_path)]
    finish([Program(host.command(*command), tmp_path) for host in hosts])
    check_run(tmp_path / "run")


@pytest.mark.slow
def test_slurm_on_two_hosts(hosts: list[Host], tmp_path: Path) -> None:
    """Slurm's commands are stand-ins: scontrol names the hosts, srun runs the task on each of them."""
    names = " ".join(host.name for host in hosts)
    tasks = " & ".join(shlex.join(map(str, host.command())) + ' "$@"' for host in hosts)
    stand_ins = {
        "scontrol": f'[ "$*" = "show hostnames gspo[1-2]" ] && printf "%s\\n" {names}',
        "srun": f"while [[ $1 == -* ]]; do shift; done\n{tasks} & wait -n && wait -n",
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "gspo[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
        "RANK_LOGS": str(tmp_path / "ranks"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    script = ROOT / "launch" / "slurm.sbatch"
    finish([Program(["bash", script, "--nproc-per-node", "2", "--", *training(tmp_path)], tmp_path, **job)])
    check_run(tmp_path / "run")


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[arguments for arguments, _ in REFUSED])
def test_bad_arguments_are_refused_with_the_fix(arguments: str, message: str) -> None:
    found = subprocess.run(["bash", TORCHRUN, *arguments.split()], capture_output=True, text=True)
    assert found.returncode == 2
    assert message in found.stderr
    assert found.stderr.count("\n") == 1


def test_help_is_the_scripts_own_head() -> None:
    found = subprocess.run(["bash", TORCHRUN, "--help"], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("Starts gspo-moe, or a Python script, on the processes of one host or of several.\n")
    assert "--rdzv-endpoint HOST:PORT" in found.stdout
    assert "set -euo" not in found.stdout


def test_dry_run_prints_the_command_and_checks_the_training() -> None:
    options = "--dry-run --nproc-per-node 3 -- train a.yaml task.options={a:1}"
    found = subprocess.run(["bash", TORCHRUN, *options.split()], capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.startswith("gspo-moe: ConfigError: cannot read the config a.yaml")
    command = shlex.split(found.stdout)
    assert command[0] == "env"
    start = command.index("--standalone")
    assert command[start - 1] == str(ROOT / "launch" / "elastic.py")
    assert Path(command[start - 2]).is_file()
    expected = "--standalone --nproc-per-node 3 -m gspo_moe train a.yaml task.options={a:1}"
    assert command[start:] == expected.split()


@pytest.mark.parametrize("taken", [True, False])
def test_a_port_in_use_and_a_gpu_that_torch_does_not_see_are_one_sentence(taken: bool) -> None:
    if torch.cuda.is_available() and not taken:
        pytest.skip("torch sees a GPU here")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        endpoint = f"127.0.0.1:{busy.getsockname()[1]}"
        meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-conf", "is_host=1"]
        processes = "1" if taken else "gpu"
        command: list[str | Path] = [sys.executable, ROOT / "launch" / "elastic.py", *meeting]
        command += ["--nproc-per-node", processes, "-m", "gspo_moe", "--version"]
        found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2
    message = f"torchrun.sh: --rdzv-endpoint {endpoint}: that port is in use on this host; end what has it, or"
    assert found.stderr.startswith(message if taken else "torchrun.sh: nvidia-smi lists GPUs, and torch ")
    assert found.stderr.count("\n") == 1


def test_a_host_that_waits_says_who_is_there_and_ends_at_a_signal() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-conf", "is_host=1"]
    quick = "import sys; sys.path.insert(0, sys.argv[1]); import elastic; elastic.WAITING_SECONDS = 1.0"
    command = [sys.executable, "-c", f"{quick}; sys.exit(elastic.main(sys.argv[2:]))", str(ROOT / "launch"), *meeting]
    command += ["--local-addr", "127.0.0.1", "--nproc-per-node", "1", "-m", "gspo_moe", "--version"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as alone:
        assert alone.stderr is not None
        said = iter(alone.stderr)
        told = next(line for line in said if "(127.0.0.1)" in line)
        assert f"s still waiting for 2 hosts to meet at {endpoint}: 1 there (127.0.0.1); start the same" in told
        alone.terminate()
        *_, last = said
    assert (alone.returncode, last) == (0, "torchrun.sh: SIGTERM ends it: no rank runs here\n")


def wrap(file: Path, command: str) -> None:
    file.write_text(f"#!/bin/bash\nexec {command}\n")
    file.chmod(0o755)


def test_a_python_that_has_the_packages_is_taken_as_it_is(tmp_path: Path) -> None:
    wrap(tmp_path / "here", f'{sys.executable} "$@"')
    options = ["--dry-run", "--", "train", "a.yaml"]
    given = {**os.environ, "GSPO_MOE_PYTHON": "./here", "PYTHONPATH": "/elsewhere"}
    found = subprocess.run(["bash", TORCHRUN, *options], cwd=tmp_path, env=given, capture_output=True, text=True)
    command = shlex.split(found.stdout)
    assert f"PYTHONPATH={ROOT}:/elsewhere" in command
    assert command[command.index(str(ROOT / "launch" / "elastic.py")) - 1] == f"{tmp_path}/./here"


@pytest.mark.parametrize(
    ("python", "message"), [("nowhere", "there is no GSPO_MOE_PYTHON="), ("bare", "lacks torch, ")]
)
def test_a_python_that_lacks_packages_is_refused(python: str, message: str, tmp_path: Path) -> None:
    wrap(tmp_path / "bare", f'{sys.executable} -S "$@"')
    given = {**os.environ, "GSPO_MOE_PYTHON": str(tmp_path / python), "PYTHONPATH": ""}
    command: list[str | Path] = ["bash", TORCHRUN, "--", "train", "a.yaml"]
    found = subprocess.run(command, env=given, capture_output=True, text=True)
    assert found.returncode == 2
    assert message in found.stderr
    assert found.stderr.count("\n") == 1
