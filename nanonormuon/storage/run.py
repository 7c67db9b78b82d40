"""A run's directory, logs and environment.

RUN/config.toml  environment.json  metrics.jsonl  samples.jsonl  train.log  groups.txt  checkpoints/
    summary.json
"""

import hashlib
import json
import logging
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from nanonormuon.errors import DataError, RunError, explained
from nanonormuon.storage import checkpoints, files

if TYPE_CHECKING:
    import torch  # slow to import; --help must not wait for it

log = logging.getLogger("nanonormuon")
PACKAGE = Path(__file__).parents[1]
SOURCES = (".py", ".toml", ".md", ".html", ".txt")


class Console(logging.Handler):
    """Writes log lines to stderr without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(Exception):  # a closed terminal must not end a run
            tqdm.write(self.format(record), file=sys.stderr)


def to_console(level: int = logging.INFO) -> None:
    """Log to stderr; replaces an earlier handler."""
    for handler in [h for h in log.handlers if isinstance(h, Console)]:
        log.removeHandler(handler)
    handler = Console(level)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)


class RunDirectory:
    """The files of one run. Only rank 0 writes them; other ranks only know the path. Leaving the
    `with` block unlocks the directory, and removes it if it is still empty."""

    def __init__(self, path: Path, first: bool = True):
        self.path, self.first = path, first
        self.owned = False  # whether this process has acquired it
        self.checkpoints = path / "checkpoints"
        self.metrics: TextIO | None = None
        self.sink: Any = None  # a runtime.trackers.Tracker, called with every row of metrics
        self.resources = ExitStack()

    def acquire(self, resume: bool) -> None:
        """Create the directory and lock it for this process; called on rank 0.

        A directory with config.toml or checkpoints/ holds a run. A new run needs a directory that
        is empty except for hidden files and errors/, which runs that fail early leave. Raises
        RunError if another process has the lock, if there is a run and `resume` is False, or if
        there are other files; DataError if a log is a pipe or link; OSError.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.hold(self.path)  # a user may delete .lock during the run
        if (self.path / "config.toml").exists() or self.checkpoints.exists():
            if not resume:
                hint = "continue it with --resume, or choose another --out"
                raise RunError(f"{self.path} already holds a run: {hint}")
        elif foreign := {n for n in os.listdir(self.path) if n[0] != "." and n != "errors"}:
            found = f"found {min(foreign)}, which a run could overwrite: choose another --out"
            raise RunError(f"{self.path}: expected a run or an empty directory, {found}")
        file = self.path / ".lock"
        logs = [p for names in ("*.log", "*.jsonl", "errors/*") for p in self.path.glob(names)]
        files.check_plain([file, *logs])
        self.hold(file)  # for file systems that cannot lock directories, and earlier versions
        file.write_text(f"{os.getpid()}\n")
        self.owned = True
        checkpoints.sweep(self.checkpoints)

    def hold(self, path: Path) -> None:
        """Lock a path until the `with` block ends. Raises RunError naming the locking process."""
        try:
            self.resources.enter_context(files.locked(path))
        except BlockingIOError:
            owner = ""
            with suppress(OSError, DataError):
                owner = files.read_file(self.path / ".lock", 99).decode(errors="replace").strip()
            user = f"in use by process {owner or 'unknown'}"
            raise RunError(f"{self.path} is {user}: wait, or choose another --out") from None

    def open(
        self, config_toml: str, environment: dict[str, Any], step: int
    ) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
        """Write the configuration and environment, and open the logs to continue after `step`.

        Returns the rows of metrics.jsonl up to `step`, and step and prompt of its samples. Removes
        later ones, which the run will repeat.
        """
        self.write("config.toml", config_toml)
        self.write("environment.json", json.dumps(environment, indent=1) + "\n")
        odd = "backslashreplace"  # for a path that is not UTF-8
        handler = logging.FileHandler(self.path / "train.log", encoding="utf-8", errors=odd)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.resources.callback(handler.close)
        self.resources.callback(log.removeHandler, handler)
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)  # for train.log; the console handler has its own level
        rows = self.rewrite("metrics.jsonl", read_metrics, step)
        samples = self.rewrite("samples.jsonl", read_samples, step)
        file = self.path / "metrics.jsonl"
        self.metrics = self.resources.enter_context(file.open("a", encoding="utf-8"))
        return rows, [(row["step"], row.get("prompt", "")) for row in samples]

    def rewrite(
        self, name: str, read: Callable[[Path], list[dict[str, Any]]], step: int
    ) -> list[dict[str, Any]]:
        """Rewrite a .jsonl file with one row per step, up to `step`; returns the rows."""
        file = self.path / name
        kept = [row for row in read(file) if row["step"] <= step]
        if file.exists():
            self.write(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
        return kept

    def record(self, row: dict[str, Any], more: dict[str, Any] | None = None) -> None:
        """Append one step's metrics, on the rank that opened the logs. more: metrics measured after
        the row was recorded; the new line repeats the row."""
        if self.metrics is not None:
            self.metrics.write(json.dumps(row | (more or {})) + "\n")
            self.metrics.flush()
        if self.sink is not None:
            self.sink({"step": row["step"], **more} if more else row)

    def settle(self) -> None:
        """Wait until the metrics are on disk, before a checkpoint follows them."""
        if self.metrics is not None:
            files.settle(self.metrics)

    def tidy(self, step: int) -> None:
        """Close the metrics and merge their lines to one per step."""
        if self.metrics is not None:
            self.metrics.close()
            self.metrics = None
            self.rewrite("metrics.jsonl", read_metrics, step)

    def add_sample(self, row: dict[str, Any]) -> None:
        """Append a sample's step, prompt and text, on the rank that opened the logs."""
        if self.metrics is not None:
            with open(self.path / "samples.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                files.settle(file)

    def write(self, name: str, content: str) -> None:
        """Replace a file of the run, on rank 0."""
        if self.first:  # JSON lines may contain a lone surrogate, written as \udXXX
            files.replace_file(self.path / name, content.encode(errors="backslashreplace"))

    def again(self, optimizer: str) -> str:
        """Return the command that continues the run. It names an optimizer of another package,
        since a file alone may not (optim.check_trusted)."""
        named = f" {shlex.quote(f'optim.name={optimizer}')}" if ":" in optimizer else ""
        return f"normuon-train run --resume --out {files.in_shell(self.path)}{named}"

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None and not explained(error):  # the console shows only one line
            log.debug("the run failed", exc_info=error)
        if self.sink is not None:
            self.sink.close()
        self.metrics = self.sink = None
        if self.owned and self.path.is_dir() and os.listdir(self.path) == [".lock"]:
            (self.path / ".lock").unlink()
            self.path.rmdir()
        self.resources.close()


def announce(row: dict[str, Any], steps: int, bar: tqdm) -> None:
    """Log a step or, on a terminal, show it in the progress bar, and log evaluations only."""
    line = f"step {row['step']}/{steps}  loss {row['loss']:.4f}  lr {row['lr']:.3g}  "
    line += f"grad_norm {row['grad_norm']:.3g}  {row['tokens_per_second']:,.0f} tokens/s"
    measures = (key for key in ("val_loss", "val_bpb") if row.get(key) is not None)
    line += "".join(f"  {key} {row[key]:.4f}" for key in measures)
    if "expert_load_max" in row:
        line += f"  load {row['expert_load_min']:.2f} to {row['expert_load_max']:.2f}"
    if row.get("skipped"):
        line += f"  skipped {row['skipped']}"
    if "qk_max" in row:
        line += f"  qk_max {row['qk_max']:.3g}  qk_clipped {row['qk_clipped']}"
    bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s")
    log.log(logging.INFO if bar.disable or "val_loss" in row else logging.DEBUG, line)


def aligned(rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Format rows of cells as a table. numbers: right-align all columns but the first."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = "<" + (">" if numbers else "<") * len(widths)
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths))
    return "\n".join(form.format(*row).rstrip() for row in rows)


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as a Markdown table; the first is the header."""
    head, *lines = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *lines))


class Validations(dict[int, dict[str, float | None]]):
    """The validations of a run: step -> {"val_loss", "val_bpb"}."""

    def take_up(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add the validations in the rows of a metrics.jsonl."""
        for row in rows:
            if "val_loss" in row:
                self[row["step"]] = {key: row.get(key) for key in ("val_loss", "val_bpb")}

    def best(self, among: Collection[int | None] | None = None) -> int | None:
        """Return the step with the lowest loss (the latest of several), of all or some steps."""
        losses = {s: row["val_loss"] for s, row in self.items() if among is None or s in among}
        steps = [step for step, loss in losses.items() if not math.isnan(loss)]
        return min(steps, key=lambda step: (losses[step], -step), default=None)

    @property
    def stale(self) -> int:
        """Number of validations since the best one."""
        return sum(step > (self.best() or 0) for step in self)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl with `read_rows`. Values are numbers, NaN and infinity included (as for
    a skipped step); val_bpb may be null."""

    def fits(key: str, value: Any) -> bool:
        small = type(value) is int and abs(value) < 1e100
        return small or isinstance(value, float) or (value is None and key == "val_bpb")

    return read_rows(file, fits)


def read_samples(file: Path) -> list[dict[str, Any]]:
    """Read a samples.jsonl with `read_rows`: step, prompt and text."""
    return read_rows(file, lambda key, value: key == "step" or isinstance(value, str))


def read_rows(file: Path, fits: Callable[[str, Any], bool]) -> list[dict[str, Any]]:
    """Read a .jsonl file of steps, merging the lines of each step (and prompt) into one row.

    Leaves out invalid lines, such as one truncated by a crash, and values for which `fits` is
    false, with one warning that names them. A missing file has no rows.
    """
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    amiss = []
    for number, row in files.read_jsonl(file, cut=True) if file.is_file() else ():
        step = row.get("step") if isinstance(row, dict) else None
        if type(step) is not int or not 0 <= step < 10**15:
            amiss.append(f"line {number}")
            continue
        amiss += [f"line {number}: {key[:40]!r}" for key in row if not fits(key, row[key])]
        kept = {key: value for key, value in row.items() if fits(key, value)}
        which = step, kept.get("prompt", "")
        rows[which] = rows.get(which, {}) | kept
    if amiss:
        more = f" and {len(amiss) - 3} more" if len(amiss) > 3 else ""
        log.warning(f"{file}: left out, because damaged: {', '.join(amiss[:3])}{more}")
    return [rows[which] for which in sorted(rows, key=lambda which: which[0])]


def known_runs(path: Path | None = None) -> str:
    """List the runs in `path` and in runs/, for the message that a run is missing."""
    places = {Path("runs"), path or Path("runs")}
    found = sorted({str(p.parent) for place in places for p in place.glob("*/config.toml")})
    return "known here: " + (", ".join(found[-5:]) or "none in runs/")


def environment(device: "torch.device", ranks: int, optimizer: str = "") -> dict[str, Any]:
    """Collect what affects results beside the configuration: command, hash of the source (and of
    an optimizer's file), versions, device."""
    import torch

    from nanonormuon import __version__

    packages = ("torch", "numpy", "safetensors", "tiktoken")
    cuda = device.type == "cuda"  # platform.processor() and .platform() would start a process
    name, processor = torch.cuda.get_device_name(device) if cuda else "", platform.machine()
    # Linux alone has this file, and some ARM processors have no such line in it
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_commit": git_commit(PACKAGE.parent),
        "source_sha256": source_hash(optimizer),
        **optimizer_hash(optimizer),
        "nanonormuon": __version__,
        "python": platform.python_version(),
        **{package: import_module(package).__version__ for package in packages},
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": f"{device} {name or processor}",
        "processor": processor,
        "cpu_threads": torch.get_num_threads(),
        "ranks": ranks,
    }


def git_commit(checkout: Path) -> str | None:
    """Return the current commit from git's files, None if there are none."""
    git = checkout / ".git"
    with suppress(OSError):
        head = (git / "HEAD").read_text().strip()  # a commit if detached, else the branch's file
        return (git / head.split()[1]).read_text().strip() if " " in head else head
    return None


def source_files(optimizer: str = "") -> dict[str, Path]:
    """List the package's sources by relative path, and the file of an optimizer "FILE.py:Class"."""
    found = [file for file in sorted(PACKAGE.rglob("*.*")) if file.suffix in SOURCES]
    own = files.optimizer_file(optimizer)
    return {f.relative_to(PACKAGE).as_posix(): f for f in found} | ({str(own): own} if own else {})


def optimizer_hash(optimizer: str) -> dict[str, str]:
    """Return {"optimizer_sha256": ...} for an optimizer "FILE.py:Class", {} for any other."""
    file = files.optimizer_file(optimizer)
    return {"optimizer_sha256": hashlib.sha256(files.read_file(file)).hexdigest()} if file else {}


def source_hash(optimizer: str = "") -> str:
    """Hash `source_files`, to tell a modified checkout from its commit."""
    digest = hashlib.sha256()
    for name, file in source_files(optimizer).items():
        digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
