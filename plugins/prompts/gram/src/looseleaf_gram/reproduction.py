"""GRAM against CoOp on mini-clip: few steps, new classes, other domains; what start, regulator and shift are for."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from looseleaf import Claim, Report, Task
from looseleaf.files import cache_dir, load_tensors, save_tensors
from looseleaf.fingerprint import content_fingerprint
from looseleaf.modes import evaluating, frozen
from looseleaf.statistics import Interval
from looseleaf.tasks import Example
from looseleaf_gram.episodes import Episodes, Pair, picture_key, read_pairs, shortened
from looseleaf_gram.optimizer import Gram, MetaPrompt
from looseleaf_gram.regulator import regulated
from looseleaf_lab import data, models
from looseleaf_lab.study import Results, Study, above, add_table, curve
from looseleaf_vision import DualEncoder, PromptSpec, VisionPrompt, as_image, base_to_new, from_arrays, harmonic_mean

SOURCE = "What counts as working here, fixed before measuring"
LIVING = ("fruit", "desserts", "mammals", "bugs", "birds", "beverages", "flowers", "meats_and_eggs")
THINGS = ("music", "hardware", "homes", "boating", "weapons", "weather", "sports", "astronomy")
EMOJI = ("animal-mammal", "food-prepared", "transport-ground", "sky & weather", "clothing", "place-building", "sport",
         "tool")
STAMPS = ("birds", "fruit", "flowers", "vegetables", "coins", "roadsigns", "christmas", "bovines")
TASKS = {"clip art, living": ("clip-art", LIVING), "clip art, things": ("clip-art", THINGS),
         "emoji": ("emoji", EMOJI), "emoji, other style": ("emoji-other-style", EMOJI), "stamps": ("stamps", STAMPS)}
STEPS, SHOTS, RATES = (0, 1, 5, 20, 50), (1, 4, 16), (0.1, 0.5, 2.0)
"""Where accuracy is measured; shots; learning rates, of which each method has its best on dev examples."""
RANDOM, PHOTO, START, REGULATOR, BOTH, SAME = ("CoOp, random", "CoOp, a photo of a", "start only", "regulator only",
                                               "GRAM", "GRAM, one domain")
METHODS = (RANDOM, PHOTO, START, REGULATOR, BOTH, SAME)
SETTINGS: dict[str, Any] = {"ctx_init": "a photo of a", "outer_lr": 0.005}
"""By the query loss of held-out episodes of another seed: at SUPMER's outer rate of 0.1 the vectors grow until nothing
moves them any more."""
TOWERS = {"coop": "text", "vpt": "vision", "both": "text and vision"}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        pairs: most for the meta-training; None: all.
        steps: outer steps.
        vision_steps: outer steps where the picture tower is tuned.
        shots: of the curves.
        tasks: how many of the tasks.
    """

    pairs: int | None = None
    steps: int = 100
    vision_steps: int = 30
    shots: tuple[int, ...] = SHOTS
    tasks: int = 5


class Subject(NamedTuple):
    """Pictures of a task's classes, as pictures and as features; examples hold a place in them."""

    labels: list[str]
    images: list[np.ndarray]
    features: Tensor

    def task(self, name: str, shots: int, seed: int) -> Task:
        return from_arrays(range(len(self.labels)), self.labels, shots, seed, name=name)


@functools.cache
def _clip() -> DualEncoder:
    return DualEncoder(*models.load("mini-clip"))


def _kept(name: str, examples: Sequence[Example], captions: Sequence[str] = ()) -> dict[str, Tensor]:
    """Features by the frozen towers, kept in the cache from one seed to the next."""
    clip = _clip()
    content = content_fingerprint([[e.inputs["image"] for e in examples], list(captions)])
    path = Path(cache_dir()) / "gram" / f"{name}-{content}-{clip.fingerprint()}.safetensors"
    try:
        return load_tensors(path, format="gram.features/1")[0]
    except FileNotFoundError:
        with torch.no_grad(), evaluating(clip.model):
            found = {"images": clip.all_images(examples)}
            if captions:
                found["texts"] = clip.texts([shortened(clip, c, clip.max_length - 2) for c in captions])
        save_tensors(path, found, format="gram.features/1")
        return found


