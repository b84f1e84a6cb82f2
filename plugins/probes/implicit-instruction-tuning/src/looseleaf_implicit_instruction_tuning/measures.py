"""What the paper measures around an adaptation: ranking of responses, adherence to a narrow task, and win rates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from looseleaf import progress as progress_
from looseleaf.statistics import Interval, bootstrap, paired
from looseleaf_implicit_instruction_tuning.pairs import Pair, Tags, as_pairs, encode
from looseleaf_text import LanguageModel, LocalModel
from looseleaf_text.encoders import unit_vectors

Judge = Callable[[str, str, str], float]
"""(instruction, response A, response B) -> 1 where A is better, 0 where B is, 0.5 for a tie."""


@dataclasses.dataclass(frozen=True)
class Ranking:
    """How often a response is likelier after its own instruction than the response to another is.

    Attributes:
        strict: of each instruction, the fraction of the other responses that are less likely; strictly.
        right: the same with a tie counted as a half.
        empty: that after an empty instruction, on the same pairs: what the likelihood of the responses alone gives. It
            is a half on average, whatever the model.
        shuffled: that after the instruction of another pair.
    """

    strict: list[float]
    right: list[float]
    empty: list[float]
    shuffled: list[float]

    @property
    def value(self) -> Interval:
        """The fraction of pairs that rank right, with a 95 % bootstrap over instructions."""
        return bootstrap(self.strict)

    @property
    def gain(self) -> Interval:
        """What the instruction adds to the fraction over an empty one, paired; above 0 only where it is read."""
        return paired(self.right, self.empty)

    @property
    def shuffled_gain(self) -> Interval:
        """The same of a wrong instruction: the control, which must not be above 0."""
        return paired(self.shuffled, self.empty)


@dataclasses.dataclass(frozen=True)
class ResponseRanking:
    """Whether a model ranks responses by the instruction already: p(response | instruction) > p(other | instruction).

    Args:
        score: ``"sum"`` of the log-probabilities of a response's tokens, as the paper writes; ``"mean"``, as its code
            computes. They can rank two responses of unequal lengths otherwise.
        others: responses of other pairs that each is compared with; its own is never drawn.
        end: count the end of text as the response's last token, as the code does.
        tags: around the instructions.
    """

    score: Literal["sum", "mean"] = "sum"
    others: int = 5
    end: bool = True
    tags: Tags = dataclasses.field(default_factory=Tags)

    def __post_init__(self) -> None:
        if self.score not in ("sum", "mean"):
            raise ValueError(f"ResponseRanking.score: expected 'sum' or 'mean', got {self.score!r}")
        if not isinstance(self.others, int) or self.others < 1:
            raise ValueError(f"ResponseRanking.others: expected an integer >= 1, got {self.others!r}")

    def __call__(self, local: LocalModel, data: Any, *, seed: int = 0, progress: bool | None = None) -> Ranking:
        """Rank the responses of pairs.

        Args:
            local: model and tokenizer.
            data: two pairs or more, see :func:`as_pairs`.
            seed: which others each response is compared with.
            progress: show a progress bar; None: only on a terminal.
        """
        pairs = as_pairs(data)
        rng = np.random.default_rng(seed)
        drawn = [rng.permutation(np.delete(np.arange(len(pairs)), n))[:self.others].tolist() for n in range(len(pairs))]
        # a cycle through a random order, so that no pair gets its own instruction
        order = rng.permutation(len(pairs))
        wrong = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
        tails = [tail if self.end else tail[:-1] for _, tail in encode(local, pairs, self.tags)]
        rows: dict[str, list[float]] = {name: [] for name in ("right", "empty", "shuffled")}
        strict: list[float] = []
        instructions = {"right": [p.instruction for p in pairs], "empty": [""] * len(pairs),
                        "shuffled": [pairs[wrong[n]].instruction for n in range(len(pairs))]}
        for name in progress_.track(rows, "ranking responses", show=progress):
            heads = [head for head, _ in encode(local, [
                Pair(instruction, p.response) for instruction, p in zip(instructions[name], pairs, strict=True)],
                self.tags)]
            scores = local.score_ids(heads, [[tails[n], *(tails[m] for m in drawn[n])] for n in range(len(pairs))])
            for n, (own, *others) in enumerate(scores):
                own, *others = (value / (len(tails[m]) if self.score == "mean" else 1)
                                for m, value in zip((n, *drawn[n]), (own, *others), strict=True))
                rows[name].append(sum((own > other) + 0.5 * (own == other) for other in others) / len(others))
                if name == "right":
                    strict.append(sum(own > other for other in others) / len(others))
        return Ranking(strict, **rows)


@dataclasses.dataclass(frozen=True)
class AdherenceResult:
    """Where each response lies between a narrow task and general answers.

    Attributes:
        x: of each instruction, its mean cosine with the task's instructions.
        y: of its response, the mean cosine with the task's responses less that with general responses.
    """

    x: list[float]
    y: list[float]

    @property
    def slope(self) -> Interval:
        """Least-squares slope of y on x with a 95 % bootstrap over instructions; NaN where all x are equal."""
        x, y = np.asarray(self.x), np.asarray(self.y)
        if np.ptp(x) < 1e-12:
            return Interval(math.nan, math.nan, math.nan)

        def of(rows: np.ndarray) -> np.ndarray:
            rows = rows.astype(int)
            dx = x[rows] - x[rows].mean(1, keepdims=True)
            power = (dx ** 2).sum(1)
            slopes: np.ndarray = (dx * y[rows]).sum(1) / np.where(power > 0, power, np.inf)
            return slopes

        return bootstrap(range(len(x)), statistic=of)


@dataclasses.dataclass(frozen=True)
class Adherence:
    """Whether a model tuned on one task behaves by the task the more, the nearer an instruction is to the task.

    Args:
        embed: texts -> (n, d); or a :class:`looseleaf_text.LanguageModel` with embeddings.
    """

    embed: Any

    def __call__(self, instructions: Sequence[str], responses: Sequence[str], task: Any,
                 general: Any) -> AdherenceResult:
        """Place the responses to instructions.

        Args:
            instructions, responses: what was asked and answered, three or more.
            task: pairs of the narrow task.
            general: pairs of a general kind, of which the responses are used.

        Raises:
            ValueError: not equally many, fewer than three, or vectors of another shape.
        """
        if len(instructions) != len(responses) or len(instructions) < 3:
            raise ValueError("adherence: expected equally many instructions and responses, three or more, got "
                             f"{len(instructions)} and {len(responses)}")
        narrow, wide = as_pairs(task, 1), as_pairs(general, 1)
        asked, answered = self._unit(instructions), self._unit(responses)
        x = (asked @ self._unit([p.instruction for p in narrow]).T).mean(1)
        y = (answered @ self._unit([p.response for p in narrow]).T).mean(1) - (
            answered @ self._unit([p.response for p in wide]).T).mean(1)
        return AdherenceResult(x.tolist(), y.tolist())

    def _unit(self, texts: Sequence[str]) -> Any:
        embed = getattr(self.embed, "embed", self.embed)
        # an empty response has no tokens for some models
        return unit_vectors(embed([text if text.strip() else "." for text in texts]), len(texts)).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class WinRate:
    """What a judge said of two models' responses, each pair in both orders.

    Attributes:
        wins: of each instruction, 1 where the first model wins in both orders, 0 where it loses in both.
        length_controlled: win rate at responses of equal length.
        first_place: how often the judge prefers what it is shown first; 0.5 for a judge without such a bias.
    """

    wins: list[float]
    length_controlled: float
    first_place: float

    @property
    def value(self) -> Interval:
        """The win rate with a 95 % bootstrap over instructions."""
        return bootstrap(self.wins)


@dataclasses.dataclass(frozen=True)
class HeadToHead:
    """One model's responses against another's, by a judge that sees every pair in both orders.

    Args:
        judge: a function (:data:`Judge`); or a :class:`looseleaf_text.LanguageModel`, local or an endpoint, which is
            asked for A or B.
    """

    judge: Any

    PROMPT = ("Which response answers the instruction better?\n\nInstruction: {instruction}\n\nResponse A: {a}\n\n"
              "Response B: {b}\n\nThe better response is")

    def __call__(self, instructions: Sequence[str], ours: Sequence[str], theirs: Sequence[str], *,
                 progress: bool | None = None) -> WinRate:
        """The win rate of ``ours`` against ``theirs``.

        Raises:
            ValueError: not equally many, none, or a judge's answer outside [0, 1].
        """
        if not len(instructions) == len(ours) == len(theirs) or not instructions:
            raise ValueError("head to head: expected equally many instructions and responses of both, one or more, got "
                             f"{len(instructions)}, {len(ours)} and {len(theirs)}")
        wins, first = [], []
        rows = list(zip(instructions, ours, theirs, strict=True))
        for instruction, a, b in progress_.track(rows, "judging", show=progress):
            there, back = self._ask(instruction, a, b), self._ask(instruction, b, a)
            wins.append((there + 1 - back) / 2)
            first += [there, back]
        longer = [math.tanh((len(a) - len(b)) / 100) for a, b in zip(ours, theirs, strict=True)]
        return WinRate(wins, length_controlled(wins, longer), sum(first) / len(first))

    def _ask(self, instruction: str, a: str, b: str) -> float:
        if isinstance(self.judge, LanguageModel):
            prompt = self.PROMPT.format(instruction=instruction, a=a, b=b)
            (one, two), = self.judge.score([prompt], [[" A", " B"]])
            return float((one > two) + 0.5 * (one == two))
        answer = float(self.judge(instruction, a, b))
        if not 0 <= answer <= 1:
            raise ValueError(f"judge: expected a number in [0, 1], got {answer!r}")
        return answer


def length_controlled(wins: Sequence[float], longer: Sequence[float], penalty: float = 0.01) -> float:
    """The win rate that a logistic regression on the difference in length predicts for equal lengths.

    A short form of AlpacaEval's: it has no term for the difficulty of an instruction.

    Args:
        wins: in [0, 1].
        longer: how much longer the first response is, in any unit.
        penalty: L2 on both coefficients, which keeps them finite where all are wins.
    """
    x, y = np.stack([np.ones(len(wins)), np.asarray(longer, dtype=np.float64)], 1), np.asarray(wins, dtype=np.float64)
    w = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x.T * (p * (1 - p))) @ x + penalty * np.eye(2)
        step = np.linalg.solve(hessian, x.T @ (p - y) + penalty * w)
        w -= np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-w[0])))


__all__ = ["Adherence", "AdherenceResult", "HeadToHead", "Judge", "Ranking", "ResponseRanking", "WinRate",
           "length_controlled"]
