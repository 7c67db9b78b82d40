"""The command line: options in, at most one line per mistake out. No logic of its own."""

import logging
import os
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from nanonormuon import errors
from nanonormuon.cli import commands
from nanonormuon.runtime import faults

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
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Say nothing on stderr but warnings and errors.")
    ] = False,
) -> None:
    if context.invoked_subcommand == "run":  # signals are answered from here on
        context.obj = context.with_resource(faults.Stopping())
    if getattr(sys.stdout, "errors", "") == "strict":  # a terminal of ASCII still shows the rest
        sys.stdout.reconfigure(errors="replace")
    from nanonormuon.storage.run import to_console

    to_console(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)


@app.command()
def run(
    context: typer.Context,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; runs/RECIPE-DATE-TIME if not given.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its newest checkpoint.")
    ] = False,
    init_from: Annotated[
        Path | None,
        typer.Option(help="Begin with this model's weights: a run, or a Qwen3 or Llama directory."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check and print the configuration and what it will take."),
    ] = False,
) -> None:
    """Train a model. Without a recipe: the demo, or with --init-from: finetune.

    \b
    normuon-train run
    normuon-train run demo train.steps=300 optim.lr=0.01
    normuon-train run shakespeare-char my.toml --out runs/a
    normuon-train run --resume --out runs/a
    normuon-train run --init-from runs/a data.path=data/mine --out runs/b
    torchrun --standalone --nproc_per_node=8 train.py gpt2-124m
    """
    from nanonormuon import config

    arguments = overrides or []
    sources = [Path(a).stem for a in arguments if not config.is_setting(a)]
    if resume:
        arguments = of_resumed(out, arguments)
    elif not sources:
        sources = ["finetune" if init_from else "demo"]
        arguments = [*sources, *arguments]
    if init_from is not None:
        arguments.append(f"train.init_from={init_from}")
    settings, origin = config.load(arguments)
    first = int(os.environ.get("RANK", "0")) == 0
    for line in config.without_effect(settings, origin) if first else ():
        logging.getLogger("nanonormuon").warning(f"{line}; it does nothing")
    if dry_run:
        from nanonormuon.cli import dry_run as estimate
        from nanonormuon.runtime import distributed

        typer.echo(config.to_toml(settings, origin))
        for line in estimate.report(settings, distributed.size()):
            typer.echo(f"# {line}")
        return
    if out is None:
        out = Path("runs") / f"{'-'.join(sources)}-{time.strftime('%Y%m%d-%H%M%S')}"
    from nanonormuon.train import train

    summary = train(settings, out, resume, context.obj)
    if first:
        report(summary, out, settings.data.path == "builtin:python")


def of_resumed(out: Path | None, arguments: list[str]) -> list[str]:
    """The arguments that continue the run in `out`: its configuration, and the settings among these
    that change it. Raises ConfigError where no run is."""
    from nanonormuon import config
    from nanonormuon.storage import checkpoints as checkpoint

    if out is None or not (out / "config.toml").is_file():
        known = sorted(str(p.parent) for p in Path("runs").glob("*/config.toml"))
        raise errors.ConfigError(
            f"--resume: {out or 'no --out given'}: expected a run directory; known here: "
            + (", ".join(known[-5:]) or "none in runs/")
        )
    settings = [a for a in arguments if config.is_setting(a)]
    files = [Path(a).stem for a in arguments if not config.is_setting(a)]
    if files:  # the same command again, with --resume
        logging.getLogger("nanonormuon").info(
            f"--resume: {out} has its own configuration; {', '.join(files)} is not read again"
        )
    saved = str(out.resolve() / "config.toml")
    steps = [checkpoint.step_of(path) or 0 for path in checkpoint.all_steps(out / "checkpoints")]
    # a run that has come to its stop_at goes on to its end, one that was cut off before stops there
    there = max(steps, default=0) >= config.load([saved])[0].train.stop_at
    return [saved, *["train.stop_at=0"] * there, *settings]


