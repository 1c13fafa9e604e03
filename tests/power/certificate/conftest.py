"""Verdicts on the tiny golden's reference, and the certificate of that golden, made once."""

from __future__ import annotations

import pytest

from harness import flow
from harness.mutations.catalogue import CATALOGUE
from harness.power.certificate import making
from harness.templates import caching
from tests.templates import tiny

#: Some with templates; one that the model lacks the part for; two that are tried; some that the suite lacks things for.
ASKED = (
    *(name for name in tiny.BUGS if not CATALOGUE[name].harmless),
    "bs-result-order",
    "tp-argmax-rows",
    "sg-min-tokens",
    "sg-pen-pad",
    "kv-not-reset",
    "pr-norm-half",
    "pr-fp16-clamp",
)


@pytest.fixture(scope="session")
def plain():
    """What a check says of the tiny golden's reference itself, by precision."""
    return {
        name: flow.check(tiny.golden(), f"hf:dtype={name}", reference=tiny.MODEL, upcast=False)
        for name in tiny.PRECISIONS
    }


@pytest.fixture(scope="session")
def tried():
    """The certificate of the tiny golden over a few bugs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "bugs_of", lambda _type: [CATALOGUE[name] for name in ASKED])
        patch.setattr(caching, "templates_of", lambda *_args: tiny.bank())
        return making.make(tiny.golden(), tiny.MODEL, lambda _text: None)
