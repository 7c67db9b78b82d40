"""Proves: a run reads each kind of data directory as it should (nanoGPT's and the speedrun's files,
mixtures, documents kept apart), says when an epoch begins, and resumes on all of them in the same
bytes; what does not fit is refused before the first step."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import TINY

from nanonormuon import config, errors
from nanonormuon.cli import app as cli
from nanonormuon.storage import shards
from nanonormuon.text.prepare import prepare
from nanonormuon.train import train


def run(arguments, out, resume=False):
    train(config.load(arguments)[0], out, resume)
    return load_file(max((out / "checkpoints").glob("step-*")) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def others(shards, text, tmp_path):
    """Two more directories of byte tokens."""
    for name, skip in (("b", 500), ("c", 1200)):
        lines = text.read_text().splitlines(keepends=True)[skip : skip + 400]
        (tmp_path / f"{name}.txt").write_text("".join(lines).upper())
        prepare([tmp_path / f"{name}.txt"], tmp_path / name, "byte", 0.1)
    return tmp_path


def test_a_mixture_resumes_in_the_same_bytes_and_names_its_epochs(others, shards, caplog):
    mix = f"data.mix={others / 'b'}=0.25,{others / 'c'} = 0.05"
    arguments = [*TINY, f"data.path={shards}", mix, "train.batch_tokens=16384", "train.steps=4"]
    small = ["model.n_layer=1", "train.eval_every=0", "train.sample_tokens=0"]
    caplog.set_level("INFO")
    whole = run([*arguments, *small], others / "whole")
    assert f"epoch 2 of {others / 'b'} begins in step" in caplog.text
    run([*arguments, *small, "train.stop_at=2"], others / "cut")
    assert same(run([*arguments, *small], others / "cut", resume=True), whole)
    other = [*arguments[:-3], mix.replace("0.25", "0.26"), *arguments[-2:]]
    with pytest.raises(errors.ConfigError, match="another run"):
        run([*other, *small], others / "cut", resume=True)
    shutil.rmtree(others / "c")
    prepare([others / "b.txt"], others / "c", "byte", 0.1)
    with pytest.raises(errors.ConfigError, match="another run: data: fingerprint"):
        run([*arguments, *small], others / "cut", resume=True)


@pytest.mark.parametrize(
    ("mix", "code", "says"),
    [
        ("data.mix=nowhere", 2, 'data.mix: "nowhere": expected DIRECTORY=SHARE'),
        ("data.mix={b}=1.5", 2, "expected DIRECTORY=SHARE, 0 < share < 1"),
        ("data.mix={b}=0.5,{c}=0.5", 2, "expected shares that add up"),
        ("data.mix=nowhere=0.5", 3, "nowhere: no such data directory"),
        ("data.mix={bpe}=0.5", 3, "expected that of"),
    ],
)
def test_mixtures_that_do_not_fit(mix, code, says, others, shards, text, capsys):
    if "bpe" in mix:
        prepare([text], others / "bpe", "bpe:300")
    mix = mix.format(b=others / "b", c=others / "c", bpe=others / "bpe")
    arguments = ["run", *TINY, f"data.path={shards}", mix, "--out", str(others / "run")]
    assert cli.main(arguments) == code
    assert says in capsys.readouterr().err
    assert cli.main([*arguments, "data.order=sequential"]) in (2, 3)


def test_nanogpts_files(shards, tmp_path, capsys):
    """The same tokens, so the same weights; nothing is read from meta.pkl."""
    folder = tmp_path / "char"
    folder.mkdir()
    for name in ("train", "val"):
        tokens = np.fromfile(shards / f"{name}_000000.bin", "<u2")[512:]
        tokens.tofile(folder / f"{name}.bin")
    (folder / "meta.pkl").write_bytes(b"cos\nsystem\n(S'echo owned'\ntR.")
    few = ["train.steps=2", "train.eval_every=0", "train.sample_tokens=0"]
    here = [*TINY, f"data.path={folder}", "data.format=nanogpt", "data.tokenizer=byte", *few]
    expected = run([*TINY, f"data.path={shards}", *few], tmp_path / "a")
    assert same(run(here, tmp_path / "b"), expected)
    arguments = [
        "run",
        *TINY,
        f"data.path={folder}",
        "data.format=nanogpt",
        "--out",
        str(tmp_path / "c"),
    ]
    assert cli.main(arguments) == 2 and "model.vocab_size = 0" in capsys.readouterr().err
    assert cli.main([*arguments, "model.vocab_size=100"]) == 3
    assert "train.bin: token 0: expected an id below 100, found 256" in capsys.readouterr().err
    arguments.remove("data.format=nanogpt")
    assert cli.main(arguments) == 3 and "set data.format=nanogpt" in capsys.readouterr().err


def test_shards_as_published_for_the_speedrun(shards, tmp_path):
    folder = tmp_path / "fineweb"
    folder.mkdir()
    shutil.copy(shards / "train_000000.bin", folder / "fineweb_train_000001.bin")
    shutil.copy(shards / "val_000000.bin", folder / "fineweb_val_000000.bin")
    few = ["train.steps=2", "train.eval_every=0", "data.tokenizer=byte", "data.order=sequential"]
    expected = run([*TINY, f"data.path={shards}", *few], tmp_path / "a")
    assert same(run([*TINY, f"data.path={folder}", *few], tmp_path / "b"), expected)


def test_documents_kept_apart(text, tmp_path, capsys, caplog):
    """Many short documents: another result than with them joined, and exact on resume."""
    (tmp_path / "in").mkdir()
    for i, line in enumerate(text.read_text().splitlines()[:600]):
        (tmp_path / "in" / f"{i}.txt").write_text(line[: 10 + i % 30])
    prepare([tmp_path / "in"], tmp_path / "data", "byte", 0.1)
    arguments = [*TINY, f"data.path={tmp_path / 'data'}", "train.steps=3"]
    caplog.set_level("INFO")
    joined = run(arguments, tmp_path / "joined")
    held_out = shards.open_data(tmp_path / "data").val.tokens
    assert f"warning: val: {held_out:,} tokens are too few" in caplog.text
    arguments.append("data.document_mask=true")
    apart = run(arguments, tmp_path / "apart")
    assert not same(apart, joined)
    run([*arguments, "train.stop_at=1"], tmp_path / "cut")
    assert same(run(arguments, tmp_path / "cut", resume=True), apart)
    for path in (tmp_path / "data").glob("*.json"):
        path.unlink()
    arguments = ["run", *arguments, "model.vocab_size=257", "--out", str(tmp_path / "x")]
    assert cli.main(arguments) == 2
    assert "data.document_mask = true: expected a data.tokenizer" in capsys.readouterr().err
    assert shards.open_data(tmp_path / "data").manifest is None
