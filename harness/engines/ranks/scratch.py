"""The directory of a team's logs and meetings; what a killed process left of its own is removed by the next one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "harness-ranks-"
_LOCK = "lock"
#: Memory that processes of a Linux machine share: what ranks make there is called after their directory.
_SHARED = Path("/dev/shm")


class Scratch:
    """A new directory, locked for as long as this process has it.

    Args:
        root: where; the system's place for temporary files by default.
    """

    def __init__(self, root: Path | None = None) -> None:
        root = Path(tempfile.gettempdir()) if root is None else root
        sweep(root)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """Remove it; again is nothing."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        _remove(self.path)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    for shared in _SHARED.glob(f"*_{path.name}_*"):
        with contextlib.suppress(OSError):
            shared.unlink()


def sweep(root: Path) -> None:
    """Remove directories whose process has ended: the kernel has let go of their locks."""
    for path in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            # No lock yet: another process is just making it. Another user's cannot be opened.
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(lock)
