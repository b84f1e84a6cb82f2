"""The baseline of every sparse method: the first keys and the most recent ones."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from looseleaf.attention.call import AttentionBackend, AttentionCall
from looseleaf.attention.dense import ROWS
from looseleaf.paper import Paper
from looseleaf.plugin import In


@dataclasses.dataclass
class SlidingWindow(AttentionBackend):
    """Attention sinks and a window: each query sees the first ``sink`` keys and the last ``window`` ones.

    Exact inside that set, computed for a few hundred query rows at a time. Decoding and encoders stay exact.

    Args:
        sink: number of first keys that every query sees.
        window: number of most recent keys that a query sees, itself included.
    """

    sink: Annotated[int, In(">= 0")] = 4
    window: Annotated[int, In(">= 1")] = 1024
    paper: ClassVar[Paper] = Paper(
        title="Efficient Streaming Language Models with Attention Sinks",
        authors=("Guangxuan Xiao", "Yuandong Tian", "Beidi Chen", "Song Han", "Mike Lewis"), year=2024,
        arxiv="2309.17453", venue="ICLR 2024", summary="Bounded attention: the first tokens and a recent window.")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """A window shorter than the kit's inputs."""
        return {"make": lambda: cls(sink=4, window=64)}

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention over sinks and window, (B, Hq, Lq, D)."""
        if not call.is_causal or call.mask is not None:
            return call.fall_back("an extra mask")
        if call.key.shape[2] <= self.sink + self.window:
            return call.fall_back("no longer than sinks and window")
        out = call.query.new_zeros(*call.query.shape[:3], call.value.shape[-1])
        kept = seen = 0
        for b, (nq, nk) in enumerate(zip(*(lengths.tolist() for lengths in call.lengths()), strict=True)):
            for start in range(0, nq, ROWS):
                stop = min(nq, start + ROWS)
                last = torch.arange(start, stop, device=out.device)[:, None] + (nk - nq)
                keys = torch.arange(max(0, min(nk, stop + nk - nq)), device=out.device)
                keys = keys[(keys < self.sink) | (keys > start + nk - nq - self.window)]
                mask = (keys <= last) & ((keys > last - self.window) | (keys < self.sink))
                kept, seen = kept + mask.sum(), seen + (last + 1).clamp(min=0).sum()
                out[b:b + 1, :, start:stop] = dataclasses.replace(
                    call, query=call.query[b:b + 1, :, start:stop], key=call.key[b:b + 1, :, keys],
                    value=call.value[b:b + 1, :, keys], is_causal=False, mask=mask, query_lengths=None,
                    key_lengths=None).dense()
        call.record(density=float(kept / max(1, int(seen))))
        return out
