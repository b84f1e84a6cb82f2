"""Small Llamas trained on a levelled PCFG, with metadata and without, on the same documents in the same order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf import progress as progress_
from looseleaf.modes import evaluating, training, with_gradients
from looseleaf_metadata_conditioning.collator import MetadataCollator
from looseleaf_metadata_conditioning.grammar import Document, LevelledPCFG

SCORED = 256
"""Documents that a small model reads at once where nothing is learned."""


def level_names(grammar: LevelledPCFG) -> tuple[str, ...]:
    """The fields that hold j_0 to j_{D-1} of a document."""
    return tuple(f"level {d}" for d in range(grammar.levels))


def grammar_rows(grammar: LevelledPCFG, documents: Sequence[Document]) -> list[dict[str, Any]]:
    """Rows for a collator: ``input_ids``, the end of the text (``grammar.terminals``) included, and the levels."""
    names = level_names(grammar)
    return [{"input_ids": [*text, grammar.terminals], **dict(zip(names, metadata, strict=True))}
            for text, metadata in documents]


def grammar_collator(grammar: LevelledPCFG, depth: int, share: float = 0.5, seed: int = 0) -> MetadataCollator:
    """Prefixes of D tokens: the first ``depth`` levels and masks, or masks alone.

    Behind the terminals come the end of the text, padding, the mask, and a token for each level and rule set.
    """
    first, k = grammar.terminals + 3, grammar.rule_sets
    tokens = {name: {value: first + d * k + value for value in range(k)}
              for d, name in enumerate(level_names(grammar))}
    return MetadataCollator(level_names(grammar), depth, share, mask_token=first - 1, tokens=tokens,
                            pad_token_id=first - 2, seed=seed)


def vocabulary_size(grammar: LevelledPCFG) -> int:
    """Tokens of :func:`grammar_collator`."""
    return grammar.terminals + 3 + grammar.levels * grammar.rule_sets


def small_llama(vocabulary: int, *, hidden: int = 64, layers: int = 3, seed: int = 0) -> nn.Module:
    """A Llama with heads of 16 and rotary positions, random weights from ``seed``; in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden,
                         num_hidden_layers=layers, num_attention_heads=max(1, hidden // 16),
                         num_key_value_heads=max(1, hidden // 16), max_position_embeddings=2048,
                         bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config)
    return model.eval()


@with_gradients()
def train(model: nn.Module, rows: Sequence[Mapping[str, Any]], collator: MetadataCollator, *, batch: int = 64,
          lr: float = 4e-3, cooldown: float = 0.0, label: str = "training",
          progress: bool | None = None) -> list[float]:
    """AdamW through ``rows`` once, in their order; the loss of each step.

    The learning rate rises for a twentieth of the steps, then falls to zero along a cosine. The model is trained where
    its weights are.

    Args:
        model: a causal language model; trained in place.
        rows: see :class:`MetadataCollator`.
        collator: says which documents have metadata.
        batch: documents of a step.
        lr: highest learning rate.
        cooldown: last fraction of the steps, in which no document has metadata (MeCo's remedy).
        label: of the progress bar.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: fewer rows than a batch, or ``cooldown`` outside [0, 1).
    """
    steps = len(rows) // batch
    if steps < 1:
        raise ValueError(f"rows: expected {batch} or more, a batch, got {len(rows)}")
    if not 0 <= cooldown < 1:
        raise ValueError(f"cooldown: expected a number in [0, 1), got {cooldown!r}")
    device, share = next(model.parameters()).device, collator.share
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup))], [warmup])
    losses: list[Tensor] = []
    try:
        with training(model), progress_.bar(label, steps, progress) as progress_bar:
            for step in range(steps):
                collator.share = 0.0 if step >= round(steps * (1 - cooldown)) else share
                tensors = {name: value.to(device) for name, value in collator(rows[step * batch:][:batch]).items()}
                # padding lies behind a document, where a causal model needs no mask
                logits = model(input_ids=tensors["input_ids"]).logits[:, :-1]
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), tensors["labels"][:, 1:].flatten())
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
                progress_bar.update()
    finally:
        collator.share = share
    out: list[float] = torch.stack(losses).tolist()
    return out


@torch.no_grad()
def predictions(model: nn.Module, grammar: LevelledPCFG, documents: Sequence[Document], depth: int) -> Tensor:
    """What a model predicts at each place of a document, log probabilities, float64 (N, T + 1, terminals + 1).

    The end of the text is the last entry, what is behind the end of a document of no meaning. Probability on other
    tokens (masks, metadata) is lost.

    Args:
        model: trained with :func:`grammar_collator`.
        grammar: the grammar.
        documents: at most T terminals long.
        depth: how many levels the model is told of; 0: masks alone.
    """
    collator = grammar_collator(grammar, depth, 1.0)
    device, out = next(model.parameters()).device, []
    width = max(len(text) for text, _ in documents) + 1
    with evaluating(model):
        for first in range(0, len(documents), SCORED):
            ids = collator(grammar_rows(grammar, documents[first:first + SCORED]))["input_ids"].to(device)
            logits = model(input_ids=ids).logits[:, grammar.levels - 1:-1].double().log_softmax(-1)
            part = logits[..., :grammar.terminals + 1].cpu()
            out.append(nn.functional.pad(part, (0, 0, 0, width - part.shape[1])))
    return torch.cat(out)


def excess_loss(model: nn.Module, grammar: LevelledPCFG, documents: Sequence[Document], depth: int,
                exact: Tensor | None = None) -> Tensor:
    """KL(exact || model) of the next token in nats, float64 (N, T + 1); NaN behind the end of a document.

    Args:
        model, grammar, documents, depth: as for :func:`predictions`; the exact prediction knows of the same levels.
        exact: ``grammar.scan(texts).predict([j[:depth] ...])`` where it is at hand.
    """
    if exact is None:
        exact = grammar.scan([text for text, _ in documents]).predict([j[:depth] for _, j in documents])
    ours = predictions(model, grammar, documents, depth)
    kl = torch.where(exact > 0, exact * (exact.clamp_min(1e-300).log() - ours), 0.0).sum(-1)
    lengths = torch.tensor([len(text) for text, _ in documents])
    return kl.masked_fill(torch.arange(kl.shape[1]) > lengths[:, None], torch.nan)


__all__ = ["excess_loss", "grammar_collator", "grammar_rows", "level_names", "predictions", "small_llama", "train",
           "vocabulary_size"]
