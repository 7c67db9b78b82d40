"""A training process with a fault: the same as train.py, but for what FAULT says.

usage: FAULT=KIND@PLACE[:STEP[:RANK]] [torchrun | python] faulty.py RECIPE KEY=VALUE... --out DIR

KIND is what happens (below), PLACE where: once, on that rank, when so many steps are done; stderr
says "fault at" the monotonic clock's time. KIND nan puts a NaN into a loss, gradient, weight or
buffer, KIND bit changes a weight on that rank alone; nan@memory fills the memory of every new
tensor, on all ranks; disk@N kills at the N-th file-system call below checkpoints/, save@N at the
N-th of those that saves make.
"""

import os
import signal
import sys
import time


def run_out():
    import torch

    raise torch.OutOfMemoryError("as if all were taken")


def end_node():
    """Kill this process's launcher and all that it started, as a machine that loses power."""
    launcher = os.getppid()
    with open(f"/proc/{launcher}/task/{launcher}/children") as file:
        ranks = [int(pid) for pid in file.read().split()]
    for pid in [launcher, *(pid for pid in ranks if pid != os.getpid()), os.getpid()]:
        os.kill(pid, signal.SIGKILL)


KINDS = {
    "oom": run_out,
    "raise": lambda: 1 / 0,
    "eio": lambda: os.close(-1),
    "exit": lambda: os._exit(3),
    "leave": lambda: os._exit(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(3600),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "int": lambda: os.kill(os.getpid(), signal.SIGINT),
    "twice": lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)],
    "launcher": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "node": end_node,
    "launcher-term": lambda: os.kill(os.getppid(), signal.SIGTERM),
}


# what no command does but those that say so; noted from the first import on
WATCHED = {"socket.connect", "socket.getaddrinfo", "pickle.find_class", "subprocess.Popen",
           "os.system", "os.exec"}  # fmt: skip
SEEN = []


class AtImport:
    """A finder that finds nothing, but notices when a module is asked for."""

    def __init__(self, happen):
        self.happen = happen

    def find_spec(self, name, *_):
        if name == "torch.nn":  # torch is about half way
            sys.meta_path.remove(self)
            self.happen()


def inject(kind, place, step="0", rank="0"):
    if place == "memory":
        import torch

        torch.use_deterministic_algorithms(True, warn_only=True)  # with it fresh memory is filled
        assert torch.empty(9).isnan().all()
        return
    if place == "trial":  # on all ranks
        import torch

        torch.compile = lambda model, **_: model
    if os.environ.get("RANK", "0") != rank:
        return
    if place == "import":
        sys.meta_path.insert(0, AtImport(KINDS[kind]))
        return
    import torch

    from nanonormuon import build, checkpoint, data, evaluate, model, sample, train
    from nanonormuon.runtime import health
    from nanonormuon.storage import checkpoints
    from nanonormuon.storage.run import RunDirectory
    from nanonormuon.train import Trainer

    places = {
        "open": (train, "open_corpus"),
        "compile": (build, "compile_engine"),
        "data": (data.Batches, "batch"),
        "trial": (data.Batches, "batch"),  # the compiler's, which here takes no time
        "forward": (model.GPT, "forward"),
        "backward": (torch.Tensor, "backward"),
        "step": (health, "norm"),
        "gather": (checkpoint, "named_for_hf"),
        "record": (RunDirectory, "record"),
        "write": (checkpoints, "write"),
        "retain": (checkpoints, "retain"),
        "evaluation": (evaluate, "validation_batches"),
        "evaluated": (evaluate, "bits_per_byte"),
        "announce": (train, "announce"),
        "summary": (Trainer, "summarise"),
        "sample": (sample, "write"),
        "weight": (Trainer, "take_step"),
        "buffer": (Trainer, "take_step"),
        "loss": (Trainer, "take_step"),
        "gradient": (Trainer, "take_step"),
    }
    owner, name = places[place]
    original, made, done = getattr(owner, name), [], []
    begin = Trainer.begin

    def remember(self, *args):
        made.append(self)
        return begin(self, *args)

    def call(*args, **kwargs):
        now = made[0].step if made else 0
        # a checkpoint is written in the background while the run takes further steps
        if not done and (args[1] if place == "write" else now) >= int(step):
            done.append(True)
            if kind in ("nan", "bit"):
                spoil(made[0], kind, place)
            else:
                os.write(2, f"fault at {time.monotonic()}\n".encode())
                KINDS[kind]()
        return original(*args, **kwargs)

    Trainer.begin = remember
    setattr(owner, name, call)


