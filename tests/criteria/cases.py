"""Small cases for the tests of the peers' rules."""

from dataclasses import replace

import numpy as np

from harness.criteria import CRITERIA, Case, Side


def rows(values, width=4):
    """An array of logits [n, V]; [0, width] for an empty list."""
    array = np.array(values, dtype=np.float64)
    return array if array.ndim == 2 else array.reshape(0, width)


def forced(same, candidate=None, exact=None, *, precision="float32", ids=None, prompt=1):
    """One prompt: decode rows [S, V], and the same rows at the end of prefill, behind rows of zeros in the prompt."""
    same = rows(same)
    candidate = same if candidate is None else rows(candidate)
    exact = same if exact is None else rows(exact)
    ids = np.zeros(len(same), dtype=np.int64) if ids is None else np.array(ids)

    def side(logits):
        zeros = np.zeros((prompt - 1, logits.shape[1]))
        return Side(
            prompt_ids=np.zeros(prompt, dtype=np.int64),
            tokens=np.zeros(0, dtype=np.int64),
            free=np.zeros((0, logits.shape[1])),
            forced_ids=np.concatenate([np.zeros(prompt, dtype=np.int64), ids]),
            decode=logits,
            prefill=np.concatenate([zeros, logits]),
        )

    return Case(precision=precision, candidate=(side(candidate),), same=(side(same),), exact=(side(exact),), repeats=())


def free(same, candidate, same_rows=None, candidate_rows=None, *, width=8):
    """One prompt and two own continuations, with logits of zeros where none are given."""
    base = forced(np.zeros((1, width)))

    def side(tokens, logits):
        logits = np.zeros((len(tokens), width)) if logits is None else rows(logits, width)
        return replace(base.same[0], tokens=np.array(tokens, dtype=np.int64), free=logits)

    return replace(base, candidate=(side(candidate, candidate_rows),), same=(side(same, same_rows),))


def together(*cases):
    """Several cases as one of several prompts."""
    return replace(
        cases[0],
        **{
            name: tuple(one for case in cases for one in getattr(case, name)) for name in ("candidate", "same", "exact")
        },
        repeats=tuple(one for case in cases for one in case.repeats),
    )


def drawn(seed=0, *, prompts=4, width=24, longest=9, precision="bfloat16", noise=0.02, error=0.02, dtype=np.float64):
    """Random sides: exact, a reference with noise, a candidate with another error; tokens are the best ones."""
    rng = np.random.default_rng(seed)
    sides = {"candidate": [], "same": [], "exact": []}
    repeats = []
    for _ in range(prompts):
        length, steps = (int(one) for one in rng.integers(1, longest, size=2))
        ids = rng.integers(0, width, size=length + steps)
        logits = {
            name: rng.normal(0, 3, size=shape)
            for name, shape in zip(
                ("free", "decode", "prefill"),
                ((steps, width), (steps, width), (length + steps - 1, width)),
                strict=True,
            )
        }
        for name, scale in (("exact", 0.0), ("same", noise), ("candidate", error)):
            arrays = {key: (one + scale * rng.normal(size=one.shape)).astype(dtype) for key, one in logits.items()}
            sides[name].append(
                Side(prompt_ids=ids[:length], tokens=arrays["free"].argmax(axis=1), forced_ids=ids, **arrays)
            )
        repeats.append((arrays["decode"], arrays["decode"].copy()))
    return Case(precision=precision, repeats=tuple(repeats), **{name: tuple(one) for name, one in sides.items()})


def changed(case, change, side="candidate"):
    """The case with ``change`` applied to all logits of one side."""
    sides = tuple(
        replace(one, free=change(one.free), decode=change(one.decode), prefill=change(one.prefill))
        for one in getattr(case, side)
    )
    return replace(case, **{side: sides})


def score(name, case):
    """The score of one criterion."""
    return CRITERIA[name].score(case)


def alarms(name, case):
    """Whether a criterion alarms at its published threshold."""
    return score(name, case) > CRITERIA[name].published[case.precision]
