"""Whether servers fit the run, asked before its first step: there at all, its model and tokens, log-probs as ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.hf_keys import HF_ARCHITECTURE
from gspo_moe.config.rollout import ServersConfig
from gspo_moe.data.tokenizers import Tokenizer
from gspo_moe.errors import ConfigError, RolloutError
from gspo_moe.rollout.servers.fleet import Fleet
from gspo_moe.rollout.servers.records import Dialect, Served

# Keys of HF's config.json that make a model another one, with what transformers takes for one that is left out.
COMPARED: dict[str, Any] = {
    "vocab_size": 151_936, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32,
    "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": False, "tie_word_embeddings": False,
}  # fmt: skip
_STARTED = "start {} as launch/with_servers.sh does, in development mode, of a version that docs/servers.md names"
SAMPLE = "Sort 3, 1 and 2: café, naïve; 東京 {x} = [0.5]\n"


@dataclass(frozen=True)
class Expected:
    """What the trainer has. temperature, truncates: of training's samples; by top-k or top-p. routes: it wants them."""

    architecture: Architecture
    tokenizer: Tokenizer
    temperature: float = 1.0
    truncates: bool = False
    routes: bool = False


def check_servers(fleet: Fleet, servers: ServersConfig, dialect: Dialect, expected: Expected) -> list[Served]:
    """What each server says of itself.

    Raises ConfigError with a line, which says what to do, for each that does not fit.
    """
    seconds, urls = servers.start_seconds, servers.urls
    down = fleet.wait_until_up(seconds)
    if down:
        raise ConfigError("\n".join(_unreachable(url, why, seconds) for url, why in down.items()))
    try:
        answers = [fleet.everywhere(question) for question in dialect.questions(expected.temperature)]
    except RolloutError as error:
        raise ConfigError(f"rollout.servers.urls: {error}; {_STARTED.format(dialect.name)}") from None
    if any(len(of_all) < len(urls) for of_all in answers):
        raise ConfigError("rollout.servers.urls: a server went away while it was asked what it serves; start it again")
    tokens = _tokens(fleet, dialect)
    found, faults = list[Served](), list[str]()
    for number, url in enumerate(urls):
        try:
            served = dialect.served([of_all[number] for of_all in answers], expected.temperature, expected.truncates)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            faults.append(
                f"{url} does not describe itself as expected ({type(error).__name__}: {error}); "
                + _STARTED.format(dialect.name)
            )
            continue
        found.append(served)
        words = [*served.faults, *differences(served, expected.architecture)]
        if expected.routes and not served.routes:
            words.append(
                "it reports no routes of experts, which routing.engine_routes and routing.replay=r3 want; start it "
                "with --enable-return-routed-experts"
            )
        words += _other_tokens(
            expected.tokenizer, None if tokens is None or len(tokens) < len(urls) else tokens[number]
        )
        faults += [f"{url} ({served.name}): {fault}" for fault in words]
    if faults:
        raise ConfigError("\n".join(f"rollout.servers.urls: {fault}" for fault in faults))
    return found


def differences(served: Served, architecture: Architecture) -> Iterator[str]:
    """How the model that is served is another one than the trainer's, as far as the server tells."""
    keys = served.keys
    names = keys.get("architectures")
    if names and HF_ARCHITECTURE not in names:
        yield f"it serves {', '.join(names)}, and the trainer has {HF_ARCHITECTURE}; start it with the run's model"
        return
    if not any(name in keys for name in COMPARED):
        return
    theirs = COMPARED | {"num_experts": keys.get("num_local_experts", COMPARED["num_experts"])}
    theirs |= {name: keys[name] for name in COMPARED if name in keys}
    mine = architecture.model_dump()
    other = [name for name in COMPARED if theirs[name] != mine[name]]
    changed = [f"{name} is {theirs[name]} there and {mine[name]} here" for name in other]
    if changed:
        yield f"it serves another model ({'; '.join(changed)}); start it with the run's model"


def _unreachable(url: str, why: str, seconds: float) -> str:
    return (
        f"rollout.servers.urls: {url} was not healthy within {seconds:g} s ({why}); start it (launch/with_servers.sh), "
        "mend the address, or raise rollout.servers.start_seconds"
    )


def _tokens(fleet: Fleet, dialect: Dialect) -> list[Any]:
    """Of the sample, by each server's tokenizer; nothing where one has none, whose answers need none."""
    try:
        return fleet.everywhere(dialect.tokenize(SAMPLE))
    except RolloutError:
        return []


def _other_tokens(tokenizer: Tokenizer, body: Any) -> Iterator[str]:
    theirs = body.get("tokens") if isinstance(body, Mapping) else None
    mine = tokenizer.encode(SAMPLE)
    if theirs is None or theirs == mine:
        return
    shorter = min(len(theirs), len(mine))
    at = next((place for place in range(shorter) if theirs[place] != mine[place]), shorter)
    yield (
        f"its tokenizer is another one: it makes {len(theirs)} tokens of {SAMPLE!r} and the run's {len(mine)}, from "
        f"token {at + 1} on {theirs[at : at + 3]} where these are {mine[at : at + 3]}; start it with the run's "
        "tokenizer (--tokenizer), or with none (--skip-tokenizer-init)"
    )
