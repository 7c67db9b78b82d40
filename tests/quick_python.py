"""A `python` for scripts, whose processes need not import torch: forks of one that has.

usage: quick_python.py FOLDER: serve FOLDER/python, a command that takes `-m MODULE ARGUMENTS...` or
`FILE ARGUMENTS...`, until standard input ends. Says "ready" when it is there.
"""

import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

# what FOLDER/python is: it hands over its arguments, environment and open files, and waits
CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as s:
    s.connect({address!r})
    wish = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(s, [b"%9d" % len(wish)], [0, 1, 2])
    s.sendall(wish)
    sys.exit(int(s.makefile().readline()))
"""


def serve(folder: Path) -> None:
    import torch._dynamo  # noqa: F401

    import nanonormuon.cli.app
    import nanonormuon.train  # noqa: F401

    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen()
        client = CLIENT.format(python=sys.executable, address=str(folder / "socket"))
        (folder / "python").write_text(client)
        (folder / "python").chmod(0o755)
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks that wait
        while True:
            connection, _ = listener.accept()
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                if not (pid := os.fork()):
                    os._exit(as_python(connection))
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                connection.sendall(b"%d\n" % code)
                os._exit(0)
            connection.close()


def as_python(connection: socket.socket) -> int:
    """Do in this process what the command asks for; returns the exit code."""
    size, files, *_ = socket.recv_fds(connection, 9, 3)
    arguments, folder, env = json.loads(connection.recv(int(size), socket.MSG_WAITALL))
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.path[0] = folder
    arguments = [part for part in arguments if part != "-u"]
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
