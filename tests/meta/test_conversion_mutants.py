"""Bugs of weight conversion, put into the converter: it writes a model without an error, and a check finds it.

The bugs are those of conversion and of tensor parallelism in the catalogue (harness/mutations), as far as a converter
can have them. Each replaces a function or a row of the table of harness/conversion; a whole checkpoint is converted.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import harness
from conftest import ROOT
from harness.conversion import configs, converting, cutting, names
from harness.conversion.converting import ToTransformers, to_megatron, to_transformers
from harness.conversion.names import Cut
from harness.engines.hf import HFEngine, Options
from harness.values import Golden, Status

MODEL = ROOT / "golden/bloom-tiny/model"
RANKS = 3
HEADS, SIZE = 6, 24
QKV = "self_attention.query_key_value"


def silent(_text):
    """A progress that nobody sees."""


@pytest.fixture(scope="module")
def golden() -> Golden:
    """The smallest golden of the model: one prompt."""
    return harness.load_golden(ROOT / "golden/bloom-tiny/headline")


@pytest.fixture(scope="module")
def layers(tmp_path_factory) -> Path:
    """A right Megatron-DeepSpeed checkpoint of the model."""
    out = tmp_path_factory.mktemp("layers") / "of-3"
    to_megatron(MODEL, out, ranks=RANKS, multiple=128, progress=silent)
    return out


def verdict(golden, directory):
    """How the function of a converted model is judged, by a pass over whole sequences, without the decode loop."""
    engine = HFEngine(Options(model=str(directory), dtype="float32"), text="converted")
    engine.capabilities = frozenset({"logits"})
    return harness.check(golden, engine, quick=True)


# --- what a bug replaces -------------------------------------------------------------------------


def whole(change, *tensors):
    """A reader that makes something else of these tensors: ``change(parts, right)``."""

    def patch(monkeypatch):
        plain = converting._whole

        def wrong(found, layer, entry, held):
            right = plain(found, layer, entry, held)
            if entry.megatron not in tensors:
                return right
            made = change([one[entry.megatron] for one in held], right)
            assert made.shape == right.shape
            assert made.dtype == right.dtype
            return made

        monkeypatch.setattr(converting, "_whole", wrong)

    return patch


def block_table(**replaced):
    """A table in which names of transformers are those of other keys."""

    def patch(monkeypatch):
        entries = {entry.megatron: entry for entry in names.BLOCK}
        monkeypatch.setattr(
            names,
            "BLOCK",
            tuple(
                dataclasses.replace(entry, megatron=replaced.get(entry.megatron, entry.megatron))
                for entry in entries.values()
            ),
        )

    return patch


def swapped(first, second):
    """Two keys of a block exchanged."""
    return block_table(**{first: second, second: first})


def blocks_from(order):
    """A reader in which block i is filled from the files of block ``order[i]``."""

    def patch(monkeypatch):
        plain = converting._write_joined

        def wrong(writer, found, layer):
            if layer.block is None:
                return plain(writer, found, layer)
            source = names._FIRST_BLOCK + order[layer.block]
            files = {**found.files, layer.number: found.files[source]}
            return plain(writer, dataclasses.replace(found, files=files), layer)

        monkeypatch.setattr(converting, "_write_joined", wrong)

    return patch


def in_config(**values):
    """A config that says something else."""

    def patch(monkeypatch):
        plain = configs.adapted
        monkeypatch.setattr(configs, "adapted", lambda *given, **more: {**plain(*given, **more), **values})

    return patch


def ends_swapped(monkeypatch):
    """The norms behind the embedding and before the head exchanged."""
    norms = [entry.transformers for entry in names.EMBEDDING[1:]], [entry.transformers for entry in names.FINAL]
    for table, others in (("EMBEDDING", norms[1]), ("FINAL", norms[0])):
        kept = getattr(names, table)[: -len(others)]
        changed = getattr(names, table)[-len(others) :]
        new = tuple(dataclasses.replace(one, transformers=name) for one, name in zip(changed, others, strict=True))
        monkeypatch.setattr(names, table, kept + new)


def padded_before(monkeypatch):
    """A writer that pads the embedding at its head."""
    monkeypatch.setattr(cutting, "padded", lambda tensor, rows: torch.cat([tensor[-(rows - len(tensor)) :], tensor]))


def part_of(change):
    """A writer whose ranks hold something else: ``change(whole, cut, rank, ranks)``, None for what is right."""

    def patch(monkeypatch):
        plain = cutting.part_of

        def wrong(tensor, cut, rank, ranks):
            made = change(tensor, cut, rank, ranks)
            return plain(tensor, cut, rank, ranks) if made is None else made.clone()

        monkeypatch.setattr(cutting, "part_of", wrong)

    return patch


# --- the bugs ------------------------------------------------------------------------------------


def qkv_blocks(tensor, heads):
    """Rows by head to [q; k; v]."""
    return tensor.unflatten(0, (heads, 3, SIZE)).transpose(0, 1).flatten(0, 2)


def qkv_heads(tensor, heads):
    """Rows in [q; k; v] to rows by head."""
    return tensor.unflatten(0, (3, heads, SIZE)).transpose(0, 1).flatten(0, 2)


def qkv_cut_in_blocks(tensor, cut, rank, ranks):
    """A rank's share of q, of k and of v, as if the rows were [q; k; v]."""
    if cut is not Cut.COLUMN or len(tensor) != 3 * HEADS * SIZE:
        return None
    return torch.cat([block.chunk(ranks)[rank] for block in tensor.chunk(3)])


