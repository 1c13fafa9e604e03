"""Convert a whole checkpoint, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.conversion import companions, configs, cutting, directories, megatron, names, pretrained, shards
from harness.conversion.names import Entry, Layer, Sizes
from harness.conversion.pretrained import Contents
from harness.conversion.problems import Problems
from harness.conversion.shards import Planned, Writer
from harness.conversion.surveying import Survey, survey
from harness.errors import ModelError, UsageError
from harness.files import readable_json, replace_file

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[str], None]

#: Differing tensors that a report names.
_NAMED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was written, and what a reader should know of it."""

    tensors: int
    bytes: int
    dtype: str
    files: int
    ranks: int
    notes: tuple[str, ...]


# --- to transformers ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ToTransformers:
    """How to write safetensors.

    Args:
        config: a config.json, or a directory with one and a tokenizer; None for those beside the source, if any.
        heads: instead of a config: the number of attention heads, which no tensor shows.
        vocabulary: rows of the embedding to keep; None for those of the config, without one all.
        average: write the mean, in float32, of replicated tensors that differ between ranks.
        shard_bytes: largest file, but for a tensor that is larger.
    """

    config: Path | None = None
    heads: int | None = None
    vocabulary: int | None = None
    average: bool = False
    shard_bytes: int = 5 * 10**9


def to_transformers(source: Path, out: Path, options: ToTransformers, *, progress: Progress) -> Report:
    """Write the safetensors, config.json and tokenizer of a Megatron-DeepSpeed checkpoint.

    Raises:
        ModelError: where the checkpoint is not whole, or the config not that of its tensors.
        UsageError: where ``out`` is there already, or options contradict each other or leave something unknown.
    """
    directories.must_be_free(out)
    file = _config_file(source, options)
    given = None if file is None else configs.read(file)
    told = _told(given, file, options)
    found = survey(source, told, average=options.average, progress=progress)
    config = configs.adapted(
        given or configs.derived(found.sizes), vocabulary=found.sizes.vocabulary, dtype=found.dtype
    )
    planned = [
        Planned(name=layer.name(entry), shape=entry.shape_in(found.sizes), dtype=found.dtype)
        for layer in names.layers(found.sizes.layers)
        for entry in layer.entries
    ]
    problems = Problems()
    configs.hold_against_transformers(config, planned, problems)
    problems.raise_any(source, fix="Nothing was written; give the config.json of this model with --config")
    files = shards.plan(planned, options.shard_bytes)
    total = sum(one.bytes for one in planned)
    directories.must_be_free(out, total)
    with directories.appearing(out) as made:
        with Writer(made, files) as writer:
            for layer in names.layers(found.sizes.layers):
                progress(f"layer {layer.number} of {max(found.files)}")
                _write_joined(writer, found, layer)
        replace_file(made / configs.FILE, readable_json(config).encode())
        copied = companions.copy(source if file is None else file.parent, made) if _with_tokenizer(options) else ()
    notes = [*_rows(found, told), *_averaged(found), *_config_notes(given, file, found), *_copied(copied)]
    return Report(
        tensors=len(planned),
        bytes=total,
        dtype=found.dtype,
        files=len(files),
        ranks=found.ranks,
        notes=tuple(notes),
    )


def _config_file(source: Path, options: ToTransformers) -> Path | None:
    """The config that is to be used; None where heads are told instead, or there is none."""
    if options.config is not None:
        if options.heads is not None:
            raise UsageError("--config says how many heads there are", fix="Leave out --heads")
        path = options.config / configs.FILE if options.config.is_dir() else options.config
        if not path.is_file():
            raise UsageError(f"there is no {path}", fix="Give a config.json or a directory that holds one")
        return path
    beside = source / configs.FILE
    return beside if beside.is_file() and options.heads is None else None


def _with_tokenizer(options: ToTransformers) -> bool:
    """A single file that is given is no more than itself."""
    return options.config is None or options.config.is_dir()


def _told(given: dict[str, object] | None, file: Path | None, options: ToTransformers) -> Sizes:
    """What is known before the tensors are seen, 0 for unknown."""
    if given is None or file is None:
        return Sizes(hidden=0, layers=0, heads=options.heads or 0, vocabulary=options.vocabulary or 0)
    sizes = configs.sizes_in(given, file)
    return replace(sizes, vocabulary=options.vocabulary or sizes.vocabulary)


def _write_joined(writer: Writer, found: Survey, layer: Layer) -> None:
    """Write the tensors of one layer, its files mapped; on return nothing of it is in memory any more."""
    paths = found.files[layer.number]
    held = [megatron.read(paths[rank]) for rank in range(found.ranks)]
    for entry in layer.entries:
        writer.write(layer.name(entry), _whole(found, layer, entry, held))


