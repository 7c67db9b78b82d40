"""Encodes documents in several threads and writes them in order into shards.

A shard depends only on the documents and the tokenizer, so neither the number of workers nor an
interruption changes a byte, and finished shards can be kept.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nanonormuon.errors import DataError
from nanonormuon.storage import shards
from nanonormuon.storage.files import naming, progress, read_file, replace_file, settle
from nanonormuon.text.bpe import Piece, Tokenizer
from nanonormuon.text.sources import Document

log = logging.getLogger(__name__)

PLAN = "plan.json"
JOB_SIZE = 1 << 18  # characters that a worker encodes at a time
AHEAD = (os.cpu_count() or 1) + 2  # maximum number of jobs in flight for each split


class Plan:
    """What a directory of unfinished work holds, kept in its plan.json.

    asked: the request; tokenizer: its hash; shards: entries of finished ones, by name. Continues
    an earlier run's plan if it was asked for the same, without shards that are no longer intact;
    empties the directory otherwise.
    """

    def __init__(self, directory: Path, asked: dict[str, Any]) -> None:
        self.directory, self.asked = directory, asked
        self.tokenizer, self.shards = "", {}
        try:
            found = json.loads(read_file(directory / PLAN, 1 << 30))
            shards.check_shape(found["shards"], [shards.SHARD_SHAPE], "shards")
            fits, self.tokenizer = found["asked"] == asked, found["tokenizer"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            fits = None  # missing, as nothing was encoded yet, or damaged
        if fits is False:
            log.info("prepare: removing another run's files in %s", directory)
        if not fits:
            if directory.exists():
                shutil.rmtree(directory)
            directory.mkdir()
            return
        for entry in found["shards"]:
            path = directory / entry["name"]
            here = path.name == entry["name"]  # a plan from a stranger may name a file elsewhere
            if here and path.is_file() and shards.sha256(path) == entry["sha256"]:
                log.info("prepare: keeping %s, finished by an earlier run", path.name)
                self.shards[path.name] = entry

    def save(self) -> None:
        """Write plan.json."""
        content = {"asked": self.asked, "tokenizer": self.tokenizer}
        content["shards"] = [*self.shards.values()]
        replace_file(self.directory / PLAN, json.dumps(content).encode())


def encode(
    documents: Iterable[tuple[str, Document]],
    total: int,
    vocabulary: Tokenizer,
    plan: Plan,
    shard_bytes: int,
    workers: int,
) -> dict[str, dict[str, Any]]:
    """Write the shards that the plan lacks; returns each split's entry for the manifest.

    documents: in order, each with "train" or "val"; `total` bytes in all. shard_bytes: of text per
    shard, or slightly more. workers: threads; 0: one per core.
    """
    if plan.tokenizer != vocabulary.hash:
        plan.tokenizer, plan.shards = vocabulary.hash, {}
    plan.save()
    pool, bar = ThreadPoolExecutor(workers or os.cpu_count()), progress("encoding", total, "B")
    with pool, bar:
        settings = vocabulary, plan, shard_bytes, pool
        splits = {split: Writer(split, *settings) for split in ("train", "val")}
        for split, document in documents:
            splits[split].add(document)
            bar.update(len(document.data))
        for writer in splits.values():
            writer.finish()
    return {split: writer.entry for split, writer in splits.items()}


class Writer:
    """Writes a split's documents into its shards; `entry` is the split's in the manifest."""

    def __init__(
        self, split: str, vocabulary: Tokenizer, plan: Plan, shard_bytes: int, pool: Executor
    ) -> None:
        self.split, self.vocabulary, self.plan = split, vocabulary, plan
        self.shard_bytes, self.pool = shard_bytes, pool
        self.version = 1 if vocabulary.vocab_size <= 65_536 else 2
        self.entry: dict[str, Any] = {"documents": 0, "tokens": 0, "bytes": 0, "shards": []}
        self.filled = 0  # bytes of text in the open shard
        self.job: list[Piece | None] = []
        self.job_size = 0
        self.waiting: deque[Future] = deque()

    def add(self, document: Document) -> None:
        """Append a document. Raises TokenizerError if an earlier one cannot be encoded."""
        if not self.filled:
            self.path = self.plan.directory / f"{self.split}_{len(self.entry['shards']):06d}.bin"
            self.kept = self.path.name in self.plan.shards
            if not self.kept:
                self.file, self.digest, self.tokens = self.path.open("wb"), hashlib.sha256(), 0
                self.file.write(bytes(shards.HEADER_BYTES))
        self.filled += len(document.data)
        self.entry["documents"] += 1
        self.entry["bytes"] += len(document.data)
        if not self.kept:
            self.job.append(None)
            for piece in self.vocabulary.cut(document.data, document.name):
                self.job.append(piece)
                self.job_size += len(piece.text)
                if self.job_size >= JOB_SIZE:
                    self._send_job(AHEAD)
        if self.filled >= self.shard_bytes:
            self.finish()

    def finish(self) -> None:
        """Finish the open shard, if any. Raises DataError if it reads back differently."""
        if not self.filled:
            return
        if not self.kept:
            self._send_job(0)
            self.plan.shards[self.path.name] = self._seal()
            self.plan.save()
        self.entry["shards"].append(self.plan.shards[self.path.name])
        self.entry["tokens"] += self.entry["shards"][-1]["tokens"]
        self.filled = 0

    def _send_job(self, left: int) -> None:
        """Submit the job, and write the oldest results until `left` jobs remain."""
        self.waiting.append(self.pool.submit(self.vocabulary.encode_job, self.job))
        self.job, self.job_size = [], 0
        while len(self.waiting) > left:
            ids = self.waiting.popleft().result()
            content = ids.astype(shards.DTYPES[self.version]).tobytes()
            with naming(self.path):
                self.file.write(content)
            self.digest.update(content)
            self.tokens += len(ids)

    def _seal(self) -> dict[str, Any]:
        """Write the shard's header, read the shard back, and return its entry."""
        with naming(self.path), self.file as file:
            file.seek(0)
            file.write(shards.header(self.version, self.tokens))
            settle(file)
        shard = shards.read_shard(self.path)
        largest = shards.check_ids(shard, self.vocabulary.vocab_size, self.path)
        if hashlib.sha256(shard.data).digest() != self.digest.digest():
            raise DataError(f"{self.path}: reads differently from what was written; check the disk")
        # shows the progress of a long preparation without a bar
        log.info("prepare: finished %s, %d tokens", self.path.name, self.tokens)
        return {
            "name": self.path.name, "tokens": self.tokens, "size": self.path.stat().st_size,
            "sha256": shards.sha256(self.path), "max_token": largest,
        }  # fmt: skip
