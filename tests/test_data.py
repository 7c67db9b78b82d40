"""Proves: a shard that is not exactly what it should be is refused with path, expected and found;
the shuffled order visits every window once per epoch, the sequential order is modded-nanogpt's, and
neither depends on how a step is cut into ranks and micro-batches; validation covers each target
exactly once on any number of ranks.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanonormuon import data
from nanonormuon.data import Batches, DataError, Split


def split_of(*lengths: int, vocab_size: int | None = None) -> Split:
    """Shards in memory whose tokens count on: shard i holds 1000 i, 1000 i + 1, ..."""
    shards = [np.arange(n, dtype=np.uint16) + np.uint16(1000 * i) for i, n in enumerate(lengths)]
    return Split([Path(f"none/train_{i}.bin") for i in range(len(lengths))], shards, vocab_size)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two train shards and one val shard over 100 ids, with their manifest."""
    rng = np.random.default_rng(0)
    manifest: dict[str, Any] = {
        "format": 1,
        "tool": "test",
        "tokenizer": {"name": "t", "hash": "0", "vocab_size": 100, "eot": 99},
    }
    for split, sizes in (("train", [500, 300]), ("val", [200])):
        shards = []
        for i, n in enumerate(sizes):
            path = tmp_path / f"{split}_{i:06d}.bin"
            tokens = rng.integers(0, 100, n)
            tokens[7] = 99
            data.write_shard(path, tokens, 100)
            entry = {"name": path.name, "tokens": n, "size": 1024 + 2 * n, "max_token": 99}
            shards.append(entry | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
        manifest[split] = {"documents": 3, "tokens": sum(sizes), "bytes": 4 * sum(sizes)}
        manifest[split]["shards"] = shards
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def refused(directory: Path, says: str, **options: Any) -> None:
    with pytest.raises(DataError, match=says) as caught:
        data.open_data(directory, **options)
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


# ----------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize(
    ("vocab_size", "version", "dtype"), [(65_536, 1, "<u2"), (65_537, 2, "<u4")]
)
def test_shard_layout(tmp_path: Path, vocab_size: int, version: int, dtype: str) -> None:
    tokens = np.array([0, 1, 258, vocab_size - 1])
    data.write_shard(tmp_path / "x.bin", tokens, vocab_size)
    raw = (tmp_path / "x.bin").read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:3].tolist() == [20240520, version, 4] and not header[3:].any()
    assert raw[1024:] == tokens.astype(dtype).tobytes()
    shard = data.read_shard(tmp_path / "x.bin")
    assert shard.tolist() == tokens.tolist() and shard.dtype == dtype
    assert not shard.flags.writeable
    assert names(tmp_path) == ["x.bin"]


def test_write_refuses_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    tokens = np.zeros(data.CHUNK + 10, np.int64)
    for wrong in (50, -1):
        tokens[data.CHUNK + 3] = wrong
        with pytest.raises(
            DataError, match=f"token {data.CHUNK + 3}: id below 50 .* {wrong} found"
        ):
            data.write_shard(tmp_path / "x.bin", tokens, 50)
    with pytest.raises(DataError, match="vector"):
        data.write_shard(tmp_path / "x.bin", np.zeros(3), 50)
    assert names(tmp_path) == []


def test_interrupted_write_leaves_the_old_shard(tmp_path: Path, monkeypatch: Any) -> None:
    data.write_shard(tmp_path / "x.bin", np.array([1, 2]), 50)

    def fail(_: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        data.write_shard(tmp_path / "x.bin", np.array([3]), 50)
    assert names(tmp_path) == ["x.bin"]
    assert data.read_shard(tmp_path / "x.bin").tolist() == [1, 2]


def put(offset: int, value: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:offset] + value.to_bytes(4, "little", signed=True) + raw[offset + 4 :]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put(0, 20240521), "20240520 expected, 20240521 found"),
        (put(4, 3), "version 1 or 2 expected, 3 found"),
        (put(4, 2), "500 tokens make a file of 3024 bytes, found 2024"),
        (put(8, 499), "499 tokens make a file of 2022 bytes, found 2024"),
        (put(8, 2**31 - 1), "2147483647 tokens make a file of"),
        (put(8, -1), "-1 tokens"),
        (lambda raw: raw[:-1], "found 2023"),
        (lambda raw: raw + b"\0\0", "found 2026"),
        (lambda raw: raw[:1024], "found 1024"),
        (lambda raw: raw[:100], "100 bytes, a shard's header alone has 1024"),
        (lambda raw: b"", "0 bytes"),
    ],
)
@pytest.mark.parametrize("with_manifest", [True, False])
def test_damaged_shard(
    directory: Path, change: Callable[[bytes], bytes], says: str, with_manifest: bool
) -> None:
    if not with_manifest:
        (directory / "manifest.json").unlink()
    path = directory / "train_000000.bin"
    path.write_bytes(change(path.read_bytes()))
    refused(directory, rf"train_000000\.bin: .*{says}")


