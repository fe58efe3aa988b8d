"""Who looks at the run's folder before the ranks meet."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_moe.config import ConfigError, load_config
from gspo_moe.config.continuing import CONFIG_FILE, record_run
from gspo_moe.config.lease import LOCK_FILE
from gspo_moe.training.preflight import take_run_folder


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("ends_together", [False, True])
def test_every_rank_refuses_another_run_where_none_would_end_it(
    rank: str, ends_together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    run = tmp_path / "run"
    record_run(load_config(None, [f"logging.run_dir={run}"]))
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    other = load_config(None, [f"logging.run_dir={run}", "seed=2"])
    if rank == "1" and ends_together:
        take_run_folder(other, ends_together=True)
    else:
        with pytest.raises(ConfigError, match="seed was 1 and is 2"):
            take_run_folder(other, ends_together=ends_together)
    assert (run / CONFIG_FILE).is_file()
    assert (run / LOCK_FILE).exists() is (rank == "0")
