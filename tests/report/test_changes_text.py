"""What an update would change, as text."""

from __future__ import annotations

from harness.report.terminal import changes_to_text
from harness.values import Change, Changes, Difference, Kind

SAME = Change(prompt="count", kind=Kind.SAME)
DRIFT = Change(prompt="story", kind=Kind.DRIFT, message="within round-off", deviation=0.0312, limit=3.0)
TIE = Change(
    prompt="chat", kind=Kind.TIE, message="token 4 became 9", step=7, margin=1.2e-5, deviation=0.9, limit=3.125
)
WRONG = Change(prompt="code", kind=Kind.BUG_SIZED, message="the logits are off", deviation=812.0, limit=3.0)
WORSE = Change(prompt="list", kind=Kind.BUG_SIZED, message="the logits are off", deviation=900.0, limit=3.0)


def changes(*prompts: Change, general: tuple[Change, ...] = (), environment: tuple[Difference, ...] = ()) -> Changes:
    """From one golden to another."""
    return Changes(old="m/old", new="m/new", prompts=prompts, general=general, environment=environment)


def test_nothing_is_one_line() -> None:
    """Where every prompt is the same there is one line."""
    assert changes_to_text(changes(SAME, SAME)) == "m/old -> m/new: nothing has changed in 2 prompts"


def test_prompts_are_in_columns_worst_first() -> None:
    """Each prompt that is not the same has a line, the worst first, its figures under their titles."""
    header, titles, *lines = changes_to_text(changes(DRIFT, SAME, TIE, WRONG, WORSE)).splitlines()
    assert header == "m/old -> m/new: prompts: 2 bug-sized, 1 tie, 1 drift, 1 same; worst: bug-sized"
    assert [line.split()[0] for line in lines] == ["list", "code", "chat", "story"]
    for line, kind in zip(lines, ("bug-sized", "bug-sized", "tie", "drift"), strict=True):
        assert line.index(kind) == titles.index("kind")
    chat = lines[2]
    assert chat[titles.index("differs from") :].startswith("step 7 ")
    assert chat[titles.index("margin") :].startswith("1.2e-05 ")
    assert chat[titles.index("deviation") :].startswith("0.9 (limit 3.12) ")
    assert chat[titles.index("what") :] == "token 4 became 9"
    assert lines[3][titles.index("margin") :].startswith("- ")


def test_general_changes_and_environment_follow() -> None:
    """What is of no prompt comes behind the prompts, and then the environment in one line."""
    text = changes_to_text(
        changes(
            WRONG,
            general=(
                Change(prompt="floor bfloat16", kind=Kind.DRIFT, message="measured again"),
                Change(prompt="model", kind=Kind.BUG_SIZED, message="the weights are others"),
            ),
            environment=(Difference(name="torch", golden="2.6", today="2.7"),),
        )
    )
    assert text.splitlines()[-3:] == [
        "  model: bug-sized: the weights are others",
        "  floor bfloat16: drift: measured again",
        "  environment: torch 2.6 -> 2.7",
    ]


def test_the_environment_alone_is_told() -> None:
    """Where only the environment differs it is said, without a table."""
    text = changes_to_text(changes(SAME, environment=(Difference(name="threads", golden="1", today="2"),)))
    assert text == "m/old -> m/new: prompts: 1 same; worst: same\n  environment: threads 1 -> 2"


def test_words_of_others_stay_on_their_line() -> None:
    """A message with line ends or control characters in it, from a hostile golden, cannot forge another line."""
    other = Change(prompt="floor x", kind=Kind.STRUCTURAL, message="lost: a\nb\x1b[31m")
    text = changes_to_text(changes(SAME, general=(other,)))
    assert len(text.splitlines()) == 2
    assert "\x1b" not in text
