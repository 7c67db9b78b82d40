"""Run by test_zoo.py, one process per rank (support.Forks), and imported by it for the problem.

arguments: OUTPUT_FOLDER   with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from nanonormuon import config
from nanonormuon.lab.external import optimizer_class

LR, DECAY, MU, STEPS, RANK = 0.02, 0.1, 0.95, 10, 3
# even, uneven and empty shards; more and fewer equal matrices than ranks
SHAPES = {"square0": (12, 12), "square1": (12, 12), "square2": (12, 12), "uneven": (9, 6),
          "few_rows": (2, 9), "wide": (6, 20)}  # fmt: skip


def problem():
    """Weights and, per step, gradients: the same on every rank and in the parent."""
    random = torch.Generator().manual_seed(12)
    draw = lambda: {k: torch.randn(s, generator=random) for k, s in SHAPES.items()}  # noqa: E731
    return draw(), [draw() for _ in range(STEPS)]


def make(name, params, **options):
    options |= {"rank": RANK} if name == "cosmos" else {}
    kind = optimizer_class(f"zoo:{name}")
    return kind(params, lr=LR, weight_decay=DECAY, ns_dtype=torch.float32, **options)


def place(value, mesh):
    return (
        value.clone()
        if mesh is None
        else distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)
    )


def whole(t):
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def train(name, mesh, again=False, **options):
    """The weights after all steps. again: half way, the state moves to a new optimizer, whole."""
    weights, grads = problem()
    params = {key: torch.nn.Parameter(place(W, mesh)) for key, W in weights.items()}
    optimizer = make(name, params.values(), **options)
    for i, step in enumerate(grads):
        for key, p in params.items():
            p.grad = place(step[key], mesh)
        optimizer.step()
        if again and i == STEPS // 2:
            content, optimizer = optimizer.state_dict(), make(name, params.values(), **options)
            for state in content["state"].values():
                state |= {key: whole(value) for key, value in state.items()}
            for p, state in zip(params.values(), content["state"].values()):
                for key, value in state.items():
                    like = optimizer.state[p][key]
                    if isinstance(like, DTensor):
                        value = distribute_tensor(value, like.device_mesh, like.placements)
                    state[key] = value
            optimizer.load_state_dict(content)
    return {key: whole(p) for key, p in params.items()}


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors, facts = {}, {"resharded": {}}
    for name in [name.partition(":")[2] for name in config.our_optimizers()[3:]]:
        for kind, place_on in (("ddp", None), ("fsdp", mesh)):
            found = train(name, place_on)
            tensors |= {f"{kind}/{name}/{key}": value for key, value in found.items()}
        again = train(name, mesh, again=True)
        facts["resharded"][name] = all(torch.equal(again[key], found[key]) for key in found)
    experts = torch.nn.Parameter(distribute_tensor(torch.randn(4, 6, 6), mesh, [Shard(0)]))
    try:
        make("lanton", [experts])
    except ValueError as error:
        facts["refused"] = str(error)
    if dist.get_rank() == 0:
        save_file(tensors, folder / "tensors.safetensors")
        (folder / "facts.json").write_text(json.dumps(facts))
    dist.barrier()
    os._exit(0)  # as cli.entry ends: taking gloo's threads down can abort
