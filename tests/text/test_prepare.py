"""Proves: what comes out is the text that went in, with the promised counts, hashes and split; a
rerun gives the same bytes; an interruption at any file operation leaves nothing that loads and
nothing that is in the way; other people's files are not touched; bad input is named.
"""

import csv
import errno
import gzip
import hashlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import prepare_cutting
from test_tokenizer import trained

from nanonormuon import errors
from nanonormuon.errors import DataError
from nanonormuon.storage import files, shards
from nanonormuon.text import bpe as bpe_module
from nanonormuon.text import builtin, encode, inspection, sources, tokenizer
from nanonormuon.text import prepare as module
from nanonormuon.text.prepare import prepare
from nanonormuon.text.sources import Document, documents

SHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained tokenizer, for processes that must not train one."""
    path = tmp_path_factory.mktemp("bpe")
    tokenizer.get("bpe:400", [Path(os.__file__).read_bytes()]).save(path)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """120 small text files in two directories, and things that a walk passes over."""
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    for i in range(120):
        folder = root / "sub" if i % 3 else root
        (folder / f"{i:03d}.txt").write_text(f"Document {i}: " + "text é 字 " * i + "\n")
    (root / "empty.txt").touch()
    (root / "binary.txt").write_bytes(b"abc\0def")
    (root / "latin.txt").write_bytes("déjà vu, à peu près".encode("latin-1"))
    (root / "picture.png").write_bytes(b"not text by its name")
    (root / ".hidden.txt").write_text("hidden")
    (root / ".git").mkdir()
    (root / ".git" / "x.txt").write_text("hidden")
    return root


def texts(out: Path, split: str) -> list[bytes]:
    """The documents of a prepared split, decoded."""
    opened = shards.open_data(out, verify="full")
    words = tokenizer.load(out)
    ids = np.concatenate(getattr(opened, split).shards)
    starts = np.flatnonzero(ids == words.eot).tolist()
    assert starts[0] == 0, "a document begins with <|endoftext|>"
    ends = [*starts[1:], len(ids)]
    return [words.decode_bytes(ids[a + 1 : b]) for a, b in zip(starts, ends, strict=True)]


def content(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize("spec", ["byte", "bpe:400"])
def test_what_goes_in_comes_out(corpus: Path, tmp_path: Path, spec: str) -> None:
    out = tmp_path / "out"
    manifest = prepare([corpus], out, tokenizer=spec, val=0.2, shard_bytes=5000)
    files = {p.read_bytes() for p in corpus.rglob("*.txt") if p.stem.isdigit()}
    expected: dict[str, list[bytes]] = {"train": [], "val": []}
    for text in files:
        fraction = int(hashlib.sha256(text).hexdigest()[:16], 16) / 16**16
        expected["val" if fraction < 0.2 else "train"].append(text)
    assert 10 < len(expected["val"]) < 40
    for split, wanted in expected.items():
        found = texts(out, split)
        assert sorted(found) == sorted(wanted)
        entry = manifest[split]
        assert (entry["documents"], entry["bytes"]) == (len(wanted), len(b"".join(wanted)))
        assert len(entry["shards"]) > 1
        for shard in entry["shards"]:
            raw = (out / shard["name"]).read_bytes()
            tokens = np.frombuffer(raw[1024:], "<u2")
            assert shard["sha256"] == hashlib.sha256(raw).hexdigest()
            assert (shard["size"], shard["tokens"]) == (len(raw), len(tokens))
            assert shard["max_token"] == tokens.max()
        assert max(s["max_token"] for s in entry["shards"]) == manifest["tokenizer"]["eot"]
        for shard in getattr(shards.open_data(out), split).shards:
            assert shard[0] == manifest["tokenizer"]["eot"], "a shard begins with a document"
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert manifest["tokenizer"]["hash"] == tokenizer.load(out).hash
    (source,) = manifest["sources"]
    assert (source["name"], source["documents"]) == ("corpus", 120)
    assert str(tmp_path) not in (out / "manifest.json").read_text()
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".bin") == [
        "manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_same_bytes_from_other_places_and_batches(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare([corpus], tmp_path / "a", tokenizer="bpe:400")
    moved = tmp_path / "elsewhere" / "corpus"
    shutil.copytree(corpus, moved)
    monkeypatch.setattr(encode, "JOB_SIZE", 100)
    monkeypatch.setattr(bpe_module, "PIECE", 50)
    prepare([moved], tmp_path / "b", tokenizer="bpe:400")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_split_is_stable_when_files_are_added(corpus: Path, tmp_path: Path) -> None:
    prepare([corpus], tmp_path / "a", tokenizer="byte", val=0.3)
    (corpus / "000new.txt").write_text("something else")
    prepare([corpus], tmp_path / "b", tokenizer="byte", val=0.3)
    new = {b"something else"}
    for split in ("train", "val"):
        before, after = texts(tmp_path / "a", split), texts(tmp_path / "b", split)
        assert set(after) - set(before) <= new and set(before) <= set(after)
    assert new <= {*texts(tmp_path / "b", "train"), *texts(tmp_path / "b", "val")}


@pytest.mark.parametrize("val", [0.1, 0.02])
def test_one_file_is_cut_as_nanogpt_cuts(
    tmp_path: Path, val: float, caplog: pytest.LogCaptureFixture
) -> None:
    if not SHAKESPEARE.exists():
        pytest.skip(f"needs {SHAKESPEARE}")
    caplog.set_level(logging.INFO)
    manifest = prepare([SHAKESPEARE], tmp_path / "out", tokenizer="byte", val=val)
    text = SHAKESPEARE.read_bytes()
    cut = int(len(text) * (1 - val))
    assert texts(tmp_path / "out", "train") == [text[:cut]]
    assert texts(tmp_path / "out", "val") == [text[cut:]]
    assert manifest["method"] == "tail of the longest document"
    assert sum("tinyshakespeare" in r.message for r in caplog.records) == 1


def test_tail_counts_characters_and_keeps_invalid_bytes(tmp_path: Path) -> None:
    text = "字".encode() * 3000 + b"\xff" + "é".encode() * 999
    (tmp_path / "x").write_bytes(text)
    prepare([tmp_path / "x"], tmp_path / "out", tokenizer="byte", val=0.25)
    assert texts(tmp_path / "out", "train") == ["字".encode() * 3000]
    assert texts(tmp_path / "out", "val") == [b"\xff" + "é".encode() * 999]


def test_few_files_keep_the_others_whole(tmp_path: Path) -> None:
    for name, text in (("a", "short"), ("b", "the longest of them"), ("c", "short")):
        (tmp_path / name).write_text(text)
    sources = [tmp_path / name for name in "abc"]
    prepare(sources, tmp_path / "out", tokenizer="byte", val=1e-9)
    assert texts(tmp_path / "out", "train") == [b"short", b"the longest of the", b"short"]
    assert texts(tmp_path / "out", "val") == [b"m"]
    (tmp_path / "a").write_text("x")
    with pytest.raises(DataError, match="1 characters cannot be split"):
        prepare([tmp_path / "a"], tmp_path / "one", tokenizer="byte")


def records(sizes: list[int], source: int = 0, seed: str = "") -> list[Document]:
    """Documents of these sizes, each of its own letters."""
    texts = (hashlib.sha256(f"{seed}{source} {i}".encode()).hexdigest() for i in range(len(sizes)))
    data = [(text * (size // 64 + 1))[:size].encode() for text, size in zip(texts, sizes)]
    return [Document(f"{source}/{i}", source, text) for i, text in enumerate(data)]


SHAPES = {  # documents' sizes in each source
    "a large file and lines": [[550_000], [450] * 1000],
    "two files": [[900_000], [200_000]],
    "a directory with one large file": [[550_000, *[450] * 1000]],
    "a file in parts": [[200_000] * 15],
    "some dozens": [[9_000] * 40],
    "few": [[20_000] * 12],
    "one file": [[500_000]],
}


@pytest.mark.parametrize("val", [0.02, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_validation_has_its_share_of_every_source(shape: str, val: float) -> None:
    """Whatever the texts; each document is on one side, or cut at the end as its copies are."""
    for seed in "abc":
        sources = [records(sizes, i, seed) for i, sizes in enumerate(SHAPES[shape])]
        copied = max((d.data for d in sources[0]), key=len)
        sources.append([Document("copy", len(sources), copied)])
        documents = list(chain.from_iterable(sources))
        survey = module.Survey(lambda d=documents: d, [str(i) for i in range(len(sources))], val)
        found = list(survey.split())
        for i, source in enumerate(sources):
            held_out = sum(len(d.data) for side, d in found if side == "val" and d.source == i)
            share = held_out / sum(len(d.data) for d in source)
            if i < len(sources) - 1 or len(source[0].data) > 256 / val:
                assert val / 2.1 <= share <= 2.1 * val, (shape, seed, i, share)
        sides = [{d.data for side, d in found if side == name} for name in ("train", "val")]
        assert not sides[0] & sides[1]
        assert b"".join(d.data for _, d in found) == b"".join(d.data for d in documents)


def test_hashes_alone_split_the_demo_and_small_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they did for the published figures."""
    documents = records([90_000, *[1000] * 900])
    survey = module.Survey(lambda: documents, ["x"], 0.02, whole=True)
    small = module.Survey(lambda: records([1000] * 900), ["x"], 0.02)
    assert survey.method == small.method == "hash of each document"
    asked: list[Any] = []
    monkeypatch.setitem(builtin.BUILTIN, "builtin:stdlib", (lambda: iter(documents[:9]), 0.2))
    monkeypatch.setattr(builtin, "prepare_documents", lambda *_, **options: asked.append(options))
    builtin.builtin_data("builtin:stdlib", "byte")
    assert asked == [{"whole": True}]


