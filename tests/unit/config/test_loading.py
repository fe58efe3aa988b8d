"""What a user types, and the message that a mistake gets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gspo_moe.config import ConfigError, load_config, save_config
from gspo_moe.config.schema import Config
from gspo_moe.config.validation import SYNONYMS, _keys, meant_key


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _message(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert "pydantic" not in str(caught.value)
    return str(caught.value)


def test_no_file_is_the_defaults_and_an_empty_one_a_mistake(tmp_path: Path) -> None:
    assert load_config(None) == Config()
    for path in (_file(tmp_path, "# nothing\n"), Path(os.devnull)):
        with pytest.raises(ConfigError, match=f"{path} is empty; .*examples/quickstart.yaml"):
            load_config(path, ["seed=2"])


def test_overrides_win_over_the_file_and_leave_the_rest(tmp_path: Path) -> None:
    path = _file(tmp_path, "seed: 3\nparallel: {tensor: 2, expert: 4}\n")
    config = load_config(path, ["parallel.tensor=1", "logging.wandb.project=x", "rollout.stop=['.', '\\n']"])
    assert (config.seed, config.parallel.tensor, config.parallel.expert) == (3, 1, 4)
    assert config.logging.wandb is not None
    assert config.logging.wandb.project == "x"
    assert config.rollout.stop == (".", "\\n")


def test_model_by_preset_name_takes_further_overrides(tmp_path: Path) -> None:
    config = load_config(_file(tmp_path, "model: tiny\n"), ["model.overrides.num_experts=8", "model.dtype=bf16"])
    assert config.model.preset == "tiny"
    assert config.model.architecture(vocab_size=54).num_experts == 8
    assert load_config(None, ["model=qwen3_30b_a3b"]).model.architecture().num_hidden_layers == 48


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-04", ".0001", "0.0001"])
def test_floats_in_every_spelling(tmp_path: Path, text: str) -> None:
    assert load_config(_file(tmp_path, f"optimizer: {{lr: {text}}}")).optimizer.lr == 1e-4
    assert load_config(None, [f"optimizer.lr={text}"]).optimizer.lr == 1e-4
    assert load_config(None, [f"task.options={{rate: {text}}}"]).task.options == {"rate": 1e-4}


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "y", "2024-01-01", "12:30:00", "0o17", "010"])
def test_words_that_yaml_1_1_takes_for_something_else_stay_text(tmp_path: Path, word: str) -> None:
    assert load_config(_file(tmp_path, f"logging: {{run_dir: {word}}}")).logging.run_dir == word


def test_switches_take_the_usual_words_and_numbers_do_not(tmp_path: Path) -> None:
    assert load_config(None, ["routing.record=no", "checkpoint.export_hf=false"]).routing.record is False
    assert "parallel.tensor='yes'" in _message(None, "parallel.tensor=yes")
    assert "parallel.tensor=True: neither true nor false" in _message(None, "parallel.tensor=true")


@pytest.mark.parametrize(
    ("override", "named", "nearest"),
    [
        ("parallel.tensr=2", "parallel.tensr=2", "parallel.tensor"),
        ("paralel.tensor=2", "paralel={'tensor': 2}", "parallel"),
        ("tensor=2", "tensor=2", "parallel.tensor"),
        ("optimizer.steps=5", "optimizer.steps=5", "schedule.steps"),
        ("rollout.temprature=1", "rollout.temprature=1", "rollout.temperature"),
        ("task.reward.timeout=1", "task.reward.timeout=1", "task.reward.timeout_seconds"),
        ("logging.wandb={project: a, proj: b}", "logging.wandb.proj='b'", "logging.wandb.project"),
    ],
)
def test_unknown_keys_name_the_nearest(override: str, named: str, nearest: str) -> None:
    assert _message(None, override) == f"unknown key {named}; the nearest valid key is {nearest}"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "optimizer.lr"),
        ("optimizer.learning_rate", "optimizer.lr"),
        ("optimizer.epsilon", "optimizer.eps"),
        ("algorithm.epsilon", "algorithm.clip_low"),
        ("batch_size", "rollout.prompts_per_step"),
        ("rollout.num_generations", "rollout.samples_per_prompt"),
        ("rollout.max_new_tokens", "rollout.max_response_tokens"),
        ("beta", "algorithm.kl.coeff"),
        ("algorithm.kl_coef", "algorithm.kl.coeff"),
        ("output_dir", "logging.run_dir"),
        ("model_name_or_path", "model.hf"),
        ("reward_funcs", "task.reward"),
        ("data.train_files", "task.data.train"),
        ("optimizer.steps", "schedule.steps"),
        ("rollout.temprature", "rollout.temperature"),
        ("task.data.train.0.weigth", "task.data.train.weight"),
        ("optimizer.momentum", None),
        ("learn", None),
        ("routing.lora_rank", None),
        ("name", None),
    ],
)
def test_an_unknown_key_is_taken_for_one_of_its_section_or_its_meaning(key: str, meant: str | None) -> None:
    assert meant_key(Config, key) == meant


def test_every_synonym_names_a_key_and_is_none_itself() -> None:
    keys = set(_keys(Config))
    assert set(SYNONYMS) <= keys
    names = [name for names in SYNONYMS.values() for name in names.split()]
    assert len(names) == len(set(names))
    assert not keys & set(names)


def test_where_no_key_is_meant_those_of_the_section_are_named() -> None:
    assert _message(None, "checkpoint.zip=1") == (
        "unknown key checkpoint.zip=1; leave it out, or take one of interval, keep, keep_every, "
        "background, rescue, on_damage, export_hf"
    )


def test_unknown_architecture_override_names_the_nearest() -> None:
    message = _message(None, "model=tiny", "model.overrides.num_expert=8")
    assert message == "unknown key model.overrides.num_expert=8; the nearest valid key is model.overrides.num_experts"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.dtype=fp16", ("model.dtype='fp16'", "'fp32' or 'bf16'")),
        ("parallel.tensor=two", ("parallel.tensor='two'", "integer")),
        ("parallel.tensor=0", ("parallel.tensor=0", "greater than 0")),
        ("parallel.tensor=1.5", ("parallel.tensor=1.5", "integer")),
        ("parallel.virtual_pipeline=1", ("parallel.virtual_pipeline=1", "2")),
        ("parallel=3", ("parallel=3", "section")),
        ("optimizer.lr=.nan", ("optimizer.lr=nan", "finite")),
        ("optimizer.lr=", ("optimizer.lr=None", "number")),
        ("logging.run_dir=12", ("logging.run_dir=12", "quotes")),
        ("logging.wandb={}", ("logging.wandb.project", "missing")),
        ("model=tinny", ("model.preset='tinny'", "tiny", "model.hf")),
        ("model={preset: tiny, hf: x}", ("model.preset='tiny'", "model.hf='x'", "leave the other null")),
        ("model.overrides={head_dim: 3}", ("model.preset=None", "set one")),
        ("model={preset: tiny, overrides: {head_dim: 3}}", ("model.overrides", "head_dim=3", "even")),
        ("algorithm.clip_low=0.2", ("algorithm.clip_low=0.2", "allow_wide_clip")),
        ("rollout.prompts_per_step=10", ("rollout.prompts_per_step=10", "algorithm.mini_batches=4", "change")),
        ("rollout.samples_per_prompt=1", ("rollout.samples_per_prompt=1", "2")),
    ],
)
def test_wrong_values_name_key_value_and_what_is_expected(override: str, parts: tuple[str, ...]) -> None:
    message = _message(None, override)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_several_mistakes_come_in_one_message_a_line_each(tmp_path: Path) -> None:
    path = _file(tmp_path, "seed: x\noptimizer: {lr: -1, foo: 2}\n")
    lines = _message(path, "parallel.tensr=2").splitlines()
    assert len(lines) == 4
    for part in ("seed='x'", "optimizer.lr=-1", "optimizer.foo=2", "parallel.tensr=2"):
        assert sum(part in line for line in lines) == 1


@pytest.mark.parametrize("text", ["a: 1\nseed: 2\nseed: 3\n", "a: 1\nb: 2\nparallel: {seed: 1, seed: 1}\n"])
def test_a_key_that_stands_twice_is_named_with_its_line(tmp_path: Path, text: str) -> None:
    message = _message(_file(tmp_path, text))
    assert "line 3" in message
    assert "'seed' stands twice" in message


def test_broken_yaml_names_file_and_line(tmp_path: Path) -> None:
    path = _file(tmp_path, "seed: 1\nparallel: {tensor: 2\noptimizer: x\n")
    message = _message(path)
    assert str(path) in message
    assert "line 3" in message
    assert "override 'seed=[1', line 1" in _message(None, "seed=[1")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert str(missing) in _message(missing)
    assert str(tmp_path) in _message(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"seed: \xff\xfe")
    assert "UTF-8" in _message(binary)
    assert "expected sections" in _message(_file(tmp_path, "- seed\n"))


@pytest.mark.parametrize("override", ["seed", "=1", "a..b=1", ".seed=1"])
def test_malformed_overrides_show_the_form(override: str) -> None:
    message = _message(None, override)
    assert repr(override) in message
    assert "section.key=value" in message


def test_an_override_below_a_value_says_so(tmp_path: Path) -> None:
    assert "seed=1 is a value, not a section" in _message(_file(tmp_path, "seed: 1\n"), "seed.x=2")


def test_an_override_below_an_alias_leaves_its_anchor_alone(tmp_path: Path) -> None:
    path = _file(tmp_path, "task: {options: {one: &shared {b: 1}, two: *shared}}\n")
    assert load_config(path, ["task.options.two.b=2"]).task.options == {"one": {"b": 1}, "two": {"b": 2}}


def test_saved_config_loads_back_equal_with_every_default_written(tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            "model=tiny",
            "seed=7",
            "optimizer.lr=1e-5",
            "optimizer.eps=1e-16",
            "rollout.stop=['\\n', 'no', 'é']",
            "logging.wandb={project: 'on', name: '1e-4'}",
            "logging.run_dir='010'",
            "task.options={date: 2024-01-01, low: 1e-3, text: 'true', none: null, list: [1, 2.5]}",
        ],
    )
    path = tmp_path / "deep" / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]
    text = path.read_text(encoding="utf-8")
    for key in ("beta2: 0.95", "timeout_minutes: 10.0", "failure_reward: 0.0", "clip_low: null"):
        assert key in text
