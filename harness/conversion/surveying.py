"""Account for every tensor of a Megatron-DeepSpeed checkpoint before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.conversion import cutting, megatron, names, shards
from harness.conversion.names import Cut, Entry, Layer, Sizes
from harness.conversion.problems import Problems
from harness.errors import ModelError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

_MENDS = "Nothing was written; complete the checkpoint, or give the config.json that belongs to it with --config"
_AVERAGES = "Nothing was written; --average-replicated writes their mean"
_UNLIKE = "not alike on all ranks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """A checkpoint that is whole.

    ``sizes.vocabulary`` are the rows that are kept, ``rows`` those that are there, padding included; ``padding`` says
    whether what is dropped is all zeros. ``dtype`` in torch's word; ``differing`` are the replicated tensors that were
    to be averaged, by layer number and key, each with how far apart the ranks are.
    """

    files: megatron.Files
    ranks: int
    sizes: Sizes
    rows: int
    zeros: bool
    dtype: str
    differing: Mapping[tuple[int, str], float]


def survey(
    directory: Path, told: Sizes, *, average: bool = False, progress: Callable[[str], None] = lambda _text: None
) -> Survey:
    """Look at every file: shapes and dtypes of all tensors, the content of replicated ones.

    ``told`` is what is known before, from a config or its user, with 0 for what the tensors are to show. With
    ``average`` replicated tensors may differ between ranks.

    Raises:
        ModelError: with all that is missing, unexpected, duplicated, mis-shaped, of another dtype, unreadable, or
            replicated and not alike.
        UsageError: where the number of heads is not told.
    """
    problems = Problems()
    files = megatron.find(directory, problems)
    ranks = 1 + max((rank for of_layer in files.values() for rank in of_layer), default=0)
    sizes, rows = _sizes(files, ranks, told, problems, directory)
    expected = {layer.number: layer for layer in names.layers(sizes.layers)}
    for number in sorted(files.keys() - expected.keys()):
        for path in files[number].values():
            problems.add("unexpected", f"the file {path.name}, in a model of {sizes.layers} blocks")
    looked = _Look(sizes=replace(sizes, vocabulary=rows), ranks=ranks, problems=problems)
    for layer in expected.values():
        progress(f"looking at layer {layer.number} of {max(expected)}")
        looked.at(layer, files.get(layer.number, {}))
    dtype = looked.settle_dtype()
    if not average:
        for number, key in looked.differing:
            problems.add(_UNLIKE, looked.told[number, key])
    problems.raise_any(directory, fix=_AVERAGES if set(problems.kinds) == {_UNLIKE} else _MENDS)
    zeros = _padding_is_zero(files, expected, sizes.vocabulary, rows, ranks)
    return Survey(
        files=files, ranks=ranks, sizes=sizes, rows=rows, zeros=zeros, dtype=dtype, differing=looked.differing
    )


def _sizes(files: megatron.Files, ranks: int, told: Sizes, problems: Problems, directory: Path) -> tuple[Sizes, int]:
    """Sizes, told or derived, and the rows of the embedding with its padding."""
    embedding = _first_part(files)
    if embedding is None and not told.hidden:
        problems.add("missing", f"rank 0's part of {names.VOCABULARY.megatron}, which shows the sizes")
        problems.raise_any(directory, fix=_MENDS)
    each, hidden = (-(-told.vocabulary // ranks), told.hidden) if embedding is None else embedding.shape
    rows = each * ranks
    sizes = Sizes(
        hidden=told.hidden or hidden,
        layers=told.layers or names.blocks_before(max(files)),
        heads=told.heads,
        vocabulary=told.vocabulary or rows,
    )
    if sizes.layers < 1:
        raise ModelError(f"{directory} holds no blocks: its last layer is {max(files)}", fix=_MENDS)
    if not sizes.heads:
        raise UsageError(
            "no tensor shows how many heads the model has", fix="Give its config.json with --config, or --heads N"
        )
    if sizes.hidden % sizes.heads or sizes.heads % ranks:
        text = f"{sizes.heads} heads for a hidden size of {sizes.hidden} on {ranks} ranks"
        problems.add("mis-shaped", text)
    if rows < sizes.vocabulary:
        text = f"{names.VOCABULARY.megatron}: {rows} rows on all ranks for a vocabulary of {sizes.vocabulary}"
        problems.add("mis-shaped", text)
    return sizes, rows


def _first_part(files: megatron.Files) -> Tensor | None:
    """What rank 0 holds of the embedding, where it is there."""
    number = next(names.layers(0)).number
    path = files.get(number, {}).get(0)
    try:
        found = None if path is None else megatron.read(path).get(names.VOCABULARY.megatron)
    except ModelError:  # told with all others when its layer is looked at
        return None
    return found if found is not None and found.ndim == 2 and found.numel() else None


class _Look:
    """Looks at layer after layer, and keeps no tensor."""

    def __init__(self, *, sizes: Sizes, ranks: int, problems: Problems) -> None:
        self._sizes, self._ranks, self._problems = sizes, ranks, problems
        self._dtypes: dict[tuple[str, int], str] = {}
        self.differing: dict[tuple[int, str], float] = {}
        self.told: dict[tuple[int, str], str] = {}

    def at(self, layer: Layer, paths: Mapping[int, Path]) -> None:
        """Look at all ranks of one layer."""
        held: dict[int, dict[str, Tensor]] = {}
        for rank in range(self._ranks):
            if rank not in paths:
                self._problems.add("missing", f"the file {megatron.file_name(layer.number, rank)}")
                continue
            try:
                held[rank] = megatron.read(paths[rank])
            except ModelError as error:
                self._problems.add("unreadable", error.problem)
        known = {entry.megatron for entry in layer.entries}
        for rank, tensors in held.items():
            for key in sorted(tensors.keys() - known):
                self._problems.add("unexpected", f"{key!r} in layer {layer.number}", rank)
        for entry in layer.entries:
            self._tensor(layer, entry, held)

    def _tensor(self, layer: Layer, entry: Entry, held: Mapping[int, Mapping[str, Tensor]]) -> None:
        what = f"{entry.megatron} in layer {layer.number}"
        wanted = entry.shape_in(self._sizes, self._ranks)
        parts: list[Tensor] = []
        for rank, tensors in held.items():
            tensor = tensors.get(entry.megatron)
            if tensor is None:
                self._problems.add("missing", what, rank)
                continue
            self._dtypes[what, rank] = str(tensor.dtype).removeprefix("torch.")
            if tuple(tensor.shape) != wanted:
                text = f"{what} is {list(tensor.shape)}, expected {list(wanted)}"
                self._problems.add("mis-shaped", text, rank)
            else:
                parts.append(tensor)
        if entry.cut is Cut.REPLICATED and len(parts) == self._ranks:
            self._compare(layer, entry, parts)

    def _compare(self, layer: Layer, entry: Entry, parts: Sequence[Tensor]) -> None:
        others = [rank for rank, part in enumerate(parts) if not cutting.same_bits(part, parts[0])]
        if not others:
            return
        apart = cutting.furthest(parts)
        place = (layer.number, entry.megatron)
        self.differing[place] = apart
        ranks = ", ".join(map(str, others))
        word = "ranks" if len(others) > 1 else "rank"
        self.told[place] = (
            f"{entry.megatron} in layer {layer.number}: {word} {ranks} and rank 0 are up to {apart:.3g} apart"
        )

    def settle_dtype(self) -> str:
        """The dtype that most tensors have; the others are problems."""
        counts = Counter(self._dtypes.values())
        most = max(counts, key=lambda dtype: (counts[dtype], dtype), default="")
        for (what, rank), dtype in self._dtypes.items():
            if dtype != most:
                self._problems.add("of another dtype", f"{what} is {dtype}, most are {most}", rank)
        if most and most not in shards.DTYPES:
            self._problems.add("of another dtype", f"most tensors are {most}; known are {', '.join(shards.DTYPES)}")
        return most


def _padding_is_zero(
    files: megatron.Files, expected: Mapping[int, Layer], vocabulary: int, rows: int, ranks: int
) -> bool:
    """Whether the rows behind the vocabulary hold nothing."""
    number, each = min(expected), rows // ranks
    for rank in range(vocabulary // each, ranks):
        part = megatron.read(files[number][rank])[names.VOCABULARY.megatron]
        if part[max(0, vocabulary - rank * each) :].count_nonzero():
            return False
    return True
