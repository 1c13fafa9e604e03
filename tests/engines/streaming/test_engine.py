"""A streamed model is the model: the logits of the one in memory, its verdicts, and nothing shown that did not run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from harness import flow, scorer
from harness.engines import build_engine
from harness.engines.streaming import passes, preflight, reading
from harness.engines.streaming.files import Place
from harness.errors import EngineError, ModelError, UsageError
from harness.numerics import metrics
from harness.values import Request, Status
from tests.support import VOCABULARY, random_model, write_model, write_suite

REQUESTS = tuple(
    Request(id=str(i), prompt_ids=tuple((7 * i + 3 * j) % 290 + 3 for j in range(n)), max_new_tokens=5)
    for i, n in enumerate((20, 4, 9, 33, 1))
)
CONTINUATIONS = [tuple((i * 11 + j) % 290 for j in range(5)) for i in range(5)]

#: Of a family each what the others do not have: windows in some layers, norms of q and k, capped and scaled logits.
OTHERS = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 4.0},
    "gpt_neox": {},
    "opt": {"ffn_dim": 54, "word_embed_proj_dim": 36},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model directory of each kind, in bf16."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("bloom", "gpt2", "llama"):
        random_model(kind, dtype="bfloat16").save_pretrained(root / kind)
    torch.manual_seed(0)
    for kind, more in OTHERS.items():
        config = AutoConfig.for_model(
            kind, vocab_size=VOCABULARY, hidden_size=36, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=3, intermediate_size=54, max_position_embeddings=128, head_dim=8,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, **more,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.25 + (parameter.ndim == 1))
        model.to(torch.bfloat16).save_pretrained(root / kind)
    return root


def rows(spec, model):
    """The rows of an engine on the requests."""
    with build_engine(spec, model=str(model)) as engine:
        return scorer.teacher_forced(engine, REQUESTS, CONTINUATIONS)


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "llama", *OTHERS])
def test_it_gives_the_logits_of_the_model_in_memory(models, kind):
    """In float64 to the last bits, in float32 and the checkpoint's own dtype within what that dtype rounds."""
    for dtype, limit in (("float64", 1e-13), ("float32", 2e-6), ("bfloat16", 1e-2)):
        memory, stream = rows(f"hf:dtype={dtype}", models / kind), rows(f"stream:dtype={dtype}", models / kind)
        size = metrics.rms(np.linalg.norm(memory.projections, axis=1))
        assert metrics.rms(metrics.error_norm(memory.projections, stream.projections)) < limit * size, dtype
        for name in ("request", "position", "generated"):
            np.testing.assert_array_equal(getattr(memory, name), getattr(stream, name))
        if dtype == "float64":
            np.testing.assert_array_equal(memory.argmax, stream.argmax)
            np.testing.assert_allclose(memory.logp, stream.logp, rtol=1e-6)
            np.testing.assert_allclose(memory.entropy, stream.entropy, rtol=1e-6)


def test_a_slice_and_a_spill_change_nothing(models, monkeypatch):
    """A head in many slices, hidden states in a file and direct reads give the same numbers."""
    plain = rows("stream:dtype=float32", models / "llama")
    monkeypatch.setattr(passes, "_SLICE_BYTES", 1000)
    cut = rows("stream:dtype=float32,hidden_gb=0,read=direct", models / "llama")
    np.testing.assert_array_equal(plain.argmax, cut.argmax)
    np.testing.assert_allclose(plain.projections, cut.projections, atol=1e-4)
    np.testing.assert_allclose(plain.logsumexp, cut.logsumexp, rtol=1e-6)


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "llama"])
def test_layers_that_are_widened_one_by_one_give_the_same(models, monkeypatch, kind):
    """Cast while they compute or all at once, the weights are the same, and so is every bit."""
    at_once = rows("stream:dtype=float32", models / kind)
    monkeypatch.setattr(preflight, "LARGE_BLOCK", 0)
    one_by_one = rows("stream:dtype=float32", models / kind)
    np.testing.assert_array_equal(at_once.projections, one_by_one.projections)


def test_one_pass_serves_the_whole_suite(models, monkeypatch):
    """Asked for the same rows again it reads nothing; asked for others it does."""
    with build_engine("stream", model=str(models / "gpt2")) as engine:
        first = scorer.teacher_forced(engine, REQUESTS, CONTINUATIONS)
        monkeypatch.setattr(reading.Reader, "_read", lambda *_a: pytest.fail("read again"))
        again = scorer.teacher_forced(engine, REQUESTS, CONTINUATIONS)
        np.testing.assert_array_equal(first.projections, again.projections)


