"""Proves: what `inspect` counts is what was prepared; what is wrong with a directory is named."""

import json
import shutil

import pytest

from nanonormuon.cli import app as cli
from nanonormuon.storage.shards import HEADER_BYTES
from nanonormuon.text.prepare import prepare
from nanonormuon.text.tokenizer import get


def called(capsys, *arguments):
    code = cli.main(["inspect", *map(str, arguments)])
    return code, capsys.readouterr().out


@pytest.fixture
def directory(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"document {i} " * (i + 1))
    (folder / "copy.txt").write_text("document 7 " * 8)
    prepare([folder], tmp_path / "data", "bpe:300", 0.2, shard_bytes=8000)
    return tmp_path / "data"


def test_counts_and_texts(directory, capsys):
    code, out = called(capsys, directory, "--json")
    found = json.loads(out)
    manifest = json.loads((directory / "manifest.json").read_text())
    assert code == 0
    for name in ("train", "val"):
        here, there = found[name], manifest[name]
        assert {k: here[k] for k in ("documents", "tokens", "bytes")} == {
            k: there[k] for k in ("documents", "tokens", "bytes")
        }
        assert here["shards"] == len(there["shards"])
        assert here["bytes_per_token"] == round(there["bytes"] / there["tokens"], 3)
        sizes = [document["tokens"] for document in here["longest"]]
        assert sizes == sorted(sizes, reverse=True)
        assert all(d["begins"].startswith("document ") for d in here["longest"])
        assert here["windows"][0].startswith("<|endoftext|>document ")
    assert found["train"]["copies"] + found["val"]["copies"] == 1
    assert found["val"]["also_in_train"] == 0
    assert found["train"]["longest"][0]["begins"].startswith(("document 59", "document 58"))
    code, out = called(capsys, directory)
    assert code == 0 and "train, long: " in out and "bytes per token" in out


def test_what_is_wrong_is_named(directory, tmp_path, capsys):
    shutil.copytree(directory, tmp_path / "leak")
    for path in (tmp_path / "leak").glob("*.json"):
        path.unlink()
    shutil.copy(directory / "train_000000.bin", tmp_path / "leak" / "val_000000.bin")
    code, out = called(capsys, tmp_path / "leak")
    assert code == 0 and "problem: no manifest and no tokenizer: add" in out
    code, out = called(capsys, tmp_path / "leak", "--tokenizer", directory)
    assert code == 0 and "documents are also in train" in out and "long: " in out
    path = directory / "train_000001.bin"
    raw = bytearray(path.read_bytes())
    raw[HEADER_BYTES + 10] ^= 1
    path.write_bytes(raw)
    code, out = called(capsys, directory)
    assert code == 3 and f"problem: {path}: " in out and "sha256" in out
    code, out = called(capsys, tmp_path / "nothing")
    assert code == 3 and "no such data directory" in out


@pytest.mark.parametrize("given", [(), ("--tokenizer", "saved")])
@pytest.mark.parametrize("others", [False, True], ids=["missing", "another's"])
def test_a_tokenizer_that_training_would_refuse(
    others, given, directory, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (directory / "tokenizer.json").rename(tmp_path / "saved")
    (directory / "tokenizer_config.json").unlink()
    if others:
        get("bpe:300", ["".join(map(chr, range(97, 600))) * 9]).save(directory)
    code, out = called(capsys, directory, *given)
    assert code == 3 and f"problem: {directory}" in out and "train: " in out
    assert ("train, long: " in out) == bool(given)
    assert cli.main(["run", "demo", f"data.path={directory}", "--out", "x"]) == 3


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(("key", "value"), [("eot", 5), ("vocab_size", 10**6), ("bytes", 10)])
def test_numbers_of_a_manifest_that_are_wrong(key, value, sealed, directory, capsys):
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    place = manifest["val" if key == "bytes" else "tokenizer"]
    place[key] = value * place["bytes"] if key == "bytes" else value
    if not sealed:
        del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    code, out = called(capsys, directory)
    assert code == 3 and f"problem: {directory}" in out
    assert cli.main(["run", "demo", f"data.path={directory}", "--out", str(directory / "x")]) == 3
    assert str(directory) in capsys.readouterr().err
    assert cli.main(["inspect", ""]) == 2


def test_nanogpts_files(directory, tmp_path, capsys):
    (tmp_path / "plain").mkdir()
    for name in ("train", "val"):
        content = (directory / f"{name}_000000.bin").read_bytes()[HEADER_BYTES:]
        (tmp_path / "plain" / f"{name}.bin").write_bytes(content)
    given = (tmp_path / "plain", "--format", "nanogpt", "--tokenizer", directory)
    code, out = called(capsys, *given)
    assert code == 0 and "train: " in out
    assert cli.main(["inspect", str(tmp_path), "--format", "other"]) == 2
