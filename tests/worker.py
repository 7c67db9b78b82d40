"""Run by test_layouts.py, one process per rank (support.Forks): every case that one world size can
answer, in one go. Rank 0 writes what it found; the parent compares.

arguments: OUTPUT_FOLDER CHECKPOINT   with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set
           OUTPUT_FOLDER compiled     likewise: with a compiler that works, or fails on one rank
           OUTPUT_FOLDER alone DEVICE as torchrun starts a single process: all code for ranks
"""

import json
import os
import re
import sys
from collections import namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from support import reserved_port
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from nanonormuon import NorMuon, normuon
from nanonormuon.config import OptimConfig, load
from nanonormuon.model import GPT, GPTConfig
from nanonormuon.optim import Schedule, make_optimizers
from nanonormuon.runtime import compilation, health
from nanonormuon.runtime.distributed import World
from nanonormuon.storage.tensors import TensorFile

STEPS = 5
# name -> shape: more rows than ranks, fewer (so that some shards are empty), one row per shard,
# uneven shards, wide, tall, and stacks of matrices; several of one shape, and fewer than there are
# ranks
SHAPES = {
    "square0": (12, 12),
    "square1": (12, 12),
    "square2": (12, 12),
    "square3": (12, 12),
    "square4": (12, 12),
    "uneven": (10, 6),
    "few_rows": (2, 9),
    "one_row_each": (4, 7),
    "wide": (6, 20),
    "tall0": (33, 5),
    "tall1": (33, 5),
    "experts": (5, 6, 8),
    "even_experts": (6, 8, 6),
}
SETTINGS = {
    f"{axis}-{adjust}": {"neuron_axis": axis, "adjust_lr_fn": adjust}
    for axis in ("rows", "longest")
    for adjust in ("original", "match_rms_adamw")
}


