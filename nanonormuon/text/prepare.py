"""Documents in, verified token shards out.

    documents -> split by content hash -> token ids, in batches -> shards, read back -> manifest

The text is read three times (survey, training the tokenizer, encoding) and never held as a whole:
memory is for some documents, some batches and eight bytes per document.

Everything is written into OUT/.partial; `plan.json` there says what is being made and which shards
are finished, and the same command goes on behind them. Then all is moved into place,
`manifest.json` last.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from nanonormuon.errors import DataError, TokenizerError
from nanonormuon.storage import shards
from nanonormuon.storage.files import replace_file, sync_directory
from nanonormuon.storage.shards import MANIFEST, PARTIAL
from nanonormuon.text import sources
from nanonormuon.text.encode import Plan, encode
from nanonormuon.text.progress import Progress
from nanonormuon.text.sources import Document
from nanonormuon.text.tokenizer import CONFIG, FILE, Tokenizer, load, pieces, trained_size
from nanonormuon.text.tokenizer import get as get_tokenizer

log = logging.getLogger(__name__)

PLAN = "plan.json"
SHARD_BYTES = 256 << 20  # of text; a shard ends with the document that reaches it
SAMPLE_BYTES = 64 << 20  # what BPE is trained on at most, spread evenly over the training text


def prepare(
    texts: list[str | Path],
    out: str | Path,
    tokenizer: str | Path = "bpe:4096",
    val: float = 0.02,
    *,
    text_field: str = "text",
    separator: str = "",
    workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Tokenise the documents of `texts` (see sources.documents; "-" is standard input, of which a
    copy is kept in `out` meanwhile) into the data directory `out`.

    A document belongs to validation if the sha256 of its content, read as a number in [0, 1), is
    below `val`: it stays on its side when other files come or go, and so do its copies. If that
    leaves a split empty, validation is the tail of the longest document. `workers` is the number of
    threads that encode (tiktoken lets go of Python's lock), 0 one per core. Returns the manifest.
    If `out` holds this very preparation already, it is verified and kept.
    Raises DataError, TokenizerError, OSError.
    """
    out, names = Path(out), [_name(text) for text in texts]
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(_spool(out)) if str(t) == "-" else t for t in texts]

        def read(report: Callable[[int], None] | None = None) -> Iterator[Document]:
            return sources.documents(opened, out, text_field, separator.encode(), report)

        def total() -> int:
            return sources.total_bytes(opened, out)

        return prepare_documents(read, names, out, tokenizer, val, workers, shard_bytes, total)


def prepare_documents(
    read: Callable[..., Iterable[Document]],
    names: list[str],
    out: Path,
    spec: str | Path,
    val: float,
    workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
    total: Callable[[], int] | None = None,
) -> dict[str, Any]:
    """`prepare` for any documents that can be read repeatedly: each `read()` begins anew. With
    `total`, the bytes that `read(report)` will report."""
    if not 0 < val < 1 or shard_bytes < 1 or workers < 0:
        raise DataError(
            "prepare: 0 < val < 1 <= shard_bytes, workers >= 0 expected,"
            f" {val}, {shard_bytes}, {workers} found"
        )
    # errors of the tokenizer come before any work
    vocabulary = None if trained_size(spec) else get_tokenizer(spec)
    survey = _surveyed(read, names, val, total)
    asked = {
        "request": {
            "tokenizer": str(spec) if vocabulary is None else vocabulary.hash,
            "val": val,
            "shard_bytes": shard_bytes,
        },
        "sources": survey.sources(),
    }
    with _alone(out):
        if (out / MANIFEST).exists():
            return _reuse(out, asked)
        partial, plan = _begin(out, asked)
        try:
            survey.say()
            if vocabulary is None:
                vocabulary = _trained(str(spec), survey, read, partial, plan)
            split, size = survey.split(read()), sum(survey.sizes)
            splits = encode(split, size, vocabulary, partial, plan, shard_bytes, workers)
            vocabulary.save(partial)
        except (DataError, TokenizerError):
            shutil.rmtree(partial, ignore_errors=True)
            raise
        except BaseException:
            log.warning("prepare: stopped; the same command goes on from what is in %s", partial)
            raise
        manifest = {
            "format": shards.FORMAT,
            "tool": f"nanonormuon {_version()}",
            "tokenizer": {
                key: getattr(vocabulary, key) for key in ("name", "hash", "vocab_size", "eot")
            },
            "method": "tail of the longest document" if survey.tail else "hash of each document",
            "copies": survey.copies,
            **splits,
            **asked,
        }
        _publish(partial, out, manifest)
    for name, split in splits.items():
        counts = (split[key] for key in ("documents", "tokens", "bytes"))
        log.info("prepare: %s documents=%d tokens=%d bytes=%d", name, *counts)
    return manifest


# ------------------------------------------------------------------------------------- the survey