def stripped_on_each_rank(parts, right):
    """Padding taken from the end of every rank's rows."""
    rows = len(right) // len(parts) + 1
    return torch.cat([part[:rows] for part in parts])[: len(right)]


SQUARE, WIDE = "self_attention.dense.weight", "mlp.dense_4h_to_h.weight"
UP, UP_BIAS = "mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias"
EMBEDDING = "word_embeddings.weight"
BIASES = ("self_attention.dense.bias", "mlp.dense_4h_to_h.bias")
BOTH = (f"{QKV}.weight", f"{QKV}.bias")
NORMS = "input_layernorm", "post_attention_layernorm"

READING = {
    "qkv: joined in blocks": whole(lambda _parts, right: qkv_blocks(right, HEADS), *BOTH),
    "qkv: joined in blocks on each rank": whole(
        lambda parts, _right: torch.cat([qkv_blocks(part, HEADS // RANKS) for part in parts]), *BOTH
    ),
    "qkv: taken for blocks": whole(lambda _parts, right: qkv_heads(right, HEADS), *BOTH),
    "qkv: the bias alone": whole(lambda _parts, right: qkv_blocks(right, HEADS), f"{QKV}.bias"),
    "qkv: q and k exchanged": whole(
        lambda _parts, right: right.unflatten(0, (HEADS, 3, SIZE))[:, [1, 0, 2]].flatten(0, 2), *BOTH
    ),
    "cut: a square one along rows": whole(lambda parts, right: torch.cat(parts).reshape(right.shape), SQUARE),
    "cut: a wide one along rows": whole(lambda parts, right: torch.cat(parts).reshape(right.shape), WIDE),
    "cut: columns": whole(lambda parts, right: torch.cat(parts, dim=1).reshape(right.shape), UP),
    "ranks: columns in reverse": whole(lambda parts, _right: torch.cat(parts[::-1]), *BOTH, UP, UP_BIAS),
    "ranks: rows in reverse": whole(lambda parts, _right: torch.cat(parts[::-1], dim=1), SQUARE, WIDE),
    "ranks: one bias in reverse": whole(lambda parts, _right: torch.cat(parts[::-1]), UP_BIAS),
    "ranks: the vocabulary in reverse": whole(lambda parts, right: torch.cat(parts[::-1])[: len(right)], EMBEDDING),
    "ranks: the first for all": whole(lambda parts, _right: torch.cat([parts[0]] * RANKS, dim=1), SQUARE),
    "bias: summed over ranks": whole(lambda _parts, right: right * RANKS, *BIASES),
    "bias: divided by ranks": whole(lambda _parts, right: right / RANKS, *BIASES),
    "bias: dropped": whole(lambda _parts, right: torch.zeros_like(right), BIASES[0]),
    "norm: summed over ranks": whole(lambda _parts, right: right * RANKS, "input_layernorm.weight"),
    "norm: left at its start": whole(
        lambda _parts, right: torch.ones_like(right), "word_embeddings.norm.weight", "weight"
    ),
    "norm: weights exchanged": swapped(*(f"{norm}.weight" for norm in NORMS)),
    "norm: biases exchanged": swapped(*(f"{norm}.bias" for norm in NORMS)),
    "norm: weight and bias exchanged": swapped("input_layernorm.weight", "input_layernorm.bias"),
    "norm: of embedding and head exchanged": ends_swapped,
    "bias: of the row-parallel layers exchanged": swapped(*BIASES),
    "square: transposed": whole(lambda _parts, right: right.T, SQUARE),
    "square: reshaped instead of transposed": whole(lambda _parts, right: right.T.reshape(right.shape), UP),
    "layers: an offset of one": blocks_from([1, 2, 3, 4, 0]),
    "layers: the second stage loads the first": blocks_from([0, 1, 2, 0, 1]),
    "layers: in reverse": blocks_from([4, 3, 2, 1, 0]),
    "layers: the last is the one before": blocks_from([0, 1, 2, 3, 3]),
    "vocabulary: shifted by a row": whole(lambda _parts, right: right.roll(1, 0), EMBEDDING),
    "vocabulary: padding taken from each rank": whole(stripped_on_each_rank, EMBEDDING),
    "dtype: through bfloat16": whole(lambda _parts, right: right.bfloat16().half(), *BOTH, SQUARE, WIDE, UP, EMBEDDING),
    "dtype: through float8": whole(lambda _parts, right: right.to(torch.float8_e4m3fn).half(), UP),
    "dtype: through bfloat16, norms alone": whole(
        lambda _parts, right: right.bfloat16().half(), *(f"{norm}.weight" for norm in NORMS)
    ),
    "config: a head of its own": in_config(tie_word_embeddings=False),
    "config: half the heads": in_config(n_head=HEADS // 2),
    "config: another epsilon": in_config(layer_norm_epsilon=1e-6),
    "config: residual behind the norm": in_config(apply_residual_connection_post_layernorm=True),
}
WRITING = {
    "qkv: cut in blocks": part_of(qkv_cut_in_blocks),
    "ranks: in reverse": part_of(
        lambda tensor, cut, rank, ranks: None if cut.value is None else tensor.chunk(ranks, cut.value)[ranks - 1 - rank]
    ),
    "cut: every rank has the first part": part_of(
        lambda tensor, cut, _rank, ranks: tensor.chunk(ranks, 1)[0] if cut is Cut.ROW else None
    ),
    "vocabulary: padded before": padded_before,
}


@pytest.mark.parametrize("patch", READING.values(), ids=READING)
def test_a_bug_of_reading_is_found(golden, layers, tmp_path, monkeypatch, patch):
    """The converter writes a model without an error, and the check says that it is another one."""
    patch(monkeypatch)
    to_transformers(layers, tmp_path / "out", ToTransformers(), progress=silent)
    found = verdict(golden, tmp_path / "out")
    assert not found.ok, str(found)
    assert found.status in (Status.DEVIATES, Status.STRUCTURAL), str(found)


@pytest.mark.parametrize("patch", WRITING.values(), ids=WRITING)
def test_a_bug_of_writing_is_found(golden, tmp_path, monkeypatch, patch):
    """Read again by a converter without it, which finds nothing missing or mis-shaped."""
    with monkeypatch.context() as patched:
        patch(patched)
        to_megatron(MODEL, tmp_path / "layers", ranks=RANKS, multiple=128, progress=silent)
    to_transformers(tmp_path / "layers", tmp_path / "out", ToTransformers(), progress=silent)
    found = verdict(golden, tmp_path / "out")
    assert not found.ok, str(found)
    assert found.status is Status.DEVIATES, str(found)


def test_a_right_conversion_is_identical(golden, layers, tmp_path):
    """The same check of what the converter writes as it is, and the one that a user runs."""
    to_transformers(layers, tmp_path / "out", ToTransformers(), progress=silent)
    assert verdict(golden, tmp_path / "out").status is Status.IDENTICAL
    assert harness.check(golden, f"hf:model={tmp_path / 'out'},dtype=float32", quick=True).status is Status.IDENTICAL


def test_the_check_that_a_user_runs_finds_a_bug(golden, layers, tmp_path, monkeypatch):
    """One of them by its SPEC, decode loop and all."""
    READING["bias: summed over ranks"](monkeypatch)
    to_transformers(layers, tmp_path / "out", ToTransformers(), progress=silent)
    assert harness.check(golden, f"hf:model={tmp_path / 'out'}", quick=True).status is Status.DEVIATES
