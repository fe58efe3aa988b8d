"""Which runs a config may go on with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from gspo_moe.config.continuing import (
    BLOCK_BYTES,
    BLOCKS,
    DATA,
    EXTENT,
    READ_BEFORE,
    RECORDS,
    WORK,
    changes,
    check_continues,
    covers,
    digest,
    record_run,
)
from gspo_moe.config.loading import load_config
from gspo_moe.config.schema import Config
from gspo_moe.errors import ConfigError

# Every other key, by section: with another value the run would be another one.
IDENTITY = {
    "": "seed stage",
    "model": "preset random_init overrides dtype",
    "tokenizer": "kind vocab_size",
    "algorithm": "name options clip_low clip_high dual_clip off_policy_mask old_log_probs mini_batches "
    "dynamic_sampling sampling_rounds overlong_buffer",
    "algorithm.mismatch": "correction level low high",
    "algorithm.kl": "coeff estimator",
    "chat": "system thinking variables special_tokens",
    "rollout": "prompts_per_step samples_per_prompt temperature top_p top_k max_response_tokens max_turns stop "
    "max_prompt_tokens long_prompts numerics engine max_staleness stragglers",
    "task": "name options environment.name environment.options",
    "task.data": "held_out columns system template shuffle on_bad_record",
    "task.reward": "name options sum failure_reward largest",
    "optimizer": "lr min_lr decay warmup_updates beta1 beta2 eps weight_decay clip_grad",
    "schedule": "sft_batch",
    "routing": "replay replay_margin predictor_lr_factor frozen_router aux_loss_coeff router_dtype",
}


def started(folder: Path, *overrides: str) -> None:
    """A run that has written one checkpoint."""
    record_run(configured(folder, *overrides))
    (folder / "checkpoints" / "step_00000003").mkdir(parents=True, exist_ok=True)


def configured(folder: Path, *overrides: str) -> Config:
    return load_config(None, [f"logging.run_dir={folder}", *overrides])


def keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The schema's keys that are no sections."""
    for name, field in schema.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if inner:
            yield from keys(inner[0], f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_key_is_of_one_class() -> None:
    found = list(keys(Config))
    identity = [f"{section}.{name}".strip(".") for section, names in IDENTITY.items() for name in names.split()]
    classes = [*WORK, *EXTENT, *DATA, *RECORDS, *identity]
    assert [key for key in found if sum(covers([name], key) for name in classes) != 1] == []
    assert [name for name in classes if not any(covers([name], key) for key in found)] == []


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ("seed=1", "seed=2", "seed was 1 and is 2"),
        ("stage=sft", "stage=rl", "stage was sft and is rl"),
        ("algorithm.name=grpo", "algorithm.name=gspo", "algorithm.name was grpo and is gspo"),
        ("routing.frozen_router=false", "routing.frozen_router=true", "routing.frozen_router was False and is True"),
        ("optimizer.lr=1e-3", "optimizer.lr=1e-4", "optimizer.lr was 0.001 and is 0.0001"),
        ("model=tiny", "model={preset: tiny, overrides: {num_experts: 8}}", "model.overrides.num_experts was unset"),
        ("task.options.min_length=2", "seed=1", "task.options.min_length was 2 and is unset"),
        ("model=tiny", "model={hf: other}", "model.preset was tiny and is unset; model.hf was unset and is other"),
    ],
)
def test_another_run_is_refused_by_the_keys_that_differ(before: str, now: str, message: str, tmp_path: Path) -> None:
    started(tmp_path, before)
    with pytest.raises(ConfigError, match=re.escape(f"holds another run ({message}")) as caught:
        check_continues(configured(tmp_path, now))
    assert f"logging.run_dir={tmp_path}" in str(caught.value)
    assert f"model={{checkpoint: {tmp_path}/checkpoints/step_00000003}}" in str(caught.value)


HARMLESS = (
    "task.reward.workers=2",
    "task.reward.timeout_seconds=1",
    "schedule.steps=200",
    "schedule.micro_batch_tokens=8",
    "parallel={tensor: 2, timeout_minutes: 1, distributed_optimizer: true}",
    "evaluation.interval=3",
    "checkpoint={interval: 1, keep: 1}",
    "logging.wandb.project=x",
    "routing={probe_interval: 2, attribution: true}",
    "model={preset: tiny, fused_log_probs: false, backend: local, log_prob_memory_mib: 7}",
    "rollout.max_batch=7",
    "rollout.servers={timeout_seconds: 5, retries: 1}",
)


def test_how_the_work_is_done_and_measured_may_change(tmp_path: Path) -> None:
    started(tmp_path)
    check_continues(configured(tmp_path, *HARMLESS))
    started(tmp_path, *HARMLESS)
    check_continues(configured(tmp_path))


def test_the_room_that_chooses_prompts_may_not_change(tmp_path: Path) -> None:
    drops = ("rollout.long_prompts=drop", "schedule.micro_batch_tokens=64")
    started(tmp_path, *drops)
    check_continues(configured(tmp_path, *drops))
    with pytest.raises(ConfigError, match=r"schedule\.micro_batch_tokens was 64 and is 96"):
        check_continues(configured(tmp_path, drops[0], "schedule.micro_batch_tokens=96"))


