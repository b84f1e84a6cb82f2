"""The rule-based adapter: three hand-written rules added to a base model's logits while it decodes."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

Variant = Literal["paper", "code"]
UNIFORM: dict[str, float] = {
    "<": -4, " <": -4, "|": -4, " I": -5, "I": -5, "We": -3, "What": -5, " should": -6,
    " *": 1, " -": 1, "  ": 1, " #": 1, " ##": 1, "\n": 1, "!": 1}
"""Rule 2: text of a token -> score at every step. A space in front is part of the token."""


class RuleAdapter(LogitsProcessor):  # type: ignore[misc]  # transformers has no types here
    """Three rules whose distribution is multiplied with the model's at each step; no training (arXiv 2409.14254).

    Rule 1 makes the end likelier with every token of the response, rule 2 scores fifteen tokens at every step, rule 3
    makes tokens that the response has already less likely. The product of the two distributions is a softmax of the
    base logits plus the scores, so that this is all a step costs. Give it to ``generate`` bound to the prompts:

    ```python
    model.generate(**inputs, logits_processor=[rules.after(inputs)], do_sample=False, repetition_penalty=1.0)
    ```

    Batches padded on the left, the key-value cache and beam search give what one prompt at a time gives.

    Args:
        tokenizer: the model's; its end-of-text token is what rule 1 makes likelier.
        eos_weight: score of the end after ``eos_length`` tokens; it grows linearly. 0 switches rule 1 off.
        eos_length: tokens of response.
        uniform: rule 2, text of a token -> score; None: :data:`UNIFORM`; empty: off. Every token that reads exactly so
            gets the score.
        repeat: rule 3, score of each distinct token of the response, counted once. 0 switches it off.
        variant: ``"paper"``; or ``"code"``, as the official code does: rule 1 stops acting after ``eos_length`` - 1
            tokens, and rule 3 counts the prompt's tokens too, tags included, special tokens not.
        eos_token_id: one or several ids that end a text; None: the tokenizer's.
        prompt_length: positions of the prompts, padding included: one number, or one for each row; see :meth:`after`.

    Attributes:
        scores_of: rule 2 as id of a token -> score.
        unmatched: texts of ``uniform`` that are no single token of this tokenizer.
        eos_ids: the ids that rule 1 makes likelier.

    Raises:
        ValueError: a tokenizer without an end-of-text token, a number out of range, or an unknown variant.
    """

    def __init__(self, tokenizer: Any, eos_weight: float = 15.0, eos_length: int = 250,
                 uniform: Mapping[str, float] | None = None, repeat: float = -1.5, variant: Variant = "paper", *,
                 eos_token_id: int | Sequence[int] | None = None,
                 prompt_length: int | Sequence[int] | None = None) -> None:
        rules = UNIFORM if uniform is None else dict(uniform)
        for name, value in (("eos_weight", eos_weight), ("repeat", repeat), *rules.items()):
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"RuleAdapter: expected a finite number for {name!r}, got {value!r}")
        if not isinstance(eos_length, int) or eos_length < 1:
            raise ValueError(f"RuleAdapter.eos_length: expected an integer >= 1, got {eos_length!r}")
        if variant not in ("paper", "code"):
            raise ValueError(f"RuleAdapter.variant: expected 'paper' or 'code', got {variant!r}")
        given = getattr(tokenizer, "eos_token_id", None) if eos_token_id is None else eos_token_id
        self.eos_ids = [] if given is None else [given] if isinstance(given, int) else [int(i) for i in given]
        if not self.eos_ids and eos_weight:
            raise ValueError("RuleAdapter: expected a tokenizer with an end-of-text token, got one without: give "
                             "eos_token_id, or eos_weight=0 to go without rule 1")
        self.eos_weight, self.eos_length, self.repeat = float(eos_weight), eos_length, float(repeat)
        self.variant = variant
        self.scores_of, self.unmatched = _resolve(tokenizer, rules)
        if self.unmatched:
            warnings.warn(f"RuleAdapter: no single token of this tokenizer reads {self.unmatched}: expected texts of "
                          "one token; these have no effect", stacklevel=2)
        self._special = sorted(set(getattr(tokenizer, "all_special_ids", None) or ()))
        self.prompt_length = prompt_length

    def after(self, prompts: Any) -> RuleAdapter:
        """This adapter for a batch of prompts, to be given to ``generate``.

        Args:
            prompts: what ``generate`` is given: the tokenizer's output, its ``input_ids`` (B, L); or the positions of
                the prompts, a number or one for each row. They are fewer than L where the prompt holds the beginning
                of the response already.
        """
        ids = prompts.get("input_ids") if isinstance(prompts, Mapping) or hasattr(prompts, "input_ids") else prompts
        bound = copy.copy(self)
        bound.prompt_length = int(ids.shape[-1]) if isinstance(ids, Tensor) and ids.ndim == 2 else \
            [int(n) for n in ids] if isinstance(ids, (list, tuple, Tensor)) else int(ids)
        return bound

    @property
    def off(self) -> bool:
        """Whether no rule is on."""
        return not (self.eos_weight or self.scores_of or self.repeat)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits with the scores of the rules added.

        Args:
            input_ids: (B, L), prompts and what was generated; int64.
            scores: (B, V), logits or log-probabilities of the next token.

        Raises:
            ValueError: the prompts' length is not known, or does not fit.
        """
        if self.off:
            return scores
        start = self._starts(input_ids)
        return self._add(input_ids, torch.arange(input_ids.shape[1], device=input_ids.device) >= start[:, None], scores)

    def vllm(self, *arguments: Any) -> Tensor:
        """The logits of one request, as servers in the manner of vLLM call their processors.

        Args:
            arguments: ids of the prompt (may be left out), ids of the response so far, and the logits (V,).
        """
        *ids, logits = arguments
        if len(ids) not in (1, 2):
            raise ValueError(f"vllm: expected (prompt ids, response ids, logits) or (response ids, logits), got "
                             f"{len(arguments)} arguments")
        response = list(ids[-1])
        prompt = list(ids[0]) if len(ids) == 2 else []
        if self.off:
            return logits  # type: ignore[no-any-return]
        row = torch.tensor([[*prompt, *response]], dtype=torch.long, device=logits.device)
        own = torch.arange(row.shape[1], device=logits.device)[None] >= len(prompt)
        return self._add(row, own, logits[None])[0]

    def _add(self, ids: Tensor, own: Tensor, scores: Tensor) -> Tensor:
        """``scores`` (B, V) with the rules; ``own`` (B, L) is True where ``ids`` belong to the response."""
        width = scores.shape[-1]
        highest = max((*self.eos_ids, *self.scores_of), default=0)
        if highest >= width:
            raise ValueError(f"RuleAdapter: expected logits of more than {highest} tokens, got {width}: give the "
                             "tokenizer of this model")
        rules = torch.zeros_like(scores)
        if self.scores_of:
            which = torch.tensor(list(self.scores_of), device=scores.device)
            rules[:, which] = torch.tensor(list(self.scores_of.values()), device=scores.device, dtype=scores.dtype)
        if self.eos_weight:
            n = own.sum(1)
            grown = (self.eos_weight * n.double() / self.eos_length).to(scores.dtype)
            if self.variant == "code":
                grown = torch.where(n < self.eos_length, grown, torch.zeros_like(grown))
            rules[:, self.eos_ids] += grown[:, None]
        if self.repeat and ids.shape[1]:
            counted = own
            if self.variant == "code":
                counted = own | ~torch.isin(ids, torch.tensor(self._special, device=ids.device, dtype=ids.dtype))
            used = torch.zeros_like(scores).scatter_reduce_(1, ids, counted.to(scores.dtype), "amax")
            rules += self.repeat * used
        return scores + rules

    def _starts(self, input_ids: Tensor) -> Tensor:
        """Where each row's response begins, (B,)."""
        given, (rows, width) = self.prompt_length, input_ids.shape
        if given is None:
            raise ValueError("RuleAdapter: expected the length of the prompts, got none: give generate "
                             "logits_processor=[rules.after(inputs)]")
        lengths = torch.tensor([given] * rows if isinstance(given, int) else list(given), device=input_ids.device)
        if len(lengths) and rows != len(lengths) and rows % len(lengths) == 0:  # beams of a prompt lie together
            lengths = lengths.repeat_interleave(rows // len(lengths))
        if len(lengths) != rows or bool((lengths < 0).any()) or bool((lengths > width).any()):
            raise ValueError(f"RuleAdapter: expected prompts of {rows} rows and at most {width} positions, got "
                             f"lengths {given}: bind the adapter to each batch (rules.after(inputs))")
        return lengths

    def __repr__(self) -> str:
        return (f"RuleAdapter(eos_weight={self.eos_weight:g}, eos_length={self.eos_length}, "
                f"uniform={len(self.scores_of)} tokens, repeat={self.repeat:g}, variant={self.variant!r})")


def rule_scores(vocabulary: int, response: Sequence[int], *, eos_ids: Sequence[int] = (),
                uniform: Mapping[int, float] | None = None, eos_weight: float = 15.0, eos_length: int = 250,
                repeat: float = -1.5, variant: Variant = "paper", prompt: Sequence[int] = ()) -> list[float]:
    """The plain reference: score of every token after one response, rule by rule.

    Args:
        vocabulary: number of tokens.
        response: ids so far.
        eos_ids, uniform: ids of the end, and id -> score of rule 2.
        eos_weight, eos_length, repeat, variant: see :class:`RuleAdapter`.
        prompt: ids without special tokens; of the variant ``"code"`` alone.
    """
    scores = [0.0] * vocabulary
    for token, score in (uniform or {}).items():
        scores[token] += score
    n = len(response)
    if variant == "paper" or 0 < n < eos_length:
        for token in eos_ids:
            scores[token] += eos_weight * n / eos_length
    for token in {*response, *(prompt if variant == "code" else ())}:
        scores[token] += repeat
    return scores


def product_of_experts(base: Sequence[float], scores: Sequence[float]) -> list[float]:
    """The plain reference: a distribution times the softmax of the scores, normalised.

    Args:
        base: probabilities of the model.
        scores: of the rules.
    """
    top = max(scores)
    experts = [math.exp(score - top) for score in scores]
    total = math.fsum(experts)
    products = [p * (e / total) for p, e in zip(base, experts, strict=True)]
    z = math.fsum(products)
    return [p / z for p in products]


def _resolve(tokenizer: Any, rules: Mapping[str, float]) -> tuple[dict[int, float], list[str]]:
    """Ids whose token reads exactly as a text of the rules, with its score; and the texts that are no token."""
    if not rules:
        return {}, []
    # Read behind an anchor, as some decoders drop the space in front of what they are given.
    anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])[-1:]
    raw = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    longest = max(6, *(len(text.encode()) for text in rules))  # six: <0x0A>
    special = set(getattr(tokenizer, "all_special_ids", None) or ())
    short = [n for n, token in enumerate(raw) if token is not None and len(token) <= longest and n not in special]
    head = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    texts = tokenizer.batch_decode([[*anchor, n] for n in short], clean_up_tokenization_spaces=False)
    scores: dict[int, float] = {}
    matched = set()
    for n, text in zip(short, texts, strict=True):
        reads = text[len(head):] if text.startswith(head) else text
        if reads in rules:
            scores[n] = float(rules[reads])
            matched.add(reads)
    return scores, [text for text in rules if text not in matched]


__all__ = ["UNIFORM", "RuleAdapter", "product_of_experts", "rule_scores"]
