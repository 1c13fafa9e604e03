"""The engines by name, with what each needs; nothing heavy is imported before an engine is opened."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from harness.engines import bloom, deepspeed, hf, target
from harness.engines.base import Engine
from harness.engines.ranks import engine as ranks
from harness.engines.spec import Spec, parse_spec, suggest
from harness.engines.streaming import engine as streaming
from harness.errors import UsageError

__all__ = ["ENGINES", "Engine", "Entry", "build_engine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """How an engine is made, what it is, and the packages it cannot run without."""

    build: Callable[..., Engine]
    summary: str
    packages: tuple[str, ...]

    def why_not(self) -> str | None:
        """Why it cannot run here, None where it can."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"install {', '.join(missing)}" if missing else None


ENGINES: Mapping[str, Entry] = {
    "hf": Entry(
        build=hf.build,
        summary="a transformers causal language model, from a directory",
        packages=("torch", "transformers", "safetensors"),
    ),
    "py": Entry(
        build=target.build,
        summary="a port of yours: whatever a function of a Python module returns, py:MODULE:FUNCTION",
        packages=("torch",),
    ),
    "bloom": Entry(
        build=bloom.build,
        summary="this project's optimized BLOOM, rung by rung: bloom:rungs=alibi+layout, or all of them",
        packages=("torch", "transformers", "safetensors"),
    ),
    "tp": Entry(
        build=ranks.build,
        summary="a transformers model with every layer cut into shards, one a process: tp:size=2",
        packages=("torch", "transformers", "safetensors", "accelerate"),
    ),
    "pp": Entry(
        build=ranks.build,
        summary="a transformers model with its blocks cut into stages, one a process: pp:stages=2; with size=2 both",
        packages=("torch", "transformers", "safetensors"),
    ),
    "stream": Entry(
        build=streaming.build,
        summary="a transformers checkpoint of any size, one block in memory at a time; scores whole sequences",
        packages=("torch", "transformers", "safetensors"),
    ),
    "deepspeed": Entry(
        build=deepspeed.build,
        summary="a transformers model that DeepSpeed cuts or partitions: deepspeed:tp=2, or zero=3,ranks=2,offload=cpu",
        packages=("torch", "transformers", "safetensors", "accelerate", "deepspeed"),
    ),
}


def build_engine(text: str, *, model: str | None = None) -> Engine:
    """The engine that a SPEC names, closed; ``model`` is used where the SPEC names none.

    Raises:
        UsageError: for an unknown engine, key or value, or one that cannot run here.
    """
    parsed: Spec = parse_spec(text)
    entry = ENGINES.get(parsed.engine)
    if entry is None:
        raise UsageError(f"there is no engine {parsed.engine!r}", fix=suggest(parsed.engine, ENGINES))
    reason = entry.why_not()
    if reason is not None:
        raise UsageError(f"the engine {parsed.engine!r} cannot run here", fix=f"To use it, {reason}")
    return entry.build(parsed, model=model)
