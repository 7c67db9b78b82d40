"""A run is exact: stopped after any step and resumed it ends in the same bytes, two processes
follow one, accumulation changes nothing but rounding, and nothing that is not finite is ever
saved."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import LATENT, ROOT, WAIT, final, losses, run

from nanonormuon import build
from nanonormuon import train as train_module
from nanonormuon.cli import app as cli
from nanonormuon.config import load
from nanonormuon.errors import CheckpointError, ConfigError, DataError, NonFinite, RunError
from nanonormuon.model import GPT
from nanonormuon.storage import checkpoints as checkpoint
from nanonormuon.storage import shards as shard_files
from nanonormuon.storage.files import locked
from nanonormuon.storage.run import RunDirectory, read_rows


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    return out, run(tiny, out)


def test_what_a_run_leaves(uninterrupted):
    out, summary = uninterrupted
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["step"] for row in rows if "val_loss" in row] == [4, 8]
    assert rows[-1]["val_loss"] < rows[3]["val_loss"] < 5.8  # it learns: log(320) = 5.77
    assert {"tokens", "seconds", "loss", "lr", "grad_norm", "tokens_per_second"} <= set(rows[0])
    saved = json.loads((out / "summary.json").read_text())
    assert saved == summary and saved["steps"] == 8 and saved["tokens"] == 8 * 384
    assert saved["val_loss"] == saved["best_val_loss"] == rows[-1]["val_loss"]
    assert 1e8 < saved["peak_memory"] < 1e11  # of the whole process, torch and all
    # every target is a byte of ASCII text, so bits per byte is the loss in bits
    assert saved["val_bpb"] == pytest.approx(saved["val_loss"] / 0.6931471805599453, rel=1e-6)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000006", "step-000008"]
    assert "NorMuon" in (out / "groups.txt").read_text()
    assert json.loads((out / "environment.json").read_text())["torch"] == torch.__version__
    assert load([str(out / "config.toml")])[0].model.vocab_size == 320
    assert "val_loss" in (out / "train.log").read_text()


@pytest.mark.parametrize("stop", range(1, 8))
def test_stopped_at_any_step_and_resumed_it_ends_in_the_same_bytes(
    stop, tiny, tmp_path, uninterrupted
):
    run([*tiny, f"train.stop_at={stop}"], tmp_path / "run")
    summary = run(tiny, tmp_path / "run", resume=True)
    assert final(tmp_path / "run") == final(uninterrupted[0])
    assert summary["val_loss"] == uninterrupted[1]["val_loss"]
    steps = [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(1, 9))


def test_accumulation_is_resumed_bitwise_and_changes_only_rounding(tiny, tmp_path, uninterrupted):
    small = [*tiny, "train.micro_batch=2"]
    run(small, tmp_path / "whole")
    run([*small, "train.stop_at=5"], tmp_path / "parts")
    run(small, tmp_path / "parts", resume=True)
    assert final(tmp_path / "whole") == final(tmp_path / "parts") != final(uninterrupted[0])
    one, other = (
        read_rows(Path(p) / "metrics.jsonl") for p in (uninterrupted[0], tmp_path / "whole")
    )
    assert [r["loss"] for r in other] == pytest.approx([r["loss"] for r in one], abs=1e-4)


@pytest.mark.parametrize(
    "settings", [["optim.name=muon"], ["optim.name=adamw"], [*LATENT, "model.q_rank=24"]]
)
def test_other_optimizers_and_models_resume_too(settings, tiny, tmp_path):
    more = [*tiny, *settings, "optim.lr=0.002", "optim.grad_clip=0.5"]
    run(more, tmp_path / "whole")
    run([*more, "train.stop_at=4"], tmp_path / "parts")
    run(more, tmp_path / "parts", resume=True)
    assert final(tmp_path / "whole") == final(tmp_path / "parts")


def test_bfloat16_runs_resume_bitwise_and_stay_near_float32(tiny, tmp_path, uninterrupted):
    more = [*tiny, "train.dtype=bf16"]
    run(more, tmp_path / "whole")
    run([*more, "train.stop_at=4"], tmp_path / "parts")
    run(more, tmp_path / "parts", resume=True)
    assert final(tmp_path / "whole") == final(tmp_path / "parts")
    a, b = (read_rows(p / "metrics.jsonl") for p in (uninterrupted[0], tmp_path / "whole"))
    assert [r["loss"] for r in b] == pytest.approx([r["loss"] for r in a], abs=0.05)


@pytest.mark.slow
def test_compiled_runs_agree_with_eager_ones(tiny, tmp_path):
    # a compiler unrolls all layers, and compiles for each shape of a batch
    shallow = [*tiny, "model.n_layer=1", "data.val_tokens=384"]
    run(shallow, tmp_path / "eager")
    summary = run([*shallow, "train.compile=on"], tmp_path / "run")
    a, b = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("eager", "run"))
    assert [r["loss"] for r in b] == pytest.approx([r["loss"] for r in a], abs=1e-4)
    assert summary["compile_seconds"] > 0 and summary["train_seconds"] < summary["compile_seconds"]


def test_a_compiler_that_fails_costs_one_line(tiny, tmp_path, uninterrupted, monkeypatch, caplog):
    def broken(model, **_):
        def call(*_):
            raise RuntimeError("no C++ compiler here\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    run([*tiny, "train.compile=on"], tmp_path / "run")
    assert "going on without it: RuntimeError: no C++ compiler here" in caplog.text
    assert "long story" not in caplog.text and final(tmp_path / "run") == final(uninterrupted[0])


def test_auto_compiles_a_run_of_so_much_work_and_its_resumption(tiny, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: asked.append(1) or model)
    config, _ = load(tiny)
    model = GPT(replace(config.model, vocab_size=320))  # the byte tokenizer's, padded
    flops = model.flops_per_token(config.data.seq_len) * 8 * config.train.batch_tokens
    auto = [*tiny, "train.compile=auto", "train.device=cpu"]
    monkeypatch.setitem(build.COMPILE_FROM, "cpu", flops * 1.001)
    run(auto, tmp_path / "short")
    assert not asked
    monkeypatch.setitem(build.COMPILE_FROM, "cpu", flops * 0.999)
    run([*auto, "train.stop_at=4"], tmp_path / "long")
    run(auto, tmp_path / "long", resume=True)
    assert len(asked) == 2


def test_a_resumed_run_repeats_lost_work_and_a_lost_evaluation(tiny, tmp_path, uninterrupted):
    run([*tiny, "train.stop_at=4"], tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    rows = read_rows(file)
    del rows[-1]["val_loss"]  # as if the process had died between saving and evaluating
    del rows[-1]["loss"]  # as older versions did, which wrote the row after both
    later = [{"step": 5, "loss": 1.0}, {"step": 6, "loss": 1.0}]  # and lost two logged steps
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in rows[:-1] + later) + '{"step": 7, "lo'
    )
    run(tiny, tmp_path / "run", resume=True)
    found, wanted = read_rows(file), read_rows(uninterrupted[0] / "metrics.jsonl")
    assert [r["step"] for r in found] == list(range(1, 9))
    for a, b in zip(found, wanted):
        assert a.get("val_loss") == b.get("val_loss"), a["step"]
        if a["step"] != 4:  # its training loss went with the process, its evaluation did not
            assert a["loss"] == b["loss"]


def test_a_run_that_ended_before_its_first_checkpoint_starts_anew(tiny, tmp_path, uninterrupted):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match=r"model\.n_embd: 32 -> 64"):
        run([*tiny, "model.n_embd=64"], tmp_path / "run", resume=True)
    run(tiny, tmp_path / "run", resume=True)
    assert final(tmp_path / "run") == final(uninterrupted[0])


def test_an_update_that_overflows_is_not_saved(tiny, tmp_path):
    with pytest.raises(NonFinite, match="after step 1; it is not saved"):
        run([*tiny, "optim.embed_lr=1e39", "train.save_every=1"], tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_extending_a_finished_run_is_allowed(tiny, tmp_path):
    run(tiny, tmp_path / "run")
    assert run([*tiny, "train.steps=10"], tmp_path / "run", resume=True)["steps"] == 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.n_embd=64", "model.n_embd: 32 -> 64"),
        ("train.batch_tokens=512", "train.batch_tokens: 384 -> 512"),
        ("optim.lr=0.5", "optim.lr: 0.04 -> 0.5"),
        ("train.seed=1", "train.seed: 0 -> 1"),
        ("train.steps=3", "train.steps = 3: .* is at step 5 already"),
        ("train.stop_at=3", "train.stop_at = 3: .* is at step 5 already"),
    ],
)
def test_another_run_is_not_resumed(change, words, tiny, tmp_path):
    run([*tiny, "train.stop_at=5"], tmp_path / "run")
    before = final(tmp_path / "run", 5)
    with pytest.raises(ConfigError, match=words):
        run([*tiny, change], tmp_path / "run", resume=True)
    assert final(tmp_path / "run", 5) == before


def test_other_data_are_not_resumed(tiny, text, tmp_path):
    from nanonormuon.text.prepare import prepare

    run([*tiny, "train.stop_at=2"], tmp_path / "run")
    (tmp_path / "more.txt").write_text(text.read_text() + "and then it stopped.\n")
    prepare([tmp_path / "more.txt"], tmp_path / "data", "byte", 0.1)
    with pytest.raises(ConfigError, match="data: fingerprint"):
        run([*tiny, f"data.path={tmp_path / 'data'}"], tmp_path / "run", resume=True)


@pytest.mark.parametrize("split", ["train", "val"])
def test_nothing_that_came_of_a_damaged_shard_is_kept(split, tiny, shards, tmp_path, monkeypatch):
    """Above the size up to which all is hashed at the start, too, however slowly it is hashed."""
    waited_for = {"train_000000.bin": threading.Event(), "val_000000.bin": threading.Event()}
    sha256, settle = shard_files.sha256, shard_files.File.settle
    monkeypatch.setattr(shard_files, "FULL_CHECK_LIMIT", 0)
    monkeypatch.setattr(
        shard_files, "sha256", lambda path: waited_for[path.name].wait() and sha256(path)
    )
    monkeypatch.setattr(
        shard_files.File, "settle", lambda file: waited_for[file.path.name].set() or settle(file)
    )
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    flip(data / f"{split}_000000.bin", 1025)
    with pytest.raises(DataError, match=rf"{split}_000000\.bin: sha256: expected \w+ .*found \w+"):
        run([*tiny, f"data.path={data}"], tmp_path / "run")
    kept = [p.name for p in checkpoint.all_steps(tmp_path / "run" / "checkpoints")]
    assert kept == (["step-000003"] if split == "val" else [])  # evaluated first at step 4
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert not any("val_loss" in row for row in rows)


def test_a_damaged_checkpoint_is_passed_over_loudly(tiny, tmp_path, uninterrupted, caplog):
    run([*tiny, "train.stop_at=6"], tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-000006" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 4
    file.write_bytes(content)
    run(tiny, tmp_path / "run", resume=True)
    named = "optimizer.safetensors: found {'size': " in caplog.text
    assert named and "trying the previous one" in caplog.text
    assert final(tmp_path / "run") == final(uninterrupted[0])
    file = tmp_path / "run" / "checkpoints" / "step-000008" / "model.safetensors"
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no usable checkpoint .*'size': 0, .*expected"):
        run([*tiny, "train.steps=9"], tmp_path / "run", resume=True)


def test_an_empty_directory_is_removed_while_it_is_locked(tmp_path, monkeypatch):
    """Else it could be removed from under the next run, which has just taken it."""
    removed = []

    def rmdir(path):
        with pytest.raises(BlockingIOError), locked(path):
            pass
        os.rmdir(path)
        removed.append(path)

    monkeypatch.setattr(Path, "rmdir", rmdir)
    with RunDirectory(tmp_path / "run") as directory:
        directory.acquire(resume=False)
    assert removed == [tmp_path / "run"]


def test_a_fresh_start_never_overwrites_a_run(tiny, uninterrupted):
    with pytest.raises(RunError, match="--resume, or choose another --out"):
        run(tiny, uninterrupted[0])


def test_one_writer(tiny, tmp_path):
    with RunDirectory(tmp_path / "run") as other:
        other.acquire(resume=False)
        with pytest.raises(RunError, match=rf"by process {os.getpid()}"):
            run(tiny, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()  # nothing was written into it


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nothing_that_is_not_finite_is_saved(where, tiny, tmp_path, monkeypatch):
    original = GPT.forward

    def forward(self, tokens, targets=None, **more):
        out = original(self, tokens, targets, **more)
        if targets is None or not self.training or not torch.is_grad_enabled():
            return out
        calls.append(1)
        if len(calls) < 5:
            return out
        if where == "loss":
            return out * float("nan")
        return out + (self.layers[1].mlp.up_proj.weight.sum() * 0).sqrt()  # 0, its slope infinite

    calls = []
    monkeypatch.setattr(GPT, "forward", forward)
    with pytest.raises(NonFinite, match=rf"the {where} of step 4 .*sequences 0 to 11"):
        run(tiny, tmp_path / "run")
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000003", "step-000004"]  # what was before the step, to repeat it from
    for tensor in load_file(
        tmp_path / "run" / "checkpoints" / names[-1] / "model.safetensors"
    ).values():
        assert tensor.isfinite().all()
    report = json.loads((tmp_path / "run" / "crash-000004.json").read_text())
    assert report["step"] == 4 and report["amiss"] == where and len(report["windows"]) == 12
    assert report["seed"] == 0 and report["config"]["optim"]["lr"] == 0.04
    assert {"matrix", "embedding", "value", "head", "vector"} == set(report["groups"])
    with pytest.raises(NonFinite, match=rf"the {where} of step 4 .*stop_at=5"):  # as it says
        run([*tiny, "train.stop_at=5"], tmp_path / "run", resume=True)


def test_room_is_made_sure_of_for_the_saves_to_come(tiny, tmp_path, monkeypatch):
    """At steps 3 and 5, then at 6 and 8."""
    found, check = [], checkpoint.check_space

    def check_space(folder, size, keep_last, saves):
        found.append(saves)
        check(folder, size, keep_last, saves)

    monkeypatch.setattr(checkpoint, "check_space", check_space)
    tiny = [*tiny, "train.sample_tokens=0", "train.eval_every=0"]
    run([*tiny, "train.stop_at=5"], tmp_path / "run")
    run(tiny, tmp_path / "run", resume=True)
    run(tiny, tmp_path / "run", resume=True)
    assert found == [2, 2, 0]


@pytest.mark.parametrize("more", [[], ["train.save_async=on"]])
def test_a_failed_save_is_never_silent(more, tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", full)
        with pytest.raises(OSError, match="No space left"):
            run([*tiny, *more], tmp_path / "run")
    assert "No space left" in (tmp_path / "run" / "errors" / "rank-0.txt").read_text()
    assert run(tiny, tmp_path / "run", resume=True)["steps"] == 8


def test_an_optimizer_of_another_package_that_fails_is_named(tiny, tmp_path, capsys):
    settings = ["optim.name=torch.optim:SparseAdam", "optim.weight_decay=0"]
    assert cli.main(["run", *tiny, *settings, "--out", str(tmp_path / "run")]) == 2
    found = capsys.readouterr().err.splitlines()[-1]
    assert "SparseAdam: its step() fails: RuntimeError: SparseAdam does not support" in found


def test_what_is_saved_in_the_background_is_of_its_step(tiny, tmp_path, monkeypatch):
    """Though training goes on before it is written."""
    tiny = [*tiny, "train.keep_last=0"]
    run(tiny, tmp_path / "a")
    later, write, take_step = threading.Event(), checkpoint.write, train_module.Trainer.take_step

    def take(self):
        result = take_step(self)
        if self.step == 5:
            later.set()
        return result

    def wait_and_write(*args):
        assert later.wait(WAIT)
        write(*args)

    monkeypatch.setattr(train_module.Trainer, "take_step", take)
    monkeypatch.setattr(checkpoint, "write", wait_and_write)
    run([*tiny, "train.save_async=on"], tmp_path / "b")
    for step in (3, 6, 8):
        assert final(tmp_path / "b", step) == final(tmp_path / "a", step)


@pytest.mark.parametrize("full", [False, True])
def test_a_run_that_fails_waits_for_what_it_saves_in_the_background(
    full, tiny, tmp_path, monkeypatch, caplog
):
    """Else the process would end in the middle of it, or release a directory that it writes to."""
    failed, left, late = threading.Event(), threading.Event(), []
    write, take_step = checkpoint.write, train_module.Trainer.take_step

    def take(self):
        if self.step == 4:
            failed.set()
            raise DataError("a shard is gone")
        return take_step(self)

    def write_late(*args):
        assert failed.wait(WAIT)
        late.append(left.wait(0.1))
        if full:
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
        write(*args)

    monkeypatch.setattr(train_module.Trainer, "take_step", take)
    monkeypatch.setattr(checkpoint, "write", write_late)
    with pytest.raises(DataError, match="a shard is gone"):
        run([*tiny, "train.save_async=on"], tmp_path / "run")
    left.set()
    assert late == [False]
    steps = [p.name for p in checkpoint.all_steps(tmp_path / "run" / "checkpoints")]
    assert steps == ([] if full else ["step-000003"])
    assert ("No space left" in caplog.text) == full


def spike_at(spiked, monkeypatch):
    """Make the gradient of one step a thousand times as large."""
    take_step = train_module.Trainer.take_step

    def call(self):
        handle = self.engine.model.embed_tokens.weight.register_hook(
            lambda grad: grad * (1000 if self.step == spiked else 1)
        )
        try:
            return take_step(self)
        finally:
            handle.remove()

    monkeypatch.setattr(train_module.Trainer, "take_step", call)


def test_what_counts_as_a_spike_is_part_of_the_state(tiny, tmp_path, monkeypatch):
    """An update with an unusual gradient is left out, also by a run that was stopped before."""
    from nanonormuon.runtime import health

    monkeypatch.setattr(health, "SPIKE_WARMUP", 3)
    spike_at(6, monkeypatch)
    more = [*tiny, "train.skip_spikes=10"]
    run(more, tmp_path / "whole")
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0] * 6 + [1] * 2
    assert rows[6]["grad_norm"] > 20
    run([*more, "train.stop_at=5"], tmp_path / "parts")
    run(more, tmp_path / "parts", resume=True)
    assert final(tmp_path / "whole") == final(tmp_path / "parts")
    run(tiny, tmp_path / "all")
    assert final(tmp_path / "whole") != final(tmp_path / "all")


def test_a_run_of_spikes_ends():
    from nanonormuon.runtime import health

    spikes = health.Spikes(2.0)
    assert not any(spikes.skip(1.0) for _ in range(30)) and spikes.skip(float("inf"))
    assert not spikes.skip(1.9) and spikes.skip(3.0)
    with pytest.raises(NonFinite, match="10 updates in a row"):
        for _ in range(10):
            spikes.skip(5.0)


def test_the_best_checkpoint_stays(tiny, tmp_path, monkeypatch):
    losses = iter([5.0, 4.0, 3.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(train_module.evaluate, "validation_loss", lambda *_: (next(losses), 10))
    often = ["train.save_every=1", "train.eval_every=1", "train.keep_last=1", "train.steps=6"]
    summary = run([*tiny, *often, "train.sample_tokens=0"], tmp_path / "run")
    kept = [p.name for p in checkpoint.all_steps(tmp_path / "run" / "checkpoints")]
    assert kept == ["step-000003", "step-000006"]
    assert summary["best_checkpoint"] == "checkpoints/step-000003"
    assert summary["best_val_loss"] == 3.0


def test_the_best_is_the_best_of_what_was_saved(tiny, tmp_path, monkeypatch):
    losses = iter([2.0, 3.0, 4.0, 4.5])  # after steps 2, 4, 6, 8; saved are 4 and 8
    monkeypatch.setattr(train_module.evaluate, "validation_loss", lambda *_: (next(losses), 10))
    rarely = ["train.save_every=4", "train.eval_every=2", "train.keep_last=1", "train.steps=8"]
    summary = run([*tiny, *rarely, "train.sample_tokens=0"], tmp_path / "run")
    kept = [p.name for p in checkpoint.all_steps(tmp_path / "run" / "checkpoints")]
    assert kept == ["step-000004", "step-000008"] and summary["best_val_loss"] == 2.0
    assert summary["best_checkpoint"] == "checkpoints/step-000004"


def test_batches_that_do_not_divide_name_the_nearest_sizes():
    config = load(["data.seq_len=64", "train.batch_tokens=4096", "train.micro_batch=3"])[0]
    with pytest.raises(ConfigError, match="the nearest are 3840 or 4224"):
        build.split_batch(config, 2)
    assert build.split_batch(load(["data.seq_len=64", "train.batch_tokens=4096"])[0], 2) == 32


def torchrun(ranks, arguments, out):
    """Train as the README starts several processes."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
         str(ROOT / "train.py"), *arguments, "--out", str(out)],
        capture_output=True, text=True, timeout=WAIT,
    )  # fmt: skip


