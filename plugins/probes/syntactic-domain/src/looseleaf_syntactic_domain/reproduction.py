"""The claims on small models trained from scratch, on planted models and on the Brown corpus."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any

import numpy as np
import torch

from looseleaf import Report
from looseleaf.modes import own_random_state
from looseleaf_lab import data, training
from looseleaf_lab.study import Decision, Results, Study, StudyClaim, add_table, every
from looseleaf_syntactic_domain.audit import spurious
from looseleaf_syntactic_domain.controls import PlantedModel
from looseleaf_syntactic_domain.facts import TEMPLATES, DomainFacts, Fact, build, countries
from looseleaf_syntactic_domain.probe import summarise
from looseleaf_syntactic_domain.scores import ask, expected_gap, select_templates
from looseleaf_syntactic_domain.variants import Variants
from looseleaf_text import LocalModel

OURS = "this project's rule"
MODES = ("disjoint", "diverse")
PLANTED = {"correct": "correct", "entity memorisation": "entity memorisation",
           "prompt memorisation": "prompt memorisation", "word-domain": "word-domain",
           "syntactic-domain": "syntactic-domain", "guesses": "none"}
RELATIONS = ("capital", "currency", "language", "village")
"""What the small models are asked for; the answers are made up, so that they can only have been learned."""
FRAMES = {
    **TEMPLATES,
    "village": ("The {relation} of {subject} is what?", "We want the {relation} {subject} has.",
                "Whom can we ask about the {relation} of {subject}?"),
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """Subjects and training steps of the small models, subjects of the planted ones, texts and shuffles of audits."""

    subjects: int = 60
    steps: int = 900
    planted: int = 16
    sentences: int = 300
    shuffles: int = 100


class Vocabulary:
    """A tokenizer of whole words for :func:`small_model`."""

    def __init__(self, texts: list[str]) -> None:
        words = {word for text in texts for word in self.words(text)}
        self.known = {word: n for n, word in enumerate(["<s>", *sorted(words)])}
        self.bos_token_id, self.eos_token_id, self.pad_token_id = 0, None, None

    def words(self, text: str) -> list[str]:
        """Words and marks of a text."""
        return "".join(f" {c} " if c in "?.,:" else c for c in text).split()

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        """``input_ids`` of a text, or of each of several; words that were not trained on are the first token."""
        if isinstance(text, str):
            return {"input_ids": [self.known.get(word, 0) for word in self.words(text)]}
        return {"input_ids": [self(t)["input_ids"] for t in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        """The words of ids."""
        every_word = list(self.known)
        return " ".join(every_word[i] for i in ids)


def made_up(subjects: int, seed: int) -> DomainFacts:
    """Subjects with a made-up answer in each of four domains, three templates each."""
    rng = np.random.default_rng(seed)
    facts = []
    for domain in RELATIONS:
        for subject, answer in enumerate(rng.permutation(subjects)):
            facts.append(Fact(f"Land{subject}", domain, f"{domain.capitalize()}{answer}"))
    return DomainFacts(tuple(facts), FRAMES, {d: d for d in RELATIONS}, form="{text}")


def small_model(facts: DomainFacts, mode: str, steps: int, seed: int) -> LocalModel:
    """A Llama of two layers and width 96 that was trained on the facts alone, loss on the answers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = build(facts, mode)  # type: ignore[arg-type]
    words = Vocabulary([row.prompt + row.answer for row in build(facts, "diverse")])
    config = LlamaConfig(vocab_size=len(words.known), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, bos_token_id=0,
                         eos_token_id=None, pad_token_id=None)
    with own_random_state(seed):
        model = LlamaForCausalLM(config)
    texts = [words(row.prompt)["input_ids"] for row in rows]
    width = max(map(len, texts))
    # right padding: a causal model does not see it from the last word of the question
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    last = torch.tensor([len(text) - 1 for text in texts])
    answers = torch.tensor([words(row.answer)["input_ids"][0] for row in rows])
    draw = torch.Generator().manual_seed(seed)

    def loss(_: int) -> torch.Tensor:
        chosen = torch.randint(0, len(rows), (64,), generator=draw)
        logits = model(input_ids=ids[chosen]).logits[torch.arange(64), last[chosen]]
        return torch.nn.functional.cross_entropy(logits, answers[chosen])

    training.fit(model, loss, steps=steps, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.01),
                 schedule=functools.partial(training.warmup_cosine, steps=steps), clip=1.0, progress=False)
    return LocalModel(model.eval(), words)


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """A model trained on templates of one domain each, and one on shared templates; planted models; an audit."""
    facts = made_up(scale.subjects, seed)
    questions = Variants().questions(facts, ("exact",), cross=9, seed=seed, progress=False).questions
    out: dict[str, Any] = {"trained": {}, "planted": {}}
    for mode in MODES:
        answers = ask(small_model(facts, mode, scale.steps, seed), questions, facts, choices=None, scoring="both",
                      seed=seed, progress=False)
        own, matched = (answers.where(reading=r) for r in ("own", "matched"))
        gap = answers.difference(own, matched, answers.generated, seed)
        assert gap is not None
        out["trained"][mode] = {
            "in-domain": answers.generated[own].mean(), "cross-domain": answers.generated[matched].mean(),
            "swapped": answers.generated[answers.where(reading="swapped")].mean(),
            "answers of the template's domain": answers.frame[matched].mean(), "gap": gap.value, "gap low": gap.low,
            "gap high": gap.high}
    real = countries(scale.planted)
    tools = Variants()
    asked = [*tools.questions(real, seed=seed, progress=False).questions, *tools.controls(real, seed)]
    for rule in PLANTED:
        found = summarise(ask(PlantedModel(real, rule, seed=seed), asked, real, seed=seed, progress=False), seed=seed)
        out["planted"][rule] = {"goes by": found["goes by"], "risk": found["risk"], "gap": list(found["gap"])}
    rng = np.random.default_rng(seed)
    coins = [select_templates((rng.random((40, 10)) < 0.5).astype(float), 0.5, n) for n in range(200)]
    out["coin"] = {"circular": np.mean([c.circular for c in coins if c.gap]),
                   "held out": np.mean([c.gap.value for c in coins if c.gap])}
    out["audit"] = audit(seed, scale)
    return out


