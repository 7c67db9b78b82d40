"""Helper functions of several test files."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

ROOT = Path(__file__).parents[1]
FSYNC = os.fsync  # the real one; conftest.py puts another in its place
WAIT = 900  # seconds for what takes some: a limit for what hangs, on a busy machine too

TINY = [
    "demo",  # what the command line begins with too
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_kv_head=1",
    "model.n_embd=32",
    "model.bigram_embed=96",
    "model.key_shift=false",  # which needs two key heads
    "data.seq_len=32",
    "data.val_tokens=900",
    "train.batch_tokens=384",
    "train.steps=8",
    "train.log_every=1",
    "train.eval_every=4",
    "train.save_every=3",
    "train.sample_tokens=2",
    "train.dtype=fp32",
    "train.device=cpu",
    "optim.momentum_warmup=4",
]
LATENT = [
    "model.attention=latent",
    "model.n_kv_head=0",
    "model.value_embed=false",
]  # what TINY lacks of latent attention


def command(*arguments, cwd=None, env=None, timeout=WAIT):
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


def serialise(tensors):
    """A safetensors file's content."""
    from nanonormuon.storage.tensors import stream

    return b"".join(stream(tensors))


def write_shard(path, tokens, vocab_size):
    """Write token ids (n,) as one shard of a vocabulary."""
    import numpy as np

    from nanonormuon.storage import shards

    version = 1 if vocab_size <= 65_536 else 2
    content = np.asarray(tokens).astype(shards.DTYPES[version]).tobytes()
    Path(path).write_bytes(shards.header(version, len(tokens)) + content)


RESERVED = deque(maxlen=64)


def reserved_port():
    """A port for processes that this one starts. A socket stays bound to it without listening, so
    that nobody else is given it, but a server with SO_REUSEADDR, as torch's store is, may take it.
    """
    RESERVED.append(s := socket.socket())
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("", 0))
    return s.getsockname()[1]


class Ranks:
    """The processes of one training run, one per rank."""

    def __init__(self, forks, pids, logs):
        self.forks, self.pids, self.logs = forks, pids, logs

    def wait(self, timeout=WAIT):
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
    """A process that has imported everything and forks off the processes of runs (faulty.py) or of
    test_layouts.py (worker.py): a short run then takes a second instead of the several that it
    takes to import torch."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "faulty.py"), "serve"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        )  # fmt: skip
        self.loaded = self.server.stdout.readline().split()  # by `import nanonormuon.train`
        assert self.loaded

    def close(self):
        self.server.stdin.close()
        self.server.wait()

    def ask(self, wish):
        self.server.stdin.write(json.dumps(wish) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, arguments, ranks=1, fault="", program="faulty.py", nodes=1):
        env = {"FAULT": fault, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(reserved_port())}
            env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks // nodes)}
        pids, logs = [], []
        for rank in range(ranks):
            self.count += 1
            logs.append(self.folder / f"{self.count}.txt")
            local = str(rank % (ranks // nodes))
            more = {"RANK": str(rank), "LOCAL_RANK": local} if ranks > 1 else {}
            wish = {"argv": [program, *map(str, arguments)], "env": env | more}
            pids.append(self.ask(wish | {"stderr": str(logs[-1])}))
        return Ranks(self, pids, logs)

    def run(self, arguments, ranks=1, fault="", program="faulty.py", nodes=1):
        """(exit codes, standard error) of a run, per rank."""
        started = self.start(arguments, ranks, fault, program, nodes)
        return started.wait(), started.said


def run(arguments, out, resume=False):
    """Train in this process; the summary."""
    from nanonormuon.config import load  # imported late: conftest.py puts defects in first
    from nanonormuon.train import train

    return train(load(arguments)[0], Path(out), resume)


def final(out, step=None):
    """The bytes of weights and optimizer in a run's checkpoint of this step, or its newest."""
    pattern = "step-*" if step is None else f"step-{step:06d}"
    path = max((Path(out) / "checkpoints").glob(pattern))
    return [(path / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]


def prepare_cutting(root, out, workers):
    """Prepare a folder of which a text of 3 MB is cut as one of 17 MB would be; for a process."""
    from nanonormuon.text import prepare, sources

    sources.LARGE, sources.PART = 1 << 21, 1 << 17
    prepare.prepare([root], out, "bpe:4096", workers=workers, shard_bytes=1 << 18)


TIMES = {"seconds", "tokens_per_second", "train_seconds", "compile_seconds", "total_seconds",
         "peak_memory"}  # fmt: skip


def outcome(out, step):
    """What a run has come to that must not depend on what happened on the way: by name, but for
    times, the bytes of its checkpoint of this step, its summary, metrics and samples."""
    logs = {name: log(out, name) for name in ("summary.json", "metrics.jsonl", "samples.jsonl")}
    return dict(zip(("weights", "buffers"), final(out, step))) | logs


def log(out, name="metrics.jsonl"):
    """The rows of a file of JSON, one per line, as they lie there, but for times."""
    text = (Path(out) / name).read_text()
    rows = [json.loads(row) for row in ([text] if name.endswith(".json") else text.splitlines())]
    return [{key: row[key] for key in row if key not in TIMES} for row in rows]


def losses(out):
    """The training losses that a run has logged."""
    return [row["loss"] for row in log(out)]


def relative(a, b):
    """How far a is from b, in units of b's norm."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm()).item()


SOURCES = """
tests/golden/normuon.safetensors has what the authors' published code (official_*) and the paper's
Algorithm 1 in float64 (paper) compute; tests/twin.py is the same update in a few plain lines. If
the update was changed on purpose: change the twin in the same way, then `python tests/twin.py`
writes new golden numbers. They are the twin's then, and no longer show agreement with the authors:
say so in README.md, "NorMuon in one box"."""


def agree(found, wanted, tolerance, where):
    """Compare with the golden numbers, or the twin; a failure says where these come from."""
    error = relative(found, wanted)
    assert error < tolerance, f"{where}: off by {error:.2g}, expected {tolerance:g}{SOURCES}"
