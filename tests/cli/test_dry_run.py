"""The cost of a run is known before it starts: in the headers of the recipes and by --dry-run."""

import re
import tomllib
from dataclasses import replace

import pytest
import torch

from nanonormuon.cli import app as cli
from nanonormuon.cli import dry_run
from nanonormuon.config import load, recipes
from nanonormuon.errors import ConfigError, TokenizerError
from nanonormuon.model import GPT, GPTConfig
from nanonormuon.pretrained import models
from nanonormuon.runtime import activations, memory
from nanonormuon.runtime.distributed import World
from nanonormuon.sample import cache_bytes
from nanonormuon.text import tokenizer

VOCABULARY = {"shakespeare-char": 320}  # of data (here bytes) that a recipe alone does not tell
UNITS = {"M": 1e6, "G": 1e9, "B": 1e9}


def sized(name):
    config, _ = load([name])
    if name in VOCABULARY:
        config = replace(config, model=replace(config.model, vocab_size=VOCABULARY[name]))
    return dry_run.with_vocabulary(config)[0]


@pytest.mark.parametrize("name", sorted(set(recipes()) - {"finetune"}))
def test_headers_say_what_the_code_computes(name):
    header = " ".join(
        line.lstrip("# ") for line in recipes()[name].read_text().splitlines() if line[:1] == "#"
    )
    config = sized(name)
    with torch.device("meta"):
        model = GPT(config.model)
    of_token = model.flops_per_token(config.data.seq_len)
    total = of_token * config.train.last_step * config.train.batch_tokens
    work = re.search(r"([\d.]+) ([MG])FLOP per token = ([\d.]+e\d+) FLOP", header)
    per_token, unit, flops = work.groups()
    assert float(per_token) * UNITS[unit] == pytest.approx(of_token, rel=0.02)
    assert float(flops) == pytest.approx(total, rel=0.04)  # two digits
    sizes = [float(a) * UNITS[b] for a, b in re.findall(r"([\d.]+)([MB])\b", header)]
    parameters = sum(p.numel() for p in model.parameters())
    assert any(parameters == pytest.approx(n, rel=0.02) for n in sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"n_kv_head": 2},
        {"attention": "latent", "q_rank": 32},
        {"n_kv_head": 2, "mlp": "experts", "n_expert": 6, "n_expert_used": 2},
    ],
)
def test_activations_are_what_autograd_keeps(settings, dtype, again):
    m = GPTConfig(vocab_size=192, n_layer=5, n_head=4, n_embd=64, **settings).resolved()
    model = GPT(m, dtype).init_weights(0)
    if again:
        activations.checkpoint_activations(model)
    tokens, seen = torch.zeros(3, 40, dtype=torch.int64), {}
    own = {p.data_ptr() for p in model.parameters()}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(tokens, tokens)
    kept = sum(s.nbytes() for pointer, s in seen.items() if pointer not in own)
    loss.backward()
    blocks, around = activations.kept(m, 40, 3, dtype, again)
    if again:  # the one block whose activations come back in the backward pass is not kept yet
        blocks -= activations.kept(replace(m, n_layer=1), 40, 3, dtype, False)[0]
    assert blocks + around == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("name", dry_run.VOCABULARIES)
def test_a_tokenizers_name_tells_its_vocabulary(name):
    try:
        expected = tokenizer.get(name).vocab_size
    except TokenizerError:  # its file is not on this machine
        pytest.skip(f"no {name}")
    assert dry_run.VOCABULARIES[name] == expected


