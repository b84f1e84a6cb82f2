"""Context-aware decoding: what the context changes counts more than it does by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from looseleaf import UnsupportedModelError, costs, unwrapped
from looseleaf.modes import evaluating
from looseleaf_text import LanguageModel, LocalModel
from looseleaf_text.encoding import Encoding
from looseleaf_text.local import padded


class ContextAwareLogits(LogitsProcessor):
    """Context-aware decoding for ``generate`` of any model: ``(1 + alpha) l(y | context) - alpha l(y | no context)``.

    ``model.generate(**inputs, logits_processor=[ContextAwareLogits(model, ids, mask, 0.5)])``; a new one for each call,
    and no beam search, which would put rows into another order. (Shi et al. 2023, arXiv 2305.14739)

    Args:
        model: the model that generates.
        input_ids, attention_mask: the same prompts without their contexts, (B, L), padded on the left.
        alpha: how much the context counts, >= 0; 0 is plain decoding.
    """

    def __init__(self, model: Any, input_ids: Tensor, attention_mask: Tensor, alpha: float = 0.5) -> None:
        check_alpha(alpha)
        self.model, self.alpha = model, alpha
        self._ids, self._mask, self._cache = input_ids, attention_mask, None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores of the next tokens, (B, V)."""
        if self.alpha == 0:
            return scores
        if self._cache is not None:
            self._ids = input_ids[:, -1:]
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -self._ids.shape[1]:]
        out = self.model(input_ids=self._ids, attention_mask=self._mask, position_ids=positions, use_cache=True,
                         past_key_values=self._cache)
        self._cache = out.past_key_values
        return (1 + self.alpha) * scores - self.alpha * out.logits[:, -1].to(scores)


class _Stop(StoppingCriteria):
    """A row ends where its new text holds one of the stops."""

    def __init__(self, tokenizer: Any, start: int, stop: Sequence[str]) -> None:
        self.tokenizer, self.start, self.stop = tokenizer, start, stop

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start:], skip_special_tokens=True)
        return torch.tensor([any(s in text for s in self.stop) for text in texts], device=input_ids.device)


def check_alpha(alpha: float) -> None:
    """Raise ValueError for anything but a finite number from 0 on."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < math.inf:
        raise ValueError(f"alpha: expected a number >= 0, got {alpha!r}")


class ContextAware(LanguageModel):
    """A local model whose answers lean on the context, see :func:`context_aware`."""

    def __init__(self, local: LocalModel, alpha: float) -> None:
        self.local, self.alpha, self.name = local, alpha, local.name

    @property
    def calls(self) -> int:  # type: ignore[override]
        """See :class:`looseleaf_text.LanguageModel`."""
        return self.local.calls

    @property
    def tokens(self) -> int:  # type: ignore[override]
        """See :class:`looseleaf_text.LanguageModel`."""
        return self.local.tokens

    def fingerprint(self) -> str:
        """Of the weights."""
        return self.local.fingerprint()

    def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        """As the local model: which text is without its context is known to :meth:`generate_pairs` alone."""
        return self.local.score(prefixes, continuations)

    def generate(self, prompts: list[str], max_tokens: int, stop: list[str] | None = None,
                 temperature: float = 0.0, seed: int = 0) -> list[str]:
        """As the local model, see :meth:`score`."""
        return self.local.generate(prompts, max_tokens, stop, temperature, seed)

    def tokenize(self, text: str) -> list[int]:
        """See :meth:`looseleaf_text.LanguageModel.tokenize`."""
        return self.local.tokenize(text)

    def detokenize(self, ids: list[int]) -> str:
        """See :meth:`looseleaf_text.LanguageModel.detokenize`."""
        return self.local.detokenize(ids)

    @costs(calls=lambda model, prompts, *_, **more: 2 * len(prompts),
           tokens=lambda model, prompts, without, max_tokens, *_, **more: sum(
               map(model.count_tokens, [*prompts, *without])) + 2 * max_tokens * len(prompts))
    def generate_pairs(self, prompts: Sequence[str], without: Sequence[str], max_tokens: int,
                       stop: Sequence[str] = ()) -> list[str]:
        """Continue each prompt by the likeliest tokens, given the same prompts ``without`` their contexts.

        Where the two are the same text the answer is that of plain decoding.
        """
        local = self.local
        encoding, inner = Encoding(local.tokenizer), unwrapped(local.model)
        rows = list(zip(encoding.opened(list(prompts)), encoding.opened(list(without)), strict=True))
        own = getattr(getattr(inner, "generation_config", None), "eos_token_id", None)
        ends = {local.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        out = [""] * len(rows)
        order = sorted(range(len(rows)), key=lambda n: len(rows[n][0]))
        longest = max((len(a) + len(b) for a, b in rows), default=1) + 2 * max_tokens
        size = max(1, local.batch_tokens // longest)
        for at in range(0, len(order), size):
            chosen = order[at:at + size]
            ids, mask = padded([rows[n][0] for n in chosen], local.device, left=True)
            other, other_mask = padded([rows[n][1] for n in chosen], local.device, left=True)
            config = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, eos_token_id=sorted(ends) or None,
                                      pad_token_id=min(ends, default=0))
            stops = [_Stop(local.tokenizer, ids.shape[1], stop)] if stop else []
            with torch.no_grad(), evaluating(local.model):
                found = inner.generate(
                    input_ids=ids, attention_mask=mask, generation_config=config,
                    logits_processor=LogitsProcessorList([ContextAwareLogits(inner, other, other_mask, self.alpha)]),
                    stopping_criteria=StoppingCriteriaList(stops))
            for n, new in zip(chosen, found[:, ids.shape[1]:].tolist(), strict=True):
                new = new[:next((i for i, token in enumerate(new) if token in ends), len(new))]
                local.calls += 2
                local.tokens += len(rows[n][0]) + len(rows[n][1]) + 2 * len(new)
                text = str(local.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))
                out[n] = text[:min((text.find(s) for s in stop if s in text), default=len(text))]
        return out


def context_aware(model: LocalModel, alpha: float = 0.5) -> ContextAware:
    """``model`` with context-aware decoding, for :class:`GroundedPrompt`: ``prompt.on(context_aware(model, 0.5))``.

    The likeliest next token of ``(1 + alpha) l(y | context, instruction) - alpha l(y | instruction)`` is taken; each
    answer costs two calls. (Shi et al. 2023)

    Args:
        model: local.
        alpha: >= 0; 0 is plain decoding, 0.5 usual.

    Raises:
        ValueError: another alpha.
        UnsupportedModelError: no local model, whose logits it needs.
    """
    check_alpha(alpha)
    if not isinstance(model, LocalModel):
        raise UnsupportedModelError(f"context-aware decoding: expected a LocalModel, got {type(model).__name__}")
    return ContextAware(model, alpha)
