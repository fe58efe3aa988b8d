"""`gspo-moe generate`: a model's answers to one prompt, without a task or a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gspo_moe.config.checks import check_files, check_vocabulary
from gspo_moe.config.layout import check_layout
from gspo_moe.config.schema import Config
from gspo_moe.data.rendering import Renderer
from gspo_moe.data.tokenizers import own_tokenizer
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.evaluation.evaluate import sampling
from gspo_moe.model.build import build_model
from gspo_moe.model.initial import load_initial_weights
from gspo_moe.parallel.groups import initialize, world_size_from_environment
from gspo_moe.parallel.reduce import gather_objects
from gspo_moe.platform import choose_backends, megatron_version
from gspo_moe.rollout.answers import Answerer
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.rollout.embedded.numerics import check_numerics, rounded_copy
from gspo_moe.rollout.engine import make_stop_ids
from gspo_moe.rollout.stop_strings import make_stop_strings
from gspo_moe.tasks.pool import TaskPool
from gspo_moe.types import Prompt, RolloutGroup


def generate(config: Config, prompt: Prompt, samples: int, limit: int | None = None) -> RolloutGroup:
    """`samples` answers, the same on every rank and at every call; sampled as `evaluation` has it. Collective.

    limit: of an answer's tokens, in place of the config's; either is lowered to what the model has room for.
    Raises ConfigError or DataError before any process group starts for what cannot work.
    """
    check_files(config, run_folder=False)
    tokenizer = own_tokenizer(config.tokenizer, config.model.folder)
    if tokenizer is None:
        raise ConfigError("the model has no tokenizer beside it; set model.hf to a folder with one, or tokenizer.path")
    architecture = config.model.architecture(tokenizer.vocab_size)
    check_vocabulary(tokenizer.vocab_size, architecture)
    renderer = Renderer(tokenizer, config.chat)
    length, longest = len(renderer.prompt(prompt)), architecture.max_positions
    if not 0 < length < longest:
        raise DataError(f"the prompt has {length} tokens; give at least one, and fewer than the model's {longest}")
    params = sampling(config, make_stop_ids(tokenizer, config.rollout.stop))
    params = replace(params, max_response_tokens=min(limit or params.max_response_tokens, longest - length))
    layout = check_layout(config, architecture, world_size_from_environment(), megatron_version())
    check_numerics(config, choose_backends(dict(config.model.backend), config.model.dtype))
    groups = initialize(layout, config.seed, config.parallel.timeout_minutes)
    model = build_model(config, architecture, groups, vocab=tokenizer.vocab_size)
    load_initial_weights(config, model)
    prefill = max(config.schedule.micro_batch_tokens, length)
    engine = MegatronEngine(
        model,
        config.rollout.max_batch,
        prefill,
        cuda_graph=config.rollout.cuda_graph,
        rounded=rounded_copy(config, model),
    )
    pool = TaskPool(config.task, config.seed)  # whose workers never start
    stop_strings = make_stop_strings(tokenizer, config.rollout.stop)
    answerer = Answerer(engine, renderer, pool, groups, stop_strings=stop_strings)
    shares = gather_objects(answerer.generate([prompt], samples, params), groups.data_context)
    (answered,) = (group for share in shares for group in share)
    return answered


def shown(answered: RolloutGroup) -> Iterator[str]:
    """Lines for a person to read; log-probs in nats, of the distribution that was sampled from, before truncation."""
    count = len(answered.rollouts)
    yield f"prompt: {len(answered.rollouts[0].prompt_ids)} tokens"
    for number, rollout in enumerate(answered.rollouts, start=1):
        tokens, total = len(rollout.log_probs), sum(rollout.log_probs)
        yield f"answer {number} of {count}: {tokens} tokens, finish {rollout.finish}, log-prob {total:.6g}"
        yield rollout.text
