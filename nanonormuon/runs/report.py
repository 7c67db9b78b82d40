"""A run as one self-contained HTML page: curves to hover over, samples, configuration."""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanonormuon.errors import UsageError
from nanonormuon.pretrained.judge import RESULTS, kept
from nanonormuon.runs.compare import RunRecord, read, row_of, spell
from nanonormuon.storage.checkpoints import read_json
from nanonormuon.storage.files import read_file, replace_file
from nanonormuon.storage.run import read_samples

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 260, 64, 30, 10
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700")
WHICH = ("min", "mean", "max")
CHARTS = (
    ("Loss", ("loss", "val_loss")),
    ("Bits per byte", ("val_bpb",)),
    ("Learning rate", ("lr",)),
    ("Gradient norm", ("grad_norm",)),
    ("Neurons' weights (root mean square)", tuple(f"neuron_rms_{w}" for w in WHICH)),
    ("Last update's norm over the weights'", ("update_ratio",)),
    ("Tokens per second", ("tokens_per_second",)),
)

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 800px; margin: 2em auto; padding: 0 1em;
  color: #1f2328; background: #fff; }}
h1 {{ font-size: 1.5em; }} h2 {{ font-size: 1.15em; margin: 2em 0 .3em; }}
table {{ border-collapse: collapse; }}
td, th {{ text-align: left; padding: .15em 1.2em .15em 0; vertical-align: top; }}
th {{ font-weight: 600; color: #59636e; }}
svg {{ width: 100%; height: auto; }} svg text {{ font-size: 11px; fill: #59636e; }}
.grid {{ stroke: #d1d9e0; }} .cursor {{ stroke: #59636e; visibility: hidden; }}
.curve {{ fill: none; stroke-width: 1.6; }}
.legend span {{ margin-right: 1.2em; }}
.readout {{ min-height: 1.5em; font-variant-numeric: tabular-nums; color: #59636e; }}
pre {{ background: #f6f8fa; padding: .8em; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 13px; }}
</style></head><body>
<h1>{title}</h1>
{body}
<script type="application/json" id="rows">{rows}</script>
<script>
const rows = JSON.parse(document.getElementById("rows").textContent);
const text = (v) => Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : +v.toPrecision(5);
for (const svg of document.querySelectorAll("svg[data-keys]")) {{
  const keys = svg.dataset.keys.split(" ");
  const [low, high, left, right] = svg.dataset.range.split(" ").map(Number);
  const own = rows.filter((r) => keys.some((k) => r[k] != null));
  const cursor = svg.querySelector(".cursor"), readout = svg.nextElementSibling;
  svg.addEventListener("pointermove", (event) => {{
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const step = low + (at - left) / (right - left) * (high - low);
    const near = (a, b) => Math.abs(b.step - step) < Math.abs(a.step - step) ? b : a;
    const row = own.reduce(near);
    const x = left + (row.step - low) / (high - low || 1) * (right - left);
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
    readout.textContent = ["step", "tokens", "seconds", ...keys].filter((k) => row[k] != null)
      .map((k) => k + " " + text(row[k])).join("   ");
  }});
  svg.addEventListener("pointerleave", () => {{
    cursor.style.visibility = "hidden"; readout.textContent = "";
  }});
}}
</script></body></html>
"""


def write(run: Path, out: Path) -> None:
    """Write the page of a run directory. Raises RunError, CheckpointError, UsageError, OSError."""
    record = read(run)
    if out.is_dir():
        raise UsageError(f"--out {out}: a directory, expected a page's name, as {out}/run.html")
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
    page = PAGE.format(title=title, body="\n".join(body), rows=rows)
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
    right, floor = WIDTH - 10, HEIGHT - BOTTOM

    def x_at(x: float) -> float:
        return LEFT + (x - first) / ((last - first) or 1) * (right - LEFT)

    def y_at(y: float) -> float:
        return TOP + (top - y) / (top - bottom) * (floor - TOP)

    def label(x: float, y: float, text: str, anchor: str = "end") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'

    parts = [label(LEFT - 6, HEIGHT - 10, "step")]
    parts += [label(x_at(x), HEIGHT - 10, f"{x:,.6g}", "middle") for x in ticks(first, last)]
    for y in ticks(bottom, top):
        grid = f'class="grid" x1="{LEFT}" x2="{right}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}"'
        parts += [f"<line {grid}/>", label(LEFT - 6, y_at(y) + 4, f"{y:,.6g}")]
    for (x, y), colour in zip(curves.values(), COLOURS):
        points = " ".join(f"{x_at(a):.1f},{y_at(b):.1f}" for a, b in zip(x, y))
        parts.append(f'<polyline class="curve" stroke="{colour}" points="{points}"/>')
    names = [f'<span style="color:{c}">{key}</span>' for key, c in zip(curves, COLOURS)]
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
