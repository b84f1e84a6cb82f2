"""DiffusionPID's claims: coloured things in emoji-diffusion, and planted redundancy, synergy and bias."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looseleaf import Claim, Report
from looseleaf.statistics import auroc, bootstrap, paired, spearman
from looseleaf_diffusionpid import planted
from looseleaf_diffusionpid.baselines import attention_maps
from looseleaf_diffusionpid.denoisers import PipelineDenoiser, as_picture
from looseleaf_diffusionpid.information import Observation, decompose, logistic_samples, observe, with_errors
from looseleaf_lab import models, scenes
from looseleaf_lab.study import Results, Study, above, add_table, below, every
from looseleaf_lab.training import fit

OURS = "this project's rule"
MAPS = ("U1", "CMI", "MI", "attention", "random", "attention and CMI")
ESTIMATORS = ("orthogonal", "standard")
emoji = functools.cache(functools.partial(models.load, "emoji-diffusion"))


@dataclasses.dataclass(frozen=True)
class Scale:
    """Pictures of emoji and noisy samples of each; training steps, pictures of a pair and samples of the world."""

    pictures: int = 4
    samples: int = 24
    steps: int = 3000
    rows: int = 12
    levels: int = 64


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """One seed: other scenes of emoji, another planted world and a network trained on it."""
    return {"emoji": of_emoji(seed, scale), "world": of_world(seed, scale)}


# ---------------------------------------------------------------------------------------------- pictures of emoji
class Remembering:
    """A denoiser that runs each text once on the same noisy pictures."""

    def __init__(self, denoiser: PipelineDenoiser) -> None:
        self.denoiser, self.known = denoiser, dict[str, Tensor]()
        self.nearest = denoiser.nearest

    def eps(self, z: Tensor, log_snr: Tensor, condition: Sequence[str]) -> Tensor:
        """As :meth:`PipelineDenoiser.eps`, for rows text by text."""
        texts = list(dict.fromkeys(condition))
        for text, rows, a in zip(texts, z.chunk(len(texts)), log_snr.chunk(len(texts)), strict=True):
            if text not in self.known:
                self.known[text] = self.denoiser.eps(rows, a, [text] * len(rows))
        return torch.cat([self.known[text] for text in texts])


def of_emoji(seed: int, scale: Scale) -> dict[str, Any]:
    """Scenes of two coloured things: how well maps of the words find them, standard errors, and rough curves."""
    denoiser, painter = PipelineDenoiser(emoji()[0]), scenes.Painter()
    draw, out = random.Random(f"diffusionpid {seed}"), []
    for _ in range(scale.pictures):
        one, two = (scenes.Thing(thing.name, draw.choice(list(scenes.COLOURS))) for thing in scenes.draw(draw, two=1.0))
        while two.colour == one.colour:
            two = scenes.Thing(two.name, draw.choice(list(scenes.COLOURS)))
        out.append(of_scene(denoiser, painter.scene((one, two), draw), draw.randrange(2 ** 31), scale.samples))
    return {key: [row[key] for row in out] for key in out[0]}


def of_scene(denoiser: PipelineDenoiser, scene: scenes.Scene, seed: int, samples: int) -> dict[str, Any]:
    """AUROC and best IoU of each map of :data:`MAPS`, both things averaged, and what the first words' samples say."""
    (one, two), draw, known = scene.things, torch.Generator().manual_seed(seed), Remembering(denoiser)
    x = denoiser.latent(as_picture(scene.image))
    a, weights = logistic_samples(samples, generator=draw)
    noise = torch.randn(samples, *x.shape, generator=draw)

    def seen(*texts: str) -> Observation:
        return observe(known, x, texts, a, weights, noise, batch=samples * len(texts))

    with denoiser.ready():
        left, right, none = (f"a {first} left of a {second}" for first, second in (
            (one, two.name), (one.name, two), (one.name, two.name)))
        colours, full = seen(none, left, right, scene.caption), scene.caption
        parts = decompose(*colours.orthogonal_map[1:])  # type: ignore[misc]
        maps: dict[str, Any] = {"U1": (parts.U1, parts.U2), "CMI": seen(full, right, left).orthogonal_map[1:],
                                "MI": seen("", str(one.colour), str(two.colour)).orthogonal_map[1:],
                                "attention": attention_maps(denoiser, x, full, [str(one.colour), str(two.colour)],
                                                            log_snr=a, noise=noise, batch=samples)}
    maps["random"] = torch.rand(2, *x.shape[1:], generator=draw)
    maps["attention and CMI"] = [m / m.max() + n / n.max() for m, n in zip(maps["attention"], maps["CMI"],
                                                                          strict=True)]
    halves = {name: np.asarray([np.asarray(m) for m in maps[name]]) for name in MAPS}
    curves = {name: (colours.weights * getattr(colours, name)[3])[colours.log_snr.argsort()] for name in ESTIMATORS}
    few, many = (with_errors(colours.contributions("orthogonal")[1:, :count])["I12"][1] for count in (samples // 4,
                                                                                                  samples))
    return {"auroc": {name: float(np.mean([auroc(m[mask], m[~mask]) for m, mask in zip(value, scene.masks,
                                                                                     strict=True)]))
                      for name, value in halves.items()},
            "iou": {name: float(np.mean([best_iou(m, mask) for m, mask in zip(value, scene.masks, strict=True)]))
                    for name, value in halves.items()},
            "roughness": {name: float(curve.diff().abs().sum() / curve.abs().sum()) for name, curve in curves.items()},
            "negative": float((colours.standard_map[3] < 0).double().mean()), "errors": [few, many],
            "terms": {e: {name: value for name, (value, _) in with_errors(colours.contributions(e)[1:]).items()}
                      for e in ESTIMATORS}}


