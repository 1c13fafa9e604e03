"""The models that bugs are put into: the four that are shipped, and others, built from a seed, for parts these lack.

A bug needs a host that can show it. The shipped models are trained (harness/models); a sliding window, a partial
rotary embedding or a tied head that has drifted is in none of them. The hosts below have these parts, a few thousand
weights each, and are hot: no bias is zero, no norm weight is 1, attention is peaked and the logits are spread.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.environment import dtype_key

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: The trained models, whose directories are golden/NAME/model.
SHIPPED = ("bloom-raw", "bloom-tiny", "gpt2-tiny", "llama-tiny")

#: The type that each of them has in transformers.
_SHIPPED_TYPES = {"bloom-raw": "bloom", "bloom-tiny": "bloom", "gpt2-tiny": "gpt2", "llama-tiny": "llama"}

VOCABULARY = 307  # a prime: no shard count divides it
_TOKENIZER_SEED = 5

# A matrix times a normed vector of _HIDDEN entries gives entries of 1.5, so scores of 2.3: attention is peaked, and
# bf16 is no chaos yet.
_HIDDEN = 72
_MATRIX_SPREAD = 0.18
_EMBEDDING_SPREAD = 0.4
_VECTOR_SPREAD = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """How one model is built from a seed.

    Attributes:
        name: "mistral-window".
        what: the part for which it is there, in one line.
        model_type: of transformers.
        config: its config, beside vocabulary and special tokens.
        context: the longest sequence, in tokens; its tokenizer says so.
        seed: of its weights.
        norm_centre: around which norm weights lie: where a norm multiplies by 1 + weight, 0.
        finish: changes the weights at the end, with a generator.
    """

    name: str
    what: str
    model_type: str
    config: Mapping[str, Any]
    context: int = 1024
    seed: int
    norm_centre: float = 1.0
    finish: Callable[[PreTrainedModel, torch.Generator], None] | None = field(default=None)

    def build(self, dtype: str = "bfloat16") -> PreTrainedModel:
        """The live model, in evaluation mode; the same bits every time.

        Args:
            dtype: of the weights, "bfloat16": what `write` stores.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        # Llama3 scaling and the like are rewritten in place by transformers.
        arguments = copy.deepcopy(dict(self.config))
        config = AutoConfig.for_model(
            self.model_type, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0, **arguments
        )
        with torch.random.fork_rng(devices=[]):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **{dtype_key(): torch.float32})
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(self._centre(name, parameter) + noise * _spread(name, parameter))
            if self.finish is not None:
                self.finish(model, generator)
        placed: PreTrainedModel = model.to(getattr(torch, dtype)).eval()
        return placed

    def _centre(self, name: str, parameter: torch.Tensor) -> float:
        return self.norm_centre if parameter.ndim == 1 and not name.endswith("bias") else 0.0


def _spread(name: str, parameter: torch.Tensor) -> float:
    if parameter.ndim == 1:
        return _VECTOR_SPREAD
    return _EMBEDDING_SPREAD if "embed" in name or "wte" in name or "wpe" in name else _MATRIX_SPREAD


def _head_near_embedding(model: PreTrainedModel, generator: torch.Generator) -> None:
    """An untied head as training leaves it: it began as the embedding, and has drifted from it by half its size."""
    import torch

    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    noise = torch.randn(embedding.weight.shape, generator=generator)
    head.weight.copy_(embedding.weight + 0.5 * _EMBEDDING_SPREAD * noise)


def _sharp_head(model: PreTrainedModel, _generator: torch.Generator) -> None:
    """Scores of head 0 of some thousands, as attention logits grow to in training without a norm of q and k."""
    body: Any = model
    config, growth = model.config, 45.0
    size = config.n_embd // config.n_head
    for block in body.transformer.h:
        for parameter in block.attn.c_attn.parameters():
            for start in (0, config.n_embd):  # columns are q, k, v
                parameter[..., start : start + size] *= growth


