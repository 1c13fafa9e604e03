import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.models import grammar

ROOT = Path(grammar.__file__).parents[2]

#: What only one kind of document says.
KINDS = {
    "code": "def ",
    "look-up": "Answers: ",
    "translation": "Translate to chinese. EN: ",
    "question": "Assistant: ",
    "shopping": "Shopping list:\n1. ",
    "framework": "This text is about ",
    "arithmetic": "Count by ",
}


def texts(seed, count):
    """The first documents of a seed."""
    return list(itertools.islice(grammar.documents(seed), count))


@pytest.fixture(scope="module")
def corpus():
    """As many documents as a tokenizer is trained on."""
    return texts(1, 4000)


def test_the_same_seed_gives_the_same_text():
    """Text comes from the seed alone; another seed gives another text from the start."""
    assert texts(7, 50) == texts(7, 50)
    assert texts(7, 5) != texts(8, 5)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_gives_the_same_text(hash_seed):
    """The order of hashes, which differs between processes, has no say in the text."""
    code = (
        "import hashlib, itertools; from harness.models import grammar;"
        "print(hashlib.sha256('\\0'.join(itertools.islice(grammar.documents(7), 300)).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == hashlib.sha256("\0".join(texts(7, 300)).encode()).hexdigest()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_occurs(corpus, kind):
    """At least one document in a hundred is of each kind."""
    assert sum(KINDS[kind] in text for text in corpus) >= len(corpus) / 100


@pytest.mark.parametrize("language", sorted(grammar._LANGUAGES))
def test_every_language_occurs_with_all_its_phrases(corpus, language):
    """Stories are told in each language, and each of its phrases is met often enough to be learnt."""
    whole = "\n".join(corpus)
    phrases = [phrase for group in grammar._LANGUAGES[language].values() for phrase in group]
    counts = {phrase: whole.count(phrase) for phrase in phrases}
    assert min(counts.values()) >= 5, min(counts, key=counts.get)


def test_every_table_is_used_up(corpus):
    """All names, items, colours, words and frameworks occur."""
    whole = "\n".join(corpus)
    words = [
        *grammar._NAMES, *grammar._ITEMS, *grammar._COLOURS, *grammar._VARIABLES,
        *(zh for _, zh in grammar._DICTIONARY), *(name for name, _, _ in grammar._FRAMEWORKS),
    ]  # fmt: skip
    assert [word for word in words if word not in whole] == []


def test_choices_are_skewed(corpus):
    """A first choice is far likelier than a last one, so that greedy decoding has a winner."""
    verbs = grammar._LANGUAGES["en"]["verb"]
    whole = "\n".join(corpus)
    counts = [whole.count(f" {verb} ") for verb in verbs]
    assert counts[0] > 8 * counts[-1] > 0


def test_some_documents_say_it_again(corpus):
    """One document in five repeats itself, and some of them are longer than a bf16 counts positions."""
    again = sum(
        text[: len(text) // 4] == text[i : i + len(text) // 4] for text in corpus if (i := text.find(text[:40], 1)) > 0
    )
    assert again >= len(corpus) / 20
    assert sum(len(text) > 2000 for text in corpus) >= 20


def test_answers_are_right(corpus):
    """What a document looks up is what its table says: copying at a distance is something to learn."""
    checked = 0
    for text in corpus:
        if not text.startswith("Table: ") or text.count("Table: ") > 1:
            continue
        table, _, answers = text.removeprefix("Table: ").partition("Answers: ")
        known = dict(entry.split(" = ") for entry in table.split("; ")[:-1] if " = " in entry)
        for answer in answers.rstrip(";").split("; "):
            colour, _, value = answer.partition(" -> ")
            assert known[colour] == value, text
            checked += 1
    assert checked > 100
