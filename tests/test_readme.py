"""The README is true: its Python runs, its commands parse, its links lead somewhere, and the steps
for one's own text work in the order given. Every command of docs/guarantees.md selects tests."""

import re
import shlex
import subprocess
import sys

import pytest
import torch
import typer
from support import ROOT, command

from nanonormuon import config
from nanonormuon.cli import app as cli
from nanonormuon.lab import race

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
COMMANDS = [
    shlex.split(line, comments=True)
    for kind, block in BLOCKS
    for line in block.splitlines()
    if not kind and line.startswith(("normuon-train", "torchrun", "pip", "python"))
]


def test_the_python_example_trains_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    (example,) = (block for kind, block in BLOCKS if kind == "python")
    torch.manual_seed(0)
    tokens = torch.arange(33).repeat(4, 1)
    for tied in (True, False):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
            )
        )  # fmt: skip
        batch = {"input_ids": tokens, "labels": tokens}
        before = float(model(**batch).loss.detach())
        exec(example, {"model": model, "batches": [batch] * 40})
        assert float(model(**batch).loss.detach()) < before / 2


def test_commands_name_what_exists():
    assert len(COMMANDS) > 10
    for words in COMMANDS:
        if words[:2] == ["normuon-train", "run"] or words[0] == "torchrun":
            words = words[words.index("train.py" if words[0] == "torchrun" else "run") + 1 :]
            if "--out" in words:
                del words[words.index("--out") : words.index("--out") + 2]
            if "--init-from" in words:
                del words[words.index("--init-from") : words.index("--init-from") + 2]
            config.load([w for w in words if not w.startswith("--")])
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file()
        elif words[1] in ("race", "trials"):
            parsed = typer.main.get_command(cli.app).commands[words[1]].make_context("", words[2:])
            given = parsed.params
            config.load(given["recipe"])
            if words[1] == "race":
                race.entries(
                    given["recipe"],
                    given["optimizers"],
                    given["lr"] or (),
                    "",
                    given["sweep"] or (),
                )


def test_links_and_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    for name in re.findall(r"`((?:nanonormuon|data|tests|scripts)/[\w./]+\.\w+)`", README):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`(\w+\.py)`", README):
        places = (ROOT, ROOT / "nanonormuon", ROOT / "scripts")
        assert any((place / name).is_file() for place in places), name


GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
COLLECT = """
import shlex, sys, pytest

class Report:
    def pytest_collection_finish(self, session):
        for item in session.items:
            marks = {mark.name for mark in item.iter_markers()}
            print("long" if marks & {"slow", "full"} else "quick", item.nodeid)

for line in sys.stdin.read().splitlines():
    print("#", line)
    plain = ["-p", "no:cacheprovider", "-p", "no:unraisableexception", "--no-summary", "-qq"]
    pytest.main([*shlex.split(line)[1:], "--collect-only", *plain], [Report()])
"""


@pytest.mark.slow
def test_every_command_of_the_guarantees_selects_tests():
    """So does each word of its -k; and of each guarantee something is tested by plain pytest."""
    rows = [re.findall(r"`(pytest [^`]+)`", row) for row in GUARANTEES.splitlines()]
    lines = [line for row in rows for line in row]
    assert len(lines) > 20
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], input="\n".join(lines), cwd=ROOT, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = dict(part.split("\n", 1) for part in done.stdout.removeprefix("# ").split("\n# "))
    assert list(found) == lines
    for line, tests in found.items():
        assert re.search(r"^(quick|long) tests/\S+::", tests, re.M), line
        words = re.findall(r'-k "?([\w ]+)', line)
        for word in words[0].split(" or ") if words else ():
            assert re.search(rf"^\w+ tests/\S+::\S*{word}", tests, re.M), (line, word)
    for text, row in zip(GUARANTEES.splitlines(), rows):
        if re.match(r"\| \d", text) and "many_runs" not in text:
            assert any(re.search(r"^quick ", found[line], re.M) for line in row), text


