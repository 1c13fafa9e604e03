"""Condense logits that come in slices of the vocabulary: what sketch.py keeps of them, without a whole row in memory.

Maximum, logsumexp and mean logit are carried from slice to slice (Milakov and Gimelshein 2018, online softmax); random
projections, products with a basis and checksums are sums over columns, and simply add up.

Shape legend: N rows, n rows of a part, v columns of a slice, V columns of the golden, J projections, G generated rows,
T top entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harness.numerics.constants import PROJECTIONS, TOP
from harness.numerics.sketch import checksum_words, finite_anchor, raw_bits, signs, softmax_sums
from harness.values import Rows

if TYPE_CHECKING:
    import torch

#: Columns of a part in float64 and its temporaries stay below this.
_CHUNK_BYTES = 64 * 2**20


class SlicedSketch:
    """Rows of logits, condensed slice by slice.

    Args:
        vocabulary: columns of the reference; further ones only count for the argmax.
        columns: all columns that will come.
        following: the token that follows each row, [N].
        request, position, generated: as in Rows, [N].
        fingerprints: keep a checksum of the raw bits of generated rows.
        basis: also keep products with these columns, [V, B].
    """

    def __init__(
        self,
        vocabulary: int,
        columns: int,
        following: NDArray[np.int64],
        *,
        request: NDArray[np.int32],
        position: NDArray[np.int32],
        generated: NDArray[np.bool_],
        fingerprints: bool = False,
        basis: NDArray[np.float64] | None = None,
    ) -> None:
        import torch

        count, steps, top = len(request), int(generated.sum()), min(TOP, vocabulary)
        self.vocabulary, self.columns = vocabulary, columns
        self._request, self._position, self._generated = request, position, generated
        self._following = torch.from_numpy(np.minimum(following, vocabulary - 1))
        self._place = torch.from_numpy(np.cumsum(generated) - 1)
        self._basis = None if basis is None else torch.from_numpy(basis)
        self._fingerprints = fingerprints
        wide = torch.float64
        self._state: dict[str, torch.Tensor] = {
            "best": torch.full((count,), -torch.inf, dtype=wide),
            "argmax": torch.zeros(count, dtype=torch.int64),
            "nonfinite": torch.zeros(count, dtype=torch.int64),
            "largest": torch.full((count,), -torch.inf, dtype=wide),
            "weight": torch.zeros(count, dtype=wide),
            "moment": torch.zeros(count, dtype=wide),
            "chosen": torch.full((count,), torch.nan, dtype=wide),
            "projections": torch.zeros((count, PROJECTIONS), dtype=wide),
            "top_ids": torch.full((steps, top), -1, dtype=torch.int64),
            "top_logits": torch.full((steps, top), -torch.inf, dtype=wide),
            "fingerprint": torch.zeros(steps, dtype=torch.int64),
            "fine": torch.zeros((count, 0 if basis is None else basis.shape[1]), dtype=wide),
        }

    def __len__(self) -> int:
        return len(self._request)

    def add(self, first: int, column: int, logits_nv: torch.Tensor) -> None:
        """Take the columns from ``column`` on of the rows from ``first`` on, in any float dtype. Each comes once."""
        step = max(1, _CHUNK_BYTES // (8 * logits_nv.shape[1]))
        for start in range(0, len(logits_nv), step):
            self._add(slice(first + start, first + min(start + step, len(logits_nv))), column, logits_nv[start:][:step])

    def _add(self, rows: slice, column: int, logits_nv: torch.Tensor) -> None:
        import torch

        state = self._state
        best_n, place_n = logits_nv.max(dim=-1)
        # `not <=`: a NaN wins, as it does in argmax, and the first one stays.
        wins_n = ~(best_n.double() <= state["best"][rows]) & ~state["best"][rows].isnan()
        state["argmax"][rows] = torch.where(wins_n, place_n + column, state["argmax"][rows])
        state["best"][rows] = torch.where(wins_n, best_n.double(), state["best"][rows])
        stop = min(column + logits_nv.shape[1], self.vocabulary)
        generated_n = torch.from_numpy(self._generated[rows])
        steps_g = self._place[rows][generated_n]
        if self._fingerprints and len(steps_g):
            words = torch.from_numpy(checksum_words(self.columns)[column : column + logits_nv.shape[1]])
            state["fingerprint"][steps_g] += (raw_bits(logits_nv[generated_n]) * words).sum(dim=-1)
        if column >= stop:
            return
        # fp32 products would add an error of the size that an fp32 candidate is judged by.
        wide = torch.float64 if logits_nv.dtype in (torch.float32, torch.float64) else torch.float32
        known_nv = logits_nv[:, : stop - column].to(wide)
        state["nonfinite"][rows] += (~torch.isfinite(known_nv)).sum(dim=-1)
        self._softmax(rows, known_nv)
        matrix_VJ = torch.from_numpy(signs(self.vocabulary)[:, column:stop]).to(wide).T
        state["projections"][rows] += (known_nv @ matrix_VJ).double()
        if self._basis is not None:
            state["fine"][rows] += (known_nv @ self._basis[column:stop].to(wide)).double()
        following_n = self._following[rows] - column
        inside_n = (following_n >= 0) & (following_n < stop - column)
        picked_n = known_nv.gather(1, following_n.clamp(0, stop - column - 1)[:, None])[:, 0].double()
        state["chosen"][rows] = torch.where(inside_n, picked_n, state["chosen"][rows])
        if len(steps_g):
            self._top(steps_g, column, known_nv[generated_n])

    def _softmax(self, rows: slice, known_nv: torch.Tensor) -> None:
        import torch

        state = self._state
        before_n, largest_n = state["largest"][rows], known_nv.max(dim=-1).values.double()
        largest_n = torch.maximum(before_n, largest_n)
        anchor_n = finite_anchor(largest_n)
        scale_n = torch.where(before_n == -torch.inf, torch.zeros_like(before_n), (before_n - anchor_n).exp())
        # What was carried is about the largest before, and moves along.
        moved_n = torch.where(scale_n == 0, torch.zeros_like(scale_n), before_n - anchor_n)
        moment_n = (state["moment"][rows] + state["weight"][rows] * moved_n) * scale_n
        more_n, term_n = softmax_sums(known_nv, anchor_n)
        state["weight"][rows] = state["weight"][rows] * scale_n + more_n.double()
        state["moment"][rows] = moment_n + term_n.double()
        state["largest"][rows] = largest_n

    def _top(self, steps_g: torch.Tensor, column: int, known_gv: torch.Tensor) -> None:
        import torch

        state = self._state
        count = state["top_ids"].shape[1]
        top = known_gv.topk(min(count, known_gv.shape[1]), dim=-1)
        logits = torch.cat([state["top_logits"][steps_g], top.values.double()], dim=1)
        ids = torch.cat([state["top_ids"][steps_g], top.indices + column], dim=1)
        # Stable: of equal logits the lower id stays in front, as argmax has it.
        order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :count]
        state["top_logits"][steps_g], state["top_ids"][steps_g] = logits.gather(1, order), ids.gather(1, order)

    def state(self) -> dict[str, torch.Tensor]:
        """All that was carried so far, to go on from in another process."""
        return dict(self._state)

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from there.

        Raises:
            ValueError: where it is of other work.
        """
        for name, tensor in self._state.items():
            if name not in state or state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
                raise ValueError(f"{name} is of other work")
        self._state = {name: state[name].clone() for name in self._state}

    def rows(self) -> Rows:
        """The rows, once all slices have come, in the order given."""
        state = self._state
        logsumexp_N = state["largest"] + state["weight"].log()
        return Rows(
            request=self._request,
            position=self._position,
            generated=self._generated,
            argmax=_array(state["argmax"], np.int32),
            nonfinite=_array(state["nonfinite"], np.int32),
            logsumexp=_array(logsumexp_N, np.float32),
            logp=_array(state["chosen"] - logsumexp_N, np.float32),
            entropy=_array(state["weight"].log() - state["moment"] / state["weight"], np.float32),
            projections=_array(state["projections"], np.float32),
            top_ids=_array(state["top_ids"], np.int32),
            top_logits=_array(state["top_logits"], np.float32),
            fingerprint=_array(state["fingerprint"], np.int64),
            fine=None if self._basis is None else _array(state["fine"], np.float64),
        )


def _array(tensor: torch.Tensor, dtype: type[np.generic]) -> NDArray[Any]:
    return tensor.numpy().astype(dtype)
