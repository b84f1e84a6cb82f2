"""LinEAS: learn the maps of all layers together, by proximal gradient descent (algorithm 1)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from looseleaf import Paper, Probe, Report, intervene
from looseleaf import progress as progress_
from looseleaf.probes.hooks import matching_modules
from looseleaf_lineas import examples
from looseleaf_lineas.activations import body, by_length, encode, frozen, pooled, weights
from looseleaf_lineas.steering import Steering
from looseleaf_lineas.wasserstein import squared_w2

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
    lr: float = 0.1
    steps: int = 100
    momentum: float = 0.9
    lambda_1: float = 0.0
    lambda_G: float = 0.0
    skip_first: bool = True
    paper: ClassVar[Paper] = Paper(
        title="LinEAS: End-to-end Learning of Activation Steering with a Distributional Loss",
        authors=("Pau Rodriguez", "Michal Klein", "Eleonora Gualdoni", "Valentino Maiorca", "Arno Blaas",
                 "Luca Zappella", "Marco Cuturi", "Xavier Suau"), year=2025, arxiv="2503.10679", venue="NeurIPS 2025",
        code="https://github.com/apple/ml-lineas",
        summary="Steer a model by 32 unwanted and 32 wanted sentences, unpaired, with a strength knob.")

    def validate(self) -> None:
        self.check("modules", isinstance(self.modules, str) and bool(self.modules) and " " not in self.modules,
                   "a name pattern such as '*layernorm'")
        self.check("lr", self.lr > 0 and math.isfinite(self.lr), "a number above 0")
        self.check("steps", isinstance(self.steps, int) and self.steps >= 1, "a whole number from 1")
        self.check("momentum", 0 <= self.momentum < 1, "a number from 0 to below 1")
        self.check("lambda_1", self.lambda_1 >= 0, "a number from 0")
        self.check("lambda_G", self.lambda_G >= 0, "a number from 0")

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
                count = 1 if isinstance(texts, str) else len(texts)
                raise ValueError(f"{name} has {count} sentences: allowed is a list of 2 or more, as a distribution "
                                 "needs samples")
        names = list(matching_modules(model, self.modules))
        device = next(model.parameters()).device
        batch = encode(tokenizer, source, device)
        share = weights(batch["attention_mask"], self.skip_first)
        with frozen(model):
            goal = pooled(model, self.modules, encode(tokenizer, target, device), self.skip_first)
            omega = {n: torch.ones_like(goal[n][0]).requires_grad_() for n in names}
            bias = {n: torch.zeros_like(goal[n][0]).requires_grad_() for n in names}
            speeds = [torch.zeros_like(parameter) for parameter in (*omega.values(), *bias.values())]
            losses: list[float] = []
            first: dict[str, float] = {}
            with progress_.bar("LinEAS", self.steps + 1, progress) as moving:
                for step in range(self.steps + 1):
                    layers = _layer_losses(model, batch, share, goal, omega, bias)
                    loss = torch.stack(list(layers.values())).sum()
                    losses.append(float(loss.detach()))
                    if not math.isfinite(losses[-1]):
                        raise ValueError(f"the loss is {losses[-1]} at step {step}: choose a smaller lr than {self.lr}")
                    last = {n: float(v.detach()) for n, v in layers.items()}
                    first = first or last
                    moving.update(1)
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
        return Steering(omega, bias, {"method": "LinEAS", **self.parameters(), "loss": losses,
                                      "w2": {n: [first[n], last[n]] for n in names}})

    def run(self, model: Any, data: Any = None, *, tokenizer: Any = None, seed: int = 0,
            progress: bool | None = None) -> Report:
        """Learn a steering and say what it does.

        Args:
            model: a transformers causal language model.
            data: ``{"source": [...], "target": [...], "prompts": [...]}``; the last quarter of each of the first two is
                held out, prompts are continued. None: 32 gloomy and 32 cheerful sentences, and neutral beginnings.
            tokenizer: the model's; needed.
            seed: nothing here is random.
            progress: show a progress bar; None: only on a terminal.
        """
        if tokenizer is None:
            raise ValueError("tokenizer=None: LinEAS works on text, pass the model's tokenizer")
        if data is None:
            data = {"source": examples.SOURCE, "target": examples.TARGET, "prompts": examples.PROMPTS}
        if not isinstance(data, dict) or not {"source", "target"} <= set(data):
            raise ValueError(f"data is {type(data).__name__}: allowed is None or a dictionary with 'source', 'target' "
                             "and, if you like, 'prompts'")
        source, held_source = _split(data["source"])
        target, held_target = _split(data["target"])
        prompts = list(data.get("prompts") or examples.PROMPTS)[:3]
        steering = self.fit(model, source, target, tokenizer, progress=progress)
        report = Report("LinEAS steering", {
            "source sentences": len(source), "target sentences": len(target), **self.parameters(),
            "loss before": steering.info["loss"][0], "loss after": steering.info["loss"][-1],
            "coordinates at identity": steering.sparsity()})
        report.figure("Loss", x_label="step", y_label="squared W2, sum over layers", y_log=True,
                      series=[_line("loss", steering.info["loss"])])
        report.table("Squared Wasserstein-2 distance, mean over neurons", ["module", "before", "after"],
                     [[n, *pair] for n, pair in steering.info["w2"].items()])
        effect = report.table("Effect on held-out sentences", ["strength", "preference", "source", "target"],
                              note="mean log-likelihood a token, nats; preference: target less source")
        rows = []
        for strength in STRENGTHS:
            with steering.apply(model, strength):
                one, two = (mean_log_likelihood(model, tokenizer, texts) for texts in (held_source, held_target))
                texts = continuations(model, tokenizer, prompts, 24) if strength in (0.0, 0.5, 1.0) else []
            rows.append(two - one)
            effect.add(strength, two - one, one, two)
            report.examples += [(f"strength {strength:g}", text) for text in texts]
        report.figure("Preference for target sentences", x_label="strength", y_label="nats a token",
                      series=[_line("held-out sentences", rows, STRENGTHS)])
        return report


def _layer_losses(model: nn.Module, batch: dict[str, Tensor], share: Tensor, goal: dict[str, Tensor],
                  omega: dict[str, Tensor], bias: dict[str, Tensor]) -> dict[str, Tensor]:
    """Delta of each module: its pooled activations, all maps up to it applied, against the target's.

    The mean over neurons, not their sum: by the sum, lr 0.1 diverges on a model 576 wide and lr 0.1/576 is the same.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in omega}

    def at(name: str, share: Tensor) -> Any:
        def function(z: Tensor) -> Tensor:
            # at least single precision: a map this close to the identity would be lost in bf16
            moved = z.to(torch.promote_types(z.dtype, torch.float32)) * omega[name] + bias[name]
            found[name].append((moved * share).sum(1))
            return moved.to(z.dtype)

        return function

    for part, part_share in by_length(batch, share):
        with intervene(model, {name: at(name, part_share) for name in omega}):
            body(model)(**part)
    return {name: squared_w2(torch.cat(values), goal[name]).mean() for name, values in found.items()}


