"""Run one recipe with n seeds and test its mean loss against a target."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanonormuon import config
from nanonormuon.lab.processes import QUIET, Job, Runner, claim, cost, resolve
from nanonormuon.lab.significance import verdict
from nanonormuon.storage.checkpoints import read_json
from nanonormuon.storage.files import as_json, read_file, replace_file
from nanonormuon.storage.run import read_rows, source_files

log = logging.getLogger(__name__)


def run(
    arguments: Sequence[str], n: int, target: float, out: Path, runner: Runner,
    metric: str = "val_loss",
) -> dict[str, Any]:  # fmt: skip
    """Run the seeds 0 to n - 1; returns significance.verdict of their last losses, or last val_bpb.

    OUT/trial-000/ is a run directory, OUT/trial-000.txt its self-contained log, OUT/trials.json the
    verdict. A larger n adds to the runs of a smaller one. Raises what Runner.run raises.
    """
    seeds = f"the trials have the seeds 0 to {n - 1} (--n)"
    settings = resolve(arguments)
    claim(out / "plan.json", arguments, seeds)
    log.info(f"plan: {cost(settings, n, runner.parallel)}")
    common = (*QUIET, *arguments)
    jobs = [Job(out / f"trial-{i:03d}", (*common, f"train.seed={i}")) for i in range(n)]
    results = runner.run(jobs)
    for job in jobs:
        replace_file(job.path.with_suffix(".txt"), self_contained(job).encode())
    values = (result.get(metric) for result in results)
    losses = [math.inf if value is None else value for value in values]  # None: diverged, unknown
    environment = read_json(jobs[0].path / "environment.json")
    found = verdict(losses, target) | {
        "losses": losses,
        "steps": settings.train.last_step,
        "seconds": [result.get("train_seconds") for result in results],
        "arguments": [*arguments],
        **{key: environment.get(key) for key in ("device", "source_sha256")},
    }
    replace_file(out / "trials.json", as_json(found))
    return found


def self_contained(job: Job) -> str:
    """One trial's log: command, environment, configuration, metrics, and the source code."""
    parts = {"command": " ".join(("normuon-train run", *job.arguments))}
    for name in ("environment.json", "config.toml", "summary.json"):
        parts[name] = read_file(job.path / name).decode()
    parts["metrics.jsonl"] = "\n".join(map(json.dumps, read_rows(job.path / "metrics.jsonl")))
    optimizer = config.load(job.arguments)[0].optim.name
    for name, file in source_files(optimizer).items():
        place = "" if file == Path(name) else "nanonormuon/"  # unless it is the user's
        parts[place + name] = file.read_text(encoding="utf-8")
    line = "=" * 100
    return "".join(f"{line}\n{name}\n{line}\n{text.rstrip()}\n" for name, text in parts.items())


def describe(found: dict[str, Any]) -> str:
    """The verdict in one line."""
    sd = "" if found["sd"] is None else f" ± {found['sd']:.4f}"
    test = "" if found["p_value"] is None else f"; p = {found['p_value']:.2g} (one-sided t-test)"
    word = "valid" if found["valid"] else "target missed"
    margin = f"(target - mean) sqrt(n) = {found['margin']:.4f}, at least 0.004 needed{test}"
    loss = f"val_loss {found['mean']:.4f}{sd} (n = {found['n']})"
    return f"{loss}, target {found['target']:g}: {word}: {margin}"
