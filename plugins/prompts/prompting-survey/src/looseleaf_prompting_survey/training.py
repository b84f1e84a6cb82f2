"""Training with prompts: five strategies, told apart by which parameters move, and soft prompts through PEFT."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from looseleaf import Budget, Example, Paper, Prompt
from looseleaf.errors import did_you_mean
from looseleaf.files import load_tensors, save_tensors
from looseleaf.modes import evaluating, frozen, with_gradients
from looseleaf.plugin import In
from looseleaf.prompts.optimizer import Search
from looseleaf.resume import StateError
from looseleaf.unwrap import unwrapped
from looseleaf_prompting_survey.optimizers import PAPER
from looseleaf_text import LocalModel, SoftPrompt, TextOptimizer, TextPrompt, TextTask

FORMAT = "looseleaf.soft-prompt-tuning/1"


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
"""Name -> strategy (survey, section 6.2 and table 6)."""


@dataclasses.dataclass
class Tuned:
    """What :func:`tune` made.

    Attributes:
        prompt: to be used with the model from now on; None for promptless fine-tuning, which reads :attr:`head`.
        losses: mean negative log-probability of the right answer (nats per token; a label for ``head``) at each step.
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
        expected, got = ("soft tokens to train", "none") if strategy.prompt_moves else ("no soft tokens", "some")
        raise ValueError(f"soft: expected {expected} for {strategy.name!r}, got {got}")
    return [*(model.parameters() if strategy.model_moves else ()), *([soft] if soft is not None else ())]


