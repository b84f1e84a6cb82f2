"""The abstract's claims on expressions composed of real digits and jittered strokes, with their LaTeX and boxes."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from looseleaf import Claim, Report
from looseleaf.statistics import Interval, auroc, bootstrap, paired
from looseleaf_lab import data
from looseleaf_lab.study import Results, Study, above, add_table, curve, every
from looseleaf_lab.training import fit, warmup_cosine
from looseleaf_mask_and_match.backend import MaskAndMatch, attended, draw_map
from looseleaf_mask_and_match.contrast import ContrastivePretraining
from looseleaf_mask_and_match.latex import LatexVocabulary, latex_tokens, token_errors
from looseleaf_mask_and_match.masking import hidden_cells, hide, hiding_order, ink_in_cells, ink_of
from looseleaf_mask_and_match.recognizer import FormulaEncoder, FormulaEncoderConfig, FormulaRecognizer

GRID = (4, 12)
RATIOS = (0.0, 0.15, 0.3, 0.45, 0.6)
"""Of hidden ink, under which maps are compared."""
ENCODERS = {"global": {"local_weight": 0.0}, "local": {"global_weight": 0.0}, "global + local": {}}
MAPS = {"progressive": {}, "constant": {"mask_start": 0.35, "mask_end": 0.35},
        "none": {"mask_start": 0.0, "mask_end": 0.0}}
READERS = ("scratch", "stage 1", "stages 1 and 2")
OPERATORS = ("+", "-", "\\times", "\\frac")
OURS = "what counts as working here, fixed before measuring"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        images, test: expressions without labels, and those of the test.
        labels: how many labelled ones stage 3 gets.
        steps: of each stage.
        batches: images in a batch of each stage.
        stand_in: made-up images, for tests.
    """

    images: int = 2000
    test: int = 300
    labels: tuple[int, ...] = (200, 1000)
    steps: tuple[int, int, int] = (150, 120, 300)
    batches: tuple[int, int, int] = (64, 64, 32)
    stand_in: bool = False


@dataclasses.dataclass(frozen=True)
class Expressions:
    """Images (n, 1, 64, 192) in [0, 1], their LaTeX and their symbols with box and role."""

    images: Tensor
    latex: list[str]
    symbols: list[list[tuple[str, float, float, float, float, bool]]]


# ---------------------------------------------------------------------------------------------------------------- data
def roles(latex: str) -> list[tuple[str, bool]]:
    """The symbols of an expression in the order in which they are drawn, and whether each is in an exponent."""
    tokens = latex_tokens(latex)

    def group(raised: bool) -> list[tuple[str, bool]]:
        assert tokens.pop(0) == "{"
        out = row(raised)
        tokens.pop(0)
        return out

    def row(raised: bool) -> list[tuple[str, bool]]:
        out: list[tuple[str, bool]] = []
        while tokens and tokens[0] != "}":
            token = tokens.pop(0)
            if token == "\\frac":
                out += [*group(raised), (token, raised), *group(raised)]
            elif token in ("^", "_"):
                out += group(raised or token == "^")
            else:
                out += [(token, raised), *(group(raised) if token == "\\sqrt" else ())]
        return out

    return row(False)


@functools.cache
def expressions(stand_in: bool) -> dict[str, Expressions]:
    """The set ``ink`` by part."""
    found = data.stand_in("ink", 24) if stand_in else data.pictures("ink")
    assert isinstance(found, data.Pictures)
    out = {}
    for part in ("train", "test"):
        numbers = [n for n, row in enumerate(found.rows) if stand_in or row["part"] == part]
        images = torch.from_numpy(np.stack([np.asarray(found.images[n]) for n in numbers])).float()[:, None] / 255
        if stand_in:  # they are all alike: noise in the ink tells them apart
            images *= 0.5 + 0.5 * torch.rand(images.shape, generator=torch.Generator().manual_seed(int(part == "test")))
        symbols = []
        for n in numbers:
            named = [(symbol, False) for symbol, *_ in found.rows[n]["symbols"]] if stand_in \
                else roles(found.rows[n]["latex"])
            assert [symbol for symbol, _ in named] == [s[0] for s in found.rows[n]["symbols"]]
            symbols.append([(*box, raised) for box, (_, raised) in zip(found.rows[n]["symbols"], named, strict=True)])
        out[part] = Expressions(images, [found.rows[n]["latex"] for n in numbers], symbols)
    return out


