"""Find, check and load a trained model: a run's, or one in a Hugging Face directory."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanonormuon.checkpoint import named_for_hf, weights_of
from nanonormuon.config import AT_LEAST_0, KINDS, LIMITS, SECTIONS, coerce
from nanonormuon.errors import CheckpointError, DataError
from nanonormuon.model import GPT
from nanonormuon.parts.config import GPTConfig
from nanonormuon.storage import checkpoints
from nanonormuon.storage import huggingface as hf
from nanonormuon.storage.run import known_runs
from nanonormuon.storage.shards import Data, open_data
from nanonormuon.storage.tensors import TensorFile, check_names, check_shape, entries, placed_like
from nanonormuon.text.builtin import builtin_data
from nanonormuon.text.huggingface import vocabulary
from nanonormuon.text.tokenizer import FILE as TOKENIZER_FILE
from nanonormuon.text.tokenizer import Tokenizer
from nanonormuon.text.tokenizer import load as load_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def find_checkpoint(path: Path) -> Path:
    """A run directory -> its newest checkpoint that verifies; a checkpoint -> itself, verified; a
    Hugging Face model directory -> itself. Raises CheckpointError."""
    if (path / "manifest.json").exists():
        if isinstance(checkpoints.read_json(path / "manifest.json").get("train"), dict):
            raise CheckpointError(f"{path}: prepared data, expected a run or a model trained on it")
        checkpoints.verify(path)
        return path
    if (path / "checkpoints").is_dir():
        return checkpoints.newest(path / "checkpoints")[0]
    if (path / "config.json").is_file() and any((path / n).is_file() for n in (WEIGHTS, INDEX)):
        return path
    raise CheckpointError(
        f"{path}: neither a run directory (with checkpoints/) nor a checkpoint nor a model "
        f"directory (with config.json and {WEIGHTS}); {known_runs(path)}"
    )


def run_of(path: Path) -> Path | None:
    """The run directory at `path`, or around it if it is a checkpoint; None if there is none."""
    homes = (path, path.parent.parent) if checkpoints.step_of(path) is not None else (path,)
    return next((home for home in homes if (home / "config.toml").is_file()), None)


def state_of(path: Path) -> dict[str, Any] | None:
    """A checkpoint's state.json, with the defaults of settings that it lacks; None for a model
    directory without one. Raises CheckpointError for what no run wrote."""
    file = path / "state.json"
    if not file.is_file():
        return None
    state = checkpoints.read_json(file)
    try:
        if not all(type(state.get(key)) is int for key in ("step", "tokens")):
            raise ValueError("expected numbers of steps and tokens")
        if not isinstance(state["data"], str) or not isinstance(state["tokenizer"], str | None):
            raise ValueError("expected the fingerprints of data and tokenizer")
        settings = state["config"]
        for section, kind in SECTIONS.items():
            table = asdict(kind()) | settings[section]
            settings[section] = {k: checked(f"{section}.{k}", v) for k, v in table.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: not a run's: {error}") from None
    return state


def checked(name: str, value: Any) -> Any:
    """The value of a setting, in its own type, if a run may have it. Raises ValueError."""
    if name not in KINDS or name.startswith("model."):  # another version's; config.json counts
        possible, expected = isinstance(value, bool | int | float | str), "a number or text"
    else:
        value = coerce(value, KINDS[name], name)
        fits, expected = LIMITS.get(name, AT_LEAST_0)
        possible = fits(value)
    if not possible:
        raise ValueError(f"{name} = {value!s:.60}: expected {expected}")
    return value


def model_config(path: Path) -> GPTConfig:
    """The model's config, whose sizes must be those in the weights' headers, so that config.json
    alone cannot cause a huge allocation. Raises CheckpointError naming what does not fit."""
    file = path / "config.json"
    content = checkpoints.read_json(file)
    try:
        config = hf.gpt_config(content).resolved()
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from None
    shapes = {n: e[1] for f in tensor_files(path) for n, e in f.entries.items()}
    layers = {n.split(".")[2] for n in shapes if n.startswith("model.layers.")}
    if len(layers) != config.n_layer:
        raise CheckpointError(f"{file}: {config.n_layer} layers, the weights have {len(layers)}")
    with torch.device("meta"):
        parameters = named_for_hf(weights_of(GPT(config)))
    for name, p in parameters.items():
        for entry, shape in entries(name, p.shape).items():
            if entry in shapes:
                check_shape(path, entry, shapes[entry], shape)
    return config


def context_of(path: Path) -> int:
    """The context length, in tokens, that a model was trained with. Raises CheckpointError."""
    file, name = path / "config.json", "max_position_embeddings"
    length, (fits, expected) = checkpoints.read_json(file).get(name), LIMITS["data.seq_len"]
    if type(length) is not int or not fits(length):
        raise CheckpointError(f"{file}: {name} = {length!s:.60}: expected {expected}")
    return length


def tensor_files(path: Path) -> list[TensorFile]:
    """A model directory's file of weights, or the files that its index names."""
    names = {WEIGHTS}
    if not (path / WEIGHTS).is_file() and (path / INDEX).is_file():
        listed = checkpoints.read_json(path / INDEX).get("weight_map")
        names = set(map(str, listed.values())) if isinstance(listed, dict) else {""}
    for name in names:
        if not name or Path(name).name != name:
            raise CheckpointError(f"{path / INDEX}: unsafe file name {name!r}")
    return [TensorFile(path / name) for name in sorted(names)]


