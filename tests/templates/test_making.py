"""Templates of a real golden: one run of the reference with each bug, its replicas, and what has no template."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from harness.engines import runner
from harness.errors import UsageError
from harness.mutations.catalogue import CATALOGUE
from harness.numerics import matched
from harness.templates import making
from harness.templates.fitting import filter_of
from harness.values import Run
from tests.templates import tiny


@pytest.fixture(scope="module")
def bank():
    """The tiny golden's templates."""
    return tiny.bank()


@pytest.fixture(scope="module")
def work():
    """The passes that they are of."""
    return making.Work.of(tiny.golden(), tiny.MODEL)


def shown(name=None, strength=1.0, precision="float32"):
    """Coordinates of the logits of the model, with a bug or without, as the runner shows them to a candidate."""
    names = () if name is None else (name,)
    with tiny.broken(precision, *names, strength=strength) as engine:
        trace = tiny.traced(engine)
    passes = {one.view: one for one in trace.passes}
    one = tiny.bank()
    return np.concatenate([passes[view].rows.fine for view in one.views]) @ one.turn


# --- shapes ------------------------------------------------------------------------------------


def test_shapes(bank):
    """Every array has the axes that Templates and TemplateNoise say."""
    golden = tiny.golden()
    generated, everywhere = int(golden.rows.generated.sum()), len(golden.rows)
    rows, columns, count = generated + everywhere, 144, len(bank.names) + len(bank.places)
    assert bank.views == ("replay", "prefill")
    assert bank.view.tolist() == [0] * generated + [1] * everywhere
    assert bank.place.tolist() == [*np.flatnonzero(golden.rows.generated).tolist(), *range(everywhere)]
    assert bank.basis.shape == (golden.vocabulary, columns)
    assert bank.turn.shape == bank.frame.shape == (columns, columns)
    assert (bank.codes.shape, bank.codes.dtype) == ((count, rows, columns), np.int8)
    assert (bank.scales.shape, bank.scales.dtype) == ((count, rows), np.float32)
    assert len(bank) == count
    assert len(bank.names) == len(bank.wrong) == len(set(bank.names))
    assert set(bank.noises) == set(bank.centres) == set(tiny.PRECISIONS)
    for precision, noise in bank.noises.items():
        replicas = golden.floors[precision].replicas
        assert bank.centres[precision].shape == noise.mean.shape == (rows, columns)
        assert noise.whiten.shape == (columns, columns)
        assert noise.row.shape == (rows,)
        assert noise.along.shape == (replicas, 2, len(golden.requests), count)
        assert noise.square.shape == (replicas, 2, len(golden.requests))
        assert noise.gram.shape == (2, len(golden.requests), count, count)


def test_names_and_places(bank):
    """Each bug at each of its strengths in the catalogue's words; attention and MLP of each of five blocks."""
    assert bank.run == "batched"
    asked = [(one.id, strength) for one, strength in tiny.bugs()]
    assert bank.names == tuple(name for name in asked if name[0] not in bank.left_out)
    assert ("x-row-scaled", 0.1) in bank.names
    assert bank.wrong == tuple(CATALOGUE[name].wrong for name, _ in bank.names)
    parts = [f"the {part} of block {block}" for block in range(5) for part in ("attention", "MLP")]
    assert list(dict.fromkeys(bank.places)) == parts
    assert {bank.places.count(one) for one in parts} == {making._CHANGES}
    assert bank.seconds > 0


# --- templates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "strength"), [("x-rows-swapped", 1.0), ("wc-eps", 0.1), ("pos-leftpad-shared", 1.0)])
def test_codes_are_what_the_bug_changes(name, strength):
    """Decoded from 8 bits a template is the float32 run with the bug less the one without, within 1 %."""
    exact = shown(name, strength) - shown()
    found = tiny.template(name, strength)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    print(f"{name} at {strength:g}: {error:.2%} off")
    assert 0 < error < 0.01


