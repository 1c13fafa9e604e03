"""Bugs of the catalogue as ports: `py:tests.meta.mutants:wc_eps` is the golden's model with the bug wc-eps.

With MUTANT_FIXED=1 in the environment the bug is taken out again: the model is the reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from harness.engines import hf
from harness.mutations.catalogue import CATALOGUE

#: What is put in stays in.
_KEPT = ExitStack()


def __getattr__(name: str) -> Callable[..., Any]:
    mutant = name.replace("_", "-")
    if mutant not in CATALOGUE:
        raise AttributeError(name)

    def build(path: Path, *, dtype: torch.dtype) -> Any:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True).eval()
        if os.environ.get("MUTANT_FIXED") != "1":
            engine = _KEPT.enter_context(hf.from_model(model))
            _KEPT.enter_context(CATALOGUE[mutant].applied(engine))
        return model

    return build
