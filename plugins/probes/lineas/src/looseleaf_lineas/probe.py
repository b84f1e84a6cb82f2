"""LinEAS: learn the maps of all layers together, by proximal gradient descent (algorithm 1)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from looseleaf import Paper, Probe, Report, Series, capture, intervene
from looseleaf import progress as progress_
from looseleaf.modes import evaluating, frozen, with_gradients
from looseleaf.plugin import In
from looseleaf.probes.hooks import matching_modules
from looseleaf.probes.subject import parts
from looseleaf_lineas import data as data_
from looseleaf_lineas.steering import Steering

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass
class LinEAS(Probe):
    """Steer a language model from unwanted to wanted sentences by tiny affine maps (arXiv 2503.10679).

    Args:
        modules: name pattern of the steered modules; every layer normalisation by default.
        lr: learning rate of the first step, for distances averaged over a layer's neurons; falls to zero along a
            cosine.
        steps: gradient steps; the paper's setting is 1000 [memory], the loss has levelled off long before.
        momentum: of the gradient steps; 0 is plain gradient descent, which needs several times the steps.
        lambda_1: weight of the L1 norm of (omega - 1, bias); above 0 leaves single neurons alone.
        lambda_G: weight of the group norms of the layers; above 0 leaves whole layers alone.
        skip_first: leave the first token of a sentence out of its mean: its activations are massive and say little.
    """

    modules: str = "*layernorm"
    lr: Annotated[float, In("> 0")] = 0.1
    steps: Annotated[int, In(">= 1")] = 100
    momentum: Annotated[float, In("[0, 1)")] = 0.9
    lambda_1: Annotated[float, In(">= 0")] = 0.0
    lambda_G: Annotated[float, In(">= 0")] = 0.0
    skip_first: bool = True
    paper: ClassVar[Paper] = Paper(
        title="LinEAS: End-to-end Learning of Activation Steering with a Distributional Loss",
        authors=("Pau Rodriguez", "Michal Klein", "Eleonora Gualdoni", "Valentino Maiorca", "Arno Blaas",
                 "Luca Zappella", "Marco Cuturi", "Xavier Suau"), year=2025, arxiv="2503.10679", venue="NeurIPS 2025",
        code="https://github.com/apple/ml-lineas",
        summary="Steer a model by 32 unwanted and 32 wanted sentences, unpaired, with a strength knob.")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """A few steps, and few sentences."""
        return {"make": lambda: cls(steps=3), "data": {"source": data_.SOURCE[:8], "target": data_.TARGET[:8],
                                                       "prompts": data_.PROMPTS[:2]}}

    def validate(self) -> None:
        self.check("modules", bool(self.modules) and " " not in self.modules, "a name pattern such as '*layernorm'")

    def fit(self, model: nn.Module, source: Sequence[str], target: Sequence[str], tokenizer: Any, *,
            progress: bool | None = None) -> Steering:
        """Learn the maps.

        Args:
            model: a causal language model or encoder; its weights are not touched.
            source: unwanted sentences, 2 or more. target: wanted ones, 2 or more; they need not correspond.
            tokenizer: the model's.
            progress: show a progress bar; None: only on a terminal.

        Returns:
            The steering; its ``info`` has ``loss`` for each step and ``w2`` for each module, before and after.

        Raises:
            ValueError: too few sentences, a pattern that matches nothing, or a loss that is not finite.
        """
        for name, texts in (("source", source), ("target", target)):
            if isinstance(texts, str) or len(texts) < 2:
                got = repr(texts) if isinstance(texts, str) else f"{len(texts)}"
                raise ValueError(f"{name}: expected a list of 2 sentences or more, as a distribution needs samples, "
                                 f"got {got}")
        names = list(matching_modules(model, self.modules))
        device = next(model.parameters()).device
        with evaluating(model), frozen(model), with_gradients():
            batch = encode(tokenizer, source, device)
            mean = token_weights(batch["attention_mask"], self.skip_first)
            goal = pooled(model, self.modules, encode(tokenizer, target, device), self.skip_first)
            omega = {n: torch.ones_like(goal[n][0]).requires_grad_() for n in names}
            bias = {n: torch.zeros_like(goal[n][0]).requires_grad_() for n in names}
            speeds = [torch.zeros_like(parameter) for parameter in (*omega.values(), *bias.values())]
            losses: list[float] = []
            first: dict[str, float] = {}
            with progress_.bar("LinEAS", self.steps + 1, progress) as progress_bar:
                for step in range(self.steps + 1):
                    layers = layer_losses(model, batch, mean, goal, omega, bias)
                    loss = torch.stack(list(layers.values())).sum()
                    losses.append(float(loss.detach()))
                    if not math.isfinite(losses[-1]):
                        raise ValueError(f"the loss is {losses[-1]} at step {step}: choose a smaller lr than {self.lr}")
                    last = {n: float(v.detach()) for n, v in layers.items()}
                    first = first or last
                    progress_bar.update(1)
                    if step == self.steps:
                        break  # only the loss of what was learned was wanted
                    rate = self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2
                    gradients = torch.autograd.grad(loss, [*omega.values(), *bias.values()])
                    with torch.no_grad():
                        for parameter, gradient, speed in zip([*omega.values(), *bias.values()], gradients, speeds,
                                                              strict=True):
                            speed.mul_(self.momentum).add_(gradient)
                            parameter -= rate * speed
                        # momentum makes a lasting gradient count 1 / (1 - momentum) times, so the penalty must too
                        pull = rate / (1 - self.momentum)
                        for values, identity in ((omega, 1.0), (bias, 0.0)):
                            for parameter in values.values():
                                parameter.copy_(identity + shrink(parameter - identity, pull, self.lambda_1,
                                                                  self.lambda_G))
        return Steering(omega, bias, {"method": "LinEAS", **self.hyperparameters(), "loss": losses,
                                      "w2": {n: [first[n], last[n]] for n in names}})

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        """Learn a steering and say what it does.

        Args:
            subject: a ``(model, tokenizer)`` pair, a text pipeline or a LocalModel; the model is a causal language
                model of transformers.
            data: ``{"source": [...], "target": [...], "prompts": [...]}``; the last quarter of each of the first two is
                held out, prompts are continued. None: 32 gloomy and 32 cheerful sentences, and neutral beginnings.
            seed: nothing here is random.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            TypeError: another subject.
            ValueError: no tokenizer, other data, or fewer than 4 sentences of a kind.
        """
        model, tokenizer = parts(subject, needs="tokenizer")
        if data is None:
            data = {"source": data_.SOURCE, "target": data_.TARGET, "prompts": data_.PROMPTS}
        if not isinstance(data, dict) or not {"source", "target"} <= set(data):
            raise ValueError("data: expected None or a dictionary with 'source', 'target' and, optionally, 'prompts', "
                             f"got {sorted(data) if isinstance(data, dict) else type(data).__name__}")
        source, held_source = _split(data["source"])
        target, held_target = _split(data["target"])
        prompts = list(data.get("prompts") or data_.PROMPTS)[:3]
        steering = self.fit(model, source, target, tokenizer, progress=progress)
        report = Report("LinEAS steering", {
            "source sentences": len(source), "target sentences": len(target), **self.hyperparameters(),
            "loss before": steering.info["loss"][0], "loss after": steering.info["loss"][-1],
            "coordinates at identity": steering.sparsity()})
        report.figure("Loss", x_label="step", y_label="squared W2, sum over layers", y_log=True,
                      series=[_line("loss", steering.info["loss"])])
        report.table("Squared Wasserstein-2 distance, mean over neurons", ["module", "before", "after"],
                     [[n, *pair] for n, pair in steering.info["w2"].items()])
        effect = report.table("Effect on held-out sentences", ["strength", "preference", "source", "target"],
                              note="mean log-likelihood a token, nats; preference: target less source")
        preferences = []
        for strength in STRENGTHS:
            with evaluating(model), steering.apply(model, strength):
                one, two = (mean_log_likelihood(model, tokenizer, texts) for texts in (held_source, held_target))
                texts = continuations(model, tokenizer, prompts, 24) if strength in (0.0, 0.5, 1.0) else []
            preferences.append(two - one)
            effect.add(strength, two - one, one, two)
            report.examples += [(f"strength {strength:g}", text) for text in texts]
        report.figure("Preference for target sentences", x_label="strength", y_label="nats per token",
                      series=[_line("held-out sentences", preferences, STRENGTHS)])
        return report


def layer_losses(model: nn.Module, batch: dict[str, Tensor], mean: Tensor, goal: dict[str, Tensor],
                 omega: dict[str, Tensor], bias: dict[str, Tensor]) -> dict[str, Tensor]:
    """Delta of each module: its pooled activations, all maps up to it applied, against the target's.

    The mean over neurons, not their sum: by the sum, lr 0.1 diverges on a model 576 wide and lr 0.1/576 is the same.
    """
    outputs: dict[str, list[Tensor]] = {name: [] for name in omega}

    def at(name: str, mean: Tensor) -> Any:
        def function(z: Tensor) -> Tensor:
            # at least single precision: a map this close to the identity would be lost in bf16
            steered = z.to(torch.promote_types(z.dtype, torch.float32)) * omega[name] + bias[name]
            outputs[name].append((steered * mean).sum(1))
            return steered.to(z.dtype)

        return function

    for part, part_mean in _by_length(batch, mean):
        with intervene(model, {name: at(name, part_mean) for name in omega}):
            body(model)(**part)
    return {name: squared_w2(torch.cat(values), goal[name]).mean() for name, values in outputs.items()}


def squared_w2(x: Tensor, y: Tensor) -> Tensor:
    """Squared Wasserstein-2 distance between two empirical distributions of every neuron (section 3).

    On the line the optimal transport matches quantiles: with equally many samples, the sorted ones; otherwise the
    quantile functions, both step functions, are compared exactly between all their steps.

    Args:
        x: (n, d) samples. y: (m, d) samples.

    Returns:
        (d,), differentiable in both.
    """
    x, y = x.sort(0).values, y.sort(0).values
    n, m = len(x), len(y)
    if n == m:
        return (x - y).square().mean(0)
    # Edges of the steps in units of 1/(n m), so that they are integers.
    edges = torch.unique(torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]))
    start, width = edges[:-1], edges[1:] - edges[:-1]
    gap = x[(start // m).to(x.device)] - y[(start // n).to(y.device)]
    return (gap.square() * (width / (n * m)).to(gap)[:, None]).sum(0)


def shrink(x: Tensor, rate: float, lambda_1: float, lambda_g: float) -> Tensor:
    """Proximal step of the sparse group lasso: soft threshold, then shrinkage of the group (section 3.3).

    The minimiser of ``|u - x|^2 / 2 + rate (lambda_1 |u|_1 + lambda_g sqrt(d) |u|_2)``.
    """
    x = x.sign() * (x.abs() - rate * lambda_1).clamp(min=0)
    norm = x.norm()
    if lambda_g == 0 or norm == 0:
        return x
    return x * (1 - rate * lambda_g * math.sqrt(x.numel()) / norm).clamp(min=0)


# ---------------------------------------------------------------------------------------------- pooled activations
def encode(tokenizer: Any, texts: Sequence[str], device: torch.device, left: bool = False) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` (n, L), padded on the right, or on the ``left`` to generate from.

    Raises:
        ValueError: a text without any token.
    """
    rows = [list(tokenizer(text)["input_ids"]) for text in texts]
    empty = [text for text, row in zip(texts, rows, strict=True) if not row]
    if empty:
        raise ValueError(f"the text {empty[0]!r} has no token: leave it out")
    pad = _pad_token(tokenizer)
    length = max(len(row) for row in rows)
    gaps = [length - len(row) for row in rows]
    if left:
        ids = [[pad] * gap + row for gap, row in zip(gaps, rows, strict=True)]
        mask = [[0] * gap + [1] * len(row) for gap, row in zip(gaps, rows, strict=True)]
    else:
        ids = [row + [pad] * gap for gap, row in zip(gaps, rows, strict=True)]
        mask = [[1] * len(row) + [0] * gap for gap, row in zip(gaps, rows, strict=True)]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def token_weights(mask: Tensor, skip_first: bool) -> Tensor:
    """(n, L, 1) weights of the tokens in a sentence's mean; they sum to 1.

    The first token is left out (where there is another one): its activations are massive and say little.
    """
    kept = mask.clone().float()
    if skip_first:
        kept[:, 0] = torch.where(mask.sum(1) > 1, 0.0, kept[:, 0])
    return (kept / kept.sum(1, keepdim=True))[..., None]


