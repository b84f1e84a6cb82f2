"""The probe on several models and data, training on a user's model, and the reproduction on tiny ones."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from looseleaf import Report
from looseleaf.resume import as_plain
from looseleaf.testing.common import assert_unchanged, mixed_modes, snapshot
from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
from looseleaf_implicit_reasoning import (
    ContinuousThought,
    DynamicPauses,
    ImplicitReasoningProbe,
    Internalize,
    LinearJump,
    Pauses,
    Problem,
    ReasoningData,
    SoftThinking,
    StepProbe,
    TwoHop,
    chain,
    planted,
    taxonomy,
)
from looseleaf_implicit_reasoning.data import prose
from looseleaf_text import LocalModel

QUICK: dict[str, Any] = {"problems": 4, "probed": 8, "steps": 1, "order_steps": (1,), "demonstrations": 1,
                         "thoughts": 1, "max_tokens": 2, "pauses": 1, "tokens": 100}
needs_training = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("accelerate", "peft"))), reason="accelerate and PEFT are not installed")


# -------------------------------------------------------------------------------------------------------------- probe
def test_the_built_in_report_has_every_part() -> None:
    report = ImplicitReasoningProbe(**QUICK).run((tiny_text_llama(), tiny_tokenizer()), progress=False)
    assert [t.title for t in report.tables] == [
        "Soft thinking", "Filler tokens", "Looped layers", "Recall of the bridge", "Linear jump to the last layer",
        "Intermediate results", "Right or wrong, from the states", "Order of the premises"]
    assert [c.verdict for c in report.claims] == ["holds"] and report.strips and len(report.figures) == 4
    assert ImplicitReasoningProbe.table().rows == taxonomy().rows


def test_data_of_ones_own_and_what_is_too_little_for() -> None:
    model, tokenizer = mixed_modes(tiny_text_llama()), tiny_tokenizer()
    before = snapshot(model)
    data = ReasoningData(tuple(Problem(f"x = {n}. x =", str(n), results=(str(n),), premises=(f"x = {n}.",))
                               for n in range(6)))
    probe = ImplicitReasoningProbe(("pauses", "recall", "jump", "steps"), **QUICK)
    report = probe.run(LocalModel(model, tokenizer), data.to_json(), progress=False)
    assert_unchanged(before, model)
    missing = {row[0]: str(row[1]) for row in report.tables[-1].rows}
    assert set(missing) == {"recall", "jump"}
    assert "expected two or more" in missing["recall"] and "two or more" in missing["jump"]
    empty = ImplicitReasoningProbe(**QUICK).run((model, tokenizer), ReasoningData(), progress=False)
    assert len(empty.tables[-1].rows) == 7  # problems in other orders are always made here


def test_the_probe_finds_the_planted_bridge() -> None:
    model, tokenizer, hops, problems = planted()
    report = ImplicitReasoningProbe(("recall", "steps")).run(
        (model, tokenizer), ReasoningData(tuple(problems), tuple(hops)), progress=False)
    assert report.facts["bridge recalled from layer"] == 2
    steps = next(t for t in report.tables if t.title == "Intermediate results")
    assert [row[2] for row in steps.rows] == [2, None]


@pytest.mark.parametrize(("options", "message"), [
    ({"parts": ("dreams",)}, "one or more of soft thinking, pauses"), ({"parts": "recall"}, "one or more of"),
    ({"loop": (1,)}, "two layers"), ({"filler": ""}, "a text"), ({"times": 0}, "an integer >= 1"),
    ({"order_steps": (0,)}, "integers >= 1")])
def test_the_probe_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImplicitReasoningProbe(**options)


def test_bad_data_and_loops_are_errors() -> None:
    subject = (tiny_text_llama(), tiny_tokenizer())
    with pytest.raises(ValueError, match="a ReasoningData or its JSON, got list"):
        ImplicitReasoningProbe(**QUICK).run(subject, [])
    with pytest.raises(ValueError, match="i < j"):
        ImplicitReasoningProbe(("loops",), loop=(2, 9), **QUICK).run(subject, progress=False)
    with pytest.raises(ValueError, match=r"expected a \(model, tokenizer\) pair"):
        ImplicitReasoningProbe(**QUICK).run(subject[0])


@needs_training
def test_models_in_wrappers() -> None:
    import peft

    tokenizer = tiny_tokenizer()
    plain = tiny_text_llama()
    wrapped = peft.get_peft_model(tiny_text_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    probe = ImplicitReasoningProbe(("soft thinking", "pauses", "loops", "jump", "steps", "confidence"), **QUICK)
    one, two = (probe.run((model, tokenizer), progress=False) for model in (plain, wrapped))
    for a, b in zip(one.tables, two.tables, strict=True):  # B of a LoRA begins at zero
        assert a.title == b.title and len(a.rows) == len(b.rows)
        for left, right in zip(a.rows, b.rows, strict=True):
            assert left == pytest.approx(right, abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ training
def arguments(folder: Path, **options: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(output_dir=str(folder), per_device_train_batch_size=4, use_cpu=True, report_to="none",
                             disable_tqdm=True, save_strategy="no", logging_strategy="no", learning_rate=3e-3,
                             **options)


@needs_training
def test_training_by_the_trainer(tmp_path: Path) -> None:
    problems = chain(8, 1)
    for part in (ContinuousThought(c=1, stages=1, epochs=3), Internalize(per_epoch=4), DynamicPauses(1)):
        model = tiny_text_llama()
        args = arguments(tmp_path, num_train_epochs=8)
        losses = part.train(model, tiny_tokenizer(), problems, args=args)  # type: ignore[attr-defined]
        assert losses[-1] < 0.7 * losses[0], type(part).__name__
        assert args.num_train_epochs == 8
        if isinstance(part, DynamicPauses):
            assert model.get_input_embeddings().weight.shape[0] == 128  # there was room for the pause
    with pytest.raises(ValueError, match="expected one or more, got none"):
        Internalize().train(tiny_text_llama(), tiny_tokenizer(), [], args=arguments(tmp_path))


@needs_training
def test_learned_pauses_train_one_embedding(tmp_path: Path) -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared, losses = Pauses(2).train(model, tokenizer, chain(8, 1), args=arguments(tmp_path, num_train_epochs=3))
    moved = [name for name, p in prepared.named_parameters() if p.requires_grad]
    assert len(moved) == 1 and "trainable_tokens" in moved[0] and len(losses) == 6
    index = tokenizer.convert_tokens_to_ids("<pause>")
    after = prepared.merge_and_unload().state_dict()  # type: ignore[operator]
    for name, value in before.items():
        changed = (after[name] != value).reshape(len(value), -1).any(1)
        assert changed.nonzero().flatten().tolist() == ([index] if "embed_tokens" in name else [])


def test_gradient_checkpointing_goes_without_the_cache() -> None:
    model = tiny_text_llama()
    part = ContinuousThought(c=1, stages=2)
    from looseleaf_implicit_reasoning import encode

    batch = part.batch(encode(chain(3, 2), tiny_tokenizer()), 2)
    plain = float(part.loss(model, batch).detach())
    model.train()
    model.gradient_checkpointing_enable()
    assert float(part.loss(model, batch).detach()) == pytest.approx(plain, abs=1e-4)


# -------------------------------------------------------------------------------------------------------- reproduction
def test_every_claim_is_measured_and_decided_by_its_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("looseleaf_lab")
    from looseleaf_implicit_reasoning import reproduction
    from looseleaf_lab.study import Results

    monkeypatch.setattr(reproduction, "BATCH", 8)
    monkeypatch.setattr(reproduction, "smollm2", lambda: (tiny_text_llama(), tiny_tokenizer()))
    monkeypatch.setattr(reproduction, "known_facts", lambda local, count: [
        TwoHop(f"{n}", "country", word, "continent", "x") for n, word in enumerate(("Wales", "Xanadu", "Zaire"))])
    scale = reproduction.Scale(steps=8, hop_steps=2, tested=16, facts=3, problems=4, texts=30)
    rows = [as_plain(reproduction.measure(seed, scale)) for seed in range(2)]
    assert as_plain(reproduction.measure(1, scale)) == rows[1]
    once = as_plain(reproduction.once(scale))
    report = reproduction.study.report(Results(rows, once, [0, 1], scale, quick=False))
    assert len(report.claims) == 14 and report.claims[0].verdict == "holds"
    assert Report.from_dict(report.to_dict()).to_json() == report.to_json()
    quick = reproduction.study.report(Results(rows[:1], once, [0], scale, quick=True))
    assert {c.verdict for c in quick.claims[1:]} == {"not shown at this scale"}


def test_the_reproduction_s_tasks_are_what_they_say() -> None:
    reproduction = pytest.importorskip("looseleaf_implicit_reasoning.reproduction")
    for e in reproduction.modular(50, random.Random(0)):
        value, results = e.question[0] - reproduction.FIRST, []
        for at in range(1, len(e.question) - 1, 2):
            operation, other = e.question[at] - reproduction.FIRST - 5, e.question[at + 1] - reproduction.FIRST
            value = (value + other, value * other)[operation] % 5
            results.append(value + reproduction.FIRST)
        assert [*(s[0] for s in e.steps), e.answer[0]] == results and 2 <= len(results) <= 4
    rows, answers = reproduction.hops(64, torch.Generator().manual_seed(0))
    for row, answer in zip(rows.tolist(), answers.tolist(), strict=True):
        at = len(row) - 1
        for _ in range(reproduction.HOPS):
            at = max(n for n in range(at) if row[n] == row[at]) + 1
        assert row[at] == answer
    assert rows.shape == (64, reproduction.LENGTH)


@pytest.mark.sweep
@pytest.mark.smollm2
def test_on_a_real_model() -> None:
    from looseleaf_lab import models

    model, tokenizer = models.load("smollm2")
    [thought] = SoftThinking(max_thoughts=0).generate(model, tokenizer, ["The capital of France is"], max_tokens=4)
    assert thought.text == LocalModel(model, tokenizer).generate(["The capital of France is"], 4)[0]
    found = StepProbe().measure(model, tokenizer, chain(60, 1))
    assert found.accuracy.shape == (1, 31, 3)
    jump = LinearJump(tokens=900).measure(model, tokenizer, prose(30))
    assert jump.agreement[-1].value == 1
