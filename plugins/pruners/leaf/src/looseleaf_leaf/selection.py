"""Which tokens are confounding: the rule from differences of sensitivity to what is removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from looseleaf import Masks, Selection
from looseleaf_leaf.gradients import min_max


@dataclass(frozen=True)
class ConfoundingTokens(Selection):
    """Remove the tokens of each row whose difference of sensitivity, teacher minus student, is lowest.

    The differences of a row (its finite scores) are brought to [0, 1] by their minimum and maximum. Of n of them the
    threshold is the one with index ``int(q * n)`` in ascending order, but at most ``cap``; what is at or below it goes
    [official code]. With ``tau`` the threshold is tau itself [paper]. Of equal differences the first go first, so that
    never more than ``int(q * n) + 1`` go. A row whose differences are all equal, as of a single token, keeps its
    tokens, for none stands out; so does a row that would lose all of them [this project's rule].

    Args:
        q: quantile of each row, 0 <= q < 1.
        cap: largest threshold, 0 to 1.
        tau: fixed threshold on the scaled differences, 0 <= tau < 1, in the place of ``q`` and ``cap``; None: not used.
    """

    q: float = 0.10
    cap: float = 0.5
    tau: float | None = None

    def __post_init__(self) -> None:
        for field, value, ok, allowed in (
                ("q", self.q, _number(self.q) and 0 <= self.q < 1, "0 <= q < 1"),
                ("cap", self.cap, _number(self.cap) and 0 <= self.cap <= 1, "0 <= cap <= 1"),
                ("tau", self.tau, self.tau is None or (_number(self.tau) and 0 <= self.tau < 1),
                 "0 <= tau < 1, or None for the quantile")):
            if not ok:
                raise ValueError(f"ConfoundingTokens.{field}={value!r}: allowed is {allowed}")

    def most(self, count: int) -> int:
        """How many of ``count`` tokens may go at most."""
        return max(0, min(count - 1, count if self.tau is not None else int(self.q * count) + 1))

    def select(self, scores: Mapping[str, Tensor]) -> Masks:
        """See :meth:`looseleaf.Selection.select`; scores are (B, L), +inf where a token may not be removed.

        The metadata of the masks say under ``"scored"`` how many tokens of each row had a finite score.
        """
        if not scores:
            raise ValueError("no scores: there is nothing to select from")
        kept, scored = {}, {}
        for name, score in scores.items():
            if not isinstance(score, Tensor) or not score.is_floating_point() or score.ndim != 2:
                raise ValueError(f"the scores of {name!r} must be floating-point, (B, L)")
            if bool((score.isnan() | score.isneginf()).any()):
                raise ValueError(f"the scores of {name!r} have NaN or -inf: allowed are numbers, and +inf for what may "
                                 "not be removed")
            kept[name] = self._keep(score.detach())
            scored[name] = score.isfinite().sum(1).tolist()
        return Masks(kept, {**self.describe(), "scored": scored})

    def _keep(self, score: Tensor) -> Tensor:
        free = score.isfinite()
        count = free.sum(1)
        scaled = min_max(score.where(free, torch.zeros_like(score)), free).masked_fill(~free, torch.inf)
        if self.tau is not None:
            gone = scaled <= self.tau
        else:
            order = scaled.sort(dim=1, stable=True).indices
            rank = torch.empty_like(order).scatter_(1, order, torch.arange(
                order.shape[1], device=order.device).expand_as(order).contiguous())
            wanted = torch.tensor([int(self.q * n) + 1 for n in count.tolist()], device=score.device)
            gone = (rank < wanted[:, None]) & (scaled <= self.cap)
        gone &= free
        low = score.masked_fill(~free, torch.inf).amin(1)
        high = score.masked_fill(~free, -torch.inf).amax(1)
        gone &= ((gone.sum(1) < count) & (high > low))[:, None]
        return ~gone

    def violations(self, masks: Masks) -> list[str]:
        """See :meth:`looseleaf.Selection.violations`. Masks without ``"scored"`` in their metadata are held to what a
        row of that length allows."""
        known = masks.metadata.get("scored", {})
        out = []
        for name, mask in masks.items():
            if mask.ndim != 2:
                out.append(f"{name}: the mask has shape {tuple(mask.shape)}, the rule asks for (B, L)")
                continue
            for row, gone in enumerate((~mask).sum(1).tolist()):
                count = known.get(name, [mask.shape[1]] * len(mask))[row]
                if gone > self.most(count):
                    out.append(f"{name}: {gone} of {count} tokens removed in row {row}, the rule allows "
                               f"{self.most(count)}")
        return out


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
