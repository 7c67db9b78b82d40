"""Turns documents into verified token shards.

    documents -> split by content -> token ids, in batches -> shards, read back -> manifest

The text is read three times (survey, training the tokenizer, encoding). Memory holds a few
documents and batches, and some eighty bytes per document.

Everything is written into OUT/.partial, where `plan.json` records the request and finished shards,
so that repeating the command continues after an interruption. Then files are moved into OUT,
`manifest.json` last. (OUT cannot appear by renaming, as it may contain hidden files.)
"""

import contextlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from hashlib import sha256
from itertools import count, zip_longest
from math import ceil
from pathlib import Path
from typing import IO, Any

import numpy as np

from nanonormuon import __version__
from nanonormuon.errors import DataError, TokenizerError
from nanonormuon.storage import shards
from nanonormuon.storage.files import locked, progress, replace_file, sync_directory
from nanonormuon.storage.shards import MANIFEST, PARTIAL
from nanonormuon.text import formats
from nanonormuon.text.bpe import Tokenizer, pieces
from nanonormuon.text.encode import Plan, encode
from nanonormuon.text.sources import Document, documents
from nanonormuon.text.tokenizer import get as get_tokenizer
from nanonormuon.text.tokenizer import load, trained_size

log = logging.getLogger(__name__)

SHARD_BYTES = 256 << 20  # of text; a shard ends with the document that reaches this size
TAIL_BYTES = 256  # minimum of a document's tail that becomes validation
SPLITS, CUT = ("train", "val"), 2  # a document's side: an index of SPLITS, or CUT
SPLIT = 2  # version of Survey's rule; shards of other versions are not reused
Read = Callable[[], Iterable[Document]]  # yields all documents anew at each call
PRODUCT = re.compile(r"tokenizer(_config)?\.json|(train|val)_\d+\.bin")
OURS = re.compile(rf"{PRODUCT.pattern}|(plan|manifest)\.json|\..*\.tmp")
SAMPLE_BYTES = 64 << 20  # maximum text for training BPE, evenly spread over the training split


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
    skip_bad: bool = False,
    max_record: int = formats.RECORD_LIMIT,
) -> dict[str, Any]:
    """Tokenise the documents of `texts` (see sources.documents; "-" is standard input, copied to a
    temporary file) into the data directory `out`, and return its manifest.

    val: share of each source's bytes for validation (see Survey). workers: encoding threads; 0: one
    per core. If `out` already contains this preparation, it is verified and kept; a directory with
    other visible files is refused. Raises DataError, TokenizerError, OSError.
    """
    if "" in (out, tokenizer):  # Path("") is the working directory
        raise DataError("prepare: expected a name for --out and --tokenizer, found ''")
    out, readings = Path(out), count()
    names = ["standard input" if str(t) == "-" else Path(os.path.realpath(t)).name for t in texts]
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(_spool(out)) if str(t) == "-" else t for t in texts]

        def read() -> Iterator[Document]:
            first = next(readings) == 0  # which is logged
            options = text_field, separator.encode(), first, skip_bad, max_record
            return documents(opened, out, *options)

        return prepare_documents(read, names, out, tokenizer, val, workers, shard_bytes)


def prepare_documents(
    read: Read,
    names: list[str],
    out: Path,
    spec: str | Path,
    val: float,
    workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
    whole: bool = False,
) -> dict[str, Any]:
    """Prepare the documents of `read`. whole: see Survey."""
    if not 0 < val < 1:
        raise DataError(f"prepare: --val {val:g}: expected a share between 0 and 1, as 0.02")
    # fail early if the tokenizer is wrong
    vocabulary = None if trained_size(spec) else get_tokenizer(spec)
    refuse_foreign(out)
    survey = Survey(read, names, val, whole)
    request = {"tokenizer": vocabulary.hash if vocabulary else str(spec), "val": val}
    asked = {"request": request | {"shard_bytes": shard_bytes}, "sources": survey.sources}
    with alone(out):
        refuse_foreign(out)
        if (out / PARTIAL / MANIFEST).exists():  # a run stopped while it moved files
            _publish(out)
        if (out / MANIFEST).exists():
            manifest = _reuse(out, asked)
        else:
            with _working(out / PARTIAL, asked) as plan:
                for note in survey.notes:
                    log.info("prepare: %s", note)
                vocabulary = vocabulary or _trained(str(spec), survey, plan)
                vocabulary.save(plan.directory)
                text, size = survey.split(), survey.bytes
                splits = encode(text, size, vocabulary, plan, shard_bytes, workers)
                words = {k: getattr(vocabulary, k) for k in ("name", "hash", "vocab_size", "eot")}
                manifest = {
                    "format": shards.FORMAT,
                    "tool": f"nanonormuon {__version__}",
                    "tokenizer": words,
                    "method": survey.method,
                    "copies": survey.copies,
                    **splits,
                    **asked,
                }
                manifest["sha256"] = shards.digest(manifest)
                # appears atomically, as it marks that files are being moved
                replace_file(plan.directory / MANIFEST, json.dumps(manifest, indent=1).encode())
                _publish(out)
    for problem in shards.too_few(**{name: manifest[name]["tokens"] for name in SPLITS}):
        log.warning("prepare: %s", problem)
    return manifest


