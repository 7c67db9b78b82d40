"""What a logged row says of the hidden matrices: how long each neuron's weights are, and how far
the last update went.

Sums over ranks: with shards the whole, with replicas a multiple of it, of which only ratios are
used; so the numbers are the same on every layout. Every rank must call these functions.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanonormuon.runtime import distributed


def matrices(optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    """What this rank holds of the hidden matrices."""
    return [
        p.detach().to_local() if isinstance(p, DTensor) else p.detach()
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
        if group["role"] == "matrix"
    ]


def copies(optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    """`matrices` as they are before an update, for `moved`."""
    return [p.clone() for p in matrices(optimizers)]


def moved(optimizers: Sequence[torch.optim.Optimizer], before: list[Tensor]) -> Tensor:
    """Sums of squares (2,) of this rank's part of the last update, decay included, and of the
    weights `before` it. Uses the copies up; nothing waits for the device."""
    size = squares(before)
    torch._foreach_sub_(before, matrices(optimizers))
    return torch.stack([squares(before), size])


def squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(t) for t in tensors]).square().sum()


def of_matrices(
    optimizers: Sequence[torch.optim.Optimizer], moved: Tensor, device: torch.device
) -> dict[str, float]:
    """The numbers for a row, of all hidden matrices together.

    neuron_rms_min, _mean, _max: root mean square of a neuron's weights. update_ratio: the norm of
    the last update over the norm of the weights before it, the "update to data ratio" of
    Karpathy's makemore lectures; unlike the update's own size, which Muon and NorMuon all but fix,
    it says whether the rate fits the weights. 0 for an update that was left out.
    """
    rows = [
        torch.linalg.vector_norm(p, dim=-1).flatten() / p.size(-1) ** 0.5
        for p in matrices(optimizers)
    ]
    norms = torch.cat(rows)
    low, high = (float(norms.min()), float(norms.max())) if len(norms) else (math.inf, -math.inf)
    low, high = distributed.largest([-low, high], device)
    count = norms.new_tensor(float(len(norms)))
    total, n, update, weights = distributed.total(
        torch.stack([norms.sum(), count, *moved])
    ).tolist()
    return {
        "neuron_rms_min": -low,
        "neuron_rms_mean": total / n,
        "neuron_rms_max": high,
        "update_ratio": math.sqrt(update / weights) if weights else 0.0,
    }
