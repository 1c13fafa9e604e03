"""The line of a verdict that refers to the certificate beside its golden: how many bugs the check could not see."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.report.certificate import NAME, SEEN, VERSION
from harness.report.characters import one_line

if TYPE_CHECKING:
    from harness.values import Answer, Verdict

_GOLDEN = "golden.json"
_LARGEST, _LARGEST_GOLDEN = 4 * 2**20, 64 * 2**20


def golden_digest(directory: Path) -> str | None:
    """The digest that a golden's JSON carries; None where there is none to be read."""
    try:
        document = _loaded(directory / _GOLDEN, _LARGEST_GOLDEN)
    except (OSError, ValueError, RecursionError):
        return None
    found = document.get("digest") if isinstance(document, dict) else None
    return found if isinstance(found, str) and found else None


def unseen_lines(directory: Path, verdict: Verdict) -> list[str]:
    """What a verdict says of the certificate beside its golden; empty where there is none, or nothing was compared.

    The file may be another's: nothing of it is shown but numbers.
    """
    path = directory / NAME
    if not path.is_file() or not any(answer.power for answer in verdict.answers):
        return []
    again = f"make it again with harness record --update --certificate --out {directory}"
    try:
        digest, counts = _read(path)
    except (OSError, ValueError, RecursionError):
        return [one_line(f"not seen: {path} cannot be read; {again}")]
    if digest != golden_digest(directory):
        return [one_line(f"not seen: {path} is out of date, the golden is another by now; {again}")]
    told = [words for answer in verdict.answers if (words := _counted(answer, counts))]
    return [one_line(f"not seen: {', '.join(told)}; see {path}")] if told else []


def _counted(answer: Answer, counts: Mapping[str, Mapping[str, int]]) -> str:
    """How many bugs one answer could not see; empty for a precision that the certificate lacks."""
    power = answer.power
    if power is None or power.level == "nothing" or power.precision not in counts:
        return ""
    found = counts[power.precision]
    named = 0 if answer.diagnosis is not None else found["name"]
    # The certificate is of logits: who shows less sees less.
    least = "" if power.level == "logits" else "at least "
    told = f"{least}{found['not'] + named} of {found['of']} bugs of the catalogue in {power.precision}"
    return told + (f" ({found['not']} with --diagnose)" if named else "")


def _read(path: Path) -> tuple[str, dict[str, dict[str, int]]]:
    """Digest and counts by precision.

    Raises:
        OSError, ValueError, RecursionError: for what is no certificate.
    """
    document = _loaded(path, _LARGEST)
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise ValueError("no certificate of this version")
    digest, rows = document.get("digest"), document.get("precisions")
    if not isinstance(digest, str) or not isinstance(rows, list):
        raise ValueError("no digest or no precisions")
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("precision"), str):
            raise ValueError("a precision without a name")
        numbers = {key: row.get(key) for key in (*SEEN, "of")}
        known = {key: value for key, value in numbers.items() if type(value) is int and value >= 0}
        if len(known) < len(numbers):
            raise ValueError("a count that is no number")
        counts[row["precision"]] = known
    return digest, counts


def _loaded(path: Path, largest: int) -> Any:
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"larger than {largest // 2**20} MiB")
    return json.loads(content)
