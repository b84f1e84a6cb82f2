"""Limits of a search, and the one place where a model's work is charged to them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from looseleaf.errors import BudgetExhausted

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M")


class Cost(NamedTuple):
    """What a call of a method costs, computed from the model and the method's own arguments; see :func:`costs`."""

    calls: Callable[..., int]
    tokens: Callable[..., int] | None = None


def costs(calls: Callable[..., int], tokens: Callable[..., int] | None = None) -> Callable[[F], F]:
    """Declare what a method of a model costs, so that :meth:`Budget.meter` can charge it before it runs.

    The declaration holds for methods that override it, too::

        @costs(calls=lambda self, pictures: len(pictures))
        def embed(self, pictures): ...

    Args:
        calls: the method's arguments (``self`` first) -> how many calls.
        tokens: the same for tokens, asked only where a budget limits them; elsewhere what the model's own attribute
            ``tokens`` grew by is charged afterwards.
    """
    def declare(method: F) -> F:
        method._looseleaf_cost = Cost(calls, tokens)  # type: ignore[attr-defined]
        return method
    return declare


@dataclasses.dataclass
class Budget:
    """Limits on what a search may spend; None is no limit.

    A *call* is one example given to the model, in training too: one prefix scored (whatever the number of
    continuations), one text generated or embedded, one picture of a batch. *Tokens* are those of the prompts and of
    what is generated, as if nothing were cached, so that the same search costs the same on every machine. The clock
    starts with the first question.

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
                raise ValueError(f"Budget.{name}: expected None or a number > 0, got {value!r}")
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
            BudgetExhausted: this would go beyond a limit; nothing is charged then, and the message begins with
                the words of :meth:`exhausted`.
        """
        self.start()
        for name, used, more in (("calls", self._calls, calls), ("tokens", self._tokens, tokens)):
            limit = getattr(self, name)
            if limit is not None and more and used + more > limit:
                raise BudgetExhausted(f"budget: {name} ({used} of {limit} used, {more} more requested)")
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

    def meter(self, model: M, methods: Sequence[str] = ()) -> M:
        """``model`` with its work charged to this budget before it is done.

        A search is simply written against it and ends where :class:`looseleaf.BudgetExhausted` is raised: nothing
        beyond the budget is ever computed. It passes for the model (``isinstance``, attributes, setting attributes).
        The methods declared by :func:`costs` are charged; a model without declarations is charged when it is called,
        one call for each row of its first argument.

        Args:
            model: who does the work; one that this budget meters already is given back as it is.
            methods: names of further methods to charge one call for each row of their first argument, for models of
                other libraries (``["get_image_features"]``).
        """
        if isinstance(model, _Proxy) and model._looseleaf_around == self._booked:
            return model
        return watched(model, self._booked, methods)

    @contextlib.contextmanager
    def _booked(self, model: Any, cost: Cost, arguments: tuple[Any, ...], options: dict[str, Any]) -> Iterator[None]:
        counts = self.tokens is not None
        tokens = cost.tokens(model, *arguments, **options) if counts and cost.tokens is not None else 0
        self.spend(calls=cost.calls(model, *arguments, **options), tokens=tokens)
        before = _tokens(model)
        yield
        if not counts:  # no need to tokenize twice: what was used is booked afterwards
            self.book(tokens=max(0, _tokens(model) - before))


Around = Callable[[Any, Cost, tuple[Any, ...], dict[str, Any]], contextlib.AbstractContextManager[None]]


def watched(model: M, around: Around, methods: Sequence[str] = ()) -> M:
    """``model`` with ``around(model, cost, arguments, options)`` entered for every costly call; see `Budget.meter`."""
    proxy: Any = (_CallableProxy if callable(model) else _Proxy)(model, around, tuple(methods))
    return proxy  # type: ignore[no-any-return]


class _Proxy:
    """Stands for a model: forwards everything, and passes isinstance checks for the model's own type."""

    __slots__ = ("__wrapped__", "_looseleaf_around", "_looseleaf_methods")  # names that no model has

    def __init__(self, model: Any, around: Around, methods: tuple[str, ...]) -> None:
        object.__setattr__(self, "__wrapped__", model)
        object.__setattr__(self, "_looseleaf_around", around)
        object.__setattr__(self, "_looseleaf_methods", methods)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self.__wrapped__.__class__  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__wrapped__, name)
        cost = _declared(self.__wrapped__.__class__, name) or (_ROWS if name in self._looseleaf_methods else None)
        if cost is None:
            return value

        @functools.wraps(value)
        def booked(*arguments: Any, **options: Any) -> Any:
            with self._looseleaf_around(self.__wrapped__, cost, arguments, options):
                return value(*arguments, **options)
        return booked

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__wrapped__, name, value)

    def __repr__(self) -> str:
        return repr(self.__wrapped__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return watched(copy.deepcopy(self.__wrapped__, memo), self._looseleaf_around, self._looseleaf_methods)


class _CallableProxy(_Proxy):
    __slots__ = ()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        cls = self.__wrapped__.__class__
        cost = _declared(cls, "__call__") or _declared(cls, "forward") or (None if _declares(cls) else _ROWS)
        if cost is None:
            return self.__wrapped__(*arguments, **options)
        with self._looseleaf_around(self.__wrapped__, cost, arguments, options):
            return self.__wrapped__(*arguments, **options)


@functools.cache
def _declared(cls: type, name: str) -> Cost | None:
    found = (getattr(vars(base).get(name), "_looseleaf_cost", None) for base in cls.__mro__)
    return next((cost for cost in found if cost is not None), None)


@functools.cache
def _declares(cls: type) -> bool:
    return any(_declared(cls, name) is not None for base in cls.__mro__ for name in vars(base))


def _rows(_: Any, *arguments: Any, **options: Any) -> int:
    """How many rows the first argument that has any has."""
    for value in (*arguments, *options.values()):
        if isinstance(value, Mapping):
            return _rows(None, *value.values())
        if getattr(value, "shape", ()):
            return int(value.shape[0])
        if isinstance(value, (list, tuple)):
            return len(value)
    return 1


_ROWS = Cost(_rows)


def _tokens(model: Any) -> int:
    value = getattr(model, "tokens", 0)
    return value if isinstance(value, int) else 0


def reason(error: BudgetExhausted) -> str:
    """The value of ``prompt.info["stopped"]`` for an error of :meth:`Budget.spend`."""
    return str(error).split(" (")[0]
