"""One sample, learned plainly and in every other way that the paper and its rivals suggest."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf_text import LocalModel
from looseleaf.pruning.selection import removed
from looseleaf_outlandish.largest import keep_smallest
from looseleaf_outlandish.learning import learn
from looseleaf_outlandish.pruner import IgnoreTopK
from looseleaf_outlandish.sample import Sample
from looseleaf_outlandish.scores import Chances, chances, log_memorisation, log_priming
from looseleaf_outlandish.stones import stepping_stones
from looseleaf_outlandish.texts import HELD_OUT, ORDINARY
from looseleaf_outlandish.updates import Update, of_model

PLAIN, EARLY = "plain", "plain, first presentations"
EACH_STEP, AT_END = "ignore top k, each step", "ignore top k, at the end"
KEEP_TOP, RANDOM = "keep top k only, at the end", "drop a random k, at the end"
STONES = "stepping stones"
STONES_ELSEWHERE = "stepping stones, in the context of the plain text"


@dataclasses.dataclass(frozen=True)
class Setting:
    """How samples are learned; the same for all methods but where a method is what differs.

    Attributes:
        steps: gradient steps, each with the sample.
        early: steps after which plain training is looked at as well.
        lr: learning rate.
        replay: ordinary sentences in each step.
        k: share of the update that is ignored.
        slower: smaller learning rates of the rival, as factors, rising.
        autocast: compute in bfloat16 while learning.
    """

    steps: int = 10
    early: int = 3
    lr: float = 3e-5
    replay: int = 2
    k: float = 0.08
    slower: tuple[float, ...] = (0.25, 0.5)
    autocast: bool = False


@dataclasses.dataclass
class Measured:
    """What was measured for one sample; natural logarithms.

    Attributes:
        sample: what was learned.
        log_p_before: of the keyword's probability in the text before learning; ``log_p_stones``: in the text with
            stepping stones.
        found: method -> (log S_mem, log S_prime).
        ordinary: method -> loss on ordinary sentences that are never learned, nats a token; ``before`` has that of the
            model as it was.
    """

    sample: Sample
    log_p_before: float
    found: dict[str, tuple[float, float]]
    ordinary: dict[str, float]
    log_p_stones: float | None = None


class Experiment:
    """Learns samples with a model and puts its weights back each time.

    Args:
        model, tokenizer: a causal language model with weights in float32, in evaluation mode.
        setting: how samples are learned.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, setting: Setting) -> None:
        self.model, self.tokenizer, self.setting = model, tokenizer, setting
        self.local = LocalModel(model, tokenizer)
        self.start = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.untouched = self.ordinary_loss()

    def measure(self, sample: Sample, seed: int, rivals: bool) -> Measured:
        """Learn ``sample`` plainly and, with ``rivals``, by all other methods; the weights are put back.

        Args:
            sample: what is learned.
            seed: of the replayed sentences, the same for all methods, and of the random entries.
            rivals: False measures plain learning only.
        """
        before = chances(self.local, sample)
        made = Measured(sample, before.log_p, {}, {"before": self.untouched})

        def note(method: str, first: Chances = before, text: Sample = sample) -> None:
            after = chances(self.local, text)
            made.found[method] = log_memorisation(first, after), log_priming(first, after)

        try:
            for step, _ in enumerate(self._learn(sample.text, seed), 1):
                if step == self.setting.early:
                    note(EARLY)
            note(PLAIN)
            made.ordinary[PLAIN] = self.ordinary_loss()
            if rivals:
                self._prune_at_end(note, seed)
                self.put(self.start)
                for _ in self._learn(sample.text, seed, pruner=IgnoreTopK(self.setting.k)):
                    pass
                note(EACH_STEP)
                made.ordinary[EACH_STEP] = self.ordinary_loss()
                for factor in self.setting.slower:
                    self.put(self.start)
                    for _ in self._learn(sample.text, seed, lr=factor * self.setting.lr):
                        pass
                    note(slower(factor))
                self.put(self.start)
                stones = dataclasses.replace(sample, text=stepping_stones(sample.text, sample.keyword))
                first = chances(self.local, stones)
                made.log_p_stones = first.log_p
                for _ in self._learn(stones.text, seed):
                    pass
                note(STONES, first, stones)
                note(STONES_ELSEWHERE)
        finally:
            self.put(self.start)
        return made

    def _prune_at_end(self, note: Callable[[str], None], seed: int) -> None:
        """What ignoring, keeping and dropping at random makes of one and the same finished training."""
        trained = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        IgnoreTopK(self.setting.k, when="end").apply(self.model, self.start)
        note(AT_END)
        for method, choose in ((KEEP_TOP, largest), (RANDOM, others(seed))):
            self.put(trained)
            with torch.no_grad():
                for update in of_model(self.model, self.start):
                    update.keep(choose(update, self.setting.k))
            note(method)

    def _learn(self, text: str, seed: int, *, lr: float | None = None,
               pruner: IgnoreTopK | None = None) -> Iterator[float]:
        wanted = self.setting
        return learn(self.model, self.tokenizer, text, steps=wanted.steps, lr=lr or wanted.lr, ordinary=ORDINARY,
                     replay=wanted.replay, seed=seed, pruner=pruner, autocast=wanted.autocast)

    @torch.no_grad()
    def put(self, state: dict[str, Tensor]) -> None:
        """Put weights back."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state[name])

    def ordinary_loss(self) -> float:
        """Negative log-likelihood of the held-out sentences, nats a token."""
        scores = self.local.score([""] * len(HELD_OUT), [[text] for text in HELD_OUT])
        return -sum(row[0] for row in scores) / sum(map(self.local.count_tokens, HELD_OUT))


def slower(factor: float) -> str:
    """The name of the rival with a smaller learning rate."""
    return f"learning rate x {factor:g}"


def largest(update: Update, k: float) -> Tensor:
    """The rival of ignoring them: keep the largest entries only, as many as would be ignored (as TIES does)."""
    magnitude = update.magnitude()
    return ~keep_smallest([magnitude], removed(k, magnitude.numel()))[0]


def others(seed: int) -> Callable[[Update, float], Tensor]:
    """The rival that drops as many entries anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def choose(update: Update, k: float) -> Tensor:
        drawn = torch.rand(update.after.shape, generator=generator)
        return keep_smallest([drawn], removed(k, drawn.numel()))[0].to(update.after.device)

    return choose


def at_equal_memorisation(points: Sequence[tuple[float, float]], log_mem: float) -> float:
    """log S_prime of a smaller learning rate that memorises as much, by linear interpolation.

    Args:
        points: (log S_mem, log S_prime) at rising learning rates; (0, 0) at rate 0 is added.
        log_mem: the memorisation wanted; beyond the last point that point's priming counts.
    """
    for (m0, p0), (m1, p1) in itertools.pairwise([(0.0, 0.0), *points]):
        if min(m0, m1) <= log_mem <= max(m0, m1):
            return p0 + (p1 - p0) * ((log_mem - m0) / (m1 - m0) if m1 != m0 else 1.0)
    return points[-1][1] if log_mem > 0 else 0.0