def problem():
    """Weights and, per step, gradients: the same on every rank and in the parent."""
    random = torch.Generator().manual_seed(11)
    weights = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    grads = [
        {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
        for _ in range(STEPS)
    ]
    return weights, grads


def kinds(world):
    """The layouts that the package makes of so many ranks; four are two nodes."""
    return ("ddp", "fsdp", "hsdp") if world == 4 else ("ddp", "fsdp")


def place(value, layout):
    """A plain tensor for DDP, a DTensor otherwise."""
    if layout is None:
        return value.clone()
    mesh, placements = layout
    return distribute_tensor(value, mesh, placements, src_data_rank=None)  # all have all of it


def whole(t):
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def train(layout, ns_dtype, **settings):
    weights, grads = problem()
    params = {name: torch.nn.Parameter(place(w, layout)) for name, w in weights.items()}
    optimizer = NorMuon(params.values(), lr=0.05, ns_dtype=ns_dtype, **settings)
    for step in grads:
        for name, p in params.items():
            p.grad = place(step[name], layout)
        optimizer.step()
    return {name: whole(p) for name, p in params.items()}


def collectives(layout, shapes):
    """Names of the collectives in a step over matrices of these shapes, as they are issued."""
    params = [torch.nn.Parameter(place(torch.randn(shape), layout)) for shape in shapes]
    for p, shape in zip(params, shapes):
        p.grad = place(torch.randn(shape), layout)
    optimizer, names = NorMuon(params), []
    originals = [
        (normuon, "all_gather"), (dist, "all_to_all_single"), (dist, "all_reduce"),
    ]  # fmt: skip
    originals = [(module, name, getattr(module, name)) for module, name in originals]

    def counted(name, original):
        def call(*args, **kwargs):
            names.append(name)
            return original(*args, **kwargs)

        return call

    try:
        for module, name, original in originals:
            setattr(module, name, counted(name, original))
        optimizer.step()
    finally:
        for module, name, original in originals:
            setattr(module, name, original)
    return names


def missing_gradients(layout):
    """A parameter without a gradient on all ranks, and one without on the last rank alone."""
    torch.manual_seed(5)
    W = torch.randn(3, 8, 6)
    params = [torch.nn.Parameter(place(w, layout)) for w in W]
    optimizer = NorMuon(params, lr=0.1, ns_dtype=torch.float32)
    for _ in range(2):
        for p in params[:2]:
            p.grad = place(torch.randn(8, 6), layout)
        if layout is not None and dist.get_rank() == dist.get_world_size() - 1:
            params[1].grad = None  # its rows count as zero
        optimizer.step()
    return {f"{i}": whole(p) for i, p in enumerate(params)}


def refusals(mesh):
    found = {}
    for name, placements in {"columns": [Shard(1)]}.items():
        try:
            NorMuon([torch.nn.Parameter(distribute_tensor(torch.randn(8, 8), mesh, placements))])
            found[name] = ""
        except ValueError as error:
            found[name] = str(error)
    return found


def state_round_trip(mesh):
    """State lies like its parameter; torch's state_dict and torch.distributed.checkpoint's helpers
    carry it."""
    layer = torch.nn.Linear(6, 10, bias=False)
    fully_shard(layer, mesh=mesh)
    optimizer = NorMuon(layer.parameters())
    layer(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    second, third = NorMuon(layer.parameters()), NorMuon(layer.parameters())
    second.load_state_dict(optimizer.state_dict())
    set_optimizer_state_dict(layer, third, get_optimizer_state_dict(layer, optimizer))
    (p,) = layer.parameters()
    a = optimizer.state[p]
    assert a["momentum"].placements == a["second_moment"].placements == p.placements
    return all(
        a.keys() == b.keys() and all(torch.equal(whole(a[key]), whole(b[key])) for key in a)
        for b in (second.state[p], third.state[p])
    )


def shape_of(path):
    from nanonormuon.storage import checkpoints as checkpoint
    from nanonormuon.storage import huggingface as hf

    return hf.gpt_config(checkpoint.read_json(path / "config.json"))


def read_back(path, model):
    """Whether a checkpoint read into this model and its optimizers comes out of them identical."""
    from nanonormuon import checkpoint as snapshot
    from nanonormuon.storage import huggingface as hf
    from nanonormuon.storage.tensors import read_tensors

    stored = read_tensors(path / "model.safetensors")
    buffers = read_tensors(path / "optimizer.safetensors")
    optimizers = make_optimizers(model, OptimConfig())
    snapshot.load_weights(model, TensorFile(path / "model.safetensors"))
    snapshot.load_optimizers(optimizers, path)
    found, state = snapshot.named_state(model, optimizers)
    found = {hf.to_hf(name): whole(t) for name, t in found.items()}
    state = {name: whole(t) for name, t in state.items()}
    return all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b)
        for a, b in ((found, stored), (state, buffers))
    )


def read_back_on_each(path, meshes):
    same = {}
    for kind, mesh in meshes.items():
        model = GPT(shape_of(path)).init_weights(99)
        if mesh:
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        same[kind] = read_back(path, model)
    return same


# a pytree, as transformers' outputs: in other objects FSDP2 finds no tensor, and reduces nothing
Output = namedtuple("Output", "loss")


def foreign_model():
    """Somebody else's: no method or name of ours, and a loss as transformers' models return it."""
    torch.manual_seed(21)

    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(30, 12)
            self.hidden = torch.nn.Linear(12, 25)
            self.out = torch.nn.Linear(25, 30)

        def forward(self, tokens, labels):
            logits = self.out(torch.relu(self.hidden(self.table(tokens))))
            return Output(torch.nn.functional.cross_entropy(logits, labels))

    return Bigram()


def readme_loop(model, rank, world):
    """The README's lines, but in float32, on this rank's share of batches of 12."""
    readme = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S)
    exact = example.replace("weight_decay=0.1)", "weight_decay=0.1, ns_dtype=torch.float32)")
    assert exact != example
    torch.manual_seed(22)
    batches = []
    for _ in range(4):
        tokens = torch.randint(30, (12,))
        mine = slice(12 // world * rank, 12 // world * (rank + 1))
        batches.append({"tokens": tokens[mine], "labels": ((tokens * 7 + 3) % 30)[mine]})
    exec(exact, {"model": model, "batches": batches})


def readme_on_each(meshes):
    found = {}
    for kind, mesh in meshes.items():
        model = foreign_model()
        if mesh:
            outer = fully_shard(model, mesh=mesh)
        else:
            outer = torch.nn.parallel.DistributedDataParallel(model)
        readme_loop(outer, dist.get_rank(), dist.get_world_size())
        for name, p in model.named_parameters():
            found[f"readme.{kind}.{name}"] = whole(p)
    return found


def filled(model):
    """The model with no parameter left at zero, so that every path matters."""
    random = torch.Generator().manual_seed(1)
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=random).to(p.dtype))
    return model


