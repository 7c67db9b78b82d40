"""Exports a run's model as a Hugging Face directory, if transformers computes equal logits."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanonormuon.config import to_toml
from nanonormuon.data import validation_batches
from nanonormuon.errors import UsageError
from nanonormuon.model import GPT
from nanonormuon.parts.config import GPTConfig
from nanonormuon.pretrained import judge, models
from nanonormuon.runtime.distributed import ALONE
from nanonormuon.runtime.packages import need
from nanonormuon.storage import huggingface as hf
from nanonormuon.storage.files import as_json, progress, publish, read_file, write_durably
from nanonormuon.storage.run import as_markdown, read_metrics
from nanonormuon.storage.shards import Data
from nanonormuon.storage.tensors import stream
from nanonormuon.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = 1e-4  # between two float32 implementations, per unit of the largest logit (at least 1)


def export(path: Path, to: Path, dtype: str = "fp32", data: Path | None = None) -> dict[str, Any]:
    """Write the model of a run or checkpoint to the new directory `to`; returns what was verified.

    `to` appears complete and verified or not at all. Padding rows of the vocabulary are cut off. A
    model without an architecture in transformers includes its source. data: prepared directory for
    the comparison (None: the run's). Raises UsageError if transformers computes other logits,
    CheckpointError, DataError, OSError.
    """
    target = to.resolve()
    if target == Path.cwd():
        raise UsageError(f"{to} is the current directory: choose another, as --out models/mine")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{to} already exists: choose another --out, or remove it")
    model, tokenizer, found = models.load_run(path, torch.float32, torch.device("cpu"))
    check_source(found, model.config)
    transformers = need("transformers", "export")
    state, context = models.state_of(found), models.context_of(found)
    tokens = some_tokens(models.data_of(state, tokenizer, data), context)
    eot, rows = tokenizer.eot, min(tokenizer.vocab_size, model.config.vocab_size)
    config, stored = replace(model.config, vocab_size=rows), DTYPES[dtype]
    with torch.device("meta"):
        cut = {name: p.size(0) for name, p in GPT(config).named_parameters()}
    weights = {n: p[: cut[n]].detach().to(stored) for n, p in model.named_parameters()}
    weights = {hf.to_hf(n): t for n, t in (*weights.items(), *model.named_buffers())}
    sampling = {"bos_token_id": eot, "eos_token_id": eot, "do_sample": True, "temperature": 0.8}
    files = {"generation_config.json": as_json(sampling, 2), **tokenizer.files()}
    described = (config, context, eot, str(stored).removeprefix("torch."))

    def attempt(partial: Path, own: str) -> dict[str, Any]:
        """Write config.json, and the model's source if `own`, and verify the directory."""
        build = hf.own_config if own else hf.plain_config
        write_durably(partial / "config.json", as_json(build(*described), 2))
        if own:
            write_durably(partial / hf.MODELING, hf.modeling())
        return verify(partial, transformers, model, tokenizer, tokens, own)

    with publish(target) as partial:
        pieces = progress("writing", 1 + len(weights), "tensor", iterable=stream(weights))
        write_durably(partial / "model.safetensors", pieces)
        for file, content in files.items():
            write_durably(partial / file, content)
        own = ", ".join(hf.obstacles(config))
        try:
            report = attempt(partial, own)
        except UsageError as error:
            if own or config.mlp == "experts":
                raise
            report = attempt(partial, str(error))  # a small model did not show the difference
        report |= {"to": str(to), "checkpoint": str(found), "dtype": dtype}
        report["rows_cut"] = model.config.vocab_size - rows
        card = model_card(config, report, tokenizer, state, models.run_of(path))
        write_durably(partial / "README.md", card.encode())
    return report


def check_source(found: Path, config: GPTConfig) -> None:
    """Raise UsageError for a model that neither transformers nor its source could load. Warn if the
    source differs from the one in the checkpoint `found`."""
    if (odd := hf.obstacles(config)) and not hf.carried(config):
        why = f"no transformers architecture supports these experts ({', '.join(odd)})"
        and_so = "their source cannot be exported: only normuon-train loads this model"
        raise UsageError(f"{found}: {why}, and {and_so}")
    if (source := found / hf.MODELING).is_file() and read_file(source) != hf.modeling():
        other = f"{source} differs from this package's model.py and parts, which are exported"
        hint = "if they compute other results, use the version that trained the model"
        log.warning(f"warning: {other}: {hint}")


def some_tokens(data: Data, context: int) -> Tensor:
    """Return the first full windows of the validation split, at most (4, 256) tokens."""
    T = min(context, 256, max(data.val.tokens - 1, 1))
    tokens, targets = next(validation_batches(data.val, T, 4, ALONE))
    full = (targets >= 0).all(1)
    return tokens[full] if full.any() else tokens[:1]


@torch.no_grad()
def verify(
    folder: Path, transformers: Any, model: GPT, tokenizer: Tokenizer, tokens: Tensor, own: str
) -> dict[str, Any]:
    """Load `folder` with transformers and with nanonormuon, and compare float32 logits and token
    ids on validation text. own: why it contains the model's source, which is run; "" if it does
    not. Raises UsageError if they differ."""
    exported = models.load_model(folder, torch.float32, torch.device("cpu"))
    transformers.utils.logging.disable_progress_bar()
    kinds = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    loaded, other = (
        kind.from_pretrained(folder, trust_remote_code=bool(own))
        for kind in progress("loading", None, "part", iterable=kinds)
    )
    three = exported, lambda tokens: loaded.float().eval()(tokens).logits, model
    logits = [each(tokens) for each in progress("comparing", None, "model", iterable=three)]
    ours, theirs, original = (each[..., : logits[0].size(-1)] for each in logits)
    difference, largest = float((theirs - ours).abs().max()), float(ours.abs().max())
    allowed = TOLERANCE * max(1.0, largest)
    if not difference <= allowed:  # also if it is NaN
        found = f"up to {difference:.3g}, expected at most {allowed:.3g}"
        raise UsageError(f"transformers' logits differ by {found}")
    text = tokenizer.decode([t for t in tokens.flatten().tolist() if t != tokenizer.eot])
    if other(text)["input_ids"] != tokenizer.encode(text):
        raise UsageError("transformers' tokenizer gives different ids")
    return {
        "architecture": type(loaded).__name__,
        "own_source": own,
        "parameters": sum(p.numel() for p in exported.parameters()),
        "tokens_compared": tokens.numel(),
        "largest_logit": largest,
        "largest_difference": difference,
        "largest_difference_to_run": float((theirs - original).abs().max()),
    }


def model_card(
    config: GPTConfig,
    report: dict[str, Any],
    tokenizer: Tokenizer,
    state: dict[str, Any] | None,
    run: Path | None,
) -> str:
    """Write a model directory's README.md: description, results and recipe."""
    name, millions = run.resolve().name if run else "model", report["parameters"] / 1e6
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    trust = ", trust_remote_code=True" if report["own_source"] else ""
    facts = {"config": config, "report": report, "tokenizer": tokenizer.name, "trust": trust}
    card = template.format(name=name, millions=millions, **facts)
    if run:
        step = state["step"] if state else 0
        card += validations(read_metrics(run / "metrics.jsonl"), step)
        card += evaluations(judge.kept(run / judge.RESULTS), step)
    if state:
        recipe = to_toml(published(state["config"], tokenizer))
        card += f"\n## Recipe\n\nAfter step {state['step']:,}, {state['tokens']:,} tokens.\n\n"
        card += f"```toml\n{recipe}```\n\nData fingerprint `{state['data']}`,\n"
        card += f"tokenizer hash `{state['tokenizer']}`.\n"
    return card


def validations(rows: Sequence[dict[str, Any]], step: int) -> str:
    """Tabulate some 12 validations up to `step`, including the last."""
    curve = [row for row in rows if "val_loss" in row and row["step"] <= step]
    every = max(1, -(-len(curve) // 12))
    forms = {"step": "", "tokens": ",", "val_loss": ".4f", "val_bpb": ".4f"}
    lines = [
        ["" if row.get(key) is None else format(row[key], form) for key, form in forms.items()]
        for row in reversed(curve[::-every])
    ]
    return table("Validation", ("step", "tokens", "loss (nats)", "bits per byte"), lines)


def evaluations(results: Sequence[dict[str, Any]], step: int) -> str:
    """Tabulate the evaluations at `step`: for each set and window, the largest one."""
    fullest: dict[tuple, list[str]] = {}

    def count(result: dict[str, Any]) -> int:
        return result.get("questions") or result.get("tokens") or 0

    for r in sorted(results, key=count):
        window, stride = (str(r.get(key, "-")) for key in ("window", "stride"))
        measure, unit = ("loss", "tokens") if "loss" in r else ("accuracy", "questions")
        error = f" ± {r['accuracy_stderr']:.4f}" if "accuracy_stderr" in r else ""
        if r.get("step") == step:
            cells = [f"{measure} {r[measure]:.4f}{error}", f"{count(r):,} {unit}", window, stride]
            fullest[r.get("path"), r.get("field"), window, stride] = [Path(r["set"]).name, *cells]
    return table("Evaluations", ("set", "result", "n", "window", "stride"), [*fullest.values()])


def published(config: dict[str, dict[str, Any]], tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Return a run's configuration with the actual tokenizer's name and without local folders."""
    data, train = config["data"], config["train"]
    mine = {"path": Path(data["path"]).name, "tokenizer": tokenizer.name}
    mine["mix"] = re.sub(r"[^,=]*/", "", data.get("mix", ""))
    source = {"init_from": Path(train.get("init_from", "")).name}
    return {**config, "data": {**data, **mine}, "train": {**train, **source}}


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table under a heading; "" if there are no rows."""
    return f"\n## {title}\n\n{as_markdown([header, *rows])}\n" if rows else ""
