"""Files and values that somebody else has made, by accident or on purpose: thousands of mutations
end in a documented error or are taken, and names and sizes are checked before anything is opened or
allocated for them.

The mutations come from a seed that is printed; FAULT_SEED repeats them. More: pytest -m full, or
FUZZ_TRIALS=3000 for 3,000 of each kind, also of the files of a run.
"""

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from collections import Counter
from dataclasses import asdict, fields, replace

import pytest
import torch
from support import TINY, serialise

from nanonormuon import checkpoint as snapshot
from nanonormuon import config, optim
from nanonormuon.cli import app as cli
from nanonormuon.cli import dry_run
from nanonormuon.errors import CheckpointError, exit_code
from nanonormuon.model import GPT, GPTConfig
from nanonormuon.pretrained import models
from nanonormuon.storage import checkpoints as checkpoint
from nanonormuon.storage.shards import open_data
from nanonormuon.storage.tensors import TensorFile
from nanonormuon.storage.values import to_toml
from nanonormuon.train import train

HOSTILE = [None, True, -1, 0, 2**31, 2**62, 2**64, 10**30, 1e308, -0.5, float("nan"), "", "x",
           "..", "../../x", "/etc/passwd", "\0", "a" * 5000, "\ud800", [], [[]],
           {}, {"x": {}}]  # fmt: skip


TRIALS = int(os.environ.get("FUZZ_TRIALS", "0"))  # of each kind; 0: each test's own number


