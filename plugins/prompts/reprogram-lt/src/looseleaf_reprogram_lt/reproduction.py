"""The paper's claims at small real scale: tickets of a small network reused, and EfficientNet-Lite0."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from looseleaf import Claim, Example, Report, Task, Unstructured, prunable_parameters
from looseleaf.report import Images
from looseleaf.statistics import Interval, bootstrap
from looseleaf_lab import data, models, vision
from looseleaf_lab.study import Results, Study, above, add_table, every
from looseleaf_lab.training import fit
from looseleaf_reprogram_lt.optimizer import VisualReprogram, frequency_mapping, label_counts
from looseleaf_reprogram_lt.probe import (
    DENSE,
    METHODS,
    TransferCost,
    TransferData,
    show_programs,
    sparsity,
    upstream,
    write_tables,
)
from looseleaf_tickets import TrainingRun, find_tickets
from looseleaf_vision import ImageClassifier, Preprocess, calibration_error, from_arrays

OURS = "this project's rule, fixed before measuring"
TICKET = "ticket"
ONCE: tuple[Literal["flm", "random"], ...] = ("flm", "random")
"""Ways of mapping that are learned apart; mapping again each epoch is in the table anyway."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is trained."""

    width: int = 16
    most: int = 200  # pictures of a source class
    steps: int = 1000  # of each training of the source network, 64 pictures each
    densities: tuple[float, ...] = (0.41, 0.17)  # a round is four of the authors', 20 % each
    shots: tuple[int, ...] = (1, 10, 50)
    epochs: int = 40
    few: int = 50  # shots at which ways of mapping are compared
    test: int = 40  # test pictures of a class
    distilled: int = 96  # steps that tune the pruned EfficientNet back
    real_epochs: int = 15


def pictures(name: str, size: int) -> tuple[np.ndarray, list[str]]:
    """Pictures of a set on white, uint8 (n, size, size, 3), and their classes."""
    found = data.pictures(name)
    read = Preprocess(size=size)
    images = [(read.read([image])[0].movedim(0, -1) * 255).round().byte().numpy() for image in found.images]
    return np.stack(images), [str(label) for label in found.column("label")]


def source(seed: int, scale: Scale) -> tuple[vision.Images, list[str]]:
    """Emoji and clip art at 32 x 32 by class, in three parts, and the names of the classes."""
    images, labels = [], []
    draw = np.random.default_rng(seed)
    for name in ("emoji", "clip-art"):
        x, y = pictures(name, 32)
        for label in sorted(set(y)):
            places = [n for n, own in enumerate(y) if own == label]
            if len(places) >= 60:
                chosen = draw.permutation(places)[:scale.most]
                images.append(torch.from_numpy(x[chosen]).movedim(-1, 1).float() / 255)
                labels += [f"{name}: {label}"] * len(chosen)
    names = sorted(set(labels))
    whole, numbers = torch.cat(images), torch.tensor([names.index(label) for label in labels])
    order = torch.from_numpy(draw.permutation(len(whole)))
    train, validation, test = (
        (whole[p].to(models.device()), numbers[p].to(models.device()))
        for p in order.tensor_split([round(0.7 * len(whole)), round(0.85 * len(whole))]))
    return vision.Images(train, validation, test), names


