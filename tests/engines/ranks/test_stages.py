"""Which tensors of a checkpoint a stage takes, under which names, and from which files alone."""

from __future__ import annotations

import json
import pickle
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from harness.engines.ranks.layout import Layout, stage_layers
from harness.engines.ranks.stages import (
    anatomy_of,
    checkpoint_keys,
    missing_of,
    renumbered,
    stage_config,
    stage_tensors,
)
from harness.errors import ModelError, UsageError

_BLOCKS = 5
_NAMES = {
    "gpt2": ("transformer", "wte.weight wpe.weight", "h", "ln_f.weight ln_f.bias"),
    "bloom": (
        "transformer",
        "word_embeddings.weight word_embeddings_layernorm.weight word_embeddings_layernorm.bias",
        "h",
        "ln_f.weight ln_f.bias",
    ),
    "llama": ("model", "embed_tokens.weight", "layers", "norm.weight"),
}


def config(kind, *, tied=False):
    """As much of a config as the stages read."""
    return SimpleNamespace(model_type=kind, tie_word_embeddings=tied, num_hidden_layers=_BLOCKS)


def names(kind, *, prefixed=True, head=True):
    """The tensors of a checkpoint: (before the blocks, those of each block, behind them)."""
    prefix, before, blocks, after = _NAMES[kind]
    base = f"{prefix}." if prefixed else ""
    return (
        [base + name for name in before.split()],
        [[f"{base}{blocks}.{block}.{part}" for part in ("mlp.weight", "norm.weight")] for block in range(_BLOCKS)],
        [base + name for name in after.split()] + (["lm_head.weight"] if head else []),
    )


def write(directory, tensors, files=1):
    """A checkpoint of one or of several files with an index; every tensor is one number, its place in ``tensors``."""
    directory.mkdir(exist_ok=True)
    values = {name: torch.tensor([float(index)]) for index, name in enumerate(tensors)}
    if files == 1:
        save_file(values, directory / "model.safetensors")
        return values
    parts = [f"model-{number + 1:05}-of-{files:05}.safetensors" for number in range(files)]
    where = {name: parts[index % files] for index, name in enumerate(values)}
    for part in parts:
        save_file({name: values[name] for name in values if where[name] == part}, directory / part)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    return values


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("kind", sorted(_NAMES))
def test_every_tensor_is_of_one_stage(tmp_path, kind, prefixed, files):
    """Each stage gets its own blocks, counted from 0, the first what embeds, the last what is behind; none is lost."""
    before, blocks, after = names(kind, prefixed=prefixed)
    values = write(tmp_path / "model", [*before, *chain.from_iterable(blocks), *after], files)
    layout = Layout(stages=3)
    for stage, layers in enumerate(stage_layers(_BLOCKS, 3)):
        own = stage_tensors(tmp_path / "model", config(kind), layers, layout.place(stage))
        expected = dict(
            zip(
                chain.from_iterable(blocks[: len(layers)]),
                chain.from_iterable(blocks[layers.start : layers.stop]),
                strict=True,
            )
        )
        expected |= {name: name for name in [*(before if stage == 0 else []), *(after if stage == 2 else [])]}
        assert {name: value.item() for name, value in own.items()} == {
            name: values[named].item() for name, named in expected.items()
        }


@pytest.mark.parametrize("kind", sorted(_NAMES))
def test_the_last_stage_takes_the_embedding_where_the_head_is_tied_to_it(tmp_path, kind):
    """A tied head has no tensor of its own: the token embedding goes to both ends, and nothing beside it."""
    before, blocks, after = names(kind, head=False)
    write(tmp_path / "model", [*before, *chain.from_iterable(blocks), *after])
    place, layers = Layout(stages=2).place(1), range(3, _BLOCKS)
    tied = stage_tensors(tmp_path / "model", config(kind, tied=True), layers, place)
    untied = stage_tensors(tmp_path / "model", config(kind, tied=False), layers, place)
    assert set(tied) - set(untied) == {before[0]}
    middle = Layout(stages=3).place(1)
    assert set(stage_tensors(tmp_path / "model", config(kind, tied=True), range(1, 2), middle)) == set(blocks[0])