def some(of: Expressions, numbers: Tensor) -> Expressions:
    """Those of some numbers."""
    rows = numbers.tolist()
    return Expressions(of.images[numbers], [of.latex[n] for n in rows], [of.symbols[n] for n in rows])


# --------------------------------------------------------------------------------------------------------------- probes
@torch.no_grad()
def at_symbols(maps: Tensor, of: Expressions) -> Tensor:
    """Features (n, C, h, w) at the middle of each symbol, one row each."""
    out = []
    for features, symbols in zip(maps, of.symbols, strict=True):
        middles = torch.tensor([[x + w / 2, y + h / 2] for _, x, y, w, h, _ in symbols])
        at = middles / torch.tensor([96.0, 32.0]) - 1
        out.append(F.grid_sample(features[None], at[None, None], padding_mode="border", align_corners=False)[0, :, 0].T)
    return torch.cat(out)


def ridge(x: Tensor, y: Tensor, test: Tensor, strength: float = 1e-3) -> Tensor:
    """Outputs for ``test`` of a linear map from x (n, d) to y (n, k), fitted with a penalty, inputs standardised."""
    mean, spread = x.mean(0), x.std(0) + 1e-6
    x, test = (F.pad((part - mean) / spread, (0, 1), value=1.0).double() for part in (x, test))
    return test @ torch.linalg.solve(x.T @ x + strength * len(x) * torch.eye(x.shape[1]).double(), x.T @ y.double())


@torch.no_grad()
def probes(encoder: FormulaEncoder | None, train: Expressions, test: Expressions) -> Row:
    """Accuracy of the class of test symbols, and AUROC of being in an exponent; of pixels without an encoder."""
    def features(of: Expressions) -> Tensor:
        out = []
        for rows in torch.arange(len(of.images)).split(100):
            few = some(of, rows)
            if encoder is None:  # 36 x 36 pixels around each place, averaged in fours by fours
                small = F.unfold(F.avg_pool2d(few.images, 4), 9, padding=4).unflatten(2, (16, 48))
            out.append(at_symbols(small if encoder is None else encoder.feature_map(few.images), few))
        return torch.cat(out)

    x, seen = features(train), features(test)
    names, asked = ([s[0] for symbols in part.symbols for s in symbols] for part in (train, test))
    classes = sorted(set(names))
    raised, truth = (torch.tensor([s[5] for symbols in part.symbols for s in symbols]) for part in (train, test))
    found = ridge(x, F.one_hot(torch.tensor([classes.index(n) for n in names])).float(), seen).argmax(1)
    scores = ridge(x, raised.float()[:, None], seen)[:, 0]
    both = bool(truth.any()) and not bool(truth.all())
    return {"class": float(np.mean([classes[int(f)] == a for f, a in zip(found, asked, strict=True)])),
            "exponent": auroc(scores[truth].tolist(), scores[~truth].tolist()) if both else 0.5}


# ----------------------------------------------------------------------------------------------------------------- maps
def grad_cam(encoder: FormulaEncoder, head: torch.nn.Module, images: Tensor) -> Tensor:
    """Grad-CAM of the size of the global head's output, (n, h, w): which features raise it."""
    features = encoder.feature_map(images).detach().requires_grad_(True)
    head(features.mean((2, 3))).square().sum().backward()
    assert features.grad is not None
    cam = (features.grad.mean((2, 3), keepdim=True) * features).sum(1).clamp(min=0).detach()
    return (cam + 1e-9) / (cam + 1e-9).flatten(1).sum(1)[:, None, None]


def lifts(maps: Tensor, of: Expressions) -> dict[str, list[float]]:
    """Of each image: mass of the map on cells with ink, and how much more of it than of the ink lies on operators and
    on exponents; a map that is even over the ink gives 1. Images without any are left out."""
    ink = ink_of(of.images)
    cells = ink_in_cells(ink, GRID)
    out: dict[str, list[float]] = {"on ink": (maps * (cells > 0)).flatten(1).sum(1).tolist(), "operators": [],
                                   "exponents": []}
    density = torch.where(cells > 0, maps / cells.clamp(min=1e-9), 0.0)
    pixels = density.repeat_interleave(16, 1).repeat_interleave(16, 2) * ink
    for mass, black, symbols in zip(pixels, ink, of.symbols, strict=True):
        for kind, wanted in (("operators", [s for s in symbols if s[0] in OPERATORS]),
                             ("exponents", [s for s in symbols if s[5]])):
            inside = torch.zeros_like(black, dtype=torch.bool)
            for _, x, y, w, h, _ in wanted:
                inside[max(0, int(y) - 1):int(y + h) + 2, max(0, int(x) - 1):int(x + w) + 2] = True
            part = (black * inside).sum() / black.sum()
            if wanted and part > 0:
                out[kind].append(float((mass * inside).sum() / mass.sum().clamp(min=1e-9) / part))
    return out


