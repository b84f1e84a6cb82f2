"""The claims: animals hidden among plants, found by name with mini-clip and cut out by mini-sam (both self-trained)."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from looseleaf import Claim, Report
from looseleaf_gensam.measures import MEASURES
from looseleaf_gensam.namer import FixedWords
from looseleaf_gensam.optimizer import GenSAM
from looseleaf_gensam.segmenter import PromptableModels, Segmenter
from looseleaf_lab import data, models, scenes
from looseleaf_lab.study import Results, Study, above, add_table
from looseleaf_vision import DualEncoder

TEMPLATES = ("{}", "a picture of a {}", "a drawing of {}", "an emoji of {}", "clip art of a {}")
"""Those that mini-clip was trained with."""
OURS = "this project's rule: scenes with exact masks"
LEAST = 60


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured: pictures of a seed, half of them camouflaged, and passes after the first."""

    pictures: int = 20
    recursive: int = 5


def pictures(seed: int, count: int) -> list[tuple[scenes.Hidden, str, str]]:
    """Scenes of animals on plants that mini-sam has never seen, with both names."""
    emoji = data.pictures("emoji")
    assert isinstance(emoji, data.Pictures)
    rows = data.split(emoji.rows, "mini-sam", train=0.8, test=0.2)["test"]
    animals = [n for n in rows if emoji.rows[n]["sublabel"].startswith("animal")]
    plants = [n for n in rows if emoji.rows[n]["sublabel"].startswith(("plant", "food-vegetable"))]
    rng, found = random.Random(f"gensam {seed}"), list[tuple[scenes.Hidden, str, str]]()
    while len(found) < count:
        thing, other = rng.choice(animals), rng.choice(plants)
        scene = scenes.hidden(np.asarray(emoji.images[thing]), np.asarray(emoji.images[other]), rng,
                              camouflage=0.5 * (len(found) % 2))
        if scene.mask.sum() >= LEAST:
            found.append((scene, emoji.rows[thing]["caption"], emoji.rows[other]["caption"]))
    return found


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """Measures of every way, and how many positive points lie in the object."""
    clip = DualEncoder(*models.load("mini-clip"))
    segmenter = Segmenter(*models.load("mini-sam"))
    plain = GenSAM("camouflaged animal", synonyms=("animal",), depth=6, size=128, templates=TEMPLATES,
                   recursive=scale.recursive)
    one = dataclasses.replace(plain, recursive=0)
    ways = {"GenSAM": (plain, "right"), "one pass": (one, "right"), "vv": (dataclasses.replace(plain, attention="vv"),
            "right"), "plain tower": (dataclasses.replace(plain, depth=0), "right"), "without background": (
            dataclasses.replace(plain, background=False), "right"), "generic words": (plain, "generic"),
            "CLIP Surgery + segmenter": (dataclasses.replace(one, attention="vv", background=False), "generic")}
    rows: dict[str, list[list[float]]] = {name: [] for name in (*ways, "last pass", "fused", "whole picture",
                                                                "true click")}
    inside: dict[str, list[float]] = {name: [] for name in ways}
    area = []
    for scene, name, place in pictures(seed, scale.pictures):
        area.append(float(scene.mask.mean()))
        for way, (settings, words) in ways.items():
            namer = FixedWords(name, place) if words == "right" else FixedWords("animal", "plant")
            three = PromptableModels(clip, segmenter, namer)
            found = settings.on(three).segment(scene.image)
            results = {way: found.mask}
            if way == "GenSAM":
                results |= {"last pass": found.passes[-1].mask, "fused": found.fused}
            for key, mask in results.items():
                rows[key].append([m(mask, scene.mask) for m in MEASURES.values()])
            first = found.passes[0]
            points = first.points[first.labels == 1].numpy()
            inside[way].append(float(scene.mask[points[:, 1], points[:, 0]].mean()) if len(points) else 0.0)
        y, x = scene.mask.nonzero()
        click = random.Random(f"{seed} {len(area)}").randrange(len(x))
        with torch.no_grad():
            from PIL import Image

            embedded = segmenter.embed(Image.fromarray(scene.image))
            side = torch.tensor([0, 0, *scene.mask.shape[::-1]])
            for key, given in (("whole picture", (None, None, side)), (
                    "true click", (torch.tensor([[x[click], y[click]]]), torch.tensor([1]), None))):
                logits, scores = segmenter.masks(embedded, *given)
                rows[key].append([m(logits[int(scores.argmax())] > 0, scene.mask) for m in MEASURES.values()])
    means = {key: dict(zip(MEASURES, np.mean(values, 0).tolist(), strict=True)) for key, values in rows.items()}
    return {"means": means, "area": float(np.mean(area)),
            "inside": {key: float(np.mean(values)) for key, values in inside.items()}}


