"""What a run shows at its end: a curve that falls as the loss does, samples side by side; plain
text if there is no terminal."""

import gzip
import io
import json
import lzma
import math
import os

import numpy as np
import pytest
from rich.console import Console

from nanonormuon.cli import app as cli
from nanonormuon.cli.options import completions
from nanonormuon.config import KINDS, recipes
from nanonormuon.config import load as load_config
from nanonormuon.errors import RunError
from nanonormuon.runs import terminal
from nanonormuon.sample import prompts
from nanonormuon.storage.run import read_rows
from nanonormuon.storage.shards import open_data
from nanonormuon.text import corpus
from nanonormuon.text.tokenizer import load

LOSS = [(step, 1 + 100 / step) for step in range(20, 521, 20)]


class Stream(io.StringIO):
    """A terminal of an encoding."""

    def __init__(self, encoding="utf-8", terminal=True):
        super().__init__()
        self.name, self.terminal = encoding, terminal

    encoding = property(lambda self: self.name)

    def isatty(self):
        return self.terminal


def drawn(stream, run, **more):
    return "\n".join(terminal.story(run, Console(file=stream, **more)))


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """A run with a curve and samples that would break a careless display."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    rows = [{"step": step, "loss": loss} for step, loss in LOSS]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, SAMPLES)))
    return tmp_path


@pytest.mark.parametrize("width", [20, 60, 90])
def test_a_curve_falls_as_the_loss_does(width):
    rows = [{"step": step, "loss": loss, "val_loss": 3.0} for step, loss in LOSS]
    loss, val_loss = (part.plain.split("\n")[1:] for part in terminal.curves(rows, width))
    assert loss[0] == "loss, 1.192 to 6, at steps 20 to 520" and len(loss) == 1 + 6
    ends = [len(line.rstrip()) for line in loss[1:]]
    assert ends == sorted(ends) and 0 < ends[0] < ends[-1] <= width
    assert set(val_loss[2]) == {"▁"}  # a flat one


def test_a_loss_that_was_logged_once_has_no_curve():
    rows = [{"step": 1, "loss": 2.0}, {"step": 5, "loss": math.inf}, {"step": 9, "val_loss": 1}]
    assert terminal.curves(rows, 90) == []
    assert len(terminal.curves([*rows, {"step": 7, "loss": 10**30}], 90)) == 1


SAMPLES = [
    {"step": 0, "prompt": "def ", "text": "x\x1b[31m\t東京 end"},
    {"step": 0, "prompt": "", "text": "y"},
    {"step": 5, "prompt": "def ", "text": "middle"},
    {"step": 9, "prompt": "def ", "text": "f():\n    return 1\n" + "long " * 30},
    {"step": 9, "prompt": "", "text": "z"},
]


def test_the_narrowest_terminal_shows_something(logged):
    assert "loss" in drawn(Stream(), logged, width=4)


@pytest.mark.parametrize("width", [91, 61])
def test_samples_before_and_after(width, logged):
    text = drawn(Stream(), logged, width=width, color_system=None)
    assert "\x1b" not in text and "\t" not in text and "middle" not in text
    assert "    return 1" in text and "東京" in text
    lines = text.splitlines()
    assert all(len(line) + line.count("東") * 2 < width for line in lines)
    together = any("def x" in line and "def f" in line for line in lines)
    assert together is (width > terminal.NARROW)
    assert text.index("before") < text.index("after") < text.index(" z ")


def test_colours_need_a_terminal_that_wants_them(logged, monkeypatch):
    colourful = drawn(Stream(), logged)
    assert "\x1b[1mdef \x1b[0m" in colourful and "\x1b[36m" in colourful
    assert drawn(Stream("ascii"), logged).replace("東京", "").isascii()
    assert "\x1b[1m" not in drawn(Stream(terminal=False), logged)
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
        assert "\x1b[36m" not in drawn(Stream(), logged)
        monkeypatch.delenv(name)


def test_without_a_terminal_a_run_ends_in_plain_lines(trained, capsys):
    rows = read_rows(trained / "samples.jsonl")
    text = drawn(Stream(terminal=False), trained)
    assert text.isprintable() is False and "\x1b" not in text and "│" not in text
    assert text.count("sample before training:\n  | ") == len(rows) / 2 > 1
    assert text.count("sample after step 60:\n  | ") == len(rows) / 2
    assert "█" in drawn(Stream(), trained)


@pytest.mark.parametrize(
    ("setting", "found"),
    [("", [""]), ("def", ["def"]), ("a|b |", ["a", "b ", ""]), ("a||b|c", ["a|b", "c"])],
)
def test_several_prompts(setting, found):
    assert prompts(setting) == found


def test_what_gzip_and_xz_need(bpe_data, monkeypatch):
    data, tokenizer, whole = open_data(bpe_data, None), load(bpe_data), load_config([])[0]
    ids = np.concatenate(data.val.shards)
    text = tokenizer.decode_bytes(ids[ids != tokenizer.eot].tolist())
    assert len(text) == data.val.bytes
    assert corpus.compressors(whole, data, tokenizer) == {
        "gzip_bpb": round(8 * len(gzip.compress(text, 9)) / len(text), 4),
        "xz_bpb": round(8 * len(lzma.compress(text)) / len(text), 4),
        "compressed_bytes": len(text),
    }
    assert corpus.compressors(whole, data, None) == {}
    part = load_config(["data.val_tokens=100"])[0]
    few = corpus.compressors(part, data, tokenizer)["compressed_bytes"]
    monkeypatch.setattr(corpus, "COMPRESSED", 100)
    assert corpus.compressors(whole, data, tokenizer)["compressed_bytes"] == few < len(text) / 2


def test_the_newest_run_by_default(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("sample", "evaluate", "diagnose", "compare", "report"):
        assert cli.main([command]) == 2 and "none in runs/" in capsys.readouterr().err
    assert cli.main(["export", "--out", "x"]) == 2
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "young" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "a-link").symlink_to(trained)
    os.utime(tmp_path / "runs" / "young" / "checkpoints", (1, 1))
    capsys.readouterr()
    for command in (["sample", "--max-tokens", "1"], ["diagnose"], ["report"]):
        assert cli.main(command) == 0
        assert "run: runs/a-link" in capsys.readouterr().err, command
    assert cli.main(["compare"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2  # a head, and the run that has metrics
    with pytest.raises(RunError, match=r"none in runs/"):
        cli.run.options.newest("nothing")


def test_a_shell_completes_recipes_and_settings():
    assert completions("shake") == ["shakespeare-char"]
    assert completions("optim.neu") == ["optim.neuron_axis="]
    assert len(completions("")) == len(recipes()) + len(KINDS)
    assert cli.app._add_completion


def test_a_closed_stream_shows_nothing_but_text(trained, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert "█" not in drawn(None, trained)
