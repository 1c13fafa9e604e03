"""Shards hold what was planned, as safetensors and transformers read it."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from harness.conversion.shards import DTYPES, Planned, Writer, plan

PLANS = st.lists(
    st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.sampled_from(sorted(DTYPES))),
    min_size=1,
    max_size=8,
)


def planned(shapes):
    """Plans with names of their own."""
    return [Planned(name=f"t{i}", shape=tuple(shape), dtype=dtype) for i, (shape, dtype) in enumerate(shapes)]


def filled(one):
    """A tensor of any bits for a plan."""
    bits = torch.arange(one.bytes, dtype=torch.uint8) * 37 + len(one.shape)
    return bits.view(getattr(torch, one.dtype)).reshape(one.shape)


@given(PLANS, st.integers(1, 300))
@settings(deadline=None)
def test_files_are_within_the_limit(shapes, limit):
    """Each tensor once and in order; a file over the limit holds one tensor, and no file could take the next one."""
    tensors = planned(shapes)
    shards = plan(tensors, limit)
    assert [one for shard in shards for one in shard.tensors] == tensors
    sizes = [sum(one.bytes for one in shard.tensors) for shard in shards]
    assert all(size <= limit or len(shard.tensors) == 1 for size, shard in zip(sizes, shards, strict=True))
    assert all(size + after.tensors[0].bytes > limit for size, after in zip(sizes[:-1], shards[1:], strict=True))


@given(PLANS, st.integers(1, 300))
@settings(deadline=None, max_examples=40)
def test_safetensors_reads_what_was_written(shapes, limit):
    """Every bit, from the files that the index names; header aligned, with the word that transformers asks for."""
    tensors = planned(shapes)
    shards = plan(tensors, limit)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with Writer(directory, shards) as writer:
            for one in tensors:
                writer.write(one.name, filled(one))
        for shard in shards:
            path = directory / shard.file
            found = load_file(path)
            assert set(found) == {one.name for one in shard.tensors}
            for one in shard.tensors:
                assert found[one.name].dtype == getattr(torch, one.dtype)
                assert torch.equal(found[one.name].view(torch.uint8), filled(one).view(torch.uint8))
            with safe_open(path, framework="pt") as opened:
                assert opened.metadata() == {"format": "pt"}
            assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
        index = directory / "model.safetensors.index.json"
        assert index.exists() == (len(shards) > 1)
        if index.exists():
            document = json.loads(index.read_text())
            assert document["weight_map"] == {one.name: shard.file for shard in shards for one in shard.tensors}
            assert document["metadata"]["total_size"] == sum(one.bytes for one in tensors)


def test_names_of_files_are_those_of_transformers():
    """One file has no number."""
    tensors = planned([((4,), "float32")] * 3)
    assert [shard.file for shard in plan(tensors, 48)] == ["model.safetensors"]
    assert [shard.file for shard in plan(tensors, 47)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


@pytest.mark.parametrize(
    ("name", "tensor"), [("t1", torch.ones(4)), ("t0", torch.ones(2, 2)), ("t0", torch.ones(4).double())]
)
def test_another_tensor_than_planned_is_refused(tmp_path, name, tensor):
    """By name, shape or dtype: its bytes would be read as something else."""
    with pytest.raises(ValueError, match="planned"), Writer(tmp_path, plan(planned([((4,), "float32")]), 99)) as writer:
        writer.write(name, tensor)


def test_a_transposed_tensor_is_written_as_it_is_read(tmp_path):
    """Row by row, whatever its strides."""
    tensor = torch.arange(6.0).reshape(2, 3).T
    with Writer(tmp_path, plan([Planned(name="a", shape=(3, 2), dtype="float32")], 99)) as writer:
        writer.write("a", tensor)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensor)
