"""What the residual stream shows: a linear jump to its end, linear probes of results, and the way it takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from looseleaf import UnsupportedModelError
from looseleaf import progress as progress_
from looseleaf.modes import evaluating
from looseleaf.plugin import In, check_fields
from looseleaf.probes.hooks import first_tensor, uncompiled
from looseleaf.statistics import Interval, auroc, bootstrap
from looseleaf.unwrap import unwrapped
from looseleaf_implicit_reasoning.data import Problem, TooLittleDataError, shared_shape
from looseleaf_text import LocalModel, LogitLens
from looseleaf_text.batching import positions as most_positions
from looseleaf_text.batching import text_config
from looseleaf_text.local import padded

LONGEST, COMPARED = 512, 256
"""Tokens after which a text is cut, and most held-out positions whose likeliest tokens are compared."""
SIGNIFICANT = 0.05
"""Chance, over all layers and positions together, of finding a result that is not there."""


@dataclasses.dataclass
class Stream:
    """The residual stream of the last forward, with its gradients.

    Attributes:
        layers: what the first layer reads and what each layer gives, (B, L, H); L + 1 of them.
        final: what the final norm gives, (B, L, H): the input of the unembedding.
    """

    layers: list[Tensor] = dataclasses.field(default_factory=list)
    final: Tensor | None = None


@contextmanager
def residual_stream(model: nn.Module, lens: LogitLens | None = None) -> Iterator[Stream]:
    """Keep the residual stream of each forward in the ``with`` block; it replaces that of the forward before.

    ``output_hidden_states`` would leave hooks on the model, and its last entry has been normed already.

    Args:
        model: a decoder of transformers, run uncompiled in the block.
        lens: of the model, where its norm has to be named; None: it is found.
    """
    lens = lens or LogitLens(model)
    modules = dict(unwrapped(model).named_modules())
    stream = Stream()

    def begin(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        stream.layers, stream.final = [arguments[0] if arguments else options["hidden_states"]], None

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        stream.layers.append(first_tensor(output))

    def end(module: nn.Module, _: Any, output: Any) -> None:
        stream.final = first_tensor(output)

    with uncompiled(model), ExitStack() as hooks:
        hooks.callback(modules[lens.names[0]].register_forward_pre_hook(begin, with_kwargs=True).remove)
        for name in lens.names:
            hooks.callback(modules[name].register_forward_hook(keep).remove)
        hooks.callback(lens.norm.register_forward_hook(end).remove)
        yield stream


@torch.no_grad()
def states(model: nn.Module, local: LocalModel, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], *,
           lens: LogitLens | None = None, batch: int = 16, progress: bool | None = False,
           logits: bool = False) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The residual stream of each row at some of its positions.

    Yields:
        (layers + 1, P, H) and, of the final norm, (P, H), float32 on the CPU; with ``logits`` also the logits (P, V).
    """
    for at in progress_.track(range(0, len(rows), batch), "states", show=progress):
        part = rows[at:at + batch]
        with evaluating(model), residual_stream(model, lens) as stream:
            ids, mask = padded(part, local.device, left=False)  # on the right, where no padding harms a causal model
            out = model(input_ids=ids, attention_mask=mask, use_cache=False)
        if len(stream.layers) < 2 or stream.final is None:
            raise UnsupportedModelError(f"{type(unwrapped(model)).__name__}: expected its layers and its final norm to "
                                        "be run in a forward, got none of them")
        for n in range(len(part)):
            places = list(positions[at + n])
            yield (torch.stack([h[n, places].float().cpu() for h in stream.layers]),
                   stream.final[n, places].float().cpu(), out.logits[n, places].float().cpu() if logits else None)


# ------------------------------------------------------------------------------------------------------ linear jump
class Jump(NamedTuple):
    """How well the end of the stream is told from each layer, on held-out text; one entry a layer, 0 to L.

    Attributes:
        r2, identity_r2: explained variance of the last layer's output by the map, and by the layer itself.
        agreement, identity_agreement: fraction of positions, at most 256, with the same likeliest token.
        shuffled_agreement: that of a map fitted to the ends of other positions: what frequency alone gives.
        positions: fitted and held-out positions.
    """

    r2: list[float]
    identity_r2: list[float]
    agreement: list[Interval]
    identity_agreement: list[Interval]
    shuffled_agreement: list[Interval]
    positions: tuple[int, int]


