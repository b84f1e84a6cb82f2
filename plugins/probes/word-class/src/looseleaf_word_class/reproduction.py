"""The paper's claims on small LSTMs trained on Brown, on grammars with a known answer, and on SmolLM2-135M."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from looseleaf import Claim, Report
from looseleaf.statistics import Interval
from looseleaf_lab import data, models
from looseleaf_lab.study import Results, Study, above, add_table, below, curve, every
from looseleaf_word_class.clusters import linear_probe
from looseleaf_word_class.planted import Grammar, PlantedModel
from looseleaf_word_class.probe import LEAST, WORDS, LayerResult, WordClassProbe, numbers
from looseleaf_word_class.representations import representations, untrained
from looseleaf_word_class.separation import Measured, Separation, conditional
from looseleaf_word_class.tags import brown_class
from looseleaf_word_class.windows import Windows, windows
from looseleaf_word_class.word_model import WordModel, train_word_model

LAST, OURS = "layers.1", "this project's rule"
CLASSES = ("ADJ", "ADP", "ADV", "DET", "NOUN", "VERB")
"""Of next words before which SmolLM2 is looked at; set before measuring."""
FREQUENT = 30
"""Last words that the condition on the last word is measured on."""
SPREAD, ZERO = 0.10, 0.02
"""Highest standard deviation over seeds beside the mean's size, and a conditional GDV that counts as 0; set before."""
CONDITIONS = (("the last word's class", "end", "given last"), ("the last word", "by word", "given last"),
              ("the next word's frequency", "end", "frequency"))