def test_codes_use_all_of_their_bits(bank):
    """The largest code of each row is 127, whatever the row's size; a row that the bug leaves alone is zero."""
    largest = np.abs(bank.codes.astype(int)).max(axis=2)
    assert set(np.unique(largest)) <= {0, 127}
    assert ((largest == 0) == (bank.scales == 0)).all()
    # Rows without padding do not change when the positions of a padded batch are wrong.
    silent = bank.scales[bank.names.index(("pos-leftpad-shared", 1.0))] == 0
    assert 0 < silent.sum() < len(silent)


def test_a_weaker_bug_is_its_template_made_smaller():
    """A tenth of a scaled row changes a tenth of the logits, nearly: the two lie in one class."""
    whole, tenth = tiny.template("x-row-scaled"), tiny.template("x-row-scaled", 0.1)
    assert np.linalg.norm(tenth) / np.linalg.norm(whole) == pytest.approx(0.1, rel=0.05)
    assert (whole * tenth).sum() / np.linalg.norm(whole) / np.linalg.norm(tenth) > 0.99


def test_padding_is_that_of_the_goldens_run(work):
    """The run's own batches are made: with one row a batch there is no padding, and a bug of padding does nothing."""
    assert work.run.batch_size == 2
    alone = replace(work, run=replace(work.run, batch_size=1))
    with tiny.broken("float32") as engine:
        right, single = work.shown(engine), alone.shown(engine)
    with tiny.broken("float32", "pos-leftpad-shared") as engine:
        wrong, wrong_single = work.shown(engine), alone.shown(engine)
    size = np.abs(right).max()
    assert np.abs(wrong - right).max() > 1e-3 * size
    assert np.abs(wrong_single - single).max() < 1e-6 * size
    # In a batch of two the shorter prompt is padded.
    lengths = np.array([len(one.prompt_ids) for one in tiny.golden().requests])
    request = tiny.golden().rows.request[work.place]
    changed = {int(one) for one in request[np.abs(wrong - right).max(axis=1) > 1e-3 * size]}
    assert changed == {pair[int(lengths[pair[0]] > lengths[pair[1]])] for pair in ([0, 1], [2, 3])}


def test_what_is_made_is_what_a_candidate_shows(bank, work):
    """The passes of templates and those that the runner asks of a candidate are the same to the bit."""
    with tiny.broken("bfloat16") as engine:
        assert work.shown(engine).tobytes() == shown(precision="bfloat16").tobytes()
    assert shown() == pytest.approx(bank.centres["float32"], abs=1e-3)


# --- what has none -----------------------------------------------------------------------------


def test_a_bug_without_its_part_is_left_out(bank):
    """A model without GELU cannot have the wrong one, and the reason says so."""
    assert "na-gelu" in {one.id for one, _ in tiny.bugs()}
    assert "GELU" in bank.left_out["na-gelu"]
    assert bank.left_out["na-gelu"].startswith("cannot be put into this model")


def test_a_bug_that_changes_nothing_is_left_out(bank):
    """The same function computed otherwise is no template: its round-off is no bug."""
    assert bank.left_out["ok-norm-twice"] == "changes nothing on these prompts"
    assert set(bank.left_out) == {"na-gelu", "ok-norm-twice"}


@contextmanager
def _nothing(_engine, _strength):
    yield


@contextmanager
def _infinite(engine, _strength):
    import torch

    weight = engine.model.lm_head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3] = torch.inf
        yield
        weight.copy_(kept)


@contextmanager
def _raising(_engine, _strength):
    raise ValueError("in the bug")
    yield


def made(monkeypatch, *changes, places=False):
    """The templates that are made of some changes by their ids, from two replicas."""
    plain = CATALOGUE["x-row-scaled"]
    monkeypatch.setattr(
        making, "bugs_for", lambda _: [(replace(plain, id=name, change=change), 1.0) for name, change in changes]
    )
    monkeypatch.setattr(making, "CATALOGUE", {**CATALOGUE, **{name: plain for name, _ in changes}})
    few = {"float32": replace(tiny.golden().floors["float32"], families=("a", "b"))}
    return making.make(replace(tiny.golden(), floors=few), tiny.MODEL, lambda _: None, places=places)


