"""Races and trials: statistics against tables and by hand, grids that grow, runs that are not done
twice, choices that never see the validation split, any optimizer by its import path."""

import concurrent.futures
import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from support import ROOT, TINY, WAIT, command

from nanonormuon import errors
from nanonormuon.cli import app as cli
from nanonormuon.config import OptimConfig, load
from nanonormuon.errors import ConfigError, RunError
from nanonormuon.lab import processes, race, results, trials
from nanonormuon.lab.external import optimizer_class
from nanonormuon.lab.processes import Job, Runner
from nanonormuon.lab.significance import interval, student_cdf, student_quantile, verdict
from nanonormuon.model import GPT, GPTConfig
from nanonormuon.normuon import NorMuon
from nanonormuon.optim import make_optimizers
from nanonormuon.runtime import distributed
from nanonormuon.storage import checkpoints as checkpoint
from nanonormuon.storage.files import locked
from nanonormuon.storage.run import PACKAGE, read_rows, source_hash
from nanonormuon.storage.shards import open_data
from nanonormuon.text import corpus
from nanonormuon.train import train

SMALL = GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=64)


class Nested(torch.optim.Optimizer):
    """An optimizer such as other packages have: lists, numbers and a group's own counter."""

    def __init__(self, params, lr=0.1, weight_decay=0.0, power=1.0, thing=None, **_):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "power": power})
        self.thing = thing

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(averages=[torch.zeros_like(p), None], steps=0, decay=(0.5, 0.9))
                    if self.thing:
                        state["thing"] = object()
                average, beta = state["averages"][0], state["decay"][1]
                average.lerp_(p.grad, 1 - beta)
                state["steps"] += 1
                p.sub_(average.sign(), alpha=group["lr"] / state["steps"] ** group["power"])


# ------------------------------------------------------------------------------------- significance


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (5, 2.5706), (19, 2.0930), (30, 2.0423)]
)
def test_students_quantiles_are_those_of_the_tables(df, t):
    assert student_quantile(0.975, df) == pytest.approx(t, abs=6e-5)
    assert student_cdf(t, df) == pytest.approx(0.975, abs=3e-6)
    assert student_cdf(-t, df) == pytest.approx(0.025, abs=3e-6)


def test_an_interval_by_hand():
    low, high = interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2.0)
    assert high - 2.0 == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert interval([1.0]) is None and interval([1.0, math.inf]) is None


def test_the_verdict_on_trials():
    found = verdict([3.2789 + d for d in (-0.001, 0.0, 0.001)], 3.28)
    assert found["margin"] == pytest.approx(0.0011 * math.sqrt(3)) and not found["valid"]
    assert found["p_value"] == pytest.approx(student_cdf(-1.1 * math.sqrt(3), 2))
    assert verdict([3.2789] * 20, 3.28)["valid"]  # 0.0011 sqrt(20) = 0.0049
    assert verdict([3.2], 3.28)["p_value"] is None
    assert verdict([3.3, 3.31], 3.28)["p_value"] > 0.9


# -------------------------------------------------------------------------------------------- grids


def test_every_optimizer_has_a_grid_about_its_own_rate():
    normuon, adamw, lion = race.entries(["demo"], "normuon,adamw,torch.optim:Adagrad")
    assert normuon.rates == (0.02, 0.04, 0.08)  # the recipe's, in the middle
    assert adamw.rates == lion.rates == (0.0015, 0.003, 0.006)
    kin, other = race.entries(["demo"], "zoo:muon8bit,zoo:reg")
    assert kin.rates == normuon.rates and other.rates == adamw.rates
    lr = ["0.5x", "adamw=1e-3", "1x", "adamw=0.01"]  # repeated, it adds rates
    normuon, adamw = race.entries(["demo"], "normuon,adamw", lr, "0,0.1", ["optim.beta2=0.9,0.95"])
    assert normuon.rates == (0.02, 0.04) and adamw.rates == (0.001, 0.01)
    assert len(adamw.others) == 4
    assert adamw.others[1] == ("optim.weight_decay=0", "optim.beta2=0.95")
    three, exact = race.entries(["demo"], "normuon+ns_steps=3,normuon+ns_coefficients=2, -1.5, 0.5")
    assert three.settings == ("optim.name=normuon", "optim.ns_steps=3")
    assert exact.settings[1] == "optim.ns_coefficients=2, -1.5, 0.5"


@pytest.mark.parametrize(
    ("optimizers", "lr", "message"),
    [
        ("normoun", [], 'did you mean "normuon"'),
        ("normuon+beta3=1", [], 'did you mean "beta2"|did you mean "optim.beta2"'),
        ("normuon,normuon", [], "distinct"),
        ("normuon", ["0.1,fast"], "numbers above 0"),
        ("normuon", ["0,0.1"], "numbers above 0"),
        ("normuon,adamw", ["adam=0.1"], 'did you mean "adamw"'),
    ],
)
def test_a_race_that_cannot_be_is_refused(optimizers, lr, message):
    with pytest.raises(ConfigError, match=message):
        race.entries(["demo"], optimizers, lr)