@torch.no_grad()
def under_occlusion(encoder: FormulaEncoder, plugin: MaskAndMatch | None, images: Tensor,
                    seed: int) -> list[list[float]]:
    """Whether the vector of each masked image is nearest to that of its own full one, for each of the ratios.

    ``plugin`` None: vectors are means over cells with ink.
    """
    def vectors(shown: Tensor) -> Tensor:
        features = encoder.feature_map(shown)
        if plugin is None:
            on = (ink_in_cells((shown - 0.1).clamp(min=0)[:, 0], GRID) > 0).float()
            a = on / on.flatten(1).sum(1).clamp(min=1)[:, None, None]
        else:
            a = plugin.grid_maps(encoder, shown)
        return F.normalize(attended(features, a), dim=1)

    cells, full = ink_in_cells(ink_of(images), GRID), vectors(images)
    order = hiding_order(cells, "random", torch.Generator().manual_seed(1000 + seed))
    out = []
    for ratio in RATIOS:
        found = (vectors(hide(images, hidden_cells(order, cells, ratio))) @ full.T).argmax(1)
        out.append((found == torch.arange(len(images))).float().tolist())
    return out


# -------------------------------------------------------------------------------------------------------------- readers
def read(encoder: FormulaEncoder, plugin: MaskAndMatch | None, train: Expressions, test: Expressions, seed: int,
         scale: Scale) -> Row:
    """Token errors of each test expression after stage 3, clean and with 0.3 of the ink hidden, and the betas."""
    torch.manual_seed(seed)
    encoder, plugin = copy.deepcopy(encoder), copy.deepcopy(plugin)
    words = LatexVocabulary.of([*train.latex, *test.latex])
    longest = max(len(words.encode(latex)) for latex in (*train.latex, *test.latex))
    model = FormulaRecognizer(words, plugin, encoder, size=128, layers=2, heads=4, inner=256, dropout=0.1,
                              length=longest + 1)
    numbers, draw = model.numbers(train.latex), torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(train.images), (scale.batches[2],), generator=draw)
        return model(train.images[rows], numbers[rows])

    fit(model, loss, steps=scale.steps[2], optimizer=lambda _: torch.optim.AdamW(model.groups(1e-3)), clip=1.0,
        schedule=lambda o: warmup_cosine(o, scale.steps[2]), label="stage 3")
    cells = ink_in_cells(ink_of(test.images), GRID)
    hidden = hidden_cells(hiding_order(cells, "random", torch.Generator().manual_seed(seed)), cells, 0.3)
    out: Row = {"length": [len(latex_tokens(latex)) for latex in test.latex],
                "beta": [float(m().detach()) for m in plugin.modules.values()] if plugin else []}
    for name, images in (("clean", test.images), ("occluded", hide(test.images, hidden))):
        found = [text for part in images.split(100) for text in model.recognize(part, beams=1)]
        out[name] = [token_errors(text.split(), latex_tokens(latex))
                     for text, latex in zip(found, test.latex, strict=True)]
    return out


