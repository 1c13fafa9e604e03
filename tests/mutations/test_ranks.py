"""Bugs for real ranks, each part by itself: what is summed, which rows are taken, what is handed over."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import ExitStack
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.engines.ranks import engine as parallel
from harness.engines.ranks.layout import Layout
from harness.engines.spec import parse_spec
from harness.mutations import hosts, ranks
from harness.mutations.catalogue import CATALOGUE
from harness.mutations.ranks import RANK_MUTATIONS
from tests.support import random_model

IDS = [one.id for one in RANK_MUTATIONS]


@pytest.fixture
def engine():
    """Makes a stand-in for a rank's engine; what it was given is put back at the end."""
    with ExitStack() as stack, torch.no_grad():

        def made(model, *, rank=0, layout=None):
            layout = layout or Layout()
            return SimpleNamespace(
                model=model, layout=layout, place=layout.place(rank), layers=range(2), _stack=stack, _full=model.config,
                _beat=lambda _name: lambda *_: None,
            )  # fmt: skip

        yield made


# --- the list ----------------------------------------------------------------------------------


def test_ids_are_there_once():
    """Two bugs of one name would hide each other."""
    assert len(set(IDS)) == len(IDS)


@pytest.mark.parametrize("one", RANK_MUTATIONS, ids=IDS)
def test_a_bug_is_told_completely(one):
    """A line of words, a reference or none, models that are shipped, a SPEC that is read, ranks that it has."""
    assert 0 < len(one.wrong) < 120
    assert "\n" not in one.wrong
    assert re.fullmatch(r"[\w.-]+/[\w.-]+#\d+|", one.reference)
    assert one.hosts
    assert one.hosts <= set(hosts.SHIPPED)
    opened = parallel.build(parse_spec(one.candidate()), model="somewhere")
    assert opened.options.model.dtype == "float32"
    module, _, function = opened.options.prepare.partition(":")
    assert module == ranks.__name__
    assert getattr(ranks, function).__doc__
    if one.where != "all":
        assert 0 < len(one.where) < opened.options.layout.world
        assert set(one.where) <= set(range(opened.options.layout.world))


@pytest.mark.parametrize("one", [one for one in RANK_MUTATIONS if one.id in CATALOGUE], ids=lambda one: one.id)
def test_a_bug_of_the_catalogue_has_its_report(one):
    """The same bug in one process names the same report."""
    assert one.reference == CATALOGUE[one.id].reference


def test_bugs_of_the_catalogue_are_among_them():
    """What the catalogue has of tensor and pipeline parallelism, and was asked for in real ranks, keeps its id."""
    asked = {
        "tp-bias-xN", "tp-qkv-chunk", "tp-bf16-reduce", "pos-alibi-rank-slopes", "pp-layers-dropped", "pp-batch-mix",
        "pp-tied-head", "wc-layer-dup",
    }  # fmt: skip
    assert asked <= set(IDS) & set(CATALOGUE)


def test_the_list_imports_no_torch():
    """Naming the bugs must not wait for torch."""
    code = "import sys; import harness.mutations.ranks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# --- sums --------------------------------------------------------------------------------------


def linear(weight_NE, bias_N):
    """A linear layer with these."""
    layer = nn.Linear(weight_NE.shape[1], weight_NE.shape[0])
    layer.weight.data, layer.bias.data = weight_NE, bias_N
    return layer


def conv1d(weight_NE, bias_N):
    """The same as GPT-2 keeps it."""
    layer = Conv1D(*weight_NE.shape)
    layer.weight.data, layer.bias.data = weight_NE.T.contiguous(), bias_N
    return layer


@pytest.mark.parametrize("kind", [linear, conv1d])
def test_the_bias_is_added_once_or_on_every_rank(kind):
    """Two shards of a layer, summed, are the layer; with the bias before the sum, the layer and a bias more."""
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 3, 8), (5, 8), (5,)))
    shards = [kind(weight[:, own], bias) for own in (slice(4), slice(4, None))]
    right = x @ weight.T + bias

    def over_ranks(early):
        partials = []
        for shard, own in zip(shards, (x[..., :4], x[..., 4:]), strict=True):
            ranks._own_forward(shard, lambda partial: partials.append(partial) or partial, early, own)
        return sum(partials) if early else sum(partials) + bias

    torch.testing.assert_close(over_ranks(early=False), right)
    torch.testing.assert_close(over_ranks(early=True), right + bias)
    # What is not summed is the rank's own product, with the bias.
    alone = ranks._own_forward(shards[0], lambda partial: partial, False, x[..., :4])
    torch.testing.assert_close(alone, x[..., :4] @ weight[:, :4].T + bias)


def test_other_sums_last_as_long_as_the_part(engine, monkeypatch):
    """A layer's own forward is in force again once the part is closed."""
    model = random_model("llama")
    layer = model.model.layers[0].self_attn.o_proj
    monkeypatch.setattr(ranks, "row_layers", lambda _engine: [layer])
    part = engine(model)
    ranks.no_reduce(part)
    assert "forward" in vars(layer)
    part._stack.close()
    assert "forward" not in vars(layer)


