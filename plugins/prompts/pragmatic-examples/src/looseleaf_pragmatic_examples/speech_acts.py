"""Rational speech acts over finitely many programs and utterances, exactly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]
E = TypeVar("E", bound="Exact")
TIE = 1e-9
"""Relative difference below which two probabilities are a tie: they are sums in another order."""


class Levels(NamedTuple):
    """(programs, utterances) probabilities: columns of L0 and L1, rows of S1 sum to 1, or to 0 where nothing fits."""

    L0: Matrix
    S1: Matrix
    L1: Matrix


def rsa(matrix: ArrayLike, prior: ArrayLike | None = None, alpha: float = 1.0) -> Levels:
    """The literal listener, the speaker who speaks to it, and the listener who reckons with that speaker.

    ``L0(d|u) ~ M[d,u] prior(d)``, ``S1(u|d) ~ L0(d|u)^alpha``, ``L1(d|u) ~ S1(u|d) prior(d)``. [section on RSA; the
    paper has a uniform prior and alpha 1]

    Args:
        matrix: (programs, utterances), 1 or True where the program agrees with the utterance; any weights >= 0.
        prior: (programs,) weights >= 0; None: uniform.
        alpha: how strongly the speaker prefers the better utterance, >= 0; 0: any true one; infinity: only the best.

    Raises:
        ValueError: another shape, weights that are negative or not finite, a prior of zeros, or a negative alpha.
    """
    m = _weights(matrix, "matrix", 2)
    p = np.ones(len(m)) if prior is None else _weights(prior, "prior", 1)
    if len(p) != len(m):
        raise ValueError(f"prior: expected one weight for each of {len(m)} programs, got {len(p)}")
    if len(p) and not p.any():
        raise ValueError("prior: expected a weight > 0, got zeros only")
    if not alpha >= 0:
        raise ValueError(f"alpha: expected a number >= 0, got {alpha!r}")
    literal = _normalised(m * p[:, None], axis=0)
    best = literal.max(axis=1, keepdims=True, initial=0.0)
    ratio = np.divide(literal, best, out=np.zeros_like(literal), where=best > 0)  # no underflow for a large alpha
    chosen = ratio >= 1 - TIE if math.isinf(alpha) else np.where(literal > 0, ratio ** alpha, 0.0)
    speaker = _normalised(np.where(literal > 0, chosen, 0.0), axis=1)
    return Levels(literal, speaker, _normalised(speaker * p[:, None], axis=0))


def agreement(programs: Sequence[Any], utterances: Sequence[Any],
              agrees: Callable[[Any, Any], bool] | None = None) -> NDArray[np.bool_]:
    """(programs, utterances), True where they agree.

    Args:
        programs: anything ``agrees`` takes; without it functions ``input -> label``.
        utterances: anything ``agrees`` takes; without it pairs ``(input, label)``.
        agrees: ``(program, utterance) -> bool``; None: the program gives the label to the input.
    """
    test = agrees or (lambda program, utterance: program(utterance[0]) == utterance[1])
    return np.array([[bool(test(d, u)) for u in utterances] for d in programs],
                    dtype=bool).reshape(len(programs), len(utterances))


@dataclasses.dataclass
class Exact:
    """Programs and utterances by their numbers; what the exact speaker and listener share.

    The model is incremental: at each turn only programs consistent with all earlier utterances count, and only
    utterances not used yet. The probability of a whole spec is the product over its turns. [section on RSA]

    Args:
        matrix: (programs, utterances) of 0 and 1; see :func:`agreement`.
        prior: (programs,) weights >= 0; None: uniform.
        alpha: of the speaker; see :func:`rsa`.
        dedupe: ``"text"``: every program counts; ``"language"``: programs that agree with the same utterances are one,
            for which the first of them stands, so that duplicates change nothing.
    """

    matrix: Any
    prior: Any = None
    alpha: float = 1.0
    dedupe: Literal["text", "language"] = "text"

    def __post_init__(self) -> None:
        weights = _weights(self.matrix, "matrix", 2)
        if not np.isin(weights, (0.0, 1.0)).all():
            raise ValueError("matrix: expected 0 and 1 (or False and True), got other weights: use rsa() for those")
        if self.dedupe not in ("text", "language"):
            raise ValueError(f"dedupe: expected 'text' or 'language', got {self.dedupe!r}")
        self.matrix = weights.astype(bool)
        first: dict[bytes, int] = {}
        same = [first.setdefault(row.tobytes(), n) if self.dedupe == "language" else n
                for n, row in enumerate(self.matrix)]
        self.stands_for = same
        """For each program the one that stands for it."""
        given = np.ones(len(self.matrix)) if self.prior is None else _weights(self.prior, "prior", 1)
        rsa(self.matrix, given, self.alpha)  # which checks them
        self._prior = np.zeros(len(given))
        if self.prior is None:
            self._prior[same] = 1.0
        else:
            np.add.at(self._prior, same, given)

    @classmethod
    def of(cls: type[E], programs: Sequence[Any], utterances: Sequence[Any],
           agrees: Callable[[Any, Any], bool] | None = None, **options: Any) -> E:
        """From programs and utterances of any kind, see :func:`agreement`; ``options`` are fields of the class."""
        return cls(agreement(programs, utterances, agrees), **options)

    def turn(self, context: Sequence[int] = ()) -> Levels:
        """The three levels after the utterances ``context``; those and inconsistent programs have probability 0.

        Raises:
            ValueError: a number that is no utterance, or the same one twice.
        """
        context = list(context)
        count = self.matrix.shape[1]
        if len(set(context)) < len(context) or not all(0 <= u < count for u in context):
            raise ValueError(f"context: expected different utterances in [0, {count}), got {context}")
        matrix = self.matrix & self.matrix[:, context].all(axis=1)[:, None]
        matrix[:, context] = False
        levels = rsa(matrix, self._prior, self.alpha)
        # a duplicate speaks as the program that stands for it
        return levels._replace(S1=levels.S1[self.stands_for])


class ExactSpeaker(Exact):
    """Chooses utterances for a target as a cooperative speaker would."""

    def choose(self, target: int, k: int) -> list[int]:
        """The ``k`` utterances with the highest S1, turn by turn; ties go to the first.

        Returns:
            Fewer than ``k`` where no more agree with the target.

        Raises:
            ValueError: no such program, or no utterance agrees with it.
        """
        return self._speak(target, k, lambda row: int(np.flatnonzero(row >= row.max() * (1 - TIE))[0]))

    def sample(self, target: int, k: int, seed: int) -> list[int]:
        """``k`` utterances drawn from S1, turn by turn; see :meth:`choose`."""
        rng = np.random.default_rng(seed)
        return self._speak(target, k, lambda row: int(rng.choice(len(row), p=row / row.sum())))

    def _speak(self, target: int, k: int, pick: Callable[[Matrix], int]) -> list[int]:
        if not 0 <= target < len(self.matrix):
            raise ValueError(f"target: expected a program in [0, {len(self.matrix)}), got {target}")
        if not self.matrix[target].any():
            raise ValueError(f"target: expected a program that agrees with some utterance, got {target}, which agrees "
                             "with none: add examples that show it")
        context: list[int] = []
        while len(context) < k:
            row = self.turn(context).S1[target]
            if not row.any():
                break
            context.append(pick(row))
        return context


class ExactListener(Exact):
    """Guesses the program behind utterances."""

    def literal(self, context: Sequence[int]) -> Matrix:
        """(programs,) the prior among the programs that agree with every utterance; zeros where none does."""
        self.turn(context)
        return _normalised(self._prior * self.matrix[:, list(context)].all(axis=1), axis=0)

    def pragmatic(self, context: Sequence[int]) -> Matrix:
        """(programs,) proportional to the prior and to how likely the speaker says just this, in this order.

        Zeros where no program agrees with every utterance.
        """
        context = list(context)
        spoken = self._prior.copy()
        for n, utterance in enumerate(context):
            spoken *= self.turn(context[:n]).S1[:, utterance]
            spoken /= spoken.max(initial=0.0) or 1.0  # long specs do not underflow
        return _normalised(spoken, axis=0)


def best(probabilities: Matrix) -> list[int]:
    """The numbers of the highest entries: one, or several where they tie; none where all are 0."""
    top = probabilities.max(initial=0.0)
    return [] if top == 0 else np.flatnonzero(probabilities >= top * (1 - TIE)).tolist()


def _weights(values: ArrayLike, name: str, dimensions: int) -> Matrix:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions or not np.isfinite(array).all() or (array < 0).any():
        shape = "(programs, utterances)" if dimensions == 2 else "(programs,)"
        raise ValueError(f"{name}: expected finite weights >= 0 of shape {shape}, got an array of shape {array.shape}"
                         + (" with other numbers" if array.ndim == dimensions else ""))
    return array


def _normalised(weights: Matrix, axis: int) -> Matrix:
    total = weights.sum(axis=axis, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


__all__ = ["Exact", "ExactListener", "ExactSpeaker", "Levels", "Matrix", "agreement", "best", "rsa"]
