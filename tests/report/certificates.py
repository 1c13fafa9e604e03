"""A certificate as a literal, for the tests of what is said of one."""

from __future__ import annotations

import math

from harness.power.certificate import Bug, Certificate, Column, Sight
from harness.values import Status


def bug(name, group="norms", options=(), **sights):
    """A bug that is seen as given, float32 first."""
    return Bug(id=name, group=group, wrong="wrong", shows="logits", options=options, sights=sights)


def unseen(**more):
    """A sight of nothing."""
    return Sight(seen="not", **more)


SIZE, NAME, TRIED = Sight(seen="size", weakest=0.1), Sight(seen="name", weakest=1.0), Sight(seen="tried")
BUGS = (
    bug("clear", float32=SIZE, bfloat16=SIZE),
    bug("hidden", float32=SIZE, bfloat16=NAME),
    bug("faint", float32=SIZE, bfloat16=unseen(tokens=2.5)),
    bug("fainter", float32=SIZE, bfloat16=unseen(tokens=3.9)),
    bug("hopeless", float32=unseen(tokens=1e7), bfloat16=unseen(signal=math.inf)),
    bug("padded", "cache", float32=unseen(needs=("padding",)), bfloat16=unseen(needs=("padding",))),
    bug("rounding", "precision", float32=unseen(needs=("half",)), bfloat16=TRIED),
    bug("sharp", "precision", float32=unseen(needs=("half",)), bfloat16=unseen(why="the check says identical")),
    bug("clamp", "precision", float32=unseen(needs=("float16",)), bfloat16=unseen(needs=("float16",))),
    bug("pieces", "cache", ("chunk=16",), float32=SIZE, bfloat16=SIZE),
    bug("window", "cache", float32=unseen(needs=("long",)), bfloat16=unseen(needs=("long",))),
    bug("penalty", "stopping", float32=unseen(needs=("penalties",)), bfloat16=unseen(needs=("penalties",))),
)
CERTIFICATE = Certificate(
    golden="m/s",
    digest="abc",
    model="m",
    model_type="llama",
    suite="s",
    run="batched",
    views=("replay", "prefill"),
    prompts=4,
    rows=100,
    longest=60,
    landmarks={"sliding_window": 16, "context": 1024},
    columns=(
        Column(precision="float32", status=Status.IDENTICAL, smallest=4.0, limit=6.0),
        Column(precision="bfloat16", status=Status.DRIFT, smallest=1.9, limit=7.0),
    ),
    bugs=BUGS,
    absent={"gone": "cannot be put into this model"},
    seconds=12.3,
    size=4_500_000,
    trials=3,
    trial_seconds=7.0,
    versions={"torch": "2"},
)