@dataclasses.dataclass
class LinearJump:
    """A least-squares map from each layer to the last: how far the computation is linear from there (2303.09435).

    Args:
        tokens: positions in all; 0: six for each dimension of the stream.
        held_out: fraction of the texts that the maps are tried on.
    """

    tokens: Annotated[int, In(">= 0")] = 0
    held_out: Annotated[float, In("(0, 1)")] = 0.25

    def __post_init__(self) -> None:
        check_fields(self)

    def measure(self, model: nn.Module, tokenizer: Any, texts: Sequence[str], *, seed: int = 0,
                progress: bool | None = None) -> Jump:
        """Fit and try the maps; the first position of a text, where many models park their attention, is left out.

        Raises:
            TooLittleDataError: fewer than two texts, or fewer positions to fit than the stream has dimensions.
        """
        local, lens = LocalModel(model, tokenizer), LogitLens(model)
        if len(texts) < 2:
            raise TooLittleDataError(f"texts: expected two or more, some of which are held out, got {len(texts)}")
        limit = min(most_positions(text_config(unwrapped(model))) or LONGEST, LONGEST)
        rows = [row[:limit] for row in begun(local, texts) if len(row) > 1]
        weight: Any = getattr(lens.head, "weight", None)
        wanted = self.tokens or 6 * (0 if weight is None else int(weight.shape[-1]))
        rows = rows[:_enough([len(row) - 1 for row in rows], wanted)]
        split = len(rows) - max(1, round(self.held_out * len(rows)))
        read = [layers for layers, _, _ in states(model, local, rows, [range(1, len(row)) for row in rows], lens=lens,
                                                  progress=progress)]
        train, test = (torch.cat(part, 1).double() for part in (read[:split], read[split:]))
        if train.shape[1] < train.shape[2]:
            raise TooLittleDataError(f"texts: expected {train.shape[2]} positions or more to fit, as the stream has "
                                     f"dimensions, got {train.shape[1]}: give more texts, or raise tokens")
        order = torch.randperm(train.shape[1], generator=torch.Generator().manual_seed(seed))
        dtype, device = next(lens.head.parameters()).dtype, next(lens.head.parameters()).device

        def top(hidden: Tensor) -> Tensor:
            with torch.no_grad():
                return lens(hidden[chosen].to(device, dtype)).argmax(-1).cpu()

        chosen = torch.randperm(test.shape[1], generator=torch.Generator().manual_seed(seed))[:COMPARED]
        end, own = test[-1], top(test[-1])
        spread = float((end - end.mean(0)).square().sum())
        out: dict[str, list[Any]] = {name: [] for name in Jump._fields[:-1]}
        for layer in progress_.track(range(len(train)), "linear maps", show=progress):
            matrix, other = linear_maps(train[layer], train[-1], train[-1][order])
            for name, guess in (("", test[layer] @ matrix), ("identity_", test[layer])):
                out[f"{name}r2"].append(1 - float((guess - end).square().sum()) / spread)
                out[f"{name}agreement"].append(bootstrap((top(guess) == own).double().tolist(), seed))
            out["shuffled_agreement"].append(bootstrap((top(test[layer] @ other) == own).double().tolist(), seed))
        return Jump(**out, positions=(train.shape[1], test.shape[1]))


def linear_maps(inputs: Tensor, *targets: Tensor) -> list[Tensor]:
    """Matrices A, (H, H), that make ``inputs @ A`` as near to each of the targets as can be; all (N, H), float64."""
    solved: Tensor = torch.linalg.lstsq(inputs, torch.cat(targets, 1)).solution
    return list(solved.split([t.shape[1] for t in targets], 1))


def _enough(lengths: Sequence[int], wanted: int) -> int:
    total = 0
    for n, length in enumerate(lengths):
        total += length
        if total >= wanted:
            return max(2, n + 1)
    return len(lengths)


