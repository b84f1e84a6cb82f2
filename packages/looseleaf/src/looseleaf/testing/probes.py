"""The conformance kit of probes."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from looseleaf.probes.probe import Probe
from looseleaf.probes.subject import parts
from looseleaf.report import Report
from looseleaf.testing.common import Kit, assert_refused
from looseleaf.testing.models import change, tiny_llama, tiny_tokenizer


def text_subject() -> Any:
    """A ``(model, tokenizer)`` pair: a random Llama of two layers, and a tokenizer of single characters.

    Dropout of the attention is on in training mode, so that a probe that runs the model in it is found out.
    """
    return tiny_llama(vocabulary=128, attention_dropout=0.1), tiny_tokenizer()


class ProbeKit(Kit):
    """What a probe must do.

    Args:
        cls: the probe class.
        make: makes an instance that is at work on small inputs, such as one with few steps; None: ``cls``.
        data: what ``run`` is given; None: the probe's own example data.
        subject: makes what the probe is run on, the same each time.
        other: makes a subject that must give another report; None: ``subject`` with other weights.
    """

    interface: ClassVar[type[Any]] = Probe

    def __init__(self, cls: type[Probe], make: Callable[[], Any] | None = None, *, data: Any = None,
                 subject: Callable[[], Any] = text_subject, other: Callable[[], Any] | None = None) -> None:
        super().__init__(cls, make)
        self.data, self.subject, self.other = data, subject, other
        self.subjects = {"": subject}

    def use(self, subject: Any) -> Any:
        return self.make().run(subject, self.data, seed=0, progress=False)

    def parts(self, subject: Any) -> Sequence[Any]:
        try:
            return parts(subject)[:1]
        except TypeError:
            return ()

    def compared(self, report: Report) -> dict[str, Any]:
        """The report as plain data without what time alone decides, to 9 digits: where arrays lie moves the last."""
        data = json.loads(report.to_json(), parse_float=lambda number: round(float(f"{float(number):.9g}"), 12))
        data["facts"] = {k: v for k, v in data["facts"].items() if "second" not in k.lower()}
        for table in data["tables"]:
            untimed = ["second" not in column.lower() for column in table["columns"]]
            table["rows"] = [list(itertools.compress(row, untimed)) for row in table["rows"]]
        return data

    def check_the_method_is_at_work(self) -> None:
        """The report depends on the subject."""
        subject = (self.other or self.subject)()
        if self.other is None:
            models = self.parts(subject)
            assert models, "expected a subject with a model: give the kit other=, which makes a subject that must " \
                           "give another report"
            change(models[0].parameters())
        ours, theirs = ({**self.compared(report), "facts": None}
                        for report in (self.first(self.subject).result, self.use(subject)))
        assert ours != theirs, "two models with different weights give the same report, facts apart: run the method " \
                               "on the subject"

    def check_runs_on_a_subject(self) -> None:
        parameters = inspect.signature(getattr(self.cls, "run")).parameters  # noqa: B009 (not of every Plugin)
        needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        assert needed == ["self", "subject"] and {"data", "seed", "progress"} <= set(parameters), \
            f"expected run(self, subject, data=None, *, seed=0, progress=None), got run({', '.join(parameters)})"
        report = self.first(self.subject).result
        assert isinstance(report, Report), f"expected a looseleaf.Report, got {type(report).__name__}"

    def check_refuses_a_wrong_subject(self) -> None:
        assert_refused(lambda: self.use(object()), "run(object())", (TypeError, ValueError), names="expected",
                       remedy="take subjects apart with looseleaf.probes.subject.parts")

    def check_reports_a_measurement(self) -> None:
        report = self.first(self.subject).result
        assert report.title, "the report has no title"
        assert report.tables or report.figures or report.images or report.claims, \
            "the report has no table, figure, image or claim: say what was measured"

    def check_report_is_plain_data(self) -> None:
        report = self.first(self.subject).result
        again = Report.from_dict(json.loads(report.to_json()))
        assert again.to_json() == report.to_json(), "JSON and back gives another report"
        assert report.to_text()

    def check_is_silent(self) -> None:
        printed = self.first(self.subject).printed.getvalue().strip()
        assert not printed, f"run(progress=False) printed {printed[:80]!r}: use looseleaf.progress and the report"

    check_same_seed_same_report = Kit.same_result
    check_leaves_the_random_state = Kit.leaves_random_state
    check_leaves_the_model_as_it_was = Kit.leaves_subject
    check_leaves_the_model_as_it_was_after_an_exception = Kit.leaves_subject_after_exception


__all__ = ["ProbeKit", "text_subject"]
