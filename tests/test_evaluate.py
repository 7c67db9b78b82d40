"""The validation loss: every target once, with as much context as window and stride give it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanonormuon.evaluate import validation_loss
from nanonormuon.model import GPT, GPTConfig
from nanonormuon.runtime.distributed import World
from nanonormuon.storage.shards import Split


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (8, 1), (5, 4), (64, 64)])
@pytest.mark.parametrize("max_tokens", [0, 17])
def test_windows_predict_every_token_once_with_enough_in_sight(window, stride, max_tokens):
    model = GPT(GPTConfig(vocab_size=32, n_layer=1, n_head=2, n_embd=16)).init_weights(0).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    shards = [np.random.default_rng(i).integers(0, 32, n) for i, n in enumerate((30, 2, 11))]
    losses, left = [], max_tokens or 1000
    for shard in shards:
        ids, end = torch.from_numpy(shard), window  # where the window that predicts a token ends
        for t in range(1, len(shard)):
            if not left:
                break
            left -= 1
            if t > end:
                end += stride
            with torch.no_grad():
                logits = model(ids[None, end - window : t])[0, -1]
            losses.append(float(F.cross_entropy(logits, ids[t])))
    split = Split([Path(f"val_{i}.bin") for i in range(3)], shards)
    world = World(0, 1, torch.device("cpu"))
    loss, count = validation_loss(model, split, window, 4, world, max_tokens, stride)
    assert count == len(losses)
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
