"""Where the prior enters: correlations of the logit lens with it, and what turning a layer down changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from looseleaf import progress as progress_
from looseleaf_prior_distribution.answers import correlation, favoured, lens_scores
from looseleaf_prior_distribution.tasks import PriorTask
from looseleaf_text import LocalModel, LogitLens, decoder_layers, scale_layers


@dataclasses.dataclass
class LayerLikelihoods:
    """What the logit lens shows of one task, layer by layer.

    Attributes:
        gold: (layers, n) log-likelihood of each right answer, nats per token.
        favoured: (layers, n) that of the wrong answer with the highest prior.
        correlation: (layers,) correlation over questions of ``gold`` with the right answers' prior.
        response_correlation: (layers,) the same of the model's own answers with theirs.
    """

    gold: np.ndarray
    favoured: np.ndarray
    correlation: np.ndarray
    response_correlation: np.ndarray


def layer_prior_correlation(values: np.ndarray, prior: Sequence[float]) -> np.ndarray:
    """(layers,) Pearson correlation over questions of a layer's log-likelihoods with log priors.

    Args:
        values: (layers, n) as from :func:`lens_scores`.
        prior: (n,) log prior of the same responses.

    Raises:
        ValueError: not equally many questions, or fewer than two.
    """
    if values.ndim != 2 or values.shape[1] != len(prior) or len(prior) < 2:
        raise ValueError("layer_prior_correlation: expected values (layers, n) and n priors, two or more, got "
                         f"{tuple(values.shape)} and {len(prior)}")
    return np.asarray([correlation(row, prior) for row in values])


def locate(correlations: Sequence[float], count: int) -> list[int]:
    """The ``count`` layers at which the correlation rises most over the layer before, in order of depth.

    The first layer counts with its whole correlation, as nothing comes before it.

    Raises:
        ValueError: more layers asked for than there are.
    """
    if not 1 <= count <= len(correlations):
        raise ValueError(f"count: expected an integer in [1, {len(correlations)}], the number of layers, got {count}")
    rises = np.diff(np.asarray(correlations, dtype=np.float64), prepend=0.0)
    # a stable sort: of equal rises the earlier layer is taken
    return sorted(int(layer) for layer in np.argsort(-rises, kind="stable")[:count])


def observe(model: LocalModel, lens: LogitLens, task: PriorTask, prior: dict[str, float], responses: Sequence[str],
            ) -> LayerLikelihoods:
    """The logit lens on every question of a task.

    Args:
        model: the model and tokenizer.
        lens: the model's lens.
        task: the task.
        prior: answer -> log prior, as from :func:`priors`.
        responses: the model's own answer to each question.
    """
    rights = [i.answer for i in task.instances]
    wrong = favoured(task, prior)
    found = {(n, a): None for names in (rights, wrong, responses) for n, a in enumerate(names)}
    # one pass for all: the model's answer is often the right or the favoured one
    values = lens_scores(model, lens, task.part([task.instances[n] for n, _ in found]), [a for _, a in found])
    column = {pair: k for k, pair in enumerate(found)}
    gold, other, own = (values[:, [column[n, a] for n, a in enumerate(names)]] for names in (rights, wrong, responses))
    return LayerLikelihoods(gold, other, layer_prior_correlation(gold, [prior[a] for a in rights]),
                  layer_prior_correlation(own, [prior[a] for a in responses]))


@dataclasses.dataclass
class ScalingEffects:
    """What turning down each layer's contribution changes; index -1 stands for the model as it is.

    Attributes:
        correlation: layer -> correlation over questions of the right answer's log-likelihood with its prior.
        accuracy: layer -> fraction of questions where the right answer is likelier than each of its alternatives.
    """

    correlation: dict[int, float]
    accuracy: dict[int, float]


def scaling(model: LocalModel, task: PriorTask, prior: dict[str, float], alpha: float, *, alternatives: int = 5,
            part: Literal["attention", "mlp", "both"] = "both", layers: Sequence[int] | None = None,
            progress: bool | None = None) -> ScalingEffects:
    """Multiply what one layer after the other adds to the residual stream by ``alpha``.

    Args:
        model: the model and tokenizer.
        task: the task.
        prior: answer -> log prior of the model as it is.
        alpha: the factor, 0 to 1.
        alternatives: number of wrong answers that the right one is compared with, those with the highest prior.
        part: the attention's contribution, the MLP's, or both.
        layers: which layers; None: all.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: a factor out of range, or no alternatives.
    """
    if not 0 <= alpha <= 1 or alternatives < 1:
        raise ValueError(f"scaling: expected 0 <= alpha <= 1 and alternatives >= 1, got alpha={alpha}, "
                         f"alternatives={alternatives}")
    net: Any = model.model
    ranked = sorted(task.answers, key=lambda a: -prior[a])
    rows = [[i.answer, *[a for a in ranked if a != i.answer][:alternatives]] for i in task.instances]
    prompts = [task.prompt(i) for i in task.instances]
    heads, tails = model.encode_pairs(prompts, [[task.continuation(a) for a in row] for row in rows])
    wanted = [prior[i.answer] for i in task.instances]
    chosen = range(len(decoder_layers(net))) if layers is None else layers
    out = ScalingEffects({}, {})
    for layer in progress_.track([-1, *chosen], "scaling layers", show=progress):
        with scale_layers(net, {} if layer < 0 else {layer: alpha}, part):
            scores = model.score_ids(heads, tails)
        gold = [row[0] / len(tail[0]) for row, tail in zip(scores, tails, strict=True)]
        out.correlation[layer] = correlation(gold, wanted)
        out.accuracy[layer] = float(np.mean([row[0] > max(row[1:]) for row in scores]))
    return out
