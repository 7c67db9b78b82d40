"""The command `sample`: prompts from everywhere, and what it refuses."""

import io
import json
import os

import pytest
import torch

from nanonormuon.cli import app as cli


def test_prompts_from_everywhere(trained, tmp_path, monkeypatch, capsys):
    def said(*arguments, typed=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        settings = ["--max-tokens", "12", "--temperature", "0", "--device", "cpu"]
        assert cli.main(["sample", str(trained), *settings, *arguments]) == 0
        return capsys.readouterr()

    found = said("--prompt", "the cat")
    assert found.out.startswith("the cat") and "tokens/s" in found.err
    (tmp_path / "prompt.txt").write_text("the cat")
    assert said("--file", str(tmp_path / "prompt.txt")).out == found.out
    assert said("--prompt", "-", typed="the cat").out == found.out
    assert said("--interactive", typed="the cat\nthe cat").out == found.out * 2
    assert "Ctrl-D" in said("--interactive").err
    assert said("--prompt", "the cat", "--quiet").err == ""
    rows = said("--prompt", "the cat", "--num", "2", "--json").out.splitlines()
    assert [json.loads(r)["prompt"] + json.loads(r)["text"] + "\n" for r in rows] == [found.out] * 2
    stopped = said("--prompt", "the cat", "--stop", found.out[10:14])
    assert stopped.out == found.out[: found.out.index(found.out[10:14], 7)] + "\n"
    assert cli.main(["sample", str(trained), "--file", str(tmp_path / "no.txt")]) == 2
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    assert cli.main(["sample", str(trained), "--file", str(tmp_path / "bytes.txt")]) == 2
    assert "position 0" in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe")
    assert cli.main(["sample", str(trained), "--file", str(tmp_path / "pipe")]) == 2
    error = capsys.readouterr().err
    assert error.count(str(tmp_path / "pipe")) == 1 and "a regular file" in error
    assert cli.main(["sample", str(trained), "--prompt", "a", "--interactive"]) == 2
    assert "expected at most one of these" in capsys.readouterr().err


def test_a_prompt_that_is_repeated_gets_other_text(trained, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("the\n" * 3))
    settings = ["--max-tokens", "8", "--temperature", "3", "--num", "2", "--json"]
    assert cli.main(["sample", str(trained), "--interactive", *settings]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["seed"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert len({row["text"] for row in rows}) == 6
    assert cli.main(["sample", str(trained), "--prompt", "the", "--seed", "4", *settings]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == rows[4]


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_named_by_its_option(command, device, trained, capsys):
    if getattr(torch, device).is_available():
        pytest.skip("it is there")
    assert cli.main([command, str(trained), "--device", device]) == 2
    error = capsys.readouterr().err
    assert f"--device {device}" in error and "train.device" not in error and "rank" not in error
