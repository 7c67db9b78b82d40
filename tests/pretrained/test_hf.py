"""Hugging Face both ways: transformers loads checkpoints and exports offline, gives the same logits
and generates the same tokens, alone in a process too; its Qwen3 and Llama directories train on; and
what does not fit is named."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import serialise

from nanonormuon import param_groups, sample
from nanonormuon.checkpoint import named_for_hf, weights_of
from nanonormuon.cli import app as cli
from nanonormuon.config import load
from nanonormuon.errors import CheckpointError, ConfigError
from nanonormuon.model import GPT, GPTConfig
from nanonormuon.pretrained import export, models
from nanonormuon.storage import huggingface as hf
from nanonormuon.text import tokenizer
from nanonormuon.train import train

transformers = pytest.importorskip("transformers")
LATENT = {"attention": "latent", "head_dim": 12, "rope_head_dim": 8, "v_head_dim": 16}
DEEPSEEK = {**LATENT, "q_rank": 20, "mlp": "experts", "n_expert": 8, "n_expert_used": 3,
            "n_dense": 1, "n_expert_group": 2, "n_group_used": 1, "router_scale": 2.5}  # fmt: skip


CHANGED = """model.py computes something else than the class that config.json names. If the
architecture was changed on purpose, let `obstacles` in nanonormuon/storage/huggingface.py return a
line about it: runs then say at their start that their checkpoints are no Hugging Face directories.
These tests of Qwen3 and Llama can go."""


def check_same(ours, theirs):
    difference = (ours - theirs).abs().max().item()
    assert difference < 1e-4, f"logits differ by {difference:.2g}: {CHANGED}"


TRACK3 = {
    "mlp": "relu2", "bias": True, "qk_gain": False, "rope": "half", "attn_scale": 0.12,
    "embed_norm": True, "logit_cap": 15.0, "norm_eps": 0.0, "embed_dtype": "bf16",
}  # fmt: skip


def written(path, **settings):
    """A model in which no parameter is zero, as a checkpoint's files describe it."""
    model = GPT(
        GPTConfig(**{"vocab_size": 96, "n_layer": 2, "n_head": 4, "n_embd": 32, **settings})
    )
    model.init_weights(0)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in weights_of(model).values():
            p.add_(0.1 * torch.randn(p.shape))
    path.mkdir(exist_ok=True)
    described = hf.config_json(model.config, 64, 95)
    (path / "config.json").write_text(json.dumps(described))
    if "auto_map" in described:
        (path / hf.MODELING).write_bytes(hf.modeling())
    weights = {name: p.detach() for name, p in weights_of(model).items()}
    (path / "model.safetensors").write_bytes(serialise(named_for_hf(weights)))
    return model.eval()


EXPERTS = {"mlp": "experts", "n_expert": 8, "n_expert_used": 2, "n_layer": 3}
QWEN3_MOE = {**EXPERTS, "router": "softmax", "n_expert_shared": 0, "balance_rate": 0.0}
DOTS1 = {**EXPERTS, "n_dense": 1, "n_expert_group": 4, "n_group_used": 2, "router_scale": 2.5}


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "Qwen3"),
        ({"tied": True}, "Qwen3"),
        ({"n_kv_head": 2}, "Qwen3"),
        ({"head_dim": 16, "n_hidden": 48, "rope_theta": 1e6, "norm_eps": 1e-5}, "Qwen3"),
        ({"qk_norm": False}, "Llama"),
        (QWEN3_MOE, "Qwen3Moe"),
        ({**QWEN3_MOE, "n_dense": 2, "router_norm": False, "balance_loss": 0.01}, "Qwen3Moe"),
        (EXPERTS, "Dots1"),
        (DOTS1, "Dots1"),
        (LATENT, "DeepseekV3"),
        (
            {**LATENT, "q_rank": 20, "rope_interleave": False, "tied": True, "norm_eps": 1e-2},
            "DeepseekV3",
        ),
        (DEEPSEEK, "DeepseekV3"),
        ({"value_embed": True}, "Nanonormuon"),
        ({"value_embed": True, "tied": True, "n_kv_head": 2}, "Nanonormuon"),
        ({"bigram_embed": 300, "key_shift": True}, "Nanonormuon"),
        ({**LATENT, "logit_cap": 15.0}, "Nanonormuon"),
        (TRACK3, "Nanonormuon"),
    ],
)
def test_transformers_gives_the_same_logits_and_tokens(settings, kind, tmp_path, monkeypatch):
    model = written(tmp_path, **settings)
    own = kind == "Nanonormuon"
    other, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True, trust_remote_code=own
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(other).__name__ == f"{kind}ForCausalLM"
    tokens = torch.randint(95, (2, 20))
    with torch.no_grad():
        ours, theirs = model(tokens), other(tokens).logits
    check_same(ours, theirs)
    assert ours.std() > 0.5
    fed, forward = [], other.forward
    monkeypatch.setattr(other, "forward", lambda **x: fed.append(x["input_ids"]) or forward(**x))
    greedy = other.generate(tokens[:1], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert [ids.size(1) for ids in fed] == [20] + 19 * [1]  # with a cache
    ours = [int(t) for t in sample.generate(model, tokens[:1], 20, temperature=0)]
    assert ours == greedy[0, 20:].tolist()


@pytest.mark.parametrize("own", [False, True])
def test_a_trained_checkpoint_loads_with_its_tokenizer(own, tiny, tmp_path):
    tables = [f"model.value_embed={own}", f"model.bigram_embed={96 * own}"]
    train(load([*tiny, "train.steps=3", *tables])[0], tmp_path / "run")
    model, ours, path = models.load_run(tmp_path / "run", torch.float32, torch.device("cpu"))
    assert (path / hf.MODELING).exists() == own
    other = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, trust_remote_code=own
    )
    theirs = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=own)
    text = "the cat sat; naïve 東京 🎉\r\n\t <|endoftext|>"
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text == ours.decode(ids)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        check_same(model(tokens), other(tokens).logits)
    assert ours.hash == tokenizer.load(path).hash


