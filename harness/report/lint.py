"""What lint found, as text: errors first, the same thing about one golden said once."""

from __future__ import annotations

from collections.abc import Sequence

from harness.lint import Anomaly
from harness.report.characters import one_line

#: Of one kind of thing about one golden so many are shown one by one.
_SHOWN = {"error": 3, "warning": 1}


def lint_to_text(anomalies: Sequence[Anomaly]) -> str:
    """The report, plain text without a final newline: one line where nothing is wrong."""
    if not anomalies:
        return "nothing is wrong with these goldens"
    errors = sum(one.severity == "error" for one in anomalies)
    warnings = len(anomalies) - errors
    lines = [f"{_counted(errors, 'error')}, {_counted(warnings, 'warning')}"]
    alike: dict[tuple[str, str, str, str], list[Anomaly]] = {}
    for one in sorted(anomalies, key=lambda one: one.severity):
        alike.setdefault((one.severity, str(one.path), one.kind, one.fix), []).append(one)
    for each in alike.values():
        lines += _block(each)
    return "\n".join(lines)


def _counted(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def _block(alike: Sequence[Anomaly]) -> list[str]:
    """Anomalies of one kind about one golden that are mended in one way."""
    first, shown = alike[0], _SHOWN[alike[0].severity]
    lines = [
        f"{one.severity}: {one.path}: {one.kind}: {f'{one.where}: ' if one.where else ''}{one.message}"
        for one in alike[:shown]
    ]
    if len(alike) > shown:
        lines.append(f"{first.severity}: {first.path}: {first.kind}: {len(alike) - shown} more of these")
    return [*map(one_line, lines), "  next: " + one_line(first.fix)]
