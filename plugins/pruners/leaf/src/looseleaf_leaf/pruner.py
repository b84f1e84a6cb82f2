"""Learning to Focus: the tokens that distract a student but not its teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from looseleaf import Paper, Pruner, Selection
from looseleaf_leaf.align import align
from looseleaf_leaf.batch import checked
from looseleaf_leaf.counterfactual import Counterfactuals, counterfactuals
from looseleaf_leaf.gradients import attending, evaluating, input_gradient_norms, min_max
from looseleaf_leaf.selection import ConfoundingTokens

Judge = Callable[[torch.nn.Module, Mapping[str, Any]], Tensor]
"""(model, batch) -> (B,) bool: which samples the model gets right."""


def greedy_match(model: torch.nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Whether greedy decoding would give exactly the response, (B,) bool: one forward pass tells.

    The judge that :class:`LeaF` has without another. For long answers with many right wordings give one of your own,
    which generates and compares the final answers.
    """
    full = checked(batch)
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        attention = attending(model, full["attention_mask"].to(device))
        logits = model(input_ids=full["input_ids"].to(device), **attention).logits
    hits = logits[:, :-1].argmax(-1).to(full["labels"].device) == full["labels"][:, 1:]
    return (hits | ~full["response_mask"][:, 1:]).all(1)


