"""The claims: animals hidden among plants, found by name with mini-clip and cut out by mini-sam (both self-trained)."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from looseleaf import Claim, Report
from looseleaf_gensam.measures import MEASURES
from looseleaf_gensam.namer import FixedWords
from looseleaf_gensam.optimizer import GenSAM, Pass
from looseleaf_gensam.segmenter import PromptableModels, Segmenter
from looseleaf_lab import data, models, scenes
from looseleaf_lab.study import Results, Study, above, add_table
from looseleaf_vision import DualEncoder

TEMPLATES = ("{}", "a picture of a {}", "a drawing of {}", "an emoji of {}", "clip art of a {}")
"""Those that mini-clip was trained with."""
OURS = "this project's rule: scenes with exact masks"
LEAST = 60
GENSAM, EMOJI, STAMPS = "GenSAM", "emoji", "stamps"
NO_WORDS = ("whole picture", "true click")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured: pictures of a seed, half of them camouflaged, of each set; passes after the first."""

    pictures: int = 20
    stamps: int = 10
    recursive: int = 5


class Picture(NamedTuple):
    """A scene with its names and whether the plants have the animal's colours."""

    scene: scenes.Hidden
    name: str
    place: str
    camouflaged: bool


def pictures(seed: int, count: int, things: str = "emoji") -> list[Picture]:
    """Scenes of animals on plants that mini-sam has never seen, with both names; stamps are photos it was not made
    for."""
    emoji, drawn = data.pictures("emoji"), data.pictures(things)
    rows = data.split(emoji.rows, "mini-sam", train=0.8, test=0.2)["test"]
    animals = [n for n in rows if emoji.rows[n]["sublabel"].startswith("animal")] if things == "emoji" else [
        n for n, row in enumerate(drawn.rows) if row["label"] == "animals"]
    plants = [n for n in rows if emoji.rows[n]["sublabel"].startswith(("plant", "food-vegetable"))]
    rng, found = random.Random(f"gensam {seed}"), list[Picture]()
    while len(found) < count:
        thing, other, camouflaged = rng.choice(animals), rng.choice(plants), bool(len(found) % 2)
        scene = scenes.hidden(np.asarray(drawn.images[thing]), np.asarray(emoji.images[other]), rng,
                              camouflage=0.5 * camouflaged)
        if scene.mask.sum() >= LEAST:
            name = re.sub(r"^(an?|the) ", "", drawn.rows[thing]["caption"].lower())
            found.append(Picture(scene, name, emoji.rows[other]["caption"], camouflaged))
    return found


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """Measures of every way on both sets."""
    three = DualEncoder(*models.load("mini-clip")), Segmenter(*models.load("mini-sam"))
    plain = GenSAM("camouflaged animal", synonyms=("animal",), depth=6, size=128, templates=TEMPLATES,
                   recursive=scale.recursive)
    one = dataclasses.replace(plain, recursive=0)
    few = {GENSAM: (plain, "right"), "one pass": (one, "right"), "CLIP Surgery + segmenter": (
        dataclasses.replace(one, attention="vv", background=False), "generic")}
    ways = {**few, "vv": (dataclasses.replace(plain, attention="vv"), "right"),
            "plain tower": (dataclasses.replace(plain, depth=0), "right"),
            "without background": (dataclasses.replace(plain, background=False), "right"),
            "picture not weighed": (dataclasses.replace(plain, weight=0.0), "right"),
            "30 % wrong words": (plain, "wrong"), "generic words": (plain, "generic")}
    return {EMOJI: tried(pictures(seed, scale.pictures), ways, three, seed),
            STAMPS: tried(pictures(seed, scale.stamps, "stamps"), few, three, seed)}


def tried(asked: list[Picture], ways: dict[str, tuple[GenSAM, str]], three: tuple[DualEncoder, Segmenter],
          seed: int) -> dict[str, Any]:
    """Measures of every way, also by kind of picture and by pass, and how many positive points lie in the object."""
    rows: dict[str, list[list[float]]] = {name: [] for name in (*ways, "last pass", "fused", *NO_WORDS)}
    inside: dict[str, list[float]] = {name: [] for name in ways}
    passes: list[list[tuple[float, float]]] = []
    draw = random.Random(f"wrong words {seed}")
    for number, picture in enumerate(asked):
        scene = picture.scene
        stranger = draw.choice([p for p in asked if p.name != picture.name] or asked)
        # three of ten, spread over both kinds of picture
        told = stranger if number % 10 in (0, 3, 7) else picture
        words = {"right": (picture.name, picture.place), "wrong": (told.name, told.place),
                 "generic": ("animal", "plant")}
        for way, (settings, kind) in ways.items():
            found = settings.on(PromptableModels(*three, FixedWords(*words[kind]))).segment(scene.image)
            results = {way: found.mask}
            if way == GENSAM:
                results |= {"last pass": found.passes[-1].mask, "fused": found.fused}
                passes.append([(MEASURES["IoU"](one.mask, scene.mask), share(one, scene)) for one in found.passes])
            for key, mask in results.items():
                rows[key].append([m(mask, scene.mask) for m in MEASURES.values()])
            inside[way].append(share(found.passes[0], scene))
        for key, mask in without_words(scene, three[1], random.Random(f"{seed} {number + 1}")).items():
            rows[key].append([m(mask, scene.mask) for m in MEASURES.values()])
    means = {key: dict(zip(MEASURES, np.mean(values, 0).tolist(), strict=True)) for key, values in rows.items()}
    column, hard = list(MEASURES).index("IoU"), np.array([picture.camouflaged for picture in asked])
    kinds = {kind: {key: float(np.array(values)[hard == flag, column].mean()) for key, values in rows.items()}
             for kind, flag in (("easy", False), ("camouflaged", True))}
    return {"means": means, "kinds": kinds, "passes": np.mean(passes, 0).tolist(),
            "area": float(np.mean([picture.scene.mask.mean() for picture in asked])),
            "inside": {key: float(np.mean(values)) for key, values in inside.items()}}