RECIPES = {  # to run on a small model, and what of its model is another
    "track3": ("track3-normuon", {"embed_dtype": "fp32", "value_embed": True, "bigram_embed": 96}),
    "track3-bf16": (
        "track3-normuon",
        {"embed_dtype": "bf16", "value_embed": True, "key_shift": True},
    ),
    "latent": ("latent-demo", {"q_rank": 20}),
}


def recipe_steps(kind, name, rank, world):
    """Three steps of a recipe on a small model, early, in the middle and late in its schedule."""
    from nanonormuon.engine import Engine

    recipe = load([RECIPES[name][0]])[0]
    sizes = {"vocab_size": 96, "n_layer": 2, "n_head": 2, "n_embd": 32, **RECIPES[name][1]}
    model = filled(GPT(replace(recipe.model, **sizes)))

    def make(model):
        return make_optimizers(model, recipe.optim, torch.float32)

    engine = Engine(model, make, World(rank, world, torch.device("cpu")), kind)
    random = torch.Generator().manual_seed(6)
    for share in (0.3, 0.6, 0.9):
        tokens, targets = torch.randint(96, (2, 12, 24), generator=random)
        mine = slice(12 // world * rank, 12 // world * (rank + 1))
        steps = recipe.train.steps
        Schedule(steps, recipe.optim).set(engine.optimizers, int(share * steps))
        engine.accumulate(iter([(tokens[mine], targets[mine])]), 1)
        engine.update()
        engine.zero_grad()
    return {f"{name}.{kind}.{n}": whole(p) for n, p in model.named_parameters()}


def clipped(kind, rank, world):
    """Two steps of two micro-batches with QK-clip, on heads that share keys; peaks, weights."""
    from nanonormuon.engine import Engine

    sizes = {"vocab_size": 96, "n_layer": 2, "n_head": 6, "n_kv_head": 3, "n_embd": 24}
    model = filled(GPT(GPTConfig(**sizes, qk_norm=False, bias=True)))
    make = partial(make_optimizers, settings=OptimConfig(), ns_dtype=torch.float32)
    here = World(rank, world, torch.device("cpu"))
    engine = Engine(model, make, here, kind, qk_clip=0.5)
    random, found = torch.Generator().manual_seed(7), {}
    for step in range(2):
        tokens, targets = torch.randint(96, (2, 24, 16), generator=random)
        mine = slice(24 // world * rank, 24 // world * (rank + 1))
        halves = zip(tokens[mine].chunk(2), targets[mine].chunk(2))
        engine.accumulate(halves, 2)
        engine.update()
        engine.zero_grad()
        found[f"clipped.{kind}.peaks{step}"] = engine.extras[0].peaks.clone()
    return found | {f"clipped.{kind}.{n}": whole(p) for n, p in model.named_parameters()}


def engine_of(world, parallel, dtype=torch.float32, make=None, **sizes):
    """An engine of a small model, with torch's compilation of an earlier one forgotten."""
    from nanonormuon.engine import Engine

    torch._dynamo.reset()
    config = {"vocab_size": 96, "n_layer": 2, "n_head": 2, "n_embd": 32, **sizes}
    model = filled(GPT(GPTConfig(**config), dtype)).to(world.device)
    optimizers = partial(make_optimizers, settings=OptimConfig(), ns_dtype=torch.float32)
    return (make or Engine)(model, optimizers, world, parallel, dtype=dtype)


def batches(world):
    """Endless micro-batches for a rank of an engine_of."""
    random = torch.Generator().manual_seed(8 + world.rank)
    while True:
        yield tuple(torch.randint(96, (2, 2, 24), generator=random).to(world.device))


def first_norms(world, parallel, trial):
    """The gradient norms of two steps of two micro-batches; trial: compile the engine first."""
    engine, micro_batches = engine_of(world, parallel), batches(world)
    failure = compilation.attempt(engine, lambda: next(batches(world))) if trial else ""
    norms = []
    for _ in range(2):
        engine.accumulate(micro_batches, 2)
        norms.append(health.norm(p.grad for p in engine.model.parameters()).item())
        engine.update()
        engine.zero_grad()
    return norms, failure


def compiled(folder):
    """Gradient norms without a compiler, with one, and with one that fails on the last rank."""
    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))

    def broken(_graph, _inputs):
        raise RuntimeError("no C++ compiler here")

    lookup, last = torch._dynamo.lookup_backend, world.rank == world.size - 1
    found = {}
    for kind in ("ddp", "fsdp"):
        found[kind] = {"off": first_norms(world, kind, False)}
        for label, backend in {"on": lookup("eager"), "fails": broken if last else None}.items():
            backend = backend or lookup("eager")
            torch._dynamo.lookup_backend = lambda _, backend=backend: backend
            found[kind][label] = first_norms(world, kind, True)
    (folder / f"{world.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def alone(folder, device):
    """What one process can answer about the code for several, with a group of one rank."""
    from nanonormuon.engine import Engine
    from nanonormuon.runtime import distributed
    from nanonormuon.runtime.bitwise import Bitwise

    where = torch.device(device)
    plain = World(0, 1, where)
    sizes = {"rope": "half", "n_embd": 64, "embed_dtype": "bf16"}
    wanted = engine_of(plain, "ddp", torch.bfloat16, **sizes)
    losses = {"alone": wanted.accumulate(batches(plain), 2).item()}
    port = str(reserved_port())
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "one"}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    asked, original = [], dist.all_reduce

    def all_reduce(*args, **kwargs):
        asked.append(args[0].device.type)
        return original(*args, **kwargs)

    dist.all_reduce = all_reduce
    world = distributed.start(device)
    x = torch.arange(3.0, device=where)
    facts = {
        "grouped": distributed.grouped(),
        "total": distributed.total(x.clone()).tolist(),
        "largest": distributed.largest([2.0, 3.0]),
        "any": distributed.largest([True, False]),
        "gather": distributed.gather(x).tolist(),
        "from_first": distributed.from_first({"a": [1]}),
        "first_does": distributed.first_does(lambda: "done"),
        "memory": (distributed.peak_memory(where) or 0) > 0,
        "asked": list(asked),
        "off": {},
    }
    for kind, make in (("ddp", Engine), ("fsdp", Engine), ("ddp", Bitwise), ("fsdp", Bitwise)):
        assert torch.are_deterministic_algorithms_enabled() == ("ddp Bitwise" in facts)
        label = f"{kind} {make.__name__}"
        engine = engine_of(world, kind, torch.bfloat16, make, **sizes)
        losses[label] = engine.accumulate(batches(world), 2).item()
        pairs = zip(wanted.model.named_parameters(), engine.model.parameters())
        facts["off"][label] = {
            name: ((whole(q.grad) - p.grad).norm() / p.grad.norm()).item() for (name, p), q in pairs
        }
        engine.update()
        engine.zero_grad()
        facts[label] = [type(engine.replica).__name__, engine.sharded]
    facts["losses"], facts["cublas"] = losses, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    steps = {}
    for name in ("OneProcess", "Replicated", "RowSharded"):
        group, torch_seed = dist.group.WORLD, torch.manual_seed(3)
        W = [torch.nn.Parameter(torch.randn(12, 8).to(where)) for _ in range(3)]
        optimizer = NorMuon(W, ns_dtype=torch.float32)
        arguments = {"OneProcess": (), "Replicated": (3, group), "RowSharded": (3, 12, group)}
        optimizer.buckets[0].layout = getattr(normuon, name)(*arguments[name])
        for _ in range(2):
            for p in W:
                p.grad = torch.randn(12, 8, generator=torch_seed).to(where)
            optimizer.step()
        steps[name] = torch.stack([p.detach() for p in W])
    facts["layouts"] = {k: torch.equal(v, steps["OneProcess"]) for k, v in steps.items()}
    distributed.finish()
    (folder / "facts.json").write_text(json.dumps(facts))
    os._exit(0)


