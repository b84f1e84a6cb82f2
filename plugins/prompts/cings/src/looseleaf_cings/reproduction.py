"""The paper's claims where memory is known: a tiny transformer that learned a table by heart, and SmolLM2-135M."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from looseleaf import Claim, Example, Report
from looseleaf.statistics import Interval
from looseleaf_cings.data import Quiz, World, quiz
from looseleaf_cings.decoding import context_aware
from looseleaf_cings.features import Collator, Rows
from looseleaf_cings.grounding import (
    ALONE,
    FOLLOWS,
    MEMORY,
    SUPPORTED,
    Fact,
    add_fractions,
    grounding,
    names,
)
from looseleaf_cings.optimizer import CInGS, GroundedPrompt
from looseleaf_cings.trainer import response_loss
from looseleaf_lab import data, models, training
from looseleaf_lab.study import Results, Study
from looseleaf_text import LocalModel, TextTask

OURS = "this project's rule"
CINGS, NO_MASK, NO_CONTEXT, USER = "CInGS", "no mask", "no context", "context in the user's turn"
ARMS: dict[str, dict[str, Any]] = {CINGS: {}, NO_MASK: {"arm": "no_mask"}, NO_CONTEXT: {"arm": "no_context"},
                                   USER: {"placement": "user"}}
BEFORE, CAD = "before training", " + context-aware decoding"
ALPHA = 0.5
MARGIN = 0.05
"""What "not lower" allows: the lower end of the interval of the difference is above minus so much. All rules were fixed
before anything was measured."""
PROSE = 1.05
TINY, LANGUAGE = "tiny transformer", "SmolLM2-135M with LoRA"
SEEDS = 3
"""Seeds of SmolLM2 at most."""


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        known, new: entities of the made-up world.
        recall, steps, batch, rate: training of the tiny transformer: by heart at first, then each arm.
        language_steps, language_rate: steps of 8 rows of SmolLM2, and their learning rate; 0: not measured.
        facts: of the quiz, those that the model knows, at most.
    """

    known: int = 128
    new: int = 1024
    recall: int = 150
    steps: int = 200
    batch: int = 32
    rate: float = 1e-3
    language_steps: int = 60
    language_rate: float = 2e-4
    facts: int = 50


QUICK = Scale(known=32, new=128, recall=60, steps=40, language_steps=4, facts=8)


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """Of each kind of model and each arm, 1 or 0 for each fact and measure."""
    row: dict[str, Any] = {TINY: tiny(seed, scale)}
    if scale.language_steps and seed < SEEDS and models.available("smollm2"):
        row[LANGUAGE] = language(seed, scale)
    return row


def tiny(seed: int, scale: Scale) -> dict[str, Any]:
    """A transformer from scratch learns a table by heart, then each arm is trained on passages about other entities."""
    world = World.draw(seed, scale.known, scale.new)
    tokenizer = world.tokenizer()
    base, facts = world.model(seed, tokenizer), world.facts(seed)

    def fit(model: Any, examples: Sequence[Mapping[str, Any]], steps: int, **options: Any) -> None:
        rows, pad = Rows(tokenizer, separator="; ", **options).all(examples), Collator()
        draw = torch.Generator().manual_seed(seed)

        def loss(_: int) -> torch.Tensor:
            batch = pad([rows[n] for n in torch.randint(len(rows), (scale.batch,), generator=draw)])
            return response_loss(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                                       use_cache=False), batch["labels"])

        training.fit(model, loss, steps=steps, progress=False, clip=1.0,
                     optimizer=lambda p: torch.optim.AdamW(p, lr=scale.rate, weight_decay=0.01),
                     schedule=lambda o: training.warmup_cosine(o, steps))

    def ask(model: Any, placement: Any = "assistant", alpha: float = 0.0) -> dict[str, Any]:
        local = LocalModel(model, tokenizer)
        prompt = GroundedPrompt(placement=placement, separator="; ", max_tokens=2, stop=())
        return grounding(prompt.on(context_aware(local, alpha) if alpha else local), facts)[0]

    fit(base, world.recall(), scale.recall, arm="no_context")
    found = {BEFORE: ask(base)}
    for name, options in ARMS.items():
        model = copy.deepcopy(base)
        fit(model, world.passages(seed), scale.steps, **options)
        found[name] = ask(model, options.get("placement", "assistant"))
        if name in (CINGS, NO_CONTEXT):
            found[name + CAD] = ask(model, alpha=ALPHA)
    return {"hits": found}


