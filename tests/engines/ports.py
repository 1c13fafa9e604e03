"""Ports for tests: callables and modules around transformers models, and the smallest models there are."""

import inspect

import torch
from torch import nn
from transformers import DynamicCache

from harness.values import Request
from tests.support import VOCABULARY

REQUESTS = (
    Request(id="long", prompt_ids=tuple(range(5, 42)), max_new_tokens=9),
    Request(id="one", prompt_ids=(17,), max_new_tokens=12),
    Request(id="short", prompt_ids=(200, 3, 44, 44, 9), max_new_tokens=4),
)
CONTINUATIONS = ((7, 8, 9, 10), (44, 3, 120, 9, 9, 61), (250, 2))


def cached(model):
    """A port with a cache around a transformers model."""

    def forward(input_ids, position_ids, attention_mask, cache):
        past = DynamicCache() if cache is None else cache
        known = inspect.signature(model.forward).parameters
        positions = {"position_ids": position_ids} if "position_ids" in known else {}
        output = model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=past, **positions)
        return output.logits, past

    return forward


def uncached(model):
    """A port without a cache around a transformers model."""

    def forward(input_ids, position_ids, attention_mask):
        known = inspect.signature(model.forward).parameters
        positions = {"position_ids": position_ids} if "position_ids" in known else {}
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions).logits

    return forward


class Module(nn.Module):
    """The same as an nn.Module, with a cache or without."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids, position_ids, attention_mask, cache):
        return cached(self.inner)(input_ids, position_ids, attention_mask, cache)


class ModuleWithoutCache(Module):
    def forward(self, input_ids, position_ids, attention_mask):
        return uncached(self.inner)(input_ids, position_ids, attention_mask)


class Bigram(nn.Module):
    """The smallest model there is: the logits of a token are a row of a table, times a buffer."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        table = torch.randn((VOCABULARY, VOCABULARY), generator=torch.Generator().manual_seed(0))
        self.table = nn.Parameter(table.to(dtype))
        self.register_buffer("scale", torch.tensor(1.1, dtype=dtype))

    def forward(self, input_ids, attention_mask):
        return self.table[input_ids] * self.scale


def table_of(input_ids):
    """A port without weights: random logits that are a function of the token."""
    return torch.randn((VOCABULARY, VOCABULARY), generator=torch.Generator().manual_seed(0))[input_ids]
