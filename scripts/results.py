"""Print rows of docs/results.md from run directories, so that no figure is typed by hand.

    python scripts/results.py runs/a runs/b >> docs/results.md

Runs that differ in their seed alone become one row with n, mean and standard deviation.
"""

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path

from nanonormuon import config as configuration
from nanonormuon.config import MAY_CHANGE
from nanonormuon.lab.results import as_markdown
from nanonormuon.runs import compare

COLUMNS = ("run", "changed", "n", "steps", "tokens", "val_loss", "val_bpb", "train s", "total s",
           "tokens/s", "device", "torch", "commit")  # fmt: skip


def spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def changed(config: dict, recipe: dict) -> str:
    """The settings in which a run differs from its recipe, except those without effect on the
    result and the seed."""
    silent = {"train.seed", "data.path", "model.vocab_size", *MAY_CHANGE} - {"train.steps"}
    return ", ".join(
        f"{section}.{key}={value}"
        for section, table in config.items()
        for key, value in table.items()
        if f"{section}.{key}" not in silent and recipe.get(section, {}).get(key, value) != value
    )


def main(folders: list[str]) -> None:
    groups: dict[tuple, list[tuple[dict, dict]]] = {}
    for folder in map(Path, folders):
        config = compare.read(folder).config
        environment = json.loads((folder / "environment.json").read_text())
        summary = json.loads((folder / "summary.json").read_text())
        words = environment["command"].split()
        recipe = next((w for w in words if w in configuration.recipes()), "demo")
        settings = asdict(configuration.load([recipe])[0])
        settings["model"] = config["model"]  # resolved from the data in the run's own file
        key = (recipe, changed(config, settings), summary["steps"], environment["git_commit"])
        groups.setdefault(key, []).append((summary, environment))
    rows = [COLUMNS]
    for (recipe, settings, steps, commit), runs in groups.items():
        s, e = [r[0] for r in runs], runs[0][1]
        cells = [
            recipe,
            settings,
            len(runs),
            steps,
            f"{s[0]['tokens']:,}",
            spread([x["val_loss"] for x in s], 4),
            spread([x["val_bpb"] for x in s], 4),
            spread([x["train_seconds"] for x in s], 1),
            spread([x["total_seconds"] for x in s], 1),
            spread([x["tokens_per_second"] for x in s], 0),
            f"{e['device']} x {e['ranks']}, {e['cpu_threads']} threads",
            e["torch"],
            commit[:8] if commit else f"source {e['source_sha256'][:8]}",
        ]
        rows.append([*map(str, cells)])
    print(as_markdown(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", help="run directories")
    main(parser.parse_args().runs)