@given(block=st.integers(0, 500), shift=st.integers(-500, 500), prefix=st.sampled_from(["", "model.", "a.b."]))
def test_a_block_is_counted_anew_and_back(block, shift, prefix):
    """Only the number of the block moves, however often a number stands in the name, and it moves back."""
    name = f"{prefix}layers.{block}.mlp.experts.7.layers.3.weight"
    moved = renumbered(name, config("llama"), shift)
    assert moved == f"{prefix}layers.{block + shift}.mlp.experts.7.layers.3.weight"
    if block + shift >= 0:
        assert renumbered(moved, config("llama"), -shift) == name


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.sublayers.3.weight", "layers.x.weight"])
def test_what_is_no_block_keeps_its_name(name):
    """A name in which the word for blocks is only a part of another one is left as it is."""
    assert renumbered(name, config("llama"), 4) == name


def test_an_unknown_architecture_is_refused_with_what_is_known():
    """The parts of a model are not guessed."""
    with pytest.raises(UsageError, match="'mamba' cannot be cut into stages"):
        anatomy_of(config("mamba"))


def test_the_config_of_a_stage_is_of_its_blocks():
    """Entries with one value a block are cut with them, and the whole model's config is left as it is."""
    whole = SimpleNamespace(num_hidden_layers=4, layer_types=["a", "b", "c", "d"], mlp_layer_types=None, hidden_size=8)
    short = stage_config(whole, range(1, 3))
    assert (short.num_hidden_layers, short.layer_types, short.hidden_size) == (2, ["b", "c"], 8)
    assert (whole.num_hidden_layers, whole.layer_types) == (4, ["a", "b", "c", "d"])


def test_what_a_stage_does_not_hold_is_not_missing():
    """Names below a part that is gone are no loss; others are, also where nothing is gone."""
    assert missing_of(["model.norm.weight", "model.layers.0.w"], frozenset({"model.norm."})) == ["model.layers.0.w"]
    assert missing_of(["b", "a"], frozenset()) == ["a", "b"]


# --- what others have written ----------------------------------------------------------------------


class _Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (Path(self.file),)


def _index(directory, content):
    directory.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "../../etc/passwd", "a/../../outside.safetensors"]
)
def test_an_index_does_not_lead_out_of_the_directory(tmp_path, name):
    """A path in an index is another's word: only the directory's own files are opened."""
    save_file({"layers.0.weight": torch.tensor([1.0])}, tmp_path / "outside.safetensors")
    _index(tmp_path / "model", {"weight_map": {"layers.0.weight": name}})
    assert {file.parent for file in checkpoint_keys(tmp_path / "model").values()} == {tmp_path / "model"}
    with pytest.raises(ModelError):
        stage_tensors(tmp_path / "model", config("llama"), range(1), Layout(stages=2).place(0))


def test_a_pickle_is_never_read(tmp_path):
    """Weights in torch's pickled format are refused, also where an index names them as if they were safe."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(tmp_path / "exploded")))
    with pytest.raises(ModelError, match=r"holds no \.safetensors file"):
        checkpoint_keys(model)
    _index(model, {"weight_map": {"layers.0.weight": "pytorch_model.bin"}})
    with pytest.raises(ModelError):
        stage_tensors(model, config("llama"), range(1), Layout(stages=2).place(0))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", {}, {"weight_map": None}, {"weight_map": [1]}, {"weight_map": {"a": 3}}]
)
def test_an_index_that_is_none_is_refused(tmp_path, content):
    """A damaged index is an error in one line, and no traceback."""
    _index(tmp_path / "model", content)
    with pytest.raises(ModelError, match="cannot be read"):
        checkpoint_keys(tmp_path / "model")


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    """A truncated or a foreign file of that name is an error in one line."""
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        checkpoint_keys(tmp_path)