# --- rows of q, k and v, slopes ----------------------------------------------------------------


def rows(*values):
    """A weight [N, 1] with these rows."""
    return torch.tensor(values, dtype=torch.float32)[:, None]


def layer_of(weight_NE):
    """A layer with no bias but a vector of the same entries."""
    return SimpleNamespace(weight=weight_NE, bias=weight_NE[:, 0].clone())


def chunked(engine, whole, held):
    """Rows of ``held()`` as each of two ranks has them."""
    found = []
    for rank in range(2):
        attention = held()
        ranks._chunk(engine(random_model("llama"), rank=rank, layout=Layout(tensor=2)), attention, whole)
        layers = [one for one in vars(attention).values() if hasattr(one, "weight")]
        assert all(torch.equal(one.weight.flatten(), one.bias) for one in layers)
        found.append([one.bias.tolist() for one in layers])
    return found


def test_chunks_of_bloom(engine):
    """Rows by head, q0 k0 v0 q1 k1 v1, become q0 q1 k0 k1 v0 v1 before they are cut."""
    whole = SimpleNamespace(query_key_value=layer_of(rows(0, 1, 2, 3, 4, 5)), num_heads=2, head_dim=1)
    held = lambda: SimpleNamespace(query_key_value=layer_of(rows(9, 9, 9)))  # noqa: E731
    assert chunked(engine, whole, held) == [[[0, 3, 1]], [[4, 2, 5]]]


def test_chunks_of_gpt2(engine):
    """q0 q1 k0 k1 v0 v1 in the columns of a Conv1D are cut in the middle."""
    transposed = lambda *values: SimpleNamespace(weight=rows(*values).T, bias=rows(*values)[:, 0].clone())  # noqa: E731
    held = lambda: SimpleNamespace(c_attn=transposed(9, 9, 9))  # noqa: E731
    assert chunked(engine, SimpleNamespace(c_attn=transposed(0, 1, 2, 3, 4, 5)), held) == [[[0, 1, 2]], [[3, 4, 5]]]


def test_chunks_of_llama(engine):
    """Four rows of q, two of k, two of v: the first rank gets all of q, and reads its last rows as k and v."""
    names = ("q_proj", "k_proj", "v_proj")
    parts = [rows(0, 1, 2, 3), rows(4, 5), rows(6, 7)]
    whole = SimpleNamespace(**dict(zip(names, map(layer_of, parts), strict=True)))
    held = lambda: SimpleNamespace(  # noqa: E731
        **dict(zip(names, (layer_of(rows(9, 9)), layer_of(rows(9)), layer_of(rows(9))), strict=True))
    )
    assert chunked(engine, whole, held) == [[[0, 1], [2], [3]], [[4, 5], [6], [7]]]


@pytest.mark.parametrize("prepare", [ranks.slopes_of_the_first_rank, ranks.slopes_of_fewer_heads])
def test_slopes(engine, prepare):
    """Of 6 heads on 2 ranks both have the slopes of the first three, or those of a model of three heads."""
    model, mask = random_model("bloom"), torch.ones(2, 5, dtype=torch.int64)
    right = model.transformer.build_alibi_tensor(mask, 6, torch.float32).view(2, 6, 5)
    fewer = model.transformer.build_alibi_tensor(mask, 3, torch.float32).view(2, 3, 5)
    part = engine(model, layout=Layout(tensor=2))
    prepare(part)
    found = model.transformer.build_alibi_tensor(mask, 6, torch.float32)
    assert found.shape == (12, 1, 5)
    own = right[:, :3] if prepare is ranks.slopes_of_the_first_rank else fewer
    assert torch.equal(found.view(2, 2, 3, 5), own[:, None].expand(2, 2, 3, 5))
    assert not torch.equal(own, right[:, 3:])
    part._stack.close()
    assert torch.equal(model.transformer.build_alibi_tensor(mask, 6, torch.float32).view(2, 6, 5), right)


# --- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "llama"])
def test_a_new_model(kind):
    """Matrices are drawn with the config's own spread, others on each rank; biases are 0 and norms 1."""
    first, second = random_model(kind), random_model(kind)
    with torch.no_grad():
        ranks.initialise(first, 0)
        ranks.initialise(second, 1)
    others = dict(second.named_parameters())
    for name, held in first.named_parameters():
        if held.ndim > 1:
            assert abs(float(held.detach().std()) / first.config.initializer_range - 1) < 0.2, name
            assert not torch.equal(held, others[name])
        else:
            assert set(held.tolist()) == {0.0 if name.endswith("bias") else 1.0}, name


