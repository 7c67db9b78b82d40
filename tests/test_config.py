"""Configuration: nothing misspelt or mistyped passes, the message names the nearest valid name, and
what is printed reads back as the same configuration."""

import dataclasses

import pytest

from nanonormuon import config
from nanonormuon.config import Config, ConfigError, load


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


@pytest.mark.parametrize("name", config.recipes())
def test_recipes_load_and_have_a_headline(name):
    load([name])
    assert config.recipes()[name].read_text().startswith("# ")


def test_later_sources_win(tmp_path):
    (tmp_path / "a.toml").write_text("[train]\nseed = 1\nsteps = 5\n")
    (tmp_path / "b.toml").write_text("[train]\nseed = 2\n")
    a, b = str(tmp_path / "a.toml"), str(tmp_path / "b.toml")
    assert load([a, b])[0].train.seed == 2 and load([b, a])[0].train.seed == 1
    assert load(["train.seed=3", a, b])[0].train.seed == 3
    assert load([a, b])[0].train.steps == 5


def test_printed_configuration_reads_back(tmp_path):
    changed, origin = load(['train.sample_prompt=def "f"\\n\t#é', "optim.lr=1e-7", "train.steps=3"])
    for text in (config.to_toml(changed), config.to_toml(changed, origin)):
        (tmp_path / "c.toml").write_text(text, encoding="utf-8")
        assert load([str(tmp_path / "c.toml")])[0] == changed
    assert config.from_dict(dataclasses.asdict(changed)) == changed
    assert "optim.lr" in origin and "# command line" in config.to_toml(changed, origin)


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
        (["optim.lr=-0.1"], "expected 0 or more"),
        (["optim.beta2=1"], "0 <= value < 1"),
        (["optim.decay=1.5"], "share of the run"),
        (["optim.nesterov=maybe"], "expected true or false"),
        (["optim.name=normoun"], 'did you mean "normuon"'),
        (["optim.ns_coefficients=1,2"], "three numbers"),
        (["train.micro_batch=all"], "expected a whole number"),
        (["train.micro_batch=0"], "expected at least 1, or auto"),
        (["train.compile=yes"], "expected one of auto, on, off"),
        (["train.batch_tokens=1000"], "the nearest are 768 or 1024"),
        (["model.n_head=7"], "take n_head = 6"),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(ConfigError) as error:
        load(arguments)
    assert words in str(error.value) and error.value.exit_code == 2


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


def test_what_may_change_on_resume_exists_and_the_rest_is_reported():
    everything = {
        f"{s}.{f.name}" for s, kind in config.SECTIONS.items() for f in dataclasses.fields(kind)
    }
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