# --- verdicts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """A golden of a small llama, beside its model."""
    root = tmp_path_factory.mktemp("golden")
    write_model(root / "model", "llama")
    flow.record(
        root / "model", write_suite(root / "small.toml"), out=root / "small", precisions=["float32", "bfloat16"]
    )
    return root


def test_a_check_says_identical_and_what_it_did_not_see(golden):
    """The same weights streamed pass both questions, and the decode path is listed as not seen."""
    verdict = flow.check(golden / "small", "stream:dtype=float32", reference=golden / "model")
    assert verdict.status is Status.IDENTICAL
    assert any("decode path" in line for line in verdict.power.unmeasured)
    verdict = flow.check(golden / "small", "stream:dtype=bfloat16", reference=golden / "model")
    assert verdict.ok
    assert [answer.question for answer in verdict.answers] == ["function", "precision"]


def test_a_check_sees_changed_weights(golden, tmp_path):
    """One changed block on disk fails."""
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(golden / "model", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    verdict = flow.check(golden / "small", f"stream:dtype=float32,model={broken}", reference=golden / "model")
    assert verdict.status is Status.DEVIATES


def test_it_generates_nothing(models):
    """What it cannot do is an engine error that names the way."""
    with build_engine("stream", model=str(models / "llama")) as engine:
        with pytest.raises(EngineError, match="harness record"):
            engine.generate(REQUESTS, batch_size=None, stop_ids=frozenset())
        with pytest.raises(EngineError, match="prefill"):
            engine.replay(REQUESTS, CONTINUATIONS, batch_size=None, sketcher=None)


# --- before hours are spent ------------------------------------------------------------------------


def test_a_missing_tensor_is_named_before_anything_is_read(models, tmp_path):
    """A checkpoint without one of the model's tensors is refused when it is opened."""
    from safetensors.torch import load_file, save_file

    part = shutil.copytree(models / "llama", tmp_path / "part")
    tensors = load_file(part / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    with (
        pytest.raises(ModelError, match=r"1 tensors .* model.layers.1.self_attn.q_proj.weight"),
        build_engine("stream", model=str(part)),
    ):
        pass


def test_another_shape_is_named(models, tmp_path):
    """A config that is not that of the weights is refused when it is opened."""
    part = shutil.copytree(models / "llama", tmp_path / "part")
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps({**config, "intermediate_size": 55}))
    with pytest.raises(ModelError, match="the config says"), build_engine("stream", model=str(part)):
        pass


def test_too_little_memory_or_disk_is_said_at_once(models, monkeypatch, tmp_path):
    """Before the first block is read, with what is needed and what is free."""
    with build_engine(f"stream:work={tmp_path}/work", model=str(models / "llama")) as engine:
        monkeypatch.setattr(reading, "available_memory", lambda: 10)
        with pytest.raises(EngineError, match="GB of memory"):
            scorer.teacher_forced(engine, REQUESTS, CONTINUATIONS)
        monkeypatch.setattr(reading, "available_memory", lambda: 2**40)
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(UsageError, match="GB are free there"):
            scorer.teacher_forced(engine, REQUESTS, CONTINUATIONS)


def test_a_file_that_shrinks_while_it_is_read_is_named(models, tmp_path):
    """Bytes that are gone by the time they are read are an error, not zeros."""
    part = shutil.copytree(models / "llama", tmp_path / "part")
    with build_engine("stream", model=str(part)) as engine:
        with (part / "model.safetensors").open("r+b") as opened:
            opened.truncate(4096)
        with pytest.raises(ModelError, match="while it was read"):
            scorer.teacher_forced(engine, REQUESTS, CONTINUATIONS)


@pytest.mark.parametrize("lost", [1, 4000])
def test_a_file_that_lacks_its_last_bytes_is_no_whole_one(tmp_path, lost):
    """Less than a sector is missing, in whatever pieces the rest comes: what the buffer held before is no weight."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(20_000))
    place = Place(name="w", file=file, dtype="F32", shape=(3000,), start=8000)
    whole = reading.plan([place])
    with reading.Reader([[place]], direct=False) as reader:
        assert [piece.tensor("w").sum().item() for piece in reader] == [0.0]
    assert whole.runs[0].needed == 20_000 - whole.runs[0].start
    os.truncate(file, 20_000 - lost)
    reader = reading.Reader([[place]], direct=False)
    with reader, pytest.raises(ModelError, match="ended at byte"):
        list(reader)


def test_reads_that_come_short_are_gone_on_with(tmp_path, monkeypatch):
    """A file over a network may give less at a time than is asked for; that is not its end."""
    real = os.preadv
    monkeypatch.setattr(reading.os, "preadv", lambda handle, views, at: real(handle, [views[0][:700]], at))
    file = tmp_path / "weights"
    numbers = torch.arange(3000, dtype=torch.float32)
    file.write_bytes(bytes(8000) + numbers.numpy().tobytes())
    place = Place(name="w", file=file, dtype="F32", shape=(3000,), start=8000)
    with reading.Reader([[place]], direct=False) as reader:
        assert all(torch.equal(piece.tensor("w"), numbers) for piece in reader)


@pytest.mark.parametrize("cut", [None, 700])
def test_direct_reads_that_are_refused_are_done_through_the_cache(tmp_path, monkeypatch, cut):
    """A file system that refuses all direct reads, or those behind a short one, is read all the same."""
    real, refused = os.preadv, []

    def preadv(handle, views, at):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
            if cut is None or at % 4096:
                refused.append(at)
                raise OSError(errno.EINVAL, "Invalid argument")
            short = real(handle, views, at)
            return min(short, cut)
        return real(handle, views, at)

    monkeypatch.setattr(reading.os, "preadv", preadv)
    file = tmp_path / "weights"
    numbers = torch.arange(3000, dtype=torch.float32)
    file.write_bytes(bytes(8000) + numbers.numpy().tobytes())
    place = Place(name="w", file=file, dtype="F32", shape=(3000,), start=8000)
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("no direct reads here")
    with reading.Reader([[place], [place]], direct=True) as reader:
        assert all(torch.equal(piece.tensor("w"), numbers) for piece in reader)
    assert len(refused) == 1


def test_settings_are_read_back_from_what_computed(models, monkeypatch):
    """A weight that was not widened shows, whatever was asked for; in large blocks as in small ones."""
    with build_engine("stream:dtype=float32", model=str(models / "mistral")) as engine:  # its norms alone are 1-D
        for large in (preflight.LARGE_BLOCK, 0):
            monkeypatch.setattr(preflight, "LARGE_BLOCK", large)
            engine.score([[3, 4, 5]], [1])
            assert (engine.settings["dtype"], engine.settings["device"]) == ("float32", "cpu")
        cast = passes.Pass._cast
        monkeypatch.setattr(passes.Pass, "_cast", lambda self, t: t.clone() if t.ndim == 1 else cast(self, t))
        monkeypatch.setattr(passes.Settings, "copies", False)
        engine.score([[3, 4, 5]], [1])
        assert engine.settings["dtype"] == "bfloat16+float32"


def test_a_part_that_cannot_be_filled_stays_empty(models):
    """Where the copy of one tensor fails, those before it are taken out again."""
    count = [0]

    def cast(tensor):
        count[0] += 1
        if count[0] == 3:
            raise MemoryError
        return tensor

    with build_engine("stream", model=str(models / "llama")) as engine:
        skeleton, name = engine.skeleton, next(iter(engine.skeleton.blocks))
        before = [one.data_ptr() for one in skeleton.blocks[name].parameters()]
        with pytest.raises(MemoryError):
            skeleton.filled(f"{name}.", lambda one: torch.zeros(skeleton.places[one].shape), cast).__enter__()
        assert count == [3]
        assert [one.data_ptr() for one in skeleton.blocks[name].parameters()] == before


def test_a_killed_pass_is_gone_on_with_only_for_the_same_sums(models):
    """Another basis, vocabulary or device makes other sums of the same sequences."""
    with build_engine("stream", model=str(models / "llama")) as engine:
        same = [engine._work_digest([1], vocabulary, True, basis) for vocabulary, basis in ((9, "a"), (9, "a"))]
        others = [engine._work_digest([1], vocabulary, True, basis) for vocabulary, basis in ((8, "a"), (9, "b"))]
        engine.options = replace(engine.options, device="cuda")
        others.append(engine._work_digest([1], 9, True, "a"))
    assert len({*same, *others}) == 4


def test_widened_blocks_are_counted_as_such(models, monkeypatch):
    """A block in 16 bits that is computed in 32 takes a buffer and twice its size, or two buffers where some stay."""
    seen = []
    real = preflight.check

    def check(skeleton, settings, *rest):
        seen.append((settings.converts, settings.copies, real(skeleton, settings, *rest).memory))
        return real(skeleton, settings, *rest)

    monkeypatch.setattr(preflight, "check", check)
    for dtype in ("bfloat16", "float32"):
        rows(f"stream:dtype={dtype}", models / "llama")
    (kept, copied, plain), (converted, made, widened) = seen
    assert (kept, copied, converted, made) == (False, False, True, True)
    assert widened > plain