@functools.cache
def known() -> tuple[LocalModel, Quiz, list[Fact], list[str]]:
    """SmolLM2, the quiz, the facts that it knows without a context, and prose."""
    local = LocalModel(*models.load("smollm2", dtype=models.fast_dtype()))
    questions = quiz(data.rows("quiz"))
    asked = GroundedPrompt(max_tokens=24, stop=()).on(local).predict(
        [Example({"instruction": f.question}) for f in questions.facts])
    prose = [row["text"][:400] for row in data.rows("wikipedia-excerpts")[:32]]
    return local, questions, [f for f, a in zip(questions.facts, asked, strict=True) if names(a, f.answers)], prose


def language(seed: int, scale: Scale) -> dict[str, Any]:
    """SmolLM2 with a LoRA on the upper third, trained on other entities of the quiz by each arm."""
    local, questions, facts, prose = known()
    facts = facts[::max(1, len(facts) // scale.facts)][:scale.facts]
    examples = [Example({k: e[k] for k in ("instruction", "context")}, e["response"]) for e in questions.train]
    task = TextTask("quiz", examples, examples[:2], template="{instruction}", metric="contains", max_tokens=16, stop=())
    plain = GroundedPrompt(max_tokens=16, stop=())
    before = plain.on(local)
    row: dict[str, Any] = {"hits": {BEFORE: grounding(before, facts)[0]}, "losses": {},
                           "perplexity": {BEFORE: before.perplexity(prose)}}
    for name, options in ARMS.items():
        method = CInGS(**options, layers=1 / 3, steps=scale.language_steps, batch_size=8, micro_batch_size=8,
                       learning_rate=scale.language_rate, max_length=128)
        prompt = method.optimize(task, local, seed=seed, progress=False)
        row["losses"][name] = prompt.info["losses"]
        predictor = prompt.on(local)
        row["hits"][name] = grounding(predictor, facts)[0]
        row["perplexity"][name] = predictor.perplexity(prose)
        if name in (CINGS, NO_CONTEXT):
            row["hits"][name + CAD] = grounding(prompt.on(context_aware(local, ALPHA)), facts)[0]
    return row


def interval(results: Results, kind: str, name: str, measure: str, minus: str = "") -> Interval:
    """The mean over seeds and facts, or that of the paired difference; bootstrap over seeds and the facts of each."""
    rows = [row[kind]["hits"] for row in results.rows if kind in row]
    table = np.array([row[name][measure] for row in rows])
    if minus:
        table = table - np.array([row[minus][measure] for row in rows])
    seeds, facts = table.shape
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, seeds, (2000, seeds))[:, :, None]
    means = table[chosen, rng.integers(0, facts, (2000, seeds, facts))].mean((1, 2))
    return Interval(float(table.mean()), *np.quantile(means, [0.025, 0.975]).tolist())


def show(report: Report, results: Results) -> None:
    """Fractions and figures of both kinds of model, perplexity, losses."""
    for kind in kinds(results):
        rows = results.rows[0][kind]["hits"]
        part = Report(kind)
        add_fractions(part, {name: {m: interval(results, kind, name, m) for m in rows[name]} for name in rows})
        report.extend(part, f"{kind}: ")
    if LANGUAGE in kinds(results):
        own = [row[LANGUAGE] for row in results.rows if LANGUAGE in row]
        table = report.table("Perplexity on prose (Wikipedia)", ["model", "perplexity", "times that before"])
        for name in own[0]["perplexity"]:
            values = np.array([row["perplexity"][name] for row in own])
            table.add(name, float(values.mean()), float((values / [r["perplexity"][BEFORE] for r in own]).mean()))
        report.table("Loss on the response, nats per token", ["model", "first tenth", "last tenth"], [
            [name, *(float(np.mean([part(row["losses"][name]) for row in own])) for part in (_first, _last))]
            for name in ARMS], note=f"{NO_MASK}: with the context")
        report.facts["facts that SmolLM2 knows"] = len(own[0]["hits"][BEFORE][FOLLOWS])


def _first(losses: Sequence[float]) -> float:
    return float(np.mean(losses[:max(1, len(losses) // 10)]))


def _last(losses: Sequence[float]) -> float:
    return float(np.mean(losses[-max(1, len(losses) // 10):]))


def kinds(results: Results) -> list[str]:
    """The kinds of models that were measured."""
    return list(results.rows[0])


def claims(results: Results) -> Iterator[Claim]:
    """The claims of the paper that can be asked at this scale, for each kind of model; and those that cannot."""
    higher = "the interval of the paired difference lies above 0"
    not_lower = f"the interval of the paired difference lies above -{MARGIN}"
    for kind in kinds(results):
        gap = functools.partial(interval, results, kind)
        count = f"{sum(kind in row for row in results.rows)} seeds"

        def claim(statement: str, rule: str, holds: bool, measured: str, source: str = "abstract",
                  paper: str = "-", kind: str = kind, count: str = count) -> Claim:
            return results.claim(f"{kind}: {statement}", source, paper, rule, holds, f"{measured}; {count}")

        lead = gap(CINGS, FOLLOWS, NO_CONTEXT)
        yield claim("CInGS follows a conflicting context more often than plain instruction tuning", higher,
                    lead.low > 0, f"{lead:+.3f}", "abstract: more reliance on the context",
                    "+5.5 % on average over 11 data sets of another kind, up to +8.6 % [2nd]")
        lead = gap(CINGS, FOLLOWS, NO_MASK)
        yield claim("CInGS follows a conflicting context no less than training without the mask", not_lower,
                    lead.low > -MARGIN, f"{lead:+.3f}", f"{OURS}; the paper's baseline")
        lead = gap(CINGS, FOLLOWS, USER)
        yield claim("CInGS follows a conflicting context no less than the same training with the context in the user's "
                    "turn", not_lower, lead.low > -MARGIN, f"{lead:+.3f}", OURS)
        lead = gap(CINGS, MEMORY, NO_CONTEXT)
        yield claim("CInGS answers from memory against the context less often than plain instruction tuning",
                    "the interval of the paired difference lies below 0", lead.high < 0, f"{lead:+.3f}",
                    "abstract: weaker prior")
        lead = gap(CINGS, SUPPORTED, NO_CONTEXT)
        yield claim("with a supporting context CInGS is right no less often than plain instruction tuning", not_lower,
                    lead.low > -MARGIN, f"{lead:+.3f}", OURS)
        lead = gap(CINGS, ALONE, NO_CONTEXT)
        yield claim("without context CInGS is right less often than plain instruction tuning, the prior is weaker",
                    "the interval of the paired difference lies below 0", lead.high < 0, f"{lead:+.3f}",
                    "abstract: weaker prior")
        leads = [gap(CINGS + CAD, FOLLOWS, other) for other in (CINGS, NO_CONTEXT + CAD)]
        yield claim("CInGS with context-aware decoding follows a conflicting context no less than either alone",
                    not_lower, all(i.low > -MARGIN for i in leads),
                    f"against CInGS {leads[0]:+.3f}, against context-aware decoding {leads[1]:+.3f}",
                    "abstract: adds to inference-time grounding")
        if kind == LANGUAGE:
            own = [row[kind]["perplexity"] for row in results.rows if kind in row]
            ratio = float(np.mean([row[CINGS] / row[BEFORE] for row in own]))
            yield claim("general ability is kept: perplexity on prose", f"at most {PROSE} times that before training, "
                        "mean over seeds", ratio <= PROSE, f"{ratio:.3f} times", "abstract: general ability kept")
    yield from results.unmeasured("abstract", "see the paper", {
        "CInGS is better on 11 information-seeking data sets (+5.5 % on average, up to +8.6 % [2nd])":
            "Llama-3.1-8B and the data sets",
        "a vision-language model with a CInGS backbone hallucinates less (4 benchmarks, up to +18.1 % [2nd])":
            "a LLaVA alignment of the trained backbone"})


study = Study("CInGS: does the model answer from the context?", measure, claims, show, full=Scale(), quick=QUICK,
              quick_seeds=1)
