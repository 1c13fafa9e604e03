"""A port as an engine: an nn.Module or a callable of yours, with a KV cache or without.

    f(input_ids[B,T], position_ids[B,T], attention_mask[B,S], cache) -> logits[B,T,V] (, cache)

The first call of a sequence gets ``cache=None``; later ones get what the call before returned. ``attention_mask`` is 1
on tokens and 0 on the padding to their left, ``position_ids`` count tokens and are 0 on padding. Inputs are int64
tensors; logits may be anything that ``torch.as_tensor`` takes. A port may take fewer of the four.

Shape legend: B batch rows, T new tokens, S tokens so far (padding included), V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from harness.engines import decoding, hf, modules
from harness.engines.base import Engine
from harness.engines.convention import ARGUMENTS, convention_of, model_name, name_of
from harness.environment import Quiet, thread_count, versions
from harness.errors import EngineError, UsageError
from harness.numerics.sketch import Sketcher
from harness.values import Generation, Request, Suite

if TYPE_CHECKING:
    import torch

#: What `build` is told unless the SPEC says otherwise.
DTYPE, DEVICE = "float32", "cpu"

#: Logits of one planned prefill batch stay below this, in float32.
_LOGITS_BYTES = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What `py:MODULE:FUNCTION?key=value&...` sets.

    ``target`` is MODULE:FUNCTION. ``dtype`` and ``device`` are handed to the function: float32 and the CPU where they
    are None. ``batch`` overrides every run's size. ``deterministic`` promises that a repeat gives the same bits; None
    leaves it to what is built, and a module or a callable of yours promises nothing by itself.
    """

    target: str = ""
    model: str | None = None
    dtype: str | None = None
    device: str | None = None
    batch: int | None = None
    threads: int | None = None
    deterministic: bool | None = None


