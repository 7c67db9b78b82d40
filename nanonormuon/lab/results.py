"""What a race says: each optimizer's numbers, their table, their plot."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanonormuon.lab.significance import interval, spread
from nanonormuon.runs.pictures import picture


@dataclass(frozen=True)
class Entry:
    """A runner in the race: an optimizer with what is fixed about it, and its grid."""

    label: str
    settings: tuple[str, ...]  # KEY=VALUE
    rates: tuple[float, ...]
    others: tuple[tuple[str, ...], ...] = ((),)  # the other axes' combinations, each KEY=VALUE ...


@dataclass
class Standing:
    """What is known of an entry."""

    entry: Entry
    tuning: dict[tuple[float, tuple[str, ...]], list[float]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best(self) -> tuple[float, tuple[str, ...]]:
        """The setting with the lowest mean loss on the tuning split, or the only one."""
        if len(self.tuning) == 1:
            return next(iter(self.tuning))
        return min(self.tuning, key=lambda s: (statistics.fmean(self.tuning[s]), s[0]))

    @property
    def losses(self) -> list[float]:
        return [run["val_loss"] for run in self.runs]


def judge(standings: Sequence[Standing], steps: int) -> list[dict[str, Any]]:
    """Each entry's numbers. The baseline is the best of all but the first; differences and steps
    saved are taken seed by seed, where initialisation and data order are the same."""
    baseline = min(standings[1:], key=mean_loss, default=None)
    rows = []
    for s in standings:
        row: dict[str, Any] = {
            "optimizer": s.entry.label,
            "lr": s.best[0],
            "settings": [*s.entry.settings, *s.best[1]],
            "tuning": [
                {"lr": rate, "settings": others, "val_loss": losses}
                for (rate, others), losses in sorted(s.tuning.items())
            ],
        }
        if s.runs:
            row |= {
                "n": len(s.runs),
                "val_loss": s.losses,
                "mean": statistics.fmean(s.losses),
                "sd": spread(s.losses),
                "ms_per_step": 1000 * statistics.fmean(r["train_seconds"] / steps for r in s.runs)
                if all(r.get("train_seconds") for r in s.runs) else None,
                "peak_memory": max((r.get("peak_memory") or 0) for r in s.runs) or None,
                "curves": [r["curve"] for r in s.runs],
            }  # fmt: skip
            row["against"] = {
                other.entry.label: versus(s.runs, other.losses, steps)
                for other in standings
                if other is not s
            }
        if s.runs and baseline is not None:
            row["baseline"] = baseline.entry.label
            row |= versus(s.runs, baseline.losses, steps)
        rows.append(row)
    return rows


def versus(runs: Sequence[dict[str, Any]], losses: Sequence[float], steps: int) -> dict[str, Any]:
    """Runs against the last losses of another optimizer's, pair by pair: the difference, and the
    step at which each one's curve is as low as the other ended."""
    differences = [run["val_loss"] - loss for run, loss in zip(runs, losses)]
    reached = [reaches(run["curve"], loss) for run, loss in zip(runs, losses)]
    row = {
        "difference": statistics.fmean(differences),
        "difference_interval": interval(differences),
        "reached": sum(r is not None for r in reached),
    }
    steps_to = [r for r in reached if r is not None]
    if len(steps_to) == len(runs):
        saved = [100 * (1 - r / steps) for r in steps_to]
        row |= {
            "steps_to_baseline": statistics.fmean(steps_to),
            "percent_saved": statistics.fmean(saved),
            "percent_saved_interval": interval(saved),
        }
    return row


def mean_loss(standing: Standing) -> float:
    return statistics.fmean(standing.losses) if standing.runs else math.inf


