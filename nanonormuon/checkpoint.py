"""Checkpoints: directories that are complete or absent, verified before anything is used.

    checkpoints/step-000500/
        model.safetensors      weights, float32, under Hugging Face's names
        optimizer.safetensors  every optimizer buffer, as <parameter>.<buffer>
        config.json, tokenizer files: with the weights, a Hugging Face model directory
        state.json             step, tokens, configuration, fingerprints of data and tokenizer
        manifest.json          size and sha256 of all of these; written last

Tensors are whole, whatever the number of ranks, so any layout resumes what any other saved. Nothing
about the data order or randomness is stored: both are functions of (seed, step).
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nanonormuon.hf import to_hf

log = logging.getLogger(__name__)

FORMAT = 1
ADAMW_STATE = ("exp_avg", "exp_avg_sq", "step")


class CheckpointError(ValueError):
    exit_code = 4


# ------------------------------------------------------------------------------------------------
# Directories


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the disk has the directory's entries (POSIX; elsewhere there is no such call)."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Exchange a small file in one step: a reader sees the old or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_durably(temporary, content)
    os.replace(temporary, path)
    sync_directory(path.parent)


def step_of(path: Path) -> int | None:
    match = re.fullmatch(r"step-(\d{6,})", path.name)
    return int(match[1]) if match else None


def all_steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by rising step; other entries are none of ours."""
    entries = folder.iterdir() if folder.is_dir() else ()
    found = [p for p in entries if step_of(p) is not None and p.is_dir()]
    return sorted(found, key=lambda p: step_of(p) or 0)


def write(folder: Path, step: int, files: Mapping[str, bytes]) -> Path:
    """Publish `files` as folder/step-NNNNNN. Digests are of what is in memory, not of what was read
    back. The order (data, manifest, rename, each waited for) leaves no moment in which a crash
    could publish a part. Raises OSError, with every older checkpoint intact."""
    target = folder / f"step-{step:06d}"
    partial = folder / f".partial-{target.name}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        entries = {}
        for name, content in files.items():
            write_durably(partial / name, content)
            entries[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
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
        if Path(name).name != name or name in (".", "..") or file.is_symlink():
            raise CheckpointError(f"{path / 'manifest.json'}: unsafe file name {name!r}")
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
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete") from None
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


def retain(folder: Path, keep_last: int, step: int) -> None:
    """Delete all but the last checkpoints up to `step`, just written; 0 keeps all. Later ones, left
    by a run that fell back behind them, do not count. First goes the name, then the content."""
    ours = [p for p in all_steps(folder) if (step_of(p) or 0) <= step]
    for path in ours[:-keep_last] if keep_last else []:
        doomed = folder / f".deleting-{path.name}"
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


# ------------------------------------------------------------------------------------------------
# Tensors


def local(t: Tensor) -> Tensor:
    """The part that this rank holds."""
    return t.to_local() if isinstance(t, DTensor) else t


def whole(t: Tensor) -> Tensor:
    """A tensor's full content on the CPU; for a sharded one all ranks must call this."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu().contiguous()


def collect(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], keep: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and optimizer buffers by name, for ranks with keep=True; all must take part."""
    weights, buffers = {}, {}
    for name, p in model.named_parameters():
        value = whole(p)
        if keep:
            weights[name] = value
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, p in zip(group["names"], group["params"]):
                for key, buffer in sorted(optimizer.state[p].items()):
                    value = whole(buffer)
                    if keep:
                        buffers[f"{name}.{key}"] = value
    return weights, buffers


def serialise(tensors: Mapping[str, Tensor]) -> bytes:
    return to_safetensors(dict(tensors), metadata={"format": "pt"})


def model_file(weights: Mapping[str, Tensor]) -> bytes:
    return serialise({to_hf(name): t for name, t in weights.items()})


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:  # read, not mapped: a mapped file that shrinks kills the process
        return from_safetensors(path.read_bytes())
    except OSError:
        raise
    except Exception as error:  # safetensors raises its own type for a damaged header
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, cut and placed as `like` is."""
    if isinstance(like, DTensor):
        mesh = like.device_mesh
        return distribute_tensor(value.to(mesh.device_type), mesh, like.placements)
    return value.to(like.device)


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a model of any layout from model.safetensors, whose names and shapes must be its own."""
    values = read_tensors(path / "model.safetensors")
    parameters = dict(model.named_parameters())
    check_names(path / "model.safetensors", set(values), {to_hf(name) for name in parameters})
    with torch.no_grad():
        for name, p in parameters.items():
            value = values[to_hf(name)]
            check_shape(path / "model.safetensors", to_hf(name), value, p)
            p.copy_(placed_like(value, p))


def load_optimizers(optimizers: Sequence[torch.optim.Optimizer], path: Path) -> None:
    """Fill optimizers of any layout from optimizer.safetensors, complete or not at all."""
    file = path / "optimizer.safetensors"
    values = read_tensors(file)
    expected = {
        f"{name}.{key}"
        for optimizer in optimizers
        for group in optimizer.param_groups
        for name, p in zip(group["names"], group["params"])
        for key in (optimizer.state[p] or ADAMW_STATE)  # AdamW makes its buffers at its first step
    }
    check_names(file, set(values), expected)
    for optimizer in optimizers:
        content = optimizer.state_dict()
        names = [name for group in optimizer.param_groups for name in group["names"]]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for index, (name, p) in enumerate(zip(names, params)):
            state = {}
            for key in optimizer.state[p] or ADAMW_STATE:
                value = values[f"{name}.{key}"]
                like = optimizer.state[p].get(key, p if value.shape == p.shape else value)
                check_shape(file, f"{name}.{key}", value, like)
                state[key] = placed_like(value, like)
            content["state"][index] = state
        optimizer.load_state_dict(content)


def check_names(file: Path, found: set[str], expected: set[str]) -> None:
    for what, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            raise CheckpointError(f"{file}: {len(names)} tensors {what}, first {min(names)}")


def check_shape(file: Path, name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise CheckpointError(
            f"{file}: {name} has shape {tuple(value.shape)}, expected {tuple(like.shape)}"
        )
