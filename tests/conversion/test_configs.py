"""A config is that of a BLOOM which the layout can hold, and of these tensors."""

import json

import pytest
from transformers import BloomConfig

from harness.conversion import configs, names
from harness.conversion.problems import Problems
from harness.conversion.shards import Planned
from harness.errors import ModelError
from tests.conversion.tiny import SIZES, config


def planned(sizes=SIZES):
    """All tensors of a model."""
    return [
        Planned(name=layer.name(entry), shape=entry.shape_in(sizes), dtype="float32")
        for layer in names.layers(sizes.layers)
        for entry in layer.entries
    ]


BAD = {
    "no JSON": ("{", "is not JSON"),
    "a list": ("[]", "is not the config of a BLOOM"),
    "another model": ('{"model_type": "llama"}', "is not the config of a BLOOM"),
    "untied": (json.dumps(config(tie_word_embeddings=False)), "tie_word_embeddings=false"),
    "no vocabulary": (json.dumps(config(vocab_size=None)), "vocab_size=None"),
    "no whole number": (json.dumps(config(n_layer=2.0)), "num_hidden_layers=2.0"),
    "no heads": (json.dumps(config(n_head=0)), "num_attention_heads=0"),
    "heads that do not divide": (json.dumps(config(n_head=5)), "5 heads"),
}


@pytest.mark.parametrize(("text", "words"), BAD.values(), ids=BAD)
def test_a_bad_config_is_one_line(tmp_path, text, words):
    """With its file, and what to give instead."""
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ModelError) as error:
        configs.sizes_in(configs.read(path), path)
    assert str(path) in str(error.value)
    assert words in str(error.value)


def test_old_names_of_sizes_are_read_as_transformers_does(tmp_path):
    """The config of the published BLOOM has n_embed and num_attention_heads."""
    old = {"model_type": "bloom", "n_embed": 24, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 17}
    assert configs.sizes_in(old, tmp_path) == SIZES
    both = {**old, "hidden_size": 48}
    assert configs.sizes_in(both, tmp_path).hidden == BloomConfig(**both).hidden_size


def test_a_derived_config_has_the_defaults_of_bloom():
    """What tensors do not show is as in BloomConfig, and transformers builds the tensors from it."""
    found = configs.derived(SIZES)
    default = BloomConfig()
    assert found["layer_norm_epsilon"] == default.layer_norm_epsilon
    assert found["apply_residual_connection_post_layernorm"] == default.apply_residual_connection_post_layernorm
    assert configs.sizes_in(found, None) == SIZES
    problems = Problems()
    configs.hold_against_transformers(found, planned(), problems)
    assert not problems


def test_only_vocabulary_and_dtype_are_adapted():
    """Under the keys that are there."""
    assert configs.adapted(config(), vocabulary=9, dtype="float16") == config(dtype="float16", vocab_size=9)
    new = {"dtype": "float32", "surprise": 1}
    assert configs.adapted(new, vocabulary=9, dtype="float16") == {"dtype": "float16", "surprise": 1, "vocab_size": 9}
    assert configs.adapted({}, vocabulary=9, dtype="float16") == {"torch_dtype": "float16", "vocab_size": 9}
    assert (configs.dtype_in(new), configs.dtype_in({})) == ("float32", None)


def test_what_transformers_builds_otherwise_is_told():
    """By name: another shape, a tensor too many, one too few; and a value that it does not take."""
    problems = Problems()
    tensors = [one for one in planned() if "ln_f.bias" not in one.name]
    tensors.append(Planned(name="more", shape=(1,), dtype="float32"))
    configs.hold_against_transformers(config(vocab_size=18), tensors, problems)
    assert len(problems.lines) == 3
    for words in ("word_embeddings.weight has (17, 24) shape, and (18, 24)", "more has (1,)", "ln_f.bias has no shape"):
        assert any(words in line for line in problems.lines)
    refused = Problems()
    configs.hold_against_transformers(config(hidden_dropout="much"), planned(), refused)
    assert list(refused.kinds) == ["refused by transformers"]