def test_others_are_left_out_with_their_reasons(monkeypatch):
    """No change, no number and an error of the bug's own are three reasons; the bug that is one has its template."""
    found = made(
        monkeypatch,
        ("no", _nothing),
        ("odd", _infinite),
        ("fails", _raising),
        ("yes", CATALOGUE["x-row-scaled"].change),
    )
    assert found.names == (("yes", 1.0),)
    assert found.places == ()
    assert dict(found.left_out) == {
        "no": "changes nothing on these prompts",
        "odd": "its logits are not finite",
        "fails": "cannot be put into this model (in the bug)",
    }


def test_a_golden_without_any_bug_has_empty_templates(monkeypatch):
    """Where nothing can be put in, the templates are none, and everything else is there."""
    found = made(monkeypatch, ("no", _nothing))
    assert (found.names, len(found), found.codes.shape[0]) == ((), 0, 0)
    assert found.noises["float32"].gram.shape[2:] == (0, 0)


def test_the_catalogue_that_is_tried():
    """Of a type of model are tried its bugs that show in logits, at each strength, and no control nor 16-bit bug."""
    asked = making.bugs_for("llama")
    ids = {one.id for one, _ in asked}
    assert {"x-row-scaled", "wc-eps", "pos-leftpad-shared"} <= ids
    assert ("x-row-scaled", 0.1) in {(one.id, strength) for one, strength in asked}
    assert not any(one.harmless or one.shows != "logits" or "half" in one.active for one, _ in asked)
    assert not any(one.id.startswith("pos-alibi") for one, _ in asked)
    assert any(one.id.startswith("pos-alibi") for one, _ in making.bugs_for("bloom"))
    assert making.bugs_for("nothing-known") == []


def test_of_a_deep_model_both_parts_are_kept(monkeypatch):
    """Where there are more parts than places, some blocks are left out, with their attention and their MLP alike."""
    monkeypatch.setattr(making, "_MOST_PLACES", 5)
    found = made(monkeypatch, ("yes", CATALOGUE["x-row-scaled"].change), places=True).places
    assert 4 <= len(found) <= 6
    assert len(set(found)) == len(found)
    attention, mlp = ({one.split()[-1] for one in found if f"the {part} of" in one} for part in ("attention", "MLP"))
    assert len(attention) >= 2
    assert attention == mlp


# --- replicas ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", tiny.PRECISIONS)
def test_the_mean_of_the_replicas_is_taken_off(bank, precision):
    """Sums with each template cancel over replicas, and squares are those of what is left."""
    noise = bank.noises[precision]
    spread = np.abs(noise.along).max(axis=0)
    assert (np.abs(noise.along.sum(axis=0)) <= 1e-4 * spread + 1e-12).all()
    assert np.abs(noise.mean).max() > 0
    # K - 1 of the whitened squares are those of the rows, summed over them.
    replicas = tiny.golden().floors[precision].replicas
    assert noise.square.sum() == pytest.approx((replicas - 1) * noise.row.sum(), rel=1e-4)
    # Whitened: a row has about as much as it has coordinates.
    assert noise.row.mean() == pytest.approx(bank.turn.shape[1], rel=0.25)


@pytest.mark.parametrize("precision", tiny.PRECISIONS)
def test_errors_of_replicas_are_in_units_of_round_off(bank, precision):
    """What the replicas have in common is a part of a row's round-off, in float32 and in bfloat16 alike."""
    shared = np.sqrt((bank.noises[precision].mean.astype(float) ** 2).sum(axis=1).mean())
    print(f"{precision}: replicas have {shared:.2f} of their round-off in common")
    assert 0.1 < shared < 1


