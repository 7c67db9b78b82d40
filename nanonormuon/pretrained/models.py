"""Finds, checks and loads a trained model of a run or in a Hugging Face directory."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from nanonormuon.checkpoint import named_for_hf, weights_of
from nanonormuon.config import KINDS, LIMITS, SECTIONS, Config, convert, differences
from nanonormuon.engine import Engine
from nanonormuon.errors import CheckpointError, ConfigError, DataError
from nanonormuon.model import GPT
from nanonormuon.parts.config import GPTConfig
from nanonormuon.runtime import distributed
from nanonormuon.storage import checkpoints, shards
from nanonormuon.storage import huggingface as hf
from nanonormuon.storage.files import progress
from nanonormuon.storage.run import known_runs
from nanonormuon.storage.shards import Data, open_data
from nanonormuon.storage.tensors import TensorFile, placed_like
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
    """Read a checkpoint's state.json, adding defaults of missing settings; None for a model
    directory without it. Raises CheckpointError."""
    file = path / "state.json"
    if not file.is_file():
        return None
    state = checkpoints.read_json(file)
    try:
        shards.check_shape(state, {"step": int, "tokens": int, "data": str}, "state")
        if not isinstance(state["tokenizer"], str | None):
            raise ValueError("expected the tokenizer's hash")
        for section, kind in SECTIONS.items():
            settings = state["config"][section] = asdict(kind()) | state["config"][section]
            for name, value in settings.items():
                if section != "model" and f"{section}.{name}" in KINDS:
                    settings[name] = convert(f"{section}.{name}", value)
                elif not isinstance(value, bool | int | float | str):  # unknown here
                    raise ValueError(f"{name} = {value!s:.60}: expected a number or text")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: not written by a run: {error}") from None
    return state


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
    with torch.device("meta"):
        parameters = named_for_hf(weights_of(GPT(config)))
    weights.expect({name: p.shape for name, p in parameters.items()})
    return weights


def context_of(path: Path) -> int:
    """Return the context length, in tokens, of a model's training. Raises CheckpointError."""
    file, name = path / "config.json", "max_position_embeddings"
    length, (low, high) = checkpoints.read_json(file).get(name), LIMITS["data.seq_len"]
    if type(length) is not int or not low <= length <= high:
        raise CheckpointError(f"{file}: {name} = {length!s:.60}: expected {low} to {high}")
    return length


def load_weights(model: GPT, path: Path) -> None:
    """Load weights into a model, sharded or not, that was made from model_config(path). Raises
    CheckpointError."""
    weights, parameters = open_weights(path, model.config), named_for_hf(weights_of(model))
    with torch.no_grad():
        for name, p in progress("reading", None, "tensor", iterable=[*parameters.items()]):
            value = weights.read(name)
            if not value.is_floating_point() or not value.isfinite().all():
                found = f"{name} ({value.dtype})"
                raise CheckpointError(f"{path}: {found}: expected finite floating point")
            p.copy_(placed_like(value.float(), p))


def load_model(path: Path, dtype: torch.dtype, device: torch.device) -> GPT:
    """Load the model of a checkpoint or model directory, in float32 and computing in `dtype`."""
    model = GPT(model_config(path), dtype)
    load_weights(model, path)
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


def adopt(config: Config, data: Data) -> Config:
    """Take the model's configuration. Raises ConfigError if the data have more token ids."""
    source = config.train.init_from
    directory = find_checkpoint(Path(source))
    model = model_config(directory)
    if (data.vocab_size or 0) > model.vocab_size:
        raise ConfigError(
            f"train.init_from = {source}: a model of {model.vocab_size} token ids, the data in "
            f"{data.path} have {data.vocab_size}: set data.path to text prepared with "
            f"--tokenizer {directory / 'tokenizer.json'}"
        )
    return replace(config, model=model)


def begin_with(config: Config, engine: Engine, tokenizer: Tokenizer | None) -> None:
    """Fill the engine with the model's weights, if it and the data's tokenizer are that model's.
    Raises ConfigError or CheckpointError naming the difference."""
    path = Path(config.train.init_from)
    found = Path(distributed.first_does(lambda: str(find_checkpoint(path))))
    model = model_config(found)
    if lines := differences(Config(model=model), Config(model=config.model)):
        raise ConfigError(f"train.init_from = {path}: another model: {'; '.join(lines)}")
    check_tokenizer(found, tokenizer)
    load_weights(engine.model, found)
    log.info(f"weights of {found}")
