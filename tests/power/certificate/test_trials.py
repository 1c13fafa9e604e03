"""Which bugs are put into the model."""

from __future__ import annotations

import pytest

from harness.power.certificate import Sight, trials
from tests.power.certificate.made_up import bug


@pytest.mark.parametrize(
    ("one", "precision", "sight", "others", "expected"),
    [
        (bug("half"), "bfloat16", Sight(seen="not"), 0, True),
        (bug("half"), "float32", Sight(seen="not", needs=("half",)), 1, False),
        (bug("free", shows="tokens"), "float32", Sight(seen="not"), 0, True),
        (bug("free", shows="tokens"), "float32", Sight(seen="not", needs=("free",)), 1, False),
        (bug("fp32"), "float32", Sight(seen="not"), 0, False),
        (bug("fp32"), "float32", Sight(seen="not"), 1, True),
        (bug("fp32"), "float32", Sight(seen="not", signal=0.1, tokens=9.0), 1, False),
        (bug("second"), "float32", Sight(seen="not", signal=0.1, tokens=9.0), 1, True),
        (bug("single"), "float32", Sight(seen="name", signal=0.1), 1, True),
        (bug("second"), "float32", Sight(seen="size", signal=9.0), 1, False),
        (bug("fp32", group="precision"), "bfloat16", Sight(seen="not"), 0, True),
    ],
)
def test_what_is_tried(one, precision, sight, others, expected):
    """Whatever templates cannot tell and the suite has all for; nothing that is red already."""
    assert trials.is_tried(one, precision, sight, others) is expected
