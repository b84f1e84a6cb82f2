"""The gate of the Theme Transformer for encoder-decoders that were made without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from looseleaf import AttentionBackend, AttentionCall, Paper
from looseleaf.attention.attached import Attached
from looseleaf.attention.call import Phase
from looseleaf.plugin import In


@dataclasses.dataclass
class ThemeGate(AttentionBackend):
    """Open cross-attention of an encoder-decoder where a theme is to return, and close it elsewhere (arXiv 2111.04093).

    The output of cross-attention is multiplied by g, that of the decoder's self-attention by 1 - e g, where g = [l > 0]
    comes from ``attached.context["theme"]``: (B, Lq), 0 outside theme regions, for each token that the decoder is
    given. The encoder stays exact. In the Theme Transformer itself both run side by side; in BART, Whisper and other
    foreign models they follow each other, and the gate comes before the output projection, whose bias stays.

    Set the context before each forward; while ``generate`` runs, :func:`follow` does so. Without it a call is exact and
    counted, or has the gate ``default``.

    Args:
        exclusive: e of the later decoder layers: 1, in a theme region they do not see their own past.
        exclusive_from: fraction of the decoder layers before which e is 0.
        default: g of calls without a context; None: they stay exact.
    """

    exclusive: Annotated[float, In("[0, 1]")] = 1.0
    exclusive_from: Annotated[float, In("[0, 1]")] = 0.5
    default: Annotated[float | None, In("[0, 1]")] = None
    phases: ClassVar[frozenset[Phase]] = frozenset({"prefill", "decode", "bidirectional"})
    # Exact attention honours all of them, and a gate that came and went with dropout would train something else.
    score_changes: ClassVar[frozenset[str]] = frozenset({"softcap", "s_aux", "position_bias", "dropout"})
    paper: ClassVar[Paper] = Paper(
        title="Theme Transformer: Symbolic Music Generation with Theme-Conditioned Transformer",
        authors=("Yi-Jen Shih", "Shih-Lun Wu", "Frank Zalkow", "Meinard Müller", "Yi-Hsuan Yang"), year=2022,
        arxiv="2111.04093", venue="IEEE Transactions on Multimedia", code="https://github.com/atosystem/ThemeTransformer",
        summary="A melody in, a piece out in which it returns: the decoder attends to the theme where it is told to.")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """A gate that is half open everywhere: the kit's models have no theme and no cross-attention."""
        return {"make": lambda: cls(exclusive=0.5, exclusive_from=0.0, default=1.0), "keeps_own_key": False}

    def attend(self, call: AttentionCall) -> Tensor:
        """Exact attention times its gate, (B, Hq, Lq, D)."""
        decoder = call.is_cross or call.phase != "bidirectional"
        config = getattr(call.module, "config", None)
        if not decoder and getattr(config, "is_encoder_decoder", False):
            call.record(part="encoder, exact")
            return call.dense()
        gate = self._gate(call)
        if gate is None:
            return call.fall_back("no context 'theme' for these queries")
        call.record(part="cross" if call.is_cross else "self", theme=gate.mean())
        factor = gate if call.is_cross else 1 - self._exclusive(call, config) * gate
        return call.dense() * factor[:, None, :, None].to(call.query.dtype)

    def _gate(self, call: AttentionCall) -> Tensor | None:
        """g of each query, (B, Lq) float32; None: unknown."""
        batch, _, _, lq, lk, _ = call.shape
        theme = call.context.get("theme")
        if theme is not None and theme.shape[1] != lq and not call.is_cross and theme.shape[1] == lk:
            # The labels of all keys, those in the cache too; the queries are the last ones of each item.
            queries, keys = call.lengths()
            places = torch.arange(lq, device=theme.device) + (keys - queries)[:, None].to(theme.device)
            theme = theme.gather(1, places.clamp(0, lk - 1))
        if theme is not None and theme.shape[1] == lq:
            return (theme > 0).float().to(call.query.device)
        if self.default is None:
            return None
        return torch.full((batch, lq), self.default, device=call.query.device)

    def _exclusive(self, call: AttentionCall, config: Any) -> float:
        """e of a layer, by its place among the decoder's; outside a model or where that is unknown, among all."""
        index = getattr(call.module, "layer_idx", None)
        counts = (getattr(config, name, None) for name in ("decoder_layers", "num_hidden_layers"))
        total = next((n for n in counts if isinstance(n, int)), None)
        place, layers = (call.layer, call.layers) if index is None or total is None else (index, total)
        return self.exclusive if place >= self.exclusive_from * layers else 0.0


def follow(attached: Attached, labels: Callable[[Tensor], Tensor], ids: Tensor) -> Callable[..., Tensor]:
    """Keep the theme labels of an attached model up to date while transformers' ``generate`` runs.

    ``model.generate(inputs, decoder_input_ids=ids, stopping_criteria=[follow(attached, labels, ids)])``. For sampling
    and greedy search with a cache; the criterion never stops anything.

    Args:
        attached: what :func:`looseleaf.attach` gave for a :class:`ThemeGate`.
        labels: maps decoder tokens (B, L) to theme labels (B, L), each a function of the tokens up to its place, such
            as :meth:`ThemeTokenizer.labels` or a schedule in time.
        ids: the tokens with which the decoder begins, (B, L).
    """
    attached.context["theme"] = labels(ids)

    def update(input_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:
        attached.context["theme"] = labels(input_ids)[:, -1:]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return update
