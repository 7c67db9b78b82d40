"""Reports on steps that are not finite, and one-line summaries with advice."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nanonormuon.runtime import distributed
from nanonormuon.runtime.health import Verdict, norm, not_finite


def examine(
    verdict: Verdict,
    loss: Tensor,
    weights: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    world: distributed.World,
) -> dict[str, Any]:
    """Report on a step that is not finite, while its gradients exist. Every rank must call this.

    weights, buffers: from checkpoint.named_state. The report's "groups" are norms by role.
    """
    grads = {name: p.grad for name, p in weights.items()}
    suspects = weights | buffers if verdict.amiss == "state" else grads
    return {
        "amiss": verdict.amiss,
        "rank": verdict.rank,
        "ranks": world.size,
        "not_finite": not_finite(suspects, world.device),
        "loss_by_rank": [repr(x) for x in distributed.gather(loss.detach().float()).tolist()],
        "groups": {
            group["role"]: {
                "weights": float(norm(weights[name] for name in group["names"])),
                "gradients": float(norm(grads[name] for name in group["names"])),
            }
            for optimizer in optimizers
            for group in optimizer.param_groups
        },
    }


def explain(
    report: Mapping[str, Any], weights: Collection[str], per_rank: int, saved: int, again: str
) -> str:
    """Summarise a crash report in one line, with advice.

    weights: their names. per_rank: sequences per rank and step. saved: step of the last checkpoint.
    again: the command that continues the run.
    """
    step, bad = report["step"], report["not_finite"]
    if report["amiss"] == "state":
        what = f"a {'weight' if bad and bad[0] in weights else 'buffer'} before step {step}"
        advice = f"continue from the last checkpoint (step {saved})"
    else:
        what = f"the {report['amiss']} of step {step}"
        advice = f"repeat this step with: {again} train.stop_at={step + 1}; skip it with "
        advice += "train.skip_spikes, or restart with lower learning rates or with optim.grad_clip"
    where = f"in {len(bad)} tensors, first {bad[0]}" if bad else "but all gradients are finite"
    first = per_rank * report["rank"]
    batch = f"rank {report['rank']}, sequences {first} to {first + per_rank - 1} of the batch"
    end = f"No update was made; see crash-{step:06d}.json; {advice}"
    return f"not finite: {what} ({batch}), {where}. {end}"
