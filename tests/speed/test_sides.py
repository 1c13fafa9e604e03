"""The process of one side: whose code it runs, and what another takes over from it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from harness.speed.revisions import Checkout
from harness.speed.sides import Side


def where(side):
    """The process, the working directory and the search path of a side's life, told by a request of its own."""
    return side._ask("where")[0:3]


@pytest.fixture
def telling(monkeypatch):
    """Sides whose processes tell where they are, and import no library."""
    from harness.engines.ranks import spawned
    from harness.speed import sides

    def team(size, **named):
        return spawned.SpawnedTeam(size, threads=1, **{**named, "server": "tests.speed.telling:Server"})

    monkeypatch.setattr(sides, "SpawnedTeam", team)


def side(checkout=None):
    """One of no candidate in particular."""
    return Side("hf", model=None, checkout=checkout, timeout=60.0, progress=lambda _text: None)


@pytest.mark.usefixtures("telling")
def test_sides_exchange_processes_and_keep_their_own_code(tmp_path):
    """After an exchange each runs as a fork of the other's process, where its own checkout is."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one, other = (
        Checkout(revision="", directory=home, path=(str(home), *sys.path), root=Path("/nowhere"), copy=home)
        for home in (tmp_path / "one", tmp_path / "other")
    )
    with side(one) as first, side(other) as second:
        before = [where(first), where(second)]
        assert [found[1] for found in before] == [str(one.directory), str(other.directory)]
        assert [found[2] for found in before] == [str(one.directory), str(other.directory)]
        first.exchange(second)
        first.restart()
        second.restart()
        after = [where(first), where(second)]
        assert [found[1:] for found in after] == [found[1:] for found in before]
        parents = [Side._call(each, "parent") for each in (first, second)]
        first.exchange(second)
        first.restart()
        second.restart()
        assert [Side._call(each, "parent") for each in (second, first)] == parents
        assert len({found[0] for found in (*before, *after, where(first), where(second))}) == 6


@pytest.mark.parametrize("library", ["harness/__init__.py", "transformers/__init__.py"])
@pytest.mark.usefixtures("telling")
def test_a_revision_with_libraries_of_its_own_has_a_process_of_its_own(tmp_path, monkeypatch, library):
    """What a fork brings along would be the candidate's; it starts in the revision, and anew as a whole process."""
    from harness.speed import sides

    here, package = Path(__file__).parents[2], tmp_path / "repository" / library
    monkeypatch.setattr(sides, "_library_files", lambda: (package,))
    theirs = Checkout(revision="", directory=here, path=tuple(sys.path), root=package.parents[1], copy=tmp_path)
    with side(theirs) as found:
        assert not found.apart, "the revision does not have it"
    (tmp_path / library).parent.mkdir(parents=True)
    (tmp_path / library).touch()
    with side(theirs) as found:
        assert found.apart
        parents = [Side._call(found, "parent")]
        found.restart()
        parents.append(Side._call(found, "parent"))
        found.restart(whole=True)
        parents.append(Side._call(found, "parent"))
    assert parents[0] == parents[1] != parents[2]
    assert os.getpid() not in parents
