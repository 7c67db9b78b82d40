"""Files that are old or new, never a part: write, fsync, rename, fsync the directory; and the lines
of those that grow, which may end in a part."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file and wait until the disk has it."""
    with open(path, "wb") as file, naming(path):
        file.write(content)
        settle(file)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError the name of the open file at fault; writing, unlike opening, sets none."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # words alone (numpy's tofile): a file name would hide them
            raise OSError(f"{path}: {error}") from error
        error.filename = error.filename or str(path)
        raise


def settle(file) -> None:
    """Wait until the disk has what was written to an open file."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the disk has a directory's entries (POSIX; elsewhere there is no such call)."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under a hidden name, then give it its own: a reader sees the old content or the
    new. Raises OSError with the old one intact."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_durably(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def read_jsonl(path: Path, cut: bool = False) -> Iterator[tuple[int, Any]]:
    """The values of a file of JSON lines, each with its line number from 1. Only "\\n" ends a line:
    a string may hold U+2028 and the like.

    cut: leave out lines that are no JSON, as a crash leaves them. Raises OSError, and ValueError
    naming file and line.
    """
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            if line.strip():
                yield number, json.loads(line.decode(errors="replace" if cut else "strict"))
        except (ValueError, RecursionError) as error:
            if not cut:
                raise ValueError(f"{path}: line {number}: {error}") from None


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """A directory that appears complete or not at all.

    Gives a hidden directory beside `target` to fill. Leaving the block renames it to `target`,
    which must not exist by then, or be empty, and waits until the disk has the entries of both. An
    error in the block removes it, so that a full disk does not stay full.
    """
    partial = target.with_name(f".partial-{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync_directory(partial)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_directory(target.parent)


def lock(path: Path, wait: bool = False) -> int | None:
    """Lock a file, made if it is missing, or an existing directory, for this process alone.

    Returns the descriptor that holds the lock until it is closed; the system closes it when the
    process dies, however it dies. None on Windows, which has no such lock. Raises BlockingIOError
    if another process holds it, unless `wait`.
    """
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        raise
    return handle


def cache_directory() -> Path:
    """Where demo data is kept: NANONORMUON_CACHE, or `nanonormuon` in the system's cache place."""
    if own := os.environ.get("NANONORMUON_CACHE"):
        return Path(own)
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local, "nanonormuon")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "nanonormuon"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nanonormuon")
