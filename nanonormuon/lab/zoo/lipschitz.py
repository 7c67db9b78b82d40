"""Muon with weights kept in a spectral-norm ball (arXiv 2507.13338), by a soft cap.

    W <- (1 - lr weight_decay) W - lr s O    Muon's step, s = sqrt(m / n)
    W <- s cap(W / s)                        on singular values: x <- x - a x^3, x <- x + a x^3

a is the least strength that brings a singular value k back to w_max, where k = w_max (1 - lr
weight_decay) + lr |O| is the largest that a step can reach: k - 3 a^2 k^5 + 3 a^3 k^7 - a^4 k^9 =
w_max. So |W| <= s w_max forever, in the norm that takes root mean squares to root mean squares.

Against NorMuon: no second moment; a constraint on the weights, which the paper uses instead of
layer norms, QK norms and logit caps (it says that they can go; removing them is the model's
business).

Sources: of the paper's constraints this is the soft cap, with its coupling to lr. An older commit
of the authors' code has -9 k^9 where the composition gives -1 k^9, as the newer one. Theirs
iterates in bfloat16, which rounds the weights; here in float32. |O| <= 1.2024 is the
largest value of Muon's polynomial (theirs are others), and 5 % are for bfloat16. Weights that start
outside of the ball are divided by their norm at the first step (the authors initialise inside).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nanonormuon.lab.zoo.base import Neighbour, lookahead
from nanonormuon.lab.zoo.buckets import Bucket
from nanonormuon.normuon import MUON, local, stack, unstack

LARGEST = 1.2024 * 1.05  # singular value of a Newton-Schulz iterate


def strength(k: float, w_max: float) -> float:
    """The a that takes a singular value k >= w_max to w_max. With y = a k^2 the condition is
    3 y^2 - 3 y^3 + y^4 = 1 - w_max / k, whose left side rises from 0 to 1 over 0 <= y <= 1."""
    low, high = 0.0, 1.0
    for _ in range(60):
        y = (low + high) / 2
        low, high = (y, high) if y**2 * (3 - 3 * y + y * y) < 1 - w_max / k else (low, y)
    if low > 1 / 3:  # beyond, smaller singular values would end above w_max
        raise ValueError(f"Lipschitz: a step of {k - w_max:.2g} is too large for w_max = {w_max:g}")
    return low / k**2


def soft_cap(W: Tensor, a: float) -> Tensor:
    """Whole matrices (K, m, n) -> singular values x (1 - y)(1 + y (1 - y)^2), y = a x^2."""
    for sign in (-1, 1):
        cube = W @ (W.mT @ W) if W.size(-2) > W.size(-1) else (W @ W.mT) @ W
        W = W + sign * a * cube
    return W


class Lipschitz(Neighbour):
    def __init__(
        self, params, lr: float = 0.02, weight_decay: float = 0.0, *, w_max: float = 1.0, **shared
    ):
        super().__init__(params, lr, weight_decay, w_max=w_max, **shared)

    def keeps(self, m: int, n: int) -> dict[str, tuple]:
        return {"momentum": (m, n), "step": (1, 1)}

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        self.strength(self.param_groups[-1])  # refuses a rate that is too large

    def strength(self, group: dict) -> float:
        k = group["w_max"] * (1 - group["lr"] * group["weight_decay"]) + group["lr"] * LARGEST
        return strength(k, group["w_max"])

    def update(self, G: Tensor, group: dict, bucket: Bucket) -> Tensor:
        X, (m, n) = lookahead(G, bucket.buffers["momentum"], group), bucket.shape
        return bucket.orthogonal(X, group | {"ns_coefficients": MUON}) * math.sqrt(m / n)

    def advance(self, G: Tensor, group: dict, bucket: Bucket) -> None:
        w_max, a = group["w_max"], self.strength(group)
        if not bucket.buffers["step"].any():
            norm = lambda W: torch.linalg.matrix_norm(W, 2, keepdim=True)  # noqa: E731
            self.constrain(lambda W: W / (norm(W) / w_max).clamp_min(1), bucket)
        super().advance(G, group, bucket)
        self.constrain(lambda W: soft_cap(W, a), bucket)
        bucket.buffers["step"] += 1

    def constrain(self, function: Callable[[Tensor], Tensor], bucket: Bucket) -> None:
        """W <- s function(W / s)"""
        W, (m, n) = [local(p) for p in bucket.params], bucket.shape
        s = math.sqrt(m / n)
        torch._foreach_copy_(W, unstack(bucket.on_whole(function, stack(W) / s) * s, W))
