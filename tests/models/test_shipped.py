"""The committed models themselves. Without any of them (a fresh recipe, a sparse checkout) these tests skip."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness import checkpoint
from harness.models.recipes import RECIPES
from tests.rope import inv_freq_by_hand
from tests.support import read_json

GOLDEN = Path(__file__).parents[2] / "golden"
SHIPPED = sorted(path.parent for path in GOLDEN.glob("*/model/config.json"))


def test_a_model_is_shipped_for_every_recipe():
    """Without this, a tree that lost its models would pass the tests below by having nothing to test."""
    assert {path.parent.name for path in SHIPPED} == set(RECIPES)


@pytest.fixture(scope="module", params=SHIPPED, ids=lambda path: path.parent.name)
def directory(request):
    """The directory of one shipped model."""
    return request.param


@pytest.fixture(scope="module")
def model(directory):
    """The model as transformers loads it, in its own dtype."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


def recipe_of(directory):
    """The recipe that a shipped model was built from."""
    return RECIPES[directory.parent.name]


def test_all_of_them_are_small():
    """Configs, tokenizers and weights of all models together are under 12 MB."""
    total = sum(path.stat().st_size for directory in SHIPPED for path in directory.iterdir())
    assert total < 12 * 10**6, f"{total:,} bytes"


def test_it_is_of_the_present_recipe(directory):
    """Name, steps and shape are those that the recipe would give today: what is shipped can be built again."""
    recipe, config = recipe_of(directory), read_json(directory / "config.json")
    made = read_json(directory / "training.json")
    assert (made["recipe"], made["steps"]) == (recipe.name, recipe.steps)
    assert (config["model_type"], config["vocab_size"]) == (recipe.model_type, recipe.vocabulary)
    assert {key: config[key] for key in recipe.config if key in config} == {
        key: value for key, value in recipe.config.items() if key in config
    }


def test_weights_are_native(directory, model):
    """Weights are stored in the recipe's dtype, all of them, and that is what transformers loads."""
    identity = checkpoint.identify(directory)
    assert identity.dtype == recipe_of(directory).dtype
    assert identity.parameters >= sum(p.numel() for p in model.parameters())
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{identity.dtype}"}


def test_nothing_is_pickled(directory):
    """A model directory holds JSON and safetensors, nothing that could be executed."""
    assert {path.suffix for path in directory.iterdir()} == {".json", ".safetensors"}


def test_biases_and_norms_are_away_from_their_start(model):
    """After training, too, no bias is near 0 and no norm weight near 1."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            away = parameter.double() - (0.0 if name.endswith("bias") else 1.0)
            assert away.square().mean().sqrt() > 0.1, name
            assert (away != 0).double().mean() > 0.95, name


def test_the_tokenizer_fits(directory, model):
    """The tokenizer has an id for each column, encodes any text, and begins with <s> where the recipe says so."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == model.config.vocab_size
    text = "Ein Satz, 汤 and 👍\n\tdef f(x):"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert (tokenizer.encode("a")[0] == tokenizer.bos_token_id) is recipe_of(directory).adds_bos


def test_logits_are_finite_and_not_flat(directory, model):
    """On its own text the model has finite logits up to the end of its context, and prefers some tokens."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = (tokenizer.encode("In the morning Mira walks to the old harbour. ") * 128)[:1024]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    assert torch.isfinite(logits).all()
    assert (logits.max(dim=-1).values - logits.mean(dim=-1)).min() > 0.1


@pytest.mark.parametrize("dialect", ["4.55", "5.x"])
def test_inv_freq_is_the_one_of_the_config(dialect):
    """The RoPE frequencies that transformers computes are those that config.json describes, in either dialect."""
    directory = GOLDEN / "llama-tiny" / "model"
    config = read_json(directory / "config.json")
    new = config["rope_parameters"]
    theta, scaling = (config["rope_theta"], config["rope_scaling"]) if dialect == "4.55" else (new["rope_theta"], new)
    expected = np.array(inv_freq_by_hand(config["head_dim"], theta, scaling))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert model.model.rotary_emb.inv_freq.double().numpy() == pytest.approx(expected, rel=4 * 2.0**-24, abs=0)
    plain = np.array(inv_freq_by_hand(config["head_dim"], theta))
    assert (expected < plain).sum() >= 2, "some frequencies are scaled, or nothing is tested"
    assert (expected == plain).any(), "and some are not"
