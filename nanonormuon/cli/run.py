"""Train a model; look at recipes, settings and the machine."""

import inspect
import logging
import os
import re
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from nanonormuon import errors
from nanonormuon.cli import options
from nanonormuon.runtime import faults
from nanonormuon.storage.files import in_shell, in_units, optimizer_file

log = logging.getLogger("nanonormuon")
LIMITS = (
    "what to expect: after minutes, a model of this size knows how its text looks (words, "
    "indentation, closing brackets), not what a program does; that takes larger models and data"
)
HELP = "Recipes and TOML files (later ones win) and settings (which always win)."
SOURCE = "Run or Hugging Face model to start from."
COST = "Print settings and cost, then stop."
OUT = "Run directory; else runs/RECIPE-DATE-TIME."
Settings = Annotated[list[str] | None, Argument(help=HELP, **options.SETTINGS)]
OF_NORMUON = ("beta2", "beta2_on", "neuron_axis")  # settings of NorMuon alone
OF_MUON = ("momentum", "momentum_start", "momentum_warmup", "nesterov", "adjust_lr_fn",
           "ns_coefficients", "ns_steps", "cautious")  # fmt: skip


def run(
    context: typer.Context,
    settings: Settings = None,
    out: Annotated[Path | None, Option(help=OUT, **options.OUT)] = None,
    resume: Annotated[bool, Option("--resume", help="Continue the run in --out.")] = False,
    init_from: Annotated[Path | None, Option(help=SOURCE, **options.DIR)] = None,
    dry_run: Annotated[bool, Option("--dry-run", help=COST)] = False,
) -> None:
    """Train a model.

    The default recipe is demo, or finetune with --init-from. Settings have no dashes: optim.lr=0.1.

    \b
    normuon-train run
    normuon-train run demo train.steps=300 optim.lr=0.01
    normuon-train run shakespeare-char my.toml --out runs/a
    normuon-train run --resume --out runs/a
    normuon-train run --init-from runs/a data.path=data/mine --out runs/b
    torchrun --standalone --nproc_per_node=8 train.py gpt2-124m
    """
    stopping = context.with_resource(faults.Stopping())  # from now on, also while torch loads
    from nanonormuon import config
    from nanonormuon.storage.values import to_toml

    arguments = list(settings or ())
    if resume:
        arguments = of_resumed(out, arguments)
    elif all(map(config.is_setting, arguments)):
        arguments.insert(0, "finetune" if init_from else "demo")
    if init_from is not None:
        arguments.append(f"train.init_from={init_from}")
    loaded, origin = config.load(arguments)
    first = os.environ.get("RANK", "0") == "0"
    for line in without_effect(loaded, origin) if first else ():
        log.warning(f"{line}; it does nothing")
    if dry_run:
        from nanonormuon.cli.dry_run import report
        from nanonormuon.pretrained.models import adopt

        if (found := adopt(loaded)) is not loaded:
            origin |= {f"model.{key}": loaded.train.init_from for key in asdict(found.model)}
        typer.echo(to_toml(asdict(found), origin))
        typer.echo("\n".join(f"# {line}" for line in report(found)))
        return
    if out is None:
        sources = [Path(a).stem for a in arguments if not config.is_setting(a)]
        out = Path("runs") / f"{'-'.join(sources)}-{time.strftime('%Y%m%d-%H%M%S')}"
    from nanonormuon.train import train

    summary = train(loaded, out, resume, stopping)
    if first:
        typer.echo(describe(summary, out, loaded.train.sample_prompt))
        if loaded.data.path.startswith("builtin:"):
            typer.echo(LIMITS)


def of_resumed(out: Path | None, arguments: list[str]) -> list[str]:
    """The arguments that continue the run in `out`: its configuration, then the settings among
    `arguments`. Raises ConfigError if `out` holds no run."""
    from nanonormuon import config
    from nanonormuon.storage import checkpoints
    from nanonormuon.storage.run import known_runs

    if out is None or not (out / "config.toml").is_file():
        problem = f"{out or 'no --out given'}: expected a run directory"
        raise errors.ConfigError(f"--resume: {problem}; {known_runs(out)}")
    if files := [Path(a).stem for a in arguments if not config.is_setting(a)]:
        names = ", ".join(files)
        log.info(f"--resume: {out} has its own configuration; {names} is not read again")
    saved = str(out.resolve() / "config.toml")  # absolute: a=b/config.toml would be a setting
    if missing := [name for name in config.SECTIONS if name not in config.read_toml(saved)]:
        problem = f"no [{missing[0]}], expected every section of a run's configuration"
        hint = "restore it (a checkpoint's state.json has the configuration too)"
        raise errors.ConfigError(f"{saved}: {problem}: {hint}")
    resumed = [saved, *filter(config.is_setting, arguments)]
    steps = [checkpoints.step_of(path) or 0 for path in checkpoints.all_steps(out / "checkpoints")]
    # a run that reached its stop_at goes on to its end; one that was cut off before stops there
    if max(steps, default=0) >= config.load([saved])[0].train.stop_at:
        resumed.insert(1, "train.stop_at=0")
    return resumed


