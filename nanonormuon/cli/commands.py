"""Commands on what a run has left: options and help only, as in cli.py, which lists them."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run directory, checkpoint or model directory.")
]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def known_device(device: str) -> str:
    from nanonormuon.runtime import distributed

    try:
        distributed.start(device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return device


def print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=1, ensure_ascii=False))


def sample(
    path: Run,
    prompt: Annotated[str, typer.Option(help='Text to continue; "-" reads it from stdin.')] = "",
    file: Annotated[Path | None, typer.Option(help="File that holds the prompt.")] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Ask for prompts, line by line.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Keep so many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Keep this much probability.")
    ] = 0.95,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given several times.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same text; sample i has seed + i.")] = 0,
    num: Annotated[int, typer.Option(min=1, help="Number of samples, made together.")] = 1,
    device: Device = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, for programs: one object per line.")
    ] = False,
) -> None:
    """Continue a text with a trained model.

    All it needs is the run directory. Samples are the same for the same seed.

    \b
    normuon-train sample runs/demo-20260101-120000 --prompt "def main():" --num 3
    normuon-train sample RUN --prompt "ROMEO:" --temperature 0.6 --max-tokens 400 --stop "JULIET:"
    echo "Once upon a time" | normuon-train sample RUN --prompt - --json
    normuon-train sample RUN --interactive
    """
    if sum(map(bool, (prompt, file, interactive))) > 1:
        raise typer.BadParameter("--prompt, --file, --interactive: expected one of them")
    if not -(1 << 63) <= seed < 1 << 63:
        raise typer.BadParameter(f"--seed {seed}: expected -2^63 to 2^63 - 1")
    import torch

    from nanonormuon.cli import sampling
    from nanonormuon.pretrained import models as pretrained
    from nanonormuon.runtime import distributed

    where = torch.device(known_device(device)) if device != "auto" else distributed.start().device
    dtype = distributed.compute_dtype("auto", where)
    model, tokenizer, found = pretrained.load_run(path, dtype, where)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    settings |= {"context": pretrained.context_of(found)}
    for text in sampling.prompts(prompt, file, interactive):
        sampling.show(model, tokenizer, text, max_tokens, num, stop or (), as_json, **settings)


def evaluate(
    path: Run,
    data: Annotated[
        list[Path] | None, typer.Option(help="Prepared directory: its validation split.")
    ] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text file, tokenized here.")] = None,
    choices: Annotated[
        list[Path] | None,
        typer.Option(help="Multiple choice: HellaSwag's, ARC's or PIQA's JSONL as published."),
    ] = None,
    window: Annotated[int, typer.Option(min=0, help="Tokens in sight; 0: as trained.")] = 0,
    stride: Annotated[
        int, typer.Option(min=0, help="Tokens predicted per window; 0: all. Less: more in sight.")
    ] = 0,
    max_tokens: Annotated[int, typer.Option(min=0, help="Tokens per set; 0: all.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Loss on any text, accuracy on multiple choice.

    Loss, perplexity and bits per byte. Without a set: the validation split of the run. --data,
    --text and --choices may be given several times. Results are kept in RUN/evaluations.json.

    \b
    normuon-train evaluate RUN
    normuon-train evaluate RUN --text book.txt --stride 64
    normuon-train evaluate RUN --data data/mine --choices hellaswag_val.jsonl --json
    """
    from nanonormuon.pretrained import judge as evaluation

    results = evaluation.evaluate(
        path, data or (), text or (), choices or (), window, stride, max_tokens,
        known_device(device),
    )  # fmt: skip
    if as_json:
        print_json(results)
    else:
        typer.echo("\n".join(evaluation.describe(result) for result in results))


