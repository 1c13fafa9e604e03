import random
from contextlib import contextmanager
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn

from harness import replicas, scorer
from harness.engines import hf
from harness.engines.spec import parse_spec
from harness.numerics.constants import BUCKETS, PROJECTIONS, REPLICAS, TOP
from harness.replicas import Draw
from harness.values import Moments, Request, Rows
from tests.engines.recorder import largest_difference, recorded
from tests.support import random_model

KINDS = ("bloom", "gpt2", "llama")
REQUESTS = (
    Request(id="a", prompt_ids=tuple(range(5, 105)), max_new_tokens=3),
    Request(id="b", prompt_ids=(17, 200, 4), max_new_tokens=3),
    Request(id="c", prompt_ids=tuple(range(150, 190)), max_new_tokens=3),
)
CONTINUATIONS = ((7, 8, 9), (44, 3, 120), (1, 1, 5))
VARIANTS = (
    Draw(),
    Draw(seed=1),
    Draw(seed=2, norms="fused"),
    Draw(norms="fused"),
    Draw(norms="unfused"),
    Draw(seed=3, attention="eager", norms="unfused", chunk=64),
    Draw(chunk=64),
    Draw(seed=5, norms="mixed", chunk=64),
    Draw(seed=6, pieces=2),
    Draw(seed=7, pieces=4, norms="fused"),
    Draw(seed=8, fused=True),
)
#: What the default draws count as at least, of a model with 2 layers: enough for the tail of Student's t.
FEWEST_EFFECTIVE = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One model directory of each kind, bf16 weights, no tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        random_model(kind, dtype="bfloat16").save_pretrained(root / kind)
    return root


@contextmanager
def opened(models, kind, dtype):
    """The open engine of a kind in one precision."""
    with hf.build(parse_spec(f"hf:dtype={dtype}"), model=str(models / kind)) as engine:
        yield engine


def logits(engine, variant):
    """All logits of one replica."""
    with replicas.applied(engine.model, variant):
        return recorded(engine, "prefill", REQUESTS, CONTINUATIONS, chunk=variant.chunk)


# --- drawing ---------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same():
    """Draws come from their seed alone; another seed gives others."""
    kernels = ("sdpa", "eager")
    assert replicas.draw(24, 5, kernels) == replicas.draw(24, 5, kernels)
    assert replicas.draw(24, 5, kernels) != replicas.draw(24, 6, kernels)


@pytest.mark.parametrize("kernels", [("eager",), ("sdpa", "eager")])
@pytest.mark.parametrize("count", [1, 2, 6, 24])
def test_as_many_are_drawn_as_asked(kernels, count):
    """The plain reference comes first, each further kernel once without anything else, then the drawn ones."""
    drawn = replicas.draw(count, 0, kernels)
    assert len(drawn) == count
    assert drawn[0] == Draw()
    assert drawn[1 : len(kernels)] == [Draw(attention=kernel) for kernel in kernels[1:]][: count - 1]
    assert all(each.seed is not None for each in drawn[len(kernels) :])
    assert len({each.seed for each in drawn[len(kernels) :]}) == len(drawn[len(kernels) :])


def test_the_first_draws_do_not_depend_on_the_count():
    """A longer list begins with the shorter one, and with `wide` all but the plain run have wide products."""
    kernels = ("sdpa", "eager")
    assert replicas.draw(40, 5, kernels)[:24] == replicas.draw(24, 5, kernels)
    wide = replicas.draw(24, 5, kernels, wide=True)
    assert [each.wide for each in wide] == [False] + [True] * 23
    assert [replace(each, wide=False) for each in wide] == replicas.draw(24, 5, kernels)


def test_each_way_to_vary_is_drawn():
    """Among the default number of draws every kernel, norm and kind of prefill occurs."""
    drawn = replicas.draw(REPLICAS, 0, ("sdpa", "eager"))
    assert {each.norms for each in drawn} == {None, "fused", "unfused", "mixed"}
    assert {each.attention for each in drawn} >= {"sdpa", "eager"}
    assert None in {each.chunk for each in drawn}
    assert len({each.chunk for each in drawn}) >= 3