def shrink(x: Tensor, rate: float, lambda_1: float, lambda_g: float) -> Tensor:
    """Proximal step of the sparse group lasso: soft threshold, then shrinkage of the group (section 3.3).

    The minimiser of ``|u - x|^2 / 2 + rate (lambda_1 |u|_1 + lambda_g sqrt(d) |u|_2)``.
    """
    x = x.sign() * (x.abs() - rate * lambda_1).clamp(min=0)
    norm = x.norm()
    if lambda_g == 0 or norm == 0:
        return x
    return x * (1 - rate * lambda_g * math.sqrt(x.numel()) / norm).clamp(min=0)


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
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    for start in range(0, len(prompts), batch):
        padded = encode(tokenizer, prompts[start:start + batch], next(model.parameters()).device, left=True)
        length = padded["input_ids"].shape[1]
        made = model.generate(**padded, max_new_tokens=tokens, do_sample=False, pad_token_id=pad)
        for row, mask in zip(made, padded["attention_mask"], strict=True):
            out.append(str(tokenizer.decode(row[length - int(mask.sum()):], skip_special_tokens=True)))
    return out


def _split(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Three quarters to learn from, one to measure on."""
    texts = list(texts)
    if len(texts) < 4:
        raise ValueError(f"{len(texts)} sentences: allowed is 4 or more, as a quarter is held out")
    held = len(texts) // 4
    return texts[:-held], texts[-held:]


def _line(name: str, values: Sequence[float], x: Sequence[float] | None = None) -> Any:
    from looseleaf import Series

    along = range(len(values)) if x is None else x
    return Series(name, [float(v) for v in along], [float(v) for v in values], style="line")
