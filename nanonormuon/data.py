"""Token shards on disk, and every batch as a pure function of (seed, step).

A shard is a 1,024-byte header (256 little-endian int32: 20240520, version, number of tokens, zeros)
and then the tokens, uint16 in version 1 and uint32 in version 2 (vocabularies over 65,536): the
format of llm.c and modded-nanogpt. A data directory holds `*train_*.bin`, `*val_*.bin` and, if
`normuon-train prepare` made it, a `manifest.json` that says what must be in them.

The order of the data is arithmetic. Nothing about it is stored, so nothing can be lost or differ
after a resume, and no number of ranks or micro-batches changes it.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

MAGIC, HEADER_BYTES = 20240520, 1024
DTYPES = {1: np.dtype("<u2"), 2: np.dtype("<u4")}  # by shard version
MANIFEST, FORMAT, PARTIAL = "manifest.json", 1, ".partial"
_SHARD = {"name": str, "tokens": int, "size": int, "sha256": str, "max_token": int}
_SPLIT = {"documents": int, "tokens": int, "bytes": int, "shards": [_SHARD]}
MANIFEST_SHAPE = {
    "format": int,
    "tokenizer": {"name": str, "hash": str, "vocab_size": int, "eot": int},
    "train": _SPLIT,
    "val": _SPLIT,
}
MANIFEST_LIMIT = 64 << 20  # bytes; a manifest of 100,000 shards has 20 MB
FULL_CHECK_LIMIT = 256 << 20  # bytes; hashing this much takes about 0.3 s, so it is always done
CHUNK = 1 << 22  # tokens looked at together when a whole shard is scanned


class DataError(ValueError):
    """Training data that is missing, damaged, or does not fit the request."""

    exit_code = 3


# ------------------------------------------------------------------------------------------ shards


def write_shard(path: str | Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Write token ids (n,) as one shard. The file appears under its name only when complete."""
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or not 0 < len(tokens) < 2**31 or tokens.dtype.kind not in "iu":
        raise DataError(f"{path}: a shard takes a vector of 1 to 2**31 - 1 integers")
    check_ids(tokens, vocab_size, path)
    version = 1 if vocab_size <= 65_536 else 2
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(header(version, len(tokens)))
            file.write(tokens.astype(DTYPES[version]).data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def header(version: int, n_tokens: int) -> bytes:
    """The first 1,024 bytes of a shard."""
    fields = np.zeros(256, "<i4")
    fields[:3] = MAGIC, version, n_tokens
    return fields.tobytes()


def read_shard(path: str | Path) -> np.memmap:
    """Map a shard read-only, after checking its size against its header; no token is read."""
    path = Path(path)
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; prepare the data again") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: not a regular file")
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    if len(start) < HEADER_BYTES:
        raise DataError(f"{path}: {len(start)} bytes, a shard's header alone has {HEADER_BYTES}")
    magic, version, n_tokens = (int(x) for x in np.frombuffer(start, "<i4")[:3])
    if magic != MAGIC:
        raise DataError(
            f"{path}: offset 0: {MAGIC} expected, {magic} found; this is no token shard"
        )
    if version not in DTYPES:
        raise DataError(f"{path}: offset 4: version 1 or 2 expected, {version} found")
    size = HEADER_BYTES + n_tokens * DTYPES[version].itemsize
    if n_tokens < 1 or status.st_size != size:
        raise DataError(
            f"{path}: offset 8: {n_tokens} tokens make a file of {size} bytes,"
            f" found {status.st_size}; copy or prepare it again"
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
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- directories


@dataclass
class Split:
    """The shards of one split in name order. `bytes`: UTF-8 bytes of its text, where known."""

    paths: list[Path]
    shards: list[np.ndarray]
    vocab_size: int | None = None
    bytes: int | None = None
    _found: list[tuple[int, int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._found = [_state(path) for path in self.paths]

    @property
    def names(self) -> list[str]:
        return [path.name for path in self.paths]

    @property
    def tokens(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def check(self, shard: int) -> None:
        """DataError if a shard's file changed since it was opened; costs one stat()."""
        if (now := _state(self.paths[shard])) != self._found[shard]:
            raise DataError(
                f"{self.paths[shard]}: changed while in use, (bytes, time in ns)"
                f" {self._found[shard]} expected, {now} found; restore it and resume"
            )


@dataclass
class Data:
    """A data directory, opened and checked. `fingerprint` tells other data: by content with a
    manifest, by names and sizes without one."""

    path: Path
    train: Split
    val: Split
    manifest: dict[str, Any] | None
    vocab_size: int | None
    fingerprint: str


def open_data(path: str | Path, vocab_size: int | None = None, verify: str = "auto") -> Data:
    """Open a data directory.

    With a manifest, the shards must be the listed ones with the listed sizes, and the vocabulary no
    larger than `vocab_size` (the model's, if given); without one (FineWeb as published) ids are
    compared with `vocab_size`, if that is given. Contents (sha256, or ids) are read whole if
    verify="full" or if all shards together have at most 256 MB; the ids of every batch are compared
    in any case. Raises DataError.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(
            f"{path}: no such data directory; run normuon-train prepare FILE... --out {path}"
        )
    manifest = read_manifest(path) if os.path.lexists(path / MANIFEST) else None
    if not manifest and (path / PARTIAL).exists():
        raise DataError(f"{path}: an unfinished preparation; run normuon-train prepare again")
    if manifest:
        made_for = manifest["tokenizer"]["vocab_size"]
        if vocab_size is not None and made_for > vocab_size:
            raise DataError(
                f"{path / MANIFEST}: prepared for {made_for} token ids, the model has {vocab_size};"
                " set model.vocab_size, or prepare the data with the model's tokenizer"
            )
        vocab_size = made_for
    splits = {}
    for name in ("train", "val"):
        paths = sorted(p for p in path.glob(f"*{name}_*.bin") if not p.name.startswith("."))
        listed = {shard["name"]: shard for shard in manifest[name]["shards"]} if manifest else {}
        if manifest and (wrong := sorted({p.name for p in paths} ^ listed.keys())):
            problem = "missing, but listed" if wrong[0] in listed else "here, but not listed"
            raise DataError(f"{path / wrong[0]}: {problem} in {MANIFEST}; prepare the data again")
        if not paths:
            raise DataError(f"{path}: no {name} split, *{name}_*.bin expected; prepare it again")
        shards = [np.asarray(read_shard(p)) for p in paths]
        for p, shard in zip(paths, shards, strict=True):
            if manifest:
                _compare(p, {"tokens": len(shard), "size": p.stat().st_size}, listed[p.name])
        splits[name] = Split(
            paths, shards, vocab_size, manifest[name]["bytes"] if manifest else None
        )
    shard_bytes = sum(shard.nbytes for split in splits.values() for shard in split.shards)
    full = verify == "full" or shard_bytes <= FULL_CHECK_LIMIT
    for name, split in splits.items():
        for i, p in enumerate(split.paths):
            if manifest and full:
                _compare(p, {"sha256": sha256(p)}, manifest[name]["shards"][i])
            elif full and not manifest and vocab_size is not None:
                check_ids(split.shards[i], vocab_size, p)
    if manifest:  # what decides the tokens; not what the sources are called, nor the tool's version
        identity: Any = [manifest["tokenizer"]["hash"], manifest["train"], manifest["val"]]
    else:
        identity = [(p.name, p.stat().st_size) for s in splits.values() for p in s.paths]
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Data(path, splits["train"], splits["val"], manifest, vocab_size, fingerprint)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Read manifest.json and check all that is relied on, before any shard is opened."""
    path = Path(directory, MANIFEST)
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MANIFEST_LIMIT:
            raise ValueError(f"a regular file of at most {MANIFEST_LIMIT} bytes expected")
        manifest = json.loads(path.read_bytes())
        _check_shape(manifest, MANIFEST_SHAPE, "manifest")
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {FORMAT} expected, {manifest['format']} found")
        vocab_size = manifest["tokenizer"]["vocab_size"]
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


def _check_shape(value: Any, shape: Any, where: str) -> None:
    """ValueError unless `value` has the keys and types of `shape`; int means 0 <= x < 2**62."""
    if isinstance(shape, dict) and isinstance(value, dict):
        for key, part in shape.items():
            _check_shape(value.get(key), part, f"{where}.{key}")
    elif isinstance(shape, list) and isinstance(value, list):
        for i, part in enumerate(value):
            _check_shape(part, shape[0], f"{where}[{i}]")
    elif type(value) is not shape or (shape is int and not 0 <= value < 2**62):
        kind = shape.__name__ if isinstance(shape, type) else type(shape).__name__
        raise ValueError(f"{where}: {kind} expected, {str(value)[:80]!r} found")


def _compare(path: Path, found: dict[str, Any], listed: dict[str, Any]) -> None:
    """DataError unless what was found in a shard is what the manifest lists."""
    if path.is_symlink():
        raise DataError(f"{path}: a symbolic link, a file of this directory expected; copy it here")
    for key, value in found.items():
        if value != listed[key]:
            raise DataError(
                f"{path}: {key} {listed[key]} expected by {MANIFEST}, {value} found;"
                " restore the file or prepare the data again"
            )


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


# ------------------------------------------------------------------------------ the training order


class Batches:
    """The training stream: which `seq_len` + 1 tokens sequence j of step s consists of.

    `sequences` is the number of sequences of one optimizer step over all ranks and micro-batches;
    a rank's micro-batch is `batch(step, start, stop)`, a slice of that one global list.

    order="shuffled": window w of a shard is tokens[w*T : w*T + T + 1], windows are numbered over
    all shards, and each epoch visits all of them once, in an order that `seed` and the number of
    the epoch decide. order="sequential": every batch is the next sequences*T tokens of a shard, as
    modded-nanogpt's benchmark reads; a shard ends when position + batch + 1 reaches its length.
    """

    def __init__(
        self, split: Split, seq_len: int, sequences: int, seed: int = 0, order: str = "shuffled"
    ) -> None:
        if seq_len < 1 or sequences < 1 or order not in ("shuffled", "sequential"):
            raise DataError(f"batches: seq_len={seq_len} sequences={sequences} order={order!r}")
        self.split, self.seq_len, self.sequences = split, seq_len, sequences
        self.seed, self.order = seed, order
        batch_tokens = seq_len * sequences
        lengths = [len(shard) for shard in split.shards]
        if order == "shuffled":
            counts, need = [(n - 1) // seq_len for n in lengths], seq_len + 1
        else:
            counts, need = (
                [max(n - 2, 0) // batch_tokens * sequences for n in lengths],
                batch_tokens + 2,
            )
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.windows_per_epoch = int(self._starts[-1])
        if not self.windows_per_epoch:
            raise DataError(
                f"{split.paths[0].parent}: order={order} with seq_len {seq_len} needs a shard"
                f" of {need} tokens, the longest has {max(lengths)}; add text or lower seq_len"
            )

    def epoch(self, step: int) -> float:
        """Epochs consumed before `step`."""
        return step * self.sequences / self.windows_per_epoch

    def windows(self, step: int) -> np.ndarray:
        """(sequences, 2) int64: shard index and offset of each sequence of a step."""
        k = step * self.sequences + np.arange(self.sequences, dtype=np.int64)
        epoch, window = np.divmod(k, self.windows_per_epoch)
        if self.order == "shuffled":
            window = permute(window, self.windows_per_epoch, self.seed, epoch)
        shard = np.searchsorted(self._starts, window, side="right") - 1
        return np.stack([shard, (window - self._starts[shard]) * self.seq_len], axis=1)

    def batch(self, step: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets, each (stop - start, seq_len) int64, of sequences start..stop-1."""
        return _gather(self.split, self.windows(step)[start:stop], self.seq_len)


def permute(x: np.ndarray, n: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Image of x (in range(n)) under the permutation that (seed, epoch) names.

    A Feistel network of eight rounds permutes the smallest range(4**h) that holds range(n); what
    falls outside range(n) goes through it again, at most three more times on average. So a shuffle
    of any size needs no memory, and uint64 arithmetic makes it the same on every machine.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    first = _mix(epoch.astype(np.uint64) + _mix(np.array([seed % 2**64], np.uint64)))
    keys = [_mix(first + np.uint64(i)) for i in range(8)]
    out, todo = x.astype(np.uint64), np.arange(len(x))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key[todo]) & mask)
        out[todo] = left << half | right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 generator's output for state x: every input bit changes half of the output."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _gather(split: Split, windows: np.ndarray, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read windows (rows, 2). Past a shard's end, and for shard -1, token 0 and target -1."""
    tokens = np.zeros((len(windows), seq_len), np.int64)
    targets = np.full_like(tokens, -1)
    for shard in set(windows[:, 0].tolist()) - {-1}:
        split.check(shard)
    for row, (shard, offset) in enumerate(windows.tolist()):
        if shard >= 0:
            window = split.shards[shard][offset : offset + seq_len + 1]
            tokens[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
    if split.vocab_size is not None and max(tokens.max(), targets.max()) >= split.vocab_size:
        for shard, offset in windows[windows[:, 0] >= 0].tolist():
            window = split.shards[shard][offset : offset + seq_len + 1]
            check_ids(window, split.vocab_size, split.paths[shard], offset)
    return torch.from_numpy(tokens), torch.from_numpy(targets)


# -------------------------------------------------------------------------------------- validation


def validation_targets(split: Split, max_tokens: int = 0) -> int:
    """How many tokens `validation_batches` predicts: all but each shard's first, or max_tokens."""
    total = split.tokens - len(split.shards)
    return min(total, max_tokens) if max_tokens else total


def validation_batches(
    split: Split, seq_len: int, batch: int, rank: int = 0, world: int = 1, max_tokens: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's share of the validation split: (batch, seq_len) int64 tokens and targets.

    Over all ranks every target of the split (or its first `max_tokens`) comes exactly once. What
    pads the last window of a shard, and the rows that give every rank equally many batches of one
    shape, has target -1, which the loss ignores.
    """
    left = validation_targets(split, max_tokens)
    if left < 1:
        raise DataError(f"{split.paths[0].parent}: the validation split has no token to predict")
    rows = []  # shard, offset, targets that count
    for index, shard in enumerate(split.shards):
        for offset in range(0, min(len(shard) - 1, left), seq_len):
            rows.append((index, offset, min(seq_len, left - offset)))
        left -= min(len(shard) - 1, left)
    rows += [(-1, 0, 0)] * (-len(rows) % (batch * world))
    for start in range(rank * batch, len(rows), batch * world):
        part = np.array(rows[start : start + batch], np.int64)
        tokens, targets = _gather(split, part[:, :2], seq_len)
        targets[torch.arange(seq_len) >= torch.from_numpy(part[:, 2:])] = -1
        yield tokens, targets
