"""What is measured of a causal model: losses by position, linear probes of its hidden states, and continuations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from looseleaf import capture
from looseleaf import progress as progress_
from looseleaf.modes import evaluating, with_gradients
from looseleaf_metadata_conditioning.collator import MetadataCollator
from looseleaf_text.batching import device_of
from looseleaf_text.layers import decoder_layers
from looseleaf_text.local import padded

Row = Mapping[str, Any]
L2 = 1e-2
"""Weight of the squared weights of a probe, whose inputs have variance 1; this project's."""


@torch.no_grad()
def token_losses(model: nn.Module, rows: Sequence[Row], collator: MetadataCollator, shown: bool, *, batch: int = 16,
                 progress: bool | None = None) -> list[np.ndarray]:
    """Loss of each token of each document in nats, a float64 array each; NaN where nothing precedes a token.

    Args:
        model: a causal language model of transformers.
        rows: documents with metadata.
        collator: makes the prefix.
        shown: whether the metadata are in it.
        batch: documents at a time.
        progress: show a progress bar; None: only on a terminal.
    """
    out: list[np.ndarray] = []
    starts = range(0, len(rows), batch)
    with evaluating(model):
        for first in progress_.track(starts, "losses", len(starts), progress):
            sequences = [collator.sequence(row, shown) for row in rows[first:first + batch]]
            ids, mask = padded([ids for ids, _ in sequences], device_of(model), left=False)
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double().cpu()
            for own, (tokens, start) in zip(losses, sequences, strict=True):
                # a document without anything in front has no loss of its first token
                out.append(np.concatenate([[np.nan] * (start == 0), own[max(start - 1, 0):len(tokens) - 1].numpy()]))
    return out


@torch.no_grad()
def hidden_states(model: nn.Module, rows: Sequence[Row], collator: MetadataCollator, lengths: Sequence[int],
                  layers: Sequence[int] = (), *, shown: bool = False, batch: int = 16,
                  progress: bool | None = None) -> tuple[Tensor, list[str]]:
    """Outputs of decoder layers behind the first ``t`` tokens of documents, float32 (layers, lengths, N, width).

    Args:
        model: a causal language model of transformers.
        rows: documents; NaN stands where one is shorter than ``t`` tokens.
        collator: makes the prefix.
        lengths: the numbers t of tokens of the document read so far, the prefix apart.
        layers: which, from 0 on, negative ones from the end; empty: all.
        shown, batch, progress: as for :func:`token_losses`.

    Returns:
        The states, and the names of the layers.

    Raises:
        ValueError: a layer that does not exist.
        UnsupportedModelError: the layers could not be found.
    """
    names = list(decoder_layers(model))
    if not all(-len(names) <= layer < len(names) for layer in layers):
        raise ValueError(f"layers: expected integers in [{-len(names)}, {len(names) - 1}], got {tuple(layers)}")
    names = [names[layer] for layer in layers] if layers else names
    parts = []
    starts = range(0, len(rows), batch)
    with evaluating(model):
        for first in progress_.track(starts, "hidden states", len(starts), progress):
            sequences = [collator.sequence(row, shown) for row in rows[first:first + batch]]
            ids, mask = padded([ids for ids, _ in sequences], device_of(model), left=False)
            places = torch.tensor([[start + t - 1 for t in lengths] for _, start in sequences])
            there = places < torch.tensor([len(tokens) for tokens, _ in sequences])[:, None]
            at = places.clamp_max(ids.shape[1] - 1).to(ids.device)

            def pick(output: Tensor, at: Tensor = at) -> Tensor:
                return output[torch.arange(len(at), device=output.device)[:, None], at.to(output.device)]

            with capture(model, names, pick) as outputs:
                model(input_ids=ids, attention_mask=mask)
            states = torch.stack([outputs[name][0].float().cpu() for name in names])
            parts.append(states.masked_fill(~there[None, :, :, None], torch.nan))
    return torch.cat(parts, 1).transpose(1, 2), names


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regressions on the same inputs, one for each field.

    Attributes:
        mean, scale: of the inputs that it was fitted on, (width,).
        weight, bias: (width, all classes), (all classes,).
        classes: number of classes of each field.
        loss: mean over documents at the end, summed over fields, without the penalty.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    classes: tuple[int, ...]
    loss: float

    def predict(self, states: Tensor) -> Tensor:
        """The likeliest class of each field, int64 (N, fields); ``states`` is (N, width)."""
        logits = (states.to(self.mean) - self.mean) / self.scale @ self.weight + self.bias
        return torch.stack([part.argmax(-1) for part in logits.split(self.classes, -1)], -1)


