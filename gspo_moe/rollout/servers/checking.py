"""What every answer must be before anything is learnt from it, whatever kind of server it comes from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gspo_moe.rollout.servers.records import Answer, Ask, BadAnswer

FINISHES = ("stop", "length", "abort")


@dataclass(frozen=True)
class Sizes:
    """Of the model that is asked. vocab: tokens of the tokenizer, which may be fewer than the model has rows."""

    vocab: int
    layers: int
    experts: int
    topk: int


@dataclass(frozen=True)
class Raw:
    """An answer as its server gave it; token_ids and log_probs of any length, None where there are none.

    versions: of the weights, of each stretch of tokens, as the server calls them.
    """

    token_ids: Sequence[Any] | None
    log_probs: Sequence[Any] | None
    finish: Any
    versions: Sequence[Any]
    routes: np.ndarray | None


def seed_of(ask: Ask) -> int:
    """63 bits that hang on what is asked alone: another continuation of the same sample has another seed."""
    key = f"{ask.params.seed}/{ask.uid}/{ask.sample_index}/{len(ask.token_ids)}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1


def checked(ask: Ask, raw: Raw, sizes: Sizes) -> Answer:
    """The answer; raises BadAnswer, naming what was asked and what came, for the first thing that is wrong with it."""
    token_ids = _token_ids(ask, raw, sizes.vocab)
    log_probs = _log_probs(ask, raw, len(token_ids))
    _check_end(ask, raw.finish, token_ids)
    routes = None
    if ask.params.report_routes and token_ids:
        routes = _routes(ask, raw.routes, len(token_ids), sizes)
    version = _version(ask, raw.versions) if token_ids else -1
    return until_stop_string(ask, Answer(token_ids, log_probs, raw.finish, version, routes))


def until_stop_string(ask: Ask, answer: Answer) -> Answer:
    """The answer up to the token with which its text holds a stop string; servers see no text."""
    strings = ask.params.stop_strings
    if strings is None:
        return answer
    ids = list(ask.token_ids[len(ask.token_ids) - ask.sampled :])
    for count, token in enumerate(answer.token_ids, 1):
        ids.append(token)
        if strings.ended(ids):
            routes = None if answer.routes is None else answer.routes[: len(ask.token_ids) + count - 1]
            return Answer(answer.token_ids[:count], answer.log_probs[:count], "stop", answer.version, routes)
    return answer


def number_of(version: Any) -> int | None:
    """The trainer's number of a version as a server calls it; None for what servers call weights of their own."""
    return int(version) if isinstance(version, str) and version.isdecimal() else None


def config_in(folder: str) -> dict[str, Any]:
    """The config.json of a server's model, where this machine sees it too; a server does not tell it."""
    file = Path(folder) / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def field(ask: Ask, body: Any, *path: str | int) -> Any:
    """What stands at a path of a JSON answer; raises BadAnswer where the path ends early."""
    found = body
    for number, step in enumerate(path):
        fits = isinstance(found, Mapping) if isinstance(step, str) else isinstance(found, list) and len(found) > step
        if not fits or (isinstance(step, str) and step not in found):
            where = ".".join(map(str, path[: number + 1]))
            raise bad(ask, f"it has no {where}: {_short(body)}")
        found = found[step]
    return found


def bad(ask: Ask, fault: str) -> BadAnswer:
    return BadAnswer(f"the answer to {ask.uid}, sample {ask.sample_index}, cannot be used: {fault}")


def _token_ids(ask: Ask, raw: Raw, vocab: int) -> tuple[int, ...]:
    if raw.token_ids is None:
        raise bad(ask, "it has no token ids")
    if len(raw.token_ids) > ask.max_tokens:
        raise bad(ask, f"it has {len(raw.token_ids)} tokens where at most {ask.max_tokens} were asked for")
    if not raw.token_ids and raw.finish != "abort":
        raise bad(ask, f"it has no token and ended by {raw.finish!r}")
    for token in raw.token_ids:
        if type(token) is not int or not 0 <= token < vocab:
            raise bad(ask, f"it has the token {token!r}, and the tokenizer has those from 0 to {vocab - 1}")
    return tuple(raw.token_ids)


def _log_probs(ask: Ask, raw: Raw, tokens: int) -> tuple[float, ...]:
    if raw.log_probs is None:
        raise bad(ask, f"it has no log-probs for its {tokens} tokens")
    if len(raw.log_probs) != tokens:
        raise bad(ask, f"it has {len(raw.log_probs)} log-probs for {tokens} tokens")
    for position, value in enumerate(raw.log_probs):
        if type(value) not in (int, float) or not math.isfinite(value) or value > 0.0:
            raise bad(ask, f"token {position + 1} of {tokens} has the log-prob {value!r}, no number of at most 0")
    return tuple(map(float, raw.log_probs))


def _check_end(ask: Ask, finish: Any, token_ids: tuple[int, ...]) -> None:
    if finish not in FINISHES:
        raise bad(ask, f"it ended by {finish!r}, which is none of {', '.join(FINISHES)}")
    stop = ask.params.stop_ids
    early = next((place for place, token in enumerate(token_ids[:-1]) if token in stop), None)
    if early is not None:
        raise bad(
            ask,
            f"it has {len(token_ids)} tokens, and token {early + 1} is {token_ids[early]}, an end token of the run",
        )
    if finish == "stop" and token_ids[-1:] and token_ids[-1] not in stop:
        raise bad(
            ask,
            f"it ended at token {token_ids[-1]}, and the run's end tokens are {sorted(stop)}; give the server a "
            "generation_config.json that names no other, or name that one too (rollout.stop)",
        )
    if finish == "length" and len(token_ids) < ask.max_tokens:
        raise bad(
            ask,
            f"it was cut off behind {len(token_ids)} of {ask.max_tokens} tokens, {len(ask.token_ids)} tokens of "
            "prompt before them; start the server with a larger context",
        )


def _version(ask: Ask, versions: Sequence[Any]) -> int:
    found = list(dict.fromkeys(map(str, versions)))
    version = number_of(found[0]) if len(found) == 1 else None
    if version is None:
        raise bad(
            ask,
            f"its server calls the weights that sampled it {' and '.join(found) or 'nothing'}, where one number of "
            "updates was to be told; weights are the trainer's alone to publish, while the server is paused",
        )
    return version


def _routes(ask: Ask, routes: np.ndarray | None, tokens: int, sizes: Sizes) -> np.ndarray:
    if routes is None:
        raise bad(ask, "it has no routes of experts, which were asked for; start the server with its flag for them")
    wanted = (len(ask.token_ids) + tokens - 1, sizes.layers, sizes.topk)
    if routes.shape != wanted or routes.dtype.kind not in "iu":
        raise bad(
            ask,
            f"its routes are {routes.dtype} {list(routes.shape)}, and {wanted[0] + 1} tokens less the last, "
            f"{sizes.layers} layers and {sizes.topk} experts make integers {list(wanted)}",
        )
    low, high = int(routes.min(initial=0)), int(routes.max(initial=0))
    if low < 0 or high >= sizes.experts:
        raise bad(ask, f"its routes name experts from {low} to {high}, and the model has {sizes.experts}")
    ordered = np.sort(routes, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise bad(ask, f"its routes name an expert twice in one layer; each token has {sizes.topk} different ones")
    return routes


def _short(body: Any) -> str:
    text = repr(body)
    return text if len(text) <= 200 else text[:197] + "..."
