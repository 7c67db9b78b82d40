"""Trackers get what metrics.jsonl gets, and whatever they do the run goes on and loses nothing."""

import json
import sys
import types

import pytest

from nanonormuon.config import load
from nanonormuon.errors import Interrupted
from nanonormuon.runtime import trackers
from nanonormuon.storage.run import read_rows
from nanonormuon.train import train

ROW = {"step": 3, "tokens": 9, "loss": 1.5, "val_bpb": None, "seconds": 0.1}


class Board:
    """A stand-in for tensorboard's writer and wandb's session."""

    def __init__(self, *where, **settings):
        self.where, self.settings, self.rows, self.closed = where, settings, [], 0

    def add_scalar(self, key, value, step):
        self.rows.append((key, value, step))

    def log(self, row, step):
        self.rows += [(key, value, step) for key, value in row.items()]

    def close(self):
        self.closed += 1

    finish = close

    def flush(self):
        self.flushed = len(self.rows)


def install(monkeypatch, board):
    """Make tensorboard and wandb importable, giving `board`."""
    writer = types.SimpleNamespace(SummaryWriter=lambda *a: board)
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)

    def init(**settings):
        board.settings = settings
        return board

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_rows_arrive_in_order_and_the_sink_is_closed(name, monkeypatch, tmp_path):
    board = Board()
    install(monkeypatch, board)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker = trackers.start(name, tmp_path / "run", {"optim": {"lr": 1}})
    tracker(ROW)
    tracker({"step": 4, "loss": 1.0})
    assert name == "wandb" or board.flushed == len(board.rows)  # nothing waits for the end
    tracker.close()
    expected = [("tokens", 9, 3), ("loss", 1.5, 3), ("seconds", 0.1, 3), ("loss", 1.0, 4)]
    assert board.rows == expected and board.closed == 1
    if name == "wandb":
        assert board.settings["mode"] == "offline" and board.settings["name"] == "run"
        assert board.settings["config"] == {"optim": {"lr": 1}}
    assert trackers.start("", tmp_path, {}) is None


@pytest.mark.parametrize("signal", [KeyboardInterrupt, Interrupted])
def test_a_signal_is_no_fault_of_the_tracker(signal, tmp_path, monkeypatch):
    board = Board()
    install(monkeypatch, board)

    def interrupted(*_, **__):
        raise signal(2, "while it was logging")

    monkeypatch.setattr(board, "add_scalar", interrupted)
    tracker = trackers.start("tensorboard", tmp_path, {})
    with pytest.raises(signal):
        tracker(ROW)
    assert board.closed == 1


@pytest.mark.parametrize("fault", ["absent", "start", "row", "close", "exit"])
def test_a_broken_tracker_never_stops_a_run(fault, tiny, tmp_path, monkeypatch):
    board = Board()

    def broken(*_, **__):
        raise SystemExit(9) if fault == "exit" else RuntimeError("no service")

    install(monkeypatch, board)
    if fault == "absent":
        monkeypatch.setitem(sys.modules, "tensorboard", None)
    elif fault == "start":
        monkeypatch.setattr(sys.modules["torch.utils.tensorboard"], "SummaryWriter", broken)
    elif fault == "close":
        monkeypatch.setattr(board, "close", broken, raising=False)
    else:
        monkeypatch.setattr(board, "add_scalar", broken)
    short = ["train.steps=2", "train.sample_tokens=0", "train.track=tensorboard"]
    summary = train(load([*tiny, *short])[0], tmp_path / "run")
    assert summary["steps"] == 2
    assert [r["step"] for r in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    said = (tmp_path / "run" / "train.log").read_text()
    words = {"absent": "pip install tensorboard", "exit": "SystemExit: 9"}
    line = words.get(fault, "tensorboard: RuntimeError: no service")
    assert said.count(line) == said.count("continuing without it") == 1
