"""Race optimizers: tune the settings of each, then judge its best ones with fresh seeds.

All optimizers have equal budget, schedule, data order and, seed by seed, initialisation. Settings
are chosen on a held-out part of the training text (data.tuning) and judged on the validation split,
at the end of fully decayed runs, since curves cross before (arXiv 2509.02046). A grid is extended
while its best rate is its lowest or highest.

    OUT/race.json     what is being compared
    OUT/tuning/NAME/  a run directory per setting; OUT/seeds/NAME/ per optimizer and seed
    OUT/results.json, OUT/results.md, OUT/race.png
"""

import hashlib
import itertools
import logging
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanonormuon import config
from nanonormuon.errors import ConfigError, MissingPackage
from nanonormuon.lab.external import default_lr
from nanonormuon.lab.processes import QUIET, Job, Runner, claim, cost, key_of, resolve
from nanonormuon.lab.results import Entry, draw, judge, markdown, mean
from nanonormuon.pretrained.judge import evaluate
from nanonormuon.storage.checkpoints import read_json
from nanonormuon.storage.files import as_json, replace_file
from nanonormuon.storage.values import nearest, parse_number

log = logging.getLogger(__name__)
COMMA = r",(?! )"  # a separator; a comma before a space is part of a value
ADAMW_LR = 0.003  # the middle of the grid for optimizers that are not a Muon
GRID = "0.5x,1x,2x"
LONGER = 4  # most rates that extend a grid
TUNING_SEED = 1_000_000  # the first seed of tuning runs; no reported result uses these
TUNING_SHARE = 0.05  # of the training tokens, held out for the choice
SEEDS = "--seeds sets the seeds"
# set by the race or shared by all its runs, so neither an axis nor an optimizer's own setting
SHARED = {"train.seed": SEEDS, "optim.name": "--optimizers has the names"} | dict.fromkeys(
    ("train.steps", "train.stop_at", "train.batch_tokens", "train.sample_tokens",
     "train.keep_last", "train.keep_best", "data.tuning"),
    "all runs of a race share it",
)  # fmt: skip


def entries(
    arguments: Sequence[str],
    optimizers: str,
    lr: Sequence[str] = (),
    weight_decay: str = "",
    sweep: Sequence[str] = (),
) -> list[Entry]:
    """Parse the command line. Raises ConfigError.

    optimizers: "normuon,zoo:reg,my.py:Class,normuon+beta2=0.9"; +KEY=VALUE adds a setting, in
        [optim] unless it names a section. A comma before a space is part of the value.
    lr: "0.01,0.02" for all, "adamw=0.001,0.003" for one, "0.5x,1x,2x" as multiples of the usual
        rate; repeated, it adds rates. weight_decay: "0,0.1". sweep: "SECTION.KEY=A,B", more axes.
    """
    axes = [f"optim.weight_decay={weight_decay}"] if weight_decay else []
    others = tuple(itertools.product(*map(axis, (*axes, *sweep))))
    labels = [*filter(None, map(str.strip, re.split(COMMA, optimizers)))]
    if len(set(labels)) < len(labels) or not labels:
        raise ConfigError(f'--optimizers "{optimizers}": expected distinct names')
    grids: dict[str, str] = {}  # by label, "" for all
    for text in lr:
        name, _, more = text.rpartition("=")
        if name and name not in labels:
            raise ConfigError(f'--lr "{text}": not in --optimizers; {nearest(name, labels)}')
        grids[name] = f"{grids[name]},{more}" if name in grids else text
    return [entry_of(e, arguments, grids.get(e, grids.get("", GRID)), others) for e in labels]


