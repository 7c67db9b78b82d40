"""The command `sample`: prompts from everywhere, and what it refuses."""

import io
import json

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
    assert said("--prompt", "the cat", "--quiet").err == ""
    rows = said("--prompt", "the cat", "--num", "2", "--json").out.splitlines()
    assert [json.loads(r)["prompt"] + json.loads(r)["text"] + "\n" for r in rows] == [found.out] * 2
    stopped = said("--prompt", "the cat", "--stop", found.out[10:14])
    assert stopped.out == found.out[: found.out.index(found.out[10:14], 7)] + "\n"
    assert cli.main(["sample", str(trained), "--file", str(tmp_path / "no.txt")]) == 2
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    assert cli.main(["sample", str(trained), "--file", str(tmp_path / "bytes.txt")]) == 2
    assert "not UTF-8" in capsys.readouterr().err
    assert cli.main(["sample", str(trained), "--prompt", "a", "--interactive"]) == 2
    assert "expected one of them" in capsys.readouterr().err
