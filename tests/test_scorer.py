from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from harness import scorer
from harness.engines import hf
from harness.engines.spec import parse_spec
from harness.numerics import metrics, quantise
from harness.values import Request, Rows
from tests.engines.recorder import recorded
from tests.support import VOCABULARY, random_model

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
    chosen = scored.rows.generated
    best = scored.rows.top_logits[:, 0].astype(np.float64) - scored.rows.logsumexp[chosen]
    # Both terms were rounded to float32 at a size of about 20.
    assert scored.rows.logp[chosen] == pytest.approx(best, abs=1e-5)
    assert (scored.rows.logp < 0).all()
    assert ((scored.rows.entropy >= 0) & (scored.rows.entropy <= np.log(VOCABULARY))).all()


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
    logp = logits[:-1].log_softmax(dim=-1)
    expected = [float(logp[p - 1, token]) for p, token in enumerate(sequence) if p]
    assert scored.rows.logp[mine] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert scored.rows.logsumexp[mine] == pytest.approx(logits[:-1].logsumexp(dim=-1).numpy(), rel=1e-5)
    assert scored.rows.entropy[mine] == pytest.approx(-(logp.exp() * logp).sum(dim=-1).numpy(), abs=1e-4)


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
    for name in ("projections", "logp", "entropy", "logsumexp", "top_logits"):
        assert getattr(centre, name).shape == getattr(rows, name).shape
        assert (getattr(centre, name) != getattr(rows, name)).any(), name
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
    logps = {key: logits.log_softmax(dim=-1) for key, logits in shown.items()}
    expected = [float(logps[i, p][tokens[i][p]]) for i, p in sorted(logps)]
    # `.double()` still rounds to fp32 inside (test_float64), which is far below the shift.
    error = np.sqrt(np.mean((centre.logp - expected) ** 2))
    moved = np.sqrt(np.mean((scored.rows.logp - expected) ** 2))
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


# --- directions ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scores(models):
    """Each model's score in float64."""
    names = (*KINDS, "half")
    return {
        name: scorer.score(str(models / name), REQUESTS, stop_ids=frozenset(), precision="float64") for name in names
    }


def shown_by(spec, model, continuations, requests=REQUESTS):
    """The rows of a spec in one teacher-forced pass."""
    with hf.build(parse_spec(spec), model=str(model)) as engine:
        return scorer.teacher_forced(engine, requests, continuations)


def same(one, other):
    """Whether two sets of rows agree in every bit."""
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in Rows.__slots__)


@pytest.mark.parametrize("kind", KINDS)
def test_a_direction_is_what_the_quantiser_does(models, scores, kind):
    """For each scheme the shift of the float64 logits that it makes, at half precision, int4 the longer one."""
    found = scorer.directions(str(models / kind), REQUESTS, scores[kind], precision="float64")
    assert list(found) == list(quantise.SCHEMES) == ["int8", "int4"]
    for scheme, direction in found.items():
        rows = shown_by(f"hf:dtype=float64,weights={scheme}", models / kind, scores[kind].continuations)
        moved = rows.projections - scores[kind].rows.projections
        assert direction.dtype == np.float16
        assert direction == pytest.approx(moved, rel=2**-10, abs=2**-14)
    assert np.linalg.norm(found["int4"].astype(float)) > 4 * np.linalg.norm(found["int8"].astype(float))


def test_a_scheme_that_changes_nothing_has_no_direction(tmp_path):
    """Weights that int8 holds exactly are not moved by it: there is no such direction, and int4 still has one."""
    model = random_model("llama")
    for _, layer, _ in hf.block_layers(model):
        codes = (layer.weight.data * 200).round().clamp(-127, 127)
        codes[:, 0] = 127
        layer.weight.data = codes / 512
    model.save_pretrained(tmp_path)
    scored = scorer.score(str(tmp_path), REQUESTS, stop_ids=frozenset(), precision="float64")
    found = scorer.directions(str(tmp_path), REQUESTS, scored, precision="float64")
    assert list(found) == ["int4"]


def test_a_direction_beyond_half_precision_is_left_out(models, scores, monkeypatch):
    """A shift that float16 cannot hold would be stored as an infinity, which no golden may hold."""
    far = replace(scores["llama"].rows, projections=scores["llama"].rows.projections + 1e6)
    with np.errstate(over="ignore"):
        found = scorer.directions(
            str(models / "llama"), REQUESTS, replace(scores["llama"], rows=far), precision="float64"
        )
    assert found == {}


# --- at check time ---------------------------------------------------------------------------------