def reaches(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """The step at which a curve of [step, loss], straight between its points, first is so low."""
    before: Sequence[float] | None = None
    for point in curve:
        if point[1] <= loss:
            if before is None:
                return point[0]
            (x0, y0), (x1, y1) = before, point
            return x0 + (x1 - x0) * (y0 - loss) / (y0 - y1)
        before = point
    return None


def markdown(results: Mapping[str, Any], times: bool = True) -> str:
    """The table of a race, for a terminal and for a README; without `times` where the runs had the
    machine for themselves only in part."""
    rows = results["optimizers"]
    head = ["optimizer", "lr", "val_loss", "n", "minus baseline", "steps to baseline's",
            "steps saved", "ms/step", "memory"]  # fmt: skip
    lines = []
    for r in rows:
        label = r["optimizer"] + (" (baseline)" if r["optimizer"] == r.get("baseline") else "")
        others = [s for s in r["settings"] if not s.startswith("optim.name=")]
        extra = "".join(f", {s.removeprefix('optim.')}" for s in others if s not in label)
        if "mean" not in r:
            lines.append([label, f"{r['lr']:g}{extra}", *["-"] * (len(head) - 2)])
            continue
        lines.append(
            [
                label,
                f"{r['lr']:g}{extra}",
                f"{r['mean']:.4f}" + ("" if r["sd"] is None else f" ± {r['sd']:.4f}"),
                str(r["n"]),
                ranged(r.get("difference"), r.get("difference_interval"), "+.4f"),
                reached(r),
                ranged(r.get("percent_saved"), r.get("percent_saved_interval"), ".1f", " %"),
                "-" if r["ms_per_step"] is None else f"{r['ms_per_step']:.1f}",
                "-" if r["peak_memory"] is None else f"{r['peak_memory'] / 1e9:.2f} GB",
            ]
        )
    table = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row[: None if times else -2]) + " |" for row in table)


def reached(row: Mapping[str, Any]) -> str:
    if "steps_to_baseline" in row:
        return f"{row['steps_to_baseline']:.0f}"
    count = row.get("reached", 0)
    return f"{count} of {row['n']} runs" if count else "not reached"


def ranged(mean: float | None, between: Sequence[float] | None, form: str, unit: str = "") -> str:
    if mean is None:
        return "-"
    text = f"{mean:{form}}{unit}"
    return text if between is None else f"{text} ({between[0]:{form}} to {between[1]:{form}})"


def draw(results: Mapping[str, Any], file: Path) -> None:
    """Validation loss over steps, shaded by one standard deviation over seeds; and what the choice
    of the learning rate was made by."""
    rows = results["optimizers"]
    with picture(file, 1, 2, 6, 4.2) as axes:
        curves, tuning = axes[0]
        for r in rows:
            points = [dict(curve) for curve in r.get("curves", []) if curve]
            shared = sorted(set.intersection(*map(set, points))) if points else []
            late = [step for step in shared if step >= 0.2 * results["steps"]]
            means = [statistics.fmean(p[step] for p in points) for step in late]
            sds = [spread([p[step] for p in points]) or 0.0 for step in late]
            label = f"{r['optimizer']}, n = {len(points)}"
            (line,) = curves.plot(late, means, label=label if points else r["optimizer"])
            curves.fill_between(
                late,
                [m - s for m, s in zip(means, sds)],
                [m + s for m, s in zip(means, sds)],
                alpha=0.25,
                color=line.get_color(),
            )
            best = {}
            for t in filter(lambda t: t["val_loss"], r["tuning"]):
                loss = statistics.fmean(t["val_loss"])
                best[t["lr"]] = min(loss, best.get(t["lr"], math.inf))
            shown = {rate: loss for rate, loss in sorted(best.items()) if math.isfinite(loss)}
            tuning.plot(shown.keys(), shown.values(), marker="o", label=r["optimizer"],
                        color=line.get_color())  # fmt: skip
        curves.set(xlabel="step", ylabel="validation loss")
        tuning.set(xlabel="learning rate of the matrices", ylabel="loss on the tuning split")
        by_rates(tuning)
        tuning.legend()


def by_rates(axis: Any) -> None:
    """Make the x-axis one of learning rates, with labels that leave each other room."""
    axis.set_xscale("log")
    axis.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
