"""Other people's optimizers: "module:Class", "FILE.py:Class", and "zoo:NAME", a file in lab/zoo."""

import ast
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from nanonormuon.config import OptimConfig
from nanonormuon.errors import ConfigError, describe, exit_code, out_of_memory
from nanonormuon.optim import check_trusted
from nanonormuon.storage.files import optimizer_file, read_file

# settings that the zoo's optimizers share with NorMuon
SHARED = ("momentum", "nesterov", "adjust_lr_fn", "ns_coefficients", "ns_steps")


def make(s: OptimConfig, groups: list[dict], ns_dtype: torch.dtype) -> Optimizer:
    """Make an optimizer from the class that s.name names; one of the zoo's kind shares NorMuon's
    settings. Raises ConfigError if it does not fit its arguments or the parameters' layout."""
    name, options, cls = s.name, s.options, optimizer_class(s.name)
    try:
        call = ast.parse(f"f({options})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise SyntaxError("positional")
        arguments = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # the last: nesting
        raise ConfigError(f'optim.options = "{options}": expected KEY=VALUE, ...') from None
    known = inspect.signature(cls).parameters  # a **kwargs would swallow a misspelt name
    if unknown := arguments.keys() - known.keys():
        raise ConfigError(f"optim.options: {name} has no {min(unknown)}; it has {', '.join(known)}")
    for group in groups:
        group["use_muon"] = True  # some packages' Muons require it; others ignore it
        if getattr(cls, "state_by_parameter", False):  # the zoo's base, or its copy
            group |= {key: getattr(s, key) for key in SHARED} | {"ns_dtype": ns_dtype}
        elif any(isinstance(p, DTensor) for p in group["params"]):
            raise ConfigError(f"{name} needs whole matrices: expected train.parallel=ddp")
    try:
        optimizer = cls(groups, lr=groups[0]["lr"], **arguments)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ConfigError(f"{name}({options}): {type(error).__name__}: {error}") from None
    if "weight_decay" not in known and groups[0]["weight_decay"]:
        raise ConfigError(f"{name} has no weight decay: expected optim.weight_decay=0")
    if not name.startswith("zoo:"):
        optimizer.step = blamed(name, optimizer.step)
    return optimizer


def blamed(name: str, step: Callable[[], Any]) -> Callable[[], Any]:
    """Make another package's step raise ConfigError naming the optimizer if it fails."""

    def call() -> Any:
        try:
            return step()
        except Exception as error:  # whatever a user's class may raise
            if exit_code(error):
                raise
            message = f"optim.name = {name}: its step() fails: {describe(error)}"
            raise ConfigError(message) from error

    return call


def optimizer_class(name: str) -> type[Optimizer]:
    """Import the class of "module:Class", "FILE.py:Class" or "zoo:NAME". Raises ConfigError."""
    check_trusted(name)
    module, _, attribute = name.rpartition(":")
    try:
        if module == "zoo":  # the only optimizer in that file
            found = vars(importlib.import_module(f"nanonormuon.lab.zoo.{attribute}"))
            kinds = (v for v in found.values() if isinstance(v, type) and issubclass(v, Optimizer))
            return next(v for v in kinds if v.__module__ == found["__name__"])
        file = optimizer_file(name)
        cls = getattr(run_file(file) if file else importlib.import_module(module), attribute)
        if not issubclass(cls, Optimizer):
            raise TypeError(f"{attribute} is not a torch.optim.Optimizer")
        return cls
    except (Exception, SystemExit) as error:  # the module may raise anything
        expected = f"expected module:Class of an optimizer ({type(error).__name__}: {error})"
        if isinstance(error, ModuleNotFoundError):
            expected += "; for your own file, use optim.name=FILE.py:Class"
        raise ConfigError(f'optim.name = "{name}": {expected}') from None


def run_file(file: Path) -> ModuleType:
    """Run a file as a module, once for each version of its content."""
    content = read_file(file)
    name = f"{file.stem}-{hashlib.sha256(content).hexdigest()}"  # cannot be imported by name
    if name not in sys.modules:
        module = sys.modules[name] = ModuleType(name)
        module.__file__ = str(file)
        try:
            exec(compile(content, file, "exec"), vars(module))
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def default_lr(name: str) -> float | None:
    """Return the default learning rate of an optimizer of the zoo's kind, None for others.
    OptimConfig's as a default means that it moves weights as far as NorMuon at equal rates."""
    cls = optimizer_class(name) if ":" in name else AdamW
    own = inspect.signature(cls).parameters if hasattr(cls, "state_by_parameter") else {}
    return own["lr"].default if "lr" in own and isinstance(own["lr"].default, float) else None
