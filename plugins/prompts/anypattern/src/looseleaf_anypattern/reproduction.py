"""The paper's claims on small vision transformers of clip art, stamps and photos: is the shown example used?"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from looseleaf import Claim, Report
from looseleaf.modes import own_random_state
from looseleaf.statistics import Interval
from looseleaf_anypattern import CopyMetric, ImageStacker, StackedEncoder, apply, copy_task, encode, keyed, train
from looseleaf_anypattern.patterns import Pattern, find
from looseleaf_anypattern.retrieval import normalized
from looseleaf_lab import data, models
from looseleaf_lab.study import Results, Study, above, add_table, every, resampled

SIDE = 32
KINDS = ("colours", "blocks", "warp")
NATURAL = ("rotate", "invert", "jpeg", "text", "crop", "noise", "pixelate", "hue", "elastic", "erase", "solarise",
           "stripes", "zoom-blur", "collage", "kaleidoscope", "ink")
BASE = [p for n in range(8) for p in (*(keyed(kind, n) for kind in KINDS), *find(NATURAL[2 * n:2 * n + 2]))]
"""40 patterns to learn; the first 5 and 20 have the same parts of each kind."""
NOVEL = {"keyed": [keyed("colours", 100), keyed("colours", 101), keyed("blocks", 100), keyed("warp", 100)],
         "natural": find(("polar", "heat-map", "voronoi", "meme"))}
MODES = ("right", "retrieved", "self", "wrong")
"""A pair of the query's own pattern; the one that ImageStacker chooses; none; a pair of another novel pattern."""
OURS = "what counts as working here, fixed before measuring"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        steps, batch, lr: of each training.
        margin, scale: of its losses.
        queries: of each novel pattern.
        limits: most pictures to train on, references, support originals and background pictures.
        samples: resamples of queries.
        stand_in: made-up pictures and no EfficientNet, for tests.
    """

    steps: int = 500
    batch: int = 64
    lr: float = 2e-3
    margin: tuple[float, float] = (0.0, 0.1)
    scale: float = 16.0
    queries: int = 60
    limits: tuple[int, int, int, int] = (900, 300, 80, 200)
    samples: int = 500
    stand_in: bool = False


@functools.cache
def parts(stand_in: bool, limits: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Pictures to train on, references, support originals and background, uint8 (n, 32, 32, 3), without duplicates;
    divided by content, so that no picture is in two parts."""
    reader, rows = encoder(0, 1), []
    for name in ("stamps", "photos", "clip-art"):
        found = data.stand_in(name, 40) if stand_in else data.pictures(name)
        assert isinstance(found, data.Pictures)
        rows += list(reader.keep(list(found.images[::1 if len(found.images) < 2000 else 5])))
    keys = [{"key": data.key(row.tobytes())} for row in {row.tobytes(): row for row in rows}.values()]
    different = list({row.tobytes(): row for row in rows}.values())
    split = data.split(keys, "anypattern", train=0.6, references=0.2, support=0.06, background=0.14)
    return tuple(np.stack([different[n] for n in places[:limit]])
                 for places, limit in zip(split.values(), limits, strict=True))


class SideBySide(nn.Module):
    """The alternative to stacking: three times the tokens, each picture with a role of its own."""

    def __init__(self, vit: ViTModel) -> None:
        super().__init__()
        self.vit, self.roles = vit, nn.Parameter(0.02 * torch.randn(3, 1, 1, vit.config.hidden_size))

    def forward(self, stack: Tensor) -> Tensor:
        """(B, 9, H, W) -> (B, width); the widened filters see three channels and six of zeros."""
        tokens = [self.vit.embeddings(torch.cat([part, torch.zeros_like(stack[:, :6])], 1)) + role
                  for part, role in zip(stack.split(3, 1), self.roles, strict=True)]
        hidden = torch.cat(tokens, 1)
        for layer in self.vit.layers:
            hidden = layer(hidden, None)
        normal: Tensor = self.vit.layernorm(hidden)
        return normal[:, 0]


