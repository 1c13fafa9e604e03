"""Ports and engines for whole checks, each right or with one thing wrong: the BLOOM that the repository carries as a
bare callable, and the `hf` engine with one method changed.

`py:tests.meta.ports:NAME` names a builder at the end of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.engines.hf import HFEngine, Options
from harness.models.ports import bloom
from harness.numerics.sketch import Sketcher
from harness.values import Generation, Request, Suite
from tests.meta.engines import Scattered

#: From the logits of a call [B, T, V] and the position of each of its tokens [B, T] to the logits to return.
Change = Callable[[Tensor, Tensor], Tensor]


class Port:
    """BLOOM as a bare callable; ``change`` spoils what it returns, ``calls`` counts."""

    def __init__(self, path: Path, *, dtype: torch.dtype = torch.float32, change: Change | None = None) -> None:
        self._config, self._weights = bloom.load(Path(path), dtype, "cpu")
        self._change = change
        self.calls = 0

    def __call__(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: Any) -> Any:
        self.calls += 1
        logits_BTV, cache = bloom.forward(self._config, self._weights, input_ids, attention_mask, cache)
        return (logits_BTV if self._change is None else self._change(logits_BTV, position_ids)), cache


def at(position: int, column: int, value: float, *, add: bool = False) -> Change:
    """One logit of one position of a sequence is another; with ``add`` it is larger by ``value``."""

    def change(logits_BTV: Tensor, position_BT: Tensor) -> Tensor:
        here = position_BT == position
        logits_BTV[here, column] = logits_BTV[here, column] + value if add else value
        return logits_BTV

    return change


def padded(value: float) -> Change:
    """Three columns behind the vocabulary."""

    def change(logits_BTV: Tensor, _position_BT: Tensor) -> Tensor:
        return torch.nn.functional.pad(logits_BTV, (0, 3), value=value)

    return change


class Visits(Port):
    """Wrong in those visits of a sequence that ``wrong`` names: 0 is the first, and so on."""

    def __init__(self, path: Path, *, wrong: Callable[[int], bool] = lambda _visit: False) -> None:
        super().__init__(path)
        self._wrong = wrong
        self._seen: dict[tuple[int, ...], int] = {}
        self._visit = 0

    def __call__(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: Any) -> Any:
        if cache is None:
            key = tuple(input_ids.flatten().tolist())
            self._visit = self._seen.get(key, -1) + 1
            self._seen[key] = self._visit
        logits_BTV, cache = super().__call__(input_ids, position_ids, attention_mask, cache)
        if self._wrong(self._visit):
            logits_BTV[..., 3] += 0.01
        return logits_BTV, cache


class Renamed(Port):
    """Its logits have another name."""

    def __call__(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: Any) -> Any:
        logits_BTV, cache = super().__call__(input_ids, position_ids, attention_mask, cache)
        return {"scores": logits_BTV, "cache": cache}


class Told(HFEngine):
    """Free continuations go through ``change`` before they are shown."""

    def __init__(self, options: Options, change: Callable[[Generation], Generation]) -> None:
        super().__init__(options, text="told")
        self._told = change

    def generate(
        self, requests: Sequence[Request], *, batch_size: int | None, stop_ids: frozenset[int]
    ) -> list[Generation]:
        return [self._told(one) for one in super().generate(requests, batch_size=batch_size, stop_ids=stop_ids)]


class Forgetful(HFEngine):
    """Does not return all that it was asked for.

    Args:
        options: as of HFEngine.
        prompts: how many prompts of a batch it leaves out.
        steps: how many steps of each continuation its replay leaves out.
    """

    def __init__(self, options: Options, *, prompts: int = 0, steps: int = 0) -> None:
        super().__init__(options, text="forgetful")
        self._prompts, self._steps = prompts, steps

    def generate(
        self, requests: Sequence[Request], *, batch_size: int | None, stop_ids: frozenset[int]
    ) -> list[Generation]:
        found = super().generate(requests, batch_size=batch_size, stop_ids=stop_ids)
        return found[: len(found) - self._prompts]

    def replay(
        self,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[int]],
        *,
        batch_size: int | None,
        sketcher: Sketcher,
    ) -> None:
        kept = max(1, len(requests) - self._prompts)
        shorter = [tokens[: len(tokens) - self._steps] for tokens in continuations[:kept]]
        super().replay(requests[:kept], shorter, batch_size=batch_size, sketcher=sketcher)


class Tokenizing(HFEngine):
    """The ids of each prompt, as its tokenizer gives them, go through ``change``."""

    def __init__(self, options: Options, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> None:
        super().__init__(options, text="tokenizing")
        self._change = change

    def tokenize(self, suite: Suite) -> tuple[Request, ...] | None:
        from dataclasses import replace

        own = super().tokenize(suite)
        return own and tuple(replace(one, prompt_ids=self._change(one.prompt_ids)) for one in own)


class Named(HFEngine):
    """Its name promises ``declared``; ``really`` is what its live settings say besides."""

    def __init__(self, options: Options, *, declared: Mapping[str, Any], really: Mapping[str, Any]) -> None:
        super().__init__(options, text="named")
        self.declared = {**self.declared, **declared}
        self._really = really

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**super().settings, **self._really}


# --- what a SPEC names -------------------------------------------------------------------------


def right(path: Path, *, dtype: torch.dtype, device: str) -> Port:
    """The port as it is."""
    return Port(path, dtype=dtype)


def broken(path: Path, *, dtype: torch.dtype, device: str) -> Port:
    """One column is a little off, everywhere."""

    def change(logits_BTV: Tensor, _position_BT: Tensor) -> Tensor:
        logits_BTV[..., 3] += 0.01
        return logits_BTV

    return Port(path, dtype=dtype, change=change)


def not_a_number(path: Path, *, dtype: torch.dtype, device: str) -> Port:
    """One logit of one prompt position is NaN."""
    return Port(path, dtype=dtype, change=at(20, 3, float("nan")))


def raising(path: Path, *, dtype: torch.dtype, device: str) -> Port:
    """Fails in the middle of a run."""

    def change(logits_BTV: Tensor, position_BT: Tensor) -> Tensor:
        if position_BT.max() > 20:
            raise RuntimeError("no such kernel")
        return logits_BTV

    return Port(path, dtype=dtype, change=change)


def restless(path: Path) -> Scattered:
    """Right, and never twice the same bits."""
    return Scattered(Options(model=str(path), dtype="float32"))


def claiming(path: Path) -> Scattered:
    """The same, and calls itself deterministic."""
    return Scattered(Options(model=str(path), dtype="float32"), claims=True)


class Table(torch.nn.Module):
    """BLOOM as a module that registers its weights, in whatever dtype it was not asked for."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        super().__init__()
        self._config, weights = bloom.load(Path(path), dtype, "cpu")
        self._names = list(weights)
        self._held = torch.nn.ParameterList(torch.nn.Parameter(one) for one in weights.values())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, cache: Any) -> Any:
        weights = dict(zip(self._names, self._held, strict=True))
        return bloom.forward(self._config, weights, input_ids, attention_mask, cache)


def as_asked(path: Path, *, dtype: torch.dtype, device: str) -> Table:
    """A module in the dtype it is asked for."""
    return Table(path, dtype)


def float32_anyway(path: Path, *, dtype: torch.dtype, device: str) -> Table:
    """A module in float32, whatever it is asked for."""
    return Table(path, torch.float32)


def float32_inside(path: Path, *, dtype: torch.dtype, device: str) -> Port:
    """A bare callable that computes in float32, whatever it is asked for."""
    return Port(path, dtype=torch.float32)
