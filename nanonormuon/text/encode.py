"""Documents into shards: encoded by several threads, written in order, each shard read back.

Which documents a shard holds depends on their text alone, and its tokens on the documents and the
tokenizer. So neither the number of workers nor an interruption can change a byte, and finished
shards can be kept.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanonormuon.errors import DataError, TokenizerError
from nanonormuon.storage import shards
from nanonormuon.storage.files import naming, replace_file, settle
from nanonormuon.text.bpe import Piece, Tokenizer
from nanonormuon.text.sources import Document

log = logging.getLogger(__name__)

JOB_BYTES = 1 << 18  # text that a worker encodes at a time
PLAN_SHAPE = {"asked": {}, "tokenizer": str, "shards": [shards.SHARD_SHAPE]}


class Plan:
    """OUT/.partial/plan.json: what is being made, and the shards that are finished and verified."""

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path, self.asked = path, asked
        self.tokenizer, self.shards = "", {}

    def resume(self) -> bool:
        """Read what an interrupted run noted; False unless it made what is asked for now."""
        try:
            content = json.loads(self.path.read_bytes())
            shards.check_shape(content, PLAN_SHAPE, "plan")
        except (OSError, ValueError, RecursionError):
            return False
        if content["asked"] != self.asked:
            return False
        self.tokenizer = content["tokenizer"]
        self.shards = {entry["name"]: entry for entry in content["shards"]}
        return True

    def finished(self, path: Path) -> dict[str, Any] | None:
        """The entry of a shard whose file is what was noted."""
        entry = self.shards.get(path.name)
        with contextlib.suppress(OSError):
            if entry and shards.sha256(path) == entry["sha256"]:
                log.info("prepare: keeping %s, finished before", path.name)
                return entry
        return None

    def save(self) -> None:
        content = {"asked": self.asked, "tokenizer": self.tokenizer}
        content["shards"] = list(self.shards.values())
        replace_file(self.path, json.dumps(content).encode())


def encode(
    documents: Iterable[tuple[str, Document]],
    total: int,
    vocabulary: Tokenizer,
    directory: Path,
    plan: Plan,
    shard_bytes: int,
    workers: int,
) -> dict[str, dict[str, Any]]:
    """Write those shards that are not finished yet; returns the manifest's entries.

    `documents` come in order, each with "train" or "val", and have `total` bytes in all. `workers`
    threads encode; 0: one per core.
    """
    if plan.tokenizer != vocabulary.hash:
        plan.tokenizer, plan.shards = vocabulary.hash, {}
    plan.save()
    workers = workers or os.cpu_count() or 1
    bar = tqdm(desc="encoding", total=total, unit="B", unit_scale=True, disable=None)
    with ThreadPoolExecutor(workers) as pool, bar:
        submit = partial(pool.submit, vocabulary.encode_job)
        writers = {
            split: Writer(directory, split, vocabulary, shard_bytes, plan, submit, workers + 2)
            for split in ("train", "val")
        }
        for split, document in documents:
            try:
                writers[split].add(document.data)
            except TokenizerError as error:
                raise TokenizerError(f"{document.name}: {error}") from None
            bar.update(len(document.data))
        return {split: writer.finish() for split, writer in writers.items()}


class Writer:
    """Writes the documents of one split into shards of `shard_bytes` of text or slightly more. A
    shard gets its header when complete, and is then read back and compared. At most `ahead` jobs
    wait to be written."""

    def __init__(
        self,
        directory: Path,
        split: str,
        vocabulary: Tokenizer,
        shard_bytes: int,
        plan: Plan,
        submit: Callable[[list[Piece]], Future],
        ahead: int,
    ) -> None:
        self.directory, self.split, self.vocabulary = directory, split, vocabulary
        self.shard_bytes, self.plan, self.submit, self.ahead = shard_bytes, plan, submit, ahead
        self.version = 1 if vocabulary.vocab_size <= 65_536 else 2
        self.documents = self.bytes = 0
        self.shards: list[dict[str, Any]] = []
        self.filled = 0  # bytes of text in the open shard
        self.job: list[Piece] = []
        self.job_bytes = 0
        self.waiting: deque[Future] = deque()

    def add(self, text: bytes) -> None:
        """Append a document that is not empty."""
        if not self.filled:
            self._open()
        self.documents += 1
        self.bytes += len(text)
        self.filled += len(text)
        if not self.kept:
            self.job.append(None)
            for piece in self.vocabulary.pieces(text):
                self.job.append(piece)
                self.job_bytes += len(piece)
                if self.job_bytes >= JOB_BYTES:
                    self._send_job()
                    self._write(self.ahead)
        if self.filled >= self.shard_bytes:
            self._close()

    def finish(self) -> dict[str, Any]:
        """Close the last shard; returns this split's entry for the manifest."""
        if self.filled:
            self._close()
        tokens = sum(shard["tokens"] for shard in self.shards)
        counts = {"documents": self.documents, "tokens": tokens, "bytes": self.bytes}
        return counts | {"shards": self.shards}

    def _send_job(self) -> None:
        self.waiting.append(self.submit(self.job))
        self.job, self.job_bytes = [], 0

    def _write(self, left: int) -> None:
        """Write the ids of the oldest jobs, until `left` remain."""
        while len(self.waiting) > left:
            ids = self.waiting.popleft().result()
            content = ids.astype(shards.DTYPES[self.version]).tobytes()
            with naming(self.path):
                self.file.write(content)
            self.digest.update(content)
            self.tokens += len(ids)

    def _open(self) -> None:
        self.path = self.directory / f"{self.split}_{len(self.shards):06d}.bin"
        self.kept = self.plan.finished(self.path)
        if not self.kept:
            self.file, self.digest, self.tokens = self.path.open("wb"), hashlib.sha256(), 0
            self.file.write(bytes(shards.HEADER_BYTES))

    def _close(self) -> None:
        full, self.filled = self.filled >= self.shard_bytes, 0
        if self.kept:
            self.shards.append(self.kept)
            return
        self._send_job()
        self._write(0)
        with naming(self.path), self.file as file:
            file.seek(0)
            file.write(shards.header(self.version, self.tokens))
            settle(file)
        shard = shards.read_shard(self.path)
        largest = shards.check_ids(shard, self.vocabulary.vocab_size, self.path)
        if hashlib.sha256(shard.data).digest() != self.digest.digest():
            raise DataError(f"{self.path}: read back other bytes than were written; check the disk")
        entry = {"name": self.path.name, "tokens": self.tokens, "size": self.path.stat().st_size}
        entry |= {"sha256": shards.sha256(self.path), "max_token": largest}
        self.shards.append(entry)
        self.plan.shards[self.path.name] = entry
        self.plan.save()
        if full:  # a long preparation's sign of life, where no bar is shown
            log.info("prepare: finished %s, %d tokens", self.path.name, self.tokens)
