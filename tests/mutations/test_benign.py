"""The held-out implementations: the same function, undone on exit, and really computed otherwise."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from harness.engines import hf
from harness.engines.spec import parse_spec
from harness.mutations import benign
from harness.mutations.benign import FAMILIES, kin_of
from harness.values import Request
from tests.engines.recorder import largest_difference, recorded
from tests.support import random_model

KINDS = ("bloom", "gpt2", "llama")
UNCOMPILED = sorted(set(FAMILIES) - {"compiled"})
#: Longer than a chunk, short, and in between: one left-padded batch.
REQUESTS = (
    Request(id="a", prompt_ids=tuple(range(5, 105)), max_new_tokens=3),
    Request(id="b", prompt_ids=(17, 200, 4), max_new_tokens=3),
    Request(id="c", prompt_ids=tuple(range(150, 190)), max_new_tokens=3),
)
CONTINUATIONS = ((7, 8, 9), (44, 3, 120), (1, 1, 5))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One model directory of each kind, bf16 weights, no tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        random_model(kind, dtype="bfloat16").save_pretrained(root / kind)
    return root


@contextmanager
def opened(models, kind, dtype, family):
    """The open engine of a family."""
    options = {"dtype": dtype, **family.options}
    text = "hf:" + ",".join(f"{key}={str(value).lower()}" for key, value in options.items())
    with hf.build(parse_spec(text), model=str(models / kind)) as engine, family.applied(engine.model):
        yield engine


def logits(models, kind, dtype, name):
    """All logits of one family, by view and place."""
    with opened(models, kind, dtype, FAMILIES[name]) as engine:
        return shown(engine)


def shown(engine):
    """The logits of a left-padded batch, through the KV cache and in one pass."""
    found = {}
    for view in ("replay", "prefill"):
        for place, row in recorded(engine, view, REQUESTS, CONTINUATIONS, batch_size=3).items():
            found[(view, *place)] = row
    return found


def relative(one, other):
    """The largest difference of two sets of logits over the largest logit."""
    assert one.keys() == other.keys()
    return largest_difference(one, other) / float(torch.stack(list(other.values())).abs().max())


# --- the same function -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_families_compute_the_same_function(models, kind):
    """In float64 every family gives the plain model's logits to 1e-9, left padding and cached decode included."""
    plain = logits(models, kind, "float64", "plain")
    assert torch.stack(list(plain.values())).std() > 0.1, "flat logits would agree with anything"
    for name in UNCOMPILED:
        assert relative(logits(models, kind, "float64", name), plain) < 1e-9, name


@pytest.mark.slow
@pytest.mark.timeout(900)  # a compiler at work, and perhaps other tests beside it
@pytest.mark.parametrize("kind", ["bloom", "llama"])  # GPT-2's is checked in float32 by tests/test_flow.py
def test_compiled_models_compute_the_same_function(models, kind):
    """A compiled model gives the plain one's logits, and was really compiled."""
    with opened(models, kind, "float64", FAMILIES["compiled"]) as engine:
        compiled = shown(engine)
        assert engine.settings["compile"] is True
    assert relative(compiled, logits(models, kind, "float64", "plain")) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_families_are_finite(models, kind, dtype):
    """In no precision does a family, padded rows and all, make a NaN or an infinity."""
    for name in UNCOMPILED:
        rows = torch.stack(list(logits(models, kind, dtype, name).values()))
        assert rows.isfinite().all(), name


# --- really otherwise --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        ("float32", ("attention", "batch-1", "norms-stepwise", "permuted", "ranks-2", "ranks-4")),
        ("bfloat16", ("attention", "head-float32", "norms-stepwise", "ranks-2", "ranks-4")),
    ],
)
def test_sums_and_roundings_are_elsewhere(models, kind, dtype, names):
    """Families that reorder sums or round elsewhere give other bits than the plain model, and than each other."""
    found = {name: logits(models, kind, dtype, name) for name in ("plain", *names)}
    for one, other in [(one, other) for one in found for other in found if one < other]:
        assert largest_difference(found[one], found[other]) > 0, f"{one} and {other}"


def test_norms_in_float32_round_once(models):
    """Llama's own norm rounds before it multiplies by its weight; in bf16 rounding once gives other bits."""
    once, plain = (logits(models, "llama", "bfloat16", name) for name in ("norms-once", "plain"))
    assert largest_difference(once, plain) > 0


