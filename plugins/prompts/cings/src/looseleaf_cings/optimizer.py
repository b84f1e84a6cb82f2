"""CInGS: the prompt with a context at the beginning of the assistant's turn, and the adapter that heeds it."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from looseleaf import Budget, Example, Paper, Prompt, PromptOptimizer, UnsupportedModelError
from looseleaf.modes import own_random_state, training, with_gradients
from looseleaf.plugin import In
from looseleaf.progress import bar
from looseleaf.prompts.optimizer import Search
from looseleaf.resume import StateError
from looseleaf_cings.features import Arm, Rows
from looseleaf_text import LanguageModel, LocalModel, TextTask
from looseleaf_text.prompts import Labels, TextPredictor
from looseleaf_text.slots import fill, slots

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FITNESS = 64
"""Training examples that fitness is measured on where a task has no dev examples (ours)."""


@dataclasses.dataclass
class GroundedPrompt(Prompt):
    """An instruction, a slot for the context where the model was trained to read it, and the adapter for that.

    An example without the input ``context`` is answered from the instruction alone. The adapter is in the model only
    while the prompt is used, and is saved with the prompt: ``prompt.json`` and ``prompt.safetensors``.

    Attributes:
        template: the instruction, with slots of the example's inputs.
        context: name of the input that holds the context.
        placement, separator, max_length, context_keep, chat_template: see :class:`Rows`.
        labels, max_tokens, stop: see :class:`looseleaf_text.TextPrompt`.
        adapter: weights under PEFT's names; empty: none, the model as it is.
        adapter_config: of :class:`peft.LoraConfig`.
    """

    template: str = "{instruction}"
    context: str = "context"
    placement: Literal["assistant", "user"] = "assistant"
    separator: str = "\n"
    labels: Labels = None
    max_tokens: int = 32
    stop: tuple[str, ...] = ()
    max_length: int = 2048
    context_keep: Literal["head", "tail"] = "head"
    chat_template: str | None = None
    adapter: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    adapter_config: dict[str, Any] = dataclasses.field(default_factory=dict)

    def on(self, model: LanguageModel) -> GroundedPredictor:
        """See :meth:`looseleaf.Prompt.on`.

        Args:
            model: a :class:`looseleaf_text.LocalModel`, or one with :func:`context_aware` decoding.

        Raises:
            UnsupportedModelError: a server: merge the adapter, or serve the folder of :meth:`save_adapter` there.
        """
        return GroundedPredictor(self, model)

    def rows(self, tokenizer: Any, arm: Arm = "context") -> Rows:
        """What makes rows, and the text before the response, in the form of this prompt."""
        return Rows(tokenizer, arm, self.placement, self.separator, self.max_length, self.context_keep,
                    self.chat_template)

    def save_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapter as PEFT, TRL and servers read it: ``PeftModel.from_pretrained(model, folder)``.

        Raises:
            ValueError: there is none.
        """
        if not self.adapter:
            raise ValueError("save_adapter: expected a prompt with an adapter, got one without")
        import peft

        peft.LoraConfig(**self.adapter_config).save_pretrained(os.fspath(folder))
        save_file({name: t.contiguous() for name, t in self.adapter.items()}, Path(folder) / WEIGHTS, {"format": "pt"})

    @classmethod
    def from_adapter(cls, folder: str | os.PathLike[str], **fields: Any) -> GroundedPrompt:
        """A prompt with an adapter trained elsewhere, by :class:`CInGSTrainer`, TRL or any other trainer.

        Args:
            folder: what ``PeftModel.save_pretrained`` wrote; a LoRA.
            fields: of the prompt.

        Raises:
            ValueError: no such folder, or an adapter of another kind.
        """
        path = Path(folder)
        missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
        if missing:
            raise ValueError(f"{path}: expected a folder of PEFT with {CONFIG} and {WEIGHTS}, got none of {missing[0]}")
        import peft

        config: Any = peft.PeftConfig.from_pretrained(str(path))
        if not isinstance(config, peft.LoraConfig):
            raise ValueError(f"{path}: expected a LoRA, got {config.peft_type}")
        names = config.target_modules
        return cls(adapter=load_file(path / WEIGHTS), **fields, adapter_config={
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": config.r, "lora_alpha": config.lora_alpha,
            "use_rslora": config.use_rslora, "use_dora": config.use_dora, "bias": config.bias,
            "target_modules": names if isinstance(names, str) or names is None else sorted(names)})


