"""EASE: the search for one ordered set of exemplars, and its instruction, that serves all queries."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch

from looseleaf import Budget, BudgetExhausted, Paper
from looseleaf.budget import reason
from looseleaf.plugin import In
from looseleaf_ease.bandit import NeuralUCB
from looseleaf_ease.search import Arm, Search, draw, generator, sets_of
from looseleaf_ease.transport import closest
from looseleaf_text import LanguageModel, TextOptimizer, TextPrompt, TextTask
from looseleaf_text.encoders import Choice

PAPER = Paper(
    title="Prompt Optimization with EASE? Efficient Ordering-aware Automated Selection of Exemplars",
    authors=("Zhaoxuan Wu", "Xiaoqiang Lin", "Zhongxiang Dai", "Wenyang Hu", "Yao Shu", "See-Kiong Ng",
             "Patrick Jaillet", "Bryan Kian Hsiang Low"), year=2024, arxiv="2405.16122", venue="NeurIPS 2024",
    code="https://github.com/ZhaoxuanWu/EASE-Prompt-Optimization",
    summary="Finds which demonstrations, in which order, make the best prompt; nothing is retrieved at test time.")

INITIAL_FRACTION = 40 / 165
"""Of all evaluations, how many are random at first, in the paper's runs."""
KEEP = 50
"""Arms embedded in each round: what one batch of the authors' code keeps. It takes 20 such batches a round; one lets
a round with MiniLM take seconds without a GPU."""