def show(report: Report, results: Results) -> None:
    """One table of all ways, one of the points, and a few pictures."""
    names = list(results.rows[0]["means"])
    add_table(report, "Measures", ({"way": name, **{m: results.interval("means", name, m) for m in MEASURES}}
                                   for name in names), note="Mean over pictures, 95 % bootstrap over seeds.")
    add_table(report, "Positive points of the first pass that lie in the object", (
        {"way": name, "fraction": results.interval("inside", name)} for name in results.rows[0]["inside"]),
        note=f"The object covers {results.mean('area'):.3f} of the picture.")
    three = DualEncoder(*models.load("mini-clip")), Segmenter(*models.load("mini-sam"))
    for scene, name, place in pictures(0, 4):
        found = GenSAM(name, depth=6, size=128, templates=TEMPLATES).on(
            PromptableModels(*three, FixedWords(name, place))).segment(scene.image)
        report.image(f"{name} among {place}", [scene.image, *found.draw(scene.image, 128)],
                     captions=("picture", "heat map", "points and box", "mask"))


def claims(results: Results) -> Iterator[Claim]:
    """The paper's statements, in IoU of the answer, paired by seed."""
    rule = "difference of mean IoU, 95 % bootstrap over seeds: above 0 holds, below 0 does not hold, else not shown"
    for words, other, source, paper in (
            ("GenSAM beats CLIP Surgery with the segmenter", "CLIP Surgery + segmenter", "table of the repository",
             "COD10K weighted F .681 against .448 [repo table]"),
            ("Several passes beat one", "one pass", "ablation", "COD10K MAE .143 to .086 with PMG [poster]"),
            ("Key against key beats value against value", "vv", "ablation", "COD10K MAE .086 to .069 [poster]"),
            ("The background's heat helps", "without background", "ablation",
             "COD10K MAE .069 to .067; CHAMELEON is best without [poster]"),
            ("Words of the picture beat the generic text", "generic words", "ablation",
             "COD10K MAE .187 to .146 [poster]"),
            ("GenSAM beats the box of the whole picture", "whole picture", OURS, "not a figure of the paper"),
            ("The chosen pass beats the last one", "last pass", OURS, "not a figure of the paper"),
            ("GenSAM beats one true click", "true click", "table of the repository",
             "COD10K weighted F .681 against .694: below [repo table]")):
        gap = results.interval("means", "GenSAM", "IoU", minus=("means", other, "IoU"))
        yield results.claim(words, source, paper, rule, above(gap), f"GenSAM minus {other}: {gap:+.3f}", count="seeds")
    gap = results.interval("inside", "GenSAM", minus=("area",))
    yield results.claim("Positive points lie in the object more often than chance", OURS, "not a figure of the paper",
                        "fraction minus the object's area: " + rule.partition(", ")[2], above(gap), f"{gap:+.3f}",
                        count="seeds")
    yield from results.unmeasured("table of the repository", "see the README [repo table]", {
        "MAE, weighted F, E and S on COD10K, CAMO and CHAMELEON": "SAM ViT-H, LLaVA and the data sets"})


study = Study("gensam: masks from one task text", measure, claims, show, full=Scale(), quick=Scale(2, 1))