def test_centres_differ_where_the_cast_is_not_exact(bank):
    """A checkpoint of bfloat16 loses nothing in bfloat16: both precisions have the reference's own centre."""
    assert tiny.golden().centres == {}
    assert bank.centres["float32"].tobytes() == bank.centres["bfloat16"].tobytes()


# --- the whole, by the real model --------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.1])
@pytest.mark.parametrize("name", ["x-row-scaled", "x-attention-scale", "x-bias-doubled"])
def test_a_bug_in_fp32_is_its_template(bank, name, strength):
    """In float32 the bug is named at its strength with the coefficient 1, far beyond chance."""
    one, sums = fitted(shown(name, strength), "float32")
    limit = one.limit(1e-4)
    (match,) = one.named(sums, limit)
    assert bank.names[match.index] == (name, strength)
    assert match.coefficient == pytest.approx(1, abs=0.01)
    assert match.z > 100 * limit


def test_a_bug_far_below_round_off_is_found(bank):
    """In bfloat16 a bug of a seventh of round-off is named by its template."""
    name, strength = tiny.HIDDEN
    signal = np.sqrt((tiny.template(name, strength) ** 2).sum() / (tiny.sigma() ** 2).sum())
    one, sums = fitted(shown(name, strength, precision="bfloat16"), "bfloat16")
    (match,) = one.named(sums, one.limit(1e-4))
    print(f"{name} at {strength:g}: S/N {signal:.2f}, a = {match.coefficient:.2f}, z = {match.z:.1f}")
    assert signal < 0.2
    assert bank.names[match.index] == tiny.HIDDEN
    assert matched.fits(match.coefficient)


@pytest.mark.parametrize("precision", tiny.PRECISIONS)
def test_the_right_model_is_not_named(precision):
    """Of the model as it is nothing is named."""
    one, sums = fitted(shown(precision=precision), precision)
    assert one.named(sums, one.limit(1e-4)) == []


def fitted(coordinates, precision):
    """The filter of one precision, and the sums of a candidate."""
    from harness.templates.fitting import Projector, part_of, sums_of

    one = tiny.bank()
    noise, sigma = one.noises[precision], tiny.sigma(precision)
    projector = Projector.of(one, tiny.golden().rows.request[one.place], sigma[:, 0], noise.whiten)
    whole = sums_of(projector, noise, (coordinates - one.centres[precision]) / sigma, [0, 1])
    return filter_of(one, noise, [0, 1]), part_of(whole, slice(len(one.names)))


# --- what is refused ---------------------------------------------------------------------------


def test_a_suite_without_whole_logits_is_refused():
    """Templates need a run of all prompts that shows logits, and the error says how to get one."""
    golden = tiny.golden()
    blind = replace(golden, suite=replace(golden.suite, runs=(Run(name="free", views=("generate",)),)))
    with pytest.raises(UsageError, match="shows the logits of all prompts") as error:
        making.make(blind, tiny.MODEL, lambda _: None)
    assert '"replay"' in error.value.fix


def test_a_golden_without_floors_is_refused():
    """Without round-off there is nothing to hold an error against."""
    with pytest.raises(UsageError, match="has no floors"):
        making.diagnosed_run(replace(tiny.golden(), floors={}))


def test_the_run_is_the_one_that_the_runner_shows():
    """The first run of all prompts with logits: not one in another order, not one of tokens alone."""
    wanted = Run(name="wanted", views=("prefill",))
    runs = (
        Run(name="free", views=("generate",)),
        Run(name="order", views=("replay",), order="A-B-A"),
        wanted,
        Run(name="later", views=("replay", "prefill")),
    )
    golden = replace(tiny.golden(), suite=replace(tiny.golden().suite, runs=runs))
    assert making.diagnosed_run(golden) is wanted is runner.first_whole(runs)
    assert making.Work.of(golden, tiny.MODEL).views == ("prefill",)
