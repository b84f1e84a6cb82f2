"""The paper's claims on a small model built as BAGEL is, which draws emoji from captions and tells their class."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf import Claim, Masks, Report
from looseleaf.modes import evaluating, own_random_state
from looseleaf_lab import data
from looseleaf_lab.study import Results, Study, above, add_table, below, curve, every
from looseleaf_lab.training import fit, warmup_cosine
from looseleaf_unified_sparsity.experts import freeze_experts, to_experts
from looseleaf_unified_sparsity.pruner import UnifiedSparsity
from looseleaf_unified_sparsity.shrinking import count_parameters, shrink
from looseleaf_unified_sparsity.stand_in import Sizes, SmallUnified

UND, GEN = "understanding", "generation"
CURVES = {"drawing, understanding": (UND, GEN), "drawing, generation": (GEN, GEN), "reading, understanding": (UND, UND)}
"""Task and component that is pruned -> component, task. Reading does not touch the generation half at all."""
WAYS = ("depth", "width")
HALF = 0.5
OURS = "what counts as working here, fixed before measuring"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured. Sizes, steps and rates were fixed on a further seed and other pictures, the rate of routers
    after a look at the tuned experts there."""

    width: int = 128
    layers: int = 6
    neurons: int = 256
    heads: int = 4
    codes: int = 64
    text: int = 8
    batch: int = 32
    steps: int = 300
    tune: int = 120
    rate: float = 5e-4
    router_rate: float = 1e-2
    test: int = 128
    calibrate: int = 30
    draws: int = 5
    random: int = 3
    keeps: tuple[float, ...] = (5 / 6, 4 / 6, HALF, 2 / 6, 1 / 6)
    experts: int = 16
    drawn: int = 64


# ------------------------------------------------------------------------------------------------------ the data
@dataclasses.dataclass
class Emoji:
    """Emoji of 32 x 32 as 8 x 8 tokens of a codebook, with captions and classes, divided by content.

    Attributes:
        pixels: (n, 32, 32, 3) in [0, 1].
        codes: (n, 64).
        book: (codes, 48), a patch of 4 x 4 each.
        text, real: (n, T) words of the caption, the finer class first, and which are no padding.
    """

    pixels: Tensor
    codes: Tensor
    book: Tensor
    text: Tensor
    real: Tensor
    labels: Tensor
    captions: list[str]
    classes: list[str]
    parts: dict[str, list[int]]
    words: int


@functools.cache
def emoji(codes: int, length: int) -> Emoji:
    """The set as the model sees it."""
    pictures = data.pictures("emoji")
    raw = torch.from_numpy(np.array(pictures.images)).float().div(255)
    pixels = raw[..., :3] * raw[..., 3:] + 1 - raw[..., 3:]  # on white
    pixels = F.avg_pool2d(pixels.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).contiguous()
    rows = pixels.unfold(1, 4, 4).unfold(2, 4, 4).permute(0, 1, 2, 4, 5, 3).reshape(len(pixels), 64, 48)
    book = codebook(rows.reshape(-1, 48), codes)
    tokens = torch.cat([torch.cdist(part, book).argmin(-1) for part in rows.split(200)])
    parts = data.split(pictures.rows, "unified-sparsity", train=0.8, dev=0.08, test=0.12)
    random.Random(0).shuffle(parts["test"])  # neighbours are alike, and captions are exchanged with the neighbour's
    spoken = [[f"<{row['sublabel']}>", *row["caption"].lower().replace(":", "").replace(",", "").split()]
              for row in pictures.rows]
    counts: dict[str, int] = {}
    for n in parts["train"]:
        for word in spoken[n]:
            counts[word] = counts.get(word, 0) + 1
    known = {word: n + 2 for n, word in enumerate(sorted(w for w, c in counts.items() if c >= 3))}
    text, real = torch.zeros(len(spoken), length, dtype=torch.long), torch.zeros(len(spoken), length, dtype=torch.long)
    for n, caption in enumerate(spoken):
        ids = [known.get(word, 1) for word in caption[:length]]
        text[n, :len(ids)], real[n, :len(ids)] = torch.tensor(ids), 1
    names = pictures.column("label")
    classes = sorted(set(names))
    labels = torch.tensor([classes.index(name) for name in names])
    return Emoji(pixels, tokens, book, text, real, labels, pictures.column("caption"), classes, parts, len(known) + 2)


