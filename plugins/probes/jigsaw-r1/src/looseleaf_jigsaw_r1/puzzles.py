"""Jigsaw puzzles from pictures: what is cut, what is asked, what is right, and what a guess would get."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from looseleaf_text.conversations import Conversation
from looseleaf_text.conversations import picture as read_picture

if TYPE_CHECKING:
    from PIL.Image import Image

Question = Literal["full", "pair", "multiple", "single", "box", "rotation"]
QUESTIONS: tuple[Question, ...] = ("full", "pair", "multiple", "single", "box", "rotation")
LETTERS = "ABCDEFGH"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
THINK = ("First think about it inside <think> </think>, then give the answer inside <answer> </answer>.")
DIRECT = "Give the answer alone."


@dataclasses.dataclass(frozen=True)
class Chance:
    """What answers without looking get, as the fraction of right answers.

    Attributes:
        uniform: every answer of the right form is equally likely.
        best_constant: always the same answer, the best one.
    """

    uniform: float
    best_constant: float


@dataclasses.dataclass(frozen=True)
class Puzzle:
    """A picture, a question about it, and its answer.

    Attributes:
        image: what is shown.
        original: the picture trimmed to whole patches, before it was cut.
        text: the question.
        solution: the right answer, as text.
        question, m, n, thinking: what kind of puzzle this is; m rows, n columns.
        permutation: ``forward``: at each place now, from 1, row by row, the original index of the patch; empty for
            rotations.
        choices: what the letters stand for, in their order; empty where the answer is no letter.
        chance: what a guess gets.
        asked: the places (k,) or (k, l) that the question is about.
        boxes: of the patches, in pixels (left, top, right, bottom), row by row; empty where the picture is cut whole.
        arrangements: for ``multiple``: the arrangement of each letter.
        forward: whether arrangements and indices are asked forward.
    """

    image: Image
    original: Image
    text: str
    solution: str
    question: Question
    m: int
    n: int
    thinking: bool
    permutation: tuple[int, ...]
    choices: tuple[str, ...]
    chance: Chance
    asked: tuple[int, ...] = ()
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    arrangements: tuple[tuple[int, ...], ...] = ()
    forward: bool = True

    @property
    def messages(self) -> Conversation:
        """The puzzle as a conversation: the picture, then the question."""
        return [{"role": "user", "content": [{"type": "image", "image": self.image},
                                             {"type": "text", "text": self.text}]}]

    @property
    def gold(self) -> str:
        """The whole output that is right, without reasoning."""
        return f"<think> </think> <answer>{self.solution}</answer>" if self.thinking else self.solution

    def answer(self, permutation: Sequence[int]) -> str | None:
        """What is right if the patches were shuffled by ``permutation`` (forward); None where it does not decide."""
        if self.question == "rotation":
            return None
        given = list(permutation) if self.forward else invert(permutation)
        if self.question == "full":
            return " ".join(map(str, given))
        if self.question == "pair":
            k, other = self.asked
            name = relation(permutation[k - 1], permutation[other - 1], self.n)
            return LETTERS[self.choices.index(name)] if name in self.choices else None
        if self.question == "single":
            return str(given[self.asked[0] - 1])
        if self.question == "box":
            return " ".join(map(str, self.boxes[permutation[self.asked[0] - 1] - 1]))
        fits = [sum(a == b for a, b in zip(given, other, strict=True)) for other in self.arrangements]
        return LETTERS[fits.index(max(fits))]


def invert(permutation: Sequence[int]) -> list[int]:
    """``backward`` of ``forward``, and the other way round: where each index, from 1, stands."""
    out = [0] * len(permutation)
    for place, index in enumerate(permutation, 1):
        out[index - 1] = place
    return out


def relation(one: int, other: int, n: int) -> str:
    """Where the patch of original index ``one`` lies relative to ``other``, both from 1, in a grid of ``n`` columns."""
    (r, c), (s, d) = divmod(one - 1, n), divmod(other - 1, n)
    if r == s:
        return "directly left" if c < d else "directly right"
    if c == d:
        return "directly above" if r < s else "directly below"
    return f"{'upper' if r < s else 'lower'} {'left' if c < d else 'right'}"


def relations(m: int, n: int) -> list[str]:
    """The relations that are offered: two in a single row or column, else eight."""
    if m == 1:
        return ["directly left", "directly right"]
    if n == 1:
        return ["directly above", "directly below"]
    return ["directly left", "directly right", "directly above", "directly below", "upper left", "upper right",
            "lower left", "lower right"]


def relation_rates(m: int, n: int) -> dict[str, float]:
    """How often each relation is right over all ordered pairs of patches."""
    counts = Counter(relation(a, b, n) for a, b in itertools.permutations(range(1, m * n + 1), 2))
    total = m * n * (m * n - 1)
    return {name: counts[name] / total for name in relations(m, n)}


def cells(width: int, height: int, m: int, n: int) -> list[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) of m rows and n columns, row by row."""
    h, w = height // m, width // n
    return [(c * w, r * h, (c + 1) * w, (r + 1) * h) for r in range(m) for c in range(n)]


