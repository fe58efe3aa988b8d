"""Rollouts of one policy with their rewards, frozen in one file, so that several runs learn from the very same ones.

A safetensors file. Tensors, rollouts end to end in the order of the groups:
  token_ids int32 and policy_mask uint8 [sum of tokens], as `types.Rollout`; lengths int32 [R];
  log_probs float64 [sum of sampled tokens]; rewards float64 [R];
  routes uint8 or int16 [sum of (tokens - 1), MoE layers, K], only where the engine reported them.
Metadata: `format`, `bank` (JSON: groups' prompts and sizes, rollouts' turns and the like, sampling), and CRC-32 of
these two, `bank_crc32`, and of the tensors, `tensors_crc32`, which formats 1 and 2 lacked.
Format 1 had prompt_lengths and response_lengths in place of mask and lengths, and rollouts of one turn.

Shape letters: R rollouts.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gspo_moe.config.schema import Config
from gspo_moe.errors import ConfigError, DataError, RolloutError
from gspo_moe.files import write_whole
from gspo_moe.plain_json import parse_json
from gspo_moe.tasks.rewards import LARGEST_REWARD
from gspo_moe.types import Prompt, Reward, Rollout, RolloutGroup, Turn

FORMAT = "gspo_moe bank 3"
FORMATS = ("gspo_moe bank 1", "gspo_moe bank 2", FORMAT)
# What must be the same where a bank is made and where it is used, keys of the config's `rollout`.
SAMPLING = ("samples_per_prompt", "temperature", "top_p", "top_k", "max_response_tokens", "numerics")
BEFORE_NUMERICS = {"numerics": "trainer"}  # of banks that older versions made
KEPT = ("uid", "sample_index", "finish", "versions")


@dataclass(frozen=True)
class Bank:
    """groups: one a prompt. sampling: `SAMPLING` and vocab_size that they were made with."""

    groups: tuple[RolloutGroup, ...]
    sampling: dict[str, Any]

    @cached_property
    def _by_uid(self) -> dict[str, RolloutGroup]:
        return {group.prompt.uid: group for group in self.groups}

    def answers(self, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        """The frozen answers to these prompts; raises RolloutError where it has none or they answer another text."""
        found = []
        for prompt in prompts:
            group = self._by_uid.get(prompt.uid)
            if group is None or group.prompt != prompt:
                raise RolloutError(
                    f"the bank of {len(self.groups)} prompts has no answers to {prompt.uid}, {prompt.shown!r}; make "
                    "one with `gspo-moe bank` from this config, its seed, task and schedule.steps"
                )
            found.append(group)
        return found


def write_bank(path: Path, bank: Bank) -> None:
    """Writes the file at once, so that nobody reads half of it."""
    rollouts = [rollout for group in bank.groups for rollout in group.rollouts]
    tensors = {
        "token_ids": torch.tensor([token for r in rollouts for token in r.token_ids], dtype=torch.int32),
        "policy_mask": torch.tensor([flag for r in rollouts for flag in r.policy_mask], dtype=torch.uint8),
        "lengths": torch.tensor([len(r.token_ids) for r in rollouts], dtype=torch.int32),
        "log_probs": torch.tensor([p for r in rollouts for p in r.log_probs], dtype=torch.float64),
        "rewards": torch.tensor([r.total_reward for r in rollouts], dtype=torch.float64),
    }
    routes = [rollout.routes for rollout in rollouts if rollout.routes is not None]
    if routes:
        assert len(routes) == len(rollouts)
        tensors["routes"] = torch.cat(routes).cpu()
    described = {
        "sampling": bank.sampling,
        "has_routes": bool(routes),
        "groups": [{"prompt": asdict(g.prompt), "size": len(g.rollouts)} for g in bank.groups],
        "rollouts": [
            {key: getattr(r, key) for key in KEPT}
            | {"turns": [asdict(turn) for turn in r.turns], "reward": _described(r.reward)}
            for r in rollouts
        ],
    }
    metadata = {"format": FORMAT, "bank": json.dumps(described)}
    metadata |= {"bank_crc32": _crc32_of_bank(metadata), "tensors_crc32": _crc32_of_tensors(tensors)}
    write_whole(path, lambda partial: save_file(tensors, partial, metadata=metadata))


def _crc32_of_bank(metadata: Mapping[str, str]) -> str:
    return str(zlib.crc32(f"{metadata['format']}\n{metadata.get('bank')}".encode()))


def _crc32_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode(), value)
        value = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, value)
    return str(value)


def _described(reward: Reward | None) -> dict[str, Any]:
    """All of a reward but its total."""
    assert reward is not None, "a bank is of rollouts with rewards"
    return {"parts": dict(reward.parts), "error": reward.error, "timed_out": reward.timed_out}


def describe_bank(path: str | Path) -> dict[str, Any]:
    """Sampling, groups and rollouts as plain values, without the tensors; raises DataError for any other file."""
    try:
        found = parse_json(_metadata(path).get("bank", ""))
        sampling = BEFORE_NUMERICS | found["sampling"]
        if type(sampling["vocab_size"]) is not int:
            raise ValueError("its vocab_size is no whole number")
        if (
            not all(isinstance(found[key], list) for key in ("groups", "rollouts"))
            or type(found["has_routes"]) is not bool
        ):
            raise ValueError("its groups and rollouts are not listed")
    except DataError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise _malformed(path, error) from error
    return dict(found)


def _malformed(path: str | Path, error: Exception) -> DataError:
    return DataError(f"{path} is a damaged bank ({error!r:.200}); make another one with `gspo-moe bank`")


def _metadata(path: str | Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read as a bank ({error}); make one with `gspo-moe bank`") from error
    if metadata.get("format") not in FORMATS:
        raise DataError(f"{path} is no bank of this version ({FORMAT}); make one with `gspo-moe bank`")
    if _is_checked(metadata) and metadata.get("bank_crc32") != _crc32_of_bank(metadata):
        raise _damaged(path, "its prompts and turns")
    return metadata


def _is_checked(metadata: Mapping[str, str]) -> bool:
    """Whether it is of a format with checksums; one damaged bit makes the number of one format another's."""
    return metadata["format"] == FORMAT or "bank_crc32" in metadata or "tensors_crc32" in metadata


