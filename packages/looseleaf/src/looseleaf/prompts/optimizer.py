"""The interface of a method that searches for a prompt."""

from __future__ import annotations

import dataclasses
import json
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from looseleaf.fingerprint import fingerprint
from looseleaf.plugin import Plugin

if TYPE_CHECKING:
    from pathlib import Path

    from looseleaf.budget import Budget
    from looseleaf_text.model import LanguageModel
    from looseleaf_text.prompt import Prompt
    from looseleaf_text.task import Task


@dataclasses.dataclass
class PromptOptimizer(Plugin):
    """Searches for a prompt that makes a language model do a task well.

    Attributes:
        improves: what the prompt is good for: the model's answers, or its embeddings, which accuracy says nothing of.
    """

    kind: ClassVar[str] = "prompts"
    improves: ClassVar[Literal["answers", "embeddings"]] = "answers"

    @abstractmethod
    def optimize(self, task: Task, model: LanguageModel, budget: Budget | None = None, *,
                 start: Prompt | None = None, seed: int = 0,
                 state_dir: str | Path | None = None, progress: bool | None = None) -> Prompt:
        """The best prompt found.

        Args:
            task: examples, labels or references, and the metric. Only ``task.train`` and ``task.dev`` may be read.
            model: what the prompt is for.
            budget: limits on calls, tokens and seconds; running out returns the best so far, whose
                ``prompt.info["stopped"]`` says why.
            start: the prompt to begin with; None: the method's own start, made from the task.
            seed: the only source of randomness.
            state_dir: the search state is written there as the search goes on; called again with the same
                arguments, the search resumes and ends with the same result as one that was never stopped.
            progress: show a progress bar; None: only on a terminal.

        Returns:
            A prompt whose ``info`` holds at least ``fitness``, ``evaluations`` and ``stopped``
            (``"done"``, ``"budget: calls"``, ``"budget: tokens"`` or ``"budget: seconds"``).
        """

    def identity(self, task: Task, model: LanguageModel, start: Prompt | None, seed: int) -> dict[str, Any]:
        """What makes two searches the same one: method, parameters, examples, model, start and seed.

        The budget is not part of it: a search that ran out may be given more and goes on.
        """
        begin = None
        if start is not None:
            tensors: dict[str, Any] = {}
            begin = {k: v for k, v in start.to_dict(tensors).items() if k != "info"}
            begin["soft"] = fingerprint(tensors) if tensors else None
        return json.loads(json.dumps({
            "optimizer": f"{type(self).__module__}:{type(self).__qualname__}",
            "parameters": self.hyperparameters(), "task": task.fingerprint(), "model": model.name,
            "weights": model.fingerprint(), "start": begin, "seed": seed}, default=str))
