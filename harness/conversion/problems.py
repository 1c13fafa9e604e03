"""What is wrong with a checkpoint, collected so that one error names all of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from harness.errors import ModelError

#: How many are told in the error's own line.
_IN_LINE = 3


class Problems:
    """Collects what is wrong, and raises once."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[int]] = {}

    def add(self, kind: str, text: str, rank: int | None = None) -> None:
        """One more, of a kind (missing, unexpected, ...); ranks with the same text share a line."""
        ranks = self._found.setdefault((kind, text), [])
        if rank is not None:
            ranks.append(rank)

    def __bool__(self) -> bool:
        return bool(self._found)

    @property
    def kinds(self) -> Counter[str]:
        """How many there are of each kind."""
        return Counter(kind for kind, _ in self._found)

    @property
    def lines(self) -> list[str]:
        """Each as ``kind: text (ranks)``."""
        return [
            f"{kind}: {text}" + (f" (rank{'s'[: len(ranks) > 1]} {', '.join(map(str, ranks))})" if ranks else "")
            for (kind, text), ranks in self._found.items()
        ]

    def raise_any(self, directory: Path, *, fix: str) -> None:
        """Raise for what was found.

        Raises:
            ModelError: with all of it: the first ones in its line, and if there are more, each in its details.
        """
        lines = self.lines
        if not lines:
            return
        counts = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        head = f"{directory}: " + (f"{counts}: " if len(lines) > 1 else "")
        more = f"; and {len(lines) - _IN_LINE} more" if len(lines) > _IN_LINE else ""
        details = "\n".join(lines) if len(lines) > _IN_LINE else ""
        raise ModelError(head + "; ".join(lines[:_IN_LINE]) + more, fix=fix, details=details)
