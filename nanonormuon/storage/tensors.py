"""Tensors on disk and across ranks: safetensors files, read tensor by tensor; whole and sharded."""

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
          torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8"}  # fmt: skip


def whole(t: Tensor) -> Tensor:
    """Return the full tensor on the CPU. If it is sharded, every rank must call this."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu().contiguous()


def copied(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Copy full tensors to host memory, which is pinned for asynchronous copies from a GPU. If any
    tensor is sharded, every rank must call this; keep=False gathers but copies nothing."""
    copies = {}
    for name, t in tensors.items():
        full = t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()
        if keep:
            copies[name] = torch.empty(full.shape, dtype=full.dtype, pin_memory=full.is_cuda)
            copies[name].copy_(full, non_blocking=True)
    if any(copy.is_pinned() for copy in copies.values()):
        torch.cuda.synchronize()
    return copies


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """Shard and place a full tensor like another one."""
    if isinstance(like, DTensor):
        mesh = like.device_mesh
        return distribute_tensor(value.to(mesh.device_type), mesh, like.placements)
    return value.to(like.device)


def flatten_tree(tree: Any, prefix: str) -> dict[str, Tensor]:
    """Turn a tree of dicts, lists and tuples, such as a state_dict, into named tensors: its own,
    numbered, and PREFIXtree, the rest as JSON (only the type of a leaf that needs pickling)."""
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
    """Invert flatten_tree; `read` returns a tensor by name. Raises KeyError, TypeError or
    ValueError if flatten_tree did not make the tensors or could not save the tree."""

    def value(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        (kind, content), *_ = tree.items()
        if kind == "unsaved":
            raise ValueError(f"{content} in its state could not be saved; restart with --init-from")
        if kind == "tensor":
            return read(f"{prefix}{content}")
        if kind == "dict":
            return {key: value(part) for key, part in content}
        return {"list": list, "tuple": tuple}[kind](value(part) for part in content)

    return value(json.loads(bytes(read(f"{prefix}tree").tolist())))


def entries(name: str, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes under which a tensor is stored: one, or, if its name has a "#",
    one for each index of the first dimension."""
    if "#" not in name:
        return {name: tuple(shape)}
    return {name.replace("#", str(i)): tuple(shape[1:]) for i in range(shape[0])}


def stream(tensors: Mapping[str, Tensor], keep: bool = True) -> Iterator[Any]:
    """Yield the bytes of a safetensors file in pieces, gathering one tensor at a time.

    If any tensor is sharded, every rank must exhaust its stream; keep=False gathers but yields no
    content. Names are those of `entries`.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, t in ordered:
        for entry, shape in entries(name, t.shape).items():
            begin, end = end, end + math.prod(shape) * t.element_size()
            found = {"dtype": DTYPES[t.dtype], "shape": [*shape], "data_offsets": [begin, end]}
            header[entry] = found
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, t in ordered:
        if keep:
            yield memoryview(whole(t).reshape(-1).view(torch.uint8).numpy())
        elif isinstance(t, DTensor):
            t.full_tensor()


class TensorFile:
    """Reads a safetensors file tensor by tensor, after checking its header against its size. Raises
    CheckpointError.

    Replaces safetensors' safe_open, which maps the file into memory: if the file shrinks while it
    is open, SIGBUS kills the process.
    """

    def __init__(self, path: Path):
        if not path.is_file():  # opening a pipe would wait for its writer
            raise CheckpointError(f"{path}: missing or not a regular file")
        self.path, size = path, path.stat().st_size
        self.entries: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}  # offset in the file
        kinds = {text: dtype for dtype, text in DTYPES.items()}
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, JSON_LIMIT):
                raise CheckpointError(f"{path}: header of {length} bytes in a file of {size} bytes")
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
                    raise ValueError(f"{name} is at {entry['data_offsets']}, expected {expected}")
                self.entries[name] = dtype, shape, begin
            if end != size:
                raise ValueError(f"tensors end at byte {end}, the file has {size}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = str(error)[:200]
            raise CheckpointError(f"{path}: not a readable safetensors file ({reason})") from None

    def read(self, name: str) -> Tensor:
        """Read a tensor, or all entries of a name with a "#"."""
        if "#" in name:
            first, last = name.split("#")
            count = sum(n.startswith(first) and n.endswith(last) for n in self.entries)
            return torch.stack([self.read(name.replace("#", str(i))) for i in range(count)])
        dtype, shape, begin = self.entries[name]
        value = torch.empty(shape, dtype=dtype)
        with open(self.path, "rb") as file:
            file.seek(begin)
            if file.readinto(value.view(-1).view(torch.uint8).numpy()) != value.nbytes:
                raise CheckpointError(f"{self.path}: {name} is truncated")
        return value

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError unless the file holds exactly these tensors, of these shapes."""
        stored = {n: s for name, shape in shapes.items() for n, s in entries(name, shape).items()}
        check_names(self.path, set(self.entries), set(stored))
        for name, shape in stored.items():
            check_shape(self.path, name, self.entries[name][1], shape)


def read_tensors(path: Path) -> dict[str, Tensor]:
    file = TensorFile(path)
    return {name: file.read(name) for name in file.entries}


def check_names(file: Path, found: set[str], expected: set[str]) -> None:
    for what, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            raise CheckpointError(f"{file}: {len(names)} tensors {what}, first {min(names)}")


def check_shape(file: Path, name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    found, expected = tuple(found), tuple(expected)
    if found != expected:
        raise CheckpointError(f"{file}: {name} has shape {found}, expected {expected}")
