"""Encodes documents in several threads and writes them in order into shards.

A shard depends only on the documents and the tokenizer, so neither the number of workers nor an
interruption changes a byte, and finished shards can be kept.
"""

import hashlib
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nanonormuon.errors import DataError
from nanonormuon.storage import shards
from nanonormuon.storage.files import naming, progress, read_file, replace_file, settle
from nanonormuon.text.bpe import Piece, Tokenizer
from nanonormuon.text.sources import Document

log = logging.getLogger(__name__)

PLAN = "plan.json"
PLAN_SHAPE = {"asked": {}, "tokenizer": str, "shards": [shards.SHARD_SHAPE]}
JOB_BYTES = 1 << 18  # text that a worker encodes at a time


def read_plan(directory: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Read an interrupted run's plan: what it was asked for, its tokenizer's hash, and those
    finished shards that are intact. None if it was asked for something else."""
    try:
        plan = json.loads(read_file(directory / PLAN, 1 << 30))
        shards.check_shape(plan, PLAN_SHAPE, "plan")
    except (OSError, ValueError, RecursionError):
        return None
    if plan["asked"] != asked:
        return None
    noted, plan["shards"] = plan["shards"], []
    for entry in noted:
        path = directory / entry["name"]
        if path.is_file() and shards.sha256(path) == entry["sha256"]:
            log.info("prepare: keeping %s, finished by an earlier run", path.name)
            plan["shards"].append(entry)
    return plan


def encode(
    documents: Iterable[tuple[str, Document]],
    total: int,
    vocabulary: Tokenizer,
    directory: Path,
    plan: dict[str, Any],
    shard_bytes: int,
    workers: int,
) -> dict[str, dict[str, Any]]:
    """Write the unfinished shards; returns each split's entry for the manifest.

    documents: in order, each with "train" or "val"; `total` bytes in all. shard_bytes: of text per
    shard, or slightly more. workers: threads; 0: one per core.
    """
    if plan["tokenizer"] != vocabulary.hash:
        plan |= {"tokenizer": vocabulary.hash, "shards": []}
    finished = {entry["name"]: entry for entry in plan["shards"]}
    replace_file(directory / PLAN, json.dumps(plan).encode())
    none = {"documents": 0, "tokens": 0, "bytes": 0}
    splits: dict[str, dict[str, Any]] = {s: {**none, "shards": []} for s in ("train", "val")}
    writers: dict[str, Writer] = {}
    workers = workers or os.cpu_count() or 1
    bar = progress("encoding", total, "B")
    with ThreadPoolExecutor(workers) as pool, bar:
        for split, name, document in _in_shards(documents, shard_bytes):
            found = splits[split]
            if document is None:
                if writer := writers.pop(name, None):
                    finished[name] = writer.finish()
                    plan["shards"].append(finished[name])
                    replace_file(directory / PLAN, json.dumps(plan).encode())
                found["tokens"] += finished[name]["tokens"]
                found["shards"].append(finished[name])
                continue
            if name not in finished:
                if name not in writers:
                    writers[name] = Writer(directory / name, vocabulary, pool, workers + 2)
                writers[name].add(document)
            found["documents"] += 1
            found["bytes"] += len(document.data)
            bar.update(len(document.data))
    return splits


def _in_shards(
    documents: Iterable[tuple[str, Document]], shard_bytes: int
) -> Iterator[tuple[str, str, Document | None]]:
    """Yield each document with its split and shard; None after a shard's last document."""
    number, filled = Counter(), Counter()  # per split: index and bytes of text of the open shard
    for split, document in documents:
        name = f"{split}_{number[split]:06d}.bin"
        yield split, name, document
        filled[split] += len(document.data)
        if filled[split] >= shard_bytes:
            yield split, name, None
            number[split], filled[split] = number[split] + 1, 0
    for split in filter(filled.get, filled):
        yield split, f"{split}_{number[split]:06d}.bin", None


class Writer:
    """Encodes documents into one shard, with at most `ahead` jobs in flight."""

    def __init__(
        self, path: Path, vocabulary: Tokenizer, pool: ThreadPoolExecutor, ahead: int
    ) -> None:
        self.path, self.vocabulary, self.pool, self.ahead = path, vocabulary, pool, ahead
        self.version = 1 if vocabulary.vocab_size <= 65_536 else 2
        self.job: list[Piece] = []
        self.job_bytes = 0
        self.names: list[str] = []  # of the documents in the job
        self.offset = 0  # bytes of the first document that are in earlier jobs
        self.waiting: deque[Future] = deque()
        self.file, self.digest, self.tokens = path.open("wb"), hashlib.sha256(), 0
        self.file.write(bytes(shards.HEADER_BYTES))

    def add(self, document: Document) -> None:
        """Append a document. Raises TokenizerError if an earlier one cannot be encoded."""
        self.job.append(None)
        self.names.append(document.name)
        done = 0
        for piece in self.vocabulary.pieces(document.data):
            self.job.append(piece)
            size = len(piece.encode() if isinstance(piece, str) else piece)
            self.job_bytes, done = self.job_bytes + size, done + size
            if self.job_bytes >= JOB_BYTES:
                self._send_job(self.ahead)
                self.names, self.offset = [document.name], done

    def _send_job(self, left: int) -> None:
        """Submit the job, and write the oldest results until `left` jobs remain."""
        job = self.job, self.names, self.offset
        self.waiting.append(self.pool.submit(self.vocabulary.encode_job, *job))
        self.job, self.job_bytes, self.names, self.offset = [], 0, [], 0
        while len(self.waiting) > left:
            ids = self.waiting.popleft().result()
            content = ids.astype(shards.DTYPES[self.version]).tobytes()
            with naming(self.path):
                self.file.write(content)
            self.digest.update(content)
            self.tokens += len(ids)

    def finish(self) -> dict[str, Any]:
        """Write the remaining jobs and the header, and read the shard back; returns its entry for
        the manifest. Raises DataError if the bytes differ."""
        self._send_job(0)
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
