"""A run whose rollouts come from a server: the stand-in, in a process of its own, as vLLM would be."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gspo_moe.rollout.bank import read_bank
from tests.e2e.program import ROOT, SMALL_MODEL, TASK, Program, gspo_moe, json_lines, metrics_by_step, succeed, torchrun
from tests.launch import free_port, free_ports

STAND_IN = ROOT / "tests" / "support" / "stand_in.py"
STEPS = (
    *TASK,
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=2",
    "algorithm.mini_batches=2",
    "schedule.micro_batch_tokens=64",
    "schedule.steps=2",
    "optimizer.lr=1e-2",
    "evaluation.prompts=4",
    "routing.engine_routes=true",
    "checkpoint.export_hf=false",
)


@dataclass(frozen=True)
class Server:
    model: Path
    url: str


def write_config(folder: Path) -> Path:
    file = folder / "config.yaml"
    file.write_text("task: {name: sort_letters}\n")
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, as a run exports it."""
    folder = tmp_path_factory.mktemp("model")
    few = ("model.preset=tiny", "schedule.steps=1", "schedule.sft_batch=4", "evaluation.prompts=0", "checkpoint.keep=0")
    succeed(
        gspo_moe(
            "train", write_config(folder), "stage=sft", *SMALL_MODEL, *TASK, *few, f"logging.run_dir={folder}/run"
        ),
        folder,
    )
    return folder / "run" / "hf"


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Each run gives it its own weights before it asks."""
    port = free_port()
    command: list[str | Path] = [sys.executable, STAND_IN, model, "--port", str(port), "--routes"]
    program = Program(command, tmp_path_factory.mktemp("server"), PYTHONPATH=str(ROOT))
    yield Server(model, f"http://127.0.0.1:{port}")
    program.kill()


def check(run: Path) -> None:
    """Log-probs and routes of the server are the trainer's, of the newest weights at every step."""
    steps = metrics_by_step(run)
    assert sorted(steps) == [0, 1, 2]
    for step in (1, 2):
        found = steps[step]
        assert found["policy_version"] == 2 * step
        assert found["mismatch/k3"] < 1e-8
        assert found["routing/engine/slot_change"] < 0.01
        assert found["sync/bytes"] > 0
        assert found["sync/probe_difference"] < 1e-4
        assert (found["rollout/servers/up"], found["rollout/servers/retries"]) == (1, 0)
        assert 0 < found["rollout/servers/utilisation"] <= 1
        assert found["queue/idle_seconds"] > 0
        assert found["rollout/servers/latency_median_seconds"] <= found["rollout/servers/latency_tail_seconds"]
    waited = [line["timing/waiting_seconds"] for line in json_lines(run / "metrics.jsonl") if "loss/policy" in line]
    assert len(waited) == 2
    assert min(waited) > 0
    assert sorted(path.name for path in (run / "weights").iterdir()) == ["version-00000002", "version-00000004"]


def test_a_run_of_one_process(server: Server, tmp_path: Path) -> None:
    given = ("rollout.engine=vllm", f"rollout.servers.urls=[{server.url}]", "rollout.servers.start_seconds=100")
    succeed(
        gspo_moe(
            "train", write_config(tmp_path), *STEPS, *given, f"model={{hf: {server.model}}}", "logging.run_dir=run"
        ),
        tmp_path,
    )
    check(tmp_path / "run")


def test_a_run_of_two_processes(server: Server, tmp_path: Path) -> None:
    given = ("rollout.engine=vllm", f"rollout.servers.urls=[{server.url}]", "rollout.servers.start_seconds=100")
    command = torchrun(
        2, "-m", "gspo_moe", "train", write_config(tmp_path), *STEPS, *given, f"model={{hf: {server.model}}}"
    )
    succeed([*command, "parallel.expert=2", "logging.run_dir=run"], tmp_path)
    check(tmp_path / "run")


