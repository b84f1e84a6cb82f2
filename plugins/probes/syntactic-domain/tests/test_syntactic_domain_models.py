"""Models of transformers: several families, adapters, training, refusals, and the reproduction."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from looseleaf.testing import conformance_tests
from looseleaf.testing.common import mixed_modes
from looseleaf.testing.models import seeded, tiny_gemma3, tiny_llama, tiny_tokenizer
from looseleaf_syntactic_domain import (
    PlantedModel,
    RefusalProbe,
    SyntacticDomainProbe,
    Variants,
    ask,
    build,
    countries,
    fine_tune,
)
from looseleaf_text import LocalModel

test_refusal_conformance = conformance_tests(RefusalProbe)
SMALL = {"entities": 4, "choices": 2, "settings": ("exact", "antonym"), "scoring": "likelihood"}


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return seeded(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2))).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_batches_give_what_single_questions_give(family: str) -> None:
    model = {"llama": lambda: tiny_llama(vocabulary=128), "gpt2": gpt2,
             "gemma3": lambda: tiny_gemma3()}[family]()
    if family == "gemma3":
        model.resize_token_embeddings(128)
    facts = countries(2)
    questions = Variants().questions(facts, ("exact",), cross=0, swapped=False, progress=False).questions[:6]
    local = LocalModel(model, tiny_tokenizer())
    whole = ask(local, questions, facts, progress=False)
    for n, question in enumerate(questions):
        one = ask(local, [question], facts, progress=False)
        assert one.probability[0] == pytest.approx(whole.probability[n], abs=1e-4)
        scores = local.score([facts.form.replace("{text}", question.text)], [[f" {a}" for a in dict.fromkeys(
            [question.answer, *facts.answers(question.domain)])]])[0]
        assert whole.probability[n] == pytest.approx(float(torch.tensor(scores).softmax(0)[0]), abs=1e-4)


def test_adapters_and_mixed_modes_and_json_and_bad_input() -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT")
    facts = countries(4)
    model = mixed_modes(peft.get_peft_model(tiny_llama(vocabulary=128), peft.LoraConfig(target_modules=["q_proj"])))
    modes = [m.training for m in model.modules()]
    probe = SyntacticDomainProbe(**SMALL)  # type: ignore[arg-type]
    one = probe.run((model, tiny_tokenizer()), facts, progress=False)
    assert [m.training for m in model.modules()] == modes
    assert one.to_json() == probe.run(LocalModel(model, tiny_tokenizer()), facts.to_json(), progress=False).to_json()
    with pytest.raises(ValueError, match="the model's tokenizer"):
        probe.run(model, facts)
    with pytest.raises(ValueError, match="data: expected None, DomainFacts or them in JSON, got int"):
        probe.run((model, tiny_tokenizer()), 3)
    for name, value in (("settings", ("synonym",)), ("settings", "exact"), ("high", 0), ("selection", 1.0),
                        ("tagset", "penn"), ("choices", 1), ("entities", 3)):
        with pytest.raises(ValueError, match=rf"SyntacticDomainProbe\.{name}: expected"):
            SyntacticDomainProbe(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("adapters", [False, True])
def test_fine_tuning_learns_the_answers_alone(adapters: bool, tmp_path: Any) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate")
    peft = pytest.importorskip("peft", reason="needs PEFT")
    model, rows = tiny_llama(vocabulary=128), build(countries(2))
    before = {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if adapters else None
    tuned, losses = fine_tune(model, tiny_tokenizer(), rows, peft_config=config, epochs=4, lr=3e-3, batch=6)
    assert torch.equal(torch.get_rng_state(), state) and not tuned.training
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
    after = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in tuned.named_parameters()}
    same = all(torch.equal(p, after[n]) for n, p in before.items())
    assert same == adapters
    with pytest.raises(ValueError, match="rows: expected solved questions"):
        fine_tune(model, tiny_tokenizer(), [])


def test_labels_are_those_of_the_answers() -> None:
    from looseleaf_syntactic_domain.training import _padded

    batch = _padded([{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 3], [-100, 5, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_refusals() -> None:
    class Declines(PlantedModel):
        """Declines what is about cakes, unless a harmless question in its exact words stands before it."""

        def generate(self, prompts: list[str], max_tokens: int, *_: Any, **__: Any) -> list[str]:
            declines = [not any(p.startswith(q) for q in exact) for p in prompts]
            return ["I'm sorry." if each else "Sure." for each in declines]

    facts = countries(3)
    own = Variants().questions(facts, ("exact",), cross=0, swapped=False, progress=False).questions
    exact = [q.text for q in own]
    data = {"requests": ["Bake a cake.", "Sell a cake.", "Buy a cake."], "refused": "sorry", "facts": facts}
    report = RefusalProbe().run(Declines(facts, "guesses"), data)
    rates = {(row[0], row[1]): row[2] for row in report.tables[0].rows}
    assert rates.pop(("before", "exact")) == 0 and set(rates.values()) == {1.0} and len(rates) == 6
    for bad, words in ((None, "got NoneType"), ({"requests": ["a", "b"]}, "got \\['requests'\\]"),
                       ({**data, "requests": ["a"]}, "two texts or more"), ({**data, "refused": 3}, "got int"),
                       ({**data, "form": "x"}, "form: expected")):
        with pytest.raises(ValueError, match=words):
            RefusalProbe().run(Declines(facts, "guesses"), bad)


def test_reproduction(monkeypatch: pytest.MonkeyPatch) -> None:
    from looseleaf.resume import as_plain
    from looseleaf_lab import data as lab_data
    from looseleaf_lab.study import Results
    from looseleaf_syntactic_domain import reproduction

    reproduction.brown.cache_clear()
    monkeypatch.setattr(lab_data, "rows", lambda name: lab_data.stand_in(name, 80))
    scale = reproduction.Scale(subjects=4, steps=4, planted=6, sentences=40, shuffles=5)
    rows = [as_plain(reproduction.measure(0, scale))]
    reproduction.brown.cache_clear()
    report = reproduction.study.report(Results(rows, {}, [0], scale, False))
    assert len(report.claims) == 10 and len(report.tables) == 3
    assert all(c.verdict == "not shown at this scale" for c in report.claims if c.measured.startswith("not measured"))
