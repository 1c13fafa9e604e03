"""Isolated replay: each module of a live model is given what the reference's was given, all in one forward pass.

A module's result is compared with the reference's, and then *replaced* by it; so is each hidden state that goes into a
module, since what lies between two modules (a residual, the products of attention) is code too. Errors do not
accumulate, whatever the depth, and one forward of the candidate shows every module (numerics.md 2.8).

The reference runs in float64 with every replaced value rounded to the precision that is asked: what it then computes is
what the candidate's arithmetic has to come near, and rounding of inputs is no part of the difference.

What else a module is given (masks, position embeddings, ALiBi) and what lies in the KV cache is compared and left as it
is: implementations may write it otherwise and compute the same.

Shape legend: B batch rows, T new tokens, S tokens so far (padding included), N real tokens, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from harness.engines import decoding
from harness.engines.base import Engine
from harness.engines.ranks.probes import Unheard
from harness.errors import EngineError
from harness.locate.maps import Mapped, Route
from harness.locate.presentations import Driven, Presentation

#: What of a module is looked at: its result; a hidden state that it is given, which the code before it made; another
#: argument; what the KV cache holds of it.
Side = Literal["output", "input", "argument", "cache"]
Phase = Literal["prefill", "decode"]

#: Where hidden states stand: everything that is neither a batch row nor a token is one axis.
_HIDDEN_AXES = 3


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Place:
    """One tensor of one module.

    Attributes:
        module: the reference's name; "" is the model as a whole.
        side: what of it.
        key: which one: the number or keyword of an argument, the number of a result.
    """

    module: str
    side: Side
    key: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One call of a model's forward.

    Attributes:
        presentation: its number.
        phase: prefill or decode.
        number: of the pass among all.
        real_BT: which new columns are tokens.
        seen_BS: which columns so far are tokens.
        positions_BT: of each new token in its own sequence.
        whole: no new column is padding.
        row_N, position_N: of each new token, padding left out.
    """

    presentation: int
    phase: Phase
    number: int
    real_BT: torch.Tensor
    seen_BS: torch.Tensor
    positions_BT: torch.Tensor
    whole: bool
    row_N: NDArray[np.int64]
    position_N: NDArray[np.int64]


