"""8-bit Muon (arXiv 2509.23106): the momentum rests in int8, with one scale per block.

    M  = scale Z                             Z in int8, one scale per block of weights
    M <- momentum M + (1 - momentum) G
    U  = Muon's update of M                  from the momentum before it is rounded
    scale <- max |M| / 127,  Z <- round(M / scale)

Against NorMuon: no second moment (normuon8bit has one), and 1 byte of state per weight, and 4 per
block, instead of 4 per weight. The paper finds that linear quantisation suffices for Muon, whose
update does not divide by small numbers as Adam's does.

Differences: a block is at most 2,048 neighbours of one row; the paper's 2,048 run on over the ends
of rows, so that blocks would depend on how FSDP2 shards them. The paper's M <- momentum M + G has
the update of the average here, since Muon's update does not depend on M's size. nesterov and
adjust_lr_fn are NorMuon's settings; the paper has no Nesterov step and 0.2 sqrt(max(m, n)), which
is "match_rms_adamw".
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from nanonormuon.lab.zoo.base import Neighbour, lookahead
from nanonormuon.lab.zoo.buckets import Bucket
from nanonormuon.normuon import neuron_factors

BLOCK = 2048


def blocks(X: Tensor) -> Tensor:
    """(K, rows, n) -> (K, rows, blocks, weights per block), the last block padded with zeros."""
    size = min(X.size(-1), BLOCK)
    return pad(X, (0, -X.size(-1) % size)).unflatten(-1, (-1, size))


def quantise(M: Tensor, Z: Tensor, scale: Tensor) -> None:
    """Round M (K, rows, n) into Z, int8 of its shape, and the scale of each block."""
    parts = blocks(M)
    scale.copy_(parts.abs().amax(-1) / 127)
    whole = parts / scale.clamp_min(1e-30).unsqueeze(-1)
    Z.copy_(whole.round().flatten(-2)[..., : M.size(-1)])


def restore(Z: Tensor, scale: Tensor) -> Tensor:
    """The inverse of quantise, but for the rounding: (K, rows, n) in scale's dtype."""
    return (blocks(Z) * scale.unsqueeze(-1)).flatten(-2)[..., : Z.size(-1)]


class Muon8bit(Neighbour):
    def __init__(
        self, params, lr: float = 0.02, weight_decay: float = 0.1, beta2: float = 0.95, **shared
    ):
        super().__init__(params, lr, weight_decay, beta2=beta2, **shared)

    def keeps(self, m: int, n: int) -> dict[str, tuple]:
        return {"momentum_int8": (m, n, torch.int8), "momentum_scale": (m, -(-n // BLOCK))}

    def update(self, G: Tensor, group: dict, bucket: Bucket) -> Tensor:
        Z, scale = bucket.buffers["momentum_int8"], bucket.buffers["momentum_scale"]
        M = restore(Z, scale)
        O = bucket.orthogonal(lookahead(G, M, group), group)
        quantise(M, Z, scale)
        v, kind = bucket.buffers.get("second_moment"), group["adjust_lr_fn"]  # v: normuon8bit's
        return O * neuron_factors(O, v, group["beta2"], kind, bucket.shape, bucket.total)
