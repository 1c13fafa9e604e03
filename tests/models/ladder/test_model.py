import copy

import pytest
import torch

from harness.engines import build_engine, hf
from harness.models.ports.ladder import kernels
from harness.models.ports.ladder.model import unavailable
from harness.models.ports.ladder.rungs import OWN, RUNGS, join, ladder
from tests.engines.ports import CONTINUATIONS, REQUESTS
from tests.engines.recorder import largest_difference, recorded
from tests.support import random_model

IN_FLOAT64 = [join(rungs) for rungs in ladder() if not rungs & OWN]
NO_KERNELS = kernels.why_not()


def written(directory, *, post_layernorm=False):
    """A random BLOOM with 6 heads as a model directory."""
    model = random_model("bloom")
    model.config.apply_residual_connection_post_layernorm = post_layernorm
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("post_layernorm", [False, True])
@pytest.mark.parametrize("rungs", IN_FLOAT64)
def test_each_rung_is_transformers_bloom(tmp_path, rungs, post_layernorm):
    """In float64 each rung's logits are those of transformers to 1e-6 of a logit: with a cache, padded, and one by one.

    Transformers has ALiBi's slopes of a number of heads that is no power of two from powers in float32.
    """
    directory = written(tmp_path, post_layernorm=post_layernorm)
    reference = build_engine("hf:dtype=float64", model=str(directory))
    candidate = build_engine(f"bloom:rungs={rungs},dtype=float64", model=str(directory))
    with reference, candidate:
        for view, batch_size in (("replay", 1), ("replay", None), ("prefill", None)):
            wanted = recorded(reference, view, REQUESTS, CONTINUATIONS, batch_size=batch_size)
            shown = recorded(candidate, view, REQUESTS, CONTINUATIONS, batch_size=batch_size)
            assert shown.keys() == wanted.keys()
            assert largest_difference(shown, wanted) < 1e-6


@pytest.mark.skipif(bool(NO_KERNELS), reason=NO_KERNELS)
@pytest.mark.parametrize("post_layernorm", [False, True])
def test_the_whole_ladder_is_transformers_bloom(tmp_path, post_layernorm):
    """In float32 the compiled step's logits are those of transformers to 1e-4, padded rows among them."""
    directory = written(tmp_path, post_layernorm=post_layernorm)
    reference = build_engine("hf:dtype=float32", model=str(directory))
    candidate = build_engine("bloom:rungs=all,dtype=float32", model=str(directory))
    with reference, candidate:
        wanted = recorded(reference, "replay", REQUESTS, CONTINUATIONS)
        shown = recorded(candidate, "replay", REQUESTS, CONTINUATIONS)
    assert shown.keys() == wanted.keys()
    assert largest_difference(shown, wanted) < 1e-4


def test_a_head_of_its_own_is_used(tmp_path):
    """Where embedding and head are not tied, both come from the checkpoint."""
    model = random_model("bloom")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    model.save_pretrained(tmp_path)
    reference = build_engine("hf:dtype=float64", model=str(tmp_path))
    with reference, build_engine("bloom:rungs=alibi+layout,dtype=float64", model=str(tmp_path)) as candidate:
        wanted, shown = (recorded(one, "replay", REQUESTS, CONTINUATIONS) for one in (reference, candidate))
        assert candidate.model.lm_head.weight is not candidate.model.transformer.word_embeddings.weight
    assert largest_difference(shown, wanted) < 1e-6


@pytest.mark.parametrize("rungs", ["none", "alibi+layout+gelu+softmax"])
def test_a_copy_has_weights_of_its_own(tmp_path, rungs):
    """A deep copy shares no memory with its original, though all weights of that lie in one block."""
    with build_engine(f"bloom:rungs={rungs},dtype=float32", model=str(written(tmp_path))) as engine:
        copied = copy.deepcopy(engine.model)
        places = {one.data_ptr() for one in engine.model.parameters()}
        assert not places & {one.data_ptr() for one in copied.parameters()}
        assert copied.lm_head.weight is copied.transformer.word_embeddings.weight


def test_the_block_holds_the_checkpoint(tmp_path):
    """Weights that were moved into one block are the checkpoint's, bit for bit, each beginning a line of the caches."""
    directory = written(tmp_path)
    with build_engine("bloom:rungs=layout,dtype=float32", model=str(directory)) as engine:
        wanted = hf.HFEngine(hf.Options(model=str(directory), dtype="float32"), text="hf")
        with wanted:
            for name, weight in wanted.model.named_parameters():
                found = engine.model.get_parameter(name)
                assert torch.equal(found, weight)
                assert found.data_ptr() % 64 == 0
        assert len({one.untyped_storage().data_ptr() for one in engine.model.parameters()}) == 1


def test_where_rungs_cannot_be_had():
    """Each reason is said; what needs no kernel can be had anywhere."""
    plain = frozenset(RUNGS) - OWN
    assert unavailable(plain, torch.float64, "cpu") == ""
    assert "CPU" in unavailable(frozenset(RUNGS), torch.float32, "cuda")
    assert "float32 and bfloat16" in unavailable(frozenset({"matvec"}), torch.float16, "cpu")
    if not NO_KERNELS:
        assert "layout" in unavailable(frozenset({"compiled"}), torch.float32, "cpu")
