"""A small policy with random weights, its rollouts and their packs: the same in every layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.layout import Layout
from gspo_moe.config.schema import Config
from gspo_moe.data.packing import pack
from gspo_moe.model.build import Model, build_model
from gspo_moe.model.names import LM_HEAD
from gspo_moe.model.weights import RandomSource, TensorSource, draw_value_head, load_weights
from gspo_moe.parallel.groups import initialize, shut_down
from gspo_moe.rollout.engine import Request, SamplingParams
from gspo_moe.routing.recorder import Recording, RouteRecorder
from gspo_moe.scoring.score import score
from gspo_moe.training.optimizer import Optimizer
from gspo_moe.training.resuming import open_trainer
from gspo_moe.training.session import Session, Trainer
from gspo_moe.types import Microbatch, Rollout, TrainingSample
from tests.launch import renew_port
from tests.qwen3 import architecture

# Weights large enough for logits that differ by several nats.
SIZES = architecture(initializer_range=0.25)
PROMPTS = ((3,), (7, 1, 9, 4), (5, 5, 5, 5, 5, 5, 5), (60, 2), (11, 12, 13, 14, 15))
STOP = frozenset({0, 8, 17, 25, 40, 56})
LONGEST = 12


class LoudRows(RandomSource):
    """Random weights, those of the rows behind `vocab` so large that any use of their logits shows."""

    def __init__(self, architecture: Architecture, seed: int, vocab: int) -> None:
        super().__init__(architecture, seed)
        self._vocab = vocab

    def get(self, name: str) -> torch.Tensor:
        value = super().get(name)
        return torch.cat([value[: self._vocab], 50 * value[self._vocab :]]) if name == LM_HEAD else value


class Letters:
    """A tokenizer whose token n is a letter of its own."""

    vocab_size = SIZES.vocab_size
    special = None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 0x100 for letter in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(chr(0x100 + one) for one in ids)


def requests(samples: int = 4, prompts: Sequence[tuple[int, ...]] = PROMPTS) -> list[Request]:
    return [Request(f"train/{index}", ids, samples) for index, ids in enumerate(prompts)]


def sampling(
    temperature: float = 1.0,
    seed: str = "1/0",
    top_p: float = 1.0,
    top_k: int = 0,
    longest: int = LONGEST,
    stop_ids: frozenset[int] = STOP,
) -> SamplingParams:
    return SamplingParams(temperature, top_p, top_k, longest, stop_ids, seed)


def as_sample(rollout: Rollout, advantage: float = 0.0) -> TrainingSample:
    return TrainingSample(
        token_ids=rollout.prompt_ids + rollout.response_ids,
        response_mask=(0,) * len(rollout.prompt_ids) + (1,) * len(rollout.response_ids),
        advantage=advantage,
        rollout_log_probs=rollout.log_probs,
    )


def packs_of(samples: Sequence[TrainingSample], per_pack: int) -> list[Microbatch]:
    """Every sample once, `per_pack` of them a pack, in order."""
    indices = range(len(samples))
    return [pack(samples, indices[start : start + per_pack]) for start in range(0, len(samples), per_pack)]


def score_and_record(
    model: Model,
    packs: Sequence[Microbatch],
    recorder: RouteRecorder,
    reference: Sequence[torch.Tensor] | None = None,
    **options: Any,
) -> tuple[list[torch.Tensor], list[Recording]]:
    """Log-probs and routes of one scoring pass, recorded with `reference`; options: as `score` takes them."""
    record = recorder.start(reference)
    return score(model, packs, record=record, **options), record.recordings()


@contextlib.contextmanager
def trainer_of(session: Session) -> Iterator[Trainer]:
    """Of a session in process groups of its own, which go down at the end."""
    try:
        yield open_trainer(session)
        renew_port()
    finally:
        session.close()
        shut_down()


@contextlib.contextmanager
def trained(
    config: Config,
    layout: Layout,
    architecture: Architecture = SIZES,
    source: TensorSource | None = None,
    vocab: int | None = None,
) -> Iterator[tuple[Model, Optimizer]]:
    """The policy under an optimizer, in its process groups, which go down at the end; random weights by default."""
    groups = initialize(layout, seed=1)
    try:
        model = build_model(config, architecture, groups, vocab=vocab, value_head=config.has_value_head)
        draw_value_head(model, seed=2)
        load_weights(model, source or RandomSource(architecture, seed=2))
        yield model, Optimizer(config, model, total_updates=10)
        renew_port()
    finally:
        shut_down()
