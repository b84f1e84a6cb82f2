"""Five strategies of training with prompts, told apart by which parameters move (survey, section 6.2 and table 6)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf_text import Example, LocalModel, Prompt, Task
from looseleaf.errors import did_you_mean


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Which parameters a strategy trains.

    Attributes:
        name: as in the survey.
        prompt: a text prompt is used.
        model_moves: the language model's parameters are trained.
        prompt_moves: parameters of the prompt (soft tokens) exist and are trained.
        examples: methods that work so.
    """

    name: str
    prompt: bool
    model_moves: bool
    prompt_moves: bool
    examples: tuple[str, ...]


STRATEGIES: dict[str, Strategy] = {s.name: s for s in (
    Strategy("promptless fine-tuning", False, True, False, ("BERT", "RoBERTa")),
    Strategy("tuning-free prompting", True, False, False, ("GPT-3", "LAMA", "AutoPrompt")),
    Strategy("fixed-LM prompt tuning", True, False, True, ("Prefix-Tuning", "Prompt-Tuning", "WARP")),
    Strategy("fixed-prompt LM tuning", True, True, False, ("PET-TC", "PET-Gen", "LM-BFF")),
    Strategy("prompt+LM tuning", True, True, True, ("PADA", "P-Tuning", "PTR")),
)}
"""Name -> strategy."""


@dataclasses.dataclass
class Tuned:
    """What :func:`tune` made.

    Attributes:
        prompt: to be used with the model from now on; None for promptless fine-tuning, which reads :attr:`head`.
        losses: mean negative log-probability of the right answer (nats a token; a label for ``head``) at each step.
        head: promptless fine-tuning: the classifier on the last token's hidden state.
    """

    prompt: Prompt | None
    losses: list[float]
    head: nn.Linear | None = None


def movable(strategy: Strategy, model: nn.Module, soft: Tensor | None = None) -> list[Tensor]:
    """The parameters a strategy trains: the model's, the prompt's, both or none.

    Raises:
        ValueError: the strategy trains a prompt and there is none, or the other way round.
    """
    if strategy.prompt_moves != (soft is not None):
        raise ValueError(f"{strategy.name!r} {'needs' if strategy.prompt_moves else 'has no'} soft tokens to train")
    return [*(model.parameters() if strategy.model_moves else ()), *([soft] if soft is not None else ())]