def codebook(patches: Tensor, size: int, rounds: int = 12) -> Tensor:
    """Centres of k-means; patches of one colour, of which there are most, count as often as others in the start."""
    draw = torch.Generator().manual_seed(0)
    patches = patches[torch.randperm(len(patches), generator=draw)[:20000]]
    distinct = patches.mul(15).round().unique(dim=0).div(15)
    centres = distinct[torch.randperm(len(distinct), generator=draw)[:size]].clone()
    for _ in range(rounds):
        nearest = torch.cdist(patches, centres).argmin(-1)
        for n in range(size):
            if (own := nearest == n).any():
                centres[n] = patches[own].mean(0)
    return centres


def painted(codes: Tensor, book: Tensor) -> Tensor:
    """(n, 64) tokens -> (n, 32, 32, 3)."""
    return book[codes].view(-1, 8, 8, 4, 4, 3).permute(0, 1, 3, 2, 4, 5).reshape(-1, 32, 32, 3).clamp(0, 1)


# ------------------------------------------------------------------------------------------------------ the models
def drawing_loss(model: nn.Module, e: Emoji, rows: Sequence[int] | Tensor) -> Tensor:
    """Cross-entropy of picture tokens, in nats a token."""
    logits = model(e.text[rows], e.real[rows], codes=e.codes[rows])
    return F.cross_entropy(logits.flatten(0, 1), e.codes[rows].flatten())


