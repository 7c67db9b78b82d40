"""QK-clip: peaks equal to a brute-force maximum, logits at the threshold after the scaling."""

import math

import pytest
import torch

from nanonormuon.cli import app as cli
from nanonormuon.engine import Engine
from nanonormuon.model import GPT, GPTConfig, attend, document_mask
from nanonormuon.runtime import distributed, qk_clip
from nanonormuon.storage.run import read_rows

LATENT = {"attention": "latent", "qk_norm": True, "v_head_dim": 12}
SHAPE = {"vocab_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 32, "qk_norm": False}


def loud(**sizes):
    """A model whose logits differ between heads."""
    model = GPT(GPTConfig(**SHAPE | sizes)).init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return model


def logits(model, tokens):
    """Each layer's logits (layers, H), brute force: the largest over all pairs that are seen."""
    found, seen = [], torch.ones(tokens.size(1), tokens.size(1)).tril().bool()
    if model.separator is not None:
        seen = document_mask(tokens, model.separator)

    def look(q, k, v, scale, mask):
        z = q @ k.repeat_interleave(q.size(1) // k.size(1), 1).mT * scale
        found.append(z.masked_fill(~seen, -math.inf).amax((0, 2, 3)))
        return attend(q, k, v, scale, mask)

    for layer in model.layers:
        layer.self_attn.attend = look
    with torch.no_grad():
        model(tokens)
    return torch.stack(found)


def engine_of(model, limit):
    return Engine(model, lambda _: [], distributed.start("cpu"), qk_clip=limit)


@pytest.mark.parametrize("rows", [512, 5])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"n_kv_head": 2, "bias": True}, {"separator": 3}, LATENT, {**LATENT, "q_rank": 12}],
)
def test_peaks_are_the_largest_logits_and_heads_above_end_at_the_limit(sizes, rows, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(qk_clip, "ROWS", rows)
    separator = sizes.pop("separator", None) if (sizes := dict(sizes)) else None
    model = loud(**sizes)
    model.separator = separator
    tokens, targets = torch.randint(64, (2, 6, 12))
    plain = loud(**sizes)
    plain.load_state_dict(model.state_dict())
    plain.separator = separator
    wanted = logits(plain, tokens)
    limit = float(wanted.flatten().sort().values[3:5].mean())
    engine = engine_of(model, limit)
    with torch.no_grad():
        model(torch.randint(64, (1, 12)))  # an evaluation does not count
    engine.accumulate(iter(zip(tokens.split(2), targets.split(2))), 3)
    engine.extras[0].begin()  # a step that is repeated begins anew
    loss = engine.accumulate(iter(zip(tokens.split(2), targets.split(2))), 3)
    assert torch.isfinite(loss) and torch.allclose(engine.extras[0].peaks, wanted, rtol=1e-5)
    engine.update()
    above = wanted > limit
    assert above.any() and not above.all()
    assert engine.extras[0].row() == {
        "qk_max": pytest.approx(float(wanted.max()), rel=1e-5), "qk_clipped": int(above.sum()),
    }  # fmt: skip
    # of the first layer, whose input no clipping has changed
    plain.load_state_dict(model.state_dict())
    after = logits(plain, tokens)[0]
    assert torch.allclose(after, wanted[0].clamp(max=limit), rtol=1e-4)


def test_without_it_attention_is_untouched_and_with_qk_norm_it_is_refused(tiny, tmp_path, capsys):
    engine = engine_of(loud(), 0.0)
    assert not engine.extras and "attend" not in vars(engine.model.layers[0].self_attn)
    assert cli.main(["run", *tiny, "optim.qk_clip=100", "--out", str(tmp_path / "r")]) == 2
    assert "model.qk_norm=false" in capsys.readouterr().err


def test_a_run_reports_it(tiny, tmp_path, capsys):
    settings = ["optim.qk_clip=0.01", "model.qk_norm=false", "train.steps=3", "train.log_every=1"]
    assert cli.main(["run", *tiny, *settings, "--out", str(tmp_path / "r")]) == 0
    assert "qk_clipped" in (tmp_path / "r/train.log").read_text()
    rows = [row for row in read_rows(tmp_path / "r/metrics.jsonl") if "loss" in row]
    assert rows[0]["qk_clipped"] == 4 and rows[0]["qk_max"] > 0.01 > rows[-1]["qk_max"]
