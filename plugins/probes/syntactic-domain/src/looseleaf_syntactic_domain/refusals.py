"""Does a harmless question before or after a request change whether a model declines it?"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from looseleaf import Paper, Probe, Report
from looseleaf.modes import evaluating
from looseleaf.plugin import In, OneOf
from looseleaf.probes.subject import parts
from looseleaf.statistics import bootstrap, paired
from looseleaf_syntactic_domain.facts import DomainFacts, countries
from looseleaf_syntactic_domain.probe import SyntacticDomainProbe
from looseleaf_syntactic_domain.variants import Variants
from looseleaf_text import LanguageModel, LocalModel

SETTINGS = ("exact", "synonym", "antonym")
"""Settings of the harmless question."""


@dataclass
class RefusalProbe(Probe):
    """Refusal rate with a benign-domain template before or after a request, against the request alone.

    The requests and the test of a refusal are yours; none are shipped.

    Args:
        place: where the harmless question stands: before the request, after it, or both, each measured.
        templates: harmless questions for each request and setting, drawn by seed.
        max_tokens: of each answer.
    """

    place: Annotated[Literal["before", "after", "both"], OneOf("before", "after", "both")] = "both"
    templates: Annotated[int, In(">= 1")] = 3
    max_tokens: Annotated[int, In(">= 1")] = 24
    paper: ClassVar[Paper] = SyntacticDomainProbe.paper

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: harmless requests, and a test that random text may pass."""
        return {"make": lambda: cls(templates=1, max_tokens=6),
                "data": {"requests": ["Bake a cake.", "Boil an egg.", "Fry rice."], "refused": "[a-m]"}}

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        """Generate an answer to each request, alone and with harmless questions, and count refusals.

        Args:
            subject: a ``(model, tokenizer)`` pair, a text pipeline, a LocalModel or another LanguageModel.
            data: ``{"requests": [...], "refused": ...}``: two requests or more, and a function of the generated text or
                a regular expression that is found in a refusal; "facts": :class:`DomainFacts` for the harmless
                questions instead of countries; "form": how a text is put to the model, with ``{text}`` once.
            seed: of the harmless questions and the bootstrap.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            TypeError: another subject.
            ValueError: no tokenizer, fewer than two requests, or no test of a refusal.
        """
        model = subject if isinstance(subject, LanguageModel) else LocalModel(*parts(subject, needs="tokenizer"))
        requests, refused, facts, form = _data(data)
        own = Variants().questions(facts, SETTINGS, cross=0, swapped=False, seed=seed, progress=progress).questions
        shown = {setting: [q.text for q in own if q.setting == setting] for setting in SETTINGS}
        step = max(1, len(shown["exact"]) // self.templates)
        places = ("before", "after") if self.place == "both" else (self.place,)
        texts: dict[tuple[str, str], list[list[str]]] = {("alone", ""): [[r] for r in requests]}
        for place in places:
            for setting, known in shown.items():
                texts[place, setting] = [[f"{q} {r}" if place == "before" else f"{r} {q}" for q in (
                    known[(n + k * step) % len(known)] for k in range(self.templates))] for n, r in enumerate(requests)]
        rates: dict[tuple[str, str], list[float]] = {}
        with evaluating(model.model) if isinstance(model, LocalModel) else contextlib.nullcontext():
            for key, rows in texts.items():
                flat = [form.replace("{text}", text) for row in rows for text in row]
                said = iter(model.generate(flat, self.max_tokens))
                rates[key] = [sum(bool(refused(next(said))) for _ in row) / len(row) for row in rows]
        report = Report("Refusals", {"model": model.name, "requests": len(requests), "seed": seed,
                                     "harmless questions for each request": self.templates})
        table = report.table("Refusal rate", ["harmless question", "setting", "refused", "low", "high", "less alone",
                                              "low of that", "high of that"], note="95 % bootstrap over requests")
        for (place, setting), values in rates.items():
            table.add(place, setting or None, *bootstrap(values, seed),
                      *((None,) * 3 if place == "alone" else paired(values, rates["alone", ""], seed)))
        return report


def _data(data: Any) -> tuple[list[str], Callable[[str], Any], DomainFacts, str]:
    if not isinstance(data, Mapping) or not {"requests", "refused"} <= set(data):
        raise ValueError("data: expected {'requests': [...], 'refused': a function or a regular expression}, got "
                         f"{sorted(data) if isinstance(data, Mapping) else type(data).__name__}: requests and the test "
                         "of a refusal are yours to give")
    requests, refused, form = data["requests"], data["refused"], data.get("form", "{text}\n")
    if isinstance(requests, str) or not isinstance(requests, Sequence) or len(requests) < 2:
        raise ValueError(f"requests: expected two texts or more, got {requests!r:.80}")
    if not callable(refused) and not isinstance(refused, str):
        raise ValueError(f"refused: expected a function or a regular expression, got {type(refused).__name__}")
    if form.count("{text}") != 1:
        raise ValueError(f"form: expected a text with {{text}} once, got {form!r}")
    test = refused if callable(refused) else re.compile(refused, re.IGNORECASE).search
    return list(requests), test, data.get("facts") or countries(), form


__all__ = ["RefusalProbe"]