@dataclasses.dataclass
class EASE(TextOptimizer):
    """Chooses the demonstrations of a prompt, their order and, if wanted, its instruction with a neural bandit.

    An arm is an ordered set of ``k`` training examples (with an instruction). Random arms are scored first; then, in
    each round, a small network is trained to predict scores from embeddings of the whole prompt, in which order
    shows; ``domain`` arms are drawn, those whose exemplars are nearest to the validation examples by optimal
    transport are embedded, and the one with the highest upper confidence bound is scored. The best arm scored is
    returned; equal scores are decided by the mean log-probability of the right labels. [paper, section on the
    method, and the authors' code]

    Scores are the task's metric on ``task.dev``; exemplars come from ``task.train``. Given a ``start``, its text is
    the first instruction and its exemplars, if any, are the first arm.

    Args:
        k: exemplars in the prompt; >= 1, and at most the number of different training examples.
        total_iterations: the search ends after this many evaluations; >= 1.
        n_init: random evaluations at the beginning, from 1 to ``total_iterations``, all of which is Best-of-N; None:
            the paper's 40 of 165, or the same fraction of what ``total_iterations`` or the budget's calls allow.
        nu: weight of exploration, inside the root of the bound; >= 0; 0 is greedy.
        lam: regularisation of the network and of the bound; > 0.
        domain: arms drawn in each round; >= 1.
        keep: arms of a round that are embedded and compared; >= 1. None: 50, or as many as there are validation
            examples where ``model`` embeds, since each is a call then.
        ot: keep the arms nearest by optimal transport; False keeps the first drawn.
        hidden: width of the network's three hidden layers; >= 1.
        train_steps: training steps of the network in each round; >= 1.
        encoder: what embeds prompts. "minilm": the sentence encoder of the extra looseleaf-ease[minilm];
            "model": the language model's own ``embed``, each text a call; "auto": MiniLM where it is installed, else
            the model; any name of sentence-transformers; or a function from texts to vectors.
        pool: at most this many training examples to choose from, labels taking turns; >= 1.
        validation: at most this many dev examples to score on, labels taking turns; >= 1.
        instructions: candidate instructions, beside none at all or the start's.
        propose: how many more instructions the model writes itself, one call each; >= 0.
        target: the search ends when a score reaches it; > 0. For a metric of your own that goes beyond 1.
    """

    k: Annotated[int, In(">= 1")] = 5
    total_iterations: Annotated[int, In(">= 1")] = 165
    n_init: Annotated[int | None, In(">= 1")] = None
    nu: Annotated[float, In(">= 0")] = 0.01
    lam: Annotated[float, In("> 0")] = 0.1
    domain: Annotated[int, In(">= 1")] = 10000
    keep: Annotated[int | None, In(">= 1")] = None
    ot: bool = True
    hidden: Annotated[int, In(">= 1")] = 100
    train_steps: Annotated[int, In(">= 1")] = 1000
    encoder: Choice = "auto"
    pool: Annotated[int, In(">= 1")] = 100
    validation: Annotated[int, In(">= 1")] = 20
    instructions: tuple[str, ...] = ()
    propose: Annotated[int, In(">= 0")] = 0
    target: Annotated[float, In("> 0", infinite=True)] = 1.0
    paper: ClassVar[Paper] = PAPER

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: a small network, and embeddings of the toy model itself."""
        return {**super().conformance(), "make": lambda: cls(
            k=3, encoder="model", total_iterations=24, n_init=8, domain=300, keep=8, hidden=16, train_steps=20)}

    def validate(self) -> None:
        """See :meth:`looseleaf.Plugin.validate`."""
        self.check("n_init", self.n_init is None or self.n_init <= self.total_iterations,
                   f"None or an integer in [1, total_iterations={self.total_iterations}]")
        self.check("encoder", callable(self.encoder) or (isinstance(self.encoder, str) and bool(self.encoder)),
                   "'auto', 'minilm', 'model', a name of sentence-transformers, or a function from texts to vectors")
        self.check("instructions", not isinstance(self.instructions, str) and all(
            isinstance(i, str) for i in self.instructions), "a sequence of texts")

    def optimize(self, task: TextTask, model: LanguageModel, *, budget: Budget | None = None,  # type: ignore[override]
                 start: TextPrompt | None = None, seed: int = 0, state_dir: str | Path | None = None,
                 progress: bool | None = None) -> TextPrompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`.

        Returns:
            The prompt, whose ``info`` also holds ``log_likelihood``, ``encoder``, ``instruction``, ``instructions``,
            ``history`` ([calls, best score] after each evaluation), ``tried`` ([score, log-likelihood, instruction,
            exemplars] of each arm, in order, as places in ``instructions`` and in the pool), ``n_init`` and
            ``embedded`` (arms embedded in each round).

        Raises:
            ValueError: no dev examples, more exemplars wanted than there are, or a start that has no place for them.
            ModuleNotFoundError: the encoder's package is not installed.
            EndpointError: the server fails, gives no log-probabilities or, with ``encoder="model"``, no embeddings.
        """
        search = self.search(task, model, budget=budget, start=start, seed=seed, state_dir=state_dir, progress=progress)
        initial = self._initial_count(search)
        keep = self._keep_count(search)
        stopped = "done"
        try:
            search.find_instructions()
            self._explore(search, initial)
            self._exploit(search, keep)
        except BudgetExhausted as end:
            stopped = reason(end)
        return search.finish(stopped, {"n_init": initial, "embedded": keep})

    def search(self, task: TextTask, model: LanguageModel, *, start: TextPrompt | None = None, seed: int = 0,
               **options: Any) -> Search:
        """The search that :meth:`optimize` makes, before anything is tried; same arguments."""
        self.check_model(model)
        return Search(task, model, identity=self.identity(task, model, start, seed), k=self.k,
                      total_iterations=self.total_iterations, pool=self.pool, validation=self.validation,
                      encoder=self.encoder, instructions=self.instructions, propose=self.propose, target=self.target,
                      start=start, seed=seed, name=type(self).__name__, **options)

    def _initial_count(self, search: Search) -> int:
        if self.n_init is not None:
            return self.n_init
        total = self.total_iterations
        if search.budget.calls is not None:
            total = min(total, search.budget.calls // len(search.validation))
        return max(1, round(INITIAL_FRACTION * total))

    def _keep_count(self, search: Search) -> int:
        if self.keep is not None:
            return self.keep
        return len(search.validation) if search.encoder_name == "model" else KEEP

    def _explore(self, search: Search, count: int) -> None:
        """Score ``count`` random arms, the start's own first."""
        # More are drawn than needed, as some may come twice.
        arms = draw(generator(search.seed, "initial"), len(search.pool), self.k, len(search.instructions),
                    2 * count + 10)
        arms = [arm for arm in arms if arm != search.first][:count]
        for arm in [search.first, *arms][:count + 1] if search.first else arms:
            if search.done() or (len(search.tried) >= count and arm not in search.tried):
                return
            search.evaluate(arm)
            search.save()

    def _exploit(self, search: Search, keep: int) -> None:
        """Score, round after round, the arm with the highest bound."""
        bandit: NeuralUCB | None = None
        while not search.done():
            search.check_budget()
            vectors = search.tried_vectors()
            if bandit is None:
                bandit = NeuralUCB(vectors.shape[1], self.hidden, self.lam, self.nu, self.train_steps, search.seed)
                if search.confidence is not None:
                    bandit.confidence = search.confidence
            candidates = self._candidates(search, keep)
            if not candidates:
                return  # every arm there is was tried
            bandit.fit(vectors, torch.tensor([r.score for r in search.tried.values()]))
            embedded = search.encode(candidates)
            chosen, gradient = bandit.select(torch.from_numpy(embedded))
            search.evaluate(candidates[chosen], embedded[chosen])
            bandit.update(gradient)
            search.confidence = bandit.confidence
            search.save()

    def _candidates(self, search: Search, keep: int) -> list[Arm]:
        """Arms of this round not tried before: the ``keep`` nearest to the validation examples of those drawn."""
        arms = draw(generator(search.seed, "round", len(search.tried)), len(search.pool), self.k,
                    len(search.instructions), self.domain, search.tried)
        if not self.ot or len(arms) <= keep:
            return arms[:keep]
        return [arms[n] for n in closest(search.transport_cost(), sets_of(arms), keep)]
