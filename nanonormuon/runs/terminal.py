"""The end of a run: its loss as a curve, if at a terminal; samples before and after training."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nanonormuon.runs.compare import sparkline
from nanonormuon.storage.run import read_rows

WIDEST, NARROW, NARROWEST = 100, 72, 20  # columns; below NARROW texts are not side by side
HEIGHTS = {"loss": 6, "val_loss": 2}  # lines of a curve
LONGEST = 10  # lines of a sample at most


def story(run: Path, console: Console) -> list[str]:
    """The curves of a run, only at a terminal, and its first and last samples."""
    rows, samples = read_rows(run / "metrics.jsonl"), read_rows(run / "samples.jsonl")
    steps = sorted({row["step"] for row in samples})
    titles = {s: f"after step {s:,}" if s else "before training" for s in (*steps[:1], *steps[-1:])}
    if console.is_terminal:
        width = max(NARROWEST, min(WIDEST, console.width - 1))
        columns = [titles] if width >= NARROW else [{s: titles[s]} for s in titles]
        parts: list[Text | Table] = [] if console.options.ascii_only else curves(rows, width)
        with console.capture() as shown:
            for part in (*parts, *(beside(samples, part, console, width) for part in columns)):
                console.print(part, width=width)
        return shown.get().splitlines()
    lines = []
    for row in samples:
        if title := titles.get(row["step"]):
            text = (row.get("prompt", "") + row.get("text", "")).splitlines()
            lines += [f"sample {title}:", *(f"  | {line}" for line in text)]
    return lines


def curves(rows: Sequence[dict[str, Any]], width: int) -> list[Text]:
    """Draw the losses that were logged at several steps, each with its range above it."""
    parts = []
    for key, height in HEIGHTS.items():
        points = {r["step"]: r[key] for r in rows if math.isfinite(r.get(key, math.nan))}
        if len(points) > 1:
            low, high = min(points.values()), max(points.values())
            head = f"{key}, {low:.4g} to {high:.4g}, at steps {min(points):,} to {max(points):,}"
            wide = [value for value in points.values() for _ in range(width // len(points) or 1)]
            bars = sparkline(wide, width, height)
            parts.append(Text.assemble("\n", (head, "dim"), "\n", (bars, "cyan")))
    return parts


def beside(
    samples: Sequence[dict[str, Any]], titles: dict[int, str], console: Console, width: int
) -> Table:
    """The samples of some steps, a column each, prompt by prompt. Nothing in their text moves the
    cursor or changes a colour."""
    table = Table(box=box.MINIMAL, show_lines=True, expand=True, header_style="dim")
    for title in titles.values():
        table.add_column(title, ratio=1, overflow="fold")
    cells: dict[tuple[int, str], Text] = {}
    for row in samples:
        prompt = row.get("prompt", "")
        text = (prompt + row.get("text", "")).expandtabs(4).rstrip()
        lines = "".join(c if c.isprintable() or c == "\n" else "?" for c in text).split("\n")
        cell = Text("\n".join(lines))
        cell.stylize("bold", 0, len(prompt))
        wrapped = cell.wrap(console, width // len(titles) - 3)  # without rules and margins
        cells[row["step"], prompt] = Text("\n").join(wrapped[:LONGEST])
    for prompt in dict.fromkeys(prompt for _, prompt in cells):
        table.add_row(*(cells.get((step, prompt), Text()) for step in titles))
    return table
