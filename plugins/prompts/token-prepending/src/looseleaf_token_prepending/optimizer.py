"""TokenPrepending: the plugin, and the search for prompt and layers on a development set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from looseleaf import Budget, Example, Paper, Predictor, Prompt, SetMetric, UnsupportedModelError
from looseleaf.plugin import In
from looseleaf.progress import bar
from looseleaf.prompts.optimizer import Search
from looseleaf_text import LanguageModel, LocalModel, TextOptimizer, TextPrompt, TextTask, decoder_layers
from looseleaf_text.slots import fill
from looseleaf_token_prepending.encoder import SentenceEncoder, Settings, body
from looseleaf_token_prepending.quality import Development, neighbour_accuracy
from looseleaf_token_prepending.templates import only_slot, rename_slot, templates_of, tidy, without_placeholder

FRACTIONS = (1 / 4, 1 / 8, 1 / 3, 1 / 2)
"""Fractions of a model's layers that are tried as ``end_layer``; the first is the default."""


@dataclasses.dataclass
class TokenPrepending(TextOptimizer):
    """Sentence embeddings from a decoder: each layer's sentence embedding stands before the sentence in the next layer.

    A placeholder token is put before the text of a prompt such as PromptEOL's. In the early layers its state is
    replaced by the last token's state of the layer before, so that the text can attend to a summary of all of itself
    in spite of causal attention. The embedding is the last token's state of a late layer, not of the very last
    (paper: section on Token Prepending; layer range and placeholder as in the authors' code).

    :meth:`encoder` makes the embeddings. :meth:`optimize` chooses prompt and layers on the examples of a task first:
    texts with labels (judged by the label of the nearest neighbour) or graded pairs (by Spearman's correlation, see
    :func:`pairs_task`).

    Args:
        prompt: ``prompteol``, ``pretended-cot``, ``knowledge``, ``metaeol``, or a text with the slot {text}, and
            <PST> where the placeholder goes if not right before the text.
        alternatives: further prompts that ``optimize`` tries.
        start_layer: the first layer whose output is prepended to the next one's input, counted from 1.
        end_layer: the last layer whose input is prepended to; above start_layer, or 0 for none. The paper takes 7 or 8
            of 32 [memory], the authors' code 3 to 7. None: a quarter of the layers; ``optimize`` tries several.
        exit_layer: the layer whose output is the embedding; negative counts from the end. The authors' code takes 27 of
            32 for LLaMA2-7B and -2 for others. None: 5 % before the last; ``optimize`` tries the upper half.
        normalize: make every embedding of length 1.
        tidy: quotes and end of the text as in the authors' evaluation: double quotes become single ones, a missing
            full stop is added, a question mark at the end becomes one.
        max_length: maximum tokens of prompt and text together, >= 16; None: the model's context.
        batch_tokens: most positions that are run together; >= 1.
    """

    prompt: str = "prompteol"
    alternatives: tuple[str, ...] = ("pretended-cot", "knowledge")
    start_layer: Annotated[int, In(">= 1")] = 1
    end_layer: Annotated[int | None, In(">= 0")] = None
    exit_layer: int | None = None
    normalize: bool = True
    tidy: bool = True
    max_length: Annotated[int | None, In(">= 16")] = None
    batch_tokens: Annotated[int, In(">= 1")] = 8192
    paper: ClassVar[Paper] = Paper(
        title="Token Prepending: A Training-Free Approach for Eliciting Better Sentence Embeddings from LLMs",
        authors=("Yuchen Fu", "Zifeng Cheng", "Zhiwei Jiang", "Zhonghui Wang", "Yafeng Yin", "Zhengliang Li",
                 "Qing Gu"), year=2025, arxiv="2412.11556", venue="ACL 2025",
        code="https://github.com/fuyuchenIfyw/token_prepending",
        summary="Better sentence embeddings from your own decoder language model, without training.")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: the toy reviews, judged by their nearest neighbours."""
        from looseleaf_text.testing import ToyLanguageModel, toy_task

        def task() -> TextTask:
            return dataclasses.replace(toy_task(generation=True), metric=SetMetric(neighbour_accuracy))

        return {"task": task, "model": ToyLanguageModel}

    def validate(self) -> None:
        """See :meth:`looseleaf.Plugin.validate`."""
        for prompt in (self.prompt, *self.alternatives):
            templates_of(prompt)
        self.check("end_layer", not self.end_layer or self.end_layer > self.start_layer,
                   "None, 0, or an integer above start_layer")
        self.check("exit_layer", self.exit_layer != 0, "None, an integer >= 1, or one below 0 that counts from the end")

    def encoder(self, model: Any, tokenizer: Any, seed: int = 0) -> SentenceEncoder:
        """An encoder of sentences with these parameters.

        Args:
            model: a decoder of transformers, in evaluation mode; not changed.
            tokenizer: its tokenizer.
            seed: of the placeholder's own embedding, which only the first layer reads.

        Raises:
            ValueError: a layer that the model does not have.
            UnsupportedModelError: the model has no stack of decoder layers.
        """
        count = len(decoder_layers(body(model)))
        end = default_ends(count, self.start_layer)[0] if self.end_layer is None else self.end_layer
        return SentenceEncoder(model, tokenizer, Settings(
            templates_of(self.prompt), self.start_layer, end, self.exit_layer or default_exit(count), "last",
            self.normalize, self.tidy, self.max_length, seed), self.batch_tokens)

    def optimize(self, task: TextTask, model: LanguageModel, *, budget: Budget | None = None,  # type: ignore[override]
                 start: TextPrompt | None = None, seed: int = 0, state_dir: str | Path | None = None,
                 progress: bool | None = None) -> EmbeddingPrompt:
        """Choose prompt and layers by the quality of the embeddings of ``task.train`` and ``task.dev`` together.

        On a :class:`looseleaf_text.LocalModel` the layers of ``prompt`` are chosen first (every exit comes from the
        same run), then the alternatives are tried with the same ``end_layer``. A model behind a server has no layers to
        reach into: there the prompts, and the bare text, are compared by what its ``embed`` gives.

        Arguments as for :meth:`looseleaf.PromptOptimizer.optimize`; the one slot of ``start`` takes the text, and it
        comes in the place of ``prompt``. ``seed`` draws the placeholder's embedding.

        Returns:
            The prompt. ``info`` also holds ``measure``, ``examples``, ``settings`` as plain data, and ``explored``, a
            row [prompt, end_layer, exit_layer, fitness] of the best exit for each run. With a budget too small for one
            run, the defaults come back with fitness 0 and no evaluation.

        Raises:
            ValueError: the examples are neither labelled texts nor graded pairs.
            UnsupportedModelError: the model has neither layers nor embeddings.
        """
        self.check_model(model)
        task.validate(model)
        data = Development.of([*task.train, *task.dev])
        begin = self.prompt if start is None else _as_template(start)
        search = Search(self, task, model, budget=budget, start=start, seed=seed, state_dir=state_dir)
        space = (LayerSpace if isinstance(model, LocalModel) else TextSpace)(self, model, search.budget, data, seed)
        runs: dict[str, dict[str, Any]] = search.state.setdefault("runs", {})
        seen: list[Run] = []
        with search, bar("TokenPrepending", None, progress) as progress_bar:
            try:
                for prompt, end in space.candidates(begin, seen):
                    key = f"{end}:{prompt}"
                    if key not in runs:
                        qualities = space.qualities(prompt, end)
                        runs[key] = {"qualities": qualities, "calls": search.budget.used["calls"]}
                        search.save()
                    seen.append(Run(prompt, end, {int(k): v for k, v in runs[key]["qualities"].items()},
                                    runs[key]["calls"]))
                    progress_bar.update()
            except NotImplementedError as error:
                raise UnsupportedModelError(f"{type(model).__name__} ({model.name}) has no embeddings to choose a "
                                            "prompt by: give a LocalModel, or a server with /embeddings") from error
        best = max(seen, key=lambda run: run.fitness, default=None)
        settings = space.settings(begin if best is None else best.prompt, best)
        history: list[list[float]] = []
        for run in seen:
            history.append([run.calls, max(run.fitness, history[-1][1] if history else run.fitness)])
        return EmbeddingPrompt(settings, info=search.info(
            0.0 if best is None else best.fitness, len(seen), measure=data.measure,
            examples=len(task.train) + len(task.dev), history=history,
            settings={**dataclasses.asdict(settings), "templates": list(settings.templates)},
            explored=[[r.prompt, r.end, r.leave, r.fitness] for r in seen]))


@dataclasses.dataclass
class EmbeddingPrompt(Prompt):
    """Prompt and layers that make vectors of texts.

    Attributes:
        settings: how a sentence becomes a vector. A model behind a server has no layers: there only the templates and
            ``tidy`` count.
    """

    settings: Settings

    def on(self, model: LanguageModel) -> EmbeddingPredictor:
        """See :meth:`looseleaf.Prompt.on`."""
        return EmbeddingPredictor(self, model)

    def encoder(self, model: Any, tokenizer: Any, batch_tokens: int = 8192) -> SentenceEncoder:
        """The encoder on a decoder of transformers."""
        return SentenceEncoder(model, tokenizer, self.settings, batch_tokens)

    def render(self, example: Example) -> list[str]:
        """The texts given to a model for an example, one for each template and input, without the placeholder."""
        return [fill(without_placeholder(template), {"text": tidy(text) if self.settings.tidy else text})
                for text in example.inputs.values() for template in self.settings.templates]


class EmbeddingPredictor(Predictor):
    """An :class:`EmbeddingPrompt` and a language model: predicts a vector for a text, (2, hidden) for a pair."""

    def __init__(self, prompt: EmbeddingPrompt, model: LanguageModel) -> None:
        self.prompt, self.model = prompt, model

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """One vector per text, float32 of shape (n, hidden); each text and template is a call."""
        settings, model = self.prompt.settings, self.model
        if not isinstance(model, LocalModel):
            return embed_texts(model, texts, tuple(map(without_placeholder, settings.templates)), settings.tidy)
        return self.prompt.encoder(model.model, model.tokenizer).encode(texts, False)

    def predict(self, examples: Sequence[Example]) -> list[Any]:
        """A vector for each example, or one for each of its texts."""
        texts = [list(e.inputs.values()) for e in examples]
        vectors = iter(self.embed([t for group in texts for t in group]))
        rows = [[next(vectors) for _ in group] for group in texts]
        return [row[0] if len(row) == 1 else np.stack(row) for row in rows]


def embed_texts(model: Any, texts: Sequence[str], templates: Sequence[str], quoted: bool) -> np.ndarray:
    """What ``model.embed`` gives the texts in the templates, mean over templates: (n, hidden).

    Args:
        model: a language model.
        texts: n texts.
        templates: without placeholders.
        quoted: bring the texts into the form of the authors' evaluation first.
    """
    shown = [tidy(t) for t in texts] if quoted else texts
    vectors = model.embed([fill(t, {"text": s}) for s in shown for t in templates])
    mean: np.ndarray = np.asarray(vectors).reshape(len(shown), len(templates), -1).mean(1)
    return mean


@dataclasses.dataclass
class Run:
    """What one run over the texts gave: the quality at each exit layer (0 stands for a model without layers)."""

    prompt: str
    end: int
    qualities: dict[int, float]
    calls: float

    @property
    def leave(self) -> int:
        return max(self.qualities, key=lambda n: (self.qualities[n], -n))

    @property
    def fitness(self) -> float:
        return self.qualities[self.leave]


class SearchSpace:
    """How candidates are measured on a kind of model."""

    def __init__(self, plugin: TokenPrepending, model: Any, budget: Budget, data: Development, seed: int) -> None:
        self.plugin, self.model, self.budget, self.data, self.seed = plugin, model, budget, data, seed

    def candidates(self, begin: str, seen: list[Run]) -> Iterator[tuple[str, int]]:
        """(prompt, end layer) one after the other; ``seen`` grows in between."""
        raise NotImplementedError

    def qualities(self, prompt: str, end: int) -> dict[int, float]:
        """Exit layer -> quality."""
        raise NotImplementedError

    def settings(self, prompt: str, best: Run | None) -> Settings:
        """Settings of the encoder found."""
        raise NotImplementedError


class TextSpace(SearchSpace):
    """Any language model with embeddings: only the text around can be chosen."""

    def candidates(self, begin: str, seen: list[Run]) -> Iterator[tuple[str, int]]:
        for prompt in dict.fromkeys([begin, *self.plugin.alternatives, "{text}"]):
            yield prompt, 0

    def qualities(self, prompt: str, end: int) -> dict[int, float]:
        templates = tuple(map(without_placeholder, templates_of(prompt)))
        return {0: self.data.quality(embed_texts(self.budget.meter(self.model), self.data.texts, templates,
                                                 self.plugin.tidy and prompt != "{text}"))}

    def settings(self, prompt: str, best: Run | None) -> Settings:
        return Settings(tuple(map(without_placeholder, templates_of(prompt))),
                        tidy=self.plugin.tidy and prompt != "{text}")


class LayerSpace(SearchSpace):
    """A local model: prompt and layers can be chosen."""

    def candidates(self, begin: str, seen: list[Run]) -> Iterator[tuple[str, int]]:
        plugin = self.plugin
        count = len(decoder_layers(body(self.model.model)))
        ends = [plugin.end_layer] if plugin.end_layer is not None else [*default_ends(count, plugin.start_layer), 0]
        for end in ends:
            yield begin, end
        chosen = max(seen, key=lambda run: run.fitness).end
        for prompt in dict.fromkeys(plugin.alternatives):
            if prompt != begin:
                yield prompt, chosen

    def qualities(self, prompt: str, end: int) -> dict[int, float]:
        encoder = self._encoder(prompt, end)
        count, fixed = len(encoder.layers), self.plugin.exit_layer
        exits = [encoder.settings.exit_layer] if fixed is not None else list(range(max(1, count // 2), count + 1))
        rows = encoder.rows(self.data.texts)
        tokens = sum(len(row.ids) for row in rows)
        self.budget.spend(calls=len(rows), tokens=tokens)
        # between batches nothing more is booked, but the clock is looked at
        states = encoder.states(self.data.texts, exits, False, self.budget.spend)
        self.model.calls += len(rows)
        self.model.tokens += tokens
        return {n: self.data.quality(state.numpy()) for n, state in zip(exits, states, strict=True)}

    def settings(self, prompt: str, best: Run | None) -> Settings:
        found = self._encoder(prompt, self.plugin.end_layer if best is None else best.end).settings
        return found if best is None else dataclasses.replace(found, exit_layer=best.leave)

    def _encoder(self, prompt: str, end: int | None) -> SentenceEncoder:
        plugin = dataclasses.replace(self.plugin, prompt=prompt, end_layer=end)
        return plugin.encoder(self.model.model, self.model.tokenizer, self.seed)


def default_ends(count: int, start_layer: int = 1) -> list[int]:
    """The end layers tried for a model of ``count`` layers: the default, a quarter, comes first."""
    lowest = start_layer + 1
    return list(dict.fromkeys(min(max(lowest, round(count * fraction)), max(count, lowest))
                              for fraction in (*FRACTIONS, 0)))


def default_exit(count: int) -> int:
    """The default exit of a model of ``count`` layers: 5 % before the last, one layer at least."""
    return max(1, count - max(1, round(count / 20)))


def _as_template(start: TextPrompt) -> str:
    if not isinstance(start, TextPrompt):
        raise ValueError(f"start: expected a TextPrompt with one slot, got a {type(start).__name__}")
    template = start.as_template()
    return rename_slot(template, only_slot(template), "text")
