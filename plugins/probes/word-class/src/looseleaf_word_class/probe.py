"""The probe: in which layers contexts group by the class of the next word, and whether that is more than copying."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from torch import nn

from looseleaf import Paper, Probe, Report, Series
from looseleaf import progress as progress_
from looseleaf.errors import UnsupportedModelError
from looseleaf.plugin import In
from looseleaf.probes.subject import parts
from looseleaf_word_class.clusters import chosen, clusters, linear_probe, plane
from looseleaf_word_class.planted import example_texts
from looseleaf_word_class.representations import Representations, representations, untrained
from looseleaf_word_class.separation import Measured, Separation, conditional, measure, ordered
from looseleaf_word_class.windows import Windows, as_windows

MAPS = ("mds", "tsne", "pca")
BANDS, LEAST = 5, 5
"""Groups of next words of similar frequency, and fewest windows of a class of last words."""
WORDS = "word vectors"


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """What was measured of one layer.

    Attributes:
        layer: its name.
        next: GDV of the labels.
        last: GDV of the class of the last word read; None where that is unknown.
        given_last: GDV of the labels among windows of one condition, see :func:`conditional`.
        given_frequency: the same among windows whose next words are of similar frequency.
        pairs: GDV of each pair of labels.
        dead: fraction of dimensions that are constant.
    """

    layer: str
    next: Measured
    last: float | None
    given_last: Measured | None
    given_frequency: Measured | None
    pairs: np.ndarray
    dead: float


@dataclasses.dataclass
class WordClassProbe(Probe):
    """In which layers do contexts group by the class of the word that comes next (arXiv 2302.07588)?

    Args:
        context: words read, 9 in the paper.
        per_class: windows of each class, drawn with the seed (ours).
        classes: classes of next words; None: all with so many windows.
        layers: name patterns of modules; None: the layers of the decoder.
        permutations: permutations of the labels, for chance (ours).
        condition: what windows that are compared have in common, to tell prediction from copying: the last word's
            class, the last word, or nothing (ours).
        stride: words from one window to the next (ours).
        untrained: also measure a copy with the weights that training begins from; it is as large as the model.
        maps: pictures of the layer with the lowest GDV: mds (the paper's), tsne, pca.
    """

    context: Annotated[int, In(">= 1")] = 9
    per_class: Annotated[int, In(">= 2")] = 200
    classes: tuple[str, ...] | None = None
    layers: tuple[str, ...] | None = None
    permutations: Annotated[int, In(">= 1")] = 100
    condition: Literal["last class", "last word"] | None = "last class"
    stride: Annotated[int, In(">= 1")] = 1
    untrained: bool = True
    maps: tuple[str, ...] = ("mds",)
    paper: ClassVar[Paper] = Paper(
        title="Word class representations spontaneously emerge in a deep neural network trained on next word "
              "prediction",
        authors=("Kishore Surendra", "Achim Schilling", "Paul Stoewer", "Andreas Maier", "Patrick Krauss"), year=2023,
        arxiv="2302.07588", venue="ICMLA 2023",
        summary="In which layers do contexts group by the class of the word that comes next?")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: few windows and permutations."""
        return {"make": lambda: cls(per_class=8, permutations=4, stride=3)}

    def validate(self) -> None:
        """See :meth:`looseleaf.Plugin.validate`."""
        self.check("maps", not isinstance(self.maps, str) and all(m in MAPS for m in self.maps),
                   f"some of {', '.join(MAPS)}")
        for field in ("classes", "layers"):
            value = getattr(self, field)
            self.check(field, value is None or (not isinstance(value, str) and len(value) > 0),
                       "None or a tuple of names")

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        """The GDV of every layer beside its controls, the pairs of classes, clusters, a linear probe and maps.

        Args:
            subject: a causal language model of transformers with its tokenizer, as a pair, a text pipeline or a
                LocalModel; or any module whose layers give (B, L, D), with a function from the words of a context to
                ids, as a pair or as its method ``encode``. Or checkpoints: a mapping from the step to such a subject,
                or to a function without arguments that loads it; all are measured, the last one in full.
            data: texts as (word, class) pairs; untagged texts and a spaCy pipeline, ``(texts, nlp)``; contexts with
                labels of your own, ``(contexts, labels)``; :class:`Windows`; or the text of a file of tagged words,
                ``the/DET dog/NOUN ...``, one text a line. None: made-up English.
            seed: of the windows drawn, permutations, resamples, clusters and the untrained copy.
            progress: show progress bars; None: only on a terminal.

        Raises:
            TypeError: another subject.
            ValueError: no tokenizer, data of another kind, too few windows, or a layer that does not fit.
            UnsupportedModelError: the layers could not be found.
        """
        checkpoints = dict(subject) if isinstance(subject, Mapping) else {None: subject}
        if not checkpoints:
            raise ValueError("subject: expected a model or a mapping from step to model, got an empty mapping")
        *early, (step, last) = [(step, None if callable(s) and not isinstance(s, nn.Module) else parts_of(s))
                                for step, s in checkpoints.items()]
        windows = self.windows(data, seed)
        curve: dict[Any, list[LayerResult]] = {}
        for earlier, loaded in early:
            model, processor = loaded or parts_of(checkpoints[earlier]())
            curve[earlier] = self.measure(representations(model, processor, windows, self.layers, progress=progress),
                                          windows, seed, label=f"step {earlier}", progress=progress)
            del model, processor, loaded
        model, processor = last or parts_of(checkpoints[step]())
        report = Report("Word classes of what comes next", {
            "model": type(model).__name__, "windows": len(windows),
            "classes": ", ".join(map(str, windows.classes)), "words read": self.context,
            **{f"left out: {why}": count for why, count in windows.left_out.items()}, "seed": seed})
        found = representations(model, processor, windows, self.layers, progress=progress)
        results = self.measure(found, windows, seed, progress=progress)
        bare = self._untrained(report, model, processor, windows, seed, progress)
        show_layers(report, results, bare, self.condition, windows)
        best = min((r for r in results if r.layer != WORDS), key=lambda r: r.next.value, default=results[0])
        self._show_clusters(report, found, windows, seed, progress)
        show_pairs(report, best, windows.classes)
        self._show_maps(report, found, best.layer, windows, seed)
        if early:
            show_checkpoints(report, {**curve, step: results})
        for n in range(0, len(windows), max(1, len(windows) // 4)):
            report.examples.append((f"a window before {windows.labels[n]}", windows.written[n]))
        return report

    def windows(self, data: Any = None, seed: int = 0) -> Windows:
        """The windows that :meth:`run` draws from its data."""
        given = as_windows(example_texts(seed=0) if data is None else data, self.context, self.stride)
        return given.sample(self.per_class, self.classes, seed)

    def measure(self, found: Representations, windows: Windows, seed: int = 0, *, label: str = "layers",
                progress: bool | None = None) -> list[LayerResult]:
        """What is measured of word vectors, where there are any, and of each layer, in the order of the model.

        Args:
            found: what :func:`representations` gave for these windows.
            windows: as :meth:`windows` gave them.
            seed: of permutations and resamples.
            label: of the progress bar.
            progress: show a progress bar; None: only on a terminal.
        """
        labels, texts = numbers(windows.labels), numbers(windows.texts)
        last = None if windows.last is None else numbers(windows.last)
        condition = numbers(windows.last_words) if self.condition == "last word" else \
            last if self.condition == "last class" else None
        frequency = None if windows.counts is None else bands(windows.counts)
        options: dict[str, Any] = {"permutations": self.permutations, "seed": seed}
        layers = ({} if found.words is None else {WORDS: found.words}) | found.states
        out = []
        for name, states in progress_.track(layers.items(), label, len(layers), progress):
            separation = Separation(states)
            common = None if last is None else np.flatnonzero(np.bincount(last)[last] >= LEAST)
            out.append(LayerResult(
                name, measure(separation, labels, texts, **options),
                None if last is None or common is None or len(np.unique(last[common])) < 2 else
                float(Separation(states[common])(np.unique(last[common], return_inverse=True)[1])[0]),
                None if condition is None else conditional(states, labels, condition, texts, **options),
                None if frequency is None else conditional(states, labels, frequency, texts, **options),
                separation.pairs(labels), separation.dead))
        return out

    def _untrained(self, report: Report, model: nn.Module, processor: Any, windows: Windows, seed: int,
                   progress: bool | None) -> dict[str, LayerResult]:
        """What is measured of an untrained copy, by layer; empty where there is none, and why is in the report."""
        if not self.untrained:
            return {}
        try:
            fresh = untrained(model, seed)
        except UnsupportedModelError as error:
            report.facts["untrained copy"] = f"left out: {error}"
            return {}
        found = representations(fresh, processor, windows, self.layers, progress=progress)
        return {r.layer: r for r in self.measure(found, windows, seed, label="untrained", progress=progress)}

    def _show_clusters(self, report: Report, found: Representations, windows: Windows, seed: int,
                       progress: bool | None) -> None:
        """Agreement of k-means with the classes, and the linear probe, at every layer."""
        labels, texts = numbers(windows.labels), numbers(windows.texts)
        layers = ({} if found.words is None else {WORDS: found.words}) | found.states
        table = report.table("Clusters and a linear probe", [
            "layer", "ARI", "NMI", "probe accuracy", "control task", "selectivity", "majority"],
            note="k-means with as many clusters as classes. Probe: fitted on half of the texts, scored on the others; "
                 "control task: every last word has a class drawn at random, so that it can only be memorised")
        for name, states in progress_.track(layers.items(), "clusters", len(layers), progress):
            points = Separation(states).points.numpy()
            score = linear_probe(points, labels, texts, windows.last_words, seed)
            table.add(name, *clusters(points, labels, seed), score.accuracy, _number(score.control),
                      _number(score.selectivity), score.majority)

    def _show_maps(self, report: Report, found: Representations, layer: str, windows: Windows, seed: int) -> None:
        labels = numbers(windows.labels)
        rows = chosen(labels, seed)
        points = Separation(found.words if layer == WORDS else found.states[layer]).points.numpy()[rows]
        for kind in self.maps:
            place = plane(points, kind, seed)
            own = [place[labels[rows] == n].T.tolist() for n in range(len(windows.classes))]
            report.figure(f"Map of {layer} by {kind}", note="the layer with the lowest GDV; a part of the windows",
                          series=[Series(str(name), x, y, style="points")
                                  for name, (x, y) in zip(windows.classes, own, strict=True)])


def parts_of(subject: Any) -> tuple[nn.Module, Any]:
    """A model and what makes ids of a context: a tokenizer, or a function of its words.

    Raises:
        TypeError: another subject.
        ValueError: neither is there.
    """
    model, processor = parts(subject)
    processor = processor if processor is not None else getattr(model, "encode", None)
    if not callable(processor):
        raise ValueError(f"subject: expected a (model, tokenizer) pair, or a model with encode(words) -> ids, got "
                         f"{type(model).__name__} alone")
    return model, processor


def numbers(names: Sequence[Any]) -> np.ndarray:
    """Labels as int64 from 0 on, in sorted order."""
    of = {name: n for n, name in enumerate(ordered(list(names)))}
    return np.array([of[name] for name in names])


def bands(counts: Sequence[int], groups: int = BANDS) -> np.ndarray:
    """Groups of windows whose next words are of similar frequency, as many in each as ties allow; int64 (N,)."""
    values = np.asarray(counts)
    edges = np.unique(np.quantile(values, np.arange(1, groups) / groups))
    return np.searchsorted(edges, values, side="left")


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def show_layers(report: Report, results: Sequence[LayerResult], bare: Mapping[str, LayerResult],
                condition: str | None, windows: Windows) -> None:
    """Tables and figures of the GDV of every layer beside its controls.

    Args:
        report: goes on.
        results: of the model.
        bare: of an untrained copy, by layer; may be empty.
        condition: see :class:`WordClassProbe`.
        windows: what was read.
    """
    table = report.table("GDV of the next word's class", [
        "layer", "GDV", "low", "high", "permuted labels", "p", "untrained copy", "last word's class", "dead units"],
        note="0: classes are not separated, -1: two point-like classes; 95 % bootstrap over texts. p: fraction of "
             "labellings as low. Dead units: constant dimensions, which dilute the value")
    for r in results:
        fresh = bare.get(r.layer)
        table.add(r.layer, *r.next.interval, r.next.null, r.next.p, fresh.next.value if fresh else None, r.last, r.dead)
    x = [float(n) for n in range(len(results))]
    curves = [_line("next word's class", x, [r.next for r in results]),
              Series("permuted labels", x, [r.next.null for r in results], style="line")]
    if all(r.last is not None for r in results):
        curves.append(Series("last word's class", x, [float(r.last or 0) for r in results], style="line"))
    if bare:
        curves.append(_line("next, untrained copy", x, [bare[r.layer].next for r in results]))
    words = ": 0 is the last word's vector" if results[0].layer == WORDS else ""
    report.figure("GDV by layer", x_label=f"layer{words}", y_label="GDV", series=curves)
    kinds = {f"given the {condition}": "given_last", "given the next word's frequency": "given_frequency"}
    lines = []
    for title, field in kinds.items():
        rows = [(r, getattr(r, field)) for r in results]
        if all(found is None for _, found in rows):
            why = "it was not asked for" if field == "given_last" and condition is None else \
                "no two classes share one" if (windows.last if field == "given_last" else windows.counts) is not None \
                else "the data do not say it"
            report.facts[title if condition or field != "given_last" else "given the last word"] = f"left out: {why}"
            continue
        table = report.table(f"GDV {title}", ["layer", "GDV", "low", "high", "permuted labels", "p", "untrained copy",
                                              "windows"],
                             note="classes are compared among windows that agree in it, and averaged: what it explains "
                                  "does not count. Labels permuted among these windows")
        for r, found in rows:
            if found is not None:
                fresh = getattr(bare.get(r.layer), field, None)
                table.add(r.layer, *found.interval, found.null, found.p, fresh.value if fresh else None, found.points)
        lines.append(_line(title, x, [found for _, found in rows]))
        if bare and all(getattr(bare[r.layer], field) is not None for r in results):
            lines.append(_line(f"{title}, untrained copy", x, [getattr(bare[r.layer], field) for r in results]))
    if lines:
        report.figure("More than copying?", x_label=f"layer{words}", y_label="GDV under a condition", series=lines)


def _line(name: str, x: Sequence[float], found: Sequence[Measured]) -> Series:
    value, low, high = (list(column) for column in zip(*(m.interval for m in found), strict=True))
    return Series(name, list(x), value, low, high)


def show_pairs(report: Report, result: LayerResult, classes: Sequence[Any]) -> None:
    """The GDV of each pair of classes of one layer."""
    report.table(f"GDV of pairs of classes, {result.layer}", ["class", *map(str, classes)],
                 [[str(name), *map(float, row)] for name, row in zip(classes, result.pairs, strict=True)],
                 note="the layer with the lowest GDV; the mean over pairs is the GDV")
    report.figure(f"Pairs of classes, {result.layer}", x_label=", ".join(map(str, classes)),
                  image=(-result.pairs).tolist(), note="-GDV: dark where two classes are well separated")


def show_checkpoints(report: Report, curve: Mapping[Any, Sequence[LayerResult]]) -> None:
    """The GDV of every layer over checkpoints, by step."""
    names = [r.layer for r in next(iter(curve.values()))]
    table = report.table("GDV over checkpoints", ["step", *names])
    for step, results in curve.items():
        table.add(step if isinstance(step, (int, float)) else str(step), *(r.next.value for r in results))
    steps = [float(s) if isinstance(s, (int, float)) else float(n) for n, s in enumerate(curve)]
    report.figure("GDV over checkpoints", x_label="step", y_label="GDV of the next word's class", series=[
        _line(name, steps, [results[n].next for results in curve.values()]) for n, name in enumerate(names)])


__all__ = ["BANDS", "MAPS", "WORDS", "LayerResult", "WordClassProbe", "bands", "numbers", "parts_of",
           "show_checkpoints", "show_layers", "show_pairs"]
