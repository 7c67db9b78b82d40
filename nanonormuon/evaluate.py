"""The loss on text: a run's validation split, every target once, summed over all ranks; and any
other text afterwards."""

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nanonormuon import errors
from nanonormuon.data import validation_batches
from nanonormuon.errors import DataError, UsageError
from nanonormuon.model import GPT, IGNORE
from nanonormuon.pretrained import models as pretrained
from nanonormuon.pretrained import multiple_choice as choices
from nanonormuon.runtime import distributed
from nanonormuon.storage import checkpoints as checkpoint
from nanonormuon.storage.files import replace_file
from nanonormuon.storage.shards import Split
from nanonormuon.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

RESULTS = "evaluations.json"


@torch.no_grad()
def validation_loss(
    forward: Callable[..., torch.Tensor],
    split: Split,
    seq_len: int,
    batch: int,
    world: distributed.World,
    max_tokens: int = 0,
) -> tuple[float, int]:
    """Mean cross entropy in nats and the number of targets it is the mean of.

    forward(tokens, targets, reduction="sum") -> scalar, as GPT. Windows of seq_len tokens do not
    overlap, so a token is predicted from at most seq_len and on average half as many before it.
    """
    losses, targets_seen = [], 0
    for tokens, targets in validation_batches(
        split, seq_len, batch, world.rank, world.size, max_tokens
    ):
        targets_seen += int((targets != IGNORE).sum())
        tokens, targets = tokens.to(world.device), targets.to(world.device)
        losses.append(forward(tokens, targets, reduction="sum"))
    split.settle()
    # float32 carries the two sums exactly enough: each rank's is rounded once, here
    nats = float(torch.stack(losses).cpu().double().sum()) if losses else 0.0
    sums = torch.tensor([nats, float(targets_seen)], dtype=torch.float64)
    if world.size > 1:
        sums = distributed.total(sums.to(world.device))
    return float(sums[0] / sums[1]), int(sums[1])


def bits_per_byte(loss: float, targets: int, text_bytes: int | None) -> float | None:
    """Nats per token -> bits per byte of the text; comparable across tokenizers. The separators'
    bits count, although they are no text. None where the number of bytes is not known."""
    return loss * targets / (math.log(2) * text_bytes) if text_bytes else None


def count_bytes(split: Split, token_lengths: np.ndarray | None, max_tokens: int = 0) -> int | None:
    """UTF-8 bytes of the text behind a split's targets, from the length of each token; None where
    tokens have no length of their own."""
    if token_lengths is None:
        return None
    total, left = 0, max_tokens or split.tokens
    for i, shard in enumerate(split.shards):
        for start in range(1, len(shard), 1 << 24):  # the first token of a shard is never a target
            part = shard[start : min(len(shard), start + (1 << 24), start + left)]
            if not len(part):
                return total
            if int(part.max()) >= len(token_lengths):
                raise DataError(
                    f"{split.names[i]}: id {int(part.max())} found, data.tokenizer has only "
                    f"{len(token_lengths)}: it is not what made these shards"
                )
            total += int(token_lengths[part].sum())
            left -= len(part)
    return total


# ------------------------------------------------------------------------------------------------
# A trained model on any text


def evaluate(
    path: Path,
    data: Sequence[Path] = (),
    texts: Sequence[Path] = (),
    questions: Sequence[Path] = (),
    window: int = 0,
    stride: int = 0,
    max_tokens: int = 0,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """One result per set: prepared directories' validation splits, raw text files, multiple-choice
    files. Without any: the validation split of the run's data (also of one that had data.tuning,
    and so measured itself elsewhere).

    window: tokens in sight at most (0: as trained); stride: tokens predicted per window (0: all of
    it; less gives each at least window - stride before it, and costs window / stride as much).
    max_tokens: targets per set (0: all). Results of a run are kept in its evaluations.json, unless
    that cannot be written, which is a warning. Raises DataError, CheckpointError, UsageError.
    """
    if run := pretrained.run_of(path):
        kept(run / RESULTS)  # damage is told before anything is computed
    where = distributed.start(device).device
    found = pretrained.find_checkpoint(path)
    state = pretrained.state_of(found)
    settings = (state or {}).get("config", {})
    dtype = distributed.compute_dtype(settings.get("train", {}).get("dtype", "auto"), where)
    model, tokenizer, _ = pretrained.load_found(found, dtype, where)
    if settings.get("data", {}).get("document_mask"):  # as in training
        model.separator = tokenizer.eot
    window = window or pretrained.context_of(found)
    stride = stride or window
    if not 0 < stride <= window:
        raise UsageError(f"--stride {stride}: expected 1 to --window {window}")
    own = not (data or texts or questions)
    results = []
    for source in [None] if own else data:
        split = pretrained.data_of(state, tokenizer, source).val
        limit = max_tokens or (settings["data"]["val_tokens"] if own else 0)
        name = str(split.paths[0].parent.name if own else source)
        results.append(on_split(model, tokenizer, name, split, window, stride, limit))
    for source in texts:
        results.append(on_text(model, tokenizer, source, window, stride, max_tokens))
    for source in questions:
        result = choices.accuracy(model, tokenizer, choices.read(Path(source)), window)
        results.append({"set": str(source), **result, "window": window, "path": Path(source)})
    how = {"step": None if state is None else state["step"]}
    how["dtype"] = str(dtype).removeprefix("torch.")
    results = [{**r, **how, "path": str(r["path"].resolve())} for r in results]
    if run:
        try:
            keep(run / RESULTS, results)
        except (OSError, errors.CheckpointError) as error:  # computed is computed
            log.warning(f"warning: the results are not kept: {error}")
    return results


def on_split(
    model: GPT, tokenizer: Tokenizer, name: str, split: Split, window: int, stride: int, limit: int
) -> dict[str, Any]:
    """The result on a prepared split, of which nothing is believed unchecked."""
    text_bytes = None if limit else split.bytes
    if text_bytes is None:
        text_bytes = count_bytes(split, tokenizer.token_lengths(), limit)
    for shard in range(len(split.shards)):
        split.check(shard)
    loss, targets = loss_on(model, split.shards, window, stride, limit)
    split.settle()
    return as_result(name, split.paths[0].parent, loss, targets, text_bytes, window, stride)


def on_text(
    model: GPT, tokenizer: Tokenizer, file: Path, window: int, stride: int, limit: int
) -> dict[str, Any]:
    """The result on a text file, or its first `limit` tokens. Raises DataError if there is no text
    to read."""
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}, expected a text file") from None
    tokens = np.array([tokenizer.eot, *tokenizer.encode(content)])
    if limit and len(tokens) > limit:
        tokens = tokens[: limit + 1]
        content = tokenizer.decode_bytes(tokens[1:].tolist())
    if not content:
        raise DataError(f"{file}: empty, expected text")
    loss, targets = loss_on(model, [tokens], window, stride)
    return as_result(str(file), Path(file), loss, targets, len(content), window, stride)