def tune(strategy: str, model: LocalModel, task: TextTask, prompt: TextPrompt | SoftPrompt | None = None, *,
         steps: int = 20, lr: float = 1e-3, batch: int = 4, soft_tokens: int = 4, start: Tensor | None = None,
         seed: int = 0) -> Tuned:
    """Train by one of the five strategies, plainly: the reference for what each of them means.

    Where the strategy moves the language model's parameters, ``model`` is changed. Adam, one epoch after another,
    dropout off.

    Args:
        strategy: one of :data:`STRATEGIES`.
        model: local, float32 or wider where it is to be trained.
        task: a classification task; ``task.train`` is learned from.
        prompt: how examples are shown; None: as the task does. Soft tokens of its own are replaced.
        steps: gradient steps, >= 1.
        lr: learning rate.
        batch: examples a step, >= 1.
        soft_tokens: length of a soft prompt, >= 1.
        start: soft tokens to begin with, of shape (tokens, hidden); None: embeddings of tokens drawn at random.
        seed: of the order of examples and of what is drawn.

    Raises:
        ValueError: an unknown strategy, no labels, or numbers below 1.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected {', '.join(STRATEGIES)}, got {strategy!r}."
                         + did_you_mean(strategy, STRATEGIES))
    for name, value in (("steps", steps), ("batch", batch), ("soft_tokens", soft_tokens)):
        if value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
    shown = _shown(task, model, prompt)
    if strategy == "tuning-free prompting":
        return Tuned(shown, [])
    chosen, network = STRATEGIES[strategy], model.model
    order, draw = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    table = unwrapped(network).get_input_embeddings().weight
    soft = None
    if chosen.prompt_moves:
        drawn = torch.randint(0, table.shape[0], (soft_tokens,), generator=draw)
        soft = (table[drawn.to(table.device)] if start is None else start.to(table)).detach().clone().requires_grad_()
    head = None if chosen.prompt else nn.Linear(table.shape[1], len(task.labels or {})).to(table)
    if head is not None:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    trained = movable(chosen, network, soft) + (list(head.parameters()) if head is not None else [])
    losses = []
    with with_gradients(), evaluating(network), frozen(network):
        if chosen.model_moves:
            network.requires_grad_(True)
        optimizer = torch.optim.Adam(trained, lr=lr)
        for examples in batches(task.train, batch, steps, order):
            loss = (answer_loss(model, task, shown, examples, soft) if head is None
                    else _head_loss(model, task, examples, head))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        optimizer.zero_grad()
    if head is not None:
        return Tuned(None, losses, head)
    return Tuned(shown if soft is None else SoftPrompt(shown, soft.detach()), losses)


def _shown(task: TextTask, model: LocalModel, prompt: TextPrompt | SoftPrompt | None) -> TextPrompt:
    """The prompt of text that examples are shown with."""
    task.validate(model)
    if task.labels is None:
        raise ValueError(f"task {task.name!r}: expected labels, whose answers are trained, got none")
    text: Any = prompt.prompt if isinstance(prompt, SoftPrompt) else prompt
    if text is not None and not isinstance(text, TextPrompt):
        raise ValueError(f"prompt: expected a TextPrompt, with or without soft tokens, got a {type(text).__name__}")
    return text or TextPrompt.for_task(task)


def batches(examples: Sequence[Example], size: int, steps: int, generator: torch.Generator) -> Iterator[list[Example]]:
    """``steps`` batches, each epoch in a new order."""
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < min(size, len(examples)):
            queue += torch.randperm(len(examples), generator=generator).tolist()
        yield [examples[n] for n in queue[:size]]
        queue = queue[size:]


def answer_ids(model: LocalModel, task: TextTask, prompt: TextPrompt,
               examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with their right answers, right-padded.

    Returns:
        Ids, mask (1 where no padding is) and targets (-100 everywhere but on the answers): int64 tensors of shape
        (examples, length) on the model's device.
    """
    heads, tails = model.encode_pairs([prompt.render(e) for e in examples], [[task.answer(e)] for e in examples])
    rows = [[*head, *tail[0]] for head, tail in zip(heads, tails, strict=True)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
    for n, (row, head) in enumerate(zip(rows, heads, strict=True)):
        ids[n, :len(row)] = torch.tensor(row)
        mask[n, :len(row)] = 1
        targets[n, len(head):len(row)] = ids[n, len(head):len(row)]
    return ids.to(model.device), mask.to(model.device), targets.to(model.device)


def answer_loss(model: LocalModel, task: TextTask, prompt: TextPrompt, examples: Sequence[Example],
                soft: Tensor | None = None) -> Tensor:
    """Mean negative log-probability (nats per token) of the right answers after the prompts, soft tokens first."""
    ids, _, targets = answer_ids(model, task, prompt, examples)
    embedded: Any = unwrapped(model.model).get_input_embeddings()(ids)
    if soft is not None:
        embedded = torch.cat([soft.expand(len(ids), -1, -1), embedded], dim=1)
        targets = torch.cat([targets.new_full((len(ids), len(soft)), -100), targets], dim=1)
    # Padding is on the right, where no token before it sees it in a causal model: no mask is needed.
    logits = model.model(inputs_embeds=embedded, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())


def _head_loss(model: LocalModel, task: TextTask, examples: Sequence[Example], head: nn.Linear) -> Tensor:
    """Cross-entropy of a classifier on the hidden state of each text's last token; no prompt at all."""
    names = list(task.labels or {})
    rows = [model.tokenize(task.show(e)) for e in examples]
    states = [unwrapped(model.model).base_model(input_ids=torch.tensor([row], device=model.device), use_cache=False)
              .last_hidden_state[0, -1] for row in rows]
    targets = torch.tensor([names.index(str(e.target)) for e in examples], device=model.device)
    return nn.functional.cross_entropy(head(torch.stack(states)), targets)


# -- soft prompts through PEFT ----------------------------------------------------------------------------------------

@dataclasses.dataclass
class SoftPromptTuning(TextOptimizer):
    """Learns a soft prompt for a local model whose weights stay as they are (survey, section 3.3.2).

    The work is done by the package ``peft``: ``pip install 'looseleaf-prompting-survey[peft]'``. It is not needed to
    use the :class:`looseleaf_text.SoftPrompt` that is returned.

    Args:
        method: ``"prompt"``: embeddings before the input (Lester et al. 2021); ``"prefix"``: keys and values in every
            layer (Li and Liang 2021, without their reparametrisation).
        num_virtual_tokens: length of the soft prompt.
        init_text: ``"prompt"``: begin with the embeddings of this text (initialised by a discrete prompt, survey
            section 3.3.2); empty: with those of tokens drawn at random.
        steps: gradient steps.
        lr: learning rate of Adam.
        batch_size: examples a step, each counted as a call.
    """

    method: Literal["prompt", "prefix"] = "prompt"
    num_virtual_tokens: Annotated[int, In(">= 1")] = 8
    init_text: str = ""
    steps: Annotated[int, In(">= 1")] = 100
    lr: Annotated[float, In("> 0")] = 0.01
    batch_size: Annotated[int, In(">= 1")] = 8
    accepts: ClassVar[type] = LocalModel
    paper: ClassVar[Paper] = PAPER

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: a model with random weights, and short reviews."""
        from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
        from looseleaf_text.testing import toy_task

        return {"task": lambda: dataclasses.replace(toy_task(size=6), template="{text}"),
                "model": lambda: LocalModel(tiny_text_llama(), tiny_tokenizer()),
                "make": lambda: cls(num_virtual_tokens=2, steps=12, batch_size=3)}

    def validate(self) -> None:
        """See :meth:`looseleaf.Plugin.validate`."""
        self.check("init_text", isinstance(self.init_text, str) and (not self.init_text or self.method == "prompt"),
                   "a text with method='prompt', an empty one with method='prefix'")

    def optimize(self, task: TextTask, model: LocalModel, *, budget: Budget | None = None,  # type: ignore[override]
                 start: TextPrompt | SoftPrompt | None = None, seed: int = 0, state_dir: str | Path | None = None,
                 progress: bool | None = None) -> SoftPrompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`.

        Args:
            model: a :class:`looseleaf_text.LocalModel`; a server gives no gradients.
            start: the text that examples are shown with, soft tokens of its own left out; None: as the task does.

        Returns:
            A soft prompt, whose ``info`` also holds ``losses`` (nats per token, before each step); ``fitness`` is its
            score on ``task.dev`` (``task.train`` where there is none), and ``evaluations`` the steps made.

        Raises:
            UnsupportedModelError: not a local model.
            ModuleNotFoundError: PEFT is not installed; the message has the pip command.
        """
        self.check_model(model)
        shown = _shown(task, model, start)
        search = Search(self, task, model, budget=budget, start=start, seed=seed, state_dir=state_dir,
                        progress=progress)
        losses: list[float] = search.state.setdefault("losses", [])
        files = [None if state_dir is None else Path(state_dir) / f"soft-{n}.safetensors" for n in (0, 1)]
        queue = batches(task.train, self.batch_size, self.steps, torch.Generator().manual_seed(seed))
        for _ in range(search.done):
            next(queue)  # trained on before the search was stopped
        with evaluating(model.model), frozen(model.model):
            training = _Training(self, search.model, seed)
            if search.done:
                training.load(files[search.done % 2], search.done)
            with search:
                for n in search.steps(self.steps):
                    ids, mask, targets = answer_ids(search.model, task, shown, next(queue))
                    search.budget.spend(calls=len(ids), tokens=int(mask.sum()))
                    losses.append(training.step(ids, mask, targets))
                    # In turns: until the state says that there is one step more, the former file is the right one.
                    training.save(files[(n + 1) % 2], n + 1)
        prompt = SoftPrompt(shown, training.soft())
        rated: dict[str, float] = search.state.setdefault("fitness", {})  # number of steps -> fitness
        steps = str(search.done)
        with search:
            if steps not in rated:
                rated[steps] = task.evaluate(prompt.on(search.model), "dev" if len(task.dev) else "train").score
        prompt.info = search.info(rated.get(steps, 0.0), len(losses), losses=list(losses))
        return prompt


class _Training:
    """PEFT's model around the local one, and its optimiser."""

    def __init__(self, plugin: SoftPromptTuning, local: LocalModel, seed: int) -> None:
        self.plugin, self.network = plugin, local.model
        try:
            import peft
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"soft prompt tuning needs the package {error.name}: "
                                      "pip install 'looseleaf-prompting-survey[peft]'") from error
        ids = local.tokenize(plugin.init_text) if plugin.init_text else []
        if plugin.init_text and not ids:
            raise ValueError(f"SoftPromptTuning.init_text: expected a text with tokens, got {plugin.init_text!r}")
        common: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": plugin.num_virtual_tokens}
        config: Any = peft.PrefixTuningConfig(**common) if plugin.method == "prefix" else peft.PromptTuningConfig(
            **common, prompt_tuning_init="RANDOM")
        with torch.random.fork_rng():  # PEFT draws from the global generator
            torch.manual_seed(seed)
            self.model: Any = peft.get_peft_model(self.network, config)
        self.model.eval()  # dropout stays off
        self.weight = next(p for name, p in self.model.named_parameters() if "prompt_encoder" in name)
        if plugin.method == "prompt":
            table = unwrapped(self.network).get_input_embeddings().weight
            drawn = torch.randint(0, table.shape[0], (plugin.num_virtual_tokens,),
                                  generator=torch.Generator().manual_seed(seed)).tolist()
            chosen = [ids[n % len(ids)] for n in range(plugin.num_virtual_tokens)] if ids else drawn
            with torch.no_grad():
                self.weight.copy_(table[torch.tensor(chosen, device=table.device)])
        self.optimizer = torch.optim.Adam([self.weight], lr=plugin.lr)

    def step(self, ids: Tensor, mask: Tensor, targets: Tensor) -> float:
        """One step of Adam; gives the loss before it."""
        with with_gradients():
            loss = self.model(input_ids=ids, attention_mask=mask, labels=targets).loss
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return float(loss.detach())

    def soft(self) -> Tensor:
        """What was learned, as :attr:`looseleaf_text.SoftPrompt.soft` wants it."""
        weight = self.weight.detach().clone()
        if self.plugin.method == "prompt":
            return weight
        config = unwrapped(self.network).config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        # PEFT: (tokens, layers x (keys, values) x heads x head size)
        return weight.view(len(weight), config.num_hidden_layers, 2, heads, -1).permute(1, 2, 3, 0, 4).contiguous()

    def save(self, path: Path | None, steps: int) -> None:
        """Write the soft prompt and the moments of Adam, atomically."""
        if path is not None:
            moments = self.optimizer.state[self.weight]
            save_tensors(path, {"weight": self.weight, **{k: moments[k] for k in ("exp_avg", "exp_avg_sq")}},
                         {"steps": steps}, format=FORMAT)

    def load(self, path: Path | None, steps: int) -> None:
        """Read what :meth:`save` wrote after ``steps`` steps."""
        assert path is not None
        try:
            tensors, info = load_tensors(path, format=FORMAT)
            if info.get("steps") != steps:
                raise ValueError(f"expected the soft prompt after {steps} steps, got that after {info.get('steps')}")
            with torch.no_grad():
                self.weight.copy_(tensors["weight"])
            self.optimizer.state[self.weight] = {
                "step": torch.tensor(float(steps)), **{k: tensors[k].to(self.weight.device)
                                                       for k in ("exp_avg", "exp_avg_sq")}}
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise StateError(f"the soft prompt {path} cannot be read ({error}): remove the state_dir to begin "
                             "again") from error