FSDP = ["train.parallel=fsdp"]


@pytest.mark.parametrize(
    ("ranks", "more", "tolerance"),
    [
        (2, [], 1e-5),
        (2, [*FSDP, "train.reshard=false", "train.micro_batch=2"], 1e-5),
        pytest.param(3, [], 1e-5, marks=pytest.mark.slow),
        pytest.param(3, FSDP, 1e-5, marks=pytest.mark.slow),
        pytest.param(2, [*FSDP, "train.dtype=bf16"], 0.05, marks=pytest.mark.slow),
    ],
)
def test_several_processes_follow_one(ranks, more, tolerance, tiny, uninterrupted, forks, tmp_path):
    """The same stream of tokens, the same losses, and checkpoints that one process resumes."""
    out, (alone, wanted) = tmp_path / "run", uninterrupted
    quiet = [*tiny, "train.sample_tokens=0"]
    codes, said = forks.run([*quiet, *more, "train.stop_at=6", "--out", out], ranks)
    assert codes == [0] * ranks, said
    summary = run([*quiet, *(m for m in more if "dtype" in m)], out, resume=True)
    a, b = (read_rows(path / "metrics.jsonl") for path in (alone, out))
    for one, many in zip(a, b, strict=True):
        assert many["loss"] == pytest.approx(one["loss"], abs=tolerance), one["step"]
        for key in ("neuron_rms_min", "neuron_rms_mean", "neuron_rms_max", "update_ratio"):
            assert many[key] == pytest.approx(one[key], rel=max(1e-4, tolerance)), one["step"]
        if "val_loss" in one:
            assert many["val_loss"] == pytest.approx(one["val_loss"], abs=tolerance), one["step"]
    assert len(b) == 8 and summary["val_loss"] == pytest.approx(wanted["val_loss"], abs=tolerance)
    ours, theirs = (
        load_file(p / "checkpoints/step-000008/model.safetensors") for p in (alone, out)
    )
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], atol=10 * tolerance), name


