"""Learning to Focus: the tokens that distract a student but not its teacher, and the samples without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from looseleaf import Paper, Report, TokenPruner
from looseleaf.modes import evaluating
from looseleaf.plugin import In
from looseleaf_leaf.batch import IGNORED, checked
from looseleaf_leaf.sensitivity import align, attending, confounding, input_gradient_norms, min_max

Judge = Callable[[torch.nn.Module, Mapping[str, Any]], Tensor]
"""(model, batch) -> (B,) bool: which samples the model gets right."""

Span = tuple[int, int]
"""First token, and one beyond the last."""


@dataclasses.dataclass
class LeaF(TokenPruner):
    """Remove the tokens of an instruction to which the student is sensitive and the teacher is not.

    Both models read the sample; the norm of the gradient of the response's cross-entropy with respect to each input
    embedding is scaled to [0, 1] over the instruction; the score of a token is the teacher's minus the student's, so
    that a low score is a confounding token. :meth:`counterfactuals` gives the samples without them, one for each
    contiguous span, and :class:`looseleaf_leaf.LeaFTrainer` distils on both. [section 3 of the paper]

    The model handed to :meth:`keep`, :meth:`score` and :meth:`counterfactuals` is the student; the teacher comes by
    :meth:`with_teacher`; batches are described in :data:`looseleaf_leaf.batch.KEYS`.

    Args:
        q: quantile of the scores of a sample at or below which tokens are confounding, in [0, 1); 0.05 for mathematics
            and 0.10 for code [official code].
        cap: largest threshold, in [0, 1], on scores scaled to [0, 1] within the sample [official code].
        tau: fixed threshold in [0, 1) on the scaled scores in the place of ``q`` and ``cap`` [paper]; None: not used.
        mistakes_only: remove only from samples that the student gets wrong and the teacher right [paper; the official
            code looks at all samples].
        collective: one counterfactual without all confounding spans of a sample, not one for each span.
        corrected_only: keep a counterfactual only if the student gets it right and the sample wrong [paper].
        judge: which samples a model gets right, a function of model and batch; None: :func:`greedy_match`.
    """

    q: Annotated[float, In("[0, 1)")] = 0.10
    cap: Annotated[float, In("[0, 1]")] = 0.5
    tau: Annotated[float | None, In("[0, 1)")] = None
    mistakes_only: bool = False
    collective: bool = False
    corrected_only: bool = False
    judge: Judge | None = None
    _teacher: Any = dataclasses.field(default=None, init=False, repr=False, compare=False)

    paper: ClassVar[Paper] = Paper(
        title="Learning to Focus: Causal Attention Distillation via Gradient-Guided Token Pruning",
        authors=("Yiju Guo", "Wenkai Yang", "Zexu Sun", "Ning Ding", "Zhiyuan Liu", "Yankai Lin"), year=2025,
        arxiv="2506.07851", venue="NeurIPS 2025", code="https://github.com/RUCBM/LeaF",
        summary="Find the prompt tokens that distract a student but not its teacher, and distil so that it ignores "
                "them.")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: another random Llama as teacher, and two samples, one padded."""
        from looseleaf.testing.models import tied_llama

        def teacher() -> Any:
            model = tied_llama()
            with torch.no_grad():
                for n, parameter in enumerate(model.parameters()):
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)), alpha=0.1)
            return model

        def batch(model: Any) -> dict[str, Tensor]:
            """Template, instruction of 14 tokens, template, response of 3; the second sample ends before its last."""
            ids = torch.arange(40).view(2, 20) * 7 % 61
            places = torch.arange(20).expand(2, 20)
            attention = places < torch.tensor([[20], [19]])
            return {"input_ids": ids, "labels": ids.where((places >= 17) & attention, IGNORED),
                    "attention_mask": attention.long(), "instruction_mask": (places >= 2) & (places < 16)}

        return {"make": lambda: cls().with_teacher(teacher()), "batches": batch}

    def validate(self) -> None:
        """See :class:`looseleaf.Plugin`."""
        self.check("judge", self.judge is None or callable(self.judge), "None or a function of model and batch")

    def with_teacher(self, teacher: torch.nn.Module) -> LeaF:
        """A copy that compares students with ``teacher``, a model that the instruction's spans do not distract."""
        if not isinstance(teacher, torch.nn.Module):
            raise ValueError(f"teacher: expected a torch module, got {type(teacher).__name__}")
        bound = dataclasses.replace(self)
        bound._teacher = teacher
        return bound

    @property
    def teacher(self) -> torch.nn.Module:
        """The teacher; ValueError where there is none."""
        if self._teacher is None:
            raise ValueError("LeaF has no teacher: call with_teacher(model) first, as in "
                             "LeaF(q=0.1).with_teacher(teacher).keep(student, batch)")
        return self._teacher  # type: ignore[no-any-return]

    def sensitivities(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Of teacher and student: gradient norms scaled to [0, 1] over the tokens of each row that may be removed, zero
        elsewhere, (B, L), on the device of the batch.

        Raises:
            ValueError: no teacher, a bad batch, tokens of another tokenizer, gradients that are NaN.
        """
        teacher, full = self.teacher, checked(batch)
        mask = full["instruction_mask"]
        own = full.get("teacher")
        if own is None:
            of_teacher = input_gradient_norms(teacher, batch, "teacher")
        else:
            there = checked(own, "the teacher's encoding")
            if "offsets" not in full or "offsets" not in there:
                raise ValueError("teacher and student have different tokens and the batch has no offsets to align "
                                 "them: make it with encode(tokenizer, samples, teacher_tokenizer=...)")
            of_teacher = align(input_gradient_norms(teacher, own, "teacher"), there["offsets"], full["offsets"], mask,
                               full["white_space"])
        of_student = input_gradient_norms(model, batch, "student")
        return min_max(of_teacher.to(mask.device), mask), min_max(of_student.to(mask.device), mask)

    def score(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Teacher's minus student's sensitivity, (B, L), in [-1, 1], float32; +inf for what may not be removed
        (template, response, padding; with ``mistakes_only`` all other samples).

        Args:
            model: the student.
            batch: samples.

        Raises:
            ValueError: as :meth:`sensitivities`.
        """
        of_teacher, of_student = self.sensitivities(model, batch)
        full = checked(batch)
        mask = full["instruction_mask"]
        if self.mistakes_only:
            judge = self.judge or greedy_match
            read = full.get("teacher", batch)
            misled = judge(self.teacher, read).to(mask.device) & ~judge(model, batch).to(mask.device)
            mask = mask & misled[:, None]
        return (of_teacher.to(of_student.dtype) - of_student).masked_fill(~mask, torch.inf)

    def keep(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``{"input_ids": (B, L) bool}``: False for the confounding tokens, see :func:`looseleaf_leaf.confounding`.

        Args:
            model: the student.
            batch: samples.

        Raises:
            ValueError: as :meth:`sensitivities`.
        """
        return {"input_ids": ~confounding(self.score(model, batch), q=self.q, cap=self.cap, tau=self.tau,
                                          never=checked(batch)["white_space"])}

    def counterfactuals(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> Counterfactuals:
        """The samples of the batch without their confounding spans, for the student ``model``.

        Raises:
            ValueError: as :meth:`sensitivities`.
        """
        changed = counterfactuals(batch, self.keep(model, batch)["input_ids"], collective=self.collective)
        if not self.corrected_only or not len(changed):
            return changed
        judge = self.judge or greedy_match
        was = judge(model, batch).to(changed.source.device)
        return changed.where(judge(model, changed.batch).to(changed.source.device) & ~was[changed.source])


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


# ------------------------------------------------------------------------------------ samples without spans
@dataclasses.dataclass
class Counterfactuals:
    """Samples with a confounding span removed.

    Attributes:
        batch: the samples, padded on the right; as the batch they come from, without ``teacher`` (the teacher reads the
            student's tokens from here on).
        source: (N,) int64, the row that each comes from.
        spans: what was removed from each, in tokens of the source row: one span, or all of them (collective pruning).
    """

    batch: dict[str, Tensor]
    source: Tensor
    spans: list[list[Span]]

    def __len__(self) -> int:
        return len(self.spans)

    def where(self, keep: Tensor) -> Counterfactuals:
        """Those with True in ``keep`` (N,)."""
        chosen = keep.bool().cpu()
        return Counterfactuals({k: v[chosen.to(v.device)] for k, v in self.batch.items()},
                               self.source[chosen.to(self.source.device)],
                               [s for s, k in zip(self.spans, chosen.tolist()) if k])


def runs(removed: Tensor) -> list[Span]:
    """The runs of True in ``removed`` (L,), in order: each as long as it can be, together all of them."""
    edges = torch.nn.functional.pad(removed.to(torch.int8), (1, 1)).diff()
    return list(zip((edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist(), strict=True))


def counterfactuals(batch: Mapping[str, Any], keep: Tensor, *, collective: bool = False) -> Counterfactuals:
    """One sample for each run of removed tokens; with ``collective`` one for each row, without all of its runs.

    Args:
        batch: see :data:`looseleaf_leaf.batch.KEYS`.
        keep: (B, L) bool, True = keep; what :meth:`LeaF.keep` gives under ``"input_ids"``.
        collective: the alternative to span pruning that the paper compares with [section 3.1].

    Raises:
        ValueError: bad batch, a mask of another shape, or one that removes what is not of the instruction.
    """
    full = checked(batch)
    if keep.dtype != torch.bool or keep.shape != full["input_ids"].shape:
        raise ValueError(f"keep: expected bool of shape {tuple(full['input_ids'].shape)}, True = keep, got "
                         f"{keep.dtype} of shape {tuple(keep.shape)}")
    if bool((~keep.to(full["instruction_mask"].device) & ~full["instruction_mask"]).any()):
        raise ValueError("the mask removes tokens that are not of the instruction: it belongs to another batch")
    tensors = {k: full[k] for k in full if k not in ("teacher", "response_mask")}
    tensors["attention_mask"] = tensors["attention_mask"].to(torch.int64)
    chosen: list[tuple[int, list[Span]]] = []
    for row in range(len(keep)):
        spans = runs(~keep[row])
        chosen += [(row, spans)] if collective and spans else [(row, [span]) for span in spans]
    device = full["input_ids"].device
    kept = []
    for row, spans in chosen:
        stays = full["attention_mask"][row].clone()
        for start, stop in spans:
            stays[start:stop] = False
        kept.append(stays.nonzero().flatten())
    length = max(map(len, kept), default=0)
    shorter = {}
    for key, value in tensors.items():
        fill = IGNORED if key == "labels" else 0
        shorter[key] = torch.full((len(chosen), length, *value.shape[2:]), fill, dtype=value.dtype, device=device)
        for at, ((row, _), index) in enumerate(zip(chosen, kept)):
            shorter[key][at, :len(index)] = value[row, index]
    return Counterfactuals(shorter, torch.tensor([row for row, _ in chosen], dtype=torch.int64, device=device),
                           [spans for _, spans in chosen])


def show(pruner: LeaF, model: torch.nn.Module, batch: Mapping[str, Any], tokenizer: Any, *, rows: int = 8) -> Report:
    """The first samples of a batch as a report; ``looseleaf_lab.html.write`` makes a page of it.

    For each sample: its text with the instruction's tokens shaded by score (low is confounding) and the removed ones
    struck out, and these tokens in a table.

    Args:
        pruner: with its teacher.
        model: the student.
        batch: see :data:`looseleaf_leaf.batch.KEYS`.
        tokenizer: the student's, for the tokens' texts.
        rows: samples at most.

    Raises:
        ValueError: ``rows`` below 1; as :meth:`LeaF.score`.
    """
    if rows < 1:
        raise ValueError(f"rows: expected 1 or more, got {rows}")
    full = checked(batch)
    of_teacher, of_student = pruner.sensitivities(model, batch)
    scores = pruner.score(model, batch)
    rule: dict[str, Any] = {"q": pruner.q, "cap": pruner.cap, "tau": pruner.tau}
    keep, free = ~confounding(scores, **rule, never=full["white_space"]), full["instruction_mask"]
    shown = min(rows, len(keep))
    report = Report("LeaF: what distracts the student", facts={
        "samples": len(keep), "shown": shown, "rule": rule,
        "removed tokens": int((~keep).sum()), "removable tokens": int(scores.isfinite().sum())})
    for row in range(shown):
        ids = full["input_ids"][row].tolist()
        texts = [tokenizer.decode([token]) for token in ids]
        places = free[row].nonzero().flatten().tolist()
        difference = (of_teacher[row] - of_student[row]).tolist()
        real = full["attention_mask"][row].nonzero().flatten().tolist()
        values = [difference[p] if bool(free[row, p]) else None for p in real]
        report.strip(f"sample {row}: teacher's minus student's sensitivity", [texts[p] for p in real], values,
                     [not bool(keep[row, p]) for p in real], "low: the student is led by it and the teacher is not")
        report.table(f"sample {row}: tokens", ["position", "token", "teacher", "student", "difference", "removed"],
                     [[p, texts[p], float(of_teacher[row, p]), float(of_student[row, p]), difference[p],
                       not bool(keep[row, p])] for p in places])
    return report