def test_a_bank_of_servers_answers_is_learnt_from_without_them(server: Server, tmp_path: Path) -> None:
    """Log-probs are held against transformers' of the same tokens, and what a run learns from against the bank."""
    from transformers import AutoModelForCausalLM

    given = ("rollout.engine=vllm", f"rollout.servers.urls=[{server.url}]", "rollout.servers.start_seconds=100")
    settings = (*STEPS, f"model={{hf: {server.model}}}", "logging.run_dir=run")
    config, file = write_config(tmp_path), tmp_path / "bank.safetensors"
    succeed(gspo_moe("bank", config, file, *settings, *given, "rollout.max_staleness=1"), tmp_path)
    groups = read_bank(str(file)).groups
    assert [group.prompt.uid for group in groups] == [f"train/{number}" for number in range(8)]
    rollouts = [one for group in groups for one in group.rollouts]
    reference = AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.float32).eval()
    for one in rollouts:
        assert [version for version, _ in one.versions] == [0]
        tokens = torch.tensor(one.token_ids)
        with torch.no_grad():
            output = reference(input_ids=tokens[None], output_router_logits=True)
        log_probs_T = output.logits[0].log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
        assert one.log_probs == pytest.approx(log_probs_T[len(one.prompt_ids) - 1 :].tolist(), abs=1e-4)
        picked = torch.stack([scores.topk(2).indices for scores in output.router_logits], 1)[:-1]
        assert one.routes is not None
        assert torch.equal(one.routes.long().sort(-1).values, picked.sort(-1).values)

    succeed(gspo_moe("train", config, *settings, "schedule.steps=1", f"rollout.bank={file}"), tmp_path)
    found = metrics_by_step(tmp_path / "run")[1]
    assert found["mismatch/k3"] < 1e-8
    assert found["reward/mean"] == pytest.approx(sum(one.total_reward for one in rollouts[:8]) / 8)
    assert found["rollout/tokens"] == sum(len(one.response_ids) for one in rollouts[:8])


def test_one_command_starts_trainer_and_servers(model: Path, tmp_path: Path) -> None:
    serve = f"{sys.executable} {STAND_IN} {{model}} --port {{port}} --routes"
    command: list[str | Path] = ["bash", ROOT / "launch" / "with_servers.sh", "--model", model, "--servers", "2"]
    command += ["--port", str(free_ports(2)), "--server-command", serve, "--nproc-per-node", "1"]
    run = ("train", write_config(tmp_path), *STEPS, f"model={{hf: {model}}}", "logging.run_dir=run")
    outcome = succeed([*command, "--", *run], tmp_path, GSPO_MOE_PYTHON=sys.executable)
    assert "2 vllm up (http://127.0.0.1:" in outcome.stderr
    assert metrics_by_step(tmp_path / "run")[2]["rollout/servers/up"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "."], "nothing to run; end with -- train CONFIG.yaml"),
        (["--model", ".", "--", "train", "x=1"], "--model '.' is no folder with a config.json; give the run's model"),
        (["--modell", ".", "--", "train", "x=1"], "unknown option --modell"),
        (["--model", "--", "train"], "--model stands without its value"),
        (["--engine", "trt", "--", "train"], "is no folder with a config.json"),
    ],
)
def test_a_command_that_cannot_start_says_why(arguments: list[str], message: str, tmp_path: Path) -> None:
    outcome = Program(["bash", ROOT / "launch" / "with_servers.sh", *arguments], tmp_path).finish()
    assert outcome.code == 2
    assert message in outcome.stderr


def test_a_server_that_dies_at_its_start_ends_the_command(model: Path, tmp_path: Path) -> None:
    command: list[str | Path] = ["bash", ROOT / "launch" / "with_servers.sh", "--model", model]
    command += ["--server-command", "bash -c echo_nothing_{port}", "--", "train", "x=1"]
    outcome = Program(command, tmp_path).finish()
    assert outcome.code == 2
    assert "echo_nothing_8000: command not found" in outcome.stderr
    assert "server 0 ended before it was up" in outcome.stderr


def test_a_server_of_another_model_ends_the_run_before_its_first_step(server: Server, tmp_path: Path) -> None:
    given = ("rollout.engine=vllm", f"rollout.servers.urls=[{server.url}]", "rollout.servers.start_seconds=100")
    other = ("model.preset=tiny", "model.overrides.num_hidden_layers=3", "model.overrides.hidden_size=32")
    outcome = Program(
        gspo_moe("train", write_config(tmp_path), *STEPS, *given, *other, "logging.run_dir=run"), tmp_path
    ).finish()
    assert outcome.code == 2
    assert "it serves another model (" in outcome.stderr
    assert "num_hidden_layers is 2 there and 3 here" in outcome.stderr
    assert "Traceback" not in outcome.stderr
