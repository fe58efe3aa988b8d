"""A run's rollout servers, found, checked and given to the trainer as its engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.rollout import ServersConfig
from gspo_moe.config.schema import Config
from gspo_moe.data.tokenizers import Tokenizer
from gspo_moe.errors import ConfigError
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.parallel.stop import raise_everywhere
from gspo_moe.rollout.servers.checking import Sizes
from gspo_moe.rollout.servers.fleet import Fleet, Limits
from gspo_moe.rollout.servers.records import Dialect, Served
from gspo_moe.rollout.servers.sglang import SGLang
from gspo_moe.rollout.servers.startup import Expected, check_servers
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
    fleet, found, fault = None, list[Served](), None
    if groups.model.rank() == 0:
        fleet = Fleet(servers.urls, dialect, limits_of(servers, groups.data_context.size()))
    if groups.is_main:
        assert fleet is not None
        rollout, routes = config.rollout, config.routing.reports_engine_routes
        expected = Expected(architecture, tokenizer, rollout.temperature, rollout.truncates, routes)
        try:
            found = check_servers(fleet, servers, dialect, expected)
        except ConfigError as error:
            fault = error
    try:
        raise_everywhere(fault)
    except ConfigError:
        if fleet is not None:
            fleet.close()
        raise
    found = gather_objects(found)[0]
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


def limits_of(servers: ServersConfig, processes: int) -> Limits:
    """processes: that ask, each of which has its part of `concurrency`."""
    return Limits(
        answer=servers.timeout_seconds,
        load=servers.timeout_seconds,
        health=servers.health_seconds,
        outage=servers.outage_seconds,
        retries=servers.retries,
        concurrency=max(1, servers.concurrency // processes),
    )
