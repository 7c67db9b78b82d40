"""Export a run's model as a Hugging Face directory, published only if transformers computes equal
logits from it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanonormuon.config import to_toml
from nanonormuon.data import validation_batches
from nanonormuon.errors import UsageError
from nanonormuon.model import GPT, GPTConfig
from nanonormuon.pretrained import judge, models
from nanonormuon.runtime.packages import need
from nanonormuon.storage import huggingface as hf
from nanonormuon.storage.files import publish, write_durably
from nanonormuon.storage.run import read_metrics
from nanonormuon.storage.shards import Data
from nanonormuon.storage.tensors import serialise
from nanonormuon.text.tokenizer import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TABLES = ("embed_tokens.weight", "lm_head.weight")  # one row per token id
TOLERANCE = 1e-4  # between two float32 implementations, per unit of the largest logit (at least 1)
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [nanonormuon, normuon]
---

# {name}

A language model of {millions:.2f}M parameters ({config.n_layer} layers, width {config.n_embd}, \
vocabulary {config.vocab_size}), trained with nanonormuon. Architecture {report[architecture]}, \
weights {report[dtype]}. It continues text; it has no chat format.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("Once")["input_ids"]]])
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))
```

Checked on {report[tokens_compared]} tokens of validation text: logits as transformers computes \
them differ by at most {report[largest_difference]:.2g} from nanonormuon's with these weights, by \
{report[largest_difference_to_run]:.2g} from the run's own.
"""
RECIPE = """
## Recipe

After step {step:,}, {tokens:,} tokens.

```toml
{toml}```

Data fingerprint `{data}`,
tokenizer hash `{tokenizer}`.
"""


def export(path: Path, to: Path, dtype: str = "fp32", data: Path | None = None) -> dict[str, Any]:
    """Write the model of a run or checkpoint to the new directory `to`; returns what was verified.

    `to` appears complete and verified, or not at all. Rows that pad the vocabulary are cut off.
    data: prepared directory with the validation text to compare on (None: the run's own). Raises
    UsageError for a model that transformers cannot express or computes differently,
    CheckpointError, DataError, OSError.
    """
    target = to.resolve()
    if target == Path.cwd():
        raise UsageError(f"{to}: the current directory: name a new one, as --to models/mine")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{to}: exists already: choose another --to, or remove it")
    model, tokenizer, found = models.load_run(path, torch.float32, torch.device("cpu"))
    if odd := hf.obstacles(model.config):
        raise UsageError(f"{found}: neither Qwen3 nor Llama can express {', '.join(odd)}")
    transformers = need("transformers", "export")
    state, context = models.state_of(found), models.context_of(found)
    tokens = some_tokens(models.data_of(state, tokenizer, data), context)
    eot, rows = tokenizer.eot, min(tokenizer.vocab_size, model.config.vocab_size)
    weights = {
        hf.to_hf(name): (p[:rows] if name in TABLES else p).detach().to(DTYPES[dtype])
        for name, p in model.named_parameters()
    }
    config, stored = replace(model.config, vocab_size=rows), str(DTYPES[dtype])
    described = hf.plain_config(config, context, eot, stored.removeprefix("torch."))
    sampling = {"bos_token_id": eot, "eos_token_id": eot, "do_sample": True, "temperature": 0.8}
    files = {
        "config.json": as_json(described),
        "generation_config.json": as_json(sampling),
        "model.safetensors": serialise(weights),
        **tokenizer.files(),
    }
    with publish(target) as partial:
        for file, content in files.items():
            write_durably(partial / file, content)
        report = verify(partial, transformers, model, tokenizer, tokens)
        report |= {"to": str(to), "checkpoint": str(found), "dtype": dtype}
        report["rows_cut"] = model.config.vocab_size - rows
        card = model_card(config, report, state, models.run_of(path))
        write_durably(partial / "README.md", card.encode())
    return report


def as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def some_tokens(data: Data, context: int) -> Tensor:
    """The first whole windows of the validation split: (4, 256) tokens at most."""
    T = min(context, 256, max(data.val.tokens - 1, 1))
    tokens, targets = next(validation_batches(data.val, T, 4))
    full = (targets >= 0).all(1)
    return tokens[full] if full.any() else tokens[:1]


@torch.no_grad()
def verify(
    folder: Path, transformers: Any, model: GPT, tokenizer: Tokenizer, tokens: Tensor
) -> dict[str, Any]:
    """Load `folder` with transformers and with nanonormuon, and compare their logits (in float32)
    and token ids on validation text. Raises UsageError if they differ."""
    transformers.utils.logging.disable_progress_bar()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    exported = models.load_model(folder, torch.float32, torch.device("cpu"))
    ours, theirs = exported(tokens), loaded.float().eval()(tokens).logits
    original = model(tokens)[..., : ours.size(-1)]
    difference, largest = float((theirs - ours).abs().max()), float(ours.abs().max())
    allowed = TOLERANCE * max(1.0, largest)
    if not difference <= allowed:  # also if it is NaN
        raise UsageError(
            f"transformers computes other logits: largest difference {difference:.3g}, expected at "
            f"most {allowed:.3g}; nothing was exported"
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
    config: GPTConfig, report: dict[str, Any], state: dict[str, Any] | None, run: Path | None
) -> str:
    """The README.md of a model directory: what the model is, its results, how it was trained."""
    name, millions = run.resolve().name if run else "model", report["parameters"] / 1e6
    card = CARD.format(name=name, millions=millions, config=config, report=report)
    curve = [r for r in read_metrics(run / "metrics.jsonl") if "val_loss" in r] if run else []
    if curve:
        every = -(-len(curve) // 12)
        forms = {"step": "", "tokens": ",", "val_loss": ".4f", "val_bpb": ".4f"}
        rows = [
            ["" if row.get(key) is None else format(row[key], form) for key, form in forms.items()]
            for row in reversed(curve[::-every])  # with the last
        ]
        card += table("Validation", ("step", "tokens", "loss (nats)", "bits per byte"), rows)
    if results := judge.kept(run / judge.RESULTS) if run else []:
        measures = ("loss" if "loss" in r else "accuracy" for r in results)
        rows = [(r["set"], f"{m} {r[m]:.4f}") for r, m in zip(results, measures)]
        card += table("Evaluations", ("set", "result"), rows)
    if state:
        private = ("path", "init_from")  # where files lay on the machine is nobody's business
        recipe = {
            section: {k: Path(v).name if k in private else v for k, v in values.items()}
            for section, values in state["config"].items()
        }
        card += RECIPE.format(toml=to_toml(recipe), **state)
    return card


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table under a heading."""
    lines = [header, ["---"] * len(header), *rows]
    return f"\n## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