def test_not_a_regular_file(directory: Path) -> None:
    path = directory / "train_000000.bin"
    path.rename(directory / "elsewhere")
    path.symlink_to(directory / "elsewhere")
    refused(directory, "symbolic link")
    path.unlink()
    os.mkfifo(path)  # opening it would wait for ever
    refused(directory, "not a regular file")
    path.unlink()
    (directory / "manifest.json").unlink()
    path.symlink_to(directory / "elsewhere")  # as in a Hugging Face cache
    assert data.open_data(directory).train.tokens == 800
    os.mkfifo(directory / "manifest.json")
    refused(directory, "regular file")
    (directory / "manifest.json").unlink()
    (directory / "manifest.json").symlink_to(directory / "nothing")
    refused(directory, "regular file")


# ------------------------------------------------------------------------------------ directories


def test_open(directory: Path) -> None:
    opened = data.open_data(directory)
    assert (opened.train.tokens, opened.val.tokens, opened.vocab_size) == (800, 200, 100)
    assert opened.train.names == ["train_000000.bin", "train_000001.bin"]
    assert (opened.train.bytes, opened.val.bytes) == (3200, 800)
    assert data.open_data(directory, vocab_size=128).vocab_size == 100
    refused(directory, "prepared for 100 token ids, the model has 99", vocab_size=99)


def test_without_manifest(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    for path in list(directory.glob("*.bin")):
        path.rename(directory / f"fineweb_{path.name}")
    opened = data.open_data(directory, vocab_size=100)
    assert opened.train.names == ["fineweb_train_000000.bin", "fineweb_train_000001.bin"]
    assert opened.manifest is None and opened.train.bytes is None and opened.vocab_size == 100
    assert data.open_data(directory).vocab_size is None
    refused(directory, r"000000\.bin: token 7: id below 99 expected, 99 found", vocab_size=99)
    (directory / "fineweb_val_000000.bin").unlink()
    refused(directory, "no val split")


def test_unfinished_preparation(directory: Path) -> None:
    """Its shards may be in place already and look like published ones."""
    (directory / ".partial").mkdir()
    (directory / "manifest.json").rename(directory / ".partial" / "manifest.json")
    refused(directory, "unfinished preparation; run normuon-train prepare again")


def test_missing_directory_says_what_to_run(tmp_path: Path) -> None:
    refused(tmp_path / "no", r"run normuon-train prepare FILE\.\.\. --out")


def test_flipped_byte(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory / "val_000000.bin"
    raw = bytearray(path.read_bytes())
    raw[1100] ^= 1
    path.write_bytes(raw)
    refused(directory, r"val_000000\.bin: sha256 .* expected by manifest\.json")
    monkeypatch.setattr(data, "FULL_CHECK_LIMIT", 0)  # as if the directory were large
    data.open_data(directory)
    refused(directory, "sha256", verify="full")


def test_shards_are_the_listed_ones(directory: Path) -> None:
    extra = directory / "train_000002.bin"
    data.write_shard(extra, np.array([1, 2, 3]), 100)
    refused(directory, r"train_000002\.bin: here, but not listed")
    extra.unlink()
    (directory / "train_000001.bin").unlink()
    refused(directory, r"train_000001\.bin: missing, but listed")


def shard_field(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda m: m["train"]["shards"][0].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (shard_field("name", "../train_000000.bin"), "no shard's name"),
        (shard_field("name", "/etc/train_0.bin"), "no shard's name"),
        (shard_field("name", ".train_0.bin"), "no shard's name"),
        (shard_field("name", "train_0.bin\n"), "no shard's name"),
        (shard_field("name", "train_0/../x.bin"), "no shard's name"),
        (shard_field("name", 3), r"shards\[0\]\.name: str expected, '3' found"),
        (shard_field("size", 10**15), "size 1000000000000000 expected"),
        (shard_field("tokens", 2**62), "tokens: int expected"),
        (shard_field("tokens", True), "tokens: int expected"),
        (shard_field("tokens", 501), "not the sum"),
        (shard_field("max_token", 100), "token id 100 in a vocabulary of 100"),
        (shard_field("sha256", None), "sha256: str expected"),
        (lambda m: m["train"]["shards"].reverse(), "name order"),
        (lambda m: m["train"]["shards"].append(m["train"]["shards"][1]), "name order"),
        (lambda m: m["train"].update(tokens=10**12), "not the sum"),
        (lambda m: m["train"].update(shards={}), "shards: list expected"),
        (lambda m: m.update(format=2), "format 1 expected, 2 found"),
        (lambda m: m.pop("tokenizer"), "tokenizer: dict expected, 'None' found"),
        (lambda m: m.pop("val"), "val: dict expected"),
        (lambda m: m["val"].update(tokens=0, shards=[]), "here, but not listed"),
    ],
)
def test_manifest_is_checked(directory: Path, change: Callable[[Any], Any], says: str) -> None:
    edit(directory, change)
    refused(directory, says)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 100_000, "\xff", '{"format": NaN}'])
