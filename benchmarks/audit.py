"""What the audit of weights and tables says of every bug of the catalogue, and of correct variants.

    python benchmarks/audit.py [--dtypes float32,bfloat16,float16] [--hosts all] [--only correct|ID,...] [--lines]

Each bug is put into each of its hosts at its first strength. Counted are bugs that change a tensor, a buffer, an
attribute or a config (seen by comparing all of them before and after), of these the ones with a deviation, and with
one at a place that was changed; unchanged hosts and correct variants must have none.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from harness.engines import hf
from harness.engines.spec import parse_spec
from harness.environment import Quiet
from harness.locate.clues import Clue, wrong
from harness.locate.tables import tables
from harness.locate.weights import audit
from harness.mutations import hosts
from harness.mutations.benign import FAMILIES
from harness.mutations.catalogue import CATALOGUE


def main() -> None:
    """Sweep, and print one line a bug and host, and the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="float32,bfloat16,float16")
    parser.add_argument("--hosts", default="all")
    parser.add_argument("--only", default="")
    parser.add_argument("--lines", action="store_true", help="print the three largest clues of each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = hosts.NAMES if arguments.hosts == "all" else arguments.hosts.split(",")
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            directory = hosts.model_directory(name, goldens=Path("golden"), scratch=Path(scratch))
            for dtype in arguments.dtypes.split(","):
                with Quiet(), hf.build(parse_spec(f"hf:dtype={dtype}"), model=str(directory)) as engine:
                    for line, count in _of_host(engine, name, directory, dtype, arguments.only, arguments.lines):
                        print(f"{name:18} {dtype:9} {line}", flush=True)
                        counts[count] = counts.get(count, 0) + 1
    for count, number in sorted(counts.items()):
        print(f"{number:5} {count}")


def _of_host(engine: Any, name: str, directory: Path, dtype: str, only: str, lines: bool) -> Iterator[tuple[str, str]]:
    """(line, what it counts as) of the host as it is, of correct variants, and of bugs."""
    before = _state(engine.model)
    changes: list[tuple[str, bool, AbstractContextManager[None]]] = []
    if only in ("", "correct"):
        changes += [(f"correct: {family.name}", True, family.applied(engine.model)) for family in FAMILIES.values()]
    changes += [
        (one.id, one.harmless, one.applied(engine, one.strengths[0]))
        for one in CATALOGUE.values()
        if name in one.hosts and (not only or one.id in only.split(",") or (only == "correct" and one.harmless))
    ]
    for label, correct, change in changes:
        try:
            with change:
                changed = _differences(before, _state(engine.model))
                found = wrong([*audit(directory, engine.model, declared=dtype), *tables(directory, engine.model)])
        except LookupError:
            continue
        outcome = _outcome(correct, changed, found)
        said = "".join(f"\n    {clue.line} ({clue.size:.2g})" for clue in found[:3]) if lines else ""
        yield f"{label:26} {len(changed):4} changed {len(found):4} wrong  {outcome}{said}", outcome


def _outcome(correct: bool, changed: set[str], found: tuple[Clue, ...]) -> str:
    if correct:
        return "correct: FALSE ALARM" if found else "correct: nothing said"
    if not changed:
        return "bug elsewhere: something said" if found else "bug elsewhere: nothing said"
    if not found:
        return "bug in state: MISSED"
    places = {place for clue in found for place in (clue.module, clue.tensor, f"{clue.module}.{clue.tensor}")}
    right = any(place and (one.startswith(place) or place.startswith(one)) for one in changed for place in places)
    right |= "config" in changed and any(clue.kind == "config" and not clue.module for clue in found)
    return "bug in state: named" if right else "bug in state: NAMED ELSEWHERE"


# --- what a model keeps ---------------------------------------------------------------------------


def _state(model: torch.nn.Module) -> dict[str, str]:
    """By module, or tensor, or "config": a digest of what is kept there. Hooks and forwards are code, and no state."""
    found = {"config": repr(sorted(model.config.to_dict().items(), key=str))}
    for path, module in model.named_modules(remove_duplicate=False):
        kept = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        found[path] = f"{type(module).__name__} {sorted(kept.items(), key=str)}"
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for path, tensor in tensors:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found[path] = hashlib.sha256(raw).hexdigest()
    return found


def _differences(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


if __name__ == "__main__":
    main()
