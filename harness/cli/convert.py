"""`harness convert`: a checkpoint in another layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import click

from harness.cli.output import progress_line
from harness.errors import HarnessError, UsageError

_SIZE = re.compile(r"(\d+) *(?:([KMGT]?)(i?)B)?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_DEFAULT_SIZE = "5GB"
#: The padding of Megatron's own --make-vocab-size-divisible-by.
_DEFAULT_MULTIPLE = 128


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), help="config.json, or a directory with it and a tokenizer.")
@click.option("--heads", type=click.IntRange(min=1), help="Without a config: the number of attention heads.")
@click.option("--vocabulary", type=click.IntRange(min=1), help="Rows of the embedding to keep; the rest is padding.")
@click.option("--average-replicated", is_flag=True, help="Write the mean of what ranks should hold alike and do not.")
@click.option(
    "--shard-size", metavar="SIZE", help=f"Largest safetensors file, e.g. 500MB; {_DEFAULT_SIZE} unless given."
)
@click.option("--tensor-parallel", type=click.IntRange(1, 99), help="Ranks to write layer files for; 1 unless given.")
@click.option(
    "--divisible-by",
    type=click.IntRange(min=1),
    help=f"Pad the embedding to a multiple of this times the ranks; Megatron's {_DEFAULT_MULTIPLE} unless given.",
)
def convert(
    source: Path,
    out: Path,
    config: Path | None,
    heads: int | None,
    vocabulary: int | None,
    average_replicated: bool,
    shard_size: str | None,
    tensor_parallel: int | None,
    divisible_by: int | None,
) -> int:
    """Convert a BLOOM between Megatron-DeepSpeed's layer files and transformers' safetensors; OUT must not exist yet.

    \b
    harness convert global_step95000 my-bloom --config path/to/model
    harness convert my-bloom global_step0 --tensor-parallel 4

    What SOURCE holds decides the direction. Every tensor is accounted for before anything is written, one layer is in
    memory at a time, and no pickle is executed. `harness check` then says whether it is still the same model.
    """  # noqa: D301  # click takes a backspace itself, which a raw text does not hold
    from_megatron = _is_megatron(source)
    _must_fit(
        from_megatron,
        reading={
            "--config": config,
            "--heads": heads,
            "--vocabulary": vocabulary,
            "--average-replicated": average_replicated or None,
            "--shard-size": shard_size,
        },
        writing={"--tensor-parallel": tensor_parallel, "--divisible-by": divisible_by},
    )
    limit = _bytes(shard_size or _DEFAULT_SIZE)
    from harness.conversion import converting

    with progress_line() as progress:
        try:
            if from_megatron:
                how = converting.ToTransformers(
                    config=config, heads=heads, vocabulary=vocabulary, average=average_replicated, shard_bytes=limit
                )
                report = converting.to_transformers(source, out, how, progress=progress)
            else:
                report = converting.to_megatron(
                    source,
                    out,
                    ranks=tensor_parallel or 1,
                    multiple=divisible_by or _DEFAULT_MULTIPLE,
                    progress=progress,
                )
        except HarnessError as error:
            if error.details:
                click.echo(error.details, err=True)
            raise
    what = f"{report.tensors} tensors, {report.bytes:,} bytes of {report.dtype} in {_several(report.files, 'file')}"
    click.echo(f"wrote {out}: {what}, {'from' if from_megatron else 'for'} {_several(report.ranks, 'rank')}")
    for note in report.notes:
        click.echo(f"  {note}")
    return 0


def _is_megatron(source: Path) -> bool:
    """Whether it holds layer files rather than safetensors.

    Raises:
        UsageError: where it holds neither, or both.
    """
    from harness.conversion import megatron

    if not source.is_dir():
        raise UsageError(f"there is no checkpoint directory {source}", fix="Check the path")
    layers, tensors = megatron.looks_like_one(source), any(source.glob("*.safetensors"))
    if layers and tensors:
        raise UsageError(f"{source} holds layer files and safetensors", fix="Move one of the two elsewhere")
    if not layers and not tensors:
        inner = [str(path) for path in megatron.inner_directories(source)]
        raise UsageError(
            f"{source} holds neither layer_NN-model_TT-model_states.pt nor .safetensors files",
            fix=f"Give {' or '.join(inner)}" if inner else "Pickled .bin weights are never loaded",
        )
    return layers


def _must_fit(from_megatron: bool, *, reading: Mapping[str, object], writing: Mapping[str, object]) -> None:
    """Refuse what would be ignored in this direction."""
    given = [name for name, value in (writing if from_megatron else reading).items() if value is not None]
    if given:
        what = "Megatron-DeepSpeed" if from_megatron else "transformers"
        raise UsageError(f"{given[0]} says nothing about reading {what} files", fix="Leave it out")


def _bytes(text: str) -> int:
    """The bytes of 500MB, 5GB, 2GiB or a plain number."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise UsageError(f"--shard-size {text!r} is no size", fix="Write e.g. 500MB, 5GB or 2GiB")
    return int(match[1]) * int((1024 if match[3] else 1000) ** _POWERS[(match[2] or "").upper()])


def _several(count: int, word: str) -> str:
    return f"{count} {word}{'s'[: count != 1]}"