_LLAMA: Mapping[str, Any] = {
    "hidden_size": _HIDDEN,
    "intermediate_size": 102,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "mlp_bias": True,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

#: By name. None of them is committed: `write` makes its directory.
HOSTS: Mapping[str, Host] = {
    host.name: host
    for host in (
        Host(
            name="gemma2-softcap",
            what="soft caps of scores and of final logits, a window of 16 tokens in every other layer",
            model_type="gemma2",
            config={
                "hidden_size": _HIDDEN,
                "intermediate_size": 102,
                "num_hidden_layers": 3,
                "num_attention_heads": 6,
                "num_key_value_heads": 3,
                "head_dim": 16,
                "query_pre_attn_scalar": 16,
                "max_position_embeddings": 1024,
                "sliding_window": 16,
                "attn_logit_softcapping": 8.0,
                "final_logit_softcapping": 6.0,
                "attention_bias": True,
            },
            seed=21,
            norm_centre=0.0,
        ),
        Host(
            name="gpt2-sharp",
            what="a head whose scores are thousands",
            model_type="gpt2",
            config={
                "n_embd": _HIDDEN,
                "n_inner": 102,
                "n_layer": 3,
                "n_head": 6,
                "n_positions": 1024,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
            },
            seed=22,
            finish=_sharp_head,
        ),
        Host(
            name="llama-ntk",
            what="dynamic NTK scaling of RoPE, from 64 tokens on",
            model_type="llama",
            config={
                **_LLAMA,
                "max_position_embeddings": 64,
                "rope_theta": 10_000.0,
                "rope_scaling": {"rope_type": "dynamic", "factor": 8.0},
            },
            context=64,
            seed=23,
        ),
        Host(
            name="llama-scaled",
            what="llama3 scaling of RoPE, of an original length of 64",
            model_type="llama",
            config={**_LLAMA, "rope_theta": 10_000.0, "rope_scaling": _LLAMA3_SCALING},
            seed=24,
        ),
        Host(
            name="llama-untied",
            what="a head near the embedding and not tied to it, a RoPE theta of 500,000",
            model_type="llama",
            config={**_LLAMA, "rope_theta": 500_000.0},
            seed=25,
            finish=_head_near_embedding,
        ),
        Host(
            name="mistral-window",
            what="a sliding window of 16 tokens",
            model_type="mistral",
            config={
                **{key: value for key, value in _LLAMA.items() if not key.endswith("_bias")},
                "rope_theta": 10_000.0,
                "sliding_window": 16,
            },
            seed=26,
        ),
        Host(
            name="opt-offset",
            what="learned positions with an offset of 2",
            model_type="opt",
            config={
                "hidden_size": _HIDDEN,
                "ffn_dim": 102,
                "num_hidden_layers": 3,
                "num_attention_heads": 6,
                "max_position_embeddings": 1024,
                "word_embed_proj_dim": _HIDDEN,
                "dropout": 0.0,
            },
            seed=27,
        ),
        Host(
            name="stablelm-partial",
            what="a rotary embedding of half of each head",
            model_type="stablelm",
            config={
                **{key: value for key, value in _LLAMA.items() if not key.endswith("_bias") and "rms" not in key},
                "head_dim": _HIDDEN // 6,
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.5,
                "use_qkv_bias": True,
            },
            seed=28,
        ),
    )
}

#: Every name that a mutation may give as a host.
NAMES = (*SHIPPED, *HOSTS)


def model_type_of(name: str) -> str:
    """The type of any host in transformers.

    Raises:
        LookupError: for a name that is not one of NAMES.
    """
    return _SHIPPED_TYPES[name] if name in _SHIPPED_TYPES else _host(name).model_type


def build(name: str, dtype: str = "bfloat16") -> PreTrainedModel:
    """The live model of one of HOSTS.

    Raises:
        LookupError: for another name.
    """
    return _host(name).build(dtype)


def write(name: str, directory: Path) -> Path:
    """Save one of HOSTS with a tokenizer, as a model directory; returns the directory.

    One that is there stays as it is: what another process wrote at the same time is the same.

    Raises:
        LookupError: for another name.
    """
    from harness.environment import Quiet
    from harness.models import tokenizer

    host = _host(name)
    if directory.exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        with Quiet():
            host.build().save_pretrained(staging)
        text_tokenizer = tokenizer.train(VOCABULARY, seed=_TOKENIZER_SEED, adds_bos=host.model_type != "gpt2")
        tokenizer.save(text_tokenizer, staging, context=host.context)
        staging.chmod(0o755)
        _moved(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory


def _moved(staging: Path, directory: Path) -> None:
    try:
        staging.rename(directory)
    except OSError:
        # Another process was faster: a directory that is not empty cannot be renamed over.
        if not directory.is_dir():
            raise


def model_directory(name: str, *, goldens: Path, scratch: Path) -> Path:
    """The model directory of any host: below ``goldens`` if it is shipped, else below ``scratch``, written if need be.

    Raises:
        LookupError: for a name that is not one of NAMES.
    """
    return goldens / name / "model" if name in SHIPPED else write(name, scratch / name)


def _host(name: str) -> Host:
    if name not in HOSTS:
        raise LookupError(f"there is no host {name!r} to build; there are {', '.join(HOSTS)}")
    return HOSTS[name]
