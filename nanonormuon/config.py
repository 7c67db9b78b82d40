"""Every knob on one screen, and a loader that takes nothing on trust.

A run's configuration = the defaults below <- recipes and TOML files, merged left to right <-
`section.key=value` from the command line. Unknown names, wrong types and impossible values raise
ConfigError with the nearest valid name, before any device or file of data is touched.
"""

import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from decimal import Decimal, InvalidOperation
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from nanonormuon.errors import ConfigError
from nanonormuon.model import GPTConfig


@dataclass(frozen=True)
class DataConfig:
    path: str = "builtin:python"  # a directory of shards, or the interpreter's own Python sources
    format: Literal["shards", "nanogpt"] = "shards"  # nanogpt: its train.bin, without a header
    tokenizer: str = "bpe:4096"  # of builtin data; a prepared directory brings its own
    mix: str = ""  # "DIR=0.2, DIR=0.1": these shares of the sequences from elsewhere
    document_mask: bool = False  # attention does not cross <|endoftext|>
    seq_len: int = 256  # tokens per window
    order: Literal["shuffled", "sequential"] = "shuffled"  # sequential: as modded-nanogpt reads
    verify: Literal["auto", "full"] = "auto"  # hash shards at the start: all of 256 MB, or always
    val_tokens: int = 0  # evaluate on the first so many targets; 0: all
    tuning: float = 0.0  # this share of the training tokens, their end, stands in for validation


@dataclass(frozen=True)
class OptimConfig:
    name: str = "normuon"  # for the hidden matrices: normuon | muon | adamw | module:Class
    options: str = ""  # of module:Class, beside lr and weight_decay: "betas=(0.9, 0.95), rho=0.1"
    lr: float = 0.02  # of the hidden matrices, and so the next two
    weight_decay: float = 0.1
    momentum: float = 0.95
    momentum_start: float = 0.85  # rises linearly to momentum ...
    momentum_warmup: int = 300  # ... over so many steps
    nesterov: bool = True
    beta2: float = 0.95  # of NorMuon's second moment, one number per neuron
    beta2_on: str = "*"  # names of the matrices that have one; Muon for the others: "*.mlp.*"
    neuron_axis: Literal["rows", "longest"] = "rows"  # longest: columns where they outnumber rows
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = (
        "original"  # latter: AdamW's lr carries over
    )
    ns_coefficients: str = "muon"  # Newton-Schulz: muon | polar_express | "a, b, c"
    ns_steps: int = 5
    cautious: bool = False  # decay only weights that the update moves towards zero
    embed_lr: float = 0.3  # AdamW's rates for the rest
    head_lr: float = 0.003
    vector_lr: float = 0.01
    adam_beta1: float = 0.8
    adam_beta2: float = 0.95
    adam_eps: float = 1e-10
    adam_weight_decay: float = 0.0
    warmup: int = 0  # steps of linear warm-up, for every rate
    decay: float = 0.7  # share of the run, at its end, in which every rate falls linearly ...
    final_lr: float = 0.0  # ... to this share of its height
    grad_clip: float = 0.0  # largest norm of the raw gradient; 0: no clipping