def test_splits_that_are_too_small_are_named(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):  # when it is made, and when it is kept
        manifest = prepare([corpus], tmp_path / "out", tokenizer="byte")
    found = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    tokens = manifest["val"]["tokens"]
    assert len(found) == 2 and found[0] == found[1]
    assert f"val: {tokens:,} tokens are too few" in found[0] and "10,000" in found[0]


@pytest.mark.parametrize(
    ("train", "val", "advice"),
    [(190_000, 4_000, "--val 0.06"), (20_000, 400, "add text")],
)
def test_what_would_make_a_small_validation_split_larger_is_named(train, val, advice) -> None:
    (line,) = shards.too_few(train=train, val=val)
    assert line.startswith("val: ") and advice in line


@pytest.mark.parametrize("there", ["notes.md", ".partial/notes.md", ".partial", "sub/notes.md"])
def test_a_directory_with_other_files_is_refused(there: str, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / there).parent.mkdir(parents=True)
    (out / there).write_text("precious")
    (out / ".download").touch()  # hidden files are in nobody's way
    with pytest.raises(DataError, match=f"{out / there.partition('/')[0]}: not made by"):
        prepare([corpus], out, tokenizer="byte")
    assert (out / there).read_text() == "precious"
    (out / there).unlink()
    for folder in {out / there, (out / there).parent} - {out, out / there}:
        folder.rmdir()
    prepare([corpus], out, tokenizer="byte")