def entry_of(
    label: str, arguments: Sequence[str], grid: str, others: tuple[tuple[str, ...], ...]
) -> Entry:
    """One optimizer, NAME+KEY=VALUE+..., checked with every combination of the other axes."""
    name, *parts = label.split("+")
    own = [part if "." in key_of(part) else f"optim.{part.strip()}" for part in parts]
    if not all(map(config.is_setting, own)):  # else a file, which may set what runs share
        raise ConfigError(f'--optimizers "{label}": expected KEY=VALUE after each +')
    keys, swept = [*map(key_of, own)], [*map(key_of, others[0])]
    given = keys + swept
    twice = [key for key in given if given.count(key) > 1]
    reasons = dict.fromkeys(twice, "set it once, by --optimizers, --sweep or --wd") | SHARED
    if "optim.lr" in swept:
        reasons["optim.lr"] = "--lr sets the rates"
    for key in filter(reasons.get, given):
        option = f'--optimizers "{label}"' if key in keys else "--sweep"
        raise ConfigError(f"{option}: {key} cannot be set here: {reasons[key]}")
    settings = (f"optim.name={name}", *own)
    for combination in others:
        usual = resolve([*arguments, *settings, *combination]).optim.lr
    if "optim.lr" not in keys and name not in ("normuon", "muon"):
        own = default_lr(name) or ADAMW_LR
        usual = usual if own == config.OptimConfig.lr else own  # the recipe's, for the kin of Muon
    return Entry(label, settings, rates(label, grid, usual, "optim.lr" in keys), others)


def axis(text: str) -> list[str]:
    """Split "SECTION.KEY=A,B" into KEY=VALUE settings. Raises ConfigError."""
    if not config.is_setting(text):
        raise ConfigError(f'--sweep "{text}": expected SECTION.KEY=A,B')
    key, values = map(str.strip, text.split("=", 1))
    parts = re.split(COMMA if config.KINDS.get(key) is str else ",", values)
    return list(dict.fromkeys(f"{key}={part.strip()}" for part in parts))


def rates(label: str, text: str, usual: float, has_rate: bool) -> tuple[float, ...]:
    """Parse the grid of one optimizer, "LABEL=0.01,2x" or "0.01,2x". If its label sets a rate,
    only multiples of that rate are allowed."""
    grid = set()
    for part in map(str.strip, text.rpartition("=")[2].split(",")):
        number, multiple = parse_number(part.removesuffix("x")), part.endswith("x")
        if number is None or not 0 < number < math.inf:
            raise ConfigError(f'--lr "{text}": expected numbers above 0, as 0.01,0.02 or {GRID}')
        if has_rate and not multiple:
            both = f'--lr "{text}" and --optimizers "{label}" both set its rate'
            raise ConfigError(f"{both}: expected one of them, or multiples of its own, as {GRID}")
        grid.add(float(f"{number * usual if multiple else number:.6g}"))
    return tuple(sorted(grid))


