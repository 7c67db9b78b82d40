"""From a configuration to a run that is ready: sizes, model, optimizers, micro-batch, resume, and a
summary for the log. train.Trainer calls these functions in about this order."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanonormuon import checkpoint, optim
from nanonormuon.config import Config, differences, from_dict, load
from nanonormuon.data import Batches
from nanonormuon.engine import Engine
from nanonormuon.errors import ConfigError
from nanonormuon.model import GPT
from nanonormuon.runtime import distributed, memory
from nanonormuon.runtime.distributed import World
from nanonormuon.storage import huggingface
from nanonormuon.storage.run import aligned
from nanonormuon.storage.shards import Data, too_few
from nanonormuon.storage.tensors import TensorFile
from nanonormuon.text import corpus
from nanonormuon.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# FLOP of a run from which on compiling pays: some twenty minutes on two CPU cores, where it takes
# 20 to 40 s and saves 3 to 25 % of a step (docs/log.md), and some minutes on a large GPU
COMPILE_FROM = {"cpu": 4e14, "cuda": 3e16}


def complete(config: Config, data: Data) -> Config:
    """Fill in the vocabulary, from the data or with the whole model from train.init_from."""
    if config.train.init_from:
        from nanonormuon.pretrained import models  # few runs need it

        config = models.adopt(config)
    given, found = config.model.vocab_size, data.vocab_size
    if not found and not given:
        raise ConfigError(f"model.vocab_size = 0, and {data.path} does not say: set it")
    if given and found and given < found:
        hint = "leave it at 0 to take it from the data"
        if source := config.train.init_from:
            hint = f"prepare text with --tokenizer and the tokenizer.json of {source}"
        problem = f"the data in {data.path} have {found} token ids"
        raise ConfigError(f"model.vocab_size = {given}: {problem}; {hint}")
    vocab_size = given or -(-found // 64) * 64  # whole tiles for the largest product
    return replace(config, model=replace(config.model, vocab_size=vocab_size).resolved())


def split_batch(config: Config, ranks: int) -> int:
    """Sequences per rank and step. Raises ConfigError, with the nearest sizes that work, if
    batch_tokens does not divide."""
    T, tokens, micro = config.data.seq_len, config.train.batch_tokens, config.train.micro_batch
    unit = T * ranks * (1 if micro == "auto" else micro)
    if tokens % unit:
        near = [n for n in (tokens // unit * unit, (tokens // unit + 1) * unit) if n]
        raise ConfigError(
            f"train.batch_tokens = {tokens}: expected a multiple of {unit} (seq_len {T} x {ranks} "
            f"ranks x micro_batch {micro}); the nearest are {' or '.join(map(str, near))}"
        )
    return tokens // T // ranks


def make_engine(
    config: Config, tokenizer: Tokenizer | None, world: World, per_rank: int, state: dict | None
) -> tuple[Engine, int]:
    """Make the initialised model and its optimizers, and lay them out over the ranks.

    Also returns the micro-batch, in sequences per device: equal on every rank, and a divisor of
    per_rank. state: of the checkpoint to resume from.
    """
    train, dtype = config.train, distributed.compute_dtype(config.train.dtype, world.device)
    separator = corpus.separator(config, tokenizer)
    if huggingface.carried(config.model):
        huggingface.modeling()  # keep the source of this moment, not that of the first save

    def make_model() -> GPT:
        model = GPT(config.model, dtype)
        model.separator = separator
        if train.activation_checkpointing:
            from nanonormuon.runtime.activations import checkpoint_activations  # few runs need it

            checkpoint_activations(model)
        return model

    def make_optimizers(model: nn.Module) -> list[Optimizer]:
        return optim.make_optimizers(model, config.optim, dtype)

    def on_trial(device: torch.device) -> tuple[GPT, list[Optimizer]]:
        with device:
            model = make_model()
        return model, make_optimizers(model)

    if train.micro_batch != "auto":
        size = train.micro_batch
    elif state and state["ranks"] == world.size:
        size = state["micro_batch"]  # for equal roundings, also on a device with less room
    else:  # before there is an engine: a GPU's probe needs memory
        size = memory.choose(on_trial, config, per_rank, world)
    kind = Engine
    if train.canonical:
        from nanonormuon.runtime.bitwise import Bitwise  # few runs need it

        kind = Bitwise
    engine = kind(
        make_model().init_weights(train.seed).to(world.device), make_optimizers, world,
        parallel=train.parallel, dtype=dtype, reshard=train.reshard,
        grad_clip=config.optim.grad_clip, qk_clip=config.optim.qk_clip,
    )  # fmt: skip
    return engine, size


# ----------------------------------------------------------------------------------- Starting point


def load_checkpoint(
    path: Path, state: dict[str, Any], config: Config, data: Data, tokenizer: Tokenizer | None,
    engine: Engine,
) -> None:  # fmt: skip
    """Fill the engine from a verified checkpoint. Raises ConfigError with every difference if it is
    another run's."""
    lines = differences(from_dict(state["config"]), config)
    if state["data"] != data.fingerprint:
        lines.append(f"data: fingerprint {state['data'][:12]} -> {data.fingerprint[:12]}")
    if tokenizer is not None and state["tokenizer"] not in (None, tokenizer.hash):
        lines.append(f"tokenizer: hash {state['tokenizer'][:12]} -> {tokenizer.hash[:12]}")
    refuse(lines)
    steps, before = config.train.steps, state["config"]["train"]["steps"]
    if state["step"] > (last := config.train.last_step):
        name = "steps" if last == steps else "stop_at"
        raise ConfigError(f"train.{name} = {last}: {path} is at step {state['step']} already")
    if steps != before and engine.world.first:
        log.warning(f"train.steps: {before} -> {steps}; the schedule of the rest follows it")
    checkpoint.load_weights(engine.model, TensorFile(path / "model.safetensors"))
    checkpoint.load_optimizers(engine.optimizers, path)


