"""The GSPO steps of a config as transformers and TRL take them, beside `benchmark_throughput.py --synthetic`.

    python tools/benchmark_trl.py CONFIG.yaml [section.key=value ...] [--synthetic 256] [--json FILE]

Sizes are the config's: the model, prompts, samples, answers of exactly `rollout.max_response_tokens`, mini-batches,
clips and learning rate. What is TRL's own: `GRPOTrainer` with importance_sampling_level="sequence", transformers'
generation, padded batches. Choices in its favour: weights, gradients and AdamW's moments in bf16 (8 bytes a parameter
against 18), no recomputation, no KL term, no loss of the router's own. One process; needs trl, datasets and accelerate.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script that is run by its path Python knows only the folder
from gspo_moe.config import Config, load_config
from gspo_moe.platform import device
from tools.synthetic import RandomPrompts

END = "<end>"


def main() -> None:
    options = parse_arguments()
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_DISABLED": "true"})
    config = load_config(options.config, options.overrides)
    with tempfile.TemporaryDirectory() as folder:
        trainer, watch = make_trainer(config, options, Path(folder))
        trainer.train()
    watch.end_of_step()
    found = report(config, watch, options)
    print(json.dumps(found, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of an RL run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--synthetic", type=int, default=256, metavar="N", help="words of a prompt (256)")
    parser.add_argument("--steps", type=int, default=1, help="steps to measure (1)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those (1)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_intermixed_args()


class Watch:
    """Seconds and tokens of each step: from one generation to the next, with all mini-batches in between."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.experts: str | None = None  # which of its implementations transformers chose
        self._start = 0.0

    def start_of_step(self) -> None:
        self.end_of_step()
        self.steps.append({"rollout": 0.0, "collect": 0.0, "response_tokens": 0, "tokens": 0})
        self._start = self._now()

    def end_of_step(self) -> None:
        if self.steps and "step" not in self.steps[-1]:
            self.steps[-1]["step"] = self._now() - self._start

    @contextmanager
    def __call__(self, phase: str) -> Any:
        start = self._now()
        yield
        self.steps[-1][phase] += self._now() - start

    def count(self, response_tokens: int, tokens: int) -> None:
        self.steps[-1]["response_tokens"] += response_tokens
        self.steps[-1]["tokens"] += tokens

    def _now(self) -> float:
        device().synchronize()
        return time.perf_counter()


def make_trainer(config: Config, options: argparse.Namespace, folder: Path) -> tuple[Any, Watch]:
    """TRL's trainer of the config's policy, and what it tells while it trains."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig
    from trl import GRPOTrainer

    watch, architecture = Watch(), config.model.architecture(1024)
    torch.manual_seed(config.seed)
    with device().torch_device:
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**architecture.to_hf()), dtype=torch.bfloat16)
    watch.experts = getattr(model.config, "_experts_implementation", None)
    rows = config.rollout.prompts_per_step * (options.warmup + options.steps)
    prompts = RandomPrompts(options.synthetic, architecture.vocab_size - 1)
    table = InMemoryTable.from_pylist([{"prompt": prompts.prompt("train", i).text} for i in range(rows)])

    class Watched(GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            watch.start_of_step()
            with watch("collect"):
                found = super()._generate_and_score_completions(inputs)
            response, prompt = (int(found[f"{name}_mask"].sum()) for name in ("completion", "prompt"))
            watch.count(response, response + prompt)
            return found

        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            with watch("rollout"):
                return super()._generate(*args, **kwargs)

    trainer = Watched(
        model=model,
        reward_funcs=random_reward,
        args=trl_config(config, options, folder),
        # A fingerprint of its own making fails where datasets lies outside of site-packages, as carried wheels do.
        train_dataset=Dataset(table, fingerprint="synthetic"),
        processing_class=make_tokenizer(architecture.vocab_size),
    )
    return trainer, watch


def trl_config(config: Config, options: argparse.Namespace, folder: Path) -> Any:
    """A step of TRL's is one update; `mini_batches` of them share a generation."""
    from trl import GRPOConfig

    rollout, algorithm = config.rollout, config.algorithm
    sequences = rollout.prompts_per_step * rollout.samples_per_prompt
    most = max(config.schedule.micro_batch_tokens // (options.synthetic + rollout.max_response_tokens), 1)
    in_mini_batch = sequences // algorithm.mini_batches
    micro_batch = max(size for size in range(1, min(most, in_mini_batch) + 1) if in_mini_batch % size == 0)
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
        max_steps=algorithm.mini_batches * (options.warmup + options.steps),
        max_completion_length=rollout.max_response_tokens,
        generation_kwargs={"min_new_tokens": rollout.max_response_tokens},
        temperature=rollout.temperature,
        learning_rate=config.optimizer.lr,
        lr_scheduler_type="constant",
        max_grad_norm=config.optimizer.clip_grad,
        bf16=True,
        gradient_checkpointing=False,
        use_cpu=device().kind == "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
    )


def make_tokenizer(vocab_size: int) -> Any:
    """Words are the token ids written as numbers, as in `synthetic.Numbers`; the last id is the end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {str(i): i for i in range(vocab_size - 1)} | {END: vocab_size - 1}
    words = Tokenizer(models.WordLevel(vocab, unk_token=END))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END, unk_token=END)


def random_reward(completions: list[str], **_: Any) -> list[float]:
    return [random.Random(completion).random() for completion in completions]


def report(config: Config, watch: Watch, options: argparse.Namespace) -> dict[str, Any]:
    """Means over the measured steps, as `benchmark_throughput.py` names them."""
    import transformers
    import trl

    measured = watch.steps[options.warmup :]

    def mean(value: Callable[[dict[str, float]], float]) -> float:
        return sum(map(value, measured)) / len(measured)

    return {
        "device": torch.cuda.get_device_name() if device().kind == "cuda" else "CPU",
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "experts": watch.experts,
        "layers": config.model.architecture(1024).num_hidden_layers,
        "steps": len(measured),
        "seconds": {
            "step": mean(lambda step: step["step"]),
            "rollout": mean(lambda step: step["rollout"]),
            "old_log_probs": mean(lambda step: step["collect"] - step["rollout"]),
            "training": mean(lambda step: step["step"] - step["collect"]),
        },
        "tokens": mean(lambda step: step["tokens"]),
        "tokens_per_second": mean(lambda step: step["tokens"] / step["step"]),
        "rollout_tokens": mean(lambda step: step["response_tokens"]),
        "rollout_tokens_per_second": mean(lambda step: step["response_tokens"] / step["rollout"]),
        "peak_device_gib": device().peak_memory_gib(),
    }


if __name__ == "__main__":
    main()
