"""Proves: the shuffled order visits every window once per epoch, the sequential order is
modded-nanogpt's, and neither depends on how a step is cut into ranks and micro-batches; validation
covers each target exactly once on any number of ranks.
"""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import write_shard

from nanonormuon import data
from nanonormuon.data import Batches, Loader
from nanonormuon.errors import DataError
from nanonormuon.runtime.distributed import ALONE, World
from nanonormuon.storage import shards
from nanonormuon.storage.shards import Split


def split_of(*lengths: int, vocab_size: int | None = None) -> Split:
    """Shards in memory whose tokens count on: shard i holds 1000 i, 1000 i + 1, ..."""
    shards = [np.arange(n, dtype=np.uint16) + np.uint16(1000 * i) for i, n in enumerate(lengths)]
    return Split([Path(f"none/train_{i}.bin") for i in range(len(lengths))], shards, vocab_size)


# ---------------------------------------------------------------------------------------- order


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_permutation_is_one(n: int, seed: int, epoch: int) -> None:
    image = data.permute(np.arange(n), n, seed, np.full(n, epoch))
    assert sorted(image.tolist()) == list(range(n))


def plain_permutation(x: int, n: int, seed: int, epoch: int) -> int:
    """`data.permute` for one number, in Python's own integers."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    half = next(h for h in range(1, 40) if 4**h >= n)
    key = mix((epoch + mix(seed % 2**64)) % 2**64)
    while True:
        left, right = divmod(x, 2**half)
        for i in range(8):
            left, right = right, left ^ mix((right + mix((key + i) % 2**64)) % 2**64) % 2**half
        x = left * 2**half + right
        if x < n:
            return x


def test_permutation_is_the_same_everywhere() -> None:
    """The order of the data is a promise: a change here changes what every resumed run reads."""
    image = data.permute(np.tile(np.arange(8), 2), 1000, 1337, np.repeat([0, 1], 8)).tolist()
    assert image[:8] == [570, 425, 217, 673, 584, 416, 422, 443]
    assert image[8:] == [273, 993, 721, 298, 897, 954, 633, 345]
    for n, seed, epoch in ((1, 0, 0), (2, 1, 5), (17, -3, 2), (10**9, 2**64 + 1, 10**6)):
        x = np.arange(min(n, 20))
        image = data.permute(x, n, seed, np.full(len(x), epoch)).tolist()
        assert image == [plain_permutation(i, n, seed, epoch) for i in range(len(x))]


def test_permutation_mixes() -> None:
    n = 20_000
    image = data.permute(np.arange(n), n, 3, np.zeros(n, np.int64))
    assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 0.03
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.03
    cells = np.histogram2d(np.arange(n), image, bins=20)[0]
    assert ((cells - 50) ** 2 / 50).sum() < 500  # chi-squared, 361 degrees of freedom: sd 27
    other = data.permute(np.arange(n), n, 4, np.zeros(n, np.int64))
    later = data.permute(np.arange(n), n, 3, np.ones(n, np.int64))
    assert (image == other).sum() < 10 and (image == later).sum() < 10


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 11),
    st.integers(0, 2**32),
)
def test_every_window_once_per_epoch(
    lengths: list[int], seq_len: int, sequences: int, seed: int
) -> None:
    windows = [(i, w * seq_len) for i, n in enumerate(lengths) for w in range((n - 1) // seq_len)]
    if not windows:
        with pytest.raises(
            DataError, match=rf"{seq_len + 1} tokens, the longest has {max(lengths)}"
        ):
            Batches(split_of(*lengths), seq_len, sequences, seed)
        return
    batches = Batches(split_of(*lengths), seq_len, sequences, seed)
    n = batches.sources[0].windows
    assert n == len(windows)
    steps = -(-3 * n // sequences)
    stream = [tuple(w) for step in range(steps) for w in batches.windows(step).tolist()]
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == windows
    assert batches.epochs(steps) == [steps * sequences / n]
    first = [k // sequences for k in range(n, steps * sequences, n)]  # of each further epoch
    assert [step for step in range(steps) if batches.begun(step)] == sorted(set(first))


def test_each_epoch_and_seed_has_an_order_of_its_own() -> None:
    orders = [
        Batches(split_of(501), 5, 100, seed).windows(epoch).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    for i, order in enumerate(orders):
        for other in orders[:i]:
            assert sum(a == b for a, b in zip(order, other, strict=True)) < 20


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 80), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 4))
def test_sequential_order_is_the_plain_loop(
    lengths: list[int], seq_len: int, sequences: int
) -> None:
    size = seq_len * sequences
    if all(size + 1 >= n for n in lengths):
        with pytest.raises(DataError, match=f"shard of at least {size + 2} tokens"):
            Batches(split_of(*lengths), seq_len, sequences, 0, "sequential")
        return
    batches = Batches(split_of(*lengths), seq_len, sequences, 0, "sequential")
    shard = position = 0
    for step in range(50):
        while position + size + 1 >= lengths[shard]:
            shard, position = (shard + 1) % len(lengths), 0
        expected = [[shard, position + j * seq_len] for j in range(sequences)]
        assert batches.windows(step).tolist() == expected
        position += size


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_batch_is_the_windows_tokens_however_it_is_cut(order: str) -> None:
    split = split_of(200, 90, vocab_size=1090)
    batches = Batches(split, 5, 12, 7, order)
    for step in (0, 3, 1000):
        tokens, targets = batches.batch(step, 0, 12)
        for row, (shard, offset) in enumerate(batches.windows(step).tolist()):
            window = split.shards[shard][offset : offset + 6].tolist()
            assert tokens[row].tolist() == window[:-1] and targets[row].tolist() == window[1:]
        assert tokens.dtype == targets.dtype == torch.int64
        assert tokens.is_contiguous() and targets.is_contiguous()
        for parts in (2, 3, 4, 12):
            cut = [batches.batch(step, i, i + 12 // parts) for i in range(0, 12, 12 // parts)]
            assert torch.equal(torch.cat([x for x, _ in cut]), tokens)
            assert torch.equal(torch.cat([y for _, y in cut]), targets)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.integers(6, 60), min_size=1, max_size=3), min_size=2, max_size=4),
    st.lists(st.integers(1, 300_000), min_size=3, max_size=3),
    st.integers(1, 13),
    st.integers(0, 2**32),
)
def test_a_mixture_keeps_shares_and_epochs(
    lengths: list[list[int]], shares: list[int], sequences: int, seed: int
) -> None:
    """Every window of every source once per epoch of that source, at any number of sequences."""
    main, *others = [split_of(*row) for row in lengths]
    mix = list(zip(others, shares, strict=False))
    batches = Batches(main, 5, sequences, seed, mix=mix)
    steps = -(-120 // sequences)
    stream = [tuple(w) for step in range(steps) for w in batches.windows(step).tolist()]
    every = [data.SHARES - sum(s for _, s in mix), *(s for _, s in mix)]
    shards = [len(main.shards), *(len(other.shards) for other in others)]
    order = [*range(1, len(every)), 0]  # as they stand in the list of shards
    at = 0
    for i in order:
        mine = [(s - at, w) for s, w in stream if at <= s < at + shards[i]]
        at += shards[i]
        assert abs(len(mine) - len(stream) * every[i] / data.SHARES) < len(every)
        windows = [(s, w * 5) for s, n in enumerate(lengths[i]) for w in range((n - 1) // 5)]
        for epoch in range(len(mine) // len(windows)):
            assert sorted(mine[epoch * len(windows) : (epoch + 1) * len(windows)]) == windows
    # the same stream, cut into other steps
    other_size = Batches(main, 5, 7, seed, mix=mix)
    again = [
        tuple(w) for step in range(-(-len(stream) // 7)) for w in other_size.windows(step).tolist()
    ]
    assert again[: len(stream)] == stream
    taken = batches.taken(steps)
    assert sum(taken) == len(stream) and len(taken) == len(every)


def test_a_mixture_of_one_is_the_source_itself() -> None:
    split = split_of(200, 90)
    assert Batches(split, 5, 12, 7).split is split
    with pytest.raises(DataError, match="shares"):
        Batches(split, 5, 12, 7, mix=[(split, data.SHARES)])
    with pytest.raises(DataError, match="sequential"):
        Batches(split, 5, 12, 7, "sequential", mix=[(split, 5)])


def test_reading_ahead_gives_the_same_and_raises_here() -> None:
    batches = Batches(split_of(200, 90, vocab_size=1090), 5, 12, 7)
    loader = Loader(batches, World(1, 2, torch.device("cpu")))  # the second half of each batch
    asked = [(0, 3), (1, 3), (9, 3), (9, 2), (10, 2)]  # (step, sequences at a time)
    read = batches.batch
    threads: list[int] = []

    def noted(*arguments: int) -> Any:
        threads.append(threading.get_ident())
        return read(*arguments)

    batches.batch = noted  # type: ignore[method-assign]
    for step, n in asked:
        found = list(loader.micro_batches(step, n))
        assert len(found) == 6 // n
        for micro, part in enumerate(found):
            for x, y in zip(part, read(step, 6 + micro * n, 6 + micro * n + n), strict=True):
                assert torch.equal(x, y)
    assert threading.get_ident() in threads and len(set(threads)) == 2

    def fail(step: int, start: int, stop: int) -> Any:
        raise DataError(f"changed in step {step}")

    batches.batch = fail  # type: ignore[method-assign]
    with pytest.raises(DataError, match="changed in step 7"):
        next(loader.micro_batches(7, 6))
    batches.batch = read  # type: ignore[method-assign]
    next(loader.micro_batches(8, 6))
    assert loader._next is not None
    loader._next[1].result()  # step 9 is read
    batches.batch = fail  # type: ignore[method-assign]
    next(loader.micro_batches(9, 6))
    with pytest.raises(DataError, match="changed in step 10"):
        next(loader.micro_batches(10, 6))


@pytest.mark.parametrize("dealt", [False, True])
def test_the_ranks_share_a_batch(dealt: bool) -> None:
    batches = Batches(split_of(200, 90), 5, 12, 7)
    whole = batches.batch(3, 0, 12)[0]
    worlds = [World(rank, 2, torch.device("cpu")) for rank in range(2)]
    loaders = [Loader(batches, world, dealt) for world in worlds]
    parts = [[x for x, _ in loader.micro_batches(3, 2)] for loader in loaders]
    ordered = [p for pair in zip(*parts) for p in pair] if dealt else [*parts[0], *parts[1]]
    assert torch.equal(torch.cat(ordered), whole)


@pytest.mark.parametrize("wrong", [{"seq_len": 0}, {"sequences": 0}, {"order": "random"}])
def test_bad_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"{next(iter(wrong))}="):
        Batches(split_of(100), **{"seq_len": 5, "sequences": 2, **wrong})


def test_batches_are_fast(tmp_path: Path) -> None:
    """Above what any trainer consumes; 20 million tokens per second on a quiet machine."""
    write_shard(tmp_path / "train_0.bin", np.arange(4_000_000) % 50_000, 50_257)
    split = Split([tmp_path / "train_0.bin"], [shards.read_shard(tmp_path / "train_0.bin")], 50_257)
    batches = Batches(split, 1024, 512)
    seconds = []
    for step in range(5):
        start = time.process_time()  # however busy the machine is
        batches.batch(step, 0, 512)
        seconds.append(time.process_time() - start)
    assert 524_288 / min(seconds) > 2e6


# ----------------------------------------------------------------------------------- validation


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 60),
    st.integers(0, 9),
)
def test_validation_covers_each_target_once(
    lengths: list[int], seq_len: int, batch: int, world: int, max_tokens: int, stride: int
) -> None:
    stride = min(stride, seq_len)
    split = split_of(*lengths)
    expected = [(t - 1, t) for shard in split.shards for t in shard[1:].tolist()]
    expected = expected[: max_tokens or None]
    assert data.validation_targets(split, max_tokens) == len(expected)
    if not expected:
        with pytest.raises(DataError, match="no token to predict"):
            next(data.validation_batches(split, seq_len, batch, ALONE))
        return
    ranks = [
        list(data.validation_batches(split, seq_len, batch, of, max_tokens, stride))
        for of in (World(rank, world, torch.device("cpu")) for rank in range(world))
    ]
    assert len({len(batches) for batches in ranks}) == 1
    pairs = []
    for tokens, targets in (b for batches in ranks for b in batches):
        assert tokens.shape == targets.shape == (batch, seq_len)
        counts = targets >= 0
        pairs += list(zip(tokens[counts].tolist(), targets[counts].tolist(), strict=True))
        assert (targets[~counts] == -1).all()
        if stride in (0, seq_len):
            assert (counts[:, 1:] <= counts[:, :-1]).all(), "padding stands at the end of a row"
        else:
            later = tokens[:, 0] % 1000 > 0  # than the first window of its shard
            assert not counts[later, : seq_len - stride].any()
    assert sorted(pairs) == expected
