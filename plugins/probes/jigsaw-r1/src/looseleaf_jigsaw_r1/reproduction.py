"""Puzzles of drawings for mini-vlm (self-trained): GRPO on 2x1 pairs, supervised training, both, and the controls."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from looseleaf import Claim, Report
from looseleaf.statistics import Interval
from looseleaf_jigsaw_r1.baselines import PlantedSolver, SeamBaseline, constant_answer, random_answer
from looseleaf_jigsaw_r1.probe import blinded, score, wilson
from looseleaf_jigsaw_r1.puzzles import Jigsaw, Puzzle, puzzles
from looseleaf_jigsaw_r1.training import train
from looseleaf_lab import data, models
from looseleaf_lab.study import Results, Study, above, add_table, curve, every
from looseleaf_text import LocalChat

OURS = "this project's rule"
SIZE = 48
"""Sides of pictures in pixels: two and three rows fall on the grid of mini-vlm's tower."""
KINDS = {kind.size: kind for kind in (Jigsaw(2, 1), Jigsaw(3, 1), Jigsaw(2, 2))}
LEFT_OUT = ("computer", "shapes")
NEAR = 0.03
"""Held-out pictures that are as near to one of training, in root mean square of 8 x 8 thumbnails, are left out."""
PLANTED = 0.75
UNTRAINED, GRPO, SFT, BOTH = "untrained", "GRPO", "SFT", "SFT, then GRPO"
BLIND = "GRPO, without the picture"


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is trained and measured.

    Attributes:
        steps: of GRPO; the paper's are 2,000. [ours]
        prompts: in a step; the paper's are 64. [ours]
        samples: for a prompt, as in the paper.
        learning_rate: of every training; the paper's 1e-6 is for weights by the billion. [ours]
        batch: puzzles in a supervised step.
        test: held-out puzzles of each size.
        windows: into which the rewards of training are averaged.
    """

    steps: int = 100
    prompts: int = 16
    samples: int = 8
    learning_rate: float = 3e-4
    batch: int = 32
    test: int = 300
    windows: int = 50

    @property
    def seen(self) -> int:
        """Puzzles that each way of training sees."""
        return self.steps * self.prompts


def drawn(image: Any) -> Any:
    """What is drawn, as mini-vlm saw it: without the white margins, which would tell where a picture was cut.

    Args:
        image: uint8 (height, width, 3 or 4).

    Returns:
        A picture of 48 x 48 pixels; None: too little is drawn.
    """
    from PIL import Image

    image = np.asarray(image)
    if image.shape[-1] == 4:
        alpha = image[..., 3:] / 255
        image = (image[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    ink = (image < 245).any(2)
    y, x = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    if len(y) < 24 or len(x) < 16:
        return None
    return Image.fromarray(image[y[0]:y[-1] + 1, x[0]:x[-1] + 1]).resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def pictures() -> tuple[list[Any], list[Any]]:
    """Pictures that mini-vlm was trained on, and those that it has never seen, nor others that look the same."""
    parts: dict[str, list[Any]] = {"train": [], "test": []}
    for name in ("emoji", "clip-art"):
        found = data.pictures(name)
        for part, rows in data.split(found.rows, "mini-vlm", train=0.8, test=0.2).items():
            kept = [drawn(found.images[n]) for n in rows if found.rows[n]["label"] not in LEFT_OUT]
            parts[part] += [picture for picture in kept if picture is not None]
    known, new = (np.stack([np.asarray(p.resize((8, 8)), dtype=np.float32).ravel() / 255 for p in parts[part]])
                  for part in ("train", "test"))
    distance = [float(((known - row) ** 2).mean(1).min() ** 0.5) for row in new]
    return parts["train"], [p for p, d in zip(parts["test"], distance, strict=True) if d > NEAR]


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """Train three times from mini-vlm, and ask every model the same puzzles of held-out pictures."""
    training, testing = pictures()
    asked = {size: list(puzzles(testing, kind, scale.test, seed)) for size, kind in KINDS.items()}
    row: dict[str, Any] = {"right": {}, "form": {}, "curves": {}, "pictures": [len(training), len(testing)]}
    grpo = {"learning_rate": scale.learning_rate, "num_generations": scale.samples, "max_completion_length": 4,
            "per_device_train_batch_size": scale.samples * scale.prompts}
    sft = {"learning_rate": scale.learning_rate, "per_device_train_batch_size": scale.batch}
    half = scale.steps // 2
    ways: dict[str, list[tuple[str, int, dict[str, Any]]]] = {
        UNTRAINED: [], GRPO: [("grpo", scale.steps, grpo)],
        SFT: [("sft", max(1, scale.seen // scale.batch), sft)],
        BOTH: [("sft", max(1, half * scale.prompts // scale.batch), sft), ("grpo", scale.steps - half, grpo)]}
    for way, stages in ways.items():
        model, processor = models.load("mini-vlm")
        # of torch's fused attention the gradients with masks are slow on CPUs
        model.set_attn_implementation("eager")
        for number, (method, steps, settings) in enumerate(stages):
            trained = train(model, processor, training, method, steps=steps,  # type: ignore[arg-type]
                            seed=1000 * seed + number, gradient_accumulation_steps=1, gradient_checkpointing=False,
                            **settings)
            if method == "grpo":
                row["curves"][way] = _curves(trained.history, scale.windows)
        chat = LocalChat(model, processor, batch=32)
        for size, of_size in asked.items():
            said = chat.chat([p.messages for p in of_size], 4)
            _put(row, way, size, of_size, said)
            if way == GRPO:
                _put(row, BLIND, size, of_size, chat.chat([blinded(p).messages for p in of_size], 4))
                row.setdefault("shown", {})[size] = said[:4]
    rng, seams = random.Random(seed), SeamBaseline()
    for size, of_size in asked.items():
        planted = PlantedSolver(of_size, PLANTED, seed)
        for name, said in {"planted": [planted(p.image, p.text) for p in of_size],
                           "seams": [seams(p) or "" for p in of_size],
                           "constant": [constant_answer(p) for p in of_size],
                           "random": [random_answer(p, rng) for p in of_size]}.items():
            _put(row, name, size, of_size, said)
    return row


def _put(row: dict[str, Any], way: str, size: str, asked: list[Puzzle], said: list[str]) -> None:
    found = score(asked, said)
    row["right"].setdefault(way, {})[size] = found.right / found.count
    row["form"].setdefault(way, {})[size] = found.form


def _curves(history: list[dict[str, Any]], windows: int) -> dict[str, list[float]]:
    """Means of what trl logged at each step, in windows of equal length."""
    names = {"accuracy": "rewards/accuracy_reward/mean", "format": "rewards/format_reward/mean",
             "equal": "frac_reward_zero_std"}
    steps = [entry for entry in history if entry["stage"] == "grpo" and "reward" in entry]
    parts = [part for part in np.array_split(np.arange(len(steps)), windows) if len(part)]
    return {"step": [float(part.mean()) + 1 for part in parts],
            **{name: [float(np.mean([steps[n][key] for n in part])) for part in parts] for name, key in names.items()}}


def pooled(results: Results, way: str, size: str) -> Interval:
    """Fraction right over the puzzles of all seeds, with its 95 % Wilson interval."""
    count = results.scale.test
    return wilson(sum(round(value * count) for value in results.values("right", way, size)),
                  count * len(results.seeds))


def show(report: Report, results: Results) -> None:
    """One table of all ways, the rewards of training, and puzzles with their answers."""
    scale = results.scale
    report.facts |= {"model": "mini-vlm (self-trained)", "pictures of training": results.rows[0]["pictures"][0],
                     "held out": results.rows[0]["pictures"][1], "puzzles seen": scale.seen,
                     "samples of a prompt": scale.samples, "learning rate": scale.learning_rate}
    for size, kind in KINDS.items():
        add_table(report, f"Held-out pictures, {size} pairs", (
            {"answers": way, "right": pooled(results, way, size),
             "lowest seed": min(results.values("right", way, size)),
             "format": results.mean("form", way, size)} for way in results.rows[0]["right"]),
            f"fraction right with 95 % Wilson interval over the puzzles of all seeds; chance "
            f"{kind.chance().uniform:.3f}, best constant {kind.chance().best_constant:.3f}; trained on 2x1 alone")
    for way in (GRPO, BOTH):
        each = results.values("curves", way)
        report.figure(f"Rewards in training, {way}", x_label="step", y_label="mean reward", series=[
            curve(name, each[0]["step"], np.mean([c[name] for c in each], 0).tolist(), "line")
            for name in ("accuracy", "format", "equal")])
    _, testing = pictures()
    for size, kind in KINDS.items():
        asked = list(puzzles(testing, kind, 4, results.seeds[0]))
        report.image(f"{size} pairs and the answers after GRPO", [np.asarray(p.image) for p in asked], captions=[
            f"{p.asked[0]} to {p.asked[1]}: {_words(p, said)} (right: {_words(p, p.solution)})"
            for p, said in zip(asked, results.rows[0]["shown"][size], strict=True)])


def _words(puzzle: Puzzle, letter: str) -> str:
    at = "ABCDEFGH".find(letter.strip() or "?")
    return puzzle.choices[at] if 0 <= at < len(puzzle.choices) else letter or "nothing"


def claims(results: Results) -> Iterator[Claim]:
    """The paper's statements on held-out pictures, and the controls."""
    def means(size: str, *ways: str) -> str:
        return ", ".join(f"{way} {results.mean('right', way, size):.2f}" for way in ways)

    values = [value for size in KINDS for value in results.values("right", "planted", size)]
    yield results.claim("Control: a model that has the key to three puzzles in four is measured so", OURS, "-",
                        "exactly 0.75 in each size and seed", all(value == PLANTED for value in values),
                        f"{min(values):.2f} to {max(values):.2f}", any_scale=True)
    before = pooled(results, UNTRAINED, "2x1")
    yield results.claim("A model that was not trained on puzzles is near chance on 2x1 pairs", "Table 1",
                        "Qwen2.5-VL-3B, direct, 52.2; GPT-4.1, thinking, 54.1; chance 50",
                        "95 % Wilson interval over all puzzles has 0.5 in it",
                        before.low <= 0.5 <= before.high, f"{before:.3f}", count="seeds")
    lowest = min(results.values("right", GRPO, "2x1"))
    yield results.claim("GRPO on 2x1 pairs solves them on new pictures", "Table 1", "52.2 to 98.8",
                        "at least 0.80 of the held-out puzzles in every seed", lowest >= 0.8,
                        f"{means('2x1', UNTRAINED, GRPO)}, lowest seed {lowest:.2f}", count="seeds")
    each = results.values("curves", GRPO)
    begun = min(c["format"][0] for c in each)
    first = every(*(_reaches(c, "format", 0.95) < _reaches(c, "accuracy", 0.75) for c in each))
    yield results.claim("The form of answers is learnt before what they say", OURS, "-",
                        "format reward reaches 0.95 in an earlier window than accuracy 0.75, in every seed; not shown "
                        "where it begins above 0.95", None if begun >= 0.95 else first,
                        f"format {begun:.2f} in the first window", count="seeds")
    for size in ("3x1", "2x2"):
        chance = KINDS[size].chance()
        yield results.claim(f"GRPO on 2x1 pairs carries over to {size} pairs", OURS,
                            "trained on them: " + {"3x1": "66.0", "2x2": "16.8"}[size],
                            f"Wilson interval above both chances, {max(chance.uniform, chance.best_constant):.3f}",
                            above(pooled(results, GRPO, size), max(chance.uniform, chance.best_constant)),
                            f"{pooled(results, GRPO, size):.3f}", count="seeds")
    for way, source, paper in ((SFT, "Table 6", "other tasks 73.18 against 69.48"),
                               (BOTH, "Table 6", "other tasks 73.18 against 69.92")):
        gap = results.interval("right", GRPO, "2x1", minus=("right", way, "2x1"))
        yield results.claim(f"GRPO is better than {way} on as many puzzles", source, paper,
                            "difference on held-out 2x1 pairs, 95 % bootstrap over seeds: above 0 holds, below 0 does "
                            "not hold, else not shown", above(gap),
                            f"{gap:+.3f} ({'; '.join(f'{s}: {means(s, GRPO, way)}' for s in KINDS)})", count="seeds")
    gap = results.interval("right", GRPO, "2x1", minus=("right", "seams", "2x1"))
    yield results.claim("The trained model is better than putting patches together by their seams", OURS, "-",
                        "difference on 2x1 pairs, 95 % bootstrap over seeds, above 0", above(gap),
                        f"{gap:+.3f} ({means('2x1', GRPO, 'seams', 'constant', 'random', BLIND)})", count="seeds")
    yield from results.unmeasured("Tables 1 and 6", "GRPO with thinking 96.8; other tasks 69.59 to 73.18", {
        "Reasoning, its keywords and its consistency; other tasks": "a vision-language model of billions of weights"})


def _reaches(curves: dict[str, list[float]], name: str, level: float) -> float:
    return next((step for step, value in zip(curves["step"], curves[name], strict=True) if value >= level), np.inf)


study = Study("jigsaw-r1: the paper's claims", measure, claims, show=show, full=Scale(),
              quick=Scale(steps=4, prompts=2, batch=4, test=8, windows=4), quick_seeds=1)
"""The reproduction; the quick run shows that everything runs."""
