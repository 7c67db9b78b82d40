"""Use a trained model: sample, evaluate, export."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from nanonormuon.cli import options


def sample(
    path: options.Run,
    prompt: Annotated[str, Option(help="Text to continue; - reads standard input.")] = "",
    file: Annotated[Path | None, Option(help="Read the prompt from a file.")] = None,
    interactive: Annotated[bool, Option("--interactive", "-i", help="Ask for prompts.")] = False,
    max_tokens: Annotated[int, Option(min=1, help="Tokens per sample.")] = 256,
    temperature: Annotated[float, Option(min=0, help="Randomness; 0: likeliest token.")] = 0.9,
    top_k: Annotated[int, Option(min=0, help="Draw from the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, Option(min=0.01, max=1, help="Probability mass to draw from.")] = 0.95,
    stop: Annotated[list[str] | None, Option(help="Stop before this text; repeatable.")] = None,
    seed: Annotated[int, Option(help="Seed of the first sample; sample i has seed + i.")] = 0,
    num: Annotated[int, Option(min=1, help="Number of samples.")] = 1,
    device: options.Device = "auto",
    as_json: Annotated[bool, Option("--json", help="Print one JSON object per line.")] = False,
) -> None:
    """Generate text with a trained model.

    The same seed gives the same text; with --interactive, each prompt uses the next seeds.

    \b
    normuon-train sample runs/demo-20260101-120000 --prompt "def main():" --num 3
    normuon-train sample RUN --prompt "ROMEO:" --temperature 0.6 --max-tokens 400 --stop "JULIET:"
    echo "Once upon a time" | normuon-train sample RUN --prompt - --json
    normuon-train sample RUN --interactive
    """
    if sum(map(bool, (prompt, file, interactive))) > 1:
        raise typer.BadParameter("--prompt, --file, --interactive: expected at most one of these")
    if not -(1 << 63) <= seed < 1 << 63:
        raise typer.BadParameter(f"--seed {seed}: expected -2^63 to 2^63 - 1")
    from nanonormuon.cli import sampling
    from nanonormuon.pretrained import models
    from nanonormuon.runtime import distributed

    where = started(device).device
    dtype = distributed.compute_dtype("auto", where)
    model, tokenizer, found = models.load_run(path, dtype, where)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    settings["context"] = models.context_of(found)
    for text in sampling.prompts(prompt, file, interactive):
        sampling.show(model, tokenizer, text, max_tokens, num, stop or (), as_json, **settings)
        settings["seed"] = (settings["seed"] + num) % (1 << 63)


DATA = "Prepared data: measure on its validation split; repeatable."
TEXT = "Text file or directory, in any format that `prepare` reads; repeatable."
Paths = list[Path] | None
CHOICES = (
    "Multiple-choice questions: JSONL of HellaSwag, ARC or PIQA as published, or "
    '{"question", "choices", "answer"}; repeatable.'
)
STRIDE = "Tokens predicted per window; 0: all. A smaller stride gives each token more context."
BREAKDOWN = "Add loss by token frequency, activation kurtosis, loss with 4-bit weights."


def evaluate(
    path: options.Run,
    data: Annotated[Paths, Option(help=DATA, parser=options.named)] = None,
    text: Annotated[Paths, Option(help=TEXT, parser=options.named)] = None,
    text_field: Annotated[str, Option(help="Field or column with a record's text.")] = "text",
    choices: Annotated[Paths, Option(help=CHOICES, parser=options.named)] = None,
    window: Annotated[int, Option(min=0, help="Tokens of context; 0: as in training.")] = 0,
    stride: Annotated[int, Option(min=0, help=STRIDE)] = 0,
    max_tokens: Annotated[int, Option(min=0, help="Tokens per data set; 0: all.")] = 0,
    breakdown: Annotated[bool, Option("--breakdown", help=BREAKDOWN)] = False,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Measure loss on text, accuracy on multiple choice.

    Prints loss, perplexity and bits per byte, by default on the run's validation split, and saves
    them in RUN/evaluations.json.

    \b
    normuon-train evaluate RUN
    normuon-train evaluate RUN --text book.txt --stride 64
    normuon-train evaluate RUN --breakdown
    normuon-train evaluate RUN --data data/mine --choices hellaswag_val.jsonl --json
    """
    from nanonormuon.pretrained import judge

    started(device)
    sets = data or (), text or (), choices or ()
    results = judge.evaluate(path, *sets, window, stride, max_tokens, device, text_field, breakdown)
    options.show(results, "\n".join(map(judge.describe, results)), as_json)


VERIFY = "Data to verify on; default: the run's own."


def export(
    path: options.Run,
    out: Annotated[Path | None, Option(help="Directory to create (required).")] = None,
    older: options.Older = None,
    dtype: Annotated[str, Option(help="Type of the stored weights: fp32 or bf16.")] = "fp32",
    data: Annotated[Path | None, Option(help=VERIFY, **options.DIR)] = None,
    as_json: options.AsJson = False,
) -> None:
    """Export a model to Hugging Face's format, and verify it.

    Keeps the directory only if transformers computes the run's logits from it.

    \b
    normuon-train export RUN --out models/mine
    normuon-train export RUN/checkpoints/step-000500 --out models/mine --dtype bf16
    """
    from nanonormuon.pretrained import export as exporting

    if dtype not in exporting.DTYPES:
        raise typer.BadParameter(f"--dtype {dtype}: expected fp32 or bf16")
    if (to := out or older) is None:
        raise typer.BadParameter("Missing option '--out'.")
    report = exporting.export(path, to, dtype, data)
    size = f"{report['parameters'] / 1e6:.2f}M parameters, weights {report['dtype']}"
    if cut := report["rows_cut"]:
        size += f", {cut} padding rows of the vocabulary cut off"
    if why := report["own_source"]:
        size += f"; loads with trust_remote_code=True, which runs its own source: {why}"
    text = (
        f"{report['to']}: {report['architecture']}, {size}\n"
        f"verified: transformers' logits on {report['tokens_compared']} tokens of validation text "
        f"differ by at most {report['largest_difference']:.2g} (from the run's own weights: "
        f"{report['largest_difference_to_run']:.2g}; largest logit {report['largest_logit']:.3g})"
    )
    options.show(report, text, as_json)


def started(device: str) -> Any:
    """Start on --device; returns a distributed.World."""
    from nanonormuon.runtime import distributed

    try:
        return distributed.start(device)
    except ValueError:
        expected = "expected auto, cpu or, where normuon-train doctor finds it, cuda or mps"
        raise typer.BadParameter(f"--device {device}: {expected}") from None
