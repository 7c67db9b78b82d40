"""A run as one self-contained HTML page: curves to hover over, samples, configuration."""

import hashlib
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from nanonormuon.errors import UsageError
from nanonormuon.pretrained.judge import RESULTS, kept
from nanonormuon.runs.compare import RunRecord, read, row_of, spell
from nanonormuon.runs.pictures import short
from nanonormuon.storage.checkpoints import read_json
from nanonormuon.storage.files import read_file, replace_file
from nanonormuon.storage.run import read_samples

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 760, 274, 72, 34, 44, 10
# by curve: its colour and its dashes, between which another that lies under it shows
STYLES = (("#1f6feb", ""), ("#d1242f", "7 3"), ("#1a7f37", "2 3"), ("#9a6700", "9 3 2 3"))
WHICH = ("min", "mean", "max")
CHARTS = (
    ("Loss", ("loss", "val_loss")),
    ("Bits per byte", ("val_bpb",)),
    ("Learning rate", ("lr",)),
    ("Gradient norm", ("grad_norm",)),
    ("Neurons' weights (root mean square)", tuple(f"neuron_rms_{w}" for w in WHICH)),
    ("Last update's norm over the weights'", ("update_ratio",)),
    ("Experts' load over its mean", ("expert_load_min", "expert_load_max")),
    ("Router's entropy over that of even shares", ("router_entropy",)),
    ("Tokens per second", ("tokens_per_second",)),
)


def write(run: Path, out: Path) -> None:
    """Write the page of a run directory, or replace the one of the same directory. Raises RunError,
    CheckpointError, UsageError, OSError."""
    record = read(run)
    if out.is_dir():
        raise UsageError(f"--out {out}: a directory, expected a page's name, as {out}/run.html")
    origin = hashlib.sha256(str(run.resolve()).encode()).hexdigest()
    mark = f'content="{origin}"'.encode()
    if out.exists() and not (out.is_file() and mark in out.read_bytes()[:1000]):
        raise UsageError(f"--out {out}: exists and is not a page of {run}: choose another name")
    body = [key_values({k: spell(k, v) for k, v in row_of(record, None).items()})]
    for title, keys in CHARTS:
        body += chart(record, title, keys)
    body += samples(run / "samples.jsonl")
    for name in (RESULTS, "summary.json", "environment.json"):
        if (run / name).exists():
            tables = kept(run / name) if name == RESULTS else [read_json(run / name)]
            body += [f"<h2>{name.split('.')[0].capitalize()}</h2>", *map(key_values, tables)]
    config = read_file(run / "config.toml").decode()
    body += ["<h2>Configuration</h2>", f"<pre>{html.escape(config)}</pre>"]
    rows = json.dumps(record.rows).replace("<", "\\u003c")
    title = html.escape(f"{record.name}: nanonormuon")
    out.parent.mkdir(parents=True, exist_ok=True)
    page = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    page = page.substitute(origin=origin, title=title, body="\n".join(body), rows=rows)
    replace_file(out, page.encode(errors="xmlcharrefreplace"))


def key_values(content: dict[str, Any]) -> str:
    known = {html.escape(str(k)): html.escape(str(v)) for k, v in content.items() if v is not None}
    cells = (f"<tr><th>{k}</th><td>{v}</td></tr>" for k, v in known.items())
    return f"<table>{''.join(cells)}</table>"


def samples(file: Path) -> list[str]:
    """The samples by step; the last one of a step that was repeated after an interruption."""
    parts = []
    for row in read_samples(file):
        text = html.escape(row.get("prompt", "") + row.get("text", ""))
        parts.append(f"<p>step {row['step']:,}</p><pre>{text}</pre>")
    return ["<h2>Samples</h2>", *parts] if parts else []


def chart(run: RunRecord, title: str, keys: Sequence[str]) -> list[str]:
    """Draw the curves that have two points or more over steps, as an inline SVG with a line that
    follows the pointer; nothing if there are none."""
    curves = {key: curve for key in keys if len((curve := run.curve(key))[0]) > 1}
    if not curves:
        return []
    ys = [y for _, y in curves.values() for y in y]
    bottom, top = min(ys), max(ys)
    if top - bottom < 1e-12 * max(1.0, abs(top)):
        bottom, top = bottom - 0.5 * (abs(bottom) or 1), top + 0.5 * (abs(top) or 1)
    first, last = run.rows[0]["step"], run.rows[-1]["step"]  # equal in all charts
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x_at(x: float) -> float:
        return LEFT + (x - first) / ((last - first) or 1) * (right - LEFT)

    def y_at(y: float) -> float:
        return TOP + (top - y) / (top - bottom) * (floor - TOP)

    def label(x: float, y: float, text: str, anchor: str = "end") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'

    parts = [label((LEFT + right) / 2, HEIGHT - 6, "step", "middle")]
    parts += [label(x_at(x), floor + 18, short(x), "middle") for x in ticks(first, last)]
    for y in ticks(bottom, top):
        grid = f'class="grid" x1="{LEFT}" x2="{right}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}"'
        parts += [f"<line {grid}/>", label(LEFT - 6, y_at(y) + 4, short(y))]
    for (x, y), (colour, dashes) in zip(curves.values(), STYLES):
        points = " ".join(f"{x_at(a):.1f},{y_at(b):.1f}" for a, b in zip(x, y))
        style = f'stroke="{colour}" stroke-dasharray="{dashes}"'
        parts.append(f'<polyline class="curve" {style} points="{points}"/>')
    names = [f'<span style="color:{c}">{key}</span>' for key, (c, _) in zip(curves, STYLES)]
    return [
        f"<h2>{title}</h2>",
        f'<div class="legend">{" ".join(names)}</div>' if len(names) > 1 else "",
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" data-keys="{" ".join(curves)}"',
        f'data-range="{first} {last} {LEFT} {right}">{"".join(parts)}',
        f'<line class="cursor" y1="{TOP}" y2="{floor}"/></svg><div class="readout"></div>',
    ]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [i * size for i in range(first, math.floor(high / size + 1e-9) + 1)]