def section(title):
    """The commands under a heading or after a line, up to the next heading."""
    text = README.partition(f"{title}\n")[2].partition("\n## ")[0]
    return [
        shlex.split(line, comments=True)
        for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
        for line in block.splitlines()
    ]


@pytest.fixture(scope="module")
def workplace(text, tmp_path_factory):
    """A directory with the files that the README speaks of."""
    place = tmp_path_factory.mktemp("readme")
    (place / "essays").mkdir()
    lines = text.read_text().splitlines(keepends=True)
    (place / "notes.txt").write_text("".join(lines[:1000]))
    for i in range(20):
        (place / "essays" / f"{i}.md").write_text("".join(lines[1000 + i * 60 : 1060 + i * 60]))
    return place


SMALL = ["data.seq_len=32", "train.batch_tokens=512", "train.steps=4", "train.eval_every=2",
         "train.device=cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def mine(workplace):
    """The three commands for one's own text, with a model small enough for a test."""
    own = section("Train on your own text:")
    assert [words[1] for words in own] == ["prepare", "run", "sample"]
    small = [*SMALL, "model.n_layer=1", "model.n_embd=32", "model.n_head=2"]
    for words in own:
        words = [w.replace("bpe:4096", "bpe:300") for w in words]
        more = small if words[1] == "run" else ["--max-tokens", "5"] if words[1] == "sample" else []
        code, out, err = command(*words[1:], *more, cwd=workplace)
        assert code == 0, err
    return workplace, out


@pytest.mark.slow
def test_train_on_your_own_text_as_written(mine):
    assert mine[1].startswith("Once")


@pytest.mark.slow
def test_use_your_model_as_written(mine, monkeypatch, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(mine[0])
    own = section("## Use your model")
    assert [words[1] for words in own] == [
        "sample", "evaluate", "evaluate", "export", "prepare", "run", "compare", "report",
        "diagnose", "doctor",
    ]  # fmt: skip
    for words in own:
        more = {"sample": ["--max-tokens", "5"], "run": SMALL, "evaluate": ["--stride", "16"]}
        assert cli.main([*words[1:], *more.get(words[1], [])]) == 0, capsys.readouterr().err
    for made in ("models/mine/README.md", "runs/more/summary.json", "curves.png", "report.html",
                 "update.png", "runs/mine/evaluations.json"):  # fmt: skip
        assert (mine[0] / made).stat().st_size > 100, made


@pytest.mark.slow
def test_mix_more_data_as_written(mine, text, monkeypatch, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    monkeypatch.chdir(mine[0])
    (mine[0] / "wiki").mkdir()
    lines = text.read_text().splitlines(keepends=True)
    rows = ["".join(lines[i : i + 40]) for i in range(0, 2400, 40)]
    parquet.write_table(pyarrow.table({"body": rows}), mine[0] / "wiki" / "a.parquet")
    own = section("## Data")
    assert [words[1] for words in own] == ["prepare", "inspect", "run"]
    for words in own:
        few = ["model.n_layer=1", "model.n_embd=32", "model.n_head=2", "--out", "runs/mix"]
        more = [*SMALL, *few] if words[1] == "run" else []
        assert cli.main([*words[1:], *more]) == 0, capsys.readouterr().err


def test_the_shakespeare_recipe_reads_what_its_script_makes(tmp_path):
    source = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
    if not source.exists():
        pytest.skip("needs tinyshakespeare.txt, which is not kept here")
    script = [sys.executable, str(ROOT / "data" / "shakespeare.py"), "--out", str(tmp_path / "d")]
    done = subprocess.run([*script, "--from", str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from nanonormuon.storage.shards import open_data

    data = open_data(tmp_path / "d")
    # nanoGPT's own split: 1,003,854 and 111,540 characters; one separator stands before each
    assert (data.train.tokens, data.val.tokens) == (1_003_855, 111_541)
    (tmp_path / "other.txt").write_text("To be")
    done = subprocess.run(
        [*script, "--from", str(tmp_path / "other.txt")], capture_output=True, text=True
    )
    assert done.returncode == 3 and "not Tiny Shakespeare" in done.stderr
