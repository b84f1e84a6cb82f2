"""The conformance kit of probes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import random
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from looseleaf.probes.probe import Probe
from looseleaf.probes.subject import parts
from looseleaf.report import Report
from looseleaf.testing.common import Kit, Skip, assert_unchanged, mixed_modes, same_random_state, snapshot
from looseleaf.testing.models import tiny_llama, tiny_tokenizer


class ProbeKit(Kit):
    """What a probe must do.

    Args:
        cls: the probe class.
        make: makes an instance that is at work on small inputs, such as one with few steps; None: ``cls``.
        data: what ``run`` is given; None: the probe's own example data.
        subject: makes what the probe is run on, the same each time; None: :func:`text_subject`.
        other: makes a subject that must give another report; None: ``subject`` with other weights.
    """

    interface: ClassVar[type[Any]] = Probe

    def __init__(self, cls: type[Probe], make: Callable[[], Any] | None = None, *, data: Any = None,
                 subject: Callable[[], Any] | None = None, other: Callable[[], Any] | None = None) -> None:
        super().__init__(cls, make)
        self.data, self.subject, self.other = data, subject or text_subject, other

    def check_the_method_is_at_work(self) -> None:
        """The report depends on the subject."""
        if self.other is not None:
            subject = self.other()
        else:
            subject = self.subject()
            model = _model(subject)
            assert model is not None, "expected a subject with a model: give the kit other=, which makes a subject " \
                                      "that must give another report"
            _change_weights(model)
        ours, theirs = (_measured(report, facts=False) for report in (self._first[0], self._run(subject)))
        assert ours != theirs, "two models with different weights give the same report, facts apart: run the method " \
                               "on the subject"

    def check_runs_on_a_subject(self) -> None:
        parameters = inspect.signature(getattr(self.cls, "run")).parameters  # noqa: B009 (not of every Plugin)
        needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        assert needed == ["self", "subject"] and {"data", "seed", "progress"} <= set(parameters), \
            f"expected run(self, subject, data=None, *, seed=0, progress=None), got run({', '.join(parameters)})"
        report = self._first[0]
        assert isinstance(report, Report), f"expected a looseleaf.Report, got {type(report).__name__}"

    def check_refuses_a_wrong_subject(self) -> None:
        try:
            self._run(object())
        except (TypeError, ValueError) as error:
            assert "expected" in str(error), f"the error does not say what was expected: {error}"
        else:
            raise AssertionError("run(object()) is accepted: take subjects apart with looseleaf.probes.subject.parts")

    def check_reports_a_measurement(self) -> None:
        report = self._first[0]
        assert report.title, "the report has no title"
        assert report.tables or report.figures or report.images or report.claims, \
            "the report has no table, figure, image or claim: say what was measured"

    def check_report_is_plain_data(self) -> None:
        report = self._first[0]
        again = Report.from_dict(json.loads(report.to_json()))
        assert again.to_json() == report.to_json(), "JSON and back gives another report"
        assert report.to_text()

    def check_is_silent(self) -> None:
        printed = self._first[1].strip()
        assert not printed, f"run(progress=False) printed {printed[:80]!r}: use looseleaf.progress and the report"

    def check_same_seed_same_report(self) -> None:
        with _another_random_state():  # what only the global generators decide must show
            again = _measured(self._run(self.subject()))
        first = _measured(self._first[0])
        differing = [name for name in first if first[name] != again[name]]
        assert not differing, f"two runs with the same seed differ in {', '.join(differing)}"

    def check_leaves_the_random_state(self) -> None:
        subject = self.subject()
        if (model := _model(subject)) is not None:
            mixed_modes(model)
        with _another_random_state(), same_random_state():  # a state that no usual seed gives
            self._run(subject)

    def check_leaves_the_model_as_it_was(self) -> None:
        subject, model = self._mixed()
        before = snapshot(model)
        self._run(subject)
        assert_unchanged(before, model)

    def check_leaves_the_model_as_it_was_after_an_exception(self) -> None:
        self._mixed()  # skips without a model
        calls = self._first[2]
        if not calls:
            raise Skip("the probe does not run the model")
        for call in dict.fromkeys((1, (calls + 1) // 2)):
            subject, model = self._mixed()
            before = snapshot(model)
            try:
                with _interrupted(model, call):
                    self._run(subject)
                raise AssertionError("run goes on after KeyboardInterrupt: catch no more than Exception")
            except KeyboardInterrupt:
                assert_unchanged(before, model)

    # ------------------------------------------------------------------------------------------------------ helpers
    def _run(self, subject: Any) -> Any:
        return self.make().run(subject, self.data, seed=0, progress=False)

    @functools.cached_property
    def _first(self) -> tuple[Any, str, int]:
        """The report on the subject, what was printed, and how many calls of modules it took."""
        subject, printed = self.subject(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), \
                _interrupted(_model(subject), None) as calls:
            report = self._run(subject)
        return report, printed.getvalue(), len(calls)

    def _mixed(self) -> tuple[Any, nn.Module]:
        """A subject whose model has mixed modes and gradients of somebody else."""
        subject = self.subject()
        model = _model(subject)
        if model is None:
            raise Skip("the subject has no model")
        for parameter in mixed_modes(model).parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        return subject, model


def text_subject() -> Any:
    """A ``(model, tokenizer)`` pair: a random Llama of two layers, and a tokenizer of single characters.

    Dropout of the attention is on in training mode, so that a probe that runs the model in it is found out.
    """
    return tiny_llama(vocabulary=128, attention_dropout=0.1), tiny_tokenizer()


def _model(subject: Any) -> nn.Module | None:
    try:
        return parts(subject)[0]
    except TypeError:
        return None


@torch.no_grad()
def _change_weights(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * (0.5 * parameter.std() if parameter.numel() > 1 else 0.5)).add_(0.01 * noise)


def _measured(report: Report, facts: bool = True) -> dict[str, Any]:
    """The report as plain data without what time alone decides."""
    data = report.to_dict()
    data["facts"] = {k: v for k, v in data["facts"].items() if facts and "second" not in k.lower()}
    for table in data["tables"]:
        timed = [i for i, column in enumerate(table["columns"]) if "second" in column.lower()]
        table["rows"] = [[cell for i, cell in enumerate(row) if i not in timed] for row in table["rows"]]
    return data


@contextlib.contextmanager
def _interrupted(model: nn.Module | None, at: int | None) -> Iterator[list[None]]:
    """The calls of modules without children; KeyboardInterrupt is raised from call ``at``, counted from 1."""
    calls: list[None] = []

    def count(*_: Any) -> None:
        calls.append(None)
        if len(calls) == at:
            raise KeyboardInterrupt

    handles = [] if model is None else [
        m.register_forward_hook(count) for m in model.modules() if next(m.children(), None) is None]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _another_random_state() -> Iterator[None]:
    numpy_, python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        np.random.seed(12345)
        random.seed(12345)
        try:
            yield
        finally:
            np.random.set_state(numpy_)
            random.setstate(python)


__all__ = ["ProbeKit", "text_subject"]
