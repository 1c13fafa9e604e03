"""One pass over the weights: every sequence through a block, block after block, then the head in slices.

What stands before and behind the blocks (embedding, masks, rotary angles, the last norm, whatever a model does to its
logits) is the model's own forward, run once with blocks that note what they are given: no architecture is named here.

Shape legend: B rows of a group, T its length, H width, n real tokens of a group, v columns of a slice.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from harness.engines.modules import dtype_name
from harness.engines.streaming.files import FLOATS, Place
from harness.engines.streaming.grouping import Group
from harness.engines.streaming.hidden import FINISHED, States
from harness.engines.streaming.reading import Piece, Reader
from harness.engines.streaming.skeleton import Skeleton, linear_weights, multiplied_in_parts, widened_late
from harness.errors import ModelError
from harness.numerics.sliced import SlicedSketch

#: Lets a part of the model compute in another way while it is open; None leaves it. Called with the part's name.
Variant = Callable[[str, nn.Module], AbstractContextManager[object]]

#: Bytes of one slice of the head.
_SLICE_BYTES = 2**28
#: Bytes of the rows of a layer that are widened at a time: a product of fewer rows is slower (measured, a third at
#: 2**26), and more of them bring nothing.
PART_BYTES = 2**29
#: Seconds after which a piece that still computes says so.
_SILENCE = 10.0
#: Rows of one product with a slice: its logits stay small beside the slice.
_ROWS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a pass runs.

    Attributes:
        load: dtype that weights are rounded to, ``dtype`` the one computed in.
        device: that computes.
        direct: read past the page cache.
        budget: bytes of hidden states that stay in memory.
        directory: where to commit after each block, None for nowhere.
        rounds: whether ``load`` is narrower than the checkpoint.
        converts: whether each tensor of a block is stored in another dtype than ``load``.
        late: hold a block as it is stored, and cast each Linear only while it computes.
        keep: leave the sums there when all is done.
        beside: passes that share this machine's memory, this one among them.
        work: digest of what is done.
    """

    load: str
    dtype: str
    device: str
    direct: bool
    budget: int
    directory: Path | None
    rounds: bool
    converts: bool
    late: bool
    keep: bool
    beside: int
    work: str

    @property
    def copies(self) -> bool:
        """Whether tensors are made anew from what was read, whose memory is then free."""
        return self.load != self.dtype or self.device != "cpu" or self.converts


@dataclass(frozen=True, kw_only=True, slots=True)
class Took:
    """Seconds of one piece: until it was read (in the other thread), waited for it, and computed with it."""

    name: str
    bytes: int
    read: float
    waited: float
    computed: float


@dataclass(kw_only=True, slots=True)
class _Calls:
    """What the blocks of one group are called with besides its hidden states, and in what they answer."""

    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


