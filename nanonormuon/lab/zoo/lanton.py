"""LANTON (arXiv 2510.14009): Muon, with a rate for each matrix that follows its gradient's noise.

    D  = G - G of the step before
    N <- beta2 N + (1 - beta2) |D|*^2        |D|* = sqrt(m / n) (sum of singular values)
    a  = alpha / sqrt(alpha^2 + N)           the quieter a matrix, the nearer to 1
    W <- (1 - lr weight_decay) W - lr sqrt(a / largest a of all matrices) s O        O, s: Muon's

|D|* is the dual of the norm that Muon's step is steepest in. The quietest matrix moves at the full
rate. The sum of singular values is <D, newton_schulz(D)>, up to newton_schulz's own inexactness.

Against NorMuon: one number per matrix instead of one per neuron, but the last gradient is kept too,
so the state is twice as large, and there is a second Newton-Schulz iteration per step. No second
moment.

Checked against what can be read of the paper (abstract, reviews, summaries; not Algorithm 1):
momentum as above; the noise is estimated in the dual norm, from the gradient of the step before
(option 1, here) or of a second batch (option 2); noisier layers get smaller rates, relative to the
others of their norm (all hidden matrices are one group); the overhead is 4 % of a step at 1.1B.
Written from memory and not checked: a, and the square root of its share of the largest; alpha and
beta2 (1 and 0.9 here); the start (here the gradient before the first is 0). The paper's steps
follow Scion, without Nesterov's look ahead (here optim.nesterov). Its groups of embedding and head,
in other norms, have AdamW here.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanonormuon.lab.zoo.base import Neighbour, lookahead
from nanonormuon.lab.zoo.buckets import Bucket
from nanonormuon.normuon import neuron_factors


class LANTON(Neighbour):
    def __init__(
        self, params, lr: float = 0.02, weight_decay: float = 0.1, *, alpha: float = 1.0,
        beta2: float = 0.9, **shared,
    ):  # fmt: skip
        super().__init__(params, lr, weight_decay, alpha=alpha, beta2=beta2, **shared)

    def keeps(self, m: int, n: int) -> dict[str, tuple]:
        return {"momentum": (m, n), "gradient": (m, n), "noise": (1, 1)}

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        if any(isinstance(p, DTensor) and p.ndim == 3 for b in self.buckets for p in b.params):
            raise ValueError("LANTON compares all matrices: expected no stacks dealt out to ranks")

    @torch.no_grad()
    def step(self, closure=None):
        loss = torch.enable_grad()(closure)() if closure else None
        for bucket in self.buckets:
            self.listen(bucket.gradients(), self.param_groups[bucket.group], bucket)
        self.largest = torch.stack([self.quiet(bucket).max() for bucket in self.buckets]).max()
        super().step()
        return loss

    def listen(self, G: Tensor, group: dict, bucket: Bucket) -> None:
        """Move the estimate of a bucket's noise."""
        D, (m, n) = G - bucket.buffers["gradient"], bucket.shape
        values = bucket.total((D * bucket.orthogonal(D, group)).sum((-2, -1), keepdim=True))
        bucket.buffers["noise"].lerp_(values.square() * (m / n), 1 - group["beta2"])
        bucket.buffers["gradient"].copy_(G)

    def quiet(self, bucket: Bucket) -> Tensor:
        """a (K, 1, 1)"""
        alpha = self.param_groups[bucket.group]["alpha"]
        return alpha / (alpha**2 + bucket.buffers["noise"]).sqrt()

    def update(self, G: Tensor, group: dict, bucket: Bucket) -> Tensor:
        O = bucket.orthogonal(lookahead(G, bucket.buffers["momentum"], group), group)
        scale = neuron_factors(O, None, 0, group["adjust_lr_fn"], bucket.shape, bucket.total)
        return O * scale * (self.quiet(bucket) / self.largest).sqrt()
