"""Prompts made of text, and the base of the methods that search for them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from looseleaf.prompts.optimizer import PromptOptimizer
from looseleaf.prompts.prompt import Prompt
from looseleaf.tasks import Example, Predictor
from looseleaf_text.model import LanguageModel, not_finite
from looseleaf_text.slots import fill, slots, with_prefix
from looseleaf_text.verbalizer import Verbalizer

if TYPE_CHECKING:
    from looseleaf_text.task import TextTask

Labels = Mapping[str, str] | Verbalizer | None


class TextPredictor(Predictor):
    """A text prompt and a language model: answers are scored after the prompt, or generated.

    One call for each example. With a mapping of labels the scores are the log-probabilities of the answers; with a
    :class:`looseleaf_text.Verbalizer` those of the labels.
    """

    def __init__(self, prompt: TextPrompt | ChatPrompt, model: LanguageModel) -> None:
        self.prompt, self.model = prompt, model
        self.classes = class_names(prompt.labels)

    def render(self, examples: Sequence[Example]) -> list[str]:
        """The text given to the model for each example."""
        return [self.prompt.render(e) for e in examples]

    def answer_scores(self, examples: Sequence[Example], answers: Sequence[str]) -> list[list[float]]:
        """Log-probability of each answer in the prompt of each example.

        A causal model gives the likelihood of the answer (and of what follows it), a
        :class:`looseleaf_text.MaskedModel` its pseudo-likelihood.

        Returns:
            (examples, answers) natural logarithms, not normalised.
        """
        befores, rows = self.render(examples), [list(answers)] * len(examples)
        if isinstance(self.prompt, ClozePrompt) and self.prompt.suffix:
            scores = self.model.score_cloze(befores, rows, [self.prompt.render_suffix(e) for e in examples])
        else:
            scores = self.model.score(befores, rows)
        for n, values in enumerate(scores):
            if not all(map(math.isfinite, values)):
                raise not_finite(self.model.name, "scores of answers", values, n, befores[n])
        return scores

    def scores(self, examples: Sequence[Example]) -> list[list[float]]:
        """Log-probability of each label, (examples, labels), in the order of the prompt's labels."""
        labels = self.prompt.labels
        if labels is None:
            raise ValueError(f"{type(self.prompt).__name__}.labels: expected label -> answer, got None: make the "
                             "prompt for a task with labels")
        if isinstance(labels, Verbalizer):
            return labels.log_probs(self.answer_scores(examples, labels.space))
        return self.answer_scores(examples, list(labels.values()))

    def predict(self, examples: Sequence[Example]) -> list[Any]:
        """The likeliest label of each example; without labels the text generated."""
        if self.classes is not None:
            return super().predict(examples)
        return self.model.generate(self.render(examples), self.prompt.max_tokens, list(self.prompt.stop) or None)


@dataclasses.dataclass
class TextPrompt(Prompt):
    """Instruction, demonstrations and the example as one text; :meth:`render` puts an example into it.

    ``text`` with a slot (``{text}`` or another name of the example's inputs) is the whole prompt. Without one it is an
    instruction, and what is rendered is instruction, exemplars, then the example through ``template`` and
    ``answer_prefix``, joined by ``separator``.

    Attributes:
        text: instruction, or whole prompt with slots.
        exemplars: demonstrations, shown with their answers.
        template: how examples are shown.
        answer_prefix: what comes between an example and its answer, on a new line unless it brings white space.
        labels: classification: label -> answer, or a verbalizer; None: answers are generated, and shown as they are.
        separator: what stands between the parts.
        max_tokens: generation: longest answer in tokens.
        stop: generation: texts that end the answer.
    """

    text: str = ""
    exemplars: Sequence[Example] = ()
    template: str = "{text}"
    answer_prefix: str = ""
    labels: Labels = None
    separator: str = "\n\n"
    max_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)

    @classmethod
    def for_task(cls, task: TextTask, text: str = "", exemplars: Sequence[Example] = (), **fields: Any) -> TextPrompt:
        """A prompt with the template, answer prefix, labels and generation limits of ``task``."""
        return cls(**{"text": text, "exemplars": list(exemplars), "template": task.template,
                      "answer_prefix": task.answer_prefix, "labels": task.labels, "max_tokens": task.max_tokens,
                      "stop": tuple(task.stop), **fields})

    def on(self, model: LanguageModel) -> TextPredictor:
        """See :meth:`looseleaf.Prompt.on`."""
        return TextPredictor(self, model)

    def render(self, example: Example) -> str:
        """The text given to the model for ``example``.

        Raises:
            ValueError: the example lacks an input that the template names.
        """
        if any(name in example.inputs for name in slots(self.text)):
            return fill(self.text, example.inputs)
        parts = [self.text] if self.text else []
        parts += [self.demonstration(e) for e in self.exemplars]
        missing = [name for name in slots(self.template) if name not in example.inputs]
        if missing:
            raise ValueError(f"the template {self.template!r}: expected the inputs {slots(self.template)}, got an "
                             f"example with {sorted(example.inputs)}")
        return self.separator.join([*parts, with_prefix(fill(self.template, example.inputs), self.answer_prefix)])

    def as_template(self, names: Iterable[str] | None = None) -> str:
        """The whole prompt as one text with slots: what methods that edit the text of a prompt start from.

        Args:
            names: of the examples' inputs, so that other braces of ``text`` are not taken for slots; None: those of
                ``template``, or any where that is the plain ``{text}``.
        """
        own = set(slots(self.text))
        anything = names is None and self.template == "{text}"
        if own & set(slots(self.template) if names is None else names) or (own and anything):
            return self.text
        parts = [self.text] if self.text else []
        parts += [self.demonstration(e) for e in self.exemplars]
        return self.separator.join([*parts, with_prefix(self.template, self.answer_prefix)])

    def demonstration(self, example: Example) -> str:
        """The example with its answer, as one part of the prompt."""
        answer = _shown_answer(self.labels, example)
        joint = self.answer_prefix
        if answer and joint and not joint[-1].isspace() and not answer[0].isspace():
            answer = " " + answer
        return with_prefix(fill(self.template, example.inputs), joint) + answer


