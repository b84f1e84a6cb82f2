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


Around = Callable[[Any, Cost, tuple[Any, ...], dict[str, Any]], contextlib.AbstractContextManager[None]]


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
    of *seconds* starts with the first question.
    """

    calls: int | None = None
    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            limit = getattr(self, field.name)
            if limit is not None and not (isinstance(limit, (int, float)) and limit > 0):
                raise ValueError(f"Budget.{field.name}: expected None or a number > 0, got {limit!r}")
        self._spent = {"calls": 0, "tokens": 0, "seconds": 0.0}
        self._started: float | None = None

    @property
    def used(self) -> dict[str, float]:
        """What was spent so far: ``calls``, ``tokens`` and ``seconds``."""
        running = 0.0 if self._started is None else time.monotonic() - self._started
        return {**self._spent, "seconds": self._spent["seconds"] + running}

    def check(self, calls: int = 0, tokens: int = 0) -> None:
        """Raise BudgetExhausted where so much more would go beyond a limit, or where the time is up.

        The message begins with ``"budget: calls"``, ``"budget: tokens"`` or ``"budget: seconds"``; see :func:`reason`.
        """
        if self._started is None:
            self._started = time.monotonic()
        used = self.used
        for name, limit, more in (("calls", self.calls, calls), ("tokens", self.tokens, tokens)):
            if limit is not None and more and used[name] + more > limit:
                raise BudgetExhausted(f"budget: {name} ({used[name]} of {limit} used, {more} more requested)")
        if self.seconds is not None and used["seconds"] >= self.seconds:
            raise BudgetExhausted(f"budget: seconds ({used['seconds']:.1f} of {self.seconds} used)")

    def spend(self, calls: int = 0, tokens: int = 0) -> None:
        """Charge ``calls`` and ``tokens`` before the work is done; nothing where :meth:`check` raises."""
        self.check(calls, tokens)
        self._spent["calls"] += calls
        self._spent["tokens"] += tokens

    def restore(self, used: Mapping[str, Any]) -> None:
        """Set what was spent, as a search does that goes on where it was stopped, and start the clock."""
        self._spent = {name: used[name] for name in self._spent}
        self._started = time.monotonic()

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
        if isinstance(model, _Proxy) and model._looseleaf_around == self._charged:
            return model
        return watched(model, self._charged, methods)

    @contextlib.contextmanager
    def _charged(self, model: Any, cost: Cost, arguments: tuple[Any, ...], options: dict[str, Any]) -> Iterator[None]:
        limited = self.tokens is not None
        tokens = cost.tokens(model, *arguments, **options) if limited and cost.tokens is not None else 0
        self.spend(cost.calls(model, *arguments, **options), tokens)
        before = _tokens(model)
        yield
        if not limited:  # no need to tokenize twice
            self._spent["tokens"] += max(0, _tokens(model) - before)


def reason(error: BudgetExhausted) -> str:
    """The value of ``prompt.info["stopped"]`` for an error of :meth:`Budget.check`."""
    return str(error).split(" (")[0]


def watched(model: M, around: Around, methods: Sequence[str] = ()) -> M:
    """``model`` with ``around(model, cost, arguments, options)`` entered for every costly call; see `Budget.meter`."""
    proxy: Any = (_CallableProxy if callable(model) else _Proxy)(model, around, tuple(methods))
    return proxy  # type: ignore[no-any-return]


class _Proxy:
    """Stands for a model: forwards everything, and passes isinstance checks for the model's own type."""

    __slots__ = ("__wrapped__", "_looseleaf_around", "_looseleaf_methods")  # names that no model has

    def __init__(self, model: Any, around: Around, methods: tuple[str, ...]) -> None:
        for name, value in zip(_Proxy.__slots__, (model, around, methods), strict=True):
            object.__setattr__(self, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self.__wrapped__.__class__  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__wrapped__, name)
        cost = _declared(self.__class__, name) or (_ROWS if name in self._looseleaf_methods else None)
        if cost is None:
            return value

        @functools.wraps(value)
        def charged(*arguments: Any, **options: Any) -> Any:
            with self._looseleaf_around(self.__wrapped__, cost, arguments, options):
                return value(*arguments, **options)
        return charged

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__wrapped__, name, value)

    def __repr__(self) -> str:
        return repr(self.__wrapped__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return watched(copy.deepcopy(self.__wrapped__, memo), self._looseleaf_around, self._looseleaf_methods)


class _CallableProxy(_Proxy):
    __slots__ = ()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        cls = self.__class__
        cost = _declared(cls, "__call__") or _declared(cls, "forward") or (None if _declares(cls) else _ROWS)
        with contextlib.nullcontext() if cost is None else self._looseleaf_around(
                self.__wrapped__, cost, arguments, options):
            return self.__wrapped__(*arguments, **options)


@functools.cache
def _declared(cls: type, name: str) -> Cost | None:
    declarations = (getattr(vars(base).get(name), "_looseleaf_cost", None) for base in cls.__mro__)
    return next(filter(None, declarations), None)


@functools.cache
def _declares(cls: type) -> bool:
    return any(_declared(cls, name) for name in dir(cls))


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
