from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gspo_moe.report.collect import collect
from gspo_moe.report.page import page_parts, render_page
from tests.runs import MARKUP, training_metrics, write_run, write_samples


class _Page(HTMLParser):
    """Scripts by id or type, every address an element asks for, and the text that a reader sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self._script: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.text += " " if tag in ("td", "th") else ""
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value is not None]
        if tag == "script":
            self._script = found.get("id") or f"script {len(self.scripts)}"
            self.scripts[self._script] = ""

    def handle_endtag(self, tag: str) -> None:
        self._script = None if tag == "script" else self._script

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text += data
        else:
            self.scripts[self._script] += data


def _words(html: str) -> str:
    return re.sub(r"\s+", " ", _Page(html).text)


def test_the_page_asks_for_nothing_outside_and_allows_its_own_scripts_alone(study: Path) -> None:
    page = render_page(collect([study]))
    found = _Page(page)
    assert all(address.startswith(("#", "data:")) for address in found.addresses)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    assert "default-src &#39;none&#39;" in policy[1]
    assert "connect-src &#39;none&#39;" in policy[1]
    assert policy[1].count("sha256-") == 3
    assert "unsafe-inline" not in policy[1].split("script-src")[1].split(";")[0]
    assert len(page) < 3_500_000


def test_text_from_runs_is_never_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>run & co", training_metrics(np.random.default_rng(0)), steps=range(1, 9))
    (run / "config.yaml").write_text(f"seed: 1\nmodel: {json.dumps(MARKUP)}\n")
    write_samples(run, range(1, 3))
    other = write_run(tmp_path / "other", lambda step: {"reward/mean": 0.1}, steps=range(1, 9))
    found = _Page(render_page(collect([run, other])))
    assert len(found.scripts) == 4
    assert "img" not in found.tags
    assert MARKUP in found.text
    data = json.loads(found.scripts["data"])
    assert data["samples"]["<b>run & co"][0]["said"][0]["text"] == f"sort 0: {MARKUP}"


def test_the_page_says_seeds_rule_interval_and_what_is_missing(study: Path) -> None:
    words = _words(page_parts(collect([study]))[0])
    assert "Reward and held-out accuracy 3 seeds an arm" in words
    assert "Collapsed means here: the mean reward of the last 5 steps falls below 50% of its running best" in words
    assert "With as few as 3 seeds a bootstrap interval is too narrow" in words
    assert "not in any run: Expert slots changed, engine" in words
    assert re.search(r"gspo 3 3 0\.\d+ \[0\.\d+, 0\.\d+\]", words)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"step": 1, "reward/mean": 0.25}\n{"step": 2, "rew', "line 2: the last line is torn and was left out"),
        ('{"step": 1, "reward/mean": null}\n', "Reward and held-out accuracy: reward/mean, eval/reward, eval/accuracy"),
        ("", "metrics.jsonl has no value yet"),
        ('{"step": 0, "eval/accuracy": 0.5}\n', "reward/mean: no run has a value to draw"),
        ('{"step": 1, "a_name_of_old": 1, "sft/loss": 2.5}\n', "Training loss nats"),
    ],
)
def test_torn_empty_and_older_runs_render_and_say_so(tmp_path: Path, lines: str, words: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines)
    body, data = page_parts(collect([tmp_path]))
    assert words in _words(body)
    assert "no config.yaml" in _words(body)
    json.dumps(data, allow_nan=False)


def _shapes(data: dict[str, Any]) -> list[tuple[str, int]]:
    return [(figure["key"], len(figure["panels"])) for figure in data["figures"]]


def test_every_panel_of_the_data_has_its_place_in_the_body(study: Path) -> None:
    body, data = page_parts(collect([study]))
    places = re.findall(r'data-figure="(\w+)" data-panel="(\d+)"', body)
    assert places == [(key, str(panel)) for key, count in _shapes(data) for panel in range(count)]
    assert len(data["looks"]) == 2
