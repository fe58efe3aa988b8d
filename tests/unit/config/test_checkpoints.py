from __future__ import annotations

from pathlib import Path

from gspo_moe.config.checkpoints import checkpoint_name, checkpoints, newest_checkpoint, unfinished_checkpoints


def test_only_what_a_run_wrote_counts(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "missing") is None
    written = [checkpoint_name(step) for step in (9, 10, 12_345_678)]
    others = ["step_x", "step_1", "step_00000020_best", "step_000000020", "hf", "mine.partial", "step_9.partial"]
    for name in (*reversed(written), "step_00000011.partial", *others):
        (tmp_path / name).mkdir()
    for name in ("step_99999999", "step_notes.txt", "step_0.log", "step_00000012.partial"):
        (tmp_path / name).touch()
    (tmp_path / "step_00000013.partial").symlink_to(tmp_path / "hf", target_is_directory=True)
    assert written[0] == "step_00000009"
    assert [path.name for path in checkpoints(tmp_path)] == written
    assert newest_checkpoint(tmp_path) == tmp_path / "step_12345678"
    assert [path.name for path in unfinished_checkpoints(tmp_path)] == ["step_00000011.partial"]
