"""The tests' own test: each deliberate defect (defects.py) makes a named test fail."""

import subprocess
import sys

import pytest
from defects import DEFECTS
from support import ROOT

# Each pytest is a fork of a process that has imported what is slow, but nothing of the package,
# into whose modules a defect goes before anything else imports them.
SERVER = """
import os, sys
import numpy, pytest, rustbpe, safetensors.torch, tiktoken, torch.distributed.tensor, typer

for line in sys.stdin:
    name, test, log = line.rstrip("\\n").split("\\t")
    if not (pid := os.fork()):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        os.environ["DEFECT"] = name
        code = pytest.main(["-p", "no:cacheprovider", "--assert=plain", "-m", "", test])
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""  # plain: to show how two checkpoints differ can take many minutes


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "-c", SERVER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, bufsize=1, **pipes) as server:
        yield server
        server.stdin.close()


@pytest.mark.full
@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_noticed(name, server, tmp_path):
    server.stdin.write(f"{name}\t{DEFECTS[name][-1]}\t{tmp_path / 'log'}\n")
    code, printed = server.stdout.readline(), (tmp_path / "log").read_text()
    assert code == "1\n" and " failed" in printed, printed[-2000:]
