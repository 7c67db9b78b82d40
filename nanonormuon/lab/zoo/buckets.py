"""Equal matrices together: a stack of their rows here, and whole matrices for Newton-Schulz.

K matrices of m x n lie as a stack (K, rows here, n); what a rank holds of m rows is decided by the
layout (normuon.py). Element-wise and row-wise operations need nothing else. Whatever sums over rows
asks `total` for the other ranks' share; whatever needs whole matrices goes through `on_whole`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanonormuon.normuon import (
    Layout,
    coefficients,
    layout_of,
    local,
    newton_schulz,
    stack,
    unstack,
    wrap_local,
)


@dataclass(eq=False)
class Bucket:
    """Equal matrices of one parameter group, with their buffers as stacks (K, rows here, ...)."""

    params: list[Tensor]
    group: int  # index into the optimizer's param_groups
    layout: Layout  # may be replaced between steps
    buffers: dict[str, Tensor]

    @classmethod
    def make(cls, params: list[Tensor], group: int, kept: dict[str, tuple], state) -> "Bucket":
        """Stacks of zeros for the buffers that Neighbour.keeps names; state[p] gets views of them,
        shaped and placed like the parameter p."""
        W, m, buffers = [local(p) for p in params], params[0].size(-2), {}
        here = stack(W)
        for key, (rows, columns, *dtype) in kept.items():
            size = (len(here), here.size(1) if rows == m else rows, columns)
            kind = dtype[0] if dtype else torch.promote_types(here.dtype, torch.float32)
            buffers[key] = here.new_zeros(size, dtype=kind)
            for p, part in zip(params, unstack(buffers[key], W)):
                state[p][key] = wrap_local(part, p, (*p.shape[:-2], rows, columns))
        return cls(params, group, layout_of(params[0], len(here)), buffers)

    @property
    def shape(self) -> torch.Size:
        """(m, n) of the whole matrices."""
        return self.params[0].shape[-2:]

    @property
    def total(self) -> Callable[[Tensor], Tensor]:
        """Sums over the ranks that share each matrix, perhaps in place."""
        return self.layout.total

    def gradients(self) -> Tensor:
        """(K, rows here, n) in float32 at least; a missing gradient counts as zero."""
        G = stack([local(torch.zeros_like(p) if p.grad is None else p.grad) for p in self.params])
        return G.to(torch.promote_types(G.dtype, torch.float32))

    def norm(self, X: Tensor) -> Tensor:
        """The Frobenius norms of the whole matrices (K, 1, 1), never 0."""
        return self.total(X.square().sum((-2, -1), keepdim=True)).sqrt().clamp_min(1e-20)

    def on_whole(self, function: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
        """Rows of function(whole matrices), each of which one rank computes."""
        return self.layout.to_parts(function(self.layout.to_whole(X)()))()

    def orthogonal(self, X: Tensor, group: dict, steps: int = 0) -> Tensor:
        """newton_schulz as the group's settings say; `steps` overrides their number."""
        triples = coefficients(group["ns_coefficients"], steps or group["ns_steps"])
        whole = X.to(group["ns_dtype"])
        return self.on_whole(lambda whole: newton_schulz(whole, triples), whole).to(X.dtype)
