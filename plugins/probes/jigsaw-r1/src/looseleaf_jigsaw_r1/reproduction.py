"""What is measured without a vision-language model: planted, constant and random answers, and seams, beside chance."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from looseleaf import Claim, Report
from looseleaf_jigsaw_r1.baselines import PlantedSolver, SeamBaseline, constant_answer, random_answer
from looseleaf_jigsaw_r1.probe import score
from looseleaf_jigsaw_r1.puzzles import Jigsaw, example_pictures, puzzles
from looseleaf_lab.study import Results, Study, above, add_table, every

OURS = "this project's rule"
KINDS = {f"{m}x{n} {question}": Jigsaw(m, n, question)  # type: ignore[arg-type]
         for m, n in ((2, 1), (3, 1), (2, 2)) for question in ("pair", "full")}
PLANTED = 0.75


def measure(seed: int, count: int) -> dict[str, Any]:
    """Fraction right of each kind of answers on made-up pictures of this seed."""
    images, rng = example_pictures(count, seed=seed), random.Random(seed)
    out: dict[str, Any] = {}
    for name, kind in KINDS.items():
        asked = list(puzzles(images, kind, count, seed))
        planted, seams = PlantedSolver(asked, PLANTED, seed), SeamBaseline()
        answers = {"planted": [planted(p.image, p.text) for p in asked], "seams": [seams(p) or "" for p in asked],
                   "constant": [constant_answer(p) for p in asked], "random": [random_answer(p, rng) for p in asked]}
        out[name] = {who: score(asked, said).right / count for who, said in answers.items()}
    return out


def show(report: Report, results: Results) -> None:
    """The table of all kinds."""
    add_table(report, "Made-up pictures", (
        {"puzzle": name, "best constant": kind.chance().best_constant, "planted": results.mean(name, "planted"),
         "seams": results.interval(name, "seams"), "constant": results.mean(name, "constant"),
         "random": results.mean(name, "random")} for name, kind in KINDS.items()), "fraction right")


def claims(results: Results) -> Iterator[Claim]:
    """The controls, and the paper's claims, none of which is measured."""
    values = [value for name in KINDS for value in results.values(name, "planted")]
    yield results.claim("Control: a model that has the key to three puzzles in four is measured so", OURS, "-",
                        "exactly 0.75 in each kind and seed", all(value == PLANTED for value in values),
                        f"{min(values):.2f} to {max(values):.2f}", any_scale=True)
    yield results.claim("Patches can be put together by their seams", OURS, "-", "interval over seeds above the best "
                        "constant answer, in each kind", every(*(
                            above(results.interval(name, "seams"), kind.chance().best_constant)
                            for name, kind in KINDS.items())),
                        "; ".join(f"{name} {results.mean(name, 'seams'):.2f}" for name in KINDS), count="seeds")
    yield from results.unmeasured("Table 1", "52.2 (chance 50); after GRPO 98.8, 3x1 66.0, 4x1 53.2, 2x2 16.8", {
        "Untrained models are near chance on 2x1 pairs, and GRPO solves them": "a vision-language model"})
    yield from results.unmeasured("Table 6", "69.59 to 73.18; SFT 69.48, SFT then RL 69.92", {
        "Other tasks gain from GRPO on puzzles, and not from SFT": "a vision-language model of billions of weights"})


study = Study("jigsaw-r1: the paper's claims", measure, claims, show=show, full=40, quick=8)
