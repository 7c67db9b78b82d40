"""Validation: the whole split, every target once, summed over all ranks."""

import math
from collections.abc import Callable

import numpy as np
import torch

from nanonormuon import distributed
from nanonormuon.data import DataError, Split, validation_batches
from nanonormuon.model import IGNORE


@torch.no_grad()
def validation_loss(
    forward: Callable[..., torch.Tensor],
    split: Split,
    seq_len: int,
    batch: int,
    world: distributed.World,
    max_tokens: int = 0,
) -> tuple[float, int]:
    """Mean cross entropy in nats and the number of targets it is the mean of.

    forward(tokens, targets, reduction="sum") -> scalar, as GPT. Windows of seq_len tokens do not
    overlap, so a token is predicted from at most seq_len and on average half as many before it.
    """
    losses, targets_seen = [], 0
    for tokens, targets in validation_batches(
        split, seq_len, batch, world.rank, world.size, max_tokens
    ):
        targets_seen += int((targets != IGNORE).sum())
        tokens, targets = tokens.to(world.device), targets.to(world.device)
        losses.append(forward(tokens, targets, reduction="sum"))
    # float32 carries the two sums exactly enough: each rank's is rounded once, here
    nats = float(torch.stack(losses).cpu().double().sum()) if losses else 0.0
    sums = torch.tensor([nats, float(targets_seen)], dtype=torch.float64)
    if world.size > 1:
        sums = distributed.total(sums.to(world.device))
    return float(sums[0] / sums[1]), int(sums[1])


def bits_per_byte(loss: float, targets: int, text_bytes: int | None) -> float | None:
    """Nats per token -> bits per byte of the text; comparable across tokenizers. The separators'
    bits count, although they are no text. None where the number of bytes is not known."""
    return loss * targets / (math.log(2) * text_bytes) if text_bytes else None


def count_bytes(split: Split, token_lengths: np.ndarray, max_tokens: int = 0) -> int:
    """UTF-8 bytes of the text behind a split's targets, from the length of each token."""
    total, left = 0, max_tokens or split.tokens
    for i, shard in enumerate(split.shards):
        for start in range(1, len(shard), 1 << 24):  # the first token of a shard is never a target
            part = shard[start : min(len(shard), start + (1 << 24), start + left)]
            if not len(part):
                return total
            if int(part.max()) >= len(token_lengths):
                raise DataError(
                    f"{split.names[i]}: id {int(part.max())} found, data.tokenizer has only "
                    f"{len(token_lengths)}: it is not what made these shards"
                )
            total += int(token_lengths[part].sum())
            left -= len(part)
    return total