def _damaged(path: str | Path, what: str) -> DataError:
    return DataError(f"{path} is damaged: {what} are not those that were written; copy it again, or make another one")


def check_bank(config: Config, vocab_size: int) -> None:
    """Raises ConfigError where `rollout.bank` was sampled otherwise, is too small, or has no routes to replay."""
    bank = describe_bank(config.rollout.bank or "")
    rollout, sampling = config.rollout, BEFORE_NUMERICS | bank["sampling"]
    changed = [
        f"rollout.{key} is {sampling.get(key)} there and {getattr(rollout, key)} here"
        for key in SAMPLING
        if sampling.get(key) != getattr(rollout, key)
    ]
    if sampling["vocab_size"] != vocab_size:
        changed.append(f"the tokenizer has {sampling['vocab_size']} tokens there and {vocab_size} here")
    if changed:
        raise ConfigError(f"rollout.bank={rollout.bank}: {'; '.join(changed)}; make one with `gspo-moe bank`")
    needed = config.schedule.steps * rollout.prompts_per_step
    if len(bank["groups"]) < needed:
        raise ConfigError(
            f"rollout.bank={rollout.bank} has answers to {len(bank['groups'])} prompts, and schedule.steps="
            f"{config.schedule.steps} with rollout.prompts_per_step={rollout.prompts_per_step} needs {needed}; lower "
            "one of them or make a larger bank"
        )
    if config.routing.reports_engine_routes and not bank["has_routes"]:
        raise ConfigError(
            f"rollout.bank={rollout.bank} holds no routes of the rollout engine, which routing.replay=r3 and "
            "routing.engine_routes need; make it with routing.engine_routes=true"
        )


