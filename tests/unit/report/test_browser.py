"""The page in headless Chromium: no error, every figure drawn, nothing asked for outside, usable on a phone."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gspo_moe.report.collect import collect
from gspo_moe.report.page import page_parts, render_page
from gspo_moe.report.server import ReportServer
from tests.runs import write_run, write_samples

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")
DRAWN_SECONDS = 120


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class _Opened:
    """A page, the panels that must be drawn in it, what its console said and every address it asked for."""

    def __init__(self, browser: Any, file: Path, **settings: Any) -> None:
        self.page = browser.new_page(**settings)
        self.console: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-drawn]", state="attached", timeout=1000 * DRAWN_SECONDS)

    def count(self, selector: str) -> int:
        return int(self.page.locator(selector).count())


@pytest.fixture(scope="module")
def file(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("page") / "report.html"
    target.write_text(render_page(collect([study])), encoding="utf-8")
    return target


def test_every_figure_is_drawn_without_an_error_or_a_request(browser: Any, file: Path, study: Path) -> None:
    opened = _Opened(browser, file, viewport={"width": 1280, "height": 900})
    figures = page_parts(collect([study]))[1]["figures"]
    kinds = [panel["kind"] for figure in figures for panel in figure["panels"]]
    assert opened.console == []
    assert opened.requests == [file.as_uri()]
    assert opened.count(".panel:has(.scatterlayer .trace path.js-line)") == kinds.count("line")
    assert opened.count(".panel:has(.hm image)") == kinds.count("heat")
    assert opened.count(".panel:has(.scatterlayer .trace .points path)") >= kinds.count("dot")
    assert opened.page.evaluate("document.querySelectorAll('.panel').length") == len(kinds)

    # Both arms' first three steps clip no sequence, which their figure marks.
    traces = "[...document.querySelector('.panel[data-figure=clip_fraction] .plot').data]"
    zeros = opened.page.evaluate(f"{traces}.filter((trace) => trace.meta?.zeros).map((trace) => trace.x)")
    assert zeros == [[1, 2, 3], [1, 2, 3]]
    assert opened.count(".panel[data-figure=clip_fraction]:has-text('▽ at the foot: 0')") == 1

    # Prompts with markup are text.
    assert "alert('run')" in opened.page.locator("#rollouts").inner_text()
    assert opened.count("#rollouts script, #rollouts img") == 0

    # Conversations take the page's width, and are chosen by reward, at one step or all.
    _check_filter(opened)

    # An arm leaves every figure, and comes back, by the keyboard alone.
    lines = ".panel[data-figure=reward] >> nth=0 >> .js-line"
    before = opened.count(lines)
    opened.page.locator("[data-arm=gspo]").focus()
    opened.page.keyboard.press("Enter")
    opened.page.wait_for_selector("[data-arm=gspo][aria-pressed=false]")
    opened.page.wait_for_selector(".panel[data-figure=volatility_layers_staleness] >> nth=1", state="hidden")
    assert opened.count(lines) == before // 2
    opened.page.keyboard.press("Enter")
    opened.page.wait_for_selector(".panel[data-figure=volatility_layers_staleness] >> nth=1", state="visible")
    assert opened.count(lines) == before

    # Arrow keys read values.
    opened.page.locator(".panel[data-figure=reward] .plot").first.focus()
    opened.page.keyboard.press("ArrowRight")
    spoken = opened.page.locator("#spoken").inner_text()
    assert spoken.startswith("step 1; ")
    assert "gspo: " in spoken
    assert opened.console == []


def _check_filter(opened: _Opened) -> None:
    """Each of two arms keeps two samples, of rewards 0 and 1, at each of 12 steps."""
    cards = "#rollouts .rollout"
    assert opened.count(cards) == 4
    inner, whole = (opened.page.locator(one).first.bounding_box()["width"] for one in ("#rollouts", "#samples"))
    assert inner > 0.9 * whole
    opened.page.locator("#reward-low").fill("0.5")
    assert opened.count(cards) == opened.count(f"{cards}:has-text('reward 1')") == 2
    opened.page.locator("#sample-all").check()
    assert opened.page.locator("#sample-count").inner_text() == "24 shown"
    opened.page.locator("#reward-low").fill("")
    opened.page.locator("#reward-high").fill("-1")
    assert opened.count(cards) == 0


def test_a_phone_in_the_dark_needs_no_sideways_scroll(browser: Any, file: Path) -> None:
    opened = _Opened(browser, file, viewport={"width": 390, "height": 800}, color_scheme="dark", has_touch=True)
    assert opened.console == []
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 390
    # The list of contents is one line, and short when open.
    assert not opened.page.locator(".contents").is_visible()
    opened.page.locator("#contents summary").click()
    assert opened.page.locator(".contents").is_visible()
    assert opened.page.locator("#contents").bounding_box()["height"] < 400
    ground = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    opened.page.locator("#theme").click()
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") != ground


def test_a_watched_run_redraws_as_it_goes_on(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lambda step: {"reward/mean": 0.1}, steps=range(1, 4))
    with ReportServer([run], 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("#news:has-text('Watching')", timeout=1000 * DRAWN_SECONDS)
        write_samples(run, range(1, 3))
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "reward/mean": 0.2, "eval/accuracy": 0.5}\n')
        page.wait_for_selector(".panel:has-text('Held-out accuracy') .points path", timeout=1000 * DRAWN_SECONDS)
        page.wait_for_selector("#rollouts .rollout", timeout=1000 * DRAWN_SECONDS)
        page.close()
        server.shutdown()
