"""Configuration: nothing misspelt or mistyped passes, the message names the nearest valid name, and
what is printed reads back as the same configuration."""

import dataclasses
import os
import re

import pytest
import torch

from nanonormuon import config
from nanonormuon.config import Config, load
from nanonormuon.errors import CheckpointError, ConfigError, exit_code
from nanonormuon.model import GPT
from nanonormuon.storage.values import to_toml


def test_values_are_parsed_by_type_and_their_origin_is_kept(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[optim]\nlr = 1\nname = "muon"\n[train]\nsteps = 7\nbatch_tokens = "0.5M"\n')
    found, origin = load(
        [str(file), "train.batch_tokens=524_288", "optim.nesterov=false", "optim.beta2=9e-1",
         "train.steps=2k", "data.path=a=b", "train.micro_batch=8"]
    )  # fmt: skip
    assert found.train.batch_tokens == 524_288 and found.train.steps == 2000
    assert found.optim.lr == 1.0 and isinstance(found.optim.lr, float)
    assert found.optim.name == "muon" and found.optim.nesterov is False and found.optim.beta2 == 0.9
    assert found.data.path == "a=b" and found.train.micro_batch == 8
    assert origin["optim.lr"] == str(file) and origin["train.steps"] == "command line"
    assert load([str(file), "data.seq_len=250"])[0].train.batch_tokens == 500_000
    odd = tmp_path / "lr=0.5"
    odd.mkdir()
    (odd / "c.toml").write_text("[train]\nsteps = 1.005e6\n")
    assert load([str(odd / "c.toml")])[0].train.steps == 1_005_000
    assert load(["train.steps=1.005M"])[0].train.steps == 1_005_000


def test_large_numbers_are_exact_or_refused(tmp_path):
    largest = 2**63 - 1
    file = tmp_path / "c.toml"
    file.write_text(f"[train]\nseed = {largest}\n")
    for argument in (str(file), f"train.seed={largest}"):
        assert load([argument])[0].train.seed == largest
    for value, words in (("1" * 400, "expected a number"), ("1" * 5000, "not a readable TOML")):
        file.write_text(f"[optim]\nlr = {value}\n")
        with pytest.raises(ConfigError, match=words):
            load([str(file)])


@pytest.mark.parametrize("name", config.recipes())
def test_recipes_load_and_have_a_headline(name):
    load([name])
    assert config.recipes()[name].read_text().startswith("# ")


# what a scaled-down twin may have of its own; anything else it takes from the recipe it stands for
SCALED = {
    "model.vocab_size", "model.n_layer", "model.n_head", "model.n_embd", "data.path",
    "data.tokenizer", "data.seq_len", "data.val_tokens", "train.steps", "train.batch_tokens",
    "train.eval_every", "train.save_every",
}  # fmt: skip
OWN = {
    "gpt2-124m": {"model.n_hidden", "optim.momentum_warmup"},
    "gpt2-350m": {"model.n_hidden", "optim.momentum_warmup"},
    "paper-1.1b": {"model.n_hidden", "model.n_kv_head", "optim.warmup"},
    "track3-normuon": {"train.stop_at", "data.order"},  # FineWeb's shards are mixed
}


def twins(name):
    return load([name])[0], load([f"{name}-mini"])[0]


def flat(settings):
    return {f"{s}.{k}": v for s, t in dataclasses.asdict(settings).items() for k, v in t.items()}


def shares(settings):
    """What a twin keeps as a share of the run, of the batch, of the model's width."""
    m, o, t = settings.model, settings.optim, settings.train
    m = dataclasses.replace(m, vocab_size=m.vocab_size or 2048).resolved()
    return {
        "width per layer": m.n_embd / m.n_layer,
        "queries per key": m.n_head / m.n_kv_head,
        "width of the MLP": m.n_hidden / m.n_embd,
        "validation, batches": settings.data.val_tokens / t.batch_tokens,
        "evaluations": t.eval_every / t.steps,
        "checkpoints": t.save_every / t.steps,
        "end": t.stop_at / t.steps,
        "momentum": o.momentum_warmup / t.steps if o.momentum_start != o.momentum else 0,
    }


def scale(settings):
    """What a twin's header says of its size, as numbers."""
    m, t = settings.model, settings.train
    m = dataclasses.replace(m, vocab_size=m.vocab_size or 2048)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(m).parameters())
    return {
        "width": m.n_embd,
        "layers": m.n_layer,
        "heads": m.n_head,
        "vocabulary": m.vocab_size,
        "sequence": settings.data.seq_len,
        "batch": t.batch_tokens,
        "steps": t.steps,
        "tokens": t.steps * t.batch_tokens,
        "tokens per parameter": t.steps * t.batch_tokens / parameters,
    }