# ------------------------------------------------------------------------------------------------------------- one seed
def measure(seed: int, scale: Scale) -> Row:
    """The three stages and their baselines for one seed."""
    torch.manual_seed(seed)
    parts, draw = expressions(scale.stand_in), torch.Generator().manual_seed(seed)
    train, test = (some(parts[name], torch.randperm(len(parts[name].images), generator=draw)[:count])
                   for name, count in (("train", scale.images), ("test", scale.test)))
    fresh = FormulaEncoder(FormulaEncoderConfig((16, 32, 64, 128)))
    out: Row = {"probes": {"pixels": probes(None, train, test), "random": probes(fresh, train, test)}, "maps": {},
                "occluded": {}, "entropy": {}, "read": {}}
    encoder, head = fresh, torch.nn.Module()
    for name, options in ENCODERS.items():
        encoder = copy.deepcopy(fresh)
        pretraining = ContrastivePretraining(encoder, **options)  # type: ignore[arg-type]
        pretraining.fit(train.images, steps=scale.steps[0], batch=scale.batches[0], seed=seed)
        out["probes"][name], head = probes(encoder.eval(), train, test), pretraining.global_head
    order = torch.randint(len(train.images), (scale.steps[1], scale.batches[1]), generator=draw)
    y, x = (torch.linspace(-1, 1, n) for n in GRID)
    gauss = torch.exp(-2 * (y[:, None] ** 2 + x ** 2)).expand(len(test.images), -1, -1)
    maps = {"center": gauss / gauss[0].sum(), "Grad-CAM": grad_cam(encoder, head, test.images)}
    plugins = {}
    for name, options in MAPS.items():
        plugins[name] = plugin = MaskAndMatch(**options)  # type: ignore[arg-type]
        plugin.calibrate(encoder, [train.images[rows] for rows in order], seed=seed)
        with torch.no_grad():
            maps[name] = plugin.grid_maps(encoder, test.images)
        out["entropy"][name] = plugin.history[-1]["entropy"]
        out["occluded"][name] = under_occlusion(encoder, plugin, test.images, seed)
    out["occluded"]["even on ink"] = under_occlusion(encoder, None, test.images, seed)
    out["maps"] = {name: lifts(found, test) for name, found in maps.items()}
    for count in scale.labels:
        labelled = some(train, torch.arange(min(count, len(train.images))))
        out["read"][str(count)] = {
            name: read(fresh if name == "scratch" else encoder, plugins["progressive"] if name == READERS[2] else None,
                       labelled, test, seed, scale) for name in READERS}
    if seed == 0:
        out["drawn"] = [[draw_map(ink, found[n]).round(2).tolist() for found in (maps["Grad-CAM"], maps["progressive"])]
                        for n, ink in enumerate(ink_of(test.images)[:4])]
    return out


# --------------------------------------------------------------------------------------------------------------- claims
def area(results: Results, name: str) -> list[float]:
    """Mean over ratios of hidden ink of whether each test image of all seeds was matched."""
    return [float(v) for seed in results.values("occluded", name) for v in np.mean(seed, 0)]


def rates(results: Results, count: int, name: str, kind: str = "clean", errors: int = 0) -> list[float]:
    """Whether each test expression of all seeds was read with at most ``errors`` wrong tokens."""
    return [float(e <= errors) for e in results.joined("read", str(count), name, kind)]


def right_tokens(results: Results, count: int, name: str, kind: str = "clean") -> list[float]:
    """1 - token error of each test expression of all seeds."""
    lengths = results.joined("read", str(count), name, "length")
    return [1 - min(1.0, e / n) for e, n in zip(results.joined("read", str(count), name, kind), lengths, strict=True)]


