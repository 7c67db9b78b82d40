"""The loss on a validation split: every target once, summed over all ranks."""

import math
from collections.abc import Callable

import torch

from nanonormuon.data import validation_batches
from nanonormuon.model import IGNORE
from nanonormuon.runtime import distributed
from nanonormuon.storage.shards import Split


@torch.no_grad()
def validation_loss(
    forward: Callable[..., torch.Tensor],
    split: Split,
    seq_len: int,
    batch: int,
    world: distributed.World,
    max_tokens: int = 0,
    stride: int = 0,
) -> tuple[float, int]:
    """Return the mean cross entropy in nats per target, and the number of targets.

    forward(tokens, targets, reduction="sum") returns a scalar, as GPT. max_tokens: 0 for the whole
    split. Windows of seq_len tokens begin `stride` tokens apart (0: seq_len), and each predicts
    only its new targets. A smaller stride gives targets more context, on average half a window
    without overlap, at seq_len / stride times the cost.
    """
    losses, targets_seen = [], 0
    for tokens, targets in validation_batches(split, seq_len, batch, world, max_tokens, stride):
        targets_seen += int((targets != IGNORE).sum())
        tokens, targets = tokens.to(world.device), targets.to(world.device)
        losses.append(forward(tokens, targets, reduction="sum"))
    split.settle()
    # float32 suffices for the sum of a batch; batches and ranks are summed in float64
    nats = float(torch.stack(losses).cpu().double().sum())
    sums = torch.tensor([nats, float(targets_seen)], dtype=torch.float64)
    if world.size > 1:
        sums = distributed.total(sums.to(world.device))
    return float(sums[0] / sums[1]), int(sums[1])


def bits_per_byte(loss: float, targets: int, text_bytes: int | None) -> float | None:
    """Convert nats per token to bits per byte of text, which compares across tokenizers; None if
    the number of bytes is unknown. Predicting a separator costs bits but adds no byte."""
    return loss * targets / (math.log(2) * text_bytes) if text_bytes else None
