import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from harness.models import tokenizer
from harness.models.recipes import RECIPES


@pytest.fixture(scope="module")
def trained():
    """Tokenizers of 1,021 entries, without and with <s> before each text."""
    return {adds_bos: tokenizer.train(1021, seed=3, adds_bos=adds_bos) for adds_bos in (False, True)}


@pytest.fixture(scope="module")
def loaded(trained, tmp_path_factory):
    """The two, written and read back by transformers."""
    found = {}
    for adds_bos, each in trained.items():
        directory = tmp_path_factory.mktemp("tokenizer")
        (directory / "config.json").write_text(json.dumps({"model_type": "llama" if adds_bos else "bloom"}))
        tokenizer.save(each, directory, context=1024)
        found[adds_bos] = AutoTokenizer.from_pretrained(directory)
    return found


# --- bytes -----------------------------------------------------------------------------------------

_TEXT = st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("utf-8", "replace"))


@given(text=_TEXT)
@example(text="")
@example(text="\x00\x01\xa0\u2028 \r\n\t  ")
@example(text="👩‍👩‍👧 Ａ é é 汤。")
@example(text="</s><pad> <s>")
@settings(deadline=None, max_examples=200)
def test_any_text_round_trips(trained, text):
    """Whatever is encoded is decoded to the same characters: no normalisation, no unknown token, no lost space."""
    ids = trained[False].encode(text, add_special_tokens=False).ids
    assert trained[False].decode(ids, skip_special_tokens=False) == text


@given(text=_TEXT)
@example(text=" leading, trailing ")
@example(text="a .b ' s n't")
@settings(deadline=None, max_examples=100)
def test_any_text_round_trips_through_transformers(loaded, text):
    """The tokenizer that transformers loads keeps every character too: nothing is cleaned up."""
    ids = loaded[False].encode(text, add_special_tokens=False)
    assert loaded[False].decode(ids, skip_special_tokens=False) == text


def test_every_byte_has_a_token(trained):
    """All 256 bytes are in the vocabulary, so there is no text that it cannot hold."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = trained[False].get_vocab()
    assert len(ByteLevel.alphabet()) == 256
    assert set(ByteLevel.alphabet()) <= vocabulary.keys()


# --- size and special tokens -----------------------------------------------------------------------


@pytest.mark.parametrize("size", sorted({301, *(recipe.vocabulary for recipe in RECIPES.values())}))
def test_the_vocabulary_is_exact(size):
    """As many entries as asked for, an odd number too, with ids from 0 without a gap."""
    vocabulary = tokenizer.train(size, seed=3, adds_bos=False).get_vocab()
    assert sorted(vocabulary.values()) == list(range(size))


def test_the_same_seed_trains_the_same(trained):
    """Two trainings on one seed give the same file, another seed another one."""
    assert tokenizer.train(1021, seed=3, adds_bos=False).to_str() == trained[False].to_str()
    assert tokenizer.train(1021, seed=4, adds_bos=False).to_str() != trained[False].to_str()


def test_more_entries_than_the_grammar_gives_are_refused():
    """A vocabulary that the text cannot fill is an error and not a smaller vocabulary."""
    with pytest.raises(AssertionError, match="90000 wanted"):
        tokenizer.train(90_000, seed=3, adds_bos=False)


def test_special_tokens_come_first(trained):
    """Padding, beginning and end have the first three ids, and text that looks like them is one token."""
    found = trained[False]
    assert [found.token_to_id(token) for token in (tokenizer.PAD, tokenizer.BOS, tokenizer.EOS)] == [0, 1, 2]
    assert found.encode("</s>").ids == [2]


def test_only_one_of_them_begins_with_bos(trained):
    """`adds_bos` puts <s> before a text once where special tokens are asked for, and never an end."""
    plain, with_bos = (trained[adds_bos].encode("In the morning").ids for adds_bos in (False, True))
    assert with_bos == [1, *plain]
    assert 1 not in plain
    assert trained[True].encode("In the morning", add_special_tokens=False).ids == plain


def test_words_of_the_grammar_are_short(trained):
    """The merges were learnt from the grammar: its sentences take a fraction of their bytes."""
    text = "In the morning Mira walks to the old harbour."
    assert len(trained[False].encode(text).ids) < len(text) / 3


# --- as transformers sees it -----------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [False, True])
def test_loadable(trained, loaded, adds_bos):
    """AutoTokenizer reads it with its special tokens, its left padding and its length, and the same ids."""
    found = loaded[adds_bos]
    assert found.is_fast
    assert (found.pad_token_id, found.bos_token_id, found.eos_token_id) == (0, 1, 2)
    assert (found.padding_side, found.model_max_length, len(found)) == ("left", 1024, 1021)
    text = "Am Morgen Mira geht zu den alten Hafen. 汤"
    assert found(text)["input_ids"] == trained[adds_bos].encode(text).ids
    batch = found(["In the morning", "At"], padding=True)
    assert batch["attention_mask"][1][0] == 0
    assert batch["input_ids"][1][0] == 0


def test_chat_template(loaded):
    """Messages become turns as the grammar writes them, with an open turn of the assistant where asked."""
    messages = [
        {"role": "user", "content": "What is my name?"},
        {"role": "assistant", "content": "Your name is Ada."},
    ]
    found = loaded[True]
    assert found.apply_chat_template(messages, tokenize=False) == (
        "User: What is my name?\nAssistant: Your name is Ada.\n"
    )
    open_turn = found.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert open_turn == "User: What is my name?\nAssistant:"


def test_chat_template_refuses_a_role_it_does_not_know(loaded):
    """A system message is refused in words, not dropped."""
    with pytest.raises(Exception, match="only the roles user and assistant"):
        loaded[True].apply_chat_template([{"role": "system", "content": "Be kind."}], tokenize=False)
