"""The end of a run: its loss as a curve, if at a terminal; samples before and after training."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nanonormuon.storage.run import read_metrics, read_samples

WIDEST, NARROW = 100, 72  # columns at most; with fewer than NARROW texts are not side by side
HEIGHT, LONGEST = 7, 10  # lines of the curve; of a sample at most
BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # dots by row and column
Points = Sequence[tuple[int, float]]  # steps and values
ASCII = dict(zip(map(ord, "│┤└─●"), "||+-o")) | dict.fromkeys(range(0x2801, 0x2900), "*")


def story(run: Path, console: Console) -> list[str]:
    """The curve of a run, only at a terminal, and its first and last samples."""
    rows, samples = read_metrics(run / "metrics.jsonl"), read_samples(run / "samples.jsonl")
    steps = sorted({row["step"] for row in samples})
    titles = {s: f"after step {s:,}" if s else "before training" for s in (*steps[:1], *steps[-1:])}
    if console.is_terminal:
        width = min(WIDEST, console.width - 1)
        loss, val_loss = (
            [(r["step"], r[key]) for r in rows if math.isfinite(r.get(key, math.nan))]
            for key in ("loss", "val_loss")
        )
        columns = [titles] if width >= NARROW else [{s: titles[s]} for s in titles]
        with console.capture() as shown:
            parts = [*curve(loss, val_loss, width), *(beside(samples, part) for part in columns)]
            for part in parts:
                console.print(part, width=width)
        text = shown.get()
        return (text.translate(ASCII) if console.options.ascii_only else text).splitlines()
    lines = []
    for row in samples:
        if title := titles.get(row["step"]):
            text = (row.get("prompt", "") + row.get("text", "")).splitlines()
            lines += [f"sample {title}:", *(f"  | {line}" for line in text)]
    return lines


def curve(loss: Points, val_loss: Points, width: int) -> list[Text]:
    """Draw the loss as a line of braille dots, and validations as larger dots upon it."""
    if len(loss) < 2:
        return []
    values = [y for _, y in (*loss, *val_loss)]
    low, high, first, last = min(values), max(values), loss[0][0], loss[-1][0]
    labels = [f"{high - (high - low) * i / (HEIGHT - 1):.3g}" for i in range(HEIGHT)]
    margin = max(map(len, labels))
    columns = width - margin - 2

    def row(y: float, rows: int) -> int:
        return round((high - y) / ((high - low) or 1) * (rows - 1))

    cells = np.full((HEIGHT, columns), 0x2800)
    points = np.array(loss, float).T  # an int may have more than 64 bits
    heights = [
        row(y, 4 * HEIGHT) for y in np.interp(np.linspace(first, last, 2 * columns), *points)
    ]
    for x, (a, b) in enumerate(pairwise([heights[0], *heights])):
        for dot in range(min(a, b), max(a, b) + 1):
            cells[dot // 4, x // 2] |= BRAILLE[dot % 4][x % 2]
    for x, y in val_loss:
        place = round((x - first) / (last - first) * (columns - 1))
        cells[row(y, HEIGHT), min(columns - 1, max(0, place))] = ord("●")
    lines = [Text()]
    for i, line in enumerate(cells.tolist()):
        axis = f"{'' if i % 3 else labels[i]:>{margin}} {'│' if i % 3 else '┤'}"
        drawn = Text("".join(map(chr, line)).rstrip("\u2800").replace("\u2800", " "), "cyan")
        drawn.highlight_words(["●"], "yellow")
        lines.append(Text.assemble((axis, "dim"), drawn))
    lines.append(Text(f"{'':{margin}} └{'─' * columns}", "dim"))
    legend = f"{'':{margin}}  step {first:,} to {last:,}: loss, and val_loss at each "
    return [*lines, Text.assemble(legend, ("●", "yellow")), Text()]


def beside(samples: Sequence[dict[str, Any]], titles: dict[int, str]) -> Table:
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
        cells[row["step"], prompt] = Text("\n".join(lines[:LONGEST]))
        cells[row["step"], prompt].stylize("bold", 0, len(prompt))
    for prompt in dict.fromkeys(prompt for _, prompt in cells):
        table.add_row(*(cells.get((step, prompt), Text()) for step in titles))
    return table
