"""A directory that appears whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.errors import UsageError
from harness.files import sync


def must_be_free(out: Path, needed: int = 0) -> None:
    """Refuse a target that could not be written, before the work; ``needed`` are the bytes that it is to hold.

    Raises:
        UsageError: where something is there already, the parent is not, or the disk has no room.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} is there already", fix="Name a directory that does not exist yet")
    parent = out.resolve().parent
    if not parent.is_dir():
        raise UsageError(f"the directory {parent} does not exist", fix="Make it first")
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UsageError(
            f"{out} needs {needed:,} bytes, and {parent} has {free:,}", fix="Make room, or write elsewhere"
        )


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A directory to write into, beside ``out`` under a hidden name; it becomes ``out`` at the end of the block.

    An error or an interrupt inside leaves nothing of it.

    Raises:
        UsageError: as must_be_free, also for what appeared there meanwhile.
    """
    must_be_free(out)
    final = out.resolve()
    made = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    try:
        yield made
        os.chmod(made, 0o755)
        sync(made)
        os.rename(made, final)
    except BaseException as error:
        shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UsageError(f"{out} appeared meanwhile", fix="Name a directory that does not exist yet") from None
        raise
    sync(final.parent)
