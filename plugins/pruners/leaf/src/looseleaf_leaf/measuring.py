"""What the reproduction measures on one teacher and one student."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looseleaf_leaf.batch import IGNORED
from looseleaf_leaf.confounded import Samples, accuracy, attention_on
from looseleaf_leaf.counterfactual import Counterfactuals, Span, counterfactuals, training_pairs
from looseleaf_leaf.loss import response_kl
from looseleaf_leaf.pruner import LeaF

Row = dict[str, float]
ARMS = ("distillation", "distillation, twice the steps", "LeaF", "LeaF, no filters", "random spans")
GAPS = ("gap on samples with a distractor", "gap on counterfactuals, LeaF")


@dataclass(frozen=True)
class Distillation:
    """How a student is distilled: optimiser steps, samples in each, learning rate (falling to zero)."""

    steps: int
    batch: int
    rate: float


def measure(teacher: Any, student: Any, distracted: Samples, clean: Samples, corpus: Samples, how: Distillation,
            seed: int, *, arms: Sequence[str] = ARMS, maps: bool = True, moving: Any = None) -> Row:
    """All figures by name.

    Args:
        teacher, student: in evaluation mode; they are not changed.
        distracted, clean: held-out samples, all with and all without distractors.
        corpus: what is distilled on.
        how: the distillation of every arm.
        seed: of the order of training and of everything random.
        arms: which of :data:`ARMS` to run.
        maps: measure attention too; needs models that give their attention maps.
        moving: a progress bar, moved on after each arm.
    """
    row: Row = {}

    def judged(name: str, model: Any) -> None:
        row[f"{name}, clean"] = accuracy(model, clean.batch, clean.answer)
        row[f"{name}, distracted"] = accuracy(model, distracted.batch, distracted.answer)
        if maps:
            row[f"{name}, attention"] = attention_on(model, distracted.batch, distracted.planted)

    judged("teacher", teacher)
    judged("student", student)
    leaf = LeaF().with_teacher(teacher)
    row.update(detection(leaf, student, distracted, seed))
    row.update(pruning(leaf, student, distracted, seed))
    row[GAPS[0]] = gap(teacher, student, distracted.batch)
    nothing = counterfactuals(corpus.batch, torch.ones_like(corpus.planted))
    papers = LeaF(mistakes_only=True, corrected_only=True).with_teacher(teacher)
    filtered = papers.counterfactuals(student, corpus.batch)
    row[GAPS[1]] = gap(teacher, student, filtered.batch) if len(filtered) else 0.0
    row["counterfactuals, LeaF"] = len(filtered)
    for arm in arms:
        made = {"LeaF": filtered, ARMS[3]: None, ARMS[4]: None}.get(arm, nothing)
        if made is None:
            made = leaf.counterfactuals(student, corpus.batch) if arm == ARMS[3] else \
                elsewhere(corpus.batch, filtered, seed)
        plain, steps = arm in ARMS[:2], how.steps * (2 if arm == ARMS[1] else 1)
        pairs = training_pairs(corpus.batch, made)
        judged(arm, distil(student, teacher, pairs, 1.0 if plain else 0.5, steps, how, seed))
        if moving is not None:
            moving.update()
    return row


@torch.no_grad()
def gap(teacher: Any, student: Any, batch: dict[str, Tensor]) -> float:
    """KL from teacher to student on the responses, nats a token: what there is to learn."""
    read = {k: batch[k] for k in ("input_ids", "attention_mask")}
    return float(response_kl(teacher(**read).logits, student(**read).logits, batch["labels"]))


def detection(leaf: LeaF, student: Any, samples: Samples, seed: int) -> Row:
    """AUROC of the planted tokens among all tokens of the instructions, over all samples together."""
    theirs, mine = leaf.sensitivities(student, samples.batch)
    free = samples.batch["instruction_mask"]
    chance = torch.rand(free.shape, generator=torch.Generator().manual_seed(seed))
    scores = {"difference": mine - theirs, "student alone": mine, "teacher alone": -theirs, "random": chance}
    return {f"AUROC, {name}": auroc(score[free], samples.planted[free]) for name, score in scores.items()}


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive has a higher score than another, ties by half."""
    hits, others = scores[positive].double().numpy(), np.sort(scores[~positive].double().numpy())
    below, not_above = np.searchsorted(others, hits, "left"), np.searchsorted(others, hits, "right")
    return float((below + not_above).mean() / 2 / len(others))


def pruning(leaf: LeaF, student: Any, samples: Samples, seed: int) -> Row:
    """The student's accuracy without the detected spans, and without as long ones elsewhere in the instruction."""
    keep = leaf.prune(student, samples.batch)["input_ids"]
    found = counterfactuals(samples.batch, keep, collective=True)
    other = elsewhere(samples.batch, found, seed)
    out = {"recall of planted tokens": float((~keep & samples.planted).sum() / samples.planted.sum())}
    for name, made in (("detected spans", found), ("random spans", other)):
        out[f"student without {name}"] = accuracy(student, made.batch, samples.answer[made.source])
    return out


def elsewhere(batch: dict[str, Tensor], made: Counterfactuals, seed: int) -> Counterfactuals:
    """The same samples without as many and as long spans, placed at random in the instruction."""
    rng = np.random.default_rng(seed)
    parts: list[Counterfactuals] = []
    for at, spans in enumerate(made.spans):
        row = int(made.source[at])
        places = batch["instruction_mask"][row].nonzero().flatten()
        keep = torch.ones((1, len(batch["input_ids"][row])), dtype=torch.bool)
        for start, stop in scatter([stop - start for start, stop in spans], len(places), rng):
            keep[0, places[start:stop]] = False
        parts.append(counterfactuals({k: v[row:row + 1] for k, v in batch.items()}, keep, collective=True))
    return joined(parts, made.source)


def scatter(lengths: Sequence[int], room: int, rng: np.random.Generator) -> list[Span]:
    """Spans of these lengths at random in ``room`` tokens, none over another: gaps are drawn, then filled."""
    order = [int(n) for n in rng.permutation(lengths)]
    cuts = np.sort(rng.integers(0, room - sum(order) + 1, len(order)))
    out, used = [], 0
    for cut, length in zip(cuts.tolist(), order):
        out.append((cut + used, cut + used + length))
        used += length
    return out


def joined(parts: list[Counterfactuals], source: Tensor) -> Counterfactuals:
    """Several sets as one, padded to the same length."""
    width = max((p.batch["input_ids"].shape[1] for p in parts), default=0)
    fill = {"labels": IGNORED}
    keys = parts[0].batch if parts else {}
    batch = {k: torch.cat([torch.nn.functional.pad(p.batch[k], (0, width - p.batch[k].shape[1]), value=fill.get(k, 0))
                           for p in parts]) for k in keys}
    return Counterfactuals(batch, source, [span for p in parts for span in p.spans])


def distil(student: Any, teacher: Any, pairs: list[dict[str, list[int]]], weight: float, steps: int, how: Distillation,
           seed: int) -> Any:
    """A copy of the student, distilled by :class:`looseleaf_leaf.LeaFTrainer` with lambda = ``weight``."""
    from transformers import PrinterCallback, TrainingArguments

    from looseleaf_leaf.trainer import LeaFTrainer

    model = copy.deepcopy(student)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        trainer = LeaFTrainer(model=model, teacher=teacher, lambda_=weight, train_dataset=pairs, args=TrainingArguments(
            folder, learning_rate=how.rate, max_steps=steps, per_device_train_batch_size=how.batch, seed=seed,
            use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.eval()