def trained(e: Emoji, seed: int, scale: Scale) -> SmallUnified:
    """A model that draws and reads."""
    with own_random_state(seed):
        model = SmallUnified(Sizes(e.words, scale.codes, 64, len(e.classes), scale.text, scale.width, scale.layers,
                                   scale.heads, scale.neurons))
    draw, train = torch.Generator().manual_seed(seed), torch.tensor(e.parts["train"])

    def loss(_: int) -> Tensor:
        rows = train[torch.randint(len(train), (scale.batch,), generator=draw)]
        read = rows[:scale.batch // 2]
        return drawing_loss(model, e, rows) + 0.5 * F.cross_entropy(model(codes=e.codes[read]), e.labels[read])

    fit(model, loss, steps=scale.steps, optimizer=lambda p: torch.optim.AdamW(p, 2e-3, weight_decay=0.05), clip=1.0,
        schedule=lambda o: warmup_cosine(o, scale.steps), label="training")
    return model.eval()


def tuned(model: nn.Module, e: Emoji, seed: int, scale: Scale) -> nn.Module:
    """The model after a while on the generation loss alone, the same batches for each; what asks for gradients learns,
    and routers, which begin at zero, learn faster."""
    groups: dict[float, list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(scale.router_rate if "routers" in name else scale.rate, []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": each, "lr": rate} for rate, each in groups.items()], weight_decay=0.0)
    draw, train = torch.Generator().manual_seed(1000 + seed), torch.tensor(e.parts["train"])

    def loss(_: int) -> Tensor:
        return drawing_loss(model, e, train[torch.randint(len(train), (scale.batch,), generator=draw)])

    fit(model, loss, steps=scale.tune, optimizer=optimizer, clip=1.0,
        schedule=lambda o: warmup_cosine(o, scale.tune), label="tuning")
    return model.eval()


@functools.cache
def judge(codes: int, length: int) -> nn.Module:
    """A classifier of real emoji by class, from pixels."""
    e = emoji(codes, length)
    with own_random_state(0):
        network = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
                                nn.Flatten(), nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, len(e.classes)))
    draw, train = torch.Generator().manual_seed(0), torch.tensor(e.parts["train"])

    def loss(_: int) -> Tensor:
        rows = train[torch.randint(len(train), (64,), generator=draw)]
        # half of them as tokens paint them, which is what it will be shown
        pixels = torch.cat([e.pixels[rows[:32]], painted(e.codes[rows[32:]], e.book)])
        return F.cross_entropy(network(pixels.permute(0, 3, 1, 2)), e.labels[rows])

    fit(network, loss, steps=300, optimizer=lambda p: torch.optim.AdamW(p, 2e-3), label="judge")
    return network.eval()


# ------------------------------------------------------------------------------------------------------ measuring
class Bench:
    """What a model is worth on test pictures; equal masks are measured once."""

    def __init__(self, e: Emoji, scale: Scale) -> None:
        self.e, self.scale, self.rows = e, scale, torch.tensor(e.parts["test"][:scale.test])

    @torch.no_grad()
    def drawing(self, model: nn.Module) -> float:
        """Nats a picture token."""
        with evaluating(model):
            return float(drawing_loss(model, self.e, self.rows))

    @torch.no_grad()
    def reading(self, model: nn.Module) -> tuple[float, float]:
        """Nats of the class, and accuracy."""
        with evaluating(model):
            logits, labels = model(codes=self.e.codes[self.rows]), self.e.labels[self.rows]
        return float(F.cross_entropy(logits, labels)), float((logits.argmax(-1) == labels).float().mean())

    @torch.no_grad()
    def without_captions(self, model: nn.Module) -> float:
        """Nats a picture token with captions of other pictures: whether captions are heeded at all."""
        rows, other = self.rows, self.rows.roll(1)
        logits = model(self.e.text[other], self.e.real[other], codes=self.e.codes[rows])
        return float(F.cross_entropy(logits.flatten(0, 1), self.e.codes[rows].flatten()))

    @torch.no_grad()
    def drawn(self, model: Any, other: bool = False) -> tuple[float, list[list[int]]]:
        """How often a classifier of real emoji finds the class of the caption in what is drawn; the first pictures.
        ``other``: drawn from captions of other pictures."""
        rows = self.rows[:self.scale.drawn]
        said = rows.roll(1) if other else rows
        codes = model.draw(self.e.text[said], self.e.real[said], seed=0, temperature=0.7)
        found = judge(self.scale.codes, self.scale.text)(painted(codes, self.e.book).permute(0, 3, 1, 2)).argmax(-1)
        return float((found == self.e.labels[rows]).float().mean()), codes[:6].tolist()


def samples(e: Emoji, task: str, count: int, seed: int) -> dict[str, list[dict[str, Tensor]]]:
    """Pictures of the training part to calibrate on."""
    train = torch.tensor(e.parts["train"])
    rows = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(500 + seed))[:count]]
    batch = {"codes": e.codes[rows]}
    return {task: [batch if task == UND else {"text": e.text[rows], "attention_mask": e.real[rows], **batch}]}


def pruned(model: nn.Module, e: Emoji, scale: Scale, way: str, component: str, task: str, keep: float, draw: int,
           criterion: str = "paper") -> Masks:
    """Masks; depth is watched on one sample, width on 30, as in the paper."""
    options: Any = {"what": way, "component": component, "criterion": criterion}
    pruner = UnifiedSparsity(keep, seed=draw, **options)
    return pruner.prune(model, samples(e, task, 1 if way == "depth" else scale.calibrate, draw))


