"""TokenPrepending: the plugin, and the search for prompt and layers on a development set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

from looseleaf import Budget, BudgetExhausted, Paper, PromptOptimizer, UnsupportedModelError
from looseleaf_text import LanguageModel, LocalModel, Prompt, Task, decoder_layers
from looseleaf.progress import bar
from looseleaf.budget import reason
from looseleaf.resume import SearchState
from looseleaf_token_prepending.encoder import SentenceEncoder, Settings, body
from looseleaf_token_prepending.quality import Development
from looseleaf_token_prepending.search import Layers, Run, Texts, Work, default_ends, default_exit
from looseleaf_token_prepending.templates import only_slot, rename_slot, templates_of, without_placeholder


@dataclasses.dataclass
class TokenPrepending(PromptOptimizer):
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
        max_length: most tokens of prompt and text together, from 16; None: the model's context.
        batch_tokens: most positions that are run together; from 1.
    """

    prompt: str = "prompteol"
    alternatives: tuple[str, ...] = ("pretended-cot", "knowledge")
    start_layer: int = 1
    end_layer: int | None = None
    exit_layer: int | None = None
    normalize: bool = True
    tidy: bool = True
    max_length: int | None = None
    batch_tokens: int = 8192
    improves: ClassVar[Literal["answers", "embeddings"]] = "embeddings"
    paper: ClassVar[Paper] = Paper(
        title="Token Prepending: A Training-Free Approach for Eliciting Better Sentence Embeddings from LLMs",
        authors=("Yuchen Fu", "Zifeng Cheng", "Zhiwei Jiang", "Zhonghui Wang", "Yafeng Yin", "Zhengliang Li",
                 "Qing Gu"), year=2025, arxiv="2412.11556", venue="ACL 2025",
        code="https://github.com/fuyuchenIfyw/token_prepending",
        summary="Better sentence embeddings from your own decoder language model, without training.")

    def validate(self) -> None:
        """Raise ValueError for a parameter out of range."""
        for prompt in (self.prompt, *self.alternatives):
            templates_of(prompt)
        self.check("start_layer", _whole(self.start_layer) and self.start_layer >= 1, "a whole number from 1")
        self.check("end_layer", self.end_layer is None or (_whole(self.end_layer) and (
            self.end_layer == 0 or self.end_layer > self.start_layer)), "None, 0, or a whole number above start_layer")
        self.check("exit_layer", self.exit_layer is None or (_whole(self.exit_layer) and self.exit_layer != 0),
                   "None, a whole number from 1, or one below 0 that counts from the end")
        self.check("max_length", self.max_length is None or (_whole(self.max_length) and self.max_length >= 16),
                   "None or a whole number from 16")
        self.check("batch_tokens", _whole(self.batch_tokens) and self.batch_tokens >= 1, "a whole number from 1")

    def encoder(self, model: Any, tokenizer: Any, seed: int = 0) -> SentenceEncoder:
        """An encoder of sentences with these parameters.

        Args:
            model: a decoder of transformers, in evaluation mode; not changed.
            tokenizer: its tokeniser.
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

    def optimize(self, task: Task, model: LanguageModel, budget: Budget | None = None, *,
                 start: Prompt | None = None, seed: int = 0,
                 state_dir: str | Path | None = None, progress: bool | None = None) -> Prompt:
        """Choose prompt and layers by the quality of the embeddings of ``task.train`` and ``task.dev`` together.

        On a :class:`looseleaf_text.LocalModel` the layers of ``prompt`` are chosen first (every exit comes from the same
        run), then the alternatives are tried with the same ``end_layer``. A model behind a server has no layers to
        reach into: there the prompts, and the bare text, are compared by what its ``embed`` gives.

        Arguments as for :meth:`looseleaf.PromptOptimizer.optimize`; the one slot of ``start`` takes the text, and it
        comes in the place of ``prompt``. ``seed`` draws the placeholder's embedding.

        Returns:
            The prompt without the placeholder, the first where there are several. ``info`` also holds ``settings`` for
            :meth:`SentenceEncoder.from_prompt` (None without layers), ``measure``, ``examples``, and ``explored``, a
            row [prompt, end_layer, exit_layer, fitness] of the best exit for each run. With a budget too small for one
            run, the defaults come back with fitness 0 and no evaluation.

        Raises:
            ValueError: the examples are neither labelled texts nor graded pairs.
            UnsupportedModelError: the model has neither layers nor embeddings.
        """
        task.validate(model)
        data = Development.of([*task.train, *task.dev])
        budget = budget or Budget()
        begin = self.prompt if start is None else _as_template(start)
        work = (Layers if isinstance(model, LocalModel) else Texts)(self, model, budget, data, seed)
        state = SearchState(state_dir, self.identity(task, model, start, seed))
        saved = state.load() or {"runs": {}, "used": None}
        runs: dict[str, dict[str, Any]] = dict(saved["runs"])
        if saved["used"] is not None:
            budget.restore(saved["used"])
        seen: list[Run] = []
        stopped = "done"
        with bar("TokenPrepending", None, progress) as moving:
            try:
                for prompt, end in work.candidates(begin, seen):
                    key = f"{end}:{prompt}"
                    if key not in runs:
                        qualities = work.qualities(prompt, end)
                        runs[key] = {"qualities": qualities, "calls": budget.used["calls"]}
                        state.save({"runs": runs, "used": budget.used})
                    seen.append(Run(prompt, end, {int(k): v for k, v in runs[key]["qualities"].items()},
                                    runs[key]["calls"]))
                    moving.update()
            except BudgetExhausted as spent:
                stopped = reason(spent)
            except NotImplementedError as error:
                raise UnsupportedModelError(f"{type(model).__name__} ({model.name}) has no embeddings to choose a "
                                            "prompt by: give a LocalModel, or a server with /embeddings") from error
        state.save({"runs": runs, "used": budget.used})
        best = max(seen, key=lambda run: run.fitness, default=None)
        return self._found(task, work, begin, best, seen, stopped, data)

    def _found(self, task: Task, work: Work, begin: str, best: Run | None, seen: list[Run], stopped: str,
               data: Development) -> Prompt:
        prompt = begin if best is None else best.prompt
        history: list[list[float]] = []
        for run in seen:
            history.append([run.calls, max(run.fitness, history[-1][1] if history else run.fitness)])
        text = without_placeholder(templates_of(prompt)[0])
        names = {name for e in task.train for name in e.fields}
        if len(names) == 1:
            text = rename_slot(text, "text", next(iter(names)))
        return Prompt(text, info={
            "fitness": 0.0 if best is None else best.fitness, "evaluations": len(seen), "stopped": stopped,
            "measure": data.measure, "examples": len(task.train) + len(task.dev),
            "settings": work.settings(prompt, best), "history": history,
            "explored": [[r.prompt, r.end, r.leave, r.fitness] for r in seen]})


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_template(start: Prompt) -> str:
    template = start.as_template()
    return rename_slot(template, only_slot(template), "text")
