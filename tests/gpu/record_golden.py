"""Writes golden.json with transformers in float64 on the CPU: `python -m tests.gpu.record_golden`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gspo_moe.types import TrainingSample
from tests.gpu.golden import (
    CLIPS,
    GOLDEN,
    GRADIENTS,
    PROMPTS,
    RESPONSE_TOKENS,
    SIZES,
    old_log_probs,
    samples,
    weights,
)

DIGITS = 9
CLEAR = 1e-3  # a choice between tokens or experts that fp32 makes as float64 does


def main() -> None:
    model = reference()
    runs = [forward(model, sample) for sample in samples()]
    log_probs = [log_probs_T for log_probs_T, _ in runs]
    loss = gspo(log_probs, samples())
    loss.backward()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    values = {
        "log_probs": [rounded(one) for one in log_probs],
        "routes": [routes.tolist() for _, routes in runs],
        "loss": rounded(loss),
        "grad_norm": rounded(torch.stack(norms).norm()),
        "gradients": {name: rounded(gradient(model, name)) for name in GRADIENTS},
        "greedy": [greedy(model, list(prompt)) for prompt in PROMPTS],
    }
    GOLDEN.write_text("{\n" + ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in values.items()) + "\n}\n")


def reference() -> Any:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_file(weights(), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(SIZES.to_hf()))
        slow = {"attn_implementation": "eager", "experts_implementation": "eager"}
        return AutoModelForCausalLM.from_pretrained(folder, **slow).double()


def forward(model: Any, sample: TrainingSample) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [T] of the targets and routes [T, layers, K], sorted, of the inputs."""
    ids = torch.tensor(sample.token_ids)
    outputs = model(input_ids=ids[None, :-1], output_router_logits=True)
    logits_TLE = torch.stack([one.view(len(ids) - 1, -1) for one in outputs.router_logits], dim=1)
    best = logits_TLE.topk(SIZES.num_experts_per_tok + 1, dim=-1)
    assert (best.values[..., -2] - best.values[..., -1]).min() > CLEAR, "a route is too close to call"
    log_probs_T = torch.log_softmax(outputs.logits[0], dim=1).gather(1, ids[1:, None])[:, 0]
    return log_probs_T, best.indices[..., :-1].sort(dim=-1).values


def gspo(log_probs: list[torch.Tensor], samples: list[TrainingSample]) -> torch.Tensor:
    """arXiv 2507.18071, eq. 5 and 7."""
    low, high = CLIPS
    total = torch.zeros((), dtype=torch.float64)
    for new_T, old_T, sample in zip(log_probs, old_log_probs(log_probs), samples, strict=True):
        response = torch.tensor(sample.response_mask[1:], dtype=torch.bool)
        ratio = (new_T - old_T.detach())[response].mean().exp()
        total = total - torch.minimum(ratio * sample.advantage, ratio.clamp(1 - low, 1 + high) * sample.advantage)
    return total / len(samples)


def gradient(model: Any, name: str) -> torch.Tensor:
    parameters = dict(model.named_parameters())
    if name not in parameters:  # transformers holds a layer's experts in one tensor
        layer, _, expert = name.partition(".experts.")
        number, kind, _ = expert.split(".")
        found: torch.Tensor = parameters[f"{layer}.experts.{kind}"].grad[int(number)]
        return found
    whole: torch.Tensor = parameters[name].grad
    return whole


@torch.no_grad()
def greedy(model: Any, ids: list[int]) -> list[int]:
    start = len(ids)
    for _ in range(RESPONSE_TOKENS):
        best = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
        assert best.values[0] - best.values[1] > CLEAR, "a token is too close to call"
        ids = [*ids, int(best.indices[0])]
    return ids[start:]


def rounded(tensor: torch.Tensor) -> Any:
    def one(value: Any) -> Any:
        return [one(item) for item in value] if isinstance(value, list) else float(f"{value:.{DIGITS}g}")

    return one(tensor.tolist())


if __name__ == "__main__":
    main()
