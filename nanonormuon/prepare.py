"""Text files in, verified token shards out.

    documents -> split by content hash -> token ids in batches -> shards, read back -> manifest

The text is read three times (survey, training the tokenizer, encoding) and never held as a whole:
memory is for one document, one batch and some hashes. Everything is written into OUT/.partial and
then moved into place, `manifest.json` last; a directory without one is unfinished, and the next run
begins it anew.
"""

import difflib
import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nanonormuon import data
from nanonormuon.data import MANIFEST, PARTIAL, DataError
from nanonormuon.tokenizer import CONFIG, FILE, PATTERN, Tokenizer, TokenizerError, load, pieces
from nanonormuon.tokenizer import get as get_tokenizer

log = logging.getLogger(__name__)

# What a walk through a directory takes for text; a file that is named itself may end in anything.
TEXT = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".css", ".xml", ".toml", ".yaml"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts"),
    *(".sh", ".sql", ".lua", ".rb", ".jl", ".r", ".yml"),
)
SAMPLE_BYTES = 64 << 20  # what BPE is trained on at most, spread evenly over the training text
BATCH_BYTES = 8 << 20  # text encoded at a time
BAD_SHARE = 0.001  # a file in which more bytes than this are not UTF-8 is not taken for text


@dataclass(frozen=True)
class Document:
    """A text to be trained on; `source` counts the sources, `name` is for messages."""

    name: str
    source: int
    data: bytes


def prepare(
    sources: list[str | Path],
    out: str | Path,
    tokenizer: str | Path = "bpe:4096",
    val: float = 0.02,
    shard_tokens: int = 100_000_000,
) -> dict[str, Any]:
    """Tokenise files and directories (every file is a document) into the data directory `out`.

    A document belongs to validation if the sha256 of its content, read as a number in [0, 1), is
    below `val`: it stays on its side when other files come or go, and so do its copies. If that
    leaves a split empty, validation is the tail of the longest document. Returns the manifest. If
    `out` holds this very preparation already, it is verified and kept.
    Raises DataError, TokenizerError, OSError.
    """
    names = [Path(source).resolve().name for source in sources]
    out = Path(out)
    return _prepare(lambda: documents(sources, out), names, out, tokenizer, val, shard_tokens)


def documents(sources: list[str | Path], skip: Path | None = None) -> Iterator[Document]:
    """The documents of files and directories (walked in name order, without the directory `skip`).

    A file named itself must be text; a walk passes over hidden, binary and empty files.
    """
    for index, source in enumerate(map(Path, sources)):
        files = _walk(source, skip) if source.is_dir() else [source]
        if not source.exists():
            there = [p.name for p in source.parent.iterdir()] if source.parent.is_dir() else []
            near = difflib.get_close_matches(source.name, there, 1)
            hint = f"; did you mean {source.with_name(near[0])}?" if near else ""
            raise DataError(f"{source}: no such file or directory{hint}")
        skipped = 0
        for path in files:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from None
            if (bad := _not_text(content)) is None:
                name = source.name if path == source else path.relative_to(source).as_posix()
                yield Document(name, index, content)
            elif path == source:
                raise DataError(
                    f"{path}: offset {bad}: UTF-8 text expected, byte 0x{content[bad]:02x} found;"
                    " convert the file or leave it out"
                )
            else:
                skipped += 1
        if skipped:
            log.info("prepare: %s: skipped %d binary files", source, skipped)


