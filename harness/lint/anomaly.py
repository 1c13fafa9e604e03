"""What lint finds, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

What = Literal["unreadable", "orphan", "stale", "name", "undecidable", "contradiction", "anomaly"]
Severity = Literal["error", "warning"]

#: What to do about a golden that is no longer of its model, its suite or its name.
RECORD_AGAIN = "Record it again: harness record --update --out {}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Anomaly:
    """One thing that is wrong with a golden, or beside it.

    Attributes:
        kind: what kind of thing.
        path: the golden's directory, or the file or directory that it is about.
        where: which prompt, position or precision; empty where it is of the whole.
        message: what is wrong, in words.
        fix: what to do about it.
        severity: errors fail, warnings are said.
    """

    kind: What
    path: Path
    message: str
    fix: str
    where: str = ""
    severity: Severity = "error"
