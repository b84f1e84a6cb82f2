"""The survey's claims: small models from scratch, a planted model, and SmolLM2 on facts that it knows."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf import Claim, Report
from looseleaf.statistics import bootstrap
from looseleaf.testing.models import seeded
from looseleaf_implicit_reasoning import data as own
from looseleaf_implicit_reasoning.loops import LoopedLM
from looseleaf_implicit_reasoning.probe import ImplicitReasoningProbe, control_claim, show_jump, show_recall
from looseleaf_implicit_reasoning.recall import BridgeRecall
from looseleaf_implicit_reasoning.states import ChainOfEmbedding, LinearJump
from looseleaf_implicit_reasoning.training import ContinuousThought, Encoded, Internalize, Trainable
from looseleaf_lab import data, models
from looseleaf_lab.study import Results, Study, above, add_table, every
from looseleaf_lab.training import fit
from looseleaf_text import LocalModel

MODULUS, STEPS, BATCH, LR = 5, (2, 3, 4), 64, 3e-3
OPERATIONS = ("+", "*")
END, EQUALS, FIRST = 1, 2, 3
"""Ids: 0 is padding; results from FIRST on, then operations."""
ALPHABET, LENGTH, HOPS = 6, 24, 2
TIMES = 2
METHODS = ("no chain of thought", "internalised (ICoT-SI)", "continuous (Coconut)", "chain of thought")
DEPTHS = ("k layers", "k layers, twice", "2 k layers")
RULE = "this project's rule, fixed before measuring"


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        steps: of each training on chains.
        hop_steps: of each training on induction.
        tested: problems that trained models are tried on.
        facts, problems, texts: that SmolLM2 is asked.
    """

    steps: int = 800
    hop_steps: int = 800
    tested: int = 512
    facts: int = 48
    problems: int = 48
    texts: int = 60


# ---------------------------------------------------------------------------------------------- models from scratch
def config(layers: int, vocabulary: int) -> Any:
    """A small Llama; its first weights are as large as its width asks for."""
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=vocabulary, hidden_size=64, intermediate_size=192, num_hidden_layers=layers,
                       num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, bos_token_id=None,
                       eos_token_id=END, pad_token_id=0, tie_word_embeddings=False, initializer_range=0.1)


def modular(count: int, draw: random.Random) -> list[Encoded]:
    """Chains of 2 to 4 operations modulo 7: a number and each operation with its number; results of all but the last
    are the steps."""
    out = []
    for _ in range(count):
        value = draw.randrange(MODULUS)
        question, results = [FIRST + value], []
        for _ in range(draw.choice(STEPS)):
            operation, other = draw.randrange(2), draw.randrange(MODULUS)
            value = (value + other, value * other)[operation] % MODULUS
            question += [FIRST + MODULUS + operation, FIRST + other]
            results.append(FIRST + value)
        out.append(Encoded((*question, EQUALS), tuple((r,) for r in results[:-1]), (results[-1], END)))
    return out


def train(model: nn.Module, part: Trainable, batch: Callable[[list[Encoded]], dict[str, Tensor]], steps: int,
          draw: random.Random) -> None:
    """Train on fresh chains with a new optimiser, whose rate rises over the first twentieth of the steps."""
    fit(model, lambda step: part.loss(model, batch(modular(BATCH, draw))), steps=steps, clip=1.0, progress=False,
        optimizer=lambda p: torch.optim.AdamW(p, LR, weight_decay=0.01), factor=lambda n: min(1.0, (n + 1) / 40))


