"""README and docs/ are true: the Python runs, commands parse, links and anchors lead somewhere,
settings and files that are named exist, and the journeys of a new user work as written. Every
command of docs/guarantees.md selects tests."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from support import ROOT, command
from torch.distributed.run import get_args_parser

import nanonormuon
from nanonormuon import config
from nanonormuon.cli import app as cli
from nanonormuon.lab import race

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in (".", "docs", "docs/results/zoo", "data")
    for path in (ROOT / folder).glob("*.md")
}
README, OWN = PAGES["README.md"], "docs/your-optimizer.md"
FENCED = re.compile(r"(?:^<!-- ([^\n]*) -->\n+)?^```(\w*)\n(.*?)^```$", re.M | re.S)
PROSE = {name: FENCED.sub("", text) for name, text in PAGES.items()}
MAY_NOT_RUN = {"needs a GPU", "needs the network", "an example to adapt"}
PROGRAMS = ("normuon-train", "torchrun", "python", "pip", "pytest")


def commands(text):
    """What is to be typed: (mark of its block, words) of each line in blocks of no language."""
    for mark, language, block in FENCED.findall(text):
        if not language and mark != "demo output":
            for line in block.splitlines():
                program = line.partition(" ")[0]
                if program in PROGRAMS or program.endswith(".sh"):
                    yield mark, shlex.split(line, comments=True)


COMMANDS = {name: found for name, text in PAGES.items() if (found := [*commands(text)])}


def test_the_python_example_trains_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    (example,) = (block for _, language, block in FENCED.findall(README) if language == "python")
    torch.manual_seed(0)
    tokens = torch.arange(33).repeat(4, 1)
    for tied in (True, False):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
            )
        )  # fmt: skip
        batch = {"input_ids": tokens, "labels": tokens}
        before = float(model(**batch).loss.detach())
        exec(example, {"model": model, "batches": [batch] * 40})
        assert float(model(**batch).loss.detach()) < before / 2


def parse(words):
    """Refuse a command that could not start: unknown options, settings, recipes or files."""
    program, *words = words
    if program == "torchrun":
        launcher = get_args_parser().parse_args(words)
        assert launcher.training_script == "train.py"
        parse(["normuon-train", "run", *launcher.training_script_args])
    elif program == "normuon-train":
        known = typer.main.get_command(cli.app).commands
        assert words[0] in known, words
        for file, kind in re.findall(r"([\w./-]+\.py):(\w+)", " ".join(words)):
            assert re.search(rf"^class {kind}\b", Path(file).read_text(), re.M), (file, kind)
        name, *words = words
        given = known[name].make_context("", words).params
        argument = [p.name for p in known[name].params if p.param_type_name == "argument"]
        if name == "recipes":
            assert not given["name"] or given["name"] in config.recipes(), words
        if name in ("run", "show", "race", "trials"):
            config.load(given[argument[0]] or [])
        # packages that nothing here requires take seconds to import, or are not installed
        if name == "race" and "pytorch_optimizer:" not in given["optimizers"]:
            grids = given["lr"] or (), "", given["sweep"] or ()
            race.entries(given["recipe"], given["optimizers"], *grids)
    elif program == "pip":
        assert words[:2] == ["install", "-r"] and (ROOT / words[2]).is_file(), words
    elif program == "pytest":
        marks = {"slow", "full", "gpu", "or", "not", "and"}
        assert not [w for w in words if "/" in w and not (ROOT / w).is_file()], words
        assert "-m" not in words or set(words[words.index("-m") + 1].split()) <= marks, words
    elif words[0] == "-c":
        compile(words[1], "-c", "exec")
    else:
        file = ROOT / (words[0] if program == "python" else program)
        source = file.read_text(encoding="utf-8")
        if file.parent.name == "data":
            source += (file.parent / "common.py").read_text(encoding="utf-8")
        assert not [w for w in words if w.startswith("--") and w not in source], words


MANY_RACES = {"docs/results.md": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(n, marks=MANY_RACES.get(n, ())) for n in COMMANDS])
def test_commands_could_start(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (own,) = (code for _, kind, code in FENCED.findall(PAGES[OWN]) if kind == "python")
    osp = (ROOT / "nanonormuon" / "lab" / "zoo" / "osp.py").read_text(encoding="utf-8")
    Path("my_optimizer.py").write_text(osp + own)
    for mark, words in COMMANDS[name]:
        assert not mark or mark in MAY_NOT_RUN, mark
        if mark == "an example to adapt" or (mark == "needs the network" and words[0] == "pip"):
            continue
        try:
            parse(words)
        except Exception as error:
            raise AssertionError(f"{shlex.join(words)}: {error!r}") from error


def test_pages_have_commands():
    assert sum(map(len, COMMANDS.values())) > 50 and len(COMMANDS) > 10
    assert {words[0] for found in COMMANDS.values() for _, words in found} >= set(PROGRAMS)


def slug(heading):
    """A heading's anchor on GitHub."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading)).strip().lower().replace(" ", "-")


