import hashlib
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from harness import checkpoint
from harness.engines.hf import default_dtype
from harness.environment import thread_count
from harness.models import build, grammar, tokenizer
from harness.models.recipes import RECIPES
from tests.support import read_json

NAMES = ("bloom-tiny", "gpt2-tiny", "llama-tiny")
STEPS = 4


def quick(name):
    """A recipe of a few seconds: short sequences, a small vocabulary, the shapes of the real one."""
    return replace(RECIPES[name], phases=((2, 2, 48), (2, 1, 96)), vocabulary=301)


def digest(directory):
    """One digest over the names and bytes of all files."""
    total = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        total.update(f"{path.name}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Each model built once, with the loss it ended at."""
    root = tmp_path_factory.mktemp("built")
    return {name: (root / name, build.build(quick(name), root / name)) for name in NAMES}


def parameters_of(directory):
    """The weights as written, by name."""
    return dict(AutoModelForCausalLM.from_pretrained(directory, dtype="auto").named_parameters())


# --- the same bytes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_two_builds_are_one(built, tmp_path, name):
    """A second build, with other threads and another state of the generator, gives the same bytes in every file."""
    directory, loss = built[name]
    torch.manual_seed(999)
    torch.rand(7)
    with thread_count(2):
        again = build.build(quick(name), tmp_path / name)
    assert again == loss
    assert digest(tmp_path / name) == digest(directory)


def test_another_seed_is_another_model(built, tmp_path):
    """Another seed gives another tokenizer and other weights of the same shapes."""
    recipe = replace(quick("bloom-tiny"), seed=99)
    build.build(recipe, tmp_path / "other", steps=1)
    one, other = checkpoint.identify(built["bloom-tiny"][0]), checkpoint.identify(tmp_path / "other")
    assert one.digest != other.digest
    assert one.signature == other.signature


def test_a_build_leaves_no_trace_in_the_process(tmp_path):
    """Generator, threads, determinism and the patched operation are after a build what they were before it."""
    torch.manual_seed(5)
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.Tensor.baddbmm)
    generator = torch.get_rng_state()
    build.build(quick("bloom-tiny"), tmp_path / "model", steps=2)
    assert torch.equal(torch.get_rng_state(), generator)
    after = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.Tensor.baddbmm)
    assert after == before


# --- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_model_directory(built, name):
    """The directory holds what transformers needs and nothing that this version of it added on top."""
    directory, loss = built[name]
    files = {path.name for path in directory.iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"}
    assert read_json(directory / "training.json") == {"recipe": name, "steps": STEPS, "loss": round(loss, 4)}
    assert len(AutoTokenizer.from_pretrained(directory)) == 301
    assert directory.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o644}


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_native(built, name):
    """All tensors are in the recipe's dtype, and every one that the model needs is there."""
    directory, _ = built[name]
    assert checkpoint.identify(directory).dtype == RECIPES[name].dtype
    parameters = parameters_of(directory)
    assert {str(p.dtype) for p in parameters.values()} == {f"torch.{RECIPES[name].dtype}"}
    _, info = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("name", NAMES)
def test_biases_and_norms_are_away_from_their_start(built, name):
    """No bias is near 0 nor norm weight near 1: a bias that is lost or added twice has to show."""
    for path, parameter in parameters_of(built[name][0]).items():
        if parameter.ndim == 1:
            away = parameter.double() - (0.0 if path.endswith("bias") else 1.0)
            assert away.square().mean().sqrt() > 0.1, path
            assert (away != 0).double().mean() > 0.95, path


@pytest.mark.parametrize("name", NAMES)
def test_config_speaks_both_dialects(built, name):
    """The old transformers 4.55 finds the dtype and the RoPE settings under its own words, 5.x under its own."""
    config = read_json(built[name][0] / "config.json")
    assert config["dtype"] == config["torch_dtype"] == RECIPES[name].dtype
    assert "transformers_version" not in config
    if name == "llama-tiny":
        recipe = RECIPES[name].config
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == recipe["rope_theta"]
        assert config["rope_scaling"] == recipe["rope_scaling"]
        assert {**config["rope_scaling"], "rope_theta": recipe["rope_theta"]} == config["rope_parameters"]


def test_config_loads_as_the_recipe_says(built):
    """What transformers reads from the two dialects is one model: the recipe's."""
    config = AutoConfig.from_pretrained(built["llama-tiny"][0])
    recipe = RECIPES["llama-tiny"].config
    assert config.rope_parameters == {**recipe["rope_scaling"], "rope_theta": recipe["rope_theta"]}
    for key in ("hidden_size", "intermediate_size", "head_dim", "num_key_value_heads", "rms_norm_eps", "mlp_bias"):
        assert getattr(config, key) == recipe[key]
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)


def test_old_words_alone_give_the_same_rope(built, tmp_path):
    """With the old dialect alone, as 4.55 reads it, the RoPE frequencies are the same: neither is a remainder."""
    config = read_json(built["llama-tiny"][0] / "config.json")
    whole = AutoConfig.from_pretrained(built["llama-tiny"][0]).rope_parameters
    for dropped in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        text = json.dumps({key: value for key, value in config.items() if key not in dropped})
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        assert AutoConfig.from_pretrained(tmp_path).rope_parameters == whole


# --- progress and interruption ---------------------------------------------------------------------