def targets(seed: int, scale: Scale) -> list[Task]:
    """Digits of 8 x 8 pixels, MNIST and stamps at 16 x 16; the same test pictures for every seed."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    digits = (x.reshape(-1, 8, 8) / 16 * 255).round().astype(np.uint8)
    found = data.pictures("mnist")
    small = [(Preprocess(size=16, mean=(0,), std=(1,)).read([image])[0, 0] * 255).round().byte().numpy()
             for image in found.images[::4]]
    stamps, kinds = pictures("stamps", 16)
    sets = {"digits": (digits, y.tolist(), 12), "mnist": (small, found.column("label")[::4], 12),
            "stamps": (stamps, kinds, 30)}
    return [from_arrays(images, labels, max(scale.shots), seed, name=name, test=scale.test, least=least)
            for name, (images, labels, least) in sets.items()]


def tickets(seed: int, scale: Scale) -> tuple[ImageClassifier, TransferData, dict[str, Any]]:
    """The trained dense network, the sparsest ticket within a point of it, and what is known of them."""
    images, names = source(seed, scale)
    network = vision.resnet(seed, scale.width, 1, len(names))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network[0] = nn.Conv2d(3, scale.width, 3, 1, 1, bias=False).to(models.device())
    trained: list[nn.Module] = []

    def train(model: nn.Module, run: TrainingRun) -> None:
        vision.fit(model, images, run, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
                   steps=scale.steps, batch=64, drops=(0.5, 0.8))

    def evaluate(model: nn.Module) -> float:
        trained.append(copy.deepcopy(model).eval())
        return vision.accuracy(model, images.validation)

    found = find_tickets(network, train, [Unstructured(1 - density) for density in scale.densities], evaluate=evaluate,
                         rewind_to=0.1, seed=seed, progress=False)
    scores = [ticket.metrics["score"] for ticket in found]
    close = [n for n, score in enumerate(scores) if n and score >= scores[0] - 0.01]
    chosen = max(close, default=1)
    dense = ImageClassifier(trained[0], size=32, mean=(0,) * 3, std=(1,) * 3, classes=names)
    examples = [Example({"image": x}, names[int(y)]) for x, y in zip(*images.test, strict=True)]
    tasks = targets(seed, scale)
    return dense, TransferData(tasks, {TICKET: trained[chosen]}, examples), {
        "round": chosen, "within": bool(close), "validation": scores, "classes": len(names),
        "pictures": len(images.train[0]), "chance": {task.name: 1 / len(task.classes or ()) for task in tasks}}


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """One network and its tickets: upstream, each target by shots and method, and ways of mapping on the dense one."""
    dense, transfer, facts = tickets(seed, scale)
    probe = TransferCost(shots=scale.shots, epochs=scale.epochs, batch_size=32)
    rows = probe.measure(dense, transfer, seed, progress=False)
    mappings: dict[str, dict[str, float]] = {}
    for task in transfer.tasks:
        optimizer = VisualReprogram(epochs=scale.epochs, batch_size=32, shots=scale.few)
        start = optimizer.untrained(task, dense)
        scores = {"ilm": reached(rows, task.name, scale.few)}
        for mapping in ONCE:
            prompt = dataclasses.replace(optimizer, mapping=mapping).optimize(task, dense, seed=seed, progress=False)
            scores[mapping] = float(task.evaluate(prompt.on(dense)).score)
            if mapping == "flm":  # the grey border with the same map of labels
                grey = dataclasses.replace(start, mapping=prompt.mapping)
                scores["grey"] = float(task.evaluate(grey.on(dense)).score)
        mappings[task.name] = scores
    return {"upstream": upstream(Report(""), dense, transfer), "rows": rows, "mappings": mappings, "facts": facts}


def efficientnet(scale: Scale) -> dict[str, Any]:
    """EfficientNet-Lite0 and its pruned self on stamps of 96 pixels in 224: one run, no intervals."""
    network, preprocessor = models.load("efficientnet-lite0", device=models.device())
    size = preprocessor.size
    dense = ImageClassifier(network, size=size, mean=preprocessor.mean, std=preprocessor.std, classes=range(1000))
    pruned = copy.deepcopy(network)
    masks = Unstructured(0.4).select({n: p.detach().abs() for n, p in prunable_parameters(pruned).items()})
    masks.apply(pruned)
    clip_art = data.pictures("clip-art").images
    draw = np.random.default_rng(0)
    order = draw.permutation(len(clip_art))
    norms = [m for m in pruned.modules() if isinstance(m, nn.BatchNorm2d)]

    def batch(places: np.ndarray) -> torch.Tensor:
        return dense.preprocess.normalize(dense.preprocess.read(list(clip_art[places]))).to(dense.device)

    def loss(step: int) -> torch.Tensor:
        for norm in norms:  # the statistics stay those of ImageNet
            norm.eval()
        x = batch(order[(step * 16 + np.arange(16)) % (len(order) - 200)])
        with torch.no_grad():
            goal = network(x).log_softmax(-1)
        return F.kl_div(pruned(x).log_softmax(-1), goal, log_target=True, reduction="batchmean")

    fit(pruned, loss, steps=scale.distilled, optimizer=lambda p: torch.optim.Adam(p, lr=2e-4), progress=False)
    masks.make_permanent(pruned)
    pruned.eval()
    with torch.no_grad():
        held = [batch(part) for part in np.array_split(order[-200:], 5)]
        agreement = fmean(float((network(x).argmax(1) == pruned(x).argmax(1)).float().mean()) for x in held)
    stamps, kinds = pictures("stamps", 96)
    task = from_arrays(list(stamps), kinds, 8, 0, name="stamps", test=10, least=30)
    optimizer, scores, prompts = VisualReprogram(epochs=scale.real_epochs, batch_size=32), {}, {}
    for name, classifier in ((DENSE, dense), ("pruned", ImageClassifier(pruned, dense.preprocess))):
        start = optimizer.untrained(task, classifier)
        module = start.module(classifier)
        with torch.no_grad():
            mapping = frequency_mapping(label_counts(
                lambda x: classifier.logits(module.frame(x)), classifier, task.train, start.classes,  # noqa: B023
                start.inner))
        prompts[name] = optimizer.optimize(task, classifier, progress=False)
        found = task.evaluate(prompts[name].on(classifier))
        scores[name] = {"vp": found.score, "ece": calibration_error(found, list(task.test), start.classes),
                        "grey": task.evaluate(dataclasses.replace(start, mapping=mapping).on(classifier)).score}
    report = Report("")
    show_programs(report, dense, [task], {(name, task.name): p for name, p in prompts.items()})
    return {"agreement": agreement, "sparsity": sparsity(pruned), "scores": scores, "classes": len(task.classes or ()),
            "pngs": report.images[0].pngs, "captions": report.images[0].captions}


def reached(rows: list[dict[str, Any]], task: str, shots: int) -> float:
    """Accuracy of the dense network with learned pixels."""
    return next(float(e["accuracy"]) for e in rows
                if (e["network"], e["method"], e["task"], e["shots"]) == (DENSE, "vp", task, shots))


def decidable(results: Results) -> list[str]:
    """Targets on which the dense network with learned pixels, at the most shots, is above chance in all likelihood."""
    found = []
    for name, chance in results.rows[0]["facts"]["chance"].items():
        scores = [reached(row["rows"], name, max(results.scale.shots)) for row in results.rows]
        if results.quick or bootstrap(scores).low > chance:
            found.append(name)
    return found


def lost(results: Results, name: str = "accuracy", **where: Any) -> Interval:
    """What the ticket has less of a figure than the dense network, mean over the rows that agree with ``where``."""
    gaps = []
    for row in results.rows:
        values: dict[str, list[float]] = {DENSE: [], TICKET: []}
        for entry in row["rows"]:
            if entry["network"] in values and all(entry[k] == v for k, v in where.items()):
                values[entry["network"]].append(entry[name])
        gaps.append(fmean(values[DENSE]) - fmean(values[TICKET]))
    return bootstrap(gaps)


def show(report: Report, results: Results) -> None:
    """The networks, dense against sparse, ways of mapping, and EfficientNet-Lite0."""
    scale, first = results.scale, results.rows[0]
    report.facts |= {
        "source": f"emoji and clip art, 32 x 32, {first['facts']['classes']} classes, {first['facts']['pictures']} to "
                  f"train a residual network of {scale.width} to {4 * scale.width} channels, {scale.steps} steps",
        "tickets": "weights rewound to 10 % of the training; the sparsest within a point of the dense network on "
                   "validation pictures",
        "targets": f"digits 8 x 8, MNIST and stamps 16 x 16; {scale.epochs} epochs of batches of 32, Adam 0.01",
        "real model": "EfficientNet-Lite0: magnitude pruning, tuned back to its own logits on clip art"}
    add_table(report, "Networks", (
        {"network": network, "sparsity": results.mean("upstream", n, "sparsity"),
         "upstream accuracy": results.interval("upstream", n, "accuracy"),
         "agreement": results.mean("upstream", n, "agreement")} for n, network in enumerate((DENSE, TICKET))),
        f"{sum(row['facts']['within'] for row in results.rows)} of {len(results.rows)} seeds have a ticket within a "
        "point on validation pictures")
    write_tables(report, [{**row, "seed": seed} for seed, found in zip(results.seeds, results.rows, strict=True)
                          for row in found["rows"]])
    add_table(report, f"Ways of mapping labels, dense network, {scale.few} shots: accuracy", (
        {"target": task, **{way: results.mean("mappings", task, way) for way in ("ilm", *ONCE, "grey")}}
        for task in first["mappings"]), "grey: the untrained border, mapped by frequency")
    once = results.once
    report.table(f"EfficientNet-Lite0, {once['classes']} classes of stamps, 8 shots, one run", [
        "network", "sparsity", "agreement with dense", "learned pixels", "ECE", "grey border"],
        [[name, *((0.0, 1.0) if name == DENSE else (once["sparsity"], once["agreement"])), s["vp"], s["ece"], s["grey"]]
         for name, s in once["scores"].items()])
    report.images.append(Images("A stamp inside the learned pixels", once["pngs"], once["captions"]))


def claims(results: Results) -> Iterator[Claim]:
    """Each claim of the paper that can be measured here, and what this project means by "works"."""
    names = decidable(results)
    at_chance = [name for name in results.rows[0]["mappings"] if name not in names]
    kinds = "mean of shots, 95 % bootstrap over seeds of the paired difference"
    per_target = {name: lost(results, task=name, method="vp") for name in names}
    upstream_loss = -results.interval("upstream", 1, "accuracy", minus=("upstream", 0, "accuracy"))
    worse = any(gap.low > 0.01 for gap in per_target.values())
    equal = bool(names) and all(gap.high < 0.01 for gap in per_target.values())
    yield results.claim(
        "Tickets are not universal reprogrammers: on certain targets far below the dense network, though alike "
        "upstream", "abstract", "plots [abstract]", f"{kinds}; holds where a target's low end is above 0.01 while "
        "upstream loses at most 0.01; does not hold where every high end is below 0.01; else not shown; targets on "
        "which the dense network is at chance are left out",
        True if worse and upstream_loss.value <= 0.01 else False if equal else None,
        "accuracy lost with learned pixels: " + "; ".join(f"{n} {gap:+.3f}" for n, gap in per_target.items())
        + f"; upstream {upstream_loss:+.3f}" + (f"; at chance: {', '.join(at_chance)}" if at_chance else ""),
        count="seeds")
    calibration = {m: -lost(results, "ece", method=m) for m in METHODS}
    yield results.claim(
        "Dense networks are better calibrated than their tickets, with learned pixels and with a linear head",
        "abstract", "plots [abstract]", f"{kinds}, all targets: above 0 for both holds, below 0 for one does not hold, "
        "else not shown", every(*map(above, calibration.values())), "ECE of the ticket minus dense: "
        + "; ".join(f"{m} {gap:+.3f}" for m, gap in calibration.items()), count="seeds")
    few, most = min(results.scale.shots), max(results.scale.shots)
    gaps = [[fmean([e["accuracy"] for e in row["rows"] if e["network"] == DENSE and e["shots"] == shots])
             - fmean([e["accuracy"] for e in row["rows"] if e["network"] == TICKET and e["shots"] == shots])
             for shots in (few, most)] for row in results.rows]
    trend = bootstrap([a - b for a, b in gaps])
    yield results.claim(
        "The cost of sparsity is largest with few data", "abstract of a later version", "plots [later abstract]",
        f"accuracy lost at {few} minus at {most} shots, both methods, all targets: above 0 holds, below 0 does "
        "not hold, else not shown", above(trend), f"{trend:+.3f}", count="seeds")
    ways = {way: [fmean(row["mappings"][n][way] for n in names or at_chance) for row in results.rows]
            for way in ("ilm", *ONCE, "grey")}
    for better, worse_way, words in (("ilm", "flm", "Mapping again each epoch is at least as good as mapping once"),
                                     ("flm", "random", "Mapping by frequency beats a random map"),
                                     ("flm", "grey", "A trained border beats the grey one with the same map")):
        gap = bootstrap([a - b for a, b in zip(ways[better], ways[worse_way], strict=True)])
        if better == "ilm":
            verdict, rule = (True if gap.low > -0.01 else False if gap.high < 0 else None), \
                "low end above -0.01 holds, high end below 0 does not hold"
        else:
            verdict, rule = above(gap), "above 0 holds, below 0 does not hold"
        yield results.claim(words, OURS, "not a figure of the paper", "mean accuracy of the same targets, 95 % "
                            f"bootstrap over seeds: {rule}, else not shown", verdict if names else None,
                            f"{better} minus {worse_way}: {gap:+.3f}", count="seeds")
    yield from results.unmeasured("abstract of a later version", "plots [later abstract]", {
        "Quantisation does not harm calibration": "a quantised network; it came with a later version of the paper"})
    yield from results.unmeasured("experiments", "plots", {
        "The same for ResNet-50 tickets of ImageNet on the published targets":
            "tickets that are not public, and GPUs"})


study = Study("reprogram-lt: what sparsity costs a reused network", measure, claims, show, once=efficientnet,
              full=Scale(), quick=Scale(width=4, most=60, steps=30, densities=(0.5, 0.3), shots=(1, 5), epochs=3, few=5,
                                        test=10, distilled=2, real_epochs=1))
