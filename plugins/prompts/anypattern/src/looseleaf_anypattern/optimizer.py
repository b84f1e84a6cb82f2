"""ImageStacker: the plugin, the prompt of support pairs, and what finds originals with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf import Budget, Example, Paper, Predictor, Prompt, PromptOptimizer, Report, SetMetric, Task
from looseleaf.modes import own_random_state
from looseleaf.plugin import In
from looseleaf.prompts.optimizer import Search
from looseleaf_anypattern.encoder import Pictures, StackedEncoder, encode
from looseleaf_anypattern.patterns import apply
from looseleaf_anypattern.retrieval import CopyIndex, CopyMetric, Match, role_of
from looseleaf_vision import picture_of


class Choice(NamedTuple):
    """A support pair for a query: its pattern, its number in the prompt, and the cosine of their pattern tokens."""

    pattern: str
    pair: int
    similarity: float


@dataclasses.dataclass
class StackPrompt(Prompt):
    """Support pairs with their pattern keys: of each query the most similar pair is stacked onto its channels.

    Attributes:
        replicas, originals: (n, H, W, 3) uint8, of the encoder's size.
        keys: (n, width) fp32 of length 1, pattern tokens of the replicas, each stacked on itself.
        patterns: what each pair is an example of.
        encoder: fingerprint of the encoder, whose keys are of no use to another one.
        top: pairs for each query; the descriptor is the mean of those with each (1 is the paper's; more is ours).
        normalize_factor, normalize_top: of scores, see :func:`looseleaf_anypattern.retrieval.normalized`.
    """

    replicas: Tensor
    originals: Tensor
    keys: Tensor
    patterns: list[str]
    encoder: str
    top: int = 1
    normalize_factor: float = 2.0
    normalize_top: int = 10

    def on(self, model: Any) -> CopyDetector:
        """See :meth:`looseleaf.Prompt.on`; ``model`` is the encoder that made the keys.

        Raises:
            ValueError: another encoder, or the same with other weights.
        """
        own = getattr(model, "fingerprint", None)
        if not callable(own) or own() != self.encoder:
            raise ValueError(f"StackPrompt: expected the encoder that made its keys ({self.encoder}), got "
                             f"{type(model).__name__} with other weights: call optimize with this encoder")
        return CopyDetector(self, model)


class CopyDetector(Predictor):
    """A prompt of support pairs and an encoder: descriptors of pictures, and originals of queries.

    Args:
        prompt: without a pair, queries are stacked on themselves.
        model: the :class:`StackedEncoder`.
    """

    def __init__(self, prompt: StackPrompt, model: Any) -> None:
        self.prompt, self.model = prompt, model

    def predict(self, examples: Sequence[Example]) -> list[Any]:
        """A descriptor (d,) for each: queries with their context, references and background pictures without."""
        alone = [n for n, e in enumerate(examples) if role_of(e) in ("reference", "background")]
        asked = [n for n, e in enumerate(examples) if role_of(e) in ("query", "support")]
        found: dict[int, np.ndarray] = {}
        if alone:
            rows = encode(self.model, [picture_of(examples[n]) for n in alone]).descriptor.numpy()
            found |= dict(zip(alone, rows, strict=True))
        if asked:
            found |= dict(zip(asked, self.describe([picture_of(examples[n]) for n in asked]).numpy(), strict=True))
        return [found[n] for n in range(len(examples))]

    def select(self, images: Pictures, n: int = 10) -> list[list[Choice]]:
        """The support pairs most similar to each query by the pattern token, best first; the first are its context."""
        like = F.normalize(encode(self.model, images).pattern, dim=1) @ self.prompt.keys.T
        best = like.topk(min(n, like.shape[1]), 1)
        return [[Choice(self.prompt.patterns[p], p, s) for p, s in zip(*both, strict=True)]
                for both in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def describe(self, images: Pictures) -> Tensor:
        """Descriptors of queries (n, d), each with the context that :meth:`select` names; two calls for each."""
        if not len(self.prompt.keys):
            return encode(self.model, images).descriptor
        chosen = self.select(images, self.prompt.top)
        rows = [encode(self.model, images, self._pairs([c[rank].pair for c in chosen])).descriptor
                for rank in range(len(chosen[0]))]
        return F.normalize(torch.stack(rows).mean(0), dim=1)

    def search(self, images: Pictures, index: CopyIndex, k: int = 10) -> list[list[Match]]:
        """The references most likely to be the original of each query, best first."""
        return index.search(self.describe(images), k, self.prompt.normalize_factor, self.prompt.normalize_top)

    def report(self, images: Pictures, index: CopyIndex, references: Mapping[Any, Any] | None = None) -> Report:
        """Queries, the pair shown with each, and what was found, as pictures and a table.

        Args:
            images: queries.
            index: of the references.
            references: key -> picture, to show what was found.
        """
        chosen, found = self.select(images, 1), self.search(images, index, 1)
        report = Report("ImageStacker", facts={"queries": len(images), "references": len(index.keys),
                                               "support pairs": len(self.prompt.keys)})
        table = report.table("queries", ["query", "pattern", "similarity", "reference", "score"])
        for n, (choice, match) in enumerate(zip(chosen, found, strict=True)):
            pair = choice[0]
            table.add(n, pair.pattern, pair.similarity, str(match[0].key), match[0].score)
            shown = [self.model.keep([images[n]])[0], *(part[0] for part in self._pairs([pair.pair]))]
            captions = ["query", f"replica, {pair.pattern}", "its original"]
            if references is not None:
                shown, captions = [*shown, self.model.keep([references[match[0].key]])[0]], [*captions, "found"]
            report.image(f"query {n}", shown, captions=captions)
        return report

    def _pairs(self, pairs: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return self.prompt.replicas[list(pairs)].numpy(), self.prompt.originals[list(pairs)].numpy()


@dataclasses.dataclass
class ImageStacker(PromptOptimizer):
    """In-context copy detection: a query is seen beside an example of the edit that made it.

    :meth:`optimize` reads the support pairs of a task, ``Example({"image": replica, "original": original}, pattern)``,
    keeps the pattern token of each replica, and gives a prompt that shows every query the most similar pair. Neither
    the encoder nor the index of references changes. Encoders come from :func:`looseleaf_anypattern.train`.

    Args:
        top: pairs for each query; the paper's 1.
        normalize_factor: of the subtracted similarity to background pictures; the authors' 2, 0 is off.
        normalize_top: background pictures it is the mean of; the authors' 10.
    """

    paper: ClassVar[Paper] = Paper(
        "AnyPattern: Towards In-context Image Copy Detection", ("Wenhao Wang", "Yifan Sun", "Zhentao Tan", "Yi Yang"),
        2026, "2404.13788", "International Journal of Computer Vision", "https://github.com/WangWenhao0716/AnyPattern",
        "a copy detector that copes with a new filter from a few examples of it")
    accepts: ClassVar[type] = StackedEncoder
    top: Annotated[int, In(">= 1")] = 1
    normalize_factor: Annotated[float, In(">= 0")] = 2.0
    normalize_top: Annotated[int, In(">= 1")] = 10

    def optimize(self, task: Task, model: Any, *, budget: Budget | None = None, start: StackPrompt | None = None,
                 seed: int = 0, state_dir: str | Path | None = None, progress: bool | None = None) -> StackPrompt:
        """Encode the support pairs of ``task.train``; see :meth:`looseleaf.PromptOptimizer.optimize`.

        ``info["fitness"]`` is the task's metric on ``task.dev`` where that has queries and references and the budget
        reaches, else the fraction of replicas whose most similar other pair is of the same pattern;
        ``info["measure"]`` says which. Nothing is drawn.

        Args:
            task: see :func:`copy_task`; other examples of ``task.train`` than pairs are ignored.
            model: the encoder.
            start: a prompt of this encoder, whose pairs are kept before those of the task.
            budget, seed, state_dir, progress: as there; one call is one picture encoded.

        Raises:
            ValueError: no support pairs, a pair without a replica or without a pattern, or a start of another encoder.
        """
        self.check_model(model)
        task.validate()
        pairs = support_of(task)
        if start is not None:
            start.on(model)
        search = Search(self, task, model, budget=budget, start=start, seed=seed, state_dir=state_dir,
                        progress=progress)
        step = -(-len(pairs) // 20)  # the state is written at most 20 times
        with search:
            for n in search.steps(-(-len(pairs) // step)):
                replicas = model.keep([picture_of(e) for e in pairs[n * step:(n + 1) * step]])
                found = F.normalize(encode(search.model, replicas).pattern, dim=1)
                search.state.setdefault("keys", []).extend(found.tolist())
        prompt = self._prompt(pairs, search.state.get("keys", []), model, start)
        fitness, measure = same_pattern(prompt.keys, prompt.patterns), "pattern of the nearest other pair"
        if search.stopped == "done" and {"query", "reference"} <= {role_of(e) for e in task.dev}:
            with search:
                fitness, measure = task.evaluate(prompt.on(search.model), "dev").score, "metric on dev"
        prompt.info = search.info(fitness, max(1, len(prompt.keys)), measure=measure, pairs=len(prompt.keys),
                                  patterns=len(set(prompt.patterns)))
        return prompt

    def _prompt(self, pairs: Sequence[Example], keys: list[list[float]], model: Any,
                start: StackPrompt | None) -> StackPrompt:
        read = pairs[:len(keys)]
        height, width = model.preprocess.size
        nothing = np.zeros((0, height, width, 3), np.uint8)
        replicas, originals = (torch.from_numpy(model.keep(pictures) if read else nothing) for pictures in (
            [picture_of(e) for e in read], [e.inputs["original"] for e in read]))
        rows = torch.tensor(keys, dtype=torch.float32).reshape(len(keys), model.width)
        patterns = [str(e.target) for e in read]
        if start is not None:
            replicas, originals = torch.cat([start.replicas, replicas]), torch.cat([start.originals, originals])
            rows, patterns = torch.cat([start.keys, rows]), [*start.patterns, *patterns]
        return StackPrompt(replicas, originals, rows, patterns, model.fingerprint(), self.top, self.normalize_factor,
                           self.normalize_top)

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`."""
        return {"task": toy_copies, "model": toy_encoder}


@dataclasses.dataclass
class CopyTask(Task):
    """A task of copy detection; :func:`copy_task` makes one. Dev and test search the same references."""

    def validate(self) -> None:
        """See :meth:`looseleaf.Task.validate`; and :func:`support_of`."""
        super().validate()
        support_of(self)

    def key(self, example: Example) -> Hashable:
        """See :meth:`looseleaf.Task.key`; what is searched may well be in two parts."""
        return super().key(example) if role_of(example) in ("query", "support") else object()


def support_of(task: Task) -> list[Example]:
    """The support pairs of a task.

    Raises:
        ValueError: none, one without a replica, or one without the name of its pattern.
    """
    pairs = [e for e in task.train if role_of(e) == "support"]
    if not pairs:
        raise ValueError(f"task {task.name!r}: expected support pairs in train, "
                         "Example({'image': replica, 'original': original}, pattern), got "
                         "none: make a replica with the new pattern of any picture you have")
    for n, pair in enumerate(pairs):
        missing = [name for name, there in (
            ("replica", any(pair.inputs.get(k) is not None for k in ("image", "picture"))),
            ("original", pair.inputs["original"] is not None), ("pattern", pair.target is not None)) if not there]
        if missing:
            raise ValueError(f"task {task.name!r}, support pair {n} (pattern {pair.target!r}): expected a replica, its "
                             f"original and the name of the pattern, got no {' and no '.join(missing)}")
    return pairs


def same_pattern(keys: Tensor, patterns: Sequence[str]) -> float:
    """Fraction of pairs whose nearest other pair, by keys of length 1, is of the same pattern; 0 for fewer than 2."""
    if len(keys) < 2:
        return 0.0
    nearest = (keys @ keys.T).fill_diagonal_(-2.0).argmax(1).tolist()
    return sum(patterns[n] == own for n, own in zip(nearest, patterns, strict=True)) / len(patterns)


def copy_task(support: Sequence[tuple[Any, Any, str]], queries: Sequence[tuple[Any, Any]] = (),
              references: Mapping[Any, Any] | None = None, backgrounds: Sequence[Any] = (), *,
              dev: Sequence[tuple[Any, Any]] = (), metric: Literal["muAP", "recall@1", "recall@p90"] = "muAP",
              normalize_factor: float = 2.0, normalize_top: int = 10, name: str = "copies") -> CopyTask:
    """A task of copy detection.

    Args:
        support: (replica, its original, name of the pattern), the examples of edits.
        queries: (picture, key of its original; None: it has none), for the test.
        references: key -> picture, what is searched; part of dev and test alike.
        backgrounds: other pictures, for the normalisation of scores.
        dev: more queries; optional.
        metric, normalize_factor, normalize_top: see :class:`looseleaf_anypattern.retrieval.CopyMetric`.
        name: of the task.

    Raises:
        ValueError: no support; a query whose key is no reference; an original of the support that is a reference or a
            background picture, too, byte by byte.
    """
    references = references or {}
    wanted = [key for _, key in (*queries, *dev) if key is not None]
    unknown = [key for key in wanted if key not in references]
    if unknown:
        raise ValueError(f"queries: expected keys of references, got {unknown[0]!r}: give None for pictures that have "
                         "no original among them")
    searched = [Example({"image": picture, "role": "reference"}, key) for key, picture in references.items()]
    searched += [Example({"image": picture, "role": "background"}) for picture in backgrounds]
    tried, asked = ([*(Example({"image": picture, "role": "query"}, key) for picture, key in part), *searched]
                    if part else [] for part in (dev, queries))
    train = [Example({"image": replica, "original": original}, pattern) for replica, original, pattern in support]
    task = CopyTask(name, train, tried, asked, metric=SetMetric(CopyMetric(metric, normalize_factor, normalize_top)))
    support_of(task)
    known = {Example({"image": picture_of(e)}).fingerprint() for e in searched}
    for n, pair in enumerate(train):
        if Example({"image": pair.inputs["original"]}).fingerprint() in known:
            raise ValueError(f"support[{n}]: expected an original that is neither a reference nor a background "
                             "picture, got one that is: figures would be too high")
    return task


def toy_copies() -> CopyTask:
    """Small made-up pictures, three edits with two examples of each, six references and four background pictures."""
    rng = np.random.default_rng(0)
    pictures = [(rng.random((4, 4, 3)) * 255).astype(np.uint8).repeat(4, 0).repeat(4, 1) for _ in range(16)]
    edits = ("invert", "channel-swap", "pixelate")
    support = [(apply([edit], pictures[2 * n + k], k), pictures[2 * n + k], edit)
               for n, edit in enumerate(edits) for k in range(2)]
    references = {f"r{n}": picture for n, picture in enumerate(pictures[6:12])}
    queries = [(apply([edits[n % 3]], picture, n), key) for n, (key, picture) in enumerate(references.items())]
    return copy_task(support, queries[3:], references, pictures[12:], dev=queries[:3], normalize_top=4)


def toy_encoder() -> StackedEncoder:
    """A tiny untrained encoder of 16 x 16 pictures, the same each time."""
    with own_random_state(0):
        base = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(128, 12))
    return StackedEncoder(base, n_patterns=3, descriptor=8, size=16, init="random").eval()


__all__ = ["Choice", "CopyDetector", "CopyTask", "ImageStacker", "StackPrompt", "copy_task", "same_pattern",
           "support_of", "toy_copies", "toy_encoder"]
