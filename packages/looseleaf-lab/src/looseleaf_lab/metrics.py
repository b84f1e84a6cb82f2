"""Figures of merit with their uncertainty: perplexity and pass-key retrieval of language models, relative errors."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from looseleaf import progress as progress_
from looseleaf.modes import evaluating
from looseleaf.statistics import bootstrap

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LOGITS_BYTES = 256 * 2**20
"""Most memory for logits at once, in bytes: a long context over a large vocabulary would not fit."""


@dataclasses.dataclass
class PerplexityResult:
    """What :func:`perplexity` measured.

    Attributes:
        value: perplexity over all scored tokens: exp of the mean negative log-likelihood in nats.
        losses: mean negative log-likelihood of each window, nats a token.
        tokens: number of scored tokens of each window.
    """

    value: float
    losses: list[float]
    tokens: list[int]

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood over all scored tokens, nats."""
        return sum(x * n for x, n in zip(self.losses, self.tokens)) / sum(self.tokens)

    def interval(self, seed: int = 0) -> tuple[float, float, float]:
        """(perplexity, low, high): 95 % bootstrap over windows, equal to the value where there is one window.

        The first figure is exp of the mean over windows; it equals :attr:`value` where windows score equally many
        tokens.
        """
        mean, low, high = bootstrap(self.losses, seed)
        return math.exp(min(mean, 700)), math.exp(min(low, 700)), math.exp(min(high, 700))


def perplexity(model: Any, ids: Tensor, context: int, stride: int | None = None, *, last: int | None = None,
               batch: int = 1, bos: int | None = None, progress: bool | None = None) -> PerplexityResult:
    """Perplexity of a causal language model over windows of a long text.

    Every window holds ``context`` tokens and is run by itself. In the first, all tokens but one are scored; in a
    later one only those that no window before it scored, so that a ``stride`` below ``context`` gives each scored
    token ``context - stride`` tokens of history at least. The first token of a window is never scored.

    Args:
        model: a transformers causal language model, or a module that maps ids (B, L) to logits (B, L, V).
        ids: token ids, int64, (L,) or (1, L).
        context: tokens in a window, 2 or more.
        stride: step between windows; None: ``context``, windows that touch.
        last: score only the last so many tokens of each window (long-context evaluation).
        batch: windows run together.
        bos: id that takes the place of each window's first token. Models that were trained with such a token (Gemma)
            fail without it; :func:`looseleaf_lab.data.bos` finds it. None: the text as it is.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: a size out of range, or fewer tokens than one window.
    """
    import torch

    ids = ids.reshape(-1)
    stride = context if stride is None else stride
    if context < 2:
        raise ValueError(f"context: expected an integer >= 2, got {context}")
    if not 1 <= stride <= context:
        raise ValueError(f"stride: expected an integer in [1, {context}], the context, got {stride}")
    if last is not None and not 1 <= last <= context - 1:
        raise ValueError(f"last: expected an integer in [1, {context - 1}], below the context, got {last}")
    if batch < 1:
        raise ValueError(f"batch: expected an integer >= 1, got {batch}")
    if len(ids) < context:
        raise ValueError(f"ids: expected at least context={context} tokens, got {len(ids)}: pass a longer text or less "
                         "context")
    starts = list(range(0, len(ids) - context + 1, stride))
    windows = [ids[s:s + context] for s in starts]
    if last is not None:
        scored = [last] * len(starts)
    else:
        scored = [context - 1] + [min(stride, context - 1)] * (len(starts) - 1)
    losses: list[float] = []
    counts: list[int] = []
    device = next(iter(model.parameters())).device
    with evaluating(model), torch.inference_mode(), progress_.bar("perplexity", len(windows), progress) as progress_bar:
        for start in range(0, len(windows), batch):
            part = torch.stack(windows[start:start + batch]).to(device)
            if bos is not None:
                part[:, 0] = bos
            sizes = scored[start:start + batch]
            nll = token_losses(model, part, last=max(sizes))
            for row, size in zip(nll, sizes, strict=True):
                losses.append(float(row[-size:].double().mean()))
                counts.append(size)
            progress_bar.update(len(part))
    total = sum(x * n for x, n in zip(losses, counts)) / sum(counts)
    return PerplexityResult(math.exp(total) if total < 700 else math.inf, losses, counts)


