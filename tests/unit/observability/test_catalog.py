from __future__ import annotations

from pathlib import Path

import pytest

from gspo_moe.observability.catalog import METRICS, describe, markdown


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("reward/mean", "reward/mean"),
        ("ratio/sequence_std", "ratio/sequence_std"),
        ("mismatch/sequence_ratio_max", "mismatch/sequence_ratio_max"),
        ("routing/staleness/slot_change", "routing/staleness/slot_change"),
        ("routing/staleness/slot_change/mini_batch_1", "routing/staleness/slot_change"),
        ("routing/staleness/any_layer_flip/mini_batch_12", "routing/staleness/any_layer_flip"),
        ("routing/staleness/flip_rate/layer_00", "routing/staleness/flip_rate"),
        ("routing/staleness/slot_change/layer_93", "routing/staleness/slot_change"),
        ("routing/load/cv", "routing/load/cv"),
        ("eval/pass_at/8", "eval/pass_at/{k}"),
        ("routing/load/entropy/layer_07", "routing/load/entropy"),
        ("timing/old_log_probs_seconds", "timing/old_log_probs_seconds"),
    ],
)
def test_every_name_that_is_written_has_its_entry(name: str, base: str) -> None:
    assert describe(name).name == base


@pytest.mark.parametrize(
    "name",
    [
        "reward",
        "reward/median",
        "reward/mean/layer_00",
        "routing/staleness/slot_change/mini_batch_0",
        "routing/staleness/slot_change/layer_0",
        "routing/staleness/any_layer_flip/layer_00",
        "reward/mean/mini_batch_1",
        "routing/staleness/slot_change/mini_batch_1/layer_00",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(KeyError, match="not in the catalog"):
        describe(name)


def test_the_page_in_docs_is_the_catalog() -> None:
    page = Path(__file__).parents[3] / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == markdown(), (
        "write it anew: python -c 'from gspo_moe.observability.catalog import markdown as m; print(m(), end=str())'"
        " > docs/metrics.md"
    )


def test_the_page_has_one_row_a_metric_and_no_broken_cell() -> None:
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [doc.name for doc in METRICS]
    assert len(set(rows)) == len(rows)
    assert all(row.count("|") == 5 for row in rows)
