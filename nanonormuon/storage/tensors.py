"""Tensors in files and on ranks: safetensors written piece by piece and read one tensor at a time,
whole tensors made of shards and cut into them again."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from nanonormuon.errors import CheckpointError
from nanonormuon.normuon import local as local
from nanonormuon.storage.checkpoints import JSON_LIMIT

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8"}  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Layouts


def whole(t: Tensor) -> Tensor:
    """A tensor's full content on the CPU; for a sharded one all ranks must call this."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu().contiguous()


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, cut and placed as `like` is."""
    if isinstance(like, DTensor):
        mesh = like.device_mesh
        return distribute_tensor(value.to(mesh.device_type), mesh, like.placements)
    return value.to(like.device)


# ------------------------------------------------------------------------------------------------
# Trees of dicts, lists, tuples and numbers whose leaves are tensors, as a state_dict is


def flatten_tree(tree: Any, prefix: str) -> dict[str, Tensor]:
    """A tree as tensors: its leaves by number, and as PREFIXtree the JSON that refers to them.

    A leaf that only pickle could keep is named in that JSON in place of the tree.
    """
    tensors: dict[str, Tensor] = {}

    def flat(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in DTYPES:
            tensors[f"{prefix}{len(tensors)}"] = value
            return {"tensor": len(tensors) - 1}
        if isinstance(value, dict):
            return {"dict": [[key, flat(part)] for key, part in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [flat(part) for part in value]}
        if value is None or isinstance(value, int | float | str):
            return value
        raise TypeError(f"a {type(value).__name__}")

    try:
        content = flat(tree)
    except TypeError as error:
        content, tensors = {"unsaved": str(error)}, {}
    text = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)
    return {f"{prefix}tree": text} | tensors


def unflatten_tree(read: Callable[[str], Tensor], prefix: str) -> Any:
    """The tree that flatten_tree took apart; `read` gives a tensor by its name.

    Raises KeyError, TypeError or ValueError for what flatten_tree did not make, or could not keep.
    """

    def value(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        (kind, content), *_ = tree.items()
        if kind == "unsaved":
            raise ValueError(f"keeps {content}, which is not saved; start anew with --init-from")
        if kind == "tensor":
            return read(f"{prefix}{content}")
        if kind == "dict":
            return {key: value(part) for key, part in content}
        return {"list": list, "tuple": tuple}[kind](value(part) for part in content)

    return value(json.loads(bytes(read(f"{prefix}tree").tolist())))


# ------------------------------------------------------------------------------------------------
# Files


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


class TensorFile:
    """A safetensors file, read tensor by tensor. Nothing is allocated before the header accounts
    for every byte of the file. Raises CheckpointError.

    safetensors' own safe_open maps the file: if it shrinks meanwhile, SIGBUS kills the process.
    """

    def __init__(self, path: Path):
        self.path, size = path, path.stat().st_size
        self.entries: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}  # with the offset
        kinds = {text: dtype for dtype, text in DTYPES.items()}
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, JSON_LIMIT):
                raise CheckpointError(f"{path}: a header of {length} bytes in a file of {size}")
            text = file.read(length)
        try:
            header = json.loads(text)
            header.pop("__metadata__", None)
            start = end = 8 + length
            for name, entry in sorted(header.items(), key=lambda i: i[1]["data_offsets"]):
                dtype, shape = kinds[entry["dtype"]], tuple(entry["shape"])
                if not all(type(n) is int and n >= 0 for n in shape):
                    raise ValueError(f"{name} has shape {shape}")
                begin, end = end, end + math.prod(shape) * dtype.itemsize
                if entry["data_offsets"] != (expected := [begin - start, end - start]):
                    raise ValueError(f"{name} lies at {entry['data_offsets']}, expected {expected}")
                self.entries[name] = dtype, shape, begin
            if end != size:
                raise ValueError(f"tensors end at byte {end}, the file has {size}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = str(error)[:200]
            raise CheckpointError(f"{path}: not a readable safetensors file ({reason})") from None

    def read(self, name: str) -> Tensor:
        dtype, shape, begin = self.entries[name]
        value = torch.empty(shape, dtype=dtype)
        with open(self.path, "rb") as file:
            file.seek(begin)
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


def check_names(file: Path, found: set[str], expected: set[str]) -> None:
    for what, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            raise CheckpointError(f"{file}: {len(names)} tensors {what}, first {min(names)}")


def check_shape(file: Path, name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            f"{file}: {name} has shape {tuple(found)}, expected {tuple(expected)}"
        )
