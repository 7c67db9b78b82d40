"""Files and directories that survive a crash, complete or absent; JSON lines; locks; the cache."""

import hashlib
import json
import os
import shlex
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanonormuon.errors import DataError


def write_durably(path: Path, content: bytes | Iterable[Any]) -> dict[str, Any]:
    """Write a file, whole or piece by piece, and wait until it is on disk.

    Returns its size and sha256, computed from memory rather than from what was written.
    """
    size, digest = 0, hashlib.sha256()
    with open(path, "wb") as file, naming(path):
        for piece in [content] if isinstance(content, bytes) else content:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        settle(file)
    return {"size": size, "sha256": digest.hexdigest()}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of an open file to an OSError: open() sets it, write() and fsync() do not."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # from numpy's tofile; a file name would hide its message
            raise OSError(f"{path}: {error}") from error
        error.filename = error.filename or str(path)
        raise


def settle(file) -> None:
    """Wait until everything written to an open file is on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until a directory's entries are on disk. Does nothing on Windows, which cannot."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file atomically: a reader sees the old content or the new.

    Raises OSError and leaves the old file intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_durably(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def open_regular(path: str | Path, buffer: int = -1) -> BufferedReader:
    """Open a file from outside the package for reading. buffer: in bytes; -1: the system's choice.

    Raises DataError for anything but a regular file: a pipe would make the reader wait, a device
    has no end. Raises OSError.
    """

    def without_waiting(path: str, flags: int) -> int:  # as opening a pipe does, for its writer
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", buffer, opener=without_waiting)  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise DataError(f"{path}: expected a regular file, not a pipe or device")


def read_file(path: str | Path, limit: int = 1 << 26) -> bytes:
    """Read a whole file, as `open_regular`. Raises OSError, DataError beyond `limit` bytes."""
    with open_regular(path) as file:
        if (found := os.fstat(file.fileno()).st_size) > limit:
            raise DataError(f"{path}: expected at most {limit:,} bytes, found {found:,}")
        return file.read(limit)


def optimizer_file(name: str) -> Path | None:
    """The file of "PATH.py:Class"; None for any other optimizer."""
    path = name.rpartition(":")[0]
    return Path(path) if path.endswith(".py") else None


def check_plain(paths: Iterable[Path]) -> None:
    """Raise DataError for a path that exists and is not a regular file. Called before something is
    appended: a pipe would make the writer wait, a symbolic link leads elsewhere."""
    for path in paths:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise DataError(f"{path}: expected a regular file, not a link or pipe: remove it")


def read_jsonl(path: Path, cut: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield line number (from 1) and value of each line of JSON. Only "\\n" ends a line, since a
    string may contain U+2028 and the like. Raises what read_file raises.

    cut: yield None for an invalid line, as a crash leaves it; else raise ValueError naming it.
    """
    for number, line in enumerate(read_file(path, 1 << 30).split(b"\n"), 1):
        try:
            if line.strip():
                yield number, json.loads(line.decode(errors="replace" if cut else "strict"))
        except (ValueError, RecursionError) as error:
            if not cut:
                raise ValueError(f"{path}: line {number}: {error}") from None
            yield number, None


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Create a directory that appears complete or not at all.

    Yields a hidden directory next to `target` to fill. On leaving the block it is renamed to
    `target`, which must not exist by then or must be empty, and both directories are synced. On an
    error it is removed, so that a full disk does not stay full.
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
    """Take an exclusive lock on a file, created if missing, or on an existing directory.

    Returns the descriptor that holds the lock until it is closed, at the latest when the process
    ends, however it ends; None on Windows, which has no flock, and for a directory on a file system
    that cannot lock one (NFS). Without `wait`, raises BlockingIOError if another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(handle)
        if path.is_dir() and not isinstance(error, BlockingIOError):
            return None
        raise
    return handle


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold `lock` on a path in the `with` block."""
    handle = lock(path, wait)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def progress(doing: str, total: float | None, unit: str, **more: Any) -> tqdm:
    """A bar on standard error, with the time left; nothing where that is no terminal."""
    scale, off = unit in ("B", "token"), {"disable": None} | more
    return tqdm(desc=doing, total=total, unit=unit, unit_scale=scale, leave=False, **off)


def in_units(size: float) -> str:
    """Write a number of bytes with three digits and the unit that fits."""
    units = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
    unit = next((unit for unit, scale in units.items() if size >= scale), "kB")
    return f"{size / units[unit]:.3g} {unit}"


def in_shell(path: Path) -> str:
    """Quote a path for a command line, where a leading dash would make it an option."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def cache_directory() -> Path:
    """Return the directory for demo data: NANONORMUON_CACHE, else in the system's cache folder."""
    if own := os.environ.get("NANONORMUON_CACHE"):
        return Path(own)
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local, "nanonormuon")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "nanonormuon"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nanonormuon")