@dataclass
class Race:
    """A race in the directory `out`; after an interruption `run` continues it."""

    arguments: Sequence[str]
    field: Sequence[Entry]
    seeds: int
    out: Path
    tuning_seeds: int = 1
    baseline: str = ""  # an entry's label; "": see results.judge
    grow: bool = True  # see `beyond`
    breakdown: bool = False  # of the final losses

    def __post_init__(self) -> None:
        self.settings = config.load(self.arguments)[0]
        self.steps = self.settings.train.last_step
        labels = [entry.label for entry in self.field]
        if self.baseline not in ("", *labels):
            hint = nearest(self.baseline, labels)
            raise ConfigError(f'--baseline "{self.baseline}": not in --optimizers; {hint}')

    def job(self, kind: str, entry: Entry, trial: Mapping[str, Any], seed: int) -> Job:
        """A run of the kind "tuning" or "seeds", in a directory named after its settings."""
        rate = f"lr={trial['lr']:g}"
        label = "+".join([entry.label, rate, *trial["settings"]])
        name = re.sub(r"[^\w.=+-]", "-", label)[:150]  # file names have at most 255 bytes
        if name != label.replace(":", "-"):  # another label may give the same name
            name += f"-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
        common = [f"train.eval_every={max(1, self.steps // 10)}", *self.arguments, *QUIET]
        if kind == "tuning":
            common += [f"data.tuning={TUNING_SHARE}", "train.eval_every=0"]
        own = [*entry.settings, f"optim.{rate}", *trial["settings"], f"train.seed={seed}"]
        path = self.out / kind / f"{name}+seed={seed}"
        return Job(path, (*common, *own), keep=kind == "seeds")

    def run(self, runner: Runner) -> dict[str, Any]:
        """Tune, run the seeds, write and return the results. Raises what claim and run raise."""
        claim(self.out / "race.json", self.arguments, SEEDS)
        for entry in self.field:
            grid = itertools.product(entry.rates, entry.others)
            entry.tuning = [{"lr": r, "settings": o, "val_loss": []} for r, o in grid]
        pending = [(e, trial) for e in self.field for trial in e.tuning
                   if len(e.tuning) > 1 or not self.seeds]  # fmt: skip
        final = self.seeds * len(self.field)
        self.announce(len(pending) * self.tuning_seeds, final, runner.parallel)
        while pending:
            seeds = range(TUNING_SEED, TUNING_SEED + self.tuning_seeds)
            jobs = [self.job("tuning", *p, seed) for p in pending for seed in seeds]
            losses = iter([result["val_loss"] for result in runner.run(jobs, final)])
            for _, trial in pending:
                trial["val_loss"] = [next(losses) for _ in seeds]
            growing = self.field if self.grow else ()
            pending = [(e, trial) for e in growing for trial in beyond(e)]
            for entry, trial in pending:
                entry.tuning.append(trial)
        seeds = range(self.seeds)
        jobs = [self.job("seeds", e, e.best, seed) for seed in seeds for e in self.field]
        for job in jobs[: len(self.field)]:
            log.info(f"chosen: {job.setting}")
        results = runner.run(jobs)
        for i, entry in enumerate(self.field):
            entry.runs = results[i :: len(self.field)]
        return self.report(jobs)

    def announce(self, tuning: int, final: int, at_once: int) -> None:
        """Log the runs ahead and their cost. tuning, final: numbers of runs."""
        log.info(f"plan: {cost(self.settings, tuning + final, at_once)}")
        each = self.tuning_seeds
        if tuning:
            grids = ", ".join(f"{e.label} {len(e.tuning)}" for e in self.field)
            log.info(f"{tuning} runs choose settings ({grids}; {each} each), {final} are final")
        if tuning and self.grow:
            end = "while its best rate is the lowest or highest of its grid (--no-grow: none)"
            log.info(f"up to {LONGER * each} more per optimizer {end}")
        if final and len(self.field) > 1:
            named = self.baseline or "chosen at the end, the best of all but the first"
            log.info(f"baseline: {named}")

    def report(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Write results.json, results.md and race.png; returns the content of the first. jobs: the
        final runs, seed by seed."""
        rows = judge(self.field, self.steps, self.baseline)
        for i, (row, entry) in enumerate(zip(rows, self.field if self.breakdown else ())):
            pairs = zip(jobs[i :: len(rows)], entry.losses)
            done = [job.path for job, loss in pairs if math.isfinite(loss)]
            row["breakdown"] = [evaluate(run, detail=True)[0]["breakdown"] for run in done]
        environments = [read_json(f) for f in sorted(self.out.glob("*/*/environment.json"))]
        several = ("source_sha256", "device", "torch")
        results = {
            "command": f"normuon-train {shlex.join(sys.argv[1:])}",
            "arguments": self.arguments,
            "steps": self.steps,
            "tokens": self.steps * self.settings.train.batch_tokens,
            **{key: sorted({str(e.get(key)) for e in environments}) for key in several},
            "optimizers": rows,
        }
        # the source hash covers an optimizer's file, too
        kinds = {(e.get("source_sha256"), e.get("optimizer_sha256")) for e in environments}
        if (count := len(kinds) - len({kind[1] for kind in kinds}) + 1) > 1:
            log.warning(f"{self.out}: its runs come from {count} versions of the source")
        replace_file(self.out / "results.json", as_json(results))
        replace_file(self.out / "results.md", (markdown(results) + "\n").encode())
        try:
            draw(results, self.out / "race.png")
        except MissingPackage as error:
            log.warning(str(error))
        return results


def beyond(entry: Entry) -> list[dict[str, Any]]:
    """The setting to try next if the best rate so far is the lowest or highest tried, since the
    optimum may then lie outside the grid; else none."""
    best, tried = entry.best, sorted({trial["lr"] for trial in entry.tuning})
    rate, lowest = best["lr"], best["lr"] == tried[0]
    may_grow = 2 <= len(tried) < len(entry.rates) + LONGER and math.isfinite(mean(best["val_loss"]))
    if not may_grow or rate not in (tried[0], tried[-1]):
        return []
    new = rate / (tried[1] / tried[0]) if lowest else rate * (tried[-1] / tried[-2])
    end = "lowest" if lowest else "highest"
    log.info(f"{entry.label}: lr {rate:g} is the best and the {end} tried; trying {new:.6g}")
    return [best | {"lr": float(f"{new:.6g}")}]