@torch.no_grad()
def test_what_the_class_in_a_checkpoint_can_do_and_what_it_refuses(tmp_path):
    model = written(tmp_path / "a", **TRACK3, value_embed=True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    other, tokens = load(tmp_path / "a", trust_remote_code=True), torch.randint(95, (2, 9))
    other.save_pretrained(tmp_path / "b")
    again = load(tmp_path / "b", trust_remote_code=True)
    assert torch.equal(again(tokens).logits, other(tokens).logits)
    loss = other(tokens, labels=tokens).loss
    assert torch.allclose(loss, model(tokens[:, :-1], tokens[:, 1:]), rtol=1e-5)
    first = other(tokens[:, :5], use_cache=True)
    rest = other(tokens[:, 5:6], past_key_values=first.past_key_values).logits
    assert torch.allclose(rest, model(tokens[:, :6])[:, -1:], atol=1e-5)
    mask = torch.ones_like(tokens)
    mask[:, -2:] = 0  # on the right nothing sees it
    assert torch.equal(other(tokens, attention_mask=mask).logits, other(tokens).logits)
    with pytest.raises(ValueError, match="one length"):
        other(tokens, attention_mask=mask.flip(1))
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "eos_token_id": None}
    assert other.generate(tokens, attention_mask=mask * 0 + 1, **options).shape == (2, 12)


@torch.no_grad()
def test_a_checkpoint_from_before_it_carried_its_source_still_loads_here(tmp_path):
    ours, tokens = written(tmp_path, bias=True), torch.randint(95, (1, 9))
    described = json.loads((tmp_path / "config.json").read_text())
    old = ("model_type", "max_position_embeddings", "nanonormuon")
    (tmp_path / "config.json").write_text(json.dumps({key: described[key] for key in old}))
    (tmp_path / hf.MODELING).unlink()
    again = models.load_model(tmp_path, torch.float32, torch.device("cpu"))
    assert torch.equal(again(tokens), ours(tokens))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("from nanonormuon.parts.extra import Extra", ""),
        ("from nanonormuon.parts.extra import Extra as E", "model.py: .* expected from"),
        ("import nanonormuon.parts.extra", "model.py: .* expected from"),
        ("from nanonormuon.parts.extra import GPT", "GPT: defined twice in nanonormuon.model, "),
        ("from nanonormuon.parts import extra", "parts.py: no such file; expected from"),
        (
            "from nanonormuon.parts.extra import (\n    Extra as E,\n)",
            "model.py: .*: expected from",
        ),
    ],
)
def test_the_files_of_a_model_become_one(line, words, tmp_path, monkeypatch):
    """Also one that is imported where it is used, and that imports the model itself."""
    package = Path(models.__file__).parents[1]
    shutil.copytree(package / "parts", tmp_path / "parts")
    (tmp_path / "storage").mkdir()
    shutil.copy(package / "storage" / "modeling.txt", tmp_path / "storage")
    source = f"{line}\n" + (package / "model.py").read_text()
    late = "def extra():\n    from nanonormuon.parts.late import (\n        Late,\n    )\n"
    (tmp_path / "model.py").write_text(f"{source}\n\n{late}\n    return Late\n")
    name = "GPT" if line.endswith("GPT") else "Extra"
    (tmp_path / "parts" / "extra.py").write_text(f"class {name}:\n    pass\n")
    text = "from nanonormuon.model import MLP\n\n\nclass Late(MLP):\n    pass\n"
    (tmp_path / "parts" / "late.py").write_text(text)
    monkeypatch.setattr(hf, "__file__", str(tmp_path / "storage" / "huggingface.py"))
    if words:
        with pytest.raises(ConfigError, match=words):
            hf.modeling.__wrapped__()
        return
    found = hf.modeling.__wrapped__().decode()
    assert "import nanonormuon" not in found and "from nanonormuon" not in found
    assert '"nanonormuon::' not in found  # else this process would lose its own operators
    names = {"__name__": "json"}  # any module, for dataclasses
    exec(found, names)
    assert names["extra"]().__mro__[1] is names["MLP"] and "Extra" in names


