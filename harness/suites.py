"""Read a suite, resolve it against a tokenizer, digest it.

A suite comes from a TOML file or from inside a golden; both go through `suite_from_dict`, which
trusts nothing. Resolving turns its prompts into token ids for one model, and never truncates.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import tomllib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from harness.errors import SuiteError
from harness.values import Order, Prompt, Request, Run, Stop, Suite, View

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_T = TypeVar("_T")

_SYNTAX = "Correct the syntax there, see https://toml.io"
_MAX_BYTES = 4 * 2**20
_MAX_INT = 2**31 - 1  # ids and counts are int32 in a trace
_SUITE_KEYS = ("name", "description", "stop", "add_special_tokens", "max_new_tokens", "prompts", "runs")
_SOURCES = ("text", "messages", "ids")
_PROMPT_KEYS = ("id", *_SOURCES, "repeat_to_tokens", "max_new_tokens")
_MESSAGE_KEYS = ("role", "content")
_RUN_KEYS = ("name", "batch_size", "order", "views", "quick")
_KINDS = {
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    float: "a number with a point",
    list: "an array",
    dict: "a table",
    type(None): "null",
}
_EXAMPLES = {
    "name": 'name = "core"',
    "description": 'description = "what it is for"',
    "stop": 'stop = "ignore-eos"',
    "add_special_tokens": "add_special_tokens = true",
    "max_new_tokens": "max_new_tokens = 64",
    "prompts": "[[prompts]]",
    "runs": "[[runs]]",
    "id": 'id = "story-en"',
    "text": 'text = "In the morning"',
    "messages": 'messages = [{ role = "user", content = "Hello" }]',
    "ids": "ids = [17, 4]",
    "role": 'role = "user"',
    "content": 'content = "Hello"',
    "batch_size": "batch_size = 4",
    "order": 'order = "suite"',
    "views": 'views = ["replay", "prefill"]',
    "quick": "quick = true",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # names become paths, pytest ids and report lines
_CONTEXT = re.compile(r"context-([0-9]{1,9})")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write half a character; no tokenizer takes it


# --- read --------------------------------------------------------------------------------------


def load_suite(path: str | Path) -> Suite:
    """Read a suite from a TOML file.

    Raises:
        SuiteError: the file cannot be read, or says something that a suite cannot say.
    """
    text = _read(path)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number too long to convert, and endless nesting
        raise _refusal(str(path), f"not valid TOML: {error!s:.200}", fix=_SYNTAX) from None
    return suite_from_dict(data, str(path))


def _read(path: str | Path) -> str:
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise _refusal(str(path), "no such suite file", fix=_neighbours(Path(path))) from None
    except IsADirectoryError:
        fix = f"Name one of the files in it, such as {Path(path) / 'core.toml'}"
        raise _refusal(str(path), "is a directory, not a suite file", fix=fix) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise _refusal(str(path), f"cannot be read: {error}", fix="Pass a suite file that you can read") from None
    if len(content) > _MAX_BYTES:
        raise _refusal(str(path), f"larger than {_MAX_BYTES // 2**20} MiB", fix="Split the suite into several files")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refusal(str(path), f"not UTF-8 at byte {error.start}", fix="Save the file as UTF-8") from None


def _neighbours(path: Path) -> str:
    """What to do about a missing file: the suites that do lie there, nearest name first."""
    names = [found.name for found in sorted(path.parent.glob("*.toml"))]
    if not names:
        return "Pass the path of a suite file, such as prompts/core.toml"
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"Did you mean {path.parent / close[0]}?" if close else f"There are {', '.join(names[:8])}"


def suite_from_dict(data: object, where: str) -> Suite:
    """Check ``data`` (parsed TOML or JSON, trusted in nothing) and make a suite of it.

    Args:
        data: the suite's tables, as `load_suite` reads and `suite_to_dict` writes them.
        where: the file that it comes from, which errors name.

    Raises:
        SuiteError: anything unknown, missing, of the wrong type, or twice.
    """
    table = _table(data, where, _SUITE_KEYS)
    suite = Suite(
        name=_name(table, "name", where),
        description=_text(table, "description", where) if "description" in table else "",
        stop=_one_of(table, "stop", get_args(Stop), where),
        add_special_tokens=_take(table, "add_special_tokens", bool, where),
        max_new_tokens=_count(table, "max_new_tokens", where),
        prompts=tuple(_prompt(*entry) for entry in _placed(table, "prompts", where)),
        runs=tuple(_run(*entry) for entry in _placed(table, "runs", where)),
        digest="",
    )
    _check_together(suite, where)
    return dataclasses.replace(suite, digest=digest(suite))


def suite_to_dict(suite: Suite) -> dict[str, Any]:
    """The suite as plain JSON types, as `suite_from_dict` reads it; the digest is left out, it is never trusted."""
    return {
        "name": suite.name,
        "description": suite.description,
        "stop": suite.stop,
        "add_special_tokens": suite.add_special_tokens,
        "max_new_tokens": suite.max_new_tokens,
        "prompts": [_plain(prompt) for prompt in suite.prompts],
        "runs": [_plain(run) for run in suite.runs],
    }


def digest(suite: Suite) -> str:
    """SHA-256, in hex, of what changes a golden: everything but the description and the runs."""
    content = suite_to_dict(suite)
    del content["description"], content["runs"]
    return _sha256(content)


def _sha256(content: object) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _plain(value: Prompt | Run) -> dict[str, Any]:
    """The fields that are set, tuples as lists."""
    entries = {key: entry for key, entry in dataclasses.asdict(value).items() if entry is not None}
    return {key: list(entry) if isinstance(entry, tuple) else entry for key, entry in entries.items()}


# --- check: each function reads one thing of a table, or refuses it by file, place and fix ---------


def _prompt(data: object, place: str) -> Prompt:
    place = _labelled(data, "id", place)
    table = _table(data, place, _PROMPT_KEYS)
    prompt_id = _name(table, "id", place)
    source = _source(table, place)
    return Prompt(
        id=prompt_id,
        text=_filled_text(table, "text", place) if source == "text" else None,
        messages=_messages(table, place) if source == "messages" else None,
        ids=_ids(table, place) if source == "ids" else None,
        repeat_to_tokens=_repeat(table, source, place) if "repeat_to_tokens" in table else None,
        max_new_tokens=_count(table, "max_new_tokens", place) if "max_new_tokens" in table else None,
    )


def _source(table: Mapping[str, Any], place: str) -> str:
    given = [key for key in _SOURCES if key in table]
    if not given:
        raise _refusal(place, "no `text`, `messages` or `ids`", fix="Give the prompt as exactly one of the three")
    if len(given) > 1:
        both = " and ".join(f"`{key}`" for key in given)
        raise _refusal(place, f"{both} in one prompt", fix="Keep one of them, or make two prompts")
    return given[0]


def _messages(table: Mapping[str, Any], place: str) -> tuple[Mapping[str, str], ...]:
    return tuple(_message(*entry) for entry in _placed(table, "messages", place))


def _message(data: object, place: str) -> Mapping[str, str]:
    table = _table(data, place, _MESSAGE_KEYS)
    return {key: _filled_text(table, key, place) for key in _MESSAGE_KEYS}


def _ids(table: Mapping[str, Any], place: str) -> tuple[int, ...]:
    entries = _entries(table, "ids", place)
    for i, entry in enumerate(entries):
        if type(entry) is not int or not 0 <= entry <= _MAX_INT:
            fix = f"Write token ids as whole numbers from 0 to {_MAX_INT}"
            raise _refusal(place, f"`ids[{i}]` is not a token id", fix=fix)
    return tuple(entries)


def _repeat(table: Mapping[str, Any], source: str, place: str) -> int | str:
    if source == "messages":
        raise _refusal(
            place, "`repeat_to_tokens` with `messages`", fix="Use it with `text` or `ids`, or write the turns out"
        )
    value = table["repeat_to_tokens"]
    if type(value) is int and 1 <= value <= _MAX_INT:
        return value
    if type(value) is str and _CONTEXT.fullmatch(value):
        return value
    raise _refusal(place, "`repeat_to_tokens` is not a length", fix='Write a whole number from 1, or "context-N"')


def _run(data: object, place: str) -> Run:
    place = _labelled(data, "name", place)
    table = _table(data, place, _RUN_KEYS)
    return Run(
        name=_name(table, "name", place),
        batch_size=_count(table, "batch_size", place) if "batch_size" in table else None,
        order=_one_of(table, "order", get_args(Order), place) if "order" in table else "suite",
        views=_views(table, place) if "views" in table else get_args(View),
        quick=_take(table, "quick", bool, place) if "quick" in table else False,
    )


def _views(table: Mapping[str, Any], place: str) -> tuple[View, ...]:
    known: tuple[View, ...] = get_args(View)
    views = _entries(table, "views", place)
    for i, view in enumerate(views):
        if view not in known:
            raise _refusal(place, f"`views[{i}]` is {_shown(view)}", fix=f"Views are {_listed(known)}")
        if view in views[:i]:
            raise _refusal(place, f"`views` names {_shown(view)} twice", fix="Name each view once")
    return tuple(views)


def _check_together(suite: Suite, where: str) -> None:
    """What no single entry can show: names used twice, no quick run, an order that needs two prompts."""
    _check_unique([prompt.id for prompt in suite.prompts], "prompts", "id", where)
    _check_unique([run.name for run in suite.runs], "runs", "name", where)
    if not any(run.quick for run in suite.runs):
        raise _refusal(f"{where}: runs", "no run is quick", fix="Give the run that `--quick` uses `quick = true`")
    for i, run in enumerate(suite.runs):
        if run.order == "A-B-A" and len(suite.prompts) < 2:
            place = f'{where}: runs[{i}] (name "{run.name}")'
            raise _refusal(place, "order A-B-A with one prompt", fix='Add a second prompt, or write `order = "suite"`')


def _check_unique(names: Sequence[str], key: str, field: str, where: str) -> None:
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        first = seen.setdefault(name, i)
        if first != i:
            place = f'{where}: {key}[{i}] ({field} "{name}")'
            raise _refusal(place, f"{key}[{first}] has the same {field}", fix=f"Give each entry its own {field}")


def _labelled(data: object, key: str, place: str) -> str:
    """The place with the entry's own name, where it has a usable one."""
    name = data.get(key) if isinstance(data, dict) else None
    return f'{place} ({key} "{name}")' if isinstance(name, str) and _NAME.fullmatch(name) else place