def test_an_older_copy_is_near():
    """Its noise is the given share of the spread; at a share of 1 nothing is left of the weights."""
    weight = torch.randn(200, 50, generator=torch.Generator().manual_seed(2))
    for strength in (0.03, 1.0):
        old = ranks._stale(weight, strength)
        likeness = float(torch.corrcoef(torch.stack([weight.flatten(), old.flatten()]))[0, 1])
        assert abs(likeness - (1 - strength**2) ** 0.5) < 0.03
        assert abs(float(old.std() / weight.std()) - 1) < 0.05


@pytest.mark.parametrize(("rank", "changes"), [(0, False), (1, True), (2, False)])
@pytest.mark.parametrize("prepare", [ranks.one_rank_at_random, ranks.one_replica_drifted])
def test_one_rank_alone(engine, prepare, rank, changes):
    """Of three ranks the second one is changed."""
    model = random_model("llama")
    before = deepcopy(model.state_dict())
    prepare(engine(model, rank=rank, layout=Layout(stages=3)))
    changed = [name for name, held in model.state_dict().items() if not torch.equal(held, before[name])]
    assert bool(changed) == changes
    if prepare is ranks.one_replica_drifted and changes:
        assert changed == ["model.norm.weight"]


@pytest.mark.parametrize("prepare", [ranks.head_at_random, ranks.head_of_before])
def test_the_head_of_the_last_stage(engine, prepare):
    """It is changed on the last stage and nowhere else."""
    for rank in range(2):
        model = random_model("llama")
        before = model.lm_head.weight.clone()
        prepare(engine(model, rank=rank, layout=Layout(stages=2)))
        assert torch.equal(model.lm_head.weight, before) == (rank == 0)


# --- stages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "llama"])
def test_a_stage_of_other_blocks_runs(engine, kind, monkeypatch):
    """Told to hold the second block alone it computes what a model of that block does, through a cache of one layer."""
    whole = random_model(kind)
    monkeypatch.setattr(ranks, "whole_model", lambda _engine: deepcopy(whole))
    part, other = engine(deepcopy(whole)), deepcopy(whole)
    ranks.hold_blocks(part, range(1, 2))
    assert part.layers == range(1, 2)
    # In the other the first block hands on what it is given.
    blocks = getattr(other.base_model, "layers" if kind == "llama" else "h")
    blocks[0].register_forward_hook(
        lambda _module, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
    )
    ids = torch.arange(3, 12)[None]
    found = part.model(ids, use_cache=True)
    assert len(found.past_key_values.layers) == 1
    torch.testing.assert_close(found.logits, other(ids).logits)


@pytest.mark.parametrize(
    ("stages", "expected"), [(2, [range(2), range(2, 4)]), (3, [range(1), range(1, 2), range(2, 3)])]
)
def test_rounded_down(engine, monkeypatch, stages, expected):
    """Five layers on two stages are two and two, on three one each."""
    held = []
    monkeypatch.setattr(ranks, "hold_blocks", lambda _engine, layers: held.append(layers))
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=5)))
    for rank in range(stages):
        ranks.remainder_dropped(engine(model, rank=rank, layout=Layout(stages=stages)))
    assert held == expected


def test_the_first_blocks_again(engine, monkeypatch):
    """A stage that holds the second block has the first one's weights in it, and its own place in the cache."""
    whole = random_model("llama")
    part = engine(deepcopy(whole))
    part.model.model.layers = part.model.model.layers[1:]
    monkeypatch.setattr(ranks, "whole_model", lambda _engine: whole)
    ranks.first_blocks_again(part)
    first = whole.model.layers[0].state_dict()
    assert all(torch.equal(held, first[name]) for name, held in part.model.model.layers[0].state_dict().items())


def test_rows_of_micro_batches_are_exchanged():
    """Of three rows and two the first two are exchanged, and the third stays; one micro-batch alone is itself."""
    one, two = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[8.0], [9.0]])
    found = ranks.exchanged([one, two])
    assert [part.flatten().tolist() for part in found] == [[8, 9, 3], [1, 2]]
    assert [part.tolist() for part in ranks.exchanged([one])] == [one.tolist()]


def test_micro_batches_of_the_first_stage_alone(engine):
    """The first stage hands over all that it has, in the wrong order, before it waits; a later one is left alone."""
    log = []
    groups = SimpleNamespace(send=lambda hidden: log.append(hidden.tolist()), flush=lambda: log.append("flush"))
    part = engine(random_model("llama"), rank=0, layout=Layout(stages=2))
    part.groups = groups
    ranks.micro_batches_exchanged(part)
    for batch in ([1.0, 2.0], [3.0]):
        for value in batch:
            groups.send(torch.tensor([value]))
        groups.flush()
    assert log == [[2.0], [1.0], "flush", [3.0], "flush"]
    later = engine(random_model("llama"), rank=1, layout=Layout(stages=2))
    later.groups = SimpleNamespace(send=None, flush=None)
    ranks.micro_batches_exchanged(later)
    assert later.groups.send is None