def encoder(seed: int, patterns: int, side_by_side: bool = False) -> StackedEncoder:
    """A small untrained encoder."""
    with own_random_state(seed):
        vit = ViTModel(ViTConfig(hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=384,
                                 image_size=SIDE, patch_size=8), add_pooling_layer=False)
        base = SideBySide(vit) if side_by_side else vit
    return StackedEncoder(base, n_patterns=patterns, descriptor=96, init="zero" if side_by_side else "random",
                          size=SIDE, seed=seed)


def trained(seed: int, scale: Scale, patterns: int, context: Any = "exact", side_by_side: bool = False) -> \
        tuple[StackedEncoder, float]:
    """An encoder trained on the first so many patterns, and the CPU seconds it took."""
    found, began = encoder(seed, patterns, side_by_side), time.process_time()
    train(found, list(parts(scale.stand_in, scale.limits)[0]), BASE[:patterns], seed, steps=scale.steps,
          batch=scale.batch, lr=scale.lr, margin=scale.margin, scale=scale.scale, most=1, context=context)
    return found.eval(), time.process_time() - began


@dataclasses.dataclass(frozen=True)
class Asked:
    """Queries of novel patterns of one kind: pictures, rows of their references, their patterns, and context pairs by
    mode; ``support`` is (replica, original, pattern), ten of each pattern."""

    queries: np.ndarray
    rows: np.ndarray
    patterns: list[str]
    contexts: dict[str, tuple[np.ndarray, np.ndarray]]
    support: list[tuple[np.ndarray, np.ndarray, str]]


def asked(seed: int, scale: Scale, patterns: Sequence[Pattern]) -> Asked:
    """Draw them; support originals are neither trained on nor references."""
    _, references, originals, _ = parts(scale.stand_in, scale.limits)
    rng = np.random.default_rng([seed, 7])
    pairs = {p.name: [(apply([p], originals[n], rng), originals[n]) for n in rng.integers(len(originals), size=10)]
             for p in patterns}
    rows, names, queries, right, wrong = [], [], [], [], []
    for number, one in enumerate(patterns):
        for row in rng.choice(len(references), scale.queries, replace=len(references) < scale.queries):
            queries.append(apply([one], references[row], rng))
            rows.append(row)
            names.append(one.name)
            other = patterns[(number + int(rng.integers(1, len(patterns)))) % len(patterns)]
            right.append(pairs[one.name][int(rng.integers(10))])
            wrong.append(pairs[other.name][int(rng.integers(10))])
    contexts = {mode: (np.stack([p[0] for p in chosen]), np.stack([p[1] for p in chosen]))
                for mode, chosen in (("right", right), ("wrong", wrong))}
    support = [(*pair, name) for name, of in pairs.items() for pair in of]
    return Asked(np.stack(queries), np.array(rows), names, contexts, support)


def measure(seed: int, scale: Scale) -> Row:
    """All encoders of a seed on all novel patterns."""
    ways: dict[str, dict[str, Any]] = {"40": {"patterns": 40}, "40, no context": {"patterns": 40, "context": "none"},
            "20": {"patterns": 20}, "5": {"patterns": 5}, "5, no context": {"patterns": 5, "context": "none"},
            "tokens": {"patterns": 40, "side_by_side": True}}
    row: Row = {"muAP": {}, "recall@1": {}, "seconds": {}, "off": {}, "best": {}, "chosen": {}}
    for way, options in ways.items():
        found, row["seconds"][way] = trained(seed, scale, **options)
        for kind, patterns in NOVEL.items():
            result = evaluated(found, asked(seed, scale, patterns), scale)
            for name, value in result.items():
                if way == "40" or name in ("muAP", "recall@1"):
                    row[name].setdefault(way, {})[kind] = value
    return row


