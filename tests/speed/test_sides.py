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
        Checkout(revision="", directory=home, path=(str(home), *sys.path), root=tmp_path, copy=home)
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


@pytest.mark.usefixtures("telling")
def test_other_code_of_this_project_has_a_process_of_its_own(tmp_path):
    """It starts in the revision, is exchanged with nobody, and anew as a whole process."""
    here = Path(__file__).parents[2]
    (tmp_path / "harness/speed").mkdir(parents=True)
    (tmp_path / "harness/speed/sides.py").touch()
    # What runs is this code: only that it is not taken for the base's is tested.
    theirs = Checkout(revision="", directory=here, path=tuple(sys.path), root=here, copy=tmp_path)
    with side() as first, side(theirs) as second:
        parents = [Side._call(each, "parent") for each in (first, second)]
        first.exchange(second)
        assert [Side._call(each, "parent") for each in (first, second)] == parents
        second.restart()
        assert Side._call(second, "parent") not in (*parents, os.getpid())
