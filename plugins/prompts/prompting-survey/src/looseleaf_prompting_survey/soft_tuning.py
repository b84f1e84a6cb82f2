"""Fixed-LM prompt tuning through PEFT: soft tokens (prompt tuning) or keys and values (prefix tuning)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from looseleaf import Budget, BudgetExhausted, Paper, PromptOptimizer
from looseleaf_text import LanguageModel, LocalModel, Prompt, Task
from looseleaf.errors import UnsupportedModelError
from looseleaf.progress import bar
from looseleaf.budget import reason
from looseleaf_text.model import MeteredModel
from looseleaf.resume import SearchState
from looseleaf_prompting_survey.paper import PAPER
from looseleaf_prompting_survey.strategies import answer_ids, batches

SAVE_EVERY = 10
"""Steps between two states on disk."""


@dataclasses.dataclass
class SoftPromptTuning(PromptOptimizer):
    """Learns a soft prompt for a local model whose weights stay as they are (survey, section 3.3.2).

    The work is done by the package ``peft``: ``pip install 'looseleaf-prompting-survey[peft]'``. What is learned goes
    into :attr:`looseleaf_text.Prompt.soft`, which ``Task.evaluate`` heeds; PEFT is not needed to use it.

    Args:
        method: ``"prompt"``: embeddings before the input (Lester et al. 2021); ``"prefix"``: keys and values in every
            layer (Li and Liang 2021, without their reparametrisation).
        num_virtual_tokens: length of the soft prompt; from 1.
        init_text: ``"prompt"``: begin with the embeddings of this text (initialised by a discrete prompt, survey
            section 3.3.2); empty: with those of tokens drawn at random.
        steps: gradient steps; from 1.
        lr: learning rate of Adam; above 0.
        batch_size: examples a step, each counted as a call; from 1.
    """

    method: Literal["prompt", "prefix"] = "prompt"
    num_virtual_tokens: int = 8
    init_text: str = ""
    steps: int = 100
    lr: float = 0.01
    batch_size: int = 8
    paper: ClassVar[Paper] = PAPER

    def validate(self) -> None:
        """Raise ValueError for a parameter out of range."""
        self.check("method", self.method in ("prompt", "prefix"), "'prompt' or 'prefix'")
        for name in ("num_virtual_tokens", "steps", "batch_size"):
            value = getattr(self, name)
            self.check(name, isinstance(value, int) and value >= 1, "a whole number from 1")
        self.check("lr", 0 < self.lr < 1e3, "a number above 0")
        self.check("init_text", isinstance(self.init_text, str) and (not self.init_text or self.method == "prompt"),
                   "a text, for method='prompt' only")

    def optimize(self, task: Task, model: LanguageModel, budget: Budget | None = None, *,
                 start: Prompt | None = None, seed: int = 0,
                 state_dir: str | Path | None = None, progress: bool | None = None) -> Prompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`.

        Args:
            model: a :class:`looseleaf_text.LocalModel`; gradients cannot be had from a server.
            start: the text that examples are shown with; None: as the task does.

        Returns:
            A prompt with ``soft``, whose ``info`` also holds ``losses``; ``fitness`` is its accuracy on ``task.dev``
            (``task.train`` where there is none), and ``evaluations`` the steps made.

        Raises:
            UnsupportedModelError: not a local model.
            ModuleNotFoundError: PEFT is not installed; the message has the pip command.
        """
        local = model.model if isinstance(model, MeteredModel) else model
        if not isinstance(local, LocalModel):
            raise UnsupportedModelError(f"soft prompts are learned by gradients, which a {type(model).__name__} does "
                                        "not give: use a LocalModel, or TemplateSearch, which needs none")
        task.validate(model)
        if task.labels is None:
            raise ValueError(f"task {task.name!r} has no labels: soft prompts are learned for classification here")
        budget = budget or Budget()
        shown = dataclasses.replace(start or Prompt.for_task(task), soft=None)
        training = _Training(self, local, seed)
        state = SearchState(state_dir, self.identity(task, model, start, seed))
        folder = None if state_dir is None else Path(state_dir)
        saved = state.load()
        losses: list[float] = []
        if saved is not None:
            losses = list(saved["losses"])
            budget.restore(saved["used"])
            if saved["file"] and folder is not None:
                training.load(folder / saved["file"], len(losses))
        stopped = "done"
        shuffle = torch.Generator().manual_seed(seed)

        def save() -> None:
            name = f"step-{len(losses)}.safetensors"
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                training.save(folder / name)
            state.save({"losses": losses, "file": name, "used": budget.used})
            for old in [] if folder is None else folder.glob("step-*.safetensors"):
                if old.name != name:
                    old.unlink()

        with bar(type(self).__name__, self.steps, progress) as moving, training:
            for n, examples in enumerate(batches(task.train, self.batch_size, self.steps, shuffle)):
                if n < len(losses):
                    continue  # done before the search was stopped
                ids, mask, targets = answer_ids(local, task, shown, examples)
                try:
                    budget.spend(calls=len(examples), tokens=int(mask.sum()))
                except BudgetExhausted as end:
                    stopped = reason(end)
                    break
                losses.append(training.step(ids, mask, targets))
                moving.update()
                if len(losses) % SAVE_EVERY == 0:
                    save()
        save()
        made = dataclasses.replace(shown, soft=training.soft())
        fitness = 0.0
        try:
            fitness = task.evaluate(made, MeteredModel(local, budget), list(task.dev) or list(task.train)).score
        except BudgetExhausted as end:
            stopped = reason(end)
        made.info = {"fitness": fitness, "evaluations": len(losses), "stopped": stopped, "losses": losses}
        return made