def export(
    path: Run,
    to: Annotated[Path, typer.Option(help="The new model directory.")],
    dtype: Annotated[str, typer.Option(help="fp32 or bf16, of the weights.")] = "fp32",
    data: Annotated[
        Path | None,
        typer.Option(help="Prepared directory to verify on; the run's own if not given."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a verified Hugging Face directory.

    It is loaded through transformers, and kept only if that computes the same logits.

    \b
    normuon-train export RUN --to models/mine
    normuon-train export RUN/checkpoints/step-000500 --to models/mine --dtype bf16
    """
    from nanonormuon.pretrained import export as exporting

    if dtype not in exporting.DTYPES:
        raise typer.BadParameter(f"--dtype {dtype}: expected fp32 or bf16")
    report = exporting.export(path, to, dtype, data)
    if as_json:
        print_json(report)
        return
    typer.echo(
        f"{report['to']}: {report['architecture']}, {report['parameters'] / 1e6:.2f}M parameters, "
        f"weights {report['dtype']}"
        + (
            f", {cut} rows that padded the vocabulary cut off"
            if (cut := report["rows_cut"])
            else ""
        )
    )
    typer.echo(
        f"verified: transformers' logits on {report['tokens_compared']} tokens of validation text "
        f"differ by at most {report['largest_difference']:.2g} (from the run's own weights: "
        f"{report['largest_difference_to_run']:.2g}; largest logit {report['largest_logit']:.3g})"
    )


def compare(
    paths: Runs,
    target: Annotated[
        float | None, typer.Option(help="Also show where val_loss first was this low.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the curves into this .png, .svg or .pdf.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show runs side by side, as a table or curves.

    \b
    normuon-train compare runs/a runs/b --target 3.28
    normuon-train compare runs/* --plot curves.png
    """
    from nanonormuon.runs import compare as comparing

    runs = comparing.read_all(paths)
    if plot is not None:
        comparing.plot(runs, plot, target)
    if as_json:
        print_json([comparing.row_of(run, target) for run in runs])
    else:
        typer.echo(comparing.table(runs, target))
        if plot is not None:
            typer.echo(f"curves: {plot}")


def report(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path(
        "report.html"
    ),
) -> None:
    """Write a run as one HTML page.

    Curves, samples over time, configuration and environment; it refers to nothing outside itself.

    \b
    normuon-train report RUN -o report.html
    """
    from nanonormuon.runs import report as reporting

    reporting.write(path, out)
    typer.echo(f"{out}: open it in a browser")


def diagnose(
    path: Run,
    plot: Annotated[
        Path | None, typer.Option(help="Draw spectra and row norms into this .png, .svg or .pdf.")
    ] = None,
    layers: Annotated[
        str, typer.Option(help='Layers to draw, as "0,5,11"; first, middle and last if not given.')
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Show how even the optimizer's updates are.

    Singular values and neurons' norms of each matrix's momentum, Muon's update and NorMuon's.

    \b
    normuon-train diagnose RUN
    normuon-train diagnose RUN/checkpoints/step-000500 --plot update.png --layers 0,11
    """
    from nanonormuon.runs import spectra as diagnosing

    try:
        wanted = [int(i) for i in layers.split(",") if i.strip()]
    except ValueError:
        raise typer.BadParameter(f'--layers "{layers}": expected numbers, as 0,5,11') from None
    if wanted and plot is None:
        raise typer.BadParameter(f'--layers "{layers}": expected with --plot only')
    profiles = diagnosing.diagnose(path)
    if plot is not None:
        diagnosing.draw(profiles, plot, wanted)
    if as_json:
        print_json(diagnosing.as_numbers(profiles))
    else:
        typer.echo(diagnosing.table(profiles))
        if plot is not None:
            typer.echo(f"picture: {plot}")


def doctor(as_json: AsJson = False) -> None:
    """Check this machine, and say what to mend.

    Versions, devices, what a run would choose and why, two processes that talk. Exits with 1 if
    something would keep a run from working.

    \b
    normuon-train doctor
    normuon-train doctor --json
    """
    from nanonormuon.cli import doctor as examining

    findings = examining.examine()
    if as_json:
        print_json([asdict(f) for f in findings])
    else:
        typer.echo(examining.describe(findings))
    if any(f.status == "fail" for f in findings):
        raise typer.Exit(1)


Recipe = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE|FILE.toml|SECTION.KEY=VALUE", help="What all runs share, as for `run`."
    ),
]
Parallel = Annotated[
    int, typer.Option(min=0, help="Runs at a time; 0: one per GPU, or one on the CPU.")
]
Ranks = Annotated[int, typer.Option(min=1, help="Processes (GPUs) per run, through torchrun.")]


def race(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="Directory of the comparison; goes on if it is there.")],
    optimizers: Annotated[
        str,
        typer.Option(
            help="Separated by commas: normuon, muon, adamw, module:Class of an installed package, "
            "each with settings behind a +."
        ),
    ] = "normuon,muon,adamw",
    lr: Annotated[
        list[str] | None,
        typer.Option(
            help='Rates to choose from: "0.01,0.02", "adamw=0.001,0.003" for one of them, "0.5x,2x"'
            " as multiples of its usual one. Given several times."
        ),
    ] = None,
    wd: Annotated[str, typer.Option(help='Weight decays to choose from, as "0,0.1".')] = "",
    sweep: Annotated[
        list[str] | None, typer.Option(help="A further axis of the grid, SECTION.KEY=A,B,C.")
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=0, help="Fresh seeds for the settings chosen; 0: only choose.")
    ] = 5,
    tuning_seeds: Annotated[int, typer.Option(min=1, help="Seeds per setting tried.")] = 1,
    parallel: Parallel = 0,
    ranks: Ranks = 1,
    as_json: AsJson = False,
) -> None:
    """Compare optimizers, each at its best settings.

    Settings are chosen on a part of the training text, and judged with fresh seeds on the
    validation split after full runs. Killed, it goes on where it was when the command is repeated.

    \b
    normuon-train race shakespeare-char train.steps=500 --seeds 5 --out runs/race
    normuon-train race demo --optimizers normuon,adamw --lr adamw=0.001,0.003 --out runs/two
    normuon-train race demo --optimizers normuon,normuon+beta2=0.9,torch.optim:Muon --out runs/b
    """
    from nanonormuon.lab import race as racing
    from nanonormuon.lab import results as standings
    from nanonormuon.lab.processes import Runner

    field = racing.entries(recipe, optimizers, lr or (), wd, sweep or ())
    found = racing.Race(recipe, field, seeds, out, tuning_seeds).run(Runner(parallel, ranks))
    if as_json:
        print_json(found)
    else:
        typer.echo(standings.markdown(found))
        typer.echo(f"results: {out / 'results.json'}, {out / 'race.png'}")


def trials(
    recipe: Recipe,
    target: Annotated[float, typer.Option(help="The validation loss to reach in the mean.")],
    out: Annotated[Path, typer.Option(help="Directory of the trials; goes on if it is there.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Runs, with the seeds 0 to N - 1.")] = 10,
    parallel: Parallel = 0,
    ranks: Ranks = 1,
) -> None:
    """Repeat a recipe, and test the mean against a target.

    Each trial leaves a log with source, configuration, environment and losses. The last line is
    JSON: mean, standard deviation, Track 3's rule (target - mean) sqrt(n) >= 0.004, p-value.

    \b
    normuon-train trials track3-normuon --n 20 --target 3.28 --ranks 8 --out runs/track3
    normuon-train trials shakespeare-char train.steps=300 --n 5 --target 1.9 --out runs/five
    """
    if not math.isfinite(target):
        raise typer.BadParameter(f"--target {target}: expected a finite number")
    from nanonormuon.lab import trials as trying
    from nanonormuon.lab.processes import Runner

    found = trying.run(recipe, n, target, out, Runner(parallel, ranks))
    typer.echo(trying.describe(found))
    typer.echo(json.dumps(found))


COMMANDS = (race, trials, sample, evaluate, export, compare, report, diagnose, doctor)
