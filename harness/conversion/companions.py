"""Files beside the weights that belong to a model: its tokenizer and how it generates."""

from __future__ import annotations

from pathlib import Path

from harness.files import replace_file

_NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def copy(source: Path, target: Path) -> tuple[str, ...]:
    """Copy those that are there; their names."""
    found = tuple(name for name in _NAMES if (source / name).is_file())
    for name in found:
        replace_file(target / name, (source / name).read_bytes())
    return found
