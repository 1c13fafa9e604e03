"""Files: what cannot be read, what belongs to nothing, what a golden was recorded from and is another by now."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import arrays, checkpoint, store, suites
from harness.checkpoint import Identity
from harness.errors import HarnessError
from harness.lint.anomaly import RECORD_AGAIN, Anomaly
from harness.values import Golden

_RESTORE = "Restore it from version control, or record it again"
_CANDIDATES = "candidates.toml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """Everything under one directory, each golden read once.

    Attributes:
        root: the directory.
        goldens: those that can be read, by directory.
        unreadable: directories of the others, with the error of each.
    """

    root: Path
    goldens: Mapping[Path, Golden]
    unreadable: Mapping[Path, str]


def read_tree(root: Path) -> Tree:
    """Read every golden under a directory; nothing in any of them is executed."""
    goldens, unreadable = {}, {}
    for directory in store.list_goldens(root):
        try:
            goldens[directory] = store.read_golden(directory)
        except HarnessError as error:
            unreadable[directory] = error.problem
        except (OSError, MemoryError) as error:
            unreadable[directory] = f"it cannot be read ({str(error) or type(error).__name__})"
    return Tree(root=root, goldens=goldens, unreadable=unreadable)


def look(tree: Tree) -> Iterator[Anomaly]:
    """All that needs no number of any golden."""
    for directory, problem in tree.unreadable.items():
        yield Anomaly(kind="unreadable", path=directory, message=problem, fix=_RESTORE)
    yield from _leftovers(tree)
    for directory, golden in tree.goldens.items():
        yield from _suite(directory, golden)
        yield from _candidates(directory)
    yield from _models(tree)


# --- what belongs to nothing ---------------------------------------------------------------------------


def _leftovers(tree: Tree) -> Iterator[Anomaly]:
    """Arrays without their golden.json, and what an interrupted writer left behind."""
    found = {path for path in tree.root.rglob("golden*.safetensors*") if arrays.is_arrays(path.name)}
    alone: dict[Path, list[str]] = {}
    for path in sorted({*found, *tree.root.rglob(".golden*.tmp")}):
        if not (path.parent / store.JSON_NAME).exists():
            alone.setdefault(path.parent, []).append(path.name)
        elif path.name not in _arrays_of(path.parent, tree):
            yield Anomaly(
                kind="orphan",
                path=path,
                message="left behind by a recording that was interrupted",
                fix="Record the golden again, or remove the file if `harness diff` can read the golden",
                severity="warning",
            )
    for directory, names in alone.items():
        yield Anomaly(
            kind="orphan",
            path=directory,
            message=f"{', '.join(names)} without {store.JSON_NAME}",
            fix=f"Restore {store.JSON_NAME} from version control, or remove the directory",
        )


def _arrays_of(directory: Path, tree: Tree) -> Sequence[str]:
    """Names of the files of a golden's arrays; where it cannot be read that is said already, and it may be any."""
    if directory in tree.goldens:
        return store.array_names(directory)
    return [path.name for path in directory.iterdir() if path.suffix == ".safetensors"]


def _candidates(directory: Path) -> Iterator[Anomaly]:
    """How the golden is checked must be written down beside it, or one directory up."""
    places = [place / _CANDIDATES for place in (directory, directory.parent)]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        yield Anomaly(
            kind="orphan",
            path=directory,
            message=f"no {_CANDIDATES} says what to check it with: `harness check --all` cannot",
            fix=f'Write quick = ["hf:dtype=float32"] and full = [] into {places[1]}',
            severity="warning",
        )
        return
    try:
        tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        message = f"{_CANDIDATES} is not TOML ({str(error)[:200]})"
        yield Anomaly(kind="unreadable", path=file, message=message, fix="Mend the line that it names")


# --- what a golden was recorded from -------------------------------------------------------------------------


def _suite(directory: Path, golden: Golden) -> Iterator[Anomaly]:
    given = golden.provenance.get("suite_path")
    if given is None:
        return
    path = beside(directory, given)
    if path is None:
        message = "the path of its suite is not one that `harness record` writes"
        yield Anomaly(kind="unreadable", path=directory, message=message, fix=_RESTORE)
    elif not path.exists():
        yield Anomaly(
            kind="orphan",
            path=directory,
            message=f"its suite {path} is gone",
            fix="Restore the suite, or remove the golden",
        )
    else:
        yield from _stale_suite(directory, golden, path)


def _stale_suite(directory: Path, golden: Golden, path: Path) -> Iterator[Anomaly]:
    try:
        suite = suites.load_suite(path)
    except HarnessError as error:
        yield Anomaly(kind="unreadable", path=path, message=error.problem, fix=error.fix)
        return
    if suite.digest == golden.suite.digest:
        return
    before, after = ({prompt.id: prompt for prompt in one.prompts} for one in (golden.suite, suite))
    others = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    what = f"prompts {', '.join(others[:5])}{' and others' * (len(others) > 5)}" if others else "what is asked of all"
    yield Anomaly(
        kind="stale",
        path=directory,
        message=f"{path} is another suite by now: {what}",
        fix=RECORD_AGAIN.format(directory),
    )


def _models(tree: Tree) -> Iterator[Anomaly]:
    """Models that are gone or others, each read once; and models that no golden is of."""
    of_model: dict[Path, list[Path]] = {}
    for directory, golden in tree.goldens.items():
        if golden.model.path is None:
            continue
        path = beside(directory, golden.model.path)
        if path is None or not path.is_dir():
            yield Anomaly(
                kind="orphan",
                path=directory,
                message=f"its model {golden.model.path} is gone",
                fix="Restore the model, or remove the golden",
            )
        else:
            of_model.setdefault(path, []).append(directory)
    for path, directories in of_model.items():
        yield from _stale_models(path, directories, tree)
    yield from _unused_models(tree, {path.resolve() for path in of_model})


def _stale_models(path: Path, directories: Sequence[Path], tree: Tree) -> Iterator[Anomaly]:
    identity = _identity(path)
    if isinstance(identity, Anomaly):
        yield identity
        return
    for directory in directories:
        model = tree.goldens[directory].model
        if model.digest == identity.digest:
            continue
        what = "has other weights by now" if model.signature == identity.signature else "is another model by now"
        yield Anomaly(
            kind="stale", path=directory, message=f"its model {path} {what}", fix=RECORD_AGAIN.format(directory)
        )


def _identity(path: Path) -> Identity | Anomaly:
    try:
        return checkpoint.identify(path)
    except HarnessError as error:
        return Anomaly(kind="unreadable", path=path, message=error.problem, fix=error.fix)
    except OSError as error:
        return Anomaly(kind="unreadable", path=path, message=str(error), fix="Make the file readable")


def _unused_models(tree: Tree, used: set[Path]) -> Iterator[Anomaly]:
    for config in sorted(tree.root.rglob("config.json")):
        path = config.parent
        weights = [one for one in path.glob("*.safetensors") if not arrays.is_arrays(one.name)]
        # A golden that cannot be read may well be of this model.
        unknown = any(path.parent in (other, other.parent) for other in tree.unreadable)
        if weights and path.resolve() not in used and not unknown:
            message = "a model that no golden is of"
            yield Anomaly(kind="orphan", path=path, message=message, fix="Record a golden of it, or remove it")


def beside(directory: Path, given: object) -> Path | None:
    """A path as a golden writes it, relative to itself; None for what is no such path."""
    if not isinstance(given, str) or not given or "\0" in given or Path(given).is_absolute():
        return None
    return Path(os.path.normpath(directory / given))