def test_draws_say_what_they_are():
    """A draw reads as words, for the golden's list of families."""
    assert str(Draw()) == "whole sums, attention as loaded, norms as loaded, one prefill"
    assert str(Draw(seed=1, attention="eager", norms="fused", chunk=64)) == (
        "sums in drawn pieces, eager, fused norms, prefill by 64"
    )
    assert str(Draw(seed=1, norms="mixed", pieces=2)) == (
        "sums in 2 pieces, attention as loaded, mixed norms, one prefill"
    )
    assert str(Draw(wide=True)).endswith(", fp32 products")
    assert str(Draw(fused=True)).endswith(", fused activations")
    assert str(Draw(ordered=3)).endswith(", partial sums of 3 ranks")


def test_fused_activations_are_half_of_the_draws():
    """The plain runs stay as they are, about half of the others are fused, and all else is drawn as ever."""
    kernels = ("sdpa", "eager")
    drawn = replicas.draw(200, 5, kernels, fused=True)
    assert not drawn[0].fused
    assert not drawn[1].fused
    assert 70 < sum(each.fused for each in drawn) < 130
    assert [replace(each, fused=False) for each in drawn] == replicas.draw(200, 5, kernels)


@pytest.mark.parametrize("size", [2, 4])
def test_a_declared_parallelism_is_half_of_the_draws(size):
    """The plain runs stay; of the others about half cut into so many even pieces, and all else is drawn as ever."""
    kernels = ("sdpa", "eager")
    drawn = replicas.draw(200, 5, kernels, parallel=size)
    assert drawn[:2] == replicas.draw(2, 5, kernels)
    assert {each.pieces for each in drawn[2:]} == {size, None}
    assert sum(each.pieces is not None for each in drawn[2:]) == pytest.approx(99, abs=25)
    assert all(each.seed is not None for each in drawn[2:])
    few = replicas.draw(REPLICAS, 0, kernels, parallel=size)
    assert 6 <= sum(each.pieces == size for each in few) <= 16
    assert {each.norms for each in few} == {None, "fused", "unfused", "mixed"}
    assert {each.attention for each in few} >= {"sdpa", "eager"}
    assert len({each.chunk for each in few}) >= 3
    assert all(each.pieces is None for each in replicas.draw(200, 5, kernels))


@pytest.mark.parametrize(
    ("kind", "kernels"), [("bloom", {"eager"}), ("gpt2", {"eager", "sdpa"}), ("llama", {"eager", "sdpa"})]
)
def test_kernels_are_those_of_the_model(models, kind, kernels):
    """The kernel in force comes first, then what else the architecture has."""
    with opened(models, kind, "bfloat16") as engine:
        found = replicas.kernels_of(engine.model)
        assert found[0] == engine.settings["attn"]
    assert set(found) == kernels
    assert len(found) == len(kernels)


# --- applying --------------------------------------------------------------------------------------


def patched(model):
    """Names of the modules whose forward is not their class's."""
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


def names_of(model, wanted):
    """Names of the modules of which `wanted` holds."""
    return {name for name, module in model.named_modules() if wanted(module)}


