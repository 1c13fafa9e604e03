"""The engine `bloom`: this project's own BLOOM, whose optimizations are switched one by one.

The model is harness/models/ports/ladder. It is driven as the `hf` engine drives transformers' model, through the same
loop, and shows as much of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from harness.engines import hf, spec
from harness.engines.ranks import engine as ranks
from harness.engines.ranks.layout import Layout, refusal
from harness.errors import ModelError, UsageError
from harness.models.ports.ladder import rungs as names

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from harness.models.ports.ladder.model import Bloom

#: The keys of `bloom:...`, each with what reads its value.
READERS: Mapping[str, Callable[[str], Any]] = {
    "rungs": names.parse,
    "tp": spec.positive,
    "timeout": spec.seconds,
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
        if reason := _other_type(config):
            raise ModelError(f"{source} {reason}, and {self.spec!r} runs BLOOM alone", fix="Run another model with hf:")
        dtype = getattr(torch, self.options.dtype or hf.native_dtype(config))
        refuse_unavailable(self.spec, self.options, dtype)
        with hf.model_errors(source):
            model: Any = self._built(config, source, dtype)
        placed: PreTrainedModel = self._place(model)
        return placed

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
        return {**super().settings, "engine": "bloom", **own_settings(self.model)}

    def _new_cache(self, batch: int, length: int) -> Any:
        model: Any = self.model
        cache = model.new_cache(length)
        self._cache_class = cache_name(cache)
        return cache


class BloomRanks(ranks.ParallelEngine):
    """The optimized BLOOM over several ranks, each with its shard.

    Args:
        options: layout and model.
        text: the SPEC.
    """

    def __init__(self, options: ranks.Options, *, text: str) -> None:
        super().__init__(options, text=text, name="bloom")
        assert isinstance(options.model, Options)
        self.declared = {**self.declared, "rungs": names.join(options.model.rungs)}

    def why_not(self, config: Any) -> str:
        return _other_type(config) or refusal(self.options.layout, config)


def build(parsed: spec.Spec, *, model: str | None) -> BloomEngine | BloomRanks:
    """The engine of a SPEC; ``model`` is used where the SPEC names none. With ``tp`` it runs over that many ranks.

    Raises:
        UsageError: for an unknown key or value, or rungs that cannot be together.
    """
    given = spec.read_options(parsed, READERS)
    size, timeout = given.pop("tp", 1), given.pop("timeout", None)
    options = Options(**{"model": model, **given})
    if size == 1:
        return BloomEngine(options, text=parsed.text)
    if (options.device or "cpu") != "cpu":
        problem = f"its ranks run on the CPU alone, in the spec {parsed.text!r}"
        raise UsageError(problem, fix="Leave device out, or tp")
    # A step that waits for other processes in each layer is no single function.
    options = replace(options, rungs=options.rungs - {"compiled"}) if "rungs" not in given else options
    if "compiled" in options.rungs:
        problem = f"compiled is the step of one process, in the spec {parsed.text!r}"
        raise UsageError(problem, fix="Leave compiled out of its rungs, or tp")
    more = {} if timeout is None else {"timeout": timeout}
    return BloomRanks(ranks.Options(layout=Layout(tensor=size), model=options, **more), text=parsed.text)


def refuse_unavailable(text: str, options: Options, dtype: torch.dtype) -> None:
    """Refuse rungs that cannot be had here.

    Raises:
        UsageError: with the reason.
    """
    from harness.models.ports.ladder.model import unavailable

    if reason := unavailable(options.rungs, dtype, options.device or "cpu"):
        fix = "Name other rungs, e.g. rungs=alibi+layout+gelu+softmax, or another dtype, e.g. dtype=float32"
        raise UsageError(f"{text!r} cannot run here: {reason}", fix=fix)


def own_settings(model: Any) -> dict[str, Any]:
    """What a live port has that no other model has, as `settings` names it."""
    return {"rungs": names.join(model.rungs), "attn": "sdpa" if "softmax" in model.rungs else "eager"}


def cache_name(cache: Any) -> str:
    """A cache of the port's, as `settings` names it."""
    return "preallocated" if cache.preallocated else "growing"


def _other_type(config: Any) -> str:
    return "" if config.model_type == "bloom" else f"is of the type {config.model_type!r}"


def rungs_in(text: str, precision: str) -> str:
    """The rungs of a SPEC that can be had in a precision, as a SPEC says them: kernels are not for all."""
    found = names.parse(text)
    return names.join(found if precision in ("float32", "bfloat16") else found - names.OWN)
