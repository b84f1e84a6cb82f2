"""What the attention of a model is given, kept for experiments on single layers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from looseleaf import AttentionBackend, AttentionCall

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass
class KeepAttention(AttentionBackend):
    """Exact attention that keeps the queries, keys and values of some layers.

    Attach it, run the model once, and read :attr:`found`, which is all that is kept after the model is gone::

        with torch.inference_mode(), looseleaf.attach(model, KeepAttention(layers=(5, 15))) as attached:
            model(ids)
        query, key, value = attached.backend.found[5]

    Args:
        layers: which layers, counted as :class:`looseleaf.AttentionCall` does.

    Attributes:
        found: layer -> query (B, Hq, Lq, D), key and value (B, Hkv, Lk, D), contiguous, of the last call that was
            no decode step, as attention sees them: rotated, without padding on the left, heads not repeated.

    Raises:
        ValueError: no layer, or a negative one.
    """

    layers: tuple[int, ...] = ()
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def validate(self) -> None:
        self.check("layers", len(self.layers) > 0 and all(isinstance(n, int) and n >= 0 for n in self.layers),
                   "one layer or more, counted from 0")

    def attend(self, call: AttentionCall) -> Tensor:
        """Exact attention, (B, Hq, Lq, D)."""
        if call.layer in self.layers and call.phase != "decode":
            self.found[call.layer] = (call.query.contiguous(), call.key.contiguous(), call.value.contiguous())
        return call.dense()