class _Training:
    """PEFT's model around the local one, for as long as the ``with`` block lasts, and its optimiser."""

    def __init__(self, plugin: SoftPromptTuning, local: LocalModel, seed: int) -> None:
        self.plugin, self.local = plugin, local
        network = local.model
        self.trainable = [(p, p.requires_grad) for p in network.parameters()]
        try:
            import peft
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"soft prompt tuning needs the package {error.name}: "
                                      "pip install 'looseleaf-prompting-survey[peft]'") from error
        ids = local.tokenize(plugin.init_text) if plugin.init_text else []
        if plugin.init_text and not ids:
            raise ValueError(f"init_text={plugin.init_text!r} has no tokens under this tokenizer: give a text")
        common: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": plugin.num_virtual_tokens}
        config: Any = peft.PrefixTuningConfig(**common) if plugin.method == "prefix" else peft.PromptTuningConfig(
            **common, prompt_tuning_init="RANDOM")
        with torch.random.fork_rng():  # PEFT draws from the global generator
            torch.manual_seed(seed)
            self.model: Any = peft.get_peft_model(network, config)
        self.model.eval()  # dropout stays off
        self.weight = next(p for name, p in self.model.named_parameters() if "prompt_encoder" in name)
        if plugin.method == "prompt":
            table = network.get_input_embeddings().weight
            drawn = torch.randint(0, table.shape[0], (plugin.num_virtual_tokens,),
                                  generator=torch.Generator().manual_seed(seed)).tolist()
            chosen = [ids[n % len(ids)] for n in range(plugin.num_virtual_tokens)] if ids else drawn
            with torch.no_grad():
                self.weight.copy_(table[torch.tensor(chosen, device=table.device)])
        self.optimizer = torch.optim.Adam([self.weight], lr=plugin.lr)
        self._release()

    def _release(self) -> None:
        """Undo what PEFT did to the model's own parameters."""
        for p, grad in self.trainable:
            p.requires_grad_(grad)

    def __enter__(self) -> _Training:
        for p, _ in self.trainable:
            p.requires_grad_(False)
        return self

    def __exit__(self, *exception: object) -> None:
        self._release()

    def step(self, ids: Tensor, mask: Tensor, targets: Tensor) -> float:
        """One step of Adam; gives the loss before it."""
        loss = self.model(input_ids=ids, attention_mask=mask, labels=targets).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def soft(self) -> Tensor:
        """What was learned, as :attr:`looseleaf_text.Prompt.soft` wants it."""
        weight = self.weight.detach().clone()
        if self.plugin.method == "prompt":
            return weight
        config = self.local.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        layers = config.num_hidden_layers
        # PEFT: (tokens, layers x (keys, values) x heads x head size)
        return weight.view(len(weight), layers, 2, heads, -1).permute(1, 2, 3, 0, 4).contiguous()

    def save(self, path: Path) -> None:
        """Write the soft prompt and the moments of Adam, whole or not at all."""
        from safetensors.torch import save_file

        moments = self.optimizer.state.get(self.weight, {})
        tensors = {"weight": self.weight.detach().contiguous(),
                   **{k: moments[k].contiguous() for k in ("exp_avg", "exp_avg_sq") if k in moments}}
        part = path.with_suffix(".part")
        save_file(tensors, str(part))
        part.replace(path)

    def load(self, path: Path, steps: int) -> None:
        """Read what :meth:`save` wrote after ``steps`` steps."""
        from looseleaf.resume import StateError

        try:
            from safetensors.torch import load_file

            tensors = load_file(str(path))
            with torch.no_grad():
                self.weight.copy_(tensors["weight"])
        except Exception as error:
            raise StateError(f"the soft prompt {path} cannot be read ({type(error).__name__}: {error}): remove the "
                             "state_dir to begin again") from error
        if steps:
            self.optimizer.state[self.weight] = {
                "step": torch.tensor(float(steps)), "exp_avg": tensors["exp_avg"].to(self.weight.device),
                "exp_avg_sq": tensors["exp_avg_sq"].to(self.weight.device)}