def measure(seed: int, scale: Scale) -> Row:
    """One training: how much each half can lose, with which criterion, and what experts get back."""
    e = emoji(scale.codes, scale.text)
    bench = Bench(e, scale)
    model = trained(e, seed, scale)
    counts = torch.bincount(e.labels[bench.rows])
    places = torch.stack([(torch.bincount(e.codes[e.parts["train"], n], minlength=scale.codes) + 1.0).log()
                          for n in range(64)]).log_softmax(-1)
    row: Row = {"dense": {"drawing": bench.drawing(model), "reading": bench.reading(model)[0],
                          "accuracy": bench.reading(model)[1], "other captions": bench.without_captions(model),
                          "majority": float(counts.max() / counts.sum()),
                          "by place alone": float(-places.gather(1, e.codes[bench.rows].T).mean())}}
    row["curves"] = {name: {way: curve_of(model, e, bench, scale, way, component, task, row["dense"])
                            for way in WAYS} for name, (component, task) in CURVES.items()}
    models: dict[str, nn.Module] = {"dense": model}
    for name, component in ((UND, UND), (GEN, GEN)):
        for way in WAYS:
            masks = pruned(model, e, scale, way, component, GEN, HALF, 0)
            began = time.perf_counter()
            models[f"half of {name}, {way}"] = small = shrink(copy.deepcopy(model), masks)
            row.setdefault("shrunk", {})[f"{name}, {way}"] = {
                "seconds": time.perf_counter() - began, **count_parameters(small)}
    row["experts"], models["experts"] = adapted(model, e, bench, seed, scale)
    row["pictures"] = {name: dict(zip(("agreement", "codes"), bench.drawn(each), strict=True))
                       for name, each in models.items()}
    row["pictures"]["dense, captions of others"] = dict(zip(("agreement", "codes"), bench.drawn(model, True),
                                                            strict=True))
    # of what a caption is worth in nats, how much half of understanding loses
    worth = row["dense"]["other captions"] - row["dense"]["drawing"]
    row["of the captions"] = {way: row["curves"][f"drawing, {UND}"][way]["half"] * row["dense"]["drawing"] / worth
                              for way in WAYS}
    return row


def curve_of(model: SmallUnified, e: Emoji, bench: Bench, scale: Scale, way: str, component: str, task: str,
             dense: Row) -> Row:
    """Loss relative to that of the dense model by fraction kept, for the paper's criterion and a random one."""
    what = "drawing" if task == GEN else "reading"
    known: list[tuple[Masks, list[float]]] = []  # few ways to drop layers differ

    def loss(masks: Masks) -> list[float]:
        for same, values in known:
            if same == masks:
                return values
        small = shrink(copy.deepcopy(model), masks)
        known.append((masks, [bench.drawing(small)] if task == GEN else list(bench.reading(small))))
        return known[-1][1]

    out: Row = {"paper": [], "random": [], "draws": [], "accuracy": []}
    for keep in scale.keeps:
        draws = [loss(pruned(model, e, scale, way, component, task, keep, draw))
                 for draw in range(scale.draws if keep == HALF else 1)]
        chance = [loss(pruned(model, e, scale, way, component, task, keep, draw, "random"))
                  for draw in range(scale.random)]
        out["paper"].append(float(np.mean([d[0] for d in draws])) / dense[what] - 1)
        out["random"].append(float(np.mean([d[0] for d in chance])) / dense[what] - 1)
        out["accuracy"].append(float(np.mean([d[-1] for d in draws])) if task == UND else None)
        if keep == HALF:
            out["draws"] = [d[0] / dense[what] - 1 for d in draws]
            out["half"] = out["paper"][-1]
    return out


