"""Which rank of a team failed, and why, from what every rank showed before the end."""

from __future__ import annotations

import re
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from harness.errors import EngineError, HarnessError, first_line

#: What a rank says that failed because another one had gone.
_ECHOES = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "timed out",
    "NCCL communicator was aborted", "ncclRemoteError", "Socket closed", "failed to connect", "Connection refused",
)  # fmt: skip
_LONGEST = 400

#: A line of faulthandler's stacks, and how many innermost ones tell what a rank is doing.
_FRAME = re.compile(r'^ +File "(.*)", line \d+ in (.*)$', re.MULTILINE)
_INNERMOST = 3
#: Files in which a rank only waits for others, by their last two parts.
_WAITING = frozenset(
    {
        ("distributed", "distributed_c10d.py"),
        ("distributed", "_functional_collectives.py"),
        ("distributed", "rendezvous.py"),
        ("ranks", "groups.py"),
    }
)


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
        return any(word in self.message for word in _ECHOES)


def raised(rank: int, error: BaseException) -> Failure:
    """The failure of a rank that raised; an error of this package is told as its author wrote it."""
    if isinstance(error, HarnessError):
        return Failure(rank=rank, message=error.problem, fix=error.fix, trace=error.details)
    return Failure(
        rank=rank,
        kind=type(error).__name__,
        message=first_line(error, "no message"),
        trace="".join(traceback.format_exception(error)).strip(),
    )


def killed(rank: int, code: int, tail: str) -> Failure:
    """The failure of a process that ended by itself.

    Args:
        rank: its number.
        code: its exit code, negative for a signal.
        tail: the last lines it wrote.
    """
    said = "Its last lines say more" if tail else "Look for what ended it"
    if code >= 0:
        return Failure(rank=rank, message=f"ended with exit code {code}", trace=tail, fix=said)
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if name == "SIGKILL":
        what = "was killed by SIGKILL, as the kernel does to a process when memory runs out"
        return Failure(rank=rank, message=what, trace=tail, fix="Give it more memory, or look for what killed it")
    return Failure(rank=rank, message=f"was killed by {name}", trace=tail, fix=said)


def waits_in(stack: str) -> str:
    """The function in which a rank waits for another, from faulthandler's text; "" for one that does something else.

    Only the innermost frames count: what hangs inside of a layer is called by all kinds of functions.
    """
    for file, function in _FRAME.findall(stack)[:_INNERMOST]:
        if PurePath(file).parts[-2:] in _WAITING:
            return str(function)
    return ""


def error_of(spec: str, failures: Sequence[Failure]) -> EngineError:
    """The error that tells of the rank that failed first of its own, with its traceback.

    Args:
        spec: the engine's.
        failures: the most telling first, at least one; echoes of another one are passed over where there is one.
    """
    own = [one for one in failures if not one.is_echo] or list(failures)
    first = own[0]
    what = f"{first.kind}: {first.message}" if first.kind else first.message
    others = sorted({one.rank for one in own} - {first.rank})
    also = f" (and rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))})" if others else ""
    fix = first.fix or "Its own traceback says where"
    return EngineError(f"rank {first.rank}{also} of {spec}: {what[:_LONGEST]}", fix=fix, details=first.trace)
