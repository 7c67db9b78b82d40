"""The results of a race: numbers per optimizer, their table, their plot."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanonormuon.lab.significance import interval, spread
from nanonormuon.runs.pictures import picture
from nanonormuon.storage.run import as_markdown


@dataclass
class Entry:
    """An optimizer in a race: its fixed settings, its grid, and the results of its runs."""

    label: str
    settings: tuple[str, ...]  # fixed, each KEY=VALUE
    rates: tuple[float, ...]
    others: tuple[tuple[str, ...], ...] = ((),)  # combinations of the other axes
    tuning: list[dict[str, Any]] = field(default_factory=list)  # as in results.json
    runs: list[dict[str, Any]] = field(default_factory=list)  # Job.result of seed 0, 1, ...

    @property
    def best(self) -> dict[str, Any]:
        """The trial with the lowest mean loss on the tuning split; a single one is not run."""
        return min(self.tuning, key=lambda t: (mean(t["val_loss"]), t["lr"]))

    @property
    def losses(self) -> list[float]:
        return [run["val_loss"] for run in self.runs]


def mean(values: Sequence[float]) -> float:
    """The mean; infinite if there are no values."""
    return statistics.fmean(values) if values else math.inf


def judge(entries: Sequence[Entry], steps: int, named: str = "") -> list[dict[str, Any]]:
    """The rows of results.json, one per entry. The baseline is the entry labelled `named`, else the
    best of all but the first. Runs of equal seed, so of equal start and data, are compared."""
    ran = [e for e in entries[not named :] if e.runs and named in ("", e.label)]
    baseline = min(ran, key=lambda e: mean(e.losses), default=None)
    rows = []
    for e in entries:
        row: dict[str, Any] = {
            "optimizer": e.label,
            "lr": e.best["lr"],
            "settings": [*e.settings, *e.best["settings"]],
            "tuning": sorted(e.tuning, key=lambda t: (t["lr"], t["settings"])),
        }
        rows.append(row)
        if not e.runs:
            continue
        seconds = [run.get("train_seconds") for run in e.runs]
        row |= {
            "n": len(e.runs),
            "val_loss": e.losses,
            "mean": mean(e.losses),
            "sd": spread(e.losses),
            "ms_per_step": 1000 * mean([s / steps for s in seconds]) if all(seconds) else None,
            "peak_memory": max((run.get("peak_memory") or 0) for run in e.runs) or None,
            "curves": [run["curve"] for run in e.runs],
            "against": {o.label: versus(e, o, steps) for o in entries if o is not e},
        }
        if baseline is not None:
            row |= {"baseline": baseline.label} | versus(e, baseline, steps)
    return rows


def versus(entry: Entry, other: Entry, steps: int) -> dict[str, Any]:
    """Compare an entry's runs with another's final losses, seed by seed: the difference, and the
    step at which the curve first reaches the other's final loss."""
    pairs = [*zip(entry.runs, other.losses)]
    differences = [run["val_loss"] - loss for run, loss in pairs]
    steps_to = [step for run, loss in pairs if (step := reaches(run["curve"], loss)) is not None]
    row = {
        "difference": mean(differences),
        "difference_interval": interval(differences),
        "reached": len(steps_to),
    }
    if len(steps_to) == len(pairs):
        saved = [100 * (1 - step / steps) for step in steps_to]
        row |= {
            "steps_to_baseline": mean(steps_to),
            "percent_saved": mean(saved),
            "percent_saved_interval": interval(saved),
        }
    return row


