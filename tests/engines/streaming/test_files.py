"""A checkpoint that is damaged or not whole is refused by its headers alone, each in its own words."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from harness import checkpoint
from harness.engines.streaming import files
from harness.errors import ModelError


@pytest.fixture
def sharded(tmp_path):
    """Two shards and their index."""
    save_file({"a": torch.ones(3, 2), "b": torch.zeros(5)}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "model-2.safetensors")
    places = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    (tmp_path / files.INDEX).write_text(json.dumps({"weight_map": places}))
    return tmp_path


def test_the_places_are_those_of_the_tensors(sharded):
    """Read at its place, every tensor has its bytes; the signature is that of the whole checkpoint."""
    places = files.survey(sharded)
    raw = places["a"].file.read_bytes()[places["a"].start :][: places["a"].bytes]
    assert torch.frombuffer(bytearray(raw), dtype=torch.float32).tolist() == [1.0] * 6
    assert files.signature(places) == checkpoint.identify(sharded).signature
    assert files.native_dtype(places) == "float32"


def truncated(path):
    """Cut the end of a shard off."""
    (path / "model-2.safetensors").write_bytes((path / "model-2.safetensors").read_bytes()[:-3])


def lengthened(path):
    """Append to a shard."""
    with (path / "model-1.safetensors").open("ab") as opened:
        opened.write(b"more")


def without_a_shard(path):
    """Take a shard away."""
    (path / "model-2.safetensors").unlink()


def with_a_wrong_index(path):
    """Let the index place a tensor elsewhere."""
    document = json.loads((path / files.INDEX).read_text())
    document["weight_map"]["c"] = "model-1.safetensors"
    (path / files.INDEX).write_text(json.dumps(document))


def with_a_deep_index(path):
    """Write an index that nests deeper than Python recurses."""
    (path / "model.safetensors.index.json").write_text('{"weight_map": ' + "[" * 200_000 + "]" * 200_000 + "}")


def with_an_index_of_nothing(path):
    """Write an index that is none."""
    (path / files.INDEX).write_text("[]")


def repeating(path):
    """Hold a tensor twice."""
    save_file({"a": torch.ones(1)}, path / "model-3.safetensors")


def with_a_huge_header(path):
    """Announce a header longer than the file."""
    (path / "model-1.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


def with_places_that_lie(path):
    """Announce another shape."""
    raw = (path / "model-1.safetensors").read_bytes()
    (path / "model-1.safetensors").write_bytes(raw.replace(b"[3,2]", b"[9,2]"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "truncated"),
        (lengthened, "longer than its header says"),
        (without_a_shard, "1 of 2 shards .* are not there, e.g. model-2"),
        (with_a_wrong_index, "does not hold it"),
        (with_an_index_of_nothing, "is not an index"),
        (with_a_deep_index, "is not an index"),
        (repeating, "repeats the tensor a"),
        (with_a_huge_header, "truncated"),
        (with_places_that_lie, "cannot be read"),
    ],
)
def test_damage_is_named(sharded, damage, words):
    """Each kind of damage is a model error that says which, before a tensor is read."""
    damage(sharded)
    with pytest.raises(ModelError, match=words):
        files.survey(sharded)