@torch.no_grad()
@pytest.mark.parametrize("kind", hf.ANSWERS)
def test_the_answers_of_small_models_are_those_of_transformers(kind, tmp_path):
    """Through a directory, as transformers stacks experts anew."""
    model = GPT(small := GPTConfig(**hf.SMALL | hf.SETTINGS[kind]).resolved())
    for name, p in weights_of(model).items():
        p.copy_(hf.filling(name, p.numel()).view(p.shape))
    (tmp_path / "config.json").write_text(json.dumps(hf.exported_config(small, 1024, None)))
    (tmp_path / "model.safetensors").write_bytes(serialise(named_for_hf(weights_of(model))))
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).float().eval()
    z = other(torch.arange(1024)[None] ** 2 % 64).logits[0, (9, 599, 1023), :2].flatten()
    assert z.tolist() == pytest.approx(hf.ANSWERS[kind], abs=2e-5, rel=0)
    assert hf.agrees(kind) and hf.obstacles(small) == []


def test_a_change_of_the_model_is_noticed(monkeypatch):
    def found():
        hf.agrees.cache_clear()
        return hf.obstacles(GPTConfig())

    assert found() == []
    for name, changed in {
        "F.silu": lambda x, own=torch.nn.functional.silu: own(x) * 1.001,
        "rotate": lambda x, cos, sin: x,
        "Attention.attend": lambda _self, q, k, v, scale, mask: model_of_a_window(q, k, v, scale),
    }.items():
        monkeypatch.setattr(f"nanonormuon.model.{name}", changed)
        assert found() == ["a changed model.py"], name
        monkeypatch.undo()
    assert found() == []


def model_of_a_window(q, k, v, scale, window=512):
    """Attention to the last so many tokens."""
    seen = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).tril()
    seen = seen.triu(1 - window)
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, seen, scale=scale, enable_gqa=True)


def test_what_hugging_face_cannot_load_is_named():
    assert hf.obstacles(GPTConfig()) == []
    odd = hf.obstacles(GPTConfig(**LATENT, mlp="relu2", rope="half", attn_scale=12**-0.5))
    assert odd == ["mlp = relu2", "rope = half", f"attn_scale = {12**-0.5}"]
    assert hf.obstacles(GPTConfig(**LATENT)) == hf.obstacles(GPTConfig(**DEEPSEEK)) == []
    odd = hf.obstacles(GPTConfig(**{**DEEPSEEK, "router": "softmax", "n_expert_shared": 0}))
    assert odd == ["router = softmax", "n_expert_shared = 0"]
    plain = {"tied": True, "n_kv_head": 2, "head_dim": 12, "rope_theta": 1e6, "embed_dtype": "fp32"}
    assert hf.obstacles(GPTConfig(vocab_size=50_304, attn_scale=12**-0.5, **plain)) == []
    odd = hf.obstacles(GPTConfig(**TRACK3, value_embed=True))
    assert {*odd} == {f"{k} = {v}" for k, v in TRACK3.items() if k != "embed_dtype"} | {
        "value_embed = True"
    }
    content = hf.config_json(GPTConfig(vocab_size=64, bias=True).resolved(), 64, None)
    assert content["model_type"] == "nanonormuon"
    assert hf.gpt_config(content) == GPTConfig(vocab_size=64, bias=True).resolved()
    softmax = GPTConfig(mlp="experts", n_expert=4, n_expert_used=2, router="softmax")
    assert hf.obstacles(softmax) == ["n_expert_shared = 1", "balance_rate = 0.001"]
    sigmoid = replace(softmax, router="sigmoid", n_expert_shared=0, qk_norm=False)
    odd = ["qk_norm = False", "n_expert_shared = 0"]
    assert hf.obstacles(sigmoid) == odd
    with pytest.raises(ValueError, match='invalid section "nanonormuon"'):
        hf.gpt_config({"nanonormuon": {"n_layers": 3}})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\]"),
        ({"num_experts": "8"}, "num_experts = '8'"),
        ({"num_experts": None}, "num_experts = None"),
        ({"moe_intermediate_size": 20}, "expert_hidden = 20: expected a multiple of 8"),
        ({"model_type": "dots1"}, "n_routed_experts = None"),
    ],
)
def test_experts_that_do_not_fit_are_named(changed, words):
    config = replace(GPTConfig(**QWEN3_MOE, vocab_size=64), balance_loss=0.001).resolved()
    content = hf.config_json(config, 64, None)
    del content["nanonormuon"]
    assert hf.gpt_config(content) == config
    with pytest.raises(ValueError, match=words):
        hf.gpt_config(content | changed)


