"""The command `harness convert`: what it says, and what it refuses."""

import shutil

import pytest

from harness.conversion.megatron import file_name
from tests.commands import listing, refused, runner
from tests.conversion.tiny import edited, write_megatron, write_pretrained


@pytest.fixture
def harness(monkeypatch, capsys, tmp_path):
    """Run the command in a directory with a checkpoint of each kind, `layers` and `pretrained`."""
    monkeypatch.chdir(tmp_path)
    write_megatron(tmp_path / "steps/layers")
    shutil.copytree("steps/layers", "layers")
    write_pretrained(tmp_path / "pretrained")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    return runner(monkeypatch, capsys)


def test_both_directions_end_in_a_summary(harness, tmp_path):
    """What was written, from or for how many ranks, what was padded, dropped and copied."""
    there = harness("convert", "pretrained", "there", "--tensor-parallel", "3", "--divisible-by", "4")
    assert (there.code, there.err) == (0, "")
    lines = there.out.splitlines()
    assert lines[0].startswith("wrote there: 29 tensors, ")
    assert lines[0].endswith(" bytes of bfloat16 in 12 files, for 3 ranks")
    assert lines[1:] == [
        "  padded: the embedding with zeros, from 17 to 24 rows",
        "  copied: config.json, tokenizer.json",
    ]
    back = harness("convert", "there", "back", "--shard-size", "10KB")
    assert (back.code, back.err) == (0, "")
    assert back.out.splitlines()[0].startswith("wrote back: 29 tensors, ")
    assert "  dropped: 7 of 24 rows of the embedding, all zeros" in back.out
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    one = harness("convert", "pretrained", "one")
    assert "in 4 files, for 1 rank\n  padded: the embedding with zeros, from 17 to 128 rows" in one.out


MISTAKES = {
    "no source": (("nowhere", "out"), ("there is no checkpoint directory nowhere",)),
    "an empty source": (("empty", "out"), ("empty holds neither", "never loaded")),
    "a directory of steps": (("steps", "out"), ("steps holds neither", "Give steps/layers")),
    "a target with something in it": (("layers", "full"), ("full is there already",)),
    "a target nowhere": (("layers", "no/out"), ("Make it first",)),
    "ranks for transformers": (("layers", "out", "--tensor-parallel", "2"), ("--tensor-parallel says nothing",)),
    "heads for Megatron": (("pretrained", "out", "--heads", "6"), ("--heads says nothing",)),
    "averages for Megatron": (("pretrained", "out", "--average-replicated"), ("--average-replicated says nothing",)),
    "no size": (("layers", "out", "--shard-size", "many"), ("'many' is no size", "500MB")),
    "size zero": (("layers", "out", "--shard-size", "0GB"), ("'0GB' is no size",)),
    "ranks that do not divide": (("pretrained", "out", "--tensor-parallel", "4"), ("6 heads", "4 ranks")),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(harness, arguments, words):
    """Exit code 2, and everything as it was."""
    before = listing()
    refused(harness("convert", *arguments), *words)
    assert listing() == before


def test_a_broken_checkpoint_is_listed_and_summed_up(harness):
    """Each problem in a line of its own, and the last line counts them; nothing is written."""
    for rank in (0, 1):
        edited(
            "layers/" + file_name(4, rank),
            lambda content: [content.pop(name) for name in list(content) if "mlp" in name],
        )
    before = listing()
    ended = harness("convert", "layers", "out")
    assert (ended.code, ended.out) == (2, "")
    lines = ended.err.splitlines()
    assert lines[0] == "missing: mlp.dense_h_to_4h.weight in layer 4 (ranks 0, 1)"
    assert len(lines) == 5
    assert lines[-1].startswith("error: layers: 4 missing: ")
    assert listing() == before


def test_layer_files_and_safetensors_together_are_refused(harness):
    """It would be a guess which of them is meant."""
    shutil.copy("pretrained/model-1.safetensors", "layers")
    refused(harness("convert", "layers", "out"), "layers holds layer files and safetensors")


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("2GiB", 2 * 2**30), ("500 mb", 5 * 10**8), ("700", 700), ("1KiB", 1024), ("3B", 3)],
)
def test_sizes_are_read(text, size):
    """In powers of 1000, with an i of 1024."""
    from harness.cli.convert import _bytes

    assert _bytes(text) == size