def evaluated(model: StackedEncoder, what: Asked, scale: Scale) -> Row:
    """muAP and recall@1 by mode, muAP without normalisation, the ten best of each query, and what was chosen."""
    _, references, _, behind = parts(scale.stand_in, scale.limits)
    where = encode(model, references).descriptor
    background = encode(model, behind).descriptor
    prompt = ImageStacker().optimize(copy_task(what.support), model, progress=False)
    detector = prompt.on(model)
    queries = {"retrieved": detector.describe(what.queries), "self": encode(model, what.queries).descriptor, **{
        mode: encode(model, what.queries, pair).descriptor for mode, pair in what.contexts.items()}}
    correct = what.rows[:, None] == np.arange(len(references))
    row: Row = {name: {mode: CopyMetric(name).of(queries[mode], where, background, correct)  # type: ignore[arg-type]
                       for mode in MODES} for name in ("muAP", "recall@1")}
    row["off"] = CopyMetric(normalize_factor=0).of(queries["retrieved"], where, None, correct)
    row["best"] = {mode: ten_best(queries[mode], where, background, correct) for mode in MODES}
    picked = [c[0].pattern for c in detector.select(what.queries, 1)]
    histogram = nearest(colours(what.queries), colours(np.stack([s[0] for s in what.support])))
    row["chosen"] = {name: float(np.mean([a == b for a, b in zip(names, what.patterns, strict=True)]))
                     for name, names in (("pattern token", picked),
                                         ("colour histogram", [what.support[n][2] for n in histogram]))}
    return row


def ten_best(queries: Tensor, references: Tensor, background: Tensor, correct: np.ndarray) -> list[Any]:
    """Scores of the ten best references of each query, and which of them is right."""
    best = normalized(queries @ references.T, queries, background).topk(min(10, len(references)), 1)
    return [best.values.tolist(), np.take_along_axis(correct, best.indices.numpy(), 1).astype(int).tolist()]


