"""Shared by the tests: a small corpus of learnable text, prepared once, and a fast
configuration."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import defects
import pytest
import torch

defects.apply()
ROOT = Path(__file__).parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "2")
torch.set_num_threads(2)

TINY = [
    "demo",  # what the command line begins with too
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_kv_head=1",
    "model.n_embd=32",
    "data.seq_len=32",
    "train.batch_tokens=384",
    "train.steps=8",
    "train.log_every=1",
    "train.eval_every=4",
    "train.save_every=3",
    "train.sample_tokens=8",
    "train.dtype=fp32",
    "train.device=cpu",
    "optim.momentum_warmup=4",
]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Sentences with structure to learn; random tokens would hide lost state."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "saw",
        "one",
        "bird",
        "near",
        "that",
        "tree",
        "while",
        "rain",
        "fell",
    ]
    lines = []
    for i in range(2500):
        lines.append(" ".join(words[(i * k + k) % len(words)] for k in range(1, 9)) + ".\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def shards(text, tmp_path_factory):
    """A prepared data directory of byte tokens."""
    from nanonormuon.text.prepare import prepare

    out = tmp_path_factory.mktemp("data") / "story"
    prepare([text], out, "byte", 0.1)
    return out


@pytest.fixture(scope="session")
def tiny(shards):
    """Arguments of a run of eight steps that takes a second."""
    return [*TINY, f"data.path={shards}"]


@pytest.fixture(scope="session")
def bpe_data(text, tmp_path_factory):
    """The same text in 300 tokens, which a model's vocabulary pads to 320 rows."""
    from nanonormuon.text.prepare import prepare

    out = tmp_path_factory.mktemp("data") / "words"
    prepare([text], out, "bpe:300", 0.1)
    return out


@pytest.fixture(scope="session")
def trained(bpe_data, tmp_path_factory):
    """The directory of a finished run that has learnt the text; for tests that only read it."""
    from nanonormuon.config import load
    from nanonormuon.train import train

    out = tmp_path_factory.mktemp("trained") / "run"
    settings = ["train.steps=60", "train.batch_tokens=512", "train.eval_every=20"]
    settings += ["train.save_every=20", "train.log_every=5", f"data.path={bpe_data}"]
    train(load([*TINY, "optim.momentum_warmup=30", *settings])[0], out)
    return out


def command(*arguments, cwd=None, env=None, timeout=120):
    """Run normuon-train as a user does: exit code, standard output, standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "nanonormuon", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout, done.stderr


class Ranks:
    """The processes of one training run, one per rank."""

    def __init__(self, forks, pids, logs):
        self.forks, self.pids, self.logs = forks, pids, logs

    def wait(self, timeout=120):
        """Exit codes, once all have ended; a process that does not is killed and gives -9."""
        until = time.monotonic() + timeout
        while any(alive(pid) for pid in self.pids) and time.monotonic() < until:
            time.sleep(0.01)
        for pid in self.pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        return [self.forks.ask(-pid) for pid in self.pids]

    @property
    def said(self):
        return [log.read_text(errors="replace") for log in self.logs]


def alive(pid):
    """Whether a process runs or is stopped; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Forks:
    """A process that has imported everything, and forks off the processes of runs (faulty.py): a
    run of a few steps then takes a second, not the many that torch needs to be imported."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "faulty.py"), "serve"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        )  # fmt: skip
        assert self.server.stdout.readline() == "ready\n"

    def ask(self, wish):
        self.server.stdin.write(json.dumps(wish) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, arguments, ranks=1, fault="", threads=1):
        env = {"FAULT": fault, "OMP_NUM_THREADS": str(threads)}
        if ranks > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
            env["WORLD_SIZE"] = env["LOCAL_WORLD_SIZE"] = str(ranks)
        pids, logs = [], []
        for rank in range(ranks):
            self.count += 1
            logs.append(self.folder / f"{self.count}.txt")
            more = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            wish = {"argv": ["faulty.py", *map(str, arguments)], "env": env | more}
            pids.append(self.ask(wish | {"stderr": str(logs[-1])}))
        return Ranks(self, pids, logs)

    def run(self, arguments, ranks=1, fault="", timeout=120):
        """(exit codes, what was said) of a run, per rank."""
        started = self.start(arguments, ranks, fault)
        return started.wait(timeout), started.said


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork()")
    forks = Forks(tmp_path_factory.mktemp("said"))
    yield forks
    forks.server.stdin.close()
    forks.server.wait(60)
