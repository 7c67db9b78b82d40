"""Exports a run's model as a Hugging Face directory, if transformers computes equal logits."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanonormuon.data import validation_batches
from nanonormuon.errors import UsageError
from nanonormuon.model import GPT
from nanonormuon.parts.config import GPTConfig
from nanonormuon.pretrained import judge, models
from nanonormuon.runtime.distributed import ALONE
from nanonormuon.runtime.packages import need
from nanonormuon.storage import huggingface as hf
from nanonormuon.storage.files import as_json, progress, publish, read_file, write_durably
from nanonormuon.storage.run import as_markdown, read_rows
from nanonormuon.storage.shards import Data
from nanonormuon.storage.tensors import stream
from nanonormuon.storage.values import to_toml
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
    taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if taken or target == Path.cwd():
        raise UsageError(f"{to} already exists: choose another --out, or remove it")
    model, tokenizer, found = models.load_run(path, torch.float32, torch.device("cpu"))
    own = source_needed(found, model.config)
    transformers = need("transformers", "export")
    state, context = models.state_of(found), models.context_of(found)
    tokens = some_tokens(models.data_of(state, tokenizer, data), context)
    eot, rows = tokenizer.eot, min(tokenizer.vocab_size, model.config.vocab_size)
    config, stored = replace(model.config, vocab_size=rows), DTYPES[dtype]
    with torch.device("meta"):
        cut = {name: p.size(0) for name, p in GPT(config).named_parameters()}
    weights = {n: p[: cut[n]].detach().to(stored) for n, p in model.named_parameters()}
    weights = {hf.to_hf(n): t for n, t in (*weights.items(), *model.named_buffers())}
    described = context, eot, bool(own), str(stored).removeprefix("torch.")
    sampling = {"bos_token_id": eot, "eos_token_id": eot, "do_sample": True, "temperature": 0.8}
    pieces = progress("writing", 1 + len(weights), "tensor", iterable=stream(weights))
    files = {
        "model.safetensors": pieces,
        "config.json": as_json(hf.exported_config(config, *described), 2),
        "generation_config.json": as_json(sampling, 2),
        **({hf.MODELING: hf.modeling()} if own else {}),
        **tokenizer.files(),
    }
    with publish(target) as partial:
        for file, content in files.items():
            write_durably(partial / file, content)
        report = verify(partial, transformers, model, tokenizer, tokens, own)
        report |= {"to": str(to), "checkpoint": str(found), "dtype": dtype}
        report["rows_cut"] = model.config.vocab_size - rows
        card = model_card(config, report, tokenizer, state, models.run_of(path))
        write_durably(partial / "README.md", card.encode())
    return report


def source_needed(found: Path, config: GPTConfig) -> str:
    """Return why an export must contain the model's source; "" if it need not. Raises UsageError
    for a model that its source could not load either. Warns if the source differs from the one in
    the checkpoint `found`."""
    why = ", ".join(hf.obstacles(config))
    if why and not hf.carried(config):
        problem = f"no transformers architecture supports these experts ({why})"
        raise UsageError(f"{found}: {problem}: only normuon-train loads this model")
    if (source := found / hf.MODELING).is_file() and read_file(source) != hf.modeling():
        other = f"{source} differs from this package's model.py and parts, which are exported"
        hint = "if they compute other results, use the version that trained the model"
        log.warning(f"warning: {other}: {hint}")
    return why


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
    trust = {"trust_remote_code": bool(own)}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **trust).float().eval()
    other = transformers.AutoTokenizer.from_pretrained(folder, **trust)
    three = exported, lambda tokens: loaded(tokens).logits, model
    logits = [each(tokens) for each in progress("comparing", None, "model", iterable=three)]
    ours, theirs, original = (each[..., : logits[0].size(-1)] for each in logits)
    difference, largest = float((theirs - ours).abs().max()), float(ours.abs().max())
    allowed = TOLERANCE * max(1.0, largest)
    if not difference <= allowed:  # also if it is NaN
        found = f"up to {difference:.3g}, expected at most {allowed:.3g}"
        hint = "if model.py was changed, let storage/huggingface.py's `obstacles` name the change"
        raise UsageError(f"transformers' logits differ by {found}: {hint}")
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
        card += validations(read_rows(run / "metrics.jsonl"), step)
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
    forms = {"step": "", "tokens": ",", "val_loss": ".4f", "val_bpb": ".4f"}
    lines = [
        ["" if row.get(key) is None else format(row[key], form) for key, form in forms.items()]
        for row in curve[:: -max(1, -(-len(curve) // 12))]
    ]
    header = ("step", "tokens", "loss (nats)", "bits per byte")
    return table("Validation", header, lines[::-1])


def evaluations(results: Sequence[dict[str, Any]], step: int) -> str:
    """Tabulate the evaluations at `step`: for each set and window, the largest one."""
    fullest = {}
    for r in sorted(results, key=lambda r: r.get("questions") or r.get("tokens") or 0):
        window, stride = (str(r.get(key, "-")) for key in ("window", "stride"))
        value, n = f"loss {r.get('loss', 0):.4f}", f"{r.get('tokens', 0):,} tokens"
        if "accuracy" in r:
            value = f"accuracy {r['accuracy']:.4f} ± {r.get('accuracy_stderr', 0):.4f}"
            n = f"{r.get('questions', 0):,} questions"
        if r.get("step") == step:
            cells = [Path(r["set"]).name, value, n, window, stride]
            fullest[r.get("path"), r.get("field"), window, stride] = cells
    header = ("set", "result", "n", "window", "stride")
    return table("Evaluations", header, [*fullest.values()])


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
