"""Evaluates a trained model: loss on any text, accuracy on multiple-choice questions."""

import logging
import math
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanonormuon.data import validation_targets
from nanonormuon.errors import CheckpointError, DataError, UsageError
from nanonormuon.evaluate import bits_per_byte, validation_loss
from nanonormuon.model import GPT, IGNORE
from nanonormuon.pretrained import breakdown, models, multiple_choice
from nanonormuon.runtime import distributed
from nanonormuon.storage import checkpoints, shards
from nanonormuon.storage.files import as_json, check_plain, locked, progress, replace_file
from nanonormuon.storage.shards import Split
from nanonormuon.text.sources import documents
from nanonormuon.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

RESULTS = "evaluations.json"
# fields of a result that others rely on; not each result has all
BLANK: dict[str, Any] = dict.fromkeys(("path", "field", "dtype"), "")
BLANK |= dict.fromkeys(("loss", "accuracy", "accuracy_stderr"), 0.0)
BLANK |= dict.fromkeys(("tokens", "questions", "window", "stride"), 0)
# results that differ in one of these are kept beside each other
IDENTITY = ("path", "field", "step", "dtype", "window", "stride", "tokens")


def evaluate(
    path: Path,
    data: Sequence[Path] = (),
    texts: Sequence[Path] = (),
    questions: Sequence[Path] = (),
    window: int = 0,
    stride: int = 0,
    max_tokens: int = 0,
    device: str = "auto",
    text_field: str = "text",
    detail: bool = False,
) -> list[dict[str, Any]]:
    """Measure a model on each set: validation splits of prepared directories (`data`); documents
    of files and directories (`texts`, see sources.documents); files of multiple-choice questions.
    Without any set, on the validation split of the run's data (also after data.tuning).

    window: context length (0: as in training). stride: tokens that each window predicts (0:
    window); see evaluate.validation_loss. max_tokens: targets per set (0: all). detail: add the
    breakdown of each loss, which needs the run's training text. Returns one result per set, and
    adds them to the run's evaluations.json. Raises DataError, CheckpointError, UsageError.
    """
    if run := models.run_of(path):
        kept(run / RESULTS)  # fail early if the file is damaged
    world = distributed.start(device)
    model, tokenizer, found = models.load_run(path, torch.float32, world.device)
    state = models.state_of(found)
    settings = {"train": {}, "data": {}} | (state or {}).get("config", {})
    wish = settings["train"].get("dtype", "auto")
    model.compute_dtype = distributed.compute_dtype(wish, world.device)
    if settings["data"].get("document_mask"):  # as in training
        model.separator = tokenizer.eot
    window = window or models.context_of(found)
    stride = stride or window
    if not 0 < stride <= window:
        raise UsageError(f"--stride {stride}: expected 1 to --window {window}")
    own = not (data or texts or questions)
    limit = max_tokens or (settings["data"].get("val_tokens", 0) if own else 0)
    train = models.data_of(state, tokenizer).train if detail else None
    measure = partial(on_split, model, tokenizer, world, window, stride, limit, train=train)
    results = []
    for source in [None] if own else data:
        split = models.data_of(state, tokenizer, source).val
        home = split.paths[0].parent
        results.append({"set": home.name if own else str(source), **measure(split), "path": home})
    field = {} if text_field == "text" else {"field": text_field}
    for file in texts:
        split = read_text(file, tokenizer, text_field)
        results.append({"set": str(file), **measure(split), "path": file, **field})
    for file in questions:
        scores = multiple_choice.accuracy(model, tokenizer, multiple_choice.read(file), window)
        results.append({"set": str(file), **scores, "window": window, "path": file})
    for result in results:
        result["path"] = os.path.realpath(result["path"])
        result["step"] = state["step"] if state else None
        result["dtype"] = str(model.compute_dtype).removeprefix("torch.")
    if run:
        keep(run / RESULTS, results)
    return results


