"""The loss against torch's own, and training with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from looseleaf.testing.models import tied_llama as tiny_llama
from looseleaf_leaf import PairCollator, response_kl

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
torch.set_num_threads(1)


def logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


LABELS = torch.tensor([[-100, -100, 4, 5, -100], [-100, 3, -100, 6, 2]])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_torchs_kl(temperature: float) -> None:
    teacher, student = logits(0, 2, 5, 7), logits(1, 2, 5, 7)
    at = [(0, 1), (0, 2), (1, 0), (1, 2), (1, 3)]  # one before each label
    p = torch.stack([teacher[i] for i in at]) / temperature
    q = torch.stack([student[i] for i in at]) / temperature
    expected = functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="batchmean") * temperature ** 2
    torch.testing.assert_close(response_kl(teacher, student, LABELS, temperature=temperature), expected)
    torch.testing.assert_close(response_kl(teacher, student, LABELS, temperature=temperature, count=10), expected / 2)
    assert float(response_kl(teacher, teacher, LABELS)) == pytest.approx(0.0, abs=1e-6)


def test_gradients_go_to_the_student_only() -> None:
    teacher, student = logits(0, 2, 5, 7).requires_grad_(), logits(1, 2, 5, 7).requires_grad_()
    response_kl(teacher, student, LABELS).backward()
    assert teacher.grad is None and student.grad is not None
    assert not student.grad[0, 0].any() and not student.grad[:, 4].any(), "positions that predict no response"
    one = (student[0, 1].softmax(-1) - teacher[0, 1].softmax(-1)).detach() / 5
    torch.testing.assert_close(student.grad[0, 1], one)


def test_certain_teachers_and_half_precision() -> None:
    teacher = torch.full((1, 2, 3), -torch.inf)
    teacher[..., 1] = 0.0
    student = logits(2, 1, 2, 3).requires_grad_()
    labels = torch.tensor([[-100, 1]])
    loss = response_kl(teacher, student, labels)
    torch.testing.assert_close(loss, functional.cross_entropy(student[:, 0], torch.tensor([1])))
    loss.backward()
    assert student.grad is not None and bool(student.grad.isfinite().all())
    assert response_kl(teacher.bfloat16(), student.bfloat16(), labels).dtype == torch.float32


def test_vocabularies_that_differ() -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        response_kl(logits(0, 1, 2, 8), logits(0, 1, 2, 7), torch.tensor([[-100, 1]]))


# ------------------------------------------------------------------------------------------- training
def pairs(count: int = 4) -> list[dict[str, list[int]]]:
    rows = []
    for n in range(count):
        ids = [(7 * n + 3 * i) % 60 + 1 for i in range(8 + n)]
        without = ids[:2] + ids[4:]
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:],
                     "counterfactual_input_ids": without,
                     "counterfactual_labels": [-100] * (len(without) - 2) + ids[-2:]})
    return rows


def other() -> Any:
    teacher = tiny_llama()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    return teacher


def trainer(tmp_path: Any, model: Any = None, rows: Any = None, steps: int = 1, size: int = 4, **fields: Any) -> Any:
    from looseleaf_leaf import LeaFTrainer

    arguments = {k: fields.pop(k) for k in ("gradient_accumulation_steps", "learning_rate") if k in fields}
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=steps, per_device_train_batch_size=size, report_to=[], save_strategy="no",
        use_cpu=True, logging_strategy="no", disable_tqdm=True, **arguments)
    return LeaFTrainer(model=model or tiny_llama(), teacher=fields.pop("teacher", None) or other(), args=args,
                       train_dataset=rows or pairs(), **fields)


@torch.no_grad()
def loss_of(made: Any) -> float:
    return float(made.compute_loss(made.model.eval(), PairCollator()(pairs())))


def terms(model: Any, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(KL on X, KL on X without A, CE on X), by hand, row by row without padding."""
    teacher, sums = other(), [torch.zeros(()) for _ in range(3)]
    for row in rows:
        for k, prefix in enumerate(("", "counterfactual_")):
            ids = torch.tensor([row[prefix + "input_ids"]])
            p, q = (m(input_ids=ids).logits[0, -3:-1].log_softmax(-1) for m in (teacher, model))
            sums[k] = sums[k] + functional.kl_div(q, p, log_target=True, reduction="sum")
            if not k:
                sums[2] = sums[2] + functional.nll_loss(q, ids[0, -2:], reduction="sum")
    count = 2 * len(rows)
    return sums[0] / count, sums[1] / count, sums[2] / count


@pytest.mark.parametrize("lambda_, ce", [(0.5, 0.0), (1.0, 0.0), (0.0, 0.0), (0.3, 0.7), (0.0, 1.0)])
def test_the_three_terms(tmp_path: Any, lambda_: float, ce: float) -> None:
    made = trainer(tmp_path, lambda_=lambda_, ce=ce)
    loss = made.compute_loss(made.model.eval(), PairCollator()(pairs()))
    whole, without, entropy = terms(made.model, pairs())
    torch.testing.assert_close(loss, lambda_ * whole + (1 - lambda_) * without + ce * entropy, rtol=1e-4, atol=1e-6)
    assert float((whole - without).detach().abs()) > 1e-4, "the terms differ, or nothing is tested"


