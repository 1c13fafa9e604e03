"""Train the small models' byte-level BPE tokenizer, and write it so that transformers 4.55 and 5.x read it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING

from harness.models import grammar

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
_TRAINING_DOCUMENTS = 4_000

# Turns of a conversation as the grammar writes them; only roles that the model has seen are allowed.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}User: {{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}Assistant: {{ message['content'] }}\n"
    "{% else %}{{ raise_exception('the small models know only the roles user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def train(vocabulary: int, *, seed: int, adds_bos: bool) -> Tokenizer:
    """Train a byte-level BPE tokenizer of exactly ``vocabulary`` entries on the grammar's text.

    Every byte is in the alphabet, so any text can be encoded. ``adds_bos`` puts ``<s>`` before each
    text when special tokens are asked for, as Llama's tokenizer does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = itertools.islice(grammar.documents(seed), _TRAINING_DOCUMENTS)
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise AssertionError(f"the grammar gave {tokenizer.get_vocab_size()} tokens, {vocabulary} wanted")
    if adds_bos:
        bos_id = tokenizer.token_to_id(BOS)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
        )
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path, *, context: int) -> None:
    """Write ``tokenizer.json`` and a ``tokenizer_config.json`` that 4.55 and 5.x both understand."""
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)  # a third of the size: all models are under 12 MB
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "padding_side": "left",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
