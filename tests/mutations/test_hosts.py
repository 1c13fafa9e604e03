"""The hosts: hot, the same every time, loadable, and with the part for which they are there."""

import json
import math
import os

import pytest
import torch

from harness.engines import hf
from harness.engines.spec import parse_spec
from harness.models import tokenizer
from harness.mutations import hosts
from harness.mutations.hosts import HOSTS, NAMES, SHIPPED
from harness.values import Request
from tests.engines.recorder import largest_difference, recorded

REQUESTS = (
    Request(id="a", prompt_ids=tuple(range(5, 45)), max_new_tokens=3),
    Request(id="b", prompt_ids=(17, 200, 4), max_new_tokens=3),
)
CONTINUATIONS = ((7, 8, 9), (44, 3, 120))


@pytest.fixture(scope="module")
def models():
    """Every host in float32."""
    return {name: hosts.build(name, "float32") for name in HOSTS}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """One host, written."""
    return hosts.write("llama-untied", tmp_path_factory.mktemp("hosts") / "deep" / "llama-untied")


# --- directories ---------------------------------------------------------------------------------


def test_names_are_the_shipped_models_and_the_others(goldens):
    """The shipped names are the directories under golden/ that hold a model; no other host has one of them."""
    assert set(SHIPPED) == {path.parent.parent.name for path in goldens.glob("*/model/config.json")}
    assert len(set(NAMES)) == len(NAMES) == len(SHIPPED) + len(HOSTS)
    assert all(name == host.name and host.what for name, host in HOSTS.items())


def test_a_shipped_model_is_found_and_not_written(goldens, tmp_path):
    """The directory of a shipped model is below the goldens, and scratch stays empty."""
    found = hosts.model_directory("gpt2-tiny", goldens=goldens, scratch=tmp_path / "scratch")
    assert (found / "config.json").is_file()
    assert not (tmp_path / "scratch").exists()


def test_a_host_is_written_once(directory, goldens):
    """A directory that is there is taken as it is; nothing else is left beside it."""
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    scratch = directory.parent
    assert hosts.model_directory("llama-untied", goldens=goldens, scratch=scratch) == directory
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert os.listdir(scratch) == ["llama-untied"]


def test_a_faster_process_wins(directory, tmp_path, monkeypatch):
    """Where the directory appears while it is being written, what is there stays, and no staging is left."""
    target = tmp_path / "llama-untied"
    save = tokenizer.save

    def overtaken(*given, **more):
        save(*given, **more)
        target.mkdir()
        (target / "first").touch()

    monkeypatch.setattr(tokenizer, "save", overtaken)
    assert hosts.write("llama-untied", target) == target
    assert os.listdir(tmp_path) == ["llama-untied"]
    assert os.listdir(target) == ["first"]


def test_what_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    """A failure half-way raises, and leaves nothing behind."""

    def full(*_given, **_more):
        raise OSError("no space left on device")

    monkeypatch.setattr(tokenizer, "save", full)
    with pytest.raises(OSError, match="no space"):
        hosts.write("llama-untied", tmp_path / "llama-untied")
    assert os.listdir(tmp_path) == []


def test_an_unknown_host_is_refused(tmp_path, goldens):
    """The refusal names the hosts that there are."""
    with pytest.raises(LookupError, match="mistral-window"):
        hosts.build("mistral")
    with pytest.raises(LookupError, match="no host 'mistral'"):
        hosts.model_directory("mistral", goldens=goldens, scratch=tmp_path)
    with pytest.raises(LookupError):
        hosts.write("llama-tiny", tmp_path / "x")


def test_what_is_written_is_what_is_built(directory):
    """An engine loads the weights that `build` gives, bit for bit, in bf16, with a tokenizer of the same vocabulary."""
    with hf.build(parse_spec("hf"), model=str(directory)) as engine:
        built = dict(hosts.build("llama-untied").named_parameters())
        loaded = dict(engine.model.named_parameters())
        assert engine.settings["dtype"] == "bfloat16"
        assert engine.settings["missing_tensors"] == []
        assert loaded.keys() == built.keys()
        assert all(torch.equal(loaded[name], built[name]) for name in built)
        assert len(engine.tokenizer) == hosts.VOCABULARY == engine.vocabulary
        ids = engine.tokenizer("In the morning")["input_ids"]
        assert ids[0] == engine.model.config.bos_token_id
        assert max(ids) < hosts.VOCABULARY
    assert json.loads((directory / "tokenizer_config.json").read_text())["model_max_length"] == 1024


# --- weights -------------------------------------------------------------------------------------


