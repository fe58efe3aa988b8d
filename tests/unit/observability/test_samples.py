from __future__ import annotations

import json
from pathlib import Path

from gspo_moe.observability.samples import Sample, SampleWriter


def _write(run_dir: Path, resume_step: int, steps: range) -> None:
    writer = SampleWriter(run_dir, resume_step)
    for step in steps:
        writer.write(
            Sample(
                step=step,
                uid=f"train/{step}",
                prompt="b a\n",
                response="a b é",
                reward=1.0,
                advantage=-0.5,
                finished=step != 2,
            )
        )
    writer.close()


def test_samples_of_a_continued_run_stand_once_each(tmp_path: Path) -> None:
    _write(tmp_path, 0, range(1, 4))
    _write(tmp_path, 1, range(2, 4))
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[1] == {
        "step": 2,
        "uid": "train/2",
        "prompt": "b a\n",
        "response": "a b é",
        "reward": 1.0,
        "advantage": -0.5,
        "finished": False,
    }
