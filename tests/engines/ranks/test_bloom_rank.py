import pytest

import harness
from harness.engines import build_engine
from harness.errors import EngineError, UsageError
from harness.models.ports.ladder import kernels

NO_KERNELS = kernels.why_not()
PLAIN = "alibi+layout+gelu+softmax"


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        f"bloom:tp=2,rungs={PLAIN},dtype=float32,threads=1",
        pytest.param(
            f"bloom:tp=3,rungs={PLAIN}+matvec,dtype=bfloat16,threads=1",  # 1021 tokens: the last shard has fewer
            marks=pytest.mark.skipif(bool(NO_KERNELS), reason=NO_KERNELS),
        ),
    ],
)
def test_its_shards_are_the_same_model(goldens, spec):
    """Heads, inner units and vocabulary shared out over processes: the verdict is ok, and every tensor is audited."""
    verdict = harness.check(goldens / "bloom-tiny" / "headline", spec, quick=True)
    assert verdict.ok, verdict
    assert "unaudited" not in str(verdict)


@pytest.mark.slow
def test_settings_show_shards_and_rungs(goldens):
    """The size is seen in the tensors of the ranks, and each holds its part of the checkpoint and no more."""
    spec = f"bloom:tp=2,rungs={PLAIN},dtype=float32,threads=1"
    with build_engine(spec, model=str(goldens / "bloom-tiny" / "model")) as engine:
        settings = engine.settings
    assert settings["engine"] == "bloom"
    assert settings["tensor_parallel"] == engine.declared["tensor_parallel"] == 2
    assert settings["rungs"] == engine.declared["rungs"] == PLAIN
    assert [one["unlike_checkpoint"] for one in settings["ranks"]] == [[], []]
    shapes = [one["shapes"]["transformer.word_embeddings.weight"] for one in settings["ranks"]]
    assert shapes == [[511, 144], [510, 144]]
    assert settings["ranks"][0]["shapes"]["transformer.h.*.self_attention.dense.weight"] == [144, 72]


def test_all_rungs_over_ranks_are_those_but_the_compiled_step(goldens):
    """Without a word of rungs the step of one process is left out; where it is asked for, it is refused."""
    assert build_engine("bloom:tp=2").declared["rungs"] == f"{PLAIN}+matvec"
    with pytest.raises(UsageError, match="one process"):
        build_engine("bloom:tp=2,rungs=all")
    with pytest.raises(UsageError, match="CPU"):
        build_engine("bloom:tp=2,device=cuda")


@pytest.mark.parametrize(
    ("spec", "name", "said"), [("bloom:tp=4", "bloom-tiny", "6"), ("bloom:tp=2", "llama-tiny", "llama")]
)
def test_what_cannot_be_cut_is_refused(goldens, spec, name, said):
    """Heads that cannot be divided, and another model, are refused before a process is started."""
    engine = build_engine(spec, model=str(goldens / name / "model"))
    with pytest.raises((UsageError, EngineError), match=said):
        engine.__enter__()
