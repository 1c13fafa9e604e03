"""Trials, bugs and rules that tests make up."""

from harness.criteria import Criterion
from harness.mutations.mutation import Mutation
from harness.power.trial import Trial


def trial(name="bug-a", status="drift", *, kind="bug", precision="bfloat16", host="host", **more):
    """A trial of a bug that was missed, with S/N 1."""
    values = {"strength": 1.0, "group": 0, "version": "v", "signal": 1.0, "error": 1.4, **more}
    return Trial(kind=kind, name=name, status=status, precision=precision, host=host, **values)


def null(name="plain", status="drift", *, kind="benign", **more):
    """A trial of a correct implementation."""
    return trial(name, status, kind=kind, **{"signal": 0.0, "error": 1.0, **more})


def mutation(name="bug-a", group="cache", subtlety="subtle", **more):
    """A bug that nobody applies."""
    return Mutation(
        id=name,
        group=group,
        subtlety=subtlety,
        wrong="wrong",
        reference="",
        hosts=frozenset({"host"}),
        change=None,
        **more,
    )


def named(*mutations):
    """A catalogue."""
    return {one.id: one for one in mutations}


def criterion(name="rule", sees="logits", **published):
    """A rule with published thresholds by precision, whose scores the trials hold already."""
    return Criterion(name=name, source="Peer", rule="score > threshold", sees=sees, published=published, score=None)


def rules(*criteria):
    """Rules by name."""
    return {one.name: one for one in criteria}