def claims(results: Results) -> Iterator[Claim]:
    """The abstract's claims, and what this project calls working."""
    claim = results.claim
    for task, words in (("class", "the class of a symbol, accuracy"), ("exponent", "being in an exponent, AUROC")):
        for baseline in ("random", "pixels", "global", "local"):
            gap = results.interval("probes", "global + local", task, minus=("probes", baseline, task))
            means = (results.mean("probes", n, task) for n in ("global + local", baseline))
            yield claim(f"Stage 1 tells {words}, to a linear probe better than {baseline}", OURS, "no figure",
                        "95 % interval of the difference over seeds above 0", above(gap),
                        "{:.3f} against {:.3f}".format(*means) + f", {gap:+.3f}", count="seeds")
    on_ink = bootstrap(results.joined("maps", "progressive", "on ink"))
    center = bootstrap(results.joined("maps", "center", "on ink"))
    yield claim("Attention is on the ink", OURS, "no figure", "95 % interval over images above that of a center prior",
                above(on_ink, center.high), f"{on_ink:.3f} against {center:.3f}", count="seeds")
    for kind in ("operators", "exponents"):
        lift = bootstrap(results.joined("maps", "progressive", kind) or [1.0])
        yield claim(f"Attention finds {kind} without supervision", "abstract", "pictures", "mass per ink, against a "
                    "map that is even over the ink (1): 95 % interval over images above 1", above(lift, 1.0),
                    f"{lift:.3f}", count="seeds")
        for baseline, words in (("Grad-CAM", "Grad-CAM of stage 1"), ("none", "a network trained without masks"),
                                ("constant", "one trained with a constant ratio")):
            gap = paired(results.joined("maps", "progressive", kind) or [1.0],
                         results.joined("maps", baseline, kind) or [1.0])
            yield claim(f"Attention finds {kind} better than {words}", OURS, "no figure",
                        "95 % interval of the paired difference over images above 0", above(gap), f"{gap:+.3f}",
                        count="seeds")
    areas = {name: area(results, name) for name in (*MAPS, "even on ink")}
    gaps = [paired(areas[a], areas[b]) for a, b in (("progressive", "constant"), ("constant", "none"))]
    yield claim("The progressive schedule makes it robust to occlusion: progressive > constant > none", "abstract",
                "an ablation", "matches under 0 to 0.6 of hidden ink: 95 % intervals of both paired differences over "
                "images above 0", every(*map(above, gaps)), ", ".join(
                    f"{name} {np.mean(v):.3f}" for name, v in areas.items()) + f"; {gaps[0]:+.3f}, {gaps[1]:+.3f}",
                count="seeds")
    for count in results.scale.labels:
        for ours, theirs in ((READERS[2], READERS[0]), (READERS[1], READERS[0]), (READERS[2], READERS[1])):
            for kind in ("clean", "occluded"):
                gap = paired(rates(results, count, ours, kind), rates(results, count, theirs, kind))
                tokens = paired(right_tokens(results, count, ours, kind), right_tokens(results, count, theirs, kind))
                figures = " against ".join(f"{np.mean(rates(results, count, n, kind)):.3f}" for n in (ours, theirs))
                yield claim(f"With {count} labels, {ours} read better than {theirs}, {kind} tests", OURS,
                            "no figure", "ExpRate: 95 % interval of the paired difference over expressions above 0",
                            above(gap),
                            f"{figures}, {gap:+.3f}; right tokens {tokens:+.3f}", count="seeds")
    yield from results.unmeasured("abstract", "no figures known", {
        "On CROHME it is better than existing self-supervised and fully supervised methods": "CROHME and their systems",
        "The same on real handwriting": "handwritten expressions; here digits are real, and composed"})


def show(report: Report, results: Results) -> None:
    """Probes, maps, occlusion, readers, pictures."""
    names = list(results.rows[0]["probes"])
    add_table(report, "Linear probes of symbols", ({"features": n, "class": results.interval("probes", n, "class"),
                                                    "exponent": results.interval("probes", n, "exponent")}
                                                   for n in names), "accuracy and AUROC, intervals over seeds")
    add_table(report, "Maps", ({"map": n, **{kind: bootstrap(results.joined("maps", n, kind) or [1.0]) for kind in
                                            ("on ink", "operators", "exponents")}} for n in results.rows[0]["maps"]),
              "mass on cells with ink; mass per ink on operators and exponents, 1: even; intervals over images")
    report.figure("Matches under occlusion", x_label="fraction of the ink hidden", y_label="own image is nearest",
                  series=[curve(name, RATIOS, [bootstrap([v for seed in results.values("occluded", name)
                                                          for v in seed[n]]) for n in range(len(RATIOS))])
                          for name in results.rows[0]["occluded"]])
    rows: list[dict[str, str | int | float | Interval]] = []
    for count in results.scale.labels:
        for name in READERS:
            rows.append({"labels": count, "trained": name, "ExpRate": bootstrap(rates(results, count, name)),
                         "at most 1 error": float(np.mean(rates(results, count, name, errors=1))),
                         "at most 2": float(np.mean(rates(results, count, name, errors=2))),
                         "right tokens": float(np.mean(right_tokens(results, count, name))),
                         "occluded": float(np.mean(rates(results, count, name, "occluded")))})
    add_table(report, "Readers", rows, "greedy decoding; stage 1 alone is also stages 1 and 2 with beta fixed at 0")
    for n, (cam, ours) in enumerate(results.rows[0]["drawn"]):
        report.image(f"Expression {n}", [np.asarray(x, dtype=np.float32) for x in (cam, ours)],
                     captions=["Grad-CAM of stage 1", "Mask & Match"])


study = Study("Mask & Match on composed expressions", measure, claims, show=show, full=Scale(),
              quick=Scale(images=128, test=32, labels=(64,), steps=(8, 8, 8), batches=(16, 16, 8)), quick_seeds=1,
              facts=lambda results: {
                  "entropy of a flat map": float(np.log(GRID[0] * GRID[1])),
                  **{f"entropy, {name}": results.mean("entropy", name) for name in MAPS}})
