"""Which rank of a team failed, and why, from what every rank showed before the end."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from harness.errors import EngineError

#: What a rank says that failed because another one had gone.
_ECHOES = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "timed out",
    "NCCL communicator was aborted", "Socket closed", "failed to connect", "Connection refused",
)  # fmt: skip
_LONGEST = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """How one rank ended.

    Attributes:
        rank: its number.
        kind: the class of an exception; "" where there was none.
        message: in one line.
        trace: its own traceback, or the last lines it wrote.
        fix: what the exception itself proposes, "" where it proposes nothing.
    """

    rank: int
    kind: str = ""
    message: str
    trace: str = ""
    fix: str = ""

    @property
    def is_echo(self) -> bool:
        """Whether it only tells that another rank had gone."""
        return bool(self.kind) and any(word in self.message for word in _ECHOES)


def killed(rank: int, code: int, tail: str) -> Failure:
    """The failure of a process that ended by itself."""
    if code >= 0:
        return Failure(rank=rank, message=f"ended with exit code {code}", trace=tail)
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    more = ", as the kernel does to a process when memory runs out" if name == "SIGKILL" else ""
    return Failure(rank=rank, message=f"was killed by {name}{more}", trace=tail)


def error_of(spec: str, failures: Sequence[Failure]) -> EngineError:
    """The error that tells of the rank that failed first of its own, with its traceback."""
    own = [one for one in failures if not one.is_echo] or list(failures)
    first = own[0]
    what = f"{first.kind}: {first.message}" if first.kind else first.message
    others = sorted({one.rank for one in own} - {first.rank})
    also = f" (and rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))})" if others else ""
    fix = first.fix or ("Its own traceback says where" if first.trace else "Look for what killed it")
    return EngineError(f"rank {first.rank}{also} of {spec}: {what[:_LONGEST]}", fix=fix, details=first.trace)
