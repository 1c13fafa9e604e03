import copy
import inspect
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import harness
from harness.engines import build_engine, hf, port
from harness.errors import EngineError, UsageError
from harness.numerics.sketch import Sketcher
from harness.values import Status
from tests.engines.ports import CONTINUATIONS, REQUESTS, Bigram, Module, ModuleWithoutCache, cached, table_of, uncached
from tests.engines.recorder import largest_difference, recorded
from tests.support import VOCABULARY, random_model

GOLDEN = "golden/small/small"


def opened(candidate, **options):
    """An engine around an object, with the options that a spec would set."""
    return port.PortEngine(candidate, port.Options(**options), text="port", built=options.get("dtype"))


@pytest.fixture
def model(home):
    """The golden's own model in float32."""
    return harness.reference_model(GOLDEN, dtype=torch.float32)


@pytest.mark.parametrize("thing", [7, None, object(), {"logits": 1}])
def test_what_cannot_be_called_is_no_candidate(home, thing):
    """An object that is neither a model nor a callable is bad input."""
    with pytest.raises(UsageError, match="is not a candidate"):
        harness.check(GOLDEN, thing)
    with pytest.raises(UsageError, match="is no port"):
        port.from_object(thing)


def test_what_a_port_is_given():
    """No cache at first, then the one it returned; masks grow, positions count tokens, padding is on the left."""
    calls = []

    def spy(input_ids, position_ids, attention_mask, cache):
        calls.append((input_ids, position_ids, attention_mask, cache))
        assert not torch.is_grad_enabled()
        return table_of(input_ids), len(calls)

    with opened(spy) as engine:
        del calls[:]
        engine.replay(REQUESTS[1:], CONTINUATIONS[1:], batch_size=None, sketcher=Sketcher(VOCABULARY))
    assert [cache for *_, cache in calls] == [None, 1, 2, 3, 4, 5]
    assert {one.dtype for call in calls for one in call[:3]} == {torch.int64}
    ids, positions, mask, _ = calls[0]
    assert ids.tolist() == [[0, 0, 0, 0, 17], [200, 3, 44, 44, 9]]
    assert positions.tolist() == [[0, 0, 0, 0, 0], [0, 1, 2, 3, 4]]
    assert mask.tolist() == [[0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
    ids, positions, mask, _ = calls[1]
    assert (ids.tolist(), positions.tolist()) == ([[44], [250]], [[1], [5]])
    assert mask.tolist() == [[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]]


def test_inputs_that_a_port_overwrites_are_its_own():
    """What a port does to its inputs in place does not reach the harness."""

    def greedy(input_ids, position_ids, attention_mask, cache):
        logits = table_of(input_ids)
        for tensor in (input_ids, position_ids, attention_mask):
            tensor.zero_()
        return logits, 1

    with opened(greedy) as engine, opened(table_of) as plain:
        one, other = (recorded(each, "prefill", REQUESTS, CONTINUATIONS) for each in (engine, plain))
    assert one.keys() == other.keys()
    assert largest_difference(one, other) == 0


# --- what it shows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("around", [cached, uncached, Module, ModuleWithoutCache])
def test_a_port_shows_what_transformers_shows(kind, around):
    """Around the same weights in float64, every view agrees with the `hf` engine to 1e-9, and so does the text."""
    model = random_model(kind, dtype="float64")
    with hf.from_model(model) as reference, opened(around(model)) as engine:
        views = ("replay", "prefill") if "replay" in engine.capabilities else ("prefill",)
        for view in views:
            for size in (1, None):
                shown, wanted = (
                    recorded(each, view, REQUESTS, CONTINUATIONS, batch_size=size) for each in (engine, reference)
                )
                assert shown.keys() == wanted.keys()
                assert largest_difference(shown, wanted) < 1e-9
        wanted = reference.generate(REQUESTS, batch_size=3, stop_ids=frozenset({2}))
        assert engine.continue_greedily(REQUESTS, batch_size=3, stop_ids=frozenset({2})) == wanted
        assert engine.vocabulary == VOCABULARY
        if "tokens" in engine.capabilities:
            assert engine.generate(REQUESTS, batch_size=3, stop_ids=frozenset({2})) == wanted
    assert len({token for each in wanted for token in each.tokens}) > 5, "a constant text would show nothing"


def test_without_a_mask_rows_run_one_by_one():
    """A port that cannot tell padding from tokens is never given any, whatever batch is asked for."""
    model = random_model("gpt2", dtype="float64")

    def forward(input_ids, position_ids, cache):
        assert len(input_ids) == 1
        past = DynamicCache() if cache is None else cache
        return model(input_ids=input_ids, position_ids=position_ids, past_key_values=past).logits, past

    with hf.from_model(model) as reference, opened(forward) as engine:
        assert engine.capabilities == {"tokens", "logits", "replay"}
        assert engine.limits[0].startswith("batches and padding")
        assert engine.settings["batch"] == 1
        for view in ("replay", "prefill"):
            shown = recorded(engine, view, REQUESTS, CONTINUATIONS)
            wanted = recorded(reference, view, REQUESTS, CONTINUATIONS, batch_size=1)
            assert largest_difference(shown, wanted) < 1e-9
        texts = (each.generate(REQUESTS, batch_size=1, stop_ids=frozenset()) for each in (engine, reference))
        assert next(texts) == next(texts)


class ArrayLike:
    """An array of another framework, which can be handed over by DLPack."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **more):
        return self._array.__dlpack__(**more)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: logits.numpy(),
        lambda logits: (logits.numpy(),),
        lambda logits: ArrayLike(logits.numpy()),
        lambda logits: SimpleNamespace(logits=logits),
        lambda logits: (logits.clone().requires_grad_(), None),
        lambda logits: logits.tolist(),
    ],
    ids=["numpy", "tuple", "array", "logits", "gradient", "list"],
)
def test_logits_come_in_many_forms(wrap):
    """Arrays of other frameworks, objects with `.logits` and plain lists are logits too."""
    with opened(lambda input_ids: wrap(table_of(input_ids))) as engine, opened(table_of) as plain:
        shown, wanted = (recorded(each, "prefill", REQUESTS, CONTINUATIONS) for each in (engine, plain))
        assert largest_difference(shown, wanted) == 0
        assert engine.settings["dtype"] == "float32"


def test_a_cache_beside_logits_is_taken():
    """An output object may carry the cache under its own name or as transformers calls it."""
    for name in ("cache", "past_key_values"):
        made = SimpleNamespace(logits=None, **{name: [7]})

        def forward(input_ids, attention_mask, cache, made=made):
            made.logits = table_of(input_ids)
            return made

        with opened(forward) as engine:
            assert "replay" in engine.capabilities


@pytest.mark.parametrize(
    ("candidate", "capabilities", "limits"),
    [
        (cached(None), {"tokens", "logits", "replay", "batch"}, ["settings"]),
        (uncached(None), {"logits", "batch"}, ["the decode path: the port keeps no cache", "settings"]),
        (
            lambda ids, positions, mask, cache: None,
            {"logits", "batch"},
            ["the decode path: the port takes a cache and returns none", "settings"],
        ),
        (table_of, {"logits"}, ["the decode path: the port keeps no cache", "batches and padding", "settings"]),
        (Bigram(), {"logits", "batch", "upcast"}, ["the decode path: the port keeps no cache"]),
    ],
)
def test_capabilities_and_limits(candidate, capabilities, limits, monkeypatch):
    """What a port can show follows from what it takes and returns; what it cannot is said."""
    if not isinstance(candidate, nn.Module) and candidate is not table_of:
        # Only the signature matters: the body is that of a model without one.
        returns_cache = "takes a cache" not in limits[0] and "cache" in inspect.signature(candidate).parameters
        signature = inspect.signature(candidate)

        def body(*places, **names):
            logits = table_of(names["input_ids"] if names else places[0])
            return (logits, 1) if returns_cache else logits

        body.__signature__ = signature
        candidate = body
    with opened(candidate) as engine:
        assert engine.capabilities == capabilities
        assert len(engine.limits) == len(limits)
        assert all(one.startswith(wanted) for one, wanted in zip(engine.limits, limits, strict=True))
        if "replay" not in capabilities:
            with pytest.raises(EngineError, match="keeps no cache"):
                engine.generate(REQUESTS, batch_size=1, stop_ids=frozenset())
            with pytest.raises(EngineError, match="keeps no cache"):
                engine.replay(REQUESTS, CONTINUATIONS, batch_size=1, sketcher=Sketcher(VOCABULARY))


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (None, "None for logits"),
        ((), "logits of shape [0]"),
        ("logits", "a str for logits"),
        ({"logits": 1}, "a dict for logits"),
        (object(), "a object for logits"),
        (torch.zeros(1, 1), "logits of shape [1, 1]"),
        (torch.zeros(1, 1, 0), "logits of shape [1, 1, 0]"),
        (torch.zeros(1, 2, 5), "logits of shape [1, 2, 5]"),
        (torch.zeros(2, 1, 5), "logits of shape [2, 1, 5]"),
        (torch.zeros(1, 1, 5, dtype=torch.int64), "logits of dtype int64"),
        (torch.zeros(1, 1, 5, dtype=torch.complex64), "logits of dtype complex64"),
        ((None, torch.zeros(1, 1, 5)), "None for logits"),
    ],
)
def test_what_is_not_logits_is_refused(returned, problem):
    """Any other shape or dtype is an error that says what came for which input, and what is wanted."""
    with pytest.raises(EngineError) as caught, opened(lambda input_ids: returned):
        pass
    assert f"port returned {problem} for input_ids of shape [1, 1]" in str(caught.value)
    assert "[B, T, V], here [1, 1, V]" in caught.value.fix


def test_logits_of_the_last_position_alone_are_refused():
    """A port for generation that shows one position a call is told which shape was wanted."""
    with (
        opened(lambda input_ids: table_of(input_ids)[:, -1:]) as engine,
        pytest.raises(EngineError, match=r"shape \[1, 1, 301\] for input_ids of shape \[1, 40\]") as caught,
    ):
        engine.prefill(REQUESTS, CONTINUATIONS, batch_size=1, sketcher=Sketcher(VOCABULARY))
    assert "here [1, 40, 301]" in caught.value.fix


def test_a_cache_that_is_lost_on_the_way_is_refused():
    """Once a port returned a cache, each call must return one: without it the next would start anew in silence."""

    def forgets(input_ids, cache):
        return table_of(input_ids), (1 if cache is None else None)

    with opened(forgets) as engine, pytest.raises(EngineError, match="returned no cache"):
        engine.generate(REQUESTS, batch_size=1, stop_ids=frozenset())


def test_a_class_in_place_of_its_instance_is_told_so():
    """Calling a class makes an object, not logits."""

    class Port:
        def __init__(self, input_ids):
            pass

    with pytest.raises(EngineError, match="Give an instance of the class") as caught, port.from_object(Port):
        pass
    assert "Port class returned a Port" in str(caught.value)


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_modules_dtype_is_read_back(dtype):
    """The dtype of a module is that of its weights, whatever was declared."""
    with opened(Bigram(getattr(torch, dtype)), dtype="float32") as engine:
        assert engine.settings["dtype"] == engine.settings["buffers"] == dtype
        assert engine.settings["parameters"] == VOCABULARY**2
        assert engine.settings["device"] == "cpu"
        assert (engine.settings["engine"], engine.settings["model"]) == ("py", "Bigram")
        assert engine.declared == {"dtype": "float32"}


@pytest.mark.parametrize(
    ("built", "logits", "wanted"),
    [
        (None, "float32", "float32"),
        (None, "float64", "float32"),
        (None, "bfloat16", "bfloat16"),
        ("float32", "float32", "float32"),
        ("float32", "float16", "float16"),
        ("float64", "float32", "float32"),
        ("bfloat16", "float32", "bfloat16"),
        ("bfloat16", "float16", "float16"),
        ("float16", "float16", "float16"),
    ],
)
def test_a_callables_dtype_is_the_declared_one_unless_its_logits_are_narrower(built, logits, wanted):
    """A bare callable is believed, as far as its logits allow it."""
    with opened(lambda input_ids: table_of(input_ids).to(getattr(torch, logits)), dtype=built) as engine:
        assert engine.settings["dtype"] == wanted
        assert engine.settings["parameters"] is None


def test_a_port_may_say_its_own_settings():
    """They stand beside what is read back and never in its place; of a bare callable the dtype is believed."""

    def own(input_ids):
        return table_of(input_ids)

    own.settings = {"dtype": torch.bfloat16, "engine": "hf", "threads": 99, "kernel": "mine"}
    with opened(own, dtype="float32") as engine:
        shown = engine.settings
        assert engine.limits[-1] == "settings: the port's own word"
    assert (shown["dtype"], shown["engine"], shown["kernel"]) == ("bfloat16", "py", "mine")
    assert shown["threads"] == torch.get_num_threads()
    module = Bigram()
    module.settings = {"dtype": "bfloat16"}
    with opened(module) as engine:
        assert engine.settings["dtype"] == "float32"


def test_a_module_is_left_as_it_was():
    """Evaluation mode while the engine is open, each submodule in its own mode afterwards, threads restored."""
    module = Module(random_model("llama")).train()
    module.inner.model.layers[0].eval()
    before = [part.training for part in module.modules()]
    threads = torch.get_num_threads()
    with opened(module, threads=threads + 1) as engine:
        assert not any(part.training for part in module.modules())
        assert engine.settings["threads"] == threads + 1
    assert [part.training for part in module.modules()] == before
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_a_port_that_is_entered_again_stays_open():
    """The first block closes it, and restores what it pinned."""
    module, threads = Module(random_model("llama")).train(), torch.get_num_threads()
    with opened(module, threads=threads + 1) as engine:
        with engine as again:
            assert again is engine
        assert engine.settings["threads"] == threads + 1
        assert not module.training
    assert torch.get_num_threads() == threads
    assert module.training
    assert torch.is_grad_enabled()


def test_a_module_is_left_as_it_was_when_it_fails():
    """The same where the very first call raises."""
    module = Bigram().train()
    module.forward = lambda input_ids: 1 / 0
    with pytest.raises(ZeroDivisionError), opened(module):
        pass
    assert module.training
    assert torch.is_grad_enabled()


def test_a_closed_engine_is_closed():
    """Outside its with block an engine runs nothing and shows no settings."""
    with opened(cached(random_model("llama"))) as engine:
        pass
    for use in (
        lambda: engine.settings,
        lambda: engine.generate(REQUESTS, batch_size=1, stop_ids=frozenset()),
        lambda: build_engine("py:a:b").inner,
    ):
        with pytest.raises(EngineError, match="closed"):
            use()


# --- widened ---------------------------------------------------------------------------------------


def test_a_module_is_widened_as_it_is():
    """Weights and buffers keep their rounded values, the module itself is left in its dtype."""
    module = Bigram(torch.bfloat16)
    with opened(module) as engine:
        assert "upcast" in engine.capabilities
        with engine.upcast() as wide:
            assert wide.settings["dtype"] == wide.settings["buffers"] == "float32"
            assert torch.equal(wide.port.table, module.table.float())
            assert float(wide.port.scale) == float(torch.tensor(1.1, dtype=torch.bfloat16))
            assert wide.narrow_operation() == ""
            assert wide.declared["dtype"] == "float32"
        assert engine.settings["dtype"] == "bfloat16"


def test_a_cast_inside_a_widened_module_is_seen():
    """A module that goes on in 16 bits when widened is found out, with a cache and without."""

    class Casts(Module):
        def forward(self, input_ids, position_ids, attention_mask, cache):
            logits, cache = super().forward(input_ids, position_ids, attention_mask, cache)
            return logits.bfloat16().float(), cache

    class CastsWithoutCache(Bigram):
        def forward(self, input_ids):
            return super().forward(input_ids, None).bfloat16().float()

    for module in (Casts(random_model("llama", dtype="bfloat16")), CastsWithoutCache(torch.bfloat16)):
        with opened(module) as engine, engine.upcast() as wide:
            assert "makes bfloat16" in wide.narrow_operation()


def test_a_bare_callable_cannot_be_widened():
    """Neither can a module that registers no weights: there is nothing to see."""

    class Hidden(nn.Module):
        def forward(self, input_ids):
            return table_of(input_ids)

    for candidate in (table_of, Hidden()):
        with opened(candidate) as engine:
            assert "upcast" not in engine.capabilities
            with pytest.raises(EngineError, match="shows no weights to widen"):
                engine.upcast()


# --- verdicts --------------------------------------------------------------------------------------

AROUND = {"cached": cached, "uncached": uncached, "module": Module, "module without cache": ModuleWithoutCache}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_the_right_port_passes(home, model, around):
    """The golden's own model behind a port is the same model, in each view that it has."""
    verdict = harness.check(GOLDEN, around(model))
    assert verdict.ok, str(verdict)
    views = {"replay", "generate", "prefill"} if around in (cached, Module) else {"prefill"}
    assert {one.view for one in verdict.passes} == views
    assert ("the port keeps no cache" in str(verdict)) == ("replay" not in views)


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_one_wrong_head_fails(home, model, around):
    """Two query heads exchanged in one layer: seen with a cache and without, in a module and in a callable."""
    weight = model.model.layers[1].self_attn.q_proj.weight
    with torch.no_grad():
        heads = weight.unflatten(0, (6, -1))
        heads[[0, 5]] = heads[[5, 0]].clone()
    verdict = harness.check(GOLDEN, around(model))
    assert verdict.status is Status.DEVIATES, str(verdict)


@pytest.mark.parametrize("broken", [False, True])
def test_a_module_in_16_bits_is_asked_both_questions(home, broken):
    """A module in bfloat16 is widened, and a bug below its round-off is seen in the copy."""
    model = harness.reference_model(GOLDEN, dtype=torch.bfloat16)
    if broken:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3] *= 1.05
    verdict = harness.check(GOLDEN, Module(model))
    answers = {answer.question: answer.status for answer in verdict.answers}
    assert list(answers) == ["function", "precision"]
    assert verdict.ok is not broken
    assert answers["function"].ok is not broken


def test_a_callable_in_16_bits_says_that_its_function_was_not_seen(home):
    """A bare callable cannot be widened: it is judged as shipped, and the verdict says that this is all."""
    model = harness.reference_model(GOLDEN, dtype=torch.bfloat16)
    verdict = harness.check(GOLDEN, cached(model))
    assert verdict.ok, str(verdict)
    assert verdict.settings["dtype"] == "bfloat16"
    assert verdict.answers[0].status is Status.UNMEASURED
    assert "the function: forward function cannot be widened to float32" in str(verdict)


def _ignores_cache(model):
    right = cached(model)
    return lambda input_ids, position_ids, attention_mask, cache: right(
        input_ids, position_ids, attention_mask[:, -input_ids.shape[1] :], None
    )


def _ignores_mask(model):
    right = cached(model)
    return lambda input_ids, position_ids, attention_mask, cache: right(
        input_ids, position_ids, torch.ones_like(attention_mask), cache
    )


def _ignores_positions(model):
    right = cached(model)
    return lambda input_ids, position_ids, attention_mask, cache: right(
        input_ids, torch.arange(input_ids.shape[1]).expand_as(input_ids), attention_mask, cache
    )


def _first_cache_forever(model):
    """Returns a copy of the cache as it was before the call: every step forgets the one before it."""
    right = cached(model)

    def forward(input_ids, position_ids, attention_mask, cache):
        if cache is None:
            return right(input_ids, position_ids, attention_mask, cache)
        logits, _ = right(
            input_ids, position_ids, attention_mask[:, -1 - cache.get_seq_length() :], copy.deepcopy(cache)
        )
        return logits, cache

    return forward


def _nan(model):
    right = cached(model)

    def forward(input_ids, position_ids, attention_mask, cache):
        logits, cache = right(input_ids, position_ids, attention_mask, cache)
        logits[0, -1, 5] = torch.nan
        return logits, cache

    return forward


def _raises(model):
    right = cached(model)

    def forward(input_ids, position_ids, attention_mask, cache):
        if cache is not None:
            raise ZeroDivisionError("kernel launch failed")
        return right(input_ids, position_ids, attention_mask, cache)

    return forward


def _nothing(model):
    return lambda input_ids, position_ids, attention_mask, cache: None


def _squeezed(model):
    right = uncached(model)
    return lambda input_ids, position_ids, attention_mask: right(input_ids, position_ids, attention_mask).squeeze(0)


def _fewer_columns(model):
    right = uncached(model)
    return lambda input_ids, position_ids, attention_mask: right(input_ids, position_ids, attention_mask)[..., :-1]


@pytest.mark.parametrize(
    ("broken", "status", "words"),
    [
        (_ignores_cache, Status.DEVIATES, "replay"),
        (_ignores_mask, Status.DEVIATES, "batched"),
        (_ignores_positions, Status.DEVIATES, "replay"),
        (_first_cache_forever, Status.DEVIATES, "replay"),
        (_nan, Status.STRUCTURAL, "NaN"),
        (_raises, Status.ERROR, "kernel launch failed"),
        (_nothing, Status.ERROR, "None for logits"),
        (_squeezed, Status.ERROR, "logits of shape [1, 301]"),
        (_fewer_columns, Status.STRUCTURAL, "300 logit columns"),
    ],
)
def test_broken_ports(home, model, broken, status, words):
    """Each way in which a port is commonly broken has its own status and its own words."""
    verdict = harness.check(GOLDEN, broken(model))
    assert verdict.status is status, str(verdict)
    assert words in str(verdict)


def test_what_is_broken_in_the_decode_path_alone_needs_the_decode_path(home, model):
    """The prefill view of a port whose cache is ignored is right: the verdict comes from the replay."""
    verdict = harness.check(GOLDEN, _ignores_cache(model))
    ratios = {one.view: one.ratio / one.limit for one in verdict.passes if one.ratio is not None}
    assert ratios["prefill"] < 1 < ratios["replay"]


def test_a_claim_of_determinism_is_held_to(home, model):
    """A port whose last bits are drawn anew at each call is ok, and fails as soon as it claims to be deterministic."""
    draws = random.Random(0)
    right = cached(model)

    def scattered(input_ids, position_ids, attention_mask, cache):
        logits, cache = right(input_ids, position_ids, attention_mask, cache)
        logits[..., draws.randrange(VOCABULARY)] *= 1 + 2**-23
        return logits, cache

    claims = port.PortEngine(scattered, port.Options(deterministic=True), text="claims")
    assert harness.check(GOLDEN, claims).status is Status.NONDETERMINISTIC
    assert harness.check(GOLDEN, scattered).ok
