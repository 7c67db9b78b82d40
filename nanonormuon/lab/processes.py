"""Many runs from one command: each a process and a run directory of its own, none done twice."""

import contextlib
import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanonormuon import config
from nanonormuon.errors import Interrupted, RunError
from nanonormuon.runs import compare
from nanonormuon.storage.files import replace_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One run: `arguments` are those of `normuon-train run`, `path` its run directory, in which
    checkpoints stay only if `keep`."""

    path: Path
    arguments: tuple[str, ...]
    keep: bool = True

    @property
    def log_file(self) -> Path:
        return self.path.with_name(self.path.name + ".log")

    def result(self) -> dict[str, Any] | None:
        """What the run ended with, None if it has not: summary.json, with the curve of val_loss as
        [step, loss]. A run whose numbers ceased to be finite has the loss infinity."""
        try:
            summary = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if summary.get("diverged"):
            return {"val_loss": float("inf"), "curve": []}
        return summary | {"curve": [*zip(*compare.read(self.path).curve("val_loss"))]}


class Runner:
    """Carries out jobs, several at once where there are several devices.

    parallel: how many; 0: one per CUDA device, or per `ranks` of them, and one on a CPU, whose
    cores are divided otherwise. ranks: processes of one run, started by torchrun.
    """

    def __init__(self, parallel: int = 0, ranks: int = 1):
        count = torch.cuda.device_count()
        names = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = names.split(",")[:count] if names else [str(i) for i in range(count)]
        self.parallel, self.ranks = parallel or max(1, count // ranks), ranks
        self.places: queue.Queue[dict[str, str]] = queue.Queue()
        for i in range(self.parallel):
            mine = {devices[(i * ranks + rank) % count] for rank in range(ranks) if count}
            threads = max(1, (os.cpu_count() or 1) // (self.parallel * ranks))
            self.places.put(
                {"CUDA_VISIBLE_DEVICES": ",".join(sorted(mine))}
                if mine
                else {"OMP_NUM_THREADS": str(threads)}
            )
        self.children: set[subprocess.Popen] = set()
        self.stopped = 0

    def run(
        self, jobs: Sequence[Job], spell: Callable[[Job], str] = lambda job: job.path.name
    ) -> list[dict[str, Any]]:
        """Every job's result, in order; one that has a result is not run again.

        Raises ConfigError before the first run; RunError with the last line of a run that failed
        and Interrupted after a signal, when the others have saved what they had. The same call
        goes on from there.
        """
        for job in jobs:
            config.load(job.arguments)
        missing = [job for job in dict.fromkeys(jobs) if job.result() is None]
        bar = tqdm(total=len(missing), unit="run", disable=not (missing and sys.stderr.isatty()))
        error: BaseException | None = None
        with bar, self.listening(), ThreadPoolExecutor(self.parallel) as pool:
            started = {pool.submit(self.carry_out, job): job for job in missing}
            for future in as_completed(started):
                if failure := future.exception():
                    error = error or failure
                    self.stop(signal.SIGTERM)
                    continue
                job, result = started[future], future.result()
                bar.update()
                log.info(f"{spell(job)}: val_loss {result['val_loss']:.4f}")
        if error is not None:
            raise error
        return [job.result() or {} for job in jobs]

    def carry_out(self, job: Job) -> dict[str, Any]:
        """Run a job in its own process, from its newest checkpoint if it has begun before."""
        place = self.places.get()
        try:
            job.path.parent.mkdir(parents=True, exist_ok=True)
            wait_for_owner(job.path)
            if job.result() is None and (job.path / "config.toml").exists():
                stop_at = config.load(job.arguments)[0].train.stop_at  # reached, it is forgotten
                self.start(job, ["--resume", f"train.stop_at={stop_at}"], place)
                if job.result() is None:  # not every optimizer's state can be saved
                    log.warning("%s: cannot be resumed, begins anew", job.path)
                    shutil.rmtree(job.path)
            if job.result() is None:
                self.start(job, job.arguments, place)
        finally:
            self.places.put(place)
        if (result := job.result()) is None:
            text = job.log_file.read_text(encoding="utf-8", errors="replace").strip()
            last = (text.splitlines() or ["it said nothing"])[-1].removeprefix("error: ")
            raise RunError(f"{job.path.name}: {last} (see {job.log_file})")
        if not job.keep:
            shutil.rmtree(job.path / "checkpoints", ignore_errors=True)
        return result

    def start(self, job: Job, arguments: Sequence[str], place: dict[str, str]) -> None:
        """Run `normuon-train run` to its end. Raises Interrupted if that was a signal's doing."""
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}", "-m"]
        command = [sys.executable, "-m", *(torchrun if self.ranks > 1 else [])]
        command += ["nanonormuon", "run", *arguments, "--out", str(job.path)]
        following = {"NANONORMUON_FOLLOW": "1"}  # should this process be killed, the run stops
        with open(job.log_file, "ab") as output:
            if self.stopped:
                raise Interrupted(self.stopped, f"before {job.path.name}")
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=os.environ | place | following, start_new_session=True,
            )  # fmt: skip
            self.children.add(child)
            code = child.wait()
            self.children.discard(child)
        if any(job.path.glob("crash-*.json")):
            replace_file(job.path / "summary.json", b'{"diverged": true}\n')
        elif code and self.stopped:
            raise Interrupted(self.stopped, f"in {job.path.name}; the same command goes on")

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """SIGINT and SIGTERM are passed on to the runs, which save and end; a second one, too."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {n: signal.signal(n, lambda number, _: self.stop(number)) for n in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self, number: int) -> None:
        self.stopped = self.stopped or number
        for child in list(self.children):
            with contextlib.suppress(OSError):
                child.send_signal(signal.SIGTERM)


def wait_for_owner(path: Path) -> None:
    """Return when no process writes the run: one whose race was killed may still be saving."""
    with contextlib.suppress(ImportError, FileNotFoundError):
        import fcntl

        with open(path / ".lock", "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
