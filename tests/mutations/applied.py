"""What tests of the catalogue share: open hosts, what they show, and their whole state."""

from __future__ import annotations

import re
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch

from conftest import ROOT
from harness.engines import hf
from harness.mutations import hosts
from harness.mutations.mutation import catalogue
from harness.values import Request
from tests.engines.recorder import recorded

#: One left-padded batch of unequal prompts; ids below every host's vocabulary.
REQUESTS = (
    Request(id="long", prompt_ids=tuple(range(5, 45)), max_new_tokens=4),
    Request(id="short", prompt_ids=(17, 200, 4), max_new_tokens=4),
    Request(id="middle", prompt_ids=tuple(range(150, 167)), max_new_tokens=4),
)
CONTINUATIONS = ((7, 8, 9, 10), (44, 3, 120, 5), (1, 1, 5, 6))
VIEWS = ("replay", "prefill")


class Opened:
    """Engines by (host, dtype), opened when first asked for: loading costs more than running."""

    def __init__(self, scratch):
        self._scratch = scratch
        self._stack = ExitStack()
        self._engines = {}
        self._plain = {}

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self._stack.close()

    def engine(self, host, dtype="float64", **options):
        key = (host, dtype, *options.items())
        if key not in self._engines:
            directory = hosts.model_directory(host, goldens=ROOT / "golden", scratch=self._scratch)
            chosen = hf.Options(model=str(directory), dtype=dtype, **options)
            self._engines[key] = self._stack.enter_context(hf.HFEngine(chosen, text=f"hf:dtype={dtype}"))
        return self._engines[key]

    def plain(self, host, dtype="float64"):
        """What the engine shows without a change."""
        if (host, dtype) not in self._plain:
            self._plain[host, dtype] = shown(self.engine(host, dtype))
        return self._plain[host, dtype]


def shown(engine, views=VIEWS, batch_size=3):
    """(view, request, position) -> logits [V], float64."""
    return {
        (view, *place): row
        for view in views
        for place, row in recorded(engine, view, REQUESTS, CONTINUATIONS, batch_size=batch_size).items()
    }


def relative(one, other, views=VIEWS):
    """The largest difference of the logits of these views over the largest logit."""
    assert one.keys() == other.keys()
    keys = [key for key in other if key[0] in views]
    rows, others = (torch.stack([found[key] for key in keys]) for found in (one, other))
    return float((rows - others).abs().max() / others.abs().max())


def same_bits(one, other):
    """Whether both show the same places with the same bits, NaN included."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in other)


def state(engine):
    """All that a change may touch: tensors with their bits and places, hooks, attributes, config, engine."""
    found = {"engine": _attributes(engine), "config": engine.model.config.to_dict()}
    for name, module in engine.model.named_modules():
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks)]
        found[name] = (id(module), module.training, hooks, _attributes(module), list(module._modules))
    tensors = [*engine.model.named_parameters(remove_duplicate=False), *engine.model.named_buffers()]
    for name, tensor in tensors:
        found[name, "tensor"] = (id(tensor), tensor.data_ptr(), tensor.dtype, bits(tensor))
    return found


def bits(tensor):
    """The bytes of a tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def _attributes(owner):
    """Public and private attributes: by value where they are plain, else by identity. Torch's own tables are apart."""
    tables = {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"}
    tables |= {name for name in vars(owner) if "_hooks" in name}
    plain = (int, float, str, bool, type(None))
    return {
        name: value if isinstance(value, plain) else id(value)
        for name, value in vars(owner).items()
        if name not in tables
    }


@contextmanager
def unharmed(engine):
    """Fails where the state after the block, or after the error that ended it, is another."""
    before = state(engine)
    try:
        yield
    finally:
        assert state(engine) == before


def cases(mutations):
    """(mutation, host) in a stable order, with ids for pytest."""
    pairs = [(one, host) for one in mutations for host in sorted(one.hosts)]
    return {"argvalues": pairs, "ids": [f"{one.id}-{host}" for one, host in pairs]}


# --- what every mutation is held to ------------------------------------------------------------


def check_changes(opened, mutation, host):
    """Each strength changes the logits of each view, a weaker one less; nothing stays behind, not a bit."""
    engine, plain = opened.engine(host), opened.plain(host)
    changes = []
    for strength in mutation.strengths:
        with unharmed(engine), mutation.applied(engine, strength):
            found = shown(engine)
        changes.append([relative(found, plain, views=(view,)) for view in VIEWS])
    assert np.min(changes) > 1e-9
    assert np.all(np.diff(np.max(changes, axis=1)) < 0)
    assert same_bits(shown(engine), plain)


def check_undone_after_an_error(opened, mutation, host):
    """An error inside the block leaves nothing behind either."""
    engine = opened.engine(host)
    with pytest.raises(ZeroDivisionError), unharmed(engine), mutation.applied(engine):
        raise ZeroDivisionError


def check_16_bits(opened, mutation, host, dtype):
    """In 16 bits, and in the float32 copy of that model by itself, it changes the logits and goes away again."""
    engine = opened.engine(host, dtype)
    plain = opened.plain(host, dtype)
    with unharmed(engine), mutation.applied(engine):
        assert not same_bits(shown(engine), plain)
    with engine.upcast() as wide:
        before = shown(wide)
        with unharmed(wide), mutation.applied(wide):
            assert relative(shown(wide), before) > 1e-7
            assert same_bits(shown(engine), plain)


def check_described(mutations):
    """Ids are there once, hosts are known, and what is wrong is one short line."""
    assert len(catalogue(*mutations)) == len(mutations)
    for one in mutations:
        assert one.hosts
        assert one.hosts <= set(hosts.NAMES)
        assert 0 < len(one.wrong) < 120
        assert "\n" not in one.wrong
        assert one.strengths[0] == 1.0
        assert (one.reference == "") or re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", one.reference)
