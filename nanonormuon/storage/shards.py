"""Token shards on disk: the format, the manifest, and a directory that is opened only if all fits.

A shard is a 1,024-byte header (256 little-endian int32: 20240520, version, number of tokens, zeros)
and then the tokens, uint16 in version 1 and uint32 in version 2 (vocabularies over 65,536): the
format of llm.c and modded-nanogpt. A data directory holds `*train_*.bin`, `*val_*.bin` and, if
`normuon-train prepare` made it, a `manifest.json` that says what must be in them.
"""

import hashlib
import json
import math
import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanonormuon.errors import DataError
from nanonormuon.storage.files import in_shell, progress, replace_file

MAGIC, HEADER_BYTES = 20240520, 1024
DTYPES = {1: np.dtype("<u2"), 2: np.dtype("<u4")}  # by shard version
MANIFEST, FORMAT, PARTIAL = "manifest.json", 1, ".partial"
SHARD_SHAPE = {"name": str, "tokens": int, "size": int, "sha256": str, "max_token": int}
_SPLIT = {"documents": int, "tokens": int, "bytes": int, "shards": [SHARD_SHAPE]}
SOURCE_SHAPE = {"name": str, "documents": int, "bytes": int}  # older manifests have no sources
MANIFEST_SHAPE = {
    "format": int,
    "tokenizer": {"name": str, "hash": str, "vocab_size": int, "eot": int},
    "train": _SPLIT,
    "val": _SPLIT,
}
MANIFEST_LIMIT = 64 << 20  # bytes; a manifest of 100,000 shards has 20 MB
FULL_CHECK_LIMIT = 256 << 20  # bytes; hashing this much takes about 0.3 s, so it is always done
FEW = 10_000  # tokens: fewer are too few to learn or judge by
CHUNK = 1 << 22  # tokens looked at together when a whole shard is scanned


# ------------------------------------------------------------------------------------------ shards


