"""The trivial rival of every sparse method: the first keys and the most recent ones."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from looseleaf.attention.call import AttentionBackend, AttentionCall
from looseleaf.attention.dense import ROWS
from looseleaf.paper import Paper


@dataclasses.dataclass
class SlidingWindow(AttentionBackend):
    """Attention sinks and a window: each query sees the first ``sink`` keys and the last ``window`` ones.

    Exact inside that set, computed for a few hundred query rows at a time. Decode steps and encoders stay exact.

    Args:
        sink: number of first keys that every query sees; 0 or more.
        window: number of most recent keys that a query sees, itself included; at least 1.
    """

    sink: int = 4
    window: int = 1024
    paper: ClassVar[Paper] = Paper(
        title="Efficient Streaming Language Models with Attention Sinks",
        authors=("Guangxuan Xiao", "Yuandong Tian", "Beidi Chen", "Song Han", "Mike Lewis"), year=2024,
        arxiv="2309.17453", venue="ICLR 2024", summary="Bounded attention: the first tokens and a recent window.")

    def validate(self) -> None:
        self.check("sink", isinstance(self.sink, int) and self.sink >= 0, "a whole number from 0")
        self.check("window", isinstance(self.window, int) and self.window >= 1, "a whole number from 1")

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention over sinks and window, (B, Hq, Lq, D)."""
        if call.phase != "prefill" or call.mask is not None:
            return call.fall_back("only causal prefill without an extra mask is changed")
        _, _, _, lq, lk, _ = call.shape
        if lk <= self.sink + self.window:
            return call.fall_back("no longer than sinks and window")
        batch, device = call.query.shape[0], call.query.device
        key_lengths = [lk] * batch if call.key_lengths is None else call.key_lengths.tolist()
        query_lengths = [lq] * batch if call.query_lengths is None else call.query_lengths.tolist()
        out = call.query.new_zeros(*call.query.shape[:3], call.value.shape[-1])
        kept, seen = 0, 0
        for b, (nq, nk) in enumerate(zip(query_lengths, key_lengths, strict=True)):
            for start in range(0, nq, ROWS):
                stop = min(nq, start + ROWS)
                last = torch.arange(start, stop, device=device)[:, None] + (nk - nq)
                low = max(self.sink, start + nk - nq - self.window + 1)
                keys = torch.cat([torch.arange(min(self.sink, nk), device=device),
                                  torch.arange(low, max(low, stop + nk - nq), device=device)])
                mask = (keys <= last) & ((keys > last - self.window) | (keys < self.sink))
                kept, seen = kept + mask.sum(), seen + (last + 1).clamp(min=0).sum()
                part = dataclasses.replace(
                    call, query=call.query[b:b + 1, :, start:stop], key=call.key[b:b + 1, :, keys],
                    value=call.value[b:b + 1, :, keys], is_causal=False, mask=mask, query_lengths=None,
                    key_lengths=None)
                out[b:b + 1, :, start:stop] = part.dense()
        call.record(density=float(kept / max(1, int(seen))))
        return out
