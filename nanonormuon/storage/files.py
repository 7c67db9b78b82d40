"""Atomic files and directories, JSON lines, locks, and the cache directory."""

import hashlib
import json
import os
import shlex
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanonormuon.errors import DataError


def write_durably(path: Path, content: bytes | Iterable[Any]) -> dict[str, Any]:
    """Write a file, whole or piece by piece, and wait until it is on disk. Returns its size and
    sha256, computed from the content in memory."""
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
    """Add the file's name to an OSError, as write() and fsync() do not set it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of numpy's tofile; setting filename would hide the message
            raise OSError(f"{path}: {error}") from error
        error.filename = error.filename or str(path)
        raise


def settle(file) -> None:
    """Wait until everything written to an open file is on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until a directory's entries are on disk (not supported by Windows)."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file atomically. If it raises OSError, the old file is intact."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_durably(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def open_regular(path: str | Path, buffer: int = -1) -> BufferedReader:
    """Open an untrusted file for reading. buffer: in bytes; -1: Python's default.

    Raises DataError for anything but a regular file (reading a pipe can block, a device may have no
    end), and OSError.
    """

    def without_waiting(path: str, flags: int) -> int:  # opening a pipe waits for its writer
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", buffer, opener=without_waiting)  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise DataError(f"{path}: expected a regular file, not a pipe or device")


def read_file(path: str | Path, limit: int = 1 << 26) -> bytes:
    """Read a whole file of at most `limit` bytes. Raises DataError and OSError."""
    with open_regular(path) as file:
        if (found := os.fstat(file.fileno()).st_size) > limit:
            raise DataError(f"{path}: expected at most {limit:,} bytes, found {found:,}")
        return file.read(limit)


def optimizer_file(name: str) -> Path | None:
    """Return the file of an optimizer "PATH.py:Class", None for any other optimizer."""
    path = name.rpartition(":")[0]
    return Path(path) if path.endswith(".py") else None


def check_plain(paths: Iterable[Path]) -> None:
    """Raise DataError if a path to be appended to is not a regular file: writing to a pipe can
    block, and a symbolic link leads elsewhere."""
    for path in paths:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise DataError(f"{path}: expected a regular file, not a link or pipe: remove it")


def read_jsonl(path: Path, cut: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield the number (from 1) and value of each line of JSON. Lines end only at "\\n", since a
    string may contain U+2028. Raises DataError and OSError.

    cut: yield None for an invalid line, as a crash may leave one; otherwise raises ValueError.
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
    """Create a directory atomically.

    Yields a hidden directory next to `target` to fill. On leaving the block, renames it to
    `target`, which must be missing or empty by then, and syncs both directories. On an error,
    removes it, so that a full disk does not stay full.
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


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on a file, created if missing, or on an existing directory.

    Does nothing where locking is not supported: on Windows, or for a directory on NFS. Raises
    BlockingIOError if another process holds the lock, unless `wait`.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if isinstance(error, BlockingIOError) or not path.is_dir():
                raise
        yield
    finally:
        os.close(handle)


def progress(doing: str, total: float | None, unit: str, show: bool = True, **more: Any) -> tqdm:
    """A bar on standard error, with the time left, if `show`; nothing where that is no terminal, or
    on ranks other than 0."""
    hidden, scale = not show or os.environ.get("RANK", "0") != "0", unit in ("B", "token")
    off = {"disable": hidden or None} | more
    return tqdm(desc=doing, total=total, unit=unit, unit_scale=scale, leave=False, **off)


def in_units(size: float) -> str:
    """Format a number of bytes with three digits and a unit."""
    units = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
    unit = next((unit for unit, scale in units.items() if size >= scale), "kB")
    return f"{size / units[unit]:.3g} {unit}"


def as_json(content: Mapping[str, Any], indent: int = 1) -> bytes:
    """Format the content of a JSON file."""
    return (json.dumps(content, indent=indent) + "\n").encode()


def in_shell(path: Path) -> str:
    """Quote a path for a command line; a leading dash must not look like an option."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def cache_directory() -> Path:
    """Return the directory for demo data: NANONORMUON_CACHE, or one in the user's cache folder."""
    folders = {"win32": os.environ.get("LOCALAPPDATA"), "darwin": Path.home() / "Library/Caches"}
    usual = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    caches = folders.get(sys.platform) or usual
    return Path(os.environ.get("NANONORMUON_CACHE") or Path(caches, "nanonormuon"))