@functools.cache
def _subjects() -> dict[str, Subject]:
    out = {}
    for name, (source, classes) in TASKS.items():
        pictures = data.pictures(source)
        folders = [str(label).split("/")[-1] for label in pictures.column("sublabel")]
        rows = [n for n, folder in enumerate(folders) if folder in classes]
        images = [np.asarray(as_image(np.array(pictures.images[n]))) for n in rows]
        labels = [folders[n].replace("_", " ").replace("-", " ").replace("&", "and") for n in rows]
        features = _kept(source, [Example({"image": image}, None) for image in images])["images"]
        out[name] = Subject(labels, images, features)
    return out


@functools.cache
def _pairs() -> list[Pair]:
    """Emoji and clip art of all other classes: at most 60 of a class, none that a task shows, no caption that is the
    name of a task's class."""
    shown = {picture_key(Example({"image": image}, None)) for s in _subjects().values() for image in s.images}
    names = {label for s in _subjects().values() for label in s.labels}
    kept: dict[str, tuple[np.ndarray, str]] = {}
    count: Counter[str] = Counter()
    for source, words in (("clip-art", 2), ("emoji", 20)):
        pictures = data.pictures(source)
        for n, row in enumerate(pictures.rows):
            # file names end in the author's name: the first words are the title's
            folder, caption = row["sublabel"].split("/")[-1], " ".join(row["caption"].lower().split()[:words])
            if folder in (*LIVING, *THINGS, *EMOJI) or not caption or caption in names or count[source + folder] >= 60:
                continue
            image = np.asarray(as_image(np.array(pictures.images[n])))
            key = picture_key(Example({"image": image}, None))
            if key not in shown and key not in kept:
                kept[key], count[source + folder] = (image, caption), count[source + folder] + 1
    return read_pairs(list(kept.values()))


def _episodes(method: Gram, seed: int, scale: Scale, held_out: bool = False) -> Episodes:
    """Episodes from four fifths of the pairs, or from the last fifth."""
    pairs = _pairs()
    known = _kept("pairs", [p.example for p in pairs], [p.caption for p in pairs])
    rows = [n for n in range(len(pairs)) if (n % 5 == 4) == held_out][:scale.pairs]
    return Episodes([pairs[n] for n in rows], known["images"][rows], known["texts"][rows],
                    classes=25 if held_out else method.classes, domains=method.domains, ways=method.ways,
                    shots=method.shots, shifted=method.shifted, seed=seed,
                    fits=lambda c: _clip().count_tokens(f"{c}.") <= _clip().max_length - 2 - method.n_ctx)


def adapt(prompt: MetaPrompt, task: Task, subject: Subject, lr: float, clip_norm: float,
          tests: Mapping[str, tuple[Sequence[Any], Sequence[Any], Tensor]], steps: Sequence[int] = STEPS,
          pixels: bool = False) -> dict[str, list[float]]:
    """Accuracy on each test (classes, targets, inputs) after so many full-batch steps of SGD on the examples."""
    clip, names = _clip(), list(task.classes or ())
    learner, regulator = prompt.for_classes(names).learner(clip), prompt.make_regulator()  # type: ignore[attr-defined]
    places = [int(e.inputs["image"]) for e in task.train]
    targets = torch.tensor([names.index(e.target) for e in task.train])
    known = "pixels" if pixels else "features"
    inputs = _pixels(subject, places) if pixels else subject.features[places]
    regulator.observe(subject.features[places])
    optimizer, out = torch.optim.SGD(learner.parameters(), lr=lr), {name: [] for name in tests}  # type: ignore[var-annotated]
    with evaluating(clip.model), frozen(clip.model), regulated(dict(learner.named_parameters()), regulator):
        for step in range(max(steps) + 1):
            if step in steps:
                with torch.no_grad():
                    for name, (classes, answers, seen) in tests.items():
                        best = torch.cat([learner(clip, classes, **{known: part}).argmax(1) for part in seen.split(64)])
                        right = [classes[b] == a for b, a in zip(best.tolist(), answers, strict=True)]
                        out[name].append(float(np.mean(right)))
            optimizer.zero_grad()
            F.cross_entropy(learner(clip, names, **{known: inputs}), targets).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(learner.parameters(), clip_norm)
            optimizer.step()
    return out


