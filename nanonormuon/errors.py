"""Every error that a user can meet, and the exit code that the process ends with.

A message says what is wrong, where (path, offset, step, rank), what was expected and found, and
what to do. Imports no torch, so that the command line can report a mistake before torch is loaded.
"""

import re
import sys


class UsageError(ValueError):
    """A command or its options ask for something impossible."""


class ConfigError(UsageError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class RunError(UsageError):
    """A run directory is missing, taken, or holds something else."""


class MissingPackage(UsageError):
    """A command needs an optional package that is not installed."""


class DataError(ValueError):
    """Text or training data is missing, damaged, or does not fit the request."""


class TokenizerError(DataError):
    """A tokenizer is unknown, damaged, or does not fit the data."""


class CheckpointError(ValueError):
    """A checkpoint or model directory is missing, damaged, or another model's."""


class NonFinite(ValueError):
    """A loss, gradient, weight or optimizer buffer is NaN or infinite, or the run has diverged."""


class Diverged(RuntimeError):
    """Replicas that should hold equal weights do not."""


class OutOfMemory(RuntimeError):
    """Not even the smallest micro-batch fits."""

    everywhere = False  # whether every rank raises it, so that they can still save together


class PeerError(RuntimeError):
    """Rank 0 failed at work that it does for all ranks, with exit code `code`."""

    follows = True

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Interrupted(BaseException):
    """A signal ended the run. A BaseException, so that `except Exception` does not swallow it."""

    def __init__(self, number: int, when: str):
        super().__init__(f"stopped by signal {int(number)} {when}")
        self.code = 128 + number


# docs/runs.md, "Exit codes", explains them; 0 is success, 1 a fault of this program
EXIT_CODES: dict[type[BaseException], int] = {
    UsageError: 2,
    DataError: 3,
    CheckpointError: 4,
    NonFinite: 5,
    OutOfMemory: 6,
    Diverged: 7,
    PeerError: 7,  # or the code that rank 0 ends with
    OSError: 8,
    Interrupted: 130,  # 128 + the signal's number
}


def exit_code(error: BaseException) -> int | None:
    """The code of an expected error; None for a fault of this program."""
    if isinstance(error, PeerError | Interrupted):
        return error.code
    if out_of_memory(error):
        return 6
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return 8  # Path.resolve() before Python 3.13
    known = next((EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES), None)
    return 7 if lost_peer(error) else known


def describe(error: BaseException) -> str:
    """The error in one line. With several ranks it begins with rank, step and section."""
    # half of a surrogate pair, as file names may have, cannot be written as UTF-8
    text = " ".join(str(error).split()).encode(errors="backslashreplace").decode()
    if exit_code(error) is None:
        text = f"{type(error).__name__}: {text} (--debug shows the traceback)"
    elif out_of_memory(error) and not isinstance(error, OutOfMemory):
        hint = "a smaller model, input or train.micro_batch (which keeps the batch) needs less"
        text = f"out of memory: {text or 'not even a message'}; {hint}"
    elif lost_peer(error):
        which = getattr(error, "lost", "another rank")
        text = f"{which} failed or is gone: see that rank's log ({text})"
    return f"{error.place}: {text}" if hasattr(error, "place") else text


def follows(error: BaseException) -> bool:
    """Whether the error is a consequence of another rank's, which reports the details. Whoever
    raises an error on several ranks says so in its attribute `follows`."""
    return getattr(error, "follows", False) or lost_peer(error)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    kinds = (MemoryError, OutOfMemory, getattr(sys.modules.get("torch"), "OutOfMemoryError", ()))
    if isinstance(error, kinds):
        return True
    # torch's allocators, also as compilers quote them; the driver; cuBLAS, cuDNN and others; NCCL
    words = "can't allocate memory|not enough memory|(MPS backend|CUDA error:|CUDA) out of memory"
    words += "|_STATUS_ALLOC_FAILED|Cuda failure.*'out of memory'|Failed to CUDA (c|m)alloc"
    plain = isinstance(error, RuntimeError) and not explained(error)
    return plain and bool(re.search(words, str(error)))


def explained(error: BaseException) -> bool:
    """Whether the message was written for people, so that a traceback adds nothing."""
    return isinstance(error, tuple(kind for kind in EXIT_CODES if kind is not OSError))


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    torch = sys.modules.get("torch")
    if torch is None or explained(error):
        return False
    failed = getattr(torch.distributed, "DistError", ())
    gone = re.search("Connection (closed|reset) by peer", str(error))
    return isinstance(error, failed) or gone is not None
