from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gspo_moe.errors import ConfigError
from gspo_moe.study.spec import flat, load_study, settings_as_overrides

PLAIN = {"name": "s", "base": "base.yaml", "seeds": [1, 2], "arms": {"a": None, "b": {"optimizer.lr": 1e-3}}}


def study_file(folder: Path, **changes: object) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**PLAIN, "online": {}, **changes}))
    return path


def test_nested_and_dotted_settings_are_the_same_and_the_later_counts() -> None:
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e.f": 3}) == {"a.b": 1, "a.c.d": 2, "e.f": 3}
    assert flat({"a.b": 1, "a": {"b": 2}}) == {"a.b": 2}
    assert flat({"task.options": {}}) == {"task.options": {}}


def test_overrides_reach_into_settings(tmp_path: Path) -> None:
    path = study_file(tmp_path, online={"set": {"schedule.steps": 40, "optimizer.lr": 1}})
    study = load_study(path, ["online.set.schedule.steps=10", "seeds=[5]"])
    assert study.online is not None
    assert study.online.set == {"schedule.steps": 10, "optimizer.lr": 1}
    assert study.seeds == (5,)
    assert study.arms == {"a": {}, "b": {"optimizer.lr": 1e-3}}
    assert study.reference == "a"


def test_settings_become_overrides_that_read_back(tmp_path: Path) -> None:
    settings = {"a": 1e-4, "b": None, "c": [1, "x y"], "d": "true", "e": True, "f": "a: b # c", "g": {"h": "i"}}
    overrides = settings_as_overrides({"a": 5}, settings)
    study = load_study(study_file(tmp_path), [f"set.{one}" for one in overrides])
    assert study.set == flat(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"online": None}, "needs `online: {}`, `bank: {}` or both"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"seeds": []}, "seeds"),
        ({"arms": {}}, "arms"),
        ({"arms": {"a/b": {}}}, "a/b"),
        ({"arms": {"banks": {}}}, "may not be called banks"),
        ({"baseline": "c"}, "baseline=c is no arm; arms are a, b"),
        ({"bank": {"mini_batches": []}}, "bank.mini_batches"),
        ({"sedes": [1]}, "the nearest valid key is seeds"),
    ],
)
def test_what_cannot_be_a_study(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(study_file(tmp_path, **changes))
    assert message in str(caught.value)