def is_sum(module):
    """Linear, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_norm(module):
    """LayerNorm or RMSNorm."""
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_sum_and_norm_is_varied(kind):
    """A seed varies every Linear and Conv1D, the head too; a style of norms every norm; a plain draw nothing."""
    model = random_model(kind)
    sums, norms = names_of(model, is_sum), names_of(model, is_norm)
    assert len(sums) > 6
    assert len(norms) >= 5
    for variant, expected in ((Draw(), set()), (Draw(seed=1), sums), (Draw(norms="fused"), norms)):
        with replicas.applied(model, variant):
            assert patched(model) == expected
    with replicas.applied(model, Draw(seed=1, norms="unfused")):
        assert patched(model) == sums | norms


@pytest.mark.parametrize("kind", KINDS)
def test_fused_activations_round_once(kind):
    """Fused, the part of the MLP between its matrices is that of float32, rounded once; in float32 nothing changes."""
    model = random_model(kind, dtype="bfloat16")
    block = (model.model.layers if kind == "llama" else model.transformer.h)[0].mlp
    inputs = 3 * torch.randn(50, 36, generator=torch.Generator().manual_seed(3)).bfloat16()

    def middle(x):
        if kind == "llama":
            return block.act_fn(block.gate_proj(x).float()) * block.up_proj(x).float()
        return (block.gelu_impl if kind == "bloom" else block.act)(x.float())

    seen = []
    last = {"llama": "down_proj", "bloom": "dense_4h_to_h", "gpt2": "c_proj"}[kind]
    with torch.no_grad():
        hook = getattr(block, last).register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
        arguments = (inputs, torch.zeros_like(inputs)) if kind == "bloom" else (inputs,)
        block(*arguments)
        with replicas.applied(model, Draw(fused=True)):
            block(*arguments)
        hook.remove()
        source = inputs if kind == "llama" else getattr(block, "dense_h_to_4h" if kind == "bloom" else "c_fc")(inputs)
        expected = middle(source)
    plain, fused = seen
    assert torch.equal(fused, expected.bfloat16())
    assert not torch.equal(plain, fused)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_activations_leave_float32_alone(models, kind):
    """In float32 a fused activation gives the same bits."""
    with opened(models, kind, "float32") as engine:
        assert largest_difference(logits(engine, Draw()), logits(engine, Draw(fused=True))) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_norms_are_drawn_one_by_one(kind):
    """With "mixed" each norm is left, rounded once or after each step by its own draw; the seed decides which."""
    model = random_model(kind)
    norms = names_of(model, is_norm)
    found = []
    for seed in range(12):
        with replicas.applied(model, Draw(seed=seed, norms="mixed")):
            found.append(frozenset(patched(model) & norms))
        with replicas.applied(model, Draw(seed=seed, norms="mixed")):
            assert patched(model) & norms == found[-1]
    assert len(set(found)) > 4
    assert set().union(*found) == norms
    assert frozenset.intersection(*found) == set()


def test_mixed_norms_are_of_both_styles():
    """In one draw some norms round as "fused" does and some as "unfused", each exactly so."""
    model = random_model("gpt2", dtype="bfloat16")
    inputs = torch.randn(7, 36, generator=torch.Generator().manual_seed(3)).bfloat16()
    norms = sorted(names_of(model, is_norm))
    outputs = {}
    for style in ("fused", "unfused"):
        with replicas.applied(model, Draw(norms=style)), torch.no_grad():
            outputs[style] = {name: model.get_submodule(name)(inputs) for name in norms}
    assert all(not torch.equal(outputs["fused"][name], outputs["unfused"][name]) for name in norms)
    mixtures = set()
    for seed in range(8):
        with replicas.applied(model, Draw(seed=seed, norms="mixed")), torch.no_grad():
            changed = patched(model) & set(norms)
            results = {name: model.get_submodule(name)(inputs) for name in changed}
        found = [style for name in changed for style in outputs if torch.equal(results[name], outputs[style][name])]
        assert len(found) == len(changed)
        mixtures.add(frozenset(found))
    assert frozenset({"fused", "unfused"}) in mixtures


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails", [False, True])
def test_applied_is_undone(kind, fails):
    """After the block, or an error in it, no forward is patched, the kernel is back and so is every bit."""
    with hf.from_model(random_model(kind, dtype="bfloat16")) as engine:
        model, kernel = engine.model, engine.model.config._attn_implementation
        before = recorded(engine, "prefill", REQUESTS, CONTINUATIONS)
        try:
            with replicas.applied(model, Draw(seed=4, attention="eager", norms="unfused")):
                assert patched(model)
                assert model.config._attn_implementation == "eager"
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        assert patched(model) == set()
        assert model.config._attn_implementation == kernel
        assert largest_difference(recorded(engine, "prefill", REQUESTS, CONTINUATIONS), before) == 0


def test_weights_are_views():
    """A draw copies no weight: what is changed in the model is changed in its replica."""
    model = random_model("llama")
    inputs = torch.randn(2, 36)
    with replicas.applied(model, Draw(seed=1)), torch.no_grad():
        before = model.lm_head(inputs)
        model.lm_head.weight[5] += 1
        assert (model.lm_head(inputs) != before)[:, 5].all()


# --- what replicas compute -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_compute_the_same_function(models, kind):
    """In float64 every variant agrees with the plain model to 1e-10: roundings move, nothing else does."""
    with opened(models, kind, "float64") as engine:
        plain = logits(engine, Draw())
        for variant in (*VARIANTS, *replicas.draw(6, 0, replicas.kernels_of(engine.model))[2:]):
            assert largest_difference(logits(engine, variant), plain) < 1e-10, str(variant)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_parallel_replicas_compute_the_same_function(models, kind, size):
    """In float64 every draw under a declared tensor parallelism agrees with the plain model to 1e-10, each of them."""
    with opened(models, kind, "float64") as engine:
        plain = logits(engine, Draw())
        drawn = replicas.draw(8, size, replicas.kernels_of(engine.model), parallel=size)
        assert {each.pieces for each in drawn} == {None, size}
        for variant in drawn:
            assert largest_difference(logits(engine, variant), plain) < 1e-10, str(variant)


def test_kernels_compute_the_same_function(models):
    """Eager and SDPA attention agree to 1e-10 in float64, left padding and chunks included."""
    for kind in ("gpt2", "llama"):
        with opened(models, kind, "float64") as engine:
            eager, sdpa = (logits(engine, Draw(attention=kernel)) for kernel in ("eager", "sdpa"))
        assert largest_difference(eager, sdpa) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_replicas_round_elsewhere(models, kind, dtype):
    """In fp32 and bf16 drawn sums differ from whole ones and from each other, and so do the two styles of norms."""
    with opened(models, kind, dtype) as engine:
        whole, one, other = (logits(engine, Draw(seed=seed)) for seed in (None, 1, 2))
        fused, unfused = (logits(engine, Draw(norms=style)) for style in ("fused", "unfused"))
    pairs = [(whole, one), (whole, other), (one, other)]
    # An RMSNorm has one place to round: in fp32 there is nothing between the two styles.
    pairs += [(whole, fused) if (kind, dtype) == ("llama", "float32") else (fused, unfused)]
    assert all(largest_difference(first, second) > 0 for first, second in pairs)


def test_the_kernel_is_really_another(models):
    """In bf16 the eager and the SDPA kernel give other bits: the setting reaches the forward pass."""
    with opened(models, "llama", "bfloat16") as engine:
        assert largest_difference(logits(engine, Draw(attention="eager")), logits(engine, Draw(attention="sdpa"))) > 0


def test_a_draw_repeats_to_the_bit(models):
    """The same draw gives the same bits: its randomness is all in its seed."""
    with opened(models, "llama", "bfloat16") as engine:
        one, again = (logits(engine, Draw(seed=9, norms="fused")) for _ in range(2))
    assert largest_difference(one, again) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_wide_products_round_once(kind):
    """With `wide` a product of fp16 operands is the fp32 product rounded once; afterwards it is the machine's own."""
    model = random_model(kind, dtype="float16")
    module = model.get_output_embeddings()
    inputs = torch.randn(5, 36, generator=torch.Generator().manual_seed(1)).half()
    with torch.no_grad():
        native = module(inputs)
        with replicas.applied(model, Draw(wide=True)):
            wide, product = module(inputs), inputs @ module.weight.T
        exact = (inputs.float() @ module.weight.float().T).half()
        assert wide.dtype == torch.float16
        assert torch.equal(wide, exact)
        assert torch.equal(product, exact)
        assert torch.equal(module(inputs), native)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_wide_products_are_of_fp16_alone(models, dtype):
    """In any other precision `wide` changes no bit."""
    with opened(models, "bloom", dtype) as engine:
        assert largest_difference(logits(engine, Draw(wide=True)), logits(engine, Draw())) == 0


