"""Tensors on disk and across ranks: safetensors files, read tensor by tensor; whole and sharded."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from nanonormuon.errors import CheckpointError
from nanonormuon.normuon import local as local

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
    """Reads the tensors of safetensors files one by one, after checking the headers against the
    files' sizes. Raises CheckpointError.

    safetensors' own reader checks the headers only. It maps a file into memory, so that SIGBUS
    would kill the process if the file shrank while tensors are read.
    """

    def __init__(self, path: Path, *more: Path):
        self.path = path.parent if more else path  # for messages
        self.entries: dict[str, tuple[torch.dtype, tuple[int, ...], int, Path]] = {}
        kinds = {text: dtype for dtype, text in DTYPES.items()}
        for file in (path, *more):
            if not file.is_file():  # opening a pipe would wait for its writer
                raise CheckpointError(f"{file}: missing or not a regular file")
            try:
                with safe_open(file, "numpy"), open(file, "rb") as content:
                    length = int.from_bytes(content.read(8), "little")
                    header = json.loads(content.read(length))
                header.pop("__metadata__", None)
                for name, entry in header.items():
                    begin = 8 + length + entry["data_offsets"][0]
                    self.entries[name] = kinds[entry["dtype"]], tuple(entry["shape"]), begin, file
            except (SafetensorError, KeyError, ValueError) as error:
                reason = str(error)[:200]
                raise CheckpointError(
                    f"{file}: not a readable safetensors file ({reason})"
                ) from None

    def read(self, name: str) -> Tensor:
        """Read a tensor, or all entries of a name with a "#"."""
        if "#" in name:
            first, last = name.split("#")
            count = sum(n.startswith(first) and n.endswith(last) for n in self.entries)
            return torch.stack([self.read(name.replace("#", str(i))) for i in range(count)])
        dtype, shape, begin, path = self.entries[name]
        value = torch.empty(shape, dtype=dtype)
        with open(path, "rb") as file:
            file.seek(begin)
            if file.readinto(value.view(-1).view(torch.uint8).numpy()) != value.nbytes:
                raise CheckpointError(f"{path}: {name} is truncated")
        return value

    def expect(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise CheckpointError unless the files hold exactly these tensors, of these shapes."""
        expected = {n: s for name, shape in shapes.items() for n, s in entries(name, shape).items()}
        found = {name: shape for name, (_, shape, *_) in self.entries.items()}
        missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
        for problem, names in (("missing", missing), ("unexpected", unexpected)):
            if names:
                listed = f"{len(names)} tensors {problem}, first {min(names)}"
                raise CheckpointError(f"{self.path}: {listed}")
        for name, shape in expected.items():
            if found[name] != shape:
                problem = f"{name} has shape {found[name]}, expected {shape}"
                raise CheckpointError(f"{self.path}: {problem}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    file = TensorFile(path)
    return {name: file.read(name) for name in file.entries}
