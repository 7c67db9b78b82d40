"""A run to disk and back: a model and its optimizers as named tensors, and what describes the run.

Tensors are whole, whatever the number of ranks, so any layout resumes what any other saved. The
directories themselves, complete or absent, are storage/checkpoints.py's.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanonormuon.config import Config, from_dict
from nanonormuon.errors import CheckpointError
from nanonormuon.normuon import NorMuon
from nanonormuon.runtime import distributed
from nanonormuon.runtime.health import Spikes
from nanonormuon.storage import checkpoints
from nanonormuon.storage.huggingface import config_json, to_hf
from nanonormuon.storage.tensors import (
    TensorFile,
    flatten_tree,
    placed_like,
    stream,
    unflatten_tree,
)
from nanonormuon.text.tokenizer import Tokenizer

OURS = (NorMuon, torch.optim.AdamW)  # whose buffers are tensors that belong to one parameter each
ADAMW_STATE = ("exp_avg", "exp_avg_sq", "step")
OTHER = "foreign."  # prefix of the tensors that another package's optimizer keeps


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
            buffers |= flatten_tree(optimizer.state_dict(), OTHER)
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
    """Publish a checkpoint: tensors of any layout, and beside them the files of `description`.

    All ranks gather the tensors, one after the other; rank 0 writes; all learn how it went.
    """
    streams = {
        "model.safetensors": stream(named_for_hf(weights), keep=world.first),
        "optimizer.safetensors": stream(buffers, keep=world.first),
    }
    failure = None
    if world.first:
        try:
            checkpoints.write(folder, step, streams | description())
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
        | {name: entry[1] for name, entry in file.entries.items() if name.startswith(OTHER)}
    )
    for optimizer in optimizers:
        if not isinstance(optimizer, OURS):
            try:
                optimizer.load_state_dict(unflatten_tree(file.read, OTHER))
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                name = type(optimizer).__name__
                raise CheckpointError(f"{file.path}: no state of {name}: {error}") from None
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
# What describes the run beside its tensors

STATE = {"step": int, "seconds": float, "total_seconds": float, "ranks": int, "micro_batch": int,
         "config": dict, "data": str}  # fmt: skip


def describe(
    config: Config, state: Mapping[str, Any], tokenizer: Tokenizer | None
) -> dict[str, bytes]:
    """The files beside a checkpoint's tensors, by name: Hugging Face's config.json, state.json (how
    far the run is, and all that must not change on resume) and the tokenizer."""
    state = {**state, "config": asdict(config), "tokenizer": tokenizer and tokenizer.hash}
    hf = config_json(config.model, config.data.seq_len, tokenizer and tokenizer.eot)
    return {
        "config.json": as_json(hf),
        "state.json": as_json(state),
        **(tokenizer.files() if tokenizer else {}),
    }


def as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def newest(folder: Path, world: distributed.World) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from and its state, verified by rank 0; None if there is none.

    Raises CheckpointError if there are some and none is usable.
    """

    def look() -> list[Any] | None:
        if not checkpoints.all_steps(folder):
            return None
        path, state = checkpoints.newest(folder)
        check_state(path / "state.json", state)
        return [str(path), state]

    found = distributed.first_does(look, world.device)
    return None if found is None else (Path(found[0]), found[1])


def check_state(file: Path, state: dict[str, Any]) -> None:
    """Raise CheckpointError for a state.json that no run wrote, whatever its hash."""
    for key, kind in STATE.items():
        if type(state.get(key)) not in (kind, int if kind is float else kind):
            raise CheckpointError(
                f"{file}: {key} = {str(state.get(key))[:80]}, expected {kind.__name__}"
            )
    try:
        Spikes(0.0, **state.get("spikes", {})).skip(1.0)
        from_dict(state["config"])
        if not isinstance(state.get("tokenizer"), str | None):
            raise ValueError("tokenizer: expected its hash")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None
