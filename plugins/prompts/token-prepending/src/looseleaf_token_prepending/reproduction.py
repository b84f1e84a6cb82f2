"""The paper's claims at small real scale: SmolLM2-135M on real sentences, judged by the MiniLM sentence encoder.

Every sentence is run once for each way of embedding it, for all layers at a time. A seed is a split into development
and test sentences and a draw of pairs: layers are chosen on the one and measured on the other.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from looseleaf import Claim, Report, Series
from looseleaf.progress import bar
from looseleaf_token_prepending.baselines import last_token, mean_pooling, prompt_eol
from looseleaf_token_prepending.encoder import SentenceEncoder
from looseleaf_token_prepending.judged import DEV_PAIRS, TEST_PAIRS, Choice, Judged, Likeness, Sentences, Split, paired
from looseleaf_token_prepending.optimizer import TokenPrepending
from looseleaf_token_prepending.quality import square
from looseleaf_token_prepending.search import default_ends, default_exit

SETS = {"documentation": ("subjects", 200), "conversation": ("topics", 201)}
"""Set -> task of the lab that the sentences and their topics come from, and how many."""
PROMPTS = {"prompteol": "PromptEOL", "pretended-cot": "Pretended CoT", "knowledge": "Knowledge Enhancement"}
TIME_LIMIT = 1.10
OURS, BASE, EARLY = "PromptEOL + TP, layers chosen", "PromptEOL, last layer", "PromptEOL, exit chosen"
RULE = "this project's rule"
ABOVE = ("the 95 % interval of the difference lies above 0 (mean over sets; bootstrap over test sentences, mean of the "
         "intervals of all splits)")
Interval = tuple[float, float, float]


def reproduce(*, seeds: int = 5, quick: bool = False, progress: bool | None = None) -> Report:
    """Measure each claim of the paper.

    Args:
        seeds: how many splits of the sentences, each with its own draw of pairs.
        quick: one split, a fifth of the sentences, one end layer, PromptEOL only; its claims are not decided.
        progress: show a progress bar; None: only on a terminal.
    """
    from looseleaf_lab import models

    if not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"seeds={seeds!r}: allowed is a whole number from 1")
    began = time.perf_counter()
    model, tokenizer = models.load("smollm2")
    sets = sentences(models.load("minilm"), quick)
    judged = judge(model, tokenizer, sets, 1 if quick else seeds, quick, progress)
    report = Report("Token Prepending: sentence embeddings without training", {
        "model": "SmolLM2-135M-Instruct, float32", "teacher": "all-MiniLM-L6-v2",
        "sentences": ", ".join(f"{len(s.texts)} {name}" for name, s in sets.items()), "seeds": len(judged.splits),
        "pairs of each set and split": f"at most {TEST_PAIRS} for the test and {DEV_PAIRS} for choosing",
        "quick": quick})
    summarise(report, judged, quick)
    timing(report, model, tokenizer, next(iter(sets.values())).texts, quick)
    report.claims.append(Claim.decide(
        None, statement="PromptEOL with Token Prepending on LLaMA2-7B gains 7 points on the average of seven STS tasks",
        source="paper, tables", paper="70.03 -> 77.19 Spearman [memory]",
        measured="not measured: needs LLaMA2-7B and the STS tasks", rule="none set"))
    report.facts["seconds"] = round(time.perf_counter() - began)
    return report


# ------------------------------------------------------------------------------------------------- measuring

def sentences(teacher: tuple[Any, Any], quick: bool) -> dict[str, Sentences]:
    """The sets, each topic equally often, with the teacher's cosines."""
    from looseleaf_lab import data

    out = {}
    for name, (task, size) in SETS.items():
        made = data.classification_task(task, seed=0, train=4, dev=4, test=size // 5 if quick else size).test
        texts = [str(e.text) for e in made]
        out[name] = Sentences(texts, [str(e.label) for e in made], square(teacher_embeddings(*teacher, texts)))
    return out


def teacher_embeddings(model: Any, tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """(n, hidden): the mean over the tokens of each text, as all-MiniLM-L6-v2 is meant to be used."""
    import torch

    out = []
    with torch.inference_mode():
        for at in range(0, len(texts), 32):
            batch = tokenizer(list(texts[at:at + 32]), padding=True, truncation=True, return_tensors="pt")
            hidden = model(**batch).last_hidden_state
            weight = batch["attention_mask"][..., None].to(hidden.dtype)
            out.append(((hidden * weight).sum(1) / weight.sum(1)).numpy())
    return np.concatenate(out)


def ways(model: Any, tokenizer: Any, quick: bool = False) -> dict[str, Callable[[], SentenceEncoder]]:
    """Name -> maker of every way of embedding; ``"<prompt> <end layer>"`` is Token Prepending over a prompt."""
    ends = default_ends(_depth(model, tokenizer))[:1 if quick else None]

    def prepending(prompt: str, end: int, seed: int = 0) -> Callable[[], SentenceEncoder]:
        return functools.partial(TokenPrepending(prompt, end_layer=end).encoder, model, tokenizer, seed)

    out: dict[str, Callable[[], SentenceEncoder]] = {
        "last token": functools.partial(last_token, model, tokenizer),
        "mean": functools.partial(mean_pooling, model, tokenizer), "placeholder": prepending("prompteol", 0)}
    for prompt in list(PROMPTS)[:1 if quick else None]:
        out[prompt] = functools.partial(prompt_eol, model, tokenizer, prompt)
        out |= {f"{prompt} {end}": prepending(prompt, end) for end in (ends if prompt == "prompteol" else ends[:1])}
    if not quick:
        out["other placeholder"] = prepending("prompteol", ends[0], 1)
    return out


def judge(model: Any, tokenizer: Any, sets: dict[str, Sentences], seeds: int, quick: bool = False,
          progress: bool | None = None) -> Judged:
    """Run every way over all sentences, and split the sentences by seed."""
    count = _depth(model, tokenizer)
    exits = list(range(1, count + 1))
    makers = ways(model, tokenizer, quick)
    found: dict[str, Likeness] = {way: {} for way in makers}
    with bar("ways of embedding", len(makers) * len(sets), progress) as moving:
        for way, maker in makers.items():
            for name, some in sets.items():
                states = maker().states(some.texts, exits, progress=False).numpy()
                found[way][name] = np.stack([square(s) for s in states]).astype(np.float32)
                moving.update()
    splits = [{name: Split.draw(some, seed) for name, some in sets.items()} for seed in range(seeds)]
    return Judged(sets, exits, found, splits)


def _depth(model: Any, tokenizer: Any) -> int:
    return len(last_token(model, tokenizer).layers)


def difference(judged: Judged, ones: Sequence[Choice], others: Sequence[Choice] | None = None,
               name: str | None = None) -> Interval:
    """Correlation with the teacher (less that of ``others``), of one set or all: (mean, low, high) over the splits."""
    from looseleaf.statistics import bootstrap

    found = []
    for seed, (one, other) in enumerate(paired(ones, others)):
        split = judged.splits[seed] if name is None else {name: judged.splits[seed][name]}
        count, statistic = judged.resampled(split, one, other)
        found.append(bootstrap(range(count), seed, samples=1000, statistic=statistic))
    return _mean(found)


def retrieval(judged: Judged, ones: Sequence[Choice], others: Sequence[Choice] | None, teacher: bool) -> Interval:
    """Share of right nearest neighbours (less that of ``others``): (mean, low, high) over the splits."""
    from looseleaf.statistics import bootstrap

    found = []
    for seed, (one, other) in enumerate(paired(ones, others)):
        values = judged.hits(one, judged.splits[seed], teacher)
        found.append(bootstrap(values if other is None else values - judged.hits(other, judged.splits[seed], teacher),
                               seed))
    return _mean(found)


def _mean(found: Iterable[Interval]) -> Interval:
    mean, low, high = np.mean(list(found), axis=0).tolist()
    return mean, low, high


# ------------------------------------------------------------------------------------------------- the report

def summarise(report: Report, judged: Judged, quick: bool = False) -> None:
    """Tables, figures and the claims that need no clock."""
    last = len(judged.exits) - 1
    default = judged.exits.index(default_exit(judged.exits[-1]))
    ends = _ends(judged)

    def fixed(way: str, leave: int = last) -> list[Choice]:
        return [(way, leave)] * len(judged.splits)

    rows: dict[str, list[Choice]] = {
        "last token, last layer": fixed("last token"), "mean, last layer": fixed("mean"),
        "mean, exit chosen": judged.chosen("mean"), BASE: fixed("prompteol"), EARLY: judged.chosen("prompteol"),
        "PromptEOL and placeholder alone, exit chosen": judged.chosen("placeholder"),
        "PromptEOL + TP, defaults": fixed(f"prompteol {ends[0]}", default),
        OURS: judged.chosen(*(f"prompteol {end}" for end in ends))}
    for prompt, name in PROMPTS.items():
        if prompt != "prompteol" and prompt in judged.ways:
            rows |= {f"{name}, last layer": fixed(prompt), f"{name}, exit chosen": judged.chosen(prompt),
                     f"{name} + TP, exit chosen": judged.chosen(f"{prompt} {ends[0]}")}
    if "other placeholder" in judged.ways:
        rows["PromptEOL + TP, defaults, another placeholder"] = fixed("other placeholder", default)
    table = report.table("Spearman's correlation with the teacher, test pairs", [
        "embedding", *judged.sets, "mean", "low", "high"],
        note="means over splits; interval: bootstrap over sentences, mean over splits")
    near = report.table("Nearest neighbour among the test sentences", [
        "embedding", "same topic", "low", "high", "the teacher's", "low ", "high "], note="share of sentences")
    for name, choices in rows.items():
        table.add(name, *(difference(judged, choices, None, s)[0] for s in judged.sets), *difference(judged, choices))
        near.add(name, *retrieval(judged, choices, None, False), *retrieval(judged, choices, None, True))
    report.table("Layers chosen on the development pairs", ["seed", "TP: end layer", "TP: exit", "PromptEOL: exit"], [
        [seed, int(way.split()[1]), judged.exits[leave], judged.exits[rows[EARLY][seed][1]]]
        for seed, (way, leave) in enumerate(rows[OURS])])
    # what is prepended in the early layers is the last token's state there: does it know the sentence?
    early = report.table("What is prepended: the last token's state of PromptEOL after the early layers", [
        "layer", "Spearman with the teacher", "low", "high"])
    for n in range(max(ends) - 1):
        early.add(judged.exits[n], *difference(judged, fixed("prompteol", n)))
    _figures(report, judged)
    _claims(report, judged, rows, quick)


def _ends(judged: Judged) -> list[int]:
    return [int(way.split()[1]) for way in judged.ways if way.startswith("prompteol ")]


def _figures(report: Report, judged: Judged) -> None:
    def curve(way: str) -> list[float]:
        return [float(np.mean([judged.correlation((way, k), split) for split in judged.splits]))
                for k in range(len(judged.exits))]

    ends = sorted(_ends(judged))
    lines = {"PromptEOL": "prompteol", "placeholder alone": "placeholder", "mean": "mean",
             **{f"TP, end layer {end}": f"prompteol {end}" for end in ends}}
    report.figure("Correlation by exit layer", x_label="exit layer", y_label="Spearman", series=[
        Series(name, [float(n) for n in judged.exits], curve(way)) for name, way in lines.items()])
    report.figure("Correlation by end layer (rows) and exit layer (columns)", x_label="exit layer",
                  y_label="end layer: " + ", ".join(map(str, ends)), image=[curve(f"prompteol {end}") for end in ends])


def _claims(report: Report, judged: Judged, rows: dict[str, list[Choice]], quick: bool) -> None:
    splits = f"{len(judged.splits)} splits"

    def claim(statement: str, found: Interval, what: str, source: str = RULE, paper: str = "-") -> None:
        report.claims.append(Claim.decide(
            None if quick else found[1] > 0, statement=statement, source=source, paper=paper,
            measured=f"{what} {found[0]:+.3f} ({found[1]:+.3f} to {found[2]:+.3f}); {splits}", rule=ABOVE))

    for rival, source, paper in (
            (BASE, "paper, tables", "70.03 -> 77.19 on LLaMA2-7B, STS average [memory]"),
            (EARLY, f"{RULE}: what is left when both leave early", "-"),
            ("mean, last layer", RULE, "-"), ("last token, last layer", RULE, "-")):
        claim(f"PromptEOL with Token Prepending correlates better with the teacher than {rival}",
              difference(judged, rows[OURS], rows[rival]), "Spearman", source, paper)
    claim("A layer before the last gives better embeddings than the last", difference(judged, rows[EARLY], rows[BASE]),
          "Spearman, PromptEOL", "paper, section on the early exit",
          "intermediate layers are better than the last [memory]")
    gains = {name: difference(judged, rows[OURS if prompt == "prompteol" else f"{name} + TP, exit chosen"],
                              rows[f"{name}, last layer"])
             for prompt, name in PROMPTS.items() if prompt in judged.ways}
    report.claims.append(Claim.decide(
        None if quick else all(low > 0 for _, low, _ in gains.values()),
        statement="Every prompt method gains (with Token Prepending and early exit against without, as in the paper)",
        source="abstract", paper="consistent gains for all prompt methods and LLMs [abstract]",
        measured="; ".join(f"{n} {mean:+.3f} ({low:+.3f} to {high:+.3f})" for n, (mean, low, high) in gains.items())
        + f"; {splits}, one model", rule=ABOVE + ", for each prompt"))
    for teacher, what in ((False, "has the same topic"), (True, "is the teacher's")):
        for rival in (BASE, EARLY):
            claim(f"The nearest neighbour more often {what} by PromptEOL with Token Prepending than by {rival}",
                  retrieval(judged, rows[OURS], rows[rival], teacher), "share of sentences")


def timing(report: Report, model: Any, tokenizer: Any, texts: Sequence[str], quick: bool = False) -> None:
    """Seconds for the same sentences with and without Token Prepending, leaving at the same layer."""
    from looseleaf_lab.timing import interleave

    texts = texts[:16 if quick else 48]
    ours = TokenPrepending().encoder(model, tokenizer)
    plain = prompt_eol(model, tokenizer, exit_layer=ours.settings.exit_layer)
    taken = interleave({"with": lambda: ours.encode(texts, False), "without": lambda: plain.encode(texts, False)},
                       rounds=1 if quick else 7)
    ratio, low, high = taken.ratio("without", "with")
    tokens = {"with": sum(len(r.ids) for r in ours.rows(texts)), "without": sum(len(r.ids) for r in plain.rows(texts))}
    report.table("Time", ["embedding", "sentences per second", "tokens per sentence"], [
        [name, len(texts) / taken.median(key), tokens[key] / len(texts)]
        for name, key in (("PromptEOL + TP", "with"), ("PromptEOL", "without"))],
        note=f"both leave after layer {ours.settings.exit_layer}")
    report.claims.append(Claim.decide(
        None if quick else ratio <= TIME_LIMIT, statement="Token Prepending costs almost no time",
        source="paper, table of inference time", paper="1.04 times [abstract/paper]",
        measured=f"{ratio:.3f} times ({low:.3f} to {high:.3f}) with {tokens['with'] / tokens['without']:.3f} times the "
                 f"tokens, {len(texts)} sentences in {len(taken.seconds['with'])} alternating rounds",
        rule=f"median ratio of {TIME_LIMIT:.2f} or less"))
