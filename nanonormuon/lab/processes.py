"""Run many jobs, each in its own process and run directory; finished ones are not repeated."""

import contextlib
import json
import logging
import os
import queue
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanonormuon import config
from nanonormuon.errors import CheckpointError, ConfigError, DataError, Interrupted, RunError
from nanonormuon.model import GPT
from nanonormuon.optim import make_optimizers
from nanonormuon.pretrained import models
from nanonormuon.runs import compare
from nanonormuon.storage import files
from nanonormuon.storage.checkpoints import read_json
from nanonormuon.storage.run import optimizer_hash

log = logging.getLogger(__name__)
# settings for runs of which only the losses matter
QUIET = ("train.sample_tokens=0", "train.keep_last=1", "train.keep_best=false")
REFRESH = 1.0  # seconds between two looks at the logs of the runs in progress


@dataclass(frozen=True)
class Job:
    """One run: its directory and the arguments of `normuon-train run`. Without `keep`, its
    checkpoints are deleted when it ends."""

    path: Path
    arguments: tuple[str, ...]
    keep: bool = True

    @property
    def setting(self) -> str:
        """The job's name without its seed; "" for trials, which differ only in the seed."""
        return self.path.name.rpartition("+seed=")[0]

    @property
    def log_file(self) -> Path:
        return self.path.with_name(self.path.name + ".log")

    def result(self) -> dict[str, Any] | None:
        """summary.json and the curve of val_loss as [step, loss]; None until the run has finished.
        A diverged run has an infinite loss."""
        try:
            summary = read_json(self.path / "summary.json")
        except (OSError, CheckpointError):
            return None
        if summary.get("diverged"):
            return {"val_loss": float("inf"), "curve": []}
        if not isinstance(summary.get("val_loss"), float | int):  # not written by a run
            return None
        return summary | {"curve": [*zip(*compare.read(self.path).curve("val_loss"))]}

    def steps(self) -> int:
        """The last step logged so far, read from the end of metrics.jsonl; 0 if there is none."""
        file = self.path / "metrics.jsonl"
        with contextlib.suppress(OSError, DataError), files.open_regular(file) as rows:
            rows.seek(max(0, os.fstat(rows.fileno()).st_size - (1 << 14)))
            steps = re.findall(rb'^{"step": (\d{1,15})', rows.read(), re.MULTILINE)
            return int(steps[-1]) if steps else 0
        return 0