def best_iou(values: np.ndarray, mask: np.ndarray) -> float:
    """Intersection over union of a mask and what lies above the best of 40 thresholds."""
    chosen = [values >= limit for limit in np.quantile(values, np.linspace(0.5, 0.99, 40))]
    return max(float((c & mask).sum() / (c | mask).sum()) for c in chosen)


# ------------------------------------------------------------------------------------------------ the planted world
def of_world(seed: int, scale: Scale) -> dict[str, Any]:
    """What the exact denoiser and a trained one say of pairs of words whose relation is planted."""
    world = planted.World(seed)
    draw, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    pictures, bags = world.captions(5 * scale.steps + 256, draw)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = planted.Learned(pictures[:160] + planted.STD * torch.randn(160, *pictures.shape[1:]))

    def loss(step: int) -> Tensor:
        rows = torch.randint(0, len(bags), (256,), generator=noise)
        return network.loss(pictures[rows], bags[rows], noise)

    losses = fit(network, loss, steps=scale.steps, optimizer=functools.partial(torch.optim.Adam, lr=3e-3), clip=1.0,
                 factor=lambda step: min(1.0, (step + 1) / 100) * 0.5 * (1 + float(np.cos(np.pi * step / scale.steps))),
                 progress=False)
    found = {name: of_pairs(denoiser, world, seed, scale)
             for name, denoiser in (("exact", world), ("trained", network.eval()))}
    return {**found, "loss": float(np.mean(losses[-50:]))}


def of_pairs(denoiser: Any, world: planted.World, seed: int, scale: Scale) -> dict[str, Any]:
    """Fractions of I12 of each kind of pair, ranks of the bias by R, and what dropping a word changes."""
    draw = torch.Generator().manual_seed(seed + 1)
    shapes = range(planted.SHAPES)
    biased = [(planted.NAMES[k], planted.HUES[planted.favourite(k)]) for k in shapes]
    synonyms = list(zip(planted.NAMES, planted.SYNONYMS, strict=True))
    switches = [(f"u{n // 2}", f"v{n % 2}") for n in range(4)]
    both = {"synonyms": synonyms, "independent words": biased[:1], "XOR": switches}
    fractions: dict[str, dict[str, dict[str, float]]] = {e: {} for e in ESTIMATORS}
    for kind, pairs in both.items():
        rows = [terms(denoiser, world, f"{a} {b}", a, b, draw, scale) for a, b in pairs]
        for e in ESTIMATORS:
            sums = {name: float(np.mean([row[e][name] for row in rows])) for name in rows[0][e]}
            fractions[e][kind] = {name: sums[name] / sums["I12"] for name in ("R", "U1", "U2", "S")} | {
                "I12": sums["I12"]}
    of_bias = [terms(denoiser, world, a, a, b, draw, scale) for a, b in biased]  # pictures of the name alone
    pairs = [*biased, *synonyms, *switches]
    asked = [terms(denoiser, world, f"{a} {b}", a, b, draw, scale) for a, b in pairs]
    change = [dropped(denoiser, world, a, b, draw, scale) for a, b in pairs]
    return {"fractions": fractions, "change": change, "R": [row["orthogonal"]["R"] for row in asked],
            "bias": {e: [row[e]["R"] for row in of_bias] for e in ESTIMATORS},
            "bias rank": {e: spearman([row[e]["R"] for row in of_bias], planted.BIASES) for e in ESTIMATORS},
            "intervention": {
                "all pairs": spearman([row["orthogonal"]["R"] for row in asked], change),
                "biased pairs": spearman([row["orthogonal"]["R"] for row in asked[:len(biased)]], change[:len(biased)]),
                "all pairs, CMI": spearman([row["orthogonal"]["U2"] + row["orthogonal"]["S"] for row in asked], change),
                "biased pairs, CMI": spearman([row["orthogonal"]["U2"] + row["orthogonal"]["S"]
                                               for row in asked[:len(biased)]], change[:len(biased)])}}