def test_progress_is_told(tmp_path):
    """Each step is told with the number of steps and the loss; the result is the mean of the last tenth."""
    told = []
    loss = build.build(quick("gpt2-tiny"), tmp_path / "model", progress=lambda *each: told.append(each))
    assert [each[:2] for each in told] == [(step + 1, STEPS) for step in range(STEPS)]
    assert loss == told[-1][2]
    assert all(0 < each[2] < 20 for each in told)


def test_steps_cut_the_training(tmp_path):
    """With `steps` the training is that short, and the file says so."""
    told = []
    build.build(quick("gpt2-tiny"), tmp_path / "model", steps=1, progress=lambda *each: told.append(each))
    assert len(told) == 1
    assert read_json(tmp_path / "model" / "training.json")["steps"] == 1


def interrupted_training(monkeypatch):
    """Ctrl-C after the second step."""

    def stop(step, _steps, _loss):
        if step == 2:
            raise KeyboardInterrupt

    return {"progress": stop}, KeyboardInterrupt


def failing_write(monkeypatch):
    """A disk that is full when the tokenizer is written, after the weights."""

    def full(*_args, **_kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(tokenizer, "save", full)
    return {"steps": 1}, OSError


@pytest.mark.parametrize("interruption", [interrupted_training, failing_write])
@pytest.mark.parametrize("name", ["bloom-tiny"])
def test_an_interrupted_build_leaves_the_old_model(tmp_path, monkeypatch, interruption, name):
    """Stopped in training or in writing, the old directory stands as it was, and nothing lies beside it."""
    out = tmp_path / "model"
    out.mkdir()
    (out / "config.json").write_text("old", encoding="utf-8")
    baddbmm = torch.Tensor.baddbmm
    arguments, error = interruption(monkeypatch)
    with pytest.raises(error):
        build.build(quick(name), out, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (out / "config.json").read_text(encoding="utf-8") == "old"
    assert torch.Tensor.baddbmm is baddbmm
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_old_model_is_replaced_whole(tmp_path):
    """After a build nothing of an older directory is left, and directories above are made."""
    out = tmp_path / "golden" / "new" / "model"
    out.mkdir(parents=True)
    (out / "stale.safetensors").write_bytes(b"old")
    build.build(quick("gpt2-tiny"), out, steps=1)
    assert not (out / "stale.safetensors").exists()
    assert [path.name for path in out.parent.iterdir()] == ["model"]


# --- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_low_precision_alibi_is_undone(fails):
    """BLOOM's bias is rounded to bf16 inside the block alone, also where the block fails."""
    before = torch.Tensor.baddbmm
    alibi = torch.full((1, 1, 1), 257.3)
    ones = torch.ones((1, 1, 1))
    exact = alibi.baddbmm(ones, ones, beta=1.0, alpha=0.0)
    try:
        with build._low_precision_alibi(True):
            rounded = alibi.baddbmm(ones, ones, beta=1.0, alpha=0.0)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert exact.item() == pytest.approx(257.3)
    assert rounded.item() == 258
    assert rounded.dtype == exact.dtype
    assert torch.Tensor.baddbmm is before


def test_an_exact_alibi_is_left_alone():
    """Every other step is trained with the operation as it is."""
    before = torch.Tensor.baddbmm
    with build._low_precision_alibi(False):
        assert torch.Tensor.baddbmm is before


def test_bloom_goes_through_the_patched_operation():
    """BLOOM's attention really calls the patched operation: without it the patch would do nothing, in silence."""
    recipe = quick("bloom-tiny")
    model = build._fresh_model(recipe, tokenizer.train(301, seed=1, adds_bos=False)).eval()
    ids = torch.arange(3, 300)[None]
    with torch.no_grad(), default_dtype(torch.float32):
        exact = model(input_ids=ids).logits
        with build._low_precision_alibi(True):
            rounded = model(input_ids=ids).logits
    assert not torch.equal(exact, rounded)


def test_the_learning_rate_warms_up_and_falls():
    """It rises to the recipe's rate, then falls to a twentieth of it at the last step."""
    rates = [build._schedule(step, 1000) for step in range(1000)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.05, rel=1e-2)
    assert rates[0] > 0


def test_batches_are_the_documents_in_their_order():
    """Each phase has its batches of its shape, cut from one stream of documents that end with </s>."""
    recipe = quick("bloom-tiny")
    found = tokenizer.train(301, seed=recipe.seed, adds_bos=False)
    batches = list(build._batches(recipe, found))
    assert [tuple(batch.shape) for batch in batches] == [(2, 48), (2, 48), (1, 96), (1, 96)]
    stream = torch.cat([batch.flatten() for batch in batches]).tolist()
    ended = stream.index(2)
    assert found.decode(stream[:ended], skip_special_tokens=False) == next(grammar.documents(recipe.seed + 1000))


def test_learned_positions_are_trained_anywhere():
    """GPT-2 sees its sequences also at the end of the context, and never beyond; the others need no positions."""
    bare = build._fresh_model(quick("gpt2-tiny"), tokenizer.train(301, seed=1, adds_bos=False))
    torch.manual_seed(0)
    starts = []
    for _ in range(200):
        positions = build._anywhere(bare, torch.zeros((2, 96), dtype=torch.int64))["position_ids"]
        assert positions.shape == (1, 96)
        assert (positions.diff() == 1).all()
        starts.append(int(positions[0, 0]))
    assert min(starts) == 0 or min(starts) < 100
    assert 700 < max(starts) <= 1024 - 96
    llama = build._fresh_model(quick("llama-tiny"), tokenizer.train(301, seed=1, adds_bos=True))
    assert build._anywhere(llama, torch.zeros((2, 96), dtype=torch.int64)) == {}