def spoil(trainer, kind, place):
    from nanonormuon import checkpoint
    from nanonormuon.storage import tensors

    engine = trainer.engine
    weights, buffers = checkpoint.named_state(engine.model, engine.optimizers)
    if place in ("weight", "buffer"):
        name = next(n for n in (weights if place == "weight" else buffers) if "mlp" in n)
        part = tensors.local((weights | buffers)[name]).detach().view(-1)
        part[3] = float("nan") if kind == "nan" else part[3] + 1e-3
        return

    def spoil_output(_module, _args, output):
        handle.remove()
        if place == "loss":
            return output * float("nan")
        output.register_hook(lambda grad: grad * float("inf"))

    layer = trainer.engine.model.layers[1].mlp.down_proj
    handle = layer.register_forward_hook(spoil_output)


def on_disk(number, folder, of_saves=False):
    """SIGKILL at the n-th time that this process opens, makes, renames or removes something below
    `folder`, or waits for the disk. of_saves: counted are those of Trainer.save alone."""
    seen = []

    def count(path):
        frame = sys._getframe()
        while of_saves and frame and frame.f_code.co_name not in ("save", "publish"):
            frame = frame.f_back
        if frame:
            seen.append(path)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, args):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and (
            folder in str(args[0]) or (event in ("os.remove", "os.rmdir") and args[-1] != -1)
        ):
            count(args[0])

    sync = os.fsync
    os.fsync = lambda handle: [count(handle), sync(handle)][1]
    sys.addaudithook(hook)


def serve():
    """Read {"argv", "env", "stderr"} per line, fork a process that does what argv says, answer with
    its id. A negative id in place of that waits for the process and answers with its exit code.

    argv[0] is faulty.py for a training run, worker.py for one of test_layouts.py's processes,
    zoo_worker.py for one of lab/test_zoo.py's, launch for `launch`, -c for Python code in argv[1].
    The first line printed says what `import nanonormuon.train` loads."""
    sys.addaudithook(lambda event, args: SEEN.append((event, args)) if event in WATCHED else None)
    import contextlib
    import io
    import json
    import traceback

    import defects
    import torch._dynamo  # noqa: F401, that is slow to import too

    os.fsync = os.fstat  # as in conftest.py
    defects.apply()
    import nanonormuon.train  # noqa: F401, the reason for all this

    rooms = {name.rpartition(".")[0] for name in sys.modules}  # an __init__.py with more below it
    loaded = [m for m in sys.modules if m.startswith("nanonormuon.") and m not in rooms]
    import worker
    import zoo_worker

    from nanonormuon.cli import app

    with contextlib.redirect_stderr(io.StringIO()):  # is refused, once all that parses it is loaded
        app.main(["run", "--resume"])
    print(*loaded, flush=True)
    for line in sys.stdin:
        wish = json.loads(line)
        if isinstance(wish, int):
            code = os.waitstatus_to_exitcode(os.waitpid(-wish, 0)[1])
            print(code, flush=True)
            continue
        if pid := os.fork():
            print(pid, flush=True)
            continue
        os.environ.update(wish["env"])
        os.dup2(os.open(wish["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(2, 1)
        sys.argv = wish["argv"]
        code = 70
        try:
            others = {"worker.py": worker.main, "zoo_worker.py": zoo_worker.main, "launch": launch,
                      "-c": lambda: sys.exit(exec(sys.argv[1], {}) or 0)}  # fmt: skip
            others.get(sys.argv[0], main)()
        except SystemExit as error:
            code = error.code
        except Exception:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    os._exit(0)  # Python's own way out takes a second


def launch():
    """Start ranks of a training run with torchrun's launcher, as forks, which import nothing.
    They are a session of their own. sys.argv[1]: their number, or of several nodes' launchers each
    "RANKS/NODE/NODES/PORT"."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.setsid()
    ranks, node, nodes, port = [*map(int, sys.argv[1].split("/")), 0, 1, 0][:4]
    static = {"rdzv_configs": {"rank": node, "timeout": 900}} if nodes > 1 else {}
    config = LaunchConfig(
        nodes, nodes, ranks, start_method="fork", max_restarts=0, run_id="test",
        rdzv_backend="static" if static else "c10d", rdzv_endpoint=f"127.0.0.1:{port}", **static,
    )  # fmt: skip
    try:
        elastic_launch(config, rank)(*sys.argv[2:])
    except ChildFailedError as error:
        print(error, file=sys.stderr)  # torchrun's last lines
        sys.exit(1)
    sys.exit(0)


def rank(*arguments):
    """One of them; the launcher wants a result of one that succeeds, so that returns."""
    from nanonormuon.cli import app

    be_faulty()
    if code := app.main(["run", *arguments]):
        os._exit(app.flush(code))


def be_faulty():
    if fault := os.environ.get("FAULT"):
        kind, _, where = fault.partition("@")
        if kind in ("disk", "save"):
            on_disk(int(where), "checkpoints", kind == "save")
        else:
            inject(kind, *where.split(":"))


def main():
    from nanonormuon.cli.app import entry

    be_faulty()
    entry(["run", *sys.argv[1:]])


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main()
