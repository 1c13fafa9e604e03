"""Programs that start at once: a process that has imported the libraries forks for each of them.

What a fork runs is imported by it; of this repository nothing is. It has the caller's arguments, directory, environment
and standard files, and its end is the caller's.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("harness", "pytest", "python")
_LIBRARIES = (
    *("numpy", "scipy.stats", "scipy.special", "scipy.optimize", "jinja2", "click", "pytest", "rich.table"),
    *("torch", "torch._dynamo", "transformers.cache_utils", "transformers.tokenization_utils_fast"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
    *(f"transformers.models.{kind}.modeling_{kind}" for kind in ("bloom", "gpt2", "llama")),
)
#: One that asks for the fork and ends as it does. What starts processes is the program itself.
_PROGRAM = """#!{python} -IS
import json, os, socket, sys
words = {{"-m", "--matrix", "--ranks", "--jobs", "bench", "gate"}}
if words.intersection(sys.argv) or any(one.startswith(("tp:", "pp:")) for one in sys.argv):
    os.execv({real!r}, [{real!r}, *sys.argv[1:]])
said = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)])
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect({address!r})
    socket.send_fds(server, [said.encode()], [0, 1, 2])
    code = int(server.recv(16))
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextmanager
def programs(directory: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """A directory for PATH with `PROGRAMS`, whose libraries were imported under ``environment``."""
    address, bin_ = str(directory / "address"), directory / "bin"
    bin_.mkdir()
    for name in PROGRAMS:
        real = str(Path(sys.executable).parent / name)
        text = _PROGRAM.format(python=sys.executable, real=real, name=name, address=address)
        (bin_ / name).write_text(text, encoding="utf-8")
        (bin_ / name).chmod(0o755)
    command = [sys.executable, __file__, address]
    given = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
    pipe = subprocess.PIPE
    server = subprocess.Popen(command, env=given, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
    assert server.stdin is not None
    assert server.stdout is not None
    with server.stdout:
        try:
            assert server.stdout.readline() == "ready\n"
            yield bin_
        finally:
            server.stdin.close()  # as when this process is killed: it ends with all its forks
            server.wait(60)


def _served(address: str) -> tuple[str, list[str]]:
    """Serve until the tests have ended; a fork returns the program that it is to be, with its arguments."""
    for name in _LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has none of the other threads"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            os.killpg(0, signal.SIGKILL)
        caller = listener.accept()[0]
        if not os.fork():
            break
        caller.close()
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    said, files, _, _ = socket.recv_fds(caller, 2**20, 3)
    pid = os.fork()
    if pid:
        for file in (0, 1, 2, *files):
            os.close(file)  # a reader of them waits for the program alone
        caller.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    caller.close()
    name, arguments, directory, environment = json.loads(said)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(directory)
    assert environment.get("OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS"), "it is read where torch is loaded"
    os.environ.clear()
    os.environ.update(environment)
    return name, arguments


def _run(name: str, arguments: list[str]) -> None:
    """Be a program: `harness`, `pytest`, or `python` with -c, - or a file."""
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    sys.path[:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv = [name, *arguments]
    if name != "python":
        from importlib.metadata import entry_points

        sys.exit(next(iter(entry_points(group="console_scripts", name=name))).load()())
    sys.argv = arguments[:1] + arguments[2:] if arguments[0] == "-c" else arguments
    if arguments[0] in ("-c", "-"):
        sys.path.insert(0, "")
        exec(arguments[1] if arguments[0] == "-c" else sys.stdin.read(), vars(main))
    else:
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _run(*_served(sys.argv[1]))
