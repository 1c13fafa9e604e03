"""The engine `deepspeed` on real ranks; where deepspeed is not installed the tests that need it are skipped."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import harness
from harness.engines import deepspeed, hf
from harness.engines.ranks import native, spawned
from harness.engines.spec import parse_spec
from harness.errors import UsageError
from tests.commands import runner

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None,
    reason="deepspeed is not installed: make test-deepspeed installs it",
)
#: One team of two serves them all; gloo, so that nothing has to be compiled.
_TWO = "deepspeed:tp=2,all_reduce=gloo"
_BREAKING = "tests.engines.ranks.breaking"


@pytest.fixture(scope="module", autouse=True)
def _kept() -> Iterator[None]:
    """Engines of this file use one team after another."""
    with spawned.kept():
        yield


@needs_deepspeed
@pytest.mark.parametrize(
    ("host", "spec", "seen"),
    [
        ("bloom-tiny", f"{_TWO},dtype=bfloat16", {"tensor_parallel": 2, "all_reduce": "gloo", "zero_stage": 0}),
        ("gpt2-tiny", "deepspeed:zero=3,ranks=2,offload=cpu,dtype=bfloat16", {"zero_ranks": 2, "offload": "cpu"}),
        ("llama-tiny", "deepspeed:zero=3,ranks=2,dtype=float32", {"zero_stage": 3, "zero_ranks": 2, "offload": None}),
        ("llama-tiny", "deepspeed:tp=3,all_reduce=gloo,dtype=float32", {"tensor_parallel": 3}),
    ],
)
def test_what_deepspeed_shares_out_is_the_same_model(
    goldens: Path, host: str, spec: str, seen: dict[str, object]
) -> None:
    """AutoTP and ZeRO-3 are within round-off; each rank is seen to hold its part of the checkpoint, and no more."""
    golden = harness.load_golden(goldens / host / "headline")
    verdict = harness.check(golden, spec, quick=True)
    assert verdict.ok, str(verdict)
    assert {key: verdict.settings[key] for key in seen} == seen
    whole = sum(p.numel() for p in harness.reference_model(golden).parameters())
    for rank in verdict.settings["ranks"]:
        assert rank["cut"]
        assert not rank["unlike_checkpoint"]
        assert not rank["unaudited"]
        assert rank["parameters"] < 0.7 * whole
    assert verdict.settings["differing"] == []


@needs_deepspeed
@pytest.mark.skipif(not native.shared_bytes(), reason="this system has no memory that processes share")
@pytest.mark.timeout(900)  # it compiles, where nobody has before
def test_its_own_sum_is_used_and_leaves_nothing(goldens: Path) -> None:
    """The all-reduce that DeepSpeed compiles sums right, and its shared memory has no name once the ranks have it."""
    verdict = harness.check(
        goldens / "bloom-tiny" / "headline", "deepspeed:tp=2,all_reduce=shm,dtype=float32", quick=True
    )
    assert verdict.ok, str(verdict)
    assert verdict.settings["all_reduce"] == "shm"
    assert not list(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*harness-ranks*"))


@needs_deepspeed
def test_bloom_works_without_a_mask_and_fails_clearly_as_upstream_has_it(
    goldens: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours makes the biases of a rank's own heads; without it the failure is an error with exit code 4, no hang.

    Where the second half fails, versions newer than deepspeed 0.19.8 and transformers 5.23 need the hook no more.
    """
    golden = goldens / "bloom-tiny" / "headline"
    spec = f"{_TWO},dtype=float32,prepare={_BREAKING}"
    verdict = harness.check(golden, f"{spec}:no_mask_where_it_is_all_ones", quick=True)
    assert verdict.ok, str(verdict)
    done = runner(monkeypatch, capsys)("check", golden, "--quick", "-c", f"{spec}:bloom_as_deepspeed_has_it")
    versions = {name: importlib.metadata.version(name) for name in ("deepspeed", "transformers")}
    assert done.code == 4, (versions, done.out)
    assert "The expanded size of the tensor (3) must match the existing size (6)" in done.out
    assert done.out.startswith("error: ")


