"""The same recipe with n seeds against a target, each trial with a log that needs nothing else."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanonormuon import config, errors
from nanonormuon.lab.processes import Job, Runner
from nanonormuon.lab.race import claim
from nanonormuon.lab.significance import verdict
from nanonormuon.storage.files import replace_file
from nanonormuon.storage.run import read_metrics, source_files

log = logging.getLogger(__name__)


def run(
    arguments: Sequence[str], n: int, target: float, out: Path, runner: Runner
) -> dict[str, Any]:
    """Runs with the seeds 0 to n - 1, and significance.verdict of their last losses.

    OUT/trial-000/ is a run directory, OUT/trial-000.txt its self-contained log, OUT/trials.json the
    verdict. A larger n goes on from a smaller one. Raises as batch.Runner does.
    """
    for argument in arguments:
        if config.is_setting(argument) and argument.partition("=")[0].strip() == "train.seed":
            raise errors.ConfigError(f"{argument}: the trials have the seeds 0 to {n - 1}, see --n")
    settings = config.load(arguments)[0]
    claim(out, "plan.json", {"arguments": arguments, "steps": settings.train.steps})
    quiet = ("train.sample_tokens=0", "train.keep_last=1", "train.keep_best=false")
    jobs = [
        Job(out / f"trial-{seed:03d}", (*quiet, *arguments, f"train.seed={seed}"))
        for seed in range(n)
    ]
    results = runner.run(jobs)
    for job in jobs:
        replace_file(job.path.with_suffix(".txt"), written_out(job).encode())
    losses = [result["val_loss"] for result in results]
    found = verdict(losses, target) | {
        "losses": losses,
        "steps": settings.train.last_step,
        "seconds": [result.get("train_seconds") for result in results],
        "arguments": [*arguments],
        "source_sha256": json.loads((jobs[0].path / "environment.json").read_text())[
            "source_sha256"
        ],
    }
    replace_file(out / "trials.json", (json.dumps(found, indent=1) + "\n").encode())
    return found


def written_out(job: Job) -> str:
    """A trial as one text: environment, configuration, metrics, and the source that made them."""
    parts = [("command", " ".join(("normuon-train run", *job.arguments)))]
    for name in ("environment.json", "config.toml", "summary.json"):
        parts.append((name, (job.path / name).read_text(encoding="utf-8")))
    rows = read_metrics(job.path / "metrics.jsonl")
    parts.append(("metrics.jsonl", "\n".join(map(json.dumps, rows))))
    for name, file in source_files().items():
        parts.append((f"nanonormuon/{name}", file.read_text(encoding="utf-8")))
    line = "=" * 100
    return "\n".join(f"{line}\n{name}\n{line}\n{text.rstrip()}" for name, text in parts) + "\n"


def describe(found: dict[str, Any]) -> str:
    """The verdict for people."""
    sd = "" if found["sd"] is None else f" ± {found['sd']:.4f}"
    test = "" if found["p_value"] is None else f"; p = {found['p_value']:.2g} (one-sided t-test)"
    word = "valid" if found["valid"] else "not valid"
    return (
        f"val_loss {found['mean']:.4f}{sd} (n = {found['n']}), target {found['target']:g}: "
        f"(target - mean) sqrt(n) = {found['margin']:.4f}, {word} from 0.004 on{test}"
    )