@pytest.mark.parametrize("name", PAGES)
def test_links_anchors_and_files_exist(name):
    prose, folder = PROSE[name], (ROOT / name).parent
    defined = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", prose, re.M))
    used = re.findall(r"\]\[([^\]]+)\]", prose)
    assert set(used) == set(defined)
    for target in (*re.findall(r"\]\(([^)]+)\)", prose), *defined.values()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (folder / path if path else ROOT / name).resolve()
        assert file.exists() and file.is_relative_to(ROOT), target
        if anchor:
            page = PROSE[file.relative_to(ROOT).as_posix()]
            assert anchor in map(slug, re.findall(r"^#+ (.+)$", page, re.M)), target
    if name in ("docs/log.md", "CHANGELOG.md"):
        return  # what was, not what is
    assert not [line for line in prose.splitlines() if line.count("`") % 2]  # no line ends in code
    for file in re.findall(r"`((?:nanonormuon|tests|scripts|docs)/[\w./-]+\.\w+)`", prose):
        assert (ROOT / file).is_file(), file
    known = {path.name for path in ROOT.glob("**/*.py")}
    known |= {"my_optimizer.py", "my_file.py", "modeling_nanonormuon.py", "deepseek_v2.py"}
    assert not set(re.findall(r"`(\w+\.py)`", prose)) - known


def test_pages_that_code_names_exist():
    named = {
        page
        for folder in ("nanonormuon", "scripts", "tests", "data")
        for file in (ROOT / folder).rglob("*.*")
        if file.suffix in (".py", ".toml", ".sh")
        for page in re.findall(r"\b\w+/[\w-]+\.md\b", file.read_text(encoding="utf-8"))
    }
    missing = {page for page in named if page.startswith(("docs/", "dev/"))} - PAGES.keys()
    assert len(named) > 5 and not missing


def test_settings_that_pages_name_exist():
    keys = set(config.flat(config.load([])[0]))
    known = typer.main.get_command(cli.app).commands
    files = {"py", "log", "bin", "safetensors"}
    found = 0
    for name, prose in PROSE.items():
        for code in re.findall(r"`([^`\n]+)`", prose) if name != "docs/log.md" else ():
            for section, key in re.findall(r"(?<![\w./-])(model|data|optim|train)\.(\w+)", code):
                assert f"{section}.{key}" in keys or key in files, (name, code)
                found += 1
            for word in re.findall(r"normuon-train (\w+)", code):
                assert word in known, (name, code)
    assert found > 60


def test_pages_say_for_whom_they_are_and_the_readme_leads_to_each():
    pages = [name for name in PAGES if re.fullmatch(r"docs/[^/]+", name)]
    assert len(pages) > 10
    for name in pages:
        title, first, *_ = PAGES[name].split("\n\n")
        assert title.startswith("# ") and first.startswith("For any"), name
        assert "This page answers" in " ".join(first.split()), name
        assert re.fullmatch(r"[a-z-]+", Path(name).stem), name
        assert f"]: {name}\n" in README, name


def test_the_readme_is_short():
    """Everything between two blanks counts as a word, code and tables too, up to the links."""
    text = re.split(r"^(?:## Links|\[[^\]]+\]: )", README, flags=re.M)[0]
    assert len(text.split()) <= 900


def test_the_tree_names_each_file_and_room():
    tree = next(block for _, _, block in FENCED.findall(README) if block.startswith("nanonormuon/"))
    named = re.findall(r"^  (\S+)", tree, re.M)
    package = ROOT / "nanonormuon"
    there = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    there |= {
        f"{path.name}/"
        for path in package.iterdir()
        if path.is_dir() and path.name != "__pycache__"
    }
    assert set(named) == there and len(named) == len(there)


def test_the_table_is_what_the_races_left():
    for row, name in (("Shakespeare", "race-shakespeare"), ("Python", "race-demo")):
        kept = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        normuon, muon, adamw = kept["optimizers"]
        cells = [f"{o['mean']:.3f} ± {o['sd']:.3f}" for o in (normuon, muon, adamw)]
        saved = normuon["against"]["adamw"]
        low, high = saved["percent_saved_interval"]
        cells += [f"{saved['percent_saved']:.0f} % ({low:.0f} to {high:.0f})", f"{adamw['n']}"]
        assert f"| {row} | {' | '.join(cells)} |\n" in README
    gained = normuon["against"]["muon"]
    high, low = (-end for end in gained["difference_interval"])
    text = " ".join(README.split())
    assert f"Python: {-gained['difference']:.3f} nats, {low:.3f} to {high:.3f})" in text
    assert "1.869 ± 0.009 (n = 5) in 11 s" in text
    assert "ends at 1.869 ± 0.009 (n = 5) in 11 s" in PAGES["docs/results.md"]


def test_versions_agree():
    version = nanonormuon.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r"^## \[(\S+)\]", PAGES["CHANGELOG.md"], re.M)[1] == version