def test_fields_that_a_file_of_experts_may_leave_out():
    config = replace(GPTConfig(**QWEN3_MOE, vocab_size=64), router_norm=False).resolved()
    content = hf.config_json(config, 64, None)
    for name in ("nanonormuon", "norm_topk_prob", "router_aux_loss_coef"):
        content.pop(name)
    assert hf.gpt_config(content) == config


def test_gpt2s_layers_are_known_by_their_class():
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 40, "bos_token_id": 0}
    config = transformers.GPT2Config(**sizes, eos_token_id=0)
    groups = {g["role"]: g for g in param_groups(transformers.GPT2LMHeadModel(config))}
    assert groups.keys() == {"columns", "embedding", "vector"}
    found = {name.split(".", 3)[3] for name in groups["columns"]["names"]}
    assert found == {
        f"{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


# ------------------------------------------------------------------------------------------ export


def with_noise(run, out, **settings):
    """A checkpoint like `run`'s, of another shape, in which no parameter is zero."""
    from nanonormuon.storage.checkpoints import all_steps, read_json, write

    source = all_steps(run / "checkpoints")[-1]
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("checkpoints"))
    config = GPTConfig(**{"vocab_size": 320, "n_layer": 2, "n_head": 4, "n_embd": 32, **settings})
    model = GPT(config).init_weights(0)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in weights_of(model).values():
            p.add_(0.05 * torch.randn(p.shape))
    files = {p.name: p.read_bytes() for p in source.iterdir() if p.name != "manifest.json"}
    files["config.json"] = json.dumps(described := hf.config_json(model.config, 32, 299)).encode()
    if "auto_map" in described:
        files[hf.MODELING] = b"raise SystemExit('a file in a directory was run')"
    files["model.safetensors"] = serialise(named_for_hf(weights_of(model)))
    return write(out / "checkpoints", read_json(source / "state.json")["step"], files)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tied": True},
        {"n_kv_head": 2},
        {"vocab_size": 300},
        {"qk_norm": False, "n_kv_head": 1, "tied": True},
        QWEN3_MOE,
        EXPERTS,
        LATENT,
        DEEPSEEK,
        TRACK3 | {"value_embed": True},
    ],
    ids=[
        "padded",
        "tied",
        "grouped",
        "unpadded",
        "llama",
        "qwen3moe",
        "dots1",
        "latent",
        "deepseek",
        "own",
    ],
)
def test_an_export_computes_what_the_model_computes(settings, dtype, trained, tmp_path):
    with_noise(trained, tmp_path / "run", **settings)
    report = export.export(tmp_path / "run", tmp_path / "hf", dtype)
    model, _, _ = models.load_run(tmp_path / "run", torch.float32, torch.device("cpu"))
    own = "value_embed" in settings
    load = transformers.AutoModelForCausalLM.from_pretrained
    other = load(tmp_path / "hf", trust_remote_code=own).float()
    kinds = [({"qk_norm": False}, "Llama"), (LATENT, "DeepseekV3"), (QWEN3_MOE, "Qwen3Moe"),
             (EXPERTS, "Dots1"), ({"value_embed": True}, "Nanonormuon")]  # fmt: skip
    kind = next((name for given, name in kinds if given.items() <= settings.items()), "Qwen3")
    expected = f"{kind}ForCausalLM"
    card = (tmp_path / "hf" / "README.md").read_text()
    assert ("trust_remote_code=True" in card) == own == bool(report["own_source"])
    assert type(other).__name__ == report["architecture"] == expected
    assert other.config.vocab_size == 300 and other.get_input_embeddings().weight.shape[0] == 300
    assert report["rows_cut"] == settings.get("vocab_size", 320) - 300 or "vocab_size" in settings
    tokens = torch.randint(300, (3, 30))
    with torch.no_grad():
        difference = (model(tokens)[..., :300] - other(tokens).logits).abs().max()
    rounded = 8e-2 if "mlp" in settings else 2e-2  # a rounded score chooses other experts
    assert difference < (1e-4 if dtype == "fp32" else rounded)
    assert report["largest_difference"] < 1e-4
    saved = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert saved["torch_dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    assert ("nanonormuon" in saved) == own
    # an exported directory serves as a run does
    again, _, _ = models.load_run(tmp_path / "hf", torch.float32, torch.device("cpu"))
    with torch.no_grad():
        assert (again(tokens) - other(tokens).logits).abs().max() < 1e-4


def test_an_export_shows_its_progress_at_a_terminal_only(trained, tmp_path, monkeypatch):
    shown = []
    for terminal in (True, False):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        export.export(trained, tmp_path / str(terminal))
        shown.append(stream.getvalue())
    assert {"verifying", "reading", "writing", "comparing"} <= {*re.findall(r"\r(\w+):", shown[0])}
    assert "\r" not in shown[1]


ALONE = """
import importlib.util, sys
from pathlib import Path
sys.path[:] = [p for p in sys.path if not (Path(p) / "nanonormuon").is_dir()]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f)]
assert importlib.util.find_spec("nanonormuon") is None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("the cat")["input_ids"]]])
    tokens = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    print(type(model).__name__, *tokens[0, ids.shape[1]:].tolist())
"""
OURS = """
import sys, torch
from pathlib import Path
from nanonormuon import sample
from nanonormuon.pretrained import export, models
for path in map(Path, sys.argv[2:]):
    report = export.export(path, Path(sys.argv[1]) / path.name)
    model, tokenizer, _ = models.load_run(path, torch.float32, torch.device("cpu"))
    ids = torch.tensor([[tokenizer.eot, *tokenizer.encode("the cat")]])
    tokens = map(int, sample.generate(model, ids, 20, temperature=0))
    print(report["architecture"], *tokens)
"""


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "story"
    assert cli.main(["export", str(trained), "--out", str(out)]) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("changed", [False, True])
def test_a_process_with_transformers_alone_generates_our_tokens(changed, trained, tmp_path):
    """Of Qwen3's and of other models; and of all of them where somebody changed the activation."""
    package, python = Path(models.__file__).parents[1], [sys.executable]
    if changed:
        shutil.copytree(package, tmp_path / "fork" / "nanonormuon")
        package = tmp_path / "fork" / "nanonormuon"
        source = (package / "model.py").read_text()
        assert source.count("F.silu(") == 1
        (package / "model.py").write_text(source.replace("F.silu(", "F.gelu("))
    tables = {"value_embed": True, "bigram_embed": 300, "key_shift": True}
    runs = {"plain": {}, "value": tables, "track3": TRACK3}
    for name, settings in runs.items():
        with_noise(trained, tmp_path / name, vocab_size=300, **settings)
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    commands = {
        "ours": [*python, "-c", OURS, tmp_path / "out", *(tmp_path / name for name in runs)],
        "theirs": [*python, "-I", "-c", ALONE, *(tmp_path / "out" / name for name in runs)],
    }
    said = {}
    for who, command in commands.items():
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        said[who] = done.stdout.splitlines()[-3:]
    assert said["ours"] == said["theirs"] and len({*said["ours"]}) == 3
    kinds = [line.split()[0].removesuffix("ForCausalLM") for line in said["ours"]]
    assert kinds == ["Nanonormuon" if changed else "Qwen3", "Nanonormuon", "Nanonormuon"]


def test_the_model_card_says_what_it_is(exported, trained, bpe_data):
    card = (exported / "README.md").read_text()
    assert "Qwen3ForCausalLM" in card and "steps = 60" in card and "| 60 | 30,720 |" in card
    assert json.loads((trained / "checkpoints/step-000060/state.json").read_text())["data"] in card
    assert str(bpe_data.parent) not in card  # where the data lay is nobody's business
    assert card.count("bpe:300") == 2 and "bpe:2048" not in card  # the data's, not the recipe's
    assert sorted(p.name for p in exported.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_the_card_has_the_fullest_evaluations_of_its_own_step(trained, tmp_path):
    run, (first, last) = tmp_path / "run", ("step-000040", "step-000060")
    shutil.copytree(trained, run)
    whole = {"set": "/home/me/book.txt", "path": "/home/me/book.txt", "loss": 1.5, "tokens": 900,
             "window": 32, "stride": 8, "step": 60}  # fmt: skip
    asked = {"set": "q.jsonl", "path": "/home/me/q.jsonl", "accuracy": 0.5, "window": 32,
             "accuracy_stderr": 0.05, "questions": 100, "step": 60}  # fmt: skip
    one = asked | {"accuracy": 1.0, "questions": 1, "accuracy_stderr": 0.0}
    found = [whole, asked, whole | {"loss": 1.1, "tokens": 9}, one, whole | {"step": 40, "loss": 2}]
    (run / "evaluations.json").write_text(json.dumps({"results": found}))
    cards = {}
    for step in (first, last):
        export.export(run / "checkpoints" / step, tmp_path / step)
        cards[step] = (tmp_path / step / "README.md").read_text().partition("## Recipe")[0]
    rows = [line for line in cards[last].splitlines() if "32 |" in line]
    assert rows == ["| q.jsonl | accuracy 0.5000 ± 0.0500 | 100 questions | 32 | - |",
                    "| book.txt | loss 1.5000 | 900 tokens | 32 | 8 |"]  # fmt: skip
    assert "| 40 | 20,480 |" in cards[first] and "| 60 |" not in cards[first]
    assert "loss 2.0000" in cards[first] and "q.jsonl" not in cards[first]


# llama.cpp's names for a Qwen3 model's tensors (gguf-py/gguf/constants.py, MODEL_TENSORS of
# QWEN3, and tensor_mapping.py there), and the shapes that its loader (src/models/qwen3.cpp) makes
# of a config: E width, H D queries, G D keys and values, F feed-forward, V vocabulary
GGUF = {
    "model.embed_tokens": ("token_embd", "V E"),
    "model.norm": ("output_norm", "E"),
    "lm_head": ("output", "V E"),
    "model.layers.#.input_layernorm": ("blk.#.attn_norm", "E"),
    "model.layers.#.self_attn.q_proj": ("blk.#.attn_q", "HD E"),
    "model.layers.#.self_attn.k_proj": ("blk.#.attn_k", "GD E"),
    "model.layers.#.self_attn.v_proj": ("blk.#.attn_v", "GD E"),
    "model.layers.#.self_attn.o_proj": ("blk.#.attn_output", "E HD"),
    "model.layers.#.self_attn.q_norm": ("blk.#.attn_q_norm", "D"),
    "model.layers.#.self_attn.k_norm": ("blk.#.attn_k_norm", "D"),
    "model.layers.#.post_attention_layernorm": ("blk.#.ffn_norm", "E"),
    "model.layers.#.mlp.gate_proj": ("blk.#.ffn_gate", "F E"),
    "model.layers.#.mlp.up_proj": ("blk.#.ffn_up", "F E"),
    "model.layers.#.mlp.down_proj": ("blk.#.ffn_down", "E F"),
}


def test_names_and_shapes_are_those_that_llama_cpp_converts(exported):
    import re

    from safetensors.torch import load_file

    c = json.loads((exported / "config.json").read_text())
    D, H, G = c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
    sizes = {"E": c["hidden_size"], "HD": H * D, "GD": G * D, "D": D, "V": c["vocab_size"]}
    sizes["F"] = c["intermediate_size"]
    found = {}
    for name, tensor in load_file(exported / "model.safetensors").items():
        pattern = re.sub(r"\.\d+\.", ".#.", name).removesuffix(".weight")
        assert tuple(sizes[s] for s in GGUF[pattern][1].split()) == tensor.shape, name
        found[pattern] = GGUF[pattern][0]
    assert found.keys() == GGUF.keys() and len(set(found.values())) == len(GGUF)
    assert c["architectures"] == ["Qwen3ForCausalLM"]


def test_what_export_refuses(trained, exported, tmp_path, monkeypatch, capsys):
    def refused(words, code=2, to=tmp_path / "new", run=trained):
        assert cli.main(["export", str(run), "--to", str(to)]) == code
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and words in error, error
        assert not (tmp_path / "new").exists() and not [*tmp_path.glob(".*")]

    refused("already exists", to=exported)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused("already exists", to=Path("."))
    mixed = with_noise(trained, tmp_path / "odd", **EXPERTS, value_embed=True)
    refused("value_embed = True", run=mixed.parents[1])
    forward = GPT.logits  # which differs from its source too
    monkeypatch.setattr(GPT, "logits", lambda self, h: forward(self, h) + 0.01)
    refused("transformers' logits differ")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused("pip install transformers")


# -------------------------------------------------------------------------------- beginning with it


MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
THEIRS = {"num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 24, "qk_rope_head_dim": 8,
          "qk_nope_head_dim": 12, "v_head_dim": 16, "num_nextn_predict_layers": 0,
          "n_routed_experts": 8, "moe_intermediate_size": 16, "num_experts_per_tok": 3,
          "n_group": 2, "topk_group": 1, "n_shared_experts": 2}  # fmt: skip


def made_by_transformers(kind, out, bpe_data, **settings):
    """A small model directory with the data's tokenizer, as transformers saves it."""
    make = {
        "qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig,
        "qwen3_moe": transformers.Qwen3MoeConfig, "dots1": transformers.Dots1Config,
        "deepseek_v3": transformers.DeepseekV3Config,
    }[kind]  # fmt: skip
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = make(**{**sizes, "bos_token_id": 299, "eos_token_id": 299, **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for p in model.state_dict().values():  # not the buffers of RoPE
            p.add_(0.05 * torch.randn(p.shape))
    model.save_pretrained(out)
    tokenizer.load(bpe_data).save(out)
    return model


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen3", {"head_dim": 16, "rope_theta": 1e6, "rms_norm_eps": 1e-5}),
        ("qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("qwen3_moe", {**MOE, "num_experts": 4, "norm_topk_prob": True, "mlp_only_layers": [0]}),
        ("qwen3_moe", {**MOE, "num_experts": 4}),
        ("deepseek_v3", {**THEIRS, "rms_norm_eps": 1e-2, "tie_word_embeddings": True}),
        ("deepseek_v3", {**THEIRS, "first_k_dense_replace": 1, "norm_topk_prob": False}),
        (
            "deepseek_v3",
            {
                **THEIRS,
                "first_k_dense_replace": 0,
                "n_group": 1,
                "q_lora_rank": None,
                "rope_interleave": False,
            },
        ),
        (
            "dots1",
            {
                **MOE,
                "n_routed_experts": 8,
                "n_shared_experts": 2,
                "n_group": 4,
                "topk_group": 2,
                "first_k_dense_replace": 1,
            },
        ),
    ],
)
def test_their_models_are_ours(kind, settings, tmp_path, bpe_data):
    other = made_by_transformers(kind, tmp_path, bpe_data, **settings)
    model, _, _ = models.load_run(tmp_path, torch.float32, torch.device("cpu"))
    assert model.config.rope_theta == other.config.rope_parameters["rope_theta"]
    tokens = torch.randint(300, (2, 40))
    with torch.no_grad():
        ours, theirs = model(tokens), other(tokens).logits
    assert (ours - theirs).abs().max() < 1e-4 and ours.std() > 0.05


@pytest.mark.parametrize(
    "kind",
    [
        "qwen3",
        "llama",
        pytest.param("qwen3_moe", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", marks=pytest.mark.slow),
    ],
)
def test_they_train_on_and_go_back(kind, tmp_path, bpe_data, capsys):
    settings = {
        "qwen3": {"head_dim": 16},
        "qwen3_moe": {**MOE, "num_experts": 4, "norm_topk_prob": True},
        "deepseek_v3": {**THEIRS, "first_k_dense_replace": 1},
    }.get(kind, {})
    made_by_transformers(kind, tmp_path / "their", bpe_data, **settings)
    size = sum(p.stat().st_size for p in (tmp_path / "their").iterdir())
    assert size < 500_000
    small = [f"data.path={bpe_data}", "data.seq_len=32", "train.batch_tokens=512", "train.steps=12",
             "train.eval_every=4", "train.device=cpu", "train.sample_tokens=4"]  # fmt: skip
    run = ["run", "--init-from", str(tmp_path / "their"), *small, "--out", str(tmp_path / "run")]
    assert cli.main([*run, "train.stop_at=4"]) == 0
    before = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert cli.main(["evaluate", str(tmp_path / "their"), "--data", str(bpe_data), "--json"]) == 0
    (start,) = json.loads(capsys.readouterr().out.partition("[")[2].join("[ "))[:1]
    assert before["val_loss"] < start["loss"]  # it began there and went down
    (tmp_path / "their" / "model.safetensors").unlink()  # a resumed run needs it no more
    assert cli.main(["run", "--resume", "--out", str(tmp_path / "run")]) == 0
    after = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert after["steps"] == 12 and after["val_loss"] < before["val_loss"]
    assert cli.main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "back")]) == 0
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["model_type"] == kind and back["vocab_size"] == 300


def test_a_run_begins_with_exactly_the_weights_given(trained, bpe_data, tmp_path, monkeypatch):
    from nanonormuon.train import Trainer

    seen = {}
    monkeypatch.setattr(
        Trainer, "loop", lambda self: seen.update(self.engine.model.state_dict()) or {"steps": 0}
    )
    small = ["train.batch_tokens=512", "train.device=cpu", "data.seq_len=32"]
    train(load(["finetune", f"train.init_from={trained}", f"data.path={bpe_data}", *small])[0],
          tmp_path / "run")  # fmt: skip
    model, _, _ = models.load_run(trained, torch.float32, torch.device("cpu"))
    assert all(torch.equal(seen[name], p) for name, p in model.state_dict().items())


def test_what_init_from_refuses(trained, bpe_data, shards, tmp_path, capsys):
    def refused(arguments, code, *texts):
        out = ["--out", str(tmp_path / "run"), "data.seq_len=32", "train.batch_tokens=512"]
        assert cli.main(["run", *arguments, *out, "train.device=cpu"]) == code
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and all(t in error for t in texts), error
        assert not (tmp_path / "run").exists()

    mine = f"data.path={bpe_data}"
    refused(["demo", "--init-from", str(trained), mine], 2, "leave out model.n_layer (demo)")
    refused(["--init-from", str(trained), mine, "model.n_layer=2"], 2, "model.n_layer (command")
    refused(["--init-from", str(tmp_path / "no"), mine], 4, "or a model directory")
    refused(["--init-from", str(trained), f"data.path={shards}"], 4, "tokens have other ids here",
            "--tokenizer")  # fmt: skip
    made_by_transformers("llama", tmp_path / "small", bpe_data, vocab_size=200, bos_token_id=0,
                         eos_token_id=0)  # fmt: skip
    refused(["--init-from", str(tmp_path / "small"), mine], 2, "vocab_size = 200", "300 token ids",
            f"tokenizer.json of {tmp_path / 'small'}")  # fmt: skip
    there = tmp_path / "llama"
    made_by_transformers("llama", there, bpe_data)
    config = json.loads((there / "config.json").read_text())
    changed = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}, "hidden_act": "gelu",
               "attention_bias": True}  # fmt: skip
    (there / "config.json").write_text(json.dumps(config | changed))
    refused(["--init-from", str(there), mine], 4, "hidden_act = 'gelu'", "rope_type = 'llama3'",
            "attention_bias = True")  # fmt: skip
    (there / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    refused(["--init-from", str(there), mine], 4, "model_type = 'mamba': expected qwen3 or")
    (there / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    refused(["--init-from", str(there), mine], 4, "mlp", "has shape (48, 32), expected (64, 32)")
    (there / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    refused(["--init-from", str(there), mine], 4, "1000000000 layers, the weights have 2")
    (there / "config.json").write_text(json.dumps(config | {"vocab_size": 10**12}))
    refused(["--init-from", str(there), mine], 4, "has shape (300, 32), expected (1000000000000,")
    (there / "config.json").write_text(json.dumps(config))
    (there / "tokenizer.json").unlink()
    refused(["--init-from", str(there), mine], 4, "tokenizer.json: missing")


def test_what_of_deepseeks_is_not_ours_is_named():
    config = transformers.DeepseekV3Config(**THEIRS, num_hidden_layers=9, num_attention_heads=4)
    plain = config.to_dict()
    found = hf.gpt_config(plain)
    assert (found.attention, found.mlp, found.n_dense) == ("latent", "experts", 3)
    odd = {
        "num_nextn_predict_layers": 1,
        "quantization_config": {"quant_method": "fp8"},
        "rope_scaling": {"type": "yarn", "factor": 40},
        "first_k_dense_replace": None,
        "attention_bias": True,
        "kv_lora_rank": None,
        "n_group": None,  # 8 in transformers
        "scoring_func": "softmax",
        "moe_layer_freq": 2,
    }
    with pytest.raises(ValueError) as refused:
        hf.gpt_config({**plain, "rope_parameters": None, **odd})
    for name in odd:
        assert name.replace("rope_scaling", "rope_type = 'yarn'") in str(refused.value)
    with pytest.raises(ValueError, match="n_group_used = 3"):
        hf.gpt_config({**plain, "topk_group": 3})
    del plain["q_lora_rank"]  # its default in transformers is 1,536, not null
    with pytest.raises(ValueError, match="q_lora_rank = None"):
        hf.gpt_config(plain)


def test_weights_in_several_files_are_read_and_odd_indices_refused(bpe_data, tmp_path):
    from safetensors.torch import load_file, save_file

    made_by_transformers("qwen3", tmp_path, bpe_data, head_dim=8)
    float32 = torch.float32, torch.device("cpu")
    expected = models.load_model(tmp_path, *float32).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: tensors[n].bfloat16() for n in part}, tmp_path / file)
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (tmp_path / models.INDEX).write_text(json.dumps(index))
    found = models.load_model(tmp_path, *float32).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n].bfloat16().float()) for n in found)
    for odd in ({"weight_map": {"x": "../a.safetensors"}}, {"weight_map": ["a.safetensors"]}, {}):
        (tmp_path / models.INDEX).write_text(json.dumps(odd))
        with pytest.raises(CheckpointError, match="unsafe file name"):
            models.load_model(tmp_path, *float32)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lm_head.weight", 2.0, "1 tensors unexpected, first lm_head.weight"),
        ("lm_head.weight", 1.0, ""),  # the embedding's weights once more
        (
            "model.norm.weight",
            float("inf"),
            r"model.norm.weight \(torch.float32\): expected",
        ),
        ("model.norm.weight", 1, r"model.norm.weight \(torch.int64\): expected"),
        ("model.norm.weight", None, "1 tensors missing, first model.norm.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(name, value, words, tmp_path):
    model = written(tmp_path, tied=True)
    tensors = {n: p.detach() for n, p in named_for_hf(weights_of(model)).items()}
    shape = {"lm_head.weight": (96, 32), "model.norm.weight": (32,)}[name]
    tensors.pop(name, None)
    if value == 1.0 and name == "lm_head.weight":
        tensors[name] = tensors["model.embed_tokens.weight"]
    elif value is not None:
        tensors[name] = torch.full(shape, value)
    (tmp_path / "model.safetensors").write_bytes(serialise(tensors))
    float32 = torch.float32, torch.device("cpu")
    if not words:
        models.load_model(tmp_path, *float32)
        return
    with pytest.raises(CheckpointError, match=words):
        models.load_model(tmp_path, *float32)


@pytest.mark.parametrize(
    ("name", "value"), [("n_embd", 32.0), ("vocab_size", 10**20), ("bigram_embed", True)]
)
def test_a_setting_that_no_model_has_is_named_with_its_file(name, value, tmp_path):
    written(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["nanonormuon"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        models.load_model(tmp_path, torch.float32, torch.device("cpu"))