@dataclass(kw_only=True)
class Pass:
    """The state of one pass; ``run`` does it.

    Attributes:
        skeleton: the empty model.
        settings: how it runs.
        groups: the sequences.
        sketches: for each variant, what condenses the logits of each group, in the order of the groups' real tokens.
        variants: ways to compute, the plain one being None.
        progress: called with a few words.
        took: of each piece, filled by ``run``.
        dtypes, devices: read back from the parts while they computed.
        lift: opened around whatever computes.
    """

    skeleton: Skeleton
    settings: Settings
    groups: Sequence[Group]
    sketches: Sequence[Sequence[SlicedSketch]]
    variants: Sequence[Variant | None]
    progress: Callable[[str], None]
    lift: Callable[[], AbstractContextManager[object]] = nullcontext
    took: list[Took] = field(default_factory=list)
    dtypes: set[str] = field(default_factory=set)
    devices: set[str] = field(default_factory=set)
    _calls: list[_Calls] = field(default_factory=list)
    _tuples: bool = False
    _output: Any = None
    _rows: torch.Tensor | None = None
    _said: float = 0.0

    def run(self) -> None:
        """Go on from the last commit of this very work, or start."""
        shapes = [(*group.ids_BT.shape, self._width) for _ in self.variants for group in self.groups]
        with (
            torch.no_grad(),
            self.lift(),
            States(
                shapes,
                self._dtype,
                directory=self.settings.directory,
                budget=self.settings.budget,
                work=self.settings.work,
            ) as states,
        ):
            words = states.resume() or {"stage": "blocks", "done": 0}
            self._tuples = bool(words.get("tuples"))
            if words["stage"] != "blocks":
                for name, sums in _nested(states.arrays(words)).items():
                    self._sketch(int(name)).restore(sums)
            if words["stage"] == FINISHED:
                return
            blocks = self.skeleton.block_places()
            first_block = words["done"] if words["stage"] == "blocks" else len(blocks)
            first_slice = words["done"] if words["stage"] == "head" else 0
            slices = self._slices()
            pieces = [*blocks[first_block:], *([one for _, one in slices][first_slice:])]
            buffers = 1 if self.settings.copies and not self.settings.late else 2
            with (
                self.skeleton_outer(),
                Reader(pieces, direct=self.settings.direct, buffers=buffers) as reader,
            ):
                arriving = iter(reader)
                for index in range(first_block, len(blocks)):
                    self._block(index, arriving, states)
                if words["stage"] == "blocks":
                    self._tail(states)
                with self._headed():
                    for index in range(first_slice, len(slices)):
                        self._slice(index, slices, arriving, states)
            states.finish(self._sums() if self.settings.keep else None)

    # --- before and behind the blocks --------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.settings.dtype)
        return found

    @property
    def _width(self) -> int:
        return self.skeleton.embedding_place.shape[1]

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """A stored tensor as it is loaded, then widened, then where it computes."""
        if not tensor.is_floating_point():
            return tensor
        with torch._C.DisableTorchFunction():  # under the lift to float64 a rounding to 16 bits would be none
            return tensor.to(getattr(torch, self.settings.load)).to(device=self.settings.device, dtype=self._dtype)

    def _loaded(self, tensor: torch.Tensor) -> torch.Tensor:
        """A stored tensor rounded as it is loaded, before it is widened."""
        with torch._C.DisableTorchFunction():
            return tensor.to(getattr(torch, self.settings.load)) if self.settings.rounds else tensor

    def _scratch(self) -> torch.Tensor:
        """Memory for the rows of a layer that are widened, one row of the largest at least."""
        if self._rows is None:
            columns = max(place.shape[-1] for block in self.skeleton.block_places() for place in block)
            size = max(columns, PART_BYTES // self._dtype.itemsize)
            self._rows = torch.empty(size, dtype=self._dtype, device=self.settings.device)
        return self._rows

    @contextmanager
    def skeleton_outer(self) -> Iterator[None]:
        """Norms and positions are there, the embedding has the rows that are asked for, and buffers are in place."""
        skeleton = self.skeleton
        outer = {place.name: self._cast(read_now(place)) for place in skeleton.outer_places()}
        with ExitStack() as stack:
            inner = (*skeleton.blocks, skeleton.embedding, skeleton.head)
            for name in skeleton.places:
                if not name.startswith(tuple(f"{one}." for one in inner)):
                    stack.enter_context(skeleton.filled(name, outer.__getitem__, lambda tensor: tensor))
            if self.settings.device != "cpu":
                for module in skeleton.model.modules():
                    for key, buffer in module._buffers.items():
                        if buffer is not None and not buffer.is_meta:
                            module._buffers[key] = buffer.to(self.settings.device)
            stack.enter_context(self._embedded())
            yield

    @contextmanager
    def _embedded(self) -> Iterator[None]:
        """The embedding holds the rows of the ids that are used, and finds them."""
        module = self.skeleton.model.get_submodule(self.skeleton.embedding)
        used = torch.from_numpy(np.unique(np.concatenate([group.ids_BT.ravel() for group in self.groups])))
        table = self._cast(rows_now(self.skeleton.embedding_place, used.tolist()))
        before, padding = module._parameters["weight"], getattr(module, "padding_idx", None)
        module._parameters["weight"] = nn.Parameter(table, requires_grad=False)
        module.padding_idx = None  # type: ignore[assignment]  # of the whole table, and only gradients heed it
        used = used.to(self.settings.device)
        hook = module.register_forward_pre_hook(lambda _module, given: (torch.searchsorted(used, given[0]),))
        try:
            yield
        finally:
            hook.remove()
            module._parameters["weight"] = before
            module.padding_idx = padding  # type: ignore[assignment]

    def _through_base(self, group: Group, blocks: Sequence[Callable[..., Any]]) -> Any:
        """The base model's own forward on a group, with other blocks."""
        base = self.skeleton.base
        ids_BT = torch.from_numpy(group.ids_BT).to(self.settings.device)
        given: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "use_cache": False}
        if "position_ids" in inspect.signature(base.forward).parameters:
            given["position_ids"] = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        modules = list(self.skeleton.blocks.values())
        for module, forward in zip(modules, blocks, strict=True):
            module.forward = forward
        try:
            return base(**given)
        finally:
            for module in modules:
                del module.forward

    def _captured(self, group: Group, first: Callable[..., Any]) -> _Calls:
        """What each block of a group is called with; ``first`` is what the first one does."""
        calls = _Calls()
        result: list[Any] = []

        def note(*arguments: Any, **keywords: Any) -> Any:
            calls.arguments.append((arguments[1:], {k: v for k, v in keywords.items() if k != "hidden_states"}))
            if not result:
                hidden = arguments[0] if arguments else keywords["hidden_states"]
                result.append(first(hidden, *calls.arguments[0][0], **calls.arguments[0][1]))
            return result[0]

        self._through_base(group, [note] * len(self.skeleton.blocks))
        return calls

    # --- the blocks --------------------------------------------------------------------------------

    def _items(self) -> Iterator[tuple[int, Variant | None, Group]]:
        """(index of its states, variant, group), variant by variant."""
        index = 0
        for variant in self.variants:
            for group in self.groups:
                yield index, variant, group
                index += 1

    def _block(self, index: int, arriving: Iterator[Piece], states: States) -> None:
        started = time.perf_counter()
        piece = next(arriving)
        waited = time.perf_counter()
        name, module = list(self.skeleton.blocks.items())[index]
        late = linear_weights(module, f"{name}.") if self.settings.late else set()
        with self.skeleton.filled(f"{name}.", piece.tensor, self._cast, late):
            if self.settings.copies and not late:
                piece.release()
            for item, variant, group in self._items():
                with ExitStack() as stack:
                    if late and variant is None:
                        stack.enter_context(multiplied_in_parts(module, self._loaded, self._scratch()))
                    elif late:  # a variant has products of its own, and wants weights
                        stack.enter_context(widened_late(module, self._cast))
                    if variant is not None:
                        stack.enter_context(variant(name, module))
                    result = self._through(index, module, item, group, variant, states)
                    self._read_back(result, *(p for n, p in module.named_parameters(prefix=name) if n not in late))
                    states.write(item, result)
                self._beat(name, item, started)
        piece.release()
        states.commit({"stage": "blocks", "done": index + 1, "tuples": self._tuples})
        self._note(name, piece, started, waited)

    def _through(
        self, index: int, module: nn.Module, item: int, group: Group, variant: Variant | None, states: States
    ) -> torch.Tensor:
        if index == 0:
            return self._first(module, group, variant)
        if item >= len(self._calls):  # gone on from a commit: what the blocks are given is found again
            self._calls.append(self._again(group, variant))
        arguments, keywords = self._calls[item].arguments[index]
        return _hidden_of(module(states.read(item).to(self.settings.device), *arguments, **keywords))

    def _first(self, module: nn.Module, group: Group, variant: Variant | None) -> torch.Tensor:
        found: list[torch.Tensor] = []
        forward = module.forward

        def first(hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            result = forward(hidden, *arguments, **keywords)
            self._tuples = isinstance(result, tuple)
            found.append(_hidden_of(result))
            return result

        with self._outer_variant(variant):
            self._calls.append(self._captured(group, first))
        return found[0]

    def _again(self, group: Group, variant: Variant | None) -> _Calls:
        def first(hidden: torch.Tensor, *_arguments: Any, **_keywords: Any) -> Any:
            return (hidden,) if self._tuples else hidden

        with self._outer_variant(variant):
            return self._captured(group, first)

    @contextmanager
    def _outer_variant(self, variant: Variant | None) -> Iterator[None]:
        """A variant on the parts outside the blocks; a block that it has changed already is left out."""
        if variant is None:
            yield
            return
        with ExitStack() as stack:
            inside = tuple(f"{name}." for name in self.skeleton.blocks)
            for name, module in self.skeleton.model.named_modules():
                leaf = not any(True for _ in module.children())
                if leaf and not name.startswith(inside) and name not in (self.skeleton.embedding, self.skeleton.head):
                    stack.enter_context(variant(name, module))
            yield

    def _tail(self, states: States) -> None:
        """What the model does behind its last block, up to the head."""
        for item, variant, group in self._items():
            hidden = states.read(item).to(self.settings.device)
            result = (hidden,) if self._tuples else hidden
            with self._outer_variant(variant):
                output = self._through_base(
                    group, [lambda *_a, result=result, **_k: result] * len(self.skeleton.blocks)
                )
            states.write(item, output[0])
        states.commit({"stage": "head", "done": 0, "tuples": self._tuples})

    # --- the head ----------------------------------------------------------------------------------

    def _slices(self) -> list[tuple[int, list[Place]]]:
        """(first column, what is read) of each slice of the head."""
        weight, bias = self.skeleton.head_places
        rows = max(1, _SLICE_BYTES // (weight.shape[1] * self._dtype.itemsize))
        found = []
        for start in range(0, weight.shape[0], rows):
            stop = min(start + rows, weight.shape[0])
            found.append((start, [weight.rows(start, stop), *([bias.rows(start, stop)] if bias is not None else [])]))
        return found

    @contextmanager
    def _headed(self) -> Iterator[None]:
        """The model's forward starts from the base model's output, whatever it is given."""
        base = self.skeleton.base
        base.forward = lambda *_a, **_k: _Output(self._output)
        try:
            yield
        finally:
            del base.forward

    def _slice(
        self, index: int, slices: Sequence[tuple[int, list[Place]]], arriving: Iterator[Piece], states: States
    ) -> None:
        started = time.perf_counter()
        piece = next(arriving)
        waited = time.perf_counter()
        column, places = slices[index]
        weight, *bias = [self._cast(piece.tensor(place.name)) for place in places]
        head = self.skeleton.model.get_submodule(self.skeleton.head)
        dummy = torch.zeros((1, 1), dtype=torch.int64, device=self.settings.device)
        head.forward = lambda hidden: nn.functional.linear(hidden, weight, bias[0] if bias else None)
        try:
            for item, _, group in self._items():
                hidden_NH = _real(states.read(item), group)
                for first in range(0, len(hidden_NH), _ROWS):
                    self._output = hidden_NH[None, first : first + _ROWS].to(self.settings.device)
                    logits_nv = self.skeleton.model(input_ids=dummy, use_cache=False).logits[0]
                    self._read_back(weight, *bias)
                    self._sketch(item).add(first, column, logits_nv.cpu())
                self._beat(self.skeleton.head, item, started)
        finally:
            del head.forward
        piece.release()
        if self.settings.directory is not None:
            states.note({"stage": "head", "done": index + 1, "tuples": self._tuples}, self._sums())
        self._note(f"{self.skeleton.head} columns from {column}", piece, started, waited)

    def _sums(self) -> dict[str, torch.Tensor]:
        """What all sketches carry, by the index of their states and name."""
        return {
            f"{item}.{name}": tensor
            for item, _, _ in self._items()
            for name, tensor in self._sketch(item).state().items()
        }

    def _sketch(self, item: int) -> SlicedSketch:
        return self.sketches[item // len(self.groups)][item % len(self.groups)]

    def _read_back(self, *tensors: torch.Tensor) -> None:
        """What is there, not what was asked for; a weight that is cast while it computes shows in what it gives."""
        self.dtypes |= {dtype_name(tensor.dtype) for tensor in tensors if tensor.is_floating_point()}
        self.devices |= {tensor.device.type for tensor in tensors}

    def _beat(self, name: str, item: int, started: float) -> None:
        """Say so while a piece takes long: whoever watches a rank takes silence for a failure."""
        if time.perf_counter() - max(started, self._said) > _SILENCE:
            self._said = time.perf_counter()
            self.progress(f"{name}: {item + 1} of {len(self.variants) * len(self.groups)} groups")

    def _note(self, name: str, piece: Piece, started: float, waited: float) -> None:
        ended = time.perf_counter()
        one = Took(name=name, bytes=piece.bytes, read=piece.seconds, waited=waited - started, computed=ended - waited)
        self.took.append(one)
        self.progress(f"{name}: {one.waited + one.computed:.1f} s")


class _Output:
    """What a head takes from the base model: the last hidden state; whatever else it asks for is not there."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _hidden_of(result: Any) -> torch.Tensor:
    hidden: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return hidden


def _real(states_BTH: torch.Tensor, group: Group) -> torch.Tensor:
    """The states of a group's real tokens, sequence by sequence, [n, H]."""
    return torch.cat([row[:length] for row, length in zip(states_BTH, group.lengths, strict=True)])


def _nested(arrays: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in arrays.items():
        item, _, key = name.partition(".")
        found.setdefault(item, {})[key] = tensor
    return found


# --- small reads -------------------------------------------------------------------------------------


def read_now(place: Place) -> torch.Tensor:
    """One tensor, whole."""
    return rows_now(place, None)


def rows_now(place: Place, rows: Sequence[int] | None) -> torch.Tensor:
    """Some rows of a tensor, or all of it: only their bytes are read."""
    dtype = getattr(torch, FLOATS[place.dtype])
    each = place.bytes if rows is None else place.bytes // place.shape[0]
    handle = os.open(place.file, os.O_RDONLY)
    try:
        data = bytearray()
        for row in rows if rows is not None else [0]:
            piece = os.pread(handle, each, place.start + row * each)
            if len(piece) != each:
                raise ModelError(f"{place.file} ended while it was read", fix="Copy it again")
            data += piece
    except OSError as error:
        raise ModelError(f"{place.file} cannot be read ({error.strerror})", fix="Check the disk") from error
    finally:
        os.close(handle)
    shape = place.shape if rows is None else (len(rows), *place.shape[1:])
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)
