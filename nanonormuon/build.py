"""What is decided before the first step: data and tokenizer, sizes, compilation, where to
resume."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanonormuon import errors
from nanonormuon.config import Config, differences, from_dict, load, parse_number
from nanonormuon.data import SHARES, Batches
from nanonormuon.errors import ConfigError, DataError, TokenizerError
from nanonormuon.model import GPT
from nanonormuon.pretrained import models as pretrained
from nanonormuon.runtime import distributed, health
from nanonormuon.storage import checkpoints as checkpoint
from nanonormuon.storage import huggingface as hf
from nanonormuon.storage.shards import Data, open_data
from nanonormuon.text import builtin
from nanonormuon.text.tokenizer import Tokenizer
from nanonormuon.text.tokenizer import get as get_tokenizer
from nanonormuon.text.tokenizer import load as load_tokenizer

log = logging.getLogger(__name__)

# FLOP of a run from which on compiling pays: some twenty minutes on two CPU cores, where it takes
# 20 to 40 s and saves 3 to 25 % of a step (dev/LOG.md), and some minutes on a large GPU
COMPILE_FROM = {"cpu": 4e14, "cuda": 3e16}


def open_corpus(config: Config, world: distributed.World) -> tuple[Data, Tokenizer | None]:
    """The data with what is mixed in, and the tokenizer that made them, None if it is not known."""
    path = Path(config.data.path)
    if config.data.path.startswith("builtin:"):
        if config.data.path != "builtin:python":
            raise ConfigError(f'data.path = "{config.data.path}": did you mean "builtin:python"?')
        built = distributed.first_does(
            lambda: str(builtin.builtin_python(config.data.tokenizer)), world.device
        )
        path = Path(built)
    data, tokenizer, problem = open_directory(config, path)
    if tokenizer is None and world.first:
        log.warning(f"no samples and no bits per byte, data.tokenizer is not usable: {problem}")
    if share := config.data.tuning:
        data.train, data.val = data.train.cut(round((1 - share) * data.train.tokens))
        if min(data.train.tokens, data.val.tokens) < 2:
            raise DataError(
                f"data.tuning = {share}: leaves {data.train.tokens} tokens of {path} to learn "
                f"and {data.val.tokens} to judge by, expected at least 2 of each"
            )
    return mixed(config, data, tokenizer), tokenizer


def open_directory(config: Config, path: Path) -> tuple[Data, Tokenizer | None, str]:
    """One data directory; its tokenizer, or why there is none."""
    if (path / "manifest.json").exists() and config.data.format == "shards":
        data, tokenizer = open_data(path, None, config.data.verify), load_tokenizer(path)
        expected = data.manifest["tokenizer"]["hash"]
        if tokenizer.hash != expected:
            raise DataError(
                f"{path / 'tokenizer.json'}: hash {tokenizer.hash}, expected {expected} "
                "(manifest.json); prepare the data again"
            )
        return data, tokenizer, ""
    tokenizer, problem = None, ""
    try:
        tokenizer = get_tokenizer(config.data.tokenizer)
    except TokenizerError as error:
        problem = str(error)
    vocab_size = config.model.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    headerless = config.data.format == "nanogpt"
    return open_data(path, vocab_size, config.data.verify, headerless), tokenizer, problem


def mixed(config: Config, data: Data, tokenizer: Tokenizer | None) -> Data:
    """The data with the train splits of data.mix, which must have the same tokenizer."""
    identity: list[Any] = [data.fingerprint]
    for item in filter(None, map(str.strip, config.data.mix.split(","))):
        name, _, text = (part.strip() for part in item.rpartition("="))
        number = parse_number(text)
        share = round((number or 0) * SHARES)
        if not name or not 0 < share < SHARES:
            raise ConfigError(f'data.mix: "{item}": expected DIRECTORY=SHARE, 0 < share < 1')
        other, its, _ = open_directory(config, Path(name))
        if (its and its.hash) != (tokenizer and tokenizer.hash):
            raise DataError(
                f"{name}: tokenizer {its and its.hash[:12]}, expected that of {data.path},"
                f" {tokenizer and tokenizer.hash[:12]}; prepare it with --tokenizer {data.path}"
            )
        data.mix.append((other.train, share))
        identity.append([other.fingerprint, share])
    if sum(share for _, share in data.mix) >= SHARES:
        raise ConfigError(f'data.mix = "{config.data.mix}": expected shares of less than 1 in all')
    if data.mix and config.data.order != "shuffled":
        raise ConfigError("data.mix: expected with data.order = shuffled only")
    if data.mix:
        data.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return data


def separator(config: Config, data: Data, tokenizer: Tokenizer | None) -> int | None:
    """The token that attention does not cross."""
    if not config.data.document_mask:
        return None
    if data.manifest is None and tokenizer is None:
        raise ConfigError("data.document_mask: data.tokenizer must tell which token ends a text")
    return data.manifest["tokenizer"]["eot"] if data.manifest else tokenizer.eot


def complete(config: Config, data: Data) -> Config:
    """The configuration with the vocabulary that the data decide, or the model to begin with."""
    if (source := config.train.init_from) and not config.model.vocab_size:
        model = pretrained.model_config(pretrained.find_checkpoint(Path(source)))
        if (data.vocab_size or 0) > model.vocab_size:
            raise ConfigError(
                f"train.init_from = {source}: a model of {model.vocab_size} token ids, the data in "
                f"{data.path} have {data.vocab_size}: prepare them with the model's tokenizer"
            )
        config = replace(config, model=model)
    given, found = config.model.vocab_size, data.vocab_size
    if not found and not given:
        raise ConfigError(f"model.vocab_size = 0, and {data.path} does not tell it: give it")
    if given and found and given < found:
        raise ConfigError(
            f"model.vocab_size = {given}: the data in {data.path} have {found} token ids; "
            "leave it at 0 to take it from the data"
        )
    vocab_size = given or -(-found // 64) * 64  # whole tiles for the largest product
    return replace(config, model=replace(config.model, vocab_size=vocab_size).resolved())


def begin_with(
    path: Path, gpt: GPT, config: Config, tokenizer: Tokenizer | None, world: distributed.World
) -> None:
    """Fill the model with the weights found at `path`, if it and the data's tokenizer are that
    model's. Raises ConfigError or CheckpointError naming what is not."""
    found = Path(
        distributed.first_does(lambda: str(pretrained.find_checkpoint(path)), world.device)
    )
    model = pretrained.model_config(found)
    if lines := differences(Config(model=model), Config(model=config.model)):
        raise ConfigError(f"train.init_from = {path}: another model: {'; '.join(lines)}")
    pretrained.check_tokenizer(found, tokenizer)
    pretrained.load_weights(gpt, found)
    if world.first:
        log.info(f"weights of {found}")


