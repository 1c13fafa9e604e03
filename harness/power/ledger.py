"""Results as JSON lines in a working directory: each is done once, by one of several processes that share the work."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from harness.environment import thread_count, versions
from harness.errors import UsageError
from harness.numerics import constants

#: Called with how many results are there, how many there will be, and what is being done.
Progress = Callable[[int, int, str], None]
Report = Callable[[str], None]
Late = Callable[[], bool]
#: (index, number) of a process among those that share the work.
Shard = tuple[int, int]
WHOLE: Shard = (0, 1)

#: Status of what could not be run; the record's finding says why.
SKIPPED = "skipped"


class Record(Protocol):
    """A frozen dataclass of plain values."""

    @property
    def key(self) -> tuple[Hashable, ...]:
        """What is not done twice; the version is the last of it."""

    @property
    def version(self) -> str:
        """The rule that judged it."""


R = TypeVar("R", bound=Record)
#: Fills in what is missing, in order.
Perform = Callable[[Sequence[R], Report, Late], Generator[R, None, None]]


@cache
def rule_version() -> str:
    """The package's version and a digest of the constants: a verdict under other constants is another verdict."""
    text = Path(constants.__file__).read_bytes()
    return f"{versions()['golden-harness']}-{hashlib.sha256(text).hexdigest()[:12]}"


def of_this_rule(records: Sequence[R]) -> list[R]:
    """Those that were judged by the rule as it is now."""
    version = rule_version()
    return [one for one in records if one.version == version]


def run(
    asked: Sequence[R],
    work: Path,
    name: str,
    parse: Callable[[dict[str, Any]], R],
    perform: Perform[R],
    progress: Progress,
    shard: Shard,
    minutes: float | None,
) -> None:
    """Do what is asked and not there yet, and add it to this shard's file.

    Args:
        asked: blank records of this shard's part.
        work: directory of the results.
        name: of the files.
        parse: makes a record of a line.
        perform: does the missing ones.
        progress: called before each and with it.
        shard: (index, number) of this process.
        minutes: time after which none is begun.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    work.mkdir(parents=True, exist_ok=True)
    done = {record.key for record in read(work, name, parse)}
    missing = [blank for blank in asked if blank.key not in done]
    written = len(asked) - len(missing)

    def report(text: str) -> None:
        progress(written, len(asked), text)

    def late() -> bool:
        return time.monotonic() > deadline

    # One thread, whatever the machine has, so that two threads are something else.
    with (
        thread_count(1),
        appending(work, name, shard) as append,
        closing(perform(missing, report, late)) as records,
    ):
        for record in records:
            append(record)
            written += 1
            report(" ".join(map(str, record.key[:-1])))
            if late():
                return


@contextmanager
def appending(work: Path, name: str, shard: Shard) -> Iterator[Callable[[Any], None]]:
    """A function that adds a line to this shard's file, after what a killed run left unfinished there is cut off."""
    index, number = shard
    path = work / (f"{name}.jsonl" if number == 1 else f"{name}-{index}.jsonl")
    with path.open("ab") as file:
        file.truncate(len(_whole_lines(path)))

        def append(record: Any) -> None:
            file.write(json.dumps(_finite(asdict(record)), allow_nan=False).encode() + b"\n")
            file.flush()

        yield append


def _finite(value: Any) -> Any:
    """Infinities as the words that float() reads, since JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def read(work: Path, name: str, parse: Callable[[dict[str, Any]], R]) -> list[R]:
    """The records of all shards, each once, of this and of former versions of the rule.

    Raises:
        UsageError: for a line that is no record; one that was cut short at the end of a file is passed over.
    """
    found: dict[Hashable, R] = {}
    for path in sorted([*work.glob(f"{name}.jsonl"), *work.glob(f"{name}-*.jsonl")]):
        for number, line in enumerate(_whole_lines(path).splitlines(), start=1):
            try:
                record = parse(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UsageError(f"line {number} of {path} is no result", fix="Remove it, or the whole file") from None
            found[record.key] = record
    return list(found.values())