def test_manifest_that_is_no_object(directory: Path, content: str) -> None:
    (directory / "manifest.json").write_text(content, encoding="latin-1")
    refused(directory, r"manifest\.json: ")


def test_fingerprint_follows_the_tokens(directory: Path) -> None:
    first = data.open_data(directory).fingerprint
    edit(directory, lambda m: m.update(tool="other", sources=[]))
    assert data.open_data(directory).fingerprint == first
    data.write_shard(directory / "val_000000.bin", np.full(200, 99), 100)
    sha256 = data.sha256(directory / "val_000000.bin")
    edit(directory, lambda m: m["val"]["shards"][0].update(sha256=sha256))
    second = data.open_data(directory).fingerprint
    (directory / "manifest.json").unlink()
    third = data.open_data(directory).fingerprint
    assert len({first, second, third}) == 3


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
    n = batches.windows_per_epoch
    assert n == len(windows)
    steps = -(-3 * n // sequences)
    stream = [tuple(w) for step in range(steps) for w in batches.windows(step).tolist()]
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == windows
    assert batches.epoch(steps) == steps * sequences / n


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
        with pytest.raises(DataError, match=f"shard of {size + 2} tokens"):
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


def test_batch_checks_ids_and_files(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    opened = data.open_data(directory)
    opened.train.vocab_size = 99
    batches = Batches(opened.train, 10, 76, 0)  # one epoch: 49 + 29 windows, the first 76 of them
    with pytest.raises(DataError, match=r"train_00000\d\.bin: token \d+: id below 99 .* 99 found"):
        for step in range(2):
            batches.batch(step, 0, 76)
    opened.train.vocab_size = 100
    batches.batch(0, 0, 76)
    path = opened.train.paths[1]
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match=r"train_000001\.bin: changed while in use"):
        batches.batch(0, 0, 76)
    path.unlink()
    with pytest.raises(DataError, match=r"train_000001\.bin: changed while in use"):
        batches.batch(0, 0, 76)


@pytest.mark.parametrize("wrong", [{"seq_len": 0}, {"sequences": 0}, {"order": "random"}])
def test_bad_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"{next(iter(wrong))}="):
        Batches(split_of(100), **{"seq_len": 5, "sequences": 2, **wrong})


def test_batches_are_fast(tmp_path: Path) -> None:
    """Well above what any trainer consumes; 20 million tokens per second on a quiet machine."""
    data.write_shard(tmp_path / "train_0.bin", np.arange(4_000_000) % 50_000, 50_257)
    split = Split([tmp_path / "train_0.bin"], [data.read_shard(tmp_path / "train_0.bin")], 50_257)
    batches = Batches(split, 1024, 512)
    seconds = []
    for step in range(5):
        start = time.perf_counter()
        batches.batch(step, 0, 512)
        seconds.append(time.perf_counter() - start)
    assert 524_288 / min(seconds) > 5e6


# ----------------------------------------------------------------------------------- validation


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 60),
)
def test_validation_covers_each_target_once(
    lengths: list[int], seq_len: int, batch: int, world: int, max_tokens: int
) -> None:
    split = split_of(*lengths)
    expected = [(t - 1, t) for shard in split.shards for t in shard[1:].tolist()]
    expected = expected[: max_tokens or None]
    assert data.validation_targets(split, max_tokens) == len(expected)
    if not expected:
        with pytest.raises(DataError, match="no token to predict"):
            next(data.validation_batches(split, seq_len, batch))
        return
    ranks = [
        list(data.validation_batches(split, seq_len, batch, rank, world, max_tokens))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    pairs = []
    for tokens, targets in (b for batches in ranks for b in batches):
        assert tokens.shape == targets.shape == (batch, seq_len)
        counts = targets >= 0
        pairs += list(zip(tokens[counts].tolist(), targets[counts].tolist(), strict=True))
        assert (targets[~counts] == -1).all()
        assert (counts[:, 1:] <= counts[:, :-1]).all(), "padding stands at the end of a row"
    assert sorted(pairs) == expected