class Survey:
    """One pass over the documents: what there is, and from that, what goes where."""

    def __init__(self, names: list[str], val: float) -> None:
        self.names, self.val = names, val
        self.documents, self.sizes = [0] * len(names), [0] * len(names)
        self._hashes = [hashlib.sha256() for _ in names]
        self.bytes = {"train": 0, "val": 0}
        self.longest, self.longest_bytes, self._longest_digest = "", 0, b""
        self._digests = array("Q")  # the first eight bytes of each document's sha256

    def add(self, document: Document) -> bytes:
        """Count a document; returns the sha256 of its content."""
        digest, size = hashlib.sha256(document.data).digest(), len(document.data)
        self.documents[document.source] += 1
        self.sizes[document.source] += size
        self._hashes[document.source].update(digest)
        self._digests.frombytes(digest[:8])
        self.bytes[self._side(digest)] += size
        if size > self.longest_bytes:
            self.longest, self.longest_bytes, self._longest_digest = document.name, size, digest
        return digest

    @property
    def tail(self) -> bool:
        """Whether hashes leave a split empty, so that validation is the longest document's tail."""
        return not all(self.bytes.values())

    @property
    def copies(self) -> int:
        """How many documents are exact copies of an earlier one."""
        return len(self._digests) - len(np.unique(np.frombuffer(self._digests, np.uint64)))

    def say(self) -> None:
        """Log what a user should know about the split."""
        if copies := self.copies:
            log.info(
                "prepare: %d of %d documents are exact copies of another; all copies of a document"
                " are on the same side of the split", copies, sum(self.documents),
            )  # fmt: skip
        if self.tail:
            share, name = self.val, self.longest
            log.info("prepare: val is the last %g of the longest document, %s", share, name)
            itself = np.frombuffer(self._longest_digest[:8], np.uint64)
            if (np.frombuffer(self._digests, np.uint64) == itself).sum() > 1:
                log.warning("prepare: train has copies of %s, and so all of val", name)

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


def _surveyed(
    read: Callable[..., Iterable[Document]],
    names: list[str],
    val: float,
    total: Callable[[], int] | None,
) -> Survey:
    """The first reading of all documents. DataError if there is no text in them."""
    survey = Survey(names, val)
    with Progress("reading", total() if total else 0) as progress:
        for document in read(progress) if total else read():
            survey.add(document)
    if not survey.longest_bytes:
        raise DataError(
            f"{', '.join(names) or 'prepare'}: no text found; name files that have some"
        )
    return survey


def _trained(
    spec: str, survey: Survey, read: Callable[..., Iterable[Document]], partial: Path, plan: Plan
) -> Tokenizer:
    """The tokenizer trained on this text: an interrupted run's, if that came so far."""
    with contextlib.suppress(TokenizerError):
        if (there := load(partial)).hash == plan.tokenizer:
            return there
    log.info("prepare: training %s", spec)
    training = (part for split, part in survey.split(read()) if split == "train")
    vocabulary = get_tokenizer(spec, _sample(training, sum(survey.sizes)))
    vocabulary.save(partial)
    return vocabulary


def _sample(texts: Iterable[bytes], total: int) -> Iterator[str | bytes]:
    """Evenly spread pieces of the texts (`total` bytes), about SAMPLE_BYTES or all there are."""
    seen = taken = 0
    for text in texts:
        for piece in pieces(text):
            if taken * total <= seen * SAMPLE_BYTES:
                yield piece
                taken += len(piece)
            seen += len(piece)


# ---------------------------------------------------------------------------- the output directory


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Make `out` and be the only one to prepare in it; the lock dies with the process."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{out}: another process is preparing here; wait, or choose another --out"
            ) from None
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _spool(out: Path) -> Iterator[Any]:
    """Standard input as a file that can be read again: without a name, so it ends with us."""
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out) as file:
        log.info("prepare: reading standard input; a copy is kept in %s meanwhile", out)
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        file.flush()
        try:
            yield file
        finally:
            if new:
                with contextlib.suppress(OSError):
                    out.rmdir()  # if nothing came of it


def _reuse(out: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a finished directory, if it is what is asked for and undamaged."""
    try:
        there = shards.read_manifest(out)
        if other := [key for key in asked if there.get(key) != asked[key]]:
            raise DataError(f"it was prepared with another {', '.join(other)}")
        manifest = shards.open_data(out, verify="full").manifest
    except DataError as error:
        raise DataError(
            f"{out}: already holds prepared data; remove it or choose another --out: {error}"
        ) from None
    assert manifest is not None
    shutil.rmtree(out / PARTIAL, ignore_errors=True)  # left, if the last run stopped at the end
    log.info("prepare: %s is prepared already, verified", out)
    return manifest


def _begin(out: Path, asked: dict[str, Any]) -> tuple[Path, Plan]:
    """Make OUT/.partial, or take up the one that an interrupted run of the same preparation left.
    What another one left goes, and nothing else."""
    partial = out / PARTIAL
    if (partial / MANIFEST).exists():  # stopped while moving files: the listed ones are ours
        for name in _products(shards.read_manifest(partial)):
            if (out / name).exists():
                (out / name).replace(partial / name)
        (partial / MANIFEST).unlink()
    plan = Plan(partial / PLAN, {"tool": _version(), **asked})
    if partial.exists() and not plan.there():
        log.info("prepare: removing what another run left in %s", partial)
        shutil.rmtree(partial)
        plan = Plan(partial / PLAN, {"tool": _version(), **asked})
    for pattern in ("*train_*.bin", "*val_*.bin", FILE, CONFIG):
        if foreign := sorted(out.glob(pattern)):
            raise DataError(f"{foreign[0]}: in the way, not of this preparation; use another --out")
    partial.mkdir(exist_ok=True)
    return partial, plan


def _publish(partial: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Move what the manifest lists from `partial` to `out`, itself last."""
    # it announces that files are being moved, so it is there whole or not at all
    replace_file(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    for name in _products(manifest):
        (partial / name).replace(out / name)
    sync_directory(out)
    (partial / MANIFEST).replace(out / MANIFEST)
    sync_directory(out)
    shutil.rmtree(partial)


def _products(manifest: dict[str, Any]) -> list[str]:
    listed = [shard["name"] for split in ("train", "val") for shard in manifest[split]["shards"]]
    return [*listed, FILE, CONFIG]


def _name(text: str | Path) -> str:
    return "standard input" if str(text) == "-" else Path(text).resolve().name


def _version() -> str:
    try:
        return version("nanonormuon")
    except PackageNotFoundError:
        return "(not installed)"
