"""Checkpoints: directories that are complete or absent, verified before anything is used.

    checkpoints/step-000500/
        model.safetensors      weights, float32 or model.embed_dtype, by Hugging Face's names
        optimizer.safetensors  every optimizer buffer, as <parameter>.<buffer>
        config.json, tokenizer files: with the weights, a Hugging Face model directory
        state.json             step, tokens, configuration, fingerprints of data and tokenizer
        manifest.json          size and sha256 of all of these; written last

Tensors are whole, whatever the number of ranks, so any layout resumes what any other saved. Nothing
about the data order or randomness is stored: both are functions of (seed, step).
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nanonormuon import distributed
from nanonormuon.files import naming, settle, sync_directory, write_durably
from nanonormuon.hf import to_hf
from nanonormuon.normuon import NorMuon

log = logging.getLogger(__name__)

FORMAT = 1
OURS = (NorMuon, torch.optim.AdamW)  # whose buffers are tensors that belong to one parameter each
ADAMW_STATE = ("exp_avg", "exp_avg_sq", "step")
JSON_LIMIT = 1 << 26  # bytes of a JSON file or header that anything is believed of
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8"}  # fmt: skip


class CheckpointError(ValueError):
    exit_code = 4


# ------------------------------------------------------------------------------------------------
# Directories


def step_of(path: Path) -> int | None:
    match = re.fullmatch(r"step-(\d{6,15})", path.name, re.ASCII)
    return int(match[1]) if match else None


def all_steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by rising step; other entries are none of ours."""
    entries = folder.iterdir() if folder.is_dir() else ()
    found = [p for p in entries if step_of(p) is not None and p.is_dir()]
    return sorted(found, key=lambda p: step_of(p) or 0)


def write(folder: Path, step: int, files: Mapping[str, bytes | Iterable]) -> Path:
    """Publish `files`, each given whole or piece by piece, as folder/step-NNNNNN. Digests are of
    what is in memory, not of what was read back. The order (data, manifest, rename, each waited
    for) leaves no moment in which a crash could publish a part. Raises OSError, with every older
    checkpoint intact."""
    target = folder / f"step-{step:06d}"
    partial = folder / f".partial-{target.name}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        entries = {}
        for name, content in files.items():
            size, digest = 0, hashlib.sha256()
            with open(partial / name, "wb") as file, naming(partial / name):
                for piece in (content,) if isinstance(content, bytes) else content:
                    file.write(piece)
                    digest.update(piece)
                    size += len(piece)
                settle(file)
            entries[name] = {"size": size, "sha256": digest.hexdigest()}
        sync_directory(partial)
        manifest = {"format": FORMAT, "step": step, "files": entries}
        write_durably(partial / "manifest.json", json.dumps(manifest, indent=1).encode())
        sync_directory(partial)
    except BaseException:  # a full disk should not stay full for half a checkpoint
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if target.exists():  # this step was saved before and found damaged, or it would not be repeated
        os.replace(target, aside := folder / f".damaged-{target.name}-{os.getpid()}")
        log.warning("%s existed and was moved to %s", target, aside)
    os.replace(partial, target)
    sync_directory(folder)
    return target


