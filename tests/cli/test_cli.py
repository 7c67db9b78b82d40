"""The command line: a mistake ends in its exit code and one line that names what to do, before any
training, and leaves no files; commands print what their help texts promise."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import command, write_shard

from nanonormuon import __version__, config
from nanonormuon.cli import app as cli
from nanonormuon.cli import dry_run
from nanonormuon.cli.run import describe, without_effect
from nanonormuon.train import train

HERE = Path(__file__).parent


def called(arguments, capsys):
    """Exit code and the error line of a command run in this process."""
    code = cli.main([str(a) for a in arguments])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "demo", "train.stepz=3"], 2, 'did you mean "train.steps"'),
        (["run", "demmo"], 2, 'did you mean "demo"'),
        (["run", "--resme"], 2, "--resume"),
        (["run", "demo", "--steps", "60"], 2, "train.steps=60"),
        (["show", "--batch-tokens=8k", "demo"], 2, "train.batch_tokens=8k"),
        (["runn"], 2, "run"),
        (["run", "train.steps=many"], 2, "expected a whole number"),
        (["run", "train.batch_tokens=1000"], 2, "the nearest are 768 or 1024"),
        (
            ["run", "train.batch_tokens=8192", "train.micro_batch=7"],
            2,
            "the nearest are 7168 or 8960",
        ),
        (
            ["run", "data.path=builtin:pyhton", "--out", "OUT"],
            2,
            "expected builtin:stdlib or builtin:python",
        ),
        (
            ["run", "data.path=nowhere", "--out", "OUT"],
            3,
            "nowhere: no such data directory; run normuon-train prepare",
        ),
        (["run", f"data.path={__file__}", "--out", "OUT"], 3, f"prepare {__file__} --out data/"),
        (["run", f"data.path={HERE}", "--out", "OUT"], 3, f"prepare {HERE} --out data/cli"),
        (["run", str(HERE)], 2, "data.path=DIR"),
        (["compare", "OUT"], 2, "not a run directory, no config.toml; known here"),
        (["run", "--resume"], 2, "--resume: no --out given"),
        (["run", "--out", ""], 2, "a path expected"),
        (["run", "--out", __file__], 2, "expected a directory, found a file"),
        (["race", "demo", "--out", ""], 2, "a path expected"),
        (["prepare", __file__, "--out", __file__], 2, "expected a directory, found a file"),
        (["evaluate", "OUT", "--choices", ""], 2, "a path expected"),
        (["run", "data.path=", "--out", "OUT"], 2, "data.path = : expected a directory"),
        (["show", "lr=1"], 2, 'did you mean "optim.lr"'),
        (["run", "--resume", "--out", "OUT"], 2, "expected a run directory"),
        (["show", "demo", "optim.lr=big"], 2, "expected a number"),
        (["sample", "OUT"], 4, "expected a run directory"),
        (["sample", "OUT", "--top-q", "1"], 2, "--top-p"),
        (["sample", "OUT", "--device", "gpu"], 2, "--device gpu: expected auto, cpu"),
        (["sample", "OUT", "--num", "0"], 2, "--num"),
        (["sample", "OUT", "--seed", "9" * 20], 2, "expected -2^63 to 2^63 - 1"),
        (["run", "train.seed=1e30", "--out", "OUT"], 2, "expected at most 9223372036854775807"),
        (["run", "train.sample_prompt=\udcff", "--out", "OUT"], 2, "expected UTF-8"),
        (["diagnose", "OUT", "--layers", "0"], 2, "expected with --plot only"),
        (["trials", "demo", "--target", "nan", "--out", "OUT"], 2, "expected a finite number"),
        (
            ["trials", "demo", "train.seed=3", "--target", "3", "--out", "OUT"],
            2,
            "train.seed=3: the trials have the seeds 0 to 9",
        ),
        (
            ["race", "demo", "--sweep", "optim.momentum=0.9,much", "--out", "OUT"],
            2,
            "optim.momentum = 'much': expected a number",
        ),
        (["evaluate", "OUT"], 4, "expected a run directory"),
        (["export", "OUT"], 2, "--out"),
        (["export", "OUT", "--to", "new"], 4, "expected a run directory"),
        (["export", "OUT", "--to", "new", "--dtype", "fp16"], 2, "expected fp32 or bf16"),
        (["run", "train.track=tensorbord"], 2, 'did you mean "tensorboard"'),
        (["prepare", "nothing.txt", "--out", "OUT"], 3, "nothing.txt"),
        (["prepare", __file__, "--out", "OUT", "--tokenizer", "gtp2"], 3, "gpt2"),
        (["prepare", __file__, "--out", "OUT", "--tokenizer", "bpe:12"], 3, "257"),
        (["prepare", __file__, "--out", "OUT", "--val", "1.5"], 3, "--val 1.5"),
    ],
)
def test_mistakes(arguments, code, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, message = called([tmp_path / "out" if a == "OUT" else a for a in arguments], capsys)
    assert found == code and words in message
    assert message.startswith("error: ") or message.startswith("Usage: ")
    assert list(tmp_path.iterdir()) == []  # nothing was made


@pytest.mark.parametrize(
    ("arguments", "idle"),
    [
        (["optim.name=muon", "optim.beta2=0.9", "optim.ns_steps=3"], ["optim.beta2"]),
        (["optim.name=adamw", "optim.ns_steps=3", "optim.lr=0.1"], ["optim.ns_steps"]),
        (["optim.name=torch.optim:Adagrad", "optim.momentum=0.9"], ["optim.momentum"]),
        (["train.patience=2", "train.eval_every=0"], ["train.patience"]),
        (["train.patience=2", "optim.beta2=0.9", "optim.beta2_on=*"], []),
        (
            ["train.canonical=true", "train.micro_batch=4", "train.parallel=fsdp"],
            ["train.parallel"],
        ),
        (["track3-normuon", "optim.name=adamw"], []),  # the recipe's, not the user's
    ],
)
def test_a_setting_that_does_nothing_is_named(arguments, idle, tiny, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "TRIAL_SECONDS", 0.01)
    found = without_effect(*config.load(arguments))
    assert [line.partition(":")[0] for line in found] == idle
    if "optim.name=adamw" in arguments and idle:
        code, message = called(["run", *tiny, *arguments, "--dry-run"], capsys)
        assert code == 0 and "optim.ns_steps: adamw" in message


def test_what_is_there_but_not_what_was_asked_for(shards, trained, tmp_path, capsys):
    for arguments, code, words in (
        (["evaluate", shards], 4, f"{shards}: expected a run or a model"),
        (
            ["run", f"data.path={shards}", "--init-from", shards, "--out", tmp_path / "out"],
            4,
            "found prepared data",
        ),
        (["sample", trained, "--file", tmp_path / "no"], 2, "no: No such file or directory; expec"),
        (["sample", trained, "--file", tmp_path], 2, "Is a directory; expected a text file"),
        (["evaluate", trained, "--text", tmp_path / "no"], 3, "no such file"),
        (["evaluate", trained, "--choices", tmp_path / "no"], 3, "expected a JSONL file"),
        (["report", trained, "--out", tmp_path], 2, f"--out {tmp_path}: a directory"),
        (["compare", trained.parent], 2, f"known here: {trained}"),
        (["sample", trained.parent], 4, f"known here: {trained}"),
        (["run", f"data.path={trained}", "--out", tmp_path / "out"], 3, "this is a run"),
    ):
        found, message = called(arguments, capsys)
        assert found == code and words in message, message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_terminal_of_another_encoding_shows_what_it_can(trained):
    code, said, message = command(
        "sample", trained, "--prompt", "\u00fc a", "--max-tokens", "1",
        env={"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert code == 0 and said.startswith("? a"), message


def refused(arguments, code, words, capsys, out):
    found, message = called(["run", *arguments, "--out", out], capsys)
    assert found == code, message
    line = message.strip().splitlines()[-1]
    assert line.startswith("error: ") and words in line
    assert not out.exists() or [p.name for p in out.iterdir()] == ["keep"]


def test_bad_text(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"some text\0\1\2" * 50)
    for name, words in (("empty.txt", "empty"), ("binary.txt", "offset 9")):
        code, message = called(["prepare", tmp_path / name, "--out", tmp_path / "out"], capsys)
        assert code == 3 and name in message and words in message
        assert not (tmp_path / "out" / "manifest.json").exists()


def test_bad_data(tiny, shards, tmp_path, capsys):
    out = tmp_path / "out"
    small = [a for a in tiny if not a.startswith("data.path")]

    def with_copy(name):
        shutil.copytree(shards, tmp_path / name)
        return [*small, f"data.path={tmp_path / name}"], tmp_path / name

    arguments, folder = with_copy("truncated")
    shard = folder / "train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    refused(arguments, 3, "train_000000.bin", capsys, out)
    arguments, folder = with_copy("flipped")
    shard, content = (
        folder / "train_000000.bin",
        bytearray((shards / "train_000000.bin").read_bytes()),
    )
    content[5000] ^= 1
    shard.write_bytes(content)
    refused(arguments, 3, "sha256", capsys, out)
    refused([*tiny, "model.vocab_size=100"], 2, "the data in", capsys, out)
    refused([*tiny, "data.tuning=1e-9"], 3, "and 0 for validation", capsys, out)
    refused([*tiny, "data.tuning=0.999999"], 3, "leaves 0 tokens", capsys, out)
    refused(
        [*tiny, "data.seq_len=200_000", "train.batch_tokens=200_000"], 3, "seq_len", capsys, out
    )
    plain = tmp_path / "plain"
    plain.mkdir()
    for split in ("train", "val"):
        write_shard(plain / f"my_{split}_0.bin", np.arange(3000) % 500, 500)
    arguments = [*small, f"data.path={plain}", "data.tokenizer=byte"]
    refused(
        [*arguments, "model.vocab_size=300"], 3, "token 300: expected an id below 300", capsys, out
    )


def test_an_output_that_cannot_be_written(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    code, message = called(["run", *tiny, "--out", tmp_path / "file" / "run"], capsys)
    assert code == 8 and str(tmp_path / "file") in message
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_unknown_fault_is_one_line_and_debug_shows_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(config, "load", lambda *_: 1 / 0)
    code, message = called(["show"], capsys)
    assert code == 1
    assert message == "error: ZeroDivisionError: division by zero (--debug shows the traceback)\n"
    code, message = called(["show", "--debug"], capsys)
    assert code == 1 and message.startswith("Traceback") and "1 / 0" in message
    assert message.splitlines()[-1].startswith("error: ZeroDivisionError")


def show(late):
    """A command whose output is written at once, or at the very end: `entry` does not leave it to
    Python's own way out."""
    echo = "cli.typer.echo = lambda text, **_: sys.stdout.write(text[:99])" if late else "pass"
    code = (
        f"import sys; from nanonormuon.cli import app as cli; {echo}; cli.entry(['show', 'demo'])"
    )
    return [sys.executable, "-c", code]


