"""Proves: a shard, or a directory of them, that is not exactly what it should be is refused with
path, expected and found."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import write_shard

from nanonormuon.data import Batches, validation_batches
from nanonormuon.errors import DataError, exit_code
from nanonormuon.runtime.distributed import ALONE
from nanonormuon.storage import shards
from nanonormuon.storage.shards import Split


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
        entries = []
        for i, n in enumerate(sizes):
            path = tmp_path / f"{split}_{i:06d}.bin"
            tokens = rng.integers(0, 100, n)
            tokens[7] = 99
            write_shard(path, tokens, 100)
            entry = {"name": path.name, "tokens": n, "size": 1024 + 2 * n, "max_token": 99}
            entries.append(entry | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
        manifest[split] = {"documents": 3, "tokens": sum(sizes), "bytes": 4 * sum(sizes)}
        manifest[split]["shards"] = entries
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def refused(directory: Path, says: str, **options: Any) -> None:
    with pytest.raises(DataError, match=says) as caught:
        shards.open_data(directory, **options)
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)
    assert exit_code(caught.value) == 3


# ----------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize(
    ("vocab_size", "version", "dtype"), [(65_536, 1, "<u2"), (65_537, 2, "<u4")]
)
def test_shard_layout(tmp_path: Path, vocab_size: int, version: int, dtype: str) -> None:
    tokens = np.array([0, 1, 258, vocab_size - 1])
    write_shard(tmp_path / "x.bin", tokens, vocab_size)
    raw = (tmp_path / "x.bin").read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:3].tolist() == [20240520, version, 4] and not header[3:].any()
    assert raw[1024:] == tokens.astype(dtype).tobytes()
    shard = shards.read_shard(tmp_path / "x.bin")
    assert shard.tolist() == tokens.tolist() and shard.dtype == dtype
    assert not shard.flags.writeable
    assert names(tmp_path) == ["x.bin"]


def test_ids_outside_the_vocabulary_are_named(tmp_path: Path) -> None:
    tokens = np.zeros(shards.CHUNK + 10, np.int64)
    for wrong in (50, -1):
        tokens[shards.CHUNK + 3] = wrong
        with pytest.raises(
            DataError, match=f"token {shards.CHUNK + 3}: expected an id below 50, found {wrong}"
        ):
            shards.check_ids(tokens, 50, tmp_path / "x.bin")


def put(offset: int, value: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:offset] + value.to_bytes(4, "little", signed=True) + raw[offset + 4 :]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put(0, 20240521), r"expected .*\[20240520, 1 .* found \[20240521, 1, 500\]"),
        (put(4, 3), r"1 \(uint16\) or 2 .* found \[20240520, 3, 500\]"),
        (put(4, 2), r"3024 bytes, found .* and 2024"),
        (put(8, 499), r"2022 bytes, found .* 499\] and 2024"),
        (put(8, 2**31 - 1), r"found \[20240520, 1, 2147483647\]"),
        (put(8, -1), "found .*-1"),
        (lambda raw: raw[:-1], "2024 bytes, found .* and 2023"),
        (lambda raw: raw + b"\0\0", "and 2026"),
        (lambda raw: raw[:1024], "and 1024"),
        (lambda raw: put(4, 3)(raw)[:1024], r"\[20240520, 3, 500\] and 1024"),
        (lambda raw: raw[:100], "1024 bytes, found .* and 100"),
        (lambda raw: b"", r"1024 bytes, found \[\] and 0"),
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
    assert shards.open_data(directory).train.tokens == 800
    os.mkfifo(directory / "manifest.json")
    refused(directory, "regular file")
    (directory / "manifest.json").unlink()
    (directory / "manifest.json").symlink_to(directory / "nothing")
    refused(directory, "regular file")


# ------------------------------------------------------------------------------------ directories


def test_open(directory: Path) -> None:
    opened = shards.open_data(directory)
    assert (opened.train.tokens, opened.val.tokens, opened.vocab_size) == (800, 200, 100)
    assert [path.name for path in opened.train.paths] == ["train_000000.bin", "train_000001.bin"]
    assert (opened.train.bytes, opened.val.bytes) == (3200, 800)
    assert shards.open_data(directory, vocab_size=128).vocab_size == 100
    refused(directory, "expected at most 99 token ids .* found 100", vocab_size=99)


def test_without_manifest(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    for path in list(directory.glob("*.bin")):
        path.rename(directory / f"fineweb_{path.name}")
    opened = shards.open_data(directory, vocab_size=100)
    assert [path.name for path in opened.train.paths] == [
        "fineweb_train_000000.bin",
        "fineweb_train_000001.bin",
    ]
    assert opened.manifest is None and opened.train.bytes is None and opened.vocab_size == 100
    assert shards.open_data(directory).vocab_size is None
    refused(directory, r"000000\.bin: token 7: expected an id below 99, found 99", vocab_size=99)
    (directory / "fineweb_val_000000.bin").unlink()
    refused(directory, "no val split")


def test_headerless_files_of_nanogpt(directory: Path, tmp_path: Path) -> None:
    """With a meta.pkl that would run code, beside a manifest that is not about them."""
    expected = {}
    for split in ("train", "val"):
        tokens = shards.read_shard(directory / f"{split}_000000.bin")
        expected[split] = tokens.tolist()
        (directory / f"{split}.bin").write_bytes(tokens.tobytes())
    (directory / "meta.pkl").write_bytes(b"cos\nsystem\n(S'echo owned'\ntR.")
    opened = shards.open_data(directory, 100, headerless=True)
    assert opened.train.shards[0].tolist() == expected["train"] and opened.manifest is None
    assert opened.val.shards[0].tolist() == expected["val"] and opened.vocab_size == 100
    refused(
        directory, r"train\.bin: token 7: expected an id below 99", vocab_size=99, headerless=True
    )
    for path in directory.glob("*_0*.bin"):
        path.unlink()
    (directory / "manifest.json").unlink()
    refused(directory, r"no train split, expected \*train_\*\.bin; .* data\.format=nanogpt")
    path = directory / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    refused(directory, r"train\.bin: .* found 999 bytes", headerless=True)
    path.write_bytes(b"")
    refused(directory, r"train\.bin: .* found 0 bytes", headerless=True)
    write_shard(path, np.arange(9), 100)
    refused(directory, r"train\.bin: .* begin with \[20240520, .*=shards", headerless=True)
    path.unlink()
    refused(directory, r"no train split, expected train\.bin", headerless=True)


def test_unfinished_preparation(directory: Path) -> None:
    """Its shards may be in place already and look like published ones."""
    (directory / ".partial").mkdir()
    (directory / "manifest.json").rename(directory / ".partial" / "manifest.json")
    refused(directory, "unfinished; run normuon-train prepare again")


def test_missing_directory_says_what_to_run(tmp_path: Path) -> None:
    refused(tmp_path / "no", r"run normuon-train prepare FILE\.\.\. --out")


def test_flipped_byte(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory / "val_000000.bin"
    raw = bytearray(path.read_bytes())
    raw[1100] ^= 1
    path.write_bytes(raw)
    refused(directory, r"val_000000\.bin: sha256: expected .*manifest\.json")
    monkeypatch.setattr(shards, "FULL_CHECK_LIMIT", 0)  # as if the directory were large
    refused(directory, "sha256", verify="full")
    opened = shards.open_data(directory)
    opened.train.files[1].check()
    opened.train.settle()
    opened.val.settle()  # nothing of it was read
    list(validation_batches(opened.val, 10, 20, ALONE))  # one batch
    listed = opened.manifest["val"]["shards"][0]["sha256"]
    says = rf"{path}: sha256: expected {listed} \(manifest\.json\), found {shards.sha256(path)}"
    whole = Split.joined([opened.train, opened.val])  # as in a mixture
    for read in (opened.val.settle, whole.settle, lambda: whole.files[2].check()):
        with pytest.raises(DataError, match=says):
            read()


def test_shards_are_the_listed_ones(directory: Path) -> None:
    extra = directory / "train_000002.bin"
    write_shard(extra, np.array([1, 2, 3]), 100)
    refused(directory, r"train_000002\.bin': found, but not listed")
    extra.unlink()
    (directory / "train_000001.bin").unlink()
    refused(directory, r"train_000001\.bin': missing, but listed")


def shard_field(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda m: m["train"]["shards"][0].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (shard_field("name", "../train_000000.bin"), "missing, but listed"),
        (shard_field("name", "/etc/train_0.bin"), "missing, but listed"),
        (shard_field("name", ".train_0.bin"), "missing, but listed"),
        (shard_field("name", "train_0.bin\n"), "missing, but listed"),
        (shard_field("name", "train_0/../x.bin"), "missing, but listed"),
        (shard_field("name", 3), r"shards\[0\]\.name: expected str, found '3'"),
        (shard_field("size", 10**15), "size: expected 1000000000000000"),
        (shard_field("tokens", 2**62), "tokens: expected int"),
        (shard_field("tokens", True), "tokens: expected int"),
        (shard_field("tokens", 501), "not the sum"),
        (shard_field("max_token", 100), "token id 100 in a vocabulary of 100"),
        (shard_field("sha256", None), "sha256: expected str"),
        (lambda m: m["train"]["shards"].append(m["train"]["shards"][1]), "not the sum"),
        (lambda m: m["train"].update(tokens=10**12), "not the sum"),
        (lambda m: m["train"].update(shards={}), "shards: expected list"),
        (lambda m: m.update(format=2), "expected format 1, found 2"),
        (lambda m: m.pop("tokenizer"), "tokenizer: expected dict, found 'None'"),
        (lambda m: m.pop("val"), "val: expected dict"),
        (lambda m: m["val"].update(tokens=0, shards=[]), "found, but not listed"),
        (lambda m: m["tokenizer"].update(eot=100), "eot < vocab_size"),
        (lambda m: m["tokenizer"].update(vocab_size=10**12), "eot < vocab_size <= 2"),
        (lambda m: m.update(sha256=None), "expected sha256 None"),
        (lambda m: m.update(sources=[{"name": "a"}]), r"sources\[0\]\.documents: expected int"),
        (lambda m: m.update(sources=0.5), "sources: expected list"),
    ],
)
def test_manifest_is_checked(directory: Path, change: Callable[[Any], Any], says: str) -> None:
    edit(directory, change)
    refused(directory, says)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The way to each number, string and list in a manifest."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    nested = [(key, item) for key, item in items if isinstance(item, dict | list)]
    below = [place for key, item in nested for place in places(item, (*path, key))]
    return [
        (*path, key) for key in (value if isinstance(value, dict) else range(len(value)))
    ] + below


def test_any_change_of_a_sealed_manifest_is_refused(directory: Path) -> None:
    """Of one that `prepare` writes now: whatever else is checked of a value."""
    original = json.loads((directory / "manifest.json").read_text())
    original |= {
        "copies": 3,
        "sources": [{"name": "é", "documents": 3, "bytes": 9}],
        "request": {"val": 0.02},
    }
    original["sha256"] = shards.digest(original)
    path = directory / "manifest.json"
    path.write_text(json.dumps(original))
    assert shards.open_data(directory).val.bytes == 800
    for place in places(original):
        changed = json.loads(path.read_text())
        node = changed
        for key in place[:-1]:
            node = node[key]
        value = node[place[-1]]
        node[place[-1]] = 10 * value if isinstance(value, int | float) else None
        (directory / "changed").mkdir(exist_ok=True)
        (directory / "changed" / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match=r"manifest\.json: "):
            shards.read_manifest(directory / "changed")


@pytest.mark.parametrize("key", ["hash", "vocab_size", "eot", "val.bytes"])
def test_an_older_manifest_is_compared_with_its_tokenizer(directory: Path, key: str) -> None:
    class Words:
        hash, vocab_size, eot = "0", 100, 99
        lengths = np.where(np.arange(100) == 99, 0, 4)

    lengths = Words.lengths
    text_bytes = int(lengths[shards.open_data(directory).val.shards[0]].sum())
    text_bytes -= int(lengths[shards.open_data(directory).val.shards[0][0]])
    edit(directory, lambda m: m["val"].update(bytes=text_bytes))
    shards.open_data(directory).check_tokenizer(Words())
    if key == "val.bytes":
        edit(directory, lambda m: m["val"].update(bytes=10 * text_bytes))
    else:
        setattr(Words, key, 55)
    with pytest.raises(DataError, match=f"{key}: expected .*manifest.*, found "):
        shards.open_data(directory).check_tokenizer(Words())
    for path in directory.glob("*.json"):
        path.unlink()
    shards.open_data(directory).check_tokenizer(Words())


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 100_000, "\xff", '{"format": NaN}'])
def test_manifest_that_is_no_object(directory: Path, content: str) -> None:
    (directory / "manifest.json").write_text(content, encoding="latin-1")
    refused(directory, r"manifest\.json: ")


def test_fingerprint_follows_the_tokens(directory: Path) -> None:
    first = shards.open_data(directory).fingerprint
    edit(directory, lambda m: m.update(tool="other", sources=[]))
    assert shards.open_data(directory).fingerprint == first
    write_shard(directory / "val_000000.bin", np.full(200, 99), 100)
    sha256 = shards.sha256(directory / "val_000000.bin")
    edit(directory, lambda m: m["val"]["shards"][0].update(sha256=sha256))
    second = shards.open_data(directory).fingerprint
    (directory / "manifest.json").unlink()
    third = shards.open_data(directory).fingerprint
    assert len({first, second, third}) == 3


def test_batch_checks_ids_and_files(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    opened = shards.open_data(directory)
    opened.train.vocab_size = 99
    batches = Batches(opened.train, 10, 76, 0)  # one epoch: 49 + 29 windows, the first 76 of them
    with pytest.raises(
        DataError, match=r"train_00000\d\.bin: token \d+: expected an id below 99, found 99"
    ):
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