def pooled(model: nn.Module, pattern: str, batch: dict[str, Tensor], skip_first: bool) -> dict[str, Tensor]:
    """Module name -> (n, d) mean activations over the tokens of a sentence, fp32, without gradient.

    Raises:
        ValueError: a module that matches and is not run by the model.
    """
    mean = token_weights(batch["attention_mask"], skip_first)
    with torch.no_grad(), capture(model, pattern, reduce=lambda z: (z.float() * mean).sum(1)) as seen:
        body(model)(**batch)
    silent = [name for name, values in seen.items() if not values]
    if silent:
        raise ValueError(f"{silent[0]} matches the pattern {pattern!r} but is not run by the model: name other modules")
    return {name: values[0] for name, values in seen.items()}


def body(model: nn.Module) -> Any:
    """The model without its head, which steering does not need."""
    inner = getattr(model, "base_model", None)
    return inner if isinstance(inner, nn.Module) else model


def _by_length(batch: dict[str, Tensor], mean: Tensor, size: int = 8) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Right-padded sentences in groups of like length, each cut to its longest: much less padding to compute."""
    lengths = batch["attention_mask"].sum(1)
    for rows in lengths.argsort().split(size):
        longest = int(lengths[rows].max())
        yield {key: value[rows, :longest] for key, value in batch.items()}, mean[rows, :longest]


# -------------------------------------------------------------------------------------------------- what it changes
@torch.no_grad()
def mean_log_likelihood(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Mean log-likelihood of the tokens of ``texts``, each but its first token, in nats."""
    batch = encode(tokenizer, texts, next(model.parameters()).device)
    logits = model(**batch).logits[:, :-1].float()
    token = torch.log_softmax(logits, -1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    valid = batch["attention_mask"][:, 1:].bool()
    return float(token[valid].mean())


@torch.no_grad()
def continuations(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int, batch: int = 16) -> list[str]:
    """Greedy continuations, prompt included.

    Args:
        model: a causal language model with ``generate``.
        tokenizer: its tokenizer.
        prompts: beginnings.
        tokens: new tokens for each.
        batch: prompts at a time; shorter ones are padded on the left.
    """
    out = []
    for start in range(0, len(prompts), batch):
        padded = encode(tokenizer, prompts[start:start + batch], next(model.parameters()).device, left=True)
        length = padded["input_ids"].shape[1]
        generated = model.generate(**padded, max_new_tokens=tokens, do_sample=False, pad_token_id=_pad_token(tokenizer))
        for row, mask in zip(generated, padded["attention_mask"], strict=True):
            out.append(str(tokenizer.decode(row[length - int(mask.sum()):], skip_special_tokens=True)))
    return out


def _pad_token(tokenizer: Any) -> int:
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


def _split(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Three quarters to learn from, one to measure on."""
    texts = list(texts)
    if len(texts) < 4:
        raise ValueError(f"data: expected 4 sentences or more of each kind, as a quarter is held out, got {len(texts)}")
    held = len(texts) // 4
    return texts[:-held], texts[-held:]


def _line(name: str, values: Sequence[float], x: Sequence[float] | None = None) -> Series:
    along = range(len(values)) if x is None else x
    return Series(name, [float(v) for v in along], [float(v) for v in values], style="line")