def token_losses(model: Any, ids: Tensor, last: int | None = None) -> Tensor:
    """Negative log-likelihood of the last tokens given those before them, float32, (B, last), nats.

    Logits are made for a few tokens at a time where the model's head can be applied to hidden states by itself.

    Args:
        model: as for :func:`perplexity`.
        ids: (B, L) int64 on the model's device.
        last: number of tokens scored; None: L - 1.
    """
    import torch
    from torch.nn import functional

    count = ids.shape[1] - 1 if last is None else last
    targets = ids[:, -count:]
    hidden = _hidden(model, ids)
    if hidden is None:
        logits = _logits(model, ids, count + 1)[:, :-1]
        return functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    head = model.get_output_embeddings()
    hidden = hidden[:, -count - 1:-1]
    rows = max(1, LOGITS_BYTES // (4 * head.weight.shape[0] * len(ids)))
    out = []
    for start in range(0, count, rows):
        logits = head(hidden[:, start:start + rows]).float()
        out.append(functional.cross_entropy(logits.transpose(1, 2), targets[:, start:start + rows], reduction="none"))
    return torch.cat(out, 1)


def _hidden(model: Any, ids: Tensor) -> Tensor | None:
    """Final hidden states (B, L, C), or None where the logits are more than the head applied to them."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    body = getattr(model, "base_model", None)
    config = getattr(model, "config", None)
    if head is None or body is None or body is model or not hasattr(head, "weight") or config is None:
        return None
    # models that scale or cap their logits after the head; asking them is safer than repeating what they do
    if any(getattr(config, name, None) for name in (
            "final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "mup_width_multiplier",
            "output_multiplier_scale", "dim_model_base")):
        return None
    found: Tensor | None = getattr(body(input_ids=ids, use_cache=False), "last_hidden_state", None)
    return found


def _logits(model: Any, ids: Tensor, last: int) -> Tensor:
    if hasattr(model, "config"):
        out = model(input_ids=ids, use_cache=False, logits_to_keep=last)
    else:
        out = model(ids)
    logits: Tensor = getattr(out, "logits", out)
    return logits[:, -last:]


# ------------------------------------------------------------------------------------------------- retrieval

@dataclasses.dataclass
class PasskeyResult:
    """What :func:`passkey` measured.

    Attributes:
        accuracy: fraction of trials whose whole key was given.
        depths: where the key stood in each trial, 0 (start) to 1 (end).
        correct: 1.0 or 0.0 for each trial.
        digits: fraction of the key's digits that were right in place, for each trial.
    """

    accuracy: float
    depths: list[float]
    correct: list[float]
    digits: list[float]


def passkey(model: Any, tokenizer: Any, context: int, *, trials: int = 5, seed: int = 0, text: str | None = None,
            digits: int = 5, progress: bool | None = None) -> PasskeyResult:
    """How often the model finds a number hidden in a long text.

    Args:
        model, tokenizer: a transformers causal language model.
        context: tokens of the whole prompt, 128 or more.
        trials: keys; the i-th is hidden at depth (i + 0.5) / trials.
        seed: of the keys.
        text: what the number is hidden in; None: :func:`looseleaf_lab.data.prose`.
        digits: length of the key.

    Raises:
        ValueError: a size out of range, or a text too short.
    """
    import torch

    from looseleaf_lab import data

    if context < 128:
        raise ValueError(f"context: expected an integer >= 128, got {context}")
    if trials < 1 or digits < 1:
        raise ValueError(f"passkey: expected trials >= 1 and digits >= 1, got trials={trials}, digits={digits}")
    rng = np.random.default_rng(seed)
    if text is None:
        filler = data.prose_ids(tokenizer, context, "evaluation")[0]
    else:
        filler = data.token_ids(tokenizer, text, context)[0]
    device = next(iter(model.parameters())).device
    found: list[float] = []
    right: list[float] = []
    depths = [(i + 0.5) / trials for i in range(trials)]
    with torch.inference_mode():
        for depth in progress_.track(depths, f"pass key at {context}", show=progress):
            key = "".join(str(d) for d in rng.integers(0, 10, digits))
            needle = data.token_ids(tokenizer, f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n")[0]
            question = data.token_ids(tokenizer, "\n\nWhat is the pass key? The pass key is")[0]
            room = context - len(needle) - len(question)
            place = round(depth * room)
            prompt = torch.cat([filler[:place], needle, filler[place:room], question])[None].to(device)
            # one token more than digits: tokenizers differ in whether the space before the number is a token
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=digits + 1,
                                 do_sample=False, pad_token_id=tokenizer.eos_token_id)
            answer = tokenizer.decode(out[0, prompt.shape[1]:]).strip()
            found.append(float(answer[:digits] == key))
            right.append(sum(a == b for a, b in zip(answer, key)) / digits)
    return PasskeyResult(sum(found) / trials, depths, found, right)


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``exact``; 0 where both are zero."""
    norm = float(exact.double().norm())
    difference = float((output.double() - exact.double()).norm())
    return difference / norm if norm else (0.0 if difference == 0 else math.inf)
