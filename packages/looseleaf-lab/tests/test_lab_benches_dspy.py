"""DSPy's few-shot optimiser as a baseline of prompt optimisers."""

from __future__ import annotations

import pytest

from looseleaf import Budget
from looseleaf_lab.benches import compare_prompts
from looseleaf_lab.benches.dspy_few_shot import NAME, DSPyFewShot
from looseleaf_text.testing import ToyLanguageModel, toy_task

pytest.importorskip("dspy", reason="dspy is not installed")


class Guided(ToyLanguageModel):
    """Right where it is shown something, wrong where not."""

    def _margin(self, prefix: str) -> float:
        right = super()._margin(prefix)
        return right if prefix.count("Sentiment:") > 1 else -right


@pytest.mark.parametrize("generation", [False, True])
def test_it_chooses_exemplars_within_the_budget(generation: bool) -> None:
    task, model, budget = toy_task(generation=generation), Guided(), Budget(calls=150)
    prompt = DSPyFewShot().optimize(task, model, budget=budget, seed=1)
    assert 1 <= len(prompt.exemplars) <= 4 and all(e in task.train for e in prompt.exemplars)
    assert model.calls == budget.used["calls"] <= 150
    best = [b for _, b in prompt.info["history"]]
    assert best == sorted(best) and prompt.info["fitness"] == best[-1]
    assert task.evaluate(prompt.on(model), "dev").score == pytest.approx(prompt.info["fitness"], abs=0.006)


def test_seeds() -> None:
    task = toy_task()
    one, again, other = (DSPyFewShot().optimize(task, Guided(), budget=Budget(calls=150), seed=s)
                         for s in (1, 1, 2))
    assert list(one.exemplars) == list(again.exemplars) != list(other.exemplars)


def test_a_spent_budget_returns_the_best_so_far(capfd: pytest.CaptureFixture[str]) -> None:
    task = toy_task()
    prompt = DSPyFewShot().optimize(task, Guided(), budget=Budget(calls=20))
    assert prompt.info["stopped"] == "budget: calls"
    assert capfd.readouterr().out == ""


def test_in_the_comparison() -> None:
    report = compare_prompts(ToyLanguageModel(), {}, [toy_task()], calls=150)
    row = next(r for r in report.tables[0].rows if r[0] == NAME)
    assert row[report.tables[0].columns.index("calls")] <= 150
    report = compare_prompts(ToyLanguageModel(), {}, [toy_task()], calls=20, published=False)
    assert NAME not in [r[0] for r in report.tables[0].rows]