def _pixels(subject: Subject, places: Sequence[int]) -> Tensor:
    return _clip().read([Example({"image": subject.images[n]}, None) for n in places])


def _asked(task: Task, subject: Subject, part: str = "test") -> tuple[Sequence[Any], Sequence[Any], Tensor]:
    examples = list(getattr(task, part))
    places = [int(e.inputs["image"]) for e in examples]
    return list(task.classes or ()), [e.target for e in examples], subject.features[places]


def _bare(spec: PromptSpec, seed: int) -> MetaPrompt:
    prompt = VisionPrompt.of(spec.build(_clip(), 2, seed), [])
    return MetaPrompt([], prompt.spec, prompt.tensors, settings={"kind": "none", "dim": _clip().dim, "rank": 1,
                                                                 "final_relu": False})


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """Everything of one seed: clusters, episodes, starts, regulators, shots.

    Returns:
        ``held``: query loss on held-out episodes of starts; ``rates``: chosen learning rates; ``curves``: method ->
        shots -> task -> accuracy after STEPS; ``new``: method -> base, new, harmonic after STEPS; ``domains``:
        method -> other domain -> accuracy after STEPS; ``towers``: what is learned -> accuracy after 0, 1, 5, 20 steps.
    """
    clip, method = _clip(), Gram(meta_steps=scale.steps, **SETTINGS)
    subjects = dict(list(_subjects().items())[:scale.tasks])
    plain, same = dataclasses.replace(method, regulator="none"), dataclasses.replace(method, shifted=False)
    shifted = _episodes(method, seed, scale)
    starts = {RANDOM: _bare(PromptSpec(), seed), PHOTO: _bare(PromptSpec(start="a photo of a"), seed)}
    starts |= {START: plain.meta_train(shifted, clip, seed=seed, progress=False),
               BOTH: method.meta_train(shifted, clip, seed=seed, progress=False),
               SAME: same.meta_train(_episodes(same, seed, scale), clip, seed=seed, progress=False)}
    starts[REGULATOR] = starts[BOTH].with_vectors(starts[PHOTO])
    held = _episodes(method, seed, scale, held_out=True)
    losses = {name: plain.held_out(starts[name], held, clip) for name in (RANDOM, PHOTO, START, BOTH)}
    rates = {name: _rate(starts[name], subjects, seed, method.clip_norm) for name in METHODS}
    curves: dict[str, Any] = {name: {} for name in METHODS}
    for name in METHODS:
        for shots in scale.shots:
            curves[name][shots] = {t: adapt(
                starts[name], task := s.task(t, shots, seed), s, rates[name], method.clip_norm,
                {"all": _asked(task, s)})["all"] for t, s in subjects.items()}
    new, domains = {}, {}
    for name in METHODS:
        rows = []
        for t, s in subjects.items():
            parts = base_to_new(s.task(t, 4, seed))
            both = adapt(starts[name], parts.base, s, rates[name], method.clip_norm,
                         {"base": _asked(parts.base, s), "new": _asked(parts.new, s)})
            rows.append([[b, n, harmonic_mean(b, n)] for b, n in zip(both["base"], both["new"], strict=True)])
        new[name] = dict(zip(("base", "new", "harmonic"), np.array(rows).mean(0).T.tolist(), strict=True))
        if "emoji" in subjects:
            task, others = subjects["emoji"].task("emoji", 4, seed), ("emoji, other style", "stamps")
            domains[name] = adapt(starts[name], task, subjects["emoji"], rates[name], method.clip_norm, {
                other: _asked(subjects[other].task(other, 1, seed), subjects[other]) for other in others
                if other in subjects})
    return {"held": losses, "rates": rates, "curves": curves, "new": new, "domains": domains,
            "towers": _towers(seed, scale, subjects), "pairs": len(shifted.pairs), "classes": len(shifted.usable)}


