"""Breaks down a model's loss: by token frequency, outliers of activations, cost of 4-bit weights.

Muon is reported to learn rare tokens better than Adam ("Muon outperforms Adam in tail-end
associative memory learning") and to avoid activation outliers, so that rounding to four bits costs
little ("Outlier-Safe Pre-Training").
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanonormuon.data import validation_batches
from nanonormuon.model import GPT, IGNORE
from nanonormuon.optim import HIDDEN, param_groups
from nanonormuon.runtime.distributed import ALONE
from nanonormuon.storage.shards import CHUNK, Split

SHARES = (50, 75, 90, 97, 100)  # upper ends of the groups of ids, in % of the training text
LEVELS = 7  # a 4-bit weight is -7 to 7 times its row's step


def groups(train: Split, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Count each id in the training text, and assign it to a group: 0 has the most frequent ids,
    which make up the first of SHARES; the last has those that never occur."""
    counts = np.zeros(vocab_size, np.int64)
    for shard in train.shards:
        for start in range(0, len(shard), CHUNK):
            counts += np.bincount(shard[start : start + CHUNK], minlength=vocab_size)
    train.settle()
    order = np.argsort(-counts, kind="stable")
    before = np.empty(vocab_size)  # % of the text made up of more frequent ids
    before[order] = 100 * (np.cumsum(counts[order]) - counts[order]) / max(1, counts.sum())
    group = np.searchsorted(SHARES, before, side="right").clip(max=len(SHARES) - 1)
    return counts, np.where(counts > 0, group, len(SHARES) - 1)


@torch.no_grad()
def target_losses(
    model: GPT, split: Split, window: int, stride: int, limit: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield targets (N,) and float64 losses in nats (N,) per batch of data.validation_batches."""
    device, batch = model.embed_tokens.weight.device, max(1, 2048 // window)
    batches = validation_batches(split, window, batch, ALONE, limit, stride)
    for tokens, targets in batches:
        real = targets != IGNORE
        logits = model(tokens.to(device))[real.to(device)].double()
        losses = F.cross_entropy(logits, targets[real].to(device), reduction="none")
        yield targets[real], losses.cpu()


def hidden(model: GPT) -> list[nn.Parameter]:
    """List the blocks' matrices and stacks of matrices."""
    return [p for group in param_groups(model) if group["role"] in HIDDEN for p in group["params"]]


@contextlib.contextmanager
def watched(model: GPT) -> Iterator[dict[str, list[float]]]:
    """Collect the excess kurtosis of the inputs to each of the blocks' matrices or stacks, by name:
    over a token's channels (0 for a normal distribution), averaged over a batch's tokens."""
    found: dict[str, list[float]] = {}

    def note(name: str, _module: nn.Module, inputs: tuple) -> None:
        x = inputs[0].detach().double().flatten(0, -2)
        x = x - x.mean(-1, keepdim=True)
        fourth = (x**4).mean(-1) / (x**2).mean(-1).square().clamp_min(1e-300)
        found.setdefault(name, []).append(float(fourth.mean()) - 3)

    matrices = {id(p) for p in hidden(model)}
    with contextlib.ExitStack() as hooks:
        for name, module in model.layers.named_modules():
            if any(id(p) in matrices for p in module.parameters(recurse=False)):
                hooks.enter_context(module.register_forward_pre_hook(partial(note, name)))
        yield found


@contextlib.contextmanager
def in_four_bits(model: GPT) -> Iterator[None]:
    """Temporarily round the blocks' matrices to 15 levels, whose step is a row's largest weight
    over 7. Embeddings, head, routers and gains are not rounded."""
    kept = {p: p.detach().clone() for p in hidden(model)}
    with torch.no_grad():
        for p in kept:
            step = (p.abs().amax(-1, keepdim=True) / LEVELS).clamp_min(torch.finfo(p.dtype).tiny)
            p.copy_((p / step).round() * step)
        try:
            yield
        finally:
            for p, value in kept.items():
                p.copy_(value)


def measure(
    model: GPT, split: Split, train: Split, window: int, stride: int, limit: int
) -> dict[str, Any]:
    """Break down a model's loss, in nats, on the first `limit` targets of a split (0: all). train:
    the text whose tokens are counted. Raises DataError."""
    counts, group = groups(train, model.config.vocab_size)
    number, nats = np.zeros(len(SHARES), np.int64), np.zeros(len(SHARES))
    with watched(model) as kurtosis:
        for targets, losses in target_losses(model, split, window, stride, limit):
            of = group[targets.numpy()]
            number += np.bincount(of, minlength=len(SHARES))
            nats += np.bincount(of, losses.numpy(), minlength=len(SHARES))
    with in_four_bits(model):
        rounded = sum(float(l.sum()) for _, l in target_losses(model, split, window, stride, limit))
    means = {name: float(np.mean(values)) for name, values in kurtosis.items()}
    where = max(means, key=lambda name: means[name])
    table = [
        {"up_to_percent": share, "ids": int(((group == i) & (counts > 0)).sum()),
         "targets": int(number[i]), "loss": nats[i] / number[i] if number[i] else None}
        for i, share in enumerate(SHARES)
    ]  # fmt: skip
    loss, in_all = nats.sum() / number.sum(), int(number.sum())
    return {
        "by_frequency": table,
        "excess_kurtosis": float(np.mean([*means.values()])),
        "largest_kurtosis": {"layer": f"layers.{where}", "value": means[where]},
        "loss_4bit": rounded / in_all,
        "cost_4bit": rounded / in_all - float(loss),
    }


def describe(found: dict[str, Any]) -> list[str]:
    """Format a breakdown as lines."""
    lines, before = ["  tokens by their share of the training text     ids   targets    loss"], 0
    for row in found["by_frequency"]:
        name = f"{before} to {row['up_to_percent']} %"
        loss = "      -" if row["loss"] is None else f"{row['loss']:7.4f}"
        lines.append(f"  {name:<42}{row['ids']:>8,}{row['targets']:>10,} {loss}")
        before = row["up_to_percent"]
    worst = found["largest_kurtosis"]
    mean, largest = f"mean {found['excess_kurtosis']:.2f}", f"largest {worst['value']:.2f}"
    lines.append(f"  excess kurtosis of activations: {mean}, {largest} (into {worst['layer']})")
    rounded = f"loss {found['loss_4bit']:.4f} ({found['cost_4bit']:+.4f})"
    return [*lines, f"  blocks' weights in 4 bits: {rounded}"]
