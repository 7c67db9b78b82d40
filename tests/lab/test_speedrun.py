"""Speedruns: what a record may change, the text it needs, the verdict, the tables of records."""

import json
import re
from pathlib import Path

import pytest
from support import ROOT
from test_race import here, smaller  # noqa: F401

from nanonormuon.cli import app as cli
from nanonormuon.config import load as load_config
from nanonormuon.config import recipes
from nanonormuon.errors import ConfigError, DataError
from nanonormuon.lab import speedrun
from nanonormuon.lab.processes import Runner
from nanonormuon.storage.shards import open_data

TRACK = """
title = "tiny"
target = {target}
metric = "{metric}"
settings = {settings}
free = ["optim.*", "train.steps"]
data = "{data}"
prepare = "make it"
[records.plain]
about = "as it is"
settings = ["optim.lr=0.01"]
"""


@pytest.fixture
def track(smaller, shards, tmp_path):  # noqa: F811
    """Write a track's file with some entries changed; returns its path."""

    def write(**changes):
        usual = {"target": 5.4, "metric": "val_loss", "data": open_data(shards).fingerprint}
        entries = usual | {"settings": json.dumps(smaller)} | changes
        file = tmp_path / "tiny.toml"
        file.write_text(TRACK.format(**entries))
        return str(file)

    return write


@pytest.fixture
def quick(monkeypatch):
    """nanoGPT's step takes a second and a record two runs."""
    monkeypatch.setattr(speedrun, "nanogpt_step", lambda: 1.0)
    monkeypatch.setattr(speedrun, "LEAST", 2)


def test_a_record_from_the_command_to_its_verdict(track, here, quick, tmp_path, capsys):  # noqa: F811
    arguments = ["speedrun", track(), "all", "--n", "2", "--out", str(tmp_path / "o")]
    assert cli.main(arguments) == 0
    found = json.loads((tmp_path / "o/tiny/plain/record.json").read_text())
    assert found["n"] == 2 and found["steps"] == 4 and found["tokens"] == 4 * 384
    assert found["valid"] == (found["p_value"] < 0.001)
    assert 0 < found["time"] < 0.01 and str(tmp_path) not in json.dumps(found)
    said = capsys.readouterr().out
    assert f"{found['mean']:.4f} ± {found['sd']:.4f} (n = 2)" in said and "as it is" in said
    assert cli.main([*arguments, "--json"]) == 0 and len(here) == 2  # nothing runs twice
    assert json.loads(capsys.readouterr().out)["plain"]["losses"] == found["losses"]


def test_few_runs_and_losses_near_the_target_are_no_record(track, quick, monkeypatch, tmp_path):
    def losses(*values):
        def run(arguments, n, target, out, runner, metric):
            out.mkdir(exist_ok=True)
            found = speedrun.trials.verdict(values, target)
            return found | {"steps": 4, "seconds": [1.0, None], "arguments": arguments}

        monkeypatch.setattr(speedrun.trials, "run", run)
        chosen = (["plain"], len(values), tmp_path / "o")
        return speedrun.run(speedrun.load(track(target=2.0)), *chosen, Runner(1))

    assert losses(1.0, 1.0001)["valid"] and losses(1.0, 1.0001)["time"] is None
    assert not losses(1.0, 1.9)["valid"]  # p = 0.2
    assert not losses(2.1, 2.1001)["valid"] and not losses(1.0)["valid"]
    monkeypatch.setattr(speedrun, "LEAST", 3)
    assert not losses(1.0, 1.0001)["valid"] and losses(1.0, 1.0001, 1.0)["valid"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["plane"], 'no record "plane": did you mean "plain"'),
        (["plain", "model.n_layer=2"], r"model\.n_layer=2: fixed; .*optim\.\*, train\.steps"),
        (["data.val_tokens=9"], "fixed"),
        (["train.seed=1"], "fixed"),
        (["plain", "optim.lrr=2"], 'did you mean "optim.lr"'),
    ],
)
def test_what_a_record_may_not_change(track, chosen, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        speedrun.run(speedrun.load(track()), chosen, 1, tmp_path / "o", Runner(1))
    assert not (tmp_path / "o").exists()


def test_another_text_is_refused_and_any_is_taken_where_the_track_names_none(
    track, here, quick, tmp_path  # noqa: F811
):  # fmt: skip
    with pytest.raises(DataError, match=r"expected fingerprint 00ff, found [0-9a-f]{64}: make it"):
        speedrun.run(speedrun.load(track(data="00ff")), ["plain"], 1, tmp_path / "a", Runner(1))
    any_text = speedrun.load(track(data="", metric="val_bpb", target=1.0))
    found = speedrun.run(any_text, ["plain"], 1, tmp_path / "b", Runner(1))
    summary = json.loads((tmp_path / "b/trial-000/summary.json").read_text())
    assert found["losses"] == [summary["val_bpb"]] != [summary["val_loss"]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("free", "fre", "fre"),
        ("title", "[title]", "not a readable TOML"),
        ("val_loss", "val_los", 'metric = "val_los": did you mean "val_loss"'),
        ("optim.lr", "optim.lrr", "did you mean"),
        ("optim.lr", "model.n_head", "fixed"),
        ("settings", "steps", "steps"),
    ],
)
def test_a_file_that_is_no_track(old, new, message, track):
    file = Path(track())
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message):
        speedrun.load(str(file))
    with pytest.raises(ConfigError, match='did you mean "shakespeare"'):
        speedrun.load("shakespear")


@pytest.mark.parametrize("name", speedrun.tracks())
def test_every_track_has_valid_records(name, capsys):
    track = speedrun.load(name)
    assert name not in recipes() and track.title
    assert load_config(track.settings)[0].data.val_tokens == 0  # the whole split is judged
    for record in track.records.values():
        result = record.get("result")
        assert not result or (result["n"] >= 10 and result["p_value"] < 0.001)
        assert not result or result["mean"] < track.target
    assert cli.main(["speedrun", name]) == 0
    assert speedrun.table(track) in capsys.readouterr().out


def test_the_page_has_the_table_of_records():
    page = (ROOT / "docs" / "speedrun.md").read_text()
    assert speedrun.table(speedrun.load("shakespeare")) in page
    for words in re.findall(r"normuon-train speedrun (\S+) ([^-`\s]\S*)", page):
        assert words[0] in speedrun.tracks() or words[0].isupper()
