"""A fair comparison of optimizers: each one's settings tuned, then judged by fresh seeds.

Every optimizer has the same budget, schedule, data order and, seed by seed, initialisation. Its
settings are chosen on a part of the training text that is kept back (data.tuning); what they are
worth is measured on the validation split, at the end of fully decayed runs, since curves cross
before (arXiv 2509.02046). A best rate at the end of its grid makes the grid longer.

    OUT/race.json     what is being compared
    OUT/tuning/NAME/  a run directory per setting; OUT/seeds/NAME/ per optimizer and seed
    OUT/results.json, OUT/results.md, OUT/race.png
"""

import hashlib
import itertools
import json
import logging
import math
import re
import shlex
import statistics
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanonormuon import config
from nanonormuon.config import parse_number
from nanonormuon.errors import ConfigError, MissingPackage, RunError
from nanonormuon.lab.processes import Job, Runner
from nanonormuon.lab.results import Entry, Standing, draw, judge, markdown
from nanonormuon.storage.files import replace_file

log = logging.getLogger(__name__)
ADAMW_LR = 0.003  # about which the search begins for what is not a Muon
FACTORS = (0.5, 1.0, 2.0)
LONGER = 4  # rates that may be added to a grid whose best one lies at its end
TUNING_SEED = 1_000_000  # and the next: none that a result is reported with
TUNING_SHARE = 0.05  # of the training tokens, kept back for the choice
# no axis and no optimizer's own setting: the race gives it to every run, or promises it to be equal
SHARED = ("train.seed", "train.steps", "train.stop_at", "train.batch_tokens", "train.sample_tokens",
          "train.keep_last", "train.keep_best", "data.tuning", "optim.name")  # fmt: skip


def entries(
    arguments: Sequence[str],
    optimizers: str,
    lr: Sequence[str] = (),
    weight_decay: str = "",
    sweep: Sequence[str] = (),
) -> list[Entry]:
    """What the command line asks for.

    optimizers: "normuon,adamw,module:Class,normuon+beta2=0.9": the part behind a + is a setting,
        of [optim] if no section is named; a comma before a blank belongs to its value.
    lr: "0.01,0.02" rates of all, "adamw=0.001,0.003" of one, "0.5x,1x,2x" multiples of each one's
        own usual rate. weight_decay: "0,0.1". sweep: "SECTION.KEY=A,B" as further axes.
    Raises ConfigError.
    """
    for argument in arguments:
        if config.is_setting(argument) and keys_of([argument]) == ["train.seed"]:
            raise ConfigError(f"{argument}: a race gives its runs their seeds, see --seeds")
    axes = [f"optim.weight_decay={weight_decay}"] if weight_decay else []
    others = tuple(itertools.product(*map(axis, (*axes, *sweep))))
    found = []
    for label in filter(None, map(str.strip, re.split(r",(?! )", optimizers))):
        name, *extra = label.split("+")
        settings = [f"optim.name={name}"]
        settings += [e if "." in e.partition("=")[0] else f"optim.{e}" for e in extra]
        refuse_shared(f'--optimizers "{label}"', settings[1:], SHARED)
        fixed = tuple(keys_of(settings[1:]))
        for combination in others:  # a mistake in the last of them should not wait for its turn
            refuse_shared(f'--sweep or --wd, and --optimizers "{label}"', combination, fixed)
            config.load([*arguments, *settings, *combination])
        resolved = config.load([*arguments, *settings])[0].optim
        usual = resolved.lr if name in ("normuon", "muon") else ADAMW_LR
        if any(s.startswith("optim.lr=") for s in settings):
            usual = resolved.lr
            text = chosen(label, lr)
            if text and not all(rate.endswith("x") for rate in rate_texts(text)):
                raise ConfigError(
                    f'--lr "{text}" and --optimizers "{label}" both say its rate: expected one of '
                    "them, or multiples of its own, as 0.5x,1x,2x"
                )
        found.append(Entry(label, tuple(settings), rates(label, lr, usual), others))
    labels = [entry.label for entry in found]
    if len(set(labels)) < len(labels) or not labels:
        raise ConfigError(f'--optimizers "{optimizers}": expected different ones')
    for text in lr:
        if "=" in text and text.rpartition("=")[0] not in labels:
            hint = config.nearest(text.rpartition("=")[0], labels)
            raise ConfigError(f'--lr "{text}": none of --optimizers; {hint}')
    return found


