import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from harness import scorer
from harness.engines import hf
from harness.engines.spec import parse_spec
from harness.numerics import metrics
from harness.values import Request
from tests.engines.recorder import recorded
from tests.support import random_model

KINDS = ("bloom", "gpt2", "llama")
REQUESTS = (
    Request(id="a", prompt_ids=tuple(range(5, 42)), max_new_tokens=6),
    Request(id="b", prompt_ids=(17, 200, 4), max_new_tokens=9),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model directories: each kind in bf16, and a llama in fp16."""
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        random_model(kind, dtype="bfloat16").save_pretrained(root / kind)
    random_model("llama", dtype="float16").save_pretrained(root / "half")
    return root


# --- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_chosen(models, kind):
    """A small model that passes the audit is recorded in float64."""
    assert scorer.reference_precision(str(models / kind)) == ("float64", "")


def test_a_hidden_cast_falls_back_to_float32(models, monkeypatch):
    """A model that casts where the lift cannot reach is recorded in float32, and the reason names an operation."""
    forward = LlamaMLP.forward

    def narrow(self, hidden):
        return forward(self, torch.from_numpy(hidden.numpy().astype(np.float32)).to(hidden.dtype))

    monkeypatch.setattr(LlamaMLP, "forward", narrow)
    precision, reason = scorer.reference_precision(str(models / "llama"))
    assert precision == "float32"
    assert "audit failed" in reason
    assert "makes float32" in reason


def test_too_large_for_float64(models, monkeypatch):
    """A model above the limit is recorded in float32, and never opened in float64."""
    opened, build = [], scorer.open_reference
    monkeypatch.setattr(scorer, "FLOAT64_PARAMETERS", 1000)
    monkeypatch.setattr(scorer, "open_reference", lambda model, dtype: opened.append(dtype) or build(model, dtype))
    precision, reason = scorer.reference_precision(str(models / "llama"))
    assert precision == "float32"
    assert "parameters are too many" in reason
    assert opened == [None]


@pytest.mark.parametrize(
    ("dtype", "weights", "spec"),
    [
        (None, None, "hf:"),
        ("float64", None, "hf:dtype=float64"),
        ("float64", "bfloat16", "hf:dtype=float64,weights=bfloat16"),
    ],
)
def test_the_reference_is_the_hf_engine(dtype, weights, spec):
    """A reference is the hf engine with a spec that says what it is."""
    engine = scorer.open_reference("anywhere", dtype, weights=weights)
    assert isinstance(engine, hf.HFEngine)
    assert engine.spec == spec
    assert (engine.options.model, engine.options.dtype, engine.options.weights) == ("anywhere", dtype, weights)


# --- scoring ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_agrees_with_itself(models, kind):
    """The greedy tokens are the best of their rows, and every position but the first of each sequence has a row."""
    scored = scorer.score(str(models / kind), REQUESTS, stop_ids=frozenset(), precision="float64")
    assert [len(tokens) for tokens in scored.continuations] == [6, 9]
    assert scored.rows.argmax[scored.rows.generated].tolist() == [t for tokens in scored.continuations for t in tokens]
    lengths = [len(r.prompt_ids) + r.max_new_tokens for r in REQUESTS]
    expected = [(i, p) for i, length in enumerate(lengths) for p in range(1, length)]
    assert list(zip(scored.rows.request.tolist(), scored.rows.position.tolist(), strict=True)) == expected
    top = scored.rows.top_logits[:, 0]
    assert (scored.rows.token_logit[scored.rows.generated] == top).all()


def test_the_score_stops_at_stop_ids(models):
    """With stop ids a continuation ends at the first of them, and so do its rows."""
    free = scorer.score(str(models / "llama"), REQUESTS, stop_ids=frozenset(), precision="float64")
    stop = free.continuations[0][2]
    stopped = scorer.score(str(models / "llama"), REQUESTS, stop_ids=frozenset({stop}), precision="float64")
    end = free.continuations[0].index(stop) + 1
    assert stopped.continuations[0] == free.continuations[0][:end]
    assert stopped.generations[0].finish == "eos"
    assert stopped.rows.generated.sum() == sum(map(len, stopped.continuations))


def test_the_score_is_the_models_own(models):
    """Rows hold what a plain transformers forward pass gives, to the rounding of that pass."""
    scored = scorer.score(str(models / "llama"), REQUESTS, stop_ids=frozenset(), precision="float64")
    live = random_model("llama")
    for parameter in live.parameters():
        parameter.data = parameter.data.bfloat16().float()
    sequence = [*REQUESTS[1].prompt_ids, *scored.continuations[1]]
    with torch.no_grad():
        logits = live(input_ids=torch.tensor([sequence])).logits[0].double()
    mine = scored.rows.request == 1
    expected = [float(logits[p - 1, token]) for p, token in enumerate(sequence) if p]
    assert scored.rows.token_logit[mine] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert scored.rows.logsumexp[mine] == pytest.approx(logits[:-1].logsumexp(dim=-1).numpy(), rel=1e-5)


def test_chunks_are_handed_through(models):
    """A chunked pass gives the same rows within float64, by another way."""
    with scorer.open_reference(str(models / "gpt2"), "float64") as engine:
        whole, parts = (scorer.teacher_forced(engine, REQUESTS, ((5, 6), (7,)), chunk) for chunk in (None, 10))
    assert (whole.top_ids == parts.top_ids).all()
    assert parts.logsumexp == pytest.approx(whole.logsumexp, rel=1e-6)


# --- centres ---------------------------------------------------------------------------------------


def centre_of(models, name, dtype):
    """The centre of one model in one precision, and the score it belongs to."""
    model = str(models / name)
    scored = scorer.score(model, REQUESTS, stop_ids=frozenset(), precision="float64")
    return scored, scorer.cast_centre(model, REQUESTS, scored, dtype, precision="float64")


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", "bfloat16"), ("llama", "float32"), ("half", "float16"), ("half", "float32")]
)
def test_an_exact_cast_has_no_centre(models, name, dtype):
    """A cast that changes no weight needs no centre of its own: the float64 run is the centre."""
    assert centre_of(models, name, dtype)[1] is None


def test_an_inexact_cast_has_a_centre(models):
    """fp16 weights cast to bf16 move the logits: the centre holds them, the shift says how far."""
    scored, centre = centre_of(models, "half", "bfloat16")
    rows = scored.rows
    shift = metrics.error_norm(centre.projections, rows.projections)
    assert centre.shift == pytest.approx(np.sqrt(np.mean(shift**2)))
    assert centre.shift > 0
    assert centre.projections.shape == rows.projections.shape
    assert centre.top_ids.shape == rows.top_ids.shape
    parameters = dict(random_model("llama", dtype="float16").named_parameters())
    inexact = [name for name, p in parameters.items() if not torch.equal(p.bfloat16().double(), p.double())]
    assert centre.inexact_tensors == len(inexact) > 0


def test_the_centre_is_the_float64_run_of_cast_weights(models):
    """The centre is what a float64 model computes whose weights went through bf16, and nothing else is rounded."""
    scored, centre = centre_of(models, "half", "bfloat16")
    live = random_model("llama", dtype="float16").to(torch.bfloat16)
    for parameter in live.parameters():
        parameter.data = parameter.data.double()
    rope = hf.to_float64(random_model("llama"), None).model.rotary_emb
    live.model.rotary_emb.inv_freq.data = rope.inv_freq
    with hf.from_model(live) as engine:
        shown = recorded(engine, "prefill", REQUESTS, scored.continuations, batch_size=1)
    tokens = [(*r.prompt_ids, *c) for r, c in zip(REQUESTS, scored.continuations, strict=True)]
    expected = [float(shown[i, p][tokens[i][p]]) for i, p in sorted(shown)]
    # `.double()` still rounds to fp32 inside (test_float64), which is far below the shift.
    error = np.sqrt(np.mean((centre.token_logit - expected) ** 2))
    moved = np.sqrt(np.mean((scored.rows.token_logit - expected) ** 2))
    assert error < moved / 100


def test_an_overflowing_cast_is_inexact(tmp_path):
    """A bf16 weight that fp16 cannot hold counts as inexact, and so do values below its smallest."""
    model = random_model("llama", dtype="bfloat16")
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 1e6
        model.model.norm.weight[1] = 1e-9
    names = hf.inexact_tensors(model, "float16")
    assert {"lm_head.weight", "model.norm.weight"} <= set(names)


def test_options_read_the_reference_spec():
    """The reference's spec can be parsed as a user's own."""
    assert parse_spec(scorer.open_reference("x", "float64", weights="bfloat16").spec).options == {
        "dtype": "float64", "weights": "bfloat16",
    }  # fmt: skip