def _table(data: object, place: str, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise _refusal(
            place, f"is {_kind(data)}, a table is wanted", fix=f"Write a table with the keys {_listed(known)}"
        )
    for key in data:
        if key not in known:
            close = difflib.get_close_matches(str(key)[:64], known, n=1)
            fix = f"Did you mean `{close[0]}`?" if close else f"The keys are {_listed(known)}"
            raise _refusal(place, f"unknown key {_shown(key)}", fix=fix)
    return data


def _take(table: Mapping[str, Any], key: str, kind: type[_T], place: str) -> _T:
    if key not in table:
        raise _refusal(place, f"`{key}` is missing", fix=f"Write it as `{_EXAMPLES[key]}`")
    value = table[key]
    if type(value) is not kind:  # not isinstance: a bool is an int in Python
        raise _refusal(place, f"`{key}` is {_kind(value)}", fix=f"Write it as `{_EXAMPLES[key]}`")
    return value


def _entries(table: Mapping[str, Any], key: str, place: str) -> list[Any]:
    entries = _take(table, key, list, place)
    if not entries:
        raise _refusal(place, f"`{key}` is empty", fix=f"Give `{key}` at least one entry")
    return entries


def _placed(table: Mapping[str, Any], key: str, place: str) -> list[tuple[Any, str]]:
    """The entries of an array, each with its place for errors."""
    return [(entry, f"{place}: {key}[{i}]") for i, entry in enumerate(_entries(table, key, place))]


def _text(table: Mapping[str, Any], key: str, place: str) -> str:
    value = _take(table, key, str, place)
    if _SURROGATE.search(value):
        raise _refusal(place, f"`{key}` holds half a surrogate pair", fix="Write the character itself, in UTF-8")
    return value


def _filled_text(table: Mapping[str, Any], key: str, place: str) -> str:
    value = _text(table, key, place)
    if not value:
        raise _refusal(place, f"`{key}` is empty", fix="Write at least one character")
    return value


def _name(table: Mapping[str, Any], key: str, place: str) -> str:
    value = _take(table, key, str, place)
    if not _NAME.fullmatch(value):
        fix = "Use up to 64 of the characters A-Z a-z 0-9 . _ -, a letter or digit first"
        raise _refusal(place, f"`{key}` is {_shown(value)}", fix=fix)
    return value


def _count(table: Mapping[str, Any], key: str, place: str) -> int:
    value = _take(table, key, int, place)
    if not 1 <= value <= _MAX_INT:
        raise _refusal(place, f"`{key}` is below 1 or beyond {_MAX_INT}", fix="Write a whole number from 1")
    return value


def _one_of(table: Mapping[str, Any], key: str, options: Sequence[_T], place: str) -> _T:
    value = _take(table, key, str, place)
    for option in options:
        if option == value:
            return option
    raise _refusal(place, f"`{key}` is {_shown(value)}", fix=f"Write one of {_listed(options)}")


def _kind(value: object) -> str:
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def _shown(value: object) -> str:
    """A value short enough for one line; other than strings only by kind, a number can have a million digits."""
    if not isinstance(value, str):
        return _kind(value)
    return json.dumps(value if len(value) <= 40 else value[:37] + "...")


def _listed(options: Sequence[object]) -> str:
    return ", ".join(f'"{option}"' for option in options)


def _refusal(place: str, problem: str, *, fix: str) -> SuiteError:
    return SuiteError(f"{place}: {problem}", fix=fix)


# --- resolve -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Target:
    """What a suite is resolved against: a tokenizer, and the limits of the model that it feeds."""

    tokenizer: PreTrainedTokenizerFast | None
    context: int | None
    vocabulary: int
    model: str


def resolve(
    suite: Suite, tokenizer: PreTrainedTokenizerFast | None, *, context: int | None, vocabulary: int, model: str
) -> tuple[Request, ...]:
    """Turn every prompt into token ids for one model; nothing is ever truncated to make it fit.

    Args:
        suite: what to resolve.
        tokenizer: a transformers tokenizer; None resolves suites whose prompts are all `ids`.
        context: tokens that the model can hold, prompt and continuation together; None where it sets no limit.
        vocabulary: ids that the model knows are below this.
        model: the model's name, for errors.

    Returns:
        One request a prompt, in the suite's order. `text` is the text that was encoded; with
        `repeat_to_tokens` the ids are the first of that text's.

    Raises:
        SuiteError: a prompt that is too long or empty, has an id beyond the vocabulary, or needs a
            tokenizer or chat template that is not there.
    """
    target = _Target(tokenizer=tokenizer, context=context, vocabulary=vocabulary, model=model)
    return tuple(_request(prompt, suite, target) for prompt in suite.prompts)


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast | None) -> str | None:
    """SHA-256, in hex, of a tokenizer's rules and chat template; None where there is no tokenizer.

    Padding and truncation are left out: transformers writes those of the latest call into the
    backend, so that a tokenizer would change its digest by being used.
    """
    if tokenizer is None:
        return None
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    return _sha256([kept, tokenizer.chat_template])


