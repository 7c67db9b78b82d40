"""A checkpoint is a Hugging Face model directory: transformers loads it offline, gives the same
logits, generates the same tokens, and its tokenizer is ours."""

import json

import pytest
import torch

from nanonormuon import hf, sample, tokenizer
from nanonormuon.checkpoint import model_file
from nanonormuon.config import load
from nanonormuon.model import GPT, GPTConfig
from nanonormuon.train import train

transformers = pytest.importorskip("transformers")


def written(path, **settings):
    """A model in which no parameter is zero, as a checkpoint's files describe it."""
    model = GPT(
        GPTConfig(**{"vocab_size": 96, "n_layer": 2, "n_head": 4, "n_embd": 32, **settings})
    )
    model.init_weights(0)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(hf.config_json(model.config, 64, 95)))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    (path / "model.safetensors").write_bytes(model_file(weights))
    return model.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tied": True},
        {"n_kv_head": 2},
        {"head_dim": 16, "n_hidden": 48, "rope_theta": 1e6, "norm_eps": 1e-5},
    ],
)
def test_transformers_gives_the_same_logits_and_tokens(settings, tmp_path):
    model = written(tmp_path, **settings)
    other, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(other).__name__ == "Qwen3ForCausalLM"
    tokens = torch.randint(95, (2, 20))
    with torch.no_grad():
        ours, theirs = model(tokens), other(tokens).logits
    assert (ours - theirs).abs().max() < 1e-4 and ours.std() > 0.5
    greedy = other.generate(tokens[:1], max_new_tokens=20, do_sample=False, eos_token_id=None)
    ours = [int(t) for t in sample.generate(model, tokens[:1], 20, temperature=0)]
    assert ours == greedy[0, 20:].tolist()


def test_a_trained_checkpoint_loads_with_its_tokenizer(tiny, tmp_path):
    train(load([*tiny, "train.steps=3"])[0], tmp_path / "run")
    model, ours, path = sample.load_run(tmp_path / "run", torch.float32, torch.device("cpu"))
    other = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    text = "the cat sat; naïve 東京 🎉\r\n\t <|endoftext|>"
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text == ours.decode(ids)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        assert (model(tokens) - other(tokens).logits).abs().max() < 1e-4
    assert ours.hash == tokenizer.load(path).hash


def test_what_hugging_face_cannot_load_is_named():
    assert hf.obstacles(GPTConfig()) == []
    odd = hf.obstacles(GPTConfig(mlp="relu2", logit_cap=15.0, attn_scale=0.12, norm_eps=0.0))
    assert odd == ["mlp = relu2", "logit_cap = 15.0", "attn_scale = 0.12", "norm_eps = 0"]
    content = hf.config_json(GPTConfig(vocab_size=64, bias=True).resolved(), 64, None)
    assert content["model_type"] == "nanonormuon"
    assert hf.gpt_config(content) == GPTConfig(vocab_size=64, bias=True).resolved()
    with pytest.raises(ValueError, match="no usable section"):
        hf.gpt_config({"model_type": "llama"})
