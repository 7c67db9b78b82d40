"""A run's directory and its log: metrics.jsonl, console, environment.

RUN/config.toml  environment.json  metrics.jsonl  samples.jsonl  train.log  groups.txt  checkpoints/
    summary.json
"""

import hashlib
import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from tqdm import tqdm

from nanonormuon.errors import RunError, explained
from nanonormuon.storage import checkpoints
from nanonormuon.storage.files import lock, read_jsonl, replace_file

if TYPE_CHECKING:
    import torch  # a help text must not wait for it

log = logging.getLogger("nanonormuon")
PACKAGE = Path(__file__).parents[1]


class Console(logging.Handler):
    """Lines on stderr that do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(Exception):  # a closed terminal must not end a run
            tqdm.write(self.format(record), file=sys.stderr)


def to_console(level: int = logging.INFO) -> None:
    """Send the package's log lines to stderr, once per process."""
    for handler in [h for h in log.handlers if isinstance(h, Console)]:
        log.removeHandler(handler)
    handler = Console(level)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)


class Sink(Protocol):
    """Something else that wants the metrics; see trackers.py."""

    def __call__(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class RunDirectory:
    """One run's files, with one writer at a time. Ranks other than the first only know the path.

    Leaving the `with` block releases it, and removes it again if nothing was written into it.
    """

    def __init__(self, path: Path, first: bool = True):
        self.path, self.first = path, first
        self.metrics: TextIO | None = None
        self.handler: logging.Handler | None = None
        self.lock: int | None = None
        self.sink: Sink | None = None

    def acquire(self, resume: bool) -> None:
        """Make the directory and become its writer; on the first rank.

        Raises RunError for a directory that another process writes, or that holds a run although
        `resume` is False; OSError if it cannot be made.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        ours = ("config.toml", "checkpoints")
        if not resume and any((self.path / name).exists() for name in ours):
            raise RunError(
                f"{self.path} already holds a run: continue it with --resume, "
                "or choose another --out"
            )
        checkpoints.sweep(self.checkpoints)

    def _lock(self) -> None:
        """Become the only writer; the lock drops when this process dies, however it dies."""
        file = self.path / ".lock"
        try:
            self.lock = lock(file)
        except BlockingIOError:
            owner = file.read_text().strip() or "unknown"
            raise RunError(
                f"{self.path} is being written by process {owner}: wait, or choose another --out"
            ) from None
        if self.lock is not None:
            file.write_text(f"{os.getpid()}\n")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def open(
        self, config_toml: str, environment: dict[str, Any], step: int
    ) -> list[dict[str, Any]]:
        """Write what describes the run, and open its logs for the steps after `step`.

        Returns the rows of metrics.jsonl up to `step`; later ones, of lost work, are dropped.
        """
        replace_file(self.path / "config.toml", config_toml.encode())
        replace_file(
            self.path / "environment.json", (json.dumps(environment, indent=1) + "\n").encode()
        )
        file = self.path / "metrics.jsonl"
        kept = [row for row in read_metrics(file) if row["step"] <= step]
        replace_file(file, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.metrics = open(file, "a", encoding="utf-8")  # noqa: SIM115
        self.handler = logging.FileHandler(self.path / "train.log", encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self.handler)
        log.setLevel(logging.DEBUG)  # for train.log; the console's handler has its own level
        return kept

    def record(self, row: dict[str, Any]) -> None:
        """Append one step's metrics."""
        if self.metrics is not None:
            self.metrics.write(json.dumps(row) + "\n")
            self.metrics.flush()
        if self.sink is not None:
            self.sink(row)

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add one object to a .jsonl file of the run."""
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def write(self, name: str, content: str) -> None:
        if self.first:
            replace_file(self.path / name, content.encode())

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None and not explained(error):  # the console shows one line
            log.debug("the run failed", exc_info=error)
        self.close()
        if self.first and self.path.is_dir() and os.listdir(self.path) == [".lock"]:
            (self.path / ".lock").unlink()  # the run ended before it wrote anything
            self.path.rmdir()

    def close(self) -> None:
        if self.sink is not None:
            self.sink.close()
        if self.handler is not None:
            log.removeHandler(self.handler)
            self.handler.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.lock is not None:
            os.close(self.lock)
        self.metrics = self.handler = self.lock = self.sink = None


def announce(row: dict[str, Any], steps: int, bar: tqdm) -> None:
    """Show a logged step: as a line, or on a terminal in the bar, with a line per evaluation."""
    line = (
        f"step {row['step']}/{steps}  loss {row['loss']:.4f}  lr {row['lr']:.3g}  "
        f"grad_norm {row['grad_norm']:.3g}  {row['tokens_per_second']:,.0f} tokens/s"
    )
    if "val_loss" in row:
        line += f"  val_loss {row['val_loss']:.4f}"
        if row["val_bpb"] is not None:
            line += f"  val_bpb {row['val_bpb']:.4f}"
    if row.get("skipped"):
        line += f"  skipped {row['skipped']}"
    bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s")
    log.log(logging.INFO if bar.disable or "val_loss" in row else logging.DEBUG, line)


def aligned(rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Rows of cells as text in aligned columns; with `numbers`, all but the first flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = (
        "  ".join(c.rjust(w) if numbers and i else c.ljust(w) for i, (c, w) in enumerate(cells))
        for cells in (list(zip(row, widths)) for row in rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a crash is left out."""
    rows = [row for _, row in read_jsonl(file, cut=True)] if file.exists() else []
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def environment(device: "torch.device", ranks: int) -> dict[str, Any]:
    """What else decides a result: command, source, versions, device."""
    import numpy
    import safetensors
    import tiktoken
    import torch

    from nanonormuon import __version__

    cuda = device.type == "cuda"  # platform.processor() and .platform() would start a process
    name = torch.cuda.get_device_name(device) if cuda else platform.machine()
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_commit": git_commit(PACKAGE.parent),
        "source_sha256": source_hash(),
        "nanonormuon": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        "tiktoken": tiktoken.__version__,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": f"{device} {name}".strip(),
        "cpu_threads": torch.get_num_threads(),
        "ranks": ranks,
    }


def git_commit(checkout: Path) -> str | None:
    """The commit checked out, read from git's own files; None where there are none."""
    with suppress(OSError):
        head = (checkout / ".git" / "HEAD").read_text().strip()
        return (
            head if " " not in head else (checkout / ".git" / head.split()[1]).read_text().strip()
        )
    return None


def source_files() -> dict[str, Path]:
    """The package's own code and recipes, of every room, by their path in the package."""
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.glob("recipes/*.toml")]
    return {file.relative_to(PACKAGE).as_posix(): file for file in sorted(files)}


def source_hash() -> str:
    """sha256 over `source_files`: tells a changed checkout from its commit."""
    digest = hashlib.sha256()
    for name, file in source_files().items():
        digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
