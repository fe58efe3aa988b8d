"""The command `gspo-moe compare`. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from gspo_moe.errors import ConfigError, DataError
from gspo_moe.files import write_whole
from gspo_moe.garbage import imports
from gspo_moe.packages import install

NEEDED = ("transformers", "safetensors", "psutil", "jinja2")
# Names of `Comparison.to_metrics`, what each is, and the factor that its unit has.
ROWS = (
    ("slot_change", "expert slots changed V, %", 100.0),
    ("flip_rate", "choices changed D, %", 100.0),
    ("any_layer_flip", "tokens with a change in any layer A, %", 100.0),
    ("flipped_layers_per_token", "layers changed, a token", 1.0),
    ("response_set_change", "experts of a whole response changed, %", 100.0),
    ("router_shift", "router shift gamma", 1.0),
    ("router_margin", "margin of the first model's choices", 1.0),
    ("log_prob_change", "log-prob change, mean, nats", 1.0),
    ("log_prob_change_abs", "log-prob change, mean size, nats", 1.0),
    ("log_prob_change_max", "log-prob change, largest size, nats", 1.0),
    ("k3", "mean exp(d) - 1 - d of the change d", 1.0),
    ("phi_token", "share of routes in the change phi, tokens", 1.0),
    ("phi_sequence", "share of routes in the change phi, sequences", 1.0),
    ("washout", "washout W", 1.0),
)


def add_compare(commands: Any) -> None:
    """Adds it to argparse's subparsers."""
    command = commands.add_parser("compare", help="volatility between two MoE checkpoints on a text of yours")
    command.add_argument("old", type=Path, metavar="A", help="Hugging Face folder")
    command.add_argument("new", type=Path, metavar="B", help="another of the same architecture, or A again")
    command.add_argument(
        "--data", required=True, type=Path, metavar="FILE.jsonl", help="texts, or prompts and responses"
    )
    command.add_argument("--output", type=Path, metavar="PAGE.html", help="figures as one page, over an earlier one")
    command.add_argument("--json", type=Path, metavar="FILE", help="every figure, over an earlier file")
    command.add_argument("--dtype", metavar="TYPE", help="float32, bfloat16 or float16 (default: the checkpoint's own)")
    command.add_argument("--dtype-b", metavar="TYPE", help="of B, where it is another one")
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    command.add_argument("--stream", action="store_true", help="one layer in memory at a time, even where all fit")
    command.add_argument("--longest", type=int, default=4096, metavar="N", help="tokens of a text (default: 4096)")
    command.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="at a time (default: 8192)")
    command.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} not installed, which compare needs; run {install('watch')}")
    with imports():
        from gspo_moe.watching.checkpoints import choose_source, compare_sources, load_config, load_tokenizer
        from gspo_moe.watching.texts import batches, read_rows

    if options.longest < 2 or options.batch_tokens < 1:
        raise ConfigError("--longest must be 2 or more and --batch-tokens 1 or more")
    for path in (options.output, options.json):
        if path is not None and path.is_dir():
            raise ConfigError(f"{path} is a folder; name a file")
    configs = [load_config(folder).get_text_config() for folder in (options.old, options.new)]
    kinds = [(one.model_type, one.vocab_size, one.num_hidden_layers, one.hidden_size) for one in configs]
    if kinds[0] != kinds[1]:
        raise DataError(
            f"A is a {kinds[0]}, B a {kinds[1]} (type, vocabulary, layers, width); compare one architecture"
        )
    rows = read_rows(options.data, load_tokenizer(options.old), configs[0].vocab_size, options.longest)
    old = choose_source(options.old, options.dtype, options.device, options.stream)
    new = choose_source(options.new, options.dtype_b or options.dtype, options.device, options.stream)
    found, layers = compare_sources(old, new, batches(rows, options.batch_tokens))
    figures = found.to_metrics()
    head = [
        f"A: {_said(old)}",
        f"B: {_said(new)}",
        f"{len(rows)} texts of {options.data}, {found.tokens} tokens counted",
    ]
    print("\n".join([*head, "", *table(figures), "", *layer_table(figures, layers)]))
    if options.json is not None:
        values = {name: _plain(value) for name, value in figures.items()}
        write_whole(options.json, json.dumps({"compared": head, "layers": layers, **values}, indent=1) + "\n")
    if options.output is not None:
        from gspo_moe.watching.page import render

        write_whole(options.output, render(head, table_rows(figures), figures, layers))
        print(f"\n{options.output}: opens in any browser, needs no network")


def table_rows(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What each figure is, its value, and its 95 % interval where it has one."""
    rows = []
    for name, label, factor in ROWS:
        value = figures.get(name)
        if value is None or not math.isfinite(value):
            rows.append((label, "not measured", ""))
            continue
        half = figures["slot_change_half_interval"] if name == "slot_change" else math.nan
        low, high = figures.get(f"{name}_low", max(value - half, 0.0)), figures.get(f"{name}_high", value + half)
        known = f"{name}_low" in figures or math.isfinite(half)
        interval = f"[{number(low * factor)}, {number(high * factor)}]" if known and math.isfinite(low) else ""
        rows.append((label, number(value * factor), interval))
    return rows


def table(figures: dict[str, Any]) -> list[str]:
    return [f"{label:<46}{value:>14}  {interval}".rstrip() for label, value, interval in table_rows(figures)]


def layer_table(figures: dict[str, Any], layers: tuple[str, ...]) -> list[str]:
    """V, D and the margin of each MoE layer."""
    changes, flips = figures["slot_change_by_layer"], figures["flip_rate_by_layer"]
    margins = figures.get("router_margin_by_layer", [math.nan] * len(layers))
    lines = [f"{'router':<32}{'V, %':>10}{'D, %':>10}{'margin':>12}"]
    for name, change, flip, margin in zip(layers, changes, flips, margins, strict=True):
        lines.append(f"{name:<32}{number(100 * change):>10}{number(100 * flip):>10}{number(margin):>12}")
    return lines


def _said(source: Any) -> str:
    how = "layer by layer" if source.streamed else "whole"
    return f"{source.folder}, {source.dtype}, {how} on {source.device}"


def number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value if math.isfinite(value) else None
