"""The paper's claims on small Llamas and grammars of four levels, with exact Bayes beside them; genres of Brown."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from looseleaf import Claim, Report
from looseleaf.statistics import Interval, bootstrap
from looseleaf_lab import data, models
from looseleaf_lab.study import Results, Study, above, add_table, below, curve, every
from looseleaf_metadata_conditioning.collator import MetadataCollator
from looseleaf_metadata_conditioning.grammar import LevelledPCFG
from looseleaf_metadata_conditioning.measures import continuations, fit_probe, hidden_states, token_losses
from looseleaf_metadata_conditioning.probe import Documents, exact_guesses
from looseleaf_metadata_conditioning.training import (
    grammar_collator,
    grammar_rows,
    predictions,
    small_llama,
    train,
    vocabulary_size,
)

LEVELS = 4
NONE, TWO, FOUR, COOLDOWN = "no metadata", "2 of 4 levels", "4 of 4 levels", "4 of 4 levels, cooldown"
ARMS = {NONE: (0, 0.0), TWO: (2, 0.0), FOUR: (4, 0.0), COOLDOWN: (4, 0.1)}
"""Levels told in half of the training documents, and last fraction of the steps without metadata."""
LENGTHS, SHORT, LONG = (1, 2, 4, 6, 8, 10, 12, 14), (1, 2, 4), (12, 14)
"""Prompt lengths of documents of 16 terminals; which are short and which are long was set before measuring."""
AS_WELL = 0.02
"""Accuracies are called equal within this; set before measuring."""
OURS = "this project's rule"
WORDS, VOCABULARY, BINS = 48, 1000, ((0, 1), (1, 4), (4, 12), (12, 48), (1, 48), (0, 48))
"""Of the documents of Brown: words of one, words that the small model knows, and groups of positions."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """Training steps, arms, fresh documents and continued ones, steps on Brown and documents read by SmolLM2."""

    steps: int = 2000
    arms: tuple[str, ...] = tuple(ARMS)
    documents: int = 2048
    continued: int = 400
    brown_steps: int = 600
    smollm2: int = 64


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """One grammar, one set of documents, and a model for each arm, which begin alike and read the same in one order."""
    grammar = LevelledPCFG.random(LEVELS, rule_lengths=(2,), seed=seed)
    rows = grammar_rows(grammar, grammar.sample(64 * scale.steps, seed=1000 + seed))
    fresh = grammar.sample(scale.documents, seed=2000 + seed)
    scan = grammar.scan([text for text, _ in fresh])
    exact = {depth: scan.predict([j[:depth] for _, j in fresh]) for depth in {ARMS[name][0] for name in scale.arms}}
    labels = torch.tensor([j for _, j in fresh])
    fit, choose, score = torch.arange(len(fresh)).tensor_split((len(fresh) // 2, len(fresh) * 3 // 4))
    guesses = exact_guesses(Documents(grammar_rows(grammar, fresh), grammar_collator(grammar, 0), grammar=grammar),
                            LENGTHS)
    out: dict[str, Any] = {
        "exact": {"accuracy": (guesses[score] == labels[score, None]).double().mean(0).tolist(),
                  "largest posterior": [float(scan.posterior()[:, t].max(-1)[0].mean()) for t in LENGTHS],
                  "entropy": {depth: float(_entropy(p).mean()) for depth, p in exact.items()}},
        "majority": [float(labels[score].double().mean(0).sub(0.5).abs().add(0.5).mean())], "arms": {}}
    for name in scale.arms:
        depth, cooldown = ARMS[name]
        model = small_llama(vocabulary_size(grammar), seed=seed).to(models.device())
        losses = train(model, rows, grammar_collator(grammar, depth, seed=seed), cooldown=cooldown, label=name,
                       progress=False)
        excess = {told: -(exact[told] * predictions(model, grammar, fresh, told)).sum(-1) - _entropy(exact[told])
                  for told in {0, depth}}
        own = Documents.of(grammar, scale.documents, depth, 2000 + seed)
        states, _ = hidden_states(model, own.rows, own.collator, LENGTHS, batch=256, progress=False)
        right = torch.zeros(len(states), len(LENGTHS), len(labels), LEVELS, dtype=torch.bool)
        for layer, place in np.ndindex(*right.shape[:2]):
            probe = fit_probe(states[layer, place, fit], labels[fit], [2] * LEVELS)
            right[layer, place] = probe.predict(states[layer, place]) == labels
        best = int(right[:, :, choose].double().mean((1, 2, 3)).argmax())
        derived = [_derived(grammar, model, own, t, scale.continued, seed) for t in LENGTHS]
        out["arms"][name] = {
            "training loss": float(np.mean(losses[-50:])), "layer": best, "excess": float(excess[0].mean()),
            "excess by position": excess[0].mean(0), "excess told": float(excess[depth].mean()),
            "loss": float((excess[0] + _entropy(exact[0])).mean()),
            "loss told": float((excess[depth] + _entropy(exact[depth])).mean()),
            "probe": right[best][:, score].double().mean(1), "own grammar": [a for a, _ in derived],
            "any grammar": [b for _, b in derived]}
    return out


def _entropy(p: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(p).sum(-1)


def _derived(grammar: LevelledPCFG, model: Any, documents: Documents, length: int, count: int,
             seed: int) -> tuple[float, float]:
    """Which fraction of continuations the document's own grammar derives, and any."""
    rows = documents.rows[:count]
    texts = continuations(model, rows, documents.collator, length, documents.end, documents.most, seed=seed,
                          batch=count, progress=False)
    possible = ~grammar.scan([text or [-1] for text in texts]).log_prob.isneginf().numpy()
    own = [grammar.index([row[name] for name in documents.collator.fields]) for row in rows]
    return float((possible & np.stack(own)).any(1).mean()), float(possible.any(1).mean())


