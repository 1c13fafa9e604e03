"""Another revision of the user's repository, beside the one that is checked out."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UsageError

_TIMEOUT = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkout:
    """Files of a revision, and how a Python process runs from them.

    Attributes:
        revision: its commit.
        directory: what the working directory is there.
        path: what `sys.path` is there.
        root: of the repository itself.
        copy: what takes its place.
    """

    revision: str
    directory: Path
    path: tuple[str, ...]
    root: Path
    copy: Path

    def holds(self, file: Path) -> bool:
        """Whether a file of this process is one of the repository, and the revision has one of its own."""
        file = file.resolve()
        return file.is_relative_to(self.root) and (self.copy / file.relative_to(self.root)).exists()


@contextmanager
def checkout(revision: str, start: Path | None = None) -> Iterator[Checkout]:
    """Inside, the files of a revision lie in a directory of their own; the repository itself is not touched.

    Files that git does not track (weights, build outputs) are not there.

    Args:
        revision: anything that git calls a commit: a branch, a tag, a hash.
        start: a directory of the repository; None is the working directory.

    Raises:
        UsageError: where there is no repository, no such revision, or no directory of the same name in it.
    """
    here = (start or Path.cwd()).resolve()
    root = Path(_git(here, "rev-parse", "--show-toplevel", what="find a repository").decode().strip())
    # After `--end-of-options` it is a name, whatever it begins with.
    named = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    commit = _git(here, *named, what=f"find the revision {revision!r}").decode().strip()
    with tempfile.TemporaryDirectory(prefix="harness-base-") as text:
        target = Path(text).resolve()
        packed = _git(root, "archive", "--format=tar", commit, what=f"read {commit}")
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(target, filter="data")
        directory = target / here.relative_to(root)
        if not directory.is_dir():
            problem = f"{here.relative_to(root)} is no directory of the revision {revision!r}"
            raise UsageError(problem, fix="Start the command in a directory that both revisions have")
        # First where packages mostly lie: those that were installed to be edited may not be on the path at all.
        first = [str(place) for place in (target, target / "src") if place.is_dir()]
        path = tuple(dict.fromkeys([*first, *moved(sys.path, root, target)]))
        yield Checkout(revision=commit, directory=directory, path=path, root=root, copy=target)


def moved(path: Sequence[str], root: Path, target: Path) -> tuple[str, ...]:
    """A module search path with what lies in ``root`` taken from ``target``, where it is there too."""
    found = []
    for entry in path:
        here = Path(entry or os.getcwd()).resolve()
        other = target / here.relative_to(root) if here.is_relative_to(root) else here
        found.append(str(other if other.exists() else here))
    return tuple(found)


def _git(directory: Path, *arguments: str, what: str) -> bytes:
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT, check=False)
    except FileNotFoundError:
        raise UsageError("git is not installed", fix="Install it, or leave out the base's revision") from None
    except subprocess.TimeoutExpired:
        raise UsageError(f"git did not {what} in {_TIMEOUT:g} s", fix="See whether its disk answers") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        problem = f"git cannot {what} from {directory}" + (f" ({said[0]})" if said else "")
        raise UsageError(problem, fix="Start in a git repository, and name a branch, a tag or a commit of it")
    return done.stdout