@dataclass(kw_only=True, slots=True)
class Recording:
    """What the reference did: every tensor of every place, by pass and by the number of the call in it.

    Attributes:
        values: exact, before they were rounded; int and bool tensors as they are.
        rounded: what went on from there, in ``dtype``; of hidden states alone.
        rows: the exact values of tokens, float64 [N, W].
        places: in the order in which the reference comes to them.
        passes: all of them.
        fed: by module, the places of what it is given beside hidden states.
        dtype: what the values that went on were rounded to.
    """

    values: dict[tuple[int, Place, int], torch.Tensor] = field(default_factory=dict)
    rounded: dict[tuple[int, Place, int], torch.Tensor] = field(default_factory=dict)
    rows: dict[tuple[int, Place, int], torch.Tensor] = field(default_factory=dict)
    places: dict[Place, int] = field(default_factory=dict)
    passes: list[Pass] = field(default_factory=list)
    fed: dict[str, set[Place]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Errors of one place over many tokens.

    Attributes:
        error: what the candidate has too much, float64 [N, W].
        right: what the reference has, float64 [N, W].
        number: of the pass.
        batch_row: of each row, [N]; -1 where rows are no tokens.
        positions: in its own sequence, [N]; -1 where rows are no tokens.
    """

    error: torch.Tensor
    right: torch.Tensor
    number: int
    batch_row: NDArray[np.int64]
    positions: NDArray[np.int64]


@dataclass(kw_only=True, slots=True)
class Replay:
    """What a candidate did on a recording.

    Attributes:
        rows: errors by place.
        strange: places whose tensors cannot be compared, with the reason.
        unlike: places of numbers that must be equal (ids, positions, masks), with how many entries of how many differ
            in which pass.
        called: modules that ran.
    """

    rows: dict[Place, list[Rows]] = field(default_factory=dict)
    strange: dict[Place, str] = field(default_factory=dict)
    unlike: dict[Place, list[tuple[int, int, int]]] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)


# --- driving -----------------------------------------------------------------------------------


def record(
    engine: Any, asked: Sequence[Presentation], names: Sequence[str], dtype: torch.dtype, driven: Driven
) -> Recording:
    """Run the reference, rounding what goes from module to module to ``dtype``.

    Args:
        engine: an open `hf` engine, in float64 where it can be.
        asked: what it runs.
        names: modules to look at.
        dtype: the precision that is asked about.
        driven: as the candidate is.
    """
    found = Recording(dtype=dtype)
    hooks = _Recorder(found)
    _run(engine, asked, driven, engine.model, [Mapped(reference=(name,), candidate=name) for name in names], hooks)
    return found


def replay(engine: Engine, route: Route, asked: Sequence[Presentation], recording: Recording, driven: Driven) -> Replay:
    """Run a candidate with the reference's values in the place of its own, and take the differences.

    Args:
        engine: open; an engine with a live model or port.
        route: how its modules are called, see harness/locate/maps.py.
        asked: what the reference ran.
        recording: of the reference, in the candidate's precision.
        driven: as the candidate is.
    """
    found = Replay()
    hooks = _Forcer(found, recording)
    _run(engine, asked, driven, route.owner, route.modules, hooks)
    return found


def _run(
    engine: Any,
    asked: Sequence[Presentation],
    driven: Driven,
    owner: Any,
    modules: Sequence[Mapped],
    hooks: _Hooks,
) -> None:
    decoder = engine.decoder
    with ExitStack() as stack:
        for each in _by_module(owner, modules, hooks):
            stack.enter_context(each)
        for number, one in enumerate(asked):
            hooks.begin(number)
            run = decoding.replay if driven.cached else decoding.teacher_forced
            run(
                replace(decoder, step=hooks.stepping(decoder.step)),
                one.requests,
                one.continuations,
                batch_size=driven.batch,
                sketcher=Unheard(1),
                chunk=driven.chunk,
            )


def _by_module(owner: Any, modules: Sequence[Mapped], hooks: _Hooks) -> Iterator[AbstractContextManager[None]]:
    """What hooks each module; one that stands under several names is hooked once, and its calls take turns."""
    shared: dict[int, tuple[Any, list[Mapped]]] = {}
    for one in modules:
        try:
            module = owner.get_submodule(one.candidate)
        except AttributeError:
            continue
        shared.setdefault(id(module), (module, []))[1].append(one)
    for module, names in shared.values():
        yield _hooked(module, names, hooks)


@contextmanager
def _hooked(module: torch.nn.Module, names: Sequence[Mapped], hooks: _Hooks) -> Iterator[None]:
    calls = [0, -1]

    def before(_module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        if calls[1] != hooks.number:
            calls[:] = [0, hooks.number]
        current = names[calls[0] % len(names)], calls[0] // len(names)
        calls[0] += 1
        hooks.stack.append(current)
        return hooks.enters(*current, args, given)

    def after(_module: Any, _args: Any, output: Any) -> Any:
        return hooks.leaves(*hooks.stack.pop(), output)

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass(presentation: int, phase: Phase, number: int, positions_BT: torch.Tensor, seen_BS: torch.Tensor) -> Pass:
    rows, new = positions_BT.shape
    real_BT = seen_BS[:, -new:]
    return Pass(
        presentation=presentation,
        phase=phase,
        number=number,
        real_BT=real_BT,
        seen_BS=seen_BS,
        positions_BT=positions_BT,
        whole=bool(real_BT.all()),
        row_N=torch.arange(rows)[:, None].expand(rows, new)[real_BT].numpy(),
        position_N=positions_BT[real_BT].numpy(),
    )


class _Hooks:
    """What is done at each module; the passes are counted here."""

    def __init__(self) -> None:
        self.number = -1
        self.stack: list[tuple[Mapped, int]] = []
        self._presentation = 0
        self._fresh = True
        self._prompts: frozenset[int] = frozenset()
        self.current: Pass | None = None

    def begin(self, presentation: int) -> None:
        self._presentation, self._fresh = presentation, True

    def stepping(self, step: Any) -> Any:
        """The engine's own step, with the pass noted before it and its logits looked at behind it."""

        def stepped(ids_BT: Any, position_BT: Any, mask_BS: Any, cache: Any, keep: int) -> Any:
            new = ids_BT.shape[1]
            self.number += 1
            self.stack.clear()
            phase: Phase = "decode" if not self._fresh and new == 1 else "prefill"
            self._fresh = False
            self.current = _pass(self._presentation, phase, self.number, position_BT.cpu(), mask_BS.bool().cpu())
            self.before(cache)
            logits_BTV = step(ids_BT, position_BT, mask_BS, cache, keep)
            self.after(logits_BTV)
            return logits_BTV

        return stepped

    def before(self, cache: Any) -> None: ...

    def after(self, logits_BTV: torch.Tensor) -> None: ...

    def enters(self, one: Mapped, call: int, args: tuple[Any, ...], given: dict[str, Any]) -> Any: ...

    def leaves(self, one: Mapped, call: int, output: Any) -> Any: ...

    @property
    def now(self) -> Pass:
        if self.current is None:
            raise EngineError("a module ran outside of the engine's own step", fix="Run the model through the engine")
        return self.current


class _Recorder(_Hooks):
    """Keeps every tensor, and lets its rounded value go on."""

    def __init__(self, found: Recording) -> None:
        super().__init__()
        self._found = found
        self._known: dict[int, tuple[Place, torch.Tensor]] = {}

    def before(self, cache: Any) -> None:
        self._found.passes.append(self.now)
        self._known = {}
        for number, tensor in enumerate(cache_tensors(cache)):
            self._keep(Place(module="", side="cache", key=str(number)), 0, tensor)

    def after(self, logits_BTV: torch.Tensor) -> None:
        self._keep(Place(module="", side="output", key="0"), 0, logits_BTV)

    def _keep(self, place: Place, call: int, tensor: torch.Tensor) -> None:
        self._found.places.setdefault(place, len(self._found.places))
        key = (self.number, place, call)
        self._found.values[key] = value = tensor.detach().clone()
        if value.is_floating_point() and not is_mask(place):
            self._found.rows[key] = rows_of(value, self.now, place.side)[0].double().cpu()
            if _is_hidden(value, self.now):
                self._found.rounded[key] = value.to(self._found.dtype)

    def enters(self, one: Mapped, call: int, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        with torch._C.DisableTorchFunction():  # the lift to float64 would undo the rounding
            for side, key, tensor in given_to(args, given, self.now):
                place = Place(module=one.reference[0], side=side, key=key)
                if side == "argument":
                    # One tensor is handed from module to module: it is looked at where it first comes.
                    known = self._known.setdefault(id(tensor), (place, tensor))[0]
                    self._found.fed.setdefault(one.reference[0], set()).add(known)
                    if known != place:
                        continue
                self._keep(place, call, tensor)
            return _with_inputs(args, given, self.now, lambda _key, tensor: self._rounded(tensor))

    def leaves(self, one: Mapped, call: int, output: Any) -> Any:
        with torch._C.DisableTorchFunction():
            tensors = results_of(output)
            for number, tensor in enumerate(tensors):
                place = Place(module=one.reference[0], side="output", key=str(number))
                self._known[id(tensor)] = (place, tensor)
                self._keep(place, call, tensor)
            if len(tensors) != 1 or not _is_hidden(tensors[0], self.now):
                return output
            return with_result(output, self._rounded(tensors[0]))

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._found.dtype).to(tensor.dtype)


class _Forcer(_Hooks):
    """Takes the difference from the reference at every place, and puts the reference's value there."""

    def __init__(self, found: Replay, recording: Recording) -> None:
        super().__init__()
        self._found, self._recording = found, recording

    @property
    def _ran(self) -> bool:
        return self.number < len(self._recording.passes)

    def before(self, cache: Any) -> None:
        for number, tensor in enumerate(cache_tensors(cache)):
            self._look(Place(module="", side="cache", key=str(number)), 0, tensor)

    def after(self, logits_BTV: torch.Tensor) -> None:
        self._look(Place(module="", side="output", key="0"), 0, logits_BTV)

    def enters(self, one: Mapped, call: int, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        self._found.called.update(one.reference)
        if not self._ran or not one.inputs:
            return None
        name = one.reference[0]
        for side, key, tensor in given_to(args, given, self.now):
            if side == "argument":
                self._look(Place(module=name, side=side, key=key), call, tensor)

        def forced(key: str, tensor: torch.Tensor) -> torch.Tensor:
            return self._forced(Place(module=name, side="input", key=key), call, tensor)

        return _with_inputs(args, given, self.now, forced, only=one.first_input)

    def leaves(self, one: Mapped, call: int, output: Any) -> Any:
        if not self._ran or not one.output:
            return None
        tensors = results_of(output)
        if len(tensors) > 1 or (tensors and not _is_hidden(tensors[0], self.now)):
            for number, tensor in enumerate(tensors):
                self._look(Place(module=one.reference[0], side="output", key=str(number)), call, tensor)
            return None
        if not tensors:
            return None
        return with_result(output, self._parts_forced(one, call, tensors[0]))

    def _parts_forced(self, one: Mapped, call: int, tensor: torch.Tensor) -> torch.Tensor:
        """The output of a module, or of a fused one each part as the module's of the reference that it stands for."""
        places = [Place(module=name, side="output", key="0") for name in one.reference]
        if len(places) == 1:
            return self._forced(places[0], call, tensor)
        rights = [self._recording.values.get((self.number, place, call)) for place in places]
        widths = [0 if right is None else right.shape[-1] for right in rights]
        parts = one.apart(tensor, widths)
        if parts is None:
            self._found.strange.setdefault(places[0], f"it is {tensor.shape[-1]} wide, and stands for {sum(widths)}")
            return tensor
        return one.joined([self._forced(place, call, part) for place, part in zip(places, parts, strict=True)])

    def _forced(self, place: Place, call: int, tensor: torch.Tensor) -> torch.Tensor:
        """The reference's value in the candidate's shape and dtype; the difference is kept."""
        key = (self.number, place, call)
        right = self._recording.values.get(key)
        if right is None:
            return tensor
        fitted = fit(tensor, right)
        if fitted is None:
            self._found.strange.setdefault(place, f"its shape is {list(tensor.shape)}, not {list(right.shape)}")
            return tensor
        self._differ(place, fitted, right, self._recording.rows.get(key))
        rounded = self._recording.rounded.get(key)
        value = (right.to(self._recording.dtype) if rounded is None else rounded).to(tensor.device, tensor.dtype)
        if fitted.shape == tensor.shape:
            return value
        if tensor.ndim < right.ndim:
            return value.reshape(tensor.shape)
        return torch.cat([tensor[:, : tensor.shape[1] - right.shape[1]], value], dim=1)

    def _look(self, place: Place, call: int, tensor: torch.Tensor) -> None:
        """Compare, and leave as it is."""
        right = self._recording.values.get((self.number, place, call))
        if right is None:
            return
        if is_mask(place) or not tensor.is_floating_point() or not right.is_floating_point():
            self._equal(place, tensor, right)
            return
        fitted = fit(tensor, right)
        if fitted is None:
            self._found.strange.setdefault(place, f"its shape is {list(tensor.shape)}, not {list(right.shape)}")
        else:
            self._differ(place, fitted, right, self._recording.rows.get((self.number, place, call)))

    def _equal(self, place: Place, tensor: torch.Tensor, right: torch.Tensor) -> None:
        """Entries of ids, positions and masks that are not the reference's, those of padding left out."""
        seen, wanted = (_visible(tensor), _visible(right)) if is_mask(place) else (tensor, right)
        if seen.ndim == wanted.ndim and seen.ndim > 1:
            seen = seen[..., : wanted.shape[-1]] if is_mask(place) else seen[..., -wanted.shape[-1] :]
        try:
            unlike = (seen.cpu() != wanted.cpu()).broadcast_to(torch.broadcast_shapes(seen.shape, wanted.shape))
        except RuntimeError:
            self._found.strange.setdefault(place, f"its shape is {list(tensor.shape)}, not {list(right.shape)}")
            return
        real = self.now.real_BT
        if unlike.ndim == 4 and unlike.shape[2] == real.shape[1]:  # [B, heads, T, S]
            seen_BS = self.now.seen_BS
            unlike = unlike & real[:, None, :, None] & _columns(seen_BS, unlike.shape[-1])
        elif unlike.ndim == 2 and unlike.shape[-1] == real.shape[1]:  # [B, T]
            unlike = unlike & real
        if wrong := int(unlike.sum()):
            self._found.unlike.setdefault(place, []).append((self.number, wrong, unlike.numel()))

    def _differ(
        self, place: Place, tensor: torch.Tensor, right: torch.Tensor, right_NW: torch.Tensor | None = None
    ) -> None:
        ours_NW, who = rows_of(tensor, self.now, place.side)
        if right_NW is None:
            right_NW = rows_of(right, self.now, place.side)[0].double().cpu()
        row, position = (np.full(len(right_NW), -1),) * 2 if who is None else who
        self._found.rows.setdefault(place, []).append(
            Rows(
                error=ours_NW.double().cpu() - right_NW,
                right=right_NW,
                number=self.number,
                batch_row=row,
                positions=position,
            )
        )


# --- tensors of modules ------------------------------------------------------------------------


def given_to(args: Sequence[Any], given: Mapping[str, Any], now: Pass) -> Iterator[tuple[Side, str, torch.Tensor]]:
    """The tensors that a module is given, each with its key: hidden states, and all else."""
    for key, value in [*((str(place), value) for place, value in enumerate(args)), *given.items()]:
        if isinstance(value, torch.Tensor):
            yield "input" if _is_hidden(value, now) else "argument", _named(key, value, now), value
        elif isinstance(value, tuple | list):
            for number, inner in enumerate(value):
                if isinstance(inner, torch.Tensor):
                    yield "argument", f"{key}.{number}", inner


def _named(key: str, value: torch.Tensor, now: Pass) -> str:
    """An argument's key; a mask that is given by its place alone is told by its shape and its values."""
    seen = value.ndim == _HIDDEN_AXES + 1 and value.shape[-2] == now.real_BT.shape[1]
    if seen and key.isdigit() and (value.dtype == torch.bool or bool((value <= 0).all())):
        return f"mask {key}"
    return key


def _with_inputs(
    args: tuple[Any, ...],
    given: Mapping[str, Any],
    now: Pass,
    change: Callable[[str, torch.Tensor], torch.Tensor],
    only: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with every hidden state changed; ``only`` the first of them, whatever it is called."""
    done = False

    def changed(key: str, value: Any) -> Any:
        nonlocal done
        if not isinstance(value, torch.Tensor) or not _is_hidden(value, now) or (only and done):
            return value
        done = True
        return change("0" if only else key, value)

    return (
        tuple(changed(str(place), value) for place, value in enumerate(args)),
        {key: changed(key, value) for key, value in given.items()},
    )


def _is_hidden(value: torch.Tensor, now: Pass) -> bool:
    """Hidden states of the new tokens: floats [B, T, W], perhaps with padding more, perhaps as [B T, W]."""
    rows, new = now.real_BT.shape
    if not value.is_floating_point() or value.ndim < _HIDDEN_AXES - 1:
        return False
    if value.ndim == _HIDDEN_AXES:
        return value.shape[0] == rows and (value.shape[1] >= new or value.shape[1] == 1)
    return value.ndim == _HIDDEN_AXES - 1 and value.shape[0] == rows * new


def results_of(output: Any) -> list[torch.Tensor]:
    """The tensors of a module's result: the first of what transformers returns beside others, all of a pair of tables.

    A tuple whose first two entries have one shape is such a pair (the cosines and sines of RoPE).
    """
    if isinstance(output, torch.Tensor):
        return [output]
    values = list(output.values()) if hasattr(output, "values") else list(output) if isinstance(output, tuple) else []
    tensors = [one for one in values if isinstance(one, torch.Tensor)]
    if len(tensors) > 1 and len(tensors) == len(values) == 2 and tensors[0].shape == tensors[1].shape:
        return tensors
    return tensors[:1]


def with_result(output: Any, value: torch.Tensor) -> Any:
    """A module's result with another first tensor."""
    if isinstance(output, torch.Tensor):
        return value
    if isinstance(output, tuple):
        first = next(place for place, one in enumerate(output) if isinstance(one, torch.Tensor))
        return (*output[:first], value, *output[first + 1 :])
    key = next(key for key, one in output.items() if isinstance(one, torch.Tensor))
    output[key] = value
    return output


def cache_tensors(cache: Any) -> list[torch.Tensor]:
    """Keys and values by layer, of a transformers cache or of nested tuples and lists; [] of anything else."""
    cache = getattr(cache, "held", cache)
    layers = getattr(cache, "layers", None)
    if layers is not None:
        pairs = [(getattr(one, "keys", None), getattr(one, "values", None)) for one in layers]
        return [one for pair in pairs for one in pair if isinstance(one, torch.Tensor) and one.numel()]
    if isinstance(cache, tuple | list):
        return [one for part in cache for one in ([part] if isinstance(part, torch.Tensor) else cache_tensors(part))]
    return []


def is_mask(place: Place) -> bool:
    """Whether a place holds a mask, of which only what it hides counts: implementations write it in many ways."""
    return place.side == "argument" and "mask" in place.key


def _visible(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask lets see: what is added is 0 there, what is chosen by is true."""
    return mask >= 0 if mask.is_floating_point() else mask.bool()


def _columns(seen_BS: torch.Tensor, length: int) -> torch.Tensor:
    """Real columns [B, 1, 1, length] of a mask of that many; slots behind the last column are no tokens."""
    from torch.nn.functional import pad

    return pad(seen_BS, (0, max(0, length - seen_BS.shape[1])))[:, None, None, -length:]


def fit(tensor: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """The part of a candidate's tensor that stands for the reference's; None where there is none.

    Columns of padding on the left, slots of a cache that are not used yet, and batch and tokens in one axis are no
    reason to differ.
    """
    if tensor.shape == right.shape:
        return tensor
    if tensor.numel() == right.numel() and tensor.shape[-1] == right.shape[-1] and tensor.ndim < right.ndim:
        return tensor.reshape(right.shape)
    if tensor.ndim != right.ndim:
        return None
    if tensor.ndim == _HIDDEN_AXES and tensor.shape[::2] == right.shape[::2] and tensor.shape[1] > right.shape[1]:
        return tensor[:, -right.shape[1] :]
    if tensor.ndim == _HIDDEN_AXES and tensor.shape[:2] == right.shape[:2] and tensor.shape[2] > right.shape[2]:
        return tensor[..., : right.shape[2]]
    if tensor.ndim > _HIDDEN_AXES and tensor.shape[-1] == right.shape[-1] and tensor.shape[-2] > right.shape[-2]:
        return tensor[..., : right.shape[-2], :]
    return None


def rows_of(
    tensor: torch.Tensor, now: Pass, side: Side
) -> tuple[torch.Tensor, tuple[NDArray[np.int64], NDArray[np.int64]] | None]:
    """A tensor as rows [N, W], those of padding left out, with (batch row, position) of each where rows are tokens."""
    rows, new = now.real_BT.shape
    real = now.real_BT
    if side == "cache" and tensor.ndim > _HIDDEN_AXES:
        seen_BS = now.seen_BS[:, : tensor.shape[-2]]
        kept = tensor.transpose(1, 2).flatten(2)[:, : seen_BS.shape[1]]
        if kept.shape[:2] == seen_BS.shape:
            place = (seen_BS.cumsum(dim=1) - 1)[seen_BS]
            row = torch.arange(rows)[:, None].expand_as(seen_BS)[seen_BS]
            return kept[seen_BS.to(kept.device)], (row.numpy(), place.numpy())
    if tensor.ndim == _HIDDEN_AXES - 1 and tensor.shape[0] == rows * new:
        tensor = tensor.reshape(rows, new, -1)
    token_shaped = tensor.ndim == _HIDDEN_AXES or (tensor.ndim > _HIDDEN_AXES and side != "argument")
    if token_shaped and tuple(tensor.shape[:2]) == (rows, new):
        kept = tensor.flatten(0, 1) if now.whole else tensor[real.to(tensor.device)]
        return (kept if kept.ndim == _HIDDEN_AXES - 1 else kept.flatten(1)), (now.row_N, now.position_N)
    if tensor.ndim == _HIDDEN_AXES and tuple(tensor.shape[:2]) == (rows, 1):
        return tensor[:, 0], (np.arange(rows), now.positions_BT[:, -1].numpy())
    # ALiBi and the like are as long as the keys, which are more in each pass: every entry is a row.
    return tensor.reshape(-1, 1), None
