"""Configs in the spelling of earlier versions: loaded, and gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gspo_moe.config.continuing import changes, check_continues, record_run
from gspo_moe.config.loading import load_config
from gspo_moe.errors import ConfigError

DEFAULTS = {"gamma": 1.0, "lam": 0.95, "value_coeff": 0.5, "value_clip": 0.2}


def written_before(folder: Path, name: str, **ppo: float) -> Path:
    """A run of a version that wrote algorithm.ppo into every run's file, with a checkpoint."""
    record_run(load_config(None, [f"algorithm.name={name}", f"logging.run_dir={folder}"]))
    values = yaml.safe_load((folder / "config.yaml").read_text())
    del values["algorithm"]["options"]
    values["algorithm"]["ppo"] = {**DEFAULTS, **ppo}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    (folder / "checkpoints" / "step_00000003").mkdir(parents=True)
    return folder / "config.yaml"


@pytest.mark.parametrize(("name", "ppo"), [("gspo", {}), ("ppo", {}), ("ppo", {"lam": 0.9})])
def test_a_run_goes_on_from_the_file_that_it_wrote(name: str, ppo: dict[str, float], tmp_path: Path) -> None:
    config = load_config(written_before(tmp_path, name, **ppo))
    assert config.algorithm.options == ({**DEFAULTS, **ppo} if name == "ppo" else {})
    check_continues(config)
    spelt_anew = [f"algorithm.options.{key}={value}" for key, value in ppo.items()]
    again = load_config(None, [f"algorithm.name={name}", f"logging.run_dir={tmp_path}", *spelt_anew])
    assert changes(tmp_path, again, ()) == []


def test_a_changed_option_is_another_run(tmp_path: Path) -> None:
    file = written_before(tmp_path, "ppo", lam=0.9)
    for spelling in ("ppo", "options"):
        values = yaml.safe_load(file.read_text())
        values["algorithm"] = {**values["algorithm"], "ppo": {"lam": 0.9}}
        values["algorithm"][spelling] = {"lam": 0.8}
        if spelling == "options":
            del values["algorithm"]["ppo"]
        other = tmp_path / "other.yaml"
        other.write_text(yaml.safe_dump(values))
        with pytest.raises(ConfigError, match=r"algorithm\.options\.lam was 0\.9 and is 0\.8"):
            check_continues(load_config(other))


def test_an_option_that_the_older_version_did_not_have_had_its_default(tmp_path: Path) -> None:
    file = written_before(tmp_path, "ppo")
    values = yaml.safe_load(file.read_text())
    del values["algorithm"]["ppo"]["value_clip"]
    file.write_text(yaml.safe_dump(values))
    assert changes(tmp_path, load_config(None, ["algorithm.name=ppo", f"logging.run_dir={tmp_path}"]), ()) == []
