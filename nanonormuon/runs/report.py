"""Runs as one self-contained HTML page: curves to hover over, samples, configuration."""

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
from nanonormuon.runs.compare import RunRecord, read_all, row_of, spell
from nanonormuon.runs.pictures import short
from nanonormuon.storage.checkpoints import read_json
from nanonormuon.storage.files import read_file, replace_file
from nanonormuon.storage.run import read_samples

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 760, 274, 72, 34, 44, 10
COLOURS = 6  # in report.html, as .c0 to .c5
# between dashes another curve that lies under this one shows
DASHES = {"": "", " (dashed)": "7 3", " (dotted)": "2 3", " (mixed)": "9 3 2 3"}
WHICH = ("min", "mean", "max")
CHARTS = (
    ("Loss", ("loss", "val_loss")),
    ("Bits per byte", ("val_bpb",)),
    ("Learning rate", ("lr",)),
    ("Gradient norm", ("grad_norm",)),
    ("Neurons' weights (root mean square)", tuple(f"neuron_rms_{w}" for w in WHICH)),
    ("Size of an update relative to the weights", ("update_ratio",)),
    ("Experts' load relative to its mean", ("expert_load_min", "expert_load_max")),
    ("Router's entropy relative to that of even shares", ("router_entropy",)),
    ("Tokens per second", ("tokens_per_second",)),
)


def write(paths: Sequence[Path], out: Path) -> None:
    """Write the page of one run directory or several, or replace the page of the same ones. Raises
    RunError, CheckpointError, UsageError, OSError."""
    runs = read_all(paths)
    if out.is_dir():
        raise UsageError(f"--out {out}: a directory, expected a page's name, as {out}/run.html")
    origin = hashlib.sha256("\n".join(str(p.resolve()) for p in paths).encode()).hexdigest()
    mark = f'content="{origin}"'.encode()
    names = ", ".join(map(str, paths))
    if out.exists() and not (out.is_file() and mark in out.read_bytes()[:1000]):
        raise UsageError(f"--out {out}: exists and is not a page of {names}: choose another name")
    body = [overview(runs)]
    for title, keys in CHARTS:
        body += chart(runs, title, keys)
    for run in runs:
        name = html.escape(run.name)
        body += [f"<details open><summary>{name}</summary>"] if len(runs) > 1 else []
        body += [*details(run.path), *(["</details>"] if len(runs) > 1 else [])]
    curves = [{"name": run.name, "rows": run.rows} for run in runs]
    rows = json.dumps(curves).replace("<", "\\u003c")
    title = html.escape(f"{', '.join(run.name for run in runs)}: nanonormuon")
    out.parent.mkdir(parents=True, exist_ok=True)
    page = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    page = page.substitute(origin=origin, title=title, body="\n".join(body), rows=rows)
    replace_file(out, page.encode(errors="xmlcharrefreplace"))


def overview(runs: Sequence[RunRecord]) -> str:
    """The runs' results, a column each, and the settings in which they differ."""
    columns = [{k: spell(k, v) for k, v in row_of(run, None).items()} for run in runs]
    settings = [{f"{s}.{k}": v for s, t in r.config.items() for k, v in t.items()} for r in runs]
    for key in dict.fromkeys(key for table in settings for key in table):
        if len({str(table.get(key, "-")) for table in settings}) > 1:
            for column, table in zip(columns, settings):
                column.setdefault(key.removeprefix("optim."), table.get(key, "-"))
    return key_values(*columns)


def details(run: Path) -> list[str]:
    """Samples, results, environment and configuration of a run."""
    parts = samples(run / "samples.jsonl")
    for name in (RESULTS, "summary.json", "environment.json"):
        if (run / name).exists():
            tables = kept(run / name) if name == RESULTS else [read_json(run / name)]
            parts += [f"<h2>{name.split('.')[0].capitalize()}</h2>", *map(key_values, tables)]
    config = read_file(run / "config.toml").decode()
    return [*parts, "<h2>Configuration</h2>", f"<pre>{html.escape(config)}</pre>"]


def key_values(*columns: dict[str, Any]) -> str:
    """A table of equal keys, without those that have no value in the first column."""
    rows = []
    for key in (key for key, value in columns[0].items() if value is not None):
        values = (spell(key, v) if isinstance(v := c.get(key), float) else v for c in columns)
        cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in values)
        rows.append(f"<tr><th>{html.escape(str(key))}</th>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def samples(file: Path) -> list[str]:
    """The samples of each prompt side by side, in the order of their steps; of a step that was
    repeated after an interruption, the later one."""
    rows = read_samples(file)
    parts = ["<h2>Samples</h2>"] if rows else []
    for prompt in dict.fromkeys(row.get("prompt", "") for row in rows):
        parts.append('<div class="samples">')
        for row in (row for row in rows if row.get("prompt", "") == prompt):
            text = f"<b>{html.escape(prompt)}</b>{html.escape(row.get('text', ''))}"
            parts.append(f"<div><p>step {row['step']:,}</p><pre>{text}</pre></div>")
        parts.append("</div>")
    return parts


def chart(runs: Sequence[RunRecord], title: str, keys: Sequence[str]) -> list[str]:
    """Draw the curves that have two points or more over steps, as an inline SVG with a line that
    follows the pointer; nothing if there are none."""
    found = ((i, key, run.curve(key)) for i, run in enumerate(runs) for key in keys)
    curves = [(i, key, curve) for i, key, curve in found if len(curve[0]) > 1]
    if not curves:
        return []
    ys = [y for *_, curve in curves for y in curve[1]]
    bottom, top = min(ys), max(ys)
    if top - bottom < 1e-12 * max(1.0, abs(top)):
        bottom, top = bottom - 0.5 * (abs(bottom) or 1), top + 0.5 * (abs(top) or 1)
    # equal in all charts
    first, last = min(r.rows[0]["step"] for r in runs), max(r.rows[-1]["step"] for r in runs)
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
    shown, names = list(dict.fromkeys(key for _, key, _ in curves)), []
    for i, key, curve in curves:
        kind = shown.index(key)
        style, dashes = list(DASHES.items())[kind]
        colour = f"c{(kind if len(runs) == 1 else i) % COLOURS}"
        points = " ".join(f"{x_at(a):.1f},{y_at(b):.1f}" for a, b in zip(*curve))
        dashed = f'stroke-dasharray="{dashes}"'
        parts.append(f'<polyline class="curve {colour}" {dashed} points="{points}"/>')
        run = html.escape(runs[i].name) if len(runs) > 1 else ""
        name = f"{run} {key}{style}" if run and len(shown) > 1 else run or key
        names.append(f'<span class="{colour}">{name}</span>')
    return [
        f"<h2>{title}</h2>",
        f'<div class="legend">{" ".join(names)}</div>' if len(names) > 1 else "",
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" data-keys="{" ".join(shown)}"',
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
