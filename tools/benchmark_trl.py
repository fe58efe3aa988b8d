"""The GSPO steps of a config as transformers and TRL take them, beside `benchmark_throughput.py --synthetic`.

    python tools/benchmark_trl.py CONFIG.yaml [section.key=value ...] [--synthetic 256] [--json FILE]

Sizes are the config's: the model (the weights of model.hf, else random ones), its dtype, prompts, samples, answers of
exactly `rollout.max_response_tokens`, mini-batches, clips and AdamW's settings. TRL's own (`tools/trl_step.py`) are
`GRPOTrainer` with importance_sampling_level="sequence", transformers' generation and padded batches. Choices in its
favour: in bf16 no fp32 copy of the weights (8 bytes a parameter against 18), no recomputation, no KL term, no loss of
the router's own, no end token to forbid. One process; needs trl, datasets and accelerate (`tools/setup_trl.sh`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script that is run by its path Python knows only the folder
from gspo_moe.config import Config, load_config
from gspo_moe.platform import device, peak_rss_gib
from tools.synthetic import RandomPrompts
from tools.trl_step import Spent, Work, load_model, make_trainer, step_parser, trl_config

END = "<end>"


def main() -> None:
    options = parse_arguments()
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_DISABLED": "true"})
    config = load_config(options.config, options.overrides)
    model = load_model(config, options.experts)
    work = synthetic_work(config, options, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        steps = options.warmup + options.steps
        arguments = trl_config(config, options.synthetic, steps, Path(folder), options.micro_batch)
        trainer, watch = make_trainer(model, work, arguments)
        trainer.train()
    watch.end_of_step()
    found = report(watch.steps[options.warmup :], model, arguments.per_device_train_batch_size)
    print(json.dumps(found, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = step_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1, help="steps to measure (1)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those (1)")
    parser.add_argument("--experts", choices=("eager", "batched_mm", "grouped_mm"), help="transformers' own choice")
    return parser.parse_intermixed_args()


def synthetic_work(config: Config, options: argparse.Namespace, vocab_size: int) -> Work:
    """The prompts of `benchmark_throughput.py --synthetic`; nothing that the model can say ends an answer."""
    prompts = RandomPrompts(options.synthetic, vocab_size)
    count = config.rollout.prompts_per_step * (options.warmup + options.steps)
    rows = [{"prompt": prompts.prompt("train", i).text} for i in range(count)]
    return Work(rows, make_tokenizer(vocab_size), random_reward)


def make_tokenizer(vocab_size: int) -> Any:
    """Words are the token ids written as numbers, as in `synthetic.Numbers`.

    The end token is one more than the model has: TRL must have one, and to forbid it would cost a pass over the logits.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {str(i): i for i in range(vocab_size)} | {END: vocab_size}
    words = Tokenizer(models.WordLevel(vocab, unk_token=END))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END, unk_token=END)


def random_reward(completions: list[str], **_: Any) -> list[float]:
    return [random.Random(completion).random() for completion in completions]


def report(measured: list[Spent], model: Any, micro_batch: int) -> dict[str, Any]:
    """Means over the measured steps, as `benchmark_throughput.py` names them."""
    import transformers
    import trl

    def mean(value: Callable[[Spent], float]) -> float:
        return sum(map(value, measured)) / len(measured)

    def seconds(clock: str) -> dict[str, float]:
        phases = [split(getattr(step, clock)) for step in measured]
        return {phase: sum(one[phase] for one in phases) / len(phases) for phase in phases[0]}

    on_gpu = device().kind == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "experts": getattr(model.config, "_experts_implementation", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "micro_batch": micro_batch,
        "layers": model.config.num_hidden_layers,
        "steps": len(measured),
        "seconds": seconds("wall"),
        "cpu_seconds": seconds("cpu"),
        "tokens": mean(lambda step: step.tokens),
        "tokens_per_second": mean(lambda step: step.tokens / step.wall["step"]),
        "rollout_tokens": mean(lambda step: step.response_tokens),
        "rollout_tokens_per_second": mean(lambda step: step.response_tokens / step.wall["rollout"]),
        "peak_device_gib": device().peak_memory_gib(),
        "peak_host_gib": peak_rss_gib(),
    }


def split(phases: dict[str, float]) -> dict[str, float]:
    """A step's seconds by phase: `training` is forward_backward, update and rest; rest is what no phase covers."""
    parts = {phase: phases.get(phase, 0.0) for phase in ("step", "rollout", "reward", "forward_backward", "update")}
    parts["old_log_probs"] = phases["collect"] - phases["rollout"] - phases["reward"]
    parts["training"] = phases["step"] - phases["collect"]
    parts["rest"] = parts["training"] - parts["forward_backward"] - parts["update"]
    return parts


if __name__ == "__main__":
    main()