UNTIL_FLUSHED = os.environ | {"PYTHONUNBUFFERED": ""}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("late", [False, True])
def test_output_that_cannot_be_written_is_an_error(late, forks):
    full = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); "
    codes, (said,) = forks.run([full + show(late)[-1]], program="-c")
    assert codes == [8] and said.count("\n") == 1
    assert "No space left on device" in said


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_a_reader_that_left_is_not_complained_of(late):
    read, write = os.pipe()
    os.close(read)
    found = subprocess.run(
        show(late), stdout=write, stderr=subprocess.PIPE, text=True, env=UNTIL_FLUSHED
    )
    os.close(write)
    assert (found.returncode, found.stderr) == (1, "")


@pytest.mark.slow
def test_an_output_that_was_never_there():
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *show(late=True)]
    found = subprocess.run(closed, stderr=subprocess.PIPE, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def test_help_and_a_misspelt_option_do_not_wait_for_torch():
    code = """if True:
        import sys
        from nanonormuon.cli import app as cli
        names = [c.__name__ for group in cli.GROUPS.values() for c in group]
        assert {cli.main([name, "--help"]) for name in names} == {0}
        assert "pydantic" not in sys.modules  # typer's; it takes as long as all else
        assert {cli.main([name, "--no-such-option"]) for name in names} == {2}
        assert cli.main(["--version"]) == 0
        assert "torch" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_shell_completes_commands_options_and_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # without runs
    monkeypatch.setattr(sys, "argv", ["normuon-train"])  # as the console script has it
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)
    monkeypatch.setenv("_NORMUON_TRAIN_COMPLETE", "complete_bash")
    typed = {"ru": "run", "run optim.l": "optim.lr=", "export --o": "--out"}
    for words, completed in typed.items():
        monkeypatch.setenv("COMP_WORDS", f"normuon-train {words}")
        monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
        with pytest.raises(SystemExit):
            cli.main([])
        found = capsys.readouterr()
        assert (found.out.split(), found.err) == ([completed], "")


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nanonormuon {__version__}\n"


def test_help_names_every_command_and_gives_examples(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert not re.search(r"\w\.\.\.$", text, re.M)  # no summary is cut off
    for name in ("run", "prepare", "sample", "evaluate", "export", "compare", "report", "diagnose",
                 "doctor", "recipes", "show", "inspect", "race", "trials", "speedrun"):  # fmt: skip
        assert re.search(rf"^  {name} ", text, re.M)
        assert cli.main([name, "--help"]) == 0
        assert name == "recipes" or f"normuon-train {name}" in capsys.readouterr().out
        assert cli.main([name, "--no-such-option"]) == 2
        assert "--no-such-option" in capsys.readouterr().err


def test_recipes_and_show(capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "TRIAL_SECONDS", 0.01)
    assert cli.main(["recipes", "dem"]) == 2 and '"demo"' in capsys.readouterr().err
    assert cli.main(["recipes", "demo"]) == 0
    assert capsys.readouterr().out == config.recipes()["demo"].read_text()
    assert cli.main(["recipes"]) == 0
    listed = [re.match(r"(\S+) +(?=\S)", line) for line in capsys.readouterr().out.splitlines()]
    names = [found.group(1) for found in listed]
    assert set(names) == set(config.recipes()) and len({found.end() for found in listed}) == 1
    assert names.index("gpt2-124m-mini") == names.index("gpt2-124m") + 1  # a twin after its recipe
    assert cli.main(["show", "demo", "optim.lr=0.5", "train.batch_tokens=1024"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^lr = 0.5 +# command line +.*hidden matrices.*$", shown, re.M)
    assert re.search(r"^n_layer = \d+ +# demo ", shown, re.M)
    assert re.search(r"^n_head = \d+ +# demo +query heads$", shown, re.M)  # in model.py
    assert re.search(r"^nesterov = true +# default", shown, re.M)
    assert config.tomllib.loads(shown)["optim"]["lr"] == 0.5
    assert cli.main(["run", "demo", "optim.lr=0.5", "train.batch_tokens=1024", "--dry-run"]) == 0
    said = capsys.readouterr().out
    bare = [re.sub(r"(# (default|demo|command line)) .*", r"\1", x) for x in shown.splitlines()]
    assert said.splitlines()[: len(bare)] == bare and "\n# parameters: " in said


@pytest.mark.slow
def test_from_text_to_samples_as_a_user_does_it(text, tmp_path, capsys, monkeypatch):
    """prepare, run, resume and sample, each in a process of its own, with quiet and greppable
    output."""
    code, out, _ = command(
        "prepare", text, "--out", "data/mine", "--tokenizer", "bpe:300", cwd=tmp_path
    )
    assert code == 0 and "train: 1 documents" in out and "next: normuon-train run" in out
    small = ["model.n_layer=1", "model.n_embd=32", "model.n_head=2", "data.path=data/mine",
             "data.seq_len=32", "train.batch_tokens=512", "train.steps=6",
             "train.log_every=2"]  # fmt: skip
    code, out, err = command("run", *small, "--out", "runs/a", cwd=tmp_path)
    assert code == 0, err
    assert re.search(
        r"^done: step 6, 3,072 tokens: val_loss \d\.\d{4}, \d\.\d{4} bits per byte", out
    )
    assert "checkpoint: runs/a/checkpoints/step-000006" in out
    assert "next: normuon-train sample runs/a" in out
    assert len(re.findall(r"^step \d/6  loss ", err, re.M)) == 3 and "\r" not in err
    assert "sample before training:\n  | " in out and "sample after step 6:\n  | " in out
    code, out, err = command("run", "--resume", "train.steps=8", "--out", "runs/a", cwd=tmp_path)
    assert code == 0 and "resumed from runs/a/checkpoints/step-000006" in err, err
    assert json.loads((tmp_path / "runs/a/summary.json").read_text())["steps"] == 8
    ask = ["sample", "runs/a", "--prompt", "the cat", "--max-tokens", "9", "--num", "2"]
    code, out, err = command(*ask, cwd=tmp_path)
    assert code == 0 and out.count("the cat") == 2 and "--- sample 2" in out, err
    monkeypatch.chdir(tmp_path)
    assert cli.main(ask) == 0 and capsys.readouterr().out == out
    assert cli.main([*ask, "--seed", "5"]) == 0 and capsys.readouterr().out != out


def test_quiet_leaves_results_and_warnings(tiny, tmp_path, capsys):
    run = ["run", *tiny, "train.steps=1", "--out", str(tmp_path / "run"), "--quiet"]
    assert cli.main(run) == 0
    found = capsys.readouterr()
    assert found.out.startswith("done: step 1") and found.err == ""
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for theirs, prompts in ((True, "def f(|x"), (False, "")):
        out = describe({**summary, "own_source": not theirs}, Path("a b"), prompts)
        assert ("trust_remote_code" in out) is not theirs
        assert ("--prompt 'def f('" in out) is bool(prompts)
        assert "normuon-train sample 'a b'" in out
    rows = [("step-000000", 0, "before training"), ("step-000001", 1, ""), ("step-000003", 2, "")]
    for kept, step, words in rows:  # the best loss is the kept checkpoint's, or an earlier step's
        values = {
            "best_step": step,
            "best_val_loss": 1.25,
            "best_checkpoint": f"checkpoints/{kept}",
        }
        out = describe(
            {**summary, **values, "checkpoint": "checkpoints/step-000009"}, Path("r"), ""
        )
        assert words in out and (": val_loss 1.2500" in out) is kept.endswith(f"{step}")
    assert "sample ./-dash" in describe(summary, Path("-dash"), "")
    assert "val_loss" in (tmp_path / "run" / "train.log").read_text()  # there it is all the same
    assert cli.main(["--quiet", "sample", str(tmp_path / "no")]) == 4
    assert capsys.readouterr().err.startswith("error: ")


def test_a_truncated_checkpoint_is_refused(tiny, tmp_path, capsys):
    assert cli.main(["run", *tiny, "train.steps=1", "--out", str(tmp_path / "run")]) == 0
    file = tmp_path / "run" / "checkpoints" / "step-000001" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    for arguments in (
        ["sample", tmp_path / "run"],
        ["run", "train.steps=2", "--resume", "--out", tmp_path / "run"],
    ):
        capsys.readouterr()
        code, message = called(arguments, capsys)
        line = message.strip().splitlines()[-1]
        assert code == 4 and line.startswith("error: ") and "model.safetensors" in line


def test_a_resumed_run_ends_at_its_stop_and_resumed_from_there_at_its_end(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    train(config.load([*tiny, "train.stop_at=3"])[0], out)
    file = out / "config.toml"  # as if it had been killed on its way to step 5
    file.write_text(file.read_text().replace("stop_at = 3", "stop_at = 5"))
    for steps in (5, 8):
        assert cli.main(["run", *tiny, "--resume", "--out", str(out)]) == 0
        assert json.loads((out / "summary.json").read_text())["steps"] == steps


AUDIT = """
import os
from __main__ import SEEN
from nanonormuon.cli.app import main
os.environ["NANONORMUON_CACHE"] = {cache!r}
for arguments in {commands}:
    assert main(arguments) == 0, arguments
assert not SEEN, SEEN
"""


def audited(commands, tmp_path, forks):
    """Run commands in one process that from its first import has noted what faulty.py watches."""
    code = AUDIT.format(cache=str(tmp_path / "cache"), commands=commands)
    codes, (said,) = forks.run([code], program="-c")
    assert codes == [0], said[-3000:]


@pytest.mark.slow
def test_no_command_does_with_the_built_in_corpus(forks, tmp_path):
    built_in = [
        "run", "data.path=builtin:python", "train.steps=1", "train.sample_tokens=3",
        "model.n_layer=1", "model.n_embd=32", "model.n_head=2", "data.tokenizer=byte",
        "data.val_tokens=1000", "--out", str(tmp_path / "builtin"),
    ]  # fmt: skip
    audited([built_in], tmp_path, forks)


def test_no_command_opens_a_connection_a_pickle_or_a_process(tiny, text, forks, tmp_path):
    """Also with decoys beside the checkpoint that would run code if anything unpickled them."""
    decoys = tmp_path / "run" / "checkpoints"
    decoys.mkdir(parents=True)
    for name in ("step-000009", "pytorch_model.bin", "optimizer.pt"):
        (decoys / name).write_bytes(b"cos\nsystem\n(S'echo owned'\ntR.")
    run, out = ["run", *tiny], ["--out", str(tmp_path / "run" / "a")]
    commands = [
        ["prepare", str(text), "--out", str(tmp_path / "data"), "--tokenizer", "bpe:300"],
        [*run, "train.stop_at=2", *out],
        [*run, "--resume", *out],
        ["sample", out[1], "--max-tokens", "3"],
        ["evaluate", out[1]],
        ["export", out[1], "--to", str(tmp_path / "export")],
        ["report", out[1], "-o", str(tmp_path / "report.html")],
        ["diagnose", out[1]],
        ["compare", out[1]],
    ]
    audited(commands, tmp_path, forks)