"""In words, and where a row has it."""
NEXT, GIVEN = ("next", "low", "high"), ("given last value", "given last low", "given last high")
KNOWN = ("last", "next", "frequency", "noise")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is trained and read: words known, width, steps on Brown and on a grammar, windows of each class (for
    SmolLM2 apart) and of each frequent last word, permutations."""

    words: int = 5000
    hidden: int = 128
    steps: int = 700
    grammar_steps: int = 600
    per_class: int = 200
    smollm2: int = 200
    per_word: int = 200
    permutations: int = 100

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Steps after which the network is looked at."""
        return tuple(dict.fromkeys(self.steps * n // 32 for n in (0, 1, 4, 16, 32)))

    @property
    def probe(self) -> WordClassProbe:
        """The probe of the small networks."""
        return WordClassProbe(per_class=self.per_class, permutations=self.permutations)


@functools.cache
def brown() -> tuple[list[Any], list[Any]]:
    """Files of Brown as texts, four fifths to train on and the rest to measure on."""
    files: dict[str, list[tuple[str, str]]] = {}
    for row in data.rows("brown"):
        files.setdefault(row["file"], []).extend(
            (word, brown_class(tag)) for word, tag in zip(row["words"], row["tags"], strict=True))
    texts = [files[name] for name in sorted(files)]
    return [t for n, t in enumerate(texts) if n % 5], texts[::5]


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """A network trained on Brown and looked at on the way, and one for each of two grammars."""
    train, test = brown()
    probe, everything = scale.probe, windows(test)
    own = everything.sample(scale.per_class, seed=seed)
    model = WordModel.of(train, scale.words, hidden=scale.hidden, seed=seed)
    steps: dict[int, Any] = {}

    def look(step: int) -> None:
        found = representations(model, model.encode, own, progress=False)
        steps[step] = plain(probe.measure(found, own, seed, progress=False))

    losses = train_word_model(model, train, steps=scale.steps, seed=seed, watch=look, at=scale.checkpoints,
                              progress=False)
    states = Separation(representations(model, model.encode, own, progress=False).states[LAST]).points.numpy()
    score = linear_probe(states, numbers(own.labels), numbers(own.texts), own.last_words, seed)
    same = everything.sample(scale.per_class, seed=0)
    again = representations(model, model.encode, same, progress=False).states[LAST]
    return {"steps": steps, "end": steps[scale.steps], "start": steps[0], "windows": len(own),
            "classes": own.classes, "loss": float(np.mean(losses[-50:])),
            "by word": by_word(model, everything, seed, scale),
            "on the same windows": float(Separation(again)(numbers(same.labels))[0]),
            "probe": {"accuracy": score.accuracy, "control task": score.control, "selectivity": score.selectivity},
            "grammar": {order: on_grammar(Grammar(order, sharp=0.9), seed, scale) for order in (1, 2)}}


def plain(results: Sequence[LayerResult]) -> dict[str, Any]:
    """What the study keeps of layers: layer -> name -> number."""
    return {r.layer: {
        "next": r.next.value, "low": r.next.interval.low, "high": r.next.interval.high, "permuted": r.next.null,
        "p": r.next.p, "last": r.last, "dead": r.dead,
        **flat("given last", r.given_last), **flat("frequency", r.given_frequency)} for r in results}


def flat(name: str, found: Measured | None) -> dict[str, float]:
    """A conditional GDV as numbers under ``name``; empty where there is none."""
    if found is None:
        return {}
    low, high = found.interval.low, found.interval.high
    return {f"{name} {what}": number for what, number in (
        ("value", found.value), ("low", low), ("high", high), ("permuted", found.null), ("p", found.p),
        ("points", found.points))}


def by_word(model: WordModel, everything: Windows, seed: int, scale: Scale) -> dict[str, Any]:
    """The GDV given the last word, by layer, on as many windows after each of the most frequent words."""
    last, draw = np.array(everything.last_words), np.random.default_rng(seed)
    rows = [draw.permutation(np.flatnonzero(last == word))[:scale.per_word]
            for word, _ in Counter(last.tolist()).most_common(FREQUENT)]
    own = everything.take(np.sort(np.concatenate(rows)))
    found = representations(model, model.encode, own, progress=False).states
    return {name: flat("given last", conditional(
        states, numbers(own.labels), numbers(own.last_words), numbers(own.texts), permutations=scale.permutations,
        seed=seed, least=LEAST)) for name, states in found.items()}


def on_grammar(grammar: Grammar, seed: int, scale: Scale) -> dict[str, Any]:
    """The last layer of a network before and after training on a grammar."""
    own = scale.probe.windows(grammar.sample(150, seed=1000 + seed), seed)
    model = WordModel(grammar.vocabulary(), hidden=64, seed=seed)
    out: dict[str, Any] = {}

    def look(step: int) -> None:
        found = representations(model, model.encode, own, progress=False)
        out["trained" if step else "untrained"] = plain(scale.probe.measure(found, own, seed, progress=False))[LAST]

    train_word_model(model, grammar.sample(2000, seed=seed), steps=scale.grammar_steps, batch=32, lr=1e-2, seed=seed,
                     watch=look, at=(0, scale.grammar_steps), progress=False)
    return out


def once(scale: Scale) -> dict[str, Any]:
    """What the probe finds where the answer is known, and in SmolLM2 and a copy with random weights."""
    grammar = Grammar(order=2, sharp=1.0, frequent=2)
    planted = dataclasses.replace(scale.probe, layers=KNOWN)
    texts = planted.windows(grammar.sample(150), 0)
    model: Any = PlantedModel(grammar)
    found = {r.layer: r for r in planted.measure(representations(model, model.encode, texts, KNOWN, progress=False),
                                                 texts, progress=False)}
    given = {name: (r.given_last, r.given_frequency) for name, r in found.items()}
    checks = {
        "point classes have their exact value": abs(found["next"].next.value + (5 / 8) ** 0.5) < 1e-9,
        "knowledge passes every condition": all(m is not None and m.value < -0.5 for m in given["next"]),
        "a copy of the last class is 0 given it": given["last"][0] is not None and given["last"][0].value == 0,
        "frequency alone looks like knowledge": found["frequency"].next.value < -0.5,
        "and is 0 given frequency": given["frequency"][1] is not None and given["frequency"][1].value == 0,
        "noise has no class": abs(found["noise"].next.value) < ZERO}
    probe = WordClassProbe(per_class=scale.smollm2, permutations=scale.permutations, classes=CLASSES)
    own = probe.windows(brown()[1], 0)
    labels, words, files = (numbers(names) for names in (own.labels, own.last_words, own.texts))
    model, tokenizer = models.load("smollm2")

    def of(model: Any) -> dict[str, Any]:
        states = representations(model, tokenizer, own, progress=False)
        out = plain(probe.measure(states, own, progress=False))
        for name, each in states.states.items():
            out[name] |= flat("given word", conditional(each, labels, words, files, permutations=scale.permutations))
        return out

    return {"planted": checks, "SmolLM2": of(model), "random copy": of(untrained(model))}


def show(report: Report, results: Results) -> None:
    """Layers of the networks with every control, training, grammars, and the layers of SmolLM2."""
    scale, first, steps = results.scale, results.rows[0], results.scale.checkpoints
    report.facts |= {"network": f"LSTM, 2 layers of {scale.hidden}, {scale.words} words, {scale.steps} steps of 1,280 "
                                "words, self-trained", "windows": first["windows"],
                     "classes": ", ".join(first["classes"]), "loss at the end, nats a word": results.mean("loss")}
    layers = list(first["end"])
    add_table(report, "GDV of the next word's class, networks trained on Brown", (
        {"layer": name, "trained": results.interval("end", name, "next"),
         "untrained": results.interval("start", name, "next"), "permuted labels": results.mean("end", name, "permuted"),
         "last word's class": results.mean("end", name, "last"), "dead units": results.mean("end", name, "dead")}
        for name in layers), f"means over {len(results.seeds)} seeds, 95 % bootstrap; windows of files not trained on")
    add_table(report, "More than copying?", (
        {"layer": name, "given": label, "trained": results.interval(key, name, f"{kind} value"),
         "untrained": results.mean("start", name, f"{kind} value") if key == "end" else None,
         "permuted labels": results.mean(key, name, f"{kind} permuted"),
         "largest p": max(results.values(key, name, f"{kind} p"))}
        for label, key, kind in CONDITIONS for name in first[key]),
        "conditional GDV: classes are compared among windows that agree in the condition")
    add_table(report, "Linear probe of the last layer", (
        {"measure": name, "accuracy": results.interval("probe", name)} for name in first["probe"]),
        f"{len(first['classes'])} classes of equal size; control task: a class drawn at random for each last word")
    report.figure("GDV over training, Brown", x_label="step", y_label="GDV of the next word's class", series=[
        curve(name, steps, [results.interval("steps", step, name, "next") for step in steps]) for name in layers])
    add_table(report, "Grammars, last layer", (
        {"order": order, "network": kind, "next class": results.interval("grammar", order, kind, "next"),
         "last class": results.mean("grammar", order, kind, "last"),
         "given the last class": results.interval("grammar", order, kind, "given last value")}
        for order in ("1", "2") for kind in ("untrained", "trained")),
        "5 classes of 40 words. Order 1: the last class says all there is to know; order 2: it says nothing")
    both = [results.once[name] for name in ("SmolLM2", "random copy")]
    add_table(report, "SmolLM2-135M on Brown", (
        {"layer": name, "next class": _interval(own[name], *NEXT),
         "random copy": other[name]["next"], "permuted labels": own[name]["permuted"], "last class": own[name]["last"],
         "given the last class": _interval(own[name], *GIVEN),
         "p": own[name]["given last p"], "random copy, given": other[name]["given last value"],
         "given the last word": own[name].get("given word value"), "p, word": own[name].get("given word p"),
         "given frequency": own[name]["frequency value"]}
        for own, other in (both,) for name in own),
        f"{scale.smollm2} windows of each of {', '.join(CLASSES)}; 95 % bootstrap over files")
    names = list(both[0])
    report.figure("SmolLM2-135M by layer", x_label="layer: 0 is the last word's vector", y_label="GDV", series=[
        curve(f"{label}, {who}" if who else label, range(len(names)),
              [_interval(own[name], *keys) for name in names])
        for own, who in zip(both, ("", "random copy"), strict=True)
        for label, keys in (("next class", NEXT), ("given the last class", GIVEN))])


def claims(results: Results) -> Iterator[Claim]:
    """Every claim with its verdict; the quick run decides the planted answers alone."""
    claim = functools.partial(results.claim, count="seeds")
    checks = results.once["planted"]
    yield results.claim("Control: the probe finds a planted class and nothing else", OURS, "-", "every check holds",
                        all(checks.values()), "; ".join(f"{k}: {'yes' if v else 'no'}" for k, v in checks.items()),
                        any_scale=True)
    end, start = results.interval("end", LAST, "next"), results.interval("start", LAST, "next")
    chance = results.interval("end", LAST, "permuted")
    yield claim("Activations after nine words cluster by the class of the tenth, without labels in training",
                "abstract", "qualitative [abstract]", "last layer: trained below untrained below permuted labels, "
                "intervals over seeds apart", every(above(start, end.high), above(chance, start.high)),
                f"trained {end:.4f}, untrained {start:.4f}, permuted {chance:.4f}")
    deeper = [results.interval("end", name, "next", minus=("end", other, "next"))
              for other, name in ((WORDS, "layers.0"), ("layers.0", LAST))]
    yield claim("The clustering grows with depth", "[memory]", "[memory]", "interval of the difference of GDV to the "
                "layer before below 0, for both layers", every(*map(below, deeper)),
                f"layer 1 less word vectors {deeper[0]:+.4f}, layer 2 less layer 1 {deeper[1]:+.4f}")
    middle = results.scale.checkpoints[2]
    longer = [results.interval("steps", middle, LAST, "next", minus=("start", LAST, "next")),
              results.interval("end", LAST, "next", minus=("steps", middle, LAST, "next"))]
    yield claim("The clustering grows with training", "[memory]", "[memory]", "last layer: interval below 0 of the "
                "change in the first eighth of the steps and of that in the rest", every(*map(below, longer)),
                f"first eighth {longer[0]:+.4f}, the rest {longer[1]:+.4f}")
    values = results.values("on the same windows")
    spread = float(np.std(values, ddof=1)) / abs(float(np.mean(values))) if len(values) > 1 else None
    yield claim("The GDV at the end of training is reproducible over initialisations", "2021 paper, abstract",
                "reproducible [abstract]", f"standard deviation over seeds at most {SPREAD:.0%} of the "
                "mean's size, on the same windows",
                None if spread is None else spread <= SPREAD,
                "one seed" if spread is None else f"{spread:.1%} of {float(np.mean(values)):.4f}; "
                f"{np.std(results.values('end', LAST, 'next'), ddof=1) / abs(end.value):.1%} with windows of their own")
    for key, what in (("end", "the last word's class"), ("by word", "the last word")):
        given = results.interval(key, LAST, "given last value")
        p = max(results.values(key, LAST, "given last p"))
        yield claim(f"More than copying: next classes are separated among windows with {what} in common", OURS, "-",
                    "last layer: interval over seeds below 0 and p <= 0.05 in every seed",
                    every(below(given), True if p <= 0.05 else None), f"{given:+.4f}, largest p {p:.3f}")
    gain = results.interval("end", LAST, "given last value", minus=("start", LAST, "given last value"))
    yield claim("Training adds to what is there given the last word's class", OURS, "-", "last layer: interval of "
                "trained less untrained below 0", below(gain), f"{gain:+.4f}")
    rare = results.interval("end", LAST, "frequency value")
    p = max(results.values("end", LAST, "frequency p"))
    yield claim("It is not frequency: next classes are separated among next words of similar frequency", OURS, "-",
                "last layer: interval over seeds below 0 and p <= 0.05 in every seed",
                every(below(rare), True if p <= 0.05 else None), f"{rare:+.4f}, largest p {p:.3f}")
    one, two = (results.interval("grammar", order, "trained", "given last value") for order in ("1", "2"))
    seen = results.interval("grammar", "1", "trained", "next")
    yield claim("Where the last class says all, the GDV shows a class and the conditional one does not", OURS, "-",
                f"order 1: interval of the GDV below -0.1, mean of the conditional one within {ZERO} of 0",
                every(below(seen, -0.1), abs(one.value) <= ZERO), f"GDV {seen:+.4f}, conditional {one:+.4f}")
    yield claim("Where the last class says nothing, the conditional GDV shows what was learned", OURS, "-",
                f"order 2: interval below -{ZERO}", below(two, -ZERO), f"{two:+.4f}")
    own, other = (list(results.once[name].values())[-1] for name in ("SmolLM2", "random copy"))
    seen, fresh = (_interval(of, *NEXT) for of in (own, other))
    yield results.claim("SmolLM2-135M separates next classes more than its random copy does", OURS, "-", "last layer: "
                        "intervals over files apart", above(fresh, seen.high), f"{seen:+.4f}, copy {fresh:+.4f}")
    for kind, what in (("last", "the last word's class"), ("word", "the last word")):
        if f"given {kind} value" in own:
            keys = [f"given {kind} {part}" for part in ("value", "low", "high")]
            given, copied = _interval(own, *keys), _interval(other, *keys)
            p = own[f"given {kind} p"]
            yield results.claim(f"... also among windows with {what} in common", OURS, "-", "last layer: interval over "
                                "files below 0 and p <= 0.05", every(below(given), True if p <= 0.05 else None),
                                f"{given:+.4f}, p {p:.3f}; copy {copied:+.4f}")


def _interval(layer: Mapping[str, Any], *keys: str) -> Interval:
    return Interval(*(layer[key] for key in keys))


study = Study("word-class: the paper's claims", measure, claims, show=show, once=once, full=Scale(),
              quick=Scale(1000, 32, 32, 40, 40, 8, 40, 20), quick_seeds=2)