@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 36, 576])
def test_cuts_cover_each_column_once(width):
    """Whatever is drawn, the pieces are a partition of the columns in order, none of them tiny but the last."""
    for seed in range(50):
        pieces = replicas._cuts(width, random.Random(seed), None)
        assert [column for piece in pieces for column in range(width)[piece]] == list(range(width))
        assert 1 <= len(pieces) <= 4
        assert pieces[0] == slice(0, width) or pieces[0].stop >= 8


@pytest.mark.parametrize("width", [1, 2, 7, 36, 54, 576])
@pytest.mark.parametrize("even", [1, 2, 3, 4, 8])
def test_even_cuts_are_even(width, even):
    """A declared parallelism cuts into so many pieces of one width, give or take a column, and never an empty one."""
    pieces = replicas._cuts(width, random.Random(0), even)
    widths = [piece.stop - piece.start for piece in pieces]
    assert [column for piece in pieces for column in range(width)[piece]] == list(range(width))
    assert len(pieces) == min(even, width)
    assert max(widths) - min(widths) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_even_pieces_are_rounded_before_they_are_added(kind):
    """A row-parallel product is the sum of its pieces' products, each rounded to 16 bits, in order."""
    model = random_model(kind, dtype="bfloat16")
    name = sorted(names_of(model, is_sum))[0]
    module = model.get_submodule(name)
    conv = type(module).__name__ == "Conv1D"
    matrix = module.weight if conv else module.weight.T
    inputs = torch.randn(5, len(matrix), generator=torch.Generator().manual_seed(1)).bfloat16()
    half = len(matrix) // 2
    with torch.no_grad():
        first, second = inputs[:, :half] @ matrix[:half], inputs[:, half:] @ matrix[half:]
        bias = torch.zeros(()) if module.bias is None else module.bias
        late = (first + second) + bias
        early = torch.nn.functional.linear(inputs[:, :half], matrix[:half].T, module.bias) + second
        for seed in range(4):
            with replicas.applied(model, Draw(seed=seed, pieces=2)):
                got = module(inputs)
            assert torch.equal(got, late.bfloat16()) or torch.equal(got, early)


