"""A run's rollout servers, found, checked and given to the trainer as its engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.schema import Config
from gspo_moe.data.tokenizers import Tokenizer
from gspo_moe.rollout.servers.checking import Sizes
from gspo_moe.rollout.servers.fleet import Fleet
from gspo_moe.rollout.servers.records import Dialect, Served
from gspo_moe.rollout.servers.sglang import SGLang
from gspo_moe.rollout.servers.startup import Expected, check_servers
from gspo_moe.rollout.servers.syncing import on_main
from gspo_moe.rollout.servers.vllm import Vllm

if TYPE_CHECKING:
    from gspo_moe.parallel.groups import Groups  # megatron-core's, of which servers know nothing


@dataclass(frozen=True)
class Opened:
    """fleet: on the first rank of each copy of the model. longest: sequence that model and servers take, in tokens.

    dtype: "fp32" where all servers compute in it.
    """

    fleet: Fleet | None
    dialect: Dialect
    longest: int
    dtype: str


def open_servers(config: Config, architecture: Architecture, tokenizer: Tokenizer, groups: Groups) -> Opened:
    """The servers of `rollout`, once they fit the run. Collective.

    Raises ConfigError, on every rank, as `check_servers` does.
    """
    servers, dialect = config.rollout.servers, make_dialect(config, architecture, tokenizer)
    fleet = None
    if groups.model.rank() == 0:
        share = max(1, servers.concurrency // groups.data_context.size())
        fleet = Fleet(servers.model_copy(update={"concurrency": share}), dialect)

    def checked() -> list[Served]:
        assert fleet is not None
        rollout, routes = config.rollout, config.routing.reports_engine_routes
        expected = Expected(architecture, tokenizer, rollout.temperature, rollout.truncates, routes)
        return check_servers(fleet, servers, dialect, expected)

    try:
        found = on_main(checked)
    except Exception:
        if fleet is not None:
            fleet.close()
        raise
    limits = [one.positions for one in found if one.positions is not None]
    dtypes = {one.dtype for one in found}
    return Opened(fleet, dialect, min([architecture.max_positions, *limits]), " and ".join(sorted(dtypes)))


def make_dialect(config: Config, architecture: Architecture, tokenizer: Tokenizer) -> Dialect:
    sizes = Sizes(
        vocab=tokenizer.vocab_size,
        layers=architecture.num_hidden_layers,
        experts=architecture.num_experts,
        topk=architecture.num_experts_per_tok,
    )
    seeded = config.rollout.servers.seeded
    return Vllm(sizes, seeded) if config.rollout.engine == "vllm" else SGLang(sizes, seeded)
