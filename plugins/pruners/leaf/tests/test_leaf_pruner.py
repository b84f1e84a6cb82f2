"""LeaF as a whole: the sign, filters, teachers with other tokens, the view."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from looseleaf import Report, get
from looseleaf.testing.common import assert_unchanged, mixed_modes, snapshot
from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
from looseleaf_leaf import LeaF, encode, greedy_match, show

torch.set_num_threads(1)
DISTRACTOR, RIGHT, WRONG = 5, 8, 9


class Reader(nn.Module):
    """Answers 8, or 9 where it notices a token 5: by ``notice`` times its embedding. Sensitive to 3 as well."""

    def __init__(self, notice: float) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.eye(10), freeze=False)
        self.notice = notice

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
                attention_mask: Tensor | None = None) -> Any:
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        x = x if attention_mask is None else x * attention_mask[..., None]
        # every weight is positive on its own token alone, so that the gradient of other tokens is small
        seen = (x[..., DISTRACTOR] ** 2).cumsum(1) * self.notice
        key = (x[..., 3] ** 2).cumsum(1)
        logits = torch.zeros((*x.shape[:2], 10)) - 20
        logits = logits.index_fill(2, torch.tensor([RIGHT, WRONG]), 0.0)
        logits = logits + torch.nn.functional.one_hot(torch.tensor(RIGHT), 10) * key[..., None]
        return SimpleNamespace(logits=logits + torch.nn.functional.one_hot(torch.tensor(WRONG), 10) * seen[..., None])


def batch() -> dict[str, Tensor]:
    """Row 0 has the distractor (place 3), row 1 has not; instruction: places 1 to 5; answer: place 7."""
    ids = torch.tensor([[0, 3, 2, 5, 4, 6, 1, RIGHT], [0, 3, 2, 4, 4, 6, 1, RIGHT]])
    labels = torch.full_like(ids, -100)
    labels[:, -1] = RIGHT
    free = torch.zeros_like(ids, dtype=torch.bool)
    free[:, 1:6] = True
    return {"input_ids": ids, "labels": labels, "instruction_mask": free}


STUDENT, TEACHER = Reader(4.0), Reader(0.0)


def test_low_is_what_only_the_student_minds() -> None:
    leaf = LeaF().with_teacher(TEACHER)
    score = leaf.score(STUDENT, batch())
    assert int(score[0].argmin()) == 3 and float(score[0, 3]) == pytest.approx(-1.0, abs=1e-5)
    assert score[0, 1] > 0, "the key matters more to the teacher"
    assert bool(score[:, [0, 6, 7]].isposinf().all()) and bool(score[:, 1:6].isfinite().all())
    of_teacher, of_student = leaf.sensitivities(STUDENT, batch())
    torch.testing.assert_close((of_teacher - of_student)[:, 1:6], score[:, 1:6])
    assert of_teacher.min() == 0 and of_teacher.max() == 1 and of_student.max() == 1
    assert not LeaF().with_teacher(TEACHER).keep(STUDENT, batch())["input_ids"][0, 3]


def test_judging_by_greedy_decoding() -> None:
    assert greedy_match(STUDENT, batch()).tolist() == [False, True]
    assert greedy_match(TEACHER, batch()).tolist() == [True, True]


def test_every_submodule_keeps_its_own_mode() -> None:
    student, teacher = mixed_modes(tiny_text_llama()), mixed_modes(tiny_text_llama())
    before = [(snapshot(model), model) for model in (student, teacher)]
    given = encode(tiny_tokenizer(), [("What is 2+2? 5!", "4")], template="{instruction} {response}")
    LeaF(mistakes_only=True, corrected_only=True).with_teacher(teacher).counterfactuals(student, given)
    greedy_match(student, given)
    for state, model in before:
        assert_unchanged(state, model)


def test_only_mistakes_of_the_student() -> None:
    leaf = LeaF(mistakes_only=True).with_teacher(TEACHER)
    keep = leaf.keep(STUDENT, batch())["input_ids"]
    assert not keep[0].all() and keep[1].all()
    assert LeaF(mistakes_only=True).with_teacher(STUDENT).keep(STUDENT, batch())["input_ids"].all(), \
        "a teacher that is wrong as well says nothing"


def test_a_judge_of_ones_own() -> None:
    asked: list[Any] = []

    def judge(model: nn.Module, given: Any) -> Tensor:
        asked.append(model)
        return torch.tensor([model is right] * len(given["input_ids"]))

    for right in (TEACHER, STUDENT):
        keep = LeaF(mistakes_only=True, judge=judge).with_teacher(TEACHER).keep(STUDENT, batch())["input_ids"]
        assert bool(keep[0].all()) == (right is STUDENT)
    assert TEACHER in asked and STUDENT in asked


def test_counterfactuals_that_correct_the_student() -> None:
    given = batch()
    given["input_ids"][:, [3, 5]] = given["input_ids"][:, [5, 3]]  # the distractor apart from what goes with it
    every = LeaF(q=0.3, cap=1.0).with_teacher(TEACHER).counterfactuals(STUDENT, given)
    assert every.spans == [[(2, 3)], [(5, 6)]] and every.source.tolist() == [0, 0], "nothing distracts in row 1"
    kept = LeaF(q=0.3, cap=1.0, corrected_only=True).with_teacher(TEACHER).counterfactuals(STUDENT, given)
    assert kept.spans == [[(5, 6)]] and bool(greedy_match(STUDENT, kept.batch).all())
    together = LeaF(q=0.3, cap=1.0, collective=True).with_teacher(TEACHER).counterfactuals(STUDENT, given)
    assert together.spans == [[(2, 3), (5, 6)]]


def test_no_teacher() -> None:
    with pytest.raises(ValueError, match="with_teacher"):
        LeaF().score(STUDENT, batch())
    with pytest.raises(ValueError, match="torch module"):
        LeaF().with_teacher("gpt")  # type: ignore[arg-type]


def test_a_bound_teacher_is_no_parameter() -> None:
    leaf = LeaF(q=0.2).with_teacher(TEACHER)
    assert leaf == LeaF(q=0.2) and "teacher" not in str(leaf) and "_teacher" not in leaf.hyperparameters()
    assert leaf.teacher is TEACHER and LeaF(q=0.2)._teacher is None


def test_nan_gradients_name_the_model() -> None:
    broken = Reader(1.0)
    with torch.no_grad():
        broken.embed.weight[3] = torch.nan
    for leaf, student, word in ((LeaF().with_teacher(broken), STUDENT, "teacher"),
                                (LeaF().with_teacher(TEACHER), broken, "student")):
        with pytest.raises(ValueError, match=f"gradients of the {word} are NaN"):
            leaf.keep(student, batch())


@pytest.mark.parametrize("fields", [
    {"q": 1.0}, {"q": -0.1}, {"q": float("nan")}, {"q": True}, {"q": "a"}, {"cap": -1}, {"cap": 1.5}, {"cap": None},
    {"tau": 2}, {"tau": 1.0}, {"tau": -0.5}, {"tau": "x"}, {"mistakes_only": 1}, {"collective": "yes"},
    {"corrected_only": None}, {"judge": 3}])
def test_bad_values(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"LeaF\.{next(iter(fields))}: expected .*, got"):
        LeaF(**fields)


def test_by_name() -> None:
    assert isinstance(get("leaf", q=0.05), LeaF)


def test_a_teacher_with_other_tokens() -> None:
    pytest.importorskip("transformers")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    digits = "0123456789"
    pieces = ["<pad>", *(a + b for a in digits for b in digits), *digits, " "]
    pairs = {piece: n for n, piece in enumerate(pieces)}
    made = Tokenizer(models.WordLevel(pairs, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d\d?"), behavior="isolated")
    twos = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")
    student, teacher, letters = tiny_text_llama(), tiny_text_llama(), tiny_tokenizer()
    given = encode(letters, [("12345", "6"), ("789", "10")], template="{instruction} {response}",
                   teacher_tokenizer=twos)
    leaf = LeaF(q=0.3).with_teacher(teacher)
    of_teacher, _ = leaf.sensitivities(student, given)
    assert of_teacher[0, 0] == of_teacher[0, 1] and of_teacher[0, 2] == of_teacher[0, 3], \
        "digits that share the teacher's token"
    assert len(leaf.counterfactuals(student, given)) and "teacher" not in leaf.counterfactuals(student, given).batch
    bare = {**given, "teacher": {k: v for k, v in given["teacher"].items() if k != "offsets"}}
    with pytest.raises(ValueError, match="teacher_tokenizer"):
        leaf.score(student, bare)


def test_the_view() -> None:
    pytest.importorskip("transformers")
    tokenizer, student, teacher = tiny_tokenizer(), tiny_text_llama(), tiny_text_llama()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.3)
    given = encode(tokenizer, [("What is 2+2? 5!", "4"), ("Hm", "ok")], template="{instruction} {response}")
    leaf = LeaF(q=0.2).with_teacher(teacher)
    report = show(leaf, student, given, tokenizer, rows=1)
    assert len(report.strips) == len(report.tables) == 1
    keep = leaf.keep(student, given)["input_ids"]
    text = report.strips[0].text()
    assert text.replace("[[", "").replace("]]", "") == "What is 2+2? 5! 4"
    assert sum(row[-1] for row in report.tables[0].rows) == int((~keep[0]).sum()) == text.count("[[") + sum(
        len(part.partition("]]")[0]) - 1 for part in text.split("[[")[1:])
    assert [v is not None for v in report.strips[0].values] == given["instruction_mask"][0].tolist()[:len(
        report.strips[0].values)]
    assert Report.from_dict(json.loads(report.to_json())).to_text()
    with pytest.raises(ValueError, match="1 or more"):
        show(leaf, student, given, tokenizer, rows=0)


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, looseleaf_leaf; assert 'transformers' not in sys.modules; looseleaf_leaf.LeaF()"
    subprocess.run([sys.executable, "-c", code], check=True)
