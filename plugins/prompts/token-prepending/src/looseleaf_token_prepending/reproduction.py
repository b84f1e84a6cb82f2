"""The paper's claims at small real scale: SmolLM2-135M on real sentences, comparison by the MiniLM sentence encoder.

Every sentence is run once for each way of embedding it, for all layers at a time. A seed is a split into development
and test sentences and a draw of pairs: layers are chosen on the one and measured on the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from looseleaf import Claim, Report
from looseleaf.statistics import Interval, bootstrap
from looseleaf_lab import data, models
from looseleaf_lab.study import Results, Study, add_table, curve
from looseleaf_lab.timing import interleave
from looseleaf_token_prepending import quality
from looseleaf_token_prepending.encoder import SentenceEncoder, last_token, mean_pooling, prompt_eol
from looseleaf_token_prepending.optimizer import TokenPrepending, default_ends, default_exit

SETS = {"documentation": ("subjects", 200), "conversation": ("topics", 201)}
"""Set -> task of the lab that the sentences and their topics come from, and how many."""
PROMPTS = {"prompteol": "PromptEOL", "pretended-cot": "Pretended CoT", "knowledge": "Knowledge Enhancement"}
TIME_LIMIT = 1.10
OURS, BASE, EARLY = "PromptEOL + TP, layers chosen", "PromptEOL, last layer", "PromptEOL, exit chosen"
MEAN, LAST = "mean, last layer", "last token, last layer"
RULE = "this project's rule"
ABOVE = ("the 95 % interval of the difference lies above 0 (mean over sets; bootstrap over test sentences, mean of the "
         "intervals of all splits)")


@dataclass(frozen=True)
class Scale:
    """How much is measured; ``brief``: a fifth of the sentences, one end layer, PromptEOL only, one timed round."""

    brief: bool = False


def sentences(teacher: tuple[Any, Any], brief: bool) -> dict[str, quality.Sentences]:
    """The sets, each topic equally often, with the teacher's cosines."""
    out = {}
    for name, (task, size) in SETS.items():
        found = data.classification_task(task, seed=0, train=4, dev=4, test=size // 5 if brief else size).test
        texts = [str(e.inputs["text"]) for e in found]
        vectors = models.sentence_embeddings(teacher, texts).numpy()
        out[name] = quality.Sentences(texts, [str(e.target) for e in found], quality.square(vectors))
    return out


def ways(model: Any, tokenizer: Any, brief: bool = False) -> dict[str, Callable[[], SentenceEncoder]]:
    """Name -> maker of every way of embedding; ``"<prompt> <end layer>"`` is Token Prepending over a prompt."""
    ends = default_ends(len(last_token(model, tokenizer).layers))[:1 if brief else None]

    def prepending(prompt: str, end: int, seed: int = 0) -> Callable[[], SentenceEncoder]:
        return functools.partial(TokenPrepending(prompt, end_layer=end).encoder, model, tokenizer, seed)

    out: dict[str, Callable[[], SentenceEncoder]] = {
        "last token": functools.partial(last_token, model, tokenizer),
        "mean": functools.partial(mean_pooling, model, tokenizer), "placeholder": prepending("prompteol", 0)}
    for prompt in list(PROMPTS)[:1 if brief else None]:
        out[prompt] = functools.partial(prompt_eol, model, tokenizer, prompt)
        out |= {f"{prompt} {end}": prepending(prompt, end) for end in (ends if prompt == "prompteol" else ends[:1])}
    if not brief:
        out["other placeholder"] = prepending("prompteol", ends[0], 1)
    return out


@functools.cache
def embeddings(scale: Scale) -> quality.EmbeddingComparison:
    """All ways over all sentences; the splits are added by :func:`measure`."""
    model, tokenizer = models.load("smollm2")
    sets = sentences(models.load("minilm"), scale.brief)
    exits = list(range(1, len(last_token(model, tokenizer).layers) + 1))
    found: dict[str, quality.Likeness] = {}
    for way, maker in ways(model, tokenizer, scale.brief).items():
        found[way] = {name: np.stack([
            quality.square(s) for s in maker().states(some.texts, exits, progress=False).numpy()]).astype(np.float32)
            for name, some in sets.items()}
    return quality.EmbeddingComparison(sets, exits, found, [])


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """What one split gives, see :func:`measure_split`."""
    return measure_split(embeddings(scale), seed)


def measure_split(comparison: quality.EmbeddingComparison, seed: int) -> dict[str, Any]:
    """Every row of the tables, the layers chosen, the curves, and differences, as [value, low, high] over sentences."""
    split = {name: quality.SentenceSplit.draw(some, seed) for name, some in comparison.sets.items()}
    comparison = quality.EmbeddingComparison(comparison.sets, comparison.exits, comparison.ways, [split])
    last, ends = len(comparison.exits) - 1, end_layers(comparison)
    default = comparison.exits.index(default_exit(comparison.exits[-1]))
    [ours], [early] = comparison.chosen(*(f"prompteol {end}" for end in ends)), comparison.chosen("prompteol")
    rows: dict[str, quality.Choice] = {
        LAST: ("last token", last), MEAN: ("mean", last), "mean, exit chosen": comparison.chosen("mean")[0],
        BASE: ("prompteol", last), EARLY: early,
        "PromptEOL and placeholder alone, exit chosen": comparison.chosen("placeholder")[0],
        "PromptEOL + TP, defaults": (f"prompteol {ends[0]}", default), OURS: ours}
    for prompt, name in PROMPTS.items():
        if prompt != "prompteol" and prompt in comparison.ways:
            rows |= {f"{name}, last layer": (prompt, last), f"{name}, exit chosen": comparison.chosen(prompt)[0],
                     f"{name} + TP, exit chosen": comparison.chosen(f"{prompt} {ends[0]}")[0]}
    if "other placeholder" in comparison.ways:
        rows["PromptEOL + TP, defaults, another placeholder"] = ("other placeholder", default)

    def correlation(one: quality.Choice, other: quality.Choice | None = None, of: Iterable[str] = split) -> Interval:
        count, statistic = comparison.resampled({name: split[name] for name in of}, one, other)
        return bootstrap(range(count), seed, samples=1000, statistic=statistic)

    def neighbours(one: quality.Choice, other: quality.Choice | None, teacher: bool) -> Interval:
        matches = comparison.neighbour_matches(one, split, teacher)
        return bootstrap(matches - (0 if other is None else comparison.neighbour_matches(other, split, teacher)), seed)

    def full(one: quality.Choice, other: quality.Choice | None = None) -> dict[str, Any]:
        return {"spearman": correlation(one, other), "topic": neighbours(one, other, False),
                "teacher": neighbours(one, other, True)}

    gains = {name: correlation(rows[OURS if prompt == "prompteol" else f"{name} + TP, exit chosen"],
                               rows[f"{name}, last layer"])
             for prompt, name in PROMPTS.items() if prompt in comparison.ways}
    return {"rows": {name: {**full(choice), "sets": {s: correlation(choice, of=[s]).value for s in comparison.sets}}
                     for name, choice in rows.items()},
            "ours minus": {name: full(ours, rows[name]) for name in (BASE, EARLY, MEAN, LAST)},
            "early minus last": correlation(early, rows[BASE]), "gains": gains, "ends": ends, "exits": comparison.exits,
            "sizes": {name: len(some.texts) for name, some in comparison.sets.items()},
            "layers": [int(ours[0].split()[1]), comparison.exits[ours[1]], comparison.exits[early[1]]],
            # what is prepended in the early layers is the last token's state there: does it know the sentence?
            "early": [correlation(("prompteol", n)) for n in range(max(ends) - 1)],
            "curves": {way: [comparison.correlation((way, k), split) for k in range(len(comparison.exits))]
                       for way in ("prompteol", "placeholder", "mean", *(f"prompteol {end}" for end in ends))}}


def end_layers(comparison: quality.EmbeddingComparison) -> list[int]:
    """The end layers that Token Prepending over PromptEOL was run with."""
    return [int(way.split()[1]) for way in comparison.ways if way.startswith("prompteol ")]


def timing(scale: Scale) -> dict[str, Any]:
    """Time for the same sentences with and without Token Prepending, leaving at the same layer."""
    model, tokenizer = models.load("smollm2")
    return time_of(model, tokenizer, next(iter(embeddings(scale).sets.values())).texts, scale)


def time_of(model: Any, tokenizer: Any, texts: Sequence[str], scale: Scale) -> dict[str, Any]:
    """Ratio with its interval, and sentences per second and tokens per sentence of both."""
    texts = texts[:16 if scale.brief else 48]
    encoders = {"with": TokenPrepending().encoder(model, tokenizer)}
    leave = encoders["with"].settings.exit_layer
    encoders["without"] = prompt_eol(model, tokenizer, exit_layer=leave)
    taken = interleave({name: functools.partial(encoder.encode, texts, False) for name, encoder in encoders.items()},
                       rounds=1 if scale.brief else 7)
    return {"ratio": taken.ratio("without", "with"), "exit": leave, "sentences": len(texts),
            "rounds": len(taken.seconds["with"]), "seconds": {name: taken.median(name) for name in encoders},
            "tokens": {name: sum(len(r.ids) for r in encoder.rows(texts)) for name, encoder in encoders.items()}}


def mean(results: Results, *path: str | int) -> Interval:
    """Mean over splits of the numbers of an interval."""
    return Interval(*np.mean(results.values(*path), axis=0).tolist())


def show(report: Report, results: Results) -> None:
    """Correlations, nearest neighbours, layers chosen, what is prepended, curves and time."""
    report.facts |= {"model": "SmolLM2-135M-Instruct, float32", "teacher": "all-MiniLM-L6-v2",
                     "sentences": ", ".join(f"{n} {name}" for name, n in results.rows[0]["sizes"].items()),
                     "pairs of each set and split": f"at most {quality.TEST_PAIRS} for the test and "
                                                    f"{quality.DEV_PAIRS} for choosing"}
    first, once = results.rows[0], results.once
    add_table(report, "Spearman's correlation with the teacher, test pairs", (
        {"embedding": name, **{of: results.mean("rows", name, "sets", of) for of in first["sizes"]},
         "mean": mean(results, "rows", name, "spearman")} for name in first["rows"]),
        "means over splits; interval: bootstrap over sentences, mean over splits")
    add_table(report, "Nearest neighbour among the test sentences", (
        {"embedding": name, "same topic": mean(results, "rows", name, "topic"),
         "the teacher's": mean(results, "rows", name, "teacher")} for name in first["rows"]), "fraction of sentences")
    report.table("Layers chosen on the development pairs", ["seed", "TP: end layer", "TP: exit", "PromptEOL: exit"],
                 [[seed, *layers] for seed, layers in zip(results.seeds, results.values("layers"), strict=True)])
    add_table(report, "What is prepended: the last token's state of PromptEOL after the early layers", (
        {"layer": first["exits"][n], "Spearman with the teacher": mean(results, "early", n)}
        for n in range(len(first["early"]))))
    curves = {way: np.mean(results.values("curves", way), axis=0).tolist() for way in first["curves"]}
    ends = sorted(first["ends"])
    lines = {"PromptEOL": "prompteol", "placeholder alone": "placeholder", "mean": "mean",
             **{f"TP, end layer {end}": f"prompteol {end}" for end in ends}}
    report.figure("Correlation by exit layer", x_label="exit layer", y_label="Spearman",
                  series=[curve(name, first["exits"], curves[way]) for name, way in lines.items()])
    report.figure("Correlation by end layer (rows) and exit layer (columns)", x_label="exit layer",
                  y_label="end layer: " + ", ".join(map(str, ends)), image=[curves[f"prompteol {end}"] for end in ends])
    add_table(report, "Time", (
        {"embedding": name, "sentences per second": once["sentences"] / once["seconds"][key],
         "tokens per sentence": once["tokens"][key] / once["sentences"]}
        for name, key in (("PromptEOL + TP", "with"), ("PromptEOL", "without"))),
        f"both leave after layer {once['exit']}")


def claims(results: Results) -> Iterator[Claim]:
    """The claims of the paper and of this project."""
    claim, once = functools.partial(results.claim, count="splits"), results.once
    for other, source, paper in (
            (BASE, "paper, tables", "70.03 -> 77.19 on LLaMA2-7B, STS average [memory]"),
            (EARLY, f"{RULE}: what is left when both leave early", "-"), (MEAN, RULE, "-"), (LAST, RULE, "-")):
        lead = mean(results, "ours minus", other, "spearman")
        yield claim(f"PromptEOL with Token Prepending correlates better with the teacher than {other}", source, paper,
                    ABOVE, lead.low > 0, f"Spearman {lead:+.3f}")
    lead = mean(results, "early minus last")
    yield claim("A layer before the last gives better embeddings than the last", "paper, section on the early exit",
                "intermediate layers are better than the last [memory]", ABOVE, lead.low > 0,
                f"Spearman, PromptEOL {lead:+.3f}")
    gains = {name: mean(results, "gains", name) for name in results.rows[0]["gains"]}
    yield results.claim(
        "Every prompt method gains (with Token Prepending and early exit against without, as in the paper)", "abstract",
        "consistent gains for all prompt methods and LLMs [abstract]", f"{ABOVE}, for each prompt",
        all(gain.low > 0 for gain in gains.values()), "; ".join(f"{name} {gain:+.3f}" for name, gain in gains.items())
        + f"; {len(results.seeds)} splits, one model")
    for key, what in (("topic", "has the same topic"), ("teacher", "is the teacher's")):
        for other in (BASE, EARLY):
            lead = mean(results, "ours minus", other, key)
            yield claim(f"The nearest neighbour more often {what} by PromptEOL with Token Prepending than by {other}",
                        RULE, "-", ABOVE, lead.low > 0, f"fraction of sentences {lead:+.3f}")
    ratio = Interval(*once["ratio"])
    yield results.claim("Token Prepending costs almost no time", "paper, table of inference time",
                        "1.04 times [abstract/paper]", f"median ratio of {TIME_LIMIT:.2f} or less",
                        ratio.value <= TIME_LIMIT, f"{ratio.value:.3f} times ({ratio.low:.3f} to {ratio.high:.3f}) "
                        f"with {once['tokens']['with'] / once['tokens']['without']:.3f} times the tokens, "
                        f"{once['sentences']} sentences in {once['rounds']} alternating rounds")
    yield results.claim("PromptEOL with Token Prepending on LLaMA2-7B gains 7 points on the average of seven STS tasks",
                        "paper, tables", "70.03 -> 77.19 Spearman [memory]", "none set", None,
                        "not measured: needs LLaMA2-7B and the STS tasks")


study = Study("Token Prepending: sentence embeddings without training", measure, claims, show, once=timing,
              full=Scale(), quick=Scale(brief=True), quick_seeds=1)
