"""A golden's name: what it claims of precision, sharding, kernel or device must be backed by the golden."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.lint.anomaly import Anomaly, Severity
from harness.values import Golden

_WORD = re.compile(r"[^a-z0-9]+")
_PARALLEL = re.compile(r"(tp|pp)([1-9][0-9]{0,3})")
_SETTING = {"tp": "tensor_parallel", "pp": "pipeline_parallel"}
_DTYPES = {
    "bf16": "bfloat16", "bfloat16": "bfloat16",
    "fp16": "float16", "f16": "float16", "float16": "float16", "half": "float16",
    "fp32": "float32", "f32": "float32", "float32": "float32",
    "fp64": "float64", "f64": "float64", "float64": "float64",
}  # fmt: skip
#: Weights in few bits: the word, and what a dtype or a quantiser's name has in it.
_QUANTISED = {"int8": "int8", "int4": "int4", "fp8": "float8", "nf4": "nf4", "awq": "awq", "gptq": "gptq"}
_ATTENTION = {
    "eager": "eager",
    "sdpa": "sdpa",
    "flash": "flash",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
}
_DEVICES = {"cpu": "cpu", "cuda": "cuda", "gpu": "cuda", "mps": "mps", "xpu": "xpu", "npu": "npu"}
_RENAME = "Rename the directory and record it again, with the settings that its name says"


def look(goldens: Mapping[Path, Golden]) -> Iterator[Anomaly]:
    """Names that say another thing than the goldens hold."""
    suites = {golden.suite.name for golden in goldens.values()}
    models = {golden.model.name for golden in goldens.values()}
    for directory, golden in goldens.items():
        parent, name = directory.resolve().parts[-2:]
        if golden.name != f"{parent}/{name}":
            message = f"it calls itself {golden.name}: it was moved or copied here"
            yield _anomaly(directory, message, "Move it back, or record it here")
            continue
        yield from _directory(directory, name, "suite", golden.suite.name, suites)
        yield from _directory(directory, parent, "model", golden.model.name, models)
        for word, says in [*_unbacked(name, golden, of_model=False), *_unbacked(parent, golden, of_model=True)]:
            yield _anomaly(directory, f"its name says {word}, and {says}", _RENAME)


def _directory(directory: Path, given: str, what: str, name: str, others: Collection[str]) -> Iterator[Anomaly]:
    """The directory is called after what it holds, with words added or left out; not after another one."""
    mine, theirs = set(words(given)), set(words(name))
    if mine >= theirs or (what == "model" and mine <= theirs):
        return
    claims = sorted(other for other in others if other != name and mine >= set(words(other)))
    message = f"the directory is called {given}, and its {what} is {name}"
    yield _anomaly(directory, message, f"Call it after its {what}", severity="error" if claims else "warning")


def words(name: str) -> list[str]:
    """The words of a name, in small letters."""
    return [word for word in _WORD.split(name.lower()) if word]


def _unbacked(name: str, golden: Golden, *, of_model: bool) -> Iterator[tuple[str, str]]:
    """(word, what the golden has instead) of each claim in a name that nothing in the golden backs."""
    for word in words(name):
        evidence = _evidence(word, golden, of_model=of_model)
        if evidence is not None and not evidence[0]:
            yield word, evidence[1]


def _evidence(word: str, golden: Golden, *, of_model: bool) -> tuple[bool, str] | None:
    """(whether the golden backs a word, what it has); None for a word that claims nothing."""
    parallel = _PARALLEL.fullmatch(word)
    if parallel:
        return _parallel(parallel[1], int(parallel[2]), golden)
    for table, judged in (
        (_DTYPES, _dtype if not of_model else _model_dtype),
        (_QUANTISED, _quantised),
        (_ATTENTION, _attention),
        (_DEVICES, _device),
    ):
        if word in table:
            return judged(table[word], golden)
    return None


Judge = Callable[[str, Golden], tuple[bool, str]]


def _model_dtype(dtype: str, golden: Golden) -> tuple[bool, str]:
    return golden.model.dtype == dtype, f"the model's weights are {golden.model.dtype}"


def _dtype(dtype: str, golden: Golden) -> tuple[bool, str]:
    floors = sorted({name.partition("/")[0] for name in golden.floors})
    has = {golden.model.dtype, golden.precision, *floors, str(_settings(golden).get("dtype"))}
    return dtype in has, (
        f"its weights are {golden.model.dtype}, its reference is in {golden.precision}, "
        f"its floors are for {', '.join(floors) or 'nothing'}"
    )


def _quantised(scheme: str, golden: Golden) -> tuple[bool, str]:
    has = [golden.model.dtype, *(str(_settings(golden).get(name)) for name in ("weights", "quantised"))]
    return any(scheme in one for one in has), f"its weights are {golden.model.dtype}"


def _parallel(kind: str, size: int, golden: Golden) -> tuple[bool, str]:
    setting = _settings(golden).get(_SETTING[kind], 1)
    floors = [name for name in golden.floors if name.partition("/")[2] == f"{kind}{size}"]
    known = ", ".join(golden.floors) or "none"
    return setting == size or bool(floors), f"{_SETTING[kind]} was {setting} and no floor is for it (floors: {known})"


def _attention(kernel: str, golden: Golden) -> tuple[bool, str]:
    attention = _settings(golden).get("attn", "not recorded")
    return str(attention).startswith(kernel), f"its attention kernel is {attention}"


def _device(device: str, golden: Golden) -> tuple[bool, str]:
    # The reference of `harness record` itself runs on the CPU.
    default = "cpu" if golden.provenance.get("engine") == "hf" else "not recorded"
    found = _settings(golden).get("device", default)
    return str(found).startswith(device), f"its device is {found}"


def _settings(golden: Golden) -> Mapping[str, Any]:
    settings = golden.provenance.get("settings")
    return settings if isinstance(settings, Mapping) else {}


def _anomaly(directory: Path, message: str, fix: str, severity: Severity = "error") -> Anomaly:
    return Anomaly(kind="name", path=directory, message=message, fix=fix, severity=severity)
