"""Write a failing case down: a script, a test and what is expected, in a directory that appears whole and was run.

Templates lie in templates/; what differs from candidate to candidate is a Recipe.
"""

from __future__ import annotations

import json
import os
import pprint
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.environment import versions
from harness.errors import UsageError
from harness.files import readable_json, sync
from harness.repro.cases import Batch
from harness.repro.finding import Found
from harness.repro.recipes import Recipe

_TEMPLATES = Path(__file__).parent / "templates"
_MARK, _FORMAT = "repro.json", "golden-harness repro 1"
_WIDTH = 110
#: Largest model that is copied in, in bytes: a case is to be pasted into a repository, or sent.
COPIED = 64 * 2**20
#: Seconds that a written script may take: it loads a model twice and runs a few tokens.
LIMIT_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A directory that was written, and what its script said in a process of its own.

    Attributes:
        directory: where.
        code: its exit code, None where it took too long.
        said: its last line.
        seconds: that it took.
    """

    directory: Path
    code: int | None
    said: str
    seconds: float

    @property
    def words(self) -> str:
        """Whether it fails as promised."""
        if self.code is None:
            return f"It was stopped after {self.seconds:.0f} seconds, so whether it fails as promised is not known."
        promised = "fails as promised" if self.code == 1 else "does NOT do what it should (exit code 1)"
        return f"Run in a process of its own it {promised}: exit code {self.code}, {self.said}"


def must_be_ours(out: Path) -> None:
    """Refuse a target that holds what was not written here.

    Raises:
        UsageError: where it does, or where its parent is not there.
    """
    if out.exists() and not _is_ours(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} holds something else", fix="Name a directory that does not exist yet")
    if not out.resolve().parent.is_dir():
        raise UsageError(f"the directory {out.resolve().parent} does not exist", fix="Make it first")


def _is_ours(directory: Path) -> bool:
    try:
        return bool(json.loads((directory / _MARK).read_text(encoding="utf-8"))["format"] == _FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write(
    out: Path,
    found: Found,
    recipe: Recipe,
    *,
    golden: str,
    candidate: str,
    reference: Path,
    copy_model: bool = False,
    seconds: float = LIMIT_SECONDS,
) -> Written:
    """Write the directory and run its script in a fresh process.

    Args:
        out: the directory; one that this function wrote before is replaced.
        found: the case.
        recipe: how the candidate is loaded.
        golden: what reports call it.
        candidate: likewise.
        reference: the reference's model directory.
        copy_model: put copies of the models into the directory.
        seconds: that the script may take.

    Raises:
        UsageError: for a directory that holds something else, or a model that is too large to copy.
    """
    must_be_ours(out)
    with _appearing(out) as place:
        copied = _copied(place, recipe, reference) if copy_model else {}
        context = _context(out.resolve(), found, recipe, golden, candidate, reference, copied)
        if found.allowed is not None:
            _save_expected(place / "expected.safetensors", found)
        (place / _MARK).write_text(readable_json(_record(found, golden, candidate)), encoding="utf-8")
        for name in ("repro.py", "test_repro.py"):
            (place / name).write_text(_rendered(name, context), encoding="utf-8")
        code, said, took = (2, "", 0.0) if recipe.source == "object" else _run(place, seconds)
        written = Written(directory=out, code=code, said=said, seconds=took)
        unfilled = "It was not run: build() is to be filled in first."
        context["checked"] = unfilled if recipe.source == "object" else written.words
        (place / "README.md").write_text(_rendered("README.md", context), encoding="utf-8")
    return written


# --- what the templates are given --------------------------------------------------------------------


def _context(
    out: Path,
    found: Found,
    recipe: Recipe,
    golden: str,
    candidate: str,
    reference: Path,
    copied: dict[str, str],
) -> dict[str, Any]:
    case, judgement = found.case, found.judgement
    batches = (case.batch, *case.before)
    decodes = {batch.decode for batch in case.before}
    numeric = judgement.kind == "logits"
    model = copied.get("model") or (_place(recipe.model, out) if recipe.model else "")
    title = f"{_shows(found)[0].upper()}{_shows(found)[1:]}: {case.words}."
    needs = "the port" if recipe.source == "py" else "the model"
    return {
        "title": _wrapped(title),
        "needs": f"It needs torch, transformers and {needs}, and nothing else.",
        "paths": _paths(recipe, numeric),
        "case": case,
        "judgement": judgement,
        "recipe": recipe,
        "imports": recipe.imports if numeric else [one for one in recipe.imports if recipe.calls == "hf"],
        "options": [
            *(["model"] if model else []), *(["reference"] if numeric else []),
            *(["port"] if recipe.source == "py" else []),
        ],
        "model": model,
        "reference": copied.get("reference") or _place(reference, out),
        "port": "" if recipe.root is None else _place(recipe.root, out),
        "rows": _python(_rows(case.batch)),
        "before": _python([(_rows(batch), batch.decode) for batch in case.before]) if case.before else "",
        "before_decodes": True in decodes,
        "before_all": "both" if len(decodes) > 1 else "decoded" if True in decodes else "one_pass",
        "needs_pass": not all(batch.decode for batch in batches),
        "needs_decode": any(batch.decode for batch in batches),
        "places": _python(list(judgement.places)),
        "limit": f"{judgement.limit:.6g}",
        "measured": f"{judgement.ratio:.6g}",
        "limit_words": "measured on its variants (repro.json)",
        "candidate": candidate,
        "golden": golden,
        "shows": _shows(found),
        "how_small": _how_small(found),
        "test": "the_candidate_computes_what_the_reference_does" if numeric else "the_candidate_runs_as_it_should",
        "claim": "The candidate's logits are the reference's, but for round-off." if numeric else "It runs, with "
        "finite logits, and gives the same bits each time.",
        "copied": copied,
    }  # fmt: skip


def _shows(found: Found) -> str:
    judgement = found.judgement
    if judgement.kind == "logits":
        return (
            f"the logits are {judgement.ratio:.3g} x the reference's own round-off off, {judgement.margin:.3g} x the "
            f"limit of {judgement.limit:.3g}"
        )
    return {
        "finite": "the logits are not finite",
        "repeat": "the same request gives other bits the second time",
        "raises": f"it raises {judgement.error}",
    }[judgement.kind]


def _how_small(found: Found) -> str:
    tokens = found.case.batch.tokens + sum(batch.tokens for batch in found.case.before)
    words = (
        f"{tokens} token{'' if tokens == 1 else 's'} in all, {found.tried} cases tried in {found.seconds:.1f} seconds"
    )
    return words if found.finished else f"{words}, when time was up: a smaller one may be there"


def _paths(recipe: Recipe, numeric: bool) -> str:
    names = [*(["model"] if recipe.model else []), *(["reference"] if numeric else [])]
    names += ["port"] if recipe.source == "py" else []
    if not names:
        return ""
    flags = " and ".join(f"`--{name}`" for name in names)
    variables = " and ".join(f"`REPRO_{name.upper()}`" for name in names)
    return f"Where things lie is said by {flags}, for pytest by {variables} in the environment."


def _rows(batch: Batch) -> list[tuple[list[int], list[int]]]:
    return [(list(row.prompt), list(row.fed)) for row in batch.rows]


def _python(value: Any) -> str:
    return pprint.pformat(value, width=_WIDTH, compact=True)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _WIDTH))


def _place(target: Path, out: Path) -> str:
    """A path as code: from the directory itself where the two lie in one tree, else as it is."""
    target = target.resolve()
    shared = os.path.commonpath([target, out])
    if shared == os.sep:
        return repr(str(target))
    return f"HERE / {os.path.relpath(target, out)!r}"


def _rendered(name: str, context: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # No HTML comes of it, so nothing is escaped.
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template(f"{name}.jinja").render(context)


# --- files ---------------------------------------------------------------------------------------


def _save_expected(path: Path, found: Found) -> None:
    from safetensors.numpy import save_file

    assert found.allowed is not None
    save_file(
        {
            "logits": np.ascontiguousarray(found.allowed.logits, dtype=np.float64),
            "round_off": np.ascontiguousarray(found.allowed.sigma, dtype=np.float64),
        },
        path,
    )


def _record(found: Found, golden: str, candidate: str) -> dict[str, Any]:
    judgement = found.judgement
    finite = np.isfinite(judgement.ratio)
    return {
        "format": _FORMAT,
        "golden": golden,
        "candidate": candidate,
        "kind": judgement.kind,
        "case": found.case.words,
        "places": [list(place) for place in judgement.places],
        "measured": judgement.ratio if finite else None,
        "limit": judgement.limit if finite else None,
        "limit_from": judgement.why,
        "seed": 0,
        "cases_tried": found.tried,
        "finished": found.finished,
        "versions": dict(versions()),
    }


def _copied(place: Path, recipe: Recipe, reference: Path) -> dict[str, str]:
    """Copies of the model directories, as code that names them."""
    found: dict[str, str] = {}
    for name, source in (("reference", reference), ("model", recipe.model)):
        if source is None:
            continue
        if name == "model" and source.resolve() == reference.resolve():
            found["model"] = found["reference"]
            continue
        size = sum(file.stat().st_size for file in source.iterdir() if file.is_file())
        if size > COPIED:
            problem = f"the model {source} has {size / 2**20:,.0f} MiB, too many to copy (limit {COPIED / 2**20:.0f})"
            raise UsageError(problem, fix="Leave out --copy-model: the script then names its directory")
        target = place / ("model" if name == "reference" else "candidate")
        target.mkdir()
        for file in sorted(source.iterdir()):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
        found[name] = f"HERE / {target.name!r}"
    return found


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A directory beside ``out`` under a hidden name, which takes its place at the end of the block."""
    final = out.resolve()
    made = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    try:
        yield made
        os.chmod(made, 0o755)
        sync(made)
        if final.exists():
            must_be_ours(out)
            old = made.with_suffix(".old")
            os.rename(final, old)
            os.rename(made, final)
            shutil.rmtree(old)
        else:
            os.rename(made, final)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    sync(final.parent)


# --- a fresh process -------------------------------------------------------------------------------


def _run(place: Path, seconds: float) -> tuple[int | None, str, float]:
    """Exit code and last line of the script; no code where it took too long."""
    started = time.monotonic()
    command: Sequence[str] = [sys.executable, "-B", "repro.py"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return None, "", time.monotonic() - started
    lines = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()
    return done.returncode, lines[-1], time.monotonic() - started