class PortEngine(Engine):
    """A module or a callable under test, used as it is.

    Args:
        port: an nn.Module or a callable, as this file's first lines say.
        options: of a SPEC; those of an object are all None.
        text: the SPEC that names it in reports.
        built: the dtype that the port was built in, None where nobody told it.

    Raises:
        UsageError: for a port that takes other arguments.
    """

    def __init__(self, port: Any, options: Options | None = None, *, text: str, built: str | None = None) -> None:
        self.spec = text
        self.options = options or Options()
        self.declared = declared_by(self.options)
        self.capabilities = frozenset()
        self._port = port
        self._built = built
        self._convention = convention_of(port)
        self._stack = ExitStack()
        self._entered = 0
        self._open = self._caches = False
        self._columns = 0
        self._logits_dtype: torch.dtype | None = None

    def __enter__(self) -> Self:
        import torch

        self._entered += 1
        if self._entered > 1:
            return self  # open already, and as it was
        self._stack = ExitStack()
        try:
            self._stack.enter_context(Quiet())
            self._stack.enter_context(thread_count(self.options.threads))
            self._stack.enter_context(torch.no_grad())
            if self._module is not None:
                self._stack.enter_context(modules.in_evaluation(self._module))
            self._open = True
            self._probe()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered = max(0, self._entered - 1)
        if self._entered:
            return
        self._open = False
        self._stack.close()

    def _probe(self) -> None:
        """Call the port with one token: it shows its vocabulary, and whether it gives a cache back."""
        import torch

        self._columns, self._logits_dtype = 0, None
        one_BT = torch.ones((1, 1), dtype=torch.int64, device=self._device)
        _, cache = self._call(one_BT * 0, one_BT * 0, one_BT, None)
        self._caches = self._takes("cache") and cache is not None
        self.capabilities = frozenset(
            {"logits"}
            | ({"tokens", "replay"} if self._caches else set())
            | ({"batch"} if self._takes("attention_mask") else set())
            | ({"upcast"} if self._tensors else set())
            | ({"deterministic"} if self.options.deterministic else set())
        )
        self.limits = tuple(self._limits())

    def _limits(self) -> Iterator[str]:
        if not self._caches:
            why = "takes a cache and returns none" if self._takes("cache") else "keeps no cache"
            yield f"the decode path: the port {why}"
        if not self._takes("attention_mask"):
            yield "batches and padding: the port takes no attention_mask, so its rows ran one by one"
        if self._module is None:
            yield "settings: " + ("the port's own word" if self.stated else "a bare callable shows none of its own")

    # --- what it is ----------------------------------------------------------------------------

    @property
    def port(self) -> Any:
        """The live port; only inside the ``with`` block."""
        if not self._open:
            raise EngineError("the engine is closed", fix="Use it inside its with block")
        return self._port

    @property
    def _module(self) -> torch.nn.Module | None:
        from torch import nn

        return self._port if isinstance(self._port, nn.Module) else None

    @property
    def _tensors(self) -> list[torch.Tensor]:
        """The floating weights of a module, else its floating buffers; none of a bare callable."""
        if self._module is None:
            return []
        weights: list[torch.Tensor] = [one for one in self._module.parameters() if one.is_floating_point()]
        return weights or [one for one in self._module.buffers() if one.is_floating_point()]

    @property
    def stated(self) -> Mapping[str, Any]:
        """What the port says of itself in an attribute ``settings``."""
        found = getattr(self._port, "settings", None)
        return found if isinstance(found, Mapping) else {}

    @property
    def _device(self) -> str:
        return str(self._tensors[0].device) if self._tensors else self.options.device or DEVICE

    @property
    def _dtype(self) -> str:
        """Read back from the weights; without any it is what the port says, or what it was built in.

        Logits that come in less than that were computed in less.
        """
        found = modules.dtypes(self._tensors)
        if found == "none":
            found = str(self.stated.get("dtype") or self._built or DTYPE).removeprefix("torch.")
        return found if self._logits_dtype is None else _narrower(found, self._logits_dtype)

    @property
    def vocabulary(self) -> int:
        return self._columns

    @property
    def settings(self) -> Mapping[str, Any]:
        import torch

        self.port  # noqa: B018  # raises when closed
        tensors = self._tensors
        known: dict[str, Any] = {
            "engine": "py",
            "model": model_name(self._port),
            "dtype": self._dtype,
            "batch": self._batch(None),
            "threads": torch.get_num_threads(),
            "device": modules.common(one.device.type for one in tensors)
            if tensors
            else torch.device(self._device).type,
            "parameters": None,
            "versions": versions(),
        }
        if self._module is not None:
            known["parameters"] = sum(parameter.numel() for parameter in self._module.parameters())
            known["buffers"] = modules.dtypes(self._module.buffers())
        return {**self.stated, **known}

    def tokenize(self, suite: Suite) -> tuple[Request, ...] | None:
        return None

    # --- running -------------------------------------------------------------------------------

    @property
    def decoder(self) -> decoding.Decoder:
        """The port as a step function."""
        return decoding.Decoder(
            step=self._step,
            new_cache=lambda _batch, _length: _Held(),
            pad_id=0,
            device=self._device,
            prefill_tokens=max(1, _LOGITS_BYTES // (4 * self.vocabulary)),
        )

    def generate(
        self, requests: Sequence[Request], *, batch_size: int | None, stop_ids: frozenset[int]
    ) -> list[Generation]:
        self._need_cache()
        return decoding.greedy(self.decoder, requests, batch_size=self._batch(batch_size), stop_ids=stop_ids)

    def continue_greedily(
        self, requests: Sequence[Request], *, batch_size: int | None, stop_ids: frozenset[int]
    ) -> list[Generation]:
        """Greedy continuations also from a port without a cache: then every step runs the whole prefix again."""
        decoder = self.decoder if self._caches else decoding.recomputing(self.decoder)
        return decoding.greedy(decoder, requests, batch_size=self._batch(batch_size), stop_ids=stop_ids)

    def replay(
        self,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[int]],
        *,
        batch_size: int | None,
        sketcher: Sketcher,
    ) -> None:
        self._need_cache()
        size = self._batch(batch_size)
        decoding.replay(self.decoder, requests, continuations, batch_size=size, sketcher=sketcher)

    def prefill(
        self,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[int]],
        *,
        batch_size: int | None,
        sketcher: Sketcher,
    ) -> None:
        size = self._batch(batch_size)
        decoding.teacher_forced(self.decoder, requests, continuations, batch_size=size, sketcher=sketcher)

    def upcast(self) -> PortEngine:
        """A copy of the live module, its weights and buffers widened to float32 as they are."""
        import torch

        if self._module is None or "upcast" not in self.capabilities:
            raise EngineError(f"{self.spec} shows no weights to widen", fix="Give an nn.Module that registers them")
        wide = modules.recast(copy.deepcopy(self._module), torch.float32)
        options = replace(self.options, dtype="float32")
        return PortEngine(wide, options, text=f"{self.spec} (upcast to float32)", built="float32")

    def narrow_operation(self) -> str:
        from harness.engines import float64

        return float64.narrow_operation(self)

    def _need_cache(self) -> None:
        if not self._caches:
            problem = f"{self.spec} keeps no cache, so it has no decode loop"
            raise EngineError(problem, fix="Take and return a cache, or ask for the view prefill alone")

    def _takes(self, argument: str) -> bool:
        return argument in self._convention.names

    def _batch(self, batch_size: int | None) -> int | None:
        """Rows in a batch: one where the port could not tell padding from tokens."""
        if not self._takes("attention_mask"):
            return 1
        return batch_size if self.options.batch is None else self.options.batch

    def _step(
        self,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        attention_mask_BS: torch.Tensor,
        cache: _Held | None,
        keep: int,
    ) -> torch.Tensor:
        before = None if cache is None else cache.held
        logits_BTV, after = self._call(input_ids_BT, position_ids_BT, attention_mask_BS, before)
        if cache is not None:
            if after is None:
                problem = f"{self.spec} returned no cache for input_ids of shape {list(input_ids_BT.shape)}"
                raise EngineError(problem, fix="Return (logits, cache) from every call, as from the first")
            cache.held = after
        return logits_BTV[:, -keep:] if keep else logits_BTV

    def _call(
        self, input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor, attention_mask_BS: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        # Copies: what a port does to its inputs in place must not reach the loop.
        tensors = (input_ids_BT.clone(), position_ids_BT.clone(), attention_mask_BS.clone())
        output = self._convention.call(self.port, dict(zip(ARGUMENTS, (*tensors, cache), strict=True)))
        logits, cache = _parts(output)
        return self._logits(logits, input_ids_BT), cache

    def _logits(self, value: Any, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """What came back as logits [B, T, V]; any other shape or dtype is refused."""
        import torch

        shape = list(input_ids_BT.shape)
        wanted = [*shape, self._columns or "V"]
        try:
            logits = torch.as_tensor(value).detach()
        except (TypeError, ValueError, RuntimeError):
            raise self._wrong(f"{article(value)} for logits", shape, wanted) from None
        found = list(logits.shape)
        if len(found) != 3 or found[:2] != shape or found[2] != (self._columns or max(1, found[2])):
            raise self._wrong(f"logits of shape {found}", shape, wanted)
        if not logits.is_floating_point():
            raise self._wrong(f"logits of dtype {modules.dtype_name(logits.dtype)}", shape, wanted)
        self._columns = found[2]
        if self._logits_dtype is None or _bits(logits.dtype) < _bits(self._logits_dtype):
            self._logits_dtype = logits.dtype
        return logits.to(self._device)

    def _wrong(self, what: str, shape: list[int], wanted: Sequence[int | str]) -> EngineError:
        given = f"input_ids of shape {shape}"
        if isinstance(self._port, type):
            return EngineError(f"{self.spec} returned {what} for {given}", fix="Give an instance of the class instead")
        fix = f"Return floating logits of shape [B, T, V], here [{', '.join(map(str, wanted))}], or (logits, cache)"
        return EngineError(f"{self.spec} returned {what} for {given}", fix=fix)


@dataclass(slots=True)
class _Held:
    """What a port returned as its cache, between two calls on one batch: None before the first."""

    held: Any = None


def _parts(output: Any) -> tuple[Any, Any]:
    """Logits and cache of whatever a port returned."""
    if hasattr(output, "logits"):
        return output.logits, getattr(output, "cache", getattr(output, "past_key_values", None))
    if isinstance(output, tuple) and output:
        return output[0], output[1] if len(output) > 1 else None
    return output, None


def article(value: Any) -> str:
    """What something is, in words."""
    return "None" if value is None else f"a {type(value).__name__}"


def _narrower(dtype: str, logits: torch.dtype) -> str:
    """The logits' dtype where it is another than ``dtype`` and no wider, else ``dtype``."""
    import torch

    no_wider = dtype in hf.DTYPES and _bits(logits) <= _bits(getattr(torch, dtype))
    return modules.dtype_name(logits) if no_wider else dtype


def _bits(dtype: torch.dtype) -> int:
    import torch

    return torch.finfo(dtype).bits


def declared_by(options: Options) -> dict[str, Any]:
    """What the spec promises, in the words of `settings`."""
    device = None if options.device is None else options.device.partition(":")[0]
    declared = {"dtype": options.dtype, "device": device, "batch": options.batch, "threads": options.threads}
    return {key: value for key, value in declared.items() if value is not None}


def from_object(port: Any, *, text: str | None = None) -> PortEngine:
    """An engine around a live nn.Module or callable, used as it is.

    Raises:
        UsageError: for what cannot be called, or takes other arguments than a port may take.
    """
    if not callable(port):
        fix = "Give an nn.Module or a callable that returns logits"
        raise UsageError(f"a {type(port).__name__} is no port, for it cannot be called", fix=fix)
    return PortEngine(port, text=text or name_of(port))