@dataclass(frozen=True)
class TrainConfig:
    init_from: str = ""  # model directory to begin with; "": a new model, as [model] says
    steps: int = 1000  # optimizer steps
    stop_at: int = 0  # end here, saved, on the schedule of `steps`; --resume goes on. 0: no
    batch_tokens: int = 8192  # per optimizer step, over all ranks and micro-batches
    micro_batch: int | Literal["auto"] = "auto"  # sequences per device at a time
    seed: int = 0
    log_every: int = 10
    eval_every: int = 250  # steps; the last step is always evaluated. 0: only the last
    patience: int = 0  # evaluations without a lower val_loss that end the run; 0: none do
    save_every: int = 250  # steps; the last step is always saved. 0: only the last
    keep_last: int = 2  # checkpoints kept; 0: all
    keep_every: int = 0  # also those of every so many steps; 0: none
    keep_best: bool = True  # also the one with the lowest validation loss
    sample_every: int = 0  # steps; 0: before and after the run only
    sample_tokens: int = 128  # per sample; 0: no samples
    sample_prompt: str = ""  # "": samples begin a new document
    track: Literal["", "tensorboard", "wandb"] = ""  # metrics.jsonl's rows go there as well
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = (
        "auto"  # of compute; weights and optimizer stay float32
    )
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: in long runs
    activation_checkpointing: bool = False  # blocks run forward again in backward: less memory
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"  # over several ranks; auto: ddp
    skip_spikes: float = 0.0  # leave out updates with so many times the usual gradient; 0: none
    time_limit: float = 900.0  # seconds for a step or a save, 4 times for longer work; 0: none
    canonical: bool = False  # the same bits on any number of ranks; slow
    reshard: bool = True  # fsdp: weights too are sharded between uses; false: only their gradients

    @property
    def last_step(self) -> int:
        return min(self.steps, self.stop_at or self.steps)


@dataclass(frozen=True)
class Config:
    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


SECTIONS: dict[str, type] = {f.name: f.type for f in fields(Config)}  # type: ignore[misc]
OPTIMIZERS = ("normuon", "muon", "adamw")
OF_NORMUON = ("beta2", "beta2_on", "neuron_axis")  # settings that other optimizers do not have
OF_MUON = ("momentum", "momentum_start", "momentum_warmup", "nesterov", "adjust_lr_fn",
           "ns_coefficients", "ns_steps", "cautious")  # fmt: skip
POSITIVE = (
    "data.seq_len",
    "train.steps",
    "train.batch_tokens",
    "train.log_every",
    "optim.ns_steps",
)
UNIT = (
    "optim.momentum",
    "optim.momentum_start",
    "optim.beta2",
    "optim.adam_beta1",
    "optim.adam_beta2",
)
MAY_CHANGE = (  # on resume; anything else would make it another run (data are compared by content)
    "train.steps",
    "train.stop_at",
    "train.micro_batch",
    "train.log_every",
    "train.eval_every",
    "train.patience",
    "train.save_every",
    "train.keep_last",
    "train.keep_every",
    "train.keep_best",
    "train.skip_spikes",
    "train.time_limit",
    "train.sample_every",
    "train.sample_tokens",
    "train.sample_prompt",
    "train.track",
    "train.device",
    "train.compile",
    "train.activation_checkpointing",
    "train.parallel",
    "train.reshard",
    "data.verify",
    "data.path",
)