def reassemble(puzzle: Puzzle) -> Image:
    """The picture with every patch back at its place; exactly ``original`` where nothing was masked or recompressed."""
    boxes = puzzle.boxes or tuple(cells(*puzzle.image.size, puzzle.m, puzzle.n))
    out = puzzle.image.copy()
    for place, index in enumerate(puzzle.permutation):
        out.paste(puzzle.image.crop(boxes[place]), boxes[index - 1][:2])
    return out


@dataclasses.dataclass(frozen=True)
class Jigsaw:
    """How pictures become puzzles: call it with a picture and a seed.

    Args:
        m: rows; >= 1.
        n: columns; >= 1, and m n >= 2.
        question: ``full``: the index of every patch; ``pair``: where one patch lies relative to another; ``multiple``:
            which of four arrangements; ``single``: the index of one patch; ``box``: where one patch was taken from, in
            pixels; ``rotation``: by how much the picture was turned.
        thinking: ask for reasoning in tags first.
        forward: answers are the original index of the patch at each place now; else where each original patch is now.
        mask_ratio: fraction of the height and width of a patch that is blacked at seams, half of it on each side;
            in [0, 1).
        shuffle_mn: swap m and n with probability 0.5.
        angles: of ``rotation``: multiples of 360 / angles degrees; >= 2.
        jpeg_quality: recompress the puzzle, so that blocks of a JPEG do not show where it was cut; None: not. [ours]

    Raises:
        ValueError: a value out of range, or a question that is not defined so.
    """

    m: int = 2
    n: int = 1
    question: Question = "pair"
    thinking: bool = False
    forward: bool = True
    mask_ratio: float = 0.0
    shuffle_mn: bool = False
    angles: int = 4
    jpeg_quality: int | None = None

    def __post_init__(self) -> None:
        if self.question not in QUESTIONS:
            raise ValueError(f"Jigsaw.question: expected one of {', '.join(QUESTIONS)}, got {self.question!r}")
        for name in ("m", "n"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Jigsaw.{name}: expected an integer >= 1, got {value!r}")
        if self.question != "rotation" and self.m * self.n < 2:
            raise ValueError(f"Jigsaw: expected m n >= 2, got {self.m} x {self.n}: a puzzle has two patches or more")
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"Jigsaw.mask_ratio: expected a number in [0, 1), got {self.mask_ratio!r}: a mask of 1 "
                             "leaves no patch")
        if self.question == "pair" and not self.forward:
            raise ValueError("Jigsaw: expected forward=True with question='pair', got False: relations of patches have "
                             "no backward form")
        if not isinstance(self.angles, int) or not 2 <= self.angles <= len(LETTERS):
            raise ValueError(f"Jigsaw.angles: expected an integer in [2, {len(LETTERS)}], got {self.angles!r}")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 95:
            raise ValueError(f"Jigsaw.jpeg_quality: expected None or an integer in [1, 95], got {self.jpeg_quality!r}")

    @property
    def size(self) -> str:
        """Such as ``2x1``."""
        return "" if self.question == "rotation" else f"{self.m}x{self.n}"

    def chance(self) -> Chance:
        """What a guess gets: of ``full``, that the whole arrangement is right; of ``box``, one of the other patches."""
        mn = self.m * self.n
        match self.question:
            case "full":
                return Chance(1 / math.factorial(mn), 1 / math.factorial(mn))
            case "pair":
                rates = relation_rates(self.m, self.n)
                # letters are shuffled, so no letter is better than another; the words are what can be preferred
                return Chance(1 / len(rates), max(rates.values()))
            case "multiple":
                return Chance(*[1 / min(4, math.factorial(mn))] * 2)
            case "single":
                return Chance(1 / mn, 1 / mn)
            case "box":
                return Chance(1 / (mn - 1), 1 / (mn - 1))
            case _:
                return Chance(1 / self.angles, 1 / self.angles)

    def __call__(self, image: Any, seed: int | str = 0) -> Puzzle:
        """The puzzle of a picture; the same seed gives the same one.

        Args:
            image: a picture of PIL, an array of uint8 (height, width, 3) or a path; grey ones and those with alpha
                become RGB, what is transparent white.
            seed: of the shuffling and of what is asked.

        Raises:
            ValueError: no picture, one smaller than the grid, or one whose patches the mask would cover.
        """
        rng = random.Random(f"jigsaw {seed}")
        picture = to_rgb(image)
        m, n = (self.n, self.m) if self.shuffle_mn and rng.random() < 0.5 else (self.m, self.n)
        if self.question == "rotation":
            return self._rotation(picture, rng)
        width, height = picture.width // n * n, picture.height // m * m
        if not width or not height:
            raise ValueError(f"a picture: expected at least {n} x {m} pixels (width x height), one for each patch, got "
                             f"{picture.width} x {picture.height}")
        original = picture.crop((0, 0, width, height))
        if self.question == "box":
            return self._box(original, m, n, rng)
        forward = list(range(1, m * n + 1))
        rng.shuffle(forward)
        boxes = cells(width, height, m, n)
        shown = original.copy()
        for place, index in enumerate(forward):
            shown.paste(original.crop(boxes[index - 1]), boxes[place][:2])
        shown = self._finish(self._masked(shown, m, n))
        given = forward if self.forward else invert(forward)
        make = functools.partial(Puzzle, image=shown, original=original, question=self.question, m=m, n=n,
                                 thinking=self.thinking, permutation=tuple(forward), forward=self.forward,
                                 chance=dataclasses.replace(self, m=m, n=n).chance())
        intro = (f"The picture was cut into {m} rows and {n} columns of patches, which were shuffled. Places are "
                 f"numbered from 1 to {m * n}, row by row.")
        way = ("For each place now, which was the original place of its patch?" if self.forward else
               "For each original place, at which place is its patch now?")
        if self.question == "full":
            return make(text=self._text(f"{intro} {way} Answer with {m * n} numbers, with spaces between them."),
                        solution=" ".join(map(str, given)), choices=())
        if self.question == "single":
            k = rng.randint(1, m * n)
            ask = (f"Which was the original place of the patch that is now at place {k} ?" if self.forward else
                   f"At which place is the patch now whose original place is {k} ?")
            return make(text=self._text(f"{intro} {ask} Answer with the number."), solution=str(given[k - 1]),
                        choices=(), asked=(k,))
        if self.question == "pair":
            k, other = rng.sample(range(1, m * n + 1), 2)
            choices = relations(m, n)
            rng.shuffle(choices)
            letter = LETTERS[choices.index(relation(forward[k - 1], forward[other - 1], n))]
            ask = (f"In the original picture, where is the patch that is now at place {k} relative to the patch that "
                   f"is now at place {other} ?")
            return make(text=self._text(f"{intro} {ask} {_offered(choices)}"), solution=letter, choices=tuple(choices),
                        asked=(k, other))
        others: list[tuple[int, ...]] = [tuple(given)]
        while len(others) < min(4, math.factorial(m * n)):
            drawn = tuple(rng.sample(range(1, m * n + 1), m * n))
            if drawn not in others:
                others.append(drawn)
        rng.shuffle(others)
        choices = [" ".join(map(str, drawn)) for drawn in others]
        return make(text=self._text(f"{intro} {way} {_offered(choices)}"), choices=tuple(choices),
                    solution=LETTERS[others.index(tuple(given))], arrangements=tuple(others))

    def _box(self, original: Image, m: int, n: int, rng: random.Random) -> Puzzle:
        regions = cells(*original.size, m, n)
        w, h = regions[0][2] // 2, regions[0][3] // 2
        if w < 1 or h < 1:
            raise ValueError(f"a picture: expected at least {2 * n} x {2 * m} pixels for question='box', got "
                             f"{original.width} x {original.height}")
        boxes = []
        for left, top, right, bottom in regions:
            x, y = rng.randint(left, right - w), rng.randint(top, bottom - h)
            boxes.append((x, y, x + w, y + h))
        forward = list(range(1, m * n + 1))
        while True:
            rng.shuffle(forward)
            moved = [place for place, index in enumerate(forward, 1) if place != index]
            if moved:
                break
        k = rng.choice(moved)
        shown = original.copy()
        for place, index in enumerate(forward):
            shown.paste(original.crop(boxes[index - 1]), boxes[place][:2])
        shown = self._finish(shown)
        text = (f"In each of {m} rows and {n} columns of regions of this picture, {original.width} pixels wide and "
                f"{original.height} high, a patch of {w} x {h} pixels was cut out, and the patches were shuffled. "
                f"Where did the patch come from that is now at {' '.join(map(str, boxes[k - 1]))} ? Answer with its "
                "left, top, right and bottom in pixels, with spaces between them.")
        return Puzzle(shown, original, self._text(text), " ".join(map(str, boxes[forward[k - 1] - 1])), "box", m, n,
                      self.thinking, tuple(forward), (), dataclasses.replace(self, m=m, n=n).chance(), (k,),
                      tuple(boxes))

    def _rotation(self, picture: Image, rng: random.Random) -> Puzzle:
        from PIL import Image, ImageDraw

        side = min(picture.size)
        if side < 2:
            raise ValueError(f"a picture: expected at least 2 x 2 pixels, got {picture.width} x {picture.height}")
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        # a square, so that its form does not tell the angle
        original = picture.crop((left, top, left + side, top + side))
        turn = rng.randrange(self.angles)
        shown = original.rotate(-360 * turn / self.angles, resample=Image.Resampling.BILINEAR)
        if 4 % self.angles:  # nor do black corners
            disc = Image.new("L", shown.size, 0)
            ImageDraw.Draw(disc).ellipse((0, 0, side - 1, side - 1), fill=255)
            shown = Image.composite(shown, Image.new("RGB", shown.size), disc)
        shown = self._finish(shown)
        choices = [f"{360 * step / self.angles:g} degrees" for step in range(self.angles)]
        name = choices[turn]
        rng.shuffle(choices)
        text = self._text(f"By how much was this picture turned clockwise? {_offered(choices)}")
        return Puzzle(shown, original, text,
                      LETTERS[choices.index(name)], "rotation", 1, 1, self.thinking, (), tuple(choices), self.chance())

    def _masked(self, shown: Image, m: int, n: int) -> Image:
        if not self.mask_ratio:
            return shown
        from PIL import ImageDraw

        h, w = shown.height // m, shown.width // n
        x, y = max(1, round(w * self.mask_ratio / 2)), max(1, round(h * self.mask_ratio / 2))
        if (n > 2 and w <= 2 * x) or (m > 2 and h <= 2 * y) or (n > 1 and w <= x) or (m > 1 and h <= y):
            raise ValueError(f"mask_ratio: expected some pixels left of patches of {w} x {h}, got {self.mask_ratio}: "
                             "take larger pictures or a smaller mask")
        draw = ImageDraw.Draw(shown)
        for c in range(1, n):
            draw.rectangle((c * w - x, 0, c * w + x - 1, shown.height - 1), fill=(0, 0, 0))
        for r in range(1, m):
            draw.rectangle((0, r * h - y, shown.width - 1, r * h + y - 1), fill=(0, 0, 0))
        return shown

    def _finish(self, shown: Image) -> Image:
        if self.jpeg_quality is None:
            return shown
        from PIL import Image

        file = io.BytesIO()
        shown.save(file, "JPEG", quality=self.jpeg_quality)
        return Image.open(file).convert("RGB")

    def _text(self, question: str) -> str:
        return f"{question} {THINK if self.thinking else DIRECT}"