def _request(prompt: Prompt, suite: Suite, target: _Target) -> Request:
    place = f'suite "{suite.name}": prompt "{prompt.id}"'
    new = prompt.max_new_tokens or suite.max_new_tokens
    length = _wanted_length(prompt, target, place)
    if length is not None:
        _check_fits(length, new, target, place)  # before a huge repetition is made
    ids, text = _encoded(prompt, length, suite, target, place)
    _check_fits(len(ids), new, target, place)
    _check_known(ids, target, place)
    return Request(id=prompt.id, prompt_ids=ids, max_new_tokens=new, text=text)


def _wanted_length(prompt: Prompt, target: _Target, place: str) -> int | None:
    """`repeat_to_tokens` as a number; "context-N" is the model's context less N."""
    wanted = prompt.repeat_to_tokens
    if not isinstance(wanted, str):
        return wanted
    if target.context is None:
        problem = f'`repeat_to_tokens = "{wanted}"`, and {target.model} states no context length'
        raise _refusal(place, problem, fix="Write the length as a number of tokens")
    length = target.context - int(wanted.removeprefix("context-"))
    if length < 1:
        problem = f'`repeat_to_tokens = "{wanted}"` leaves {length} tokens, {target.model} holds {target.context}'
        raise _refusal(place, problem, fix=f"Use a model of a longer context, or a number below {target.context}")
    return length


