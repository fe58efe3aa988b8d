"""How vLLM is spoken to: pure, after the sources of version 0.32, whose answers are the tests' fixtures.

`/inference/v1/generate` takes and gives token ids alone, and says which weights sampled which tokens; what changes
weights and tells of the server needs VLLM_SERVER_DEV_MODE=1 in its environment, the former --enable-scale-out.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gspo_moe.rollout.servers.checking import Raw, Sizes, bad, checked, config_in, field, number_of, seed_of
from gspo_moe.rollout.servers.records import Answer, Ask, Post, Served

NO_LOG_PROB = -9999.0  # what vLLM writes for a log-prob that is not finite


@dataclass(frozen=True)
class Vllm:
    """seeded: each sample has a seed of its own, which costs the sampler of a GPU a kernel a sample."""

    sizes: Sizes
    seeded: bool = True
    name: str = "vllm"

    def ask(self, ask: Ask) -> Post:
        params = ask.params
        sampling: dict[str, Any] = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_tokens": ask.max_tokens,
            "stop_token_ids": sorted(params.stop_ids),
            "ignore_eos": True,  # the run's end tokens are all named
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
        }
        if self.seeded:
            sampling["seed"] = seed_of(ask)
        return Post("/inference/v1/generate", {"token_ids": list(ask.token_ids), "sampling_params": sampling})

    def answer(self, ask: Ask, body: Any) -> Answer:
        choice = field(ask, body, "choices", 0)
        spans = field(ask, choice, "weight_versions") or ()
        raw = Raw(
            token_ids=field(ask, choice, "token_ids"),
            log_probs=_log_probs(ask, field(ask, choice, "logprobs")),
            finish=field(ask, choice, "finish_reason"),
            versions=[field(ask, span, "version") for span in spans],
            routes=_routes(ask, choice.get("routed_experts")) if ask.params.report_routes else None,
        )
        return checked(ask, raw, self.sizes)

    def questions(self, temperature: float) -> tuple[Post, ...]:
        return Post("/v1/models"), Post("/server_info?config_format=json")

    def served(self, bodies: Sequence[Any], temperature: float, truncates: bool) -> Served:
        models, info = bodies
        model, config = models["data"][0], info["vllm_config"]["model_config"]
        dtype = str(config["dtype"]).removeprefix("torch.")
        return Served(
            name=config["model"],
            keys=config_in(config["model"]),
            dtype="fp32" if dtype == "float32" else dtype,
            routes=info["vllm_config"]["aux_output_config"]["enable_return_routed_experts"],
            positions=int(model["max_model_len"]),
            faults=tuple(_log_prob_fault(config["logprobs_mode"], temperature, truncates)),
        )

    def tokenize(self, text: str) -> Post:
        return Post("/tokenize", {"prompt": text, "add_special_tokens": False})

    def health(self) -> Post:
        return Post("/health")

    def pause(self) -> Post:
        return Post("/pause?mode=abort&clear_cache=true", {})

    def resume(self) -> Post:
        return Post("/resume", {})

    def weights(self) -> Post:
        return Post("/weight_info")

    def version(self, body: Any) -> int | None:
        return number_of(body.get("weight_version")) if isinstance(body, Mapping) else None

    def load_folder(self, folder: str, version: int) -> tuple[Post, ...]:
        """By our worker extension's method; the engine that labels tokens learns the version by itself."""
        arguments = {"method": "load_folder", "args": [folder, version]}
        return (
            Post("/collective_rpc", arguments, version),
            Post("/update_weight_version", {"new_version": str(version)}, version),
        )


def _log_probs(ask: Ask, logprobs: Any) -> Sequence[Any] | None:
    if logprobs is None:
        return None
    content = field(ask, logprobs, "content")
    if content is None:
        return None
    values = [field(ask, one, "logprob") for one in content]
    return [None if isinstance(value, float) and value <= NO_LOG_PROB else value for value in values]


def _routes(ask: Ask, text: Any) -> np.ndarray | None:
    if text is None:
        return None
    try:
        found = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except (binascii.Error, TypeError, ValueError, EOFError, OSError) as error:
        raise bad(ask, f"its routed_experts are no array in base64 ({error})") from None
    return np.asarray(found)


def _log_prob_fault(mode: Any, temperature: float, truncates: bool) -> Iterator[str]:
    """Ours are of the sampling temperature's untruncated distribution.

    `raw_logprobs` are of temperature 1's, untruncated; `processed_logprobs` of the sampling temperature's, of what
    top-k and top-p have left.
    """
    fits = ["raw_logprobs"] if temperature == 1.0 else []
    fits += [] if truncates else ["processed_logprobs"]
    if mode not in fits:
        yield f"it gives log-probs by --logprobs-mode {mode}; start it with --logprobs-mode {' or '.join(fits)}"