def reaches(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """The step at which a curve of [step, loss], linear in between, first reaches `loss`."""
    i = next((i for i, (_, y) in enumerate(curve) if y <= loss), None)
    if not i:
        return None if i is None else curve[0][0]
    (x0, y0), (x1, y1) = curve[i - 1 : i + 1]
    return x0 + (x1 - x0) * (y0 - loss) / (y0 - y1)


def markdown(results: Mapping[str, Any], times: bool = True) -> str:
    """The table of a race as Markdown. times: with time and memory (of an idle machine)."""
    lines = [["optimizer", "lr", "val_loss", "n", "minus baseline", "steps to baseline's",
              "steps saved", "ms/step", "memory"]]  # fmt: skip
    for r in results["optimizers"]:
        label = r["optimizer"] + (" (baseline)" if r["optimizer"] == r.get("baseline") else "")
        others = [s for s in r["settings"] if not s.startswith("optim.name=") and s not in label]
        rate = "".join([f"{r['lr']:g}", *(f", {s.removeprefix('optim.')}" for s in others)])
        lines.append([label, rate, *["-"] * 7])
        if "mean" in r:
            memory = None if r["peak_memory"] is None else r["peak_memory"] / 1e9
            lines[-1][2:] = [
                with_spread(r["val_loss"]),
                str(r["n"]),
                ranged(r.get("difference"), "+.4f", between=r.get("difference_interval")),
                reached(r),
                ranged(r.get("percent_saved"), ".1f", " %", r.get("percent_saved_interval")),
                ranged(r["ms_per_step"], ".1f"),
                ranged(memory, ".2f", " GB"),
            ]
    table = as_markdown([line[: None if times else -2] for line in lines])
    detailed = [r for r in results["optimizers"] if r.get("breakdown")]
    return f"{table}\n\n{breakdowns(detailed)}" if detailed else table


def breakdowns(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of pretrained/breakdown.py's numbers: means and standard deviations over seeds."""
    shares = [group["up_to_percent"] for group in rows[0]["breakdown"][0]["by_frequency"]]
    spans = [f"loss, {a} to {b} %" for a, b in pairwise([0, *shares])]
    lines = [["optimizer", *spans, "kurtosis", "largest", "cost of 4 bits"]]
    for row in rows:
        parts = [
            *([b["by_frequency"][i]["loss"] for b in row["breakdown"]] for i in range(len(shares))),
            [b["excess_kurtosis"] for b in row["breakdown"]],
            [b["largest_kurtosis"]["value"] for b in row["breakdown"]],
            [b["cost_4bit"] for b in row["breakdown"]],
        ]
        lines.append([row["optimizer"], *map(with_spread, parts)])
    return as_markdown(lines)


def with_spread(values: Sequence[float | None]) -> str:
    """A mean and its standard deviation; "-" if a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    sd = spread(known)
    return f"{mean(known):.4f}" + ("" if sd is None else f" ± {sd:.4f}")


def reached(row: Mapping[str, Any]) -> str:
    if "steps_to_baseline" in row:
        return f"{row['steps_to_baseline']:.0f}"
    if (count := row.get("reached")) is None:  # no baseline
        return "-"
    return f"{count} of {row['n']} runs" if count else "not reached"


def ranged(
    value: float | None, form: str, unit: str = "", between: Sequence[float] | None = None
) -> str:
    """A number and its interval; "-" for None."""
    if value is None:
        return "-"
    text = f"{value:{form}}{unit}"
    return text if between is None else f"{text} ({between[0]:{form}} to {between[1]:{form}})"


def draw(results: Mapping[str, Any], file: Path, times: bool = True) -> None:
    """Draw the validation loss over steps, shaded by one standard deviation over seeds, and over
    seconds (times: of an idle machine), and the loss on the tuning split over learning rates."""
    rows = results["optimizers"]
    times = times and all(r.get("ms_per_step") for r in rows)
    with picture(file, 1, 2 + times, 6, 4.2) as axes:
        curves, *clock, tuning = axes[0]
        for r in rows:
            points = [dict(curve) for curve in r.get("curves", []) if curve]
            shared = sorted(set.intersection(*map(set, points))) if points else []
            late = [step for step in shared if step >= 0.2 * results["steps"]]
            means = [mean([p[step] for p in points]) for step in late]
            sds = [spread([p[step] for p in points]) or 0.0 for step in late]
            label = f"{r['optimizer']}, n = {len(points)}" if points else r["optimizer"]
            marker = "." if len(late) < 40 else None  # one point makes no line
            (line,) = curves.plot(late, means, marker=marker, label=label)
            color = line.get_color()
            low, high = ([m + sign * s for m, s in zip(means, sds)] for sign in (-1, 1))
            curves.fill_between(late, low, high, alpha=0.25, color=color)
            for axis in clock:
                seconds = [step * r["ms_per_step"] / 1000 for step in late]
                axis.plot(seconds, means, marker=marker, color=color)
            best: dict[float, float] = {}  # by rate, over the other axes
            for t in r["tuning"]:
                best[t["lr"]] = min(mean(t["val_loss"]), best.get(t["lr"], math.inf))
            shown = {rate: loss for rate, loss in sorted(best.items()) if math.isfinite(loss)}
            tuning.plot(shown.keys(), shown.values(), marker="o", label=r["optimizer"], color=color)
        curves.set(xlabel="step", ylabel="validation loss")
        for axis in clock:
            axis.set(xlabel="seconds of training", ylabel="validation loss")
        tuning.set(xlabel="learning rate of the matrices", ylabel="loss on the tuning split")
        by_rates(tuning)
        tuning.legend()


def by_rates(axis: Any) -> None:
    """Scale the x-axis for learning rates, with labels that do not overlap."""
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    fewer = int(high > 50 * low) + int(high > 3000 * low)
    axis.xaxis.get_major_locator().set_params(subs=((1, 2, 5), (1, 3), (1,))[fewer])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
