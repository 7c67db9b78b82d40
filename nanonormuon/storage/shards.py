"""Token shards on disk: their format, the manifest, and data directories, checked when opened.

A shard is a 1,024-byte header (256 little-endian int32: 20240520, version, number of tokens, zeros)
and then the tokens, uint16 in version 1 and uint32 in version 2 (vocabularies over 65,536): the
format of llm.c and modded-nanogpt. A data directory holds `*train_*.bin`, `*val_*.bin` and, if
`normuon-train prepare` made it, a `manifest.json` that says what must be in them.
"""

import hashlib
import json
import math
import os
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nanonormuon.errors import DataError
from nanonormuon.storage.files import in_shell, progress

MAGIC, HEADER_BYTES = 20240520, 1024
DTYPES = {1: np.dtype("<u2"), 2: np.dtype("<u4")}  # by shard version
MANIFEST, FORMAT, PARTIAL = "manifest.json", 1, ".partial"
AGAIN = "prepare the data again"  # in errors
SHARD_SHAPE = {"name": str, "tokens": int, "size": int, "sha256": str, "max_token": int}
_SPLIT = {"documents": int, "tokens": int, "bytes": int, "shards": [SHARD_SHAPE]}
SOURCE_SHAPE = {"name": str, "documents": int, "bytes": int}  # missing in older manifests
MANIFEST_SHAPE = {
    "format": int,
    "tokenizer": {"name": str, "hash": str, "vocab_size": int, "eot": int},
    "train": _SPLIT,
    "val": _SPLIT,
}
MANIFEST_LIMIT = 64 << 20  # bytes; a manifest of 100,000 shards has 20 MB
FULL_CHECK_LIMIT = 256 << 20  # bytes always hashed at the start; takes about 0.3 s
FEW = 10_000  # tokens; fewer are too few to train or validate on
CHUNK = 1 << 22  # tokens read at a time in a scan of a shard


# ------------------------------------------------------------------------------------------ shards


def header(version: int, n_tokens: int) -> bytes:
    """Return the first 1,024 bytes of a shard."""
    fields = np.zeros(256, "<i4")
    fields[:3] = MAGIC, version, n_tokens
    return fields.tobytes()


def read_shard(path: str | Path, headerless: bool = False) -> np.memmap:
    """Map a shard read-only after checking its size against its header. Reads no tokens.
    `headerless`: a file of uint16 tokens only, as nanoGPT writes."""
    path = Path(path)
    if not path.is_file():  # reading a pipe could block
        raise DataError(f"{path}: missing or not a regular file; {AGAIN}")
    found, first = path.stat().st_size, np.fromfile(path, "<i4", 3).tolist()
    if headerless:
        if found < 2 or found % 2 or first[:1] == [MAGIC]:
            problem = f"expected uint16 tokens alone, found {found} bytes that begin with {first}"
            raise DataError(f"{path}: {problem}; shards with a header need data.format=shards")
        return np.memmap(path, DTYPES[1], "r")
    magic, version, n_tokens = first if found >= HEADER_BYTES else (0, 0, 0)
    known = version in DTYPES
    size = HEADER_BYTES + n_tokens * DTYPES[version].itemsize if known else HEADER_BYTES
    if magic != MAGIC or not known or n_tokens < 1 or found != size:
        expected = f"[{MAGIC}, 1 (uint16) or 2 (uint32), number of tokens] and {size} bytes"
        problem = f"expected a shard with {expected}, found {first} and {found} bytes"
        raise DataError(f"{path}: {problem}; copy or prepare it again")
    return np.memmap(path, DTYPES[version], "r", HEADER_BYTES, (n_tokens,))


def check_ids(tokens: np.ndarray, vocab_size: int | None, path: Path, offset: int = 0) -> int:
    """Return the largest of the ids (n,). Raises DataError for one outside the vocabulary."""
    largest = 0
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        largest = max(largest, int(chunk.max()))
        if vocab_size is not None and (largest >= vocab_size or int(chunk.min()) < 0):
            i = int(np.flatnonzero((chunk >= vocab_size) | (chunk < 0))[0])
            problem = f"expected an id below {vocab_size}, found {int(chunk[i])}"
            hint = "prepare the data with this model's tokenizer"
            raise DataError(f"{path}: token {offset + start + i}: {problem}; {hint}")
    return largest


