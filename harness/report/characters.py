"""Characters that a report may hold: a candidate's name and a port's exception come from others.

An escape code in them could rewrite what a terminal shows, a NUL or a surrogate makes XML and UTF-8 impossible.
"""

from __future__ import annotations

import re

#: All that is no character of XML 1.0 (https://www.w3.org/TR/xml/#charsets): control codes, surrogates, two more.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
REPLACEMENT = "\ufffd"


def legal(text: str) -> str:
    """The text with line feeds as line ends, and a replacement character for each that XML or UTF-8 cannot hold."""
    return _ILLEGAL.sub(REPLACEMENT, text.replace("\r\n", "\n").replace("\r", "\n"))


def one_line(text: str) -> str:
    """The same on one line: whitespace of every kind becomes a space."""
    return " ".join(legal(text).split())
