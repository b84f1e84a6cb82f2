"""The probe: learn each text by a few gradient steps, and see how far its keyword has spread."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from looseleaf import Paper, Probe, Report, Series
from looseleaf.modes import evaluating, with_gradients
from looseleaf.plugin import In
from looseleaf.probes.subject import parts
from looseleaf.progress import track
from looseleaf_outlandish.data import LEVELS, ORDINARY, SAMPLES, Sample, read_samples
from looseleaf_outlandish.pruner import IgnoreTopK
from looseleaf_text import LanguageModel, LocalModel

SMALLEST = -300.0
"""Logarithms below are shown as this one: exp of less is not drawn on a logarithmic axis."""

FIELDS = ("log_p_before", "log_mem", "log_prime")


@dataclass(frozen=True)
class Outcome:
    """What learning one sample did; natural logarithms.

    Attributes:
        log_p_before: of the keyword's probability in its own context before learning.
        log_mem: of S_mem, the mean of P_after / P_before in the text's own contexts.
        log_prime: of S_prime, the same in the contexts of the theme.
    """

    log_p_before: float
    log_mem: float
    log_prime: float


@dataclasses.dataclass
class PrimingProbe(Probe):
    """How far does a newly learned text leak into contexts it has nothing to do with (arXiv 2504.09522)?

    Each sample is learned by itself with full fine-tuning; then the weights are put back. Needs memory for five copies
    of the weights in float32: the weights, those before, gradients, and the optimiser's two.

    Args:
        steps: gradient steps for each sample; each has the sample and some ordinary sentences.
        lr: learning rate of AdamW.
        replay: ordinary sentences in each step, 0 to 32.
        samples: how many of the 48 built-in samples, evenly over keywords and levels; ignored for samples of your own.
        ignore_top_k: fraction of each update to ignore, the largest entries, as :class:`IgnoreTopK` does; 0: none.
        autocast: compute in bfloat16 while learning: faster on processors made for it.
    """

    steps: Annotated[int, In(">= 1")] = 10
    lr: Annotated[float, In("> 0")] = 3e-5
    replay: Annotated[int, In(f"[0, {len(ORDINARY)}]")] = 2
    samples: Annotated[int, In(f"[1, {len(SAMPLES)}]")] = 48
    ignore_top_k: Annotated[float, In("[0, 1]")] = 0.0
    autocast: bool = False

    paper: ClassVar[Paper] = IgnoreTopK.paper

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: few steps, which are large for that."""
        return {"make": lambda: cls(steps=2, samples=3, lr=1e-3)}

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        """Learn each sample and measure memorisation and priming.

        Args:
            subject: a ``(model, tokenizer)`` pair, a pipeline of transformers or a ``looseleaf_text.LocalModel``: a
                causal language model with weights in float32, put back afterwards, and its tokenizer.
            data: a list of :class:`Sample`, or JSON lines with their fields (:func:`read_samples`). None:
                built-in samples.
            seed: of the replayed sentences.
            progress: show a progress bar; None: only on a terminal.

        Returns:
            A table of all samples, one by level, and the scatter of S_prime over P_before.
        """
        model, tokenizer = parts(subject, "tokenizer")
        samples = self._samples(data)
        outcomes = []
        with restored(model) as put_back:
            for number, sample in enumerate(track(samples, "priming", show=progress)):
                outcomes.append(self.outcome(model, tokenizer, sample, seed + number))
                put_back()
        facts = {k: v for k, v in self.hyperparameters().items() if k != "samples"}
        return report_of(samples, outcomes, {"samples": len(samples), **facts, "seed": seed})

    def outcome(self, model: Any, tokenizer: Any, sample: Sample, seed: int = 0) -> Outcome:
        """Learn one sample; the model is left with it learned (:func:`restored` puts it back)."""
        local = LocalModel(model, tokenizer)
        before = keyword_probabilities(local, sample)
        pruner = IgnoreTopK(self.ignore_top_k) if self.ignore_top_k else None
        for _ in learn(model, tokenizer, sample.text, steps=self.steps, lr=self.lr, ordinary=ORDINARY,
                       replay=self.replay, seed=seed, pruner=pruner, autocast=self.autocast):
            pass
        after = keyword_probabilities(local, sample)
        return Outcome(before.log_p, log_memorisation(before, after), log_priming(before, after))

    def _samples(self, data: Any) -> list[Sample]:
        if data is None:
            # one of each keyword first, at a level that changes from keyword to keyword; then the next level of each
            count = len(LEVELS)
            order = sorted(range(len(SAMPLES)), key=lambda i: ((i - i // count) % count, i))
            return [SAMPLES[i] for i in sorted(order[:self.samples])]
        if isinstance(data, str):
            return read_samples(data)
        samples = list(data) if isinstance(data, Sequence) else []
        if not samples or not all(isinstance(s, Sample) for s in samples):
            raise ValueError("data: expected None, a list of looseleaf_outlandish.Sample, or JSON lines with their "
                             f"fields, got {type(data).__name__}")
        return samples


def report_of(samples: Sequence[Sample], outcomes: Sequence[Outcome], facts: dict[str, Any]) -> Report:
    """Tables and scatter of what was measured for each sample."""
    report = Report("How far new texts leak", dict(facts))
    levels = list(dict.fromkeys(s.level or "samples" for s in samples))
    groups = {level: [o for s, o in zip(samples, outcomes, strict=True) if (s.level or "samples") == level]
              for level in levels}
    report.table("Medians", ["level", "samples", "P_before", "S_mem", "S_prime"], [
        [level, len(rows), *(_exp(statistics.median(getattr(o, f) for o in rows)) for f in FIELDS)]
        for level, rows in [*groups.items(), ("all", list(outcomes))]],
        note="P_before: the keyword's probability in the text before learning; S_mem: how many times likelier it is "
             "there afterwards; S_prime: the same in unrelated contexts of the theme, 1 where nothing leaked")
    report.table("Samples", ["keyword", "level", "category", "P_before", "S_mem", "S_prime"], [
        [s.keyword, s.level or None, s.category or None, *(_exp(getattr(o, f)) for f in FIELDS)]
        for s, o in zip(samples, outcomes, strict=True)])
    report.figure("Priming by probability before", x_label="P_before", y_label="S_prime", x_log=True,
                  y_log=True, series=[
        Series(level, [_exp(o.log_p_before) for o in rows], [_exp(o.log_prime) for o in rows], style="points")
        for level, rows in groups.items()])
    report.arrays.update({field: [getattr(o, field) for o in outcomes] for field in FIELDS})
    report.examples.append(("the sample that leaked most", max(
        zip(samples, outcomes, strict=True), key=lambda pair: pair[1].log_prime)[0].text))
    return report


def _exp(log: float) -> float:
    return math.exp(min(max(log, SMALLEST), -SMALLEST))


# ------------------------------------------------------------------------------------ how likely a keyword is
@dataclass(frozen=True)
class KeywordProbabilities:
    """Natural logarithms of the keyword's probability.

    Attributes:
        own: after the text up to each occurrence of the keyword.
        theme: after each context of the theme.
    """

    own: tuple[float, ...]
    theme: tuple[float, ...]

    @property
    def log_p(self) -> float:
        """log of the mean probability in the text's own contexts; before learning, the paper's predictor."""
        return log_mean(self.own)


def keyword_probabilities(model: LanguageModel, sample: Sample) -> KeywordProbabilities:
    """The keyword's probability in its own contexts and in those of its theme.

    A keyword of several tokens has the product of their probabilities, each given those before it (chain rule).

    Args:
        model: such as ``looseleaf_text.LocalModel(model, tokenizer)``.
        sample: text, keyword and contexts.
    """
    contexts = [*sample.own_contexts(), *sample.theme_contexts()]
    scores = [row[0] for row in model.score(contexts, [[sample.keyword]] * len(contexts))]
    own = len(sample.places())
    return KeywordProbabilities(tuple(scores[:own]), tuple(scores[own:]))


def log_memorisation(before: KeywordProbabilities, after: KeywordProbabilities) -> float:
    """log S_mem: S_mem is the mean over the text's own contexts of P_after / P_before (section 3)."""
    return _log_mean_ratio(before.own, after.own)


def log_priming(before: KeywordProbabilities, after: KeywordProbabilities) -> float:
    """log S_prime: S_prime is the mean over the contexts of the theme of P_after / P_before (section 3)."""
    return _log_mean_ratio(before.theme, after.theme)


def log_mean(logs: Sequence[float]) -> float:
    """log of the mean of exp(logs), without overflow."""
    top = max(logs)
    return top + math.log(sum(math.exp(x - top) for x in logs) / len(logs)) if math.isfinite(top) else top


def _log_mean_ratio(before: Sequence[float], after: Sequence[float]) -> float:
    if len(before) != len(after):
        raise ValueError(f"{len(before)} contexts before and {len(after)} after: both must be of the same sample")
    return log_mean([b - a for a, b in zip(before, after, strict=True)])


# ------------------------------------------------------------------------------------ learning one text
def learn(model: nn.Module, tokenizer: Any, text: str, *, steps: int, lr: float, ordinary: Sequence[str] = (),
          replay: int = 2, seed: int = 0, pruner: IgnoreTopK | None = None, autocast: bool = False) -> Iterator[float]:
    """Full fine-tuning on ``text`` mixed with ordinary texts, one step for each value that is taken from the iterator.

    Each step is one of AdamW (no weight decay, a constant rate) on a batch of ``text`` and ``replay`` ordinary texts;
    the loss is the mean over all their tokens. The model should be in evaluation mode: dropout would add noise.

    Args:
        model: a causal language model with ``input_ids`` and ``attention_mask``; all that requires a gradient learns.
        tokenizer: its tokenizer.
        text: what is to be learned.
        steps: how many steps.
        lr: learning rate.
        ordinary: texts to draw the replayed ones from; at least ``replay``.
        replay: ordinary texts in each step.
        seed: of the draws.
        pruner: prunes the updates, each or the whole as its ``when`` says.
        autocast: compute in bfloat16; the weights stay as they are.

    Yields:
        The loss of each step, after the step, in nats per token. With ``when="end"`` the update is pruned when the last
        value has been taken and the next is asked for, as a ``for`` loop does.

    Raises:
        ValueError: weights in half precision, in which small updates are lost, too few ordinary texts, or what
            :meth:`IgnoreTopK.attach` raises.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    coarse = next((n for n, p in parameters.items() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if coarse is not None:
        raise ValueError(f"{coarse!r} is {parameters[coarse].dtype}: most updates of fine-tuning are smaller than its "
                         "spacing and would be lost. Load the model with dtype=torch.float32")
    if not parameters:
        raise ValueError("no parameter requires a gradient: there is nothing to learn with")
    if replay > len(ordinary):
        raise ValueError(f"ordinary: expected at least replay={replay} texts, got {len(ordinary)}")
    draw = random.Random(seed)
    device = next(iter(parameters.values())).device
    # fused: all in one go over the weights; torch has it for these devices
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.0, fused=device.type in ("cpu", "cuda"))
    pruning: Any = contextlib.nullcontext() if pruner is None else pruner.attach(optimizer, model)
    try:
        with pruning:
            for _ in range(steps):
                with with_gradients():  # not around the yield, which would switch them on for the caller
                    batch, labels = _batch(tokenizer, [text, *draw.sample(list(ordinary), replay)], device)
                    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                        logits: Tensor = model(**batch, use_cache=False).logits
                    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                yield float(loss.detach())
    finally:
        optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Evaluation mode within a ``with`` block; afterwards weights, buffers, gradients and modes are what they were.

    Yields:
        A function that puts weights and buffers back at once.
    """
    tensors = [*model.parameters(), *model.buffers()]
    kept = [t.detach().clone() for t in tensors]
    gradients = [(p, p.grad) for p in model.parameters()]

    @torch.no_grad()
    def put_back() -> None:
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)

    try:
        for parameter, _ in gradients:
            parameter.grad = None
        with evaluating(model):
            yield put_back
    finally:
        put_back()
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _batch(tokenizer: Any, texts: Sequence[str], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Right-padded ids and mask, and labels with -100 where there is no token to predict."""
    rows = [list(ids) for ids in tokenizer(list(texts))["input_ids"]]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row)
        mask[i, :len(row)] = 1
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, labels.to(device)
