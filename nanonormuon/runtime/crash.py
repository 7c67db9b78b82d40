"""What there is to know of a refused step: a report for the disk, and one line with what to do."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanonormuon.runtime import distributed
from nanonormuon.runtime.health import Verdict, norm, not_finite


def group_norms(
    optimizers: Iterable[torch.optim.Optimizer], weights: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Per role, the norms of the named weights and of their gradients."""
    return {
        group["role"]: {
            "weights": float(norm(weights[name] for name in group["names"])),
            "gradients": float(norm(weights[name].grad for name in group["names"])),
        }
        for optimizer in optimizers
        for group in optimizer.param_groups
    }


def examine(
    verdict: Verdict,
    loss: Tensor,
    weights: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    world: distributed.World,
) -> dict[str, Any]:
    """What there is to know of a refused step while its gradients are still there.

    weights, buffers: as checkpoint.named_state gives them. Every rank must call this.
    """
    grads = {name: p.grad for name, p in weights.items()}
    suspects = weights | buffers if verdict.amiss == "state" else grads
    losses = torch.zeros(world.size, device=world.device)
    losses[world.rank] = loss
    return {
        "amiss": verdict.amiss,
        "rank": verdict.rank,
        "ranks": world.size,
        "not_finite": not_finite(suspects, world.device),
        "loss_by_rank": [repr(x) for x in distributed.total(losses).tolist()],
        "groups": group_norms(optimizers, weights),
    }


def explain(
    report: Mapping[str, Any], weights: Iterable[str], per_rank: int, saved: int, run: Path
) -> str:
    """A crash report in one line, with what to do.

    weights: their names. per_rank: sequences per rank and step. saved: the step of the last
    checkpoint. run: the run directory.
    """
    step, bad = report["step"], report["not_finite"]
    of_state = report["amiss"] == "state"
    what = f"the {report['amiss']} of step {step}"
    if of_state:
        kind = "weight" if bad and bad[0] in set(weights) else "buffer"
        what = f"a {kind} before step {step}"
    where = f"first in {bad[0]} of {len(bad)} tensors" if bad else "in no gradient"
    first = per_rank * report["rank"]
    advice = (
        f"go on from the last checkpoint ({saved})"
        if of_state
        else "repeat just this step with: normuon-train run --resume --out "
        f"{shlex.quote(str(run))} train.stop_at={step + 1}; go past it with train.skip_spikes, or "
        "start anew with a lower optim.lr and auxiliary rates, or optim.grad_clip"
    )
    return (
        f"not finite: {what} (rank {report['rank']}, sequences {first} to {first + per_rank - 1} "
        f"of the batch), {where}. No update was made; see crash-{step:06d}.json; {advice}"
    )