def once(scale: Scale) -> dict[str, Any]:
    """Real text: gain of the genre in front by position, SmolLM2 as it is and two small models trained on Brown."""
    files: dict[str, list[dict[str, Any]]] = {}
    for row in data.rows("brown"):
        files.setdefault(row["file"], []).append(row)
    counts: Counter[str] = Counter()
    documents: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for n, name in enumerate(sorted(files)):
        words = [word for row in files[name] for word in row["words"]]
        held_out = n % 5 == 0
        if not held_out:
            counts.update(word.lower() for word in words)
        documents[held_out] += [{"words": words[i:i + WORDS], "genre": files[name][0]["genre"], "file": name}
                                for i in range(0, len(words) - WORDS + 1, WORDS)]
    ids = {word: n for n, (word, _) in enumerate(counts.most_common(VOCABULARY))}
    genres = sorted({row["genre"] for row in documents[False]})
    draw = np.random.default_rng(0)
    for rows in documents.values():
        draw.shuffle(rows)  # type: ignore[arg-type]
        for row in rows:
            row["input_ids"] = [ids.get(word.lower(), VOCABULARY) for word in row["words"]]
    test, out = documents[True][:2000], {}
    tokens = {"genre": {genre: VOCABULARY + 2 + n for n, genre in enumerate(genres)}}
    trained = [row for _ in range(1 + 64 * scale.brown_steps // len(documents[False])) for row in documents[False]]
    for name, depth in ((NONE, 0), ("genre", 1)):
        collator = MetadataCollator(("genre",), depth, mask_token=VOCABULARY + 1, tokens=tokens)
        model = small_llama(VOCABULARY + 2 + len(genres), layers=2).to(models.device())
        train(model, trained[:64 * scale.brown_steps], collator, label=f"Brown, {name}", progress=False)
        out[name] = {"without": token_losses(model, test, collator, False, batch=256, progress=False)}
        if depth:
            out[name] |= _told(model, test, collator, genres, 256)
    model, tokenizer = models.load("smollm2")
    texts = [{"text": " ".join(row["words"]), "genre": row["genre"].replace("_", " ")} for row in test]
    collator = MetadataCollator(("genre",), template="Genre: {genre}\n\n", tokenizer=tokenizer, max_length=96)
    out["SmolLM2"] = {"without": token_losses(model, texts[:scale.smollm2], collator, False, progress=False),
                      **_told(model, texts[:scale.smollm2], collator, sorted({r["genre"] for r in texts}), 16)}
    return {name: {kind: [[float(np.mean(row[low:high])) for low, high in BINS] for row in losses]
                   for kind, losses in own.items()} for name, own in out.items()}


def _told(model: Any, rows: Sequence[dict[str, Any]], collator: MetadataCollator, genres: Sequence[str],
          batch: int) -> dict[str, list[np.ndarray]]:
    """Losses with the genre in front, and with another one: what is gained by any prefix is no gain of the genre."""
    other = [{**row, "genre": genres[(genres.index(row["genre"]) + 1 + n % (len(genres) - 1)) % len(genres)]}
             for n, row in enumerate(rows)]
    return {"told": token_losses(model, rows, collator, True, batch=batch, progress=False),
            "another genre": token_losses(model, other, collator, True, batch=batch, progress=False)}


def gains(results: Results, name: str, before: str, after: str, column: int) -> Interval | None:
    """Loss on Brown less another, paired by documents; None where nothing precedes the words that would be scored.

    ``before`` may be the model that never saw genres.
    """
    a = results.once[NONE if before == NONE else name]["without" if before == NONE else before]
    b = results.once[name][after]
    pairs = [(x[column], y[column]) for x, y in zip(a, b, strict=True)]
    differences = [x - y for x, y in pairs if x is not None and y is not None]
    return bootstrap(differences) if differences else None


def accuracy(results: Results, name: str, what: str, lengths: Sequence[int], minus: str = "") -> Interval:
    """Mean over prompt lengths (and levels) of a measure of an arm, or its difference to another arm, over seeds."""
    places = [LENGTHS.index(t) for t in lengths]

    def of(arm: str) -> np.ndarray:
        return np.array([np.mean([np.mean(row[arm_what][place]) for place in places])
                         for row in (results.values("exact") if arm == "exact" else results.values("arms", arm))
                         for arm_what in ("accuracy" if arm == "exact" else what,)])

    return bootstrap(of(name) - of(minus) if minus else of(name))


def crossing(results: Results, name: str, what: str, minus: str) -> int | None:
    """The least prompt length from which on the mean difference between two arms is not below 0."""
    signs = [accuracy(results, name, what, [t], minus).value >= 0 for t in LENGTHS]
    last = max((n for n, sign in enumerate(signs) if not sign), default=-1)
    return LENGTHS[last + 1] if last + 1 < len(LENGTHS) else None


def show(report: Report, results: Results) -> None:
    """Losses, probes and continuations of every arm beside what is exact, and the gain of genres by position."""
    arms, scale = results.scale.arms, results.scale
    report.facts |= {"grammars": f"{LEVELS} levels, 2 rule sets, 2 rules of 2 symbols each, one grammar a seed",
                     "model": "Llama, 3 layers of 64", "steps": scale.steps, "documents a step": 64,
                     "share of documents with metadata": 0.5, "fresh documents": scale.documents}
    add_table(report, "Excess loss over exact Bayes", (
        {"trained with": name, "tested without metadata": results.interval("arms", name, "excess"),
         "less no metadata": results.interval("arms", name, "excess", minus=("arms", NONE, "excess")),
         "tested with its metadata": results.interval("arms", name, "excess told"),
         "loss told": results.mean("arms", name, "loss told")} for name in arms),
        "nats a token, means over seeds with 95 % bootstrap; exact Bayes has as many levels as the model is told")
    report.figure("Excess loss without metadata", x_label="terminals read", y_label="KL, nats", series=[
        curve(name, range(17), [results.interval("arms", name, "excess by position", t) for t in range(17)])
        for name in arms])
    add_table(report, "Probe accuracy", (
        {"trained with": name, "terminals read": t, "accuracy": accuracy(results, name, "probe", [t]),
         "exact posterior": accuracy(results, "exact", "probe", [t]).value,
         **{f"level {d}": float(np.mean([row[LENGTHS.index(t)][d] for row in results.values("arms", name, "probe")]))
            for d in range(LEVELS)}} for name in arms for t in LENGTHS),
        f"mean over levels; layer chosen on other documents; majority {results.mean('majority', 0):.3f}")
    report.figure("Probe accuracy", x_label="terminals read", y_label="accuracy, mean over levels", series=[
        *(curve(name, LENGTHS, [accuracy(results, name, "probe", [t]) for t in LENGTHS]) for name in arms),
        curve("exact posterior", LENGTHS, [accuracy(results, "exact", "probe", [t]) for t in LENGTHS])])
    add_table(report, "Grammatical accuracy", (
        {"trained with": name, "terminals given": t, "own grammar": accuracy(results, name, "own grammar", [t]),
         "any grammar": accuracy(results, name, "any grammar", [t])} for name in arms for t in LENGTHS),
        "fraction of continuations drawn at temperature 1, tested without metadata")
    for what in ("own grammar", "any grammar"):
        report.figure(f"Grammatical accuracy, {what}", x_label="terminals given", y_label="fraction", series=[
            curve(name, LENGTHS, [accuracy(results, name, what, [t]) for t in LENGTHS]) for name in arms])
    exact = [accuracy(results, "exact", "probe", [t]).value for t in LENGTHS]
    known = next((t for t, a in zip(LENGTHS, exact, strict=True) if a > 0.9), None)
    add_table(report, "Crossing points", (
        {"trained with": name, "measure": what, "from this length on no worse than without metadata":
            crossing(results, name, what, NONE), "exact posterior right in 0.9 from": known}
        for name in arms[1:] for what in ("probe", "own grammar", "any grammar")), "dash: at no length measured")
    before = {"genre": (NONE, "without", "another genre"), "SmolLM2": ("without", "another genre")}
    rows = ((name, kind, n, gains(results, name, kind, "told", n)) for name in before for kind in before[name]
            for n in range(len(BINS)))
    add_table(report, "Brown: gain of the genre in front, by position", (
        {"model": "small model, self-trained with genres" if name == "genre" else name,
         "compared with": {NONE: "a model that never saw genres", "without": "nothing in front"}.get(kind, kind),
         "places": "first" if BINS[n] == (0, 1) else f"{BINS[n][0] + 1} to {BINS[n][1]}", "gain": gain}
        for name, kind, n, gain in rows if gain is not None),
        "nats a word (SmolLM2: a token), 95 % bootstrap over documents of files that no small model was trained on")


def claims(results: Results) -> Iterator[Claim]:
    """Every claim with its verdict."""
    claim = functools.partial(results.claim, count="seeds")
    told = [name for name in results.scale.arms if name in (TWO, FOUR)]
    loss = {name: results.interval("arms", name, "loss", minus=("arms", NONE, "loss")) for name in told}
    yield claim("Without metadata at test there is no consistent gain in average next-token loss", "abstract",
                "no consistent gain [abstract]", "the 95 % interval of loss less that of the model without metadata is "
                "not below 0 at every depth", not all(i.high < 0 for i in loss.values()), _words(loss))
    told_loss = {name: bootstrap(np.array(results.values("arms", name, "loss told"))
                                 - np.array(results.values("arms", NONE, "loss"))) for name in told}
    yield claim("With metadata at test the loss is lower", "paper, measures", "lower [2nd]",
                "the interval of loss with metadata less that of the model without any is below 0 at every depth",
                every(*(below(i) for i in told_loss.values())), _words(told_loss))
    probe = {t: accuracy(results, FOUR, "probe", t, NONE) for t in (SHORT, LONG)}
    yield claim("Metadata-trained models infer the metadata less well from short prompts", "paper, probes",
                "less well [2nd]", f"interval of the difference of probe accuracy over {SHORT} terminals below 0",
                below(probe[SHORT]), f"all levels less none {probe[SHORT]:+.4f}; exact posterior "
                f"{accuracy(results, 'exact', 'probe', SHORT).value:.3f}, without metadata "
                f"{accuracy(results, NONE, 'probe', SHORT).value:.3f}")
    yield claim("... and as well from long ones", "paper, probes", "as well [2nd]",
                f"interval over {LONG} terminals above -{AS_WELL}", above(probe[LONG], -AS_WELL),
                f"all levels less none {probe[LONG]:+.4f}; exact posterior "
                f"{accuracy(results, 'exact', 'probe', LONG).value:.3f}")
    for what in ("own grammar", "any grammar"):
        short, long = (accuracy(results, FOUR, what, t, NONE) for t in (SHORT, LONG))
        yield claim(f"Continuations are grammatical less often after short prompts ({what})", "abstract",
                    "worse [abstract, 2nd]", f"interval of the difference over {SHORT} terminals below 0", below(short),
                    f"all levels less none {short:+.4f}")
        yield claim(f"... and more often after long ones ({what})", "abstract", "better [abstract, 2nd]",
                    f"interval of the difference over {LONG} terminals above 0", above(long),
                    f"all levels less none {long:+.4f}")
    if COOLDOWN in results.scale.arms:
        cool = results.interval("arms", COOLDOWN, "loss", minus=("arms", FOUR, "loss"))
        yield claim("A cooldown without metadata lowers the loss without metadata", "MeCo's remedy; " + OURS, "-",
                    "interval of the difference below 0", below(cool), f"cooldown less none {cool:+.4f} nats")
    real, first = (gains(results, "genre", "another genre", "told", n) for n in (-1, 0))
    assert real is not None and first is not None
    yield results.claim("On Brown a small model gains by the genre in front", OURS, "-", "interval over documents of "
                        "the gain over another genre above 0", above(real),
                        f"{real:+.4f} nats a word; first word {first:+.4f}")


def _words(intervals: dict[str, Interval]) -> str:
    return "; ".join(f"{name} {interval:+.4f} nats" for name, interval in intervals.items())


study = Study("metadata-conditioning: the paper's claims", measure, claims, show=show, once=once, full=Scale(),
              quick=Scale(40, (NONE, FOUR), 128, 32, 8, 16))