@contextlib.contextmanager
def _working(partial: Path, asked: dict[str, Any]) -> Iterator[Plan]:
    """Begin or continue the work in a directory. On an error, keep finished shards."""
    plan = Plan(partial, {"tool": __version__, "split": SPLIT, **asked})
    try:
        yield plan
    except BaseException as error:
        if isinstance(error, DataError) and not plan.shards:
            shutil.rmtree(partial, ignore_errors=True)
        if partial.is_dir():
            log.warning("prepare: stopped; repeat the command to continue from %s", partial)
        raise


# ------------------------------------------------------------------------------------- the survey


class Survey:
    """Counts the documents and assigns each to a split. Raises DataError if there is no text.

    A document belongs to validation if the sha256 of its content, read as a number in [0, 1), is
    below `val`, so it keeps its split when other files come or go. With few large documents, shares
    would be random. So, unless `whole`, in each source

    * a document with more than twice validation's share of the bytes is cut, and its tail, a share
      `val` of its characters, becomes validation;
    * if validation still has less than half or more than twice its share, documents whose hashes
      are nearest to the boundary change sides.

    Exact copies, in whatever source, are treated alike. If a split is left empty, the longest
    document is cut. So a corpus of one document, such as Shakespeare, is cut as by nanoGPT, and one
    of many small documents is split by hash alone.
    """

    def __init__(self, read: Read, names: list[str], val: float, whole: bool = False) -> None:
        self.read, self.val = read, val
        # of each document: first eight bytes of its sha256, bytes, source
        numbers, sizes, of = array("Q"), array("Q"), array("I")
        self.sources: list[dict] = [{"name": n, "documents": 0, "bytes": 0} for n in names]
        longest: dict[int, tuple[int, int, str]] = {}  # by source: bytes, number, name
        hashes = [sha256() for _ in names]  # over the documents' sha256 (binary, in order)
        with progress("reading", None, "B") as bar:
            for document in read():
                digest, size = sha256(document.data).digest(), len(document.data)
                number, index = int.from_bytes(digest[:8], "big"), document.source
                self.sources[index]["documents"] += 1
                self.sources[index]["bytes"] += size
                hashes[index].update(digest)
                if size > longest.get(index, (0,))[0]:
                    longest[index] = size, number, document.name
                numbers.append(number)
                sizes.append(size)
                of.append(index)
                bar.update(size)
        if not longest:
            where = ", ".join(names) or "prepare"
            raise DataError(f"{where}: no text found; name files with text")
        for source, digests in zip(self.sources, hashes):
            source["sha256"] = digests.hexdigest()
        self.bytes = sum(source["bytes"] for source in self.sources)
        self.numbers = np.asarray(numbers)
        self._assign(np.asarray(sizes), np.asarray(of), longest, whole)

    def _assign(
        self, sizes: np.ndarray, of: np.ndarray, longest: dict[int, tuple], whole: bool
    ) -> None:
        """Decide by the documents' numbers, so that copies are treated alike."""
        numbers, which = np.unique(self.numbers, return_inverse=True)
        cut, held_out = np.zeros(len(numbers), bool), numbers < ceil(self.val * 2**64)
        by_hash = held_out.copy()
        balanced = longest if not whole and len(sizes) > 1 else ()
        for index in balanced:
            place, size = which[of == index], sizes[of == index]
            cut[place[(size > 2 * self.val * size.sum()) & (self.val * size >= TAIL_BYTES)]] = True
        for index in balanced:  # a copy may be cut because of another source
            self._balance(held_out, cut, which[of == index], sizes[of == index])
        moved = np.count_nonzero(held_out != by_hash)
        self.method = "hash of each document"
        if cut.any() or moved:
            self.method += f", {np.count_nonzero(cut)} cut, {moved} moved"
        if not cut.any() and held_out.all() == held_out.any():
            self.method = "tail of the longest document"
            cut[numbers == max(longest.values(), key=lambda found: found[0])[1]] = True
        self.sides = np.where(cut, CUT, held_out).astype(np.uint8)[which]
        self.copies = len(sizes) - len(numbers)
        self.notes: list[str] = []  # for the log
        if self.copies:
            self.notes.append(f"{self.copies} of {len(sizes)} documents are exact copies of others")
        if names := [name for _, number, name in longest.values() if number in numbers[cut]][:3]:
            tails = ", ".join(names) + ", ..." * bool((self.sides == CUT).sum() > len(names))
            self.notes.append(f"held out for validation: the last {100 * self.val:g} % of {tails}")

    def _balance(
        self, held_out: np.ndarray, cut: np.ndarray, place: np.ndarray, size: np.ndarray
    ) -> None:
        """Move uncut documents until validation has half to twice its share of a source."""
        # each document once, in order of its number, with the bytes of all its copies
        place, which = np.unique(place, return_inverse=True)
        total, whole, inside = np.bincount(which, size), ~cut[place], held_out[place]
        share = self.val * total.sum()
        found = self.val * total[~whole].sum() + total[whole & inside].sum()
        for i in np.flatnonzero(whole & ~inside & (total <= 2 * share)):
            if found >= share / 2:
                break
            held_out[place[i]] = True
            found += total[i]
        for i in np.flatnonzero(whole & inside)[::-1]:
            if found > 2 * share and found - total[i] >= share / 2:
                held_out[place[i]] = False
                found -= total[i]

    def split(self) -> Iterator[tuple[str, Document]]:
        """Read anew: yield each document with its split. Raises DataError for other documents."""
        for document, number, side in zip_longest(self.read(), self.numbers, self.sides):
            # document or number is None if the other reading has more documents
            found = document and int.from_bytes(sha256(document.data).digest()[:8], "big")
            if found != number:
                names = ", ".join(source["name"] for source in self.sources)
                raise DataError(f"{names}: changed during preparation; run it again")
            if side != CUT:
                yield SPLITS[side], document
                continue
            text = document.data.decode("utf-8", "surrogateescape")
            at = max(1, int(len(text) * (1 - self.val)))  # in characters, as nanoGPT cuts
            if at >= len(text):
                raise DataError(f"{document.name}: {len(text)} characters cannot be split in two")
            for split, part in zip(SPLITS, (text[:at], text[at:])):
                yield split, replace(document, data=part.encode("utf-8", "surrogateescape"))


