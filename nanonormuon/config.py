"""Every setting on one screen, and a strict loader.

Later sources override earlier ones: the defaults below, recipes and TOML files from left to right,
`section.key=value` from the command line. An unknown name, a wrong type or an impossible value
raises ConfigError before any device or data file is touched.
"""

import math
import re
import tomllib
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from nanonormuon.errors import CheckpointError, ConfigError
from nanonormuon.parts.config import GPTConfig
from nanonormuon.storage.files import optimizer_file, read_file
from nanonormuon.storage.values import coerce, mixture, nearest


@dataclass(frozen=True)
class DataConfig:
    path: str = "builtin:stdlib"  # directory of shards, or builtin:stdlib (Python's own library)
    format: Literal["shards", "nanogpt"] = "shards"  # nanogpt: its headerless train.bin and val.bin
    tokenizer: str = "bpe:4096"  # for builtin data and shards without a manifest
    mix: str = ""  # other directories and their shares of the sequences: "DIR=0.2, DIR=0.1"
    document_mask: bool = False  # restrict attention to the current document
    seq_len: int = 256  # context length in tokens
    order: Literal["shuffled", "sequential"] = "shuffled"  # sequential: as modded-nanogpt reads
    verify: Literal["auto", "full"] = "auto"  # auto: above 256 MB, check each shard on first use
    val_tokens: int = 0  # evaluate on the first val_tokens targets; 0: on all
    tuning: float = 0.0  # validate on this share of the training data, its end, instead; 0: off


@dataclass(frozen=True)
class OptimConfig:
    name: str = "normuon"  # normuon | muon | adamw | zoo:NAME | FILE.py:Class | module:Class
    options: str = ""  # more arguments of a zoo:NAME or Class, such as "betas=(0.9, 0.95), rho=1"
    lr: float = 0.02  # learning rate of the hidden matrices
    weight_decay: float = 0.1  # of the hidden matrices
    momentum: float = 0.95  # of the hidden matrices
    momentum_start: float = 0.85  # momentum at the start, rising linearly to optim.momentum
    momentum_warmup: int = 300  # steps over which momentum rises
    nesterov: bool = True  # Nesterov momentum
    beta2: float = 0.95  # decay rate of NorMuon's second moment (one value per neuron)
    beta2_on: str = "*"  # matrices that get NorMuon, such as "*.mlp.*"; the others get plain Muon
    neuron_axis: Literal["rows", "longest"] = "rows"  # longest: columns if there are more of them
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"  # match_*: use AdamW's lr
    ns_coefficients: str = "muon"  # Newton-Schulz: muon | polar_express | "a, b, c"
    ns_steps: int = 5  # Newton-Schulz iterations
    cautious: bool = False  # decay only weights that the update moves towards zero
    embed_lr: float = 0.3  # AdamW's learning rate for the embedding
    value_lr: float = 0.1  # AdamW's learning rate for model.value_embed and model.bigram_embed
    head_lr: float = 0.003  # AdamW's learning rate for the output head
    vector_lr: float = 0.01  # AdamW's learning rate for gains, biases and routers
    adam_beta1: float = 0.8
    adam_beta2: float = 0.95
    adam_eps: float = 1e-10
    adam_weight_decay: float = 0.0
    warmup: int = 0  # steps of linear learning rate warm-up
    decay: float = 0.7  # final fraction of the run, over which learning rates fall linearly
    final_lr: float = 0.0  # learning rates at the end, as a fraction of their peaks
    grad_clip: float = 0.0  # maximum gradient norm; 0: no clipping
    qk_clip: float = 0.0  # maximum attention logit (MuonClip; usually 100); 0: no limit


