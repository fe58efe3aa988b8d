"""A step of TRL's `GRPOTrainer` as a config of ours has it, and where its time goes."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from gspo_moe.config import Config
from gspo_moe.platform import device

RANDOM_VOCABULARY = 1024  # of a preset that leaves it to the tokenizer


@dataclass(frozen=True)
class Work:
    """What a trainer is given to do: prompts with what their rewards need, a column each; tokenizer; reward."""

    rows: list[dict[str, Any]]
    tokenizer: Any
    reward: Callable[..., list[float]]


@dataclass
class Spent:
    """Of one step: seconds by phase, of the clock and of the CPU in all threads; tokens; the mean reward."""

    wall: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    tokens: int = 0
    response_tokens: int = 0
    reward: float = 0.0


class Watch:
    """What each step spends: from one generation to the next, with all mini-batches in between. Phases may nest."""

    def __init__(self) -> None:
        self.steps: list[Spent] = []
        self._start = (0.0, 0.0)

    def start_of_step(self) -> None:
        self.end_of_step()
        self.steps.append(Spent())
        self._start = self.now()

    def end_of_step(self) -> None:
        if self.steps and "step" not in self.steps[-1].wall:
            self.add("step", self._start)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self.now()
        yield
        self.add(phase, start)

    def during(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its calls timed as that phase."""

        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(phase):
                return call(*args, **kwargs)

        return timed

    def now(self) -> tuple[float, float]:
        device().synchronize()
        return time.perf_counter(), time.process_time()

    def add(self, phase: str, start: tuple[float, float]) -> None:
        wall, cpu = self.now()
        self.steps[-1].wall[phase] += wall - start[0]
        self.steps[-1].cpu[phase] += cpu - start[1]


def step_parser(description: str) -> argparse.ArgumentParser:
    """The arguments of a program that takes the step of a config with synthetic prompts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of an RL run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--synthetic", type=int, default=256, metavar="N", help="words of a prompt (256)")
    parser.add_argument("--micro-batch", type=int, metavar="N", help="answers; what schedule.micro_batch_tokens holds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def load_model(config: Config, experts: str | None = None) -> Any:
    """transformers' model in the config's dtype: the weights of model.hf, else random ones of its sizes.

    experts: transformers' implementation of them; None leaves the choice to it.
    """
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.model.dtype]
    torch.manual_seed(config.seed)
    with device().torch_device:
        if config.model.hf is not None and not config.model.random_init:
            model = AutoModelForCausalLM.from_pretrained(config.model.hf, dtype=dtype)
        else:
            hf_config = Qwen3MoeConfig(**config.model.architecture(RANDOM_VOCABULARY).to_hf())
            model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    if experts is not None:
        model.set_experts_implementation(experts)
    return model


def micro_batch_of(config: Config, prompt_tokens: int, at_most: int | None = None) -> int:
    """Answers of a micro-batch: `at_most`, else as many as schedule.micro_batch_tokens holds; divides a mini-batch."""
    rollout = config.rollout
    in_mini_batch = rollout.prompts_per_step * rollout.samples_per_prompt // config.algorithm.mini_batches
    most = at_most or config.schedule.micro_batch_tokens // (prompt_tokens + rollout.max_response_tokens)
    return max(size for size in range(1, max(min(most, in_mini_batch), 1) + 1) if in_mini_batch % size == 0)


def trl_config(config: Config, prompt_tokens: int, steps: int, folder: Path, micro_batch: int | None = None) -> Any:
    """A step of TRL's is one update; `mini_batches` of them share a generation. micro_batch: of `micro_batch_of`."""
    from trl import GRPOConfig

    rollout, algorithm, optimizer = config.rollout, config.algorithm, config.optimizer
    sequences = rollout.prompts_per_step * rollout.samples_per_prompt
    micro_batch = micro_batch_of(config, prompt_tokens, micro_batch)
    in_mini_batch = sequences // algorithm.mini_batches
    clip_low, clip_high = algorithm.clips
    return GRPOConfig(
        output_dir=str(folder),
        importance_sampling_level="sequence",
        loss_type="grpo",
        beta=0.0,
        router_aux_loss_coef=0.0,
        epsilon=clip_low,
        epsilon_high=clip_high,
        num_generations=rollout.samples_per_prompt,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=in_mini_batch // micro_batch,
        steps_per_generation=sequences // micro_batch,
        max_steps=algorithm.mini_batches * steps,
        max_completion_length=rollout.max_response_tokens,
        temperature=rollout.temperature,
        shuffle_dataset=False,
        learning_rate=optimizer.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=optimizer.warmup_updates,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip_grad,
        bf16=config.model.dtype == "bf16",
        gradient_checkpointing=False,
        use_cpu=device().kind == "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
    )


def make_trainer(model: Any, work: Work, arguments: Any) -> tuple[Any, Watch]:
    """TRL's trainer, and what it tells while it trains."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    watch = Watch()

    class Watched(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            watch.start_of_step()
            with watch("collect"):
                found = super()._generate_and_score_completions(inputs)
            response, prompt = (int(found[f"{name}_mask"].sum()) for name in ("completion", "prompt"))
            watch.steps[-1].response_tokens = response
            watch.steps[-1].tokens = response + prompt
            return found

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            with watch("reward"):
                rewards = super()._calculate_rewards(*args, **kwargs)
            watch.steps[-1].reward = float(rewards.mean())
            return rewards

    class Updates(TrainerCallback):
        start = (0.0, 0.0)

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.start = watch.now()

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            watch.add("update", self.start)

    trainer = Watched(
        model=model,
        reward_funcs=work.reward,
        args=arguments,
        # A fingerprint of its own making fails where datasets lies outside of site-packages, as carried wheels do.
        train_dataset=Dataset(InMemoryTable.from_pylist(work.rows), fingerprint="synthetic"),
        processing_class=work.tokenizer,
        callbacks=[Updates()],
    )
    trainer._generate = watch.during("rollout", trainer._generate)
    trainer._clip_grad_norm = watch.during("update", trainer._clip_grad_norm)
    trainer.compute_loss = watch.during("forward_backward", trainer.compute_loss)
    trainer.accelerator.backward = watch.during("forward_backward", trainer.accelerator.backward)
    return trainer, watch
