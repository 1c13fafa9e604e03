"""One course of requests that shows what a mutation does, and where: batched, alone, one after another, in one pass."""

from contextlib import ExitStack

import pytest
import torch

from harness.engines import hf
from harness.engines.spec import parse_spec
from harness.mutations import hosts
from harness.values import Request
from tests.engines.recorder import recorded

#: One left-padded batch: behind the second piece of 16 tokens, of eight tokens or fewer, and the longest.
LENGTHS = (36, 6, 45)
STEPS = 4
#: (view, requests) in the order in which the engine gets them.
STAGES = (("replay", (0, 1, 2)), ("replay", (1,)), ("replay", (0,)), ("prefill", (0, 1, 2)))


def requests_for(vocabulary, lengths=LENGTHS, steps=STEPS):
    """Prompts of these lengths and what is forced behind them: any tokens, the same every time."""
    generator = torch.Generator().manual_seed(11)
    drawn = [torch.randint(3, vocabulary, (length + steps,), generator=generator).tolist() for length in lengths]
    requests = [
        Request(id=str(i), prompt_ids=tuple(ids[:length]), max_new_tokens=steps)
        for i, (ids, length) in enumerate(zip(drawn, lengths, strict=True))
    ]
    return requests, [tuple(ids[-steps:]) for ids in drawn]


def shown(engine, stages=STAGES, lengths=LENGTHS):
    """(stage, request, position) -> logits [V]."""
    requests, continuations = requests_for(engine.vocabulary, lengths)
    found = {}
    for stage, (view, chosen) in enumerate(stages):
        rows = recorded(
            engine, view, [requests[i] for i in chosen], [continuations[i] for i in chosen], batch_size=len(chosen)
        )
        found |= {(stage, chosen[row], position): logits for (row, position), logits in rows.items()}
    return found


def touched(active, key, *, chunk=None, stages=STAGES, lengths=LENGTHS):
    """Whether a place of the course is one where a mutation with this ``active`` may do something."""
    stage, request, position = key
    view, chosen = stages[stage]
    # The one-pass view pads whole sequences, and these are all STEPS - 1 longer.
    padding = max(lengths[i] for i in chosen) - lengths[request]
    conditions = {
        "decode": view == "replay" and position > lengths[request],
        "prefill": view == "prefill",
        "padding": padding > 0,
        "batch": len(chosen) > 1,
        "second": stage > 0,
        "chunk": chunk is not None and position + padding > chunk,
    }
    return all(conditions.get(word, True) for word in active)


def changed_at(one, other, beyond=0.0):
    """The places whose logits differ by more than that; NaN is a number far away."""
    assert one.keys() == other.keys()
    return {key for key in one if (one[key].nan_to_num(1e30) - other[key].nan_to_num(1e30)).abs().max() > beyond}


def relative(one, other):
    """The largest difference of two logits over the largest logit; infinite where one is not finite."""
    difference = (torch.stack(list(one.values())) - torch.stack(list(other.values()))).abs().max()
    return float(torch.nan_to_num(difference, nan=torch.inf) / torch.stack(list(other.values())).abs().max())


def distance(one, other):
    """The length of the difference of all logits."""
    return float((torch.stack(list(one.values())) - torch.stack(list(other.values()))).norm())


def state_of(engine):
    """All that a mutation could leave changed: tensors by their bits, and who holds what."""
    model = engine.model
    tensors = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    held = {
        name: {key: id(value) for table in tables(module) for key, value in table.items()}
        for name, module in model.named_modules()
    }
    config = {key: repr(value) for key, value in vars(model.config).items()}
    settings = {key: (id(value), value if isinstance(value, str) else "") for key, value in vars(engine).items()}
    return tensors, held, config, settings


def tables(module):
    """Where a module keeps its parts, attributes and hooks."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    plain = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    return (plain, module._modules, module._parameters, module._buffers, *hooks)


def assert_same_state(one, other):
    """Two `state_of` agree in every bit."""
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())
    assert one[1:] == other[1:]


class Engines:
    """Open engines by host, dtype and options, each with the course of the plain model, until the module ends."""

    def __init__(self, goldens, scratch, stages=STAGES):
        self._goldens, self._scratch, self._stages, self._stack = goldens, scratch, stages, ExitStack()
        self._open, self._plain = {}, {}

    def engine(self, host, dtype="float64", options=()):
        """The open engine."""
        key = (host, dtype, tuple(options))
        if key not in self._open:
            directory = hosts.model_directory(host, goldens=self._goldens, scratch=self._scratch)
            given = {**dict(options), "dtype": dtype}
            text = "hf:" + ",".join(f"{name}={value}" for name, value in given.items())
            self._open[key] = self._stack.enter_context(hf.build(parse_spec(text), model=str(directory)))
        return self._open[key]

    def plain(self, host, dtype="float64", options=()):
        """What it shows without a mutation."""
        key = (host, dtype, tuple(options))
        if key not in self._plain:
            self._plain[key] = shown(self.engine(host, dtype, options), self._stages)
        return self._plain[key]

    def close(self):
        """Close all engines."""
        self._stack.close()


def pairs(mutations):
    """(mutation, host) as parameters of a test, with readable names."""
    return [
        pytest.param(mutation, host, id=f"{mutation.id}-{host}")
        for mutation in mutations
        for host in sorted(mutation.hosts)
    ]


def assert_undone(engine, plain, before):
    """The engine is what it was: in state, and in the bits of its first stage."""
    assert_same_state(before, state_of(engine))
    after = shown(engine, STAGES[:1])
    assert not changed_at(after, {key: plain[key] for key in after})


def assert_exception_undoes(mutation, engine):
    """A failure inside the block leaves nothing behind either."""
    before = state_of(engine)
    with pytest.raises(ZeroDivisionError), mutation.applied(engine):
        raise ZeroDivisionError
    assert_same_state(before, state_of(engine))
