"""Documents into shards: encoded by several threads, written in order, each shard read back.

Which documents a shard holds depends on their text alone, and its tokens on those and the
tokenizer. So neither the number of workers nor an interruption can change a byte, and a shard that
is finished can be kept.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nanonormuon.errors import DataError
from nanonormuon.storage import shards
from nanonormuon.storage.files import naming, replace_file, settle
from nanonormuon.text.progress import Progress
from nanonormuon.text.tokenizer import Tokenizer, pieces

log = logging.getLogger(__name__)

JOB_BYTES = 1 << 18  # text that a worker encodes at a time
PLAN_SHAPE = {"asked": {}, "tokenizer": str, "shards": [shards.SHARD_SHAPE]}


class Plan:
    """OUT/.partial/plan.json: what is being made, and the shards that are finished and verified."""

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path, self.asked = path, asked
        self.tokenizer, self.shards = "", {}

    def there(self) -> bool:
        """Take over what an interrupted run of the same preparation has noted."""
        try:
            content = json.loads(self.path.read_bytes())
            shards.check_shape(content, PLAN_SHAPE, "plan")
        except (OSError, ValueError, RecursionError):
            return False
        self.tokenizer = content["tokenizer"]
        self.shards = {entry["name"]: entry for entry in content["shards"]}
        return content["asked"] == self.asked

    def for_tokenizer(self, tokenizer: str) -> None:
        """Begin to write shards of this tokenizer, keeping those that were made with it."""
        if self.tokenizer != tokenizer:
            self.tokenizer, self.shards = tokenizer, {}
        self.save()

    def finished(self, path: Path) -> dict[str, Any] | None:
        """The entry of a shard that is there as it was noted."""
        entry = self.shards.get(path.name)
        with contextlib.suppress(OSError):
            if entry and shards.sha256(path) == entry["sha256"]:
                log.info("prepare: keeping %s, finished before", path.name)
                return entry
        return None

    def note(self, entry: dict[str, Any]) -> None:
        self.shards[entry["name"]] = entry
        self.save()

    def save(self) -> None:
        content = {"asked": self.asked, "tokenizer": self.tokenizer}
        content["shards"] = list(self.shards.values())
        replace_file(self.path, json.dumps(content).encode())


def encode(
    texts: Iterable[tuple[str, bytes]],
    total: int,
    vocabulary: Tokenizer,
    directory: Path,
    plan: Plan,
    shard_bytes: int,
    workers: int,
) -> dict[str, dict[str, Any]]:
    """Write those shards of `texts` that are not finished yet; returns the manifest's entries.

    `texts` are (train or val, document) in order, `total` bytes in all. `workers` threads encode;
    0: one per core.
    """
    plan.for_tokenizer(vocabulary.hash)
    workers = workers or os.cpu_count() or 1
    with (
        ThreadPoolExecutor(workers) as pool,
        Progress("encoding", total) as progress,
    ):
        queue = Queue(pool, 2 * workers + 2)
        writers = {
            s: Writer(directory, s, vocabulary, shard_bytes, plan, queue) for s in ("train", "val")
        }
        for split, text in texts:
            writers[split].add(text)
            progress(len(text))
        return {split: writer.finish() for split, writer in writers.items()}


class Queue:
    """Jobs in a pool, at most `limit` at a time, whose results are used in the order of jobs."""

    def __init__(self, pool: ThreadPoolExecutor, limit: int) -> None:
        self.pool, self.limit = pool, limit
        self.waiting: deque[tuple[Callable[[np.ndarray], None], Future]] = deque()

    def submit(self, use: Callable[[np.ndarray], None], call: Callable, *arguments: Any) -> None:
        self.waiting.append((use, self.pool.submit(call, *arguments)))
        self.drain(self.limit)

    def drain(self, left: int = 0) -> None:
        while len(self.waiting) > left:
            use, job = self.waiting.popleft()
            use(job.result())


class Writer:
    """Puts the documents of one split into its shards, each of `shard_bytes` of text or slightly
    more. A shard gets its header when complete, and is then read back and compared."""

    def __init__(
        self,
        directory: Path,
        split: str,
        vocabulary: Tokenizer,
        shard_bytes: int,
        plan: Plan,
        queue: Queue,
    ) -> None:
        self.directory, self.split, self.vocabulary = directory, split, vocabulary
        self.shard_bytes, self.plan, self.queue = shard_bytes, plan, queue
        self.version = 1 if vocabulary.vocab_size <= 65_536 else 2
        self.documents = self.bytes = 0
        self.shards: list[dict[str, Any]] = []
        self.filled = 0  # bytes of text in the open shard
        self.job: list[str | bytes | None] = []  # pieces of text; None: a document begins
        self.job_bytes = 0

    def add(self, text: bytes) -> None:
        """Append a document that is not empty."""
        if not self.filled:
            self._open()
        self.documents += 1
        self.bytes += len(text)
        self.filled += len(text)
        if not self.kept:
            self.job.append(None)
            for piece in pieces(text):
                self.job.append(piece)
                self.job_bytes += len(piece)
                if self.job_bytes >= JOB_BYTES:
                    self._submit()
        if self.filled >= self.shard_bytes:
            self._close()

    def finish(self) -> dict[str, Any]:
        """Close the last shard; returns this split's entry for the manifest."""
        if self.filled:
            self._close()
        tokens = sum(shard["tokens"] for shard in self.shards)
        counts = {"documents": self.documents, "tokens": tokens, "bytes": self.bytes}
        return counts | {"shards": self.shards}

    def _submit(self) -> None:
        self.queue.submit(self._write, self.vocabulary.encode_job, self.job)
        self.job, self.job_bytes = [], 0

    def _write(self, ids: np.ndarray) -> None:
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
        self.filled = 0
        if self.kept:
            self.shards.append(self.kept)
            return
        self._submit()
        self.queue.drain()
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
        self.plan.note(entry)