@pytest.mark.parametrize(
    ("optimizers", "sweep", "message"),
    [
        ("normuon", "train.seed=1,2", "--sweep: train.seed cannot be set here: --seeds"),
        ("normuon", "optim.lr=0.1,0.2", "--sweep: optim.lr .*: --lr"),
        ("normuon", "train.steps=2,4", "--sweep: train.steps .*: all runs of a race share it"),
        ("normuon+train.seed=3", "", r'^--optimizers "normuon\+.*": train.seed .*: --seeds'),
        ("normuon+name=muon", "", '^--optimizers ".*": optim.name .*: --optimizers'),
        ("normuon+beta2=0.5", "optim.beta2=0.9", '^--optimizers ".*": optim.beta2 .* once'),
        ("normuon+beta2=0.5+optim.beta2=0.9", "", '^--optimizers ".*": optim.beta2 .* once'),
        ("normuon", "optim.weight_decay=0,0.2", "--sweep: optim.weight_decay .* once, .*--wd"),
        ("normuon", "optim.beta2", "expected SECTION.KEY=A,B"),
        ("normuon", "=", "expected SECTION.KEY=A,B"),
        ("normuon", "./longer.toml=", "expected SECTION.KEY=A,B"),
        *((f"muon,normuon+{part}", "", rf'"normuon\+{part}": expected KEY=VALUE')
          for part in ("longer.toml", "./longer.toml=", "")),
    ],
)  # fmt: skip
def test_a_setting_that_would_be_overruled_is_refused(
    optimizers, sweep, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("longer.toml", "longer.toml=", "optim."):
        Path(name).write_text("[train]\nsteps = 99")
    with pytest.raises(ConfigError, match=message):
        race.entries(["demo"], optimizers, (), "0,0.1", [sweep] if sweep else [])


def test_a_rate_is_said_once():
    with pytest.raises(ConfigError, match="both set its rate"):
        race.entries(["demo"], "normuon,normuon+lr=0.03", ["0.01,0.02"])
    (_, own) = race.entries(["demo"], "normuon,normuon+lr=0.03", ["0.5x,1x"])
    assert own.rates == (0.015, 0.03)


def test_runs_that_are_repeated_have_their_own_seeds(tmp_path):
    arguments = ["demo", "train.seed=3"]
    with pytest.raises(ConfigError, match=r"train\.seed=3: .*--seeds"):
        race.Race(arguments, race.entries(arguments, "normuon"), 1, tmp_path / "a").run(Runner())
    with pytest.raises(ConfigError, match=r"train\.seed=3: .*--n"):
        trials.run(arguments, 1, 9.0, tmp_path / "b", Runner())
    assert not any(tmp_path.iterdir())


def test_no_two_settings_share_a_run_directory(tmp_path):
    values = ["x y", "x-y", "x" * 300, "x" * 299 + "y"]
    sweep = [f"train.sample_prompt={','.join(values)}"]
    field = race.entries(["demo"], "normuon,torch.optim:Adagrad", ["0.1"], sweep=sweep)
    races = race.Race(["demo"], field, 1, tmp_path)
    trial = lambda others: {"lr": 0.1, "settings": others}  # noqa: E731
    names = [races.job("seeds", e, trial(o), 0).path.name for e in field for o in e.others]
    assert len(set(names)) == 8 and max(map(len, names)) < 200
    plain = races.job("seeds", field[1], trial(["optim.momentum=0.9"]), 0).path.name
    assert plain == "torch.optim-Adagrad+lr=0.1+optim.momentum=0.9+seed=0"
    (triple,) = race.entries(["demo"], "normuon", sweep=["optim.ns_coefficients=muon,2, -1.5, .5"])
    assert triple.others == (
        ("optim.ns_coefficients=muon",),
        ("optim.ns_coefficients=2, -1.5, .5",),
    )


def test_steps_are_those_taken(smaller, tmp_path, here):
    arguments = [*smaller, "train.steps=8", "train.stop_at=4"]
    found = trials.run(arguments, 2, 9.0, tmp_path / "t", Runner())
    assert found["steps"] == 4 and found["n"] == 2
    environment = json.loads((tmp_path / "t/trial-000/environment.json").read_text())
    known = re.search(r"(?m)^model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    assert environment["processor"] == (known[1].strip() if known else platform.machine())
    assert found["device"] == f"cpu {environment['processor']}" == environment["device"]
    assert found["mean"] == statistics.fmean(found["losses"])
    field = race.entries(arguments, "normuon", ["0.02"])
    found = race.Race(arguments, field, 1, tmp_path / "r").run(Runner())
    assert found["steps"] == 4 and found["tokens"] == 4 * 384


class Pretended:
    """A runner whose runs end with the loss that a function of their settings gives."""

    def __init__(self, loss):
        self.loss, self.jobs, self.parallel = loss, [], 1

    def run(self, jobs, later=0):
        self.jobs += jobs
        found = []
        for job in jobs:
            settings = dict(a.split("=", 1) for a in job.arguments if "=" in a)
            loss = self.loss(settings)
            curve = [[k, loss + 1 - k / 10] for k in range(1, 11)]
            found.append({"val_loss": loss, "curve": curve, "train_seconds": 2.0})
        return found


def test_a_grid_grows_until_its_best_rate_lies_inside(tmp_path):
    fast = Pretended(lambda s: abs(math.log(float(s["optim.lr"]) / 0.2)))
    field = race.entries(["demo"], "normuon,muon", ["muon=0.1,0.2,0.4"])
    found = race.Race(["demo", "train.steps=10"], field, 2, tmp_path, 2).run(fast)
    normuon, muon = found["optimizers"]
    assert [t["lr"] for t in normuon["tuning"]] == [0.02, 0.04, 0.08, 0.16, 0.32]
    assert normuon["lr"] == 0.16 and [t["lr"] for t in muon["tuning"]] == [0.1, 0.2, 0.4]
    tuning = [job for job in fast.jobs if "tuning" in job.path.parts]
    assert len(tuning) == (5 + 3) * 2 and not any(job.keep for job in tuning)
    for job in tuning:
        assert "data.tuning=0.05" in job.arguments and "train.eval_every=0" in job.arguments
    seeds = [job for job in fast.jobs if "seeds" in job.path.parts]
    assert not any("data.tuning" in a for job in seeds for a in job.arguments)
    own = lambda jobs: {a for job in jobs for a in job.arguments if "train.seed" in a}  # noqa: E731
    assert own(seeds) == {"train.seed=0", "train.seed=1"} and not own(seeds) & own(tuning)
    count = len(fast.jobs)
    alone = race.entries(["demo"], "normuon", ["0.1"])
    assert race.Race(["demo"], alone, 2, tmp_path / "c").run(fast)["optimizers"][0]["n"] == 2
    assert len(fast.jobs) == count + 2  # nothing to choose
    endless = race.Race(["demo"], field[:1], 0, tmp_path / "b")
    endless.run(Pretended(lambda s: -float(s["optim.lr"])))
    assert len(field[0].tuning) == 3 + race.LONGER
    fixed = race.Race(["demo"], field[:1], 0, tmp_path / "d", grow=False)
    fixed.run(Pretended(lambda s: -float(s["optim.lr"])))
    assert len(field[0].tuning) == 3


def test_the_plan_says_what_a_race_costs(tmp_path, caplog):
    """Every run is counted, those after a grid has grown too; the baseline is named."""
    caplog.set_level("INFO", "nanonormuon")
    field = race.entries(["demo"], "normuon,muon", ["muon=0.1,0.2"], sweep=["optim.ns_steps=4,5"])
    races = race.Race(["demo", "train.steps=10"], field, 3, tmp_path, 2)
    begun = Pretended(lambda s: 1.0)
    races.run(begun)
    plan = [record.getMessage() for record in caplog.records]
    assert plan[0].startswith(f"plan: {(3 + 2) * 2 * 2 + 3 * 2} runs of 10 steps of 4,096 tokens")
    assert "20 runs choose" in plan[1] and "normuon 6, muon 4; 2 each" in plan[1]
    assert "up to 8 more" in plan[2] and "--no-grow" in plan[2]
    assert "best of all but the first" in plan[3]
    named = race.Race(["demo", "train.steps=10"], field, 3, tmp_path, 2, "normuon", grow=False)
    found = named.run(Pretended(lambda s: 1.0))
    assert [row["baseline"] for row in found["optimizers"]] == ["normuon", "normuon"]
    with pytest.raises(ConfigError, match=r'--baseline "normoun".*did you mean "normuon"'):
        race.Race(["demo"], field, 3, tmp_path, 2, "normoun")


@pytest.mark.parametrize(
    ("optimizers", "sweep", "message"),
    [
        ("normuon,torch.optim:Adammm", "optim.beta2=0.9", "Adammm"),
        ("normuon,torch.optim:Adagrad+options=epsilon=1", "optim.cautious=true", "no epsilon"),
        ("normuon,muon", "optim.beta2_on=*.mlpp.*", "matches no matrix"),
        ("normuon,muon", "optim.ns_coefficients=muon,2", "three numbers"),
    ],
)
def test_every_candidate_is_made_before_the_first_run(optimizers, sweep, message):
    with pytest.raises(ConfigError, match=message):
        race.entries(["demo"], optimizers, sweep=[sweep])


def test_who_leads_is_shown_and_a_continued_race_counts_what_it_has(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "nanonormuon")
    losses = {"a+seed=0": 3.0, "b+seed=0": 2.0, "a+seed=1": 0.5, "b+seed=1": 2.0}
    clock = itertools.count(0, 30).__next__  # seconds; read at the start and after each run
    monkeypatch.setattr(processes, "time", types.SimpleNamespace(perf_counter=clock))

    def carry_out(self, job):
        job.path.mkdir(parents=True)
        (job.path / "metrics.jsonl").write_text('{"step": 1, "val_loss": 1}')
        (job.path / "config.toml").write_text("")
        summary = {"val_loss": losses[job.path.name]}
        (job.path / "summary.json").write_text(json.dumps(summary))
        return summary

    monkeypatch.setattr(Runner, "carry_out", carry_out)
    jobs = [Job(tmp_path / "seeds" / name, ("demo",)) for name in losses]
    Runner(1).run(jobs[:1])
    runner = Runner(1)
    runner.run(jobs[:2], later=2)
    runner.run(jobs[2:])
    first, *others = [r.getMessage() for r in caplog.records]
    assert first == "1/1 a+seed=0: val_loss 3.0000; mean 3.0000 (n = 1)"
    assert [line.partition(":")[0] for line in others] == [
        "2/4 b+seed=0", "3/4 a+seed=1", "4/4 b+seed=1",
    ]  # fmt: skip
    assert "b leads with 2.0000 (n = 1); about 01:00 to go" in others[0]
    assert "a leads with 1.7500 (n = 2)" in others[1] and "to go" not in others[2]


def test_the_bar_of_a_race_advances_with_the_steps_of_its_runs(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def carry_out(self, job):
        """Log a step, and end once the bar has shown it."""
        job.path.mkdir()
        with open(job.path / "metrics.jsonl", "a") as rows:
            for step in (1, 2):
                rows.write(json.dumps({"step": step}) + "\n")
                rows.flush()
                expected = f" {shown.pop(0)}/9 ["
                while expected not in screen.getvalue():
                    assert time.monotonic() < late, screen.getvalue()
                    threading.Event().wait(0.001)
        return {"val_loss": 1.0}

    monkeypatch.setattr(processes, "REFRESH", 0.001)
    monkeypatch.setattr(Runner, "carry_out", carry_out)
    monkeypatch.setattr("sys.stderr", screen := Terminal())
    shown, late = [1, 2, 4, 5], time.monotonic() + 60
    jobs = [Job(tmp_path / name, ("demo", "train.steps=3")) for name in "ab"]
    assert len(Runner(1).run(jobs, later=1)) == 2
    assert shown == []


@pytest.mark.parametrize(("given", "expected"), [(None, "2"), ("5", "5")])
def test_threads_that_the_user_gives_are_kept(given, expected, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    places = list(Runner(4).places.queue)
    assert places == [{"OMP_NUM_THREADS": expected}] * 4


def test_the_judgement_by_hand():
    def entry(label, curves):
        tuning = [{"lr": 0.1, "settings": (), "val_loss": [1.0]}]
        found = results.Entry(label, (f"optim.name={label}",), (0.1,), ((),), tuning)
        for curve in curves:
            run = {"val_loss": curve[-1][1], "curve": curve, "train_seconds": 3.0}
            found.runs.append(run | {"peak_memory": 7})
        return found

    field = [
        entry("a", [[[50, 3.0], [100, 1.0]], [[50, 2.5], [100, 1.5]]]),
        entry("b", [[[50, 3.0], [100, 2.0]], [[50, 3.0], [100, 2.0]]]),
        entry("c", [[[50, 3.0], [100, 2.5]], [[50, 3.0], [100, 2.9]]]),
    ]
    a, b, c = results.judge(field, 100)
    assert a["baseline"] == "b" and a["mean"] == 1.25 and a["sd"] == pytest.approx(0.353553, 1e-5)
    assert a["difference"] == pytest.approx(-0.75)
    assert a["steps_to_baseline"] == pytest.approx(
        (75 + 75) / 2
    )  # straight from 3 to 1, 2.5 to 1.5
    assert a["percent_saved"] == pytest.approx(25) and a["percent_saved_interval"] is not None
    assert a["against"]["b"]["steps_to_baseline"] == a["steps_to_baseline"]
    assert a["against"]["c"]["difference"] == pytest.approx(1.25 - 2.7)
    assert b["difference"] == 0 and b["percent_saved"] == 0 and b["reached"] == 2
    assert c["reached"] == 0 and "percent_saved" not in c
    assert a["ms_per_step"] == pytest.approx(30) and a["peak_memory"] == 7
    alone = results.markdown({"optimizers": results.judge(field[:1], 100), "steps": 100})
    assert "a (baseline)" not in alone and "| - | - | - |" in alone and "reached" not in alone
    table = results.markdown({"optimizers": [a, b, c], "steps": 100})
    assert "b (baseline)" in table and "not reached" in table and "1.2500 ± 0.3536" in table


# --------------------------------------------------------------------------------------------- runs


@pytest.fixture
def here(monkeypatch):
    """Runs in this process instead of one of their own; counts them."""
    begun = []

    def start(self, job, arguments, place):
        begun.append(job.path.name)
        resume = arguments[0] == "--resume"
        source = [str(job.path / "config.toml"), *arguments[1:]] if resume else arguments
        if resume:
            source.insert(1, "train.stop_at=0")  # as cli.run does
        train(load(source)[0], job.path, resume)
        return 0, ""

    class Inline(concurrent.futures.ThreadPoolExecutor):  # signals need the main thread
        def submit(self, call, *arguments):
            future = concurrent.futures.Future()
            future.set_result(call(*arguments))
            return future

    monkeypatch.setattr(Runner, "start", start)
    monkeypatch.setattr(processes, "ThreadPoolExecutor", Inline)
    return begun


@pytest.fixture
def smaller(tiny):
    """Arguments of a run of four steps."""
    return [*tiny, "model.n_layer=1", "train.steps=4", "train.eval_every=2"]


def test_a_race_from_its_first_run_to_its_table(smaller, tmp_path, here):
    field = race.entries(smaller, "normuon,adamw", ["1x", "normuon=0.04,0.02"])
    found = race.Race(smaller, field, 2, tmp_path / "r").run(Runner())
    assert json.loads((tmp_path / "r/results.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "r/race.png").stat().st_size > 1000 and len(found["source_sha256"]) == 1
    count = len(here)
    paths = sorted((tmp_path / "r/seeds").glob("*=0"))
    normuon, adamw = (read_rows(path / "metrics.jsonl")[0] for path in paths)
    assert normuon["loss"] == adamw["loss"]  # the same weights, the same text
    steps = [step for step, _ in found["optimizers"][0]["curves"][0]]
    assert steps == [2, 4]  # the user's eval_every
    for folder in (tmp_path / "r/tuning").iterdir():
        assert not (folder / "checkpoints").exists()
    losses = found["optimizers"][0]["val_loss"]
    found = race.Race(smaller, field, 3, tmp_path / "r", breakdown=True).run(Runner())
    assert len(here) == count + 2 and found["optimizers"][0]["val_loss"][:2] == losses
    assert [len(row["breakdown"]) for row in found["optimizers"]] == [3, 3]
    table = (tmp_path / "r/results.md").read_text()
    assert (
        re.search(r"^\| adamw \| \d\.\d{4} ± 0\.\d{4} \|", table, re.M) and "97 to 100 %" in table
    )
    with pytest.raises(RunError, match="other runs"):
        race.Race([*smaller, "optim.decay=1"], field, 2, tmp_path / "r").run(Runner())


def test_a_race_goes_on_only_with_the_settings_that_it_began_with(tmp_path, monkeypatch):
    """Another version of the package may have changed the recipe that the arguments name."""
    plan = tmp_path / "r" / "race.json"
    processes.claim(plan, ["demo", "train.steps=3"], "seeds are the race's")
    processes.claim(plan, ["demo", "train.steps=3"], "seeds are the race's")
    content = json.loads(plan.read_text())
    assert content["settings"]["train.batch_tokens"] == 4096
    content["settings"]["train.batch_tokens"] = 8192
    plan.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"train\.batch_tokens = 8192.* 4096") as refused:
        processes.claim(plan, ["demo", "train.steps=4"], "seeds are the race's")
    assert "train.steps = 3" in str(refused.value) and "arguments" not in str(refused.value)
    content["settings"]["train.batch_tokens"] = 4096
    del content["settings"]["model.key_shift"]  # a plan from before this setting: its default
    plan.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"model\.key_shift = false, found true"):
        processes.claim(plan, ["demo", "train.steps=3"], "seeds are the race's")
    del content["settings"]  # a plan of an older version
    plan.write_text(json.dumps(content))
    processes.claim(plan, ["demo", "train.steps=3"], "seeds are the race's")
    with pytest.raises(RunError, match=r"arguments = .*3.*4.*steps = 3, found 4"):
        processes.claim(plan, ["demo", "train.steps=4"], "seeds are the race's")
    for broken in ("[]", "{", "null"):
        plan.write_text(broken)
        with pytest.raises(RunError, match=r"race\.json"):
            processes.claim(plan, ["demo", "train.steps=3"], "seeds are the race's")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_kept_results_become_tables_and_are_verified(smaller, tmp_path, here, monkeypatch, capsys):
    """The way from a race to docs/results.md, and back to a run that is compared."""
    arguments = smaller
    field = race.entries(arguments, "normuon,adamw", ["1x", "adamw=0.003"])
    race.Race(arguments, field, 2, tmp_path / "race-shakespeare").run(Runner())
    for width in (32, 64):
        fast = Pretended(lambda s: abs(math.log(float(s["optim.lr"]) / 0.04)))
        race.Race(
            arguments, race.entries(arguments, "normuon"), 0, tmp_path / f"width-{width}"
        ).run(fast)
    evidence, verify = script("evidence"), script("verify_results")
    for name in ("KEPT", "RESULTS"):
        monkeypatch.setattr(evidence, name, tmp_path / "docs" / name)
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/RESULTS").write_text("before\n<!-- races -->\nold\n<!-- /races -->\nafter")
    evidence.main([str(tmp_path / n) for n in ("race-shakespeare", "width-32", "width-64")])
    written = (tmp_path / "docs/RESULTS").read_text()
    assert written.startswith("before") and written.endswith("after") and "old" not in written
    assert "| normuon | 64 |" in written and "**0.0000**" in written
    assert "| adamw (baseline) |" in written
    kept = (tmp_path / "docs/KEPT/race-shakespeare.json").read_text()
    assert str(tmp_path) not in json.loads(kept)["arguments"] and "data.path" not in kept
    data = next(a for a in arguments if a.startswith("data.path"))
    monkeypatch.setattr(verify, "KEPT", tmp_path / "docs/KEPT")
    monkeypatch.setattr(sys, "argv", ["verify", "race-shakespeare", "--set", data])
    assert verify.main() == 0 and "agrees" in capsys.readouterr().out
    spoilt = json.loads(kept)
    spoilt["optimizers"][0]["val_loss"][0] += 1
    (tmp_path / "docs/KEPT/race-shakespeare.json").write_text(json.dumps(spoilt))
    assert verify.main() == 1 and "DIFFERS" in capsys.readouterr().out


def test_the_choice_never_sees_the_validation_split(tiny, shards):
    whole = open_data(shards)
    part, rest = whole.train.cut(round(0.75 * whole.train.tokens))
    assert part.tokens + rest.tokens == whole.train.tokens
    joined = [*part.shards, *rest.shards]
    assert b"".join(bytes(s) for s in joined) == b"".join(bytes(s) for s in whole.train.shards)
    for share, tokens in ((0.0, whole.val.tokens), (0.25, rest.tokens)):
        config = load([*tiny, f"data.tuning={share}"])[0]
        data, _ = corpus.open_corpus(config, distributed.start("cpu"))
        assert data.val.tokens == tokens


def test_a_run_whose_numbers_explode_loses_the_race(tiny, tmp_path, monkeypatch):
    job = Job(tmp_path / "a", (*tiny,))
    job.path.mkdir()
    (job.path / "crash-000003.json").write_text("{}")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert Runner().carry_out(job)["val_loss"] == math.inf
    tuning = [{"lr": 0.1, "settings": (), "val_loss": [math.inf]}]
    assert results.judge([results.Entry("a", (), (0.1,), ((),), tuning)], 8)[0]["lr"] == 0.1


@pytest.mark.slow
def test_trials_survive_a_kill(tiny, tmp_path, capsys):
    """Killed together with the run under way, and repeated: the same loss as in one go."""
    out = tmp_path / "t"
    settings = [*tiny, "model.n_layer=1", "train.steps=200", "train.save_every=4"]
    settings += ["train.eval_every=0"]
    arguments = ["trials", *settings, "--n", "1", "--target", "9", "--out", str(out)]
    begun = subprocess.Popen([sys.executable, "-m", "nanonormuon", *arguments])
    until = time.monotonic() + WAIT
    while not any(out.glob("trial-000/checkpoints/step-*")) and time.monotonic() < until:
        time.sleep(0.01)
    for pid in (begun.pid, int((out / "trial-000" / ".lock").read_text())):
        os.kill(pid, signal.SIGKILL)
    begun.wait()
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads((out / "trials.json").read_text())
    assert found["n"] == 1 and found["valid"] and found["target"] == 9
    text = (out / "trial-000.txt").read_text()
    for piece in ("def newton_schulz", "source_sha256", "train.seed=0", '"val_loss"', "[optim]"):
        assert piece in text
    assert "resumed from" in (out / "trial-000" / "train.log").read_text()
    whole = train(load([*settings, "train.sample_tokens=0"])[0], tmp_path / "whole")
    assert whole["val_loss"] == found["losses"][0]


def test_a_run_that_outlives_its_race_is_waited_for(smaller, tmp_path, here):
    job = Job(tmp_path / "a", (*smaller,))
    train(load(smaller)[0], job.path)
    later = (job.path / "summary.json").rename(tmp_path / "later.json")
    writer = contextlib.ExitStack()
    writer.enter_context(locked(job.path / ".lock"))

    def end():
        later.rename(job.path / "summary.json")
        writer.close()

    threading.Timer(0.2, end).start()
    assert Runner().carry_out(job)["steps"] == 4 and not here


@pytest.mark.parametrize(
    ("code", "report", "anew"),
    [(-9, "", False), (8, "", False), (4, "", True), (1, "8", False), (1, "4", True)],
)
def test_a_run_starts_over_only_if_its_checkpoints_are_refused(
    code, report, anew, smaller, tmp_path, monkeypatch
):
    """Killed once more, or on a full disk, it keeps what it has. report: of torchrun, after the
    error of the rank that failed first."""
    job, begun = Job(tmp_path / "a", (*smaller,)), []
    (job.path / "checkpoints" / "step-000002").mkdir(parents=True)
    (job.path / "config.toml").touch()
    job.log_file.write_text("error: an older one\n")
    text = "step 1\nerror: what it said\n"
    if report:
        text += "error: of another rank\n  exitcode  : 7 (pid: 1) \nRoot Cause\n"
        text += f"  exitcode  : {report} (pid: 2) \n=====\n"

    class Child:
        def __init__(self, command, **options):
            begun.append("--resume" in command)
            options["stdout"].write(text.encode())

        def wait(self):
            return code

    monkeypatch.setattr(subprocess, "Popen", Child)
    with pytest.raises(RunError, match="a: what it said"):
        Runner(ranks=2 if report else 1).carry_out(job)
    assert (job.path / "checkpoints" / "step-000002").exists() is not anew
    assert begun == [True, False][: 1 + anew]


@pytest.mark.parametrize(
    ("visible", "ranks", "expected"),
    [("", 1, ["0", "1", "2", "3"]), ("4,5,6,7", 2, ["4,5", "6,7"]), ("2,3", 1, ["2", "3"])],
)
def test_each_run_has_gpus_of_its_own(visible, ranks, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    count = len(visible.split(",")) if visible else 4
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    places = list(Runner(0, ranks).places.queue)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == expected


def test_a_job_that_was_cut_off_ends_where_it_was_to_end(tiny, tmp_path, here):
    job = Job(tmp_path / "a", (*tiny, "train.stop_at=5"))
    train(load([*tiny, "train.stop_at=3"])[0], job.path)  # saved at step 3 ...
    (job.path / "summary.json").unlink()  # ... and killed
    assert Runner().run([job])[0]["steps"] == 5


@pytest.mark.slow
def test_a_failing_run_ends_the_batch_with_its_last_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        processes, "config", type("no", (), {"load": staticmethod(lambda a: load(["demo"]))})
    )
    job = Job(tmp_path / "a", ("demo", "train.stepz=1"))
    with pytest.raises(RunError, match=r"did you mean .*train\.steps.*see .*a\.log"):
        Runner().run([job])


# ------------------------------------------------------------------------------ others' optimizers


def run(arguments, out, resume=False, **more):
    return train(load([*arguments, *(f"{k}={v}" for k, v in more.items())])[0], out, resume)


def bytes_of(run_directory):
    newest = checkpoint.all_steps(run_directory / "checkpoints")[-1]
    return (newest / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["test_race:Nested", "torch.optim:Adagrad", "torch.optim:Muon"])
def test_any_optimizer_trains_and_resumes_bitwise(name, smaller, tmp_path):
    arguments = [*smaller, f"optim.name={name}", "optim.lr=0.01"]
    whole = run(arguments, tmp_path / "a")
    assert whole["val_loss"] < 5.3  # from ln 256 = 5.5
    run([*arguments, "train.stop_at=2"], tmp_path / "b")
    run([str(tmp_path / "b/config.toml"), arguments[-2], "train.stop_at=0"], tmp_path / "b", True)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_state_that_needs_pickle_is_not_resumed(tiny, tmp_path):
    arguments = [*tiny, "optim.name=test_race:Nested", "optim.options=thing=1, power=0.5"]
    run([*arguments, "train.stop_at=3"], tmp_path / "a")
    with pytest.raises(errors.CheckpointError, match=r"Nested.*a object.*init-from"):
        run(
            [str(tmp_path / "a/config.toml"), arguments[-2], "train.stop_at=0"],
            tmp_path / "a",
            True,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "nowhere:X"}, "No module named 'nowhere'.*FILE.py"),
        ({"name": "torch.optim:Muonn"}, "has no attribute 'Muonn'"),
        ({"name": "os:system"}, "expected module:Class of an optimizer"),
        ({"name": "test_race:Nested", "options": "powr=2"}, "has no powr; it has .*power"),
        ({"name": "test_race:Nested", "options": "power=print"}, "expected KEY=VALUE"),
        ({"name": "torch.optim:Adagrad", "options": "eps=-1"}, "Invalid epsilon"),
        ({"name": "torch.optim:Rprop", "weight_decay": 0.1}, "no weight decay"),
        ({"beta2_on": "*.mlpp.*"}, "matches no matrix"),
    ],
)
def test_what_is_no_optimizer_or_no_setting_of_it(settings, message):
    with pytest.raises(ValueError, match=message):
        make_optimizers(GPT(SMALL), OptimConfig(**settings))


def test_names_in_the_configuration():
    with pytest.raises(ConfigError, match='did you mean "muon"'):
        load(["demo", "optim.name=mu0n"])
    with pytest.raises(ConfigError, match="ddp"):
        load(["demo", "optim.name=torch.optim:Muon", "train.parallel=fsdp"])
    with pytest.raises(ConfigError, match=r"optim\.options"):
        load(["demo", "optim.options=eps=1"])
    assert load([*TINY, "optim.name=torch.optim:Muon"])[0].optim.name == "torch.optim:Muon"


MINE = """
import torch

class Mine(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1, weight_decay=0.0, scale=1.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "scale": scale})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"] * group["scale"])
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """An optimizer's file in the working directory, and its name as a command has it."""
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(MINE)
    return Path("my.py"), "my.py:Mine"


def test_an_optimizer_in_a_file_of_ones_own(mine, smaller):
    file, name = mine
    arguments = [*smaller, "train.steps=2", "optim.lr=0.01", f"optim.name={name}"]
    run(arguments, "a")
    made = json.loads(Path("a/environment.json").read_text())
    assert made["optimizer_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert made["source_sha256"] == source_hash(name) != source_hash()
    once = optimizer_class(name)
    assert optimizer_class(name) is once  # its module is made once ...
    file.write_text(MINE.replace("sign()", "sign().neg()"))
    assert optimizer_class(name) is not once  # ... for each content
    assert source_hash(name) != made["source_sha256"]
    with pytest.raises(ConfigError, match=r"a/config.toml.*add optim\.name=my\.py:Mine"):
        run(["a/config.toml"], "b")
    for wrong, why in (
        ("you.py:Mine", "you.py"),
        ("my.py:Yours", "Yours"),
        ("my.py:torch", "class"),
    ):
        with pytest.raises(ValueError, match=rf"name = .{wrong}.*{why}"):
            optimizer_class(wrong)


@pytest.mark.slow
def test_a_file_that_changed_stops_its_race(mine, smaller, here, caplog):
    """Before the next run, and after a run that it changed under; other runs do not mind."""
    file, name = mine
    arguments = [*smaller, "train.steps=2"]

    def race_on(seeds):
        field = race.entries(arguments, f"normuon,{name}", ["0.01"])
        return race.Race(arguments, field, seeds, Path("r")).run(Runner())

    assert len(race_on(1)["source_sha256"]) == 2  # with the file, and without
    assert "versions of the source" not in caplog.text
    file.write_text(MINE + "\n")
    old, new = (hashlib.sha256(text.encode()).hexdigest() for text in (MINE, MINE + "\n"))
    with pytest.raises(RunError, match=rf"my\.py:Mine.*{old}.*{new}.*--out"):
        race_on(2)
    assert len(here) == 2
    file.write_text(MINE)
    assert len(race_on(2)["optimizers"][1]["val_loss"]) == 2


@pytest.mark.slow
def test_a_trials_log_has_the_optimizers_file(mine, smaller, here):
    arguments = [*smaller, "train.steps=2", f"optim.name={mine[1]}", "optim.lr=0.01"]
    trials.run(arguments, 1, 9.0, Path("t"), Runner())
    assert "\nmy.py\n" in (text := Path("t/trial-000.txt").read_text()) and MINE in text


@pytest.mark.slow
def test_your_own_optimizer_as_written(smaller, here, tmp_path, monkeypatch, capsys):
    """Every command of docs/your-optimizer.md, in its order, with its file; the runs are small."""
    text = (ROOT / "docs" / "your-optimizer.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    (source,) = (block for kind, block in blocks if kind == "python")
    copy, *commands = [line for kind, block in blocks if not kind for line in block.splitlines()]
    monkeypatch.chdir(tmp_path)
    subprocess.run(copy.replace("python", sys.executable), shell=True, check=True)
    assert Path("my_optimizer.py").read_bytes() == (PACKAGE / "lab/zoo/osp.py").read_bytes()
    Path("my_optimizer.py").write_text(source)
    assert len(source.splitlines()) <= 40
    small = [a for a in smaller if "=" in a and "steps" not in a]
    for line in commands:
        line = re.sub(
            r"--seeds (\d)", lambda seeds: f"--no-grow --seeds {int(seeds[1]) // 4}", line
        )
        words = shlex.split(re.sub("steps=([12])[02]0", r"steps=\1", line))[1:]
        more = [] if "--resume" in words else small
        assert cli.main([words[0], *more, *words[1:]]) == 0, capsys.readouterr().err
    results = json.loads(Path("runs/mine/results.json").read_text())
    assert [row["n"] for row in results["optimizers"]] == [2, 2, 2]
    assert "my_optimizer.py:Rows" in capsys.readouterr().out


@pytest.mark.slow
def test_a_file_whose_state_does_not_shard_needs_ddp(mine, tiny, forks):
    arguments = [*tiny, f"optim.name={Path.cwd() / mine[1]}", "train.parallel=fsdp"]
    codes, said = forks.run([*arguments, "--out", Path("f").resolve()], ranks=2)
    assert codes == [2, 2] and "my.py:Mine needs whole matrices" in said[0]


def test_a_second_moment_for_some_matrices_only():
    def after(**settings):
        torch.manual_seed(0)
        model = GPT(SMALL).init_weights(0)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer = make_optimizers(model, OptimConfig(**settings), torch.float32)[0]
        assert isinstance(optimizer, NorMuon)
        optimizer.step()
        return dict(model.named_parameters())

    some, full, none = after(beta2_on="*.mlp.*"), after(), after(name="muon")
    matrices = [n for n in some if "proj" in n]
    assert {"mlp" in n for n in matrices} == {True, False}
    for name in matrices:
        like, unlike = (full, none) if "mlp" in name else (none, full)
        assert torch.allclose(some[name], like[name], rtol=1e-6, atol=1e-8)
        assert not torch.allclose(some[name], unlike[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_real_thing_on_the_command_line(tmp_path):
    code, _, said = command("race", "demo", "--optimizers", "normoun", "--out", tmp_path / "x")
    assert code == 2 and 'did you mean "normuon"' in said and not Path(tmp_path / "x").exists()