ENGINES = {  # name -> ranks, nodes, settings
    "one": (1, 1, ["train.parallel=auto"]),
    "ddp": (2, 1, ["train.parallel=ddp"]),
    "fsdp": (2, 1, FSDP),
    "hsdp": (4, 2, ["train.parallel=hsdp"]),
}


@pytest.mark.full
@pytest.mark.parametrize("engine", ENGINES)
def test_any_engine_goes_on_for_fifty_steps_with_what_any_other_saved(
    engine, tiny, forks, tmp_path
):
    """What is read is the same for all, but for rounding: from three of them two steps show it."""
    longer = [*tiny, "train.steps=60", "train.save_every=0", "train.eval_every=0"]
    longer += ["train.sample_tokens=0", "data.val_tokens=384"]
    last = 60 if engine == "fsdp" else 12

    def run(out, engine, *more):
        ranks, nodes, layout = ENGINES[engine]
        codes, said = forks.run([*longer, *layout, *more, "--out", out], ranks, nodes=nodes)
        assert codes == [0] * ranks, said
        return losses(out)[10:]

    run(tmp_path / "saved", engine, "train.stop_at=10")
    found = {}
    for other in ENGINES:
        shutil.copytree(tmp_path / "saved", tmp_path / other)
        found[other] = run(tmp_path / other, other, "--resume", f"train.stop_at={last % 60}")
    for other, curve in found.items():
        assert len(curve) == last - 10
        assert curve[0] == pytest.approx(found["one"][0], abs=1e-6), other
        assert curve == pytest.approx(found["one"], abs=1e-3), other


