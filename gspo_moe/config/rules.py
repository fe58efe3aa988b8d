"""What sections of a config cannot be together: each rule yields its faults, in words with key, value and fix.

Torch-free. What one section cannot be by itself stands there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gspo_moe.config.schema import Config


def faults(config: Config) -> Iterator[str]:
    """Every rule that the config breaks."""
    for rule in RULES if config.stage == "rl" else SFT_RULES:
        yield from rule(config)


def mini_batches_divide(config: Config) -> Iterator[str]:
    prompts, mini_batches = config.rollout.prompts_per_step, config.algorithm.mini_batches
    if prompts % mini_batches:
        yield (
            f"rollout.prompts_per_step={prompts} is not a multiple of algorithm.mini_batches={mini_batches}; change "
            "one of them"
        )


def staleness_has_old_routes(config: Config) -> Iterator[str]:
    if config.routing.record and config.algorithm.old_log_probs == "rollout":
        yield (
            "algorithm.old_log_probs=rollout leaves out the forward pass whose routes staleness is measured against; "
            "set routing.record=false, or algorithm.old_log_probs=trainer"
        )


def groups_can_be_compared(config: Config) -> Iterator[str]:
    samples, name = config.rollout.samples_per_prompt, config.algorithm.name
    if not config.algorithm.spec.has_value_function and samples < 2:
        yield (
            f"rollout.samples_per_prompt={samples}: algorithm.name={name} compares the answers to a prompt with each "
            "other; set it to 2 or more, or take an algorithm with a value function (docs/algorithms.md)"
        )


def router_shift_is_recorded(config: Config) -> Iterator[str]:
    spec = config.algorithm.spec
    if spec.router_shift and not config.routing.record:
        yield (
            f"algorithm.name={config.algorithm.name} weighs tokens by how far the router's scores moved, which "
            "routing.record=false leaves unrecorded; set routing.record=true"
            + (f", or use {spec.instead}" if spec.instead else "")
        )


def servers_are_named_for_their_engine(config: Config) -> Iterator[str]:
    engine, urls = config.rollout.engine, config.rollout.servers.urls
    if engine == "megatron" and urls:
        yield (
            f"rollout.servers.urls={', '.join(urls)} with rollout.engine=megatron, which asks no server; set "
            "rollout.engine to vllm or sglang, or leave them out"
        )
    if engine != "megatron" and not urls:
        yield (
            f"rollout.engine={engine} has no server to ask; name them (rollout.servers.urls=[http://HOST:PORT]), or "
            "start trainer and server together (launch/with_servers.sh)"
        )


def servers_can_take_weights(config: Config) -> Iterator[str]:
    if config.rollout.engine == "sglang" and config.rollout.servers.sync == "ipc":
        yield (
            "rollout.servers.sync=ipc is for vLLM, as SGLang takes IPC handles in its own library's format; set "
            "rollout.servers.sync to folder or broadcast"
        )


def servers_wait_for_rl(config: Config) -> Iterator[str]:
    if config.rollout.engine != "megatron":
        yield (
            f"rollout.engine={config.rollout.engine} with stage=sft, whose evaluations alone would ask it, of weights "
            "brought there at every step; set rollout.engine=megatron"
        )


def servers_tell_our_log_probs(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if rollout.engine == "vllm" and rollout.temperature != 1.0 and rollout.truncates:
        yield (
            f"rollout.engine=vllm with temperature={rollout.temperature:g}, top_p={rollout.top_p:g} and "
            f"top_k={rollout.top_k}: vLLM gives log-probs of temperature 1 or of what top_p and top_k have left, and "
            "training needs those of the whole distribution; set temperature=1, or top_p=1 and top_k=0"
        )


def bank_has_each_prompt(config: Config) -> Iterator[str]:
    if config.algorithm.samples_dynamically and config.rollout.bank is not None:
        yield (
            f"rollout.bank={config.rollout.bank} has one batch of prompts a step, and algorithm.dynamic_sampling draws "
            "more; set algorithm.dynamic_sampling=false"
        )


def answers_can_differ(config: Config) -> Iterator[str]:
    if config.algorithm.samples_dynamically and config.rollout.top_k == 1:
        yield (
            "algorithm.dynamic_sampling needs answers that differ, and rollout.top_k=1 gives every sample of a prompt "
            "the same one; set rollout.top_k=0 or algorithm.dynamic_sampling=false"
        )


def overlong_buffer_fits(config: Config) -> Iterator[str]:
    limit = config.rollout.max_response_tokens
    if config.algorithm.overlong_tokens(limit) > limit:
        yield (
            f"algorithm.overlong_buffer={config.algorithm.overlong_buffer} exceeds rollout.max_response_tokens={limit};"
            " lower it to a fifth of that, or 0 for none"
        )


def numerics_are_not_the_trainers(config: Config) -> Iterator[str]:
    if config.rollout.numerics == config.model.dtype == "bf16":
        yield (
            "rollout.numerics=bf16 with model.dtype=bf16 copies the weights to sample what they give themselves; set "
            "rollout.numerics=trainer"
        )


def there_are_rollouts_to_measure(config: Config) -> Iterator[str]:
    routing = config.routing
    wanted = [
        name
        for name, is_set in (
            (f"routing.replay={routing.replay}", routing.replay != "none"),
            ("routing.engine_routes=true", routing.engine_routes),
            ("routing.probe_interval", routing.probe_interval > 0),
            ("routing.attribution=true", routing.attribution),
        )
        if is_set
    ]
    if wanted:
        yield f"{', '.join(wanted)}: stage=sft has no rollouts to measure; leave it to stage=rl"


def log_ratios_are_there_to_split(config: Config) -> Iterator[str]:
    if config.routing.attribution and config.algorithm.mini_batches < 2:
        yield (
            "routing.attribution=true with algorithm.mini_batches=1: log-ratios are 0 before the first update, so "
            "there is nothing to split; set algorithm.mini_batches to 2 or more"
        )


def predictions_are_replayed(config: Config) -> Iterator[str]:
    if config.routing.replay == "predict" and config.parallel.dispatcher == "allgather":
        yield (
            "routing.replay=predict with parallel.dispatcher=allgather, which pads a pack to the longest of its pass: "
            "what predictors learn from would lie in other rows; set parallel.dispatcher=alltoall"
        )
    if config.routing.replay == "predict" and config.algorithm.mini_batches < 2:
        yield (
            "routing.replay=predict with algorithm.mini_batches=1: before a step's first update there is nothing to "
            "foretell and nothing to learn it from; set algorithm.mini_batches to 2 or more, or routing.replay=none"
        )


def there_is_something_to_go_back_to(config: Config) -> Iterator[str]:
    guard, checkpoint = config.guard, config.checkpoint
    if not guard.bounds or guard.action != "roll_back":
        return
    if not checkpoint.interval or not checkpoint.keep:
        yield (
            f"guard.action=roll_back with checkpoint.interval={checkpoint.interval} and checkpoint.keep="
            f"{checkpoint.keep} has no checkpoint to go back to; set both to 1 or more, or guard.action=stop"
        )
    if config.rollout.bank is not None:
        yield (
            f"guard.action=roll_back with rollout.bank={config.rollout.bank}: the bank has no prompts beside those of "
            "the run's steps to go on with; set guard.action=stop"
        )


RULES = (
    mini_batches_divide,
    staleness_has_old_routes,
    groups_can_be_compared,
    router_shift_is_recorded,
    servers_are_named_for_their_engine,
    servers_can_take_weights,
    servers_tell_our_log_probs,
    bank_has_each_prompt,
    answers_can_differ,
    overlong_buffer_fits,
    numerics_are_not_the_trainers,
    log_ratios_are_there_to_split,
    predictions_are_replayed,
    there_is_something_to_go_back_to,
)
SFT_RULES = (
    servers_wait_for_rl,
    there_are_rollouts_to_measure,
    numerics_are_not_the_trainers,
    log_ratios_are_there_to_split,
    there_is_something_to_go_back_to,
)
