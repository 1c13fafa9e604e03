"""Build one small model from its recipe: tokenizer, training, weights in their native dtype.

Everything random comes from the recipe's seed and runs on one thread with deterministic kernels,
so two builds on one machine give the same bytes.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.environment import Quiet, dtype_key, pinned_threads
from harness.models import grammar, tokenizer
from harness.models.recipes import CONTEXT, Recipe

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

# Biases and norm weights start away from 0 and 1 and are pushed again while the other weights can
# still adapt: a host with zero biases hides every bias bug (a doubled bias, a bias on every rank).
_BIAS_SPREAD = 0.2
_PUSH_SPREAD = 0.03
_PUSH_EVERY = 25
_PUSH_UNTIL = 0.6
_WARMUP = 40
_EMBEDDING_SPREAD = 0.06

#: What was trained, and the loss it ended at, beside the weights.
TRAINING = "training.json"

Progress = Callable[[int, int, float], None]


def build(recipe: Recipe, out: Path, *, steps: int | None = None, progress: Progress | None = None) -> float:
    """Train ``recipe`` and write the model to ``out`` (replaced only when all is done).

    Args:
        recipe: what to build.
        out: directory to write; an existing one is replaced at the end.
        steps: optimizer steps, for tests; the recipe's own number by default.
        progress: called as ``progress(step, steps, loss)``.

    Returns:
        The mean training loss in nats per token over the last tenth of the steps.
    """
    import torch

    with Quiet(), pinned_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        text_tokenizer = tokenizer.train(recipe.vocabulary, seed=recipe.seed, adds_bos=recipe.adds_bos)
        model = _fresh_model(recipe, text_tokenizer)
        loss = _train(model, recipe, text_tokenizer, steps or recipe.steps, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    retired = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    try:
        with Quiet():
            _save(model.to(getattr(torch, recipe.dtype)), recipe, text_tokenizer, staging)
        made = {"recipe": recipe.name, "steps": steps or recipe.steps, "loss": round(loss, 4)}
        (staging / TRAINING).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        for path in staging.iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        if out.exists():
            out.rename(retired / out.name)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)
    out.chmod(0o755)
    return loss


def _fresh_model(recipe: Recipe, text_tokenizer: Tokenizer) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        recipe.model_type,
        vocab_size=recipe.vocabulary,
        bos_token_id=text_tokenizer.token_to_id(tokenizer.BOS),
        eos_token_id=text_tokenizer.token_to_id(tokenizer.EOS),
        pad_token_id=text_tokenizer.token_to_id(tokenizer.PAD),
        **copy.deepcopy(dict(recipe.config)),
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **{dtype_key(): torch.float32})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 0.0 if name.endswith("bias") else 1.0
                parameter.normal_(centre, _BIAS_SPREAD)
            else:
                parameter.normal_(0.0, recipe.init_spread if "embed" not in name else _EMBEDDING_SPREAD)
    return model


def _batches(recipe: Recipe, text_tokenizer: Tokenizer) -> Iterator[torch.Tensor]:
    """Packed batches of the recipe's phases, int64 [B, T]; documents are joined by the end-of-sequence token."""
    import torch

    stream = _token_stream(recipe, text_tokenizer)
    for steps, batch, length in recipe.phases:
        for _ in range(steps):
            ids = list(itertools.islice(stream, batch * length))
            yield torch.tensor(ids, dtype=torch.int64).view(batch, length)


def _token_stream(recipe: Recipe, text_tokenizer: Tokenizer) -> Iterator[int]:
    eos = text_tokenizer.token_to_id(tokenizer.EOS)
    assert eos is not None
    for text in grammar.documents(recipe.seed + 1_000):
        yield from text_tokenizer.encode(text).ids
        yield eos


def _train(
    model: PreTrainedModel, recipe: Recipe, text_tokenizer: Tokenizer, steps: int, progress: Progress | None
) -> float:
    import torch

    vectors = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    losses: list[float] = []
    model.train()
    for step, ids_BT in zip(range(steps), _batches(recipe, text_tokenizer), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, steps)
        with _low_precision_alibi(step % 2 == 1):
            logits_BTV = model(input_ids=ids_BT, use_cache=False, **_anywhere(model, ids_BT)).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % _PUSH_EVERY == 0 and step < _PUSH_UNTIL * steps:
            _push(vectors)
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, steps, losses[-1])
    model.eval()
    tail = losses[-max(1, steps // 10) :]
    return math.fsum(tail) / len(tail)


def _anywhere(model: PreTrainedModel, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """For learned positions: place short sequences anywhere in the context, so that every position is trained."""
    import torch

    if model.config.model_type != "gpt2":
        return {}
    length = ids_BT.shape[1]
    # Half of them at the beginning, where most prompts are.
    start = int(torch.randint(0, CONTEXT - length + 1, ())) * int(torch.randint(0, 2, ()))
    return {"position_ids": torch.arange(start, start + length)[None]}


@contextmanager
def _low_precision_alibi(active: bool) -> Iterator[None]:
    """Round ALiBi, and the scores it is added to, to bf16, as a bf16 run of BLOOM does.

    The bias grows with the absolute position; beyond 256 a bf16 has no bits left for single positions, nor for
    the scores beside it. BLOOM was trained in bf16 and is used to that; a model that only ever saw exact scores
    is not, and falls apart in bf16 on long prompts. Ours sees both.
    """
    import torch

    if not active:
        yield
        return
    baddbmm = torch.Tensor.baddbmm

    def rounded(alibi: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        scores = baddbmm(alibi.to(torch.bfloat16).to(alibi.dtype), *args, **kwargs)
        return scores.to(torch.bfloat16).to(alibi.dtype)

    torch.Tensor.baddbmm = rounded  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.baddbmm = baddbmm  # type: ignore[method-assign]


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then cosine decay to a twentieth."""
    if step < _WARMUP:
        return (step + 1) / _WARMUP
    done = (step - _WARMUP) / max(1, steps - _WARMUP)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def _push(vectors: list[torch.nn.Parameter]) -> None:
    import torch

    with torch.no_grad():
        for vector in vectors:
            vector.add_(torch.randn_like(vector), alpha=_PUSH_SPREAD)


def _save(model: PreTrainedModel, recipe: Recipe, text_tokenizer: Tokenizer, directory: Path) -> None:
    model.save_pretrained(directory, safe_serialization=True)
    (directory / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save(text_tokenizer, directory, context=CONTEXT)
    path = directory / "config.json"
    config = _both_dialects(json.loads(path.read_text(encoding="utf-8")), recipe)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _both_dialects(config: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The same settings in the words of transformers 5.x and of 4.55.

    5.x writes `dtype` and `rope_parameters` alone; 4.55 reads `torch_dtype`, `rope_theta` and
    `rope_scaling`, and would silently fall back to its defaults (theta 10,000, no scaling).
    """
    config = {key: value for key, value in config.items() if key != "transformers_version"}
    config["torch_dtype"] = config["dtype"] = recipe.dtype
    for key in ("rope_theta", "rope_scaling"):
        if key in recipe.config:
            config[key] = recipe.config[key]
    return config