def test_lambda_1_is_plain_distillation(tmp_path: Any) -> None:
    plain = [{k: v for k, v in row.items() if not k.startswith("counter")} for row in pairs()]
    scrambled = [{**row, "counterfactual_input_ids": [1, 2, 3], "counterfactual_labels": [-100, 2, 3]}
                 for row in pairs()]
    states = []
    for rows in (pairs(), plain, scrambled):
        made = trainer(tmp_path, rows=rows, steps=2, lambda_=1.0, learning_rate=1e-2)
        made.train()
        states.append(made.model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]) and torch.equal(value, states[2][name])


def test_without_counterfactuals_a_sample_is_its_own(tmp_path: Any) -> None:
    made = trainer(tmp_path)
    same = [{**row, "counterfactual_input_ids": row["input_ids"], "counterfactual_labels": row["labels"]}
            for row in pairs()]
    plain = [{k: v for k, v in row.items() if not k.startswith("counter")} for row in pairs()]
    a, b = (made.compute_loss(made.model.eval(), PairCollator()(rows)) for rows in (same, plain))
    torch.testing.assert_close(a, b)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Any) -> None:
    rows = pairs()
    rows[0]["labels"] = [-100] + rows[0]["input_ids"][1:]  # more response than the others
    rows[0]["counterfactual_labels"] = [-100] * 2 + rows[0]["counterfactual_input_ids"][2:]
    grown = []
    for size, steps in ((4, 1), (1, 4)):
        made = trainer(tmp_path, rows=rows, size=size, gradient_accumulation_steps=steps, learning_rate=1e-3, ce=0.5)
        made.create_optimizer()
        made.optimizer = torch.optim.SGD(made.model.parameters(), lr=1.0)
        made.train()
        grown.append(torch.cat([p.detach().flatten() for p in made.model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in tiny_llama().parameters()])
    assert float((grown[0] - start).norm()) > 1e-5
    torch.testing.assert_close(grown[0] - start, grown[1] - start, rtol=1e-3, atol=1e-6)


def test_training_brings_the_student_nearer_and_leaves_the_teacher(tmp_path: Any) -> None:
    teacher = other().train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    made = trainer(tmp_path, steps=30, teacher=teacher, learning_rate=3e-3)
    first = loss_of(made)
    made.train()
    assert loss_of(made) < 0.3 * first
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training


def test_evaluation_gives_the_loss(tmp_path: Any) -> None:
    made = trainer(tmp_path, eval_dataset=pairs())
    with torch.no_grad():
        whole, without, _ = terms(made.model.eval(), pairs())
    assert made.evaluate()["eval_loss"] == pytest.approx(float((whole + without) / 2), rel=1e-3)


def test_padded_embeddings_of_different_size(tmp_path: Any) -> None:
    teacher = other()
    teacher.resize_token_embeddings(72)
    batch = PairCollator()(pairs())
    made = trainer(tmp_path, teacher=teacher)
    with pytest.raises(ValueError, match="vocabulary=len"):
        made.compute_loss(made.model, batch)
    made = trainer(tmp_path, teacher=teacher, vocabulary=64)
    expected = trainer(tmp_path).compute_loss(tiny_llama(), batch)
    torch.testing.assert_close(made.compute_loss(made.model.eval(), batch), expected, rtol=1e-4, atol=1e-6)


def test_with_lora(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    from looseleaf_leaf import LeaF

    base = tiny_llama()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"],
                                                          task_type="CAUSAL_LM"))
    made = trainer(tmp_path, model=model, steps=20, learning_rate=1e-2)
    first = loss_of(made)
    made.train()
    assert loss_of(made) < first
    for name, value in model.get_base_model().state_dict().items():
        if "lora" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), name
    ids = torch.tensor([pairs()[0]["input_ids"]])
    labels = ids.clone()
    labels[:, :-2] = -100
    batch = {"input_ids": ids, "labels": labels}
    assert LeaF(q=0.3).with_teacher(other()).keep(model, batch)["input_ids"].logical_not().any()


@pytest.mark.parametrize("fields", [{"lambda_": 1.5}, {"lambda_": -0.1}, {"temperature": 0.0}, {"ce": -1.0},
                                    {"temperature": float("nan")}, {"vocabulary": 0}])
def test_bad_values(tmp_path: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"LeaFTrainer\.{next(iter(fields))}: expected .*, got"):
        trainer(tmp_path, **fields)


def test_a_teacher_that_is_none(tmp_path: Any) -> None:
    from looseleaf_leaf import LeaFTrainer

    with pytest.raises(ValueError, match="torch module"):
        LeaFTrainer(model=tiny_llama(), teacher="gpt")  # type: ignore[arg-type]
