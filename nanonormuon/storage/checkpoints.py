"""Checkpoints: directories that are complete or absent, verified before anything is used.

    checkpoints/step-000500/
        model.safetensors      weights, float32 or model.embed_dtype, by Hugging Face's names
        optimizer.safetensors  every optimizer buffer, as <parameter>.<buffer>
        config.json, tokenizer files: with the weights, a Hugging Face model directory
        state.json             step, tokens, configuration, fingerprints of data and tokenizer
        manifest.json          size and sha256 of all of these; written last

Here a file is bytes with a name; the package's checkpoint.py turns a model and its optimizers into
the first two and back. Nothing about data order or randomness is stored: both are functions of
(seed, step).
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

from nanonormuon.errors import CheckpointError
from nanonormuon.storage.files import naming, publish, settle, sync_directory, write_durably

log = logging.getLogger(__name__)

FORMAT = 1
JSON_LIMIT = 1 << 26  # bytes of a JSON file or header that anything is believed of


def step_of(path: Path) -> int | None:
    match = re.fullmatch(r"step-(\d{6,15})", path.name, re.ASCII)
    return int(match[1]) if match else None


def all_steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by rising step; other entries are ignored."""
    entries = folder.iterdir() if folder.is_dir() else ()
    found = [p for p in entries if step_of(p) is not None and p.is_dir()]
    return sorted(found, key=lambda p: step_of(p) or 0)


def write(folder: Path, step: int, files: Mapping[str, bytes | Iterable]) -> Path:
    """Publish `files`, each given whole or piece by piece, as folder/step-NNNNNN.

    Digests are of what is in memory, not of what was read back. The order (data, manifest, rename,
    each waited for) leaves no moment in which a crash could publish a part. Raises OSError, with
    every older checkpoint intact.
    """
    target, entries = folder / f"step-{step:06d}", {}
    with publish(target) as partial:
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
        if target.exists():  # found damaged before, or this step would not be repeated
            os.replace(target, aside := folder / f".damaged-{target.name}-{os.getpid()}")
            log.warning("%s existed and was moved to %s", target, aside)
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
    """The newest checkpoint that verifies, and its state; logs each damaged one that it passes.

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
    """Remove what a killed process left half written or half deleted. Only the run's writer may."""
    for path in [*folder.glob(".partial-step-*"), *folder.glob(".deleting-step-*")]:
        shutil.rmtree(path, ignore_errors=True)


def retain(
    folder: Path, keep_last: int, step: int, keep_every: int = 0, best: int | None = None
) -> None:
    """Delete all checkpoints up to `step`, which was just written, but the last `keep_last` (0:
    all), those of every keep_every steps, and the best.

    Later checkpoints, left by a run that fell back behind them, do not count. Nothing is deleted
    before the newest has been read back and found whole; the name goes first, then the content.
    """
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
    """Raise OSError unless the disk has room for the checkpoints still to be made: those that will
    be kept, and one more, which is written before the oldest goes."""
    copies = max(1, (keep_last or 1) + 1 - len(all_steps(folder)))
    place = next(p for p in (folder, *folder.parents) if p.exists())
    if (free := shutil.disk_usage(place).free) < copies * size:
        raise OSError(
            errno.ENOSPC,
            f"{free / 1e9:.2f} GB free, expected room for {copies} checkpoints of "
            f"{size / 1e9:.2f} GB; free some, lower train.keep_last, or choose another --out",
            str(folder),
        )
