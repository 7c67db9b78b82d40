"""The doctor finds what is there, says what a run would choose, and fails where a run would."""

import json
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from nanonormuon.cli import app as cli
from nanonormuon.cli import doctor
from nanonormuon.runtime import distributed

CHECKS = ["python", "packages", "extras", "device", "precision", "attention", "compile", "disk",
          "shared memory", "backends", "handshake"]  # fmt: skip


@pytest.mark.slow
def test_this_machine_is_healthy(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert [f["check"] for f in findings] == CHECKS
    found = {f["check"]: f for f in findings}
    assert found["handshake"]["found"].startswith("two processes agreed")
    assert torch.__version__ in found["packages"]["found"]
    dtype = distributed.compute_dtype("auto", distributed.start().device)
    assert found["precision"]["found"].startswith(str(dtype).removeprefix("torch."))


@pytest.fixture()
def no_handshake(monkeypatch):
    def handshake():
        return "not tried", ""

    monkeypatch.setattr(doctor, "handshake", handshake)


def test_what_is_wrong_is_named_with_its_remedy(no_handshake, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "version", lambda n: "missing" if n == "tiktoken" else "1")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**8))

    def broken():
        raise RuntimeError("driver mismatch")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "fail  packages" in out and "-> pip install tiktoken" in out
    assert "fail  device         RuntimeError: driver mismatch" in out
    assert "warn  disk" in out and "-> make room in" in out
    monkeypatch.setattr(doctor.os, "access", lambda path, _: path != Path.cwd())
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "fail  disk" in out and f"{Path.cwd()} is not writable: choose another" in out


def refuse(rank, *_):
    """Stands in for doctor.meet, in processes of its own."""
    if rank == 1:
        raise ConnectionError("connection refused")


def never(*_):
    threading.Event().wait()


@pytest.mark.slow
def test_a_handshake_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(doctor, "meet", refuse)
    found, fix = doctor.handshake()
    assert found == "gloo: ConnectionError: connection refused" and "firewall" in fix
    monkeypatch.setattr(doctor, "meet", never)
    assert doctor.handshake(0.5)[0] == "gloo: no answer in 0 s"