def share(one: Pass, scene: scenes.Hidden) -> float:
    """Fraction of a pass's positive points that lie in the object; 0 without any."""
    points = one.points[one.labels == 1].numpy()
    return float(scene.mask[points[:, 1], points[:, 0]].mean()) if len(points) else 0.0


def without_words(scene: scenes.Hidden, segmenter: Segmenter, draw: random.Random) -> dict[str, Any]:
    """Masks by the box of the whole picture and by one click in the object."""
    from PIL import Image

    y, x = scene.mask.nonzero()
    click = draw.randrange(len(x))
    side = torch.tensor([0, 0, *scene.mask.shape[::-1]])
    prompts = ((None, None, side), (torch.tensor([[x[click], y[click]]]), torch.tensor([1]), None))
    found = {}
    with torch.no_grad():
        embedded = segmenter.embed(Image.fromarray(scene.image))
        for key, given in zip(NO_WORDS, prompts, strict=True):
            logits, scores = segmenter.masks(embedded, *given)
            found[key] = logits[int(scores.argmax())] > 0
    return found


def show(report: Report, results: Results) -> None:
    """Tables of all ways, kinds of picture, passes and points, and a few pictures."""
    for name, first in results.rows[0].items():
        add_table(report, f"{name}: measures", ({"way": way, **{
            m: results.interval(name, "means", way, m) for m in MEASURES}} for way in first["means"]),
            note="Mean over pictures, 95 % bootstrap over seeds.")
        add_table(report, f"{name}: IoU by kind of picture", ({"way": way, **{
            kind: results.interval(name, "kinds", kind, way) for kind in first["kinds"]}} for way in first["means"]),
            note="camouflaged: the plants in the animal's colours")
        add_table(report, f"{name}: pass by pass", ({"pass": n, "IoU": results.interval(name, "passes", n, 0),
                                                     "points in the object": results.interval(name, "passes", n, 1)}
                                                    for n in range(len(first["passes"]))))
        add_table(report, f"{name}: positive points of the first pass that lie in the object", (
            {"way": way, "fraction": results.interval(name, "inside", way)} for way in first["inside"]),
            note=f"The object covers {results.mean(name, 'area'):.3f} of the picture.")
    three = DualEncoder(*models.load("mini-clip")), Segmenter(*models.load("mini-sam"))
    for things in ("emoji", "stamps"):
        for scene, name, place, _ in pictures(0, 4 if things == "emoji" else 2, things):
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
            ("Right words beat words of which 30 % are wrong", "30 % wrong words", OURS, "not a figure of the paper"),
            ("Weighing the picture that CLIP sees next by the heat helps", "picture not weighed", OURS,
             "not a figure of the paper"),
            ("GenSAM beats the box of the whole picture", "whole picture", OURS, "not a figure of the paper"),
            ("The chosen pass beats the last one", "last pass", OURS, "not a figure of the paper"),
            ("GenSAM beats one true click", "true click", "table of the repository",
             "COD10K weighted F .681 against .694: below [repo table]")):
        gap = results.interval(EMOJI, "means", GENSAM, "IoU", minus=(EMOJI, "means", other, "IoU"))
        yield results.claim(words, source, paper, rule, above(gap), f"GenSAM minus {other}: {gap:+.3f}", count="seeds")
    for other in ("CLIP Surgery + segmenter", "one pass"):
        gap = results.interval(STAMPS, "means", GENSAM, "IoU", minus=(STAMPS, "means", other, "IoU"))
        yield results.claim(f"The same on stamps: GenSAM beats {other}", OURS, "not a figure of the paper", rule,
                            above(gap), f"GenSAM minus {other}: {gap:+.3f}", count="seeds")
    gap = results.interval(EMOJI, "inside", GENSAM, minus=(EMOJI, "area"))
    yield results.claim("Positive points lie in the object more often than chance", OURS, "not a figure of the paper",
                        "fraction minus the object's area: " + rule.partition(", ")[2], above(gap), f"{gap:+.3f}",
                        count="seeds")
    yield from results.unmeasured("table of the repository", "see the README [repo table]", {
        "MAE, weighted F, E and S on COD10K, CAMO and CHAMELEON": "SAM ViT-H, LLaVA and the data sets"})


study = Study("gensam: masks from one task text", measure, claims, show, full=Scale(), quick=Scale(2, 2, 1))
