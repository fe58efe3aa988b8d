"""transformers' own pieces at the sizes of a config: `generate()`, and forward + backward of the tokens of a step.

    python tools/benchmark_transformers.py CONFIG.yaml [section.key=value ...] [--synthetic 256] [--json FILE]

`generate()` answers all prompts of a step in one batch, with each of --experts' implementations of the experts; by
default without batched_mm, which copies an expert's weights for every token and so takes twice as long on a CPU.
Forward + backward takes grouped_mm, micro-batches of schedule.micro_batch_tokens (or --micro-batch answers), and logits
of the answers alone. The least seconds of --repeats, after one call that is not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script that is run by its path Python knows only the folder
from gspo_moe.config import Config, load_config
from gspo_moe.platform import device
from tools.synthetic import Numbers, RandomPrompts
from tools.trl_step import load_model, micro_batch_of, step_parser

EXPERTS = ("eager", "batched_mm", "grouped_mm")


def main() -> None:
    import transformers

    options = parse_arguments()
    config = load_config(options.config, options.overrides)
    model = load_model(config)
    prompts = prompt_ids(config, options.synthetic, model.config.vocab_size)
    answers = torch.randint(model.config.vocab_size, (len(prompts), config.rollout.max_response_tokens))
    sequences = torch.cat([prompts, answers.to(prompts.device)], dim=1)
    micro_batch = micro_batch_of(config, options.synthetic, options.micro_batch)
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "micro_batch": micro_batch,
        "generate": {},
    }
    for experts in options.experts:
        model.set_experts_implementation(experts)
        found["generate"][experts] = least(lambda: generate(model, prompts, config), options.repeats)
    model.set_experts_implementation("grouped_mm")
    steps = sequences.split(micro_batch)
    found["forward_backward"] = least(lambda: forward_backward(model, steps, options.synthetic), options.repeats)
    print(json.dumps(found, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = step_parser(__doc__)
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=["eager", "grouped_mm"])
    parser.add_argument("--repeats", type=int, default=2, help="calls to measure (2)")
    return parser.parse_intermixed_args()


def prompt_ids(config: Config, length: int, vocab_size: int) -> torch.Tensor:
    """Ids of the prompts of the first synthetic step, each as often as it is answered."""
    prompts, tokenizer = RandomPrompts(length, vocab_size), Numbers(vocab_size)
    texts = [prompts.prompt("train", i).text for i in range(config.rollout.prompts_per_step)]
    ids = torch.tensor([tokenizer.encode(text) for text in texts], device=device().torch_device)
    return ids.repeat_interleave(config.rollout.samples_per_prompt, dim=0)


@torch.no_grad()
def generate(model: Any, prompts: torch.Tensor, config: Config) -> None:
    model.eval()
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=config.rollout.max_response_tokens,
        do_sample=True,
        temperature=config.rollout.temperature,
        top_k=0,
        eos_token_id=None,
        pad_token_id=0,
    )


def forward_backward(model: Any, steps: tuple[torch.Tensor, ...], prompt_tokens: int) -> None:
    """Gradients of the answers' mean log-prob; the weights stay."""
    model.train()
    model.zero_grad()
    for ids in steps:
        answers = ids[:, prompt_tokens:]
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=answers.size(1) + 1).logits[:, :-1]
        logits.log_softmax(-1).gather(-1, answers[..., None]).mean().backward()


def least(call: Callable[[], None], repeats: int) -> dict[str, float]:
    """The least wall and CPU seconds of the calls, after one that is not counted."""
    call()
    found = []
    for _ in range(repeats):
        device().synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        device().synchronize()
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return {"wall": min(wall for wall, _ in found), "cpu": min(cpu for _, cpu in found)}


if __name__ == "__main__":
    main()
