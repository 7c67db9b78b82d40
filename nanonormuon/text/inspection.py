"""Describes a data directory's contents and finds problems in them."""

import hashlib
import heapq
from array import array
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nanonormuon.errors import DataError
from nanonormuon.storage.files import progress
from nanonormuon.storage.shards import CHUNK, Split, open_data, too_few
from nanonormuon.text.tokenizer import FILE, Tokenizer, get, load

COUNTS = ("documents", "tokens", "shards", "bytes", "bytes_per_token", "copies")
LONGEST, WINDOWS, WINDOW = 5, 3, 64  # documents, windows of each split, tokens in one


def inspect(directory: Path, tokenizer: str = "", headerless: bool = False) -> dict[str, Any]:
    """Read a whole data directory and describe it as a JSON object.

    tokenizer: needed only if the directory has none. "problems" lists all problems; a directory
    that cannot be opened has no other keys. "refused" means that training would refuse it.
    """
    problems: list[str] = []
    words: Tokenizer | None = None
    try:
        if tokenizer or (directory / FILE).exists():
            words = get(tokenizer) if tokenizer else load(directory)
        data = open_data(directory, words and words.vocab_size, "full", headerless)
    except DataError as error:
        return {"path": str(directory), "problems": [str(error)]}
    result: dict[str, Any] = {"path": str(directory), "fingerprint": data.fingerprint}
    if data.manifest:
        result["tokenizer"] = data.manifest["tokenizer"]
        result["sources"] = data.manifest.get("sources", [])
        try:
            data.check_tokenizer(load(directory))
        except DataError as error:
            problems.append(str(error))
            result["refused"] = True
        if words and words.hash != data.manifest["tokenizer"]["hash"]:
            if tokenizer:
                problems.append(f"{tokenizer}: not the tokenizer of the shards")
            words = None
    elif words is None:
        problems.append("no manifest and no tokenizer: add, for instance, --tokenizer gpt2")
    eot = data.manifest["tokenizer"]["eot"] if data.manifest else words and words.eot
    result["train"], train_digests = describe(data.train, eot, words)
    result["val"], val_digests = describe(data.val, eot, words)
    if eot is not None:
        result["val"]["also_in_train"] = int(np.isin(val_digests, train_digests).sum())
        problems += find_problems(result)
    return result | {"problems": problems}


def describe(
    split: Split, eot: int | None, words: Tokenizer | None
) -> tuple[dict[str, Any], np.ndarray]:
    """Return a split's counts, longest documents and first windows, and each document's digest."""
    found: dict[str, Any] = {
        "shards": len(split.shards), "tokens": split.tokens, "bytes": split.bytes,
        "largest_id": max(int(shard.max()) for shard in split.shards),
    }  # fmt: skip
    digests, longest = array("Q"), []

    def read() -> Iterator[np.ndarray]:
        with progress("inspecting", split.tokens, "token") as bar:
            for tokens in documents(split, eot):
                digests.frombytes(hashlib.sha256(tokens.tobytes()).digest()[:8])
                bar.update(len(tokens) + 1)
                yield tokens

    if eot is not None:
        longest = heapq.nlargest(LONGEST, read(), key=len)
        found["documents"] = len(digests)
        found["copies"] = len(digests) - len(np.unique(np.asarray(digests)))
    if words is not None:
        if (text_bytes := split.text_bytes(words)) is not None:
            found["bytes_per_token"] = round(text_bytes / split.tokens, 3)
        found["longest"] = [{"tokens": len(t), "begins": words.decode(t[:24])} for t in longest]
        first = split.shards[0]
        windows = (first[i * WINDOW : (i + 1) * WINDOW] for i in range(WINDOWS))
        found["windows"] = [*map(words.decode, windows)]
    return found, np.asarray(digests)


def documents(split: Split, eot: int) -> Iterator[np.ndarray]:
    """Yield each document's tokens (n,) without separator, also those before the first one."""
    for shard in split.shards:
        starts = range(0, len(shard), CHUNK)
        ends = (at + np.flatnonzero(shard[at : at + CHUNK] == eot) for at in starts)
        each = chain.from_iterable(map(np.ndarray.tolist, ends))
        for before, end in pairwise(chain([-1], each, [len(shard)])):
            if end > 0:  # the separator at index 0 ends no document
                yield shard[before + 1 : end]


def find_problems(result: dict[str, Any]) -> list[str]:
    """List duplicate documents and splits with too few tokens."""
    problems = too_few(train=result["train"]["tokens"], val=result["val"]["tokens"])
    for name in ("train", "val"):
        part = result[name]
        if part["copies"] > 0.1 * part["documents"]:
            share = part["copies"] / part["documents"]
            problems.append(f"{name}: {share:.0%} of the documents are duplicates")
    if shared := result["val"]["also_in_train"]:
        documents = f"{shared} of {result['val']['documents']} documents"
        problems.append(f"val: {documents} are also in train, which lowers the validation loss")
    return problems


def as_text(result: dict[str, Any]) -> str:
    """Format the result of `inspect`."""
    lines = [f"{result['path']}"]
    if words := result.get("tokenizer"):
        lines.append(f"tokenizer: {words['name']}, {words['vocab_size']:,} ids")
    for source in result.get("sources", []):
        name, number, size = source["name"], source["documents"], source["bytes"]
        lines.append(f"source: {name}, {number:,} documents, {size:,} bytes")
    for name in filter(result.get, ("train", "val")):
        part = result[name]
        counts = [f"{part[k]:,} {k.replace('_', ' ')}" for k in COUNTS if part.get(k) is not None]
        lines.append(f"{name}: {', '.join(counts)}")
        for document in part.get("longest", []):
            lines.append(f"{name}, long: {document['tokens']:,} tokens {document['begins']!r}")
        for i, window in enumerate(part.get("windows", [])):
            lines.append(f"{name}, tokens {i * WINDOW} to {i * WINDOW + WINDOW - 1}: {window!r}")
    lines += [f"problem: {problem}" for problem in result["problems"]] or ["no problem found"]
    return "\n".join(lines)
