"""Shared by the tests: a small corpus of learnable text, prepared once, and a fast
configuration."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    from nanonormuon.prepare import prepare

    out = tmp_path_factory.mktemp("data") / "story"
    prepare([text], out, "byte", 0.1)
    return out


@pytest.fixture(scope="session")
def tiny(shards):
    """Arguments of a run of eight steps that takes a second."""
    return [*TINY, f"data.path={shards}"]


def command(*arguments, cwd=None, env=None, timeout=120):
    """Run normuon-train as a user does: exit code, standard output, standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "nanonormuon.cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout, done.stderr
