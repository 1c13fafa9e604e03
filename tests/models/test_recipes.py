import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from harness.models.recipes import CONTEXT, RECIPES

NAMES = sorted(RECIPES)
TRAINED = [name for name in NAMES if name != "bloom-raw"]


def model_of(name):
    """The recipe's model without any memory behind it: shapes alone."""
    recipe = RECIPES[name]
    # A copy: transformers writes into the nested settings that it is given.
    config = AutoConfig.for_model(recipe.model_type, vocab_size=recipe.vocabulary, **copy.deepcopy(dict(recipe.config)))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def models():
    """Every recipe's model, on the meta device."""
    return {name: model_of(name) for name in NAMES}


def layers_of(model):
    """The transformer blocks."""
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def mlp_width(model):
    """Width between the two halves of the first MLP."""
    mlp = layers_of(model)[0].mlp
    return (
        mlp.gate_proj if hasattr(mlp, "gate_proj") else getattr(mlp, "dense_h_to_4h", None) or mlp.c_fc
    ).weight.shape


def is_prime(number):
    """Whether a number has no divisor but one and itself."""
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def test_the_four_hosts():
    """The shipped models are those that the goldens are named after; seeds and names are their own."""
    assert set(RECIPES) == {"bloom-tiny", "bloom-raw", "llama-tiny", "gpt2-tiny"}
    assert all(name == recipe.name and recipe.summary for name, recipe in RECIPES.items())
    assert len({recipe.seed for recipe in RECIPES.values()}) == len(RECIPES)


@pytest.mark.parametrize("name", NAMES)
def test_five_layers(models, name):
    """Five blocks: split over two and over three stages there is a remainder."""
    assert len(layers_of(models[name])) == 5


@pytest.mark.parametrize("name", NAMES)
def test_the_vocabulary_is_prime(models, name):
    """A prime vocabulary divides among no number of ranks, in the head as in the embedding."""
    assert is_prime(RECIPES[name].vocabulary)
    assert models[name].get_input_embeddings().weight.shape[0] == RECIPES[name].vocabulary
    assert models[name].get_output_embeddings().weight.shape[0] == RECIPES[name].vocabulary


@pytest.mark.parametrize("name", ["bloom-tiny", "bloom-raw", "gpt2-tiny"])
def test_six_heads(models, name):
    """Six heads: splits by 2, 3 and 6, and no power of two, which ALiBi treats in another way."""
    attention = layers_of(models[name])[0]
    attention = attention.self_attention if hasattr(attention, "self_attention") else attention.attn
    assert attention.num_heads == 6


def test_grouped_heads_of_another_width(models):
    """Llama has 12 heads on 6 key-value heads, and a head_dim that hidden / heads does not give."""
    config, attention = models["llama-tiny"].config, layers_of(models["llama-tiny"])[0].self_attn
    assert (config.num_attention_heads, config.num_key_value_heads) == (12, 6)
    assert config.head_dim != config.hidden_size // config.num_attention_heads
    assert attention.q_proj.weight.shape == (12 * config.head_dim, config.hidden_size)
    assert attention.k_proj.weight.shape == (6 * config.head_dim, config.hidden_size)
    assert attention.o_proj.weight.shape == (config.hidden_size, 12 * config.head_dim)


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
def test_the_mlp_splits_by_six_and_not_by_four(models, name):
    """An MLP width divisible by 6 and not by 4 catches a shard count that was assumed."""
    hidden = models[name].config.hidden_size
    (width,) = set(mlp_width(models[name])) - {hidden}
    assert width % 6 == 0
    assert width % 4 != 0


@pytest.mark.parametrize("name", ["bloom-tiny", "bloom-raw"])
def test_blooms_mlp_is_four_times_as_wide(models, name):
    """BLOOM's own code fixes the width at 4 x hidden: at least it splits by 6."""
    hidden = models[name].config.hidden_size
    assert set(mlp_width(models[name])) == {hidden, 4 * hidden}
    assert 4 * hidden % 6 == 0


def test_gpt2_has_a_square_weight(models):
    """One Conv1D weight is square: transposed by mistake, it still fits."""
    block = layers_of(models["gpt2-tiny"])[0]
    rows, columns = block.attn.c_proj.weight.shape
    assert rows == columns


@pytest.mark.parametrize("name", NAMES)
def test_context_and_training_length(name):
    """The context is at least 1,024; trained models saw sequences of 640 and of the whole context."""
    recipe = RECIPES[name]
    lengths = [length for _, _, length in recipe.phases]
    assert CONTEXT >= 1024
    assert max(lengths) >= 640
    assert max(lengths) <= CONTEXT
    if name in TRAINED:
        assert CONTEXT in lengths
    context = recipe.config.get("max_position_embeddings") or recipe.config.get("n_positions")
    assert (context or recipe.config["seq_length"]) == CONTEXT


def test_bloom_raw_is_hardly_trained():
    """The bad host has the shape of bloom-tiny and a hundredth of its training."""
    raw, tiny = RECIPES["bloom-raw"], RECIPES["bloom-tiny"]
    assert raw.config == tiny.config
    assert raw.steps * 30 < tiny.steps


def test_llama3_scaling_has_a_short_original_length(models):
    """RoPE is scaled as in Llama 3.1, and prompts of the suites are longer than the original length."""
    parameters = models["llama-tiny"].config.rope_parameters
    assert parameters["rope_type"] == "llama3"
    assert parameters["original_max_position_embeddings"] <= 256
    assert parameters["rope_theta"] == RECIPES["llama-tiny"].config["rope_theta"]


def test_biases_everywhere_and_an_untied_head(models):
    """Llama's biases are on, in attention and MLP, and its head is its own; BLOOM's and GPT-2's are tied."""
    names = {name for name, _ in models["llama-tiny"].named_parameters()}
    for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert f"model.layers.0.{module}.bias" in names
    for name in NAMES:
        assert models[name].config.tie_word_embeddings is (name != "llama-tiny")


@pytest.mark.parametrize("name", NAMES)
def test_no_dropout(models, name):
    """Training has no dropout, so that the model in training is the model in use."""
    rates = [module.p for module in models[name].modules() if isinstance(module, torch.nn.Dropout)]
    assert all(rate == 0 for rate in rates)
    assert getattr(models[name].config, "attention_dropout", 0.0) == 0


def test_native_dtypes():
    """One model is stored in fp16, the others in bf16; only llama's tokenizer begins with <s>."""
    assert {name: recipe.dtype for name, recipe in RECIPES.items()} == {
        "bloom-tiny": "float16", "bloom-raw": "bfloat16", "llama-tiny": "bfloat16", "gpt2-tiny": "bfloat16",
    }  # fmt: skip
    assert [name for name, recipe in RECIPES.items() if recipe.adds_bos] == ["llama-tiny"]


def test_they_fit_into_twelve_megabytes(models):
    """Sixteen bits a parameter, all four together leave room for the tokenizers under 12 MB."""
    parameters = sum(p.numel() for model in models.values() for p in model.parameters())
    assert 2 * parameters < 11.9e6
