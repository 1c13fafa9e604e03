"""`harness models`: list, build and describe the small test models."""

from __future__ import annotations

from pathlib import Path

import click

from harness.errors import UsageError


@click.group()
def models() -> None:
    """The small test models: list them, build them from their recipes, describe them."""


@models.command("list")
def models_list() -> int:
    """Name and summary of each recipe."""
    from harness.models.recipes import RECIPES

    for recipe in RECIPES.values():
        click.echo(f"{recipe.name:12} {recipe.dtype:9} {recipe.summary}")
    return 0


@models.command("build")
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="Directory to write; default golden/NAME/model.")
@click.option("--steps", type=click.IntRange(min=1), help="Fewer optimizer steps, to try a recipe out.")
def models_build(name: str, out: Path | None, steps: int | None) -> int:
    """Generate the text, train tokenizer and model NAME, write it. About 15 minutes on one core."""
    from harness.engines.spec import suggest
    from harness.models.recipes import RECIPES

    if name not in RECIPES:
        raise UsageError(f"there is no recipe {name!r}", fix=suggest(name, RECIPES))
    target = out or Path("golden") / name / "model"
    from rich.progress import Progress

    from harness.checkpoint import identify
    from harness.models.build import build

    with Progress(transient=True) as bar:
        task = bar.add_task(f"training {name}", total=None)

        def report(step: int, total: int, loss: float) -> None:
            bar.update(task, completed=step, total=total, description=f"training {name}, loss {loss:.3f}")

        loss = build(RECIPES[name], target, steps=steps, progress=report)
    identity = identify(target)
    click.echo(f"built {target}: {identity.parameters:,} parameters, loss {loss:.3f}, digest {identity.digest[:16]}")
    return 0


@models.command("table")
@click.option("--root", type=click.Path(path_type=Path), default=Path("golden"), show_default=True)
def models_table(root: Path) -> int:
    """Parameters, training loss, margins and coverage of the small models, from their `core` goldens."""
    from harness.models.table import describe

    click.echo(describe(root))
    return 0