def _encoded(
    prompt: Prompt, length: int | None, suite: Suite, target: _Target, place: str
) -> tuple[tuple[int, ...], str | None]:
    """The prompt's ids, repeated to ``length`` where it is given, and the text that they come from."""
    if prompt.ids is not None:
        return _repeated_ids(prompt.ids, length), None
    if target.tokenizer is None:
        fix = "Put the tokenizer's files beside the model, or give the prompt as `ids`"
        raise _refusal(place, f"it is text, and {target.model} comes without a tokenizer", fix=fix)
    if prompt.messages is not None:
        return _encoded_messages(prompt.messages, target.tokenizer, target.model, place)
    text = prompt.text or ""
    if length is not None:
        text = _repeated_text(text, length, target.tokenizer, suite.add_special_tokens, place)
    return tuple(_encode(text, target.tokenizer, suite.add_special_tokens)[:length]), text


def _encode(text: str, tokenizer: PreTrainedTokenizerFast, add_special_tokens: bool) -> list[int]:
    # Not verbose: a text that is repeated past the model's context to be cut there is no reason to warn.
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return ids


def _encoded_messages(
    messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerFast, model: str, place: str
) -> tuple[tuple[int, ...], str]:
    """Ids and text of a conversation in the tokenizer's chat template, up to where the answer begins."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        fix = "Use a tokenizer that has one, or write the prompt as `text`"
        raise _refusal(place, f"it has `messages`, and the tokenizer of {model} has no chat template", fix=fix)
    conversation = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        encoded = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True)
    except TemplateError as error:
        problem = f"the chat template of {model} refuses the messages: {error}"
        raise _refusal(place, problem, fix="Use roles, and an order of them, that the template knows") from error
    # transformers 4 returns the ids, 5 a BatchEncoding.
    ids = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
    return tuple(ids), str(text)


def _repeated_ids(ids: tuple[int, ...], length: int | None) -> tuple[int, ...]:
    return ids if length is None else (ids * -(-length // len(ids)))[:length]


def _repeated_text(
    text: str, length: int, tokenizer: PreTrainedTokenizerFast, add_special_tokens: bool, place: str
) -> str:
    """The fewest copies of ``text``, joined by a space, that encode to at least ``length`` tokens.

    Copies are doubled and then bisected, so that a context of 100,000 tokens is encoded a few dozen times.
    """

    def tokens(copies: int) -> int:
        return len(_encode(" ".join([text] * copies), tokenizer, add_special_tokens))

    high = 1
    while tokens(high) < length:
        if high >= length:
            problem = f"{high} copies of the text are {tokens(high)} tokens, {length} are wanted"
            raise _refusal(place, problem, fix="Write a text that every copy adds a token of")
        high *= 2
    copies = bisect_left(range(high), length, lo=high // 2 + 1, key=tokens)
    return " ".join([text] * copies)


def _check_fits(length: int, new: int, target: _Target, place: str) -> None:
    if target.context is None or length + new <= target.context:
        return
    room = target.context - new
    shorter = f"Shorten the prompt to {room} tokens, or lower" if room >= 1 else "Lower"
    problem = f"{length} tokens and {new} new ones are {length + new}, {target.model} holds {target.context}"
    raise _refusal(place, problem, fix=f"{shorter} `max_new_tokens`, or use a model of a longer context")


def _check_known(ids: Sequence[int], target: _Target, place: str) -> None:
    if not ids:
        problem = f"the tokenizer of {target.model} makes no token of it"
        raise _refusal(place, problem, fix="Write a longer text, or set `add_special_tokens = true`")
    if max(ids) >= target.vocabulary:
        problem = f"token id {max(ids)} is not one of the {target.vocabulary} of {target.model}"
        raise _refusal(
            place, problem, fix=f"Use ids below {target.vocabulary}, and the tokenizer that belongs to the model"
        )