@needs_deepspeed
def test_rotary_frequencies_that_deepspeed_rounds_are_found(goldens: Path) -> None:
    """What bfloat16 hides shows in the widened copy, and is gone where the frequencies are float32 again.

    Where the first half fails, DeepSpeed leaves them alone by now (docs/findings.md).
    """
    golden, spec = goldens / "llama-tiny" / "headline", f"{_TWO},dtype=bfloat16"
    verdict = harness.check(golden, spec, quick=True)
    assert verdict.status == "deviates", str(verdict)
    assert "function wrong, precision ok" in str(verdict)
    assert "first wrong: the input of model.layers.0.self_attn.o_proj, on every rank" in str(verdict)
    verdict = harness.check(golden, f"{spec},prepare={_BREAKING}:exact_frequencies", quick=True)
    assert verdict.ok, str(verdict)


@needs_deepspeed
def test_an_all_reduce_that_takes_too_long_to_compile_ends(
    goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit on compiling ends it, with a way out; a lock that a rank left which was ended keeps nobody waiting."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    spawned._Kept.team = None if spawned._Kept.team is None else spawned._Kept.team.close()
    verdict = harness.check(goldens / "llama-tiny" / "headline", "deepspeed:tp=2,dtype=float32,build=1", quick=True)
    assert verdict.status == "error"
    assert "took longer than 1 s" in str(verdict)
    assert "all_reduce=gloo" in str(verdict)
    native.forget_locks(tmp_path)
    assert not list(tmp_path.rglob("lock"))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("deepspeed", "names no tp"),
        ("deepspeed:tp=2,zero=3", "exclude each other"),
        ("deepspeed:zero=2", "ZeRO|zero='2'"),
        ("deepspeed:tp=2,offload=cpu", "offload is of ZeRO"),
        ("deepspeed:ranks=2", "ranks are those of ZeRO"),
        ("deepspeed:zero=3,all_reduce=gloo", "sums nothing"),
        ("deepspeed:tp=2,kernels=true", "kernels are CUDA's"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(monkeypatch: pytest.MonkeyPatch, spec: str, said: str) -> None:
    """Before anything is loaded, in one line."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(deepspeed.outer, "launched", lambda: None)
    parsed = parse_spec(spec)
    with pytest.raises(UsageError, match=said):
        deepspeed.build(parsed, model=None)


def test_what_cannot_run_here_says_why(goldens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that AutoTP does not cut, heads that do not divide, float16, a missing compiler, little shared memory."""

    def why(host: str, spec: str) -> str:
        engine = deepspeed.build(parse_spec(spec), model=None)
        return engine.why_not(hf.load_config(str(goldens / host / "model")))

    monkeypatch.setattr(deepspeed, "_has_float16", lambda: False)
    assert "does not support the model type 'gpt2'" in why("gpt2-tiny", "deepspeed:tp=2")
    assert "cannot be divided among 5 ranks" in why("llama-tiny", "deepspeed:tp=5")
    assert "no float16" in why("llama-tiny", "deepspeed:zero=3,ranks=2,dtype=float16")
    assert why("gpt2-tiny", "deepspeed:zero=3,ranks=2,dtype=float32") == ""
    monkeypatch.setattr(native, "shared_bytes", lambda: 64 * 2**20)
    assert "MB of /dev/shm" in why("llama-tiny", "deepspeed:tp=2,dtype=float32")
    monkeypatch.setattr(deepspeed, "compiler", lambda: None)
    assert "no C++ compiler" in why("llama-tiny", "deepspeed:tp=2,dtype=float32")
    assert why("llama-tiny", "deepspeed:tp=2,dtype=float32,all_reduce=gloo") == ""
