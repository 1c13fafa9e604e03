"""DeepSpeed's sum over ranks in shared memory, which it compiles on first use: watched, limited, one at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from harness.errors import EngineError, first_line

#: DeepSpeed's name of it, and of its directory among torch's compiled extensions.
NAME = "deepspeed_shm_comm"
#: Bytes of shared memory that a rank makes, measured with deepspeed 0.19.8.
BYTES = 69_206_024
_SHARED = Path("/dev/shm")
_LOOK = 0.2
_INSTEAD = "or write all_reduce=gloo, which needs no compiler"


def shared_bytes() -> int:
    """Bytes of shared memory that are free on this machine; 0 where it has none."""
    return shutil.disk_usage(_SHARED).free if _SHARED.is_dir() else 0


def load(pulse: Callable[[str], None], seconds: float) -> None:
    """Load it, compiled first where it has not been.

    Args:
        pulse: called with a few words while that takes its time.
        seconds: that it may take.

    Raises:
        EngineError: where it takes longer, or cannot be compiled.
    """
    # ninja comes as a package: its command lies beside python, which need not be on the path.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    with _alone(pulse, seconds) as root, _watched(pulse, seconds) as ended:
        forget_locks(root)
        try:
            _builder().load()
        except Exception as error:  # compilers and loaders raise anything
            if ended.is_set():
                problem = f"compiling DeepSpeed's all-reduce took longer than {seconds:g} s"
                raise EngineError(problem, fix=f"Write build={2 * seconds:g}, {_INSTEAD}") from error
            problem = f"DeepSpeed's all-reduce cannot be compiled ({first_line(error)})"
            raise EngineError(problem, fix=f"Install g++ and ninja, {_INSTEAD}") from error


def _builder() -> Any:
    """What DeepSpeed compiles it with."""
    import deepspeed

    with redirect_stdout(None):
        return deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder")


def unlink(rank: int) -> None:
    """Take the name of a rank's shared memory away, once every rank has it: it is freed when they end, however."""
    place = f"{os.getuid()}_{os.environ.get('MASTER_ADDR', '')}_{os.environ.get('MASTER_PORT', '')}"
    with contextlib.suppress(OSError):
        (_SHARED / f"deepspeed_allreduce_buffer_{place}_{rank}").unlink()


def _root() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


@contextmanager
def _alone(pulse: Callable[[str], None], seconds: float) -> Iterator[Path]:
    """The directory of compiled extensions, for this process alone; the kernel lets go of it when the process ends."""
    root, end = _root(), time.monotonic() + seconds
    root.mkdir(parents=True, exist_ok=True)
    lock = os.open(root / "golden-harness.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    problem = f"another process has compiled DeepSpeed's all-reduce for {seconds:g} s"
                    raise EngineError(problem, fix=f"End it, {_INSTEAD}") from None
                pulse("waits for DeepSpeed's all-reduce to be compiled")
                time.sleep(_LOOK)
        yield root
    finally:
        os.close(lock)


def forget_locks(root: Path, seconds: float = 2.0) -> None:
    """Remove what a compilation that was killed left: torch waits for such a file for ever.

    Args:
        root: the directory of compiled extensions.
        seconds: in which nothing is seen to be compiled there.
    """
    for lock in (*root.glob(f"*/{NAME}/lock"), *root.glob(f"{NAME}/lock")):
        end = time.monotonic() + seconds
        # A compiler runs in the directory of what it compiles; the rest of the work takes moments.
        while lock.exists() and not _is_worked_in(lock.parent):
            if time.monotonic() > end:
                lock.unlink(missing_ok=True)
                break
            time.sleep(_LOOK)


def _is_worked_in(directory: Path) -> bool:
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if Path(process.cwd()) == directory:
                return True
    return False


@contextmanager
def _watched(pulse: Callable[[str], None], seconds: float) -> Iterator[threading.Event]:
    """Inside, tell how long it has taken, and end what this process has started when it is too long.

    Yields:
        What is set when it was ended.
    """
    done, ended, begun = threading.Event(), threading.Event(), time.monotonic()

    def watch() -> None:
        while not done.wait(_LOOK):
            spent = time.monotonic() - begun
            if spent > seconds:
                ended.set()
                _end_children()
                return
            pulse(f"compiling DeepSpeed's all-reduce, as on each first use: {spent:.0f} s")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        done.set()
        thread.join()


def _end_children() -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
