"""Prompt decomposition (survey, section 5.4): one hard question becomes several easy ones, each with its own prompt."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

from looseleaf_text import Example, LanguageModel, Template, Verbalizer
from looseleaf_prompting_survey.formalism import search

Part = dict[str, str]


@dataclasses.dataclass
class PromptDecomposer:
    """Asks about each part of an example, such as every span of a sentence for its entity type.

    As in TemplateNER (Cui et al. 2021): "[X] {span} is a [Z] entity" for every span.

    Args:
        template: with one answer slot; its slots are the example's fields and those of a part.
        verbalizer: what a part can be.
        split: an example -> the fields of each of its parts; see :func:`spans`.
    """

    template: Template
    verbalizer: Verbalizer
    split: Callable[[Example], Sequence[Part]]

    def parts(self, example: Example) -> list[Example]:
        """The sub-examples, each with the fields of the example and of the part.

        Raises:
            ValueError: no parts, or a part with a field that the example has already.
        """
        found = list(self.split(example))
        if not found:
            raise ValueError(f"nothing to ask about in {example.fields}: split() gave no part")
        for part in found:
            both = sorted(set(part) & set(example.fields))
            if both:
                raise ValueError(f"a part has the fields {both}, which the example has too: give them other names")
        return [Example({**example.fields, **part}) for part in found]

    def run(self, example: Example, model: LanguageModel) -> list[tuple[Part, str, float]]:
        """Each part, the label found for it, and the label's log-probability; one call per part."""
        asked = self.parts(example)
        out = []
        for sub, found in zip(asked, search(self.template, asked, model, self.verbalizer), strict=True):
            assert found.log_probs is not None
            row = self.verbalizer.log_probs([[found.log_probs[z] for z in self.verbalizer.space]])[0]
            best = max(range(len(row)), key=row.__getitem__)
            part = {k: v for k, v in sub.fields.items() if k not in example.fields}
            out.append((part, self.verbalizer.labels[best], row[best]))
        return out


def spans(longest: int = 3, field: str = "text", name: str = "span") -> Callable[[Example], list[Part]]:
    """A ``split`` that gives every run of up to ``longest`` words, in order of appearance.

    Args:
        longest: words in a span, at most; from 1.
        field: of the example that is cut up.
        name: of the part's field.
    """
    if not isinstance(longest, int) or longest < 1:
        raise ValueError(f"spans(longest={longest!r}): allowed is a whole number from 1")

    def split(example: Example) -> list[Part]:
        words = re.findall(r"\w[\w'-]*", example.fields[field])
        found = [" ".join(words[at:at + n]) for at in range(len(words)) for n in range(1, longest + 1)
                 if at + n <= len(words)]
        return [{name: span} for span in dict.fromkeys(found)]

    return split
