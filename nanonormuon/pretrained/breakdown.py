"""What a loss hides: how it falls on frequent and rare tokens, whether activations have outliers,
and what weights of four bits cost.

Muon is reported to learn rare tokens better than Adam ("Muon outperforms Adam in tail-end
associative memory learning") and to leave activations without outliers, so that rounding to four
bits costs little ("Outlier-Safe Pre-Training"). Both can be seen here.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanonormuon.data import validation_batches
from nanonormuon.model import GPT, IGNORE
from nanonormuon.optim import HIDDEN, param_groups
from nanonormuon.storage.shards import CHUNK, Split

SHARES = (50, 75, 90, 97, 100)  # % of the training text; each ends a group of tokens
LEVELS = 7  # a weight of four bits is one of -7 .. 7 times its row's step


def groups(train: Split, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each id occurs in the training text, and its group: 0 holds the most frequent ids,
    which make up the first of SHARES; ids that never occur are in the last."""
    counts = np.zeros(vocab_size, np.int64)
    for shard in train.shards:
        for start in range(0, len(shard), CHUNK):
            counts += np.bincount(shard[start : start + CHUNK], minlength=vocab_size)
    train.settle()
    order = np.argsort(-counts, kind="stable")
    before = np.empty(vocab_size)  # % of the text that more frequent ids make up
    before[order] = 100 * (np.cumsum(counts[order]) - counts[order]) / max(1, counts.sum())
    group = np.searchsorted(SHARES, before, side="right").clip(max=len(SHARES) - 1)
    return counts, np.where(counts > 0, group, len(SHARES) - 1)


@torch.no_grad()
def target_losses(
    model: GPT, split: Split, window: int, stride: int, limit: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Targets (N,) and their losses in nats (N,), float64, per batch of data.validation_batches."""
    device = model.embed_tokens.weight.device
    for tokens, targets in validation_batches(
        split, window, max(1, 2048 // window), max_tokens=limit, stride=stride
    ):
        real = targets != IGNORE
        logits = model(tokens.to(device))[real.to(device)].double()
        yield (
            targets[real],
            F.cross_entropy(logits, targets[real].to(device), reduction="none").cpu(),
        )


def hidden(model: GPT) -> list[nn.Parameter]:
    """The blocks' matrices, and stacks of them."""
    return [p for group in param_groups(model) if group["role"] in HIDDEN for p in group["params"]]


@contextlib.contextmanager
def watched(model: GPT) -> Iterator[dict[str, list[float]]]:
    """Collect, by name, the excess kurtosis of the inputs to each of the blocks' matrices, or stack
    of them: over a token's channels (0 for a normal distribution), the mean over a batch's tokens.
    """
    found: dict[str, list[float]] = {}
    handles = []
    matrices = {id(p) for p in hidden(model)}
    for name, module in model.layers.named_modules():
        if any(id(p) in matrices for p in module.parameters(recurse=False)):

            def note(_module: nn.Module, inputs: tuple, name: str = name) -> None:
                x = inputs[0].detach().double().flatten(0, -2)
                x = x - x.mean(-1, keepdim=True)
                fourth = (x**4).mean(-1) / (x**2).mean(-1).square().clamp_min(1e-300)
                found.setdefault(name, []).append(float(fourth.mean()) - 3)

            handles.append(module.register_forward_pre_hook(note))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def in_four_bits(model: GPT) -> Iterator[None]:
    """Round the blocks' matrices to four bits for a while: to the nearest of 15 levels, whose step
    is the largest weight of a row over 7. Embeddings, head, routers and gains stay as they are."""
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
    """The breakdown of a model's loss on the first `limit` targets of a split (0: all). train: the
    text whose tokens are counted. Losses are in nats; raises DataError."""
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
    """A breakdown as lines."""
    lines, before = ["  tokens by their share of the training text     ids   targets    loss"], 0
    for row in found["by_frequency"]:
        name = f"{before} to {row['up_to_percent']} %"
        loss = "      -" if row["loss"] is None else f"{row['loss']:7.4f}"
        lines.append(f"  {name:<42}{row['ids']:>8,}{row['targets']:>10,} {loss}")
        before = row["up_to_percent"]
    worst = found["largest_kurtosis"]
    lines.append(
        f"  excess kurtosis of activations: mean {found['excess_kurtosis']:.2f}, largest "
        f"{worst['value']:.2f} (into {worst['layer']})"
    )
    lines.append(f"  blocks' weights in 4 bits: loss {found['loss_4bit']:.4f} "
                 f"({found['cost_4bit']:+.4f})")  # fmt: skip
    return lines
