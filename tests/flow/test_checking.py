"""A check whose reference is streamed says what one says whose reference is in memory, and loads no model for it."""

from __future__ import annotations

import pytest

from harness import flow, scorer
from harness.errors import UsageError
from harness.flow.references import reference_of
from tests.support import write_model, write_suite


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small llama, its golden, and the traces of a correct candidate in bf16 and of one that says other things."""
    root = tmp_path_factory.mktemp("checking")
    write_model(root / "model", "llama")
    write_model(root / "other", "llama", seed=1)
    write_suite(root / "small.toml")
    golden = flow.record(root / "model", root / "small.toml", out=root / "plain", precisions=["bfloat16"], replicas=4)
    traces = {
        name: flow.run(f"hf:dtype=bfloat16,model={root}/{name}", golden, model=root / "model", upcast=False)
        for name in ("model", "other")
    }
    return root, golden, traces


def told(verdict):
    """All that a verdict says but for how long it took."""
    return {key: value for key, value in verdict.to_dict().items() if key != "seconds"}


@pytest.mark.parametrize("name", ["model", "other"])
def test_the_verdict_is_that_of_a_reference_in_memory(place, name, monkeypatch):
    """The same findings and figures, and none of them from a model that was loaded."""
    root, golden, traces = place
    loaded = flow.check(golden, traces[name], reference=root / "model")
    monkeypatch.setattr(scorer, "open_reference", lambda *_a, **_k: pytest.fail("a model was loaded"))
    streamed = flow.check(golden, traces[name], reference=f"stream:model={root}/model,hidden_gb=0")
    assert told(streamed) == told(loaded)
    assert (streamed.status.exit_code == 1) is (name == "other")


def test_it_is_asked_about_tokens_behind_a_divergence(place):
    """The other candidate's own tokens are scored, and as in memory."""
    root, golden, traces = place
    asked = [
        flow.checking.scoring(golden, traces["other"], text, lambda _text: None)
        for text in (root / "model", f"stream:model={root}/model")
    ]
    assert asked[0].free is not None
    assert asked[1].free is not None
    assert len(asked[1].free) > 0
    assert abs(asked[0].free.projections - asked[1].free.projections).max() < 1e-5


def test_what_was_recorded_by_streaming_is_streamed(place):
    """Its model may not fit into memory; nobody has to say so again."""
    root, golden, _ = place
    found = flow.record(
        root / "model", root / "small.toml", out=root / "streamed", precisions=[], stream="stream:dtype=float32"
    )
    assert reference_of(found, root / "model").stream == "stream"
    assert reference_of(golden, root / "model").stream == ""


def test_another_precision_than_the_goldens_is_refused(place):
    """Rows in float32 beside a golden in float64 would be of another reference; templates need a model in memory."""
    root, golden, traces = place
    with pytest.raises(UsageError, match="recorded in float64"):
        flow.check(golden, traces["other"], reference=f"stream:model={root}/model,dtype=float32")
    with pytest.raises(UsageError, match="templates are made with the model in memory"):
        flow.check(golden, traces["other"], reference=f"stream:model={root}/model", diagnose=True)
