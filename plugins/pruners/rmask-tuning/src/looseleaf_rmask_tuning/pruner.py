"""Regularized mask tuning: scores of weights, trained with gradients that may not contradict the unmasked network."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf import (
    Example,
    LearnedMasks,
    Masks,
    Paper,
    Report,
    Selection,
    Series,
    Task,
    Threshold,
    WeightPruner,
    prunable_parameters,
    unwrapped,
)
from looseleaf.fingerprint import fingerprint
from looseleaf.modes import evaluating
from looseleaf.plugin import In
from looseleaf.pruning.targets import check_finite, model_facts, named_by, plain_name
from looseleaf_rmask_tuning.data import LabelledData
from looseleaf_vision import Batch, Recipe, Tuned, tune

EPSILON = 1e-8
"""In the denominator of the probability [official code]."""
_QKV = re.compile(r"(to_|c_)?[qkv](_?proj|_lin)?(_weight)?|query|key|value")
_QUANTISED = ("torch.ao.nn.quantized", "torch.nn.quantized", "bitsandbytes")


# ------------------------------------------------------------------------------------------------------ the gradient
def keep_probability(a: Tensor, c: Tensor) -> Tensor:
    """The probability that a gradient is kept, 1 where both agree in sign.

    ``(sign(a) (a + c) / (|a| + |c| + 1e-8) + 1) / 2`` [official code; section on gradient dropout regularity].

    Args:
        a: gradient of the task's loss, any shape.
        c: gradient of the distance to the unmasked network, of the same shape.
    """
    return (a.sign() * (a + c) / (a.abs() + c.abs() + EPSILON) + 1) / 2


def regularized(a: Tensor, c: Tensor, strength: float, generator: torch.Generator | None = None) -> Tensor:
    """The gradient that is used: ``a`` where it is kept, ``(1 - strength) a`` where it is dropped.

    Args:
        a, c: see :func:`keep_probability`.
        strength: lambda, in [0, 1]; 0 uses ``a`` as it is.
        generator: of the draw, on the tensors' device.
    """
    draw = torch.rand(a.shape, generator=generator, device=a.device)
    return a * ((1 - strength) + strength * (keep_probability(a, c) > draw))


# ------------------------------------------------------------------------------------------------------ the weights
def choose_weights(model: nn.Module, targets: str | Sequence[str] = "attention",
                   exclude: str | Sequence[str] | None = None, patch_embedding: bool = True,
                   within: str | None = None) -> list[str]:
    """Names of the weights that get a mask: no biases, norms, embeddings, adapters or output head.

    ``"attention"`` are the projections of every self-attention (what lies below a module called ``attn``, ``attention``
    or the like, cross-attention left out); ``"mlp"`` the other Linear layers of numbered layers; ``"all"`` every Linear
    and convolution. Names decide, so that any network will do [ours; the official code has CLIP's two image towers].

    Args:
        model: any torch module.
        targets: one of these three, or name patterns (see :mod:`looseleaf.names`), which are taken as they are.
        exclude: patterns of what to leave out.
        patch_embedding: the convolution that makes patches too; in a network without one, such as a ResNet, every
            convolution. Not read with name patterns.
        within: pattern of the part of the model that may be masked; None: all of it.

    Raises:
        ValueError: nothing matches, or the weights are quantised.
    """
    _refuse_quantised(model, within)
    if not isinstance(targets, str):
        return list(prunable_parameters(model, list(targets), exclude))
    known = prunable_parameters(model, None, exclude)
    names = list(known) if within is None else named_by(within, known)
    convolutions = [n for n in names if known[n].ndim > 2]
    patches = [n for n in convolutions if "patch" in n.lower()] or convolutions
    if targets == "all":
        chosen = {n for n in names if patch_embedding or n not in patches}
    else:
        wanted = _is_attention if targets == "attention" else _is_mlp
        chosen = {n for n in names if known[n].ndim == 2 and wanted(plain_name(n))}
        if patch_embedding and (chosen or targets == "attention"):
            chosen |= set(patches)
    if not chosen:
        raise ValueError(f"targets: expected {targets!r} to name weights of this {type(unwrapped(model)).__name__}"
                         f"{f' within {within!r}' if within else ''}, got none; its layers are called "
                         f"{', '.join(names[:3]) or 'otherwise'}: give name patterns, such as targets=('layers.*',)")
    return [n for n in names if n in chosen]


def groups(names: Iterable[str]) -> list[list[str]]:
    """Names whose scores have one norm together: q, k and v of a layer, which are one tensor in the official model."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        owner, _, layer = plain_name(name).removesuffix(".weight").rpartition(".")
        found[f"{owner} q, k, v" if _QKV.fullmatch(layer) else name].append(name)
    return list(found.values())


def penalty(scores: dict[str, Tensor]) -> Tensor:
    """The sum over :func:`groups` of the L2 norm of their scores (the norm, not its square)."""
    return torch.stack([torch.cat([scores[n].reshape(-1) for n in group]).norm() for group in groups(scores)]).sum()


def _is_attention(name: str) -> bool:
    return bool(re.search(r"attn|attention", name, re.I)) and not re.search(r"cross|encdec|encoder_attn", name, re.I)


def _is_mlp(name: str) -> bool:
    return not re.search(r"attn|attention", name, re.I) and any(part.isdigit() for part in name.split("."))


def _refuse_quantised(model: nn.Module, within: str | None) -> None:
    odd = next((f"{name!r} of the type {type(module).__name__}" for name, module in model.named_modules()
                if type(module).__module__.startswith(_QUANTISED)), None)
    integers = [n for n, p in model.named_parameters() if not p.is_floating_point() and not p.is_complex()]
    odd = odd or next((f"integers in {n!r}" for n in (named_by(within, integers) if within else integers)), None)
    if odd is None and getattr(unwrapped(model), "is_quantized", False):
        odd = "a quantised model"
    if odd is not None:
        raise ValueError(f"model: expected weights that are floating-point numbers, got {odd}: load the model without "
                         "quantisation, learn the masks, and quantise what make_permanent leaves")


# ------------------------------------------------------------------------------------------------------ the method
@dataclasses.dataclass
class RMaskTuning(WeightPruner):
    """Learn on a few labelled examples which weights of a frozen network to switch off.

    Every weight has a score that begins at ``init``; where it falls to ``threshold`` or below, the weight is 0. Scores
    are trained straight through that rule on ``cross-entropy + reg_weight * sum of norms``, and a gradient that would
    take the network away from its unmasked predictions is dropped at random [gradient dropout regularity]. With
    ``gdr=False`` it is the paper's AMT, with it R-AMT; ``targets="mlp"`` and ``"all"`` are its R-MMT and R-PMT
    [memory; the official code masks MLPs only beside attention].

    Args:
        targets: ``"attention"``, ``"mlp"``, ``"all"``, or name patterns; see :func:`choose_weights`.
        exclude: patterns of weights to leave out.
        patch_embedding: mask the convolution that makes patches as well [official code; the paper says attention].
        init: first score of every weight.
        threshold: the highest score at which a weight is switched off.
        reg_weight: weight of the norms of the scores.
        gdr: drop gradients that contradict the unmasked network.
        gdr_lambda: 1: dropped gradients are 0; 0: nothing is dropped. The authors' README takes 0.3 for 16 shots (but
            not on ImageNet, SUN397 and Food101) and 1 otherwise; its example lines say the reverse.
        temperature: of the distance to the unmasked network.
        epochs: passes over the examples.
        lr: first learning rate of Adam, which falls as a cosine by epochs; ImageNet: 3e-5 and 10 epochs.
        batch_size: examples in a step; a last, smaller batch is left out where there is a whole one.
        seed: of order, crops and dropped gradients.
    """

    targets: Literal["attention", "mlp", "all"] | tuple[str, ...] = "attention"
    exclude: tuple[str, ...] | None = None
    patch_embedding: bool = True
    init: float = 0.01
    threshold: float = 0.005
    reg_weight: Annotated[float, In(">= 0")] = 1e-4
    gdr: bool = True
    gdr_lambda: Annotated[float, In("[0, 1]")] = 1.0
    temperature: Annotated[float, In("> 0")] = 1.0
    epochs: Annotated[int, In(">= 1")] = 30
    lr: Annotated[float, In("> 0")] = 8e-5
    batch_size: Annotated[int, In(">= 1")] = 32
    seed: Annotated[int, In(">= 0")] = 0

    paper: ClassVar[Paper] = Paper(
        title="Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models",
        authors=("Kecheng Zheng", "Wei Wu", "Ruili Feng", "Kai Zhu", "Jiawei Liu", "Deli Zhao", "Zheng-Jun Zha",
                 "Wei Chen", "Yujun Shen"), year=2023, arxiv="2307.15049", venue="ICCV 2023",
        code="https://github.com/wuw2019/R-AMT",
        summary="Few-shot adaptation that adds nothing: a bit for each attention weight says whether it is used.")

    def validate(self) -> None:
        """See :class:`looseleaf.Plugin`."""
        for field in ("targets", "exclude"):
            value = getattr(self, field)
            if isinstance(value, str) and (field == "exclude" or value not in ("attention", "mlp", "all")):
                value = (value,)
            value = tuple(value) if isinstance(value, list) else value
            setattr(self, field, value)
            patterns = isinstance(value, tuple) and bool(value) and all(isinstance(p, str) and p for p in value)
            allowed = value is None if field == "exclude" else isinstance(value, str)
            self.check(field, allowed or patterns, "'attention', 'mlp', 'all' or name patterns"
                       if field == "targets" else "None or name patterns")
        self.check("init", math.isfinite(self.init) and self.init > self.threshold,
                   f"a number above threshold={self.threshold}, so that learning begins with all weights")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: two classes that the kit's models tell apart badly."""
        return {"make": lambda: cls(targets="all", lr=2e-3, epochs=4, batch_size=4), "data": _kit_data}

    def score(self, model: nn.Module, data: LabelledData | None = None, *, state_dir: str | Path | None = None,
              progress: bool | None = None) -> dict[str, Tensor]:
        """The learned scores by parameter name, float32; see :meth:`prune`."""
        return self._learn(model, data, state_dir, progress)[0]

    def selection(self) -> Selection:
        """Scores above ``threshold`` are kept."""
        return Threshold(self.threshold)

    def prune(self, model: nn.Module, data: LabelledData | None = None, *, state_dir: str | Path | None = None,
              progress: bool | None = None) -> Masks:
        """The masks for ``model``, which is not changed: ``masks.apply(model)`` puts them on.

        Args:
            model: in float32 (bfloat16 at your own risk). It is in evaluation mode meanwhile, batch norms included.
            data: of :func:`looseleaf_rmask_tuning.clip_task`, ``classifier_task`` or ``LabelledData.of_tensors``.
            state_dir: scores and moments are kept there after every epoch, so that the same call goes on.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: no data, no such weights, quantised, half-precision or not finite weights, logits of another
                shape, or a loss that is not finite (step and layer are named).
            StateError: the state on disk is damaged, or that of another run.

        Warns:
            UserWarning: there are too few steps for any score to reach the threshold.
        """
        scores, tuned = self._learn(model, data, state_dir, progress)
        masks = self.selection().select(scores)
        masks.metadata.update(model_facts(model, masks), plugin="rmask-tuning", hyperparameters=self.hyperparameters(),
                              steps=tuned.steps, losses=[round(value, 6) for value in tuned.epochs])
        return masks

    def _learn(self, model: nn.Module, data: LabelledData | None, state_dir: str | Path | None,
               progress: bool | None) -> tuple[dict[str, Tensor], Tuned]:
        if not isinstance(data, LabelledData):
            raise ValueError("data: expected what looseleaf_rmask_tuning.clip_task, classifier_task or "
                             f"LabelledData.of_tensors gives, got {type(data).__name__}")
        names = choose_weights(model, self.targets, self.exclude, self.patch_embedding, data.within)
        weights = dict(model.named_parameters())
        for name in names:
            check_finite(name, weights[name].detach(), "weights")
            if weights[name].dtype == torch.float16:
                raise ValueError(f"model: expected float32 weights, got {name!r} in float16, in which gradients "
                                 "vanish: learn on model.float(), and put the masks on the model in half precision")
        self._warn_of_few_steps(len(data))
        identity = {} if state_dir is None else {"plugin": self.hyperparameters(), "data": data.fingerprint(),
                                                 "model": fingerprint(model)}
        recipe = Recipe(self.epochs, self.batch_size, self.lr, "adam", weight_decay=0.0, warmup=0, crop=None)
        task = Task("rmask-tuning", [Example({"place": n}, label) for n, label in enumerate(data.labels)],
                    classes=data.classes)
        known = self._teacher(model, data) if self.gdr and not data.random else None
        with LearnedMasks(model, self.selection(), names, self.init) as learned:
            steps = _Steps(self, model, data, dict(zip(names, learned.parameters(), strict=True)), known)
            tuned = tune(nn.ParameterList(learned.parameters()), steps.loss, task, SimpleNamespace(model=model), recipe,
                         backward=steps.backward, seed=self.seed, state_dir=state_dir, identity=identity,
                         progress=progress, label="rmask-tuning")
            return {name: score.detach().clone() for name, score in steps.scores.items()}, tuned

    def _warn_of_few_steps(self, examples: int) -> None:
        steps = max(1, examples // min(self.batch_size, examples))
        recipe = Recipe(self.epochs, self.batch_size, self.lr, warmup=0)
        total = sum(recipe.rate(step, steps) for step in range(self.epochs * steps))
        needed = self.init - self.threshold
        if total < needed:
            warnings.warn(f"the learning rates of {self.epochs * steps} steps sum to {total:.2g}, and a score must "
                          f"move by {needed:.2g} to switch its weight off: expected a sum well above it, or nothing is "
                          f"ever masked. Raise lr (to {self.lr * 5 * needed / total:.2g} or more) or epochs",
                          UserWarning, stacklevel=4)

    @torch.no_grad()
    def _teacher(self, model: nn.Module, data: LabelledData) -> Tensor:
        """Logits (n, classes) of the unmasked network, where no example is read at random."""
        with evaluating(model):
            parts = torch.arange(len(data)).split(self.batch_size)
            return torch.cat([_logits(model, data, data.read(part, torch.Generator())) for part in parts])


class _Steps:
    """Loss and gradients of each step of an :class:`RMaskTuning`."""

    def __init__(self, method: RMaskTuning, model: nn.Module, data: LabelledData, scores: dict[str, Tensor],
                 known: Tensor | None) -> None:
        self.method, self.model, self.data, self.scores, self.known = method, model, data, scores, known
        self.student: Tensor | None = None
        self.teacher: Tensor | None = None
        self.generator = torch.Generator()

    def loss(self, batch: Batch, _: Any) -> Tensor:
        """Cross-entropy + reg_weight * norms; what :meth:`backward` needs is kept."""
        inputs = self.data.read(batch.index, batch.generator)
        self.generator = batch.generator
        if self.method.gdr and self.known is None:
            with torch.no_grad(), self._unmasked():
                self.teacher = _logits(self.model, self.data, inputs)
        elif self.known is not None:
            self.teacher = self.known[batch.index.to(self.known.device)]
        self.student = _logits(self.model, self.data, inputs)
        loss = F.cross_entropy(self.student, batch.targets.to(self.student.device))
        if not bool(torch.isfinite(loss.detach())):
            raise ValueError(f"rmask-tuning, step {batch.step}: expected a finite loss, got {float(loss.detach())}; "
                             f"the first layer whose output is not finite is {self._broken(inputs)}: lower lr, or look "
                             "at the inputs of this batch")
        return loss + self.method.reg_weight * penalty(self.scores).to(loss.device)

    def backward(self, loss: Tensor) -> None:
        """Fill the gradients of the scores."""
        scores, method, student = list(self.scores.values()), self.method, self.student
        assert student is not None
        first = torch.autograd.grad(loss, scores, retain_graph=method.gdr)
        if method.gdr:
            assert self.teacher is not None
            # the gradient of T^2 CE(softmax(teacher/T), softmax(student/T)), exactly 0 where both are the same
            t = method.temperature
            towards = t * (F.softmax(student.detach() / t, -1) - F.softmax(self.teacher / t, -1)) / len(student)
            second = torch.autograd.grad(student, scores, towards)
            draws = torch.Generator(scores[0].device).manual_seed(
                int(torch.randint(1 << 62, (), generator=self.generator)))
            first = tuple(regularized(a, c, method.gdr_lambda, draws) for a, c in zip(first, second, strict=True))
        for score, gradient in zip(scores, first, strict=True):
            score.grad = gradient
        self.student = self.teacher = None

    @contextlib.contextmanager
    def _unmasked(self) -> Iterator[None]:
        """Every weight is used: all scores lie above the threshold meanwhile, without a second copy of the network."""
        former = [score.detach().clone() for score in self.scores.values()]
        for score in self.scores.values():
            score.fill_(self.method.threshold + 1)
        try:
            yield
        finally:
            for score, value in zip(self.scores.values(), former, strict=True):
                score.copy_(value)

    @torch.no_grad()
    def _broken(self, inputs: Any) -> str:
        """The first layer whose output is NaN or infinite."""
        found: list[str] = []

        def note(name: str, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not bool(torch.isfinite(output).all()):
                found.append(name)

        with contextlib.ExitStack() as hooks:
            for name, module in self.model.named_modules():
                if not list(module.parameters(recurse=False)):
                    continue
                hooks.callback(module.register_forward_hook(lambda _, __, out, name=name: note(name, out)).remove)
            self.data.logits(self.model, inputs)
        return repr(found[0]) if found else "none: the logits themselves are not"


def _logits(model: nn.Module, data: LabelledData, inputs: Any) -> Tensor:
    found = data.logits(model, inputs)
    if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[1] != len(data.classes):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"logits: expected (B, {len(data.classes)}), one for each class, got {got}: give data with as "
                         "many classes as the network has outputs")
    return found.float()


def _kit_data(model: nn.Module) -> LabelledData:
    """Inputs of the conformance kit's models, with labels that have nothing to do with them."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(8) % 4
    if hasattr(unwrapped(model), "config"):
        return LabelledData.of_tensors({"input_ids": torch.randint(64, (8, 6), generator=draw)}, labels, range(64),
                                       logits=lambda model, batch: model(**batch).logits[:, -1])
    shape = (8, 16) if hasattr(unwrapped(model), "again") else (8, 8, 8, 8)
    return LabelledData.of_tensors(torch.randn(shape, generator=draw), labels, range(8))


# ------------------------------------------------------------------------------------------------------ what came out
def show(masks: Masks) -> Report:
    """What was switched off, by layer and kind of weight, as a table and a figure."""
    places: dict[tuple[int | None, str], list[str]] = defaultdict(list)
    for name in masks:
        parts = plain_name(name).removesuffix(".weight").split(".")
        number = next((n for n, part in enumerate(parts) if part.isdigit()), None)
        kind = ".".join(parts[-1:] if number is None else parts[number + 1:]) or parts[-1]
        places[None if number is None else int(parts[number]), kind].append(name)
    report = Report("Weights switched off", facts={"weights": masks.total(), "switched off": masks.removed(),
                                                   "fraction": masks.sparsity()})
    fractions = {place: sum(map(masks.removed, names)) / sum(map(masks.total, names))
                 for place, names in places.items()}
    report.table("By layer and kind", ["layer", "kind", "weights", "switched off", "fraction"], [
        [number, kind, sum(map(masks.total, names)), sum(map(masks.removed, names)), fractions[number, kind]]
        for (number, kind), names in places.items()])
    kinds = dict.fromkeys(kind for number, kind in places if number is not None)
    if kinds:
        report.figure("Fraction of the weights switched off", x_label="layer", y_label="fraction", series=[
            Series(kind, [float(n) for n, k in fractions if k == kind and n is not None],
                   [value for (n, k), value in fractions.items() if k == kind and n is not None]) for kind in kinds])
    return report


__all__ = ["EPSILON", "RMaskTuning", "choose_weights", "groups", "keep_probability", "penalty", "regularized", "show"]
