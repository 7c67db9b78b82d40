"""Write the part of docs/results.md that comes from races, and its plots.

    python scripts/evidence.py runs/race-shakespeare runs/width-*   # adds these races
    python scripts/evidence.py                                      # from the races kept

The results.json of a race is kept as docs/results/NAME.json. All tables and plots are made from
those files; the text goes between the marks `<!-- races -->` and `<!-- /races -->`. The README's
table is written by hand, and tests/test_readme.py compares it with the races kept. Races usually
run beside other work, so times are left out; --ms normuon=226,adamw=210 adds milliseconds per
step, measured on an idle machine, to the one race given.
"""

import argparse
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from nanonormuon.lab import results
from nanonormuon.runs.pictures import picture

ROOT = Path(__file__).parents[1]
KEPT, RESULTS = ROOT / "docs" / "results", ROOT / "docs" / "results.md"
FAMILIES = {"width": "model width", "batch": "tokens per step"}  # races named FAMILY-NUMBER


def take(folder: Path, ms: dict[str, float]) -> None:
    """Keep a race's results, without the path of its data if that is a directory. ms: milliseconds
    per step of each optimizer, on an idle machine."""
    text = (folder / "results.json").read_text(encoding="utf-8")
    found = json.loads(text)
    directory = re.compile(r" ?data\.path=(?!builtin:)\S+")
    found["arguments"] = [a for a in found["arguments"] if not directory.match(a)]
    found["command"] = directory.sub("", found["command"])
    for row in found["optimizers"]:
        row["ms_per_step"] = ms.get(row["optimizer"])
        row["curves"] = [[[x, round(y, 5)] for x, y in curve] for curve in row.get("curves", [])]
    KEPT.mkdir(exist_ok=True)
    lines = json.dumps(found, indent=1)
    lines = re.sub(r"\[\s+([-\d.e]+),\s+([-\d.e]+)\s+\]", r"[\1, \2]", lines)
    (KEPT / f"{folder.name}.json").write_text(lines + "\n", encoding="utf-8")


def section(name: str, found: dict[str, Any]) -> str:
    """One race: how it was made, its table, its plot."""
    seeds = max((row.get("n", 0) for row in found["optimizers"]), default=0)
    lines = [f"### {name}", "", "```", found["command"], "```", ""]
    where = f"{', '.join(found['device'])}, torch {', '.join(found['torch'])}"
    lines += [
        f"{found['steps']:,} steps, {found['tokens']:,} tokens; {where}; source "
        f"{', '.join(s[:8] for s in found['source_sha256'])}. "
        + (f"Differences and intervals (95 %) are over {seeds} seeds in pairs." if seeds else ""),
        "",
    ]
    if seeds:
        against_first = name == "ablations"
        table = variants if against_first else partial(results.markdown, times=False)
        lines += [table(found), ""]
        (draw_variants if against_first else results.draw)(found, KEPT / f"{name}.png")
        lines += [f"![{name}](results/{name}.png)", ""]
    return "\n".join(lines)


def variants(found: dict[str, Any]) -> str:
    """Every optimizer of a race against its first."""
    first = found["optimizers"][0]["optimizer"]
    lines = [["optimizer", "lr", "val_loss", f"minus {first}", "95 % interval"]]
    for row in found["optimizers"]:
        cells = ["", ""]
        if versus := row["against"].get(first):
            low, high = versus["difference_interval"]
            cells = [f"{versus['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}"]
        loss = f"{row['mean']:.4f} ± {row['sd']:.4f}"
        lines.append([row["optimizer"], f"{row['lr']:g}", loss, *cells])
    return results.as_markdown(lines)