def _rate(prompt: MetaPrompt, subjects: dict[str, Subject], seed: int, clip_norm: float) -> float:
    """The best of RATES on the dev examples of all tasks, after one and five steps with four shots."""
    def worth(lr: float) -> float:
        return float(np.mean([adapt(prompt, task := s.task(t, 4, seed), s, lr, clip_norm, {
            "dev": _asked(task, s, "dev")}, (1, 5))["dev"] for t, s in subjects.items()]))

    return max(RATES, key=worth)


def _towers(seed: int, scale: Scale, subjects: dict[str, Subject]) -> dict[str, list[float]]:
    """Text, vision, or both learned with as many and as small episodes: the tower is slow to train through."""
    name, subject = next(iter(subjects.items()))
    out, task = {}, subject.task(name, 1, seed)
    places = [int(e.inputs["image"]) for e in list(task.test)[::3]]
    tests = {"all": (list(task.classes or ()), [subject.labels[n] for n in places], _pixels(subject, places))}
    for learner, words in TOWERS.items():
        method = Gram(learner, meta_steps=scale.vision_steps, episodes_per_step=1, shots=1,  # type: ignore[arg-type]
                      **SETTINGS)
        start = method.meta_train(_episodes(method, seed, scale), _clip(), seed=seed, progress=False)
        out[words] = adapt(start, task, subject, method.inner_lr, method.clip_norm, tests, (0, 1, 5, 20), True)["all"]
    return out


def early(row: dict[str, Any], method: str, first: int = 0, last: int = 3) -> float:
    """Mean accuracy over tasks, shots and the first three measurements: 0, 1 and 5 steps; or the last alone."""
    part = slice(first, None if first < 0 else last)
    return float(np.mean([values[part] for tasks in row["curves"][method].values() for values in tasks.values()]))


def _gap(results: Results, one: Any, other: Any) -> Interval:
    """The paired difference of two functions of a seed's row, over seeds."""
    rows = [{"a": one(row), "b": other(row)} for row in results.rows]
    return dataclasses.replace(results, rows=rows).interval("a", minus=("b",), times=100)


def show(report: Report, results: Results) -> None:
    """Curves, new classes, other domains, towers."""
    report.facts |= {"model": "mini-clip, self-trained", "pairs": results.mean("pairs"),
                     "classes with two domains": results.mean("classes"), "outer steps": results.scale.steps}
    for shots in results.scale.shots:
        report.figure(f"Accuracy against steps, {shots} shots, mean of {results.scale.tasks} tasks", x_label="step",
                      y_label="accuracy", series=[curve(name, STEPS, [dataclasses.replace(results, rows=[
                          {"x": float(np.mean([v[n] for v in row["curves"][name][str(shots)].values()]))}
                          for row in results.rows]).interval("x") for n in range(len(STEPS))]) for name in METHODS])
    add_table(report, "After at most five steps, and at the end", (
        {"method": name, "learning rate": results.mean("rates", name),
         "0 to 5 steps": _gap(results, lambda r, n=name: early(r, n), lambda r: 0.0),
         "50 steps": _gap(results, lambda r, n=name: early(r, n, -1), lambda r: 0.0)}
        for name in METHODS), "per cent, mean of tasks and shots; 95 % bootstrap over seeds")
    add_table(report, "Base and new classes, 4 shots, 20 steps", (
        {"method": name, **{k: results.interval("new", name, k, 3, times=100) for k in ("base", "new", "harmonic")},
         "new after 0 steps": results.interval("new", name, "new", 0, times=100),
         "new after 50 steps": results.interval("new", name, "new", 4, times=100)} for name in METHODS))
    if results.rows[0]["domains"]:
        add_table(report, "Tuned on emoji, 4 shots, 20 steps", (
            {"method": name, **{other: results.interval("domains", name, other, 3, times=100)
                                for other in results.rows[0]["domains"][name]}} for name in METHODS))
    add_table(report, "Query loss on held-out episodes", (
        {"start": name, "before the step": results.interval("held", name, "before"),
         "after": results.interval("held", name, "after")} for name in results.rows[0]["held"]))
    add_table(report, "What is learned, 1 shot, small episodes", (
        {"learned": words, **{f"{step} steps": results.interval("towers", words, n, times=100)
                              for n, step in enumerate((0, 1, 5, 20))}} for words in TOWERS.values()))
    report.extend(_episodes(Gram(), 0, results.scale).report(1))


