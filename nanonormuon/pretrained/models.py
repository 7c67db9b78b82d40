"""Finds, checks and loads a trained model of a run or in a Hugging Face directory."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanonormuon.checkpoint import check_state, load_weights, named_for_hf, weights_of
from nanonormuon.config import LIMITS, Config, differences
from nanonormuon.engine import Engine
from nanonormuon.errors import CheckpointError, ConfigError, DataError
from nanonormuon.model import GPT
from nanonormuon.parts.config import GPTConfig
from nanonormuon.runtime import distributed
from nanonormuon.storage import checkpoints
from nanonormuon.storage import huggingface as hf
from nanonormuon.storage.run import known_runs
from nanonormuon.storage.shards import Data, open_data
from nanonormuon.storage.tensors import TensorFile
from nanonormuon.text.builtin import builtin_data
from nanonormuon.text.huggingface import vocabulary
from nanonormuon.text.tokenizer import FILE as TOKENIZER_FILE
from nanonormuon.text.tokenizer import Tokenizer
from nanonormuon.text.tokenizer import load as load_tokenizer

log = logging.getLogger(__name__)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def find_checkpoint(path: Path) -> Path:
    """Return a run's newest intact checkpoint, or a verified checkpoint, or a Hugging Face model
    directory as it is. Raises CheckpointError."""
    if (path / "manifest.json").exists():
        if isinstance(checkpoints.read_json(path / "manifest.json").get("train"), dict):
            raise CheckpointError(f"{path}: expected a run or a model, found prepared data")
        checkpoints.verify(path)
        return path
    if (path / "checkpoints").is_dir():
        return checkpoints.newest(path / "checkpoints")[0]
    if (path / "config.json").is_file() and any((path / n).is_file() for n in (WEIGHTS, INDEX)):
        return path
    model = f"a model directory (with config.json and {WEIGHTS})"
    expected = f"expected a run directory (with checkpoints/), a checkpoint or {model}"
    raise CheckpointError(f"{path}: {expected}; {known_runs(path)}")


def run_of(path: Path) -> Path | None:
    """Return the run directory at `path`, or that of a checkpoint; None if there is none."""
    homes = (path, path.parent.parent) if checkpoints.step_of(path) is not None else (path,)
    return next((home for home in homes if (home / "config.toml").is_file()), None)


def state_of(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint's state.json; None for a model directory without it."""
    file = path / "state.json"
    return check_state(file, checkpoints.read_json(file)) if file.is_file() else None


def model_config(path: Path) -> GPTConfig:
    """Read the model's config, checked against the weights. Raises CheckpointError."""
    file = path / "config.json"
    content = checkpoints.read_json(file)
    try:
        config = hf.gpt_config(content)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from None
    open_weights(path, config)
    return config


def open_weights(path: Path, config: GPTConfig) -> TensorFile:
    """Open a model directory's weights, one file or those in its index, and compare their names and
    shapes with the config, so that it cannot cause a huge allocation. Raises CheckpointError."""
    names = {WEIGHTS}
    if not (path / WEIGHTS).is_file() and (path / INDEX).is_file():
        listed = checkpoints.read_json(path / INDEX).get("weight_map")
        names = set(map(str, listed.values())) if isinstance(listed, dict) else {""}
    for name in names:
        if not name or Path(name).name != name:
            raise CheckpointError(f"{path / INDEX}: unsafe file name {name!r}")
    weights = TensorFile(*(path / name for name in sorted(names)))
    layers = {n.split(".")[2] for n in weights.entries if n.startswith("model.layers.")}
    if len(layers) != config.n_layer:
        problem = f"{config.n_layer} layers, the weights have {len(layers)}"
        raise CheckpointError(f"{path / 'config.json'}: {problem}")
    redundant = {n for n in weights.entries if n.endswith("rotary_emb.inv_freq")}  # of Llama
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    if config.tied and {head, table} <= weights.entries.keys():
        redundant |= {head} if torch.equal(weights.read(head), weights.read(table)) else set()
    for name in redundant:
        del weights.entries[name]
    try:
        with torch.device("meta"):
            parameters = named_for_hf(weights_of(GPT(config)))
    except (TypeError, RuntimeError) as error:  # a setting of another type, or absurdly large
        raise CheckpointError(f"{path / 'config.json'}: no model: {error}") from None
    weights.expect({name: p.shape for name, p in parameters.items()})
    return weights


