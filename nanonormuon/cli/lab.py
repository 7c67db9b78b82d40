"""Experiments of many runs: races of optimizers, trials and speedruns against a target."""

import json
import math
import re
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from nanonormuon.cli import options

Recipe = Annotated[list[str], Argument(help="Settings of all runs.", **options.SETTINGS)]
Out = Annotated[Path, Option(help="Directory; an existing one is continued.", **options.OUT)]
AT_ONCE = "Runs at a time; 0: one per GPU, one on a CPU. Each has OMP_NUM_THREADS threads if set."
Parallel = Annotated[int, Option(min=0, help=AT_ONCE)]
Ranks = Annotated[int, Option(min=1, help="Processes (GPUs) per run, through torchrun.")]
Count = Annotated[int, Option("--n", min=1, help="Runs, with seeds 0 to N - 1.")]
Strings = list[str] | None
OPTIMIZERS = "normuon, muon, adamw, zoo:NAME, FILE.py:Class, module:Class; each may add +KEY=VALUE."
RATES = 'Rates to try: "0.01,0.02", "adamw=0.01,0.02" or multiples "0.5x,2x"; repeatable.'
GROW = "Extend a grid by up to 4 rates while its best rate is the lowest or highest."
BASELINE = "Optimizer to compare the others with; default: the best of all but the first."
BREAKDOWN = "Add what `evaluate --breakdown` shows of the final models."
CHOSEN = "A record and changes to it; all: every record."
AXIS = "Values of another setting to try: SECTION.KEY=A,B,C; repeatable."


def race(
    recipe: Recipe,
    out: Out,
    optimizers: Annotated[str, Option(help=OPTIMIZERS)] = "normuon,muon,adamw",
    lr: Annotated[Strings, Option(help=RATES)] = None,
    wd: Annotated[str, Option(help='Weight decays to try, as "0,0.1".')] = "",
    sweep: Annotated[Strings, Option(help=AXIS)] = None,
    grow: Annotated[bool, Option("--grow/--no-grow", help=GROW)] = True,
    baseline: Annotated[str, Option(help=BASELINE)] = "",
    seeds: Annotated[int, Option(min=0, help="Seeds of the final runs; 0: only tune.")] = 5,
    tuning_seeds: Annotated[int, Option(min=1, help="Seeds per setting in the tuning.")] = 1,
    breakdown: Annotated[bool, Option("--breakdown", help=BREAKDOWN)] = False,
    parallel: Parallel = 0,
    ranks: Ranks = 1,
    as_json: options.AsJson = False,
) -> None:
    """Compare optimizers, each at its best settings.

    Settings are tuned on a held-out part of the training text. The final runs have new seeds and
    are judged on the validation split. The plan and its cost are shown before the first run. Repeat
    an interrupted command to continue it.

    \b
    normuon-train race shakespeare-char train.steps=500 --seeds 5 --out runs/race
    normuon-train race demo --optimizers normuon,adamw --lr adamw=0.001,0.003 --out runs/two
    normuon-train race demo --optimizers normuon,zoo:adamuon,my_file.py:MyOptimizer --out runs/b
    """
    from nanonormuon.lab import processes, race, results

    runner = processes.Runner(parallel, ranks)
    field = race.entries(recipe, optimizers, lr or (), wd, sweep or ())
    contest = race.Race(recipe, field, seeds, out, tuning_seeds, baseline, grow, breakdown)
    found = contest.run(runner)
    files = f"results: {out / 'results.json'}, {out / 'race.png'}"
    options.show(found, f"{results.markdown(found)}\n{files}", as_json)


def trials(
    recipe: Recipe,
    target: Annotated[float, Option(help="Mean validation loss to reach.")],
    out: Out,
    n: Count = 10,
    parallel: Parallel = 0,
    ranks: Ranks = 1,
) -> None:
    """Repeat a recipe and test its mean loss against a target.

    Each trial leaves a log with source, configuration, environment and losses. The last line is
    JSON: mean, standard deviation, Track 3's rule (target - mean) sqrt(n) >= 0.004, and p-value.

    \b
    normuon-train trials track3-normuon --n 20 --target 3.28 --ranks 8 --out runs/track3
    normuon-train trials shakespeare-char train.steps=300 --n 5 --target 1.9 --out runs/five
    """
    if not math.isfinite(target):
        raise typer.BadParameter(f"--target {target}: expected a finite number")
    from nanonormuon.lab import processes, trials

    found = trials.run(recipe, n, target, out, processes.Runner(parallel, ranks))
    typer.echo(f"{trials.describe(found)}\n{json.dumps(found)}")


def speedrun(
    track: Annotated[str, Argument(metavar="[TRACK|FILE.toml]", help="Track; else a list.")] = "",
    chosen: Annotated[Strings, Argument(metavar="[RECORD|KEY=VALUE]...", help=CHOSEN)] = None,
    n: Count = 10,
    out: Out = Path("runs/speedrun"),
    parallel: Parallel = 1,
    as_json: options.AsJson = False,
) -> None:
    """Run a speedrun: a fixed loss in few steps or little time.

    Lists the tracks, a track's records, or runs one (docs/speedrun.md has the rules). A record is
    valid with 10 runs whose mean is below the target with p < 0.001. Settings after its name make
    an attempt of your own. "all" runs every record in turn. OUT/TRACK/RECORD/ has logs and verdict.

    \b
    normuon-train speedrun shakespeare normuon data.path=DIR
    normuon-train speedrun shakespeare normuon train.steps=200 optim.lr=0.03 data.path=DIR
    normuon-train speedrun shakespeare all data.path=DIR --n 3 --out runs/times
    """
    from nanonormuon.lab import processes, speedrun

    if not chosen:
        names = [track] if track else speedrun.tracks()
        loaded = {name: speedrun.load(name) for name in names}
        parts = [f"{name}: {t.title}\n\n{speedrun.table(t)}" for name, t in loaded.items()]
        options.show({name: vars(t) for name, t in loaded.items()}, "\n\n".join(parts), as_json)
        return
    found, results = speedrun.load(track), {}
    for record in found.records if chosen[0] == "all" else chosen[:1]:
        parts = [record, *chosen[1:]]
        name = " ".join(part for part in parts if not part.startswith("data.path"))
        place = out / Path(track).stem / re.sub(r"[^\w.=+-]", "-", name)[:150]
        results[name] = speedrun.run(found, parts, n, place, processes.Runner(parallel))
    valid = sum(result["valid"] for result in results.values())
    text = f"{speedrun.table(found, results)}\n\n{valid} of {len(results)} valid ({speedrun.RULE})"
    options.show(results, text, as_json)