def with_experts(kind, rank, world):
    """Two steps of two micro-batches with 5 experts, which divide among no ranks; visits of each
    step, weights and biases."""
    from nanonormuon.checkpoint import weights_of
    from nanonormuon.engine import Engine

    experts = {"mlp": "experts", "n_expert": 5, "n_expert_used": 2, "balance_loss": 0.1}
    sizes = {"vocab_size": 96, "n_layer": 2, "n_head": 2, "n_embd": 32, "n_dense": 1}
    model = filled(GPT(GPTConfig(**sizes, **experts)))
    make = partial(make_optimizers, settings=OptimConfig(), ns_dtype=torch.float32)
    engine = Engine(model, make, World(rank, world, torch.device("cpu")), kind)
    random, found = torch.Generator().manual_seed(9), {}
    for step in range(2):
        tokens, targets = torch.randint(96, (2, 24, 16), generator=random)
        mine = slice(24 // world * rank, 24 // world * (rank + 1))
        engine.accumulate(zip(tokens[mine].chunk(2), targets[mine].chunk(2)), 2)
        engine.update()
        engine.zero_grad()
        found[f"experts.{kind}.visits{step}"] = engine.extras[0].visits
    return found | {f"experts.{kind}.{name}": whole(t) for name, t in weights_of(model).items()}


def main():
    folder, what, *more = sys.argv[1:]
    torch.set_num_threads(1)
    if what in ("compiled", "alone"):
        return {"compiled": compiled, "alone": alone}[what](Path(folder), *more)
    layouts(Path(folder), Path(what))


def layouts(folder, saved):
    from nanonormuon.engine import grid

    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    layouts = {"ddp": None, "fsdp": (mesh, [Shard(0)]), "replicas": (mesh, [Replicate()])}
    meshes = {"ddp": None, "fsdp": mesh}
    if world == 4:
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        meshes["hsdp"] = grid(World(rank, world, torch.device("cpu")), "hsdp")
        layouts["hsdp"] = (meshes["hsdp"], [Replicate(), Shard(0)])
    tensors, facts = {}, {"collectives": {}, "order": {}, "stacks": {}}
    for kind, layout in layouts.items():
        for label, settings in SETTINGS.items():
            for name, value in train(layout, torch.float32, **settings).items():
                tensors[f"fp32.{kind}.{label}.{name}"] = value
        for name, value in train(layout, torch.bfloat16).items():
            tensors[f"bf16.{kind}.rows-original.{name}"] = value
        equal = [sorted(collectives(layout, [(8, 6)] * copies)) for copies in (2, 9)]
        facts["collectives"][kind] = equal
        facts["stacks"][kind] = collectives(layout, [(5, 6, 8), (6, 6, 8)])
        facts["order"][kind] = collectives(layout, [(8, 6), (6, 8), (8, 8)])
        for name, value in missing_gradients(layout).items():
            tensors[f"missing.{kind}.{name}"] = value
    facts["refusals"] = refusals(mesh)
    facts["state"] = state_round_trip(mesh)
    keep, torch.compile = torch.compile, lambda model, **_: model
    here = World(rank, world, torch.device("cpu"))
    facts["norms"] = {
        kind: [first_norms(here, kind, trial)[0] for trial in (False, True)]
        for kind in kinds(world)
    }
    torch.compile = keep
    facts["checkpoint"] = read_back_on_each(saved, meshes)
    tensors |= readme_on_each(meshes)
    for kind in kinds(world):
        for name in RECIPES:
            tensors |= recipe_steps(kind, name, rank, world)
        tensors |= clipped(kind, rank, world)
        tensors |= with_experts(kind, rank, world)
    for key in sorted(tensors):  # replicas must not drift apart by a single bit
        mine = tensors[key].clone()
        dist.broadcast(mine, 0)
        # (unless the test itself gave two replicas different gradients)
        assert key == "missing.hsdp.1" or torch.equal(mine, tensors[key]), key
    if rank == 0:
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "tensors.safetensors")
        (folder / "facts.json").write_text(json.dumps(facts))
    dist.barrier()
    os._exit(0)  # as cli.entry ends: taking gloo's threads down can abort