def draw_variants(found: dict[str, Any], file: Path) -> None:
    """What each variant adds to the first optimizer's loss, with 95 % intervals."""
    first, *rest = found["optimizers"]
    with picture(file, 1, 1, 8, 5) as axes:
        axis = axes[0, 0]
        for y, row in enumerate(reversed(rest)):
            versus = row["against"][first["optimizer"]]
            low, high = versus["difference_interval"]
            label = "95 % interval" if y == 0 else None
            axis.plot([low, high], [y, y], "-", color="C0", label=label)
            axis.plot([versus["difference"]], [y], marker="o", color="C0")
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_yticks(range(len(rest)), [row["optimizer"] for row in reversed(rest)], fontsize=8)
        axis.set(xlabel=f"validation loss minus {first['optimizer']}'s")


def family(kind: str, races: dict[int, dict[str, Any]]) -> str:
    """Races that differ in one size: the rates tried, best ones marked, and the curves."""
    rows = {
        (label, size): {t["lr"]: sum(t["val_loss"]) / len(t["val_loss"])
                        for t in entry["tuning"] if t["val_loss"]}
        for size, found in sorted(races.items())
        for entry in found["optimizers"] for label in [entry["optimizer"]]
    }  # fmt: skip
    rates = sorted({rate for tried in rows.values() for rate in tried})
    lines = [["optimizer", FAMILIES[kind], *(f"lr {rate:g}" for rate in rates)]]
    for (label, size), tried in sorted(rows.items()):
        best = min(tried, key=tried.__getitem__)
        cells = [f"{tried[r]:.4f}" if r in tried else "" for r in rates]
        cells = [f"**{c}**" if r == best else c for r, c in zip(rates, cells)]
        lines.append([label, f"{size:,}", *cells])
    with picture(KEPT / f"{kind}.png", 1, 1, 7, 4.5) as axes:
        axis = axes[0, 0]
        labels, sizes = sorted({label for label, _ in rows}), sorted(races)
        for (label, size), tried in sorted(rows.items()):
            which = sizes.index(size)  # several optimizers: a colour each, a line style per size
            style = ("-", "--", "-.", ":")[which % 4] if len(labels) > 1 else "-"
            color = f"C{labels.index(label) if len(labels) > 1 else which}"
            axis.plot(tried.keys(), tried.values(), style, color=color, marker=".",
                      label=f"{label} {size:,}")  # fmt: skip
            best = min(tried, key=tried.__getitem__)
            axis.plot([best], [tried[best]], marker="o", color=color)
        axis.set(xlabel="learning rate of the matrices", ylabel="loss on the tuning split")
        results.by_rates(axis)
    table = results.as_markdown(lines)
    return f"### {kind}\n\nLoss on the tuning split.\n\n{table}\n\n![{kind}](results/{kind}.png)\n"


def between(file: Path, content: str) -> None:
    """Replace what stands between the marks of a file."""
    text = file.read_text(encoding="utf-8")
    new, count = re.subn(
        r"(<!-- races -->\n).*?(<!-- /races -->)", lambda m: m[1] + content + m[2], text, flags=re.S
    )
    if count != 1:
        raise SystemExit(f"{file}: expected <!-- races --> and <!-- /races --> once, found {count}")
    file.write_text(new, encoding="utf-8")


def main(folders: list[str], ms: str = "") -> None:
    pairs = (part.partition("=") for part in ms.split(",") if part)
    times = {name: float(value) for name, _, value in pairs}
    for folder in folders:
        take(Path(folder), times)
    races = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(KEPT.glob("*.json"))}
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for name, found in races.items():
        kind, _, size = name.rpartition("-")
        if kind in FAMILIES and size.isdigit():
            groups.setdefault(kind, {})[int(size)] = found
    parts = [section(name, found) for name, found in races.items()]
    parts += [family(kind, members) for kind, members in sorted(groups.items())]
    between(RESULTS, "\n" + "\n".join(parts) + "\n")
    print(f"{RESULTS.relative_to(ROOT)}: {len(races)} races")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("races", nargs="*", help="directories that `normuon-train race` left")
    parser.add_argument("--ms", default="", help="OPTIMIZER=MILLISECONDS,... per step")
    options = parser.parse_args()
    main(options.races, options.ms)