def terms(denoiser: Any, world: planted.World, prompt: str, y1: str, y2: str, draw: torch.Generator,
          scale: Scale) -> dict[str, dict[str, float]]:
    """Mean terms of pictures of a prompt, by estimator."""
    texts = [world.add(text) for text in ("", y1, y2, f"{y1} {y2}")]
    rows = []
    for x in world.sample(world.add(prompt), scale.rows, draw).float():
        a, weights = logistic_samples(scale.levels, loc=-3.0, scale=1.0, clip=4.0, generator=draw)
        noise = torch.randn(scale.levels, *x.shape, generator=draw)
        seen = observe(denoiser, x, texts, a, weights, noise, batch=4 * scale.levels)
        rows.append({e: with_errors(seen.contributions(e)[1:]) for e in ESTIMATORS})
    return {e: {name: float(np.mean([row[e][name][0] for row in rows])) for name in rows[0][e]} for e in ESTIMATORS}


def dropped(denoiser: Any, world: planted.World, y1: str, y2: str, draw: torch.Generator, scale: Scale) -> float:
    """Mean squared change of a picture, summed over pixels, when the second word leaves the prompt."""
    noise = torch.randn(2 * scale.rows, 3, planted.SIZE, planted.SIZE, generator=draw)
    full, less = (planted.sample(denoiser, [world.add(text)] * len(noise), noise) for text in (f"{y1} {y2}", y1))
    return float((full - less).square().sum((1, 2, 3)).mean())


# ----------------------------------------------------------------------------------------------------------- results
def pooled(results: Results, *path: str) -> list[float]:
    """A number of every picture of every seed."""
    return [_in(row, path[1:]) for row in results.joined("emoji", path[0])]


def _in(row: Any, path: Sequence[str]) -> float:
    for key in path:
        row = row[key]
    return float(row)


def show(report: Report, results: Results) -> None:
    """Maps against masks, the world's fractions, biases and interventions."""
    report.facts |= {"model": "emoji-diffusion (self-trained); a small network on planted pictures (trained here)",
                     "pictures": len(pooled(results, "negative")), **dataclasses.asdict(results.scale)}
    add_table(report, "Maps of words against the masks of their things", (
        {"map": name, "AUROC": bootstrap(pooled(results, "auroc", name)),
         "best IoU": bootstrap(pooled(results, "iou", name))} for name in MAPS),
        "two things a picture; 95 % bootstrap over pictures")
    add_table(report, "Two colours in a scene", (
        {"estimator": e, **{name: float(np.mean(pooled(results, "terms", e, name)))
                            for name in ("I1", "I2", "I12", "R", "U1", "U2", "S")}} for e in ESTIMATORS), "nats")
    add_table(report, "Planted pairs", (
        {"denoiser": d, "pair": kind, "estimator": e, **{
            name: results.mean("world", d, "fractions", e, kind, name) for name in ("R", "U1", "U2", "S", "I12")}}
        for d in ("exact", "trained") for kind in results.rows[0]["world"][d]["fractions"]["standard"]
        for e in ESTIMATORS), "fractions of I12; I12 in nats")
    add_table(report, "Planted bias: R of pictures of the name", (
        {"bias": bias, **{f"{d}, {e}": results.mean("world", d, "bias", e, n)
                          for d in ("exact", "trained") for e in ESTIMATORS}}
        for n, bias in enumerate(planted.BIASES)), "nats")
    add_table(report, "Dropping the second word: rank correlation of the change with R, and with U2 + S", (
        {"denoiser": d, "pairs": name, "Spearman": results.interval("world", d, "intervention", name)}
        for d in ("exact", "trained") for name in results.rows[0]["world"][d]["intervention"]), "over seeds")