@dataclasses.dataclass
class LeaF(Pruner):
    """Remove the tokens of an instruction to which the student is sensitive and the teacher is not.

    Both models read the sample; the norm of the gradient of the response's cross-entropy with respect to each input
    embedding is scaled to [0, 1] over the instruction; the score of a token is the teacher's minus the student's, so
    that a low score is a confounding token. :meth:`counterfactuals` gives the samples without them, one for each
    contiguous span, and :class:`looseleaf_leaf.LeaFTrainer` distils on both. [section 3 of the paper]

    The model handed to :meth:`score`, :meth:`prune` and :meth:`counterfactuals` is the student; the teacher comes by
    :meth:`with_teacher`; the data are a batch (:data:`looseleaf_leaf.batch.KEYS`).

    Args:
        q: quantile of the scores of a sample at or below which tokens are confounding; 0.05 for mathematics and 0.10
            for code [official code].
        cap: largest threshold, on scores scaled to [0, 1] within the sample [official code].
        tau: fixed threshold on the scaled scores in the place of ``q`` and ``cap`` [paper]; None: not used.
        mistakes_only: True: nothing is removed but from samples that the student gets wrong and the teacher right
            [paper; the official code looks at all samples].
        collective: True: one counterfactual without all confounding spans of a sample, not one for each span.
        corrected_only: True: keep a counterfactual only if the student gets it right and the sample wrong [paper].
        judge: says which samples a model gets right, a function of model and batch; None: greedy decoding gives
            exactly the response.
    """

    q: float = 0.10
    cap: float = 0.5
    tau: float | None = None
    mistakes_only: bool = False
    collective: bool = False
    corrected_only: bool = False
    judge: Judge | None = None
    _teacher: Any = dataclasses.field(default=None, init=False, repr=False, compare=False)

    removes: ClassVar[Literal["weights", "updates", "tokens"]] = "tokens"
    paper: ClassVar[Paper] = Paper(
        title="Learning to Focus: Causal Attention Distillation via Gradient-Guided Token Pruning",
        authors=("Yiju Guo", "Wenkai Yang", "Zexu Sun", "Ning Ding", "Zhiyuan Liu", "Yankai Lin"), year=2025,
        arxiv="2506.07851", venue="NeurIPS 2025", code="https://github.com/RUCBM/LeaF",
        summary="Find the prompt tokens that distract a student but not its teacher, and distil so that it ignores "
                "them.")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: a teacher, and batches."""
        from looseleaf_leaf.kit import batch, teacher

        return {"make": lambda: cls().with_teacher(teacher()), "data": batch}

    def validate(self) -> None:
        """See :class:`looseleaf.Plugin`."""
        try:
            self.selection()
        except ValueError as error:  # the rule checks its own numbers
            raise ValueError(str(error).replace("ConfoundingTokens", "LeaF")) from None
        for field in ("mistakes_only", "collective", "corrected_only"):
            self.check(field, isinstance(getattr(self, field), bool), "True or False")
        self.check("judge", self.judge is None or callable(self.judge), "a function of model and batch, or None")

    def with_teacher(self, teacher: torch.nn.Module) -> LeaF:
        """A copy that compares students with ``teacher``, a model that the instruction's spans do not distract."""
        if not isinstance(teacher, torch.nn.Module):
            raise ValueError(f"teacher is a {type(teacher).__name__}: allowed is a torch module")
        bound = dataclasses.replace(self)
        bound._teacher = teacher
        return bound

    @property
    def teacher(self) -> torch.nn.Module:
        """The teacher; ValueError where there is none."""
        if self._teacher is None:
            raise ValueError("LeaF has no teacher: call with_teacher(model) first, as in "
                             "LeaF(q=0.1).with_teacher(teacher).prune(student, batch)")
        return self._teacher  # type: ignore[no-any-return]

    def sensitivities(self, model: torch.nn.Module, data: Any = None) -> tuple[Tensor, Tensor]:
        """(teacher, student): gradient norms scaled to [0, 1] over the tokens of each row that may be removed, zero
        elsewhere, (B, L), on the device of the batch.

        Raises:
            ValueError: no teacher, a bad batch, tokens of another tokenizer, gradients that are NaN.
        """
        teacher, full = self.teacher, checked(data)
        mask = full["instruction_mask"]
        own = full.get("teacher")
        if own is None:
            theirs = input_gradient_norms(teacher, data, "teacher")
        else:
            there = checked(own, "the teacher's encoding")
            if "offsets" not in full or "offsets" not in there:
                raise ValueError("teacher and student have different tokens and the batch has no offsets to align "
                                 "them: make it with encode(tokenizer, samples, teacher_tokenizer=...)")
            theirs = align(input_gradient_norms(teacher, own, "teacher"), there["offsets"], full["offsets"], mask)
        mine = input_gradient_norms(model, data, "student")
        return min_max(theirs.to(mask.device), mask), min_max(mine.to(mask.device), mask)

    def score(self, model: torch.nn.Module, data: Any = None) -> dict[str, Tensor]:
        """``{"input_ids": (B, L)}``: teacher's minus student's sensitivity in [-1, 1], float32; +inf for what may not
        be removed (template, response, white space, padding; with ``mistakes_only`` all other samples).

        Args:
            model: the student.
            data: a batch.

        Raises:
            ValueError: as :meth:`sensitivities`.
        """
        theirs, mine = self.sensitivities(model, data)
        full = checked(data)
        mask = full["instruction_mask"]
        if self.mistakes_only:
            judge = self.judge or greedy_match
            read = full.get("teacher", data)
            misled = judge(self.teacher, read).to(mask.device) & ~judge(model, data).to(mask.device)
            mask = mask & misled[:, None]
        return {"input_ids": (theirs.to(mine.dtype) - mine).masked_fill(~mask, torch.inf)}

    def selection(self) -> Selection:
        """The rule of ``q``, ``cap`` and ``tau``."""
        return ConfoundingTokens(self.q, self.cap, self.tau)

    def counterfactuals(self, model: torch.nn.Module, data: Any = None) -> Counterfactuals:
        """The samples of the batch without their confounding spans, for the student ``model``.

        Raises:
            ValueError: as :meth:`sensitivities`.
        """
        made = counterfactuals(data, self.prune(model, data)["input_ids"], collective=self.collective)
        if not self.corrected_only or not len(made):
            return made
        judge = self.judge or greedy_match
        was = judge(model, data).to(made.source.device)
        return made.where(judge(model, made.batch).to(made.source.device) & ~was[made.source])