def read_bank(path: str | Path) -> Bank:
    """Reads what `write_bank` wrote; DataError for other or damaged files, unknown ids, rewards too large."""
    metadata, described = _metadata(path), describe_bank(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        if _is_checked(metadata) and metadata.get("tensors_crc32") != _crc32_of_tensors(tensors):
            raise _damaged(path, "its tokens, probabilities and rewards")
        return _bank(path, tensors, described)
    except DataError:
        raise
    # What else any of its parts may raise that is not what `write_bank` writes.
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise _malformed(path, error) from error
    except StopIteration as error:
        raise _malformed(path, ValueError("fewer rollouts than its groups have")) from error


def _bank(path: str | Path, tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> Bank:
    largest, vocab_size = int(tensors["token_ids"].max()), described["sampling"]["vocab_size"]
    if largest >= vocab_size:
        raise DataError(
            f"{path} holds token {largest}, which its tokenizer of {vocab_size} tokens does not have and no policy can "
            "sample; make another one with `gspo-moe bank`"
        )
    reward = float(tensors["rewards"].abs().max())
    if not reward <= LARGEST_REWARD:
        raise DataError(
            f"{path} holds a reward of size {reward:g}, beyond {LARGEST_REWARD:g}, where advantages lose their "
            "precision; make another one with `gspo-moe bank`"
        )
    rollouts = _rollouts(tensors, described["rollouts"])
    groups = [
        RolloutGroup(Prompt.from_json(group["prompt"]), tuple(next(rollouts) for _ in range(group["size"])))
        for group in described["groups"]
    ]
    return Bank(tuple(groups), described["sampling"])


def _rollouts(tensors: dict[str, torch.Tensor], described: Sequence[dict[str, Any]]) -> Iterator[Rollout]:
    if "lengths" not in tensors:
        tensors, described = _from_format_1(tensors, described)
    lengths = tensors["lengths"].tolist()
    tokens, masks = tensors["token_ids"].split(lengths), tensors["policy_mask"].split(lengths)
    log_probs = tensors["log_probs"].split([int(mask.sum()) for mask in masks])
    rewards = tensors["rewards"].tolist()
    routes: Sequence[torch.Tensor | None] = [None] * len(lengths)
    if "routes" in tensors:
        routes = tensors["routes"].split([length - 1 for length in lengths])
    for number, fields in enumerate(described):
        yield Rollout(
            **{key: fields[key] for key in ("uid", "sample_index", "finish")},
            token_ids=tuple(tokens[number].tolist()),
            policy_mask=tuple(masks[number].tolist()),
            log_probs=tuple(log_probs[number].tolist()),
            versions=tuple((version, count) for version, count in fields["versions"]),
            turns=tuple(Turn(**turn) for turn in fields["turns"]),
            reward=Reward(rewards[number], **fields["reward"]),
            routes=routes[number],
        )


def _from_format_1(
    tensors: dict[str, torch.Tensor], described: Sequence[dict[str, Any]]
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    prompts, responses = tensors["prompt_lengths"], tensors["response_lengths"]
    counts = torch.stack([prompts, responses], dim=1).flatten()
    mask = torch.tensor([0, 1], dtype=torch.uint8).repeat(len(prompts)).repeat_interleave(counts.long())
    rollouts = [
        {
            "uid": fields["uid"],
            "sample_index": fields["sample_index"],
            "finish": "stop" if fields["finished"] else "length",
            "versions": [(fields["policy_version"], length)],
            "turns": [{"role": "policy", "text": fields["text"]}],
            "reward": {},
        }
        for fields, length in zip(described, responses.tolist(), strict=True)
    ]
    return tensors | {"policy_mask": mask, "lengths": prompts + responses}, rollouts