def write_shard(path: str | Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Write token ids (n,) as one shard. The file appears under its name only when complete."""
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or not 0 < len(tokens) < 2**31 or tokens.dtype.kind not in "iu":
        raise DataError(f"{path}: a shard takes a vector of 1 to 2**31 - 1 integers")
    check_ids(tokens, vocab_size, path)
    version = 1 if vocab_size <= 65_536 else 2
    replace_file(path, header(version, len(tokens)) + tokens.astype(DTYPES[version]).tobytes())


def header(version: int, n_tokens: int) -> bytes:
    """The first 1,024 bytes of a shard."""
    fields = np.zeros(256, "<i4")
    fields[:3] = MAGIC, version, n_tokens
    return fields.tobytes()


def read_shard(path: str | Path, headerless: bool = False) -> np.memmap:
    """Map a shard read-only, after checking its size against its header; no token is read.
    `headerless`: a file that is nothing but uint16 tokens, as nanoGPT writes them."""
    path = Path(path)
    if not path.is_file():  # reading a pipe could wait for ever
        raise DataError(f"{path}: missing, or not a regular file; prepare the data again")
    found, first = path.stat().st_size, np.fromfile(path, "<i4", 3).tolist()
    if headerless:
        if found < 2 or found % 2:
            raise DataError(f"{path}: uint16 tokens expected, {found} bytes found; copy it again")
        if first[:1] == [MAGIC]:
            raise DataError(f"{path}: a shard with a header; leave data.format at shards")
        return np.memmap(path, DTYPES[1], "r")
    if found < HEADER_BYTES:
        raise DataError(f"{path}: {found} bytes, a shard's header alone has {HEADER_BYTES}")
    magic, version, n_tokens = first
    if magic != MAGIC:
        raise DataError(f"{path}: offset 0: {MAGIC} expected, {magic} found; this is no shard")
    if version not in DTYPES:
        raise DataError(f"{path}: offset 4: version 1 or 2 expected, {version} found")
    size = HEADER_BYTES + n_tokens * DTYPES[version].itemsize
    if n_tokens < 1 or found != size:
        raise DataError(
            f"{path}: offset 8: {n_tokens} tokens make a file of {size} bytes,"
            f" found {found}; copy or prepare it again"
        )
    return np.memmap(path, DTYPES[version], "r", HEADER_BYTES, (n_tokens,))


def check_ids(tokens: np.ndarray, vocab_size: int | None, path: Path, offset: int = 0) -> int:
    """The largest of the ids (n,), found in chunks; DataError if one is not in the vocabulary."""
    largest = 0
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        largest = max(largest, int(chunk.max()))
        if vocab_size is not None and (largest >= vocab_size or int(chunk.min()) < 0):
            i = int(np.flatnonzero((chunk >= vocab_size) | (chunk < 0))[0])
            raise DataError(
                f"{path}: token {offset + start + i}: id below {vocab_size} expected,"
                f" {int(chunk[i])} found; prepare the data with this model's tokenizer"
            )
    return largest


def sha256(path: str | Path) -> str:
    """Hash of a file's content, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------- directories


class File:
    """A shard's file as it was when it was opened. `listed`: its entry in the manifest, if there is
    one and the content is still to be compared with it."""

    turn = threading.Lock()  # one file is hashed at a time, beside the work of the run

    def __init__(self, path: Path, listed: dict[str, Any] | None = None) -> None:
        self.path, self.found, self.listed = path, _state(path), listed
        self._error: DataError | OSError | None = None
        self._thread: threading.Thread | None = None

    def compare(self, **found: Any) -> None:
        """Raise DataError unless what was found in the shard is what the manifest lists, if any."""
        if self.listed and self.path.is_symlink():
            raise DataError(f"{self.path}: a symbolic link, a file expected; copy it here")
        for key, value in found.items():
            if self.listed and value != self.listed[key]:
                raise DataError(
                    f"{self.path}: {key} {self.listed[key]} expected by {MANIFEST}, {value} found;"
                    " restore the file or prepare the data again"
                )

    def verify(self) -> None:
        """Hash the file, if it is listed and not verified yet. Raises DataError."""
        if self.listed:
            self.compare(sha256=sha256(self.path))
            self.listed = None

    def check(self) -> None:
        """Raise DataError if the file has changed, or was found not to be the listed one.
        The first call starts a thread that verifies it."""
        if (now := _state(self.path)) != self.found:
            raise DataError(
                f"{self.path}: changed while in use, (bytes, time in ns)"
                f" {self.found} expected, {now} found; restore it and resume"
            )
        if self._error:
            raise self._error
        if self.listed and self._thread is None:  # a daemon: a run that fails does not wait for it
            self._thread = threading.Thread(target=self._verify_in_turn, daemon=True)
            self._thread.start()

    def settle(self) -> None:
        """Wait for the verification of a file in use; DataError if its content is another."""
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
    """The shards of one split in name order. `bytes`: UTF-8 bytes of its text, where known."""

    paths: list[Path]
    shards: list[np.ndarray]
    vocab_size: int | None = None
    bytes: int | None = None
    files: list[File] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.files = self.files or [File(path) for path in self.paths]

    @property
    def names(self) -> list[str]:
        return [path.name for path in self.paths]

    @property
    def tokens(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def _of(self, parts: list[tuple[File, np.ndarray]]) -> "Split":
        """A split of shards, or parts of shards, over the same vocabulary."""
        files, shards = [file for file, _ in parts], [shard for _, shard in parts]
        return Split([file.path for file in files], shards, self.vocab_size, files=files)

    @classmethod
    def joined(cls, splits: list["Split"]) -> "Split":
        """The shards of several splits in one list."""
        if len(splits) == 1:
            return splits[0]
        return splits[-1]._of([part for s in splits for part in zip(s.files, s.shards)])

    def cut(self, tokens: int) -> tuple["Split", "Split"]:
        """The first `tokens` tokens, and the rest. A part's bytes of text are not known."""
        first, rest = [], []
        for file, shard in zip(self.files, self.shards):
            for half, part in ((first, shard[:tokens]), (rest, shard[tokens:])):
                if len(part):
                    half.append((file, part))
            tokens = max(0, tokens - len(shard))
        return self._of(first), self._of(rest)

    def count_bytes(self, token_lengths: np.ndarray | None, max_tokens: int = 0) -> int | None:
        """UTF-8 bytes of the text behind the targets, or the first `max_tokens` of them, from the
        length of each token; None where tokens have no length of their own."""
        if token_lengths is None:
            return None
        total, left = 0, max_tokens or self.tokens
        for path, shard in zip(self.paths, self.shards):
            for start in range(1, len(shard), CHUNK):  # a shard's first token is never a target
                part = shard[start : min(len(shard), start + CHUNK, start + left)]
                if not len(part):
                    return total
                if int(part.max()) >= len(token_lengths):
                    raise DataError(
                        f"{path.name}: id {int(part.max())} found, data.tokenizer has only "
                        f"{len(token_lengths)}: it is not what made these shards"
                    )
                total += int(token_lengths[part].sum())
                left -= len(part)
        return total

    def check(self, shard: int) -> None:
        """Call before reading a shard; costs a stat(). Raises DataError as File.check does."""
        self.files[shard].check()

    def settle(self) -> None:
        """Call before keeping anything computed from this split. Raises DataError if the content
        of a shard read so far is not what the manifest lists."""
        for file in self.files:
            file.settle()


@dataclass
class Data:
    """A data directory, opened and checked. `fingerprint` identifies the data: by content with a
    manifest, by names and sizes of files without one."""

    path: Path
    train: Split
    val: Split
    manifest: dict[str, Any] | None
    vocab_size: int | None
    fingerprint: str
    mix: list[tuple[Split, int]] = field(default_factory=list)  # see data.Batches

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise DataError if the manifest, where there is one, does not fit its tokenizer."""
        if not self.manifest:
            return
        keys = ("hash", "vocab_size", "eot")
        pairs = {key: (self.manifest["tokenizer"][key], getattr(tokenizer, key)) for key in keys}
        if "sha256" not in self.manifest:  # an older one, whose numbers only a count can check
            counted = self.val.count_bytes(tokenizer.token_lengths())
            pairs["val.bytes"] = self.val.bytes, self.val.bytes if counted is None else counted
        for key, (expected, found) in pairs.items():
            if found != expected:
                raise DataError(
                    f"{self.path}: {key} {expected} expected by {MANIFEST}, {found} found by the"
                    " tokenizer; prepare the data again"
                )


def open_data(
    path: str | Path,
    vocab_size: int | None = None,
    verify: str = "auto",
    headerless: bool = False,
) -> Data:
    """Open a data directory.

    With a manifest, the shards must be the listed ones with the listed sizes, and the vocabulary no
    larger than `vocab_size` (the model's, if given); without one (FineWeb as published) ids are
    compared with `vocab_size`, if that is given. Contents (sha256, or ids) are read whole if
    verify="full" or if all shards together have at most 256 MB; else a listed shard is hashed when
    it is first read (File), and the ids of every batch are compared in any case. `headerless`:
    nanoGPT's train.bin and val.bin, plain uint16; its meta.pkl is never read, because unpickling
    can run code. Raises DataError.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: {_absent(path)}")
    manifest = None
    if os.path.lexists(path / MANIFEST) and not headerless:
        manifest = read_manifest(path)
        made_for = manifest["tokenizer"]["vocab_size"]
        if vocab_size is not None and made_for > vocab_size:
            raise DataError(
                f"{path / MANIFEST}: prepared for {made_for} token ids, the model has {vocab_size};"
                " set model.vocab_size, or prepare the data with the model's tokenizer"
            )
        vocab_size = made_for
    elif (path / PARTIAL).exists():
        raise DataError(f"{path}: an unfinished preparation; run normuon-train prepare again")
    train, val = (
        _open_split(path, name, manifest and manifest[name], vocab_size, headerless)
        for name in ("train", "val")
    )
    shards, files = train.shards + val.shards, train.files + val.files
    if verify == "full" or sum(shard.nbytes for shard in shards) <= FULL_CHECK_LIMIT:
        for shard, file in zip(shards, progress("verifying", None, "file", iterable=files)):
            file.verify()
            if vocab_size is not None and not manifest:
                check_ids(shard, vocab_size, file.path)
    if manifest:  # what decides the tokens; not what the sources are called, nor the tool's version
        identity: Any = [manifest["tokenizer"]["hash"], manifest["train"], manifest["val"]]
    else:
        identity = [(file.path.name, file.found[0]) for file in files]
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Data(path, train, val, manifest, vocab_size, fingerprint)


def _absent(path: Path) -> str:
    """What is at a path that has no shards, and how to come by some."""
    if (path / "config.toml").is_file():
        return "this is a run; expected is the directory that normuon-train prepare wrote"
    if path.exists():
        out = in_shell(Path("data", path.resolve().stem))
        make = f"normuon-train prepare {in_shell(path)} --out {out}"
        return f"not prepared; run {make}, then set data.path={out}"
    make = f"normuon-train prepare FILE... --out {in_shell(path)}"
    return f"no such data directory; run {make} (a recipe's data: see normuon-train recipes NAME)"


def _open_split(
    path: Path, name: str, entry: dict[str, Any] | None, vocab_size: int | None, headerless: bool
) -> Split:
    """A split's files, which must be those of its entry in the manifest, if there is one, in number
    and size; their content is still to be compared."""
    pattern = f"{name}.bin" if headerless else f"*{name}_*.bin"
    paths = sorted(p for p in path.glob(pattern) if not p.name.startswith("."))
    listed = {shard["name"]: shard for shard in entry["shards"]} if entry else {}
    if entry and (wrong := sorted({p.name for p in paths} ^ listed.keys())):
        problem = "missing, but listed" if wrong[0] in listed else "here, but not listed"
        raise DataError(f"{path / wrong[0]}: {problem} in {MANIFEST}; prepare the data again")
    if not paths:
        hint = "prepare it again" if entry or any(path.glob("*_*.bin")) else _absent(path)
        if not headerless and (path / f"{name}.bin").exists():
            hint = "for nanoGPT's files set data.format=nanogpt"
        raise DataError(f"{path}: no {name} split, {pattern} expected; {hint}")
    files = [File(p, listed.get(p.name)) for p in paths]
    shards = [np.asarray(read_shard(p, headerless)) for p in paths]
    for file, shard in zip(files, shards):
        file.compare(tokens=len(shard), size=file.found[0])
        if entry and shard.dtype != DTYPES[1 if vocab_size <= 65_536 else 2]:
            raise DataError(
                f"{file.path}: {shard.dtype} tokens do not fit the {vocab_size} ids of {MANIFEST};"
                " prepare the data again"
            )
    return Split(paths, shards, vocab_size, entry and entry["bytes"], files)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Read manifest.json and check all that is relied on, before any shard is opened."""
    path = Path(directory, MANIFEST)
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MANIFEST_LIMIT:
            raise ValueError(f"a regular file of at most {MANIFEST_LIMIT} bytes expected")
        manifest = json.loads(path.read_bytes())
        check_shape(manifest, MANIFEST_SHAPE, "manifest")
        check_shape(manifest.get("sources", []), [SOURCE_SHAPE], "manifest.sources")
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {FORMAT} expected, {manifest['format']} found")
        if (expected := manifest.get("sha256", digest(manifest))) != digest(manifest):
            raise ValueError(f"sha256 {expected} expected, {digest(manifest)} found")
        vocab_size = manifest["tokenizer"]["vocab_size"]
        if not manifest["tokenizer"]["eot"] < vocab_size <= 2**32:
            raise ValueError(f"eot < vocab_size <= 2**32 expected, found {manifest['tokenizer']}")
        for split in ("train", "val"):
            shards = manifest[split]["shards"]
            names = [shard["name"] for shard in shards]
            for name in names:  # a plain file name: no directory, no "..", nothing hidden
                if not re.fullmatch(rf"(\w[\w.-]*)?{split}_[\w.-]*\.bin", name, re.ASCII):
                    raise ValueError(f"{split}: {name[:80]!r} is no shard's name")
            if names != sorted(set(names)):
                raise ValueError(f"{split}: shards are not in name order, each once")
            if sum(shard["tokens"] for shard in shards) != manifest[split]["tokens"]:
                raise ValueError(f"{split}: tokens are not the sum over the shards")
            if (largest := max((s["max_token"] for s in shards), default=0)) >= vocab_size:
                raise ValueError(f"{split}: token id {largest} in a vocabulary of {vocab_size}")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}; prepare the data again") from None
    return manifest


def digest(manifest: dict[str, Any]) -> str:
    """The sha256 of a manifest without its own, which older ones lack."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def too_few(**tokens: int) -> list[str]:
    """A line for each split, by its name, that has too few tokens to learn or judge by."""
    share = math.ceil(100 * FEW / max(sum(tokens.values()), 1)) / 100
    larger = f", or prepare it with --val {share:g}" if share <= 0.2 else ""
    return [
        f"{name}: {count:,} tokens are too few to learn or judge by; expected {FEW:,} or more: "
        + f"add text{larger if name == 'val' else ''}"
        for name, count in tokens.items()
        if count < FEW
    ]


def check_shape(value: Any, shape: Any, where: str) -> None:
    """ValueError unless `value` has the keys and types of `shape`; int means 0 <= x < 2**62."""
    if isinstance(shape, dict) and isinstance(value, dict):
        for key, part in shape.items():
            check_shape(value.get(key), part, f"{where}.{key}")
    elif isinstance(shape, list) and isinstance(value, list):
        for i, part in enumerate(value):
            check_shape(part, shape[0], f"{where}[{i}]")
    elif type(value) is not shape or (shape is int and not 0 <= value < 2**62):
        kind = shape.__name__ if isinstance(shape, type) else type(shape).__name__
        raise ValueError(f"{where}: {kind} expected, {str(value)[:80]!r} found")


def _state(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns; zeros for a file that cannot be found."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