def split_batch(config: Config, ranks: int) -> int:
    """Sequences per rank and step.

    Raises ConfigError, with the nearest sizes that work, if batch_tokens does not divide.
    """
    T, tokens, micro = config.data.seq_len, config.train.batch_tokens, config.train.micro_batch
    unit = T * ranks * (1 if micro == "auto" else micro)
    if tokens % unit:
        near = [n for n in (tokens // unit * unit, (tokens // unit + 1) * unit) if n]
        raise ConfigError(
            f"train.batch_tokens = {tokens}: expected a multiple of {unit} (seq_len {T} x {ranks} "
            f"ranks x micro_batch {micro}); the nearest are {' or '.join(map(str, near))}"
        )
    return tokens // T // ranks


def work(config: Config, model: GPT) -> float:
    """FLOP of the whole run, also where it is resumed: so it goes on in the same bits."""
    per_token = model.flops_per_token(config.data.seq_len)
    return per_token * config.train.steps * config.train.batch_tokens


def compiled(
    model: nn.Module,
    wish: str,
    flops: float,
    trial: Callable[[Callable], None],
    device: torch.device,
) -> tuple[Callable[..., Tensor], float]:
    """The model, through torch.compile if that is wanted and works; and the seconds it took. wish:
    train.compile, where auto compiles if that pays in a run of so many FLOP."""
    if wish == "off" or (wish == "auto" and flops < COMPILE_FROM.get(device.type, math.inf)):
        return model, 0.0
    start, failure = time.perf_counter(), ""
    fast = torch.compile(model, dynamic=False)
    distributed.sync_gradients(model, False)  # a rank that fails must not leave others waiting
    try:
        trial(fast)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler may raise; the model itself is tested
        lines = str(error).strip().splitlines() or [""]
        failure = f"{type(error).__name__}: {lines[0]}"
    finally:
        model.zero_grad(set_to_none=True)
    if distributed.largest([float(bool(failure))], device)[0]:
        log.warning("torch.compile failed, going on without it: %s", failure or "on another rank")
        fast = model
    return fast, time.perf_counter() - start


def introduction(
    config: Config,
    data: Data,
    batches: Batches,
    model: GPT,
    micro_batch: int,
    world: distributed.World,
) -> list[str]:
    """What is about to happen, in a few lines."""
    m, t = config.model, config.train
    epochs = max(batches.epochs(t.steps))  # of the source that has most
    parameters = sum(p.numel() for p in model.parameters())
    lines = [
        f"model: {parameters / 1e6:.2f}M parameters, {m.n_layer} layers, width {m.n_embd}, "
        f"vocabulary {m.vocab_size}; {str(model.compute_dtype).removeprefix('torch.')} on "
        f"{world.device}, {world.size} rank{'s' * (world.size > 1)}",
        f"data: {data.path}, {data.train.tokens:,} train and {data.val.tokens:,} validation tokens",
        f"plan: {t.steps:,} steps of {t.batch_tokens:,} tokens ({micro_batch} sequences at a time "
        f"per rank) = {epochs:.2f} epochs, {work(config, model):.2g} FLOP",
    ]
    if odd := hf.obstacles(m):
        lines.append(f"warning: Hugging Face's Qwen3 cannot load this model: {', '.join(odd)}")
    if epochs > 4:
        lines.append(
            f"warning: {epochs:.1f} epochs: beyond 4, repetition teaches little (arXiv 2305.16264)"
        )
    return lines


def where_to_resume(folder: Path, world: distributed.World) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from and its state, verified by the first rank; None if the run
    ended before its first one. Raises CheckpointError if there are some and none is usable."""

    def look() -> list[Any] | None:
        if not checkpoint.all_steps(folder):
            return None
        path, state = checkpoint.newest(folder)
        check_state(path / "state.json", state)
        return [str(path), state]

    found = distributed.first_does(look, world.device)
    return None if found is None else (Path(found[0]), found[1])


STATE = {"step": int, "seconds": float, "total_seconds": float, "ranks": int, "micro_batch": int,
         "config": dict, "data": str}  # fmt: skip


def check_state(file: Path, state: dict[str, Any]) -> None:
    """Raise CheckpointError for a state.json that is not one of ours, whatever its hash."""
    for key, kind in STATE.items():
        if type(state.get(key)) not in (kind, int if kind is float else kind):
            raise errors.CheckpointError(
                f"{file}: {key} = {str(state.get(key))[:80]}, expected {kind.__name__}"
            )
    try:
        health.Spikes(0.0, **state.get("spikes", {})).skip(1.0)
        from_dict(state["config"])
        if not isinstance(state.get("tokenizer"), str | None):
            raise ValueError("tokenizer: expected its hash")
    except (TypeError, ValueError) as error:
        raise errors.CheckpointError(f"{file}: {error}") from None


def refuse_other_settings(file: Path, config: Config) -> None:
    """The same for a run that was stopped before its first checkpoint, from its config.toml."""
    if file.is_file() and (lines := differences(load([str(file)])[0], config)):
        raise ConfigError(
            f"--resume: this would be another run than {file} says: {'; '.join(lines)}. "
            "Undo that, or start a new --out"
        )


def refuse_other_run(
    config: Config, state: dict[str, Any], data: Data, tokenizer: Tokenizer | None
) -> None:
    """Raise ConfigError with every difference that would make this another run."""
    lines = differences(from_dict(state["config"]), config)
    if state["data"] != data.fingerprint:
        lines.append(f"data: fingerprint {state['data'][:12]} -> {data.fingerprint[:12]}")
    if tokenizer is not None and state["tokenizer"] not in (None, tokenizer.hash):
        lines.append(f"tokenizer: hash {state['tokenizer'][:12]} -> {tokenizer.hash[:12]}")
    if lines:
        raise ConfigError(
            f"--resume: this would be another run: {'; '.join(lines)}. "
            "Undo that, or start a new --out"
        )
