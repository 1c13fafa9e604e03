"""Arrays above a size are in shards: nothing is lost, nothing damaged is used, and a write is one step as ever."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import arrays
from harness.errors import GoldenError
from harness.files import content_digest
from harness.lint import tree
from harness.store import JSON_NAME, array_names, read_golden, write_golden

LIMIT = 15_000
#: Two files, or three.
HALF = 90_000
#: Of the header of one file.
HEADER = 4_000


@pytest.fixture(scope="module")
def golden():
    """A golden of the repository, 0.17 MB in one file."""
    return read_golden(Path("golden/llama-tiny/translate"))


@pytest.fixture
def small(monkeypatch):
    """A limit that the golden exceeds."""
    monkeypatch.setattr(arrays, "SHARD_BYTES", LIMIT)


@pytest.fixture
def sharded(golden, small, tmp_path):
    """The golden, written in shards."""
    write_golden(golden, tmp_path / "sharded")
    return tmp_path / "sharded"


def content(golden, place):
    """What a golden says in the bytes of one file, whatever files it came from."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(arrays, "SHARD_BYTES", 10**12)
        write_golden(replace(golden, directory=None), place)
    found = {path.name: path.read_bytes() for path in place.iterdir()}
    shutil.rmtree(place)
    return found


def names(directory):
    """Files of a directory."""
    return sorted(path.name for path in directory.iterdir())


def test_shards_hold_what_one_file_would(golden, sharded, tmp_path):
    """Each is below the limit, some array is cut, and every value comes back."""
    files = array_names(sharded)
    assert len(files) >= 4
    assert names(sharded) == sorted([JSON_NAME, *files])
    assert all((sharded / name).stat().st_size <= LIMIT + HEADER for name in files)
    assert len(golden.rows) * golden.rows.projections.shape[1] * 4 > LIMIT  # more than one file's
    again = read_golden(sharded)
    assert content(again, tmp_path / "a") == content(golden, tmp_path / "b")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400),
    st.lists(st.tuples(st.sampled_from(["f4", "f2", "i4"]), st.lists(st.integers(0, 7), max_size=3)), max_size=6),
)
def test_arrays_of_any_shape_come_back(tmp_path_factory, limit, shapes):
    """Empty ones, single numbers, and rows that are larger than a file may be."""
    place = tmp_path_factory.mktemp("any")
    rng = np.random.default_rng(0)
    given_ = {f"a{n}": rng.integers(0, 99, shape).astype(dtype) for n, (dtype, shape) in enumerate(shapes)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(arrays, "SHARD_BYTES", limit)
        declared = arrays.stage(place, given_)
        assert arrays.read(place, declared).keys() == given_.keys()  # staged, and declared by now
        arrays.settle(place, declared)
    found = arrays.read(place, json.loads(json.dumps(declared)))
    assert found.keys() == given_.keys()
    for name, array in given_.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    shutil.rmtree(place)


def flip(path):
    """Another last byte."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


DAMAGE = {
    "flipped": (lambda directory, files: flip(directory / files[2]), "SHA-256"),
    "truncated": (lambda directory, files: os.truncate(directory / files[1], 100), "truncated"),
    "missing": (lambda directory, files: (directory / files[3]).unlink(), "is missing"),
    "exchanged": (lambda directory, files: shutil.copy(directory / files[0], directory / files[1]), "damaged"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_shard_is_refused(sharded, damage, words):
    """Whichever it is, it is named, and no number of the others is used."""
    damage(sharded, array_names(sharded))
    with pytest.raises(GoldenError, match=words) as caught:
        read_golden(sharded)
    assert "-of-000" in str(caught.value)


def test_an_index_without_one_of_its_shards_is_refused(sharded):
    """An index that leaves a shard out, every digest right."""
    document = json.loads((sharded / JSON_NAME).read_text())
    shards = document["arrays"]["shards"]
    del shards[-1]
    document["digest"] = content_digest(document)
    (sharded / JSON_NAME).write_text(json.dumps(document))
    with pytest.raises(GoldenError):  # another number of shards has other names
        read_golden(sharded)


@pytest.mark.parametrize("declared", [None, [], {}, {"shards": []}, {"shards": [1]}, {"shards": [{"sha256": 1}]}])
def test_what_declares_no_arrays_is_refused(tmp_path, declared):
    """No index, or one of something else."""
    with pytest.raises(ValueError, match="does not name its arrays"):
        arrays.read(tmp_path, declared)


@pytest.mark.parametrize(("before", "after"), [(10**12, HALF), (HALF, 10**12), (HALF, HALF)])
def test_a_write_that_fails_leaves_the_old_golden_or_the_new_one(golden, tmp_path, monkeypatch, before, after):
    """From one file to shards and back, at each of its renames; the next write clears up."""
    other = replace(golden, provenance={**golden.provenance, "history": [{"reason": "another"}]})
    other = replace(other, rows=replace(other.rows, logp=other.rows.logp + 1))
    expected = [content(one, tmp_path / "x") for one in (golden, other)]
    place, rename, seen = tmp_path / "written", os.replace, []
    for failing in range(100):
        monkeypatch.setattr(arrays, "SHARD_BYTES", before)
        write_golden(golden, place)
        monkeypatch.setattr(arrays, "SHARD_BYTES", after)
        left = [failing]

        def fail(*arguments, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise OSError("no space left on device")
            rename(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", fail)
            try:
                write_golden(other, place)
                break
            except OSError:
                pass
        seen.append(expected.index(content(read_golden(place), tmp_path / "x")))
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}
    assert names(place) == sorted([JSON_NAME, *array_names(place)])


def test_lint_knows_shards(sharded):
    """Those of the golden are no leftovers; one of another number of shards is, and one without a golden.json."""
    assert not [one for one in tree.look(tree.read_tree(sharded.parent)) if one.path.name.startswith("golden")]
    stray = sharded / "golden-00001-of-00009.safetensors"
    shutil.copy(sharded / array_names(sharded)[0], stray)
    assert [one.path for one in tree.look(tree.read_tree(sharded.parent)) if "interrupted" in one.message] == [stray]
    (sharded / JSON_NAME).unlink()
    assert any("without golden.json" in one.message for one in tree.look(tree.read_tree(sharded.parent)))
