"""What the data cost: training a tokenizer, encoding, reading batches.

    python scripts/bench_data.py [--mb 16] [--json]

Encodes the interpreter's own sources on one thread, then reads the demo's batches (4,096 tokens in
windows of 256) and large ones (65,536 in windows of 1,024) from a file on the disk. The last line
is JSON. Times are medians; run it on a machine that does nothing else.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np

from nanonormuon.data import Batches
from nanonormuon.storage import shards
from nanonormuon.text import tokenizer
from nanonormuon.text.builtin import python_sources

DEMO_TOKENS_PER_SECOND = 21_000  # on two cores (docs/results.md: 2.13M in 103 s)


def seconds(call: Callable[[], object], times: int) -> float:
    """Median over several calls."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=float, default=16, help="text to encode [%(default)s]")
    parser.add_argument("--json", action="store_true", help="print the last line alone")
    options = parser.parse_args()
    corpus = [document.data for document in python_sources()]
    size = sum(map(len, corpus)) / 1e6
    start = time.perf_counter()
    words = tokenizer.get("bpe:4096", corpus)
    result = {"train_mb": round(size, 1), "train_seconds": round(time.perf_counter() - start, 2)}
    every = max(1, round(size / options.mb))
    part = corpus[::every]
    job = [piece for text in part for piece in (None, *words.cut(text, ""))]
    words.encode("warm")
    rate = sum(map(len, part)) / 1e6 / seconds(lambda: words.encode_job(job), 3)
    result["encode_mb_per_second_per_core"] = round(rate, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train_000000.bin")
        few = [piece for text in islice(part, 300) for piece in (None, *words.cut(text, ""))]
        ids = np.resize(words.encode_job(few), 20_000_000).astype(shards.DTYPES[1])
        path.write_bytes(shards.header(1, len(ids)) + ids.tobytes())
        split = shards.Split([path], [np.asarray(shards.read_shard(path))], words.vocab_size)
        for name, seq_len, sequences in (("demo", 256, 16), ("large", 1024, 64)):
            batches, steps = Batches(split, seq_len, sequences), iter(range(10_000))
            for_one = seconds(lambda b=batches, s=steps, n=sequences: b.batch(next(s), 0, n), 200)
            result[f"{name}_batch_ms"] = round(1e3 * for_one, 3)
            result[f"{name}_tokens_per_second"] = round(seq_len * sequences / for_one)
    result["times_what_the_demo_consumes"] = round(
        result["demo_tokens_per_second"] / DEMO_TOKENS_PER_SECOND
    )
    if not options.json:
        width = max(map(len, result))
        for key, value in result.items():
            print(f"{key:<{width}}  {value:>14,}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
