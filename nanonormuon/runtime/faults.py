"""Signals, lost ranks and time limits.

Does not import torch, so that signals are handled while torch is being imported.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanonormuon.errors import Interrupted, describe, explained, follows
from nanonormuon.storage.files import replace_file

LIMITS = {"start": 4, "compilation": 4, "evaluation": 4}  # times time_limit; other sections: 1
GRACE = 5.0  # seconds that torchrun has to notice the rank that failed first


class Stopping:
    """Handles SIGINT and SIGTERM.

    The first signal raises Interrupted or, after finish_steps, only sets `number`, so that the
    current step is finished and saved. A second signal ends the process immediately.
    """

    def __init__(self) -> None:
        self.number, self.finishing = 0, False  # number: of the signal to stop for
        self.received = False  # a failed save sets `number` without a signal

    def __enter__(self) -> "Stopping":
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.number and not self.finishing:  # an import may have swallowed Interrupted
            self.interrupt()

    def note(self, number: int, _frame: Any) -> None:
        if self.received:
            os._exit(128 + number)
        self.number, self.received = number, True
        if not self.finishing:
            self.interrupt()
        say(f"signal {number}: finishing the step, then saving; a second signal ends at once")

    def finish_steps(self) -> None:
        """Defer signals to the end of a step. Raises Interrupted after an earlier signal."""
        self.finishing = True
        if self.number:
            self.interrupt()

    def interrupt(self) -> None:
        raise Interrupted(self.number, "before its first step; the checkpoints are unchanged")


class Watch:
    """Tracks what this rank is doing, for error messages, and enforces time limits.

    A thread ends the process with exit code 7 if a section takes too long, and sends it SIGTERM if
    its parent dies: torchrun, or a race (NANONORMUON_FOLLOW). Leaving the `with` block with an
    error writes it to RUN/errors/rank-N.txt, if `folder` is set, and to torchrun's error file.
    """

    def __init__(self, time_limit: float, stopping: Stopping):
        self.time_limit, self.stopping = time_limit or float("inf"), stopping
        self.rank = int(os.environ.get("RANK", "0"))
        self.ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self.step, self.name, self.deadline = 0, "start", float("inf")
        self.folder: Path | None = None
        self.done = threading.Event()
        led = {"TORCHELASTIC_RUN_ID", "NANONORMUON_FOLLOW"} & os.environ.keys()
        self.parent = os.getppid() if led else None

    def limit(self, name: str) -> float:
        """Return the time limit of a section in seconds."""
        return self.time_limit * LIMITS.get(name, 1)

    def longest(self) -> float:
        """Return the seconds after which every section has ended."""
        return min(self.time_limit * max(LIMITS.values()) + 60, 7 * 86400)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Name and time a part of the run. After an error, keeps the name for the message."""
        outer = self.name, self.deadline
        self.name, self.deadline = name, time.monotonic() + self.limit(name)
        yield
        self.name, self.deadline = outer

    @property
    def place(self) -> str:
        rank = f"rank {self.rank}, " if self.ranks > 1 else ""
        return f"{rank}step {self.step}, {self.name}"

    def __enter__(self) -> "Watch":
        threading.Thread(target=self._observe, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _traceback: Any) -> None:
        self.done.set()
        if error is None or isinstance(error, GeneratorExit):
            return
        if self.ranks > 1 and not isinstance(error, Interrupted):
            self.name = getattr(error, "section", self.name)  # more precise, if the error has one
            error.place = self.place  # type: ignore[attr-defined]
        if follows(error) and self.parent is not None:
            until = time.monotonic() + GRACE  # let torchrun report the rank that failed first
            while time.monotonic() < until and not self.stopping.number:
                time.sleep(0.05)
            if self.stopping.number or not (others := self.elsewhere()):
                return
            error.lost = f"one of the ranks {others}, on another node,"  # type: ignore[attr-defined]
        if isinstance(error, Interrupted):  # only for torchrun, as it is not a failure
            self.folder = None
        detail = "" if explained(error) else "".join(traceback.format_exception(error))
        self.write_down(describe(error), detail)

    def elsewhere(self) -> str:
        """Name the ranks of other nodes, "" if there are none."""
        first = self.rank - int(os.environ.get("LOCAL_RANK", self.rank))
        after = first + int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks))
        both = (0, first - 1), (after, self.ranks - 1)
        return " or ".join(f"{a} to {b}" for a, b in both if a <= b)

    def write_down(self, message: str, detail: str = "") -> Path | None:
        """Write an error to torchrun's file and to this rank's, and return the latter."""
        file = None
        with contextlib.suppress(OSError):
            if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
                record = {"message": message, "timestamp": int(time.time())}
                replace_file(Path(path), json.dumps(record).encode())
            if self.folder is not None:
                file = self.folder / f"rank-{self.rank}.txt"
                file.parent.mkdir(exist_ok=True)
                with open(file, "a", encoding="utf-8") as out:
                    out.write(f"{time.strftime('%F %T')} {message}\n{detail}")
        return file

    def _observe(self) -> None:
        while not self.done.wait(0.2):
            if self.parent is not None and os.getppid() != self.parent:
                self.parent, self.time_limit = None, min(self.time_limit, 30.0)
                self.deadline = min(self.deadline, time.monotonic() + self.time_limit)
                say("torchrun is gone")
                os.kill(os.getpid(), signal.SIGTERM)
            if time.monotonic() > self.deadline:
                self._expire()

    def _expire(self) -> None:
        """Write all stacks and end the process, as other ranks do at about the same time."""
        factor = f", times {LIMITS[self.name]}" if self.name in LIMITS else ""
        limit = f"{self.limit(self.name):g} s (train.time_limit = {self.time_limit:g}{factor})"
        advice = "Raise the limit if the rank was still working, else see where each was stuck"
        message = f"{self.place}: took more than {limit}; ended. {advice}"
        if file := self.write_down(message):
            with contextlib.suppress(OSError), open(file, "a") as out:
                faulthandler.dump_traceback(out)
        else:
            faulthandler.dump_traceback(sys.__stderr__)
        say(f"error: {message}: {file or 'above'}")
        time.sleep(min(1.0, self.time_limit))
        os._exit(7)


def say(line: str) -> None:
    """Write to stderr without buffers or locks, which the interrupted code may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