def axis(text: str) -> list[str]:
    """ "SECTION.KEY=A,B" -> KEY=VALUE for each; in a setting that is text, a comma before a blank
    belongs to its value. Raises ConfigError."""
    key, equals, values = text.partition("=")
    if not equals:
        raise ConfigError(f'--sweep "{text}": expected SECTION.KEY=A,B')
    refuse_shared(f'--sweep "{text}"', [text], (*SHARED, "optim.lr"))
    section, _, name = key.strip().partition(".")
    kinds = typing.get_type_hints(config.SECTIONS[section]) if section in config.SECTIONS else {}
    parts = re.split(r",(?! )" if kinds.get(name) is str else ",", values)
    return list(dict.fromkeys(f"{key.strip()}={part.strip()}" for part in parts))


def keys_of(settings: Sequence[str]) -> list[str]:
    return [setting.partition("=")[0].strip() for setting in settings]


def refuse_shared(where: str, settings: Sequence[str], taken: Sequence[str]) -> None:
    """Raise ConfigError if one of KEY=VALUE is decided elsewhere and would be overruled, or make
    the runs of a race incomparable."""
    for key in set(keys_of(settings)) & set(taken):
        hint = {"optim.lr": "--lr has the rates", "train.seed": "--seeds gives them"}.get(key)
        hint = hint or ("all runs of a race share it" if key in SHARED else "set it in one of them")
        raise ConfigError(f"{where}: {key}: {hint}")


def chosen(label: str, given: Sequence[str]) -> str:
    """The --lr that an optimizer's rates come from; one that names it counts before the others."""
    mine = [text for text in given if text.rpartition("=")[0] == label]
    return (mine or [text for text in given if "=" not in text] or [""])[-1]


def rate_texts(text: str) -> list[str]:
    return [part.strip() for part in text.rpartition("=")[2].split(",")]


def rates(label: str, given: Sequence[str], usual: float) -> tuple[float, ...]:
    """The grid of one optimizer, from all --lr."""
    text = chosen(label, given)
    grid = [usual * factor for factor in FACTORS]
    if text:
        parts = rate_texts(text)
        values = [parse_number(part.removesuffix("x")) for part in parts]
        if any(value is None or not 0 < value < math.inf for value in values):
            raise ConfigError(
                f'--lr "{text}": expected numbers above 0, as 0.01,0.02 or 0.5x,1x,2x'
            )
        grid = [v * usual if part.endswith("x") else v for v, part in zip(values, parts)]  # type: ignore
    return tuple(sorted({float(f"{rate:.6g}") for rate in grid}))


