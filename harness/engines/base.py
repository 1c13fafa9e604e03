"""The engine contract: something that can continue prompts, and shows what is really in force."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from harness.errors import EngineError
from harness.numerics.sketch import Sketcher
from harness.values import Generation, Request, Suite

#: What an engine may be able to show. What it cannot is `unmeasured`, never skipped in silence.
CAPABILITIES = frozenset(
    {
        "tokens", "top_logprobs", "prompt_logprobs", "logits", "replay", "modules", "inject", "upcast", "batch",
        "deterministic",
    }
)  # fmt: skip


class Engine(ABC):
    """A context manager that runs requests. Everything below is called inside its ``with`` block.

    Attributes:
        spec: the SPEC that names it in reports.
        declared: what that name promises, compared with ``settings``.
        capabilities: a subset of CAPABILITIES.
        limits: what it cannot show of itself, in words that the verdict repeats.
        progress: called with a few words while the engine works, where it takes its time.
    """

    spec: str
    declared: Mapping[str, Any]
    capabilities: frozenset[str]
    limits: tuple[str, ...] = ()
    progress: Callable[[str], None] = staticmethod(lambda _text: None)

    @abstractmethod
    def __enter__(self) -> Self:
        """Load and make ready."""

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Free everything and restore what was pinned."""

    @property
    def lost(self) -> bool:
        """Whether it is gone for good: a process of it has ended."""
        return False

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """What is in force, read back from the live engine: dtype, attention, cache, threads, weights..."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Columns of the logits."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a text by the model's own configuration; empty where it names none."""
        return frozenset()

    @abstractmethod
    def tokenize(self, suite: Suite) -> tuple[Request, ...] | None:
        """The suite resolved with the engine's own tokenizer, None where it has none."""

    @abstractmethod
    def generate(
        self, requests: Sequence[Request], *, batch_size: int | None, stop_ids: frozenset[int]
    ) -> list[Generation]:
        """Continue each request greedily on its own."""

    @abstractmethod
    def replay(
        self,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[int]],
        *,
        batch_size: int | None,
        sketcher: Sketcher,
    ) -> None:
        """Force the continuations through the running decode loop, KV cache and all; logits go to ``sketcher``.

        Every step is seen on the golden's prefix, so nothing after a first differing token is lost,
        and the decode path itself is what is tested.
        """

    @abstractmethod
    def prefill(
        self,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[int]],
        *,
        batch_size: int | None,
        sketcher: Sketcher,
    ) -> None:
        """One pass over prompt and continuation; logits at all positions go to ``sketcher``."""

    def narrow_operation(self) -> str:
        """The first operation that makes a float below 32 bits, in words; empty where there is none, or none is seen.

        A forward that was wrapped before the copy was made may still run the 16-bit model.
        """
        return ""

    def upcast(self) -> Engine:
        """A copy of the live model as loaded, its weights and buffers widened as they are; the copy is closed.

        Raises:
            EngineError: by an engine that lacks the capability.
        """
        raise EngineError(f"the engine {self.spec} cannot be widened", fix="Only one with the capability upcast can be")
