"""The command line: options in, at most one line per mistake out. No logic of its own."""

import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="normuon-train",
    help="Train small language models with NorMuon (arXiv 2510.05491).\n\n"
    "Begin with `normuon-train run`: a demo of two minutes, on any machine, without a network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE|FILE.toml|SECTION.KEY=VALUE]...",
        help="Recipes, TOML files and single settings, merged from left to right.",
        show_default=False,
    ),
]


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback.")] = False,
) -> None:
    from nanonormuon.log import to_console

    to_console(logging.DEBUG if debug else logging.INFO)


@app.command()
def run(
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; runs/RECIPE-DATE-TIME if not given.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its newest checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print the configuration, then stop.")
    ] = False,
) -> None:
    """Train a model. Without a recipe: the demo.

    \b
    normuon-train run
    normuon-train run demo train.steps=300 optim.lr=0.01
    normuon-train run shakespeare-char my.toml --out runs/a
    normuon-train run --resume --out runs/a
    torchrun --standalone --nproc_per_node=8 train.py gpt2-124m
    """
    from nanonormuon import config
    from nanonormuon.train import train

    arguments = overrides or []
    sources = [Path(a).stem for a in arguments if not config.is_setting(a)]
    if resume:
        if out is None or not (out / "config.toml").is_file():
            known = sorted(str(p.parent) for p in Path("runs").glob("*/config.toml"))
            raise config.ConfigError(
                f"--resume: {out or 'no --out given'}: expected a run directory; known here: "
                + (", ".join(known[-5:]) or "none in runs/")
            )
        # stop_at was for the process that had it
        arguments = [str(out.resolve() / "config.toml"), "train.stop_at=0", *arguments]
    elif not sources:
        sources, arguments = ["demo"], ["demo", *arguments]
    settings, origin = config.load(arguments)
    if dry_run:
        typer.echo(config.to_toml(settings, origin), nl=False)
        return
    if out is None:
        out = Path("runs") / f"{'-'.join(sources)}-{time.strftime('%Y%m%d-%H%M%S')}"
    summary = train(settings, out, resume)
    if int(os.environ.get("RANK", "0")) == 0:
        report(summary, out)


def report(summary: dict, out: Path) -> None:
    """A run's last words: the result, where it lies, what to do next."""
    result = f"step {summary['steps']:,}, {summary['tokens']:,} tokens"
    if summary.get("val_loss") is not None:
        result += f": val_loss {summary['val_loss']:.4f}"
    if summary.get("val_bpb") is not None:
        result += f", {summary['val_bpb']:.4f} bits per byte"
    typer.echo(
        f"done: {result}; {summary['train_seconds']:.0f} s of training, "
        f"{summary['total_seconds']:.0f} s in all"
    )
    typer.echo(f"checkpoint: {out / summary['checkpoint']}  (a Hugging Face model directory)")
    typer.echo(f"next: normuon-train sample {out} --prompt 'def '")


@app.command()
def prepare(
    sources: Annotated[list[Path], typer.Argument(help="Text files, or directories of them.")],
    out: Annotated[Path, typer.Option(help="Directory for the shards.")],
    tokenizer: Annotated[
        str,
        typer.Option(help="byte, gpt2, bpe:N (trained on the text), or a saved tokenizer's path."),
    ] = "bpe:4096",
    val: Annotated[
        float, typer.Option(help="Share of the documents held out for validation.")
    ] = 0.02,
) -> None:
    """Turn text into verified shards of tokens.

    \b
    normuon-train prepare book.txt --out data/book --tokenizer byte
    normuon-train prepare notes/ essays/ --out data/mine --tokenizer bpe:4096 --val 0.05
    normuon-train run demo data.path=data/mine
    """
    from nanonormuon.prepare import prepare as prepare_shards

    manifest = prepare_shards(sources, out, tokenizer, val)
    for name in ("train", "val"):
        split = manifest[name]
        typer.echo(
            f"{name}: {split['documents']:,} documents, {split['bytes']:,} bytes, "
            f"{split['tokens']:,} tokens"
        )
    typer.echo(f"next: normuon-train run demo data.path={out}")


@app.command()
def sample(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory or checkpoint.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Keep so many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Keep this much probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    num: Annotated[int, typer.Option(min=1, help="Number of samples.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Continue a text with a trained model, from its run directory alone.

    \b
    normuon-train sample runs/demo-20260101-120000 --prompt "def main():" --num 3
    normuon-train sample RUN --prompt "ROMEO:" --temperature 0.6 --max-tokens 400
    """
    from nanonormuon import distributed
    from nanonormuon import sample as sampling

    try:
        world = distributed.start(device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    dtype = distributed.compute_dtype("auto", world.device)
    model, tokenizer, found = sampling.load_run(path, dtype, world.device)
    context = sampling.context_of(found)
    for i in range(num):
        if num > 1:
            typer.echo(f"--- sample {i + 1}")
        sys.stdout.write(prompt)
        for piece in sampling.stream(
            model, tokenizer, prompt, max_tokens, temperature, top_k, top_p, seed + i, context
        ):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")


@app.command()
def recipes() -> None:
    """List the recipes that come with the package, with what each is for."""
    from nanonormuon import config

    for name, path in config.recipes().items():
        headline = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        typer.echo(f"{name:<20} {headline}")


@app.command()
def show(overrides: Overrides = None) -> None:
    """Print a configuration, each value with where it comes from.

    \b
    normuon-train show demo optim.lr=0.01
    """
    from nanonormuon import config

    settings, origin = config.load(overrides or [])
    typer.echo(config.to_toml(settings, origin), nl=False)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code (README, "Exit codes")."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if debug := "--debug" in arguments:  # wherever it stands
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    try:
        code = app(args=arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.Abort:
        code, message = 130, "interrupted"
    except Exception as error:
        if hasattr(error, "show"):  # typer's own: a misspelt option, a missing argument
            error.show()
            return error.exit_code
        code, message = exit_code(error), describe(error)
        if code is None or debug:
            raise
    print(f"error: {message}", file=sys.stderr)
    return code


def entry(arguments: list[str] | None = None) -> NoReturn:
    """What the shell and torchrun start: `main`, and an end without waiting for anybody.

    As one of several ranks the process ends at once, with all output written: taking a process
    group down can wait for ranks that are gone, and gloo's threads can abort it.
    """
    code = main(arguments)
    if "RANK" in os.environ:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def exit_code(error: Exception) -> int | None:
    """An expected error's code; None for a fault of ours, which keeps its traceback."""
    if hasattr(error, "exit_code"):
        return error.exit_code
    if out_of_memory(error):
        return 6
    if isinstance(error, OSError):
        return 8
    return 7 if lost_peer(error) else None


def out_of_memory(error: Exception) -> bool:
    import torch

    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)


def lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone."""
    import torch.distributed as dist

    gone = "Connection closed by peer", "Connection reset by peer"
    return isinstance(error, getattr(dist, "DistError", ())) or any(g in str(error) for g in gone)


def describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    if out_of_memory(error):
        return f"out of memory: {text}; lower train.micro_batch, the batch itself can stay"
    if exit_code(error) == 7 and lost_peer(error):
        return f"another rank failed or is gone; its own message says why ({text})"
    return text


if __name__ == "__main__":
    entry()