def context_of(path: Path) -> int:
    """Return the context length, in tokens, of a model's training. Raises CheckpointError."""
    file, name = path / "config.json", "max_position_embeddings"
    length, (low, high) = checkpoints.read_json(file).get(name), LIMITS["data.seq_len"]
    if type(length) is not int or not low <= length <= high:
        raise CheckpointError(f"{file}: {name} = {length!s:.60}: expected {low} to {high}")
    return length


def load_model(path: Path, dtype: torch.dtype, device: torch.device) -> GPT:
    """Load the model of a checkpoint or model directory, in float32 and computing in `dtype`."""
    config = model_config(path)
    model = GPT(config, dtype)
    load_weights(model, open_weights(path, config))
    return model.to(device).eval()


def load_run(path: Path, dtype: torch.dtype, device: torch.device) -> tuple[GPT, Tokenizer, Path]:
    """Load model and tokenizer of anything that find_checkpoint accepts; also returns its path."""
    found = find_checkpoint(path)
    if not (found / TOKENIZER_FILE).exists():
        hint = "set data.tokenizer in the run, for instance to gpt2"
        raise CheckpointError(f"{found}: no tokenizer (the run used shards without one): {hint}")
    return load_model(found, dtype, device), load_tokenizer(found), found


def check_tokenizer(path: Path, tokenizer: Tokenizer | None) -> None:
    """Raise CheckpointError unless all tokens of the data have equal ids in the model."""
    file = path / TOKENIZER_FILE
    if tokenizer is None:
        raise CheckpointError(f"{path}: the data's tokenizer is unknown: set data.tokenizer")
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; copy the model's own {TOKENIZER_FILE} there")
    try:
        ours, theirs = vocabulary(tokenizer.content), vocabulary(checkpoints.read_json(file))
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: not a tokenizer's vocabulary ({error})") from None
    if wrong := [(token, i) for token, i in ours.items() if theirs.get(token) != i]:
        token, i = wrong[0]
        first = f"first {token!r}: {i} in the data, {theirs.get(token)} in the model"
        other = f"{len(wrong)} of the data's {len(ours)} tokens have other ids here, {first}"
        raise CheckpointError(f"{file}: {other}; prepare the data with --tokenizer {file}")


def data_of(state: dict[str, Any] | None, tokenizer: Tokenizer, path: Path | None = None) -> Data:
    """Open the data directory at `path` (None: the training data in a run's `state`), which must be
    prepared with this tokenizer. Raises DataError."""
    headerless = False
    if path is None:
        settings = (state or {}).get("config", {}).get("data")
        if settings is None:
            hint = "give --data (evaluate: or --text)"
            raise DataError(f"the model's training data are unknown: {hint}")
        path, headerless = Path(settings["path"]), settings.get("format") == "nanogpt"
        if settings["path"].startswith("builtin:"):
            path = builtin_data(settings["path"], settings["tokenizer"])
        elif not path.is_dir():
            raise DataError(f"{path}: the run's data are missing: give --data")
    data = open_data(path, tokenizer.vocab_size, headerless=headerless)
    try:
        data.check_tokenizer(tokenizer)
    except DataError as error:
        raise DataError(f"{error} with the model's tokenizer, or use --text") from None
    return data


# ------------------------------------------------------------------------------- train.init_from


def adopt(config: Config) -> Config:
    """Take the model of train.init_from, unless one is configured. Raises CheckpointError."""
    source = config.train.init_from
    if not source or config.model.vocab_size:
        return config
    return replace(config, model=model_config(find_checkpoint(Path(source))))


def begin_with(config: Config, engine: Engine, tokenizer: Tokenizer | None) -> None:
    """Fill the engine with the model's weights, if it and the data's tokenizer are that model's.
    Raises ConfigError or CheckpointError naming the difference."""
    path = Path(config.train.init_from)
    found = Path(distributed.first_does(lambda: str(find_checkpoint(path))))
    model = model_config(found)
    if lines := differences(Config(model=model), Config(model=config.model)):
        raise ConfigError(f"train.init_from = {path}: another model: {'; '.join(lines)}")
    check_tokenizer(found, tokenizer)
    load_weights(engine.model, open_weights(found, model))
    log.info(f"weights of {found}")
