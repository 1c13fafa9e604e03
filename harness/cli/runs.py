"""`harness run`: do the work here, to be judged elsewhere."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.output import must_be_writable, progress_line
from harness.errors import EngineError, HarnessError, UsageError, first_line


@click.command()
@click.argument("spec")
@click.option("--golden", type=click.Path(path_type=Path), metavar="DIR", help="Force this golden's tokens.")
@click.option("--suite", type=click.Path(path_type=Path), metavar="FILE", help="Or continue a suite freely.")
@click.option("--model", type=click.Path(path_type=Path), metavar="DIR", help="Weights for a SPEC that names none.")
@click.option("--trace", "file", required=True, metavar="FILE", help="File to write.")
@click.option("--quick", is_flag=True, help="Only the quick runs.")
@click.option("--no-upcast", is_flag=True, help="Without the float32 copy of a 16-bit candidate.")
@click.option("--diagnose", is_flag=True, help="Also show what `check --diagnose` fits; needs the golden's model.")
def run(
    spec: str,
    golden: Path | None,
    suite: Path | None,
    model: Path | None,
    file: str,
    quick: bool,
    no_upcast: bool,
    diagnose: bool,
) -> int:
    """Run SPEC on the machine that has the device; `harness check GOLDEN --trace FILE` judges it anywhere.

    \b
    harness run hf:dtype=bfloat16,device=cuda --golden golden/my-model/core --model path/to/model --trace out.trace
    harness run hf:dtype=float16 --suite prompts/core.toml --model path/to/model --trace out.trace

    With --golden (both of its files are needed, its model is not) the golden's tokens are forced, and the verdict is
    the same as in place. With --suite the candidate goes on alone, and its tokens are what can be judged.
    """  # noqa: D301  # click takes a backspace itself, which a raw text does not hold
    if (golden is None) == (suite is None):
        raise UsageError("give either --golden or --suite", fix="--golden golden/NAME/SUITE tells more")
    from harness.engines import build_engine

    build_engine(spec)
    must_be_writable("--trace", file)
    if diagnose and golden is None:
        raise UsageError("--diagnose needs the tokens of a golden", fix="Give --golden instead of --suite")
    if file == "-":
        raise UsageError("a trace is no text", fix="Name a file with --trace")
    from harness import flow

    work = golden if golden is not None else suite
    assert work is not None
    with progress_line() as progress:
        try:
            trace = flow.run(
                spec, work, model=model, quick=quick, upcast=not no_upcast, diagnose=diagnose, progress=progress
            )
        except HarnessError:
            raise
        except (Exception, SystemExit) as error:  # whatever a candidate does: one line, and the exit code of an engine
            line = first_line(error, "no message")
            raise EngineError(
                f"{spec} failed ({type(error).__name__}: {line})", fix="Set HARNESS_TRACEBACK=1 with `harness check`"
            ) from error
    trace.save(file)
    passes = len(trace.passes) + (0 if trace.upcast is None else len(trace.upcast.passes))
    click.echo(f"wrote {file}: {passes} passes of {trace.engine}")
    if trace.upcast is None and trace.upcast_reason:
        click.echo(f"  note: the function was not asked about: {trace.upcast_reason}")
    return 0