def tune(strategy: str, model: LocalModel, task: Task, prompt: Prompt | None = None, *, steps: int = 20,
         lr: float = 1e-3, batch: int = 4, soft_tokens: int = 4, start: Tensor | None = None, seed: int = 0) -> Tuned:
    """Train by one of the five strategies, plainly: the reference for what each of them means.

    Where the strategy moves the language model's parameters, ``model`` is changed. Adam, one epoch after another.

    Args:
        strategy: one of :data:`STRATEGIES`.
        model: local, float32 or wider where it is to be trained.
        task: a classification task; ``task.train`` is learned from.
        prompt: how examples are shown; None: as the task does. Its own soft tokens are replaced.
        steps: gradient steps; from 1.
        lr: learning rate.
        batch: examples a step.
        soft_tokens: length of a soft prompt.
        start: soft tokens to begin with, of shape (tokens, hidden); None: embeddings of tokens drawn at random.
        seed: of the order of examples and of what is drawn.

    Raises:
        ValueError: an unknown strategy, no labels, or numbers below 1.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}: allowed are {', '.join(STRATEGIES)}."
                         + did_you_mean(strategy, STRATEGIES))
    if min(steps, batch, soft_tokens) < 1:
        raise ValueError(f"tune(steps={steps}, batch={batch}, soft_tokens={soft_tokens}): allowed are numbers from 1")
    task.validate(model)
    if task.labels is None:
        raise ValueError(f"task {task.name!r} has no labels: the strategies are shown on classification")
    chosen = STRATEGIES[strategy]
    order, draw = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    shown = dataclasses.replace(prompt or Prompt.for_task(task), soft=None)
    if strategy == "tuning-free prompting":
        return Tuned(shown, [])
    network = model.model
    table = network.get_input_embeddings().weight
    soft = None
    if chosen.prompt_moves:
        drawn = torch.randint(0, table.shape[0], (soft_tokens,), generator=draw)
        soft = (table[drawn.to(table.device)] if start is None else start.to(table)).detach().clone().requires_grad_()
    head = None if chosen.prompt else nn.Linear(table.shape[1], len(task.labels)).to(table)
    if head is not None:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    moving = movable(chosen, network, soft) + (list(head.parameters()) if head is not None else [])
    before = [(p, p.requires_grad) for p in network.parameters()]
    losses = []
    try:
        for p, _ in before:
            p.requires_grad_(chosen.model_moves)
        optimizer = torch.optim.Adam(moving, lr=lr)
        for examples in batches(task.train, batch, steps, order):
            loss = (answer_loss(model, task, shown, examples, soft) if head is None
                    else _head_loss(model, task, examples, head))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    finally:
        for p, grad in before:
            p.requires_grad_(grad)
            p.grad = None
    if head is not None:
        return Tuned(None, losses, head)
    return Tuned(dataclasses.replace(shown, soft=None if soft is None else soft.detach()), losses)


def batches(examples: Sequence[Example], size: int, steps: int, generator: torch.Generator) -> Iterator[list[Example]]:
    """``steps`` batches, each epoch in a new order."""
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < min(size, len(examples)):
            queue += torch.randperm(len(examples), generator=generator).tolist()
        yield [examples[n] for n in queue[:size]]
        queue = queue[size:]


def answer_ids(model: LocalModel, task: Task, prompt: Prompt,
               examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with their right answers, right-padded.

    Returns:
        Ids, mask (1 where no padding is) and targets (-100 everywhere but on the answers): int64 tensors of shape
        (examples, length) on the model's device.
    """
    heads, tails = model.encode_pairs([prompt.render(e) for e in examples], [[task.answer(e)] for e in examples])
    rows = [[*head, *tail[0]] for head, tail in zip(heads, tails, strict=True)]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
    for n, (row, head) in enumerate(zip(rows, heads, strict=True)):
        ids[n, :len(row)] = torch.tensor(row)
        mask[n, :len(row)] = 1
        targets[n, len(head):len(row)] = ids[n, len(head):len(row)]
    return ids.to(model.device), mask.to(model.device), targets.to(model.device)


def answer_loss(model: LocalModel, task: Task, prompt: Prompt, examples: Sequence[Example],
                soft: Tensor | None = None) -> Tensor:
    """Mean negative log-probability of the right answers' tokens after the prompts, soft tokens first."""
    ids, _, targets = answer_ids(model, task, prompt, examples)
    embedded: Any = model.model.get_input_embeddings()(ids)
    if soft is not None:
        embedded = torch.cat([soft.expand(len(ids), -1, -1), embedded], dim=1)
        targets = torch.cat([targets.new_full((len(ids), len(soft)), -100), targets], dim=1)
    # Padding is on the right, where no token before it sees it in a causal model: no mask is needed.
    logits = model.model(inputs_embeds=embedded, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())


def _head_loss(model: LocalModel, task: Task, examples: Sequence[Example], head: nn.Linear) -> Tensor:
    """Cross-entropy of a classifier on the hidden state of each text's last token; no prompt at all."""
    names = list(task.labels or {})
    rows = [model.tokenize(task.show(e)) for e in examples]
    states = [model.model.base_model(input_ids=torch.tensor([row], device=model.device), use_cache=False)
              .last_hidden_state[0, -1] for row in rows]
    golds = torch.tensor([names.index(str(e.label)) for e in examples], device=model.device)
    return nn.functional.cross_entropy(head(torch.stack(states)), golds)
