"""Speedruns: a fixed model, text and validation loss, and records of who gets there soonest.

A track is a TOML file: what all its runs share, what a record may change, the target, and the
records with their measured results. Those of the package are in recipes/speedrun/.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nanonormuon import config
from nanonormuon.errors import ConfigError, DataError
from nanonormuon.lab import trials
from nanonormuon.lab.processes import Runner, key_of, resolve
from nanonormuon.optim import check_trusted
from nanonormuon.storage.files import as_json, replace_file
from nanonormuon.storage.run import as_markdown
from nanonormuon.storage.values import coerce, nearest
from nanonormuon.text.corpus import open_directory

LEAST, LEVEL = 10, 0.001  # a record has at least so many runs, and a lower p-value
RULE = f"at least {LEAST} runs, mean below the target with p < {LEVEL:g}"
Metric = Literal["val_loss", "val_bpb"]  # nats per token, bits per byte
NANOGPT_STEPS = 2000  # of nanoGPT's CPU recipe, whose time is the unit of the records' times


@dataclass(frozen=True)
class Track:
    """A speedrun. Each record has `about`, `settings` and, once measured, `result`."""

    title: str
    target: float  # of the metric's mean over runs
    settings: list[str]  # shared by all runs: a recipe, SECTION.KEY=VALUE
    free: list[str]  # patterns of the settings that a record may change
    metric: Metric = "val_loss"
    data: str = ""  # fingerprint of the prepared text; "": any
    prepare: str = ""  # how to prepare it
    records: dict[str, dict[str, Any]] = field(default_factory=dict)


def tracks() -> dict[str, Path]:
    """Name -> file of every track in the package."""
    folder = Path(config.__file__).parent / "recipes" / "speedrun"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load(name: str) -> Track:
    """Read a track of the package, or a TOML file. Raises ConfigError."""
    if name not in tracks() and not name.endswith(".toml"):
        raise ConfigError(f'no track "{name}": {nearest(name, tracks())}, or a FILE.toml')
    try:
        track = Track(**config.read_toml(str(tracks().get(name, name))))
        coerce(track.target, float, f"{name}: target")
        coerce(track.metric, Metric, f"{name}: metric")
        for record in track.records:
            config.load(arguments(track, [record]))
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{name}: not a track: {error}") from None
    return track


def arguments(track: Track, chosen: Sequence[str]) -> list[str]:
    """The arguments of a run. chosen: records and settings of one's own, from left to right. Raises
    ConfigError for an unknown record or a setting that the track fixes."""
    own: list[str] = []
    for part in chosen:
        if not config.is_setting(part) and part not in track.records:
            raise ConfigError(f'no record "{part}": {nearest(part, track.records)}')
        own += [part] if config.is_setting(part) else track.records[part]["settings"]
    for setting in own:
        if not any(fnmatchcase(key_of(setting), pattern) for pattern in ("data.path", *track.free)):
            raise ConfigError(f"{setting}: fixed; records may change {', '.join(track.free)}")
    return [*track.settings, *own]


def run(track: Track, chosen: Sequence[str], n: int, out: Path, runner: Runner) -> dict[str, Any]:
    """Run `chosen` with the seeds 0 to n - 1; returns the content of OUT/record.json.

    time: seconds of training over those of nanoGPT's steps, timed before and after in this process;
    null if several runs share the machine. Raises ConfigError, DataError, what trials.run raises.
    """
    given = arguments(track, chosen)
    for named in [a for a in given if key_of(a) == "optim.name"][-1:]:
        if named not in chosen:
            check_trusted(config.from_file(named.partition("=")[2].strip(), "the track"))
    settings = resolve(given)
    path, expected = Path(settings.data.path), track.data
    if expected and (data := open_directory(settings, path)[0].fingerprint) != expected:
        raise DataError(f"{path}: expected fingerprint {expected}, found {data}: {track.prepare}")
    before = nanogpt_step()
    found = trials.run(given, n, track.target, out, runner, track.metric)
    unit, seconds = NANOGPT_STEPS * (before + nanogpt_step()) / 2, found.pop("seconds")
    found |= {
        "valid": n >= LEAST and found["p_value"] is not None and found["p_value"] < LEVEL,
        "tokens": found["steps"] * settings.train.batch_tokens,
        "time": statistics.fmean(seconds) / unit if runner.parallel == 1 and all(seconds) else None,
        "arguments": [a for a in found["arguments"] if not a.startswith("data.path")],
    }
    replace_file(out / "record.json", as_json(found))
    return found


def table(track: Track, results: dict[str, dict[str, Any]] | None = None) -> str:
    """The track's records as Markdown, with their published results; or other results by name."""
    lines = [["record", "steps", "tokens", "result", "p", "time", "what is new"]]
    for name, r in (results or {k: v.get("result", {}) for k, v in track.records.items()}).items():
        if not results:  # a record may be unmeasured
            t = config.load(arguments(track, [name]))[0].train
            r = {"steps": t.last_step, "tokens": t.last_step * t.batch_tokens} | r
        loss = f"{r['mean']:.4f} ± {r['sd'] or 0:.4f} (n = {r['n']})" if "mean" in r else "-"
        p, time = r.get("p_value"), r.get("time")
        cells = [loss, "-" if p is None else f"{p:.1g}", "-" if time is None else f"{time:.3f}"]
        about = track.records.get(name, {}).get("about", "")
        lines.append([name, f"{r['steps']:,}", f"{r['tokens']:,}", *cells, about])
    return as_markdown(lines)


def nanogpt_step(steps: int = 60) -> float:
    """Median seconds of a training step of nanoGPT's CPU recipe: a stand-in of its size and
    arithmetic (4 layers of width 128, 12 x 64 tokens, 65 characters, float32, AdamW)."""
    layer = nn.TransformerEncoderLayer(
        128, 4, 512, 0.0, "gelu", batch_first=True, norm_first=True, bias=False
    )
    blocks = nn.TransformerEncoder(layer, 4, nn.LayerNorm(128), enable_nested_tensor=False)
    model = nn.ModuleList([nn.Embedding(65, 128), nn.Embedding(64, 128), blocks])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.99), weight_decay=0.1)
    mask, seconds = nn.Transformer.generate_square_subsequent_mask(64), []
    for _ in range(10 + steps):
        x, y = torch.randint(65, (2, 12, 64))
        begin = time.perf_counter()
        h = blocks(model[0](x) + model[1].weight, mask, is_causal=True)
        cross_entropy((h @ model[0].weight.T).flatten(0, 1), y.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[10:])