@dataclass(frozen=True)
class TrainConfig:
    init_from: str = ""  # run or model directory to start from; "": a new model
    steps: int = 1000  # optimizer steps
    stop_at: int = 0  # save and stop early, after this step; --resume continues. 0: never
    batch_tokens: int = 8192  # tokens per optimizer step, over all ranks and micro-batches
    micro_batch: int | Literal["auto"] = "auto"  # sequences per device and forward pass
    seed: int = 0
    log_every: int = 10  # steps between rows of metrics
    eval_every: int = 250  # steps between evaluations; 0: evaluate only the last step
    patience: int = 0  # stop after this many evaluations without a lower val_loss; 0: never
    save_every: int = 250  # steps between checkpoints; 0: save only the last step
    keep_last: int = 2  # newest checkpoints to keep; 0: all
    keep_every: int = 0  # also keep checkpoints at multiples of this step; 0: none
    keep_best: bool = True  # also keep the checkpoint with the lowest validation loss
    save_async: Literal["auto", "on", "off"] = "auto"  # save in the background; auto: on GPUs
    sample_every: int = 0  # steps between samples; 0: only before and after the run
    sample_tokens: int = 128  # tokens per sample; 0: no samples
    sample_prompt: str = ""  # texts for samples to continue, "def |class "; "": a new document
    track: Literal["", "tensorboard", "wandb"] = ""  # also send the rows of metrics.jsonl there
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # for computing; weights stay float32
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: in long runs
    activation_checkpointing: bool = False  # save memory: recompute blocks in the backward pass
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"  # auto: ddp; hsdp: fsdp within nodes
    skip_spikes: float = 0.0  # skip gradients whose norm is this many times the average; 0: none
    time_limit: float = 900.0  # seconds for a step or save; evaluations take 4 times that; 0: none
    canonical: bool = False  # bitwise equal results on any number of ranks; slow
    reshard: bool = True  # fsdp, hsdp: free gathered weights between forward and backward pass

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
KINDS: dict[str, Any] = {  # "section.key" of every setting -> its type
    f"{section}.{key}": kind
    for section, table in SECTIONS.items()
    for key, kind in typing.get_type_hints(table).items()
}
OPTIMIZERS = ("normuon", "muon", "adamw")
TRUSTED = ("torch.optim", "zoo")  # modules whose classes even a file may name
# What may change on resume. Data are compared by content.
MAY_CHANGE = ("data.path", "data.verify", *(f"train.{key}" for key in (
    "steps", "stop_at", "micro_batch", "log_every", "eval_every", "patience", "save_every",
    "save_async", "keep_last", "keep_every", "keep_best", "skip_spikes", "time_limit",
    "sample_every", "sample_tokens", "sample_prompt", "track", "device", "compile",
    "activation_checkpointing", "parallel", "reshard",
)))  # fmt: skip

LARGEST = 2**63 - 1  # of a whole number
BELOW_1 = (0, math.nextafter(1, 0))
WIDTH = (0, 1 << 20)  # beyond any model, but parameters are counted quickly and without overflow
LIMITS: dict[str, tuple[float, float]] = {  # least and largest value; others: 0 or more
    **dict.fromkeys(("train.steps", "train.log_every", "train.micro_batch"), (1, LARGEST)),
    **dict.fromkeys(("optim.momentum", "optim.momentum_start", "optim.beta2"), BELOW_1),
    **dict.fromkeys(("optim.adam_beta1", "optim.adam_beta2", "data.tuning"), BELOW_1),
    **{f"model.{key}": WIDTH for key in ("n_head", "n_kv_head", "n_embd", "head_dim")},
    **{f"model.{key}": WIDTH for key in ("q_rank", "kv_rank", "rope_head_dim", "v_head_dim")},
    **dict.fromkeys(("model.n_hidden", "model.expert_hidden"), (0, 1 << 24)),
    "model.vocab_size": (0, 1 << 32),  # ids in shards have 32 bits
    "model.bigram_embed": (0, 1 << 32),
    "model.n_layer": (1, 10_000),
    "model.attn_scale": (-math.inf, math.inf),
    "data.seq_len": (1, 1 << 24),
    "train.batch_tokens": (1, 10**12),
    "optim.ns_steps": (1, 1000),  # a list is that long
    "optim.decay": (0, 1),  # a share of the run
}


def recipes() -> dict[str, Path]:
    """Return every recipe's name and file."""
    folder = Path(__file__).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"), key=lambda path: path.stem)}


class FromFile(str):
    """A module:Class that a file names. optim.py refuses these: importing a module runs its code,
    and files come from anywhere."""

    file: str


def from_file(name: str, file: str) -> str:
    """Mark the name of an optimizer that `file` gives, unless it is one of TRUSTED."""
    if ":" not in name or name.rpartition(":")[0] in TRUSTED:  # "zoo:a.py:C" is a file's class
        return name
    found = FromFile(name)
    found.file = file
    return found


def our_optimizers() -> list[str]:
    """List the package's optimizers, including "zoo:NAME" for each file of the zoo."""
    zoo = {path.stem for path in (Path(__file__).parent / "lab" / "zoo").glob("*.py")}
    return [*OPTIMIZERS, *sorted(f"zoo:{x}" for x in zoo - {"__init__", "base", "buckets"})]


def is_setting(argument: str) -> bool:
    """Whether an argument is key=value rather than a recipe or file, whose path may contain =."""
    return re.match(r"\s*[\w.]+\s*=", argument) is not None


def load(arguments: Sequence[str]) -> tuple[Config, dict[str, str]]:
    """Build the configuration from recipes, TOML files and key=value arguments. Also returns the
    origin of each key that is set. Raises ConfigError."""
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source in [a for a in arguments if not is_setting(a)]:
        for section, table in read_toml(source).items():
            if section not in SECTIONS or not isinstance(table, dict):
                hint = nearest(section, SECTIONS)
                raise ConfigError(f"{source}: unknown section [{section}]: {hint}")
            values |= {f"{section}.{key}": value for key, value in table.items()}
            origin |= {f"{section}.{key}": source for key in table}
    for argument in filter(is_setting, arguments):
        name, text = map(str.strip, argument.split("=", 1))
        values[name], origin[name] = text, "command line"
    changed: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in values.items():
        section, _, key = name.partition(".")
        if name not in KINDS:
            alike = [n for n in KINDS if n.partition(".")[2] == name.rpartition(".")[2]]
            hint = f'did you mean "{alike[0]}"?' if alike else nearest(name, KINDS)
            raise ConfigError(f'{origin[name]}: unknown key "{name}": {hint}')
        changed[section][key] = convert(name, value, f"{origin[name]}: ")
    where = origin.get("optim.name", "command line")
    if where != "command line":
        changed["optim"]["name"] = from_file(changed["optim"]["name"], where)
    try:
        config = Config(**{section: kind(**changed[section]) for section, kind in SECTIONS.items()})
    except ValueError as error:  # GPTConfig checks itself
        raise ConfigError(f"model: {error}") from None
    check(config, origin)
    return config, origin


