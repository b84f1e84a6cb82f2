"""The interface of a method that searches for a prompt."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from looseleaf.budget import Budget, reason
from looseleaf.errors import BudgetExhausted, UnsupportedModelError
from looseleaf.fingerprint import fingerprint
from looseleaf.plugin import Plugin
from looseleaf.progress import bar
from looseleaf.resume import SearchState
from looseleaf.unwrap import unwrapped

if TYPE_CHECKING:
    from pathlib import Path

    from looseleaf.prompts.prompt import Prompt
    from looseleaf.tasks import Task


@dataclasses.dataclass
class PromptOptimizer(Plugin):
    """Searches for a prompt that makes a model do a task well.

    Class attributes:
        accepts: the type of model it is for.
    """

    kind: ClassVar[str] = "prompts"
    accepts: ClassVar[type] = object

    @abstractmethod
    def optimize(self, task: Any, model: Any, *, budget: Budget | None = None, start: Any = None, seed: int = 0,
                 state_dir: str | Path | None = None, progress: bool | None = None) -> Prompt:
        """The best prompt found.

        Methods may narrow the types of ``task`` and ``start``, and then say so in their own signature.

        Args:
            task: a :class:`looseleaf.Task`. Only ``task.train`` and ``task.dev`` may be read.
            model: what the prompt is for, an instance of :attr:`accepts`; left as it is.
            budget: limits on calls, tokens and seconds (see :meth:`looseleaf.Budget.meter`); running out returns the
                best so far.
            start: the :class:`looseleaf.Prompt` to begin with; None: the method's own start, made from the task.
            seed: the only source of randomness.
            state_dir: the search state is written there as the search goes on; called again with the same
                arguments, the search resumes and ends with the same result as one that was never stopped.
            progress: show a progress bar; None: only on a terminal.

        Returns:
            A prompt whose ``info`` holds at least ``fitness``, ``evaluations`` and ``stopped``
            (``"done"``, ``"budget: calls"``, ``"budget: tokens"`` or ``"budget: seconds"``).

        Raises:
            ValueError: a task that it cannot work with.
            UnsupportedModelError: a model that it cannot work with; see :meth:`check_model`.
        """

    def check_model(self, model: Any) -> None:
        """Raise UnsupportedModelError unless ``model``, or what is wrapped in it, is what this method accepts."""
        if not isinstance(model, self.accepts) and not isinstance(unwrapped(model), self.accepts):
            raise UnsupportedModelError(f"{type(self).__name__}: expected a {self.accepts.__name__} to find a prompt "
                                        f"for, got {type(model).__name__}")

    def identity(self, task: Task, model: Any, start: Prompt | None, seed: int) -> dict[str, Any]:
        """What makes two searches the same one, for :class:`looseleaf.resume.SearchState`.

        The budget is not part of it: a search that ran out may be given more and goes on.
        """
        own = getattr(model, "fingerprint", None)
        weights = own() if callable(own) else fingerprint(model) if hasattr(model, "state_dict") else None
        return {"optimizer": f"{type(self).__module__}:{type(self).__qualname__}",
                "parameters": self.hyperparameters(), "task": task.fingerprint(),
                "model": getattr(model, "name", None) or model.__class__.__name__, "weights": weights,
                "start": None if start is None else start.fingerprint(), "seed": seed}


class Search:
    """One search: the model metered, the state kept on disk, the progress shown.

    The ``with`` block ends where the budget does::

        search = Search(self, task, model, budget=budget, ...)
        with search:
            for n in search.steps(self.trials):
                ...  # asks search.model, changes search.state
        return MyPrompt(..., info=search.info(fitness, evaluations=search.done))

    Args:
        optimizer, task, model, budget, start, seed, state_dir, progress: see :meth:`PromptOptimizer.optimize`.
        identity: what else makes two searches the same one.

    Attributes:
        model: to be asked; every call is charged to :attr:`budget` first.
        state: plain data that the search goes on from; written after every step.
        done: steps made, those of former runs included.
        stopped: why the search ended.

    Raises:
        UnsupportedModelError: the optimiser does not accept the model.
        StateError: the state on disk is damaged, or that of another search.
    """

    def __init__(self, optimizer: PromptOptimizer, task: Task, model: Any, *, budget: Budget | None = None,
                 start: Prompt | None = None, seed: int = 0, state_dir: str | Path | None = None,
                 progress: bool | None = None, identity: dict[str, Any] | None = None) -> None:
        optimizer.check_model(model)
        self.budget, self.start, self.seed = budget or Budget(), start, seed
        self.model: Any = self.budget.meter(model)
        self.state: dict[str, Any] = {}
        self.done, self.stopped = 0, "done"
        self._label, self._progress = type(optimizer).__name__, progress
        self._file = SearchState(state_dir, {**optimizer.identity(task, model, start, seed), **(identity or {})})
        saved = self._file.load()
        if saved is not None:
            self.state, self.done = saved["state"], saved["done"]
            self.budget.restore(saved["used"])

    def steps(self, total: int | None = None) -> Iterator[int]:
        """The number of each step from where the search is; the state is written after each."""
        with bar(self._label, total, self._progress) as progress_bar:
            progress_bar.update(self.done)
            while total is None or self.done < total:
                yield self.done
                self.done += 1
                self.save()
                progress_bar.update()

    def save(self) -> None:
        """Write the state and what was spent."""
        self._file.save({"state": self.state, "done": self.done, "used": self.budget.used})

    def info(self, fitness: float, evaluations: int, **more: Any) -> dict[str, Any]:
        """Metadata of the search, for ``Prompt.info``."""
        return {"fitness": float(fitness), "evaluations": evaluations, "stopped": self.stopped, **more}

    def __enter__(self) -> Search:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if error is not None and not isinstance(error, BudgetExhausted):
            return False
        self.stopped = "done" if error is None else reason(error)
        self.save()
        return True
