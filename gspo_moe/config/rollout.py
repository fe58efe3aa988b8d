"""The sections `rollout` and `evaluation`: how answers are sampled. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from gspo_moe.section import Section

Probability = Annotated[float, Field(gt=0.0, le=1.0)]
HOTTEST = 1000.0  # temperatures beyond it only flatten float32's last digits


class ServersConfig(Section):
    """Rollout servers, where `rollout.engine` is of them.

    urls: of each, http://HOST:PORT. sync: how they get new weights, by files, by NCCL (gloo where there is no GPU), or
    by CUDA IPC where vLLM's servers are on the trainer's GPUs.
    folder: that trainer and servers see alike, for weights; null is run_dir/weights.
    address: at which servers reach the first rank for a broadcast; null is torchrun's master address, or this machine.
    start_seconds: for all of them to be there. timeout_seconds: for one answer, its wait for its turn included.
    retries: of one answer, elsewhere where it can be. concurrency: answers that one server works on at once.
    health_seconds: between two looks at each. outage_seconds: without any server, before the run ends.
    seeded: samples hang on `seed`, as far as a server's arithmetic lets them; false is faster on GPUs.
    """

    urls: tuple[str, ...] = ()
    sync: Literal["folder", "broadcast", "ipc"] = "folder"
    folder: str | None = None
    address: str | None = None
    start_seconds: PositiveFloat = 60.0
    timeout_seconds: PositiveFloat = 1800.0
    retries: NonNegativeInt = 8
    concurrency: PositiveInt = 256
    health_seconds: PositiveFloat = 5.0
    outage_seconds: PositiveFloat = 600.0
    seeded: bool = True

    def faults(self) -> Iterator[str]:
        for url in self.urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                yield f"rollout.servers.urls: {url} is no address; write http://HOST:PORT"
        twice = sorted({url for url in self.urls if self.urls.count(url) > 1})
        if twice:
            yield f"rollout.servers.urls names {', '.join(twice)} twice; name each server once"


class RolloutConfig(Section):
    """Sampling: `prompts_per_step` prompts over all ranks, `samples_per_prompt` answers each.

    samples_per_prompt: at least 2, unless the algorithm compares answers with a value function.
    max_response_tokens: of one answer, in a conversation of each turn. max_turns: answers in a conversation at most.
    max_prompt_tokens: of a prompt as the model reads it; null is what model and micro-batch have room for.
    long_prompts: longer ones are an error before the run starts, left out, or cut off at their left end.
    stop: strings which end an answer as the model's own end tokens do.
    engine: samples; megatron is the trainer itself, the others are servers beside it.
    bank: a file of `gspo-moe bank`, whose frozen answers the steps take instead of making their own.
    cuda_graph: `auto` replays decode steps as CUDA graphs on GPUs, and says why where it cannot; `off` never does.
    """

    prompts_per_step: PositiveInt = 32
    samples_per_prompt: PositiveInt = 8
    temperature: Annotated[float, Field(gt=0.0, le=HOTTEST)] = 1.0
    top_p: Probability = 1.0
    top_k: NonNegativeInt = 0
    max_response_tokens: PositiveInt = 32
    max_turns: PositiveInt = 16
    max_prompt_tokens: PositiveInt | None = None
    long_prompts: Literal["error", "drop", "truncate_left"] = "error"
    stop: tuple[str, ...] = ()
    max_batch: PositiveInt = 512
    cuda_graph: Literal["auto", "off"] = "auto"
    bank: str | None = None
    engine: Literal["megatron", "vllm", "sglang"] = "megatron"
    servers: ServersConfig = ServersConfig()

    @property
    def truncates(self) -> bool:
        """Whether sampling leaves some tokens out."""
        return bool(self.top_k) or self.top_p < 1.0


class EvaluationConfig(Section):
    """Held-out accuracy: `samples` answers to each of `prompts` prompts, before, after, and every `interval` steps.

    prompts: a number, or `all` of a task whose prompts have an end.
    pass_at: the k of each pass@k, at most `samples`.
    max_response_tokens: as `rollout` has it; null is that one.
    keep_answers: every evaluation of a run leaves its answers in evaluations/step_N.jsonl of the run's folder.
    """

    prompts: NonNegativeInt | Literal["all"] = 512
    samples: PositiveInt = 1
    pass_at: tuple[PositiveInt, ...] = ()
    interval: NonNegativeInt = 0
    temperature: Annotated[float, Field(ge=0.0, le=HOTTEST)] = 1.0
    top_p: Probability = 1.0
    top_k: NonNegativeInt = 0
    max_response_tokens: PositiveInt | None = None
    keep_answers: bool = False

    def faults(self) -> Iterator[str]:
        beyond = [k for k in self.pass_at if k > self.samples]
        if beyond:
            yield f"evaluation.pass_at={beyond} needs as many evaluation.samples, which is {self.samples}; raise it"
