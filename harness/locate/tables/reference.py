"""The reference's side: a configuration, and modules that have its settings, with or without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What is right.

    Attributes:
        config: of transformers, or of anything that has ``to_dict``; None where there is none.
        modules: by dotted name; empty where no model can be made of the config. Tensors may have no memory.
    """

    config: Any
    modules: Mapping[str, nn.Module]


def reference_of(reference: Any) -> Reference:
    """A live model, a config or a model directory as a reference; of the latter two a model without memory is made.

    No code of a model directory is executed.
    """
    from torch import nn

    if isinstance(reference, nn.Module):
        return Reference(config=getattr(reference, "config", None), modules=dict(reference.named_modules()))
    config = _config(Path(reference)) if isinstance(reference, (str, Path)) else reference
    return Reference(config=config, modules=_skeleton(config))


def _config(directory: Path) -> Any:
    from transformers import AutoConfig

    from harness.environment import Quiet

    try:
        with Quiet():
            return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None


def _skeleton(config: Any) -> Mapping[str, nn.Module]:
    import torch
    from transformers import AutoModelForCausalLM

    from harness.environment import Quiet

    try:
        with Quiet(), torch.device("meta"):
            return dict(AutoModelForCausalLM.from_config(config).eval().named_modules())
    except (ValueError, AttributeError, KeyError, TypeError, NotImplementedError, RuntimeError):
        return {}


def text_config(config: Any) -> Any:
    """The language model's part of a config; None of none."""
    inner = getattr(config, "get_text_config", None)
    return inner() if callable(inner) else config
