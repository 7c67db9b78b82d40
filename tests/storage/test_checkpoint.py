"""Checkpoints: complete or absent; every corruption is found before anything is loaded; retention
orders by step number; a missing or additional tensor is refused."""

import errno
import json
import os
import re
import shutil
import stat

import pytest
import torch
from support import TINY, serialise

from nanonormuon import checkpoint as snapshot
from nanonormuon import optim
from nanonormuon.config import load
from nanonormuon.errors import CheckpointError
from nanonormuon.model import GPT, GPTConfig
from nanonormuon.storage import checkpoints as checkpoint
from nanonormuon.storage.tensors import TensorFile, read_tensors
from nanonormuon.train import train

FILES = {"model.safetensors": b"weights", "optimizer.safetensors": b"buffers", "config.json": b"{}"}


def write(folder, step):
    return checkpoint.write(folder, step, FILES | {"state.json": b'{"step": %d}' % step})


@pytest.fixture
def saved(tmp_path):
    return write(tmp_path, 7)


def test_what_is_written_is_verified_and_found(saved, tmp_path):
    assert checkpoint.verify(saved) == {"step": 7}
    assert checkpoint.newest(tmp_path) == (saved, {"step": 7})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000007"]
    old = os.umask(0o022)
    os.umask(old)
    for file in saved.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~old, file


def damage(path, kind):
    content = path.read_bytes()
    if kind == "flip":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif kind == "truncate":
        path.write_bytes(content[:-1])
    elif kind == "append":
        path.write_bytes(content + b"\0")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "remove":
        path.unlink()
    elif kind == "link":
        path.rename(path.parent.parent / "elsewhere")
        path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize("kind", ["flip", "truncate", "append", "empty", "remove", "link"])
@pytest.mark.parametrize("name", [*FILES, "state.json"])
def test_every_corruption_of_every_file_is_named(name, kind, saved, tmp_path):
    older = write(tmp_path, 3)
    damage(saved / name, kind)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        checkpoint.verify(saved)
    assert checkpoint.newest(tmp_path)[0] == older


@pytest.mark.parametrize("kind", ["truncate", "empty", "remove"])
def test_a_damaged_manifest(kind, saved):
    damage(saved / "manifest.json", kind)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint.verify(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"step": 8},
        {"files": {"model.safetensors": {"sizf": 7}}},
        {"files": {"model.safetensors": 7}},
        {"files": []},
        {"files": {}},
        {"files": {"../outside": {"size": 1, "sha256": ""}}},
        {"files": {"/etc/passwd": {"size": 1, "sha256": ""}}},
    ],
)
def test_a_malformed_manifest_is_refused(change, saved):
    manifest = json.loads((saved / "manifest.json").read_text()) | change
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint.verify(saved)


def test_debris_and_foreign_files_are_neither_used_nor_deleted(tmp_path):
    (tmp_path / ".partial-step-000009").mkdir()
    (tmp_path / "step-000010").mkdir()  # empty: another tool crashed
    (tmp_path / "step-final").mkdir()
    (tmp_path / "step-000011").write_text("no directory")
    (tmp_path / "notes.txt").write_text("mine")
    good = write(tmp_path, 8)
    write(tmp_path, 2)
    assert checkpoint.newest(tmp_path)[0] == good
    checkpoint.retain(tmp_path, 5, 8)
    assert (tmp_path / "step-final").is_dir() and (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(CheckpointError, match="no step-NNNNNN directory"):
        checkpoint.newest(tmp_path / "nothing")


def test_a_run_that_fell_back_keeps_what_it_writes(tmp_path):
    write(tmp_path, 2)
    damage(write(tmp_path, 5) / "model.safetensors", "flip")
    assert checkpoint.newest(tmp_path)[1] == {"step": 2}
    write(tmp_path, 3)
    checkpoint.retain(tmp_path, 1, 3)
    assert checkpoint.newest(tmp_path)[1] == {"step": 3}


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    for name in (".partial-step-000009", ".deleting-step-000002", ".partial-other"):
        (tmp_path / name).mkdir()
    write(tmp_path, 3)
    checkpoint.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".partial-other", "step-000003"]


def test_retention_counts_steps(tmp_path):
    for step in (999_999, 1_000_000, 9, 10):
        write(tmp_path, step)
    checkpoint.retain(tmp_path, 0, 1_000_000)
    assert len(checkpoint.all_steps(tmp_path)) == 4
    checkpoint.retain(tmp_path, 2, 1_000_000)
    assert [p.name for p in checkpoint.all_steps(tmp_path)] == ["step-999999", "step-1000000"]


@pytest.mark.parametrize("at", range(1, 12))
def test_a_full_disk_costs_nothing_that_was_there(at, tmp_path, monkeypatch):
    """No space at the n-th write, sync or rename of a save."""
    older = write(tmp_path, 3)
    calls = []

    def failing(original):
        def call(*args, **kwargs):
            calls.append(original)
            if len(calls) == at:
                raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))
            return original(*args, **kwargs)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(checkpoint.os, name, failing(getattr(os, name)))
    try:
        write(tmp_path, 7)
        failed = False
    except OSError:
        failed = True
    monkeypatch.undo()
    assert failed == (at <= 9)  # 5 files, 2 directories, the rename, its directory
    assert checkpoint.newest(tmp_path)[0] in (older, tmp_path / "step-000007")
    checkpoint.verify(older)
    write(tmp_path, 7)  # the next save works despite the leftovers
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "step-000007"
    assert checkpoint.verify(tmp_path / "step-000007") == {"step": 7}


