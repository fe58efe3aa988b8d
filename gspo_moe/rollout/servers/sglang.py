"""How SGLang is spoken to: pure, after the sources of version 0.5, whose answers are the tests' fixtures.

Its log-probs are of the sampling temperature's untruncated distribution as they come, unless its environment has
SGLANG_RETURN_ORIGINAL_LOGPROB=1, which only its log-probs tell.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gspo_moe.rollout.servers.checking import Raw, Sizes, bad, checked, config_in, field, number_of, seed_of
from gspo_moe.rollout.servers.records import Answer, Ask, Post, Served

LIKELIEST = 5  # tokens whose log-probs tell of which temperature they are
CLOSE = 0.05  # nats


@dataclass(frozen=True)
class SGLang:
    """seeded: each sample has a seed of its own, which a server with --enable-deterministic-inference heeds."""

    sizes: Sizes
    seeded: bool = True
    name: str = "sglang"

    def ask(self, ask: Ask) -> Post:
        params = ask.params
        sampling: dict[str, Any] = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_new_tokens": ask.max_tokens,
            "stop_token_ids": sorted(params.stop_ids),  # ignore_eos would have it ignore them too
        }
        if self.seeded:
            sampling["sampling_seed"] = seed_of(ask)
        body = {"input_ids": list(ask.token_ids), "sampling_params": sampling, "return_logprob": True}
        return Post("/generate", body | ({"return_routed_experts": True} if params.report_routes else {}))

    def answer(self, ask: Ask, body: Any) -> Answer:
        meta = field(ask, body, "meta_info")
        pairs = meta.get("output_token_logprobs")
        spans = meta.get("weight_versions")
        raw = Raw(
            token_ids=field(ask, body, "output_ids"),
            log_probs=None if pairs is None else [field(ask, list(pair), 0) for pair in pairs],
            finish=field(ask, meta, "finish_reason", "type"),
            versions=[field(ask, span, "version") for span in spans] if spans else [meta.get("weight_version")],
            routes=self._routes(ask, meta.get("routed_experts")) if ask.params.report_routes else None,
        )
        named = None if pairs is None else [field(ask, list(pair), 1) for pair in pairs]
        if named is not None and raw.token_ids is not None and named != list(raw.token_ids)[: len(named)]:
            raise bad(ask, f"its log-probs are of the tokens {named[:5]}... and its tokens {raw.token_ids[:5]}...")
        return checked(ask, raw, self.sizes)

    def questions(self, temperature: float) -> tuple[Post, ...]:
        described = (Post("/get_model_info"), Post("/get_server_info"))
        if temperature == 1.0:
            return described
        return (*described, _likeliest(self.sizes, 1.0), _likeliest(self.sizes, temperature))

    def served(self, bodies: Sequence[Any], temperature: float, truncates: bool) -> Served:
        info, server, *measured = bodies
        keys = {"architectures": info.get("architectures")} | config_in(info["model_path"])
        faults = tuple(_log_prob_fault(measured[0], measured[1], temperature)) if measured else ()
        positions = server.get("context_length")
        dtype = "fp32" if server["dtype"] == "float32" else str(server["dtype"])
        return Served(
            name=str(info["model_path"]),
            keys=keys,
            dtype=dtype,
            routes=bool(server.get("enable_return_routed_experts")),
            positions=None if positions is None else int(positions),
            faults=faults,
        )

    def tokenize(self, text: str) -> Post:
        return Post("/v1/tokenize", {"prompt": text, "add_special_tokens": False})

    def health(self) -> Post:
        return Post("/health")

    def pause(self) -> Post:
        return Post("/pause_generation", {"mode": "abort"})

    def resume(self) -> Post:
        return Post("/continue_generation", {})

    def weights(self) -> Post:
        return Post("/get_model_info")

    def version(self, body: Any) -> int | None:
        return number_of(body.get("weight_version")) if isinstance(body, Mapping) else None

    def load_folder(self, folder: str, version: int) -> tuple[Post, ...]:
        body = {"model_path": folder, "weight_version": str(version), "flush_cache": True}
        return (Post("/update_weights_from_disk", body, version),)

    def _routes(self, ask: Ask, text: Any) -> np.ndarray | None:
        """int32 [tokens - 1, layers, experts a token], in C's order."""
        if text is None:
            return None
        try:
            return np.frombuffer(base64.b64decode(text, validate=True), np.int32).reshape(
                -1, self.sizes.layers, self.sizes.topk
            )
        except (binascii.Error, TypeError, ValueError) as error:
            wanted = f"[*, {self.sizes.layers}, {self.sizes.topk}]"
            raise bad(ask, f"its routed_experts are no int32 {wanted} ({error})") from None


def _likeliest(sizes: Sizes, temperature: float) -> Post:
    sampling = {"temperature": temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "max_new_tokens": 1}
    body = {"input_ids": [sizes.vocab // 2], "sampling_params": sampling}
    return Post("/generate", {**body, "return_logprob": True, "top_logprobs_num": LIKELIEST})


def _log_prob_fault(plain: Any, scaled: Any, temperature: float) -> Iterator[str]:
    """Of the likeliest tokens at temperature 1 and at the run's: log-probs' distances shrink by the temperature."""
    one, other = (
        {token: value for value, token, *_ in body["meta_info"]["output_top_logprobs"][0]} for body in (plain, scaled)
    )
    shared = [token for token in one if token in other]
    first = shared[0]
    off = max(abs((other[token] - other[first]) * temperature - (one[token] - one[first])) for token in shared)
    if off > CLOSE * max(1.0, temperature):
        yield (
            f"its log-probs at temperature {temperature} are of another one, {off:.3g} nats apart over its likeliest "
            "tokens; start it without SGLANG_RETURN_ORIGINAL_LOGPROB"
        )
