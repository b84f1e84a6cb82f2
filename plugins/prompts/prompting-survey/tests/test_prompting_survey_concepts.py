"""Every concept's example runs, and the reproduction with it."""

from __future__ import annotations

import pytest

from looseleaf_prompting_survey import concepts
from looseleaf_text import LocalModel
from looseleaf_text.testing import ToyLanguageModel, toy_task


def test_examples_on_a_model_that_answers_anything() -> None:
    found = concepts.run(ToyLanguageModel())
    assert set(found) == set(concepts.CONCEPTS) - set(concepts.LOCAL) and all(found.values())
    assert "[Z]" in found["prompt addition"] and "great" in found["prompt addition"]
    text = concepts.show(ToyLanguageModel(), ["sharing"])
    assert text.startswith("## sharing\n") and "begin alike" in text
    with pytest.raises(ValueError, match="Did you mean 'ensembling'"):
        concepts.run(ToyLanguageModel(), ["ensemblin"])
    with pytest.raises(ValueError, match="expected a LocalModel, got a ToyLanguageModel"):
        concepts.run(ToyLanguageModel(), ["training strategies"])


def test_examples_on_a_local_and_on_a_masked_model() -> None:
    pytest.importorskip("transformers")
    from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer

    model = LocalModel(tiny_text_llama(), tiny_tokenizer())
    assert set(concepts.run(model)) == set(concepts.CONCEPTS)
    reproduction = pytest.importorskip("looseleaf_prompting_survey.reproduction", exc_type=ImportError)
    masked = reproduction.random_bert()
    found = concepts.run(masked)
    assert set(found) == set(concepts.CONCEPTS) - set(concepts.LOCAL) - set(concepts.GENERATING)
    with pytest.raises(ValueError, match="expected a model that generates, got a MaskedModel"):
        concepts.run(masked, ["prefix prompt"])


def test_reproduction_adds_up() -> None:
    pytest.importorskip("looseleaf_lab")
    from looseleaf_lab.study import Results
    from looseleaf_prompting_survey.reproduction import METHODS, Scale, compare, study

    rows = [{name: compare(toy_task(seed + shift), ToyLanguageModel(), seed) for name, shift in (("a", 0), ("b", 9))}
            for seed in range(3)]
    for run in (run for row in rows for run in row.values()):
        assert set(run["plain"]) == set(run["calibrated"]) == set(METHODS)
        single = run["singles"][0]
        assert len(single) >= 6 and run["plain"]["manual template"] == single[0]
        assert run["plain"]["mean single template"] == pytest.approx(sum(single) / len(single))
    once = {"examples": [["ensembling", "some text"]], "dtype": "float32", "threads": 1}
    report = study.report(Results(rows, once, [0, 1, 2], Scale(), False))
    assert [c.verdict for c in report.claims[-2:]] == ["not shown at this scale"] * 2
    assert all(c.verdict != "not shown at this scale" for c in report.claims[:-2])
    quick = study.report(Results(rows, once, [0, 1, 2], Scale(), True))
    assert all(c.verdict == "not shown at this scale" for c in quick.claims)
    accuracies, spread = report.tables
    assert len(accuracies.rows) == 3 * len(METHODS) and len(spread.rows) == 6 == report.facts["runs"]
    assert len(report.figures) == 3 and set(report.arrays) == {f"weights {t} {s}" for t in "ab" for s in range(3)}
    report.to_json()


@pytest.mark.slow
@pytest.mark.smollm2
def test_concepts_on_smollm2() -> None:
    from looseleaf_lab import models

    found = concepts.run(LocalModel(*models.load("smollm2")), ["prefix prompt", "cloze prompt", "ensembling"])
    assert "Paris" in found["prefix prompt"] and "bored me to tears." in found["cloze prompt"]
