"""The application: the list of commands, their common options, exit codes.

Commands import torch, and modules that need it, inside their functions, so that a help text or a
misspelt option takes a tenth of a second.
"""

import logging
import os
import re
import sys
import traceback
from typing import Annotated, NoReturn

import typer
from typer import Option

from nanonormuon import __version__, errors
from nanonormuon.cli import lab, models, run, runs, text
from nanonormuon.storage.run import to_console

COMMANDS = (
    run.run, run.recipes, run.show, text.prepare, text.inspect, models.sample, models.evaluate,
    models.export, runs.compare, runs.report, runs.diagnose, lab.race, lab.trials,
    lab.speedrun, run.doctor,
)  # fmt: skip
app = typer.Typer(
    name="normuon-train",
    help="Train small language models with NorMuon (arXiv 2510.05491).\n\n"
    "Start with `normuon-train run`: a two-minute demo on any machine, without a network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in COMMANDS:
    app.command()(command)


def print_version(wanted: bool) -> None:
    """Print the version and exit before typer asks for a command."""
    if wanted:
        typer.echo(f"nanonormuon {__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, Option("--quiet", help="Log only warnings and errors.")] = False,
    version: Annotated[
        bool, Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if getattr(sys.stdout, "errors", "") == "strict":  # print ? for what an ASCII terminal lacks
        sys.stdout.reconfigure(errors="replace")
    to_console(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code (README, "Exit codes")."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = sorted(arguments, key=lambda a: a not in ("--debug", "--quiet"))  # valid anywhere
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
            print(hint(error, arguments), end="", file=sys.stderr)
            return error.exit_code
        if debug:
            traceback.print_exc()
        code, message = errors.exit_code(error) or 1, f"error: {errors.describe(error)}"
    print(message, file=sys.stderr)
    return code


def hint(error: Exception, arguments: list[str]) -> str:
    """A line that suggests settings in place of an unknown option with a value, as optim.lr=0.1 for
    --lr 0.1; "" if no setting has its name."""
    option = getattr(error, "option_name", "")
    command = error.ctx.info_name if getattr(error, "ctx", None) else ""
    value = (
        re.search(rf"{re.escape(option)}[ =]([^\s-]\S*)", " ".join(arguments)) if option else None
    )
    if not value or command not in ("run", "show", "race", "trials", "speedrun"):
        return ""  # without torch, which the list of settings needs
    from nanonormuon.config import KINDS

    key = option.lstrip("-").replace("-", "_")
    names = [name for name in KINDS if name.partition(".")[2] == key]
    return "".join(f"settings have no dashes: did you mean {n}={value[1]}?\n" for n in names)


def entry(arguments: list[str] | None = None) -> NoReturn:
    """Run `main`, then end the process; the entry point for the shell and torchrun.

    Once torch is loaded, the process ends without Python's cleanup, after all output is written.
    Cleanup takes 0.4 s; with several ranks it can wait for lost ones, and gloo's threads can abort
    it.
    """
    # None if they were closed from the start
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    code = main(arguments)
    if "RANK" in os.environ or "torch" in sys.modules:
        logging.shutdown()
        os._exit(flush(code))
    sys.exit(code)


def flush(code: int) -> int:
    """Write out buffered output; returns `code`, or the failure's if it was 0."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # the reader has left, like `head`: nothing to report
            code = code or 1
        except OSError as error:
            if not code and stream is sys.stdout:  # otherwise an error has been reported already
                print(f"error: standard output: {errors.describe(error)}", file=sys.stderr)
            code = code or errors.exit_code(error) or 1
    return code