GUARANTEES = PAGES["docs/guarantees.md"]
COLLECT = """
import shlex, sys, pytest

class Report:
    def pytest_collection_finish(self, session):
        for item in session.items:
            marks = {mark.name for mark in item.iter_markers()}
            print("long" if marks & {"slow", "full"} else "quick", item.nodeid)

for line in sys.stdin.read().splitlines():
    print("#", line)
    plain = ["-p", "no:cacheprovider", "-p", "no:unraisableexception", "--no-summary", "-qq"]
    pytest.main([*shlex.split(line)[1:], "--collect-only", *plain], [Report()])
"""


@pytest.mark.slow
def test_every_command_of_the_guarantees_selects_tests():
    """So does each word of its -k; and of each guarantee something is tested by plain pytest."""
    rows = [re.findall(r"`(pytest [^`]+)`", row) for row in GUARANTEES.splitlines()]
    lines = [line for row in rows for line in row]
    assert len(lines) > 20
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], input="\n".join(lines), cwd=ROOT, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = dict(part.split("\n", 1) for part in done.stdout.removeprefix("# ").split("\n# "))
    assert list(found) == lines
    for line, tests in found.items():
        assert re.search(r"^(quick|long) tests/\S+::", tests, re.M), line
        words = re.findall(r'-k "?([\w ]+)', line)
        for word in words[0].split(" or ") if words else ():
            assert re.search(rf"^\w+ tests/\S+::\S*{word}", tests, re.M), (line, word)
    for text, row in zip(GUARANTEES.splitlines(), rows):
        if re.match(r"\| \d", text) and "many_runs" not in text:
            assert any(re.search(r"^quick ", found[line], re.M) for line in row), text


def section(name, heading):
    """The commands of a page under a heading, up to the next one."""
    text = PAGES[name].partition(f"\n{heading}\n")[2]
    return [words for _, words in commands(re.split(r"^#+ ", text, flags=re.M)[0])]