# ------------------------------------------------------------------------------------------------------ linear probes
class StepFinding(NamedTuple):
    """Where each intermediate result can be read off, on problems that the probes have not seen.

    Attributes:
        accuracy: (steps, layers + 1, positions) of the linear probes; entry 0 is what the first layer reads.
        control: the same with random labels, one for each input.
        frequency: (steps,) accuracy of the most frequent result.
        last_word: (steps, positions) accuracy of the most frequent result after the word at the position.
        p: (steps, layers + 1, positions) chance of beating the best of the three controls so clearly by luck, times
            the number of layers and positions.
        problems: on which the probes were fitted, and tried.
    """

    accuracy: np.ndarray
    control: np.ndarray
    frequency: np.ndarray
    last_word: np.ndarray
    p: np.ndarray
    problems: tuple[int, int]

    @property
    def selectivity(self) -> np.ndarray:
        """Accuracy minus that with random labels, as accuracy."""
        return self.accuracy - self.control

    def first_layer(self, step: int, position: int) -> int | None:
        """The first layer whose output shows the result of a step at a position, counted from 0.

        -1: what the first layer reads shows it already. None: no layer shows it.
        """
        found = np.nonzero(self.p[step, :, position] < SIGNIFICANT)[0]
        return int(found[0]) - 1 if len(found) else None


@dataclasses.dataclass
class StepProbe:
    """Linear probes of each intermediate result, by layer and position, with three controls (2412.01113, 2411.15862).

    A result is found where the probe beats all of: a probe of random labels (one for each input, so that what is
    learned by heart is no help), the most frequent result, and the most frequent result given the word that stands
    there.

    Args:
        ridge: of the ridge classifier on standardised features, relative to the mean squared length of an input.
        train: fraction of the problems that the probes are fitted on.
    """

    ridge: Annotated[float, In("> 0")] = 0.1
    train: Annotated[float, In("(0, 1)")] = 0.6

    def __post_init__(self) -> None:
        check_fields(self)

    def measure(self, model: nn.Module, tokenizer: Any, problems: Sequence[Problem], *, seed: int = 0,
                progress: bool | None = None) -> StepFinding:
        """Fit and try the probes; the positions are the last token of each premise, and of the question.

        Raises:
            TooLittleDataError: problems without premises and results, or not as many in each.
        """
        steps = shared_shape(problems)[1]
        local = LocalModel(model, tokenizer)
        rows, positions = zip(*(marked(local, problem) for problem in problems), strict=True)
        read = [layers for layers, _, _ in states(model, local, rows, positions, progress=progress)]
        features = torch.stack(read, 2).double()  # layers, positions, problems, hidden
        words = np.array([[row[p] for p in places] for row, places in zip(rows, positions, strict=True)])
        draw = np.random.default_rng(seed)
        order = draw.permutation(len(problems))
        split = max(1, min(len(problems) - 1, round(self.train * len(problems))))
        fit, try_ = order[:split], order[split:]
        labels = [np.array([p.results[k] for p in problems]) for k in range(steps)]
        random = [_per_input(column, [p.question for p in problems], draw) for column in labels]
        right, chance = self._probes(features, [*labels, *random], fit, try_, progress).split(steps)
        frequency = np.array([[_mode(c[fit])] * len(try_) == c[try_] for c in labels])
        last = np.array([[_by_word(c, words[:, p], fit, try_) for p in range(words.shape[1])] for c in labels])
        hits, blind = right.numpy(), chance.numpy()  # steps, layers, positions, problems
        cells = hits.shape[1] * hits.shape[2]
        p = np.ones(hits.shape[:3])
        for k, layer, place in np.ndindex(*p.shape):
            mine = hits[k, layer, place]
            p[k, layer, place] = min(1.0, cells * max(
                sign_test(mine, other) for other in (blind[k, layer, place], frequency[k], last[k, place])))
        return StepFinding(hits.mean(-1), blind.mean(-1), frequency.mean(-1), last.mean(-1), p,
                           (len(fit), len(try_)))

    def _probes(self, features: Tensor, labels: Sequence[np.ndarray], fit: np.ndarray, try_: np.ndarray,
                progress: bool | None) -> Tensor:
        """Whether each label of the problems to try is told: (labels, layers, positions, problems) float64."""
        classes = [sorted(set(column)) for column in labels]
        targets = [torch.tensor([[float(v == c) for c in known] for v in column[fit]], dtype=torch.float64)
                   for column, known in zip(labels, classes, strict=True)]
        means = [t.mean(0) for t in targets]
        joint = torch.cat([t - m for t, m in zip(targets, means, strict=True)], 1)
        out = torch.zeros(len(labels), *features.shape[:2], len(try_), dtype=torch.float64)
        for layer in progress_.track(range(len(features)), "probes", show=progress):
            for place in range(features.shape[1]):
                x, y = features[layer, place, fit], features[layer, place, try_]
                centre, scale = x.mean(0), x.std(0, correction=0)
                scale = torch.where(scale > 1e-9 * (1 + centre.abs()), scale, math.inf)
                x, y = (x - centre) / scale, (y - centre) / scale
                gram = x @ x.T
                gram += self.ridge * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(x), dtype=x.dtype)
                scores = y @ x.T @ torch.linalg.solve(gram, joint)
                for n, part in enumerate(scores.split([len(c) for c in classes], 1)):
                    guess = (part + means[n]).argmax(1).tolist()
                    out[n, layer, place] = torch.tensor(
                        [float(classes[n][g] == v) for g, v in zip(guess, labels[n][try_], strict=True)],
                        dtype=torch.float64)
        return out