def test_large_vocabulary_uses_version_2(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte = tokenizer.get("byte")
    words = bpe_module.BPE("wide", byte.pattern, byte.ranks, 70_000)
    words.save(tmp_path / "wide")
    manifest = prepare([corpus], tmp_path / "out", tokenizer=tmp_path / "wide")
    assert manifest["tokenizer"]["vocab_size"] == 70_001
    assert shards.open_data(tmp_path / "out").train.shards[0].dtype == np.uint32
    assert len(texts(tmp_path / "out", "train")) == manifest["train"]["documents"]


def test_a_tokenizer_whose_tokens_are_no_bytes(corpus: Path, tmp_path: Path) -> None:
    path, _ = trained("llama2", tmp_path)
    (corpus / "latin.txt").unlink()
    manifest = prepare([corpus], tmp_path / "out", tokenizer=path, val=0.2, shard_bytes=5000)
    words = tokenizer.load(tmp_path / "out")
    assert words.hash == manifest["tokenizer"]["hash"] == tokenizer.get(path).hash
    files = {p.read_bytes() for p in corpus.rglob("*.txt") if p.stem.isdigit()}
    assert {*texts(tmp_path / "out", "train"), *texts(tmp_path / "out", "val")} == files
    data = shards.open_data(tmp_path / "out")
    assert data.val.text_bytes(words, 100) is None
    found = inspection.inspect(tmp_path / "out")
    assert all("too few" in p for p in found["problems"]) and found["train"]["bytes_per_token"] > 0
    (corpus / "sub" / "bad.txt").write_bytes(b"x" * 5000 + b"\xff and more")
    with pytest.raises(DataError, match=r"sub/bad\.txt: offset 5000: byte 0xff is not UTF-8"):
        prepare([corpus], tmp_path / "b", tokenizer=path)
    assert list((tmp_path / "b").iterdir()) == []


def test_named_files_and_bad_sources(corpus: Path, tmp_path: Path) -> None:
    picture, hidden = corpus / "picture.png", corpus / ".hidden.txt"
    assert [d.name for d in documents([picture, hidden])] == [str(picture), str(hidden)]
    for name, says in (
        ("binary.txt", r"binary\.txt: offset 3: expected UTF-8 text, found byte 0x00"),
        ("latin.txt", r"latin\.txt: offset 1: expected UTF-8 text, found byte 0xe9"),
        ("picture.pgn", r"picture\.pgn: no such file"),
        ("empty.txt", "no text found"),
    ):
        with pytest.raises(DataError, match=says):
            prepare([corpus / name], tmp_path / "out", tokenizer="byte")
    with pytest.raises(DataError, match="--val 0"):
        prepare([corpus], tmp_path / "out", val=0.0)
    for spec, says in (
        ("gtp2", "did you mean gpt2"),
        ("bpe:99", "expected 257"),
        ("bpe:x", "bpe:N"),
        ("bpe:10000000", "to 9999999"),
    ):
        with pytest.raises(errors.TokenizerError, match=says):
            prepare([corpus], tmp_path / "out", tokenizer=spec)
    assert not (tmp_path / "out").exists()


def test_walk(
    corpus: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    (corpus / "out").mkdir()
    (corpus / "out" / "x.txt").write_text("own output")
    (corpus / "linked").symlink_to(corpus / "sub")
    names = [d.name for d in documents([corpus], corpus / "out", log_passed=True)]
    assert names == sorted(names) and len(names) == 120 and str(corpus / "sub/001.txt") in names
    says = caplog.text
    assert "read 120 .txt" in says and f"1 linked directories ({corpus / 'linked'})" in says
    for kind in ("2 hidden", "2 not text", "1 empty", "1 of no known format, .png", "1 the output"):
        assert kind in says

    def refuse(folder: Path, iterdir: Any = Path.iterdir) -> Any:
        if folder == corpus / "sub":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=rf"{corpus / 'sub'}: cannot be read: Permission denied"):
        list(documents([corpus]))


def test_few_invalid_bytes_are_kept(tmp_path: Path) -> None:
    text = b"mostly text. " * 200 + b"\xff" + b" and more" * 50
    (tmp_path / "x").write_bytes(text)
    prepare([tmp_path / "x"], tmp_path / "out", tokenizer="bpe:300")
    assert b"".join(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")) == text


def test_same_preparation_is_reused_and_another_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = prepare([corpus], out, tokenizer="bpe:300")
    times = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert prepare([corpus], out, tokenizer="bpe:300") == first
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == times
    with pytest.raises(DataError, match=r"already holds .*tokenizer: bpe:300, now bpe:301"):
        prepare([corpus], out, tokenizer="bpe:301")
    with pytest.raises(DataError, match=r"val: 0\.02, now 0\.5"):
        prepare([corpus], out, tokenizer="bpe:300", val=0.5)
    (corpus / "000.txt").write_text("changed")
    with pytest.raises(DataError, match="sources differ"):
        prepare([corpus], out, tokenizer="bpe:300")
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == times
    inside = [str(corpus / "**" / "*[!yn].*")], corpus / "out", "byte"
    os.remove(corpus / "binary.txt"), os.remove(corpus / "latin.txt")
    assert prepare(*inside) == prepare(*inside)  # its output is not taken for a source


def test_damaged_output_is_not_reused(corpus: Path, tmp_path: Path) -> None:
    prepare([corpus], tmp_path / "out", tokenizer="byte")
    path = tmp_path / "out" / "train_000000.bin"
    raw = bytearray(path.read_bytes())
    raw[2000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"remove it or choose another --out: .*sha256"):
        prepare([corpus], tmp_path / "out", tokenizer="byte")
    raw[2000] ^= 1
    path.write_bytes(raw)
    prepare([corpus], tmp_path / "out", tokenizer="byte")
    tokenizer.get("bpe:300", ["some text"]).save(tmp_path / "out")
    with pytest.raises(DataError, match=r"hash: expected .*manifest\.json"):
        prepare([corpus], tmp_path / "out", tokenizer="byte")


@pytest.mark.parametrize("name", ["fineweb_train_000001.bin", "val_9.bin", "tokenizer.json"])
def test_other_peoples_files_are_left_alone(corpus: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(b"precious")
    with pytest.raises(DataError, match=f"{name}: not made by"):
        prepare([corpus], out, tokenizer="byte")
    assert content(out) == {name: b"precious"}


class Killed(BaseException):
    """Stands for the process ending: nothing may catch it and carry on."""


def test_interrupted_anywhere(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop at the n-th write, sync, rename or removal, for every n; then run again."""
    clean = tmp_path / "clean"
    prepare([corpus], clean, tokenizer="byte", val=0.2, shard_bytes=40_000)
    wanted = content(clean)
    left, stopped = 0, False

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left, stopped
            left -= 1
            if left == 0:
                stopped = True
            if stopped:  # the process is gone, so no clean-up happens either
                raise Killed
            return original(*args, **kwargs)

        return call

    steps = 0
    while True:
        out = tmp_path / f"out{steps}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", counted(os.fsync))
            patch.setattr(Path, "replace", counted(Path.replace))
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(Path, "rmdir", counted(Path.rmdir))
            patch.setattr(Path, "mkdir", counted(Path.mkdir))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            left, stopped = steps + 1, False
            try:
                prepare([corpus], out, tokenizer="byte", val=0.2, shard_bytes=40_000)
                break
            except Killed:
                pass
        if (out / "manifest.json").exists():
            shards.open_data(out, verify="full")  # the last step was done, so all of them were
        else:
            with pytest.raises(
                DataError, match=r"no such data directory|unfinished|no train split"
            ):
                shards.open_data(out)
        prepare([corpus], out, tokenizer="byte", val=0.2, shard_bytes=40_000)
        assert content(out) == wanted
        steps += 1
    assert steps > 12


def test_a_run_that_stopped_while_it_moved_files(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next finishes the move, and keeps the data whatever is asked for."""
    out, original = tmp_path / "out", Path.replace
    wanted = prepare([corpus], tmp_path / "clean", tokenizer="byte", shard_bytes=5000)

    def stop_at_manifest(self: Path, target: Path) -> Path:
        if self.name == "manifest.json":
            raise Killed
        return original(self, target)

    for again in ({"shard_bytes": 5000}, {}):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", stop_at_manifest)
            with pytest.raises(Killed):
                prepare([corpus], out, tokenizer="byte", shard_bytes=5000)
        with pytest.raises(DataError, match="unfinished"):
            shards.open_data(out)
        if again:
            assert prepare([corpus], out, tokenizer="byte", **again) == wanted
        else:
            with pytest.raises(DataError, match=r"already holds .*shard_bytes: 5000, now"):
                prepare([corpus], out, tokenizer="byte")
        assert content(out) == content(tmp_path / "clean")
        shutil.rmtree(out)


def mixed(root: Path, megabytes: float) -> Path:
    """A folder of every format, with an empty file, invalid UTF-8, and a long repetitive text."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    root.mkdir()
    found = [d.data.decode() for d in islice(builtin.python_sources(), 400)]
    for i in range(40):
        (root / f"{i}.txt").write_text(found[i])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in found[40:160])
    (root / "records.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(pyarrow.table({"text": found[160:260]}), root / "table.parquet")
    with (root / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in found[260:300])])
    (root / "empty.txt").touch()
    (root / "latin.txt").write_bytes("déjà vu, à peu près".encode("latin-1"))
    paragraphs = "\n\n".join(found[300:]).encode()
    with (root / "long.txt").open("wb") as file:
        while file.tell() < megabytes * 1e6:
            file.write(paragraphs)
    return root


MEASURED = """
import re, sys
from nanonormuon.text.prepare import prepare
root, out, tokenizer, workers, shard_bytes = sys.argv[1:]
prepare([root], out, tokenizer, workers=int(workers), shard_bytes=int(shard_bytes))
# ru_maxrss would begin with the memory of the process that started this one
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


@pytest.mark.full
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux counts memory there")
def test_100_mb_take_no_more_memory_than_25(tmp_path: Path) -> None:
    """75 MB more of text, held once, would be seen, beside the shards, which are mapped when they
    are read back. The number of workers changes no byte."""

    def peak(megabytes: int, workers: int) -> float:
        out = tmp_path / f"{megabytes}-{workers}"
        arguments = [tmp_path / f"{megabytes}", out, "bpe:4096", workers, 8 << 20]
        command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
        return int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout) / 1e6

    for megabytes in (25, 100):
        mixed(tmp_path / f"{megabytes}", megabytes)
    found = [peak(25, 1), peak(25, 2), peak(100, 2)]
    print(found)
    assert found[2] < min(500, found[1] + 70), found
    assert content(tmp_path / "25-1") == content(tmp_path / "25-2")


@pytest.mark.full
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_20_times(tmp_path: Path, workers: int) -> None:
    """In the tokenizer's training too."""
    # forked from a process that has imported everything and begun nothing: rustbpe's threads, once
    # there, would be missing in a fork
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanonormuon.text.prepare", "support"])
    root, moments, kills = mixed(tmp_path / "mixed", 3), random.Random(workers), 0

    def start(out: Path) -> multiprocessing.Process:
        process = context.Process(target=prepare_cutting, args=(root, out, workers))
        process.start()
        return process

    start(tmp_path / "warm").kill()
    begin = time.monotonic()
    start(tmp_path / "clean").join()
    seconds = time.monotonic() - begin
    wanted, out = content(tmp_path / "clean"), tmp_path / "killed"
    while kills < 20:
        process = start(out)
        process.join(moments.uniform(0, seconds))
        kills += process.is_alive()
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if (out / "manifest.json").exists():
            if not (out / ".partial").exists():
                assert content(out) == wanted
            shutil.rmtree(out)
    start(out).join()
    assert content(out) == wanted


def test_a_plan_keeps_only_shards_of_its_own_directory(tmp_path: Path) -> None:
    asked, entries = {"request": {}}, []
    for name in ("train_000000.bin", "../train_000001.bin", str(tmp_path / "train_000002.bin")):
        path = tmp_path / "partial" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
        digest = hashlib.sha256(name.encode()).hexdigest()
        entries.append({"name": name, "tokens": 1, "size": 1, "max_token": 0, "sha256": digest})
    content = {"asked": asked, "tokenizer": "", "shards": entries}
    (tmp_path / "partial" / encode.PLAN).write_text(json.dumps(content))
    plan = encode.Plan(tmp_path / "partial", asked)
    assert [*plan.shards] == ["train_000000.bin"]


def test_only_files_of_another_request_are_called_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    partial, asked = tmp_path / "partial", {"request": {"val": 0.1}}
    encode.Plan(partial, asked)  # stopped while it trained its tokenizer
    (partial / "tokenizer.json").touch()
    encode.Plan(partial, asked).save()
    assert [p.name for p in partial.iterdir()] == [encode.PLAN] and "another" not in caplog.text
    encode.Plan(partial, {"request": {"val": 0.2}})
    assert not [*partial.iterdir()] and "removing another run's files" in caplog.text


@pytest.mark.slow
def test_killed_at_random_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bpe: Path
) -> None:
    """As above, in seconds; alternately with one worker and with two."""
    monkeypatch.setattr(sources, "LARGE", 1 << 17)  # so that the long text is cut here too
    monkeypatch.setattr(sources, "PART", 1 << 14)
    root, context = mixed(tmp_path / "mixed", 1), multiprocessing.get_context("fork")
    settings = {"tokenizer": bpe, "shard_bytes": 1 << 18}
    begin = time.monotonic()
    prepare([root], tmp_path / "clean", **settings)
    seconds = time.monotonic() - begin
    wanted = content(tmp_path / "clean")
    assert len(wanted) > 15
    out, moments, kills, kept = tmp_path / "killed", random.Random(0), 0, 0
    while kills < 10 or (kept < 4 and kills < 100):
        options = {**settings, "workers": 1 + kills % 2}
        process = context.Process(target=prepare, args=([root], out), kwargs=options)
        process.start()
        process.join(moments.uniform(0, 1.2 * seconds))
        kills += process.is_alive()
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if not (out / "manifest.json").exists():
            begun = (out / ".partial" / "plan.json").exists()
            kept += begun
            seconds *= 1 if begun else 1.2  # the machine may be busier than it was
            continue
        if not (out / ".partial").exists():
            assert content(out) == wanted
        shutil.rmtree(out)
    prepare([root], out, **settings)
    assert content(out) == wanted
    assert kept > 3, "some of them were resumed in the middle"


def test_a_read_error_costs_no_finished_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even one in the last reading, of two, of the last file."""
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / "in" / f"{i:02}.txt").write_text(f"document {i} " * 99)
    opened, open_regular = [], sources.open_regular

    def fail(path: Path, buffer: int) -> Any:
        opened.append(path.name)
        if opened.count("19.txt") == 2:
            raise OSError(errno.EIO, "Input/output error")
        return open_regular(path, buffer)

    def attempt() -> None:
        prepare([tmp_path / "in"], tmp_path / "out", "byte", 0.2, shard_bytes=3000)

    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "open_regular", fail)
        with pytest.raises(DataError, match=r"19\.txt: cannot be read: Input/output error"):
            attempt()
    assert "repeat the command" in caplog.text
    attempt()
    assert caplog.text.count("keeping train_") > 2


def test_finished_shards_are_kept_and_damaged_ones_made_anew(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    options: dict[str, Any] = {"tokenizer": "bpe:300", "val": 0.2, "shard_bytes": 5000}
    prepare([corpus], tmp_path / "clean", **options)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare([corpus], out, **options)
    (out / ".partial" / "manifest.json").unlink()
    first = out / ".partial" / "train_000000.bin"
    raw = bytearray(first.read_bytes())
    raw[1500] ^= 1
    first.write_bytes(raw)
    encoded, original = [], bpe_module.BPE.encode_job

    def counted(self: bpe_module.BPE, job: list[Any], *names: Any) -> np.ndarray:
        encoded.append(len(job))
        return original(self, job, *names)

    monkeypatch.setattr(bpe_module.BPE, "encode_job", counted)
    monkeypatch.setattr(module, "get_tokenizer", None)  # trained already
    prepare([corpus], out, **options)
    assert len(encoded) == 1, "the damaged shard alone"
    assert "keeping train_000001.bin" in caplog.text
    assert content(out) == content(tmp_path / "clean")


def test_only_one_process_prepares_in_a_directory(corpus: Path, tmp_path: Path) -> None:
    with (
        module.alone(tmp_path / "out"),
        pytest.raises(DataError, match="another process is preparing"),
    ):
        prepare([corpus], tmp_path / "out", tokenizer="byte")


def test_copies_are_counted_and_do_not_cross_the_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text {i % 10}" * 9)
    assert prepare([tmp_path], tmp_path / "out", "byte", 0.3)["copies"] == 30
    assert "30 of 40 documents are exact copies" in caplog.text
    assert not set(texts(tmp_path / "out", "train")) & set(texts(tmp_path / "out", "val"))
    prepare([tmp_path], tmp_path / "tail", "byte", 1e-9)
    assert set(texts(tmp_path / "tail", "val")) == {b"0"}  # of four copies alike
    assert texts(tmp_path / "tail", "train").count(b"text 0" * 8 + b"text ") == 4


def test_the_split_is_logged_only_where_one_is_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    files = [tmp_path / f"{i}.txt" for i in range(5)]
    for i, path in enumerate(files):
        path.write_text(f"{i % 4} text " * 3000)
    cases = (
        (files[:1], f"held out for validation: the last 2 % of {files[0]}\n"),
        (files[:4], f"the last 2 % of {files[0]}, {files[1]}, {files[2]}, ..."),
        ([tmp_path], ", ..."),
    )
    for i, (chosen, says) in enumerate(cases):
        out = tmp_path / f".out{i}"
        prepare(chosen, out, "byte")
        assert says in caplog.text and ("exact copies" in caplog.text) == (chosen == [tmp_path])
        caplog.clear()
        prepare(chosen, out, "byte")
        with pytest.raises(DataError, match="already holds"):
            prepare(chosen, out, "byte", val=0.5)
        assert "held out" not in caplog.text and "exact copies" not in caplog.text


@pytest.mark.parametrize("second", [[b"a" * 99, b"B"], [b"a" * 99], [b"a" * 99, b"b", b"c"]])
def test_change_during_preparation_is_noticed(second: list[bytes], tmp_path: Path) -> None:
    readings = [[b"a" * 99, b"b"], second]

    def read() -> list[Document]:
        return [Document("x", 0, text) for text in readings.pop(0)]

    with pytest.raises(DataError, match="changed during preparation"):
        module.prepare_documents(read, ["x"], tmp_path / "out", "byte", 0.1)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    source = os.fsencode(tmp_path / "caf") + b"\xe9.txt"
    try:
        Path(os.fsdecode(source)).write_text("some text " * 100)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    manifest = prepare([os.fsdecode(source)], tmp_path / "out", tokenizer="byte")
    assert shards.read_manifest(tmp_path / "out") == manifest


def test_a_full_disk_is_named(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any) -> None:
        if file.name.endswith(".bin"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(encode, "settle", full)
    with pytest.raises(OSError, match=r"No space left on device: .*train_000000\.bin") as caught:
        prepare([corpus], tmp_path / "out", tokenizer="byte")
    assert caught.value.errno == errno.ENOSPC


def test_written_and_read_back_bytes_are_compared(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = shards.header

    def corrupt(version: int, tokens: int) -> bytes:
        return original(version, tokens) + bytes(2)  # overwrites the first token

    monkeypatch.setattr(shards, "header", corrupt)
    with pytest.raises(DataError, match="reads differently"):
        prepare([corpus], tmp_path / "out", tokenizer="byte")


def test_sample_is_bounded_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_BYTES", 1000)
    texts = [f"{i:02d}".encode() * 50 for i in range(100)]
    taken = [int(text[:2]) for text in module._sample(texts, 10_000)]
    assert len(taken) == 10 and set(np.diff(taken)) <= {9, 10, 11}
    assert len(list(module._sample(texts[:10], 1000))) == 10


def test_unwritable_out_is_an_os_error(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        prepare([corpus], tmp_path / "file" / "out", tokenizer="byte")


def test_python_sources() -> None:
    found = list(builtin.python_sources())
    names = [d.name for d in found]
    assert len(set(names)) == len(names) > 400
    assert "os.py" in names and "json/decoder.py" in names
    assert not any(part in name for name in names for part in ("-packages", "__pycache__"))
    assert sum(len(d.data) for d in found) > 5e6
    assert next(d for d in found if d.name == "os.py").data == Path(os.__file__).read_bytes()


def test_library_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tests, no tables, nothing that a build generates; the rest of the library as it is."""
    names = {d.name for d in builtin.library_sources()}
    assert {"os.py", "json/decoder.py", "unittest/case.py"} < names
    assert not any("test_" in name or "/tests/" in name for name in names)
    assert not any(
        name.startswith(("encodings/", "_sysconfigdata", "pydoc_data")) for name in names
    )
    table = Document("codes.py", 0, b"TABLE = {" + b"0x1f: 2310, " * 99 + b"}")
    code = [Document(name, 0, b"def double(x):\n    return 2 * x\n") for name in (
        "a.py", "b/latest.py", "b/test_a.py", "c/tests/d.py", "config-3.11/e.py")]  # fmt: skip
    monkeypatch.setattr(builtin, "python_sources", lambda: iter([table, *code]))
    assert [d.name for d in builtin.library_sources()] == ["a.py", "b/latest.py"]


@pytest.fixture
def few_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The demo's corpus cut to its first MB, and a cache directory of our own."""
    found = []
    for document in builtin.library_sources():
        found.append(document)
        if sum(len(d.data) for d in found) > 1e6:
            break
    monkeypatch.setitem(builtin.BUILTIN, "builtin:stdlib", (lambda: iter(found), 0.2))
    monkeypatch.setenv("NANONORMUON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_builtin_python(few_sources: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = builtin.builtin_data("builtin:stdlib", "bpe:500")
    assert path.parent == few_sources and path.name.startswith("stdlib-")
    before = content(path)
    assert builtin.builtin_data("builtin:stdlib", "bpe:500") == path and content(path) == before
    assert builtin.builtin_data("builtin:stdlib", "byte") != path
    raw = bytearray(before["train_000000.bin"])
    raw[5000] ^= 1
    (path / "train_000000.bin").write_bytes(raw)
    assert builtin.builtin_data("builtin:stdlib", "bpe:500") == path and content(path) == before
    assert "rebuilding the demo's data" in caplog.text
    assert len(list(few_sources.iterdir())) == 2, "no scratch directory is left"


def test_builtin_python_by_two_processes_at_once(few_sources: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=builtin.builtin_data, args=("builtin:stdlib", "byte"))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(900)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    (path,) = few_sources.iterdir()
    shards.open_data(path, verify="full")


def test_no_network(few_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    assert shards.open_data(builtin.builtin_data("builtin:stdlib", "bpe:400")).vocab_size == 400


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NANONORMUON_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_directory() == tmp_path / "nanonormuon"
    monkeypatch.setenv("NANONORMUON_CACHE", str(tmp_path / "own"))
    assert files.cache_directory() == tmp_path / "own"
