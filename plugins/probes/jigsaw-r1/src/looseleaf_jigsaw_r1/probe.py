"""The probe: puzzles of several sizes and questions, a model's answers, chance, and controls."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from torch import nn

from looseleaf import Paper, Probe, Report
from looseleaf import progress as progress_
from looseleaf.modes import evaluating
from looseleaf.plugin import In
from looseleaf.probes.subject import parts
from looseleaf.statistics import Interval
from looseleaf_jigsaw_r1 import verifiers
from looseleaf_jigsaw_r1.baselines import SeamBaseline, constant_answer, random_answer
from looseleaf_jigsaw_r1.puzzles import QUESTIONS, Jigsaw, Puzzle, example_pictures, pictures, puzzles
from looseleaf_text import ChatModel, LocalChat

Ask = Callable[[Sequence[Puzzle]], list[str]]


def wilson(right: int, count: int, z: float = 1.959964) -> Interval:
    """A fraction with its 95 % Wilson interval; ``count`` >= 1."""
    p, zz = right / count, z * z
    middle = (p + zz / (2 * count)) / (1 + zz / count)
    half = z / (1 + zz / count) * math.sqrt(p * (1 - p) / count + zz / (4 * count * count))
    return Interval(p, max(0.0, middle - half), min(1.0, middle + half))


@dataclasses.dataclass(frozen=True)
class Scores:
    """What answers to puzzles of one kind got.

    Attributes:
        right: how many are right.
        count: of how many.
        reward: mean accuracy reward, such as the fraction of right indices.
        form: fraction of outputs that have the form that was asked for.
    """

    right: int
    count: int
    reward: float
    form: float

    @property
    def interval(self) -> Interval:
        """Fraction right with its Wilson interval."""
        return wilson(self.right, self.count)


def score(asked: Sequence[Puzzle], outputs: Sequence[str]) -> Scores:
    """Score outputs, one for each puzzle."""
    rewards = [verifiers.accuracy(text, p.solution, p.question, p.thinking, p.m * p.n)
               for p, text in zip(asked, outputs, strict=True)]
    forms = [verifiers.well_formed(text, p.question, p.thinking, p.m * p.n)
             for p, text in zip(asked, outputs, strict=True)]
    right = sum(verifiers.is_right(reward, p.question) for p, reward in zip(asked, rewards, strict=True))
    return Scores(right, len(asked), float(np.mean(rewards)), float(np.mean(forms)))


def asker(subject: Any, max_tokens: int, progress: bool | None = None) -> tuple[Ask, Any]:
    """How a subject is asked, and its torch module or None.

    Args:
        subject: a ``(model, processor)`` pair, a pipeline, a :class:`looseleaf_text.ChatModel` (also one behind a
            server), or a callable ``(image, text) -> text``.
        max_tokens: of an answer.
        progress: show a bar.

    Raises:
        TypeError: another subject.
        ValueError: no processor, or one without a chat template.
    """
    if callable(subject) and not isinstance(subject, (nn.Module, ChatModel)) and not hasattr(subject, "model"):
        def call(asked: Sequence[Puzzle]) -> list[str]:
            return [str(subject(p.image, p.text)) for p in progress_.track(asked, "puzzles", show=progress)]

        return call, None
    chat = subject if isinstance(subject, ChatModel) else LocalChat(*parts(subject, needs="processor"))

    def ask(asked: Sequence[Puzzle]) -> list[str]:
        with progress_.bar("puzzles", len(asked), progress) as bar:
            return chat.chat([p.messages for p in asked], max_tokens, keep=lambda number, text: bar.update())

    model = getattr(chat, "model", None)
    return ask, model if isinstance(model, nn.Module) else None


@dataclasses.dataclass
class JigsawProbe(Probe):
    """Can a vision-language model put shuffled patches of a picture in order? Any pictures, no labels (2505.23590).

    Args:
        sizes: rows x columns, such as 2x1.
        questions: full, pair, multiple, single, box, rotation.
        puzzles: of each size and question.
        thinking: ask for reasoning in tags before the answer.
        forward: see :class:`Jigsaw`; not for pairs.
        mask_ratio: fraction of a patch that is blacked at seams, in [0, 1).
        jpeg_quality: recompress puzzles, so that the blocks of JPEG files do not show the cut; None: not.
        max_tokens: of an answer; the paper's 512 with reasoning.
        shown: puzzles drawn in the report with their answers.
    """

    sizes: tuple[str, ...] = ("2x1", "3x1", "2x2")
    questions: tuple[str, ...] = ("pair", "full")
    puzzles: Annotated[int, In(">= 1")] = 100
    thinking: bool = False
    forward: bool = True
    mask_ratio: Annotated[float, In("[0, 1)")] = 0.0
    jpeg_quality: int | None = None
    max_tokens: Annotated[int, In(">= 1")] = 512
    shown: Annotated[int, In(">= 0")] = 6
    paper: ClassVar[Paper] = Paper(
        title="Jigsaw-R1: A Study of Rule-based Visual Reinforcement Learning with Jigsaw Puzzles",
        authors=("Zifu Wang", "Junyi Zhu", "Bo Tang", "Zhiyu Li", "Feiyu Xiong", "Jiaqian Yu", "Matthew B. Blaschko"),
        year=2025, arxiv="2505.23590", venue="TMLR 2025", code="https://github.com/zifuwanggg/Jigsaw-R1",
        summary="Can your vision-language model put the shuffled patches of your own pictures in order?")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: few puzzles, for a small LLaVA with random weights."""
        from looseleaf_text.testing.models import toy_llava

        def subject() -> Any:
            pair = toy_llava()
            # transformers hangs hooks of its own into a vision tower when it first runs, and leaves them there
            LocalChat(*pair).chat([Jigsaw()(example_pictures(1)[0]).messages], 1)
            return pair

        return {"make": lambda: cls(sizes=("2x1",), questions=("pair",), puzzles=3, max_tokens=4, shown=3),
                "subject": subject}

    def validate(self) -> None:
        """See :meth:`looseleaf.Plugin.validate`."""
        sizes = not isinstance(self.sizes, str) and all(re.fullmatch(r"[1-9]\d*x[1-9]\d*", s) for s in self.sizes)
        self.check("sizes", sizes and bool(self.sizes), "one or more of the form 2x1, rows x columns")
        known = not isinstance(self.questions, str) and all(q in QUESTIONS for q in self.questions)
        self.check("questions", known and bool(self.questions), f"one or more of {', '.join(QUESTIONS)}")
        self.kinds()

    def kinds(self) -> list[Jigsaw]:
        """The kinds of puzzles that are asked: sizes x questions; rotations have no size, pairs are always forward."""
        out: list[Jigsaw] = []
        for question in self.questions:
            for size in self.sizes if question != "rotation" else ("1x1",):
                m, n = map(int, size.split("x"))
                out.append(Jigsaw(m, n, question, self.thinking,  # type: ignore[arg-type]
                                  self.forward or question == "pair", self.mask_ratio, jpeg_quality=self.jpeg_quality))
        return out

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        """Ask the puzzles, with and without their pictures, and score the answers beside chance and baselines.

        Args:
            subject: a ``(model, processor)`` pair of transformers, a :class:`looseleaf_text.ChatModel` such as a
                ``ChatEndpoint``, or a callable ``(image, text) -> text``.
            data: a folder of pictures, or a list of pictures, arrays or paths; None: made-up ones.
            seed: of the puzzles.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            TypeError: another subject.
            ValueError: no processor, no pictures, or pictures that are too small.
        """
        ask, model = asker(subject, self.max_tokens, progress)
        images = pictures(example_pictures() if data is None else data)
        report = Report("Jigsaw puzzles", {
            "pictures": len(images), "made up": data is None, "puzzles of each kind": self.puzzles, "seed": seed,
            "thinking": self.thinking, "forward": self.forward, "mask ratio": self.mask_ratio})
        table = report.table("Puzzles in order", [
            "question", "size", "puzzles", "right", "low", "high", "chance", "best constant", "above both", "reward",
            "format", "without the picture"],
            note="95 % Wilson intervals. above both: the interval lies above uniform chance and the best constant "
                 "answer. reward: mean accuracy reward, such as the fraction of right indices. without the picture: "
                 "fraction right where a grey one is shown; there even a model that solves puzzles is at chance")
        controls = report.table("Beside the model", ["question", "size", "seams", "constant", "random", "key"],
                                note="fraction right. seams: patches put together by the mismatch of their edges; key: "
                                     "the right answers as they are read back, which must be 1")
        outputs: list[tuple[Puzzle, str]] = []
        with evaluating(model):
            for kind in self.kinds():
                asked = list(puzzles(images, kind, self.puzzles, seed))
                answers = ask(asked)
                outputs += list(zip(asked, answers, strict=True))
                found, blind = score(asked, answers), score(asked, ask([blinded(p) for p in asked]))
                chance, interval = _chance(asked), found.interval
                table.add(kind.question, kind.size, found.count, *interval, *chance,
                          interval.low > max(chance), found.reward, found.form, blind.right / blind.count)
                controls.add(kind.question, kind.size, *_controls(asked, seed))
        if self.thinking:
            words = verifiers.keywords([text for _, text in outputs])
            report.table("Words of the reasoning", ["recheck", "work backwards", "length"],
                         [[words.recheck, words.backwards, words.length]],
                         note="outputs in 1,000 with recheck, reverify, reevaluate or reexamine; mean length in words")
        self._show(report, outputs)
        return report

    def _show(self, report: Report, outputs: Sequence[tuple[Puzzle, str]]) -> None:
        step = max(1, len(outputs) // max(1, self.shown))
        some = list(outputs[::step][:self.shown])
        if some:
            report.image("Puzzles and answers", [np.asarray(p.image) for p, _ in some],
                         captions=[f"{p.question} {p.m}x{p.n}: {said.strip()[-40:] or 'nothing'} (right: {p.solution})"
                                   for p, said in some])
        report.examples += [(f"{p.question} {p.m}x{p.n}", f"{p.text}\n-> {said}\nright: {p.solution}")
                            for p, said in some]


def blinded(puzzle: Puzzle) -> Puzzle:
    """The same puzzle with a grey picture."""
    from PIL import Image

    return dataclasses.replace(puzzle, image=Image.new("RGB", puzzle.image.size, (128, 128, 128)))


def _chance(asked: Sequence[Puzzle]) -> tuple[float, float]:
    return (float(np.mean([p.chance.uniform for p in asked])), float(np.mean([p.chance.best_constant for p in asked])))


def _controls(asked: Sequence[Puzzle], seed: int) -> list[float | None]:
    rng, seams = random.Random(f"controls {seed}"), SeamBaseline()
    by_seams = [seams(p) for p in asked]
    known = [(p, text) for p, text in zip(asked, by_seams, strict=True) if text is not None]

    def of(answers: Sequence[str], those: Sequence[Puzzle] = asked) -> float:
        direct = [dataclasses.replace(p, thinking=False) for p in those]
        return score(direct, answers).right / len(those)

    return [of([text for _, text in known], [p for p, _ in known]) if known else None,
            of([constant_answer(p) for p in asked]), of([random_answer(p, rng) for p in asked]),
            score(asked, [p.gold for p in asked]).right / len(asked)]


__all__ = ["Ask", "JigsawProbe", "Scores", "asker", "blinded", "score", "wilson"]
