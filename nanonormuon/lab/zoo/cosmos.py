"""COSMOS (arXiv 2502.17410): SOAP in the gradient's leading eigenspace, Muon in the rest.

    M <- momentum M + (1 - momentum) G
    P <- qr(beta3 P S + (1 - beta3) G'G P)       n x r, an orthonormal basis; ' is the transpose
    S <- beta3 Q'S Q + (1 - beta3) (G P)'(G P)   r x r, with Q = (old P)'P
    V <- beta2 V + (1 - beta2) (G P)^2           m x r
    A  = [M P / (1 - momentum^t)] / [sqrt(V / (1 - beta2^t)) + eps] P'
    B  = newton_schulz(M - M P P')
    X  = A + gamma sqrt(m n) B / |B|_F
    W <- (1 - lr weight_decay) W - lr gamma sqrt(m n) X / |X|_F

The first P: the r leading eigenvectors of G'G, with S = (1 - beta3) P'G'G P.

Against NorMuon: Adam's second moment where the gradients are largest, m r numbers per matrix, and a
basis of n r: the state grows by r (m + n), the step by products with n x r matrices.

Sources disagree. A page of formulas projects columns (G P, as here), the authors' code
(lliu606/COSMOS) rows; the page adds eps under the root, the code after it (here); the last factor
is sqrt(n) on the page, gamma sqrt(m n) in the code (here: the update's root mean square is gamma =
0.1, and AdamW's rates fit). The code has 5 iterations, no Nesterov step and no weight decay. r is
at most half of the smaller side: in a full basis nothing but rounding would be left for B. While
optim.momentum_warmup lasts, momentum^t is that of the current momentum, as if it had been constant.
"""

import math

import torch
from torch import Tensor

from nanonormuon.lab.zoo.base import Neighbour, lookahead
from nanonormuon.lab.zoo.buckets import Bucket


class COSMOS(Neighbour):
    def __init__(
        self, params, lr: float = 0.005, weight_decay: float = 0.1, *, rank: int = 64,
        gamma: float = 0.1, beta2: float = 0.96, beta3: float = 0.96, eps: float = 1e-8, **shared,
    ):  # fmt: skip
        self.rank = rank
        own = {"gamma": gamma, "beta2": beta2, "beta3": beta3, "eps": eps}
        super().__init__(params, lr, weight_decay, **own, **shared)

    def keeps(self, m: int, n: int) -> dict[str, tuple]:
        r = min(self.rank, min(m, n) // 2)  # P and S as single rows: every rank has all of them
        return {"momentum": (m, n), "subspace_second_moment": (m, r), "basis": (1, n * r),
                "spectrum": (1, r * r), "step": (1, 1)}  # fmt: skip

    def update(self, G: Tensor, group: dict, bucket: Bucket) -> Tensor:
        M, V, basis, spectrum, step = bucket.buffers.values()
        P, S = basis.view(len(G), G.size(-1), -1), spectrum.view(len(G), *[V.size(-1)] * 2)
        self.turn(G, P, S, group["beta3"], bucket, first=not step.any())
        step += 1
        t, scale = step.max().item(), group["gamma"] * math.sqrt(math.prod(bucket.shape))
        M = lookahead(G, M, group | {"nesterov": False})
        V.lerp_((G @ P).square(), 1 - group["beta2"])
        second = (V / (1 - group["beta2"] ** t)).sqrt() + group["eps"]
        A = (M @ P / (1 - group["momentum"] ** t) / second) @ P.mT
        B = bucket.orthogonal(M - M @ P @ P.mT, group)
        X = A + scale * B / bucket.norm(B)
        return scale * X / bucket.norm(X)

    def turn(
        self, G: Tensor, P: Tensor, S: Tensor, beta3: float, bucket: Bucket, first: bool
    ) -> None:
        """Move the basis P (K, n, r) and the gradient's second moment in it, S (K, r, r)."""
        if first:
            P.copy_(torch.linalg.eigh(bucket.total(G.mT @ G))[1][..., -P.size(-1) :])
            old = torch.zeros_like(S)
        else:
            power = bucket.total(G.mT @ (G @ P))
            new = torch.linalg.qr(torch.lerp(power, P @ S, beta3))[0]
            Q = P.mT @ new
            old = Q.mT @ S @ Q
            P.copy_(new)
        S.copy_(torch.lerp(bucket.total((G @ P).mT @ (G @ P)), old, beta3))
