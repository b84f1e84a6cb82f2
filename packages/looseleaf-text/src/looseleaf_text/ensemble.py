"""Several prompts that answer together, by the mean of their probabilities or by vote."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

from looseleaf.prompts.prompt import Prompt
from looseleaf.tasks import Example, Predictor, as_rows
from looseleaf_text.verbalizer import log_normalised, log_sum


@dataclasses.dataclass
class EnsemblePrompt(Prompt):
    """Several prompts for one task. One call for each example and member that makes one is what using it costs.

    Attributes:
        members: prompts of any kind for the same classes, or all without classes.
        weights: non-negative member weights; None: all the same.
        combine: classification: ``"average"`` takes the weighted mean of the members' normalised probabilities,
            ``"vote"`` their weighted votes. Generated texts are always voted on.

    Raises:
        ValueError: no members, an unknown ``combine``, or weights that are not one number >= 0 for each member.
    """

    members: Sequence[Prompt]
    weights: Sequence[float] | None = None
    combine: Literal["average", "vote"] = "average"

    def __post_init__(self) -> None:
        if self.combine not in ("average", "vote"):
            raise ValueError(f"EnsemblePrompt.combine: expected 'average' or 'vote', got {self.combine!r}")
        self.members = tuple(self.members)
        if not self.members:
            raise ValueError("EnsemblePrompt.members: expected one prompt or more, got none")
        normalised_weights(self.weights, len(self.members))

    def on(self, model: Any) -> EnsemblePredictor:
        """See :meth:`looseleaf.Prompt.on`."""
        return EnsemblePredictor(self, model)

    def render(self, example: Example) -> str:
        """What the member of the most weight renders, the first of equals."""
        weights = [1.0] * len(self.members) if self.weights is None else list(self.weights)
        heaviest: Any = self.members[max(range(len(weights)), key=weights.__getitem__)]
        text: str = heaviest.render(example)
        return text


class EnsemblePredictor(Predictor):
    """An :class:`EnsemblePrompt` and a model: every member is asked."""

    def __init__(self, prompt: EnsemblePrompt, model: Any) -> None:
        self.prompt = prompt
        self.members = [member.on(model) for member in prompt.members]
        self.classes = self.members[0].classes
        for n, member in enumerate(self.members):
            if set(member.classes or ()) != set(self.classes or ()):
                raise ValueError("EnsemblePrompt.members: expected prompts of the same classes, got "
                                 f"{self.classes} and, for member {n}, {member.classes}")

    def scores(self, examples: Sequence[Example]) -> list[list[float]]:
        """Natural-log probabilities (examples, classes); each row's probabilities sum to one."""
        names = list(self.classes or ())
        rows = []
        for member in self.members:
            places = [list(member.classes or ()).index(name) for name in names]
            rows.append([[row[p] for p in places] for row in as_rows(member.scores(examples))])
        return combine(rows, self.prompt.weights, vote=self.prompt.combine == "vote")

    def predict(self, examples: Sequence[Example]) -> list[Any]:
        """The likeliest class of each example; without classes the text that the members give most."""
        if self.classes is not None:
            return super().predict(examples)
        answers = [member.predict(examples) for member in self.members]
        return [most_voted(texts, self.prompt.weights) for texts in zip(*answers, strict=True)]


def combine(members: Sequence[Sequence[Sequence[float]]], weights: Sequence[float] | None = None, *,
            vote: bool = False) -> list[list[float]]:
    """Combine predictions of several prompts: the weighted mean of their normalised probabilities, or of their votes.

    Args:
        members: (prompts, examples, labels) natural-log probabilities; need not be normalised.
        weights: one for each prompt, >= 0; None: all the same.
        vote: each prompt gives its weight to its likeliest label; ties are broken by the mean probability.

    Returns:
        (examples, labels) natural-log probabilities; each row's probabilities sum to one.
    """
    shares = normalised_weights(weights, len(members))
    out = []
    for rows in zip(*members, strict=True):
        normal = [log_normalised(row) for row in rows]
        mixed = [log_sum([math.log(w) + v for w, v in zip(shares, column, strict=True) if w > 0])
                 for column in zip(*normal, strict=True)]
        if vote:
            votes = [0.0] * len(mixed)
            for share, row in zip(shares, normal, strict=True):
                votes[max(range(len(row)), key=row.__getitem__)] += share
            # The mean probability counts so little that it decides nothing but ties.
            mixed = log_normalised([math.log(max(v + 1e-6 * math.exp(m), 1e-30))
                                    for v, m in zip(votes, mixed, strict=True)])
        out.append(mixed)
    return out


def most_voted(texts: Sequence[str], weights: Sequence[float] | None = None) -> str:
    """The text with the most weight; case and outer white space are no difference, and ties go to the first."""
    shares: dict[str, float] = {}
    for text, share in zip(texts, normalised_weights(weights, len(texts)), strict=True):
        key = text.strip().casefold()
        shares[key] = shares.get(key, 0.0) + share
    best = max(shares, key=lambda key: (round(shares[key], 9), -list(shares).index(key)))
    return next(t for t in texts if t.strip().casefold() == best)


def normalised_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """``weights`` divided by their sum; equal shares for None.

    Raises:
        ValueError: not ``count`` weights, a negative one, or nothing but zeros.
    """
    values = [1.0] * count if weights is None else list(weights)
    total = sum(values)
    if len(values) != count or not all(w >= 0 and math.isfinite(w) for w in values) or not total > 0:
        raise ValueError(f"weights: expected one number >= 0 for each of {count} prompts, not all of them 0, got "
                         f"{weights!r}")
    return [w / total for w in values]