def nearest(name: str, valid: Iterable[str]) -> str:
    """ "; did you mean X?" for a misspelt name, else the whole list."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"expected one of {', '.join(valid)}"


def recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package."""
    folder = Path(str(resources.files("nanonormuon") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"), key=lambda path: path.stem)}


def is_setting(argument: str) -> bool:
    """key=value, as against the name of a recipe or a file, in which = may occur too."""
    return re.match(r"\s*[\w.]+\s*=", argument) is not None


def load(arguments: Sequence[str]) -> tuple[Config, dict[str, str]]:
    """Recipes, TOML files, key=value arguments -> the configuration, and each set key's origin.

    Raises ConfigError naming the argument or file, what was found and what is valid there.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source in [a for a in arguments if not is_setting(a)]:
        path = recipes().get(source) or Path(source)
        for section, table in read_toml(path, source).items():
            if section not in SECTIONS or not isinstance(table, dict):
                raise ConfigError(
                    f"{source}: unknown section [{section}]: {nearest(section, SECTIONS)}"
                )
            for key, value in table.items():
                values[f"{section}.{key}"], origin[f"{section}.{key}"] = value, source
    for argument in arguments:
        if is_setting(argument):
            name, _, text = argument.partition("=")
            values[name.strip()], origin[name.strip()] = text.strip(), "command line"
    config = Config()
    changed: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in values.items():
        section, _, key = name.partition(".")
        annotations = typing.get_type_hints(SECTIONS[section]) if section in SECTIONS else {}
        if key not in annotations:
            everything = [f"{s}.{f.name}" for s in SECTIONS for f in fields(SECTIONS[s])]
            same_key = [n for n in everything if n.partition(".")[2] == name.rpartition(".")[2]]
            hint = (
                nearest(name, same_key or everything)
                if not same_key
                else f'did you mean "{same_key[0]}"?'
            )
            raise ConfigError(f'{origin[name]}: unknown key "{name}": {hint}')
        changed[section][key] = coerce(value, annotations[key], f"{origin[name]}: {name}")
    try:
        config = replace(
            config, **{s: replace(getattr(config, s), **c) for s, c in changed.items()}
        )
    except ValueError as error:  # the model's own checks
        raise ConfigError(f"model: {error}") from None
    check(config, origin)
    return config, origin


def read_toml(path: Path, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = f'no file "{source}"' if source.endswith(".toml") else nearest(source, recipes())
        raise ConfigError(f'unknown recipe "{source}": {hint}') from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{source}: not a readable TOML file: {error}") from None


def coerce(value: Any, kind: Any, where: str) -> Any:
    """A TOML value or a command line's text -> the annotated type, or ConfigError. 0.5M and 524_288
    are numbers; nothing is rounded."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value
        raise ConfigError(f'{where} = "{value}": {nearest(str(value), choices)}')
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        number, words = typing.get_args(kind)
        return value if value in typing.get_args(words) else coerce(value, number, where)
    if kind is str and isinstance(value, str):
        if not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value):
            raise ConfigError(f"{where} = {value!r}: expected UTF-8 (is the locale, LANG, that?)")
        return value
    if kind is bool:
        words = {"true": True, "false": False}
        if isinstance(value, bool) or str(value).lower() in words:
            return value if isinstance(value, bool) else words[value.lower()]
    elif kind in (int, float) and not isinstance(value, bool):
        number = parse_number(value) if isinstance(value, str) else value
        if isinstance(number, int | float) and number == number and abs(number) != float("inf"):
            if kind is float:
                return float(number)
            if number == int(number):
                return int(number)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(f"{where} = {value!r}: expected {names[kind]}")


def parse_number(text: str) -> int | float | None:
    """ "524_288", "0.5M", "1e-3" -> a number; None if it is none."""
    scale = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    try:
        number = Decimal(text if scale == 1 else text[:-1]) * scale  # in decimals 1.005M is whole
    except InvalidOperation:
        return None
    whole = number.is_finite() and number == number.to_integral_value()
    return int(number) if whole and abs(number) < 10**18 else float(number)


def without_effect(config: Config, origin: dict[str, str]) -> list[str]:
    """What of the command line this run has no use for, and why. A recipe may say more than its
    run needs, since another optimizer may take its place."""
    name = config.optim.name
    others = {"normuon": (), "muon": OF_NORMUON}.get(name, OF_NORMUON + OF_MUON)
    reasons = {f"optim.{key}": f"{name} has no such setting here" for key in others}
    if not config.train.eval_every:
        reasons["train.patience"] = "with train.eval_every = 0 only the end is evaluated"
    return [
        f"{key}: {reason}" for key, reason in reasons.items() if origin.get(key) == "command line"
    ]


def check(config: Config, origin: dict[str, str]) -> None:
    """Values that no run could have, whatever the device and the data."""

    def refuse(name: str, expected: str) -> None:
        section, _, key = name.partition(".")
        value = getattr(getattr(config, section), key)
        raise ConfigError(f"{origin.get(name, 'default')}: {name} = {value}: expected {expected}")

    for name in POSITIVE + UNIT:
        section, _, key = name.partition(".")
        value = getattr(getattr(config, section), key)
        if name in POSITIVE and value < 1:
            refuse(name, "at least 1")
        if name in UNIT and not 0 <= value < 1:
            refuse(name, "0 <= value < 1")
    for section in ("data", "optim", "train"):
        for f in fields(SECTIONS[section]):
            value = getattr(getattr(config, section), f.name)
            if isinstance(value, int | float) and value < 0:
                refuse(f"{section}.{f.name}", "0 or more")
    if config.train.seed >= 1 << 63:
        refuse("train.seed", "below 2^63")
    if config.train.canonical and config.train.micro_batch == "auto":
        refuse("train.micro_batch", "a number, since train.canonical adds up micro-batches in turn")
    if config.train.micro_batch == 0:
        refuse("train.micro_batch", "at least 1, or auto")
    given = [f"{name} ({where})" for name, where in origin.items() if name.startswith("model.")]
    if config.train.init_from and given and not config.model.vocab_size:
        raise ConfigError(
            f"train.init_from = {config.train.init_from}: the model is the one there: leave out "
            f"{', '.join(given)}; the recipe finetune has no [model]"
        )
    if config.optim.decay > 1:
        refuse("optim.decay", "a share of the run, 0 to 1")
    if config.data.tuning >= 1:
        refuse("data.tuning", "a share of the training tokens, below 1")
    if config.optim.name not in OPTIMIZERS and ":" not in config.optim.name:
        hint = nearest(config.optim.name, OPTIMIZERS)
        refuse("optim.name", f"{', '.join(OPTIMIZERS)} or module:Class; {hint}")
    if ":" in config.optim.name and config.train.parallel == "fsdp":
        refuse("train.parallel", f"ddp: {config.optim.name} needs whole matrices on every rank")
    if config.optim.options and config.optim.name in OPTIMIZERS:
        refuse("optim.options", f"none: {config.optim.name} has settings of its own here")
    tokens, T = config.train.batch_tokens, config.data.seq_len
    if tokens % T:
        near = " or ".join(str(n) for n in (tokens // T * T, (tokens // T + 1) * T) if n)
        refuse("train.batch_tokens", f"a multiple of data.seq_len = {T}; the nearest are {near}")
    if config.optim.ns_coefficients not in ("muon", "polar_express"):
        from nanonormuon.optim import parse_triple

        try:
            parse_triple(config.optim.ns_coefficients)
        except ValueError as error:
            raise ConfigError(f"{origin.get('optim.ns_coefficients')}: optim.{error}") from None


def from_dict(content: dict[str, dict[str, Any]]) -> Config:
    """dataclasses.asdict(config), as a checkpoint's state.json has it -> the configuration."""
    try:
        return Config(**{section: SECTIONS[section](**table) for section, table in content.items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"the saved configuration is of another version: {error}") from None


def differences(old: Config, new: Config) -> list[str]:
    """The keys in which a resumed run would be another one, as readable lines."""
    lines = []
    for section, kind in SECTIONS.items():
        for f in fields(kind):
            a, b = (getattr(getattr(c, section), f.name) for c in (old, new))
            if a != b and f"{section}.{f.name}" not in MAY_CHANGE:
                lines.append(f"{section}.{f.name}: {a} -> {b}")
    return lines


def to_toml(
    config: Config | dict[str, dict[str, Any]], origin: dict[str, str] | None = None
) -> str:
    """A configuration, or the dictionary that a checkpoint keeps of one, as TOML. With `origin`,
    each line says where its value comes from."""
    lines = []
    for section, table in (asdict(config) if isinstance(config, Config) else config).items():
        lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        for name, value in table.items():
            text = str(value).lower() if isinstance(value, bool) else repr(value)
            if isinstance(value, str):
                text = json.dumps(value, ensure_ascii=False)  # its escapes are TOML's
            line = f"{name} = {text}"
            if origin is not None:
                line = f"{line:<36}  # {origin.get(f'{section}.{name}', 'default')}"
            lines.append(line)
    return "\n".join(lines) + "\n"
