"""QK-clip, MuonClip's rule (Kimi K2, arXiv 2507.20534): limits attention logits.

After an update in which a head's largest logit S exceeds the threshold t, the product of its query
and key weights is scaled by t / S. If a head has its own key, each side takes the square root.
Query heads that share a key head scale it by the smallest of their factors' roots, and each query
takes the rest. Latent attention's shared rotary key and the optimizer's state do not change.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from nanonormuon.errors import ConfigError
from nanonormuon.model import GPT, attend
from nanonormuon.runtime import distributed

ROWS = 512  # queries whose logits are in memory at a time


class QkClip:
    """Records the largest logits of a model's training passes, and scales its heads.

    A maximum is exact for any split of a step over micro-batches and ranks. Raises ConfigError for
    a model whose q and k are normalised, as their weights do not change the logits.
    """

    def __init__(self, model: GPT, threshold: float, device: torch.device):
        c = model.config
        if c.qk_norm and c.attention == "full":  # latent attention does not normalise q and k
            raise ConfigError("optim.qk_clip needs model.qk_norm=false: QK-norm bounds the logits")
        self.layers, self.threshold, self.shared = model.layers, threshold, c.n_head // c.n_kv_head
        self.peaks = torch.full((c.n_layer, c.n_head), -torch.inf, device=device)
        for peaks, layer in zip(self.peaks, self.layers):
            layer.self_attn.attend = partial(noting, peaks)

    def begin(self) -> None:
        """Reset the maxima before a step's passes, which may be a second attempt."""
        self.peaks.fill_(-torch.inf)

    def add(self, count: int) -> None:
        """Do nothing: the forward pass has raised the maxima."""

    def finish(self) -> None:
        """Take the maxima over ranks; every rank must call this."""
        if distributed.grouped():
            dist.all_reduce(self.peaks, dist.ReduceOp.MAX)

    @torch.no_grad()
    def apply(self) -> None:
        """Scale the heads after an update."""
        factors = torch.where(self.peaks > self.threshold, self.threshold / self.peaks, 1.0)
        keys = factors.unflatten(1, (-1, self.shared)).amin(2).sqrt()
        queries = factors / keys.repeat_interleave(self.shared, 1)
        for layer, q, k in zip(self.layers, queries, keys):
            attention = layer.self_attn
            if hasattr(attention, "scaled_by"):  # latent attention: a factor per head
                for p, rows in attention.scaled_by(q * k):
                    scale_rows(p, rows)
                continue
            for projection, head in ((attention.q_proj, q), (attention.k_proj, k)):
                rows = head.repeat_interleave(attention.head_dim)
                for p in projection.parameters():  # weight and bias
                    scale_rows(p, rows)

    def row(self) -> dict[str, Any]:
        """Return the last step's largest logit and the number of heads above the threshold."""
        clipped = int((self.peaks > self.threshold).sum())
        return {"qk_max": float(self.peaks.max()), "qk_clipped": clipped}


def noting(
    peaks: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
) -> Tensor:
    """Call model.attend and, in training, raise `peaks` (H,) to each head's largest logit."""
    if torch.is_grad_enabled():
        note(peaks, q.detach(), k.detach(), scale, mask)
    return attend(q, k, v, scale, mask)


@torch.no_grad()
def note(peaks: Tensor, q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> None:
    """Raise `peaks` (H,) to the largest logit of queries (B, H, T, D) and keys (B, G, T, D), causal
    or where mask (B, 1, T, T) is true."""
    (B, H, T, D), G = q.shape, k.size(1)
    for start in range(0, T, ROWS):
        rows = slice(start, min(T, start + ROWS))
        part = q[:, :, rows].reshape(B, G, -1, D)  # heads that share a key are rows of one matmul
        logits = (part @ k[:, :, : rows.stop].mT).view(B, H, -1, rows.stop)
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril(start)
        if mask is not None:
            seen = mask[:, :, rows, : rows.stop]
        highest = logits.masked_fill(~seen, -torch.inf).amax((0, 2, 3))
        torch.maximum(peaks, highest.float() * scale, out=peaks)


def scale_rows(p: Tensor, rows: Tensor) -> None:
    """Multiply each row of a parameter, sharded or not, by a factor (rows,)."""
    factor = rows.view(-1, *[1] * (p.ndim - 1)).to(p.dtype)
    if isinstance(p, DTensor):  # every rank has all factors: nothing to send
        factor = distribute_tensor(factor, p.device_mesh, p.placements, src_data_rank=None)
    p.mul_(factor)