def _trained(spec: str, survey: Survey, plan: Plan) -> Tokenizer:
    """Train the tokenizer, or load the one that an interrupted run saved."""
    with contextlib.suppress(TokenizerError):
        if (there := load(plan.directory)).hash == plan.tokenizer:
            return there
    log.info("prepare: training %s", spec)
    training = (document.data for side, document in survey.split() if side == "train")
    return get_tokenizer(spec, _sample(training, survey.bytes))


def _sample(texts: Iterable[bytes], total: int) -> Iterator[str | bytes]:
    """Yield about SAMPLE_BYTES, or all, of texts of `total` bytes, in evenly spread pieces."""
    seen = taken = 0
    for text in texts:
        for piece in pieces(text):
            if taken * total <= seen * SAMPLE_BYTES:
                yield piece
                taken += len(piece)
            seen += len(piece)


# ---------------------------------------------------------------------------- the output directory


@contextlib.contextmanager
def alone(directory: Path, wait: bool = False) -> Iterator[None]:
    """Create and lock a directory. Raises DataError if another process has it, unless `wait`."""
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(directory, wait))
        except BlockingIOError:
            what = "another process is preparing here; wait, or choose another --out"
            raise DataError(f"{directory}: {what}") from None
        yield


@contextlib.contextmanager
def _spool(out: Path) -> Iterator[IO[bytes]]:
    """Copy standard input to an unnamed temporary file, which can be read repeatedly."""
    here = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    with tempfile.TemporaryFile(dir=here) as file:  # /tmp may lack the space
        log.info("prepare: copying standard input to a temporary file in %s", here)
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        file.flush()
        yield file


def _reuse(out: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of a finished directory if it is intact and fits the request."""
    try:
        manifest = shards.read_manifest(out)
        before, now = manifest.get("request", {}), asked["request"]
        if other := [f"{k}: {before.get(k)}, now {now[k]}" for k in now if before.get(k) != now[k]]:
            raise DataError("; ".join(other))
        if manifest.get("sources") != asked["sources"]:
            raise DataError("the sources differ, or their content has changed")
        shards.open_data(out, verify="full").check_tokenizer(load(out))
    except DataError as error:
        hint = "already holds prepared data; remove it or choose another --out"
        raise DataError(f"{out}: {hint}: {error}") from None
    shutil.rmtree(out / PARTIAL, ignore_errors=True)  # left by a run that stopped at its end
    log.info("prepare: %s is already prepared, verified", out)
    return manifest


def refuse_foreign(out: Path) -> None:
    """Raise DataError for a directory with visible files that no preparation has made."""
    partial = out / PARTIAL
    if not out.is_dir() or (out / MANIFEST).exists() or (partial / MANIFEST).exists():
        return
    ours = partial.is_dir() and all(OURS.fullmatch(path.name) for path in partial.iterdir())
    found = (p for p in out.iterdir() if p.name[0] != "." or (p == partial and not ours))
    if foreign := sorted(found):
        raise DataError(f"{foreign[0]}: not made by prepare; move it or use another --out")


def _publish(out: Path) -> None:
    """Move the files of OUT/.partial into OUT, the manifest last."""
    partial = out / PARTIAL
    for path in sorted(partial.iterdir()):
        if PRODUCT.fullmatch(path.name):
            path.replace(out / path.name)
    sync_directory(out)
    (partial / MANIFEST).replace(out / MANIFEST)
    sync_directory(out)
    shutil.rmtree(partial)