@pytest.fixture(scope="module")
def two_ranks(tiny, forks, tmp_path_factory):
    """The directory of an uninterrupted run of two ranks."""
    out = tmp_path_factory.mktemp("two") / "run"
    codes, said = forks.run([*tiny, "--out", out], ranks=2)
    assert codes == [0, 0], said
    return out


def test_several_processes_resume_bitwise(tiny, two_ranks, forks, tmp_path):
    """Stopped where the step had been evaluated, which every rank must know."""
    for more in (["train.stop_at=4"], ["--resume"]):
        codes, said = forks.run([*tiny, *more, "--out", tmp_path / "parts"], ranks=2)
        assert codes == [0, 0], said
    assert final(two_ranks) == final(tmp_path / "parts")


@pytest.mark.slow
def test_torchrun_starts_the_same_run(tiny, two_ranks, tmp_path):
    done = torchrun(2, tiny, tmp_path / "run")
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-4000:]
    assert final(two_ranks) == final(tmp_path / "run")


@pytest.mark.slow
def test_a_mistake_that_only_the_first_rank_sees_ends_all(tiny, forks, uninterrupted):
    before = final(uninterrupted[0])
    codes, said = forks.run([2, *tiny, "--out", uninterrupted[0]], program="launch")
    assert codes == [1] and "already holds a run" in said[0]
    assert final(uninterrupted[0]) == before
