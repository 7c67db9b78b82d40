"""A clean Hugging Face directory from a run, published only when transformers computes with it what
the run's model computes."""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanonormuon.data import validation_batches
from nanonormuon.errors import UsageError, need
from nanonormuon.model import GPT
from nanonormuon.pretrained import models as pretrained
from nanonormuon.pretrained.judge import RESULTS, kept
from nanonormuon.storage import huggingface as hf
from nanonormuon.storage.files import sync_directory, write_durably
from nanonormuon.storage.run import read_metrics
from nanonormuon.storage.shards import Data
from nanonormuon.storage.tensors import serialise
from nanonormuon.text.tokenizer import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = 1e-4  # between two float32 implementations, per unit of the largest logit (at least 1)


def export(path: Path, to: Path, dtype: str = "fp32", data: Path | None = None) -> dict[str, Any]:
    """Write the model of a run or checkpoint to the new directory `to`; returns what was verified.

    `to` appears complete and verified, or not at all. Rows that pad the vocabulary are cut off.
    Raises UsageError for a model that transformers has no architecture for or computes otherwise,
    CheckpointError, DataError, OSError.
    """
    shown, to = to, to.resolve()
    if to == Path.cwd():
        raise UsageError(f"{shown}: the current directory: name a new one, as --to models/mine")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"{shown}: exists already: choose another --to, or remove it")
    model, tokenizer, found = pretrained.load_run(path, torch.float32, torch.device("cpu"))
    if odd := hf.obstacles(model.config):
        raise UsageError(f"{found}: neither Qwen3 nor Llama can express {', '.join(odd)}")
    transformers = need("transformers", "export")
    state = pretrained.state_of(found)
    tokens = some_tokens(pretrained.data_of(state, tokenizer, data), pretrained.context_of(found))
    exported = cut(model, tokenizer.vocab_size, DTYPES[dtype])
    context, name = pretrained.context_of(found), str(DTYPES[dtype]).removeprefix("torch.")
    special = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    weights = {hf.to_hf(n): p.detach().to(DTYPES[dtype]) for n, p in exported.named_parameters()}
    describes = hf.plain_config(exported.config, context, tokenizer.eot, name)
    files = {
        "config.json": as_json(describes),
        "generation_config.json": as_json({**special, "do_sample": True, "temperature": 0.8}),
        "model.safetensors": serialise(weights),
        **tokenizer.files(),
    }
    partial = to.with_name(f".{to.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        for file, content in files.items():
            write_durably(partial / file, content)
        report = verify(partial, transformers, model, exported, tokenizer, tokens)
        report |= {"to": str(shown), "checkpoint": str(found), "dtype": dtype}
        report["rows_cut"] = model.config.vocab_size - exported.config.vocab_size
        card = model_card(exported, report, state, pretrained.run_of(path))
        write_durably(partial / "README.md", card.encode())
        sync_directory(partial)
        with suppress(FileNotFoundError):
            to.rmdir()  # an empty one
        os.replace(partial, to)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_directory(to.parent)
    return report


def as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def some_tokens(data: Data, context: int) -> Tensor:
    """The first windows of the validation split: (4, 256) tokens at most."""
    T = min(context, 256, max(data.val.tokens - 1, 1))
    tokens, targets = next(iter(validation_batches(data.val, T, 4)))
    full = (targets >= 0).all(1)
    return tokens[full] if bool(full.any()) else tokens[:1]


def cut(model: GPT, vocab_size: int, dtype: torch.dtype) -> GPT:
    """A copy with `vocab_size` rows in embedding and head, its weights rounded to `dtype`."""
    config = replace(model.config, vocab_size=min(vocab_size, model.config.vocab_size))
    copy = GPT(config, torch.float32).eval()
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in copy.named_parameters():
            p.copy_(values[name][: p.size(0)].to(dtype))
    return copy


@torch.no_grad()
def verify(
    folder: Path, transformers: Any, model: GPT, exported: GPT, tokenizer: Tokenizer, tokens: Tensor
) -> dict[str, Any]:
    """Load `folder` through transformers and compare, in float32, logits and token ids on real
    text. Raises UsageError if they differ."""
    transformers.utils.logging.disable_progress_bar()
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    odd = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if odd:
        raise UsageError(f"transformers did not load {len(odd)} tensors, first {odd[0]}")
    theirs = loaded.float().eval()(tokens).logits
    ours, original = exported(tokens), model(tokens)[..., : exported.config.vocab_size]
    difference, largest = float((theirs - ours).abs().max()), float(ours.abs().max())
    if not difference <= TOLERANCE * max(1.0, largest):
        raise UsageError(
            f"transformers computes other logits: largest difference {difference:.3g}, expected at "
            f"most {TOLERANCE * max(1.0, largest):.3g}; nothing was exported"
        )
    text = tokenizer.decode([t for t in tokens.flatten().tolist() if t != tokenizer.eot])
    other = transformers.AutoTokenizer.from_pretrained(folder)
    if other(text)["input_ids"] != tokenizer.encode(text):
        raise UsageError("transformers' tokenizer gives other ids; nothing was exported")
    return {
        "architecture": type(loaded).__name__,
        "parameters": sum(p.numel() for p in exported.parameters()),
        "tokens_compared": tokens.numel(),
        "largest_logit": largest,
        "largest_difference": difference,
        "largest_difference_to_run": float((theirs - original).abs().max()),
    }


def model_card(
    model: GPT, report: dict[str, Any], state: dict[str, Any] | None, run: Path | None
) -> str:
    """The README.md of a model directory: what it is, how it came about, what it reaches."""
    c = model.config
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [nanonormuon, normuon]",
        "---",
        "",
        f"# {run.resolve().name if run else 'model'}",
        "",
        f"A language model of {report['parameters'] / 1e6:.2f}M parameters ({c.n_layer} layers, "
        f"width {c.n_embd}, vocabulary {c.vocab_size}), trained with nanonormuon. Architecture "
        f"{report['architecture']}, weights {report['dtype']}. It continues text; it has no chat "
        "format.",
        "",
        "```python",
        "import torch",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        'ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("Once")["input_ids"]]])',
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))",
        "```",
        "",
        f"Checked on {report['tokens_compared']} tokens of validation text: logits as transformers "
        f"computes them differ by at most {report['largest_difference']:.2g} from nanonormuon's "
        f"with these weights, by {report['largest_difference_to_run']:.2g} from the run's own.",
    ]
    rows = read_metrics(run / "metrics.jsonl") if run else []
    curve = [r for r in rows if "val_loss" in r]
    if curve:
        lines += ["", "## Validation", "", "| step | tokens | loss (nats) | bits per byte |"]
        lines += ["|---|---|---|---|"]
        every = -(-len(curve) // 12)
        for r in [r for i, r in enumerate(curve) if (len(curve) - 1 - i) % every == 0]:
            bpb = "" if r.get("val_bpb") is None else f"{r['val_bpb']:.4f}"
            lines.append(f"| {r['step']} | {r['tokens']:,} | {r['val_loss']:.4f} | {bpb} |")
    if run and (results := kept(run / RESULTS)):
        lines += ["", "## Evaluations", "", "| set | result |", "|---|---|"]
        for r in results:
            value = f"loss {r['loss']:.4f}" if "loss" in r else f"accuracy {r['accuracy']:.4f}"
            lines.append(f"| {r['set']} | {value} |")
    if state:
        lines += ["", "## Recipe", "", f"After step {state['step']:,}, {state['tokens']:,} tokens."]
        lines += ["", "```toml"]
        for section, table in state["config"].items():
            lines.append(f"[{section}]")
            for key, value in table.items():
                if key in ("path", "init_from"):  # where it lay is nobody's business
                    value = Path(value).name
                lines.append(f"{key} = {json.dumps(value)}")
        lines += ["```", "", f"Data fingerprint `{state['data']}`,"]
        lines.append(f"tokenizer hash `{state['tokenizer']}`.")
    return "\n".join(lines) + "\n"
