from __future__ import annotations

from pathlib import Path

import numpy as np

from gspo_moe.observability.samples import Sample, SampleWriter
from gspo_moe.report.collect import collect
from gspo_moe.report.samples import CHARACTERS_SHOWN, SAMPLES_A_STEP, STEPS_SHOWN, sample_rollouts
from gspo_moe.types import Message, Prompt, Reward, Rollout, Turn
from tests.runs import write_run, write_samples


def test_samples_are_spread_over_the_run_and_long_texts_are_cut(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lambda step: {"reward/mean": 0.0}, steps=range(2))
    write_samples(run, range(1, 101))
    (arm,) = collect([run]).arms
    shown = sample_rollouts(arm)
    steps = sorted({sample["step"] for sample in shown})
    assert len(steps) == STEPS_SHOWN
    assert (steps[0], steps[-1]) == (1, 100)
    assert np.ptp(np.diff(steps)) <= 1
    assert shown[-1]["said"][-1] == {"role": "policy", "text": "answer at step 100"}
    long = '{"step": 1, "prompt": "' + "x" * (CHARACTERS_SHOWN + 5) + '"}\n'
    (run / "samples.jsonl").write_text(long * (SAMPLES_A_STEP + 3))
    shown = sample_rollouts(collect([run]).arms[0])
    assert len(shown) == SAMPLES_A_STEP
    assert shown[0]["said"][0]["text"] == "x" * CHARACTERS_SHOWN + " … (cut)"
    assert (shown[0]["reward"], shown[0]["parts"], shown[0]["end"]) == (None, {}, "")


def test_a_conversation_is_shown_turn_by_turn_with_the_parts_of_its_reward(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lambda step: {"reward/mean": 0.0}, steps=range(2))
    prompt = Prompt("train/0", "", "sums", messages=(Message("system", "Be brief."), Message("user", "2 + 2?")))
    turns = (Turn("policy", "call add(2, 2)"), Turn("environment", "4"), Turn("policy", "four"))
    reward = Reward(0.5, {"right": 1.0, "long": -0.5}, error="ValueError: odd", timed_out=False)
    rollout = Rollout("train/0", 0, (1, 2), (0, 1), (-0.1,), "length", ((0, 1),), turns, reward)
    samples = SampleWriter(run)
    samples.write(Sample.of(1, prompt, rollout, advantage=-0.25))
    samples.close()
    (shown,) = sample_rollouts(collect([run]).arms[0])
    assert [(one["role"], one["text"]) for one in shown["said"]] == [
        ("system", "Be brief."),
        ("user", "2 + 2?"),
        ("policy", "call add(2, 2)"),
        ("environment", "4"),
        ("policy", "four"),
    ]
    assert (shown["reward"], shown["parts"], shown["advantage"]) == (0.5, {"right": 1.0, "long": -0.5}, -0.25)
    assert (shown["end"], shown["error"]) == ("cut off by the length limit", "ValueError: odd")