def test_a_dry_run_says_it_and_stays_readable(capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "TRIAL_SECONDS", 0.01)
    assert cli.main(["run", "demo", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert tomllib.loads(said)["train"]["steps"] == 360
    model, _ = dry_run.build(sized("demo"), torch.device("meta"))
    total = sum(p.numel() for p in model.parameters())
    assert f"\n# parameters: {total:,} (" in said and f"{total:,}".startswith("3,2")
    words = ["memory, 1 rank", "optimizer", "checkpoint: ", "minutes of training"]
    for word in (*words, f"{cache_bytes(model):,} bytes of cache per token"):
        assert word in said


def test_experts_are_timed(capsys):
    small = ["model.n_layer=1", "model.n_embd=32", "train.batch_tokens=256", "data.seq_len=64"]
    assert cli.main(["run", "experts-demo", *small, "--dry-run"]) == 0
    assert "minutes of training" in capsys.readouterr().out


def test_what_is_assumed_of_data_that_are_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "timed", lambda *_: [0.1, 0.1])
    for arguments, words in (([], "320 token ids"), (["model.vocab_size=64"], "")):
        settings = [f"data.path={tmp_path / 'no'}", "data.tokenizer=byte", *arguments]
        first = dry_run.report(load(["shakespeare-char", *settings])[0])[0]
        assert words in first and (str(tmp_path / "no") in first) is bool(words)


def test_on_several_nodes_it_shows_what_a_rank_holds_in_each_layout(monkeypatch):
    monkeypatch.setattr(dry_run, "timed", lambda *_: [0.1, 0.1])
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    lines = "\n".join(dry_run.report(load(["demo", "model.n_layer=1"])[0]))
    sizes = dict(re.findall(r"^memory, each of 4 ranks, (\w+), .*?: ([\d.]+) GB", lines, re.M))
    assert list(sizes) == ["ddp", "fsdp", "hsdp"]
    assert float(sizes["ddp"]) > float(sizes["hsdp"]) > float(sizes["fsdp"])
    demo = sized("demo")
    found = []
    for reshard in (True, False):
        config = replace(demo, train=replace(demo.train, reshard=reshard, dtype="fp32"))
        model, optimizers = dry_run.build(config, torch.device("meta"))
        found.append(dry_run.memory_parts(config, model, optimizers, 1, 4, 4)["weights"])
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert found[0] < found[1] == weights // 4 + weights


def test_a_dry_run_describes_the_model_to_start_from(trained, capsys):
    """With where it is from; and a tokenizer's absurd size is refused, not counted."""
    given = ["run", "--init-from", str(trained), "train.device=cuda", "--dry-run"]
    assert cli.main([*given, "data.path=nowhere"]) == 0
    said = capsys.readouterr().out
    (newest,) = (trained / "checkpoints").glob("step-000060")
    expected = sum(p.numel() for p in GPT(models.model_config(newest)).parameters())
    assert f"\n# parameters: {expected:,} (" in said
    assert re.search(rf"^n_embd = 32 +# {trained}$", said, re.M)
    assert cli.main(["run", "demo", "data.tokenizer=bpe:1000000000000", "--dry-run"]) == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.vocab_size=4e9"], "at least 2.05 TB of memory"),
        (["model.n_embd=1_000_000"], "at least 96 TB of memory"),
        (["train.batch_tokens=512_000_000_000"], "train.batch_tokens = 512000000000"),
        (["model.n_layer=10000", "train.batch_tokens=2560M"], "train.time_limit is 900 s"),
        (["train.steps=1e15"], "train.steps = 1000000000000000"),
        (["train.steps=1e15", "train.stop_at=5"], ""),
        (["train.batch_tokens=2560M", "train.time_limit=0"], ""),
    ],
)
def test_what_no_machine_can_do_is_refused(settings, words, monkeypatch):
    monkeypatch.setattr(memory, "memory_of", lambda _: 32e9)
    small = ["model.n_layer=1", "model.n_embd=32", "model.n_head=2", "model.vocab_size=320"]
    config, world = load([*small, *settings])[0], World(0, 1, torch.device("cpu"))
    if not words:
        return memory.refuse_absurd(config, world)
    with pytest.raises(ConfigError, match=re.escape(words)):
        memory.refuse_absurd(config, world)


@pytest.mark.parametrize("name", sorted(set(recipes()) - {"finetune"}))
def test_no_recipe_is_refused_on_a_single_gpu(name, monkeypatch):
    monkeypatch.setattr(memory, "memory_of", lambda _: 24e9)
    memory.refuse_absurd(sized(name), World(0, 1, torch.device("cuda")))