def test_a_changed_chat_template_is_another_run_unless_it_was_not_looked_at(tmp_path: Path) -> None:
    template = tmp_path / "tokenizer" / "chat_template.jinja"
    template.parent.mkdir()
    (template.parent / "tokenizer.json").write_text("{}")
    template.write_text("one")
    given = f"tokenizer.path={template.parent}"
    started(tmp_path, given)
    check_continues(configured(tmp_path, given))
    inputs = tmp_path / "inputs.json"
    inputs.write_text(json.dumps({"tokenizer.path": digest(template.parent, READ_BEFORE)}))
    check_continues(configured(tmp_path, given))
    started(tmp_path, given)
    template.write_text("two")
    with pytest.raises(ConfigError, match=r"tokenizer\.path .* with other content"):
        check_continues(configured(tmp_path, given))


def test_a_run_of_before_backends_had_parts_goes_on(tmp_path: Path) -> None:
    started(tmp_path)
    file = tmp_path / "config.yaml"
    values = yaml.safe_load(file.read_text())
    values["model"]["backend"] = "local"
    file.write_text(yaml.safe_dump(values))
    check_continues(configured(tmp_path))
    check_continues(configured(tmp_path, "model={preset: tiny, backend: {experts: local}}"))


def test_without_a_checkpoint_nothing_is_gone_on_with(tmp_path: Path) -> None:
    record_run(configured(tmp_path, "seed=1"))
    check_continues(configured(tmp_path, "seed=2"))


def test_keys_of_other_versions_are_no_difference(tmp_path: Path) -> None:
    started(tmp_path)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del written["optimizer"]["clip_grad"], written["routing"], written["task"]["reward"]
    written["optimizer"]["momentum"], written["old"] = 0.9, {"key": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    check_continues(configured(tmp_path))
    assert changes(tmp_path, configured(tmp_path, "optimizer.clip_grad=2"), WORK) == [
        "optimizer.clip_grad was 1.0 and is 2.0"
    ]


@pytest.mark.parametrize(
    "key", ["model.hf", "algorithm.kl.reference", "tokenizer.path", "rollout.bank", "chat.template"]
)
@pytest.mark.parametrize("recorded", [True, False])
def test_of_a_path_what_lies_there_counts(key: str, recorded: bool, tmp_path: Path) -> None:
    is_file, run = key in ("rollout.bank", "chat.template"), tmp_path / "run"
    first, copy, other = (tmp_path / name for name in ("first", "copy", "other"))
    for path, content in ((first, b"1"), (copy, b"1"), (other, b"2")):
        if not is_file:
            path.mkdir()
        (path if is_file else path / "model.safetensors").write_bytes(content)
    rest = {"model.hf": ("model.preset=null",), "algorithm.kl.reference": ("algorithm.kl.coeff=1",)}.get(key, ())

    def at(path: Path) -> tuple[str, ...]:
        return (f"{key}={path}", *rest)

    started(run, *at(first))
    if not recorded:
        (run / "inputs.json").unlink()
    check_continues(configured(run, *at(copy)))
    with pytest.raises(ConfigError, match=f"{key} was {first} and is {other}"):
        check_continues(configured(run, *at(other)))
    if recorded:
        first.rename(tmp_path / "moved")
        check_continues(configured(run, *at(copy)))
        other.rename(first)
        with pytest.raises(ConfigError, match=f"{key} was {first} and is {first} with other content"):
            check_continues(configured(run, *at(first)))


def test_records_may_move_and_not_change(tmp_path: Path) -> None:
    def at(folder: str, text: str = '{"prompt": "1"}', entry: str = "path: {}") -> str:
        file = tmp_path / folder / "train.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return f"task.data.train=[{{{entry.format(file)}}}]"

    run = tmp_path / "run"
    started(run, at("first"))
    (tmp_path / "first").rename(tmp_path / "moved")
    check_continues(configured(run, f"task.data.train={tmp_path}/moved/train.jsonl"))
    others = (at("changed", '{"prompt": "2"}'), at("other", entry="path: {}, limit: 3"), at("both", "[]"))
    for other in others:
        with pytest.raises(ConfigError, match=r"task\.data\.train was "):
            check_continues(configured(run, other))
    with pytest.raises(ConfigError, match="with other content"):
        check_continues(configured(run, at("first", '{"prompt": "3"}')))
    folder = f"task.data.train=[{{path: {tmp_path}/first}}]"
    started(tmp_path / "of_a_folder", folder)
    at("first", '{"prompt": "4"}')
    with pytest.raises(ConfigError, match="with other content"):
        check_continues(configured(tmp_path / "of_a_folder", folder))


def test_the_digest_reads_small_files_whole_and_large_ones_from_end_to_end(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    size = BLOCKS * BLOCK_BYTES
    for length, places in ((size, (0, size // 2 + 12_345, size - 1)), (2 * size, (0, 2 * size - 1))):
        content = bytearray(length)
        file.write_bytes(content)
        seen = {digest(tmp_path)}
        for place in places:
            content[place] = 1
            file.write_bytes(content)
            seen.add(digest(tmp_path))
        assert len(seen) == len(places) + 1
    file.write_bytes(bytes(2 * size + 1))
    assert digest(tmp_path) not in seen
