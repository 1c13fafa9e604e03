"""A conversion keeps every bit, holds one layer, and leaves nothing where it fails."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from harness.conversion import converting, cutting, directories, megatron
from harness.conversion.converting import ToTransformers, to_megatron, to_transformers
from harness.conversion.pretrained import Stored
from harness.errors import ModelError, UsageError
from tests.conversion.tiny import SIZES, config, edited, layer_files, weights, write_config, write_megatron
from tests.conversion.tiny import write_pretrained as write_source

NORM = "input_layernorm.weight"


def silent(_text):
    """A progress that nobody sees."""


def transformed(source, out, **options):
    """The report of a conversion to transformers."""
    return to_transformers(source, out, ToTransformers(**options), progress=silent)


def cut(source, out, ranks=2, multiple=1):
    """The report of a conversion to Megatron-DeepSpeed."""
    return to_megatron(source, out, ranks=ranks, multiple=multiple, progress=silent)


def tensors_in(directory):
    """All tensors of a transformers directory by name."""
    return {name: one for path in directory.glob("*.safetensors") for name, one in load_file(path).items()}


def assert_same(found, wanted):
    """The same names, and the same bits under each."""
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not cutting.same_bits(found[name], wanted[name])]
    assert not different


def prefixed(tensors):
    """The names of BloomForCausalLM."""
    return {"transformer." + name: tensor for name, tensor in tensors.items()}


# --- every bit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", ["bloom-tiny", "bloom-raw"])
def test_a_round_trip_keeps_every_bit(tmp_path, name, ranks):
    """To layer files and back: the tensors, the config's values and the tokenizer are those of before."""
    source = ROOT / "golden" / name / "model"
    there = to_megatron(source, tmp_path / "there", ranks=ranks, multiple=128, progress=silent)
    rows = {1: 1024, 2: 1024, 3: 1152}[ranks]
    assert there.notes[0] == f"padded: the embedding with zeros, from 1021 to {rows} rows"
    back = transformed(tmp_path / "there", tmp_path / "back", shard_bytes=700_000)
    assert f"dropped: {rows - 1021} of {rows} rows of the embedding, all zeros" in back.notes
    assert back.files == 5
    assert_same(tensors_in(tmp_path / "back"), tensors_in(source))
    configs = [json.loads((directory / "config.json").read_text()) for directory in (source, tmp_path / "back")]
    assert configs[0] == configs[1]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_layer_files_hold_the_slices_of_each_rank(tmp_path, ranks):
    """As written down without the converter: file names, keys, slices, rows of zeros; no file holds more."""
    tensors = weights()
    cut(write_source(tmp_path / "source", tensors), tmp_path / "out", ranks)
    wanted = layer_files(tensors, ranks)
    assert {path.name for path in (tmp_path / "out").glob("*.pt")} == set(wanted)
    for name, content in wanted.items():
        found = torch.load(tmp_path / "out" / name, weights_only=True)
        assert_same(found, content)
        assert all(one.untyped_storage().nbytes() == one.numel() * one.element_size() for one in found.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_slices_of_each_rank_become_whole(tmp_path, ranks, dtype):
    """Files that the converter did not write; any bits, so that no number is rounded or made tidy on the way."""
    tensors = weights(dtype, seed=ranks)
    report = transformed(write_megatron(tmp_path / "source", ranks, tensors), tmp_path / "out")
    assert_same(tensors_in(tmp_path / "out"), prefixed(tensors))
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert report.bytes == sum(one.numel() * one.element_size() for one in tensors.values())
    assert (report.tensors, report.ranks, report.files) == (len(tensors), ranks, 1)


# --- vocabulary, config, averages ----------------------------------------------------------------


def test_rows_are_dropped_only_when_the_vocabulary_is_told(tmp_path):
    """Otherwise all are kept, and that is said; what is dropped is told, the more where it is not zeros."""
    padding = torch.ones(3, SIZES.hidden).bfloat16()
    source = write_megatron(tmp_path / "source", 2, padding=padding, told=False)
    kept = transformed(source, tmp_path / "all", heads=6)
    assert len(tensors_in(tmp_path / "all")["transformer.word_embeddings.weight"]) == 20
    assert kept.notes[0] == "kept: all 20 rows of the embedding; --vocabulary N drops padding behind them"
    assert json.loads((tmp_path / "all/config.json").read_text())["vocab_size"] == 20
    told = transformed(source, tmp_path / "told", heads=6, vocabulary=17)
    assert_same(tensors_in(tmp_path / "told"), prefixed(weights()))
    assert told.notes[0] == "dropped: 3 of 20 rows of the embedding, NOT all zeros"
    with pytest.raises(ModelError, match="20 rows on all ranks for a vocabulary of 21"):
        transformed(source, tmp_path / "more", heads=6, vocabulary=21)


def test_a_vocabulary_that_is_told_is_written_to_the_config(tmp_path):
    """With a note that the given config said otherwise."""
    source = write_megatron(tmp_path / "source", 2)
    report = transformed(source, tmp_path / "out", vocabulary=18)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 18
    assert "config: vocab_size is 18, was 17" in report.notes


def test_a_config_is_given_as_file_or_directory(tmp_path):
    """A directory brings its tokenizer along; values that the tensors do not show are kept, the dtype is theirs."""
    source = write_megatron(tmp_path / "source", told=False)
    given = write_config(tmp_path / "given", dtype="float32", layer_norm_epsilon=1e-6)
    (given / "tokenizer.json").write_text("{}")
    for name, path, copied in (("a", given, True), ("b", given / "config.json", False)):
        report = transformed(source, tmp_path / name, config=path)
        assert json.loads((tmp_path / name / "config.json").read_text()) == config(layer_norm_epsilon=1e-6)
        assert "config: dtype is bfloat16 as the tensors are, was float32" in report.notes
        assert (tmp_path / name / "tokenizer.json").exists() == copied
    with pytest.raises(UsageError, match="Leave out --heads"):
        transformed(source, tmp_path / "c", config=given, heads=6)
    with pytest.raises(UsageError, match=r"there is no .*nowhere"):
        transformed(source, tmp_path / "c", config=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="--heads N"):
        transformed(source, tmp_path / "c")


def test_differing_replicas_are_averaged_when_asked_to(tmp_path):
    """In float32, and only those that differ; the others keep bits that no mean would."""
    tensors = weights()
    tensors["h.0.input_layernorm.weight"] = torch.linspace(1, 2, SIZES.hidden).bfloat16()
    source = write_megatron(tmp_path / "source", 3, tensors)
    edited(source / megatron.file_name(3, 2), lambda content: content[NORM].mul_(1.5))
    with pytest.raises(ModelError, match="--average-replicated"):
        transformed(source, tmp_path / "out")
    report = transformed(source, tmp_path / "out", average=True)
    first = tensors["h.0.input_layernorm.weight"]
    parts = [first.float(), first.float(), (first * 1.5).float()]
    tensors["h.0.input_layernorm.weight"] = (torch.stack(parts).sum(0) / 3).bfloat16()
    assert_same(tensors_in(tmp_path / "out"), prefixed(tensors))
    assert report.notes[1].startswith("averaged over 3 ranks in float32: what was not alike on them, 1 of the")
    assert report.notes[1].endswith(f"{NORM} in layer 3 (1)")


def test_heads_that_ranks_cannot_share_are_refused(tmp_path):
    """Before anything is written."""
    source = write_source(tmp_path / "source")
    with pytest.raises(UsageError, match="6 heads cannot be shared by 4 ranks"):
        cut(source, tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()


# --- one layer, and nothing half -----------------------------------------------------------------


def test_one_layer_is_held_at_a_time(tmp_path, monkeypatch):
    """When a layer is read no tensor of another one is alive any more, in either direction."""
    alive, seen = {}, []

    def noted(layer, tensors):
        others = {name for name, (of, tensor) in alive.items() if of != layer and tensor() is not None}
        assert not others, (layer, others)
        seen.append(layer)
        alive.update({(layer, name, len(seen)): (layer, weakref.ref(one)) for name, one in tensors.items()})

    def read_layer(path, plain=megatron.read):
        tensors = plain(path)
        noted(path.name.partition("-")[0], tensors)
        return tensors

    def read_tensor(stored, plain=Stored.read):
        tensor = plain(stored)
        noted(stored.name.split(".")[2] if ".h." in stored.name else stored.name[:16], {stored.name: tensor})
        return tensor

    monkeypatch.setattr(megatron, "read", read_layer)
    monkeypatch.setattr(Stored, "read", read_tensor)
    cut(write_source(tmp_path / "source"), tmp_path / "there")
    assert len(seen) == len(weights())
    transformed(tmp_path / "there", tmp_path / "back")
    assert len(set(seen)) > 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [2, 5, 7])
def test_an_interrupt_leaves_nothing(tmp_path, error, at):
    """At whichever layer, in either direction; a second try succeeds."""
    pretrained, layers = write_source(tmp_path / "pretrained"), write_megatron(tmp_path / "layers")
    before = sorted(path.name for path in tmp_path.iterdir())

    def interrupted():
        said = []

        def progress(text):
            said.append(text)
            if len(said) == at:
                raise error

        return progress

    out = tmp_path / "out"
    with pytest.raises(error):
        to_transformers(layers, out, ToTransformers(), progress=interrupted())
    if at <= 4:  # as many layers
        with pytest.raises(error):
            to_megatron(pretrained, out, ranks=2, multiple=1, progress=interrupted())
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    transformed(layers, out)
    assert_same(tensors_in(out), prefixed(weights()))


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
    """Between the survey and the conversion a tensor goes, or becomes another."""
    source = write_megatron(tmp_path / "source")
    plain = directories.appearing
    for change in (lambda content: content.pop(NORM), lambda content: content.update({NORM: torch.ones(24)})):

        def changing(out, change=change):
            edited(source / megatron.file_name(4, 1), change)
            edited(source / megatron.file_name(4, 0), change)
            return plain(out)

        monkeypatch.setattr(directories, "appearing", changing)
        with pytest.raises(ModelError, match="changed while it was read"):
            transformed(source, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        write_megatron(source)


def test_what_is_there_is_never_overwritten(tmp_path):
    """Told at once, before the source is looked at."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("1")
    with pytest.raises(UsageError, match="is there already"):
        transformed(tmp_path / "nowhere", out)
    with pytest.raises(UsageError, match="is there already"):
        cut(tmp_path / "nowhere", out)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_table_unlike_transformers_writes_nothing(tmp_path, monkeypatch):
    """What is planned is held against the model that transformers builds."""
    source = write_megatron(tmp_path / "source")
    monkeypatch.setattr(converting.names, "PREFIX", "model.")
    with pytest.raises(ModelError, match="unlike transformers"):
        transformed(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
