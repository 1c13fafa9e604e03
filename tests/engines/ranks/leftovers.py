"""What ranks have while they run - processes, listening sockets, shared memory, files - and what of it is left."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from harness.engines.ranks import spawned

_LISTENS = "0A"
_PATIENCE = 20.0


class Seen:
    """What processes had when they were looked at.

    Args:
        pids: of ranks, each the leader of a session.
        directory: of their team.
    """

    def __init__(self, pids, directory):
        self.pids, self.directory = tuple(pids), Path(directory)
        self.sockets = {inode for pid in self.pids for inode in _sockets(pid)}
        self.shared = {file for pid in self.pids for file in _shared(pid)}

    def left(self, patience=0.0):
        """What of it is still there after at most ``patience`` seconds, in words."""
        end = time.monotonic() + patience
        while (found := self._left()) and time.monotonic() < end:
            time.sleep(0.02)
        return found

    def kill(self):
        """End the ranks that a failed test has left."""
        for pid in self.pids:
            if pid in _processes() and _session(pid) == pid:
                os.kill(pid, signal.SIGKILL)

    def _left(self):
        alive = [f"process {pid}" for pid in _processes() if pid in self.pids or _session(pid) in self.pids]
        listening = [f"socket {inode}" for inode in _listening() & self.sockets]
        files = [str(file) for file in (self.directory, *self.shared) if Path(file).exists()]
        return alive + listening + files


class WatchedTeam(spawned.SpawnedTeam):
    """A team that is looked at before it is closed."""

    made = []  # noqa: RUF012  # one list for all, emptied by who looks

    def close(self):
        """Look, and close."""
        if self.pids:
            self.made.append(Seen(self.pids, self._directory))
        super().close()


def everything_gone(pids, patience=_PATIENCE):
    """Whether processes and all of their sessions end within a while."""
    return not Seen(pids, "/nothing/at/all").left(patience)


def _processes():
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _fields(name)[:1] not in ([], ["Z"])]


def _fields(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _session(pid):
    fields = _fields(pid)
    return int(fields[3]) if fields else None


def _sockets(pid):
    with suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                target = os.readlink(entry.path)
                if target.startswith("socket:["):
                    yield target[8:-1]


def _listening():
    lines = [
        line.split() for name in ("tcp", "tcp6") if (file := Path(f"/proc/net/{name}")).exists()
        for line in file.read_text(encoding="ascii").splitlines()[1:]
    ]  # fmt: skip
    return {line[9] for line in lines if line[3] == _LISTENS}


def _shared(pid):
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            name = line.split(maxsplit=5)[-1]
            if name.startswith("/dev/shm/"):
                yield name.removesuffix(" (deleted)")
