"""The engine `bloom`: this project's own BLOOM, whose optimizations are switched one by one.

The model is harness/models/ports/ladder. It is driven as the `hf` engine drives transformers' model, through the same
loop, and shows as much of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.engines import hf, spec
from harness.errors import ModelError, UsageError
from harness.models.ports.ladder import rungs as names

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from harness.models.ports.ladder.model import Bloom

#: The keys of `bloom:...`, each with what reads its value.
READERS: Mapping[str, Callable[[str], Any]] = {
    "rungs": names.parse,
    **{key: hf.READERS[key] for key in ("model", "dtype", "batch", "chunk", "threads", "device")},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options(hf.Options):
    """What `bloom:key=value,...` sets: of `hf` what the port has, and the rungs, all of them where none is named."""

    rungs: frozenset[str] = frozenset(names.RUNGS)


class BloomEngine(hf.HFEngine):
    """The optimized BLOOM under test.

    Args:
        options: how to load and run.
        text: the SPEC that names it in reports.
        model: a live port to use as it is, instead of loading one.
    """

    options: Options

    def __init__(self, options: Options, *, text: str, model: Any = None) -> None:
        super().__init__(options, text=text, model=model)
        self.declared = {**self.declared, "rungs": names.join(options.rungs)}

    def _load(self) -> PreTrainedModel:
        import torch

        source = self.options.model
        if source is None:
            raise UsageError(f"the spec {self.spec!r} names no model", fix="Add model=DIR, or pass --model DIR")
        config = hf.load_config(source)
        if config.model_type != "bloom":
            problem = f"{source} is of the type {config.model_type!r}, and {self.spec!r} runs BLOOM alone"
            raise ModelError(problem, fix="Run another model with hf:")
        dtype = getattr(torch, self.options.dtype or hf.native_dtype(config))
        if reason := self._unavailable(dtype):
            fix = "Name other rungs, e.g. rungs=alibi+layout+gelu+softmax, or another dtype, e.g. dtype=float32"
            raise UsageError(f"{self.spec!r} cannot run here: {reason}", fix=fix)
        with hf.model_errors(source):
            model: Any = self._built(config, source, dtype)
        placed: PreTrainedModel = self._place(model)
        return placed

    def _unavailable(self, dtype: torch.dtype) -> str:
        from harness.models.ports.ladder.model import unavailable

        return unavailable(self.options.rungs, dtype, self.options.device or "cpu")

    def _built(self, config: Any, source: str, dtype: torch.dtype) -> Bloom:
        from harness.models.ports.ladder.loading import load_tensors
        from harness.models.ports.ladder.model import Bloom

        model = Bloom(config, self.options.rungs, load_tensors(source, dtype))
        model.generation_config = hf.load_generation_config(source)
        return model

    def _like(self, options: hf.Options, text: str, model: Any) -> BloomEngine:
        assert isinstance(options, Options)
        return BloomEngine(options, text=text, model=model)

    @property
    def settings(self) -> Mapping[str, Any]:
        model: Any = self.model
        return {
            **super().settings,
            "engine": "bloom",
            "rungs": names.join(model.rungs),
            "attn": "sdpa" if "softmax" in model.rungs else "eager",
        }

    def _new_cache(self, batch: int, length: int) -> Any:
        model: Any = self.model
        cache = model.new_cache(length)
        self._cache_class = "preallocated" if cache.preallocated else "growing"
        return cache


def build(parsed: spec.Spec, *, model: str | None) -> BloomEngine:
    """The engine of a SPEC; ``model`` is used where the SPEC names none.

    Raises:
        UsageError: for an unknown key or value, or rungs that cannot be together.
    """
    given = spec.read_options(parsed, READERS)
    return BloomEngine(Options(**{"model": model, **given}), text=parsed.text)


def rungs_in(text: str, precision: str) -> str:
    """The rungs of a SPEC that can be had in a precision, as a SPEC says them: kernels are not for all."""
    found = names.parse(text)
    return names.join(found if precision in ("float32", "bfloat16") else found - names.OWN)
