"""LayoutPrompter: exemplars like the query, several answers, and the tidiest and most usual of them."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from looseleaf import Budget, Example, Paper, Predictor, Prompt, Task
from looseleaf.fingerprint import content_fingerprint
from looseleaf.plugin import In
from looseleaf.progress import bar
from looseleaf.prompts.optimizer import PromptOptimizer, Search
from looseleaf.resume import SearchState
from looseleaf.tasks import Metric, SetMetric
from looseleaf_layoutprompter.answers import parse
from looseleaf_layoutprompter.layout import (
    BY_POSITION,
    Canvas,
    Layout,
    TaskName,
    alignment,
    box_similarity,
    coverage_similarity,
    draw,
    greatest_likeness,
    label_similarity,
    likeness,
    overlap,
)
from looseleaf_layoutprompter.serializer import LayoutSerializer, Output, check_inputs, layout_example
from looseleaf_text import LanguageModel, LocalModel, Template
from looseleaf_text.testing import ToyLanguageModel

PAPER = Paper(title="LayoutPrompter: Awaken the Design Ability of Large Language Models",
              authors=("Jiawei Lin", "Jiaqi Guo", "Shizhao Sun", "Zijiang James Yang", "Jian-Guang Lou",
                       "Dongmei Zhang"), year=2023, arxiv="2311.06495", venue="NeurIPS",
              summary="layouts from a constraint, by any language model and some hundred examples",
              code="https://github.com/microsoft/LayoutGeneration")
CHUNK = 8
"""Examples that are answered side by side on a server."""


# ------------------------------------------------------------------------------------------------------ exemplars
def similarity(query: Example, candidate: Example, serializer: LayoutSerializer) -> float:
    """How like a query an example with a known layout is, by the measure of the task (section 3.2)."""
    asked, layout, task = query.inputs, candidate.target, serializer.task
    if task in ("gent", "genr"):
        return label_similarity(asked["labels"], layout.labels)
    if task == "gents":
        boxes = box_similarity(asked["labels"], asked["sizes"], layout.labels, layout.array[:, 2:])
        return 0.5 * label_similarity(asked["labels"], layout.labels) + 0.5 * boxes
    if task == "refinement":
        noisy = asked["noisy"]
        boxes = box_similarity(noisy.labels, noisy.array, layout.labels, layout.array)
        return 0.5 * label_similarity(noisy.labels, layout.labels) + 0.5 * boxes
    if task == "completion":
        partial, count = asked["partial"], len(asked["partial"])
        return box_similarity(partial.labels, partial.array, layout.labels[:count], layout.array[:count])
    if task == "content":
        return coverage_similarity(asked["saliency"], candidate.inputs["saliency"], serializer.canvas)
    a, b = (np.asarray(e.inputs["embedding"], dtype=float).reshape(-1) for e in (query, candidate))
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def select(query: Example, pool: Sequence[Example], serializer: LayoutSerializer, k: int = 10, *, seed: int | str = 0,
           retrieve: bool = True) -> list[Example]:
    """The exemplars of a query: the ``k`` most similar of the pool, shuffled.

    Left out are examples with an element that has no width or height in whole pixels, and the query itself.

    Args:
        query: its inputs are read, of the task ``text`` with an ``embedding``.
        pool: examples as :func:`layout_example` makes them.
        serializer: of the task and canvas.
        k: how many.
        seed: of the shuffling.
        retrieve: False takes random ones instead; for comparison.

    Raises:
        ValueError: nothing in the pool can be an exemplar.
    """
    rng = random.Random(f"{seed}")
    usable = [e for e in pool if e.target.pixels(serializer.canvas)[:, 2:].all() and e != query]
    if not usable:
        raise ValueError(f"pool: expected examples whose elements are at least a pixel wide and high, got {len(pool)} "
                         "examples and none of them: give training layouts, or a larger canvas")
    if retrieve:
        usable.sort(key=lambda e: similarity(query, e, serializer), reverse=True)
        chosen = usable[:k]
        rng.shuffle(chosen)
        return chosen
    return rng.sample(usable, min(k, len(usable)))


# --------------------------------------------------------------------------------------------------------- ranking
def rank(layouts: Sequence[Layout], validation: Sequence[Layout] = (),
         weights: Sequence[float] = (0.2, 0.2, 0.6)) -> tuple[list[int], list[float]]:
    """The order of layouts, best first, and the quality of each, lower is better (section 3.3).

    Alignment, overlap and likeness to the most similar validation layout are each scaled to [0, 1] over the layouts (0
    where all are equal) and weighted.

    Args:
        layouts: answers to one query; none to many.
        validation: real layouts; without any the third term is left out.
        weights: of alignment, overlap and unlikeness.
    """
    if not layouts:
        return [], []
    columns = [_scaled([alignment(layout) for layout in layouts]), _scaled([overlap(layout) for layout in layouts])]
    if validation:
        columns.append(1 - _scaled([greatest_likeness(layout, validation) for layout in layouts]))
    quality = sum(weight * column for weight, column in zip(weights, columns, strict=False))
    values = np.asarray(quality).tolist()
    return sorted(range(len(layouts)), key=values.__getitem__), values


def _scaled(values: Sequence[float]) -> np.ndarray:
    # sums in another order differ in their last digits, which must not be blown up to 0 and 1
    numbers = np.asarray(values, dtype=float).round(9)
    span = numbers.max() - numbers.min()
    return (numbers - numbers.min()) / span if span > 0 else np.zeros_like(numbers)


# ---------------------------------------------------------------------------------------------------------- prompt
@dataclasses.dataclass
class GeneratedLayout:
    """What a query gave.

    Attributes:
        layout: the best answer; None where no answer is valid, and :attr:`problems` say why.
        texts: all answers, as generated.
        layouts: of each answer; None where it is not valid.
        problems: of each answer; empty where it is valid.
        order: places of the valid answers, the best first.
        quality: of those, in the same order, lower is better.
    """

    layout: Layout | None
    texts: list[str]
    layouts: list[Layout | None]
    problems: list[str]
    order: list[int]
    quality: list[float]

    def svg(self, canvas: Canvas | None = None) -> str:
        """The valid answers, best first, see :func:`draw`; ValueError where there is none."""
        ranked = [layout for n in self.order if (layout := self.layouts[n]) is not None]
        if not ranked:
            raise ValueError(f"expected a valid answer to draw, got none: {self.problems}")
        return draw(ranked, canvas, titles=[f"{q:.2f}" for q in self.quality])


@dataclasses.dataclass
class LayoutPrompt(Prompt):
    """A prompt that is made anew for each example, and the choice among the answers to it.

    Attributes:
        serializer: how constraints and layouts are written.
        pool: examples that exemplars are taken from, as :func:`layout_example` makes them.
        validation: real layouts that the ranker compares answers with; none: it does without.
        k, samples, temperature, weights, max_chars, max_tokens, chat: see :class:`LayoutPrompter`.
        retrieve: False takes random exemplars; for comparison.
        seed: of shuffling and sampling; exemplars are shuffled by it and the example's inputs.
    """

    serializer: LayoutSerializer
    pool: Sequence[Example]
    validation: Sequence[Layout] = ()
    k: int = 10
    samples: int = 10
    temperature: float = 0.7
    weights: Sequence[float] = (0.2, 0.2, 0.6)
    max_chars: int = 8000
    max_tokens: int = 800
    chat: bool = False
    retrieve: bool = True
    seed: int = 0

    def on(self, model: LanguageModel, *, state_dir: str | os.PathLike[str] | None = None,
           progress: bool | None = False) -> LayoutPredictor:
        """See :meth:`looseleaf.Prompt.on`.

        Args:
            model: of text.
            state_dir: answers are kept there, one folder for each example, model and prompt: the same call goes on
                where it was stopped, and asks nothing again.
            progress: show a progress bar; None: only on a terminal.
        """
        return LayoutPredictor(self, model, state_dir, progress)


class LayoutPredictor(Predictor):
    """A :class:`LayoutPrompt` and a language model."""

    def __init__(self, prompt: LayoutPrompt, model: LanguageModel, state_dir: str | os.PathLike[str] | None = None,
                 progress: bool | None = False) -> None:
        self.prompt, self.model, self.progress = prompt, model, progress
        self.state_dir = None if state_dir is None else Path(state_dir)
        self._chat: Any = None
        self._pool: list[Example] | None = None
        if prompt.chat:
            tokenizer = getattr(model, "tokenizer", None)
            if not isinstance(model, LocalModel):
                raise ValueError("chat: expected a LocalModel, whose tokenizer has a chat template, got "
                                 f"{type(model).__name__}: for a server use EndpointModel(..., api='chat')")
            self._chat = Template("[X][Z]").with_chat(tokenizer).to_prompt()

    def exemplars(self, example: Example) -> list[Example]:
        """Those of ``example``; fewer may fit into its prompt."""
        example, = self._embedded([example])
        return self._select(example)

    def render(self, examples: Sequence[Example]) -> list[str]:
        """The text given to the model for each example."""
        prompt = self.prompt
        texts = [prompt.serializer.prompt(e, self._select(e), prompt.max_chars) for e in self._embedded(examples)]
        return [self._chat.render(Example({"text": text})) for text in texts] if self._chat is not None else texts

    def choose(self, texts: Sequence[str]) -> GeneratedLayout:
        """The best of the answers to one example."""
        own = self.prompt.serializer
        parsed = [parse(text, own.canvas, own.labels, own.output, index=own.index) for text in texts]
        valid = [n for n, answer in enumerate(parsed) if answer.layout is not None]
        order, quality = rank([parsed[n].layout for n in valid],  # type: ignore[misc]
                              self.prompt.validation, self.prompt.weights)
        return GeneratedLayout(parsed[valid[order[0]]].layout if valid else None, list(texts),
                               [answer.layout for answer in parsed], [answer.problem for answer in parsed],
                               [valid[n] for n in order], [quality[n] for n in order])

    def predict(self, examples: Sequence[Example]) -> list[GeneratedLayout]:
        """The best of several answers to each example; :attr:`LayoutPrompt.samples` calls of the model for each."""
        for n, example in enumerate(examples):
            check_inputs(example.inputs, self.prompt.serializer.task, f"example {n}")
        weights = self.model.fingerprint() if self.state_dir is not None else None
        out: list[GeneratedLayout] = []
        size = 1 if isinstance(self.model, LocalModel) else CHUNK
        with bar("layouts", len(examples), self.progress) as progress_bar:
            for begin in range(0, len(examples), size):
                chunk = examples[begin:begin + size]
                out += map(self.choose, self._answers(self.render(chunk), weights))
                progress_bar.update(len(chunk))
        return out

    def _answers(self, prompts: list[str], weights: str | None) -> list[list[str]]:
        """:attr:`LayoutPrompt.samples` answers to each prompt, those on disk among them."""
        wanted, options = self.prompt.samples, {"max_tokens": self.prompt.max_tokens, "stop": ["\n\n"],
                                                "temperature": self.prompt.temperature}
        first = 1000 * self.prompt.seed  # those of two prompts should not overlap
        states = [self._state(text, first, weights) for text in prompts]
        answers = [list((state.load() or {"texts": []})["texts"]) for state in states]
        if isinstance(self.model, LocalModel):  # one batch: each row draws on
            for text, texts, state in zip(prompts, answers, states, strict=True):
                if len(texts) < wanted:
                    texts[:] = self.model.generate([text] * wanted, seed=first, **options)  # type: ignore[arg-type]
                    state.save({"texts": texts})
            return answers
        # on a server the same prompt with the same seed has the same answer, so each sample has a seed of its own
        for sample in range(wanted):
            rows = [n for n, texts in enumerate(answers) if len(texts) == sample]
            texts = self.model.generate([prompts[n] for n in rows], seed=first + sample,
                                        **options) if rows else []  # type: ignore[arg-type]
            for n, text in zip(rows, texts, strict=True):
                answers[n].append(text)
                states[n].save({"texts": answers[n]})
        return answers

    def _state(self, text: str, seed: int, weights: str | None) -> SearchState:
        identity = {"prompt": content_fingerprint(text), "model": self.model.name, "weights": weights, "seed": seed,
                    "samples": self.prompt.samples, "temperature": self.prompt.temperature,
                    "max_tokens": self.prompt.max_tokens}
        folder = None if self.state_dir is None else self.state_dir / content_fingerprint(identity)
        return SearchState(folder, identity)

    def _select(self, example: Example) -> list[Example]:
        prompt = self.prompt
        return select(example, prompt.pool if self._pool is None else self._pool, prompt.serializer, prompt.k,
                      seed=_own_seed(prompt.seed, example), retrieve=prompt.retrieve)

    def _embedded(self, examples: Sequence[Example]) -> list[Example]:
        """With embeddings where the task compares texts: the examples' own, or else the model's."""
        if self.prompt.serializer.task != "text":
            return list(examples)
        if self._pool is None:
            self._pool = self._with_vectors(self.prompt.pool)
        return self._with_vectors(examples)

    def _with_vectors(self, examples: Sequence[Example]) -> list[Example]:
        bare = [n for n, e in enumerate(examples) if e.inputs.get("embedding") is None]
        out = list(examples)
        if bare:
            for n, vector in zip(bare, self.model.embed([examples[n].inputs["text"] for n in bare]), strict=True):
                out[n] = Example({**examples[n].inputs, "embedding": vector}, examples[n].target)
        return out


def _own_seed(seed: int, example: Example) -> str:
    """16 hexadecimal digits: the seed of an example, whichever others are asked with it; no target is read."""
    inputs = {name: value for name, value in example.inputs.items() if name != "embedding"}
    return content_fingerprint([seed, inputs])


def likeness_to_target(prediction: Any, example: Example) -> float:
    """The likeness of a predicted layout to the target; 0 without a valid answer. The metric of layout tasks."""
    layout = prediction if isinstance(prediction, Layout) else prediction.layout
    return 0.0 if layout is None else likeness(layout, example.target)


@dataclasses.dataclass
class LayoutTask(Task):
    """A task whose targets are layouts; two of its examples are the same where their layouts are, too."""

    metric: str | Metric | SetMetric = likeness_to_target

    def key(self, example: Example) -> str:
        """See :meth:`looseleaf.Task.key`: many pages have the same types of elements."""
        return example.fingerprint()


def layout_task(name: str, train: Sequence[Layout], dev: Sequence[Layout] = (), test: Sequence[Layout] = (), *,
                task: TaskName = "gent", seed: int = 0) -> LayoutTask:
    """A task made of layouts alone; those for ``content`` and ``text`` are made of :func:`layout_example`.

    Args:
        name: of the task.
        train: layouts to take exemplars from.
        dev: layouts that answers are compared with by the ranker.
        test: layouts to be made again from their constraints.
        task: see :class:`LayoutSerializer`.
        seed: see :func:`layout_example`; each layout has one of its own.
    """
    def examples(part: str, layouts: Sequence[Layout]) -> list[Example]:
        return [layout_example(layout, task, seed=f"{seed} {part} {n}") for n, layout in enumerate(layouts)]

    return LayoutTask(name, examples("train", train), examples("dev", dev), examples("test", test))


# ------------------------------------------------------------------------------------------------------- optimiser
@dataclasses.dataclass
class LayoutPrompter(PromptOptimizer):
    """Layouts from a constraint, by any language model and some hundred layouts, without training.

    ``optimize`` searches for nothing: it makes the prompt of ``task.train`` (exemplars) and ``task.dev`` (real layouts
    for the ranker), and tries it on a few training examples, each left out of its own exemplars.

    Args:
        task: what layouts are made from: ``gent`` types, ``gents`` types and sizes, ``genr`` types and relations,
            ``completion`` a partial layout, ``refinement`` a noisy one, ``content`` types and salient parts, ``text``.
        k: exemplars.
        samples: answers to each example.
        temperature: of sampling.
        weights: of alignment, overlap and unlikeness to real layouts in the ranker.
        max_chars: longest prompt in characters.
        output: how layouts are written: ``html``, ``seq``, or ``json`` (ours).
        input: how constraints are written.
        index: elements are numbered.
        separator: elements of a sequence are separated by a bar.
        unknown: numbers that are not given are written as ``<unk>``.
        description: of the task, in the prompt; empty: our wording after the paper's.
        width: of the canvas in pixels.
        height: of the canvas in pixels.
        domain: the word for its layouts.
        max_tokens: longest answer; None: 800, for text 1,200.
        chat: the prompt is put into the chat template of a local model's tokenizer; ours.
        trials: training examples that the prompt is tried on; ours.
    """

    paper: ClassVar[Paper] = PAPER
    accepts: ClassVar[type] = LanguageModel

    task: TaskName = "gent"
    k: Annotated[int, In(">= 1")] = 10
    samples: Annotated[int, In(">= 1")] = 10
    temperature: Annotated[float, In(">= 0")] = 0.7
    weights: Annotated[tuple[float, ...], In(">= 0")] = (0.2, 0.2, 0.6)
    max_chars: Annotated[int, In(">= 1")] = 8000
    output: Output = "html"
    input: Literal["seq", "html"] = "seq"
    index: bool = True
    separator: bool = True
    unknown: bool = False
    description: str = ""
    width: Annotated[int, In(">= 1")] = 120
    height: Annotated[int, In(">= 1")] = 160
    domain: str = "document"
    max_tokens: Annotated[int | None, In(">= 1")] = None
    chat: bool = False
    trials: Annotated[int, In(">= 1")] = 4

    def validate(self) -> None:
        """See :meth:`looseleaf.plugin.Plugin.validate`."""
        self.check("weights", len(self.weights) == 3 and sum(self.weights) > 0, "three numbers >= 0, not all 0")

    def prompt(self, task: Task, seed: int = 0) -> LayoutPrompt:
        """The prompt, not tried on anything.

        Raises:
            ValueError: a task of no layouts, of the inputs of another kind of constraint, or with no usable exemplar.
        """
        task.validate()
        for part, examples in (("train", task.train), ("dev", task.dev)):
            for n, example in enumerate(examples):
                self._check_example(f"task {task.name!r}, {part}[{n}]", example, part == "train")
        labels = tuple(sorted({label for e in (*task.train, *task.dev) for label in e.target.labels}))
        serializer = LayoutSerializer(self.task, Canvas(self.width, self.height, self.domain), labels, self.output,
                                      self.input, self.index, self.separator, self.unknown, self.description)
        prompt = LayoutPrompt(
            serializer, list(task.train), [e.target for e in task.dev], self.k, self.samples, self.temperature,
            tuple(self.weights), self.max_chars, self.max_tokens or (1200 if self.task == "text" else 800), self.chat,
            seed=seed)
        first = task.train[0]
        fits = len(serializer.prompt(first, ())) + 2 + len(serializer.exemplar(first))
        if fits > self.max_chars:
            raise ValueError(f"LayoutPrompter.max_chars: expected room for one exemplar, {fits} characters for the "
                             f"first, got {self.max_chars!r}")
        return prompt

    def _check_example(self, where: str, example: Example, exemplar: bool) -> None:
        if not isinstance(example.target, Layout):
            raise ValueError(f"{where}: expected a Layout as the target, got {type(example.target).__name__}: make the "
                             "task of layouts (layout_task)")
        if not exemplar:  # the ranker reads the layout alone
            return
        check_inputs(example.inputs, self.task, where)
        labels = example.inputs.get("labels")
        if labels is not None and self.task not in BY_POSITION and sorted(labels) != list(example.target.labels):
            raise ValueError(f"{where}: expected the target's elements to be those of labels, sorted by name, got "
                             f"{list(labels)} and {list(example.target.labels)}: make examples by layout_example")

    def optimize(self, task: Task, model: LanguageModel, *, budget: Budget | None = None,
                 start: LayoutPrompt | None = None, seed: int = 0, state_dir: str | Path | None = None,
                 progress: bool | None = None) -> LayoutPrompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`.

        Args:
            task: its targets are :class:`Layout`; see :func:`layout_task` and :func:`layout_example`.
            start: a prompt whose serializer, wording included, is taken in place of the one of the parameters.

        Returns:
            A prompt whose ``info["fitness"]`` is the task's mean score, and ``info["valid"]`` the fraction of valid
            answers, on the examples it was tried on.
        """
        self.check_model(model)
        prompt = self.prompt(task, seed)
        if start is not None:
            if not isinstance(start, LayoutPrompt):
                raise ValueError(f"start: expected a LayoutPrompt, got {type(start).__name__}")
            prompt = dataclasses.replace(prompt, serializer=start.serializer)
        search = Search(self, task, model, budget=budget, start=start, seed=seed, state_dir=state_dir,
                        progress=progress)
        tried = random.Random(seed).sample(list(task.train), min(self.trials, len(task.train)))
        with search:
            predictor = prompt.on(search.model)
            for n in search.steps(len(tried)):
                generated, = predictor.predict([tried[n]])
                search.state.setdefault("scores", []).append(task.score(generated, tried[n]))
                search.state.setdefault("valid", []).append(len(generated.order) / self.samples)
        scores, valid = search.state.get("scores", []), search.state.get("valid", [])
        mean = float(np.mean(scores)) if scores else 0.0
        prompt.info = search.info(mean, evaluations=search.done, valid=float(np.mean(valid)) if valid else 0.0,
                                  scores=scores)
        return prompt

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`."""
        return {"task": toy_layout_task, "model": EchoModel, "calls": 40,
                "make": lambda: cls(k=2, samples=3, trials=4, output="seq")}


# ----------------------------------------------------------------------------------------------- for trying it out
class EchoModel(ToyLanguageModel):
    """A made-up model that answers with the layout of one of the exemplars, picked by the seed."""

    name = "echo"

    def generate(self, prompts: list[str], max_tokens: int, stop: list[str] | None = None, temperature: float = 0.0,
                 seed: int = 0) -> list[str]:
        """See :meth:`looseleaf_text.LanguageModel.generate`."""
        super().generate(prompts, max_tokens, stop)  # counts
        out = []
        for prompt in prompts:
            shown = prompt.split("\n\n")[1:-1]
            layout = random.Random(seed).choice(shown) if shown else ""
            begin = min((n for mark in ("<html>", "\n{") if (n := layout.find(mark)) >= 0), default=None)
            out.append(layout.splitlines()[-1] if begin is None and layout else layout[begin or 0:].strip())
        return out


def toy_layout_task(count: int = 8, seed: int = 0) -> LayoutTask:
    """Made-up pages of a title, a text and a figure."""
    rng = random.Random(seed)

    def page() -> Layout:
        left, middle = rng.uniform(0.05, 0.3), rng.uniform(0.3, 0.7)
        return Layout(("title", "text", "figure"), ((left, 0.05, 0.4, 0.1), (left, 0.2, 0.6, middle - 0.25),
                                                    (left, middle, 0.5, 0.25)))

    return layout_task("pages", *([page() for _ in range(count)] for _ in range(3)))