def python_sources() -> Iterator[Document]:
    """The running interpreter's standard library: tens of MB of text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    outside = {"site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.parts):
        name = path.relative_to(root)
        if outside.isdisjoint(name.parts) and path.is_file() and (content := path.read_bytes()):
            try:
                content.decode()
            except UnicodeDecodeError:
                continue  # a few of CPython's tests are in other encodings on purpose
            yield Document(name.as_posix(), 0, content)


def builtin_python(tokenizer: str = "bpe:4096", val: float = 0.02) -> Path:
    """The demo's data directory: `python_sources`, prepared once into the user's cache.

    It is found by a hash of contents and settings, and verified in full each time it is used.
    Several processes may call this at once: each prepares a directory of its own, one is kept.
    """
    corpus = list(python_sources())
    key = hashlib.sha256(f"{data.FORMAT} {tokenizer} {PATTERN} {val}".encode())
    for document in corpus:
        key.update(hashlib.sha256(document.data).digest())
    target = cache_directory() / f"python-{key.hexdigest()[:12]}"

    def usable() -> bool:
        if target.exists():
            try:
                manifest = data.open_data(target, verify="full").manifest
                if manifest and load(target).hash == manifest["tokenizer"]["hash"]:
                    return True
                log.warning("prepare: rebuilding the demo's data: another tokenizer in %s", target)
            except (DataError, TokenizerError) as error:
                log.warning("prepare: rebuilding the demo's data: %s", error)
        return False

    if usable():
        log.info("prepare: using %s, verified", target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".python-", dir=target.parent) as scratch:
        new, names = Path(scratch, "new"), [f"Python {platform.python_version()} standard library"]
        _prepare(lambda: iter(corpus), names, new, tokenizer, val)
        try:
            new.rename(target)
        except OSError:  # it exists: another process was faster, or it is the damaged one
            if not usable():
                target.rename(Path(scratch, "damaged"))
                new.rename(target)
    return target


def cache_directory() -> Path:
    """Where demo data is kept: NANONORMUON_CACHE, or `nanonormuon` in the system's cache place."""
    if own := os.environ.get("NANONORMUON_CACHE"):
        return Path(own)
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local, "nanonormuon")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "nanonormuon"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nanonormuon")


# ------------------------------------------------------------------------------------------ stages