@with_gradients()
def fit_probe(states: Tensor, labels: Tensor, classes: Sequence[int], *, l2: float = L2,
              steps: int = 60) -> LinearProbe:
    """Fit one logistic regression for each field, by L-BFGS on standardised inputs.

    Args:
        states: (N, width).
        labels: int64 (N, fields).
        classes: number of classes of each field.
        l2: weight of the sum of squared weights, bias apart.
        steps: most iterations.

    Raises:
        ValueError: no state, or a field all of whose labels are equal.
    """
    for n in range(labels.shape[1]):
        if len(labels[:, n].unique()) < 2:
            raise ValueError(f"field {n}: expected documents of two classes or more, got {len(labels)} documents of "
                             f"{len(labels[:, n].unique())}: there is nothing to tell apart")
    inputs = states.double()
    mean, scale = inputs.mean(0), inputs.std(0).clamp_min(1e-6)
    inputs = (inputs - mean) / scale
    weight = torch.zeros(inputs.shape[1], sum(classes), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(sum(classes), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def fields_loss() -> Tensor:
        logits = (inputs @ weight + bias).split(list(classes), -1)
        return torch.stack([nn.functional.cross_entropy(own, labels[:, n]) for n, own in enumerate(logits)]).sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = fields_loss() + l2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        loss = float(fields_loss())
    return LinearProbe(mean, scale, weight.detach(), bias.detach(), tuple(classes), loss)


@torch.no_grad()
def continuations(model: nn.Module, rows: Sequence[Row], collator: MetadataCollator, length: int, end: int | None,
                  most: int, *, shown: bool = False, seed: int = 0, batch: int = 64,
                  progress: bool | None = None) -> list[list[int] | None]:
    """Documents continued from their first ``length`` tokens, drawn from the model at temperature 1.

    Args:
        model: a causal language model of transformers.
        rows: documents; a document shorter than ``length`` gives None.
        collator: makes the prefix.
        length: tokens of the document that are given.
        end: the token that ends a document; None: all of ``most`` tokens are drawn.
        most: most tokens that are drawn for one document.
        shown, batch, progress: as for :func:`token_losses`.
        seed: random seed of the draws.

    Returns:
        The given and the drawn tokens of each document, without ``end``.
    """
    out: list[list[int] | None] = [None] * len(rows)
    prompts: dict[int, list[tuple[int, list[int], int]]] = {}
    for n, row in enumerate(rows):
        ids, start = collator.sequence(row, shown)
        own = len(ids) - start - (ids[-1] == end)
        if own >= length and start + length > 0:
            prompts.setdefault(start + length, []).append((n, ids[:start + length], start))
    # equally long prompts go together, so that nothing is padded
    parts = [own[first:first + batch] for own in prompts.values() for first in range(0, len(own), batch)]
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model):
        for part in progress_.track(parts, "continuations", len(parts), progress):
            drawn = coming = torch.tensor([prompt for _, prompt, _ in part], device=device_of(model))
            cache: Any = None
            open_ = torch.ones(len(part), dtype=torch.bool)
            for _ in range(most):
                output = model(input_ids=coming, past_key_values=cache, use_cache=True)
                cache = getattr(output, "past_key_values", None)
                logits = output.logits[:, -1].float().softmax(-1).cpu()
                token = torch.multinomial(logits, 1, generator=generator)
                drawn = torch.cat([drawn, token.to(drawn.device)], 1)
                open_ &= token[:, 0] != end
                if not open_.any():
                    break
                coming = token.to(drawn.device) if cache is not None else drawn
            for (n, prompt, start), tokens in zip(part, drawn.tolist(), strict=True):
                new = tokens[len(prompt):]
                out[n] = tokens[start:len(prompt)] + (new[:new.index(end)] if end in new else new)
    return out


def share_derived(texts: Sequence[list[int] | None], derives: Callable[[int, list[int]], bool]) -> list[float]:
    """For each text that is there: 1 where ``derives(index, text)``, else 0."""
    return [float(derives(n, text)) for n, text in enumerate(texts) if text is not None]


__all__ = ["LinearProbe", "continuations", "fit_probe", "hidden_states", "share_derived", "token_losses"]