def claims(results: Results) -> Iterator[Claim]:
    """The claims of the abstract, and those of this project."""
    rule = "holds where the 95 % interval over seeds of the paired difference lies above 0, does not hold below it"
    words = "in words, no figure known to us [abstract]"
    held = _gap(results, lambda r: r["held"][RANDOM]["before"], lambda r: r["held"][BOTH]["before"])
    yield results.claim("Control: held-out episodes have a lower loss from the learned start than from a random one",
                        SOURCE, "-", rule, above(held), f"{held.value / 100:+.3f} nats", any_scale=True)

    def end(name: str) -> Any:
        return lambda r: r["new"][name]["harmonic"][3]

    def forgotten(name: str) -> Any:
        return lambda r: r["new"][name]["new"][-1] - max(r["new"][name]["new"])

    def first(name: str) -> Any:
        return lambda r: early(r, name)

    def abroad(name: str) -> Any:
        return lambda r: float(np.mean([v[3] for v in r["domains"][name].values()])) if r["domains"] else 0.0

    for statement, source, paper, one, other in (
            ("After at most 5 steps GRAM is better than CoOp from a random start", SOURCE, words, first(BOTH),
             first(RANDOM)),
            ("... than CoOp from \"a photo of a\"", SOURCE, words, first(BOTH), first(PHOTO)),
            ("The start alone is better than \"a photo of a\", where it began, after at most 5 steps", SOURCE, words,
             first(START), first(PHOTO)),
            ("The regulator alone is better than CoOp from the same \"a photo of a\" after at most 5 steps", SOURCE,
             words, first(REGULATOR), first(PHOTO)),
            ("Start and regulator are better than the start alone after at most 5 steps", SOURCE, words, first(BOTH),
             first(START)),
            ("Base and new classes: the harmonic mean of GRAM is above CoOp's (\"a photo of a\")", "abstract", words,
             end(BOTH), end(PHOTO)),
            ("... and above that of the start alone", SOURCE, words, end(BOTH), end(START)),
            ("GRAM forgets less of new classes, from their best to 50 steps, than CoOp (\"a photo of a\")", SOURCE,
             words, forgotten(BOTH), forgotten(PHOTO)),
            ("Tuned on emoji, GRAM is better on the other style and on stamps than CoOp (\"a photo of a\")", "abstract",
             words, abroad(BOTH), abroad(PHOTO)),
            ("Shifted episodes are better than those of one domain, harmonic mean", SOURCE, "-", end(BOTH), end(SAME)),
            ("Text and vision together are better than text alone", "abstract", words,
             lambda r: r["towers"]["text and vision"][3], lambda r: r["towers"]["text"][3]),
            ("... than vision alone", "abstract", words, lambda r: r["towers"]["text and vision"][3],
             lambda r: r["towers"]["vision"][3])):
        gap = _gap(results, one, other)
        yield results.claim(statement, source, paper, rule, above(gap), f"{gap:+.2f} points", count="seeds")
    yield from results.unmeasured("abstract", words, {
        "Consistent gains on 11 data sets, across data sets and domains": "the 11 data sets and a real CLIP"})


study = Study("GRAM: a start and a regulator", measure, claims, show, full=Scale(),
              quick=Scale(1200, 10, 2, (4,), 1), quick_seeds=1)
