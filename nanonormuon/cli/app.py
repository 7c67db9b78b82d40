"""The application: commands by group, common options, exit codes. Commands import torch inside
their functions, so that a help text or a misspelt option is answered at once."""

import logging
import os
import re
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer
from typer import Option

from nanonormuon import __version__, errors
from nanonormuon.cli import lab, models, run, runs, text
from nanonormuon.storage.run import to_console

GROUPS = {
    "Train": (run.run, run.recipes, run.show),
    "Prepare data": (text.prepare, text.inspect),
    "Use a model": (models.sample, models.evaluate, models.export),
    "Look at runs": (runs.compare, runs.report, runs.diagnose),
    "Compare optimizers": (lab.race, lab.trials, lab.speedrun),
    "Check the machine": (run.doctor,),
}


class Groups(typer.core.TyperGroup):
    """Lists the commands by group in plain text too, as rich does at a terminal."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)
        for flag in (p for p in params if getattr(p, "is_flag", False) and p.default is None):
            flag.default = False  # --help and other flags of typer, which loads pydantic for None
        return params

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        limit = formatter.width - 6 - max(map(len, self.commands))
        for group, members in GROUPS.items():
            names = [command.__name__ for command in members]
            with formatter.section(group):
                formatter.write_dl([(n, self.commands[n].get_short_help_str(limit)) for n in names])


terminal = sys.stdout is not None and sys.stdout.isatty()  # None: closed by whoever started it
plain = not terminal or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
app = typer.Typer(
    name="normuon-train",
    cls=Groups,
    help="Train small language models with NorMuon (arXiv 2510.05491).\n\n"
    "Start here: `normuon-train run` is a demo of a few minutes; it needs no GPU and no network.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None if plain else "rich",
)
for group, members in GROUPS.items():
    for command in members:
        app.command(rich_help_panel=group)(command)


def print_version(wanted: bool) -> None:
    """Print the version and exit before typer asks for a command."""
    if wanted:
        typer.echo(f"nanonormuon {__version__}")
        raise typer.Exit


QUIET = "Print results, warnings and errors only."
AT_ONCE = {"callback": print_version, "is_eager": True}


@app.callback()
def common(
    debug: Annotated[bool, Option("--debug", help="Show tracebacks.")] = False,
    quiet: Annotated[bool, Option("--quiet", help=QUIET)] = False,
    version: Annotated[bool, Option("--version", help="Print the version.", **AT_ONCE)] = False,
) -> None:
    if getattr(sys.stdout, "errors", "") == "strict":  # print ? for what an ASCII terminal lacks
        sys.stdout.reconfigure(errors="replace")
    to_console(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code (docs/runs.md, "Exit codes")."""
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
    """Suggest optim.lr=0.1 to whoever typed --lr 0.1; "" if no setting has the option's name."""
    option = getattr(error, "option_name", "")
    command = error.ctx.info_name if getattr(error, "ctx", None) else ""
    value = re.search(rf"{re.escape(option)}[ =]([^\s-]\S*)", " ".join(arguments))
    if not (option and value) or command not in ("run", "show", "race", "trials", "speedrun"):
        return ""
    from nanonormuon.config import KINDS

    key = option.lstrip("-").replace("-", "_")
    names = [name for name in KINDS if name.partition(".")[2] == key]
    return "".join(f"settings have no dashes: did you mean {n}={value[1]}?\n" for n in names)


def entry(arguments: list[str] | None = None) -> NoReturn:
    """Run `main` and end the process; the entry point for the shell and torchrun. Once torch is
    loaded, skip Python's cleanup: 0.4 s, and lost ranks or gloo's threads spoil it."""
    # None if they were closed from the start
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    code = main(arguments)
    if "RANK" in os.environ or "torch" in sys.modules:
        logging.shutdown()
        os._exit(flush(code))
    sys.exit(code)


def flush(code: int) -> int:
    """Write buffered output; returns `code`, or the code of a failed write if `code` is 0."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left, like `head`: nothing to report
        return code or 1
    except OSError as error:
        if not code:  # otherwise an error has been reported already
            print(f"error: standard output: {errors.describe(error)}", file=sys.stderr)
        return code or errors.exit_code(error) or 1
    return code