def colours(pictures: np.ndarray) -> Tensor:
    """Histograms of 4 x 4 x 4 colours, (n, 64), of length 1."""
    bins = (pictures // 64).astype(int) @ np.array([16, 4, 1])
    counts = np.stack([np.bincount(row.ravel(), minlength=64) for row in bins])
    return F.normalize(torch.from_numpy(counts).float().sqrt(), dim=1)


def nearest(queries: Tensor, pairs: Tensor) -> list[int]:
    """The most similar pair of each query."""
    found: list[int] = (queries @ pairs.T).argmax(1).tolist()
    return found


def hashes(pictures: np.ndarray) -> Tensor:
    """A perceptual hash: signs of differences of neighbours in 9 x 8 grey, (n, 64), of length 1."""
    grey = torch.from_numpy(pictures).float().mean(-1)[:, None]
    small = F.interpolate(grey, (8, 9), mode="area")[:, 0]
    return F.normalize(torch.sign(small[..., 1:] - small[..., :-1]).flatten(1) + 1e-6, dim=1)


def undone(query: np.ndarray, replica: np.ndarray, original: np.ndarray) -> np.ndarray:
    """The query with its colours mapped back by what the pair shows: for each channel of the original, the channel of
    the replica that tells most about it, and the mean value that went with each of 32 levels."""
    out = np.zeros(query.shape)
    levels = replica // 8
    for c in range(3):
        fits = []
        for d in range(3):
            flat, values = levels[..., d].ravel(), original[..., c].ravel().astype(float)
            counts = np.bincount(flat, minlength=32)
            table = np.bincount(flat, values, 32) / counts.clip(1)
            seen = counts > 0
            table = np.interp(np.arange(32), np.arange(32)[seen], table[seen])
            fits.append((float(np.square(values - table[flat]).mean()), d, table))
        _, d, table = min(fits, key=lambda fit: fit[0])
        out[..., c] = table[query[..., d] // 8]
    return out


def once(scale: Scale) -> Row:
    """What needs no training: can the pair decide, what do a hash and frozen features find (queries of seed 0)."""
    _, references, _, behind = parts(scale.stand_in, scale.limits)
    row: Row = {"undo": {}, "frozen": {}}

    def flat(pictures: np.ndarray) -> Tensor:
        x = torch.from_numpy(pictures).float().flatten(1)
        return F.normalize(x - x.mean(1, keepdim=True), dim=1)

    what = asked(0, scale, NOVEL["keyed"][:2])
    correct = what.rows[:, None] == np.arange(len(references))
    for mode in ("right", "self", "wrong"):
        shown = np.stack([undone(q, *pair) for q, *pair in zip(what.queries, *what.contexts[mode], strict=True)]) \
            if mode != "self" else what.queries
        row["undo"][mode] = CopyMetric(normalize_factor=0).of(flat(shown), flat(references), None, correct)
    features: dict[str, Any] = {"hash": hashes}
    if not scale.stand_in:
        network, preprocess = models.load("efficientnet-lite0")

        def frozen(pictures: np.ndarray) -> Tensor:
            with torch.no_grad():
                return F.normalize(torch.cat([network.features(preprocess(pictures[n:n + 32]))
                                              for n in range(0, len(pictures), 32)]), dim=1)

        features["EfficientNet"] = frozen
    for name, function in features.items():
        where, background = function(references), function(behind)
        for kind, patterns in NOVEL.items():
            what = asked(0, scale, patterns)
            correct = what.rows[:, None] == np.arange(len(references))
            queries = function(what.queries)
            picked = nearest(queries, function(np.stack([s[0] for s in what.support])))
            row["frozen"].setdefault(name, {})[kind] = {
                "muAP": CopyMetric().of(queries, where, background, correct),
                "chosen": float(np.mean([what.support[n][2] == p for n, p in zip(picked, what.patterns, strict=True)]))}
    return row


def gap(results: Results, kind: str, ours: str, theirs: str) -> Interval:
    """Difference of muAP of two modes of the main encoder, mean over seeds, 95 % bootstrap over queries."""
    both = [[tuple(np.array(x) for x in best[mode]) for mode in (ours, theirs)]
            for best in results.values("best", "40", kind)]

    def statistic(units: np.ndarray) -> np.ndarray:
        return np.array([np.mean([area(a, u) - area(b, u) for a, b in both]) for u in units])

    return resampled(len(both[0][0][0]), statistic, samples=results.scale.samples)


def area(best: tuple[np.ndarray, ...], queries: np.ndarray) -> float:
    """muAP of these queries, of the ten best of each; each has one original."""
    scores, right = (x[queries].ravel() for x in best)
    ordered = right[np.lexsort((right, -scores))]
    return float((ordered * ordered.cumsum() / np.arange(1, len(ordered) + 1)).sum() / len(queries))


def show(report: Report, results: Results) -> None:
    """Tables, and a few patterns as pictures."""
    for kind in NOVEL:
        add_table(report, f"muAP on novel {kind} patterns", ({"trained on": way, **{
            mode: results.interval("muAP", way, kind, mode) for mode in MODES},
            "CPU seconds": results.mean("seconds", way)} for way in results.rows[0]["muAP"]),
            note="Mean over seeds, 95 % bootstrap over seeds. tokens: 40 patterns, three times the tokens.")
    add_table(report, "Without training, queries of seed 0", ({"features": name, **{
        f"{kind} {m}": value for kind, row in kinds.items() for m, value in row.items()}}
        for name, kinds in results.once["frozen"].items()))
    picture = parts(results.scale.stand_in, results.scale.limits)[1][0]
    for kind, patterns in NOVEL.items():
        report.image(f"novel {kind} patterns", [picture, *(apply([p], picture) for p in patterns)],
                     captions=("original", *(p.name for p in patterns)))


def claims(results: Results) -> Iterator[Claim]:
    """The paper's statements and the card's, by rules fixed before measuring."""
    claim = results.claim
    undo, none = results.once["undo"], "not a figure of the paper"
    yield claim("Control: the pair of a keyed pattern is enough to undo it", OURS, none,
                "colours mapped back by the pair: muAP with the right pair at least 0.3 above none and a wrong one",
                undo["right"] - max(undo["self"], undo["wrong"]) > 0.3,
                ", ".join(f"{mode} {value:.3f}" for mode, value in undo.items()))
    over = "95 % bootstrap over queries, mean of seeds: above 0 holds, below 0 does not hold, else not shown"
    for kind in NOVEL:
        for ours, theirs, words in (("right", "self", "The right pair helps"), ("self", "wrong", "A wrong pair harms"),
                                    ("retrieved", "self", "The pair that is retrieved helps")):
            found = gap(results, kind, ours, theirs)
            yield claim(f"{words}, novel {kind} patterns", "abstract, in words",
                        "+16.75 muAP by context [abstract], 10 novel patterns", f"muAP {ours} - {theirs}: {over}",
                        above(found), f"{found:+.3f}", count="seeds")
    seeds = "95 % bootstrap over seeds: above 0 holds, below 0 does not hold, else not shown"

    def differences(*pairs: tuple[tuple[Any, ...], tuple[Any, ...]]) -> tuple[bool | None, str]:
        found = [results.interval(*one, minus=other) for one, other in pairs]
        return every(*map(above, found)), ", ".join(f"{i:+.3f}" for i in found)

    def both(way: str, mode: str) -> list[tuple[Any, ...]]:
        return [("muAP", way, kind, mode) for kind in NOVEL]

    for words, source, paper, left, right in (
            ("Training and asking with context beats both without", "abstract", "+16.75 muAP [abstract]",
             both("40", "retrieved"), both("40, no context", "self")),
            ("More patterns help without context: 40 beat 5", "abstract", "+26.66 muAP by many patterns [abstract]",
             both("40, no context", "self"), both("5, no context", "self")),
            ("Stacking beats three times the tokens, equal steps", "abstract, in words", none, both("40", "right"),
             both("tokens", "right"))):
        yield claim(words, source, paper, f"muAP, keyed and natural novel patterns, both: {seeds}",
                    *differences(*zip(left, right, strict=True)), count="seeds")
    gaps = {way: [a - b for a, b in zip(results.values("muAP", way, "keyed", "right"),
                                        results.values("muAP", way, "keyed", "self"), strict=True)]
            for way in ("5", "20", "40")}
    more = resampled(len(gaps["5"]), lambda u: np.array([np.mean([gaps["40"][n] - gaps["5"][n] for n in row])
                                                         for row in u]), samples=results.scale.samples)
    yield claim("The use of context emerges with many patterns", "abstract",
                "no in-context ability without the large pattern set [abstract]",
                f"(right - self) with 40 patterns minus the same with 5, keyed: {seeds}", above(more),
                f"{more:+.3f}; gaps " + ", ".join(f"{way}: {np.mean(g):+.3f}" for way, g in gaps.items()),
                count="seeds")
    cost = results.interval("seconds", "tokens", minus=("seconds", "40"))
    yield claim("Stacking is cheaper than three times the tokens", OURS, none, f"CPU seconds of training: {seeds}",
                above(cost), f"{cost:+.1f} s", count="seeds")
    yield claim("The pattern token chooses better than a colour histogram", OURS, none,
                f"fraction of pairs of the right pattern of four, keyed and natural, both: {seeds}",
                *differences(*((("chosen", "40", kind, "pattern token"), ("chosen", "40", kind, "colour histogram"))
                               for kind in NOVEL)), count="seeds")
    chance = [Interval(*(v - 0.25 for v in results.interval("chosen", "40", kind, "pattern token"))) for kind in NOVEL]
    yield claim("The pattern token chooses better than chance", OURS, none, f"the same minus 1/4: {seeds}",
                every(*map(above, chance)), ", ".join(f"{i:+.3f}" for i in chance), count="seeds")
    yield claim("The normalisation of scores helps", "official evaluation", "no figure",
                f"muAP retrieved, factor 2 minus factor 0, both: {seeds}",
                *differences(*((("muAP", "40", kind, "retrieved"), ("off", "40", kind)) for kind in NOVEL)),
                count="seeds")
    yield from results.unmeasured("repository", "in the repository's table [repo]", {
        "muAP 56.65 (rerun 56.82), recall@1 60.86 (60.59), recall at 90 % precision 54.04 (rerun), 25,000 queries":
            "the AnyPattern data and its trainings", "Style mimicry, a million references": "their data and models"})


study = Study("anypattern: an example of the edit in the channels", measure, claims, show, once, full=Scale(),
              quick=Scale(steps=20, batch=16, queries=8, limits=(100, 60, 30, 30), samples=100), quick_seeds=1)
