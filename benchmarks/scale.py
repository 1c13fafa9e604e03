"""What streaming costs: memory, the share of what disk and processor can do, and how it grows.

    python benchmarks/scale.py blocks       # blocks of BLOOM-176B's shapes, 22 GB of disk, 14 GB of memory
    python benchmarks/scale.py verdicts     # a model of 1.4 billion parameters in 1.5 GB, correct and mutated
    python benchmarks/scale.py record       # speculative recording: passes and mistakes by draft
    python benchmarks/scale.py linear       # seconds over layers and prompts

Checkpoints are made in a temporary directory (TMPDIR) and removed. Each pass is cold where that is said: what the page
cache holds of the files is dropped before.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from harness import store
from harness.conversion.shards import Planned, Writer, plan
from harness.engines import build_engine
from harness.engines.streaming import files, reading

#: BLOOM-176B's shapes (bigscience/bloom, config.json).
BLOOM_176B = {"hidden_size": 14336, "n_head": 112, "vocab_size": 250880, "seq_length": 2048}
LAYERS_176B = 70
#: A BLOOM of 1.4 billion parameters: bloom-1b7's width and vocabulary with fewer blocks.
SMALL = {"hidden_size": 2048, "n_head": 16, "vocab_size": 250880, "seq_length": 2048, "n_layer": 18}
_POOL = 2**26
#: Blocks in memory at once: one is computed with, one is read (engines/streaming/reading.py).
_BUFFERS = 2
_SHARD = 5 * 10**9


# --- checkpoints ---------------------------------------------------------------------------------


def bloom(directory: Path, **shapes: int) -> Path:
    """A BLOOM checkpoint of random bf16 weights, written tensor by tensor."""
    from transformers import AutoConfig

    config = AutoConfig.for_model("bloom", bos_token_id=1, eos_token_id=2, pad_token_id=3, **shapes)
    config.architectures = ["BloomForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    width, pool = shapes["hidden_size"], torch.randn(_POOL, generator=torch.Generator().manual_seed(0))
    pool = torch.cat([pool, pool]).to(torch.bfloat16)
    planned = [Planned(name=name, shape=shape, dtype="bfloat16") for name, shape in _tensors(width, shapes)]
    with Writer(directory, plan(planned, _SHARD)) as writer:
        for number, one in enumerate(planned):
            writer.write(one.name, _random(one, number, pool, width))
    return directory


def _tensors(width: int, shapes: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "transformer.word_embeddings.weight", (shapes["vocab_size"], width)
    for end in ("word_embeddings_layernorm", "ln_f"):
        yield from _affine(f"transformer.{end}", width)
    for layer in range(shapes["n_layer"]):
        block = f"transformer.h.{layer}"
        yield from _affine(f"{block}.input_layernorm", width)
        yield from _affine(f"{block}.self_attention.query_key_value", 3 * width, width)
        yield from _affine(f"{block}.self_attention.dense", width, width)
        yield from _affine(f"{block}.post_attention_layernorm", width)
        yield from _affine(f"{block}.mlp.dense_h_to_4h", 4 * width, width)
        yield from _affine(f"{block}.mlp.dense_4h_to_h", width, 4 * width)


def _affine(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _random(one: Planned, number: int, pool: torch.Tensor, width: int) -> torch.Tensor:
    """Normal numbers of a sensible size: pieces of one pool, from a place of the tensor's own."""
    count = math.prod(one.shape)
    parts = [pool[(number * 7919 + k * 104729) % _POOL :][:_POOL] for k in range(-(-count // _POOL))]
    drawn = torch.cat(parts)[:count].reshape(one.shape)
    if len(one.shape) == 1:
        return drawn * 0.1 + (1.0 if one.name.endswith("weight") else 0.0)
    return drawn if "embeddings" in one.name else drawn.mul_(1.5 / math.sqrt(one.shape[1]))


def drop(directory: Path) -> None:
    """What the page cache holds of these files is forgotten."""
    for path in directory.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


# --- measuring -----------------------------------------------------------------------------------


class Memory:
    """The most that this process had resident meanwhile, looked at every 20 ms: anonymous, and of mapped files."""

    def __enter__(self) -> Self:
        self.anonymous = self.mapped = self.together = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            words = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            anonymous, file, shared = (int(words[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile", "RssShmem"))
            self.anonymous, self.mapped = max(self.anonymous, anonymous), max(self.mapped, file + shared)
            self.together = max(self.together, anonymous + file + shared)

    def __str__(self) -> str:
        return (
            f"peak memory {self.together / 1e9:.2f} GB resident "
            f"(anonymous at most {self.anonymous / 1e9:.2f}, mapped files at most {self.mapped / 1e9:.2f})"
        )


def disk_limit(places: Sequence[files.Place]) -> float:
    """Bytes a second that the disk gives to direct reads of these tensors and nothing else.

    Read twice into the same memory, the second time counts: the first clears its pages.
    """
    with reading.Reader([places, places], direct=True, buffers=1) as reader:
        for piece in reader:
            piece.release()
    return piece.bytes / piece.seconds


def matmul_limit(tokens: int, width: int, dtype: torch.dtype) -> float:
    """Operations a second of the block's largest product alone, the best of three."""
    a = torch.randn((tokens, width)).to(dtype)
    b = torch.randn((4 * width, width // 8)).to(dtype).repeat(1, 8)
    best = math.inf
    for _ in range(3):
        started = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = min(best, time.perf_counter() - started)
    return 2.0 * tokens * width * 4 * width / best


def sequences(prompts: int, tokens: int, vocabulary: int) -> list[list[int]]:
    """Token ids that tell nothing."""
    drawn = torch.randint(3, vocabulary, (prompts, tokens), generator=torch.Generator().manual_seed(1))
    return drawn.tolist()


@contextmanager
def place() -> Iterator[Path]:
    """A temporary directory, removed whatever happens."""
    with tempfile.TemporaryDirectory(prefix="harness-scale-") as found:
        yield Path(found)


# --- a block of 176B -------------------------------------------------------------------------------


def blocks(arguments: argparse.Namespace) -> None:
    """Cold passes over blocks of BLOOM-176B's shapes."""
    shapes = {**BLOOM_176B, "n_layer": arguments.layers}
    with place() as directory:
        if arguments.checkpoint is not None:
            directory = arguments.checkpoint
        if not (directory / "config.json").exists():
            bloom(directory, **shapes)
        width, prompts, tokens = shapes["hidden_size"], arguments.prompts, arguments.tokens
        work = sequences(prompts, tokens + 1, shapes["vocab_size"])
        found = files.survey(directory)
        first = [one for name, one in found.items() if name.startswith("transformer.h.0.")]
        drop(directory)
        dtype = arguments.dtype
        disk, products = disk_limit(first), matmul_limit(prompts * tokens, width, getattr(torch, dtype))
        size, count = sum(one.bytes for one in first), sum(math.prod(one.shape) for one in first)
        print(f"a block: {size / 1e9:.2f} GB, {prompts} prompts of {tokens} tokens, {torch.get_num_threads()} threads")
        for number in range(arguments.repeats):
            drop(directory)
            with Memory() as memory, build_engine(f"stream:dtype={dtype},read=direct", model=str(directory)) as engine:
                started = time.perf_counter()
                engine.score(work, [1] * prompts)  # type: ignore[attr-defined]
                seconds = time.perf_counter() - started
                took = engine.took  # type: ignore[attr-defined]
            drop(directory)
            disk = max(disk, disk_limit(first))  # it is not always as fast
            read_limit = size / disk
            drop(directory)
            disk = max(disk, disk_limit(first))  # other work on the host makes it slower at times
            products = max(products, matmul_limit(prompts * tokens, width, getattr(torch, dtype)))
            read_limit, compute_limit = size / disk, 2.0 * count * prompts * tokens / products
            own, head = took[: arguments.layers], took[arguments.layers :]
            for one in own:
                print(f"  {one.name}: read {one.read:.2f} s, waited {one.waited:.2f} s, computed {one.computed:.2f} s")
            # The first two blocks are read into memory that the system has to clear first; all others find it there.
            clearing, others = own[:_BUFFERS], own[_BUFFERS:] or own[1:]
            block = statistics.mean(one.waited + one.computed for one in others)
            rest = sum(one.waited + one.computed for one in head)
            whole = sum(one.waited + one.computed for one in clearing) + (LAYERS_176B - len(clearing)) * block + rest
            print(f"pass {number + 1}: {seconds:.1f} s, {memory}")
            print(
                f"  limits: {disk / 1e9:.2f} GB/s of direct reads, {products / 1e12:.3f} TFLOP/s of {dtype} products: "
                f"{read_limit:.2f} s to read a block, {compute_limit:.2f} s to multiply with it"
            )
            print(
                f"  a block behind the first two, the next one read meanwhile: {block:.2f} s, "
                f"{max(read_limit, compute_limit) / block:.0%} of the slower limit; the head {rest:.1f} s"
            )
            print(f"  computed for {LAYERS_176B} blocks: {whole:.0f} s ({whole / 60:.1f} min)")


# --- a model that fits, in less than it needs ------------------------------------------------------


def verdicts(arguments: argparse.Namespace) -> None:
    """A model of 1.4 billion parameters streamed within 1.5 GB: what is said of it, and of three that are wrong."""
    from harness import flow, suites

    with place() as directory, ExitStack() as stack:
        model = bloom(directory / "model", **SMALL)
        gc.collect()
        memory = stack.enter_context(Memory())
        count = sum(math.prod(one.shape) for one in files.survey(model).values())
        suite = suites.suite_from_dict(_suite(sequences(6, 16, SMALL["vocab_size"])), where="scale")
        started = time.perf_counter()
        spec = "stream:dtype=float64,read=direct"
        flow.record(model, suite, out=directory / "golden", precisions=["float32"], replicas=16, stream=spec)
        print(f"{count / 1e9:.2f} billion parameters, recorded in {time.perf_counter() - started:.0f} s, {memory}")
        for name, candidate in {"correct": model, **wrong(model, directory)}.items():
            started = time.perf_counter()
            text = f"stream:dtype=float32,read=direct,model={candidate}"
            verdict = flow.check(directory / "golden", text, reference=model)
            seconds = time.perf_counter() - started
            worst = max((one.ratio or 0.0 for one in verdict.passes), default=0.0)
            print(f"  {name}: {verdict.status}, error {worst:.3g} x round-off, {seconds:.0f} s, {memory}")


def _suite(prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    return {
        "name": "scale", "description": "Token ids that tell nothing.", "stop": "ignore-eos", "max_new_tokens": 1,
        "add_special_tokens": False,
        "prompts": [{"id": f"p{number}", "ids": list(ids)} for number, ids in enumerate(prompts)],
        "runs": [{"name": "batched", "views": ["prefill"], "quick": True}],
    }  # fmt: skip


def wrong(model: Path, directory: Path) -> dict[str, Path]:
    """Three copies of a checkpoint with a bug each, made of links but for what differs."""
    found = {}
    for name in ("another epsilon", "two rows of one MLP swapped", "one bias of one block left out"):
        copy = directory / name.replace(" ", "-")
        copy.mkdir()
        for path in model.iterdir():
            (copy / path.name).symlink_to(path.resolve())
        found[name] = copy
    config = found["another epsilon"] / "config.json"
    document = json.loads(config.read_text())
    config.unlink()
    config.write_text(json.dumps({**document, "layer_norm_epsilon": 1e-6}))
    one = files.survey(model)["transformer.h.9.mlp.dense_h_to_4h.weight"]
    rows = [_bytes(one.rows(index, index + 1)) for index in (7, 8)]
    _patch(found["two rows of one MLP swapped"], [(one.rows(7, 8), rows[1]), (one.rows(8, 9), rows[0])])
    one = files.survey(model)["transformer.h.3.self_attention.query_key_value.bias"]
    _patch(found["one bias of one block left out"], [(one, bytes(one.bytes))])
    return found


def _bytes(one: files.Place) -> bytes:
    with one.file.open("rb") as opened:
        opened.seek(one.start)
        return opened.read(one.bytes)


def _patch(copy: Path, changes: Sequence[tuple[files.Place, bytes]]) -> None:
    """Replace the link to a shard by a file that differs in these bytes."""
    link = copy / changes[0][0].file.name
    target = link.resolve()
    link.unlink()
    shutil.copyfile(target, link)
    with link.open("r+b") as opened:
        for one, content in changes:
            opened.seek(one.start)
            opened.write(content)


# --- speculative recording ---------------------------------------------------------------------------


def record(_arguments: argparse.Namespace) -> None:
    """Passes over the weights and mistakes of a good draft and of others; the tokens are those of the golden."""
    from harness import flow

    model = Path("golden/bloom-tiny/model")
    with place() as directory:
        nonsense = directory / "nonsense.jsonl"
        for suite, name, draft in (
            ("core", "the same weights in bf16", f"hf:dtype=bfloat16,model={model}"),
            ("translate", "prompt look-up", "lookup"),
            ("translate", "useless", str(nonsense)),
        ):
            golden = store.read_golden(f"golden/bloom-tiny/{suite}")
            lines = [
                {"id": one.id, "prompt_ids": list(one.prompt_ids), "tokens": [5] * one.max_new_tokens}
                for one in golden.requests
            ]
            nonsense.write_text("\n".join(map(json.dumps, lines)))
            started = time.perf_counter()
            found = flow.record(
                model,
                Path(f"prompts/{suite}.toml"),
                out=directory / name,
                precisions=[],
                stream="stream:dtype=float32",
                draft=draft,
            )
            settings = found.provenance["settings"]
            same = "exact" if found.generations == golden.generations else "NOT what plain greedy decoding gives"
            print(
                f"{suite}, draft {name}: {settings['passes']} passes for {len(golden.requests)} prompts of "
                f"{golden.suite.max_new_tokens} tokens, {same}; {time.perf_counter() - started:.0f} s"
            )
            print(f"  mistakes: {', '.join(f'{key} {value}' for key, value in settings['mistakes'].items())}")


# --- how it grows --------------------------------------------------------------------------------------


def linear(arguments: argparse.Namespace) -> None:
    """Seconds over the number of layers and of prompts."""
    shapes = {"hidden_size": 128 if arguments.quick else 2048, "n_head": 16, "vocab_size": 4096, "seq_length": 2048}
    for layers, prompts in ((4, 8), (8, 8), (16, 8), (8, 16), (8, 32)):
        with place() as directory:
            model = bloom(directory, **shapes, n_layer=layers)
            drop(model)
            with build_engine("stream:dtype=float32,read=direct", model=str(model)) as engine:
                engine.score(sequences(prompts, 65, 4096), [1] * prompts)  # type: ignore[attr-defined]
                took = engine.took[:layers]  # type: ignore[attr-defined]
            blocks_took = sum(one.waited + one.computed for one in took)
            print(
                f"{layers:3} layers, {prompts:3} prompts of 64 tokens: blocks {blocks_took:6.2f} s, "
                f"{1000 * blocks_took / layers / prompts:6.2f} ms a layer and prompt"
            )


COMMANDS: dict[str, Any] = {"blocks": blocks, "verdicts": verdicts, "record": record, "linear": linear}


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--layers", type=int, default=3, help="blocks of 176B's shapes")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32", help="that blocks are computed in")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--checkpoint", type=Path, help="make it here, or use what is here, and keep it")
    COMMANDS[parser.parse_args().command](parser.parse_args())


if __name__ == "__main__":
    main()
