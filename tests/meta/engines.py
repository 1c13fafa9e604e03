"""Engines for whole checks: correct ones that never repeat a bit, and ones with a bug that no weight shows.

Each is the `hf` engine with its forward step wrapped, so that everything else is the real thing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from harness.engines.hf import HFEngine, Options
from harness.replicas import Draw, applied
from harness.values import Generation, Request


class Scattered(HFEngine):
    """Correct and never twice alike: each forward call draws anew in which pieces every product is summed.

    Args:
        options: as of HFEngine.
        seed: of the draws.
        claims: whether it calls itself deterministic all the same.
    """

    def __init__(self, options: Options, *, seed: int = 0, claims: bool = False) -> None:
        super().__init__(options, text="scattered")
        self._claims = claims
        self._draws = random.Random(seed)
        self._scatter(self)

    def upcast(self) -> HFEngine:
        wide = super().upcast()
        self._scatter(wide)
        return wide

    def _scatter(self, engine: HFEngine) -> None:
        step = engine._step
        if not self._claims:
            engine.capabilities -= {"deterministic"}

        def scattered(*arguments: Any) -> Any:
            with applied(engine.model, Draw(seed=self._draws.randrange(2**32), norms="mixed")):
                return step(*arguments)

        engine._step = scattered


class Leaking(Scattered):
    """Something of the request before this one is still there: it never was deterministic, and says so.

    Args:
        options: as of HFEngine.
        leak: "cache" mixes the earlier request's keys and values of one token into this one's; "position"
            goes on counting one place too far once there has been an earlier request.
        scatter: whether its sums are drawn anew as well, so that repeating a request tells nothing.
    """

    def __init__(self, options: Options, *, leak: str, scatter: bool) -> None:
        self._scatters = scatter
        self._earlier: list[tuple[Any, Any]] = []
        self._leak: Callable[..., Any] = {"cache": self._leak_cache, "position": self._leak_position}[leak]
        super().__init__(options)
        self.spec = f"leaking {leak}"

    def _scatter(self, engine: HFEngine) -> None:
        engine.capabilities -= {"deterministic"}
        if self._scatters:
            super()._scatter(engine)
        # A widened copy is a fresh engine: it starts without an earlier request.
        self._earlier = []
        step = engine._step

        def leaking(ids_BT: Any, position_BT: Any, mask_BS: Any, cache: Any, keep: int) -> Any:
            return self._leak(step, ids_BT, position_BT, mask_BS, cache, keep)

        engine._step = leaking

    def _leak_cache(self, step: Any, ids_BT: Any, position_BT: Any, mask_BS: Any, cache: Any, keep: int) -> Any:
        logits_BTV = step(ids_BT, position_BT, mask_BS, cache, keep)
        if cache is not None and ids_BT.shape[1] > 1:
            # The first token may be the same special one in every request: the second is not.
            own = [(layer.keys[:, :, 1].clone(), layer.values[:, :, 1].clone()) for layer in cache.layers]
            for layer, (keys, values) in zip(cache.layers, self._earlier, strict=False):
                layer.keys[:, :, 1] = (layer.keys[:, :, 1] + keys) / 2
                layer.values[:, :, 1] = (layer.values[:, :, 1] + values) / 2
            self._earlier = own
        return logits_BTV

    def _leak_position(self, step: Any, ids_BT: Any, position_BT: Any, mask_BS: Any, cache: Any, keep: int) -> Any:
        if cache is not None and ids_BT.shape[1] > 1:
            self._earlier.append((None, None))
        late = len(self._earlier) > 1 and ids_BT.shape[1] == 1
        return step(ids_BT, position_BT + 1 if late else position_BT, mask_BS, cache, keep)


class Served(HFEngine):
    """Shows tokens alone; in one prompt it takes another token once, and may go wrong some steps later.

    Args:
        options: as of HFEngine; ``show`` should be "tokens".
        prompt: id of that prompt.
        flip: (step, token): what it takes there instead of its best.
        wrong: (step, change): from that step of that prompt on ``change(model)`` is in force.
    """

    def __init__(
        self,
        options: Options,
        *,
        prompt: str,
        flip: tuple[int, int],
        wrong: tuple[int, Callable[[Any], AbstractContextManager[None]]] | None = None,
    ) -> None:
        super().__init__(options, text="served")
        self._prompt, self._flip, self._wrong = prompt, flip, wrong
        self._alone, self._made = False, 0

    def generate(
        self, requests: Sequence[Request], *, batch_size: int | None, stop_ids: frozenset[int]
    ) -> list[Generation]:
        found: dict[str, Generation] = {}
        for self._alone in (True, False):
            asked = [request for request in requests if (request.id == self._prompt) == self._alone]
            shown = super().generate(asked, batch_size=batch_size, stop_ids=stop_ids) if asked else []
            found |= {request.id: given for request, given in zip(asked, shown, strict=True)}
        return [found[request.id] for request in requests]

    def _new_cache(self, batch: int, length: int) -> Any:
        self._made = 0
        return super()._new_cache(batch, length)

    def _step(self, *arguments: Any) -> Any:
        late = self._wrong is not None and self._alone and self._made >= self._wrong[0]
        with self._wrong[1](self.model) if self._wrong is not None and late else nullcontext():
            logits_BTV = super()._step(*arguments)
        if self._alone and self._made == self._flip[0]:
            logits_BTV[0, -1, self._flip[1]] = logits_BTV[0, -1].max() + 1
        self._made += 1
        return logits_BTV
