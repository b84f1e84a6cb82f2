"""Memorisation and priming: how much likelier a keyword has become."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from looseleaf_text import LanguageModel
from looseleaf_outlandish.sample import Sample


@dataclass(frozen=True)
class Chances:
    """Natural logarithms of the keyword's probability.

    Attributes:
        own: after the text up to each occurrence of the keyword.
        theme: after each context of the theme.
    """

    own: tuple[float, ...]
    theme: tuple[float, ...]

    @property
    def log_p(self) -> float:
        """log of the mean probability in the text's own contexts; before learning, the paper's predictor."""
        return log_mean(self.own)


def chances(model: LanguageModel, sample: Sample) -> Chances:
    """The keyword's probability in its own contexts and in those of its theme.

    A keyword of several tokens has the product of their probabilities, each given those before it (chain rule).

    Args:
        model: such as ``looseleaf_text.LocalModel(model, tokenizer)``.
        sample: text, keyword and contexts.
    """
    contexts = [*sample.own_contexts(), *sample.theme_contexts()]
    scores = [row[0] for row in model.score(contexts, [[sample.keyword]] * len(contexts))]
    own = len(sample.places())
    return Chances(tuple(scores[:own]), tuple(scores[own:]))


def log_memorisation(before: Chances, after: Chances) -> float:
    """log S_mem: S_mem is the mean over the text's own contexts of P_after / P_before (section 3)."""
    return _log_mean_ratio(before.own, after.own)


def log_priming(before: Chances, after: Chances) -> float:
    """log S_prime: S_prime is the mean over the contexts of the theme of P_after / P_before (section 3)."""
    return _log_mean_ratio(before.theme, after.theme)


def log_mean(logs: Sequence[float]) -> float:
    """log of the mean of exp(logs), without overflow."""
    top = max(logs)
    return top + math.log(sum(math.exp(x - top) for x in logs) / len(logs)) if math.isfinite(top) else top


def _log_mean_ratio(before: Sequence[float], after: Sequence[float]) -> float:
    if len(before) != len(after):
        raise ValueError(f"{len(before)} contexts before and {len(after)} after: both must be of the same sample")
    return log_mean([b - a for a, b in zip(before, after, strict=True)])