def adapted(model: SmallUnified, e: Emoji, bench: Bench, seed: int, scale: Scale) -> tuple[Row, nn.Module]:
    """Half of the experts, before and after tuning, and a static half of the same layers tuned as long."""
    calibration = samples(e, GEN, scale.calibrate, 0)
    pruner = UnifiedSparsity(HALF, "width", "generation")
    scores, masks = pruner.score(model, calibration), pruner.prune(model, calibration)
    ends = ("layers.0.", f"layers.{scale.layers - 1}.")
    static = shrink(copy.deepcopy(model), Masks({name: m for name, m in masks.items() if not name.startswith(ends)}))
    mixture = copy.deepcopy(model)
    to_experts(mixture, scores, scale.experts, scale.experts // 2)
    row: Row = {"dense": bench.drawing(model), "experts, not tuned": bench.drawing(mixture),
                "static half, not tuned": bench.drawing(static)}
    routers = copy.deepcopy(mixture)
    freeze_experts(routers)
    row["experts, routers tuned"] = bench.drawing(tuned(routers, e, seed, scale))
    for name, each in (("experts, all tuned", mixture), ("static half, all tuned", static),
                       ("dense, all tuned", copy.deepcopy(model))):
        row[name] = bench.drawing(tuned(each, e, seed, scale))
    row["weights"] = {"dense": count_parameters(model), "experts": count_parameters(mixture),
                      "static half": count_parameters(static)}
    return row, mixture


# ------------------------------------------------------------------------------------------------------ the report
def show(report: Report, results: Results) -> None:
    """Tables, curves and what the pruned models draw."""
    dense = results.rows[0]["dense"]
    add_table(report, "The model", ({"what": name, "value": results.interval("dense", name)} for name in dense),
              "drawing, other captions, by place alone: nats a picture token; reading: nats of the class; 95 % "
              "bootstrap over trainings")
    keeps = results.scale.keeps
    add_table(report, "Relative increase of the loss", (
        {"task, pruned half": name, "way": way, "kept": keep,
         "paper's criterion": results.interval("curves", name, way, "paper", n),
         "random": results.interval("curves", name, way, "random", n)}
        for name in CURVES for way in WAYS for n, keep in enumerate(keeps)))
    for way in WAYS:
        report.figure(f"Drawing, {way}: loss by fraction kept", x_label="fraction of the units kept",
                      y_label="relative increase of nats a token", series=[
                          curve(f"{name.partition(', ')[2]}, {criterion}", keeps, [
                              results.interval("curves", name, way, criterion, n) for n in range(len(keeps))])
                          for name in list(CURVES)[:2] for criterion in ("paper", "random")])
    experts = [name for name in results.rows[0]["experts"] if name != "weights"]
    add_table(report, "Experts", (
        {"model": name, "nats a token": results.interval("experts", name),
         "against dense": results.interval("experts", name, minus=("experts", "dense"))} for name in experts))
    report.table("Weights", ["model", "total", "active", "seconds of shrink"], [
        *([name, w["total"], w["active"], None] for name, w in results.rows[0]["experts"]["weights"].items()),
        *([name, w["total"], w["active"], results.mean("shrunk", name, "seconds")]
          for name, w in results.rows[0]["shrunk"].items())])
    pictures = results.rows[0]["pictures"]
    add_table(report, "Drawn pictures whose class a classifier of real emoji finds", (
        {"model": name, "fraction": results.interval("pictures", name, "agreement")} for name in pictures))
    e = emoji(results.scale.codes, results.scale.text)
    rows = e.parts["test"][:len(pictures["dense"]["codes"])]
    real = painted(e.codes[rows], e.book)
    for name, shown in {"real": None, **pictures}.items():
        drawn = real if shown is None else painted(torch.tensor(shown["codes"]), e.book)
        report.image(f"{name}", [np.asarray(p).repeat(3, 0).repeat(3, 1) for p in drawn],
                     captions=[e.captions[n] for n in rows])


def claims(results: Results) -> Iterator[Claim]:
    """Each claim of the paper, with the rules of this project."""
    claim = functools.partial(results.claim, count="trainings")
    for way in WAYS:
        und, gen = (results.interval("curves", f"drawing, {name}", way, "half") for name in (UND, GEN))
        yield claim(f"Half of understanding can go while drawing, half of generation cannot ({way})", "abstract",
                    {"depth": "GenEval .652 -> .648 without half of understanding [repo README, later]",
                     "width": "GenEval .652 -> .645, generation .518 [repo README, later]"}[way],
                    "relative increase of nats a token at keep 0.5 is lower for understanding, intervals over "
                    "trainings apart; does not hold where they are apart the other way",
                    True if und.high < gen.low else False if gen.high < und.low else None,
                    f"understanding {und:.3f}, generation {gen:.3f}; captions of other pictures cost "
                    f"{results.mean('dense', 'other captions') / results.mean('dense', 'drawing') - 1:.3f}")
        lost = results.interval("of the captions", way)
        yield claim(f"Half of understanding keeps most of what captions are worth ({way})", OURS, "no figure",
                    "the nats lost are below half of those that captions of other pictures cost, interval over "
                    "trainings", below(lost, 0.5), f"{lost:.2f} of them lost")
        gap = results.interval("pictures", f"half of {UND}, {way}", "agreement",
                               minus=("pictures", f"half of {GEN}, {way}", "agreement"))
        agreed = [results.mean("pictures", name, "agreement") for name in (
            "dense", f"half of {UND}, {way}", f"half of {GEN}, {way}", "dense, captions of others")]
        yield claim(f"Pictures drawn without half of understanding show the class of their caption more often than "
                    f"without half of generation ({way})", "abstract", "GenEval .645 against .518, width [repo README, "
                    "later]", "interval of the difference over trainings above 0", above(gap),
                    f"{agreed[1]:.3f} and {agreed[2]:.3f}; dense {agreed[0]:.3f}, captions of others {agreed[3]:.3f}")
    for name in CURVES:
        for way in WAYS:
            wins = [results.interval("curves", name, way, "paper", n,
                                     minus=("curves", name, way, "random", n)).value < 0
                    for n in range(len(results.scale.keeps))]
            yield claim(f"The criterion is better than random ({name} pruned, {way})", OURS, "no figure",
                        "lower mean loss at 4 or more of 5 fractions kept",
                        sum(wins) >= 4 if len(wins) >= 5 else None, f"{sum(wins)} of {len(wins)}")
    full, static, dense = (results.interval("experts", name) for name in (
        "experts, all tuned", "static half, all tuned", "dense"))
    ratio = results.interval("experts", "experts, all tuned", minus=("experts", "dense"))
    gain = results.interval("experts", "experts, all tuned", minus=("experts", "static half, all tuned"))
    yield claim("With half of the experts active, tuning gets the quality back", "model card",
                "GenEval .89 against .86 dense [model card]; .649-.651 against .652 [repo README, later]",
                "after tuning nats a token within 5 % of the dense model as it was, and below a static half of the "
                "same layers tuned as long, interval of the paired difference over trainings below 0",
                every(below(ratio, 0.05 * dense.value), below(gain)),
                f"dense {dense.value:.3f}, experts {full:.3f}, static {static:.3f}, experts - static {gain:+.4f}; not "
                f"tuned {results.mean('experts', 'experts, not tuned'):.3f} and "
                f"{results.mean('experts', 'static half, not tuned'):.3f}; dense tuned as long "
                f"{results.mean('experts', 'dense, all tuned'):.3f}")
    routers = results.interval("experts", "experts, routers tuned", minus=("experts", "experts, not tuned"))
    yield claim("Routers alone get part of it back, with frozen experts", "method", "no figure",
                "nats a token fall, interval over trainings below 0", below(routers),
                f"{results.mean('experts', 'experts, not tuned'):.3f} -> "
                f"{results.mean('experts', 'experts, routers tuned'):.3f}, {routers:+.4f}")
    yield from results.unmeasured("model card, repository", "GenEval .86 dense, .89 with 16 of 32 and 8 of 16 experts "
                                  "[model card]", {"BAGEL, Ming-Omni and Qwen-Image on GenEval": "those models"})


study = Study("Unified sparsity: halves of a model that reads and draws emoji", measure, claims, show, full=Scale(),
              quick=Scale(width=32, layers=4, neurons=64, steps=25, tune=5, test=24, calibrate=4, draws=2, random=1,
                          keeps=(HALF,), experts=8, drawn=8, batch=16), quick_seeds=1)