def verify(path: Path) -> dict[str, Any]:
    """Check every byte of a checkpoint; returns its state.json. Raises CheckpointError."""
    if path.is_symlink() or (path / "manifest.json").is_symlink():
        raise CheckpointError(f"{path}: a symbolic link, expected the files themselves")
    manifest = read_json(path / "manifest.json")
    files = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(files, dict):
        raise CheckpointError(
            f"{path / 'manifest.json'}: format {manifest.get('format')!r}, expected {FORMAT}"
        )
    if manifest.get("step") != step_of(path):
        raise CheckpointError(f"{path / 'manifest.json'}: of step {manifest.get('step')!r}")
    for name, entry in files.items():
        file = path / name
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise CheckpointError(f"{path / 'manifest.json'}: no size and sha256 of {name!r}")
        if not re.fullmatch(r"\w[\w.-]{0,99}", name, re.ASCII) or file.is_symlink():
            raise CheckpointError(f"{path / 'manifest.json'}: unsafe file name {name[:99]!r}")
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, although the manifest lists it")
        if (size := file.stat().st_size) != entry["size"]:
            raise CheckpointError(f"{file}: {size} bytes, expected {entry['size']} (manifest)")
        with open(file, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != entry["sha256"]:
            raise CheckpointError(f"{file}: sha256 {digest}, expected {entry['sha256']} (manifest)")
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "config.json"):
        if name not in files:
            raise CheckpointError(f"{path / 'manifest.json'}: lists no {name}")
    state = read_json(path / "state.json")
    if state.get("step") != manifest["step"]:
        raise CheckpointError(f"{path / 'state.json'}: of step {state.get('step')!r}")
    return state


def read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete")
    if not path.is_file() or path.stat().st_size > JSON_LIMIT:
        raise CheckpointError(f"{path}: expected a plain file of at most {JSON_LIMIT} bytes")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that verifies, and its state; each damaged one it passes is reported.

    Raises CheckpointError, naming what was found, if there is none.
    """
    failures = []
    for path in reversed(all_steps(folder)):
        try:
            return path, verify(path)
        except (CheckpointError, OSError) as error:
            log.error("checkpoint refused: %s; trying the one before", error)
            failures.append(str(error))
    found = "; ".join(failures) or "no step-NNNNNN directory there"
    raise CheckpointError(f"{folder}: no usable checkpoint ({found})")


def sweep(folder: Path) -> None:
    """Remove what a killed process left half written or half deleted; for the run's only writer."""
    for path in [*folder.glob(".partial-step-*"), *folder.glob(".deleting-step-*")]:
        shutil.rmtree(path, ignore_errors=True)


def retain(
    folder: Path, keep_last: int, step: int, keep_every: int = 0, best: int | None = None
) -> None:
    """Delete all but the last checkpoints up to `step`, just written, each keep_every steps' one
    and the best. keep_last = 0 keeps all. Later ones, left by a run that fell back behind them, do
    not count. Nothing is deleted before the newest has been read back and found whole; first goes
    the name, then the content."""
    ours = [p for p in all_steps(folder) if (step_of(p) or 0) <= step]
    doomed = [
        path
        for path in (ours[:-keep_last] if keep_last else [])
        if step_of(path) != best and not (keep_every and (step_of(path) or 0) % keep_every == 0)
    ]
    if doomed:
        verify(ours[-1])
    for path in doomed:
        hidden = folder / f".deleting-{path.name}"
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def check_space(folder: Path, size: int, keep_last: int) -> None:
    """Raise OSError unless the disk has room for the checkpoints that will be kept, and for the one
    that is written before the oldest goes; those already there have theirs."""
    copies = max(1, (keep_last or 1) + 1 - len(all_steps(folder)))
    place = next(p for p in (folder, *folder.parents) if p.exists())
    if (free := shutil.disk_usage(place).free) < copies * size:
        raise OSError(
            errno.ENOSPC,
            f"{free / 1e9:.2f} GB free, expected room for {copies} checkpoints of "
            f"{size / 1e9:.2f} GB; free some, lower train.keep_last, or choose another --out",
            str(folder),
        )


# ------------------------------------------------------------------------------------------------
# Tensors


def local(t: Tensor) -> Tensor:
    """The part that this rank holds."""
    return t.to_local() if isinstance(t, DTensor) else t


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


def load_foreign(optimizer: torch.optim.Optimizer, file: "TensorFile") -> None:
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