@pytest.mark.parametrize(
    ("ranks", "length", "last"),
    [(2, 6, [0, 0, 0, 0, 1, 1]), (3, 12, [0] * 4 + [1] * 4 + [2] * 4), (3, 7, [0, 0, 0, 0, 1, 1, 1])],
)
def test_a_ring_ends_each_chunk_at_its_own_rank(ranks, length, last):
    """Of 2^30, -2^30 and 1 the 1 survives where it is added last; chunks are of whole 8 bytes, here of two floats."""
    if ranks == 2:
        # Two numbers have one sum, whichever is first.
        values = [torch.randn(length), torch.randn(length)]
        assert torch.equal(replicas._ring(values), values[0] + values[1])
        return
    for one in range(ranks):
        big = iter((2.0**30, -(2.0**30)))
        partials = [torch.full((length,), 1.0 if rank == one else next(big)) for rank in range(ranks)]
        kept = [place for place, value in enumerate(replicas._ring(partials)) if value == 1.0]
        assert kept == [place for place, rank in enumerate(last) if rank == one]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_in_the_order_of_ranks_are_the_same_function(models, kind, ranks):
    """Only layers that tensor parallelism sums are changed, two a block, by round-off alone, and undone."""
    with scorer.open_reference(str(models / kind), "float32") as engine:
        plain = logits(engine, Draw())
        with replicas.applied(engine.model, Draw(ordered=ranks)):
            assert len(patched(engine.model)) == 2 * engine.model.config.num_hidden_layers
        ordered = logits(engine, Draw(ordered=ranks))
        assert 0 < largest_difference(ordered, plain) < 1e-4
        assert patched(engine.model) == set()


# --- the floor -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def floors(models):
    """(centre, floor) of bf16 with the default number of replicas, for each kind."""
    return {kind: measured(models, kind, "bfloat16") for kind in KINDS}