@pytest.mark.parametrize(("kind", "difference"), [("bloom", 2 * 2), ("gpt2", 2 * 2), ("llama", -2 * 3)])
def test_products_are_regrouped(kind, difference):
    """Two layers: BLOOM and GPT-2 take two more products each, Llama three fewer (two of q, k, v; one of the gate)."""
    model = random_model(kind)
    counts = []
    for name in ("plain", "qkv"):
        with FAMILIES[name].applied(model), Products() as products, torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]]))
        counts.append(products.count)
    assert counts[1] - counts[0] == difference


class Products(TorchFunctionMode):
    """Counts the matrix products of weights while it is active."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.nn.functional.linear, torch.addmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ranks", [2, 4])
def test_partial_sums_are_rounded_and_the_bias_is_added_once(ranks):
    """A row-parallel layer of 54 inputs is the sum, in rank order, of bf16 products over 27 or 13 and 14 columns."""
    model = random_model("llama", dtype="bfloat16")
    module = model.model.layers[1].mlp.down_proj
    module.bias = torch.nn.Parameter(torch.randn(36, generator=torch.Generator().manual_seed(1)).bfloat16())
    x = torch.randn(5, 54, generator=torch.Generator().manual_seed(2)).bfloat16()
    sizes = {2: [27, 27], 4: [14, 14, 13, 13]}[ranks]
    with torch.no_grad():
        total = torch.zeros(5, 36, dtype=torch.bfloat16)
        for x_part, weight_part in zip(x.split(sizes, 1), module.weight.split(sizes, 1), strict=True):
            total = total + x_part @ weight_part.T
        with FAMILIES[f"ranks-{ranks}"].applied(model):
            assert torch.equal(module(x), total + module.bias)
        assert not torch.equal(module(x), total + module.bias)


def test_the_head_is_in_float32():
    """The final logits of a bf16 model are the float32 products of its bf16 numbers."""
    model = random_model("llama", dtype="bfloat16")
    x = torch.randn(4, 36, generator=torch.Generator().manual_seed(1)).bfloat16()
    with FAMILIES["head-float32"].applied(model), torch.no_grad():
        found = model.lm_head(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, x.float() @ model.lm_head.weight.float().T)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_units_are_permuted(kind):
    """Every weight of an MLP but the last bias is another, with the same entries; nothing else is."""
    model = random_model(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with FAMILIES["permuted"].applied(model):
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.flatten().sort().values, before[name].flatten().sort().values)
    last = ("dense_4h_to_h.bias", "mlp.c_proj.bias", "down_proj.bias")
    assert moved == {name for name in before if ".mlp." in name and not name.endswith(last)}


# --- undone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails", [False, True])
def test_families_are_undone(kind, fails):
    """After the block, or an error in it, forwards, kernel and weights are back, and so is every bit."""
    with hf.from_model(random_model(kind, dtype="bfloat16")) as engine:
        model = engine.model
        before, kernel = shown(engine), model.config._attn_implementation
        places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        for family in FAMILIES.values():
            try:
                with family.applied(model):
                    shown(engine)
                    if fails:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                assert fails
            assert not any("forward" in vars(module) for module in model.modules()), family.name
            assert model.config._attn_implementation == kernel
            assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
            assert largest_difference(shown(engine), before) == 0, family.name


# --- the list ----------------------------------------------------------------------------------


def test_families_say_what_they_are():
    """Eleven families or more, each under its own name with one short line, and options that the engine has."""
    assert len(FAMILIES) >= 11
    for name, family in FAMILIES.items():
        assert family.name == name
        assert 0 < len(family.what) < 80
        assert "\n" not in family.what
        assert set(family.options) <= set(hf.READERS)


def test_families_of_one_kin_are_left_out_together():
    """Two and four ranks are one kin; any other family, and a name that is not known, is its own."""
    assert kin_of("ranks-2") == kin_of("ranks-4") == "ranks"
    assert kin_of("norms-once") == "norms-once"
    assert kin_of("nobody") == "nobody"


def test_families_are_held_out():
    """Nothing is taken from the replicas, by which the rule was made."""
    tree = ast.parse(Path(benign.__file__).read_text(encoding="utf-8"))
    sources = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any("replicas" in source for source in sources)


@pytest.mark.parametrize("name", ["permuted", "qkv", "ranks-2"])
def test_a_host_without_the_part_is_refused(name):
    """On an architecture that it does not know a family says so, instead of changing nothing."""
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(LookupError), FAMILIES[name].applied(AutoModelForCausalLM.from_config(config)):
        pass


def test_compiling_needs_a_compiler(monkeypatch):
    """Without a C++ compiler the compiled family is refused on entry."""
    monkeypatch.setattr(benign, "compiler", lambda: None)
    with pytest.raises(LookupError, match="compiler"), FAMILIES["compiled"].applied(random_model("llama")):
        pass
