"""What a run shows at its end: a curve that falls as the loss does, samples side by side; plain
text if there is no terminal."""

import gzip
import io
import lzma
import os
import re

import numpy as np
import pytest

from nanonormuon.cli import app as cli
from nanonormuon.cli.options import completions
from nanonormuon.config import KINDS, recipes
from nanonormuon.config import load as load_config
from nanonormuon.errors import RunError
from nanonormuon.runs import terminal
from nanonormuon.runs.terminal import Look
from nanonormuon.sample import prompts
from nanonormuon.storage.run import read_rows
from nanonormuon.storage.shards import open_data
from nanonormuon.text import corpus
from nanonormuon.text.tokenizer import load

PLAIN = Look(terminal=True, colours=False, unicode=True, width=90)
LOSS = [(step, 1 + 100 / step) for step in range(20, 521, 20)]
ESCAPE = re.compile(r"\x1b\[\d*m")


class Stream(io.StringIO):
    def __init__(self, encoding, terminal=True):
        super().__init__()
        self.name, self.terminal = encoding, terminal

    encoding = property(lambda self: self.name)

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize("width", [20, 60, 90])
@pytest.mark.parametrize("unicode", [True, False])
def test_a_curve_falls_as_the_loss_does(width, unicode):
    look = Look(True, False, unicode, width)
    lines = terminal.curve(LOSS, [(260, 1.3), (520, 1.1)], look)
    drawn = [re.split("[┤│|+]", line, maxsplit=1)[1] for line in lines[1:8]]
    marks = "●" if unicode else "o"
    assert sum(line.count(marks) for line in drawn) == 2
    assert all(len(line) <= width for line in lines[:9])
    ends = [len(line.rstrip()) for line in drawn if line.strip()]
    assert ends == sorted(ends) and drawn[0][0] != " "  # each row ends further right than the last
    assert lines[1].split()[0] == "6" and lines[7].split()[0] == "1.1"  # the values' range
    assert "step 20 to 520" in lines[9] and (unicode or "\n".join(lines).isascii())


def test_no_curve_of_one_point_and_a_flat_one():
    assert terminal.curve(LOSS[:1], [], PLAIN) == []
    assert len(terminal.curve([(1, 2.0), (9, 2.0)], [(9, 2.0)], PLAIN)) == 11
    assert len(terminal.curve([(1, 2.0), (5, 10**30), (9, 2.0)], [], PLAIN)) == 11


SAMPLES = [
    {"step": 0, "prompt": "def ", "text": "x\x1b[31m\t東京 end"},
    {"step": 0, "prompt": "", "text": "y"},
    {"step": 5, "prompt": "def ", "text": "middle"},
    {"step": 9, "prompt": "def ", "text": "f():\n    return 1\n" + "long " * 30},
    {"step": 9, "prompt": "", "text": "z"},
]


@pytest.mark.parametrize("width", [90, 60])
def test_samples_before_and_after(width):
    lines = terminal.beside(SAMPLES, {0: "before", 9: "after"}, Look(True, False, True, width))
    text = "\n".join(lines)
    assert "\x1b" not in text and "\t" not in text and "middle" not in text
    assert "    return 1" in text and "東京" in text
    assert all(len(line) + line.count("東") * 2 <= width for line in lines)
    together = any("def x" in line and "def f" in line for line in lines)
    assert together is (width >= terminal.NARROW)
    assert text.index("before") < text.index("after") < text.index("y")


def test_colours_need_a_terminal_that_wants_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    colourful = Look.of(Stream("utf-8"))
    assert colourful.colours and colourful.unicode and Look.of(Stream("ascii")).unicode is False
    assert not Look.of(Stream("utf-8", terminal=False)).colours
    shown = terminal.beside(SAMPLES, {0: "before", 9: "after"}, colourful)
    assert "\x1b[1mdef \x1b[0m" in "\n".join(shown)
    bare = Look(True, False, True, colourful.width)
    plain = terminal.beside(SAMPLES, {0: "before", 9: "after"}, bare)
    assert [ESCAPE.sub("", line).rstrip() for line in shown] == plain
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
        assert not Look.of(Stream("utf-8")).colours
        monkeypatch.delenv(name)


def test_without_a_terminal_a_run_ends_in_plain_lines(trained, capsys):
    rows = read_rows(trained / "samples.jsonl")
    text = "\n".join(terminal.story(trained, Look.of(Stream("utf-8", terminal=False))))
    assert text.isprintable() is False and "\x1b" not in text and "│" not in text
    assert text.count("sample before training:\n  | ") == len(rows) / 2 > 1
    assert text.count("sample after step 60:\n  | ") == len(rows) / 2
    assert "●" in "\n".join(terminal.story(trained, PLAIN))


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


def test_a_closed_stream_shows_nothing_but_text():
    look = terminal.Look.of(None)
    assert not (look.terminal or look.colours or look.unicode)
