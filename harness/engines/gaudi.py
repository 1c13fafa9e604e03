"""Steps of a model on Gaudi (HPU) through optimum-habana: shapes that stay, from buckets, replayed as HPU graphs.

Models that optimum-habana adapts take their KV cache from the output of the step before, at its full length from the
first; `token_idx` says how much of it counts. The rest is padding on the right, behind all that counts.

Shape legend: B batch rows, T new tokens, S tokens so far, L length of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DEVICE = "hpu"
#: Tokens of a bucket where none is named: lengths are rounded up to a multiple of it.
BUCKET = 128
_PACKAGES = ("habana_frameworks", "optimum.habana")


@dataclass(kw_only=True, slots=True)
class Cache:
    """A KV cache of fixed length; ``values`` is what the model gave with its last step, None before the first."""

    length: int
    values: Any = None


def adapt() -> None:
    """Put optimum-habana's models in the place of transformers' own, and make torch know the device.

    Raises:
        UsageError: without its packages.
    """
    missing = [name for name in _PACKAGES if not _is_there(name)]
    if missing:
        problem = f"device=hpu needs {' and '.join(missing)}"
        raise UsageError(problem, fix="On a Gaudi machine: pip install optimum-habana (with transformers 4.55)")
    import_module("habana_frameworks.torch.core")  # registers the device
    from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi

    adapt_transformers_to_gaudi()


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):  # no package around it; a module without a spec
        return False


def graphed(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's forward, captured once a shape and replayed."""
    from habana_frameworks.torch.hpu import wrap_in_hpu_graph
    from torch import nn

    class Around(nn.Module):
        """What is wrapped in the model's place, so that a copy of the model is one without graphs."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **arguments: Any) -> Any:
            return self.model(**arguments)

    wrapped: Callable[..., Any] = wrap_in_hpu_graph(Around().eval())
    return wrapped


def rounded_up(length: int, bucket: int) -> int:
    """The length of the bucket that holds so many tokens."""
    return -(-length // bucket) * bucket


def step(
    forward: Callable[..., Any],
    accepts: frozenset[str],
    input_ids_BT: torch.Tensor,
    position_ids_BT: torch.Tensor,
    attention_mask_BS: torch.Tensor,
    cache: Cache | None,
    *,
    bucket: int,
) -> torch.Tensor:
    """One forward pass in static shapes; the logits of all new tokens, [B, T, V].

    Args:
        forward: the model's.
        accepts: names of the arguments it takes.
        input_ids_BT: the new tokens.
        position_ids_BT: of each in its sequence.
        attention_mask_BS: 1 for what is attended to, padding and new tokens included.
        cache: None where none is kept.
        bucket: that a pass without a cache is filled up to.
    """
    import torch
    from habana_frameworks.torch import core

    new, length = input_ids_BT.shape[1], attention_mask_BS.shape[1]
    whole = rounded_up(new, bucket) if cache is None else cache.length
    width = whole if cache is None or cache.values is None else new
    arguments: dict[str, Any] = {
        "input_ids": _filled(input_ids_BT, width),
        "attention_mask": _filled(attention_mask_BS, whole),
        "use_cache": cache is not None,
    }
    if "position_ids" in accepts:
        arguments["position_ids"] = _filled(position_ids_BT, width)
    if cache is not None:
        arguments |= {
            "past_key_values": cache.values,
            "token_idx": torch.tensor(length, device=input_ids_BT.device),
        }
    output = forward(**arguments)
    if cache is not None:
        cache.values = output.past_key_values
    core.mark_step()  # in lazy mode nothing runs before
    logits_BTV: torch.Tensor = output.logits[:, :new]
    return logits_BTV


def _filled(tensor_BT: torch.Tensor, width: int) -> torch.Tensor:
    """The tensor with zeros on the right, [B, width]."""
    import torch

    return torch.nn.functional.pad(tensor_BT, (0, width - tensor_BT.shape[1]))