def test_the_order_of_a_save(tmp_path, monkeypatch):
    """Data, their directory, the manifest, its directory, the rename, the parent: each is on disk
    before the next begins, so that a power cut at any moment is harmless."""
    calls = []
    sync, replace = os.fsync, os.replace

    def fsync(handle):
        calls.append(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path))
        sync(handle)

    def rename(old, new):
        calls.append(f"{os.path.relpath(old, tmp_path)} -> {os.path.relpath(new, tmp_path)}")
        replace(old, new)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    write(tmp_path, 7)
    partial = ".partial-step-000007"
    data = [f"{partial}/{name}" for name in (*FILES, "state.json")]
    after = [partial, f"{partial}/manifest.json", partial, f"{partial} -> step-000007", "."]
    assert calls == data + after


def test_milestones_and_the_best_stay(tmp_path):
    for step in range(1, 10):
        write(tmp_path, step)
        checkpoint.retain(tmp_path, 2, step, keep_every=4, best=min(step, 3))
    assert [checkpoint.step_of(p) for p in checkpoint.all_steps(tmp_path)] == [3, 4, 8, 9]


def test_nothing_is_deleted_while_the_newest_is_not_whole(tmp_path):
    for step in (1, 2, 3):
        newest = write(tmp_path, step)
    damage(newest / "model.safetensors", "flip")
    with pytest.raises(CheckpointError, match=r"step-000003/model\.safetensors"):
        checkpoint.retain(tmp_path, 1, 3)
    assert len(checkpoint.all_steps(tmp_path)) == 3
    assert checkpoint.newest(tmp_path)[1] == {"step": 2}


def test_a_disk_without_room_is_refused_with_numbers(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=7_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    folder = tmp_path / "not" / "there" / "yet"
    checkpoint.check_space(folder, 2_000_000_000, keep_last=2, saves=9)
    with pytest.raises(OSError, match=r"7 GB free, .*3 checkpoints of 2\.4 GB"):
        checkpoint.check_space(folder, 2_400_000_000, keep_last=2, saves=9)
    free = free._replace(free=5_000)
    checkpoint.check_space(folder, 4_900, keep_last=20, saves=1)  # as many as will be written
    with pytest.raises(OSError, match=r"5 kB free, .* 2 checkpoints of 4\.9 kB"):
        checkpoint.check_space(folder, 4_900, keep_last=20, saves=2)


@pytest.fixture
def trained(shards, tmp_path):
    config = load([*TINY, f"data.path={shards}", "train.steps=2", "train.sample_tokens=0"])[0]
    train(config, tmp_path / "run")
    return config, tmp_path / "run" / "checkpoints" / "step-000002"


def test_every_buffer_is_stored_and_none_may_be_missing(trained):
    """A file without one of the buffers is refused, whichever it is."""
    config, path = trained
    model = GPT(GPTConfig(**{**config.model.__dict__, "vocab_size": 320}))
    optimizers = optim.make_optimizers(model, config.optim)
    snapshot.load_weights(model, TensorFile(path / "model.safetensors"))
    snapshot.load_optimizers(optimizers, path)
    buffers = read_tensors(path / "optimizer.safetensors")
    names = {name for name, _ in model.named_parameters()}
    kinds = {
        key: {n.rpartition(".")[2] for n in buffers if n.rpartition(".")[0] == key} for key in names
    }
    for name in names:
        hidden = name.startswith("layers") and not re.search("norm|embed", name)
        wanted = {"momentum", "second_moment"} if hidden else {"exp_avg", "exp_avg_sq", "step"}
        assert kinds[name] == wanted, name
    for name in sorted(buffers)[::5]:
        fewer = {k: v for k, v in buffers.items() if k != name}
        (path / "optimizer.safetensors").write_bytes(serialise(fewer))
        with pytest.raises(CheckpointError, match=f"1 tensors missing, first {name}"):
            snapshot.load_optimizers(optimizers, path)
    more = buffers | {"layers.9.mlp.momentum": torch.zeros(1)}
    (path / "optimizer.safetensors").write_bytes(serialise(more))
    with pytest.raises(CheckpointError, match="unexpected"):
        snapshot.load_optimizers(optimizers, path)


def test_weights_of_another_shape_are_refused(trained):
    _, path = trained
    sizes = {"vocab_size": 320, "n_head": 2, "n_kv_head": 1, "value_embed": True}
    sizes["bigram_embed"] = 96
    other = GPT(GPTConfig(n_layer=2, n_embd=64, **sizes))
    with pytest.raises(CheckpointError, match="has shape"):
        snapshot.load_weights(other, TensorFile(path / "model.safetensors"))
    deeper = GPT(GPTConfig(n_layer=4, n_embd=32, **sizes))
    with pytest.raises(CheckpointError, match=r"tensors missing, first model\.layers\.2"):
        snapshot.load_weights(deeper, TensorFile(path / "model.safetensors"))
    shutil.rmtree(path)


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")  # as write() and fsync() raise it

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        write(tmp_path, 3)
    assert ".partial-step-000003" in caught.value.filename
