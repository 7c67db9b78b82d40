"""Checkpoint directories, published atomically and verified before use.

    checkpoints/step-000500/
        model.safetensors      weights by Hugging Face names, in float32 or model.embed_dtype
        optimizer.safetensors  every optimizer buffer, as <parameter>.<buffer>
        config.json, tokenizer files: with the weights, a Hugging Face model directory
        modeling_nanonormuon.py  the model's source, unless transformers has the architecture
        state.json             step, tokens, configuration, fingerprints of data and tokenizer
        manifest.json          size and sha256 of every file above; written last

This module treats files as named bytes; nanonormuon/checkpoint.py converts models and optimizers.
Data order and random state are not stored: both are functions of (seed, step).
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nanonormuon.errors import CheckpointError, DataError
from nanonormuon.storage import files

log = logging.getLogger(__name__)

FORMAT = 1
REQUIRED = ("model.safetensors", "optimizer.safetensors", "state.json", "config.json")


def step_of(path: Path) -> int | None:
    match = re.fullmatch(r"step-(\d{6,15})", path.name, re.ASCII)
    return int(match[1]) if match else None


def all_steps(folder: Path) -> list[Path]:
    """List the checkpoints in a folder by increasing step; other entries are ignored."""
    entries = folder.iterdir() if folder.is_dir() else ()
    found = [p for p in entries if step_of(p) is not None and p.is_dir()]
    return sorted(found, key=lambda p: step_of(p) or 0)


def write(folder: Path, step: int, content: Mapping[str, bytes | Iterable]) -> Path:
    """Publish the files `content`, each whole or in pieces, as folder/step-NNNNNN.

    Data, manifest and rename reach the disk in this order, so that a crash cannot publish a partial
    checkpoint. Raises OSError.
    """
    target = folder / f"step-{step:06d}"
    with files.publish(target) as partial:
        entries = {n: files.write_durably(partial / n, data) for n, data in content.items()}
        files.sync_directory(partial)
        manifest = {"format": FORMAT, "step": step, "files": entries}
        text = json.dumps(manifest, indent=1)
        files.write_durably(partial / "manifest.json", text.encode())
        if target.exists():  # damaged, or the run would have resumed from it
            os.replace(target, aside := folder / f".damaged-{target.name}-{os.getpid()}")
            log.warning("%s: a damaged checkpoint, moved to %s", target, aside)
    return target


def verify(path: Path, show: bool = True) -> dict[str, Any]:
    """Check every byte of a checkpoint, with a progress bar if `show`, and return its state.json.
    Raises CheckpointError."""
    listing = path / "manifest.json"
    if path.is_symlink() or listing.is_symlink():
        raise CheckpointError(f"{path}: the directory or its manifest.json is a symbolic link")
    manifest = read_json(listing)
    expected = {"format": FORMAT, "step": step_of(path)}
    found, listed = {key: manifest.get(key) for key in expected}, manifest.get("files")
    if found != expected or not isinstance(listed, dict):
        raise CheckpointError(f"{listing}: expected {expected} and a list of files, found {found}")
    for name, entry in listed.items():
        if not re.fullmatch(r"\w[\w.-]{0,99}", name, re.ASCII):
            raise CheckpointError(f"{listing}: unsafe file name {name[:99]!r}")
        file, digest = path / name, hashlib.sha256()
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file}: missing or no regular file, but listed in the manifest")
        size = file.stat().st_size
        with open(file, "rb") as content, files.progress("verifying", size, "B", show) as bar:
            while piece := content.read(1 << 20):
                digest.update(piece)
                bar.update(len(piece))
        if (found := {"size": size, "sha256": digest.hexdigest()}) != entry:
            problem = f"found {found}, expected {str(entry)[:200]} (manifest.json)"
            raise CheckpointError(f"{file}: {problem}")
    if missing := [name for name in REQUIRED if name not in listed]:
        raise CheckpointError(f"{listing}: does not list {missing[0]}")
    state = read_json(path / "state.json")
    if state.get("step") != manifest["step"]:
        problem = f"step {state.get('step')!r}, expected {manifest['step']}"
        raise CheckpointError(f"{path / 'state.json'}: {problem}")
    return state


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a regular file of limited size. Raises CheckpointError, OSError."""
    try:
        content = json.loads(files.read_file(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete") from None
    except DataError as error:
        raise CheckpointError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Find the newest intact checkpoint and its state, logging damaged ones. Raises
    CheckpointError, with every reason, if there is none."""
    failures = []
    for path in reversed(all_steps(folder)):
        try:
            return path, verify(path)
        except (CheckpointError, OSError) as error:
            log.error("damaged checkpoint: %s; trying the previous one", error)
            failures.append(str(error))
    found = "; ".join(failures) or "it contains no step-NNNNNN directory"
    raise CheckpointError(f"{folder}: no usable checkpoint ({found})")


def sweep(folder: Path) -> None:
    """Remove what a killed process left half written or half deleted. Only for the run's writer."""
    for path in [*folder.glob(".partial-step-*"), *folder.glob(".deleting-step-*")]:
        shutil.rmtree(path, ignore_errors=True)


def retain(
    folder: Path, keep_last: int, step: int, keep_every: int = 0, best: int | None = None
) -> None:
    """Delete old checkpoints up to `step`, the one just written, if that is intact.

    Keeps the last `keep_last` (0: all), multiples of keep_every, and the best. Ignores later steps,
    which a run that fell back to an earlier checkpoint has left. Renames each directory before
    deleting it, so that a partly deleted one is never listed.
    """
    ours = [p for p in all_steps(folder) if (step_of(p) or 0) <= step]
    old = ((p, step_of(p)) for p in (ours[:-keep_last] if keep_last else []))
    doomed = [p for p, n in old if n != best and (not keep_every or n % keep_every)]
    if doomed:
        verify(ours[-1], show=False)  # training has a bar
    for path in doomed:
        hidden = folder / f".deleting-{path.name}"
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def check_space(folder: Path, size: int, keep_last: int, saves: int) -> None:
    """Raise OSError unless the disk has room for the `saves` checkpoints still to come: those to
    keep and one more, since a new one is written before the oldest is deleted."""
    copies = min(saves, max(1, (keep_last or 1) + 1 - len(all_steps(folder))))
    place = next(p for p in (folder, *folder.parents) if p.exists())
    if (free := shutil.disk_usage(place).free) < copies * size:
        expected = f"expected room for {copies} checkpoints of {files.in_units(size)}"
        hint = "free some space, lower train.keep_last, or choose another --out"
        raise OSError(errno.ENOSPC, f"{files.in_units(free)} free, {expected}; {hint}", str(folder))