def sha256(path: str | Path) -> str:
    """Hash a file's content, reading it in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------- directories


class File:
    """A shard's file in the state in which it was opened. `listed`: its entry in the manifest, if
    any, until the content has been verified."""

    turn = threading.Lock()  # the run's threads hash one file at a time

    def __init__(self, path: Path, listed: dict[str, Any] | None = None) -> None:
        self.path, self.found, self.listed = path, _state(path), listed
        self._error: DataError | OSError | None = None
        self._thread: threading.Thread | None = None

    def compare(self, **found: Any) -> None:
        """Raise DataError if the manifest lists other values for the shard."""
        if self.listed and self.path.is_symlink():
            raise DataError(f"{self.path}: expected a file, found a symbolic link; copy it here")
        for key, value in found.items():
            if self.listed and value != self.listed[key]:
                problem = f"{key}: expected {self.listed[key]} ({MANIFEST}), found {value}"
                raise DataError(f"{self.path}: {problem}; restore the file or {AGAIN}")

    def verify(self) -> None:
        """Compare the file's hash with the manifest, once. Raises DataError."""
        if self.listed:
            self.compare(sha256=sha256(self.path))
            self.listed = None

    def check(self) -> None:
        """Raise DataError if the file has changed or failed verification, which this may start.
        Called before a shard is read; costs a stat()."""
        if (now := _state(self.path)) != self.found:
            problem = f"expected (bytes, time in ns) {self.found}, found {now}"
            raise DataError(f"{self.path}: changed while in use: {problem}; restore it and resume")
        if self._error:
            raise self._error
        if self.listed and self._thread is None:  # a daemon, so a failing run need not wait for it
            self._thread = threading.Thread(target=self._verify_in_turn, daemon=True)
            self._thread.start()

    def settle(self) -> None:
        """Wait for the verification, if started. Raises DataError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self.check()

    def _verify_in_turn(self) -> None:
        try:
            with self.turn:
                self.verify()
        except (DataError, OSError) as error:
            self._error = error


@dataclass
class Split:
    """The shards of a split in name order. `bytes`: UTF-8 bytes of its text, if known."""

    paths: list[Path]
    shards: list[np.ndarray]
    vocab_size: int | None = None
    bytes: int | None = None
    files: list[File] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.files = self.files or [File(path) for path in self.paths]

    @property
    def tokens(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def _of(self, parts: list[tuple[File, np.ndarray]]) -> "Split":
        """Make a split of shards, or parts of shards, with this split's vocabulary."""
        files, shards = [file for file, _ in parts], [shard for _, shard in parts]
        return Split([file.path for file in files], shards, self.vocab_size, files=files)

    @classmethod
    def joined(cls, splits: list["Split"]) -> "Split":
        """Concatenate splits."""
        if len(splits) == 1:
            return splits[0]
        return splits[-1]._of([part for s in splits for part in zip(s.files, s.shards)])

    def cut(self, tokens: int) -> tuple["Split", "Split"]:
        """Split into the first `tokens` tokens and the rest, whose bytes of text are unknown."""
        first, rest = [], []
        for file, shard in zip(self.files, self.shards):
            for half, part in ((first, shard[:tokens]), (rest, shard[tokens:])):
                if len(part):
                    half.append((file, part))
            tokens = max(0, tokens - len(shard))
        return self._of(first), self._of(rest)

    def text_bytes(self, tokenizer: Any, max_tokens: int = 0) -> int | None:
        """Return the UTF-8 bytes of the targets, or of the first `max_tokens`; None if unknown."""
        if self.bytes is not None and not max_tokens:
            return self.bytes
        if tokenizer is None or (lengths := tokenizer.lengths) is None:
            return None
        total, left = 0, max_tokens or self.tokens
        for path, shard in zip(self.paths, self.shards):
            for start in range(1, len(shard), CHUNK):  # a shard's first token is never a target
                part = shard[start : min(len(shard), start + CHUNK, start + left)]
                if not len(part):
                    return total
                check_ids(part, len(lengths), path, start)
                total += int(lengths[part].sum())
                left -= len(part)
        return total

    def settle(self) -> None:
        """Finish verifying shards read so far, before their results are used. Raises DataError."""
        for file in self.files:
            file.settle()


