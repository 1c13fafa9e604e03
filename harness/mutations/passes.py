"""What a model is being asked in the forward pass that runs: many bugs are of prefill, decode or chunks alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.mutations.mutation import hooked

if TYPE_CHECKING:
    import torch

    from harness.engines.hf import HFEngine


@dataclass(kw_only=True, slots=True)
class Pass:
    """The pass in progress: B rows of T new tokens, after ``past`` tokens in the KV cache (padding included).

    ``mask_BS`` is the padding mask; with a static cache it is as long as the cache.
    """

    rows: int = 0
    new: int = 0
    past: int = 0
    mask_BS: torch.Tensor | None = None

    @property
    def decoding(self) -> bool:
        """One token a row, behind others."""
        return self.new == 1 and self.past > 0

    @property
    def continuing(self) -> bool:
        """Several tokens a row, behind others: a later chunk of a prompt, or drafted tokens."""
        return self.new > 1 and self.past > 0

    def columns_BT(self) -> torch.Tensor:
        """The column of each new token in the padded batch, int64."""
        return self.columns_T().expand(self.rows, -1)

    def columns_T(self) -> torch.Tensor:
        """The columns of the new tokens, int64."""
        import torch

        return torch.arange(self.past, self.past + self.new, device=self.padding_BS().device)

    def padding_BS(self) -> torch.Tensor:
        """The padding mask, where the pass has one: the engine always gives it."""
        assert self.mask_BS is not None
        return self.mask_BS


@contextmanager
def watched(engine: HFEngine) -> Iterator[Pass]:
    """The pass in progress, renewed before the model's own forward begins.

    It hangs on the model and not on the engine, so that a deep copy of the model keeps the bug.
    """
    current = Pass()

    def observe(_model: Any, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
        current.rows, current.new = given["input_ids"].shape
        cache = given.get("past_key_values")
        current.past = 0 if cache is None else int(cache.get_seq_length())
        current.mask_BS = given.get("attention_mask")

    with hooked((engine.model, observe, True)):
        yield current