def read_weights(path: Path, tied: bool) -> dict[str, Tensor]:
    """A model directory's tensors in float32. tied: leave out a head that equals the embedding."""
    tensors = {
        name: file.read(name)
        for file in tensor_files(path)
        for name in file.entries
        if not name.endswith("rotary_emb.inv_freq")  # in some Llama files; follows from rope_theta
    }
    head, table = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if tied and head is not None and table is not None and torch.equal(head, table):
        del tensors["lm_head.weight"]
    for name, t in tensors.items():
        if not t.is_floating_point() or not t.isfinite().all():
            raise CheckpointError(f"{path}: {name} ({t.dtype}): expected finite floating point")
    return {name: t.float() for name, t in tensors.items()}


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a model, sharded or not, that was made from model_config(path). Raises CheckpointError
    for missing and for unexpected tensors."""
    parameters = named_for_hf(weights_of(model))
    stored = {name: [*entries(name, p.shape)] for name, p in parameters.items()}
    values = read_weights(path, "lm_head.weight" not in parameters)
    check_names(path, set(values), {entry for names in stored.values() for entry in names})
    with torch.no_grad():
        for name, p in parameters.items():
            parts = [values.pop(entry) for entry in stored[name]]
            p.copy_(placed_like(torch.stack(parts) if "#" in name else parts[0], p))


def load_model(path: Path, dtype: torch.dtype, device: torch.device) -> GPT:
    """The model of a checkpoint or model directory, in float32 and computing in `dtype`."""
    model = GPT(model_config(path), dtype)
    load_weights(model, path)
    return model.to(device).eval()


def load_run(path: Path, dtype: torch.dtype, device: torch.device) -> tuple[GPT, Tokenizer, Path]:
    """Model, tokenizer and checkpoint of anything that find_checkpoint accepts."""
    found = find_checkpoint(path)
    if not (found / TOKENIZER_FILE).exists():
        raise CheckpointError(
            f"{found}: holds no tokenizer (it was trained on shards that came without one): set "
            "data.tokenizer in the run, for instance to gpt2"
        )
    return load_model(found, dtype, device), load_tokenizer(found), found


def check_tokenizer(path: Path, tokenizer: Tokenizer | None) -> None:
    """Raise CheckpointError unless every id of the data's tokenizer means the same to the model."""
    file = path / TOKENIZER_FILE
    if tokenizer is None:
        raise CheckpointError(f"{path}: whether the data fit it cannot be told: set data.tokenizer")
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; copy the model's own {TOKENIZER_FILE} there")
    try:
        ours, theirs = vocabulary(tokenizer.content), vocabulary(checkpoints.read_json(file))
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: not a tokenizer's vocabulary ({error})") from None
    if wrong := [(token, i) for token, i in ours.items() if theirs.get(token) != i]:
        token, i = wrong[0]
        raise CheckpointError(
            f"{file}: {len(wrong)} of the data's {len(ours)} tokens are others here, first "
            f"{token!r}: id {i} in the data, {theirs.get(token)} in the model; prepare the data "
            f"with --tokenizer {file}"
        )


def data_of(state: dict[str, Any] | None, tokenizer: Tokenizer, path: Path | None = None) -> Data:
    """The data directory at `path` (None: the training data of the run whose state.json `state`
    is), which must be prepared with this tokenizer. Raises DataError."""
    headerless = False
    if path is None:
        settings = (state or {}).get("config", {}).get("data")
        if settings is None:
            raise DataError(
                "this model does not say what it was trained on: give --data (evaluate: or --text)"
            )
        path, headerless = Path(settings["path"]), settings.get("format") == "nanogpt"
        if settings["path"].startswith("builtin:"):
            path = builtin_data(settings["path"], settings["tokenizer"])
        elif not path.is_dir():
            raise DataError(f"{path}: the run's data are no longer there: give --data")
    data = open_data(path, tokenizer.vocab_size, headerless=headerless)
    made_with = data.manifest["tokenizer"]["hash"] if data.manifest else tokenizer.hash
    if made_with != tokenizer.hash:
        raise DataError(
            f"{path}: made with tokenizer {made_with[:12]}, the model's is {tokenizer.hash[:12]}: "
            "prepare the text with the model's own tokenizer, or evaluate with --text"
        )
    data.check_tokenizer(tokenizer)
    return data
