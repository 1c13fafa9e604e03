"""Values that go over a socket between this process and a rank, pickled; one of the two ends never blocks.

A rank may be stopped in the middle of what it sends, or of what is sent to it: who watches it must not wait for that.
"""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

_HEADER = struct.Struct("!Q")
_PIECE = 2**20


class Wire:
    """One end.

    Args:
        end: a stream socket.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._coming, self._going = bytearray(), memoryview(b"")
        #: Whether the other end is closed.
        self.ended = False

    # --- the end that waits --------------------------------------------------------------------

    def send(self, value: Any) -> None:
        """Send a value, and wait until it has gone."""
        self._end.sendall(_packed(value))

    def receive(self) -> Any:
        """The next value.

        Raises:
            EOFError: where the other end is closed.
        """
        while not (found := self._whole(1)):
            self._read()
            if self.ended:
                raise EOFError
        return found[0]

    # --- the end that never does ---------------------------------------------------------------

    def watch(self) -> None:
        """Make this the end that never blocks."""
        self._end.setblocking(False)

    def fileno(self) -> int:
        """The socket's."""
        return self._end.fileno()

    def put(self, value: Any) -> None:
        """Begin to send a value; `exchange` goes on with it."""
        self._going = memoryview(bytes(self._going) + _packed(value))

    @property
    def wants_to_write(self) -> bool:
        """Whether there is more to send."""
        return bool(self._going) and not self.ended

    def exchange(self) -> list[Any]:
        """Send and take what can be without waiting; the values that are whole."""
        try:
            if self._going:
                self._going = self._going[self._end.send(self._going[:_PIECE]) :]
        except BlockingIOError:
            pass
        except OSError:
            # Its process is gone. What it sent before is still to be read.
            self._going = memoryview(b"")
        try:
            self._read()
        except BlockingIOError:
            pass
        except OSError:
            self.ended = True
        return self._whole()

    def finish(self) -> None:
        """Tell the other end that nothing more will come."""
        try:
            self._end.shutdown(socket.SHUT_WR)
        except OSError:
            self.ended = True

    def close(self) -> None:
        """Free the socket."""
        self._end.close()

    # --- both ----------------------------------------------------------------------------------

    def _read(self) -> None:
        piece = self._end.recv(_PIECE)
        self._coming += piece
        self.ended = not piece

    def _whole(self, most: int | None = None) -> list[Any]:
        found: list[Any] = []
        while len(self._coming) >= _HEADER.size and len(found) != most:
            end = _HEADER.size + _HEADER.unpack_from(self._coming)[0]
            if len(self._coming) < end:
                break
            # From a process that this one started, or that started it; never a file.
            found.append(pickle.loads(memoryview(self._coming)[_HEADER.size : end].tobytes()))  # noqa: S301
            del self._coming[:end]
        return found


def _packed(value: Any) -> bytes:
    data = pickle.dumps(value)
    return _HEADER.pack(len(data)) + data
