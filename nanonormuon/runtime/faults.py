"""What may end a run from outside: signals, lost ranks, time limits.

Imports no torch, so that a signal is answered while torch is still being imported.
"""

import contextlib
import faulthandler
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

LONGER = {"start": 4, "compilation": 4, "evaluation": 4}  # sections that get more than time_limit
GRACE = 5.0  # seconds in which torchrun should have seen the rank that failed first


class Stopping:
    """SIGINT and SIGTERM.

    Until `finishing` is set, the first signal ends the run where it stands; from then on it only
    leaves its `number`, so that the step is finished and saved. A second signal ends the process at
    once.
    """

    def __init__(self) -> None:
        self.number, self.finishing = 0, False

    def __enter__(self) -> "Stopping":
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame: Any) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number
        if not self.finishing:
            self.finish_steps(False)
        say(f"signal {number}: finishing the step, then saving; once more ends at once")

    def finish_steps(self, finishing: bool = True) -> None:
        """Have signals wait for the end of a step from now on; an earlier one does not wait."""
        self.finishing = finishing
        if self.number:
            raise Interrupted(self.number, "before its first step; checkpoints are as they were")


class Watch:
    """Knows what this rank is doing, so that errors can name it.

    A thread ends the process with exit code 7 when a section takes too long, and stops it as if by
    SIGTERM when the process that started it (torchrun, or a race: NANONORMUON_FOLLOW) is gone.
    Leaving the `with` block with an error writes the error to RUN/errors/rank-N.txt (once `folder`
    is set) and to the file that torchrun reports from.
    """

    def __init__(self, time_limit: float, stopping: Stopping):
        self.time_limit, self.stopping = time_limit or float("inf"), stopping
        self.rank, self.ranks = (
            int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        self.step, self.name, self.deadline = 0, "start", float("inf")
        self.folder: Path | None = None
        self.done = threading.Event()
        led = {"TORCHELASTIC_RUN_ID", "NANONORMUON_FOLLOW"} & os.environ.keys()
        self.parent = os.getppid() if led else None

    def longest(self) -> float:
        """Seconds after which any section would have been ended."""
        return min(self.time_limit * max(LONGER.values()) + 60, 7 * 86400)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """A part of the run with a name and a time limit. After an error the name stays."""
        outer = self.name, self.deadline
        limit = self.time_limit * LONGER.get(name, 1)
        self.name, self.deadline = name, time.monotonic() + limit
        yield
        self.name, self.deadline = outer

    @property
    def place(self) -> str:
        rank = f"rank {self.rank}, " if self.ranks > 1 else ""
        return f"{rank}step {self.step}, {self.name}"

    def place_of(self, error: BaseException) -> str:
        """Where an error occurred; its own `section` tells more than the current one."""
        self.name = getattr(error, "section", self.name)
        return self.place

    def __enter__(self) -> "Watch":
        threading.Thread(target=self._observe, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _traceback: Any) -> None:
        self.done.set()
        if error is None or isinstance(error, GeneratorExit):
            return
        if self.ranks > 1 and not isinstance(error, Interrupted):
            error.place = self.place_of(error)  # type: ignore[attr-defined]
        if follows(error) and self.parent is not None:
            self._await_launcher()  # its report should be about the rank that failed first
        else:
            if isinstance(error, Interrupted):  # that is no error, but torchrun asks for a reason
                self.folder = None
            detail = "".join(traceback.format_exception(error))
            self.write_down(describe(error), "" if explained(error) else detail)

    def _await_launcher(self) -> None:
        until = time.monotonic() + GRACE
        while time.monotonic() < until and not self.stopping.number:
            time.sleep(0.05)

    def write_down(self, message: str, detail: str = "") -> Path | None:
        """Append to this rank's error file, and leave torchrun its record."""
        file = None
        with contextlib.suppress(OSError):
            if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
                import json

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
        """End the process. All ranks expire at about one time, so that all stacks are on disk."""
        limit = self.time_limit * LONGER.get(self.name, 1)
        message = (
            f"{self.place}: took more than {limit:g} s (train.time_limit = {self.time_limit:g}"
            f"{'' if limit == self.time_limit else f', times {LONGER[self.name]}'}); ended. Raise "
            "the limit if this was work, else see what each rank was doing"
        )
        if file := self.write_down(message):
            with contextlib.suppress(OSError), open(file, "a") as out:
                faulthandler.dump_traceback(out)
        else:
            faulthandler.dump_traceback(sys.__stderr__)
        say(f"error: {message}: {file or 'above'}")
        time.sleep(min(1.0, self.time_limit))
        os._exit(7)


def say(line: str) -> None:
    """Write to stderr, past buffers and locks, which the interrupted code may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