def begin_with(config: Config, engine: Engine, tokenizer: Tokenizer | None) -> None:
    """Fill the engine with the weights of train.init_from."""
    from nanonormuon.pretrained import models

    models.begin_with(config, engine, tokenizer)


def refuse_other_settings(file: Path, config: Config) -> None:
    """Raise ConfigError if the config.toml of a run without checkpoints has other settings."""
    if file.is_file():
        refuse(differences(load([str(file)])[0], config), f" than {file} says")


def refuse(lines: Sequence[str], than: str = "") -> None:
    if lines:
        raise ConfigError(
            f"--resume: this would be another run{than}: {'; '.join(lines)}. "
            "Undo that, or start a new --out"
        )


# ------------------------------------------------------------------------ Compilation, introduction


def work(config: Config, model: GPT) -> float:
    """FLOP of the whole run; a resumed run counts the same, and so compiles or not alike."""
    per_token = model.flops_per_token(config.data.seq_len)
    return per_token * config.train.steps * config.train.batch_tokens


def compile_engine(
    config: Config, engine: Engine, trial: Callable[[], tuple[Tensor, Tensor]]
) -> float:
    """Compile the engine as train.compile says (auto: if it saves time); returns the seconds."""
    wish, device = config.train.compile, engine.world.device
    pays = work(config, engine.model) >= COMPILE_FROM.get(device.type, math.inf)
    if wish == "off" or (wish == "auto" and not pays):
        return 0.0
    from nanonormuon.runtime import compilation  # few runs need it

    return compilation.compile_engine(engine, trial)


def introduction(
    config: Config, data: Data, batches: Batches, engine: Engine, micro_batch: int
) -> list[str]:
    """Describe model, data, plan and optimizers in a few lines."""
    m, t, model, world = config.model, config.train, engine.model, engine.world
    epochs = max(batches.epochs(t.steps))  # of the source that has most
    parameters, unvisited = sum(p.numel() for p in model.parameters()), model.unvisited()
    active = f" ({(parameters - unvisited) / 1e6:.2f}M active)" if unvisited else ""
    lines = [
        f"model: {parameters / 1e6:.2f}M parameters{active}, {m.n_layer} layers, width {m.n_embd}, "
        f"vocabulary {m.vocab_size}; {str(model.compute_dtype).removeprefix('torch.')} on "
        f"{world.device}, {world.size} rank{'s' * (world.size > 1)}",
        f"data: {data.path}, {data.train.tokens:,} train and {data.val.tokens:,} validation tokens",
        f"plan: {t.steps:,} steps of {t.batch_tokens:,} tokens ({micro_batch} sequences at a time "
        f"per rank) = {epochs:.2f} epochs, {work(config, model):.2g} FLOP",
    ]
    few = too_few(train=data.train.tokens, val=data.val.tokens)
    lines += [f"warning: {problem}" for problem in few]
    if odd := huggingface.obstacles(m):
        way = "only normuon-train loads it"
        if huggingface.carried(m):
            file = huggingface.MODELING
            way = f"load it with trust_remote_code=True, which runs {file} in the checkpoint"
        lines.append(
            f"no transformers architecture can express this model ({', '.join(odd)}): {way}"
        )
    if epochs > 4:
        lines.append(
            f"warning: {epochs:.1f} epochs: beyond 4, repetition teaches little (arXiv 2305.16264)"
        )
    return [*lines, aligned(optim.group_rows(engine.optimizers, fold=True))]