def claims(results: Results) -> Iterator[Claim]:
    """The claims of the paper, of Info-Decomp and of this project; rules were set before measuring."""
    claim = functools.partial(results.claim, count="seeds")
    scores = {name: pooled(results, "auroc", name) for name in MAPS}
    own = bootstrap(scores["U1"])
    yield claim("The unique part marks the thing of its word", "paper, abstract and figures", "-",
                "AUROC of U1: interval above 0.5", above(own, 0.5), f"AUROC {own:.3f}")
    for name in ("CMI", "MI", "attention"):
        lead = paired(scores["U1"], scores[name])
        yield claim(f"It does so better than {name}", OURS, "-", "paired difference of AUROC: interval above 0",
                    above(lead), f"{lead:+.3f}")
    iou = {name: pooled(results, "iou", name) for name in MAPS}
    best = [paired(iou["attention and CMI"], iou[name]) for name in ("attention", "CMI")]
    yield claim("Attention and CMI together find things better than each alone", "Info-Decomp, README",
                "mIoU 42.7 against 34.9 and 33.2 on COCO-IT, SD 2.1",
                "paired differences of best IoU: intervals above 0", every(*(above(b) for b in best)),
                f"{best[0]:+.3f} over attention, {best[1]:+.3f} over CMI")
    rough = paired(pooled(results, "roughness", "orthogonal"), pooled(results, "roughness", "standard"))
    yield claim("Curves of the orthogonal estimator are smoother", "paper, figures", "-",
                "paired difference of relative total variation: interval below 0", below(rough), f"{rough:+.2f}")
    ratio = bootstrap([few / many for few, many in results.joined("emoji", "errors")])
    yield claim("Standard errors fall as the root of the samples", OURS, "-",
                "a quarter of the samples: mean ratio of 1.7 to 2.3", 1.7 <= ratio.value <= 2.3, f"{ratio:.2f}")
    world = functools.partial(results.interval, "world", "trained")
    for kind, part in (("synonyms", "R"), ("XOR", "S")):
        value, exact = (results.interval("world", d, "fractions", "orthogonal", kind, part)
                        for d in ("trained", "exact"))
        yield claim(f"{'Redundancy' if part == 'R' else 'Synergy'} is found where it was planted: {kind}",
                    f"paper, abstract; {OURS}", "-",
                    f"{part} / I12: mean of the exact denoiser at least 0.99, of the trained one 0.75",
                    exact.value >= 0.99 and value.value >= 0.75, f"exact {exact:.3f}, trained {value:.3f}")
    apart = results.interval("world", "trained", "fractions", "orthogonal", "independent words", "R")
    yield claim("Independent words have no redundancy", OURS, "-",
                "R / I12 of the trained denoiser below 0.1 in the mean", apart.value < 0.1, f"{apart:.3f}; S / I12 "
                f"{results.mean('world', 'trained', 'fractions', 'orthogonal', 'independent words', 'S'):.3f}")
    for e in ESTIMATORS:
        rank = world("bias rank", e)
        yield claim(f"R of the {e} estimator ranks names by their bias", "paper, abstract",
                    "recovers gender and ethnicity bias", "Spearman over 8 names: interval above 0", above(rank),
                    f"{rank:.2f}; exact denoiser {results.interval('world', 'exact', 'bias rank', e):.2f}")
    for name in ("all pairs", "biased pairs"):
        rank = world("intervention", name)
        yield claim(f"The picture changes less without a word of high R: {name}", "paper, figures", "-",
                    "Spearman of change and R: interval below 0", below(rank, touching=True),
                    f"{rank:.2f}; with U2 + S {world('intervention', f'{name}, CMI'):.2f}")
    yield from results.unmeasured("paper, abstract; Info-Decomp, README", "ARO VG-A 72.0 against 64.6; figures", {
        "Gender and ethnicity of 188 occupations; homonyms, synonyms, co-hyponyms; COCO-IT; ARO":
            "Stable Diffusion 2.1, `DiffusionPID().run(pipeline, data)`, and a GPU"})


study = Study("DiffusionPID on emoji and planted words", measure, claims, show=show, full=Scale(), quick_seeds=1,
              quick=Scale(pictures=1, samples=8, steps=150, rows=2, levels=16))