class Race:
    """The state of a comparison; `run` brings it to its end, however often it was interrupted."""

    def __init__(self, arguments: Sequence[str], field: Sequence[Entry], seeds: int, out: Path,
                 tuning_seeds: int = 1):  # fmt: skip
        self.arguments, self.seeds, self.out = tuple(arguments), seeds, out
        self.tuning_seeds = tuning_seeds
        self.standings = [Standing(entry) for entry in field]
        self.config = config.load(arguments)[0]
        self.steps = self.config.train.last_step

    def job(
        self, kind: str, entry: Entry, setting: tuple[float, tuple[str, ...]], seed: int
    ) -> Job:
        """A run. Its directory's name says all that tells it from the other runs of its kind."""
        rate, others = setting
        tuning = kind == "tuning"
        own = [*entry.settings, f"optim.lr={rate:g}", *others, f"train.seed={seed}"]
        label = "+".join([entry.label, f"lr={rate:g}", *others])
        name = re.sub(r"[^\w.=+-]", "-", label)[:150]  # file names end at 255 bytes
        if name != label.replace(":", "-"):  # others could come to the same
            name += f"-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
        quiet = ["train.sample_tokens=0", "train.keep_last=1", "train.keep_best=false"]
        common = [f"train.eval_every={max(1, self.steps // 10)}", *self.arguments, *quiet]
        if tuning:
            common += [f"data.tuning={TUNING_SHARE}", "train.eval_every=0"]
        path = self.out / kind / f"{name}+seed={seed}"
        return Job(path, (*common, *own), keep=not tuning)

    def run(self, runner: Runner) -> dict[str, Any]:
        """Tune, run the seeds, write the results; returns what results.json says."""
        self.claim()
        pending = []
        for s in self.standings:
            settings = [*itertools.product(s.entry.rates, s.entry.others)]
            if len(settings) == 1 and self.seeds:  # nothing to choose
                s.tuning[settings[0]] = []
            else:
                pending += [(s, *setting) for setting in settings]
        while pending:
            self.tune(runner, pending)
            pending = [extension for s in self.standings for extension in beyond(s)]
        jobs = [
            self.job("seeds", s.entry, s.best, seed)
            for seed in range(self.seeds) for s in self.standings
        ]  # fmt: skip
        if jobs:
            log.info(f"{len(jobs)} runs with the settings chosen")
        results = dict(zip(jobs, runner.run(jobs)))
        for s in self.standings:
            mine = [self.job("seeds", s.entry, s.best, seed) for seed in range(self.seeds)]
            s.runs = [results[job] for job in mine]
        return self.report()

    def claim(self) -> None:
        """Raise RunError if the directory is another comparison's."""
        claim(
            self.out, "race.json", {"arguments": self.arguments, "steps": self.config.train.steps}
        )

    def tune(self, runner: Runner, pending: Sequence[tuple[Standing, float, tuple]]) -> None:
        seeds = range(TUNING_SEED, TUNING_SEED + self.tuning_seeds)
        log.info(f"{len(pending) * len(seeds)} runs to choose settings by")
        jobs = [self.job("tuning", s.entry, (r, o), seed) for s, r, o in pending for seed in seeds]
        results = iter(runner.run(jobs))
        for s, rate, others in pending:
            s.tuning[rate, others] = [next(results)["val_loss"] for _ in seeds]

    def report(self) -> dict[str, Any]:
        files = sorted(self.out.glob("*/*/environment.json"))
        told = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        sources = sorted({environment["source_sha256"] for environment in told})
        if len(sources) > 1:
            log.warning(f"{self.out}: its runs are of {len(sources)} versions of the source")
        results = {
            "command": f"normuon-train {shlex.join(sys.argv[1:])}",
            "arguments": self.arguments,
            "steps": self.steps,
            "tokens": self.steps * self.config.train.batch_tokens,
            "source_sha256": sources,
            "device": sorted({environment["device"] for environment in told}),
            "torch": sorted({environment["torch"] for environment in told}),
            "optimizers": judge(self.standings, self.steps),
        }
        self.out.mkdir(parents=True, exist_ok=True)
        replace_file(self.out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        replace_file(self.out / "results.md", (markdown(results) + "\n").encode())
        try:
            draw(results, self.out / "race.png")
        except MissingPackage as error:
            log.warning(str(error))
        return results


def claim(out: Path, name: str, content: Mapping[str, Any]) -> None:
    """Make OUT/name, or raise RunError if it is there with other content."""
    file, text = out / name, json.dumps(content, indent=1) + "\n"
    if file.exists():
        if (found := file.read_text(encoding="utf-8")) != text:
            raise RunError(
                f"{file}: {json.dumps(json.loads(found))}, expected {json.dumps(content)}: "
                "another comparison is there; choose another --out"
            )
        return
    if out.is_dir() and any(out.iterdir()):
        raise RunError(f"{out}: not empty, and no {name} there; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    replace_file(file, text.encode())


def beyond(standing: Standing) -> list[tuple[Standing, float, tuple[str, ...]]]:
    """The next rate, if the best one so far is the smallest or largest tried, as (standing, rate,
    other settings): an optimum at the end of a grid may lie outside it."""
    tried = sorted({rate for rate, _ in standing.tuning})
    rate, others = standing.best
    longer = len(tried) - len(standing.entry.rates)
    if len(tried) < 2 or longer >= LONGER or rate not in (tried[0], tried[-1]):
        return []
    if not math.isfinite(statistics.fmean(standing.tuning[rate, others])):
        return []
    step = tried[1] / tried[0] if rate == tried[0] else tried[-1] / tried[-2]
    new = float(f"{rate / step if rate == tried[0] else rate * step:.6g}")
    log.info(f"{standing.entry.label}: lr {rate:g} is best and last of the grid; {new:g} is added")
    return [(standing, new, others)]