@dataclass
class Data:
    """An open data directory. `fingerprint`: of its content or, without a manifest, its files."""

    path: Path
    train: Split
    val: Split
    manifest: dict[str, Any] | None
    vocab_size: int | None
    fingerprint: str
    mix: list[tuple[Split, int]] = field(default_factory=list)  # see data.Batches

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise DataError if there is a manifest that does not fit the tokenizer."""
        if not self.manifest:
            return
        expected = {key: self.manifest["tokenizer"][key] for key in ("hash", "vocab_size", "eot")}
        found = {key: getattr(tokenizer, key) for key in expected}
        if "sha256" not in self.manifest and tokenizer.lengths is not None:  # an older one
            expected["val.bytes"] = self.val.bytes
            found["val.bytes"] = replace(self.val, bytes=None).text_bytes(tokenizer)
        for key, value in expected.items():
            if found[key] != value:
                problem = f"expected {value} ({MANIFEST}), found {found[key]} (the tokenizer)"
                raise DataError(f"{self.path}: {key}: {problem}; {AGAIN}")


def open_data(
    path: str | Path,
    vocab_size: int | None = None,
    verify: str = "auto",
    headerless: bool = False,
) -> Data:
    """Open a data directory.

    With a manifest, shards must have the listed names and sizes, and the vocabulary at most
    `vocab_size` ids (the model's, if given). Without one (FineWeb as published), ids must be below
    `vocab_size`, if given. All contents (hashes, or ids) are checked if verify="full" or if the
    shards have at most 256 MB in all; otherwise a listed shard is hashed on first use. Each batch's
    ids are checked in any case. `headerless`: nanoGPT's train.bin and val.bin; its meta.pkl is
    never read, because unpickling can run code. Raises DataError.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: {_absent(path)}")
    manifest = None
    if os.path.lexists(path / MANIFEST) and not headerless:
        manifest = read_manifest(path)
        made_for = manifest["tokenizer"]["vocab_size"]
        if vocab_size is not None and made_for > vocab_size:
            problem = f"expected at most {vocab_size} token ids (the model's), found {made_for}"
            hint = "set model.vocab_size, or prepare with the model's tokenizer"
            raise DataError(f"{path / MANIFEST}: {problem}; {hint}")
        vocab_size = made_for
    elif (path / PARTIAL).exists():
        raise DataError(f"{path}: preparation is unfinished; run normuon-train prepare again")
    parts = ((name, manifest and manifest[name]) for name in ("train", "val"))
    train, val = (_open_split(path, *part, vocab_size, headerless) for part in parts)
    shards, files = train.shards + val.shards, train.files + val.files
    if verify == "full" or sum(shard.nbytes for shard in shards) <= FULL_CHECK_LIMIT:
        for shard, file in zip(shards, progress("verifying", None, "file", iterable=files)):
            file.verify()
            if vocab_size is not None and not manifest:
                check_ids(shard, vocab_size, file.path)
    if manifest:  # what determines the tokens, without names of sources or the tool's version
        identity: Any = [manifest["tokenizer"]["hash"], manifest["train"], manifest["val"]]
    else:
        identity = [(file.path.name, file.found[0]) for file in files]
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Data(path, train, val, manifest, vocab_size, fingerprint)


def _absent(path: Path) -> str:
    """Describe a path without shards, and how to prepare data."""
    if (path / "config.toml").is_file():
        return "this is a run; expected a directory that normuon-train prepare wrote"
    if path.exists():
        out = in_shell(Path("data", path.resolve().stem))
        make = f"normuon-train prepare {in_shell(path)} --out {out}"
        return f"not prepared; run {make}, then set data.path={out}"
    make = f"normuon-train prepare FILE... --out {in_shell(path)}"
    return f"no such data directory; run {make} (a recipe's data: see normuon-train recipes NAME)"


def _open_split(
    path: Path, name: str, entry: dict[str, Any] | None, vocab_size: int | None, headerless: bool
) -> Split:
    """Open a split's files, checking their names and sizes against its entry in the manifest."""
    pattern = f"{name}.bin" if headerless else f"*{name}_*.bin"
    paths = sorted(p for p in path.glob(pattern) if not p.name.startswith("."))
    listed = {shard["name"]: shard for shard in entry["shards"]} if entry else {}
    if entry and (wrong := sorted({p.name for p in paths} ^ listed.keys())):
        problem = "missing, but listed" if wrong[0] in listed else "found, but not listed"
        raise DataError(f"{path}: {wrong[0][:80]!r}: {problem} in {MANIFEST}; {AGAIN}")
    if not paths:
        hint = "prepare it again" if entry or any(path.glob("*_*.bin")) else _absent(path)
        if not headerless and (path / f"{name}.bin").exists():
            hint = "for nanoGPT's files set data.format=nanogpt"
        raise DataError(f"{path}: no {name} split, expected {pattern}; {hint}")
    files = [File(p, listed.get(p.name)) for p in paths]
    shards = [np.asarray(read_shard(p, headerless)) for p in paths]
    for file, shard in zip(files, shards):
        file.compare(tokens=len(shard), size=file.found[0])
    return Split(paths, shards, vocab_size, entry and entry["bytes"], files)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Read manifest.json and check all fields that are used. Raises DataError."""
    path = Path(directory, MANIFEST)
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MANIFEST_LIMIT:
            raise ValueError(f"expected a regular file of at most {MANIFEST_LIMIT} bytes")
        manifest = json.loads(path.read_bytes())
        check_shape(manifest, MANIFEST_SHAPE, "manifest")
        check_shape(manifest.get("sources", []), [SOURCE_SHAPE], "manifest.sources")
        if manifest["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT}, found {manifest['format']}")
        if (expected := manifest.get("sha256", digest(manifest))) != digest(manifest):
            raise ValueError(f"expected sha256 {expected}, found {digest(manifest)}")
        vocab_size = manifest["tokenizer"]["vocab_size"]
        if not manifest["tokenizer"]["eot"] < vocab_size <= 2**32:
            raise ValueError(f"expected eot < vocab_size <= 2**32, found {manifest['tokenizer']}")
        for split in ("train", "val"):
            shards = manifest[split]["shards"]
            if sum(shard["tokens"] for shard in shards) != manifest[split]["tokens"]:
                raise ValueError(f"{split}: tokens are not the sum over the shards")
            if len({shard["name"] for shard in shards}) < len(shards):
                raise ValueError(f"{split}: a shard is listed twice")
            if (largest := max((s["max_token"] for s in shards), default=0)) >= vocab_size:
                raise ValueError(f"{split}: token id {largest} in a vocabulary of {vocab_size}")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}; {AGAIN}") from None
    return manifest


def digest(manifest: dict[str, Any]) -> str:
    """Hash a manifest without its own sha256, which older ones lack."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def too_few(**tokens: int) -> list[str]:
    """Return a warning for each split with too few tokens."""
    share = math.ceil(100 * FEW / max(sum(tokens.values()), 1)) / 100
    larger = f", or prepare it with --val {share:g}" if share <= 0.2 else ""
    problem = f"tokens are too few, expected at least {FEW:,}: add text"
    few = (name for name, count in tokens.items() if count < FEW)
    return [f"{name}: {tokens[name]:,} {problem}{larger * (name == 'val')}" for name in few]


MOST = {int: 2**62, float: 1e9}  # numbers are below; 1e9 seconds are 32 years


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Raise ValueError unless `value` has the keys and types of `shape`. Numbers are from 0 to
    MOST; a float may be written as an int."""
    if isinstance(shape, dict) and isinstance(value, dict):
        for key, part in shape.items():
            check_shape(value.get(key), part, f"{where}.{key}")
    elif isinstance(shape, list) and isinstance(value, list):
        for i, part in enumerate(value):
            check_shape(part, shape[0], f"{where}[{i}]")
    elif type(value) not in ((float, int) if shape is float else (shape,)) or (
        shape in (int, float) and not 0 <= value < MOST[shape]
    ):
        kind = shape.__name__ if isinstance(shape, type) else type(shape).__name__
        kind += f" from 0 to {MOST[shape]:.3g}" if shape in (int, float) else ""
        raise ValueError(f"{where}: expected {kind}, found {str(value)[:80]!r}")


def _state(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and modification time in ns; zeros if it is missing."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