def report(summary: dict, out: Path, code: bool) -> None:
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
    what = "  (a Hugging Face model directory)" if summary["hugging_face"] else ""
    typer.echo(f"checkpoint: {out / summary['checkpoint']}{what}")
    best = summary.get("best_checkpoint")
    if best not in (None, summary["checkpoint"]):
        typer.echo(f"best: {out / best}: val_loss {summary['best_val_loss']:.4f}")
    prompt = " --prompt 'def '" if code else ""
    typer.echo(f"next: normuon-train sample {shlex.quote(str(out))}{prompt}")


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE", help="Files, directories, quoted patterns, or - (standard input)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory for the shards.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="byte, gpt2, cl100k_base, o200k_base, bpe:N (trained on the text), or the path of "
            "a tokenizer.json or *.tiktoken file."
        ),
    ] = "bpe:4096",
    val: Annotated[
        float, typer.Option(help="Share of the documents held out for validation.")
    ] = 0.02,
    text_field: Annotated[
        str, typer.Option(help="Field or column of the text in JSON, CSV and Parquet.")
    ] = "text",
    doc_separator: Annotated[
        str, typer.Option(help="What stands between documents in text files; \\n is a line end.")
    ] = "",
    workers: Annotated[int, typer.Option(min=0, help="Encoding threads; 0: one per core.")] = 0,
) -> None:
    """Turn text into verified shards of tokens.

    Reads text and code, JSON lines and arrays, CSV, Parquet, all also as .gz and .zst, as streams
    of any size. An interrupted preparation goes on where it was when the command is repeated.

    \b
    normuon-train prepare book.txt --out data/book --tokenizer byte
    normuon-train prepare notes/ essays.jsonl.gz --out data/mine --tokenizer bpe:4096 --val 0.05
    normuon-train prepare "wiki/*.parquet" --text-field body --tokenizer gpt2 --out data/wiki
    zcat stories.txt.gz | normuon-train prepare - --doc-separator "<|endoftext|>" --out data/st
    normuon-train run demo data.path=data/mine
    """
    from nanonormuon.text.prepare import prepare as prepare_shards

    manifest = prepare_shards(
        sources,
        out,
        tokenizer,
        val,
        text_field=text_field,
        separator=doc_separator.replace("\\n", "\n").replace("\\t", "\t"),
        workers=workers,
    )
    for name in ("train", "val"):
        split = manifest[name]
        typer.echo(
            f"{name}: {split['documents']:,} documents, {split['bytes']:,} bytes, "
            f"{split['tokens']:,} tokens"
        )
    typer.echo(f"next: normuon-train run demo {shlex.quote(f'data.path={out}')}")


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Data directory.")],
    tokenizer: Annotated[
        str, typer.Option(help="What made the shards, where the directory does not say it.")
    ] = "",
    data_format: Annotated[
        str, typer.Option("--format", help="shards, or nanogpt for its headerless train.bin.")
    ] = "shards",
    as_json: commands.AsJson = False,
) -> None:
    """Show what is in a data directory, and what is wrong.

    Exits with 3 if training would refuse it.

    \b
    normuon-train inspect data/mine
    normuon-train inspect data/fineweb --tokenizer gpt2 --json
    """
    from nanonormuon.text import inspection

    if data_format not in ("shards", "nanogpt"):
        raise typer.BadParameter(f'--format "{data_format}": expected shards or nanogpt')
    found = inspection.inspect(directory, tokenizer, data_format == "nanogpt")
    if as_json:
        commands.print_json(found)
    else:
        typer.echo(inspection.as_text(found))
    if "train" not in found:
        raise typer.Exit(3)


@app.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    from nanonormuon import config

    found = config.recipes()
    for name, path in found.items():
        headline = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        typer.echo(f"{name:<{max(map(len, found))}}  {headline}")


@app.command()
def show(overrides: Overrides = None) -> None:
    """Print a configuration and where its values come from.

    \b
    normuon-train show demo optim.lr=0.01
    """
    from nanonormuon import config

    settings, origin = config.load(overrides or [])
    typer.echo(config.to_toml(settings, origin), nl=False)


for command in commands.COMMANDS:
    app.command()(command)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code (README, "Exit codes")."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug, everywhere = "--debug" in arguments, ("--debug", "--quiet")  # wherever they stand
    arguments = sorted(arguments, key=lambda a: a not in everywhere)
    try:
        code = app(args=arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except errors.Interrupted as error:
        code, message = error.code, str(error)
    except typer.Abort:
        code, message = 130, "interrupted"
    except Exception as error:
        if hasattr(error, "show"):  # typer's own: a misspelt option, a missing argument
            error.show()
            return error.exit_code
        if debug:
            raise
        code, message = errors.exit_code(error) or 1, f"error: {errors.describe(error)}"
    print(message, file=sys.stderr)
    return code


def entry(arguments: list[str] | None = None) -> NoReturn:
    """What the shell and torchrun start: `main`, and an end without waiting for anybody.

    Once torch is there the process ends at once, with all output written. As one of several ranks
    it might wait for others that are gone, and gloo's threads can abort it; alone, it would spend
    0.4 s on taking modules down.
    """
    # None if they were closed from the start
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        code = main(arguments)
    except Exception as error:  # under --debug
        traceback.print_exc()
        print(f"error: {errors.describe(error)}", file=sys.stderr)
        code = errors.exit_code(error) or 1
    if "RANK" in os.environ or "torch" in sys.modules:
        logging.shutdown()
        os._exit(written(code))
    sys.exit(code)


def written(code: int) -> int:
    """Write what is left of the output; returns the exit code, which says if that failed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # a reader that left, as `head` does: no more is said of it
            code = code or 1
        except OSError as error:
            if not code and stream is sys.stdout:  # else something has been said already
                print(f"error: standard output: {errors.describe(error)}", file=sys.stderr)
            code = code or errors.exit_code(error) or 1
    return code


if __name__ == "__main__":
    entry()
