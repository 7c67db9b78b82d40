"""Runs side by side: a table for the terminal, curves as PNG or SVG, where a loss was reached."""

import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanonormuon.errors import RunError
from nanonormuon.runs.pictures import picture
from nanonormuon.storage.run import read_metrics

BARS = "▁▂▃▄▅▆▇█"
KNOWN = ("step", "tokens", "seconds", "loss", "val_loss", "val_bpb", "lr", "tokens_per_second")


@dataclass(frozen=True)
class RunRecord:
    """What a run directory tells: its configuration and its metrics."""

    path: Path
    name: str
    config: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]

    def curve(self, key: str, over: str = "step") -> tuple[list[float], list[float]]:
        """The values of `key` that were logged, and where."""
        rows = [r for r in self.rows if r.get(key) is not None and r.get(over) is not None]
        return [r[over] for r in rows], [r[key] for r in rows]


def read(path: Path) -> RunRecord:
    """Raises RunError for what is no run directory or has no metrics yet."""
    try:
        config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RunError(f"{path}: not a run directory: {error}") from None
    rows = read_metrics(path / "metrics.jsonl")
    if not rows:
        raise RunError(f"{path}: no step is logged in metrics.jsonl yet")
    return RunRecord(path, path.resolve().name, config, rows)


def read_all(paths: Sequence[Path]) -> list[RunRecord]:
    """Several runs; those that share a name go by their paths as given."""
    runs = [read(path) for path in paths]
    count = Counter(run.name for run in runs)
    return [replace(r, name=str(r.path)) if count[r.name] > 1 else r for r in runs]


def row_of(run: RunRecord, target: float | None) -> dict[str, Any]:
    """One run's line of the table. With a target: the first evaluation at or below it."""
    last, (_, losses) = run.rows[-1], run.curve("val_loss")
    _, bits = run.curve("val_bpb")
    optim = run.config.get("optim", {})
    row = {
        "run": run.name,
        "optimizer": optim.get("name"),
        "lr": optim.get("lr"),
        "steps": last["step"],
        "tokens": last.get("tokens"),
        "seconds": max((r.get("seconds", 0.0) for r in run.rows), default=None),
        "loss": next((r["loss"] for r in reversed(run.rows) if "loss" in r), None),
        "val_loss": losses[-1] if losses else None,
        "best_val_loss": min(losses, default=None),
        "val_bpb": bits[-1] if bits else None,
    }
    if target is not None:
        hit = next((r for r in run.rows if r.get("val_loss", target + 1) <= target), {})
        row |= {f"target_{k}": hit.get(k) for k in ("step", "tokens", "seconds")}
    return row


def table(runs: Sequence[RunRecord], target: float | None = None, width: int = 24) -> str:
    """One line per run, its curve of val_loss (or loss) at the end."""
    lines = [[*row_of(runs[0], target), "curve"]]
    for run in runs:
        cells = [spell(key, value) for key, value in row_of(run, target).items()]
        curve = run.curve("val_loss")[1]
        lines.append([*cells, sparkline(curve if len(curve) > 2 else run.curve("loss")[1], width)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def spell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if key.endswith("seconds"):
        return f"{value:,.0f}"
    if "loss" in key or "bpb" in key:
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """A curve in one line of text, each character the mean of its share of the values."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((m - low) * scale)] for m in means)


def plot(runs: Sequence[RunRecord], file: Path, target: float | None = None) -> None:
    """Curves as PNG or SVG, by the file's name: the loss over steps, tokens and time, learning
    rate, gradient norm, speed, and whatever other numbers were logged."""
    others = {k for run in runs for r in run.rows for k in r if isinstance(r[k], int | float)}
    panels = [("val_loss", "step"), ("val_loss", "tokens"), ("val_loss", "seconds")]
    panels += [("loss", "step"), ("lr", "step"), ("tokens_per_second", "step")]
    panels += [(key, "step") for key in sorted(others - set(KNOWN))]
    with picture(file, -(-len(panels) // 3), 3, 5, 4) as axes:
        for axis, (key, over) in zip(axes.flat, panels):
            for run in runs:
                x, y = run.curve(key, over)
                axis.plot(x, y, label=run.name, marker="." if len(x) < 40 else None)
            if target is not None and key == "val_loss":
                axis.axhline(target, color="grey", linestyle="--", linewidth=1)
            axis.set(xlabel=over, ylabel=key)