def _prepare(
    read: Callable[[], Iterable[Document]],
    names: list[str],
    out: Path,
    spec: str | Path,
    val: float,
    shard_tokens: int = 100_000_000,
) -> dict[str, Any]:
    """`prepare` for any documents that can be read repeatedly: each `read()` begins anew."""
    if not 0 < val < 1 or shard_tokens < 1:
        raise DataError(
            f"prepare: 0 < val < 1 <= shard_tokens expected, {val}, {shard_tokens} found"
        )
    size = str(spec).removeprefix("bpe:") if str(spec).startswith("bpe:") else ""
    trained = size.isdecimal() and int(size) >= 257
    vocabulary = None if trained else get_tokenizer(spec)  # its errors come before any work
    survey = Survey(names, val)
    for document in read():
        survey.add(document)
    if not survey.longest_bytes:
        raise DataError(
            f"{', '.join(names) or 'prepare'}: no text found; name files that have some"
        )
    asked = {
        "request": {
            "tokenizer": str(spec) if vocabulary is None else vocabulary.hash,
            "val": val,
            "shard_tokens": shard_tokens,
        },
        "sources": survey.sources(),
    }
    if (out / MANIFEST).exists():
        return _reuse(out, asked)
    partial = _begin(out)
    try:
        if survey.tail:
            log.info("prepare: val is the last %g of the longest document, %s", val, survey.longest)
        if vocabulary is None:
            training = (part for split, part in survey.split(read()) if split == "train")
            vocabulary = get_tokenizer(spec, _sample(training, sum(survey.sizes)))
        splits = _encode(survey, read(), vocabulary, partial, shard_tokens)
        vocabulary.save(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk gets its space back
        raise
    manifest = {
        "format": data.FORMAT,
        "tool": f"nanonormuon {_version()}",
        "tokenizer": {
            key: getattr(vocabulary, key) for key in ("name", "hash", "vocab_size", "eot")
        },
        "method": "tail of the longest document" if survey.tail else "hash of each document",
        **splits,
        **asked,
    }
    _publish(partial, out, manifest)
    for name, split in splits.items():
        counts = (split[key] for key in ("documents", "tokens", "bytes"))
        log.info("prepare: %s documents=%d tokens=%d bytes=%d", name, *counts)
    return manifest


class Survey:
    """One pass over the documents: what there is, and from that, what goes where."""

    def __init__(self, names: list[str], val: float) -> None:
        self.names, self.val = names, val
        self.documents, self.sizes = [0] * len(names), [0] * len(names)
        self._hashes = [hashlib.sha256() for _ in names]
        self.bytes = {"train": 0, "val": 0}
        self.longest, self.longest_bytes, self._longest_digest = "", 0, b""

    def add(self, document: Document) -> bytes:
        """Count a document; returns the sha256 of its content."""
        digest, size = hashlib.sha256(document.data).digest(), len(document.data)
        self.documents[document.source] += 1
        self.sizes[document.source] += size
        self._hashes[document.source].update(digest)
        self.bytes[self._side(digest)] += size
        if size > self.longest_bytes:
            self.longest, self.longest_bytes, self._longest_digest = document.name, size, digest
        return digest

    @property
    def tail(self) -> bool:
        """Whether hashes leave a split empty, so that validation is the longest document's tail."""
        return not all(self.bytes.values())

    def sources(self) -> list[dict[str, Any]]:
        """One entry per source; `sha256` is over the documents' sha256 (binary, in order)."""
        rows = zip(self.names, self.documents, self.sizes, self._hashes, strict=True)
        return [
            {"name": n, "documents": d, "bytes": b, "sha256": h.hexdigest()} for n, d, b, h in rows
        ]

    def split(self, documents: Iterable[Document]) -> Iterator[tuple[str, bytes]]:
        """Each document's split and text, in order; DataError if they are not the surveyed ones."""
        again, cut = Survey(self.names, self.val), not self.tail
        for document in documents:
            digest = again.add(document)
            if not self.tail:
                yield self._side(digest), document.data
            elif not cut and digest == self._longest_digest:
                cut = True
                text = document.data.decode("utf-8", "surrogateescape")
                at = max(1, int(len(text) * (1 - self.val)))  # in characters, as nanoGPT cuts
                if at >= len(text):
                    raise DataError(
                        f"{document.name}: {len(text)} characters cannot be split in two"
                    )
                yield "train", text[:at].encode("utf-8", "surrogateescape")
                yield "val", text[at:].encode("utf-8", "surrogateescape")
            else:
                yield "train", document.data
        if again.sources() != self.sources():
            raise DataError(f"{', '.join(self.names)}: changed during preparation; run it again")

    def _side(self, digest: bytes) -> str:
        return "val" if int.from_bytes(digest[:8], "big") < self.val * 2**64 else "train"


def _sample(texts: Iterable[bytes], total: int) -> Iterator[str | bytes]:
    """Evenly spread pieces of the texts (`total` bytes), about SAMPLE_BYTES or all there are."""
    seen = taken = 0
    for text in texts:
        for piece in pieces(text):
            if taken * total <= seen * SAMPLE_BYTES:
                yield piece
                taken += len(piece)
            seen += len(piece)


def _encode(
    survey: Survey,
    documents: Iterable[Document],
    vocabulary: Tokenizer,
    directory: Path,
    shard_tokens: int,
) -> dict[str, dict[str, Any]]:
    """Write the shards of both splits; returns their entries for the manifest."""
    writers = {s: Writer(directory, s, vocabulary.vocab_size, shard_tokens) for s in survey.bytes}
    eot = np.array([vocabulary.eot], np.uint32)
    queue: list[tuple[Writer, str | bytes | None]] = []  # None: a document begins

    def flush() -> None:
        ids = iter(vocabulary.encode_batch([piece for _, piece in queue if piece is not None]))
        for writer, piece in queue:
            writer.write(eot if piece is None else next(ids))
        queue.clear()

    waiting = 0
    with tqdm(total=sum(survey.sizes), unit="B", unit_scale=True, disable=None) as bar:
        for split, text in survey.split(documents):
            writer = writers[split]
            writer.documents += 1
            writer.bytes += len(text)
            queue.append((writer, None))
            for piece in pieces(text):
                queue.append((writer, piece))
                waiting += len(piece)
                if waiting >= BATCH_BYTES:
                    flush()
                    waiting = 0
            bar.update(len(text))
        flush()
    return {split: writer.finish() for split, writer in writers.items()}


class Writer:
    """Appends token ids to the shards of one split, each of at most `shard_tokens`.

    A shard is complete when its header is written, and is then read back and compared. Documents
    may cross from one shard into the next.
    """

    def __init__(self, directory: Path, split: str, vocab_size: int, shard_tokens: int) -> None:
        self.directory, self.split, self.vocab_size = directory, split, vocab_size
        self.shard_tokens, self.version = shard_tokens, 1 if vocab_size <= 65_536 else 2
        self.documents = self.bytes = 0
        self.shards: list[dict[str, Any]] = []
        self.room = 0  # tokens that the open shard still takes; 0 if none is open

    def write(self, ids: np.ndarray) -> None:
        """Append ids (n,)."""
        while len(ids):
            if not self.room:
                self.path = self.directory / f"{self.split}_{len(self.shards):06d}.bin"
                self.file, self.digest = self.path.open("wb"), hashlib.sha256()
                self.file.write(bytes(data.HEADER_BYTES))
                self.room = self.shard_tokens
            part, ids = ids[: self.room], ids[self.room :]
            content = part.astype(data.DTYPES[self.version]).tobytes()
            self.file.write(content)
            self.digest.update(content)
            self.room -= len(part)
            if not self.room:
                self._close(self.shard_tokens)

    def finish(self) -> dict[str, Any]:
        """Close the last shard; returns this split's entry for the manifest."""
        if self.room:
            self._close(self.shard_tokens - self.room)
        tokens = sum(shard["tokens"] for shard in self.shards)
        counts = {"documents": self.documents, "tokens": tokens, "bytes": self.bytes}
        return counts | {"shards": self.shards}

    def _close(self, tokens: int) -> None:
        with self.file as file:
            file.seek(0)
            file.write(data.header(self.version, tokens))
            file.flush()
            os.fsync(file.fileno())
        self.room = 0
        shard = data.read_shard(self.path)
        largest = data.check_ids(shard, self.vocab_size, self.path)
        if hashlib.sha256(shard.data).digest() != self.digest.digest():
            raise DataError(f"{self.path}: read back other bytes than were written; check the disk")
        entry = {"name": self.path.name, "tokens": tokens, "size": self.path.stat().st_size}
        self.shards.append(entry | {"sha256": data.sha256(self.path), "max_token": largest})


# ---------------------------------------------------------------------------- the output directory


def _reuse(out: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a finished directory, if it is what is asked for and undamaged."""
    try:
        there = data.read_manifest(out)
        if other := [key for key in asked if there.get(key) != asked[key]]:
            raise DataError(f"it was prepared with another {', '.join(other)}")
        manifest = data.open_data(out, verify="full").manifest
    except DataError as error:
        raise DataError(
            f"{out}: already holds prepared data; remove it or choose another --out: {error}"
        ) from None
    assert manifest is not None
    shutil.rmtree(out / PARTIAL, ignore_errors=True)  # empty, if the last run stopped at the end
    log.info("prepare: %s is prepared already, verified", out)
    return manifest


def _begin(out: Path) -> Path:
    """Make OUT/.partial, after removing what an interrupted run left and nothing else."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out / PARTIAL
    if (partial / MANIFEST).exists():  # stopped while moving files: the listed ones are ours
        manifest = data.read_manifest(partial)
        listed = [
            shard["name"] for split in ("train", "val") for shard in manifest[split]["shards"]
        ]
        for name in (*listed, FILE, CONFIG):
            (out / name).unlink(missing_ok=True)
    if partial.exists():
        log.info("prepare: removing what an interrupted run left in %s", partial)
        shutil.rmtree(partial)
    for pattern in ("*train_*.bin", "*val_*.bin", FILE, CONFIG):
        if foreign := sorted(out.glob(pattern)):
            raise DataError(f"{foreign[0]}: in the way, not of this preparation; use another --out")
    partial.mkdir()
    return partial


def _publish(partial: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Move everything from `partial` to `out`, the manifest last."""
    # it announces that files are being moved, so it is there whole or not at all
    with (partial / "manifest.tmp").open("w", encoding="utf-8", newline="\n") as file:
        json.dump(manifest, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    (partial / "manifest.tmp").replace(partial / MANIFEST)
    _sync_directory(partial)
    for path in sorted(partial.iterdir()):
        if path.name != MANIFEST:
            path.replace(out / path.name)
    _sync_directory(out)
    (partial / MANIFEST).replace(out / MANIFEST)
    partial.rmdir()
    _sync_directory(out)


def _sync_directory(path: Path) -> None:
    """Make renames in a directory last through a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _walk(root: Path, skip: Path | None) -> list[Path]:
    """Visible, non-empty text files below a directory, in name order on every system."""
    files = []
    for folder, below, names in os.walk(root):
        here = Path(folder)
        below[:] = [
            name
            for name in below
            if not name.startswith(".")
            and not (skip and skip.exists() and skip.samefile(here / name))
        ]
        for path in (here / name for name in names if not name.startswith(".")):
            if path.suffix.lower() in TEXT and path.is_file() and path.stat().st_size:
                files.append(path)
    return sorted(files, key=lambda path: path.parts)


def _not_text(content: bytes) -> int | None:
    """Offset of what shows that a file is no UTF-8 text: a NUL, or too many undecodable bytes."""
    if (nul := content.find(0)) >= 0:
        return nul
    try:
        content.decode()
    except UnicodeDecodeError as error:
        text = content.decode("utf-8", "surrogateescape")
        if sum("\ud800" <= c <= "\udfff" for c in text) > BAD_SHARE * len(content):
            return error.start
    return None


def _version() -> str:
    try:
        return version("nanonormuon")
    except PackageNotFoundError:
        return "(not installed)"