def on_split(
    model: GPT,
    tokenizer: Tokenizer,
    world: distributed.World,
    window: int,
    stride: int,
    limit: int,
    split: Split,
    train: Split | None = None,
) -> dict[str, Any]:
    """Compute loss, perplexity and bits per byte on the first `limit` targets of a split (0: all),
    and, given the training split, the breakdown of the loss."""
    ids = model.config.vocab_size
    split.vocab_size = min(ids, split.vocab_size or ids)  # rejects larger ids in any batch
    text_bytes = split.text_bytes(tokenizer, limit)
    expected = validation_targets(split, limit)
    batch = max(1, min(64, 8192 // window, expected // stride))
    with progress("evaluating", expected, "token") as bar:

        def forward(tokens: Tensor, targets: Tensor, reduction: str) -> Tensor:
            bar.update(int((targets != IGNORE).sum()))
            return model(tokens, targets, reduction=reduction)

        loss, targets = validation_loss(forward, split, window, batch, world, limit, stride)
    detail = {}
    if train is not None:
        detail["breakdown"] = breakdown.measure(model, split, train, window, stride, limit)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": bits_per_byte(loss, targets, text_bytes),
        "tokens": targets,
        "bytes": text_bytes,
        "window": window,
        "stride": stride,
        **detail,
    }


def read_text(file: Path, tokenizer: Tokenizer, text_field: str = "text") -> Split:
    """Encode the documents of a file or directory as a split of one shard. Raises DataError."""
    parts, size = [], 0
    try:
        for document in documents([file], text_field=text_field):
            parts.append(np.array([tokenizer.eot, *tokenizer.encode(document.data, document.name)]))
            size += len(document.data)
    except DataError as error:  # without advice on options that only `prepare` has
        raise type(error)(re.split(r"(?: \(|; )prepare --", str(error))[0]) from None
    if not parts:
        raise DataError(f"{file}: empty, expected text")
    return Split([file], [np.concatenate(parts)], bytes=size)


def describe(result: dict[str, Any]) -> str:
    """Format a result as one line, followed by its breakdown."""
    if "questions" in result:
        names = "accuracy", "accuracy_normalised"
        plain, other = (f"{result[n]:.4f} ± {result[f'{n}_stderr']:.4f}" for n in names)
        measures = f"accuracy {plain}, length-normalised {other}"
        return f"{result['set']}: {measures} ({result['questions']:,} questions)"
    bpb = result["bits_per_byte"]
    per_byte = "" if bpb is None else f", {bpb:.4f} bits per byte"
    measures = f"loss {result['loss']:.4f}, perplexity {result['perplexity']:.2f}{per_byte}"
    how = f"{result['tokens']:,} tokens, window {result['window']}, stride {result['stride']}"
    more = breakdown.describe(result["breakdown"]) if "breakdown" in result else []
    return "\n".join([f"{result['set']}: {measures} ({how})", *more])


def kept(file: Path) -> list[dict[str, Any]]:
    """Read the results in an evaluations.json, if it exists. Raises CheckpointError."""
    if not file.exists():
        return []
    results = checkpoints.read_json(file).get("results")
    try:
        shards.check_shape(results, [{"set": str}], "results")
        for result in results:
            if not {"loss", "accuracy"} & result.keys():
                raise ValueError(f"a result without loss or accuracy: {result!s:.80}")
            known = {name: value for name, value in result.items() if value == value}  # NaN fits
            shape = {name: type(value) for name, value in BLANK.items()}
            shards.check_shape(BLANK | known, shape, "result")
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}; move the file away to continue") from None
    return results


def keep(file: Path, results: Sequence[dict[str, Any]]) -> None:
    """Add results to evaluations.json, replacing those of equal IDENTITY. Only warns if it fails,
    so that results are not lost."""
    identity = [[result.get(name) for name in IDENTITY] for result in results]
    guard = file.with_name(f".{file.name}.lock")  # against simultaneous evaluations
    try:
        check_plain([guard])
        with locked(guard, wait=True):
            others = [r for r in kept(file) if [r.get(name) for name in IDENTITY] not in identity]
            replace_file(file, as_json({"results": [*others, *results]}))
    except (OSError, CheckpointError, DataError) as error:
        log.warning(f"warning: the results are not saved: {error}")
