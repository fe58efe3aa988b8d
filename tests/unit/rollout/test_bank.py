from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gspo_moe.config.loading import load_config
from gspo_moe.errors import ConfigError, DataError, RolloutError
from gspo_moe.rollout.bank import SAMPLING, Bank, check_bank, describe_bank, read_bank, write_bank
from gspo_moe.types import Message, Prompt, Reward, Rollout, RolloutGroup, Turn


def rollout(uid: str, index: int, response: int, *, routes: bool) -> Rollout:
    generator = torch.Generator().manual_seed(10 * index + response)
    return Rollout(
        uid=uid,
        sample_index=index,
        token_ids=(*(7, 300, 5)[: index + 2], *range(response)),
        policy_mask=(0,) * (index + 2) + (1,) * response,
        # Floats with all their digits, as float32 engines give them.
        log_probs=tuple((-torch.rand(response, generator=generator)).tolist()),
        finish="stop" if index else "length",
        versions=((4, response),),
        turns=(Turn("policy", f"é {index}"),),
        reward=Reward(1.0 if index else response / 10, {"right": 0.5}, error="it broke" if index else None),
        routes=torch.randint(320, (index + 1 + response, 3, 2), generator=generator).short() if routes else None,
    )


def bank(*, routes: bool) -> Bank:
    groups = []
    for number in range(3):
        uid = f"train/{number}"
        prompt = Prompt(uid, f"sort {number}:", "sort_letters", {"answer": number})
        if number == 1:
            prompt = Prompt(uid, "", "chat", messages=(Message("user", "hello"),))
        rollouts = tuple(rollout(uid, index, number + 2 * index + 1, routes=routes) for index in range(2))
        groups.append(RolloutGroup(prompt, rollouts))
    return Bank(tuple(groups), {"temperature": 1.0, "vocab_size": 400})


@pytest.mark.parametrize("routes", [False, True])
def test_everything_comes_back_as_it_was(routes: bool, tmp_path: Path) -> None:
    made = bank(routes=routes)
    write_bank(tmp_path / "sub" / "bank.safetensors", made)
    found = read_bank(tmp_path / "sub" / "bank.safetensors")
    assert found == made
    assert describe_bank(tmp_path / "sub" / "bank.safetensors")["has_routes"] is routes
    for ours, theirs in zip(made.groups, found.groups, strict=True):
        for left, right in zip(ours.rollouts, theirs.rollouts, strict=True):
            assert (left.routes is None) == (right.routes is None) == (not routes)
            if left.routes is not None and right.routes is not None:
                assert left.routes.dtype == right.routes.dtype
                assert torch.equal(left.routes, right.routes)
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["bank.safetensors"]


def test_answers_come_by_prompt() -> None:
    made = bank(routes=False)
    prompts = [made.groups[2].prompt, made.groups[0].prompt]
    assert made.answers(prompts) == [made.groups[2], made.groups[0]]
    for other in (replace(prompts[0], uid="train/9"), replace(prompts[0], text="count 2:")):
        with pytest.raises(RolloutError, match=r"no answers to train/.*its seed, task"):
            made.answers([other])


def test_ids_that_the_tokenizer_does_not_have_are_refused(tmp_path: Path) -> None:
    write_bank(tmp_path / "bank", replace(bank(routes=False), sampling={"vocab_size": 300}))
    with pytest.raises(DataError, match=r"holds token 300, which its tokenizer of 300 tokens does not have"):
        read_bank(tmp_path / "bank")


@pytest.mark.parametrize("reward", [-1.1e6, math.nan])
def test_rewards_that_no_run_would_keep_are_refused(reward: float, tmp_path: Path) -> None:
    made = bank(routes=False)
    first = made.groups[0]
    broken = replace(first, rollouts=(replace(first.rollouts[0], reward=Reward(reward)),))
    write_bank(tmp_path / "bank", replace(made, groups=(broken,)))
    with pytest.raises(DataError, match=r"holds a reward of size (1.1e\+06|nan), beyond 1e\+06"):
        read_bank(tmp_path / "bank")


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "bank.safetensors"
    with pytest.raises(DataError, match="gspo-moe bank"):
        describe_bank(file)
    file.write_bytes(b"text")
    with pytest.raises(DataError, match="cannot be read as a bank"):
        describe_bank(file)
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(DataError, match="no bank of this version"):
        read_bank(file)


def test_a_bank_that_was_sampled_with_other_numerics_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    settings = ["rollout.prompts_per_step=1", "schedule.steps=1", "algorithm.mini_batches=1", f"rollout.bank={path}"]
    plain, rounded = (load_config(None, [*settings, f"rollout.numerics={one}"]) for one in ("trainer", "bf16"))
    sampling = {key: getattr(plain.rollout, key) for key in SAMPLING} | {"vocab_size": 400}
    older = {key: value for key, value in sampling.items() if key != "numerics"}
    for made_with in (sampling, older):
        write_bank(path, Bank(bank(routes=False).groups, made_with))
        check_bank(plain, 400)
        with pytest.raises(ConfigError, match=r"rollout\.numerics is trainer there and bf16 here; make one"):
            check_bank(rounded, 400)


def silent_flips(path: Path, bits: Iterable[int]) -> list[int]:
    """Which bits, each flipped alone, a reading of the bank does not refuse."""
    whole, silent = path.read_bytes(), []
    for bit in bits:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            read_bank(path)
            silent.append(bit)
        except DataError:
            pass
    path.write_bytes(whole)
    return silent


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_flipped_bit_is_silent(count: int, tmp_path: Path) -> None:
    path = tmp_path / "bank"
    write_bank(path, bank(routes=True))
    bits = random.Random(count).sample(range(8 * path.stat().st_size), count)
    assert silent_flips(path, bits) == []
    number = path.read_bytes().index(b"gspo_moe bank 3") + len("gspo_moe bank 3") - 1
    assert silent_flips(path, range(8 * number, 8 * number + 8)) == [], "nor one that makes it an older format's"
    assert read_bank(path) == bank(routes=True)


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    write_bank(path, bank(routes=False))
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bank is damaged: its tokens, probabilities and rewards .* copy it again"):
        read_bank(path)
    content[content.index(b"sort_letters")] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="bank is damaged: its prompts and turns"):
        describe_bank(path)
