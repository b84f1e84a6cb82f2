"""The interface of a method that searches for a prompt."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from looseleaf.plugin import Plugin

if TYPE_CHECKING:
    from pathlib import Path

    from looseleaf.prompts.budget import Budget
    from looseleaf.prompts.model import LanguageModel
    from looseleaf.prompts.prompt import Prompt
    from looseleaf.prompts.task import Task


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