def without_effect(config: Any, origin: dict[str, str]) -> list[str]:
    """List the settings from the command line that a run of a config.Config ignores, and why. Those
    from a recipe are not listed: they may be for an optimizer that has been replaced."""
    name = config.optim.name
    others = {"normuon": (), "muon": OF_NORMUON}.get(name, OF_NORMUON + OF_MUON)
    if name.startswith("zoo:") or optimizer_file(name):  # unknown for a class of a file
        others = () if optimizer_file(name) else (*OF_NORMUON, "cautious")
    reasons = {f"optim.{key}": f"{name} does not have this setting" for key in others}
    if not config.train.eval_every:
        reasons["train.patience"] = "train.eval_every = 0 evaluates only the last step"
    if config.train.canonical:
        names = "train.parallel", "train.reshard"
        reasons |= dict.fromkeys(names, "train.canonical keeps replicas of all weights")
    return [f"{k}: {reason}" for k, reason in reasons.items() if origin.get(k) == "command line"]


def describe(summary: dict, out: Path, prompts: str) -> str:
    """The end of a run in words: result, curve and samples, checkpoints, what to do next."""
    from rich.console import Console

    from nanonormuon.runs.terminal import story
    from nanonormuon.sample import prompts as split

    result = f"step {summary['steps']:,}, {summary['tokens']:,} tokens"
    if summary.get("val_loss") is not None:
        result += f": val_loss {summary['val_loss']:.4f}"
    if summary.get("val_bpb") is not None:
        result += f", {summary['val_bpb']:.4f} bits per byte"
    times = "{train_seconds:.0f} s of training, {total_seconds:.0f} s in all".format(**summary)
    lines = [f"done: {result}; {times}"]
    if summary.get("val_bpb") is not None and (size := summary.get("compressed_bytes")):
        others = "gzip -9 needs {gzip_bpb:.3f} and xz {xz_bpb:.3f}".format(**summary)
        learned = f"{summary['val_bpb']:.3f} bits per byte of text it never saw"
        lines.append(f"learned: {learned}; {others} ({in_units(size)} of validation text)")
    colours = None if os.environ.get("NO_COLOR") else "auto"  # for rich, bold is no colour
    terminal = sys.stdout is not None and sys.stdout.isatty()  # whatever FORCE_COLOR says
    console = Console(force_terminal=terminal, color_system=colours)
    lines += [*story(out, console), f"checkpoint: {out / summary['checkpoint']}"]
    if summary["hugging_face"] or summary["own_source"]:
        trusting = ", with trust_remote_code=True" if summary["own_source"] else ""
        lines[-1] += f"  (in Hugging Face's format{trusting}; normuon-train export verifies it)"
    best, step = summary.get("best_checkpoint"), summary.get("best_step")
    if best not in (None, summary["checkpoint"]):
        saved = best == f"checkpoints/step-{step:06d}"  # else a later one, of those that are kept
        loss = f": val_loss {summary['best_val_loss']:.4f}" if saved else " of those kept"
        lines.append(f"best: {out / best}{loss}")
    if step == 0:
        lines.append("val_loss never fell below its value before training: try a lower optim.lr")
    prompt = f" --prompt {shlex.quote(first)}" if (first := split(prompts)[0]) else ""
    lines.append(f"next: normuon-train sample {in_shell(out)}{prompt}")
    return "\n".join([*lines, f"next: normuon-train report {in_shell(out)}"])


def recipes(
    name: Annotated[str, Argument(metavar="NAME", help="Recipe to print; else a list.")] = "",
) -> None:
    """List the recipes, or print one.

    \b
    normuon-train recipes track3-normuon
    """
    from nanonormuon import config
    from nanonormuon.storage.run import aligned
    from nanonormuon.storage.values import nearest

    if name and name not in config.recipes():
        raise errors.ConfigError(f'no recipe "{name}": {nearest(name, config.recipes())}')
    if name:
        typer.echo(config.recipes()[name].read_text(encoding="utf-8"), nl=False)
        return
    texts = {name: path.read_text(encoding="utf-8") for name, path in config.recipes().items()}
    typer.echo(aligned([(name, text.splitlines()[0].lstrip("# ")) for name, text in texts.items()]))


def show(settings: Settings = None) -> None:
    """Print every setting with its value, origin and meaning.

    \b
    normuon-train show demo optim.lr=0.01
    """
    from nanonormuon import config
    from nanonormuon.storage.values import to_toml

    loaded, origin = config.load(settings or ())
    lines, meanings = to_toml(asdict(loaded), origin).splitlines(), {}
    for i, line in enumerate(lines):
        if line.startswith("["):  # a setting's meaning is its comment in the source
            source = inspect.getsource(config.SECTIONS[line[1:-1]])
            meanings = dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE))
        elif meaning := meanings.get(line.partition(" ")[0]):
            lines[i] = f"{line:<54}  {meaning}"
    typer.echo("\n".join(lines))


def doctor(as_json: options.AsJson = False) -> None:
    """Check this machine and say what to fix.

    Shows versions, devices and the choices a run would make here, and lets two processes exchange
    data. Exits with 1 if runs cannot work.

    \b
    normuon-train doctor
    normuon-train doctor --json
    """
    from nanonormuon.cli.doctor import describe, examine

    findings = examine()
    options.show(findings, describe(findings), as_json)
    if any(finding["status"] == "fail" for finding in findings):
        raise typer.Exit(1)
