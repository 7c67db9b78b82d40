"""Compare run directories: a table for the terminal, curves, where a loss was reached."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanonormuon.config import read_toml
from nanonormuon.errors import CheckpointError, RunError
from nanonormuon.runs.pictures import picture
from nanonormuon.storage.checkpoints import all_steps, read_json
from nanonormuon.storage.run import aligned, known_runs, read_rows

log = logging.getLogger(__name__)
BARS = "▁▂▃▄▅▆▇█"
KNOWN = {"step", "tokens", "seconds", "loss", "val_loss", "val_bpb", "lr", "tokens_per_second"}


@dataclass(frozen=True)
class RunRecord:
    """The configuration and metrics of a run directory."""

    path: Path
    name: str
    config: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]

    def curve(self, key: str, over: str = "step") -> tuple[list[float], list[float]]:
        """The logged values of `key`: x coordinates (steps, or another key's values) and values."""
        rows = [r for r in self.rows if r.get(key) is not None and r.get(over) is not None]
        return [r[over] for r in rows], [r[key] for r in rows]


def read(path: Path) -> RunRecord:
    """Read a run directory. Raises RunError or ConfigError if it is not one, or has no metrics."""
    file = path / "config.toml"
    if not file.exists():
        raise RunError(f"{path}: not a run directory, no config.toml; {known_runs(path)}")
    config = read_toml(str(file))
    for name, table in config.items():
        values = table.values() if isinstance(table, dict) else [None]
        if not all(isinstance(value, bool | int | float | str) for value in values):
            raise RunError(f"{file}: [{name[:40]}]: expected numbers and text")
    rows = read_rows(path / "metrics.jsonl")
    if not rows:
        raise RunError(f"{path}: no step is logged in metrics.jsonl yet")
    for row in rows:  # neither a curve nor a table can show NaN, infinity, or a number near it
        for key in [k for k, v in row.items() if v is not None and not abs(v) < 1e100]:
            del row[key]
    return RunRecord(path, path.resolve().name, config, rows)


def read_all(paths: Sequence[Path]) -> list[RunRecord]:
    """Read runs; those with equal names go by their paths. Logs a warning if their validation
    losses are not on the same tokens in the same windows."""
    runs = [read(path) for path in paths]
    count = Counter(run.name for run in runs)
    runs = [replace(r, name=str(r.path)) if count[r.name] > 1 else r for r in runs]
    if len({*(sets := validation_sets(runs))}) > 1:
        each = "; ".join(f"{run.name}: {name}" for run, name in zip(runs, sets))
        log.warning(f"warning: val_loss cannot be compared, it is on different tokens: {each}")
    return runs


def validation_sets(runs: Sequence[RunRecord]) -> list[str]:
    """What each run validates on: the data's fingerprint in its checkpoint, or the data's path if a
    run has no checkpoint or mixes other directories into its fingerprint."""
    tables, names = [run.config.get("data", {}) for run in runs], []
    for run, table in zip(runs, tables):
        saved = [] if table.get("mix") else all_steps(run.path / "checkpoints")[-1:]
        with suppress(CheckpointError, LookupError, OSError, TypeError):
            names += [f"data {read_json(path / 'state.json')['data'][:12]}" for path in saved]
    if len(names) < len(runs):
        names = [str(table.get("path")) for table in tables]
    for i, table in enumerate(tables):
        if share := table.get("tuning"):
            names[i] += f", the last {spell('share', share)} of the training tokens"
        if tokens := table.get("val_tokens"):
            names[i] += f", {spell('tokens', tokens)} tokens"
        names[i] += f", windows of {table.get('seq_len')}"
    return names


def row_of(run: RunRecord, target: float | None) -> dict[str, Any]:
    """A run's row of the table; with a target, also the first evaluation at or below it."""
    last, optim = run.rows[-1], run.config.get("optim", {})
    losses, bits = run.curve("val_loss")[1], run.curve("val_bpb")[1]
    row = {
        "run": run.name,
        "optimizer": optim.get("name"),
        "lr": optim.get("lr"),
        "steps": last["step"],
        "tokens": last.get("tokens"),
        "seconds": max(r.get("seconds", 0.0) for r in run.rows),
        "loss": next((r["loss"] for r in reversed(run.rows) if "loss" in r), None),
        "val_loss": losses[-1] if losses else None,
        "best_val_loss": min(losses, default=None),
        "val_bpb": bits[-1] if bits else None,
    }
    if target is not None:
        hit = next((r for r in run.rows if r.get("val_loss", target + 1) <= target), {})
        row |= {f"target_{k}": hit.get(k) for k in ("step", "tokens", "seconds")}
    return row


def table(runs: Sequence[RunRecord], target: float | None = None) -> str:
    """A line per run that ends in a curve of val_loss, or of loss if there are few evaluations."""
    lines = [[*row_of(runs[0], target), "curve"]]
    for run in runs:
        cells = [spell(key, value) for key, value in row_of(run, target).items()]
        curve = run.curve("val_loss")[1]
        lines.append([*cells, sparkline(curve if len(curve) > 2 else run.curve("loss")[1])])
    return aligned(lines, numbers=True)


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


def sparkline(values: Sequence[float], width: int = 24, height: int = 1) -> str:
    """Draw values as bars in at most `width` columns, each the mean of an equal share of them, and
    `height` lines."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) * height - 1) / (high - low) if high > low else 0.0
    filled = [1 + round((m - low) * scale) for m in means]  # eighths of a line
    rows = ([min(8, max(0, n - 8 * row)) for n in filled] for row in reversed(range(height)))
    return "\n".join("".join((" " + BARS)[n] for n in row) for row in rows)


def plot(runs: Sequence[RunRecord], file: Path, target: float | None = None) -> None:
    """Draw the loss over steps, tokens and time, and every other number that was logged over steps,
    as PNG, SVG or PDF by the file's name. Raises what `picture` raises."""
    logged = {k for run in runs for r in run.rows for k in r if isinstance(r[k], int | float)}
    others = {k for k in logged if re.fullmatch(r"\w{1,50}", k, re.ASCII)}  # others are ignored
    over_steps = ["loss", "lr", "tokens_per_second", *sorted(others - KNOWN)]
    panels = [("val_loss", over) for over in ("step", "tokens", "seconds")]
    panels += [(key, "step") for key in over_steps]
    with picture(file, -(-len(panels) // 3), 3, 5, 4) as axes:
        for axis, (key, over) in zip(axes.flat, panels):
            for run in runs:
                x, y = run.curve(key, over)
                name = run.name.encode(errors="replace").decode()  # bytes may be no UTF-8
                axis.plot(x, y, label=name, marker="." if len(x) < 40 else None)
            if target is not None and key == "val_loss":
                axis.axhline(target, color="grey", linewidth=1, label=f"target {target:g}")
            axis.set(xlabel=over, ylabel=key)
            axis.ticklabel_format(axis="x", scilimits=(-3, 4))  # long labels would overlap
