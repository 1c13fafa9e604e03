"""Prompts that nothing was trained or tuned on, drawn from a seed, and the goldens of models on them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness import checkpoint, flow, store, suites
from harness.errors import GoldenError
from harness.files import locked
from harness.models import grammar
from harness.models.recipes import RECIPES
from harness.numerics.constants import EFFECT, REPLICAS
from harness.values import Golden, Suite

#: The trained models, each with its directory as seen from the repository's root.
MODELS: Mapping[str, Path] = {name: Path("golden") / name / "model" for name in RECIPES}
PRECISIONS = tuple(EFFECT)

_SHORTEST = 8
#: Of the grammar's text, by the tokenizers of the trained models.
CHARACTERS_A_TOKEN = 3.7


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Which prompts, and which file. Group g is made from seed ``seed + g``.

    The small models were trained on the text of seeds 11 to 14 and 1,011 to 1,014, the suites took 20,231.
    """

    name: str
    seed: int


NULLS = Bench(name="nulls", seed=2_000_000)
PILOT = Bench(name="pilot", seed=3_000_000)
TRIALS = Bench(name="trials", seed=4_000_000)


def generate_suite(
    seed: int,
    prompts: int = 8,
    new_tokens: int = 32,
    *,
    longest: int = 160,
    long: int | None = 480,
    characters: float = CHARACTERS_A_TOKEN,
    alone: bool = False,
    ends: bool = False,
) -> Suite:
    """Beginnings of the grammar's documents, in left-padded batches of half of them.

    Args:
        seed: of the documents, and of how much is taken of each.
        prompts: how many.
        new_tokens: that follow each.
        longest: prompts are of about 8 to so many tokens, evenly in their logarithm.
        long: tokens of the last one, of several documents, past every window and bucket; None for one like the others.
        characters: of the model's tokenizer a token, on this text.
        alone: also the first prompt by itself, the longest, and the first again.
        ends: texts may end: all but the long prompt are whole documents but for a few characters, the first five whole;
            the last prompt of a batch has half the budget, so that rows end apart in any case.
    """
    rng = random.Random(seed)
    documents = grammar.documents(seed)
    lengths = [math.exp(rng.uniform(math.log(_SHORTEST), math.log(longest))) for _ in range(prompts)]
    sizes = [round(length * characters) for length in lengths]
    if ends:
        cut = [rng.randint(1, round(new_tokens * characters / 2)) if number > 4 else 0 for number in range(prompts)]
        texts = [_ending(documents, length, less) for length, less in zip(sizes, cut, strict=True)]
    else:
        texts = [_beginning(documents, length) for length in sizes]
    if long is not None:
        texts[-1] = _joined(documents, round(long * characters))
    views = ["generate", "replay", "prefill"]
    # A size, since without one batches are planned by length and hardly padded.
    size, shorter = max(1, prompts // 2), {"max_new_tokens": new_tokens // 2}
    runs = [{"name": "batched", "batch_size": size, "views": views, "quick": True}]
    if alone:
        runs.append({"name": "order", "batch_size": 1, "order": "A-B-A", "views": ["replay"]})
    data = {
        "name": f"drawn-{seed}",
        "description": f"Drawn from seed {seed}.",
        "stop": "eos" if ends else "ignore-eos",
        "add_special_tokens": True,
        "max_new_tokens": new_tokens,
        "prompts": [
            {"id": f"drawn-{number}", "text": text, **(shorter if ends and (number + 1) % size == 0 else {})}
            for number, text in enumerate(texts)
        ],
        "runs": runs,
    }
    return suites.suite_from_dict(data, f"the suite of seed {seed}")


def _beginning(documents: Iterator[str], characters: int) -> str:
    return next(text for text in documents if len(text) > characters)[:characters]


def _ending(documents: Iterator[str], characters: int, less: int) -> str:
    """A document of at most twice so many characters, and more than are cut off its end."""
    text = next(text for text in documents if 2 * less < len(text) <= 2 * max(characters, 2 * less))
    return text[: len(text) - less]


def _joined(documents: Iterator[str], characters: int) -> str:
    text = ""
    while len(text) < characters:
        text += next(documents) + "\n\n"
    return text[:characters]


def recorded(
    model: Path,
    suite: Suite,
    out: Path,
    progress: Callable[[str], None] = lambda _text: None,
    *,
    precisions: tuple[str, ...] = PRECISIONS,
) -> Golden:
    """The golden of a model and suite in ``out``, made where it is missing, damaged, or of something else."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # Shards of one run need the same goldens.
    with locked(out.parent / f"{out.name}.lock"):
        try:
            golden = store.read_golden(out)
        except GoldenError:
            golden = None
        if golden is None or golden.suite != suite or golden.model.digest != checkpoint.identify(model).digest:
            golden = flow.record(
                model,
                suite,
                out=out,
                precisions=precisions,
                replicas=REPLICAS,
                update=True,
                reason="of another suite or model",
                progress=progress,
            )
    return golden
