"""The report as one HTML file: text and tables by Jinja2 (escaped), figures as JSON for plotly.js."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from plotly.offline import get_plotlyjs

from gspo_moe.observability.comparison import LEVEL, CollapseRule, Estimate
from gspo_moe.report.collect import Collection
from gspo_moe.report.contents import Contents, contents
from gspo_moe.report.facts import config_text, facts
from gspo_moe.report.figures import DotPanel, Figure, HeatPanel, LinePanel
from gspo_moe.report.outcomes import NO_FULL_REWARD, no_full_reward
from gspo_moe.report.palette import looks
from gspo_moe.report.samples import sample_rollouts
from gspo_moe.report.tables import arm_rows, config_differences, run_rows

SIGNIFICANT_DIGITS = 5


def render_page(collection: Collection, *, watch: bool = False) -> str:
    """The whole page. watch: it asks the server that it came from for news."""
    script = _asset("page.js")
    library = get_plotlyjs()
    loader = _asset("loader.js")
    address = "'self'" if watch else "'none'"
    # Only these three scripts run, whatever text a run has written into its prompts.
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(_digest(source) for source in (loader, library, script))}",
            "style-src 'unsafe-inline'",
            "img-src data: blob:",
            f"connect-src {address}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    body, data = page_parts(collection)
    return (
        _templates()
        .get_template("page.html")
        .render(
            title=collection.title,
            policy=policy,
            style=_asset("page.css"),
            loader=loader,
            script=script,
            library=_packed(library),
            body=body,
            data=_embedded(data),
            watch=watch,
        )
    )


def page_parts(collection: Collection) -> tuple[str, dict[str, Any]]:
    """What changes while a run goes on: the body's HTML, and the data that the page's script draws."""
    found = contents(collection)
    rule = CollapseRule()
    arms = collection.online or collection.bank
    look = looks(list(dict.fromkeys(arm.of for arm in collection.arms)))
    samples = {arm.name: rollouts for arm in collection.online if (rollouts := sample_rollouts(arm))}
    body = (
        _templates()
        .get_template("body.html")
        .render(
            collection=collection,
            look=look,
            contents=found,
            seeds_of={figure.key: seeds_text(figure, collection) for figure in found.figures},
            numbers_of={figure.key: numbers(figure) for figure in found.figures},
            facts=facts(collection.arms),
            config=config_text(collection.arms),
            arm_rows=arm_rows(arms, rule),
            no_full_reward=NO_FULL_REWARD if no_full_reward(arms) else "",
            run_rows=run_rows(collection.arms, rule),
            rule=rule,
            level=LEVEL,
            differences=config_differences(arms),
            without_samples=[arm.name for arm in collection.online if arm.name not in samples],
            samples=samples,
            has_zeros=lambda panel: any(len(curve.zeros) for curve in panel.curves),
            fewest_seeds=min(len(arm.cells) for arm in arms),
        )
    )
    return body, _page_data(found, look, samples)


def _page_data(found: Contents, look: dict[str, Any], samples: dict[str, Any]) -> dict[str, Any]:
    return {
        "looks": {
            arm: {"light": entry.light, "dark": entry.dark, "dash": entry.dash, "marker": entry.marker[0]}
            for arm, entry in look.items()
        },
        "figures": [
            {
                "key": figure.key,
                "title": figure.title,
                "shared_y": figure.shared_y,
                "panels": [_panel(panel) for panel in figure.panels],
            }
            for figure in found.figures
        ],
        "samples": _plain(samples),
    }


def _panel(panel: LinePanel | HeatPanel | DotPanel) -> dict[str, Any]:
    kind = {LinePanel: "line", HeatPanel: "heat", DotPanel: "dot"}[type(panel)]
    return {"kind": kind, **{field.name: _plain(getattr(panel, field.name)) for field in fields(panel)}}


def _plain(value: Any) -> Any:
    """Dataclasses, arrays and floats as JSON values; what is not finite becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value


def seeds_text(figure: Figure, collection: Collection) -> str:
    """How many seeds stand behind a figure, `3 seeds an arm` or `1 to 3 seeds an arm`."""
    of_arm = {arm.name: len(arm.cells) for arm in collection.arms}
    counts: set[int] = set()
    for panel in figure.panels:
        if isinstance(panel, LinePanel):
            counts |= {int(curve.seeds.max()) for curve in panel.curves}
        elif isinstance(panel, DotPanel):
            counts |= {len(row.values) for row in panel.dots}
        else:
            counts.add(of_arm[panel.arm])
    low, high = min(counts or of_arm.values()), max(counts or of_arm.values())
    number = str(low) if low == high else f"{low} to {high}"
    return f"{number} seed{'' if high == 1 else 's'}{' an arm' if len(of_arm) > 1 else ''}"


def numbers(figure: Figure) -> list[tuple[str, list[tuple[str, str, Estimate]]]]:
    """What a figure shows, as rows of text: by panel, each arm's last point with interval and number of seeds."""
    tables = []
    for panel in figure.panels:
        if isinstance(panel, LinePanel):
            rows = []
            for curve in panel.curves:
                last = np.flatnonzero(np.isfinite(curve.mean))[-1]
                mean, low, high = (float(values[last]) for values in (curve.mean, curve.low, curve.high))
                end = Estimate(mean, low, high, int(curve.seeds[last]))
                rows.append((curve.arm, f"{panel.x_label} {curve.x[last]:g}", end))
            tables.append((panel.title, rows))
        elif isinstance(panel, DotPanel):
            tables.append(
                (panel.title, [(d.label, "", Estimate(d.mean, d.low, d.high, len(d.values))) for d in panel.dots])
            )
    return tables


def _number(value: float | None) -> str:
    return "not measured" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _interval(value: Estimate) -> str:
    return "" if not math.isfinite(value.low) else f"[{value.low:.4g}, {value.high:.4g}]"


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gspo_moe.report", "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "interval": _interval}
    return environment


def _asset(name: str) -> str:
    return files("gspo_moe.report").joinpath("assets", name).read_text(encoding="utf-8")


def _embedded(data: Any) -> str:
    """JSON for a script element: nothing in it can end that element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@cache
def _packed(library: str) -> str:
    """gzip and base64: a third of plotly.js's own size."""
    return base64.b64encode(gzip.compress(library.encode(), 9, mtime=0)).decode()


def _digest(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
