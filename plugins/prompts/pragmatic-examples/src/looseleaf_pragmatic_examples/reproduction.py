"""The paper's claims at small scale: exactly over 107 languages, with small models trained here, and with SmolLM2."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

from looseleaf import Claim, Example, Report
from looseleaf.statistics import Interval, bootstrap, paired
from looseleaf_lab import models
from looseleaf_lab.study import Results, Study, above, add_table, curve
from looseleaf_pragmatic_examples.choose import diverse_examples, edit_features, random_examples
from looseleaf_pragmatic_examples.models import ModelListener, ModelSpeaker, rank, rank_by_rsa
from looseleaf_pragmatic_examples.optimizer import PragmaticExamples
from looseleaf_pragmatic_examples.regexes import MatchesRegex, RegexDomain, Utterance, full_match, strings
from looseleaf_pragmatic_examples.self_play import SelfPlay, listener_rows, random_specs
from looseleaf_pragmatic_examples.speech_acts import ExactListener, ExactSpeaker, best
from looseleaf_text import LocalModel, TextPrompt, TextTask

ATOMS, QUANTIFIERS = ("a", "b", "[ab]"), ("", "+", "{2}", "?")
DOMAIN = RegexDomain("ab", parts=2, longest=4, atoms=ATOMS, quantifiers=QUANTIFIERS)
STRINGS = strings("ab", 4)
ALPHAS = {"S1": 1.0, "S1^4": 4.0, "S1 argmax": math.inf}
METHODS = ("literal", "literal, more random specs", "RSA at inference", "PraX")
RULES = {"ends in a": "[abc]*a", "has a double letter": "[abc]*(aa|bb|cc)[abc]*", "starts with b": "b[abc]*",
         "has no c": "[ab]*", "has an a": "[bc]*a[abc]*", "five letters or more": "[abc]{5,}",
         "a before b": "[ac]*a[abc]*b[bc]*", "even length": "([abc][abc])*"}
RULE = "holds where the interval of the paired difference lies above 0, does not hold where below; else not shown"
OURS = "this project's, fixed before measuring"


@dataclasses.dataclass(frozen=True)
class Scale:
    """Programs and epochs of the literal models, rounds and their programs, samples, targets tested, few-shot tests."""

    programs: int = 2000
    epochs: int = 30
    rounds: int = 3
    targets: int = 200
    samples: int = 20
    tested: int = 107
    queries: int = 40


@functools.cache
def world() -> tuple[list[str], list[Utterance], np.ndarray]:
    """One program for each of the 107 languages, the 60 utterances, and which agree."""
    atoms = [a + q for a in ATOMS for q in QUANTIFIERS]
    rows: dict[tuple[bool, ...], str] = {}
    for program in [*atoms, *map("".join, itertools.product(atoms, atoms))]:
        rows.setdefault(tuple(bool(full_match(program, s)) for s in STRINGS), program)
    positive = np.array(list(rows))
    return (list(rows.values()), [(s, label) for label in "+-" for s in STRINGS],
            np.concatenate([positive, ~positive], axis=1))


def random_spec(target: int, k: int, rng: random.Random) -> list[int]:
    """Utterances of a speaker by chance: + or - with equal chance, then any such string, as random pairs are made."""
    row, spec = world()[2][target], list[int]()
    while len(spec) < k:
        half = rng.randrange(2)
        left = [u for u in np.flatnonzero(row).tolist() if u // len(STRINGS) == half and u not in spec]
        spec += [rng.choice(left)] if left else []
    return spec


def exact(scale: Scale) -> dict[str, Any]:
    """Top-1 of the exact listeners after 1 to 4 examples, and how many examples leave the target alone."""
    matrix = world()[2]
    speaker, listener, rng = ExactSpeaker(matrix), ExactListener(matrix), random.Random(0)
    targets = range(len(matrix))
    specs = {"S1": [[speaker.choose(d, 20)] for d in targets],
             "random": [[random_spec(d, 20, rng) for _ in range(10)] for d in targets]}
    out: dict[str, Any] = {"top-1": {}, "needed": {}}
    for name, of in specs.items():
        for guess in ("literal", "pragmatic"):
            out["top-1"][f"{name}, {'L0' if guess == 'literal' else 'L1'}"] = [
                [float(np.mean([right(getattr(listener, guess)(s[:n]), d) for s in of[d][:3]])) for d in targets]
                for n in range(1, 5)]
        out["needed"][name] = [float(np.mean([needed(matrix, d, s) for s in of[d]])) for d in targets]
    return out


def right(probabilities: np.ndarray, target: int) -> float:
    """The chance that a guess among the likeliest programs is the target."""
    top = best(probabilities)
    return (target in top) / max(1, len(top))


def needed(matrix: np.ndarray, target: int, spec: Sequence[int]) -> int:
    """How many examples rule out every other language; one more than there are where they do not."""
    alive = np.ones(len(matrix), bool)
    for n, utterance in enumerate(spec, 1):
        alive &= matrix[:, utterance]
        if alive.sum() == 1:
            return n
    return len(spec) + 1


def network(seed: int, tokenizer: Any) -> Any:
    """A T5 of 0.2 million parameters with random weights."""
    options: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
                               "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **options))


def neural(seed: int, scale: Scale) -> dict[str, Any]:
    """Method -> alpha of the informative user -> whether each target is ranked first, after 1 to 4 examples."""
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(["[U]", "[P]", *(f"[{n}]" for n in range(1, 6))])
    first = {"learning_rate": 3e-3, "num_train_epochs": scale.epochs, "per_device_train_batch_size": 32,
             "lr_scheduler_type": "linear", "warmup_steps": 20}
    later = {**first, "learning_rate": 1e-3, "num_train_epochs": 2, "lr_scheduler_type": "constant"}
    options: dict[str, Any] = {"max_new_tokens": 16, "batch_size": 4096, "training": first}
    rng = random.Random(seed)
    specs = random_specs(DOMAIN.sample(scale.programs, seed), DOMAIN.examples, 4, seed)
    ends = [rng.randrange(len(spec)) for _, spec in specs]
    heard = [(spec[:end + rng.randrange(2)], program) for end, (program, spec) in zip(ends, specs, strict=True)]
    said = [(program, spec[:end], spec[end]) for end, (program, spec) in zip(ends, specs, strict=True)]
    literal = _with(ModelListener(network(seed, tokenizer), tokenizer, **options).train(heard, seed), later)
    speaks = _with(ModelSpeaker(network(seed, tokenizer), tokenizer, **options).train(said, seed), later)
    play = SelfPlay(literal, speaks, DOMAIN.agrees, rounds=scale.rounds, programs_per_round=scale.targets, turns=4,
                    listener_samples=scale.samples, speaker_samples=scale.samples)
    played = play.run(DOMAIN.sample, seed=seed, progress=False)
    pairs = [pair for one in played.specs for pair in one]
    more = literal.train(listener_rows([(program, DOMAIN.examples(program, 4, seed + 1)[:len(spec)])
                                        for program, spec in pairs]), seed)

    programs, utterances, matrix = world()
    out: dict[str, Any] = {m: {} for m in (*METHODS, "exact L0", "exact L1")}
    chosen = random.Random(seed).sample(range(len(programs)), min(scale.tested, len(programs)))
    for name, alpha in ALPHAS.items():
        speaker, listener = ExactSpeaker(matrix, alpha=alpha), ExactListener(matrix)
        numbers = [speaker.sample(d, 4, seed) for d in chosen]
        for n in range(1, 5):
            asked = [[utterances[u] for u in spec[:n]] for spec in numbers]
            ranked = {"literal": rank(literal, asked, DOMAIN.agrees, scale.samples, seed),
                      "literal, more random specs": rank(more, asked, DOMAIN.agrees, scale.samples, seed),
                      "PraX": rank(played.listener, asked, DOMAIN.agrees, scale.samples, seed),
                      "RSA at inference": rank_by_rsa(literal, speaks, asked, DOMAIN.agrees, scale.samples, seed, 5)}
            for method, rows in ranked.items():
                out[method].setdefault(name, []).append([
                    float(bool(r) and DOMAIN.equivalent(r[0][0], programs[d]))
                    for r, d in zip(rows, chosen, strict=True)])
            for method, guess in (("exact L0", listener.literal), ("exact L1", listener.pragmatic)):
                out[method].setdefault(name, []).append(
                    [right(guess(spec[:n]), d) for spec, d in zip(numbers, chosen, strict=True)])
    proposed = speaks.propose([(program, []) for program, _ in pairs[:50]], scale.samples, seed)
    return {"top-1": out, "examples per spec": float(np.mean([len(spec) for _, spec in pairs])),
            "speaker agrees": float(np.mean([DOMAIN.agrees(program, u) for (program, _), some in zip(
                pairs[:50], proposed, strict=True) for u in some]))}


def _with(model: Any, training: dict[str, Any]) -> Any:
    return type(model)(model.model, model.tokenizer, **{**model.options, "training": training})


@functools.cache
def language_model() -> LocalModel:
    """SmolLM2-135M-Instruct."""
    return LocalModel(*models.load("smollm2", dtype=models.fast_dtype()))


def few_shot(seed: int, scale: Scale) -> dict[str, list[float]]:
    """Accuracy of SmolLM2 on each rule after 4 examples chosen in each way."""
    rng = random.Random(seed)
    rules = {name: MatchesRegex(pattern, labels=("yes", "no")) for name, pattern in RULES.items()}
    out: dict[str, list[float]] = {way: [] for way in ("pragmatic", "random", "diverse")}
    for name, rule in rules.items():
        every: dict[Any, list[str]] = {"yes": [], "no": []}
        for text in rng.sample(strings("abc", 5), len(strings("abc", 5))):
            every[rule(text)].append(text)
        pool = [text for pair in zip(every["yes"], every["no"], strict=False) for text in pair][:40 + scale.queries]
        examples = [Example({"text": text}, rule(text)) for text in pool]
        task = TextTask(name, examples[:40], test=examples[40:], labels={"yes": " yes", "no": " no"},
                        template="String: {text}", answer_prefix="Label:")
        others = tuple(r for n, r in rules.items() if n != name)
        optimizer: Any = PragmaticExamples(k=4, hypotheses=others)
        prompts = {"pragmatic": optimizer.optimize(task, language_model(), seed=seed, progress=False)}
        for way, chosen in (("random", random_examples(40, 4, seed)),
                            ("diverse", diverse_examples(edit_features(pool[:40]), 4, seed))):
            prompts[way] = TextPrompt.for_task(task, exemplars=[examples[n] for n in chosen])
        for way, prompt in prompts.items():
            scores = np.array(task.class_scores(prompt.on(language_model()), task.test))
            truth = np.array([e.target == "yes" for e in task.test])
            said = scores[:, 0] > scores[:, 1]
            out[way].append(float(np.mean([np.mean(said[truth == side] == side) for side in set(truth.tolist())])))
    return out


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """What the small models trained here and SmolLM2 do with one seed."""
    return {**neural(seed, scale), "few-shot": few_shot(seed, scale)}


def pooled(results: Results, method: str, *alphas: str) -> list[float]:
    """Top-1 of a method for each seed: the mean over targets, numbers of examples and kinds of informative user."""
    return [float(np.mean([row["top-1"][method][a] for a in alphas or ALPHAS])) for row in results.rows]


def points(gap: Interval) -> Interval:
    """A difference of fractions in points."""
    return Interval(*(100 * value for value in gap))


def show(report: Report, results: Results) -> None:
    """The exact table, top-1 by method, by number of examples, and the few-shot accuracies."""
    report.facts |= {"languages": len(world()[0]), "model": "T5, 0.2 million parameters, self-trained",
                     "few-shot model": "SmolLM2-135M-Instruct",
                     "examples per self-play spec": results.mean("examples per spec"),
                     "literal speaker's examples that agree": results.mean("speaker agrees")}
    top = results.once["top-1"]
    report.table("Exact: top-1 after 1 to 4 examples, all 107 languages", ["speaker, listener", "1", "2", "3", "4"],
                 [[name, *(float(np.mean(values)) for values in rows)] for name, rows in top.items()])
    report.figure("Exact: top-1 by number of examples", x_label="examples", y_label="top-1", series=[
        curve(name, range(1, 5), [float(np.mean(values)) for values in rows]) for name, rows in top.items()])
    methods = (*METHODS, "exact L0", "exact L1")
    add_table(report, "Top-1 after 1 to 4 examples of an informative user: mean over seeds and 95 % interval", (
        {"user": alpha, "method": m, "top-1": bootstrap(pooled(results, m, alpha))}
        for alpha in ALPHAS for m in methods))
    for alpha in ALPHAS:
        report.figure(f"Top-1 by number of examples, user {alpha}", x_label="examples", y_label="top-1", series=[
            curve(m, range(1, 5), [bootstrap([float(np.mean(row["top-1"][m][alpha][n])) for row in results.rows])
                                   for n in range(4)]) for m in methods])
    add_table(report, "SmolLM2, balanced accuracy with 4 examples, mean over rules and seeds", (
        {"examples": way, "accuracy": bootstrap(results.joined("few-shot", way))}
        for way in ("pragmatic", "random", "diverse")))


def claims(results: Results) -> Iterator[Claim]:
    """The claims of the paper and of this project."""
    several = len(results.seeds) >= 3

    def difference(one: str, two: str, statement: str, source: str, paper: str) -> Claim:
        gap = paired(pooled(results, one), pooled(results, two))
        relative = np.mean(pooled(results, one)) / max(1e-9, float(np.mean(pooled(results, two)))) - 1
        return results.claim(statement, source, paper, RULE + " (nor with fewer than 3 seeds)",
                             above(gap, touching=False) if several else None,
                             f"{points(gap):+.1f} points of top-1, {relative:+.0%} relative", count="seeds")

    yield difference("PraX", "literal, more random specs", "Training on pragmatically chosen examples beats training "
                     "on as many random ones, for informative users", "abstract; the users are exact S1 speakers, "
                     "not people", "+23 points, 51 % relative [abstract]")
    yield difference("PraX", "literal", "... and beats the literal model it began with", OURS, "no figure read")
    yield difference("PraX", "RSA at inference", "... and beats RSA at inference with the literal models", OURS,
                     "a baseline of the paper; no figure read")
    top = {name: np.array(rows) for name, rows in results.once["top-1"].items()}
    gap = paired(top["S1, L1"].mean(0), top["S1, L0"].mean(0))
    yield results.claim("With chosen examples a listener who reckons with the choice is right more often", OURS,
                        "not a figure of the paper", RULE + ", over languages", above(gap, touching=False),
                        f"{points(gap):+.1f} points of top-1 over 107 languages and 1 to 4 examples", any_scale=True)
    need = results.once["needed"]
    gap = paired(need["random"], need["S1"])
    yield results.claim("A pragmatic speaker needs fewer examples to identify the target than a random one", OURS,
                        "not a figure of the paper", RULE + ", over languages", above(gap, touching=False),
                        f"{np.mean(need['S1']):.1f} against {np.mean(need['random']):.1f} examples (21 where 20 do not "
                        f"do): {gap:.1f} fewer over 107 languages", any_scale=True)
    for other in ("random", "diverse"):
        pairs = [(a, b) for row in results.rows for a, b in zip(row["few-shot"]["pragmatic"], row["few-shot"][other],
                                                                strict=True)]
        gap = paired([a for a, _ in pairs], [b for _, b in pairs])
        yield results.claim(f"Demonstrations chosen pragmatically serve a language model better than {other} ones",
                            OURS, "not a claim of the paper", RULE + " (nor with fewer than 3 seeds)",
                            above(gap, touching=False) if several else None,
                            f"{points(gap):+.1f} points of balanced accuracy over {len(RULES)} rules", count="seeds")
    yield from results.unmeasured("abstract", "as good [abstract]", {
        "It matches training on human examples": "specs written by people"})


study = Study("Pragmatic examples: RSA, exact and learnt by self-play", measure, claims, show, once=exact, full=Scale(),
              quick=Scale(programs=800, epochs=6, rounds=1, targets=40, samples=10, tested=20, queries=10),
              quick_seeds=1)
