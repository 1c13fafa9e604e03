"""Condense logits into a few numbers a position: random projections, top entries, logsumexp.

Full logits of 150,000 columns are 600 kB a position; a sketch is about 250 bytes, and the length of
an error vector is still known to a few per cent over a suite (Johnson-Lindenstrauss; Achlioptas
2003 for random signs).

Shape legend: N rows, V columns of the golden's vocabulary, J projections, G generated rows, T top entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harness.numerics.constants import PROJECTIONS, TOP
from harness.values import Rows

if TYPE_CHECKING:
    import torch

#: Named in every golden: changing the generator changes every projection.
GENERATOR = "philox4x64-10 signs, key 0x676f6c64656e, scaled 1/sqrt(J), rows centred"
_KEY = 0x676F6C64656E
_CHUNK_BYTES = 64 * 2**20


@lru_cache(maxsize=4)
def signs(vocabulary: int, projections: int = PROJECTIONS) -> NDArray[np.float64]:
    """Random signs over sqrt(J), each row's mean over V removed, float64 [J, V].

    Removing the mean from the signs removes it from the logits: (P C) L = P (C L), with C the
    projection that takes out a constant shift, to which the softmax is blind.
    The stream is numpy's Philox, a counter-based generator whose raw output is part of its contract.
    """
    matrix = plain_signs(vocabulary, projections)
    centred: NDArray[np.float64] = matrix - matrix.mean(axis=1, keepdims=True)
    return centred


def plain_signs(width: int, projections: int = PROJECTIONS) -> NDArray[np.float64]:
    """Random signs over sqrt(J), float64 [J, width]: for what a constant shift matters in."""
    words = np.random.Philox(key=_KEY).random_raw(-(-projections * width // 64))
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: projections * width]
    signs_JW: NDArray[np.float64] = (1.0 - 2.0 * bits.reshape(projections, width)) / np.sqrt(projections)
    return signs_JW


class Sketcher:
    """Condenses logits as they come, so that no full copy of them is kept.

    Args:
        vocabulary: columns of the reference; a candidate's further columns only count for the argmax.
        fingerprints: also keep a checksum of the raw bits of generated rows, for bit-equality.
        basis: also keep the products of the logits with these columns, each orthogonal to a constant, [V, B].
    """

    def __init__(
        self, vocabulary: int, *, fingerprints: bool = False, basis: NDArray[np.float64] | None = None
    ) -> None:
        self.vocabulary = vocabulary
        self.fingerprints = fingerprints
        self.basis = basis
        self._parts: list[Rows] = []

    def add(
        self,
        logits_NV: torch.Tensor,
        next_ids_N: torch.Tensor,
        *,
        request: NDArray[np.int32],
        position: NDArray[np.int32],
        generated: NDArray[np.bool_],
    ) -> None:
        """Condense N rows of logits (any float dtype); ``next_ids_N`` are the tokens that follow."""
        columns = logits_NV.shape[-1]
        step = max(1, _CHUNK_BYTES // (8 * columns))
        for start in range(0, len(request), step):
            cut = slice(start, start + step)
            self._parts.append(
                self._condense(logits_NV[cut], next_ids_N[cut], request[cut], position[cut], generated[cut])
            )

    def _condense(
        self,
        logits_NV: torch.Tensor,
        next_ids_N: torch.Tensor,
        request: NDArray[np.int32],
        position: NDArray[np.int32],
        generated: NDArray[np.bool_],
    ) -> Rows:
        import torch

        # fp32 products would add an error of the size that an fp32 candidate is judged by.
        wide = torch.float64 if logits_NV.dtype in (torch.float32, torch.float64) else torch.float32
        known_NV = logits_NV[:, : self.vocabulary].to(wide)
        matrix_VJ = torch.from_numpy(signs(self.vocabulary)).to(device=logits_NV.device, dtype=wide).T
        generated_N = torch.from_numpy(generated).to(logits_NV.device)
        top = known_NV[generated_N].topk(min(TOP, self.vocabulary), dim=-1)
        inside_N = next_ids_N.clamp(max=self.vocabulary - 1)
        anchor_N = finite_anchor(known_NV.max(dim=-1).values)
        weight_N, moment_N = softmax_sums(known_NV, anchor_N)
        logsumexp_N = anchor_N + weight_N.log()
        return Rows(
            request=request,
            position=position,
            generated=generated,
            argmax=_array(logits_NV.argmax(dim=-1), np.int32),
            nonfinite=_array((~torch.isfinite(known_NV)).sum(dim=-1), np.int32),
            logsumexp=_array(logsumexp_N, np.float32),
            logp=_array(known_NV.gather(1, inside_N[:, None])[:, 0] - logsumexp_N, np.float32),
            entropy=_array(weight_N.log() - moment_N / weight_N, np.float32),
            projections=_array(known_NV @ matrix_VJ, np.float32),
            top_ids=_array(top.indices, np.int32),
            top_logits=_array(top.values, np.float32),
            fingerprint=self._fingerprint(logits_NV[generated_N]),
            fine=self._fine(known_NV),
        )

    def _fine(self, known_NV: torch.Tensor) -> NDArray[np.float64] | None:
        import torch

        if self.basis is None:
            return None
        basis_VB = torch.from_numpy(self.basis).to(device=known_NV.device, dtype=known_NV.dtype)
        return _array(known_NV @ basis_VB, np.float64)

    def _fingerprint(self, logits_GV: torch.Tensor) -> NDArray[np.int64]:
        """A linear checksum, modulo 2^64, of the logits' bit patterns, int64 [G]."""
        import torch

        if not self.fingerprints:
            return np.zeros(len(logits_GV), dtype=np.int64)
        bits_GV, words = raw_bits(logits_GV), torch.from_numpy(checksum_words(logits_GV.shape[-1]))
        return _array((bits_GV * words.to(bits_GV.device)).sum(dim=-1), np.int64)

    def take(self, other: Sketcher) -> None:
        """Add what another one has condensed, in another process for one."""
        self._parts += other._parts

    def put(self, rows: Rows) -> None:
        """Add rows that were condensed elsewhere, of the same vocabulary."""
        self._parts.append(rows)

    def rows(self, requests: Sequence[int] | None = None) -> Rows:
        """All rows added so far, ordered by (request, position).

        ``requests`` translate the indices that were added into those of the suite.
        """
        rows = sort_rows(concatenate(self._parts, self.vocabulary))
        if requests is None:
            return rows
        return sort_rows(replace(rows, request=np.asarray(requests, dtype=np.int32)[rows.request]))