@pytest.fixture(scope="module")
def dice():
    seed = int(os.environ.get("FAULT_SEED", time.time_ns() % 10**6))
    print(f"FAULT_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    settings = config.load([*TINY, f"data.path={shards}", "train.steps=1", "train.sample_tokens=0"])
    out = tmp_path_factory.mktemp("fuzz") / "run"
    train(settings[0], out)
    return out


def mutate_bytes(dice, content):
    content, at = bytearray(content), dice.randrange(max(1, len(content)))
    kind = dice.randrange(6)
    if kind == 0:
        content[at : at + 1] = bytes([dice.randrange(256)])
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        del content[at : at + dice.randint(1, 9)]
    elif kind == 3:
        content[at:at] = dice.randbytes(dice.randint(1, 9))
    elif kind == 4:
        content[at : at + 8] = dice.choice(
            [b"\xff" * 8, b"\0" * 8, (1 << 40).to_bytes(8, "little")]
        )
    else:
        content = bytearray(dice.randbytes(dice.randint(0, 64)))
    return bytes(content)


def mutate_json(dice, content):
    """One value somewhere in it replaced, removed or renamed."""
    content = json.loads(content)
    node = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = dice.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and dice.random() < 0.8:
            node = node[key]
            continue
        what = dice.randrange(4)
        if what == 0:
            del node[key]
        elif what == 1 and isinstance(node, dict):
            node[str(dice.choice(HOSTILE))[:300]] = node.pop(key)
        else:
            node[key] = dice.choice(HOSTILE)
        break
    return json.dumps(content).encode()


def mutate_header(dice, content):
    """A safetensors file whose header is JSON, but says something else."""
    length = int.from_bytes(content[:8], "little")
    header = mutate_json(dice, content[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def documented(error):
    """Whether a user gets one line and an exit code of its own for this error."""
    return bool(exit_code(error)) and (not isinstance(error, OSError) or error.errno)


def sign(path):
    """Make the manifest agree with the files: what a hostile sender would do."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in filter(lambda name: (path / name).is_file(), manifest["files"]):
        content = (path / name).read_bytes()
        entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["files"][name] = entry
    (path / "manifest.json").write_text(json.dumps(manifest))


def fuzz_checkpoint(trials, dice, trained, folder):
    """Returns how many of the mutated checkpoints were refused."""
    original = checkpoint.all_steps(trained / "checkpoints")[0]
    settings = config.load([str(trained / "config.toml")])[0]
    model = GPT(settings.model)
    optimizers = optim.make_optimizers(model, settings.optim)
    refused = 0
    for trial in range(trials):
        path = folder / "step-000001"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(original, path)
        signed = dice.random() < 0.7
        names = ["state.json", "config.json", "model.safetensors", "optimizer.safetensors"]
        name = dice.choice(names if signed else [*names, "manifest.json"])
        content = (path / name).read_bytes()
        by_structure = mutate_json if name.endswith(".json") else mutate_header
        mutate = mutate_bytes if dice.random() < 0.4 else by_structure
        (path / name).write_bytes(mutate(dice, content))
        if signed:
            sign(path)
        try:
            state = checkpoint.verify(path)
            snapshot.check_state(path / "state.json", state)
            snapshot.load_weights(model, TensorFile(path / "model.safetensors"))
            snapshot.load_optimizers(optimizers, path)
        except Exception as error:
            assert documented(error), (trial, name, repr(error))
            refused += 1
    return refused


def test_checkpoints(dice, trained, tmp_path):
    assert fuzz_checkpoint(150, dice, trained, tmp_path) > 75


def fuzz_data(trials, dice, shards, folder):
    refused = 0
    for trial in range(trials):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(shards, folder)
        name = dice.choice(sorted(p.name for p in folder.iterdir()))
        content = (folder / name).read_bytes()
        as_json = name.endswith(".json") and dice.random() < 0.7
        if name.endswith(".bin"):  # the header is the part that is believed
            content = mutate_bytes(dice, content[:1024]) + content[1024:]
        else:
            content = (mutate_json if as_json else mutate_bytes)(dice, content)
        (folder / name).write_bytes(content)
        try:
            open_data(folder)
        except Exception as error:
            assert documented(error), (trial, name, repr(error))
            refused += 1
    return refused


def test_data(dice, shards, tmp_path):
    assert fuzz_data(100, dice, shards, tmp_path / "data") > 30


def fuzz_settings(trials, dice, folder, capsys):
    names = list(config.KINDS)
    lines = to_toml(asdict(config.Config())).encode()
    for trial in range(trials):
        value = dice.choice(HOSTILE)
        argument = f"{dice.choice(names)}={value}"
        if trial % 2:
            (folder / "my.toml").write_bytes(mutate_bytes(dice, lines))
            argument = str(folder / "my.toml")
        code = cli.main(["show", argument])
        err = capsys.readouterr().err
        assert code in (0, 2), (argument, err)
        assert (code == 2) == err.startswith(("error: ", "Usage: ")), (argument, err)
    assert {p.name for p in folder.iterdir()} <= {"my.toml"}


def test_settings(dice, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzz_settings(100, dice, tmp_path, capsys)


# each class of what a setting may be given, as the command line has it
VALUES = ["nan", "inf", "-1", "0", "1", "0.5", "1e300", "9223372036854775807", str(10**19), "",
          "x" * 100_000, "true", "[1]", "é\u0000\u200f", "a=nan", ":", "a..b:C", "../..", "²",
          "/"]  # fmt: skip


def fuzz_dry_runs(tiny, names, value, capsys):
    for name in names:
        code = cli.main(["run", *tiny, f"{name}={value}", "--dry-run"])
        err = capsys.readouterr().err
        assert code in (0, 2, 3, 4, 8), (name, err[-500:])
        assert (code == 0) or err.splitlines()[-1].startswith("error: "), (name, err[-500:])


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:20].encode())
def test_a_setting_of_any_value_ends_in_a_documented_code(value, dice, tiny, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "timed", lambda *_: [0.1, 0.1])
    for name in config.KINDS:
        try:
            config.load([*tiny, f"{name}={value}"])
        except Exception as error:
            assert exit_code(error) == 2, (name, repr(error))
    fuzz_dry_runs(tiny, dice.sample(list(config.KINDS), 1), value, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:20].encode())
def test_every_setting_of_any_value(value, tiny, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "timed", lambda *_: [0.1, 0.1])
    fuzz_dry_runs(tiny, config.KINDS, value, capsys)


@pytest.mark.parametrize(
    "value", ["[1]", "{a = 1}", "1979-05-27", "true", '""', '"\\u0000"', "1e400"]
)
def test_a_file_with_a_value_of_any_type(value, tmp_path):
    for name in config.KINDS:
        section, _, key = name.partition(".")
        (tmp_path / "my.toml").write_text(f"[{section}]\n{key} = {value}\n")
        try:
            config.load([str(tmp_path / "my.toml")])
        except Exception as error:
            assert exit_code(error) == 2, (name, repr(error))


def test_an_absurd_number_is_refused_at_once(capsys):
    assert cli.main(["show", f"model.n_head={2**20}"]) == 2
    assert "set n_head = 768" in capsys.readouterr().err


NUMBERS = ["1" * 5000, "1" + "0" * 400, "1e999", "nan", "-inf", "0x_1", "1979-05-27T07:32:00Z",
           "[" * 3000, '"\\u0000"', '"\\ud800"', "{a = 1}"]  # fmt: skip
FIRST = "checkpoints/step-000001/"
SHORT = [
    "train.steps=1",
    "train.stop_at=0",
    "train.sample_tokens=0",
    "train.time_limit=900",
    "data.val_tokens=64",
]  # what a hostile value could make last for ever is set here
COMMANDS = {  # with a pattern of the files that they read
    "resume": (".*", ["run", "--resume", *SHORT, "--out", "{run}"]),
    "begin": (FIRST, ["run", *TINY[5:], *SHORT, "data.path={data}", "--init-from", "{run}",
                      "--out", "out"]),
    "recipe": ("config.toml", ["run", "--dry-run", "{run}/config.toml"]),
    "show": ("config.toml", ["show", "{run}/config.toml"]),
    "compare": ("config.toml|metrics|.*state", ["compare", "--target", "3", "{run}", "{whole}"]),
    "plot": ("metrics", ["compare", "--plot", "out.svg", "{run}"]),
    "report": ("[^/]+$", ["report", "-o", "out.html", "{run}"]),
    "sample": (FIRST, ["sample", "--max-tokens", "2", "{run}"]),
    "checkpoint": (FIRST, ["sample", "--max-tokens", "2", "{run}/" + FIRST]),
    "evaluate": (FIRST + "|eval", ["evaluate", "--max-tokens", "64", "{run}"]),
    "texts": (FIRST, ["evaluate", "--text", "{text}", "--data", "{data}", "--max-tokens", "64",
                      "{run}"]),
    "choices": (FIRST, ["evaluate", "--choices", "{questions}", "{run}"]),
    "diagnose": (FIRST, ["diagnose", "--json", "{run}"]),
    "export": (FIRST + "|eval|metrics", ["export", "--to", "out", "{run}"]),
    "inspect": (".*tokenizer", ["inspect", "{data}", "--tokenizer", "{run}/" + FIRST]),
    "prepare": (".*tokenizer", ["prepare", "{text}", "--out", "out", "--tokenizer",
                                "{run}/" + FIRST + "tokenizer.json"]),
}  # fmt: skip


def mutate_line(dice, content, toml):
    """One line of a TOML file or of JSON lines says something else."""
    lines = content.split(b"\n")
    full = [i for i, line in enumerate(lines) if (b"=" in line if toml else line)]
    at = dice.choice(full)
    if toml:
        value = dice.choice([*NUMBERS, *(json.dumps(value) for value in HOSTILE)])
        lines[at] = lines[at].partition(b"=")[0] + b"= " + value.encode()
    else:
        row = mutate_json(dice, lines[at]).decode()
        numbers = [n for n in NUMBERS if n[0] in "1["] if dice.random() < 0.3 else []
        lines[at] = row.replace("NaN", dice.choice(numbers or ["NaN"])).encode()
    return b"\n".join(lines)


def mutate_file(dice, path):
    """Another content, encoding or kind of file. Returns what was done."""
    content, what = path.read_bytes(), dice.choice(["bytes", "lines", "lines", "encoding", "kind"])
    if what == "kind":
        path.unlink()
        what = dice.choice(["missing", "empty", "directory", "loop", "pipe"])
        if what == "empty":
            path.touch()
        elif what == "directory":
            path.mkdir()
        elif what == "loop":
            path.symlink_to(path.name)
        elif what == "pipe":
            os.mkfifo(path)
        return what
    if what == "encoding":
        text = content.decode(errors="replace").encode("utf-16")
        content = dice.choice([b"\xef\xbb\xbf" + content, text, b"\xff" + content, content * 2])
    elif what == "bytes" or path.suffix in (".log", ".txt", ".py"):
        content = mutate_bytes(dice, content)
    elif path.suffix in (".toml", ".jsonl"):
        content = mutate_line(dice, content, path.suffix == ".toml")
    else:
        content = (mutate_header if path.suffix == ".safetensors" else mutate_json)(dice, content)
    path.write_bytes(content)
    return what


class Hangs(BaseException):
    """No Exception, which main() would explain."""


def fuzz_run(trials, dice, run, folder, places, capsys):
    """Mutate a file or two of a run directory and give it to a command. Returns how often each exit
    code came, and what was wrong with which trials."""

    def expire(*_):
        raise Hangs

    names = sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file())
    names = [name for name in names if not name.startswith(".")]  # locks, whose content is unread
    path, codes, faults = folder / "run", Counter(), []
    places = places | {"run": path, "whole": run}
    before = signal.signal(signal.SIGALRM, expire)
    for trial in range(trials):
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        shutil.copytree(run, path)
        command, case = dice.choice([*COMMANDS]), [f"trial {trial}"]
        pattern, arguments = COMMANDS[command]
        read = [name for name in names if re.match(pattern, name)]
        mutated = {dice.choice(read), dice.choice(read if dice.random() < 0.7 else names)}
        for name in sorted(mutated):
            case.append(f"{name}: {mutate_file(dice, path / name)}")
        if FIRST + "manifest.json" not in mutated and dice.random() < 0.7:
            sign(path / FIRST)
        signal.alarm(120)
        try:
            code = cli.main([part.format_map(places) for part in arguments])
        except Hangs:
            code = "hangs"
        finally:
            signal.alarm(0)
        out, err = capsys.readouterr()
        codes[code] += 1
        explained = "error: " in err or "problem: " in out
        if code not in (0, 2, 3, 4, 5, 6, 8) or not (code == 0 or explained):
            faults.append(f"{command}, {', '.join(case)}: {code}: {err[-1500:]}")
    signal.signal(signal.SIGALRM, before)
    return codes, faults


@pytest.fixture(scope="module")
def whole_run(bpe_data, tmp_path_factory):
    """A run directory with every file that a run, an evaluation and a tokenizer leave."""
    out = tmp_path_factory.mktemp("fuzz") / "run"
    settings = [*TINY, "train.steps=1", f"data.path={bpe_data}"]
    train(config.load(settings)[0], out)
    assert cli.main(["evaluate", "--max-tokens", "64", str(out)]) == 0
    return out


@pytest.mark.slow
def test_files_of_a_run(dice, whole_run, bpe_data, text, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(dry_run, "timed", lambda *_: [0.1, 0.1])
    question = {"question": "What sat on a mat?", "choices": ["the cat", "a tree"], "answer": 0}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    (tmp_path / "text.txt").write_text(text.read_text()[:2000])
    places = {"data": bpe_data, "text": tmp_path / "text.txt"}
    places["questions"] = tmp_path / "questions.jsonl"
    dice = dice if TRIALS else random.Random(61)  # any seed with FUZZ_TRIALS=1000
    codes, faults = fuzz_run(TRIALS or 60, dice, whole_run, tmp_path / "here", places, capsys)
    print(dict(codes))
    assert not faults, "\n\n".join(faults)
    assert codes[0] and codes[4], codes


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("config", None), ("config", [["optim", 1]]), ("step", "1"), ("config.optim", "normuon"),
        ("config.optim.ns_steps", 2**62), ("config.optim.ns_coefficients", 7), ("config.model", {}),
        ("config.data.path", 7), ("config.data.val_tokens", -1), ("config.train.dtype", []),
        ("config.train.setting_of_another_version", []), ("config.train.of_another_version", 1),
        ("data", None), ("tokenizer", 7),
    ],
)  # fmt: skip
def test_a_state_that_no_run_wrote(place, value, trained, tmp_path):
    path = checkpoint.all_steps(trained / "checkpoints")[0]
    state = node = json.loads((path / "state.json").read_text())
    *above, key = place.split(".")
    for name in above:
        node = node[name]
    node[key] = value
    (tmp_path / "state.json").write_text(json.dumps(state))
    if value in ({}, 1):  # an older version, which lacks settings, and a newer one
        assert models.state_of(tmp_path)["config"]["model"]["n_layer"]
        return
    with pytest.raises(CheckpointError, match=r"state\.json: not written by a run"):
        models.state_of(tmp_path)


@pytest.mark.parametrize("value", ["", None, True, 0, -1, 2**31, 1.5, []])
def test_a_context_length_that_no_model_has(value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": value}))
    with pytest.raises(CheckpointError, match=r"config\.json: max_position_embeddings = "):
        models.context_of(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("micro_batch", 0), ("micro_batch", -1), ("micro_batch", 5), ("micro_batch", 2**62),
        ("ranks", 0), ("seconds", -1e308), ("seconds", 1e17), ("seconds", 10**400),
        ("seconds", float("nan")), ("tokenizer", None), ("tokenizer", 7), ("config", {}),
    ],
)  # fmt: skip
def test_a_state_that_no_run_goes_on_with(key, value, trained):
    state = checkpoint.verify(checkpoint.all_steps(trained / "checkpoints")[0])
    snapshot.check_state(trained, state)
    state[key] = value
    if value is None:
        del state[key]
    with pytest.raises(CheckpointError, match=f"{trained}: ({key} =|not written by a run)"):
        snapshot.check_state(trained, state)


@pytest.mark.full
def test_thousands_of_mutations(dice, trained, shards, tmp_path, capsys, monkeypatch):
    (tmp_path / "settings").mkdir()
    monkeypatch.chdir(tmp_path)
    trials = TRIALS or 1000
    fuzz_settings(trials, dice, tmp_path / "settings", capsys)
    assert fuzz_checkpoint(trials, dice, trained, tmp_path) > trials / 2
    assert fuzz_data(trials, dice, shards, tmp_path / "data") > 0.3 * trials


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"a": {"dtype": "F32", "shape": [1 << 33, 1 << 33], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 62]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
        {"a": {"dtype": "O", "shape": [4], "data_offsets": [0, 16]}},
        {"a": 7},
        [],
    ],
)
def test_declared_sizes_are_compared_with_the_file_before_memory_is_asked_for(header, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        TensorFile(tmp_path / "x.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


def test_a_header_larger_than_its_file(tmp_path):
    for length in (1 << 62, 100, 1, 0):
        (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(CheckpointError, match=r"x\.safetensors: not a readable"):
            TensorFile(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
def test_a_pipe_in_a_files_place_does_not_hang(name, trained, tmp_path):
    path = shutil.copytree(
        checkpoint.all_steps(trained / "checkpoints")[0], tmp_path / "step-000001"
    )
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        checkpoint.newest(tmp_path)


def test_every_setting_is_either_refused_on_resume_or_listed_as_free():
    plain = config.Config()
    for section in config.SECTIONS:
        for f in fields(config.SECTIONS[section]):
            part = getattr(plain, section)
            object.__setattr__(other := replace(part), f.name, "another value")
            lines = config.differences(plain, replace(plain, **{section: other}))
            name = f"{section}.{f.name}"
            told = [f"{name}: {getattr(part, f.name)} -> another value"]
            assert lines == ([] if name in config.MAY_CHANGE else told), name
    assert set(config.MAY_CHANGE) <= set(config.KINDS)


def test_what_is_streamed_is_what_the_library_writes_and_reads():
    from safetensors.torch import load, save

    torch.manual_seed(3)
    tensors = {"b": torch.randn(3, 5), "a": torch.tensor(7.0), "n": torch.arange(4),
               "h": torch.randn(2, 2).bfloat16(), "none": torch.zeros(0, 4)}  # fmt: skip
    ours = serialise(tensors)
    for name, value in load(ours).items():
        assert torch.equal(value, tensors[name]) and value.dtype == tensors[name].dtype
    assert load(save(tensors)).keys() == tensors.keys()
    model = GPT(GPTConfig(vocab_size=64, n_layer=1, n_head=2, n_embd=32))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    assert serialise(weights) == save(weights, metadata={"format": "pt"})