def measured(models, kind, dtype, **more):
    """The float64 rows of a model, and its floor in one precision."""
    model = str(models / kind)
    with scorer.open_reference(model, "float64") as engine:
        centre = scorer.teacher_forced(engine, REQUESTS, CONTINUATIONS)
    return centre, replicas.measure_floor(model, REQUESTS, CONTINUATIONS, centre, dtype, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_the_draws_are_independent_enough(floors, kind):
    """The default 24 draws count as at least 12 independent ones, on a model of 2 layers."""
    _, floor = floors[kind]
    print(f"{kind}: {floor.effective:.1f} effective of {REPLICAS}")
    assert FEWEST_EFFECTIVE <= floor.effective <= REPLICAS


@pytest.mark.parametrize("kind", KINDS)
def test_a_floor_has_a_number_for_each_place(floors, kind):
    """Sigma for each row, noise for each step, sums for each replica, prompt and bucket; all of them finite."""
    centre, floor = floors[kind]
    assert floor.sigma.shape == (len(centre),)
    assert floor.pair.shape == (centre.generated.sum(),)
    assert len(floor.families) == floor.replicas == REPLICAS
    shapes = {
        **dict.fromkeys(("square", "largest", "gain", "logp", "entropy"), (len(REQUESTS), 2)),
        **dict.fromkeys(("margin", "top", "top_largest", "flips", "deficit"), (len(REQUESTS),)),
        "along": (len(REQUESTS), 2, 0), "bias": (2, PROJECTIONS), "bucket": (2, BUCKETS),
    }  # fmt: skip
    assert set(shapes) == {field.name for field in fields(Moments)}
    for name, shape in shapes.items():
        assert getattr(floor.moments, name).shape == (REPLICAS, *shape), name
    for array in (floor.sigma, floor.pair, *(getattr(floor.moments, name) for name in shapes)):
        assert np.isfinite(array).all()
        assert array.dtype == np.float32
    assert (floor.sigma > 0).all()
    assert (floor.pair > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_are_in_units_of_their_own_floor(floors, kind):
    """Over all replicas and rows the mean squared error in units of sigma is one, or less where sigma has its floor."""
    centre, floor = floors[kind]
    squares = floor.moments.square.astype(np.float64)
    assert 0.8 < np.mean(squares.sum(axis=(1, 2)) / len(centre)) <= 1 + 1e-6
    assert squares.sum(axis=(1, 2)) == pytest.approx(floor.moments.bucket.astype(np.float64).sum(axis=(1, 2)))


def test_fp32_is_far_below_bf16(models, floors):
    """The floor of fp32 is three orders and more below that of bf16: it can see what bf16 hides."""
    _, narrow = floors["llama"]
    _, wide = measured(models, "llama", "float32", count=6)
    assert np.median(narrow.sigma / wide.sigma) > 1e3


def test_a_floor_repeats(models, floors):
    """The same seed measures the same floor; another seed another one, of about the same size."""
    _, floor = floors["llama"]
    _, again = measured(models, "llama", "bfloat16")
    _, other = measured(models, "llama", "bfloat16", seed=1)
    assert (again.sigma == floor.sigma).all()
    assert (other.sigma != floor.sigma).any()
    assert np.median(other.sigma / floor.sigma) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_directions_are_projected_on(models, kind):
    """A floor measured with directions has each replica's part along each of them, in proportion to its length."""
    rng = np.random.default_rng(3)
    centre, _ = measured(models, kind, "bfloat16", count=1)
    one = rng.normal(size=centre.projections.shape).astype(np.float16)
    _, floor = measured(models, kind, "bfloat16", count=5, directions=(one, -2 * one))
    assert floor.moments.along.shape == (5, len(REQUESTS), 2, 2)
    first, second = floor.moments.along[..., 0], floor.moments.along[..., 1]
    assert (first != 0).all()
    assert second == pytest.approx(-2 * first, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parallel_floor_is_another_one(models, kind):
    """Under a declared tensor parallelism other replicas are measured, and said to be; the size is alike."""
    _, plain = measured(models, kind, "bfloat16", count=8)
    _, parallel = measured(models, kind, "bfloat16", count=8, parallel=4)
    assert (plain.sigma != parallel.sigma).any()
    assert np.median(parallel.sigma / plain.sigma) == pytest.approx(1, abs=0.5)
    assert any("sums in 4 pieces" in family for family in parallel.families)
    assert not any("sums in 4 pieces" in family for family in plain.families)


def test_progress_counts_the_replicas(models):
    """Progress is told after each replica how many are done."""
    told = []
    measured(models, "gpt2", "bfloat16", count=3, progress=lambda *counts: told.append(counts))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_fp16_has_a_floor(models, kind):
    """The fp16 floor is one of fp32 products but for the plain run, and lies between those of fp32 and bf16."""
    _, half = measured(models, kind, "float16", count=4)
    assert ["fp32 products" in family for family in half.families] == [False, True, True, True]
    _, single = measured(models, kind, "float32", count=2)
    _, brain = measured(models, kind, "bfloat16", count=2)
    assert np.median(single.sigma) < np.median(half.sigma) < np.median(brain.sigma)


def test_a_variant_that_overflows_is_replaced(models, monkeypatch):
    """A drawn variant that is not finite is no correct implementation: the next one takes its place."""
    calls, run = [], replicas.teacher_forced

    def broken(*args):
        calls.append(args)
        rows = run(*args)
        return replace(rows, nonfinite=rows.nonfinite + 1) if len(calls) in bad else rows

    monkeypatch.setattr(replicas, "teacher_forced", broken)
    bad = {2, 4}
    _, floor = measured(models, "gpt2", "bfloat16", count=4)
    assert len(calls) == 6
    assert len(floor.moments.square) == len(floor.families) == 4
    for bad, expected in (({1}, 1), (set(range(2, 99)), 16)):  # noqa: B007  # read by `broken`
        calls.clear()
        assert measured(models, "gpt2", "bfloat16", count=4)[1] is None
        assert len(calls) == expected


def test_overflow_has_no_floor(tmp_path):
    """Where the reference itself is not finite in a precision there is no floor, instead of one full of NaN."""
    model = random_model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 1e5
    model.save_pretrained(tmp_path / "llama")
    centre, floor = measured(tmp_path, "llama", "float16", count=2)
    assert floor is None
    assert np.isfinite(centre.projections).all()


def test_condensed_by_hand():
    """A floor of two replicas on two prompts, against the formulas."""
    rng = np.random.default_rng(0)
    centre = centre_of([0, 0, 1, 1], [1, 2, 1, 2], [False, True, False, True])
    errors = rng.normal(size=(2, 4, PROJECTIONS)).astype(np.float32)
    tops = rng.normal(size=(2, 2, TOP)).astype(np.float32)
    shown = [
        replace(centre, projections=error, logp=error[:, 0], entropy=error[:, 1], top_logits=centre.top_logits + top)
        for error, top in zip(errors, tops, strict=True)
    ]
    direction = rng.normal(size=(4, PROJECTIONS)).astype(np.float16)
    floor = replicas.condense_floor(shown, centre, [direction], 2, 100, ("x", "y"))
    norms = np.sqrt((errors.astype(np.float64) ** 2).sum(axis=2))
    sigma = np.sqrt((norms**2).mean(axis=0))
    assert floor.sigma == pytest.approx(sigma, rel=1e-6)
    # The mean squared difference of two of five numbers is twice their variance.
    pair = np.sqrt((2 * tops[:, :, :5].astype(np.float64).var(axis=2, ddof=1)).mean(axis=0))
    assert floor.pair == pytest.approx(pair, rel=1e-5)
    ratio, moments = norms / sigma, floor.moments
    assert moments.square[1, 0] == pytest.approx(ratio[1, :2] ** 2, rel=1e-5)
    assert moments.largest[0, 1] == pytest.approx(ratio[0, 2:], rel=1e-5)
    along = (errors[1, 3].astype(np.float64) * direction[3].astype(np.float64)).sum() / sigma[3] ** 2
    assert moments.along[1, 1, 1, 0] == pytest.approx(along, rel=1e-5)
    assert moments.logp[1, 0, 1] == pytest.approx(errors[1, 1, 0] * np.sqrt(100) / sigma[1], rel=1e-5)
    assert moments.entropy[0, 1, 0] == pytest.approx(errors[0, 2, 1] * np.sqrt(100) / sigma[2], rel=1e-5)
    whitened = errors[0].astype(np.float64) / sigma[:, None]
    assert moments.bias[0] == pytest.approx(np.stack([whitened[[0, 2]].sum(axis=0), whitened[[1, 3]].sum(axis=0)]))
    assert moments.margin[1] == pytest.approx((tops[1, :, 0] - tops[1, :, 1]) / pair, rel=1e-4)
    assert (moments.gain == 0).all()
    assert (moments.flips == 0).all()
    assert floor.effective == pytest.approx(1)
    assert floor.families == ("x", "y")


def centre_of(requests, positions, generated):
    """Rows of zeros at these places."""
    count, new = len(requests), sum(generated)
    return Rows(
        request=np.array(requests, dtype=np.int32),
        position=np.array(positions, dtype=np.int32),
        generated=np.array(generated),
        argmax=np.zeros(count, dtype=np.int32),
        nonfinite=np.zeros(count, dtype=np.int32),
        logsumexp=np.zeros(count, dtype=np.float32),
        logp=np.zeros(count, dtype=np.float32),
        entropy=np.zeros(count, dtype=np.float32),
        projections=np.zeros((count, PROJECTIONS), dtype=np.float32),
        top_ids=np.tile(np.arange(TOP, dtype=np.int32), (new, 1)),
        top_logits=np.zeros((new, TOP), dtype=np.float32),
        fingerprint=np.zeros(new, dtype=np.int64),
    )
