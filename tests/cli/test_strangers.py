"""What a stranger has made, be it a run directory, a model or a configuration, is read and never
run; what has no end is not even read."""

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from nanonormuon.cli import app as cli
from nanonormuon.config import OptimConfig, load
from nanonormuon.errors import ConfigError, RunError
from nanonormuon.lab.processes import Job, Runner
from nanonormuon.model import GPT, GPTConfig
from nanonormuon.optim import make_optimizers
from nanonormuon.storage.files import locked
from nanonormuon.storage.run import RunDirectory
from nanonormuon.train import train


@pytest.fixture
def theirs(trained, tmp_path, monkeypatch):
    """A trained run that names a module beside it as its optimizer, and that module."""
    home = shutil.copytree(trained, tmp_path / "theirs")
    (tmp_path / "decoy.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (home / "checkpoints" / "step-000040" / "state.json").unlink()  # the newest is what counts
    for file in (home / "config.toml", home / "checkpoints" / "step-000060" / "state.json"):
        text = file.read_text()
        assert '"normuon"' in text
        file.write_text(text.replace('"normuon"', '"decoy:X"'))
    listing = file.with_name("manifest.json")
    manifest = json.loads(listing.read_text())
    entry = {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    manifest["files"]["state.json"] = entry
    listing.write_text(json.dumps(manifest))
    yield home
    sys.modules.pop("decoy", None)


@pytest.mark.parametrize("name", ["zoo:x.py", "torch.optim:x.py"])
def test_a_file_cannot_pass_for_a_trusted_module(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("open('executed', 'w')\n")
    Path("their.toml").write_text(f'[optim]\nname = "{name}:X"\n')
    settings = load(["their.toml"])[0].optim
    with pytest.raises(ConfigError, match=r"add optim\.name="):
        make_optimizers(GPT(GPTConfig(vocab_size=9, n_layer=1, n_head=1, n_embd=8)), settings)
    assert not os.path.exists("executed")


@pytest.mark.parametrize("place", ["settings", "record"])
def test_a_strangers_track_runs_no_code(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("their.py").write_text(f"open('executed', 'w')  # {place}\n")
    own = {"settings": [], "record": [], place: ["optim.name = their.py:X"]}
    Path("track.toml").write_text(
        'title = "t"\ntarget = 1.0\nfree = ["optim.*"]\n'
        f"settings = {['demo', *own['settings']]}\n[records.a]\nsettings = {own['record']}\n"
    )
    assert cli.main(["speedrun", "track.toml"]) == 0  # the list
    assert cli.main(["speedrun", "track.toml", "a", "--n", "1"]) == 2
    assert "add optim.name=their.py:X" in capsys.readouterr().err
    assert not os.path.exists("executed")
    trusting = ["speedrun", "track.toml", "a", "optim.name=their.py:X", "--n", "1"]
    assert cli.main(trusting) == 2 and os.path.exists("executed")  # which has no X


@pytest.mark.parametrize(
    ("code", "command"),
    [
        (2, "run RUN/config.toml --out new"),
        (2, "run --resume --out RUN"),
        (2, "trials RUN/config.toml --n 1 --target 3 --out new"),
        (0, "run RUN/config.toml train.device=cuda --dry-run"),
        pytest.param(
            0, "run optim.name=decoy:X train.device=cuda --dry-run", marks=pytest.mark.slow
        ),
        (0, "show RUN/config.toml"),
        (0, "sample RUN --max-tokens 1"),
        (0, "evaluate RUN --max-tokens 10"),
        (0, "compare RUN"),
        (0, "report RUN --out page.html"),
        (0, "diagnose RUN"),
    ],
)
def test_a_strangers_optimizer_is_not_imported(code, command, theirs, capsys):
    assert cli.main(command.replace("RUN", str(theirs)).split()) == code
    said = capsys.readouterr()
    assert not os.path.exists("executed") and not os.path.exists("new")
    if code:  # the setting to add is in the message
        assert "config.toml: optim.name = decoy:X" in said.err
        assert "add optim.name=decoy:X " in said.err
    if "--dry-run" in command:
        assert "decoy:X is not imported" in said.out
    with pytest.raises(ConfigError, match=r"add optim\.name=decoy:X"):
        train(load([str(theirs / "config.toml")])[0], theirs.parent / "new")
    assert not os.path.exists("executed")
    with pytest.raises(ValueError, match="has no attribute 'X'"):  # the decoy does work
        make_optimizers(
            GPT(GPTConfig(vocab_size=9, n_layer=1, n_head=1, n_embd=8)), OptimConfig(name="decoy:X")
        )
    assert os.path.exists("executed")


def test_an_optimizer_named_in_the_command_goes_on_under_a_race(tiny, tmp_path, monkeypatch):
    """A file's name for it does not get to the processes that a race starts, its own does."""
    begun = []

    def start(_, job, given, place):
        begun.append(list(given))
        return 4, "no output"

    monkeypatch.setattr(Runner, "start", start)
    name = "optim.name=torch.optim:Adagrad"
    job = Job(tmp_path / "a", (*tiny, name))
    job.path.mkdir()
    (job.path / "config.toml").write_text("")
    with pytest.raises(ValueError, match="no output"):
        Runner().carry_out(job)
    resumed, afresh = begun
    assert resumed[:2] == ["--resume", name] and name in afresh


def test_a_named_optimizer_trains_and_resumes(tiny, tmp_path, capsys, monkeypatch):
    out, named = ["--out", str(tmp_path / "run")], "optim.name=torch.optim.adagrad:Adagrad"
    short = [*tiny, "train.steps=2", "train.sample_tokens=0"]
    assert cli.main(["run", *short, named, "train.stop_at=1", *out]) == 0
    assert cli.main(["run", "--resume", *out]) == 2
    again = ["run", "--resume", *out, re.search(r"add (optim\S+)", capsys.readouterr().err)[1]]
    with monkeypatch.context() as broken:
        broken.setattr(GPT, "forward", Mock(side_effect=MemoryError))
        assert cli.main(again) == 6
    printed = re.search(r"normuon-train (.*?) train\.", capsys.readouterr().err)[1]
    assert cli.main(shlex.split(printed)) == 0


HOSTILE = {"pipe": os.mkfifo, "endless": lambda path: path.symlink_to("/dev/zero")}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize(
    ("code", "name", "command"),
    [
        (2, "my.toml", "show my.toml"),
        (2, "config.toml", "show RUN/config.toml"),
        (2, "config.toml", "compare RUN"),
        (3, "metrics.jsonl", "run --resume --out RUN"),
        (3, "train.log", "run --resume --out RUN"),
        (3, "samples.jsonl", "run --resume --out RUN"),
        (3, ".lock", "run --resume --out RUN"),
        (4, "checkpoints/step-000060/manifest.json", "sample RUN/checkpoints/step-000060"),
        (4, "checkpoints/step-000060/state.json", "sample RUN/checkpoints/step-000060"),
        (4, "evaluations.json", "evaluate RUN"),
        (4, "summary.json", "report RUN --out page.html"),
        (4, "model/config.json", "sample RUN/model"),
        (4, "model/model.safetensors", "sample RUN/model"),
        (2, "prompt", "sample RUN --file RUN/prompt"),
        (3, "questions", "evaluate RUN --choices RUN/questions"),
        (3, "a-labels.lst", "evaluate RUN --choices RUN/a.jsonl"),
        (3, "manifest.json", "run data.path=RUN --dry-run"),
        (3, "plan.json", "trials demo --n 1 --target 3 --out RUN"),
        (3, "trial-000.log", "trials demo --n 1 --target 3 --out RUN"),
    ],
)
def test_nothing_waits_for_a_pipe_or_reads_without_end(
    make, code, name, command, trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    home = shutil.copytree(trained, tmp_path / "run")
    newest = home / "checkpoints" / "step-000060"
    shutil.copytree(newest, home / "model", ignore=shutil.ignore_patterns("manifest.json"))
    path = tmp_path / name if name == "my.toml" else home / name
    path.unlink(missing_ok=True)
    make(path)
    signal.alarm(60)  # a hang ends the tests
    try:
        found = cli.main(command.replace("RUN", "run").split())
    finally:
        signal.alarm(0)
    said = capsys.readouterr().err
    assert found == code and path.name in said, said


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.json", "notes.txt", "src/a.py"])
@pytest.mark.parametrize(
    "command", ["run demo", "race demo", "trials demo --n 1 --target 3", "export RUN"]
)
def test_a_directory_of_something_else_is_left_alone(command, name, trained, tmp_path, capsys):
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine\n")
    out = "--to" if "export" in command else "--out"
    arguments = [*command.replace("RUN", str(trained)).split(), out, str(tmp_path / "mine")]
    if command == "run demo":
        arguments += ["data.tokenizer=byte", "train.device=cpu"]
    assert cli.main(arguments) == 2
    assert str(tmp_path / "mine") in capsys.readouterr().err
    assert file.read_text() == "mine\n" and len(list(tmp_path.rglob("*"))) == 2 + name.count("/")


def test_a_lock_outlives_its_file(tmp_path):
    """Deleted under a live run, the file lets nobody else in; with it, its owner is named."""
    with RunDirectory(tmp_path / "run") as run:
        run.acquire(resume=False)
        for owner in (str(os.getpid()), "unknown"):
            with (
                pytest.raises(RunError, match=f"by process {owner}"),
                RunDirectory(run.path) as two,
            ):
                two.acquire(resume=True)
            (run.path / ".lock").unlink(missing_ok=True)
    old = tmp_path / "old"  # an earlier version locks this file alone
    old.mkdir()
    with (
        locked(old / ".lock"),
        pytest.raises(RunError, match="in use by"),
        RunDirectory(old) as run,
    ):
        run.acquire(resume=False)
    assert (old / ".lock").exists()
    with RunDirectory(old) as run:
        run.acquire(resume=False)
    assert not old.exists()  # nothing was written to it


def test_a_log_can_write_its_directorys_name(tmp_path, capsys):
    path = tmp_path / os.fsdecode(b"a\xff")
    with RunDirectory(path) as run:
        run.acquire(resume=False)
        run.open("", {}, 0)
        logging.getLogger("nanonormuon").info(f"writing to {path}")
    assert "Traceback" not in capsys.readouterr().err
    assert "a\\udcff" in (path / "train.log").read_text()


def test_a_link_to_itself_is_an_error_of_the_disk(trained, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert cli.main(["export", str(trained), "--to", str(tmp_path / "loop")]) == 8


@pytest.mark.parametrize("content", ["", "[optim]\nlr = 1.0\n"])
def test_half_a_configuration_is_not_filled_with_defaults(content, tmp_path, capsys):
    """Or another run, on the default data, would go on."""
    (tmp_path / "config.toml").write_text(content)
    assert cli.main(["run", "--resume", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path}/config.toml: no [" in capsys.readouterr().err
