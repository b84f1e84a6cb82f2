"""Answers beside a model's: by the seams, by chance, always the same, and from the key."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

import numpy as np

from looseleaf_jigsaw_r1.puzzles import LETTERS, Puzzle, cells

MOST_PATCHES = 6


def solve_by_seams(image: np.ndarray, m: int, n: int) -> list[int]:
    """The shuffling (forward) whose inverse leaves the least mismatch where patches meet; every one is tried.

    Args:
        image: (height, width, 3), uint8.
        m, n: rows and columns, at most six patches.

    Raises:
        ValueError: more than six patches.
    """
    if m * n > MOST_PATCHES:
        raise ValueError(f"SeamBaseline: expected at most {MOST_PATCHES} patches, got {m} x {n}: it tries every "
                         "arrangement")
    pixels = np.asarray(image, dtype=np.float64)
    patches = [pixels[top:bottom, left:right] for left, top, right, bottom in
               cells(pixels.shape[1], pixels.shape[0], m, n)]
    beside = np.array([[np.abs(a[:, -1] - b[:, 0]).mean() for b in patches] for a in patches])
    below = np.array([[np.abs(a[-1] - b[0]).mean() for b in patches] for a in patches])

    def mismatch(backward: Sequence[int]) -> float:
        grid = np.array(backward).reshape(m, n)
        return float(beside[grid[:, :-1], grid[:, 1:]].sum() + below[grid[:-1], grid[1:]].sum())

    best = min(itertools.permutations(range(m * n)), key=mismatch)  # original place -> place now
    forward = [0] * (m * n)
    for original, place in enumerate(best):
        forward[place] = original + 1
    return forward


class SeamBaseline:
    """Assigns patches by the mismatch of their edges; knows no picture and needs no training."""

    def __call__(self, puzzle: Puzzle) -> str | None:
        """Its answer; None where seams do not decide: boxes, rotations, more than six patches."""
        if puzzle.question in ("box", "rotation") or puzzle.m * puzzle.n > MOST_PATCHES:
            return None
        return puzzle.answer(solve_by_seams(np.asarray(puzzle.image), puzzle.m, puzzle.n))


def random_answer(puzzle: Puzzle, rng: random.Random) -> str:
    """An answer of the right form, drawn uniformly; of ``full`` an arrangement, of ``box`` another patch's."""
    if puzzle.choices:
        return rng.choice(LETTERS[:len(puzzle.choices)])
    indices = list(range(1, puzzle.m * puzzle.n + 1))
    if puzzle.question == "full":
        return " ".join(map(str, rng.sample(indices, len(indices))))
    if puzzle.question == "single":
        return str(rng.choice(indices))
    return " ".join(map(str, rng.choice([box for k, box in enumerate(puzzle.boxes, 1) if k != puzzle.asked[0]])))


def constant_answer(puzzle: Puzzle) -> str:
    """Always the same: the identity, the first index, the first letter, or "directly left" where there are eight."""
    if puzzle.question == "pair":
        return LETTERS[puzzle.choices.index(sorted(puzzle.choices)[0])]  # "directly ..." comes before diagonals
    if puzzle.choices:
        return "A"
    count = puzzle.m * puzzle.n
    if puzzle.question == "box":
        width, height = puzzle.image.size
        return f"{width // 4} {height // 4} {3 * width // 4} {3 * height // 4}"
    return " ".join(map(str, range(1, count + 1))) if puzzle.question == "full" else "1"


class PlantedSolver:
    """A callable ``(image, text) -> text`` that has the key and answers rightly a known fraction of it.

    Args:
        puzzles: what it will be asked.
        right: fraction that it answers rightly; rounded to whole puzzles, drawn by ``seed``.
        seed: of which these are.
    """

    def __init__(self, puzzles: Sequence[Puzzle], right: float = 1.0, seed: int = 0) -> None:
        rng = random.Random(seed)
        chosen = set(rng.sample(range(len(puzzles)), round(right * len(puzzles))))
        self.answers: Mapping[tuple[bytes, str], str] = {
            (p.image.tobytes(), p.text): p.gold if at in chosen else self._wrong(p) for at, p in enumerate(puzzles)}

    def __call__(self, image: object, text: str) -> str:
        """The answer; nothing to a picture that it was not asked about, such as an empty one."""
        return self.answers.get((image.tobytes(), text), "")  # type: ignore[attr-defined]

    @staticmethod
    def _wrong(puzzle: Puzzle) -> str:
        if puzzle.choices:
            wrong = next(letter for letter in LETTERS[:len(puzzle.choices)] if letter != puzzle.solution)
        elif puzzle.question == "box":
            wrong = "0 0 0 0"
        else:
            right, count = list(map(int, puzzle.solution.split())), puzzle.m * puzzle.n
            wrong = " ".join(str(index % count + 1) for index in right)
        return f"<think> </think> <answer>{wrong}</answer>" if puzzle.thinking else wrong


__all__ = ["MOST_PATCHES", "PlantedSolver", "SeamBaseline", "constant_answer", "random_answer", "solve_by_seams"]