def named_for_hf(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {to_hf(name): t for name, t in weights.items()}


def whole(t: Tensor) -> Tensor:
    """A tensor's full content on the CPU; for a sharded one all ranks must call this."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu().contiguous()


def stream(tensors: Mapping[str, Tensor], keep: bool = True) -> Iterator[Any]:
    """The bytes of a safetensors file, piece by piece, each tensor gathered when its turn comes, so
    that no more than one of them is held whole. Sharded ones need every rank to exhaust its stream;
    ranks with keep=False get nothing for it."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, t in ordered:
        end = offset + t.numel() * t.element_size()
        header[name] = {
            "dtype": DTYPES[t.dtype],
            "shape": [*t.shape],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, t in ordered:
        if keep:
            yield memoryview(whole(t).reshape(-1).view(torch.uint8).numpy())
        elif isinstance(t, DTensor):
            t.full_tensor()


def serialise(tensors: Mapping[str, Tensor]) -> bytes:
    return b"".join(stream(tensors))


def model_file(weights: Mapping[str, Tensor]) -> bytes:
    return serialise(named_for_hf(weights))


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
            write(folder, step, streams | description())
        except Exception as error:
            failure = error
    for pieces in streams.values():  # after a failure too, the others send what is left
        for _ in pieces:
            pass
    distributed.first_does(lambda: raise_if(failure), world.device)


def raise_if(failure: BaseException | None) -> None:
    if failure is not None:
        raise failure


class TensorFile:
    """A safetensors file, read tensor by tensor: read, not mapped, since a mapped file that shrinks
    kills the process. What its header declares is compared with the file's size before anything is
    allocated for it. Raises CheckpointError."""

    def __init__(self, path: Path):
        self.path, self.entries = path, {}
        size = path.stat().st_size
        kinds = {text: dtype for dtype, text in DTYPES.items()}
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, JSON_LIMIT):
                raise CheckpointError(f"{path}: a header of {length} bytes in a file of {size}")
            try:
                header = json.loads(file.read(length))
                header.pop("__metadata__", None)
                self.start, end = 8 + length, 0
                for name, entry in sorted(header.items(), key=lambda i: i[1]["data_offsets"]):
                    dtype, shape = kinds[entry["dtype"]], entry["shape"]
                    if not all(type(n) is int and n >= 0 for n in shape):
                        raise ValueError(f"{name} has shape {shape}")
                    begin, end = end, end + math.prod(shape) * dtype.itemsize
                    if entry["data_offsets"] != [begin, end]:
                        raise ValueError(f"{name} lies at {entry['data_offsets']}, {[begin, end]}")
                    self.entries[name] = dtype, tuple(shape), begin
                if self.start + end != size:
                    raise ValueError(f"tensors of {end} bytes, {size - self.start} found")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(
                    f"{path}: not a readable safetensors file ({str(error)[:200]})"
                ) from None

    def read(self, name: str) -> Tensor:
        dtype, shape, begin = self.entries[name]
        value = torch.empty(shape, dtype=dtype)
        with open(self.path, "rb") as file:
            file.seek(self.start + begin)
            if file.readinto(value.view(-1).view(torch.uint8).numpy()) != value.nbytes:
                raise CheckpointError(f"{self.path}: {name} is cut short")
        return value

    def expect(self, like: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError unless the file has just these tensors of just these shapes."""
        check_names(self.path, set(self.entries), set(like))
        for name, shape in like.items():
            check_shape(self.path, name, self.entries[name][1], shape)


def read_tensors(path: Path) -> dict[str, Tensor]:
    file = TensorFile(path)
    return {name: file.read(name) for name in file.entries}


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, cut and placed as `like` is."""
    if isinstance(like, DTensor):
        mesh = like.device_mesh
        return distribute_tensor(value.to(mesh.device_type), mesh, like.placements)
    return value.to(like.device)


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


def check_names(file: Path, found: set[str], expected: set[str]) -> None:
    for what, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            raise CheckpointError(f"{file}: {len(names)} tensors {what}, first {min(names)}")


def check_shape(file: Path, name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            f"{file}: {name} has shape {tuple(found)}, expected {tuple(expected)}"
        )
