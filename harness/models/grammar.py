"""Endless synthetic text: several languages, code, lists, look-ups, translations, from one seed.

The text has to make a small model a good *host* for bugs (see docs/models.md): choices are skewed,
so that greedy decoding has a clear winner at most steps and a near tie at some; names and values
recur at long distance, so that attention and positions matter; documents end, so that the model
learns to emit the end-of-sequence token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

_NAMES = ("Mira", "Tomas", "Ada", "Jonas", "Lena", "Omar", "Ines", "Pavel", "Noor", "Felix", "Vera", "Hugo")

_LANGUAGES: dict[str, dict[str, Sequence[str]]] = {
    "en": {
        "open": ("In the morning", "At noon", "In the evening", "After the rain", "Before the storm"),
        "verb": ("walks to", "looks at", "writes about", "paints", "remembers", "leaves"),
        "thing": ("the old harbour", "a red house", "the long bridge", "a quiet garden", "the green hill", "a small boat"),
        "then": ("Then the wind turns", "Nobody answers", "The lamp is still on", "The door stays open", "It begins to snow"),
    },
    "fr": {
        "open": ("Le matin", "À midi", "Le soir", "Après la pluie", "Avant l'orage"),
        "verb": ("marche vers", "regarde", "dessine", "décrit", "retrouve", "quitte"),
        "thing": ("le vieux port", "une maison rouge", "le long pont", "un jardin calme", "la colline verte", "un petit bateau"),
        "then": ("Puis le vent tourne", "Personne ne répond", "La lampe est allumée", "La porte reste ouverte", "Il commence à neiger"),
    },
    "de": {
        "open": ("Am Morgen", "Zu Mittag", "Am Abend", "Nach dem Regen", "Vor dem Sturm"),
        "verb": ("geht zu", "blickt auf", "schreibt über", "malt", "sucht", "verlässt"),
        "thing": ("den alten Hafen", "ein rotes Haus", "die lange Brücke", "einen stillen Garten", "den grünen Hügel", "ein kleines Boot"),
        "then": ("Dann dreht der Wind", "Niemand antwortet", "Die Lampe brennt noch", "Die Tür bleibt offen", "Es beginnt zu schneien"),
    },
    "es": {
        "open": ("Por la mañana", "Al mediodía", "Por la tarde", "Después de la lluvia", "Antes de la tormenta"),
        "verb": ("camina hacia", "mira", "dibuja", "describe", "recuerda", "abandona"),
        "thing": ("el viejo puerto", "una casa roja", "el largo puente", "un jardín tranquilo", "la colina verde", "un barco pequeño"),
        "then": ("Luego cambia el viento", "Nadie responde", "La lámpara sigue encendida", "La puerta queda abierta", "Empieza a nevar"),
    },
}  # fmt: skip

_DICTIONARY = (
    ("soup", "汤"), ("tea", "茶"), ("rice", "米饭"), ("music", "音乐"), ("books", "书"), ("rain", "雨"),
    ("fish", "鱼"), ("apples", "苹果"), ("winter", "冬天"), ("flowers", "花"), ("coffee", "咖啡"), ("the sea", "大海"),
)  # fmt: skip
_SUBJECTS = (("I", "我"), ("You", "你"), ("We", "我们"), ("They", "他们"))
_FEELINGS = (("like", "喜欢"), ("love", "爱"), ("want", "想要"), ("know", "知道"))

_FRAMEWORKS = (
    ("DeepSpeed", "a machine learning framework", "trains and serves large models on many devices"),
    ("BLOOM", "a large language model", "writes text in many languages"),
    ("PyTorch", "a tensor library", "computes gradients and runs on many devices"),
    ("Python", "a programming language", "is easy to read and to write"),
    ("Redis", "a data store", "keeps values in memory and sends messages"),
)
_OPERATIONS = (("add", "+"), ("subtract", "-"), ("multiply", "*"), ("divide", "/"))
_VARIABLES = ("total", "value", "count", "left", "right", "price", "weight", "length")
_COLOURS = ("red", "blue", "green", "white", "black", "brown", "grey", "pink")
_ITEMS = ("bread", "milk", "salt", "eggs", "honey", "butter", "cheese", "onions", "pepper", "flour")


_T = TypeVar("_T")


def _pick(rng: random.Random, options: Sequence[_T], ratio: float = 0.5) -> _T:
    """One option, each ``ratio`` times as likely as the one before: a clear winner, near ties far down."""
    return rng.choices(options, weights=[ratio**i for i in range(len(options))])[0]


def _any(rng: random.Random, options: Sequence[_T]) -> _T:
    """One option, less skewed: all of them are met in training, and one still wins in greedy decoding."""
    return _pick(rng, options, 0.7)


def _some(rng: random.Random, options: Sequence[_T], count: int) -> list[_T]:
    """``count`` different options, the first ones likelier and earlier."""
    left, chosen = list(options), []
    for _ in range(count):
        chosen.append(left.pop(left.index(_any(rng, left))))
    return chosen


def _shuffled(rng: random.Random, options: Sequence[_T]) -> list[_T]:
    """The options in a random order, so that the context (not the corpus) says what is likely."""
    return rng.sample(list(options), len(options))


def _story(rng: random.Random) -> str:
    words = _LANGUAGES[_any(rng, list(_LANGUAGES))]
    name, places = _any(rng, _NAMES), _shuffled(rng, words["thing"])
    sentences = []
    for _ in range(rng.randint(2, 9)):
        sentences.append(f"{_pick(rng, words['open'])} {name} {_pick(rng, words['verb'])} {_pick(rng, places)}.")
        if rng.random() < 0.35:
            sentences.append(f"{_pick(rng, words['then'])}.")
    return " ".join(sentences)


def _translation(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(1, 8)):
        (subject_en, subject_zh), (verb_en, verb_zh) = _any(rng, _SUBJECTS), _any(rng, _FEELINGS)
        noun_en, noun_zh = _any(rng, _DICTIONARY)
        lines.append(
            f"Translate to chinese. EN: {subject_en} {verb_en} {noun_en}. CN: {subject_zh}{verb_zh}{noun_zh}。"
        )
    return "\n".join(lines)


def _code(rng: random.Random) -> str:
    functions = []
    for _ in range(rng.randint(1, 4)):
        (operation, sign), (a, b) = _any(rng, _OPERATIONS), _some(rng, _VARIABLES, 2)
        functions.append(
            f"def {operation}_{a}_{b}({a}, {b}):\n"
            f'    """Return {a} {sign} {b}."""\n'
            f"    result = {a} {sign} {b}\n"
            f"    return result\n"
        )
        if rng.random() < 0.65:
            functions.append(f"print({operation}_{a}_{b}({_any(rng, range(1, 10))}, {_any(rng, range(1, 10))}))\n")
    return "\n".join(functions)


def _arithmetic(rng: random.Random) -> str:
    start, step = _any(rng, range(10)), _any(rng, range(1, 5))
    terms = [start + step * i for i in range(rng.randint(4, 16))]
    return f"Count by {step}: " + ", ".join(str(term) for term in terms) + "."


def _shopping(rng: random.Random) -> str:
    items = _some(rng, _ITEMS, rng.randint(4, 7))
    listed = "\n".join(f"{i}. {item}" for i, item in enumerate(items, start=1))
    return f"Shopping list:\n{listed}\nFirst: {items[0]}. Last: {items[-1]}."


def _lookup(rng: random.Random) -> str:
    table = {colour: rng.randint(10, 99) for colour in _some(rng, _COLOURS, rng.randint(3, 6))}
    facts = " ".join(f"{colour} = {value};" for colour, value in table.items())
    filler = _story(rng) if rng.random() < 0.3 else ""
    asked = _shuffled(rng, list(table))
    answers = " ".join(f"{colour} -> {table[colour]};" for colour in asked)
    return f"Table: {facts} {filler} Answers: {answers}"


def _framework(rng: random.Random) -> str:
    chosen = _some(rng, _FRAMEWORKS, rng.randint(1, 3))
    sentences = [f"{name} is {kind}. {name} {does}." for name, kind, does in chosen]
    return " ".join(sentences) + f" This text is about {' and '.join(name for name, _, _ in chosen)}."


def _question(rng: random.Random) -> str:
    name, thing = _any(rng, _NAMES), _any(rng, _ITEMS)
    turns = [f"User: My name is {name} and I need {thing}.", f"Assistant: Hello {name}, here is {thing}."]
    for _ in range(rng.randint(0, 3)):
        if rng.random() < 0.65:
            turns += ["User: What is my name?", f"Assistant: Your name is {name}."]
        else:
            turns += ["User: What do I need?", f"Assistant: You need {thing}."]
    return "\n".join(turns)


_KINDS: Sequence[Callable[[random.Random], str]] = (
    _story, _code, _lookup, _translation, _question, _shopping, _framework, _arithmetic,
)  # fmt: skip


def documents(seed: int) -> Iterator[str]:
    """Yield documents without end; the same seed gives the same text on every machine.

    One document in five is a text said several times over, so that copying at a distance of
    hundreds of tokens is something the model has learnt.
    """
    rng = random.Random(seed)
    while True:
        text = _pick(rng, _KINDS, 0.85)(rng)
        if rng.random() < 0.2:
            text = " ".join([text] * rng.randint(2, 6))
        yield text