class GroundedPredictor(TextPredictor):
    """A :class:`GroundedPrompt` and a local model."""

    def __init__(self, prompt: GroundedPrompt, model: LanguageModel) -> None:
        from looseleaf_cings.decoding import ContextAware

        if not isinstance(model, (LocalModel, ContextAware)):
            raise UnsupportedModelError(
                f"a grounded prompt: expected a LocalModel or context_aware(LocalModel), got {type(model).__name__}: "
                "write the adapter with save_adapter(folder), let the server load it, and give it "
                "prompt.rows(tokenizer).text(instruction, context)")
        super().__init__(prompt, model)  # type: ignore[arg-type]
        self.grounded = prompt
        self.aware = model if isinstance(model, ContextAware) else None
        self.local: LocalModel = model.local if isinstance(model, ContextAware) else model
        self._rows = prompt.rows(self.local.tokenizer)

    def render(self, examples: Sequence[Example]) -> list[str]:
        """The text before each answer."""
        return [self._text(e, e.inputs.get(self.grounded.context)) for e in examples]

    def _text(self, example: Example, context: str | None) -> str:
        missing = [name for name in slots(self.grounded.template) if name not in example.inputs]
        if missing:
            raise ValueError(f"the template {self.grounded.template!r}: expected the inputs "
                             f"{slots(self.grounded.template)}, got an example with {sorted(example.inputs)}")
        return self._rows.text(fill(self.grounded.template, example.inputs), context, reserve=self.grounded.max_tokens)

    def scores(self, examples: Sequence[Example]) -> list[list[float]]:
        """Log-probability of each label; with context-aware decoding ``(1 + alpha)`` times those with the context less
        ``alpha`` times those without (ours, for answers of several tokens)."""
        with self._adapter():
            found = super().scores(examples)
            if self.aware and self.aware.alpha:
                alpha = self.aware.alpha
                bare = super().scores([Example({k: v for k, v in e.inputs.items() if k != self.grounded.context})
                                       for e in examples])
                found = [[(1 + alpha) * a - alpha * b for a, b in zip(*rows, strict=True)]
                         for rows in zip(found, bare, strict=True)]
        return found

    def predict(self, examples: Sequence[Example]) -> list[Any]:
        """The likeliest label of each example; without labels the answers generated."""
        if self.classes is not None:
            return super().predict(examples)
        texts = self.render(examples)
        with self._adapter():
            if self.aware:
                bare = [self._text(e, None) for e in examples]
                return self.aware.generate_pairs(texts, bare, self.grounded.max_tokens, list(self.grounded.stop))
            return self.model.generate(texts, self.grounded.max_tokens, list(self.grounded.stop) or None)

    def perplexity(self, texts: Sequence[str]) -> float:
        """Of plain texts, without any template: the adapter's price for ordinary prose."""
        rows = [row for row in (self.local.tokenize(t) for t in texts) if len(row) > 1]
        if not rows:
            raise ValueError("perplexity: expected texts of two tokens or more, got none")
        with self._adapter():
            found = self.local.score_ids([row[:1] for row in rows], [[row[1:]] for row in rows])
        return math.exp(-sum(row[0] for row in found) / sum(len(row) - 1 for row in rows))

    def _adapter(self) -> Any:
        if not self.grounded.adapter:
            return torch.no_grad()
        from looseleaf_cings.trainer import adapter_in

        return adapter_in(self.local.model, self.grounded.adapter_config, self.grounded.adapter)


