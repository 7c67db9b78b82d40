"""The tests' own test: each deliberate defect (defects.py) makes a named test fail."""

import os
import subprocess
import sys

import pytest
from defects import DEFECTS
from support import ROOT, WAIT


@pytest.mark.full
@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_noticed(name):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--assert=plain", "-m", "",
         DEFECTS[name][-1]],  # plain: to show how two checkpoints differ can take many minutes
        cwd=ROOT, env={**os.environ, "DEFECT": name}, capture_output=True, text=True, timeout=WAIT,
    )  # fmt: skip
    assert done.returncode == 1 and " failed" in done.stdout, done.stdout[-2000:]
