"""Early stop: the run ends after so many evaluations without a lower loss, saved and evaluated, and
stopped and resumed it ends at the same step."""

import json

import pytest

from nanonormuon import evaluate
from nanonormuon.config import load
from nanonormuon.storage.run import read_rows
from nanonormuon.train import train

LOSSES = [5.0, 3.0, 3.5, 2.0, 2.5, 2.4, 1.0, 0.5]  # after steps 1 to 8


@pytest.fixture()
def scripted(tiny, monkeypatch):
    """Runs of eight steps, evaluated after each, with the losses above."""
    left = []

    def validation_loss(*_):
        return left.pop(0), 100

    monkeypatch.setattr(evaluate, "validation_loss", validation_loss)

    def run(out, *settings, resume=False, done=0):
        left[:] = LOSSES[done:]
        more = ["train.eval_every=1", "train.save_every=0", "train.sample_tokens=0",
                "train.keep_last=0"]  # fmt: skip
        return train(load([*tiny, *more, *settings])[0], out, resume)

    return run


@pytest.mark.parametrize(("patience", "end"), [(0, 8), (1, 3), (2, 6), (3, 8)])
def test_it_ends_when_patience_does(patience, end, scripted, tmp_path):
    summary = scripted(tmp_path / "run", f"train.patience={patience}")
    assert summary["steps"] == end and summary["val_loss"] == LOSSES[end - 1]
    assert summary["best_val_loss"] == min(LOSSES[:end])
    assert (tmp_path / "run" / summary["checkpoint"] / "manifest.json").is_file()
    assert ("no lower val_loss" in (tmp_path / "run" / "train.log").read_text()) == (end < 8)


def test_stopped_and_resumed_it_ends_at_the_same_step(scripted, tmp_path):
    for stop in (1, 4, 5):
        out = tmp_path / f"run{stop}"
        scripted(out, "train.patience=2", f"train.stop_at={stop}")
        assert scripted(out, "train.patience=2", resume=True, done=stop)["steps"] == 6
        assert [r["step"] for r in read_rows(out / "metrics.jsonl")] == list(range(1, 7))
    again = scripted(out, "train.patience=2", resume=True, done=6)  # nothing left to do
    assert again["steps"] == 6
    assert scripted(out, "train.patience=0", resume=True, done=6)["steps"] == 8
    assert json.loads((out / "summary.json").read_text())["best_val_loss"] == 0.5