ELSEWHERE = ((1, (5, 6, 7, 8, 9)), (0, (9, 8, 7)), (1, (5, 6, 7)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_other_continuations_are_rescored(models, kind, precision):
    """Rescoring is one teacher-forced pass over other continuations, whose `request` counts these and not prompts."""
    rows = scorer.rescore(str(models / kind), REQUESTS, ELSEWHERE, precision=precision, weights=None)
    asked = [REQUESTS[index] for index, _ in ELSEWHERE]
    expected = shown_by(f"hf:dtype={precision}", models / kind, [tokens for _, tokens in ELSEWHERE], asked)
    assert same(rows, expected)
    lengths = [len(REQUESTS[index].prompt_ids) + len(tokens) - 1 for index, tokens in ELSEWHERE]
    assert np.bincount(rows.request).tolist() == lengths
    assert np.bincount(rows.request[rows.generated]).tolist() == [len(tokens) for _, tokens in ELSEWHERE]


def test_rescoring_is_the_models_own(models):
    """What the reference says of a token on a prefix of the candidate's is what a plain forward pass says."""
    rows = scorer.rescore(str(models / "gpt2"), REQUESTS, ELSEWHERE, precision="float64", weights=None)
    live = random_model("gpt2")
    for parameter in live.parameters():
        parameter.data = parameter.data.bfloat16().float()
    for number, (index, tokens) in enumerate(ELSEWHERE):
        sequence = [*REQUESTS[index].prompt_ids, *tokens]
        with torch.no_grad():
            logp = live(input_ids=torch.tensor([sequence])).logits[0].double().log_softmax(dim=-1)
        expected = [float(logp[p - 1, token]) for p, token in enumerate(sequence) if p]
        assert rows.logp[rows.request == number] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_golden_is_rescored_to_the_bit(models, scores):
    """On its own continuations the reference says at check time what it said when it was recorded."""
    again = scorer.rescore(
        str(models / "llama"),
        REQUESTS,
        tuple(enumerate(scores["llama"].continuations)),
        precision="float64",
        weights=None,
    )
    assert same(again, scores["llama"].rows)


def test_rescoring_casts_the_weights(models):
    """Where the candidate's dtype does not hold the checkpoint, the reference's weights go through it first."""
    model = str(models / "half")
    plain, cast = (
        scorer.rescore(model, REQUESTS, ELSEWHERE, precision="float64", weights=weights)
        for weights in (None, "bfloat16")
    )
    asked = [REQUESTS[index] for index, _ in ELSEWHERE]
    tokens = [tokens for _, tokens in ELSEWHERE]
    assert same(cast, shown_by("hf:dtype=float64,weights=bfloat16", model, tokens, asked))
    assert (cast.projections != plain.projections).any()


@pytest.mark.parametrize("kind", [*KINDS, "half"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_centre_of_a_float32_candidate_is_that_of_quantised_weights(models, scores, kind, scheme):
    """In float32 dequantised weights keep every bit: the centre is the engine's own float64 run of that scheme."""
    tokens = scores[kind].continuations
    rows = scorer.quantised_centre(
        str(models / kind), REQUESTS, tokens, scheme=scheme, dtype="float32", precision="float64"
    )
    assert same(rows, shown_by(f"hf:dtype=float64,weights={scheme}", models / kind, tokens))


@pytest.mark.parametrize("kind", [*KINDS, "half"])
@pytest.mark.parametrize(("scheme", "dtype"), [("int8", "bfloat16"), ("int4", "bfloat16"), ("int8", "float16")])
def test_the_quantised_centre_casts_as_a_candidate_does(models, scores, tmp_path, kind, scheme, dtype):
    """In 16 bits the centre is the float64 run of the very weights that `hf:weights=int8` holds in that dtype."""
    tokens = scores[kind].continuations
    with hf.build(parse_spec(f"hf:dtype={dtype},weights={scheme}"), model=str(models / kind)) as engine:
        engine.model.save_pretrained(tmp_path / "cast")
    expected = shown_by("hf:dtype=float64", tmp_path / "cast", tokens)
    rows = scorer.quantised_centre(
        str(models / kind), REQUESTS, tokens, scheme=scheme, dtype=dtype, precision="float64"
    )
    assert same(rows, expected)
    uncast = scorer.quantised_centre(
        str(models / kind), REQUESTS, tokens, scheme=scheme, dtype="float32", precision="float64"
    )
    assert (rows.projections != uncast.projections).any()


def test_the_quantised_centre_takes_any_bits_and_group(models, scores):
    """`int4-g32` is int4, and other bits and groups are another centre; any other text is refused."""
    tokens = scores["llama"].continuations

    def centre(scheme):
        return scorer.quantised_centre(
            str(models / "llama"), REQUESTS, tokens, scheme=scheme, dtype="float32", precision="float64"
        )

    assert same(centre("int4-g32"), centre("int4"))
    errors = [
        np.linalg.norm(centre(scheme).projections - scores["llama"].rows.projections)
        for scheme in ("int3-g32", "int4-g32", "int6-g32", "int8")
    ]
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(ValueError, match="int4-g128"):
        centre("gptq")


def test_the_quantised_centre_of_a_float32_reference(models, scores):
    """A reference that is too large for float64 gives the centre in float32, the same within its round-off."""
    tokens = scores["llama"].continuations
    narrow, wide = (
        scorer.quantised_centre(
            str(models / "llama"), REQUESTS, tokens, scheme="int8", dtype="bfloat16", precision=precision
        )
        for precision in ("float32", "float64")
    )
    shift = np.abs(wide.projections - scores["llama"].rows.projections).max()
    assert np.abs(narrow.projections - wide.projections).max() < shift / 1000