class Runner:
    """Runs jobs in parallel, one per device.

    parallel: jobs at a time, which share the CPU's cores unless OMP_NUM_THREADS is set; 0: one per
    `ranks` CUDA devices, or one on a CPU. ranks: processes per run, started by torchrun.
    """

    def __init__(self, parallel: int = 0, ranks: int = 1):
        count = torch.cuda.device_count()
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        devices = cycle(names.split(",")[:count])
        self.parallel, self.ranks = parallel or max(1, count // ranks), ranks
        threads = max(1, (os.cpu_count() or 1) // (self.parallel * ranks))
        self.places: queue.Queue[dict[str, str]] = queue.Queue()  # environment variables
        for _ in range(self.parallel):
            mine = ",".join(dict.fromkeys(islice(devices, ranks)))
            on_cpu = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
            self.places.put({"CUDA_VISIBLE_DEVICES": mine} if mine else on_cpu)
        self.children: set[subprocess.Popen] = set()
        self.stopped = 0
        self.hashes: dict[str, str] = {}  # of the optimizers' files, "" for other optimizers
        self.results: dict[Job, dict[str, Any]] = {}  # of the runs that have ended

    def run(self, jobs: Sequence[Job], later: int = 0) -> list[dict[str, Any]]:
        """Run the jobs that have no result yet; returns the results of all, in order.

        later: runs still to come in other calls. Raises ConfigError before the first run; RunError
        with the last line of a run that failed, and Interrupted after a signal, once the other runs
        have saved. Calling it again continues them.
        """
        for job in jobs:
            self.check_optimizer(job)
            if (result := job.result()) is not None:
                self.results[job] = result
        missing = [job for job in dict.fromkeys(jobs) if job not in self.results]
        with contextlib.ExitStack() as handlers, ThreadPoolExecutor(self.parallel) as pool:
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers.callback(signal.signal, number, signal.signal(number, self.stop))
            self.follow({pool.submit(self.carry_out, job): job for job in missing}, later)
        return [self.results[job] for job in jobs]

    def follow(self, started: Mapping[Future, Job], later: int) -> None:
        """Show progress in steps until all runs have ended, and a line for each that ends. Raises
        the first error of a run, which stops the others."""
        jobs, runs = [*started.values()], len(self.results) + len(started) + later
        steps = config.load(jobs[0].arguments)[0].train.last_step if jobs else 0  # of every run

        def going() -> list[Job]:
            return [job for job in jobs if job not in self.results]

        def done() -> int:
            return steps * len(self.results) + sum(min(steps, job.steps()) for job in going())

        error, pending, before, began = None, {*started}, done(), time.perf_counter()
        with files.progress("", steps * runs, "step", initial=before) as bar:
            while pending:
                bar.n = done()
                bar.set_postfix_str(", ".join(job.path.name for job in going()[: self.parallel]))
                ended, pending = wait(pending, None if bar.disable else REFRESH, FIRST_COMPLETED)
                for run in sorted(ended, key=[*started].index):
                    if failure := run.exception():
                        error = error or failure
                        self.stop(signal.SIGTERM, None)
                        continue
                    self.results[started[run]] = run.result()
                    line = f"{len(self.results)}/{runs} {self.standing(started[run])}"
                    if len(self.results) < runs and (now := done()) > before:
                        pace = (time.perf_counter() - began) / (now - before)
                        left = tqdm.format_interval(pace * (steps * runs - now))
                        line += f"; about {left} to go"
                    log.info(line)
        if error is not None:
            raise error

    def standing(self, job: Job) -> str:
        """A finished run's loss, and which setting leads among the runs of its kind."""
        losses: dict[str, list[float]] = defaultdict(list)
        for other, result in self.results.items():
            if other.path.parent == job.path.parent:
                losses[other.setting].append(result["val_loss"])
        best = min(losses, key=lambda setting: statistics.fmean(losses[setting]))
        mean = f"{statistics.fmean(losses[best]):.4f} (n = {len(losses[best])})"
        leader = f"{best} leads with {mean}" if len(losses) > 1 else f"mean {mean}"
        return f"{job.path.name}: val_loss {self.results[job]['val_loss']:.4f}; {leader}"

    def carry_out(self, job: Job) -> dict[str, Any]:
        """Run a job in its own process, from its newest checkpoint if there is one."""
        place = self.places.get()
        try:
            job.path.parent.mkdir(parents=True, exist_ok=True)
            if job.path.is_dir():  # a run whose race was killed may still be saving
                with files.locked(job.path / ".lock", wait=True):
                    pass
            if job.result() is None and (job.path / "config.toml").exists():
                # --resume clears it once it is reached
                stop_at = config.load(job.arguments)[0].train.stop_at
                named = [a for a in job.arguments if key_of(a) == "optim.name"]
                resumed = ["--resume", *named, f"train.stop_at={stop_at}"]
                code, last = self.start(job, resumed, place)
                if code == 4:  # not every optimizer's state can be saved
                    log.warning(f"{job.path}: cannot be resumed, starting over")
                    shutil.rmtree(job.path)
            if job.result() is None and not (job.path / "config.toml").exists():
                _, last = self.start(job, job.arguments, place)
        finally:
            self.places.put(place)
        self.check_optimizer(job)  # the file may have changed in the meantime
        if (result := job.result()) is None:
            raise RunError(f"{job.path.name}: {last.removeprefix('error: ')} (see {job.log_file})")
        if not job.keep:
            shutil.rmtree(job.path / "checkpoints", ignore_errors=True)
        return result

    def check_optimizer(self, job: Job) -> None:
        """Raise ConfigError for invalid arguments, RunError if the job's run began with another
        version of its optimizer's file than the first that this runner has used."""
        name = config.load(job.arguments)[0].optim.name
        now = self.hashes.setdefault(name, optimizer_hash(name).get("optimizer_sha256", ""))
        with contextlib.suppress(OSError, CheckpointError):  # not started yet
            began = read_json(job.path / "environment.json").get("optimizer_sha256", "")
            if began != now:
                other = f"began with another version of the file (sha256 {began}, now {now})"
                hint = "restore it, rename the new one, or choose another --out"
                raise RunError(f"{name}: {job.path} {other}: {hint}")

    def start(self, job: Job, arguments: Sequence[str], place: dict[str, str]) -> tuple[int, str]:
        """Run `normuon-train run` and wait for it; returns its exit code and last line (of several
        ranks, those of the first to fail). Raises Interrupted if a signal ended it."""
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}", "-m"]
        command = [sys.executable, "-m", *(torchrun if self.ranks > 1 else [])]
        command += ["nanonormuon", "run", *arguments, "--out", str(job.path)]
        # the run stops if this process is killed, and imports what this one does; by default
        # `python -m` would also import from the current directory
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        own = {"NANONORMUON_FOLLOW": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": path}
        with open(job.log_file, "ab") as output:
            begin = output.tell()
            if self.stopped:
                raise Interrupted(self.stopped, f"before {job.path.name}")
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            env = os.environ | place | own
            child = subprocess.Popen(command, env=env, start_new_session=True, **streams)
            self.children.add(child)
            code = child.wait()
            self.children.discard(child)
        if any(job.path.glob("crash-*.json")):
            files.replace_file(job.path / "summary.json", b'{"diverged": true}\n')
        elif code and self.stopped:
            raise Interrupted(self.stopped, f"in {job.path.name}; the same command continues it")
        with files.open_regular(job.log_file) as output:
            output.seek(begin)
            return outcome(output.read().decode(errors="replace"), code)

    def stop(self, number: int, _frame: Any) -> None:
        """Forward a signal to the runs, which save and exit."""
        self.stopped = self.stopped or number
        for child in list(self.children):
            child.send_signal(signal.SIGTERM)  # no effect on a child that has exited


def outcome(text: str, code: int) -> tuple[int, str]:
    """The exit code and the last line of a run that ended with `code` and printed `text`. torchrun
    always exits with 1; the last entry of its report is the first failure."""
    lines = text.strip().splitlines() or ["no output"]
    if not (codes := re.findall(r"^  exitcode +: (-?\d+) ", text, re.MULTILINE)):
        return code, lines[-1]
    return int(codes[-1]), next((line for line in lines if line.startswith("error: ")), lines[-1])


def key_of(setting: str) -> str:
    return setting.partition("=")[0].strip()


def resolve(arguments: Sequence[str]) -> config.Config:
    """Load a configuration and build its optimizers on the meta device, so that a wrong name or
    setting is found before any run. Raises ConfigError, CheckpointError."""
    found = config.load(arguments)[0]
    model = models.adopt(found).model
    model = replace(model, vocab_size=model.vocab_size or 64)  # else the data decide it
    with torch.device("meta"), contextlib.suppress(RuntimeError):  # some optimizers need storage
        make_optimizers(GPT(model), found.optim)
    return found


def cost(settings: config.Config, runs: int, at_once: int) -> str:
    """Describe the cost of `runs` runs in one line."""
    steps, tokens = settings.train.last_step, settings.train.batch_tokens
    total = f"{runs * steps * tokens:,} tokens"
    each = f"{runs} runs of {steps:,} steps of {tokens:,} tokens"
    return f"{each}: {total}, {at_once} at a time; a time estimate follows the first run"


def claim(file: Path, arguments: Sequence[str], seeds: str) -> None:
    """Write the plan `file`, what all runs of a directory share, or check that it is unchanged.

    seeds: why arguments may not set train.seed. Raises ConfigError if they do, RunError if changed.
    """
    for argument in arguments:
        if key_of(argument) == "train.seed":
            raise ConfigError(f"{argument}: {seeds}")
    out = file.parent
    files.check_plain([*out.glob("*.log"), *out.glob("*/*.log")])
    loaded = config.load(arguments)[0]
    settings = json.loads(json.dumps(config.flat(loaded)))
    content = {"arguments": [*arguments], "steps": loaded.train.steps}
    if not file.exists():
        if out.is_dir() and any(out.iterdir()):
            raise RunError(f"{out}: not empty, but without {file.name}; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        files.replace_file(file, files.as_json(content | {"settings": settings}))
        return
    text = files.read_file(file)
    try:
        begun = dict.fromkeys(content) | json.loads(text)
        if (known := begun.get("settings")) is not None:  # none in plans of older versions
            begun = json.loads(json.dumps(config.flat(config.Config()))) | known  # new: defaults
    except (ValueError, TypeError):
        raise RunError(f"{file}: {text[:99]!r}, expected a plan; choose another --out") from None
    changed = []
    for name, value in begun.items():
        if value != (now := (settings | content).get(name, value)):
            changed.append(
                f"begun with {name} = {json.dumps(value)[:999]}, found {json.dumps(now)}"
            )
    if changed:
        hint = "begin other runs in another --out; if a recipe has changed, use its version"
        raise RunError(f"{file}: {'; '.join(changed[:3])}: {hint}")