def _offered(choices: Sequence[str]) -> str:
    offered = " ; ".join(f"{letter} {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return f"{offered} . Answer with the letter."


def to_rgb(image: Any) -> Image:
    """A picture of PIL in RGB from one, an array or a path; what is transparent becomes white.

    Raises:
        ValueError: no picture.
    """
    from PIL import Image

    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 4:
        image = Image.fromarray(image)
    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as opened:
                image = opened.copy()
        except OSError as error:
            raise ValueError(f"expected a picture, got {os.fspath(image)!r}: {error}") from error
    if isinstance(image, Image.Image) and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return read_picture(image)


def pictures(given: Any) -> list[Any]:
    """Pictures from a folder, with those below it, or a list of pictures, arrays or paths; files stay unread.

    Raises:
        ValueError: nothing there, or something else.
    """
    if isinstance(given, (str, Path)):
        folder = Path(given)
        if not folder.is_dir():
            raise ValueError(f"pictures: expected a folder or a list of pictures, got {str(given)!r:.200}, which is "
                             "no folder")
        given = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not given:
            raise ValueError(f"pictures: expected files such as {', '.join(SUFFIXES[:3])} in the folder, got none in "
                             f"{folder}")
        return list(given)
    if isinstance(given, np.ndarray) and given.ndim == 4:
        given = list(given)
    if not isinstance(given, Sequence) or not len(given):
        raise ValueError("pictures: expected a folder, or one picture or more in a list, got "
                         f"{'an empty list' if isinstance(given, Sequence) else type(given).__name__}")
    return list(given)


def split(images: Any, held_out: float = 0.2, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Pictures to train on and to test on: by picture, not by puzzle, so that no patch is in both."""
    found = pictures(images)
    if len(found) < 2 or not 0 < held_out < 1:
        raise ValueError(f"split: expected two pictures or more and held_out in (0, 1), got {len(found)} and "
                         f"{held_out}")
    random.Random(seed).shuffle(found)
    cut = min(len(found) - 1, max(1, round(held_out * len(found))))
    return found[cut:], found[:cut]


def example_pictures(count: int = 24, size: int = 64, seed: int = 0) -> list[Image]:
    """Made-up pictures for trying the probe out: smooth colours that get lighter towards the top, and a disc."""
    from PIL import Image

    out = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        y, x = np.mgrid[0:size, 0:size] / size
        picture = np.stack([sum(np.cos(2 * np.pi * (a * x + b * y) + c) for a, b, c in rng.uniform(-1, 1, (3, 3)))
                            for _ in range(3)], axis=-1) * 30 + 128 - 60 * (y[..., None] - 0.5)
        cx, cy, radius = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.25)
        picture[(x - cx) ** 2 + (y - cy) ** 2 < radius ** 2] = rng.uniform(0, 255, 3)
        out.append(Image.fromarray(picture.clip(0, 255).astype(np.uint8)))
    return out


def puzzles(images: Any, jigsaw: Jigsaw, count: int, seed: int = 0) -> Iterator[Puzzle]:
    """``count`` puzzles, the pictures taking turns in an order of ``seed``.

    Raises:
        ValueError: see :func:`pictures` and :meth:`Jigsaw.__call__`.
    """
    found = pictures(images)
    for number in range(count):
        yield puzzle_at(found, jigsaw, number, seed)


def puzzle_at(images: Sequence[Any], jigsaw: Jigsaw, number: int, seed: int = 0) -> Puzzle:
    """The puzzle of that number: from it alone, so that puzzles can be made when they are needed."""
    turn, at = divmod(number, len(images))
    order = _order(len(images), f"{seed} {turn}")
    return jigsaw(images[order[at]], f"{seed} {number}")


@functools.lru_cache(maxsize=8)
def _order(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def row(puzzle: Puzzle) -> dict[str, Any]:
    """A puzzle as trl reads it: ``prompt``, ``image``, and what the rewards are given."""
    return {"prompt": [{"role": "user", "content": puzzle.text}], "image": puzzle.image, "solution": puzzle.solution,
            "question": puzzle.question, "thinking": puzzle.thinking, "patches": puzzle.m * puzzle.n}


Stages = Jigsaw | Sequence[tuple[Jigsaw, int]]
"""One kind of puzzle, or a curriculum: kinds and how many puzzles of each are seen, in this order."""


def staged(jigsaw: Stages, number: int) -> Jigsaw:
    """The kind of puzzle of that number in a curriculum; its last kind goes on for ever."""
    if isinstance(jigsaw, Jigsaw):
        return jigsaw
    for kind, count in jigsaw:
        if number < count:
            return kind
        number -= count
    return jigsaw[-1][0]


def dataset(images: Any, jigsaw: Stages = Jigsaw(), count: int = 1000, seed: int = 0, *,
            make: Callable[[Puzzle], Mapping[str, Any]] = row) -> Any:
    """A ``datasets.Dataset`` whose puzzles are made when they are read.

    Args:
        images: a folder, or a list of pictures.
        jigsaw: the kind of puzzle, or a curriculum of ``(kind, how many)``. Puzzles are counted over the whole
            training, whatever the number of workers: read them in order.
        count: of puzzles.
        seed: of all of them.
        make: what becomes of a puzzle; by default what GRPO of trl reads.

    Raises:
        ValueError: see :func:`pictures`.
        ModuleNotFoundError: ``datasets`` is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("dataset: expected the package datasets, got none: "
                                  "pip install 'looseleaf-jigsaw-r1[train]'") from error
    found = pictures(images)

    def transform(batch: Mapping[str, list[int]]) -> dict[str, list[Any]]:
        rows = [make(puzzle_at(found, staged(jigsaw, number), number, seed)) for number in batch["number"]]
        return {name: [r[name] for r in rows] for name in rows[0]} if rows else {}

    return datasets.Dataset.from_dict({"number": list(range(count))}).with_transform(transform)


__all__ = ["LETTERS", "QUESTIONS", "Chance", "Jigsaw", "Puzzle", "Question", "Stages", "cells", "dataset",
           "example_pictures", "invert", "pictures", "puzzle_at", "puzzles", "reassemble", "relation", "relation_rates",
           "relations", "row", "split", "staged", "to_rgb"]