def test_every_twin_stands_for_a_recipe():
    minis = {n for n in config.recipes() if n.endswith("-mini")}
    assert minis == {f"{name}-mini" for name in OWN} and set(OWN) < set(config.recipes())


@pytest.mark.parametrize("name", OWN)
def test_a_twin_differs_in_nothing_but_its_scale(name):
    big, mini = map(flat, twins(name))
    assert {k for k in big if big[k] != mini[k]} == SCALED | OWN[name]
    assert (mini["data.path"], mini["data.tokenizer"]) == ("builtin:python", "bpe:2048")


@pytest.mark.parametrize("name", OWN)
def test_a_twin_keeps_the_proportions(name):
    big, mini = twins(name)
    assert shares(mini) == pytest.approx(shares(big), rel=0.01)
    widths = [m.n_embd // m.n_head for m in (big.model, mini.model)]
    assert widths[0] == widths[1] * (2 if name == "paper-1.1b" else 1)  # it has 4 heads to share K
    warmup = big.optim.warmup / big.train.steps * mini.train.steps
    assert abs(mini.optim.warmup - warmup) < 1  # a whole number of few steps


@pytest.mark.parametrize("name", OWN)
def test_a_twins_header_says_how_it_is_scaled(name):
    lines = config.recipes()[f"{name}-mini"].read_text().splitlines()
    header = " ".join(line.lstrip("# ") for line in lines if line[:1] == "#")
    words = "width|layers|heads|vocabulary|sequence|batch|steps|tokens per parameter|tokens"
    said = re.findall(rf"({words}) 1/(\d+(?:\.\d+)?)", header.partition(" scaled ")[2])
    sizes = [scale(settings) for settings in twins(name)]
    assert {word: float(n) for word, n in said} == pytest.approx(
        {word: n / sizes[1][word] for word, n in sizes[0].items()}, rel=0.02
    )


def test_later_sources_win(tmp_path):
    (tmp_path / "a.toml").write_text("[train]\nseed = 1\nsteps = 5\n")
    (tmp_path / "b.toml").write_text("[train]\nseed = 2\n")
    a, b = str(tmp_path / "a.toml"), str(tmp_path / "b.toml")
    assert load([a, b])[0].train.seed == 2 and load([b, a])[0].train.seed == 1
    assert load(["train.seed=3", a, b])[0].train.seed == 3
    assert load([a, b])[0].train.steps == 5


def test_printed_configuration_reads_back(tmp_path):
    changed, origin = load(['train.sample_prompt=def "f"\\n\t#é', "optim.lr=1e-7", "train.steps=3"])
    settings = dataclasses.asdict(changed)
    for text in (to_toml(settings), to_toml(settings, origin)):
        (tmp_path / "c.toml").write_text(text, encoding="utf-8")
        assert load([str(tmp_path / "c.toml")])[0] == changed
    assert config.from_dict(settings) == changed
    settings["train"]["odd"] = 1
    with pytest.raises(CheckpointError, match=r"another version.*odd"):
        config.from_dict(settings)
    assert "optim.lr" in origin and "# command line" in to_toml(settings, origin)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.stepz=3"], 'unknown key "train.stepz": did you mean "train.steps"'),
        (["trian.steps=3"], 'did you mean "train.steps"'),
        (["steps=3"], 'did you mean "train.steps"'),
        (["train.nesterov=1"], 'did you mean "optim.nesterov"'),
        (["demoo"], 'unknown recipe "demoo": did you mean "demo"'),
        (["nothing.toml"], 'no file "nothing.toml"'),
        (["train.steps=three"], "expected a whole number"),
        (["train.steps=1.5"], "expected a whole number"),
        (["train.steps=nan"], "expected a whole number"),
        (["train.steps=-1"], "expected at least 1"),
        (["train.steps=true"], "expected a whole number"),
        (["optim.lr=fast"], "expected a number"),
        (["optim.lr=inf"], "expected a number"),
        (["optim.lr=-0.1"], "expected at least 0"),
        (["optim.beta2=1"], "optim.beta2 = 1.0: expected below 1"),
        (["optim.decay=1.5"], "optim.decay = 1.5: expected at most 1"),
        (["optim.ns_steps=2b"], "optim.ns_steps = 2000000000: expected at most 1000"),
        (["optim.ns_steps=1e308"], "expected at most 1000"),
        (["optim.nesterov=maybe"], "expected true or false"),
        (["optim.name=normoun"], 'did you mean "normuon"'),
        (["optim.ns_coefficients=1,2"], "three numbers"),
        (["train.micro_batch=all"], "expected a whole number"),
        (["train.micro_batch=0"], "train.micro_batch = 0: expected at least 1"),
        (["train.micro_batch=-1"], "train.micro_batch = -1: expected at least 1"),
        (["train.canonical=true"], "train.micro_batch = auto: expected a number"),
        (["train.seed=-1"], "train.seed = -1: expected at least 0"),
        (["train.patience=-1"], "train.patience = -1: expected at least 0"),
        (["data.tuning=1"], "data.tuning = 1.0: expected below 1"),
        (["optim.options=rho=1"], "optim.options = rho=1: expected none"),
        (["optim.name=torch.optim:SGD", "train.parallel=fsdp"], "train.parallel = fsdp: expected"),
        (["optim.name=torch.optim:SGD", "train.parallel=hsdp"], "train.parallel = hsdp: expected"),
        (["demo", "train.init_from=x"], "leave out model.n_layer (demo)"),
        (["data.mix=a=0.1", "data.order=sequential"], "data.order = sequential: expected shuffled"),
        (["train.compile=yes"], "expected one of auto, on, off"),
        (["train.batch_tokens=1000"], "the nearest are 768 or 1024"),
        (["model.n_head=7"], "n_head = 6"),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(ConfigError) as error:
        load(arguments)
    assert words in str(error.value) and exit_code(error.value) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[trian]\nsteps = 3\n", 'unknown section [trian]: did you mean "train"'),
        ("steps = 3\n", "unknown section [steps]"),
        ("[train]\nstep = 3\n", 'did you mean "train.steps"'),
        ("[train]\nsteps = [3]\n", "expected a whole number"),
        ("[train]\nsteps = 'x'\n", "expected a whole number"),
        ("[data]\npath = 3\n", "expected text"),
        ("[train\n", "not a readable TOML file"),
    ],
)
def test_mistakes_in_files_are_named_with_the_file(tmp_path, text, words):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load([str(tmp_path / "bad.toml")])
    assert words in str(error.value) and "bad.toml" in str(error.value)


def test_what_is_no_file_is_named_once(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    for name, words in (("folder", "Is a directory"), ("pipe", "expected a regular file")):
        with pytest.raises(ConfigError, match=words) as error:
            load([str(tmp_path / f"{name}.toml")])
        assert str(error.value).count(f"{name}.toml") == 1


def test_what_may_change_on_resume_exists_and_the_rest_is_reported():
    everything = set(config.KINDS)
    assert everything == set(flat(Config()))
    assert set(config.MAY_CHANGE) <= everything
    old = Config()
    for name in everything:
        section, _, key = name.partition(".")
        table = getattr(old, section)
        value = getattr(table, key)
        other = {bool: lambda v: not v, str: lambda v: v + "x"}.get(type(value), lambda v: v + 1)(
            value
        )
        new = dataclasses.replace(old)  # checks of the model do not matter here
        object.__setattr__(new, section, dataclasses.replace(table))
        object.__setattr__(getattr(new, section), key, other)
        assert bool(config.differences(old, new)) == (name not in config.MAY_CHANGE), name
