"""Context-aware decoding against its formula, the grounding report, and the reproduction on stand-ins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from looseleaf import Budget, Example, Predictor, Report, UnsupportedModelError
from looseleaf.testing.models import tiny_gemma3, tiny_llama, tiny_tokenizer
from looseleaf_cings import ContextAwareLogits, Fact, GroundedPrompt, context_aware, grounding_report
from looseleaf_cings.data import World, quiz
from looseleaf_cings.grounding import ALONE, FOLLOWS, IRRELEVANT, MEMORY, SUPPORTED, grounding, names, normalized
from looseleaf_text import LocalModel
from looseleaf_text.testing import ToyLanguageModel

torch.set_num_threads(1)
CHAT = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")


def local(model: Any = None, **options: Any) -> LocalModel:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    return LocalModel(tiny_llama(vocabulary=128) if model is None else model, tokenizer, **options)


EXAMPLES = [Example({"instruction": "Why?", "context": "So."}), Example({"instruction": "Who is it then?"}),
            Example({"instruction": "Ah", "context": "A long story about nothing at all."})]
FACTS = [Fact("Capital of X?", ("Rome", "Roma"), "It is Oslo.", ("Oslo",), "It is Rome.", "Cats sleep."),
         Fact("Capital of Y?", ("Paris",), "It is the Hague.", ("The Hague",), "It is Paris.")]


def by_hand(model: LocalModel, prompt: str, without: str, alpha: float, count: int) -> str:
    """The formula with both texts forwarded whole at each step."""
    ids, other = model.tokenize(prompt), model.tokenize(without)
    new: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            a, b = (model.model(torch.tensor([each + new])).logits[0, -1] for each in (ids, other))
            token = int(((1 + alpha) * a - alpha * b).argmax())
            if token == model.tokenizer.eos_token_id:
                break
            new.append(token)
    return str(model.tokenizer.decode(new, skip_special_tokens=True))


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_decoding_is_the_formula_batched_or_not(alpha: float) -> None:
    model = local()
    prompt = GroundedPrompt(max_tokens=8, stop=())
    predictor = prompt.on(context_aware(model, alpha))
    bare = prompt.on(model).render([Example({"instruction": e.inputs["instruction"]}) for e in EXAMPLES])
    expected = [by_hand(model, text, without, alpha, 8) for text, without in zip(
        predictor.render(EXAMPLES), bare, strict=True)]
    assert predictor.predict(EXAMPLES) == expected
    assert prompt.on(context_aware(local(batch_tokens=1), alpha)).predict(EXAMPLES) == expected
    plain = prompt.on(model).predict(EXAMPLES)
    assert plain[1] == expected[1] and plain != expected, "without a context it is plain decoding"


@pytest.mark.parametrize("make", [lambda: tiny_llama(vocabulary=128), lambda: tiny_gemma3()])
def test_alpha_0_is_generate(make: Any) -> None:
    model = local(make())
    if model.model.config.vocab_size < 128:
        model.model.resize_token_embeddings(128, mean_resizing=False)
    for stop in ((), ("e",)):
        prompt = GroundedPrompt(max_tokens=8, stop=stop)
        assert prompt.on(context_aware(model, 0)).predict(EXAMPLES) == prompt.on(model).predict(EXAMPLES)


def test_processor_works_with_generate_and_calls_are_charged() -> None:
    model = local()
    predictor = GroundedPrompt(max_tokens=5, stop=()).on(context_aware(model, 0.5))
    [text] = predictor.render(EXAMPLES[:1])
    ids = torch.tensor([model.tokenize(text)])
    bare = torch.tensor([model.tokenize("<user>Why?<assistant>")])
    processor = ContextAwareLogits(model.model, bare, torch.ones_like(bare), 0.5)
    out = model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False,
                               logits_processor=[processor], pad_token_id=0)
    assert model.tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True) == predictor.predict(EXAMPLES[:1])[0]
    budget = Budget(calls=6)
    GroundedPrompt(max_tokens=2).on(budget.meter(context_aware(model))).predict(EXAMPLES)
    assert budget.used["calls"] == 6


def test_labels_by_the_same_formula() -> None:
    model = local()
    prompt = GroundedPrompt(labels={"x": "a", "y": "b"})
    [plain], [bare] = (prompt.on(model).scores([e]) for e in (EXAMPLES[0], Example({"instruction": "Why?"})))
    [ours] = prompt.on(context_aware(model, 0.5)).scores(EXAMPLES[:1])
    assert ours == pytest.approx([1.5 * a - 0.5 * b for a, b in zip(plain, bare, strict=True)])


@pytest.mark.parametrize(("text", "answers", "expected"), [
    ("The capital is ROME!", ("Rome",), True), ("Romeo", ("Rome",), False), ("it is Hague.", ("The Hague",), True),
    ("Yaoundé", ("Yaounde",), True), ("I cannot say.", ("Rome",), False), ("St. John's", ("St John s",), True),
    ("Roma", ("Rome", "Roma"), True), ("", ("Rome",), False)])
def test_names(text: str, answers: tuple[str, ...], expected: bool) -> None:
    assert names(text, answers) is expected and normalized("A  the Cat,an") == "cat"


class Reader(Predictor):
    """Answers from the context (1), from memory (0), or refuses."""

    def __init__(self, reads: bool | None) -> None:
        self.reads = reads

    def predict(self, examples: Sequence[Example]) -> list[Any]:
        memory = {"Capital of X?": "Rome", "Capital of Y?": "Paris"}
        return ["I cannot say" if self.reads is None else e.inputs.get("context", memory[e.inputs["instruction"]])
                if self.reads else memory[e.inputs["instruction"]] for e in examples]


def test_report_of_readers_whose_answers_are_known() -> None:
    expected = {True: (1, 0, 1, 0, 1), False: (0, 1, 1, 1, 1), None: (0, 0, 0, 0, 0)}
    for reads, wanted in expected.items():
        hits, _ = grounding(Reader(reads), FACTS)
        measures = (FOLLOWS, MEMORY, SUPPORTED, IRRELEVANT, ALONE)
        assert [sum(hits[m]) / len(hits[m]) for m in measures] == list(wanted)
        assert len(hits[IRRELEVANT]) == 1, "one fact has no irrelevant passage"
    report = grounding_report({"memory": Reader(False), "reader": Reader(True)}, FACTS)
    difference = next(t for t in report.tables if t.title == "Difference from memory")
    assert difference.rows[0] == [FOLLOWS, "reader", 1.0, 1.0, 1.0]
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text() and len(report.figures) == 1


def test_report_of_models_and_perplexity() -> None:
    model = local()
    prompt = GroundedPrompt("{question}", context="passage")
    report = grounding_report({"plain": model, "aware": prompt.on(context_aware(model))}, FACTS,
                              prose=["some words", "a"])
    [table] = [t for t in report.tables if t.title == "Perplexity on prose"]
    ids = torch.tensor([model.tokenize("some words")])
    with torch.no_grad():
        loss = model.model(ids, labels=ids).loss
    assert [row[1] for row in table.rows] == pytest.approx([float(loss.exp())] * 2, rel=1e-4)


def test_bad_input() -> None:
    for alpha in (-1, float("nan"), "x", True):
        with pytest.raises(ValueError, match="alpha: expected a number >= 0"):
            context_aware(local(), alpha)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="expected a LocalModel"):
        context_aware(ToyLanguageModel())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected others than the answers"):
        Fact("?", ("Rome",), "", ("the rome",))
    with pytest.raises(ValueError, match="a sequence of one or more texts"):
        Fact("?", "Rome", "", ("Oslo",))  # type: ignore[arg-type]
    for facts in ([], ["x"]):
        with pytest.raises(ValueError, match="facts: expected one or more Fact"):
            grounding_report(local(), facts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two tokens"):
        GroundedPrompt().on(local()).perplexity(["a"])


def test_quiz_and_world_share_no_entity_between_training_and_test() -> None:
    rows = [{"topic": "capitals", "key": f"{n:x}", "answers": {"country": [f"Land{n}"], "capital": [f"Town{n}"]}}
            for n in range(12)] + [{"topic": "latin", "key": "1", "answers": {"latin": ["sino"], "english": []}}]
    made = quiz(rows)
    asked = {f.question for f in made.facts}
    assert len(asked) == len(made.facts) == 6 and not asked & {e["instruction"] for e in made.train}
    assert all(names(f.conflicting, f.conflicting_answers) and not names(f.conflicting, f.answers)
               and names(f.supporting, f.answers) and not names(f.irrelevant, f.answers) for f in made.facts)
    assert all(names(e["context"], [e["response"]]) for e in made.train) and quiz(rows) == made
    world = World.draw(0, 8, 8)
    assert not {e["instruction"] for e in world.passages(0)} & {f.question for f in world.facts(0)}
    tokenizer = world.tokenizer()
    assert tokenizer.unk_token_id is None or 0 not in tokenizer(world.facts(0)[0].conflicting)["input_ids"]


def test_reproduction_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("looseleaf_lab")
    from looseleaf_cings import reproduction
    from looseleaf_lab.study import Results

    rows = [{"topic": "capitals", "key": f"{n:x}", "answers": {"country": [f"L{n}"], "capital": [f"T{n}"]}}
            for n in range(10)]
    sets = {"quiz": rows, "wikipedia-excerpts": [{"text": "Some prose."}]}
    small = local()
    monkeypatch.setattr(reproduction.models, "available", lambda name: True)
    monkeypatch.setattr(reproduction.models, "load", lambda name, dtype=None: (small.model, small.tokenizer))
    monkeypatch.setattr(reproduction.data, "rows", sets.__getitem__)
    monkeypatch.setattr(reproduction, "names", lambda text, answers: True)
    full = reproduction.World.model
    monkeypatch.setattr(reproduction.World, "model", lambda world, *given: full(world, *given, width=16, layers=1))
    reproduction.known.cache_clear()
    scale = reproduction.Scale(known=4, new=8, recall=2, steps=1, batch=4, language_steps=1, facts=2)
    row = reproduction.measure(0, scale)
    reproduction.known.cache_clear()
    monkeypatch.setattr(reproduction, "tiny", lambda seed, scale: row[reproduction.TINY])
    assert list(reproduction.measure(reproduction.SEEDS, scale)) == [reproduction.TINY]
    for quick in (True, False):
        report = reproduction.study.report(Results([row, row], {}, [0, 1], scale, quick))
        assert len(report.claims) == 17 and all(c.rule and c.paper and c.source and c.measured for c in report.claims)
        assert ({c.verdict for c in report.claims} == {"not shown at this scale"}) == quick
        assert len(report.tables) == 4 and len(report.figures) == 2 and "[2nd]" in report.claims[0].paper
        assert Report.from_dict(report.to_dict()).to_text() == report.to_text()
