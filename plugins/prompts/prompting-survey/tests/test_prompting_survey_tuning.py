"""Which parameters move, and soft prompts by PEFT against the plain loop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from looseleaf import Budget, Example, UnsupportedModelError
from looseleaf.testing.common import assert_unchanged, mixed_modes, snapshot
from looseleaf_prompting_survey import STRATEGIES, SoftPromptTuning, movable, tune
from looseleaf_text import LocalModel, SoftPrompt, TextPrompt, TextTask
from looseleaf_text.testing import ToyLanguageModel, toy_task

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

TASK = TextTask("t", train=[Example({"text": text}, label) for text, label in (
    ("fine day", "good"), ("bad day", "bad"), ("so fine", "good"), ("so bad", "bad"), ("it is fine", "good"))],
    dev=[Example({"text": "fine"}, "good"), Example({"text": "bad"}, "bad")],
    labels={"good": " yes", "bad": " no"}, template="{text}", answer_prefix="Good?")


def local() -> LocalModel:
    from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer

    return LocalModel(tiny_text_llama(), tiny_tokenizer())


def weights(model: LocalModel) -> dict[str, Any]:
    return {k: v.clone() for k, v in model.model.state_dict().items()}


def changed(model: LocalModel, before: dict[str, Any]) -> bool:
    return any(not torch.equal(v, before[k]) for k, v in model.model.state_dict().items())


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_what_moves(name: str) -> None:
    model, strategy = local(), STRATEGIES[name]
    before = weights(model)
    made = tune(name, model, TASK, steps=3, lr=0.01, soft_tokens=2)
    assert changed(model, before) is strategy.model_moves
    if made.prompt is None:
        assert not strategy.prompt and made.head is not None and made.head.weight.abs().sum() > 0
    else:
        assert isinstance(made.prompt, SoftPrompt) is strategy.prompt_moves
        assert len(TASK.evaluate(made.prompt.on(model), "dev").predictions) == 2
    assert all(p.requires_grad and p.grad is None for p in model.model.parameters())
    assert len(made.losses) == (0 if name == "tuning-free prompting" else 3)
    if strategy.prompt_moves:
        start = tune(name, local(), TASK, steps=1, lr=0.0, soft_tokens=2)
        assert not torch.equal(made.prompt.soft, start.prompt.soft)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_modes_and_gradients_come_back(name: str) -> None:
    model = local()
    mixed_modes(model.model)
    before = snapshot(model.model)
    tune(name, model, TASK, steps=1, lr=0.0, soft_tokens=2)
    assert_unchanged(before, model.model)


def test_movable_parameters() -> None:
    model = torch.nn.Linear(2, 2)
    soft = torch.zeros(1, 2)
    assert movable(STRATEGIES["tuning-free prompting"], model) == []
    assert len(movable(STRATEGIES["prompt+LM tuning"], model, soft)) == 3
    assert movable(STRATEGIES["fixed-LM prompt tuning"], model, soft)[0] is soft
    for name, given in (("prompt+LM tuning", None), ("fixed-prompt LM tuning", soft)):
        with pytest.raises(ValueError, match=r"soft: expected (soft tokens to train|no soft tokens) for"):
            movable(STRATEGIES[name], model, given)


def test_training_lowers_the_loss_and_reads_like_the_model() -> None:
    from looseleaf_prompting_survey.training import answer_loss

    model = local()
    made = tune("fixed-LM prompt tuning", model, TASK, steps=30, lr=0.1, batch=5, soft_tokens=3)
    assert made.losses[-1] < made.losses[0]
    # the loss of one example is what the trained prompt gives its answer, by tokens
    example = TASK.train[0]
    assert isinstance(made.prompt, SoftPrompt)
    row = TASK.class_scores(made.prompt.on(model), [example])[0]
    loss = answer_loss(model, TASK, TextPrompt.for_task(TASK), [example], made.prompt.soft)
    assert -row[0] / len(model.tokenize(" yes")) == pytest.approx(float(loss.detach()), abs=1e-4)


def test_what_tuning_refuses() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'prompt\+LM tuning'"):
        tune("prompt+LM tunin", local(), TASK)
    with pytest.raises(ValueError, match="steps: expected an integer >= 1, got 0"):
        tune("prompt+LM tuning", local(), TASK, steps=0)
    with pytest.raises(ValueError, match="expected labels"):
        tune("prompt+LM tuning", local(), toy_task(generation=True))


# -- PEFT ---------------------------------------------------------------------------------------------------------

def test_soft_prompts_need_a_local_model_and_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModelError, match="expected a LocalModel"):
        SoftPromptTuning().optimize(toy_task(), ToyLanguageModel())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"looseleaf-prompting-survey\[peft\]"):
        SoftPromptTuning().optimize(TASK, local())


@pytest.mark.parametrize(("field", "wrong"), [
    ("method", "lora"), ("num_virtual_tokens", 0), ("steps", 0), ("lr", 0.0), ("batch_size", 0)])
def test_bad_tuning_parameters(field: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=rf"SoftPromptTuning\.{field}: expected .*, got "):
        SoftPromptTuning(**{field: wrong})
    with pytest.raises(ValueError, match=r"SoftPromptTuning\.init_text: expected a text with method='prompt'"):
        SoftPromptTuning(method="prefix", init_text="x")


def test_peft_does_what_the_plain_loop_does() -> None:
    pytest.importorskip("peft")
    model = local()
    before, attributes = weights(model), set(vars(model.model))
    ids = model.tokenize("Say yes")
    start = model.model.get_input_embeddings().weight[torch.tensor(ids)].detach().clone()
    plain = tune("fixed-LM prompt tuning", model, TASK, steps=12, lr=0.05, batch=3, start=start, seed=4)
    by_peft = SoftPromptTuning(num_virtual_tokens=len(ids), init_text="Say yes", steps=12, lr=0.05, batch_size=3
                               ).optimize(TASK, model, seed=4, progress=False)
    assert by_peft.soft is not None and by_peft.soft.shape == start.shape
    assert plain.losses == pytest.approx(by_peft.info["losses"], abs=1e-3)
    assert torch.allclose(plain.prompt.soft, by_peft.soft, atol=1e-2)  # type: ignore[union-attr]
    assert not changed(model, before) and all(p.requires_grad for p in model.model.parameters())
    assert set(vars(model.model)) == attributes  # PEFT leaves nothing on the model
    again = SoftPromptTuning(num_virtual_tokens=len(ids), init_text="Say yes", steps=12, lr=0.05, batch_size=3
                             ).optimize(TASK, model, seed=4, progress=False)
    assert torch.equal(again.soft, by_peft.soft)
    assert by_peft.info["fitness"] == TASK.evaluate(by_peft.on(model), "dev").score


def test_prefixes_are_used_as_they_were_trained() -> None:
    """The loss PEFT reports at the first step is that of the prefix read by the core."""
    pytest.importorskip("peft")
    model = local()
    task = TextTask("one", train=[TASK.train[0], TASK.train[1]], labels=TASK.labels, template="{text}",
                answer_prefix="Good?")
    made = SoftPromptTuning("prefix", num_virtual_tokens=3, steps=1, lr=1e-9, batch_size=2).optimize(
        task, model, progress=False)
    assert made.soft is not None and made.soft.dim() == 5
    rows = task.class_scores(made.on(model), task.train)
    lengths = [len(model.tokenize(" yes")), len(model.tokenize(" no"))]
    assert made.info["losses"][0] == pytest.approx(-(rows[0][0] + rows[1][1]) / sum(lengths), abs=1e-3)
    trained = SoftPromptTuning("prefix", num_virtual_tokens=3, steps=30, lr=0.1).optimize(task, model, progress=False)
    assert trained.info["losses"][-1] < trained.info["losses"][0]


def test_stopped_tuning_resumes(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    optimizer = SoftPromptTuning(num_virtual_tokens=2, steps=25, batch_size=2)
    whole = optimizer.optimize(TASK, local(), progress=False)
    budget = Budget(calls=2 * 13)
    part = optimizer.optimize(TASK, local(), budget=budget, state_dir=tmp_path, progress=False)
    assert part.info["stopped"] == "budget: calls" and part.info["evaluations"] == 13
    assert budget.used["calls"] <= 26
    again = optimizer.optimize(TASK, local(), state_dir=tmp_path, progress=False)
    assert again.info["losses"] == pytest.approx(whole.info["losses"])
    assert torch.allclose(again.soft, whole.soft, atol=1e-6) and again.info["stopped"] == "done"
    spent = Budget()
    assert optimizer.optimize(TASK, local(), budget=spent, state_dir=tmp_path, progress=False).info == again.info
    assert spent.used["calls"] == 2 * 25 + len(TASK.dev)  # a finished search is not paid for again
    again.save(tmp_path / "prompt.json")
    assert torch.equal(SoftPrompt.load(tmp_path / "prompt.json").soft, again.soft)
    for path in tmp_path.glob("soft-?.safetensors"):
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be read"):
        optimizer.optimize(TASK, local(), state_dir=tmp_path, progress=False)