@pytest.fixture(scope="module")
def workplace(text, tmp_path_factory):
    """A directory with the files that README and docs/ speak of."""
    place = tmp_path_factory.mktemp("readme")
    (place / "essays").mkdir()
    lines = text.read_text().splitlines(keepends=True)
    (place / "notes.txt").write_text("".join(lines[:1000]))
    for i in range(20):
        (place / "essays" / f"{i}.md").write_text("".join(lines[1000 + i * 60 : 1060 + i * 60]))
    return place


SMALL = ["data.seq_len=32", "train.batch_tokens=512", "train.steps=4", "train.eval_every=2",
         "train.device=cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def mine(workplace):
    """The three commands for one's own text, with a model small enough for a test."""
    own = section("README.md", "## Your own text")
    assert [words[1] for words in own] == ["prepare", "run", "sample"]
    small = [*SMALL, "model.n_layer=1", "model.n_embd=32", "model.n_head=2"]
    for words in own:
        words = [w.replace("bpe:4096", "bpe:300") for w in words]
        more = small if words[1] == "run" else ["--max-tokens", "5"] if words[1] == "sample" else []
        code, out, err = command(*words[1:], *more, cwd=workplace)
        assert code == 0, err
    return workplace, out


@pytest.mark.slow
def test_train_on_your_own_text_as_written(mine):
    assert mine[1].startswith("Once")


@pytest.mark.slow
def test_use_your_model_as_written(mine, monkeypatch, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(mine[0])
    own = section("docs/models.md", "## Sample and evaluate")
    own += section("docs/models.md", "## Fine-tune")
    own += section("docs/runs.md", "## Compare, report, diagnose")
    assert [words[1] for words in own] == [
        "sample", "evaluate", "evaluate", "export", "prepare", "run", "compare", "report",
        "diagnose", "doctor",
    ]  # fmt: skip
    for words in own:
        more = {"sample": ["--max-tokens", "5"], "run": SMALL, "evaluate": ["--stride", "16"]}
        assert cli.main([*words[1:], *more.get(words[1], [])]) == 0, capsys.readouterr().err
    for made in ("models/mine/README.md", "runs/more/summary.json", "curves.png", "report.html",
                 "update.png", "runs/mine/evaluations.json"):  # fmt: skip
        assert (mine[0] / made).stat().st_size > 100, made


@pytest.mark.slow
def test_mix_more_data_as_written(mine, text, monkeypatch, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    monkeypatch.chdir(mine[0])
    (mine[0] / "wiki").mkdir()
    lines = text.read_text().splitlines(keepends=True)
    rows = ["".join(lines[i : i + 40]) for i in range(0, 2400, 40)]
    parquet.write_table(pyarrow.table({"body": rows}), mine[0] / "wiki" / "a.parquet")
    own = section("docs/data.md", "## Inspect and mix")
    assert [words[1] for words in own] == ["prepare", "inspect", "run"]
    for words in own:
        few = ["model.n_layer=1", "model.n_embd=32", "model.n_head=2", "--out", "runs/mix"]
        more = [*SMALL, *few] if words[1] == "run" else []
        assert cli.main([*words[1:], *more]) == 0, capsys.readouterr().err


def test_the_shakespeare_recipe_reads_what_its_script_makes(tmp_path):
    source = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
    if not source.exists():
        pytest.skip("needs tinyshakespeare.txt, which is not kept here")
    script = [sys.executable, str(ROOT / "data" / "shakespeare.py"), "--out", str(tmp_path / "d")]
    done = subprocess.run([*script, "--from", str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from nanonormuon.storage.shards import open_data

    data = open_data(tmp_path / "d")
    # nanoGPT's own split: 1,003,854 and 111,540 characters; one separator stands before each
    assert (data.train.tokens, data.val.tokens) == (1_003_855, 111_541)
    (tmp_path / "other.txt").write_text("To be")
    done = subprocess.run(
        [*script, "--from", str(tmp_path / "other.txt")], capture_output=True, text=True
    )
    assert done.returncode == 3 and "not Tiny Shakespeare" in done.stderr