@dataclasses.dataclass
class ClozePrompt(TextPrompt):
    """A text prompt with text after the answer, for which masked models are made.

    Attributes:
        suffix: what follows the answer; slots are filled.
    """

    suffix: str = ""

    def render_suffix(self, example: Example) -> str:
        """The text that follows the answer."""
        return fill(self.suffix, example.inputs)

    def demonstration(self, example: Example) -> str:
        """The example with its answer and what follows it."""
        return super().demonstration(example) + self.render_suffix(example)

    def as_template(self, names: Iterable[str] | None = None) -> str:
        """Not what a prompt with text after the answer has.

        Raises:
            ValueError: always.
        """
        raise ValueError("expected a prompt whose answer comes last, got a ClozePrompt with text after the answer: "
                         "it has no single text; start from text and exemplars")


@dataclasses.dataclass
class ChatPrompt(Prompt):
    """A prompt made of chat messages.

    Attributes:
        messages: ``{"role": ..., "content": ...}``; slots in the contents are filled.
        labels, max_tokens, stop: see :class:`TextPrompt`.
    """

    messages: list[dict[str, str]]
    labels: Labels = None
    max_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)

    def on(self, model: LanguageModel) -> TextPredictor:
        """See :meth:`looseleaf.Prompt.on`."""
        return TextPredictor(self, model)

    def render_messages(self, example: Example) -> list[dict[str, str]]:
        """The messages for ``example``."""
        return [{**m, "content": fill(m["content"], example.inputs)} for m in self.messages]

    def render(self, example: Example) -> str:
        """The messages as ``role: content`` lines, after which the assistant speaks."""
        return "\n".join([*(f"{m['role']}: {m['content']}" for m in self.render_messages(example)), "assistant:"])


@dataclasses.dataclass
class RetrievedPrompt(Prompt):
    """A text prompt whose exemplars are chosen anew for each example: those nearest to it, the nearest last.

    Nearness is the cosine of the model's own embeddings (Liu et al. 2021); an example is never its own demonstration.
    One further call for each example, and one for each of the pool the first time.

    Attributes:
        prompt: how examples are shown; its exemplars are replaced.
        pool: examples to choose from.
        shots: how many are shown.
    """

    prompt: TextPrompt
    pool: Sequence[Example]
    shots: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.shots, int) or not 1 <= self.shots <= len(self.pool):
            raise ValueError(f"RetrievedPrompt.shots: expected an integer in [1, {len(self.pool)}], the size of the "
                             f"pool, got {self.shots!r}")

    def on(self, model: LanguageModel) -> RetrievingPredictor:
        """See :meth:`looseleaf.Prompt.on`."""
        return RetrievingPredictor(self, model)


class RetrievingPredictor(TextPredictor):
    """A :class:`RetrievedPrompt` and a language model; :meth:`resolve` gives the prompt of each example."""

    def __init__(self, prompt: RetrievedPrompt, model: LanguageModel) -> None:
        super().__init__(prompt.prompt, model)
        self.shown, self.pool, self.shots = prompt.prompt, list(prompt.pool), prompt.shots
        self._vectors: Any = None

    def render(self, examples: Sequence[Example]) -> list[str]:
        """See :meth:`TextPredictor.render`; each with its own exemplars."""
        return [p.render(e) for p, e in zip(self.resolve(examples), examples, strict=True)]

    def resolve(self, examples: Sequence[Example]) -> list[TextPrompt]:
        """The prompt of each example."""
        import numpy as np

        if self._vectors is None:
            self._vectors = self._embed(self.pool)
        out = []
        for example, cosines in zip(examples, self._embed(examples) @ self._vectors.T, strict=True):
            order = [n for n in np.argsort(-cosines, kind="stable") if self.pool[n].inputs != example.inputs]
            out.append(dataclasses.replace(self.shown, exemplars=[self.pool[n] for n in reversed(order[:self.shots])]))
        return out

    def _embed(self, examples: Sequence[Example]) -> Any:
        import numpy as np

        vectors = self.model.embed([fill(self.shown.template, e.inputs) for e in examples])
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


@dataclasses.dataclass
class TextOptimizer(PromptOptimizer):
    """A prompt optimiser for language models; the conformance kit gives it a toy model and a toy task of text."""

    accepts: ClassVar[type] = LanguageModel

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`."""
        from looseleaf_text.testing import ToyLanguageModel, toy_task

        return {"task": toy_task, "model": ToyLanguageModel}


def class_names(labels: Labels) -> list[str] | None:
    """The names of the labels, in order; None where there are none."""
    return None if labels is None else labels.labels if isinstance(labels, Verbalizer) else list(labels)


def _shown_answer(labels: Labels, example: Example) -> str:
    if labels is None:
        return "" if example.target is None else str(example.target)
    target = str(example.target)
    if isinstance(labels, Verbalizer):
        return labels.answers[target][0] if target in labels.answers else target
    return labels.get(target, target)
