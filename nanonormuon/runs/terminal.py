"""The end of a run: its loss as a curve, if at a terminal; samples before and after training."""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TextIO
from unicodedata import combining, east_asian_width

import numpy as np

from nanonormuon.storage.run import read_rows

WIDEST, NARROW = 100, 72  # columns at most; with fewer than NARROW texts are not side by side
HEIGHT, LONGEST = 7, 10  # lines of the curve; of a sample at most
BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # dots by row and column
LOSSES = "loss", "val_loss"
Points = Sequence[tuple[int, float]]  # steps and values
ASCII = dict(zip(map(ord, "│┤└─┼●"), "||+-+o")) | dict.fromkeys(range(0x2801, 0x2900), "*")


@dataclass(frozen=True)
class Look:
    """What a stream can show."""

    terminal: bool
    colours: bool
    unicode: bool
    width: int

    @classmethod
    def of(cls, stream: TextIO | None) -> "Look":
        """Colours need a terminal, and no NO_COLOR (no-color.org). None: a closed stream."""
        terminal = stream is not None and stream.isatty()
        colours = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        unicode = (getattr(stream, "encoding", "") or "").lower().startswith("utf")
        width = max(20, min(WIDEST, shutil.get_terminal_size().columns - 1))
        return cls(terminal, colours, unicode, width)

    def paint(self, text: str, code: int) -> str:
        """Text in a colour or weight (1 bold, 2 faint, 33 yellow, 36 cyan), where there are any;
        lines and dots in ASCII, where there is nothing else."""
        text = text if self.unicode else text.translate(ASCII)
        return f"\x1b[{code}m{text}\x1b[0m" if self.colours and text else text


def story(run: Path, look: Look) -> list[str]:
    """The curve of a run, only at a terminal, and its first and last samples."""
    rows, samples = read_rows(run / "metrics.jsonl"), read_rows(run / "samples.jsonl")
    steps = sorted({row["step"] for row in samples})
    titles = {s: f"after step {s:,}" if s else "before training" for s in (*steps[:1], *steps[-1:])}
    if look.terminal:
        known = ([r for r in rows if math.isfinite(r.get(k, math.nan))] for k in LOSSES)
        curves = ([(r["step"], r[k]) for r in found] for k, found in zip(LOSSES, known))
        return [*curve(*curves, look), *beside(samples, titles, look)]
    lines = []
    for row in samples:
        if title := titles.get(row["step"]):
            text = (row.get("prompt", "") + row.get("text", "")).splitlines()
            lines += [f"sample {title}:", *(f"  | {line}" for line in text)]
    return lines


def curve(loss: Points, val_loss: Points, look: Look) -> list[str]:
    """Draw the loss as a line of braille dots, and validations as larger dots upon it."""
    if len(loss) < 2:
        return []
    values = [y for _, y in (*loss, *val_loss)]
    low, high, first, last = min(values), max(values), loss[0][0], loss[-1][0]
    labels = [f"{high - (high - low) * i / (HEIGHT - 1):.3g}" for i in range(HEIGHT)]
    margin = max(map(len, labels))
    width = look.width - margin - 2

    def row(y: float, rows: int) -> int:
        return round((high - y) / ((high - low) or 1) * (rows - 1))

    cells, before = [[0x2800] * width for _ in labels], row(loss[0][1], 4 * HEIGHT)
    points = np.array(loss, float).T  # an int may have more than 64 bits
    for x, y in enumerate(np.interp(np.linspace(first, last, 2 * width), *points)):
        y = row(y, 4 * HEIGHT)
        for dot in range(min(y, before), max(y, before) + 1):
            cells[dot // 4][x // 2] |= BRAILLE[dot % 4][x % 2]
        before = y
    for x, y in val_loss:
        place = min(width - 1, max(0, round((x - first) / (last - first) * (width - 1))))
        cells[row(y, HEIGHT)][place] = ord("●")
    lines = []
    for i, line in enumerate(cells):
        axis = f"{'' if i % 3 else labels[i]:>{margin}} {'│' if i % 3 else '┤'}"
        parts = "".join(map(chr, line)).rstrip("\u2800").replace("\u2800", " ").split("●")
        drawn = look.paint("●", 33).join(look.paint(part, 36) for part in parts)
        lines.append(look.paint(axis, 2) + drawn)
    lines.append(look.paint(f"{'':{margin}} └{'─' * width}", 2))
    legend = f"{'':{margin}}  step {first:,} to {last:,}: loss, and val_loss at each "
    return ["", *lines, legend + look.paint("●", 33), ""]


def beside(samples: Sequence[dict[str, Any]], titles: dict[int, str], look: Look) -> list[str]:
    """The samples of two steps, prompt by prompt: side by side, or stacked if `look` is narrow."""
    of: dict[int, dict[str, str]] = {step: {} for step in titles}
    for row in samples:
        of.get(row["step"], {})[row.get("prompt", "")] = row.get("text", "")
    wide = look.width >= NARROW and len(titles) > 1
    width = (look.width - 3) // 2 if wide else look.width
    lines = []
    for prompt in dict.fromkeys(prompt for texts in of.values() for prompt in texts):
        heads = (look.paint(f"── {titles[step]} ".ljust(width, "─"), 2) for step in of)
        bodies = (wrapped(prompt, texts.get(prompt, ""), width, look) for texts in of.values())
        blocks = [[head, *body] for head, body in zip(heads, bodies)]
        rows = zip_longest(*blocks, fillvalue=" " * width) if wide else zip(chain(*blocks))
        lines += [f" {look.paint('│', 2)} ".join(row).rstrip() for row in rows]
    return [*lines, ""]


def wrapped(prompt: str, text: str, width: int, look: Look) -> list[str]:
    """The first lines of a sample, filled up to `width` columns, with its prompt in bold. Nothing
    in the text moves the cursor or changes a colour."""
    lines, room = [""], [width]
    for char in (prompt + text).expandtabs(4).rstrip():
        size = 0 if combining(char) else 1 + (east_asian_width(char) in "WF")
        if char == "\n" or size > room[-1]:
            lines.append("")
            room.append(width)
        if char != "\n":
            lines[-1] += char if char.isprintable() else "?"
            room[-1] -= size
    lines = [line + " " * left for line, left in zip(lines, room)][:LONGEST]
    if prompt and lines[0].startswith(prompt):
        lines[0] = look.paint(prompt, 1) + lines[0].removeprefix(prompt)
    return lines
