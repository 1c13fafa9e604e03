"""The catalogue as a whole: what it covers, and that it is light to import."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import get_args

import pytest

from harness.mutations import hosts
from harness.mutations.catalogue import CATALOGUE
from harness.mutations.mutation import Group, Mutation, catalogue

BUGS = [one for one in CATALOGUE.values() if not one.harmless]


def test_ninety_bugs_of_every_group():
    """At least ninety bugs, and at least four of every part of an implementation."""
    assert len(BUGS) >= 90
    for group in get_args(Group):
        assert sum(one.group == group for one in BUGS) >= 4, group


@pytest.mark.parametrize("one", CATALOGUE.values(), ids=CATALOGUE)
def test_a_bug_is_told_completely(one: Mutation):
    """Id, a line of words, a reference owner/repo#number or none, hosts that exist, and its own strength first."""
    assert re.fullmatch(r"[a-z]+-[A-Za-z0-9-]+", one.id)
    assert one.wrong
    assert "\n" not in one.wrong
    assert re.fullmatch(r"[\w.-]+/[\w.-]+#\d+|", one.reference)
    assert one.hosts
    assert one.hosts <= set(hosts.NAMES)
    assert one.strengths[0] == 1.0
    assert list(one.strengths) == sorted(set(one.strengths), reverse=True)
    assert one.active


def test_an_id_twice_is_refused():
    """Two bugs of one name would hide each other."""
    one = next(iter(CATALOGUE.values()))
    with pytest.raises(ValueError, match="twice"):
        catalogue(one, one)


def test_the_catalogue_imports_no_torch():
    """Listing the catalogue must not wait for torch."""
    code = "import sys; import harness.mutations.catalogue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
