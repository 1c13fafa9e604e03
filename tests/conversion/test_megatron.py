"""Layer files are found, and read without executing anything."""

import argparse
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from harness.conversion import megatron
from harness.conversion.problems import Problems
from harness.errors import ModelError


class Bomb:
    """Makes the directory `marker` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("marker",)


def test_files_are_found_by_layer_and_rank(tmp_path):
    """Whatever lies beside them; numbers beyond 99 have three digits."""
    for name in ("layer_01-model_00-model_states.pt", "layer_103-model_12-model_states.pt", "latest", "config.json",
                 "mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):  # fmt: skip
        (tmp_path / name).touch()
    problems = Problems()
    found = megatron.find(tmp_path, problems)
    assert not problems
    assert {number: {rank: path.name for rank, path in paths.items()} for number, paths in found.items()} == {
        1: {0: "layer_01-model_00-model_states.pt"},
        103: {12: "layer_103-model_12-model_states.pt"},
    }
    assert megatron.file_name(1, 0) == "layer_01-model_00-model_states.pt"
    assert megatron.file_name(103, 12) == "layer_103-model_12-model_states.pt"


def test_names_that_are_odd_or_double_are_problems(tmp_path):
    """A copy by hand, and one layer under two spellings."""
    for name in (
        "layer_01-model_00-model_states.pt",
        "layer_001-model_00-model_states.pt",
        "layer_01-model_00.pt.part",
    ):
        (tmp_path / name).touch()
    problems = Problems()
    megatron.find(tmp_path, problems)
    assert problems.lines == [
        "duplicated: layer_01-model_00-model_states.pt and layer_001-model_00-model_states.pt",
        "unexpected: the file layer_01-model_00.pt.part",
    ]


@pytest.mark.parametrize("wrap", [dict, OrderedDict])
def test_what_was_written_is_read(tmp_path, wrap):
    """Also what a module's own state_dict looks like: parameters that want a gradient."""
    tensors = {"a": torch.arange(6).half().reshape(2, 3), "b": torch.ones(3)}
    megatron.write(tmp_path / "ours", tensors)
    torch.save(wrap((name, torch.nn.Parameter(tensor)) for name, tensor in tensors.items()), tmp_path / "theirs")
    for name in ("ours", "theirs"):
        found = megatron.read(tmp_path / name)
        assert list(found) == ["a", "b"]
        assert all(torch.equal(found[key], tensors[key]) and not found[key].requires_grad for key in found)


def _garbage(path):
    path.write_bytes(b"no zip at all")


def _cut(path):
    torch.save({"a": torch.ones(100)}, path)
    os.truncate(path, 500)


def _saved(content):
    return lambda path: torch.save(content, path)


HOSTILE = {
    "a bomb": (_saved({"a": torch.ones(2), "b": Bomb()}), "posix.mkdir"),
    "a bomb alone": (_saved(Bomb()), "posix.mkdir"),
    "arguments": (_saved({"args": argparse.Namespace(lr=1.0)}), "argparse.Namespace"),
    "a dict in a dict": (_saved({"module": {"a": torch.ones(2)}}), "a dict as 'module'"),
    "a number": (_saved({"iteration": 3}), "a int as 'iteration'"),
    "a list": (_saved([torch.ones(2)]), "a list, no dict"),
    "a key that is no text": (_saved({1: torch.ones(2)}), "as 1"),
    "sparse": (_saved({"a": torch.eye(3).to_sparse()}), "a Tensor as 'a'"),
    "larger than the file": (_saved({"a": torch.ones(1).expand(10**6, 10**6)}), "larger than the file"),
    "garbage": (_garbage, "damaged"),
    "empty": (Path.touch, "damaged"),
    "truncated": (_cut, "damaged"),
    "of old": (lambda path: torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False), "damaged"),
}


@pytest.mark.filterwarnings("ignore")  # of torch, of the switch and of sparse tensors
@pytest.mark.parametrize(("write", "words"), HOSTILE.values(), ids=HOSTILE)
def test_anything_but_tensors_is_one_line(tmp_path, monkeypatch, write, words):
    """And nothing in it is executed, nor with the switch that lets torch execute it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    write(Path("x.pt"))
    with pytest.raises(ModelError) as error:
        megatron.read(Path("x.pt"))
    assert len(str(error.value).splitlines()) == 1
    assert "x.pt" in str(error.value)
    assert words in str(error.value)
    assert not Path("marker").exists()


def test_a_directory_of_checkpoints_tells_them(tmp_path):
    """DeepSpeed saves each step into a directory of its own."""
    for name in ("global_step2", "global_step1", "logs"):
        (tmp_path / name).mkdir()
    for name in ("global_step2", "global_step1"):
        (tmp_path / name / megatron.file_name(1, 0)).touch()
    assert not megatron.looks_like_one(tmp_path)
    assert [path.name for path in megatron.inner_directories(tmp_path)] == ["global_step1", "global_step2"]
