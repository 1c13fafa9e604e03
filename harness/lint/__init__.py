"""lint: goldens that cannot be trusted. One pass over all of them; each is read once and nothing in it is executed."""

from __future__ import annotations

from pathlib import Path

from harness.errors import GoldenError
from harness.lint import contradictions, names, numbers, tree
from harness.lint import live as asked_again
from harness.lint.anomaly import Anomaly

__all__ = ["Anomaly", "lint"]


def lint(root: Path, *, live: bool = False) -> list[Anomaly]:
    """What is wrong with the goldens under a directory, and beside them.

    Args:
        root: the directory; goldens may lie at any depth.
        live: also let each golden's own model score the recorded tokens again.

    Returns:
        Anomalies in the order of their paths, errors and warnings together.

    Raises:
        GoldenError: where there is no golden at all, not even a broken one.
    """
    seen = tree.read_tree(root)
    found = list(tree.look(seen))
    if not seen.goldens and not found:
        raise GoldenError(f"there is no golden under {root}", fix="Name the directory of the goldens, or record one")
    found += names.look(seen.goldens)
    for directory, golden in seen.goldens.items():
        found += numbers.look(directory, golden)
        if live:
            found += asked_again.look(directory, golden)
    found += contradictions.look(seen.goldens)
    return sorted(found, key=lambda one: (str(one.path), one.severity))
