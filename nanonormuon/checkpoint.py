"""A model and its optimizers as named tensors, into a checkpoint and out of it.

Tensors are whole, whatever the number of ranks, so any layout resumes what any other saved.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanonormuon.errors import CheckpointError
from nanonormuon.normuon import NorMuon
from nanonormuon.runtime import distributed
from nanonormuon.storage import checkpoints as checkpoint
from nanonormuon.storage.huggingface import to_hf
from nanonormuon.storage.tensors import DTYPES, TensorFile, placed_like, stream

OURS = (NorMuon, torch.optim.AdamW)  # whose buffers are tensors that belong to one parameter each
ADAMW_STATE = ("exp_avg", "exp_avg_sq", "step")


def named_state(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by parameter, optimizer buffers by parameter.buffer: all that changes in training."""
    weights = dict(model.named_parameters())
    buffers = {
        f"{name}.{key}": buffer
        for optimizer in optimizers
        if isinstance(optimizer, OURS)
        for group in optimizer.param_groups
        for name, p in zip(group["names"], group["params"])
        for key, buffer in sorted(optimizer.state[p].items())
    }
    for optimizer in optimizers:
        if not isinstance(optimizer, OURS):
            buffers |= foreign_state(optimizer)
    return weights, buffers


def named_for_hf(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {to_hf(name): t for name, t in weights.items()}


def buffer_shapes(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, tuple[int, ...]]:
    """A parameter's buffers, also those that AdamW makes at its first step only."""
    state = optimizer.state[p] if isinstance(optimizer, OURS) else {}  # of others: an estimate
    if state:
        return {key: tuple(value.shape) for key, value in state.items()}
    return {key: () if key == "step" else tuple(p.shape) for key in ADAMW_STATE}


def size_of(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Bytes of the tensors in a checkpoint; whole ones, whatever this rank holds."""
    buffers = sum(
        4 * math.prod(shape)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
        for shape in buffer_shapes(optimizer, p).values()
    )
    return buffers + sum(p.numel() * p.element_size() for p in model.parameters())


# ------------------------------------------------------------------------------------------------
# Into a checkpoint and out of it


def save(
    folder: Path,
    step: int,
    weights: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    description: Callable[[], Mapping[str, bytes]],
    world: distributed.World,
) -> None:
    """Publish a checkpoint of tensors of any layout, and the files that `description` gives beside
    them. Every rank takes part in gathering the tensors, one after the other, the first one writes,
    all learn how it went."""
    streams = {
        "model.safetensors": stream(named_for_hf(weights), keep=world.first),
        "optimizer.safetensors": stream(buffers, keep=world.first),
    }
    failure = None
    if world.first:
        try:
            checkpoint.write(folder, step, streams | description())
        except Exception as error:
            failure = error
    for pieces in streams.values():  # after a failure too, the others send what is left
        for _ in pieces:
            pass
    distributed.first_does(lambda: raise_if(failure), world.device)


def raise_if(failure: BaseException | None) -> None:
    if failure is not None:
        raise failure


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a model of any layout from model.safetensors, whose names and shapes must be its own."""
    file = TensorFile(path / "model.safetensors")
    parameters = named_for_hf(dict(model.named_parameters()))
    file.expect({name: p.shape for name, p in parameters.items()})
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(placed_like(file.read(name), p))


def load_optimizers(optimizers: Sequence[torch.optim.Optimizer], path: Path) -> None:
    """Fill optimizers of any layout from optimizer.safetensors, complete or not at all."""
    file = TensorFile(path / "optimizer.safetensors")
    file.expect(
        {
            f"{name}.{key}": shape
            for optimizer in optimizers
            if isinstance(optimizer, OURS)
            for group in optimizer.param_groups
            for name, p in zip(group["names"], group["params"])
            for key, shape in buffer_shapes(optimizer, p).items()
        }
        | {name: entry[1] for name, entry in file.entries.items() if name.startswith("foreign.")}
    )
    for optimizer in optimizers:
        if not isinstance(optimizer, OURS):
            load_foreign(optimizer, file)
            continue
        content = optimizer.state_dict()
        names = [name for group in optimizer.param_groups for name in group["names"]]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for index, (name, p) in enumerate(zip(names, params)):
            state = {}
            for key in buffer_shapes(optimizer, p):
                value = file.read(f"{name}.{key}")
                like = optimizer.state[p].get(key, p if value.shape == p.shape else value)
                state[key] = placed_like(value, like)
            content["state"][index] = state
        optimizer.load_state_dict(content)


# ------------------------------------------------------------------------------------------------
# Another package's optimizer


def foreign_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of another package's optimizer: its tensors by number, and as bytes of JSON the
    tree of dicts, lists and numbers whose leaves they are. What only pickle could keep is named
    there instead."""
    tensors: list[Tensor] = []

    def tree(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in DTYPES:
            tensors.append(value)
            return {"tensor": len(tensors) - 1}
        if isinstance(value, dict):
            return {"dict": [[key, tree(part)] for key, part in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [tree(part) for part in value]}
        if value is None or isinstance(value, int | float | str):
            return value
        raise TypeError(f"{type(optimizer).__name__} keeps a {type(value).__name__}")

    try:
        found = tree(optimizer.state_dict())
    except TypeError as error:
        found, tensors = {"unsaved": str(error)}, []
    text = torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)
    return {"foreign.tree": text} | {f"foreign.{i}": t for i, t in enumerate(tensors)}


def load_foreign(optimizer: torch.optim.Optimizer, file: TensorFile) -> None:
    """The way back from foreign_state. Raises CheckpointError."""

    def value(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        (kind, content), *_ = tree.items()
        if kind == "unsaved":
            raise ValueError(f"{content}, which is not saved; begin a new run, with --init-from")
        if kind == "tensor":
            return file.read(f"foreign.{content}")
        if kind == "dict":
            return {key: value(part) for key, part in content}
        return {"list": list, "tuple": tuple}[kind](value(part) for part in content)

    try:
        optimizer.load_state_dict(value(json.loads(bytes(file.read("foreign.tree").tolist()))))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file.path}: no state of {type(optimizer).__name__}: {error}"
        ) from None
