"""Saves and loads a run: model and optimizers as named tensors, and the run's description.

Tensors are saved unsharded, so a run can resume on any number of ranks and in any layout.
storage/checkpoints.py writes the directory atomically.
"""

import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanonormuon.config import KINDS, SECTIONS, Config, convert
from nanonormuon.errors import CheckpointError
from nanonormuon.optim import by_parameter
from nanonormuon.runtime import distributed
from nanonormuon.runtime.faults import Stopping
from nanonormuon.runtime.health import Spikes
from nanonormuon.storage import checkpoints, tensors
from nanonormuon.storage.files import as_json, progress
from nanonormuon.storage.huggingface import MODELING, config_json, modeling, to_hf
from nanonormuon.storage.shards import check_shape
from nanonormuon.storage.tensors import TensorFile, placed_like
from nanonormuon.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

ADAMW_STATE = ("exp_avg", "exp_avg_sq", "step")
OTHER = "foreign."  # prefix of the state of optimizers from other packages


def named_parameters(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield an optimizer's parameters with their names, in the order of its state_dict."""
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"])


def named_state(
    model: nn.Module, optimizers: Sequence[Optimizer]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return all that training changes: weights by parameter, buffers by parameter.buffer."""
    buffers: dict[str, Tensor] = {}
    for optimizer in optimizers:
        if not by_parameter(type(optimizer)):
            buffers |= tensors.flatten_tree(optimizer.state_dict(), OTHER)
            continue
        for name, p in named_parameters(optimizer):
            buffers |= {f"{name}.{key}": t for key, t in sorted(optimizer.state[p].items())}
    return weights_of(model), buffers


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors that a checkpoint saves: parameters and routers' biases."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def named_for_hf(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {to_hf(name): t for name, t in weights.items()}


def buffer_shapes(optimizer: Optimizer, p: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a parameter's buffers, including those that AdamW creates at its first
    step. For optimizers of other packages, AdamW's serve as an estimate."""
    if by_parameter(type(optimizer)) and (state := optimizer.state[p]):
        return {key: tuple(value.shape) for key, value in state.items()}
    return {key: () if key == "step" else tuple(p.shape) for key in ADAMW_STATE}


def size_of(model: nn.Module, optimizers: Sequence[Optimizer]) -> int:
    """Return the bytes of a checkpoint's tensors, unsharded."""
    buffers = sum(
        math.prod(shape) * getattr(optimizer.state.get(p, {}).get(key), "itemsize", 4)
        for optimizer in optimizers
        for _, p in named_parameters(optimizer)
        for key, shape in buffer_shapes(optimizer, p).items()
    )
    return buffers + sum(p.numel() * p.element_size() for p in weights_of(model).values())


# ----------------------------------------------------------------------- Saving and loading tensors


class Saver:
    """Publishes checkpoints, one at a time. Rank 0 writes while all ranks wait, or, if
    `background`, in a thread from copies in host memory while training continues."""

    def __init__(
        self, folder: Path, world: distributed.World, stopping: Stopping, background: bool
    ):
        self.folder, self.world, self.stopping = folder, world, stopping
        self.background = background
        self.thread = ThreadPoolExecutor(1, "save")
        self.pending: Future[None] | None = None  # on rank 0

    def save(
        self, step: int, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor],
        description: Callable[[], Mapping[str, bytes]], retain: Callable[[], None],
    ) -> None:  # fmt: skip
        """Publish tensors of any layout and the files of `description`, then call `retain`.

        All ranks must call this, after `settle`, and gather the tensors one by one. All raise if
        writing fails: here, or in the next `settle` if it happens in the background.
        """
        first, groups = self.world.first, {"model": named_for_hf(weights), "optimizer": buffers}
        if self.background:
            groups = {name: tensors.copied(group, keep=first) for name, group in groups.items()}
        streams = {f"{k}.safetensors": tensors.stream(g, keep=first) for k, g in groups.items()}

        def gather() -> None:
            for pieces in () if self.background else streams.values():
                for _ in pieces:
                    pass

        def write() -> None:
            try:
                files = streams | description()
                if self.background:
                    self.pending = self.thread.submit(self.publish, step, files, retain)
                    self.pending.add_done_callback(self.end_if_failed)
                else:
                    self.publish(step, files, retain)
            finally:
                gather()  # what a failure left, since the other ranks do

        if not first:
            gather()
        distributed.first_does(write)

    def publish(self, step: int, files: Mapping[str, Any], retain: Callable[[], None]) -> None:
        """Write a checkpoint, then delete old ones."""
        checkpoints.write(self.folder, step, files)
        retain()

    def end_if_failed(self, saved: Future[None]) -> None:
        """Stop all ranks after their step, as a signal does, so that they reach `settle`."""
        if error := saved.exception():
            log.error(f"a checkpoint was not saved: {error}")
            self.stopping.number = self.stopping.number or signal.SIGTERM

    def settle(self) -> None:
        """Wait until the last checkpoint is published. Raises on every rank if it failed."""
        if self.background:
            pending, self.pending = self.pending, None
            distributed.first_does(lambda: pending and pending.result())


def load_weights(model: nn.Module, file: TensorFile) -> None:
    """Load a model's tensors into a model of any layout. Raises CheckpointError."""
    parameters = named_for_hf(weights_of(model))
    file.expect({name: p.shape for name, p in parameters.items()})
    with torch.no_grad():
        for name, p in progress("reading", None, "tensor", iterable=[*parameters.items()]):
            value = file.read(name)
            if not value.is_floating_point() or not value.isfinite().all():
                found = f"{name} ({value.dtype})"
                raise CheckpointError(f"{file.path}: {found}: expected finite floating point")
            p.copy_(placed_like(value.float(), p))


def load_optimizers(optimizers: Sequence[Optimizer], path: Path) -> None:
    """Load optimizer.safetensors into optimizers of any layout. Raises CheckpointError, before
    changing anything, if a tensor is missing, unexpected or of another shape."""
    file = TensorFile(path / "optimizer.safetensors")
    expected = {name: e[1] for name, e in file.entries.items() if name.startswith(OTHER)}
    for optimizer in (o for o in optimizers if by_parameter(type(o))):
        for name, p in named_parameters(optimizer):
            shapes = buffer_shapes(optimizer, p)
            expected |= {f"{name}.{key}": shape for key, shape in shapes.items()}
    file.expect(expected)
    for optimizer in optimizers:
        if not by_parameter(type(optimizer)):
            try:
                optimizer.load_state_dict(tensors.unflatten_tree(file.read, OTHER))
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                name = type(optimizer).__name__
                raise CheckpointError(f"{file.path}: no state of {name}: {error}") from None
            continue
        content = optimizer.state_dict()
        for index, (name, p) in enumerate(named_parameters(optimizer)):
            content["state"][index] = state = {}
            for key in buffer_shapes(optimizer, p):
                value = file.read(f"{name}.{key}")
                like = optimizer.state[p].get(key, p if value.shape == p.shape else value)
                state[key] = placed_like(value, like)
        optimizer.load_state_dict(content)


# ---------------------------------------------------------------------------- The run's description

STATE = {"step": int, "tokens": int, "seconds": float, "total_seconds": float, "ranks": int,
         "micro_batch": int, "config": {}, "data": str}  # fmt: skip


def describe(
    config: Config, state: Mapping[str, Any], tokenizer: Tokenizer | None
) -> dict[str, bytes]:
    """Make the files beside a checkpoint's tensors: Hugging Face's config.json and the model's
    source where it needs one, state.json (progress, and all that must not change on resume) and the
    tokenizer's files."""
    state = {**state, "config": asdict(config), "tokenizer": tokenizer and tokenizer.hash}
    hf = config_json(config.model, config.data.seq_len, tokenizer and tokenizer.eot)
    return {
        "config.json": as_json(hf),
        "state.json": as_json(state),
        **({MODELING: modeling()} if "auto_map" in hf else {}),
        **(tokenizer.files() if tokenizer else {}),
    }


def newest(folder: Path, world: distributed.World) -> tuple[Path, dict[str, Any]] | None:
    """Find the checkpoint to resume from and its state, verified by rank 0; None if there are no
    checkpoints. Raises CheckpointError if none is usable."""

    def look() -> list[Any] | None:
        if not checkpoints.all_steps(folder):
            return None
        path, state = checkpoints.newest(folder)
        return [str(path), check_state(path / "state.json", state)]

    found = distributed.first_does(look)
    return None if found is None else (Path(found[0]), found[1])


def check_state(file: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a state.json with the defaults of settings that it lacks. Raises
    CheckpointError if no run can have written it."""
    try:
        check_shape(state, STATE, "state")
        Spikes(0.0, **state.get("spikes", {})).skip(1.0)
        for section, kind in SECTIONS.items():
            settings = state["config"][section] = asdict(kind()) | state["config"][section]
            for name, value in settings.items():
                if section != "model" and f"{section}.{name}" in KINDS:
                    settings[name] = convert(f"{section}.{name}", value)
                elif not isinstance(value, bool | int | float | str):  # unknown here
                    raise ValueError(f"{name} = {value!s:.60}: expected a number or text")
        batch = state["config"]["train"]["batch_tokens"] // state["config"]["data"]["seq_len"]
        if batch % (state["ranks"] * state["micro_batch"]):
            raise ValueError("ranks and micro_batch do not divide the batch")
        if not isinstance(state["tokenizer"], str | None):
            raise ValueError("expected the tokenizer's hash")
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: not written by a run: {error}") from None
    return state