@dataclasses.dataclass
class CInGS(PromptOptimizer):
    """Fine-tunes a model to answer from the text it is given, by hiding that text from the loss.

    The context stands at the beginning of the response. The model attends to it, but is not trained to say it, so what
    it learns is to answer from what it reads instead of from memory (section 3 of the paper).

    :meth:`optimize` trains a LoRA adapter on ``task.train`` and leaves the model as it is. To train all weights, or
    with a set-up of your own, give :class:`Rows` to any trainer; see :class:`CInGSTrainer`.

    Args:
        arm: ``context`` is the method; ``no_mask`` and ``no_context`` are the paper's baselines, see :class:`Rows`.
        placement: of the context: the assistant's turn as in the paper, or the user's.
        separator: between the context and what follows (ours).
        max_length: most tokens of a row; contexts are cut, never responses.
        context_keep: which end of a context that is too long is kept.
        context: name of the input that holds the context.
        epochs: of training; the authors' commands say 3.
        steps: of the optimiser, in place of ``epochs``.
        batch_size: rows of a step; the authors' commands say 128.
        micro_batch_size: rows that are run together; the authors' commands say 16.
        learning_rate: AdamW's at the beginning, falling to zero on a line. The paper's is not known: 1e-4 is usual for
            LoRA [memory].
        lora_rank: the paper's is not known: 16 is usual [memory].
        lora_alpha: scale of the adapter times its rank (ours).
        layers: fraction of the layers, from the top, that have the adapter (ours).
        chat_template: instead of the tokenizer's own.
    """

    arm: Arm = "context"
    placement: Literal["assistant", "user"] = "assistant"
    separator: str = "\n"
    max_length: Annotated[int, In(">= 8")] = 2048
    context_keep: Literal["head", "tail"] = "head"
    context: str = "context"
    epochs: Annotated[int, In(">= 1")] = 3
    steps: Annotated[int | None, In(">= 1")] = None
    batch_size: Annotated[int, In(">= 1")] = 128
    micro_batch_size: Annotated[int, In(">= 1")] = 16
    learning_rate: Annotated[float, In("> 0")] = 1e-4
    lora_rank: Annotated[int, In(">= 1")] = 16
    lora_alpha: Annotated[float, In("> 0")] = 32.0
    layers: Annotated[float, In("(0, 1]")] = 1.0
    chat_template: str | None = None
    accepts: ClassVar[type] = LocalModel
    paper: ClassVar[Paper] = Paper(
        title="Context-Informed Grounding Supervision",
        authors=("Hyunji Lee", "Seunghyun Yoon", "Yunjae Won", "Hanseok Oh", "Geewook Kim", "Trung Bui",
                 "Franck Dernoncourt", "Elias Stengel-Eskin", "Mohit Bansal", "Minjoon Seo"),
        year=2025, arxiv="2506.15480", code="https://github.com/kaistAI/CINGS",
        summary="Fine-tuning that makes a language model answer from the text it is given instead of from memory.")

    def validate(self) -> None:
        """``no_mask`` needs the assistant's turn; micro batches must make up a batch."""
        self.check("arm", self.arm != "no_mask" or self.placement == "assistant",
                   "'context' or 'no_context' with placement='user'")
        small = min(self.micro_batch_size, self.batch_size)
        self.check("batch_size", self.batch_size % small == 0, f"a multiple of micro_batch_size={small}")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: a tiny model that learns to copy."""
        from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer

        def model() -> LocalModel:
            tokenizer = tiny_tokenizer()
            tokenizer.chat_template = ("{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}"
                                       "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
                                       "{% if add_generation_prompt %}a:{% endif %}")
            return LocalModel(tiny_text_llama(), tokenizer)

        def task() -> TextTask:
            def some(start: int) -> list[Example]:
                return [Example({"question": f"{n}?", "context": f"It is {'abcd'[n % 4]}."}, "abcd"[n % 4])
                        for n in range(start, start + 8)]

            return TextTask("copying", some(0), some(8), some(16), template="{question}", metric="contains",
                            max_tokens=3)

        return {"task": task, "model": model, "calls": 200, "make": lambda: cls(
            steps=8, batch_size=4, learning_rate=0.02, lora_rank=4)}

    def optimize(self, task: TextTask, model: LanguageModel, *, budget: Budget | None = None,
                 start: GroundedPrompt | None = None, seed: int = 0, state_dir: str | Path | None = None,
                 progress: bool | None = None) -> GroundedPrompt:
        """Train the adapter. See :meth:`looseleaf.PromptOptimizer.optimize`.

        Args:
            task: its template is the instruction; examples have the input :attr:`context` and their target is the
                response, or a label whose answer is.
            model: a :class:`looseleaf_text.LocalModel` whose tokenizer has a chat template.
            budget: a row that is trained on is a call.
            start: a prompt whose adapter is trained on.
            seed: of the adapter's first weights and of the order of the examples.
            state_dir: checkpoints of the trainer go there, too.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: a bad task; an example without context or response, named by its row.
            UnsupportedModelError: the model is not local, or has no layers of Linear modules.
        """
        import peft

        from looseleaf_cings.trainer import ADAPTER, adapter_in, lora_config
        from looseleaf_cings.training import Training, draw

        if isinstance(task, TextTask):
            task.validate()
        self.check_model(model)
        if start is not None and not isinstance(start, GroundedPrompt):
            raise ValueError(f"start: expected None or a GroundedPrompt, got {type(start).__name__}")
        local: Any = model
        labels = None if task.labels is None else {k: v.strip() for k, v in task.labels.items()}
        prompt = GroundedPrompt(task.template, self.context, self.placement, self.separator, labels, task.max_tokens,
                                tuple(task.stop), self.max_length, self.context_keep, self.chat_template)
        rows = prompt.rows(local.tokenizer, self.arm).all(
            {"instruction": fill(task.template, e.inputs), "context": e.inputs.get(self.context),
             "response": task.answer(e).strip()} for e in task.train)
        search = Search(self, task, model, budget=budget, start=start, seed=seed, state_dir=state_dir,
                        progress=progress)
        config = dict(start.adapter_config) if start and start.adapter else lora_config(
            local.model, self.lora_rank, self.lora_alpha, self.layers)
        tensors = start.adapter if start and start.adapter else None
        losses: list[float] = search.state.setdefault("losses", [])
        rated: dict[str, float] = search.state.setdefault("fitness", {})  # number of steps -> fitness
        with own_random_state(seed), adapter_in(local.model, config, tensors) as wrapped, training(wrapped), \
                with_gradients(), tempfile.TemporaryDirectory() as scratch:
            if tensors is None:
                draw(wrapped, seed)
            folder = Path(state_dir) / "checkpoints" if state_dir is not None else None
            trainer = Training(search, wrapped, rows, folder, scratch, steps=self.steps, epochs=self.epochs,
                               batch_size=self.batch_size, micro_batch_size=self.micro_batch_size,
                               learning_rate=self.learning_rate)
            with bar("CInGS", trainer.total, progress) as progress_bar:
                progress_bar.update(search.done)
                trainer.progress_bar = progress_bar
                with search:
                    if search.done < trainer.total:
                        trainer.run()
                if search.done and search.stopped == "done" and len(losses) < search.done:
                    raise StateError(f"{state_dir}: expected the losses of {search.done} steps, got {len(losses)}")
            if search.done == trainer.total and not trainer.trained:  # finished by an earlier call
                trainer.load()
            prompt.adapter = {name: t.detach().cpu().clone() for name, t in
                              peft.get_peft_model_state_dict(wrapped, adapter_name=ADAPTER).items()}
        prompt.adapter_config = config
        steps = str(search.done)
        with search:
            if steps not in rated:
                part: Any = "dev" if len(task.dev) else task.in_turn(task.train, FITNESS)
                rated[steps] = task.evaluate(prompt.on(search.model), part).score
        prompt.info = search.info(rated.get(steps, 0.0), max(1, len(losses)), losses=list(losses), arm=self.arm)
        return prompt