def begun(local: LocalModel, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts with what the tokenizer puts before them, and nothing after."""
    return local.encode_pairs(texts, [[] for _ in texts])[0]


def marked(local: LocalModel, problem: Problem) -> tuple[list[int], list[int]]:
    """Ids of a question, and the places of the last token of each premise and of the question."""
    text, *more = problem.premises
    [ids] = begun(local, [text])
    places = [len(ids) - 1]
    for part in (*(f" {premise}" for premise in more), problem.question[len(" ".join(problem.premises)):]):
        if part.strip():
            ids = [*ids, *local.encode_pairs([text], [[part]])[1][0][0]]
            text += part
            places.append(len(ids) - 1)
    return ids, places


def sign_test(ours: np.ndarray, others: np.ndarray) -> float:
    """Chance of ``ours`` winning so often, or more, of the cases where the two differ, were they as good."""
    wins, losses = int((ours > others).sum()), int((ours < others).sum())
    n = wins + losses
    return sum(math.comb(n, k) for k in range(wins, n + 1)) / 2 ** n


def _per_input(labels: np.ndarray, inputs: Sequence[str], draw: np.random.Generator) -> np.ndarray:
    """A random label for each distinct input, as frequent as the labels are."""
    known = {text: draw.choice(labels) for text in dict.fromkeys(inputs)}
    return np.array([known[text] for text in inputs])


def _mode(values: np.ndarray) -> Any:
    found, counts = np.unique(values, return_counts=True)
    return found[counts.argmax()]


def _by_word(labels: np.ndarray, words: np.ndarray, fit: np.ndarray, try_: np.ndarray) -> np.ndarray:
    known = {word: _mode(labels[fit][words[fit] == word]) for word in set(words[fit].tolist())}
    return np.array([known.get(word, _mode(labels[fit])) == label
                     for word, label in zip(words[try_].tolist(), labels[try_], strict=True)])


# ------------------------------------------------------------------------------------------------ chain of embedding
def chain_of_embedding(hidden: Tensor) -> tuple[float, float]:
    """CoE-R and CoE-C of mean states h_0 to h_L, (L + 1, H) (Wang et al. 2024, section 3).

    Lengths of the steps are relative to that of the whole way, |h_L - h_0|, and angles, in radians, to the angle
    between its ends.

    Raises:
        ValueError: fewer than two states, or a way that ends where it began.
    """
    h = hidden.double()
    if h.dim() != 2 or len(h) < 2:
        raise ValueError(f"hidden: expected (layers + 1, H) with two states or more, got {tuple(hidden.shape)}")
    whole, turn = float((h[-1] - h[0]).norm()), float(_angle(h[-1], h[0]))
    if not whole > 0 or not turn > 0:
        raise ValueError("hidden: expected a way whose last state differs from its first in place and direction, got "
                         f"the distance {whole:g} and the angle {turn:g}")
    m, a = (h[1:] - h[:-1]).norm(dim=-1) / whole, _angle(h[1:], h[:-1]) / turn
    return float(m.mean() - a.mean()), math.hypot(float((m * a.cos()).mean()), float((m * a.sin()).mean()))


def _angle(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(x, y, dim=-1).clamp(-1, 1).arccos()


class Confidence(NamedTuple):
    """What tells right answers from wrong ones.

    Attributes:
        scores: name -> a score for each answer; higher should mean right.
        right: whether each answer is.
        answers: as generated.
    """

    scores: dict[str, list[float]]
    right: list[bool]
    answers: list[str]

    def auroc(self, name: str, seed: int = 0) -> Interval | None:
        """AUROC of a score with its interval over answers; None where all answers are right, or all wrong."""
        values, marks = np.array(self.scores[name]), np.array(self.right)
        if len(set(self.right)) < 2:
            return None

        def statistic(rows: np.ndarray) -> np.ndarray:
            picked = rows.astype(int)
            return np.array([auroc(values[row][marks[row]], values[row][~marks[row]]) if 0 < marks[row].sum() < len(row)
                             else 0.5 for row in picked])

        return bootstrap(range(len(values)), seed, samples=500, statistic=statistic)


@dataclasses.dataclass
class ChainOfEmbedding:
    """Whether an answer is right, from the way of the hidden states alone (2410.13640).

    Args:
        max_tokens: of each answer.
        final_norm: the last state is what the final norm gives, as ``hidden_states`` of transformers has it and the
            authors' code takes it; False: the last layer's output.
    """

    max_tokens: Annotated[int, In(">= 1")] = 8
    final_norm: bool = True

    def __post_init__(self) -> None:
        check_fields(self)

    def measure(self, model: nn.Module, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], *,
                progress: bool | None = None) -> Confidence:
        """Answer greedily, and score each answer by its states and by its probabilities.

        States are those that predict the tokens of the answer. An answer is right if it begins with the right one.

        Args:
            model, tokenizer: a decoder of transformers, and its tokenizer.
            prompts, answers: as many.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            TooLittleDataError: all answers are empty.
        """
        local, lens = LocalModel(model, tokenizer), LogitLens(model)
        with evaluating(model):
            texts = local.generate(list(prompts), self.max_tokens)
        keep = [n for n, text in enumerate(texts) if text]
        if not keep:
            raise TooLittleDataError(f"prompts: expected some that the model answers, got {len(texts)} empty answers")
        heads, tails = local.encode_pairs([prompts[n] for n in keep], [[texts[n]] for n in keep])
        rows = [[*head, *tail[0]] for head, tail in zip(heads, tails, strict=True)]
        positions = [range(len(head) - 1, len(row) - 1) for head, row in zip(heads, rows, strict=True)]
        scores: dict[str, list[float]] = {name: [] for name in ("CoE-R", "CoE-C", "max-prob", "entropy", "perplexity")}
        for (layers, final, logits), tail in zip(states(model, local, rows, positions, lens=lens, logits=True,
                                                        progress=progress), tails, strict=True):
            assert logits is not None
            way = torch.cat([layers[:-1], final[None]]) if self.final_norm else layers
            log_p = torch.log_softmax(logits.double(), -1)
            chosen = log_p.gather(1, torch.tensor(tail[0])[:, None])
            values = (*chain_of_embedding(way.double().mean(1)), log_p.exp().amax(-1).mean(),
                      (log_p.exp() * log_p).sum(-1).mean(), -torch.exp(-chosen.mean()))  # the last two: less is better
            for name, value in zip(scores, values, strict=True):
                scores[name].append(float(cast(Any, value)))
        return Confidence(scores, [is_right(texts[n], answers[n]) for n in keep], [texts[n] for n in keep])


def is_right(text: str, answer: str) -> bool:
    """Whether a text begins with an answer, as a whole word."""
    text = text.lstrip()
    return text.startswith(answer) and not text[len(answer):len(answer) + 1].isalnum()