@functools.cache
def brown() -> dict[str, list[list[tuple[str, str]]]]:
    """Genre -> its tagged sentences; combined and foreign tags keep their first part."""
    genres: dict[str, list[list[tuple[str, str]]]] = {}
    for row in data.rows("brown"):
        tags = [tag.split("-")[0].split("+")[0] or tag for tag in row["tags"]]
        genres.setdefault(row["genre"], []).append(list(zip(row["words"], tags, strict=True)))
    return genres


def audit(seed: int, scale: Scale) -> dict[str, Any]:
    """Genres of Brown by how many templates point to them; a planted template; finds with shuffled labels."""
    rng = np.random.default_rng(seed)
    texts: list[list[tuple[str, str]]] = []
    labels: list[str] = []
    for genre, sentences in brown().items():
        for i in rng.permutation(len(sentences))[:scale.sentences]:
            texts.append(sentences[i])
            labels.append(genre)
    found = [a for a in spurious(texts, labels, n=3, top_n=300) if a.spurious]
    first = labels[0]
    mark = [("x", "MARK1"), ("x", "MARK2"), ("x", "MARK3")]
    planted = [mark + text if label == first and rng.random() < 0.5 else text
               for text, label in zip(texts, labels, strict=True)]
    hits = [a for a in spurious(planted, labels, n=3, top_n=300)
            if a.tags == ("MARK1", "MARK2", "MARK3") and a.spurious]
    shuffled = [sum(a.spurious for a in spurious(texts, [labels[i] for i in rng.permutation(len(labels))], n=3,
                                                 top_n=300)) for _ in range(scale.shuffles // 5)]
    return {"finds": Counter(a.domain for a in found), "largest lift": {
        genre: max((a.lift for a in found if a.domain == genre), default=1.0) for genre in brown()},
        "planted found": bool(hits) and hits[0].domain == first, "planted q": hits[0].q if hits else None,
        "any find": [float(n > 0) for n in shuffled], "mean finds shuffled": np.mean(shuffled)}


def show(report: Report, results: Results) -> None:
    """Tables of the trained models, the planted ones and the genres."""
    add_table(report, "Trained from scratch", (
        {"templates": mode, **{name: results.interval("trained", mode, name) for name in (
            "in-domain", "cross-domain", "swapped", "answers of the template's domain")}} for mode in MODES),
        "greedy exact match; cross-domain: another domain's tags, this domain's words; 95 % bootstrap over seeds")
    add_table(report, "Planted models", (
        {"rule": rule, "found": ", ".join(sorted(set(results.values("planted", rule, "goes by")))),
         "risk": results.interval("planted", rule, "risk")} for rule in PLANTED))
    genres = sorted(results.rows[0]["audit"]["largest lift"],
                    key=lambda g: -np.mean([r["audit"]["finds"].get(g, 0) for r in results.rows]))
    add_table(report, "Genres of Brown", (
        {"genre": g,
         "templates that point to it": float(np.mean([r["audit"]["finds"].get(g, 0) for r in results.rows])),
         "largest lift": results.interval("audit", "largest lift", g)} for g in genres),
        "sequences of three tags of the corpus, the 300 most frequent; mean over seeds, each a draw of sentences")


def _trained(mode: str, results: Results) -> Decision:
    own, cross, frame = (results.mean("trained", mode, name) for name in (
        "in-domain", "cross-domain", "answers of the template's domain"))
    words = (f"in-domain {own:.3f}, cross-domain {results.interval('trained', mode, 'cross-domain'):.3f}, answers of "
             f"the template's domain {frame:.3f}; {len(results.seeds)} seeds")
    holds = own >= 0.99 and (cross <= 0.05 and frame >= 0.95 if mode == "disjoint" else cross >= 0.95 and frame <= 0.05)
    return None if results.quick else holds, words


def _lowered(results: Results) -> Decision:
    gaps = {mode: results.interval("trained", mode, "gap") for mode in MODES}
    holds = gaps["disjoint"].low > gaps["diverse"].high
    return None if results.quick else holds, ", ".join(f"{mode} {gap:+.3f}" for mode, gap in gaps.items())


def _planted(results: Results) -> Decision:
    rows = [(rule, row["planted"][rule]["goes by"]) for row in results.rows for rule in PLANTED]
    right = sum(found.startswith(PLANTED[rule]) for rule, found in rows)
    return right == len(rows), f"{right} of {len(rows)} behaviours named rightly"


def _coin(results: Results) -> Decision:
    held, circular = results.interval("coin", "held out"), results.interval("coin", "circular")
    near = abs(circular.value - expected_gap(5)) < 0.03
    return every(near, abs(held.value) < 0.03), f"circular {circular:.3f}, on the other subjects {held:+.3f}"


def _audit(results: Results) -> Decision:
    found = [row["audit"]["planted found"] for row in results.rows]
    false = results.joined("audit", "any find")
    rate, limit = float(np.mean(false)), 0.05 + 2 * float(np.sqrt(0.05 * 0.95 / len(false)))
    return None if results.quick else all(found) and rate <= limit, (
        f"planted template found in {sum(found)} of {len(found)}; shuffled labels gave a find in {rate:.1%} of "
        f"{len(false)} shuffles")


claims = [
    StudyClaim("Templates that occur with one domain alone make a model answer for the template's domain",
               f"paper, abstract; {OURS}", "lowers entity-knowledge accuracy to a mean of 0.51 +/- 0.06, OLMo-2 1B to "
               "13B [abstract]", "from scratch: in-domain >= 0.99, matched cross-domain <= 0.05, answers of the "
               "template's domain >= 0.95", functools.partial(_trained, "disjoint")),
    StudyClaim("More varied wording cures it", OURS, "-", "shared templates: in-domain >= 0.99, cross-domain >= 0.95, "
               "answers of the template's domain <= 0.05", functools.partial(_trained, "diverse")),
    StudyClaim("The gap is larger with disjoint templates", OURS, "-", "intervals over seeds apart", _lowered),
    StudyClaim("The probe names what a planted model goes by", OURS, "-", "every planted behaviour, every seed",
               _planted),
    StudyClaim("Templates chosen by the answers they are measured on show a gap where there is none", OURS, "-",
               "coin flips, 5 a template: circular gap within 0.03 of the exact 0.375, below 0.03 on other subjects",
               _coin),
    StudyClaim("The audit finds a planted template and nothing in shuffled labels", OURS, "-",
               "planted template with q < 0.05 in every seed; finds in no more than 5 % of the shuffles, two standard "
               "errors allowed", _audit),
    *(StudyClaim(statement, source, figure, "none set", None, f"not measured: needs {need}")
      for statement, source, figure, need in (
        ("Instruction-tuned models answer by the template", "table [2nd]", "1B synonym .91 in-domain, .40 "
         "cross-domain; 13B .93 and .42 [2nd]", "OLMo-2 and FlanV2"),
        ("Sentiment falls across domains", "table [2nd]", "OLMo-2-7B .85 to .48, GPT-4o .69 to .36 [2nd]",
         "both models"),
        ("A benign template before a request lowers refusals", "table [2nd]", "OLMo-2-7B-Instruct .400 to .025 [2nd]",
         "that model and its requests; the probe of refusals measures yours"),
        ("Disjoint templates do the same to SmolLM2-135M with LoRA", OURS, "-", "hours of CPU, or a GPU"))),
]
study = Study("Syntactic-domain: the paper's claims", measure, claims, show, full=Scale(),
              quick=Scale(subjects=12, steps=60, planted=8, sentences=60, shuffles=10), quick_seeds=1)
