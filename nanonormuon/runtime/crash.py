"""Reports on steps that are not finite: a file with what was found, and a line with advice."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from nanonormuon.errors import NonFinite
from nanonormuon.runtime import distributed
from nanonormuon.runtime.health import BadStep, norm, not_finite


def report(
    bad: BadStep, trainer: Any, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> NonFinite:
    """Write crash-NNNNNN.json on the step that a train.Trainer refused, while its gradients exist;
    returns the error for all ranks to raise. Every rank must call this.

    weights, buffers: from checkpoint.named_state. The report's "groups" are norms by role. If the
    state before the step is sound it is saved, so that a resumed run repeats the step.
    """
    verdict, step, world, run = bad.verdict, trainer.step, trainer.world, trainer.run
    grads = {name: p.grad for name, p in weights.items()}
    suspects = weights | buffers if verdict.amiss == "state" else grads
    odd = not_finite(suspects)
    found = {
        "step": step,
        "amiss": verdict.amiss,
        "rank": verdict.rank,
        "ranks": world.size,
        "not_finite": odd,
        "loss_by_rank": [repr(x) for x in distributed.gather(bad.loss.detach().float()).tolist()],
        "groups": {
            group["role"]: {
                "weights": float(norm(weights[name] for name in group["names"])),
                "gradients": float(norm(grads[name] for name in group["names"])),
            }
            for optimizer in trainer.engine.optimizers
            for group in optimizer.param_groups
        },
        "seed": trainer.config.train.seed,
        "windows": trainer.batches.windows(step).tolist(),  # (shard, offset) per sequence
        "config": asdict(trainer.config),
    }
    run.write(f"crash-{step:06d}.json", json.dumps(found) + "\n")
    if verdict.amiss == "state":
        what = f"a {'weight' if odd and odd[0] in weights else 'buffer'} before step {step}"
        advice = f"continue from the last checkpoint (step {trainer.saved})"
    else:
        if step:
            trainer.save(retain=False)
        what = f"the {verdict.amiss} of step {step}"
        advice = f"repeat this step with: {trainer.again} train.stop_at={step + 1}; skip it with "
        advice += "train.skip_spikes, or restart with lower learning rates or with optim.grad_clip"
    where = f"in {len(odd)} tensors, first {odd[0]}" if odd else "but all gradients are finite"
    first = trainer.per_rank * verdict.rank
    last = first + trainer.per_rank - 1
    batch = f"rank {verdict.rank}, sequences {first} to {last} of the batch"
    end = f"No update was made; see crash-{step:06d}.json; {advice}"
    message = f"not finite: {what} ({batch}), {where}. {end}"
    error = NonFinite(message)
    error.follows = world.rank != verdict.rank  # type: ignore[attr-defined]
    return error
