"""Limits of a search."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from looseleaf.errors import BudgetExhausted


@dataclasses.dataclass
class Budget:
    """Limits on what a search may spend; None is no limit.

    A *call* is one prompt given to the model: one prefix scored (whatever the number of continuations), one text
    generated or one text embedded. *Tokens* are those of the prompts and of what is generated, as if nothing were
    cached, so that the same search costs the same on every machine. The clock starts with the first question.

    Attributes:
        calls: most calls.
        tokens: most tokens.
        seconds: longest time.
    """

    calls: int | None = None
    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("calls", "tokens", "seconds"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and value > 0):
                raise ValueError(f"Budget.{name}={value!r}: allowed is a number above 0, or None for no limit")
        self._calls = 0
        self._tokens = 0
        self._before = 0.0
        self._started: float | None = None

    @property
    def used(self) -> dict[str, float]:
        """What was spent so far: ``calls``, ``tokens`` and ``seconds``."""
        running = 0.0 if self._started is None else time.monotonic() - self._started
        return {"calls": self._calls, "tokens": self._tokens, "seconds": self._before + running}

    def start(self) -> None:
        """Start the clock, if it is not running yet."""
        if self._started is None:
            self._started = time.monotonic()

    def spend(self, calls: int = 0, tokens: int = 0) -> None:
        """Book ``calls`` and ``tokens`` before the work is done.

        Raises:
            BudgetExhausted: this would go beyond a limit; nothing is booked then, and the message begins with
                the words of :meth:`exhausted`.
        """
        self.start()
        for name, used, more in (("calls", self._calls, calls), ("tokens", self._tokens, tokens)):
            limit = getattr(self, name)
            if limit is not None and more and used + more > limit:
                raise BudgetExhausted(f"budget: {name} ({used} of {limit} used, {more} more wanted)")
        if self.seconds is not None and self.used["seconds"] >= self.seconds:
            raise BudgetExhausted(f"budget: seconds ({self.used['seconds']:.1f} of {self.seconds} used)")
        self._calls += calls
        self._tokens += tokens

    def book(self, calls: int = 0, tokens: int = 0) -> None:
        """Add what was spent on a thing that has no limit; never raises."""
        self._calls += calls
        self._tokens += tokens

    def exhausted(self) -> str | None:
        """``"budget: calls"``, ``"budget: tokens"`` or ``"budget: seconds"`` once a limit is reached, else None."""
        self.start()
        for name, used in self.used.items():
            limit = getattr(self, name)
            if limit is not None and used >= limit:
                return f"budget: {name}"
        return None

    def remaining_calls(self) -> int | None:
        """How many calls are left; None is no limit."""
        return None if self.calls is None else max(0, self.calls - self._calls)

    def restore(self, used: Mapping[str, Any]) -> None:
        """Set what was spent, as a search does that goes on where it was stopped."""
        self._calls, self._tokens = int(used["calls"]), int(used["tokens"])
        self._before = float(used["seconds"])
        self._started = None
        self.start()


def reason(error: BudgetExhausted) -> str:
    """The value of ``prompt.info["stopped"]`` for an error of :meth:`Budget.spend`."""
    return str(error).split(" (")[0]