def chains(seed: int, scale: Scale) -> dict[str, dict[str, float]]:
    """Each method -> accuracy, tokens that it writes, and accuracy of the longest chains; as many steps each."""
    tested = modular(scale.tested, random.Random(f"test {seed}"))
    out = {}
    longest = max(STEPS) - 1
    thought, internal = ContinuousThought(c=1, stages=longest), Internalize()
    for method in METHODS:
        model = seeded(lambda: models_from(config(2, FIRST + MODULUS + len(OPERATIONS))), seed)
        draw = random.Random(f"train {seed}")
        part: Trainable = thought if method.startswith("continuous") else internal
        if part is thought:
            for stage in range(longest + 1):
                train(model, part, lambda few, s=stage: thought.batch(few, s),  # type: ignore[misc]
                      scale.steps // (longest + 1), draw)
        elif method.startswith("internalised"):
            for removed in range(longest + 1):
                train(model, part, lambda few, r=removed: internal.batch(few, r),  # type: ignore[misc]
                      scale.steps // (longest + 1), draw)
        else:
            gone = 0 if method == "chain of thought" else longest
            train(model, part, lambda few, r=gone: internal.batch(few, r), scale.steps, draw)  # type: ignore[misc]
        asked = thought.questions(tested, longest) if part is thought else internal.questions(tested)
        said = part.answer(model.eval(), asked, longest + 2, END)
        right = [bool(s) and s[-1] == e.answer[0] for s, e in zip(said, tested, strict=True)]
        hard = [r for r, e in zip(right, tested, strict=True) if len(e.steps) == longest]
        out[method] = {"accuracy": sum(right) / len(right), "longest": sum(hard) / len(hard),
                       "tokens": sum(map(len, said)) / len(said)}
    return out


def models_from(made: Any) -> nn.Module:
    """A model with the weights that the global generator gives."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(made)


def hops(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences (count, LENGTH) and the answers of p-hop induction (count,) (Saunshi et al. 2025).

    A hop goes from a token to the one behind its latest earlier occurrence; all sequences have HOPS of them.
    """
    rows: list[list[int]] = []
    answers: list[int] = []
    while len(rows) < count:
        drawn = torch.randint(ALPHABET, (4 * count, LENGTH), generator=generator)
        for row in drawn.tolist():
            at = LENGTH - 1
            for _ in range(HOPS):
                at = next((n + 1 for n in range(at - 1, -1, -1) if row[n] == row[at]), -1)
                if at < 0:
                    break
            if at >= 0 and len(rows) < count:
                rows.append(row)
                answers.append(row[at])
    return torch.tensor(rows), torch.tensor(answers)


def depths(seed: int, scale: Scale) -> dict[str, float]:
    """Accuracy of k layers, of k layers run twice, and of 2 k layers on p-hop induction."""
    asked, answers = hops(scale.tested, torch.Generator().manual_seed(10_000 + seed))
    out = {}
    for name in DEPTHS:
        model: nn.Module = seeded(lambda n=name: LoopedLM(  # type: ignore[misc]
            config(4 if n == DEPTHS[2] else 2, ALPHABET), TIMES if n == DEPTHS[1] else 1), seed)
        draw = torch.Generator().manual_seed(seed)

        def loss(step: int, model: nn.Module = model, draw: torch.Generator = draw) -> Tensor:
            rows, wanted = hops(BATCH, draw)
            return nn.functional.cross_entropy(model(rows, use_cache=False).logits[:, -1], wanted)

        fit(model, loss, steps=scale.hop_steps, clip=1.0, progress=False, factor=lambda n: min(1.0, (n + 1) / 40),
            optimizer=lambda p: torch.optim.AdamW(p, LR, weight_decay=0.01))
        with torch.no_grad():
            given = model.eval()(asked, use_cache=False).logits[:, -1].argmax(-1)
        out[name] = float((given == answers).double().mean())
    return out


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """One training of each small model."""
    return {"chains": chains(seed, scale), "depths": depths(seed, scale)}


# ---------------------------------------------------------------------------------------------------------- SmolLM2
@functools.cache
def smollm2() -> tuple[Any, Any]:
    """The model and its tokenizer."""
    found: tuple[Any, Any] = models.load("smollm2")
    return found


def known_facts(local: LocalModel, count: int) -> list[own.TwoHop]:
    """Capitals whose country, and countries whose continent, the model knows when it is asked for one of them alone.

    Known: likelier than seven other countries, and than the three other continents.
    """
    continents = {"africa": "Africa", "america": "America", "asia": "Asia", "europe": "Europe"}
    rows = [(r["answers"]["capital"][0], r["answers"]["country"][0], continents[r["file"]])
            for r in data.rows("quiz") if r["topic"] == "capitals" and r["file"] in continents]
    draw = random.Random(0)
    draw.shuffle(rows)
    rows = [r for r in rows if r[1].casefold() not in r[0].casefold() and r[0].casefold() not in r[1].casefold()]
    rows = rows[:3 * count]
    others = [[country, *draw.sample([c for _, c, _ in rows if c != country], min(7, len(rows) - 1))]
              for _, country, _ in rows]
    first = local.score([f"{city} is the capital of" for city, _, _ in rows], [[f" {c}" for c in o] for o in others])
    names = sorted(continents.values())
    second = local.score([f"The continent of {country} is" for _, country, _ in rows],
                         [[f" {c}" for c in names] for _ in rows])
    return [own.TwoHop(city, "country", country, "continent", continent, other_r1="river")
            for (city, country, continent), one, two in zip(rows, first, second, strict=True)
            if max(one) == one[0] and names[two.index(max(two))] == continent][:count]


def once(scale: Scale) -> dict[str, Any]:
    """SmolLM2: the probe's report on facts that it knows, and the numbers that the claims are about."""
    model, tokenizer = smollm2()
    facts = known_facts(LocalModel(model, tokenizer), scale.facts)
    report = ImplicitReasoningProbe(("soft thinking", "pauses", "loops", "order"), problems=scale.problems).run(
        (model, tokenizer), progress=False)
    recall = BridgeRecall().measure(model, tokenizer, facts, progress=False)
    show_recall(report, recall)
    jump = LinearJump().measure(model, tokenizer, own.prose(scale.texts), progress=False)
    show_jump(report, jump)
    problems = own.chain(4 + 2 * scale.problems, 1)
    shown = "".join(f"{p.question} {p.answer}\n" for p in problems[:4])
    asked = problems[4:]
    sure = ChainOfEmbedding().measure(model, tokenizer, [shown + p.question for p in asked], [p.answer for p in asked],
                                      progress=False)
    middle = len(jump.r2) // 2
    gains = {t.title: t.rows[1][4:] for t in report.tables if t.title in ("Filler tokens", "Looped layers")}
    soft = next(t for t in report.tables if t.title == "Soft thinking").rows
    return {"report": report.to_dict(), "facts": len(recall.facts), "asked": scale.facts,
            "recalled": recall.first_layer(), "layers": len(recall.recall),
            "helps": bootstrap((recall.slope > 0).mean(0).tolist()), "middle": middle,
            "jump": [jump.agreement[middle], jump.identity_agreement[middle], jump.r2[middle],
                     jump.identity_r2[middle]],
            "auroc": {name: sure.auroc(name) for name in sure.scores}, "right": sum(sure.right),
            "answered": len(sure.right), "gains": gains, "soft": soft}


def show(report: Report, results: Results) -> None:
    """Small models, and what the probe says of SmolLM2."""
    report.facts |= {"chains": f"modulo {MODULUS}, {min(STEPS)} to {max(STEPS)} steps, {results.scale.steps} steps of "
                               f"{BATCH}", "induction": f"{HOPS} hops, {LENGTH} tokens of {ALPHABET}, "
                               f"{results.scale.hop_steps} steps of {BATCH}"}
    add_table(report, "Modular chains, two layers from scratch", (
        {"method": name, **{key: results.interval("chains", name, key) for key in ("accuracy", "longest", "tokens")}}
        for name in METHODS), "accuracy; that of chains of 4 steps; tokens written, the end of the text aside; means "
                              "over seeds with 95 % bootstrap intervals; as many training steps each")
    add_table(report, f"p-hop induction, k = 2, {HOPS} hops", (
        {"model": name, "accuracy": results.interval("depths", name)} for name in DEPTHS))
    if results.once:
        report.extend(Report.from_dict(results.once["report"]), "SmolLM2: ")


def claims(results: Results) -> Iterator[Claim]:
    """The claims of the card of each part that can be decided here, and those that cannot."""
    known = control_claim()
    yield known
    claim = functools.partial(results.claim, count="seeds")
    none, internal, thought, words = METHODS
    several = len(results.seeds) > 1

    def gap(one: str, two: str) -> Any:
        return results.interval("chains", one, "accuracy", minus=("chains", two, "accuracy"))

    gaps = {name: gap(name, none) for name in (internal, thought)}
    yield claim("Trained to reason silently, a model answers better than one trained on answers alone", RULE,
                "-", "intervals of both paired differences in accuracy above 0",
                every(*(above(g) for g in gaps.values())) if several else None,
                ", ".join(f"{name} {g:+.3f}" for name, g in gaps.items()))
    gaps = {name: gap(name, words) for name in (internal, thought)}
    yield claim("Silent reasoning hardly ever beats reasoning in words", "survey, table 8",
                "GSM8K, Llama-3.1-8B: CoT 80.10, Coconut 76.12, ICoT-SI 47.08, pause 79.50; SoftCoT 81.03 [repo table "
                "8]", "no interval of the paired difference in accuracy above 0",
                all(not above(g) for g in gaps.values()) if several else None,
                ", ".join(f"{name} {g:+.3f}" for name, g in gaps.items()))
    saved = [1 - row["chains"][name]["tokens"] / row["chains"][words]["tokens"]
             for row in results.rows for name in (internal, thought)]
    yield claim("Silent reasoning saves tokens", RULE, "-", "fewer tokens written in every seed", min(saved) > 0,
                f"{bootstrap(saved):.1%} of those of the chain of thought")
    more = results.interval("depths", DEPTHS[1], minus=("depths", DEPTHS[0]))
    less = results.interval("depths", DEPTHS[1], minus=("depths", DEPTHS[2]))
    yield claim("Layers run twice do more than layers run once, with the same weights", "Saunshi et al. 2025 [survey]",
                "-", "interval of the paired difference in accuracy above 0", above(more) if several else None,
                f"p-hop induction {more:+.3f}")
    yield claim("They come up to a model of twice as many layers", "Saunshi et al. 2025 [survey]", "-",
                "lower end of the interval of the paired difference above -0.05",
                less.low > -0.05 if several else None, f"p-hop induction {less:+.3f}")
    if results.once:
        yield from on_smollm2(results)
    yield from results.unmeasured("survey, table 8", "Qwen2.5-1.5B: CODI 65.80, HRPO 72.00 [repo table 8]", {
        "Methods with more supervision of the silent steps do better on GSM8K": "models of billions of parameters and "
                                                                              "their training"})


def on_smollm2(results: Results) -> Iterator[Claim]:
    """What holds of a pretrained model; one model, intervals over facts, positions and answers."""
    found, claim = results.once, results.claim
    enough = found["facts"] >= 20
    yield claim("A two-hop prompt makes the model recall the bridge", "Yang et al. 2024 [survey]",
                "substantial evidence for the first hop [memory]", "at some layer the bridge beats entity, relation "
                "and last word, and the control does not; else not shown", (found["recalled"] is not None) or None
                if enough else None, f"from layer {found['recalled']} of {found['layers']}; {found['facts']} facts "
                "known singly")
    helps = found["helps"]
    yield claim("More recall makes the two-hop answer more consistent with the one-hop answer",
                "Yang et al. 2024 [survey]", "moderate evidence [memory]", "interval over facts of the fraction of "
                "layers with a positive derivative above 0.5", above(helps, 0.5) if enough else None,
                f"{helps[0]:.3f} ({helps[1]:.3f} to {helps[2]:.3f})")
    ours, itself, r2, plain = found["jump"]
    yield claim("From the middle layer a linear map tells the end better than the layer itself",
                "Din et al. 2023 [survey]", "-", "its interval of agreement above that of the identity, and higher R2",
                ours[1] > itself[2] and r2 > plain,
                f"same top token {ours[0]:.3f} ({ours[1]:.3f} to {ours[2]:.3f}) and {itself[0]:.3f} ({itself[1]:.3f} "
                f"to {itself[2]:.3f}); R2 {r2:.3f} and {plain:.3f}")
    scores = {name: value for name, value in found["auroc"].items() if value}
    yield claim("The way of the hidden states tells right answers from wrong ones", "Wang et al. 2024 [survey]", "-",
                "interval of the AUROC of CoE-R or CoE-C above 0.5", any(
                    scores[n][1] > 0.5 for n in ("CoE-R", "CoE-C")) or None if scores else None,
                ", ".join(f"{n} {v[0]:.2f} ({v[1]:.2f} to {v[2]:.2f})" for n, v in scores.items())
                + f"; {found['right']} of {found['answered']} right")
    for name, title in (("Filler tokens", "Filler tokens help an untrained model"),
                        ("Looped layers", "Looping its middle layers helps an untrained model")):
        gain = found["gains"][name]
        yield claim(title, "survey; this project's rule", "-", "interval of the gain above 0; below: does not hold",
                    above(gain), f"{gain[0]:+.3f} ({gain[1]:+.3f} to {gain[2]:+.3f})")
    (_, before, *_), (_, after, low, high, top, sharp) = found["soft"]
    yield claim("Soft thoughts help an untrained model", "Zhang et al. 2025 [survey]", "-",
                "accuracy without them outside the interval with them", True if low > before else
                False if high < before else None,
                f"accuracy {after:.3f} ({low:.3f} to {high:.3f}), in words {before:.3f}; weight of the top token "
                f"{top:.2f}, {sharp:.0%} of thoughts above 0.9")


study = Study("Implicit reasoning: small models, a planted model, and SmolLM2", measure, claims, show, once=once,
              full=Scale(), quick=Scale(40, 30, 64, 8, 6, 40), quick_seeds=1)