def read_toml(source: str) -> dict[str, Any]:
    """Parse a recipe or TOML file. Raises ConfigError."""
    try:
        return tomllib.loads(read_file(recipes().get(source) or source, 1 << 20).decode())
    except FileNotFoundError:
        hint = f'no file "{source}"' if source.endswith(".toml") else nearest(source, recipes())
        raise ConfigError(f'unknown recipe "{source}": {hint}') from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also 5,000 digits
        hint = "" if source.endswith(".toml") else "; name a data directory with data.path=DIR"
        problem = getattr(error, "strerror", None) or str(error).removeprefix(f"{source}: ")
        raise ConfigError(f"{source}: not a readable TOML file: {problem}{hint}") from None


def convert(name: str, value: Any, where: str = "") -> Any:
    """Convert the value of the setting `name` to its type. Raises ConfigError, whose message begins
    with `where`, for another type or an impossible value."""
    found = coerce(value, KINDS[name], where + name)
    low, high = LIMITS.get(name, (0, LARGEST if isinstance(found, int) else math.inf))
    if not isinstance(found, str) and not low <= found <= high:
        most = "below 1" if high == BELOW_1[1] else f"at most {high}"
        expected = f"at least {low}" if found < low else most
        raise ConfigError(f"{where}{name} = {found!s:.60}: expected {expected}")
    return found


def check(config: Config, origin: dict[str, str]) -> None:
    """Raise ConfigError for settings that are impossible on any device and data."""

    def refuse(name: str, expected: str) -> None:
        value = attrgetter(name)(config)
        raise ConfigError(f"{origin.get(name, 'default')}: {name} = {value}: expected {expected}")

    from nanonormuon.normuon import coefficients  # loads torch, which a list of settings need not

    o, t, T = config.optim, config.train, config.data.seq_len
    if t.canonical and t.micro_batch == "auto":
        refuse("train.micro_batch", "a number with train.canonical, whose sums depend on it")
    module = o.name not in our_optimizers() and not optimizer_file(o.name)
    if module and ":" in o.name and t.parallel in ("fsdp", "hsdp"):
        refuse("train.parallel", f"ddp: {o.name} needs whole matrices on every rank")
    if mixture(config.data.mix) and config.data.order != "shuffled":
        refuse("data.order", "shuffled with data.mix")
    if module and (":" not in o.name or o.name.startswith("zoo:")):
        refuse("optim.name", f"FILE.py:Class or module:Class; {nearest(o.name, our_optimizers())}")
    if not config.data.path:
        refuse("data.path", "a directory; . is the working directory")
    if o.options and o.name in OPTIMIZERS:
        refuse("optim.options", f"none: set the arguments of {o.name} by optim.KEY=VALUE")
    if rest := t.batch_tokens % T:
        near = " or ".join(str(n) for n in (t.batch_tokens - rest, t.batch_tokens - rest + T) if n)
        refuse("train.batch_tokens", f"a multiple of data.seq_len = {T}; the nearest are {near}")
    given = [f"{name} ({where})" for name, where in origin.items() if name.startswith("model.")]
    if t.init_from and given and not config.model.vocab_size:
        refuse("train.init_from", f"no model settings beside it: leave out {', '.join(given)}")
    try:
        if not all(map(math.isfinite, coefficients(o.ns_coefficients, 1)[0])):
            raise ValueError(f"ns_coefficients = {o.ns_coefficients}: expected finite numbers")
    except ValueError as error:
        raise ConfigError(f"{origin.get('optim.ns_coefficients')}: optim.{error}") from None


def from_dict(content: dict[str, dict[str, Any]]) -> Config:
    """Invert dataclasses.asdict(config), for a checkpoint's state.json. Raises CheckpointError."""
    try:
        return Config(**{section: SECTIONS[section](**table) for section, table in content.items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"state.json: configuration of another version: {error}") from None


def flat(config: Config, without: Collection[str] = ()) -> dict[str, Any]:
    """Map "section.key" to value for every setting."""
    return {name: attrgetter(name)(config) for name in KINDS if name not in without}


def differences(old: Config, new: Config) -> list[str]:
    """List the changes that a resumed run may not make, one line each."""
    before = flat(old, MAY_CHANGE)
    return [f"{k}: {before[k]} -> {b}" for k, b in flat(new, MAY_CHANGE).items() if before[k] != b]