def raw_bits(logits_GV: torch.Tensor) -> torch.Tensor:
    """The bit pattern of each logit, int64 [G, V]."""
    import torch

    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[logits_GV.element_size()]
    return logits_GV.contiguous().view(integer).to(torch.int64)


@lru_cache(maxsize=4)
def checksum_words(columns: int) -> NDArray[np.int64]:
    """What bit patterns are multiplied with before they are summed modulo 2^64, int64 [V].

    Odd multipliers are invertible modulo 2^64: a change in one column always shows.
    """
    words = np.random.Philox(key=_KEY + 1).random_raw(columns) | np.uint64(1)
    return words.view(np.int64)


def softmax_sums(logits_NV: torch.Tensor, anchor_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over V of a softmax's weights w = exp(d) and of w d, of distances d from a finite anchor, [N] each.

    With the largest logit as the anchor, logsumexp is anchor + log(sum w), and the entropy is log(sum w) less
    sum(w d) / sum(w): logsumexp less the mean logit would cancel where logits are large, and leave their round-off.
    """
    import torch

    distance_NV = logits_NV - anchor_N[:, None].to(logits_NV.dtype)
    weight_NV = distance_NV.exp()
    # A masked column (-inf) adds nothing: its weight is 0, and 0 x inf is not.
    term_NV = torch.where(weight_NV == 0, torch.zeros_like(distance_NV), weight_NV * distance_NV)
    return weight_NV.sum(dim=-1), term_NV.sum(dim=-1)


def finite_anchor(largest_N: torch.Tensor) -> torch.Tensor:
    """The largest logit of each row, 0 where that is infinite and nothing can be scaled by it."""
    import torch

    return torch.where(largest_N.isinf(), torch.zeros_like(largest_N), largest_N)


def _array(tensor: torch.Tensor, dtype: type[np.generic]) -> NDArray[Any]:
    return tensor.detach().cpu().numpy().astype(dtype)


def empty_rows(vocabulary: int) -> Rows:
    """No rows at all, with the right shapes and dtypes."""
    integers, floats = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32)
    top = min(TOP, vocabulary)
    return Rows(
        request=integers, position=integers, generated=np.zeros(0, dtype=np.bool_), argmax=integers,
        nonfinite=integers, logsumexp=floats, logp=floats, entropy=floats,
        projections=np.zeros((0, PROJECTIONS), dtype=np.float32),
        top_ids=np.zeros((0, top), dtype=np.int32), top_logits=np.zeros((0, top), dtype=np.float32),
        fingerprint=np.zeros(0, dtype=np.int64),
    )  # fmt: skip


def concatenate(parts: list[Rows], vocabulary: int) -> Rows:
    """Rows one after another."""
    if not parts:
        return empty_rows(vocabulary)
    found = {name: np.concatenate([getattr(part, name) for part in parts]) for name in (*_PER_ROW, *_PER_GENERATED)}
    fine = [part.fine for part in parts if part.fine is not None]
    return Rows(**found, fine=np.concatenate(fine) if len(fine) == len(parts) else None)


def select_rows(rows: Rows, keep: NDArray[np.bool_] | NDArray[np.int64]) -> Rows:
    """The rows of a mask [N] or of indices, top entries and fingerprints with them."""
    place = np.cumsum(rows.generated) - 1
    chosen = rows.generated[keep]
    top = place[keep][chosen]
    return Rows(
        **{name: getattr(rows, name)[keep] for name in _PER_ROW},
        **{name: getattr(rows, name)[top] for name in _PER_GENERATED},
        fine=None if rows.fine is None else rows.fine[keep],
    )


_PER_ROW = (
    "request", "position", "generated", "argmax", "nonfinite", "logsumexp", "logp", "entropy", "projections",
)  # fmt: skip
_PER_GENERATED = ("top_ids", "top_logits", "fingerprint")


def sort_rows(rows: Rows) -> Rows:
    """The rows ordered by (request, position)."""
    return select_rows(rows, np.lexsort((rows.position, rows.request)))