def test_building_is_repeatable_and_draws_nothing():
    """Two builds have the same bits, and torch's own generator stands where it stood."""
    state = torch.get_rng_state()
    first, second = (hosts.build("mistral-window").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", HOSTS)
def test_hosts_are_hot(models, name):
    """No bias is zero, no norm weight is 1, and no norm is left at its centre: such a host hides bugs."""
    for path, parameter in models[name].named_parameters():
        assert float(parameter.detach().std()) > 0.05, path
        if parameter.ndim == 1:
            assert (parameter != 0).all()
            assert (parameter != 1).all()


@pytest.mark.parametrize("name", HOSTS)
def test_attention_is_peaked_and_logits_are_spread(models, name):
    """Entropy of attention is well below that of a uniform one, and the logits are neither flat nor one-sided."""
    model = models[name]
    kernel = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        shown = model(input_ids=torch.tensor([REQUESTS[0].prompt_ids]), output_attentions=True)
    model.config._attn_implementation = kernel
    last = torch.stack(shown.attentions)[:, 0, :, -1].double()
    entropy = -(last * last.clamp(min=1e-300).log()).sum(dim=-1).mean()
    keys = int((last > 0).sum(dim=-1).max())
    assert float(entropy) < 0.8 * math.log(keys)
    probabilities = shown.logits.softmax(dim=-1).max(dim=-1).values
    assert 0.02 < float(probabilities.median()) < 0.98


@pytest.mark.parametrize("name", HOSTS)
def test_hosts_decode_as_they_prefill(models, name):
    """A left-padded batch through the KV cache gives the logits of one pass: as references they are sound."""
    with hf.from_model(models[name]) as engine:
        replayed = recorded(engine, "replay", REQUESTS, CONTINUATIONS, batch_size=2)
        forced = recorded(engine, "prefill", REQUESTS, CONTINUATIONS, batch_size=1)
    assert largest_difference(replayed, forced) < 1e-3 * max(float(row.abs().max()) for row in forced.values())


# --- the parts -----------------------------------------------------------------------------------


def test_shapes_are_awkward(models):
    """A prime vocabulary; heads no power of 2; Llama's head size is apart from hidden / heads, its KV heads fewer."""
    for model in models.values():
        assert model.config.vocab_size == 307
        assert model.config.num_attention_heads == 6
    config = models["llama-scaled"].config
    assert config.head_dim != config.hidden_size // config.num_attention_heads
    assert config.num_key_value_heads == 3


def test_the_head_is_near_the_embedding(models):
    """The untied head correlates with the embedding at 1 / sqrt(1.25), and is not it."""
    model = models["llama-untied"]
    pair = torch.stack([model.lm_head.weight.flatten(), model.model.embed_tokens.weight.flatten()])
    assert float(torch.corrcoef(pair.detach())[0, 1]) == pytest.approx(1.25**-0.5, abs=0.01)


def test_one_head_is_sharp(models):
    """Scores of head 0 spread over thousands, those of the others over a few."""
    model = models["gpt2-sharp"]
    seen = {}

    def keep(module, _inputs, output):
        seen[module] = output

    attention = model.transformer.h[1].attn
    with torch.no_grad():
        handle = attention.c_attn.register_forward_hook(keep)
        model(input_ids=torch.tensor([REQUESTS[0].prompt_ids]))
        handle.remove()
    query, key, _ = seen[attention.c_attn][0].split(72, dim=-1)
    query, key = (x.unflatten(-1, (6, 12)).transpose(0, 1) for x in (query, key))
    spread = (query @ key.transpose(-1, -2) * attention.scaling).std(dim=(-1, -2))
    assert float(spread[0]) > 2000
    assert float(spread[1:].max()) < 20


def test_parts_are_in_force(models):
    """Windows, caps, scaling, partial rotation and the offset are in the live modules, not in the config alone."""
    assert models["mistral-window"].config.sliding_window == 16
    gemma = models["gemma2-softcap"].config
    assert gemma.layer_types.count("sliding_attention") == 2
    assert gemma.final_logit_softcapping == 6.0
    assert models["llama-ntk"].model.rotary_emb.rope_type == "dynamic"
    assert models["llama-scaled"].model.rotary_emb.rope_type == "llama3"
    assert models["llama-untied"].config.rope_parameters["rope_theta"] == 500_000
    attention = models["stablelm-partial"].model.layers[0].self_attn
    assert (attention.rotary_ndims, attention.head_dim) == (6, 12)
    assert models["opt-offset"].model.decoder.embed_positions.offset == 2