def as_result(
    name: str, path: Path, loss: float, targets: int, text_bytes: int, window: int, stride: int
) -> dict[str, Any]:
    return {
        "set": name,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": bits_per_byte(loss, targets, text_bytes),
        "tokens": targets,
        "bytes": text_bytes,
        "window": window,
        "stride": stride,
        "path": path,
    }


def describe(result: dict[str, Any]) -> str:
    """A result as one line."""
    if "questions" in result:
        plain, normalised = (
            f"{result[name]:.4f} ± {result[f'{name}_stderr']:.4f}"
            for name in ("accuracy", "accuracy_normalised")
        )
        n = result["questions"]
        return (
            f"{result['set']}: accuracy {plain}, length-normalised {normalised} ({n:,} questions)"
        )
    bpb = result["bits_per_byte"]
    return (
        f"{result['set']}: loss {result['loss']:.4f}, perplexity {result['perplexity']:.2f}, "
        + (f"{bpb:.4f} bits per byte " if bpb is not None else "")
        + f"({result['tokens']:,} tokens, window {result['window']}, stride {result['stride']})"
    )


def loss_on(
    model: GPT, shards: Sequence[np.ndarray], window: int, stride: int, max_tokens: int = 0
) -> tuple[float, int]:
    """Mean cross entropy in nats over all tokens (each shard's first is none of them) or the first
    max_tokens, and their number."""
    batch = max(1, min(64, 8192 // window))
    device = model.embed_tokens.weight.device
    total, seen = 0.0, 0
    rows = list(sliding(shards, window, stride, max_tokens))
    bar = range(0, len(rows), batch)
    with torch.no_grad():
        for start in tqdm(bar, unit="batch", leave=False, disable=not sys.stderr.isatty()):
            part = rows[start : start + batch]
            tokens = torch.zeros(len(part), window, dtype=torch.int64)
            targets = torch.full_like(tokens, IGNORE)
            for i, (shard, offset, first, stop) in enumerate(part):
                ids = torch.from_numpy(shards[shard][offset : stop + 1].astype(np.int64))
                if int(ids.max()) >= model.config.vocab_size:
                    raise DataError(
                        f"token {int(ids.max())} found, the model has {model.config.vocab_size}"
                    )
                tokens[i, : len(ids) - 1], targets[i, : len(ids) - 1] = ids[:-1], ids[1:]
                targets[i, : first - offset - 1] = IGNORE  # predicted in the window before
            seen += int((targets != IGNORE).sum())
            total += float(model(tokens.to(device), targets.to(device), reduction="sum"))
    if not seen:
        raise DataError("no token to predict: expected at least two")
    return total / seen, seen


def sliding(
    shards: Sequence[np.ndarray], window: int, stride: int, max_tokens: int = 0
) -> Iterator[tuple[int, int, int, int]]:
    """Windows that predict every token but its shard's first exactly once: (shard, offset, first,
    stop) sees the tokens offset to stop - 1 and predicts the tokens first to stop."""
    left = max_tokens or sum(map(len, shards))
    for i, shard in enumerate(shards):
        last = min(len(shard) - 1, left)  # the last token predicted
        left -= max(last, 0)
        done = offset = 0
        while done < last:
            stop = min(last, offset + window)
            yield i, offset, done + 1, stop
            done, offset = stop, offset + stride


def kept(file: Path) -> list[dict[str, Any]]:
    """The results in an evaluations.json, if there is one. Raises CheckpointError naming it."""
    found = checkpoint.read_json(file).get("results") if file.exists() else []
    if not isinstance(found, list) or not all(
        isinstance(r, dict) and "set" in r and ("loss" in r or "accuracy" in r) for r in found
    ):
        raise errors.CheckpointError(f"{file}: no list of results; move it away to go on")
    return found


def keep(file: Path, results: Sequence[dict[str, Any]]) -> None:
    """Add results to evaluations.json; one of the same set, step, type and windows is replaced."""

    def key(result: dict[str, Any]) -> tuple:
        names = ("path", "step", "dtype", "window", "stride", "tokens")
        return tuple(result.get(name) for name in names)

    new = {key(r) for r in results}
    merged = [r for r in kept(file) if key(r) not in new] + list(results)
    replace_file(file, (json.dumps({"results": merged}, indent=1) + "\n").encode())