def _whole(found: Survey, layer: Layer, entry: Entry, held: Sequence[dict[str, Tensor]]) -> Tensor:
    import torch

    parts = [tensors.get(entry.megatron) for tensors in held]
    shape = entry.shape_in(replace(found.sizes, vocabulary=found.rows), found.ranks)
    same = [part for part in parts if part is not None and tuple(part.shape) == shape]
    if len(same) < found.ranks or any(part.dtype != getattr(torch, found.dtype) for part in same):
        fix = "Convert a checkpoint that nobody writes to"
        raise ModelError(f"{entry.megatron} in layer {layer.number} changed while it was read", fix=fix)
    if (layer.number, entry.megatron) in found.differing:
        return cutting.mean(same)
    whole = cutting.join(same, entry.cut)
    return whole[: found.sizes.vocabulary] if entry == names.VOCABULARY else whole


def _rows(found: Survey, told: Sizes) -> list[str]:
    """What became of the embedding's rows; nothing where they are what was told."""
    if not told.vocabulary:
        return [f"kept: all {found.rows} rows of the embedding; --vocabulary N drops padding behind them"]
    dropped = found.rows - told.vocabulary
    what = "all zeros" if found.zeros else "NOT all zeros"
    return [f"dropped: {dropped} of {found.rows} rows of the embedding, {what}"] if dropped else []


def _averaged(found: Survey) -> list[str]:
    if not found.differing:
        return []
    furthest = sorted(found.differing.items(), key=lambda one: -one[1])
    told = ", ".join(f"{key} in layer {number} ({apart:.3g})" for (number, key), apart in furthest[:_NAMED])
    return [
        f"averaged over {found.ranks} ranks in float32: what was not alike on them, {len(furthest)} of the replicated "
        f"tensors, furthest apart {told}"
    ]


def _config_notes(given: dict[str, object] | None, file: Path | None, found: Survey) -> list[str]:
    if given is None:
        return [
            "config: derived from the tensors; layer_norm_epsilon and apply_residual_connection_post_layernorm, "
            "which they do not show, are Megatron-DeepSpeed's defaults"
        ]
    notes = [f"config: {file}"]
    if given["vocab_size"] != found.sizes.vocabulary:
        notes.append(f"config: vocab_size is {found.sizes.vocabulary}, was {given['vocab_size']}")
    said = configs.dtype_in(given)
    if said not in (None, found.dtype):
        notes.append(f"config: dtype is {found.dtype} as the tensors are, was {said}")
    return notes


def _copied(files: Sequence[str]) -> list[str]:
    return [f"copied: {', '.join(files)}"] if files else ["no tokenizer: --config DIR takes one along"]


# --- to Megatron-DeepSpeed ---------------------------------------------------------------------


def to_megatron(source: Path, out: Path, *, ranks: int, multiple: int, progress: Progress) -> Report:
    """Write the layer files of a transformers BLOOM for a number of tensor-parallel ranks; config and tokenizer beside.

    Rows of the embedding are padded with zeros to a multiple of ``multiple`` times ``ranks``.

    Raises:
        ModelError: where the source is no whole BLOOM.
        UsageError: where ``out`` is there already, or its heads cannot be shared.
    """
    directories.must_be_free(out)
    file = source / configs.FILE
    sizes = configs.sizes_in(configs.read(file), file)
    if sizes.heads % ranks:
        raise UsageError(
            f"{sizes.heads} heads cannot be shared by {ranks} ranks", fix="Give a --tensor-parallel that divides them"
        )
    contents = pretrained.survey(source, sizes)
    rows = cutting.padded_size(sizes.vocabulary, multiple, ranks)
    layers = list(names.layers(sizes.layers))
    total = _bytes_on_ranks(layers, replace(sizes, vocabulary=rows), contents.dtype, ranks)
    directories.must_be_free(out, total)
    with directories.appearing(out) as made:
        for layer in layers:
            progress(f"layer {layer.number} of {layers[-1].number}")
            _write_layer(made, layer, contents, ranks=ranks, rows=rows)
        replace_file(made / configs.FILE, file.read_bytes())
        copied = companions.copy(source, made)
    padded = rows > sizes.vocabulary
    notes = [f"padded: the embedding with zeros, from {sizes.vocabulary} to {rows} rows"] if padded else []
    notes.append(f"copied: {', '.join((configs.FILE, *copied))}")
    return Report(
        tensors=len(contents.tensors),
        bytes=total,
        dtype=contents.dtype,
        files=len(layers) * ranks,
        ranks=ranks,
        notes=tuple(notes),
    )


def _write_layer(made: Path, layer: Layer, contents: Contents, *, ranks: int, rows: int) -> None:
    """Write the files of one layer; on return no tensor of it is in memory any more."""
    whole = {entry: contents.tensors[layer.name(entry)].read() for entry in layer.entries}
    if names.VOCABULARY in whole:
        whole[names.VOCABULARY] = cutting.padded(whole[names.VOCABULARY], rows)
    for rank in range(ranks):
        parts = {entry.megatron: cutting.part_of(tensor, entry.cut, rank, ranks) for entry, tensor in whole.items()}
        megatron.write(made / megatron.file_name(layer.number, rank), parts)


def _bytes_on_ranks(layers: Sequence[Layer], sizes: Sizes, dtype: str, ranks: int) -> int:
    """The bytes of all tensors on all ranks, replicated ones once for each."""
    return ranks * sum(
        Planned(name=entry.megatron, shape=entry.shape_in(sizes, ranks), dtype=dtype).bytes
        for layer in layers
        for entry in layer.entries
    )
