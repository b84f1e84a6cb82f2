"""Where templates come from: written by hand, paraphrased, mined (survey, sections 3.2 and 3.3.1)."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from looseleaf_text import LanguageModel, Template, TextTask
from looseleaf_text.template import Slot

CLASSIFICATION = (
    "{task}\nQuestion: Which of these fits best, {options}?\nAnswer:[Z]",
    "Options: {options}.\n{task}\nThe right option is:[Z]",
    "{task}\nIn one word, {options}, this is:[Z]",
    "Read the following and say what it is: {options}.\n\n{task}\nAnswer:[Z]",
    "Classify into {options}.\n\n{task}\nClass:[Z]",
    "{task}\nLabel ({options}):[Z]",
    "{task}\nAll in all, the best description is[Z]",
)
"""Wordings around a task: ``{task}`` is its own template, ``{options}`` its answers."""

GENERATION = (
    "{task}\nAnswer:[Z]", "Question: {task}\nAnswer:[Z]", "Answer briefly.\n\n{task}\nAnswer:[Z]",
    "{task}\nThe answer is[Z]", "Task: {task}\nResult:[Z]",
)

ASK = "Rewrite the following text in other words and keep its meaning.\nText: {text}\nRewritten text:"


def default_pool(task: TextTask) -> list[Template]:
    """Templates written by hand that any task can be put into: the task's own, then seven others.

    A task without labels has five others.
    """
    names = [text.strip() for text in (task.labels or {}).values()]
    options = f"{', '.join(names[:-1])} or {names[-1]}" if names else ""
    shown = Template.of_task(dataclasses.replace(task, answer_prefix="")).parts[:-1]
    known: dict[str, Sequence[str | Slot]] = {"{task}": shown, "{options}": [options], "[Z]": [Slot("Z", True)]}
    out = [Template.of_task(task)]
    for wording in CLASSIFICATION if names else GENERATION:
        pieces = re.split(r"(\{task\}|\{options\}|\[Z\])", wording)
        out.append(Template.of([part for piece in pieces for part in known.get(piece, [piece])]))
    return out


def paraphrase(template: Template, model: LanguageModel, count: int, *, seed: int = 0, temperature: float = 0.9,
               max_tokens: int = 48) -> list[Template]:
    """Prompt paraphrasing: the longest text of a template in the model's own words, the rest as it is.

    Args:
        template: what is paraphrased; its slots and its other texts stay.
        model: one that generates.
        count: paraphrases asked for, >= 1, one call each; fewer come back where the model repeats itself or
            says nothing.
        seed: of the sampling.
        temperature: > 0, or all paraphrases would be one.
        max_tokens: longest paraphrase.

    Raises:
        ValueError: a template without a word of its own, a count below 1, or a temperature of 0.
    """
    if count < 1 or not temperature > 0:
        raise ValueError(f"paraphrase: expected count >= 1 and temperature > 0, got count={count!r}, "
                         f"temperature={temperature!r}")
    texts = [p for p in template.parts if isinstance(p, str)]
    longest = max(texts, key=lambda t: len(re.findall(r"\w", t)), default="")
    core = longest.strip()
    if not re.search(r"\w", core):
        raise ValueError(f"the template {template.text!r}: expected words of its own to paraphrase, got none")
    lead, trail = longest[:longest.index(core)], longest[longest.index(core) + len(core):]
    place = template.parts.index(longest)
    prompt = ASK.replace("{text}", " ".join(core.split()))
    templates: dict[str, Template] = {}
    for n in range(count):
        # One request each: the seed of a request is that of all its texts.
        text = model.generate([prompt], max_tokens, ["\n"], temperature, seed * 1000 + n)[0].strip().strip('"').strip()
        if re.search(r"\w", text) and text != core:
            new = Template.of([*template.parts[:place], lead + text + trail, *template.parts[place + 1:]],
                              template.chat)
            templates[new.text] = new
    return list(templates.values())


def mine_templates(corpus: Iterable[str], pairs: Sequence[tuple[str, str]], most: int = 10, longest: int = 8
                   ) -> list[Template]:
    """Prompt mining: the words that stand between an input and its answer in a corpus (Jiang et al. 2020).

    Args:
        corpus: texts, such as sentences.
        pairs: (input, answer) that are known to belong together.
        most: templates given back, the most frequent first, ties in order of appearance.
        longest: words between the two, at most.

    Returns:
        Templates such as ``"[X] is the capital of [Z]"``; empty where no text holds a pair.

    Raises:
        ValueError: no pairs, an empty text in one, or numbers below 1.
    """
    if not pairs or any(not x.strip() or not z.strip() for x, z in pairs) or most < 1 or longest < 1:
        raise ValueError("mine_templates: expected one pair of two texts or more, most >= 1 and longest >= 1, got "
                         f"{list(pairs)[:3]}, most={most!r}, longest={longest!r}")
    count: Counter[str] = Counter()
    for text in corpus:
        for x, z in pairs:
            for first, second, shape in ((x, z, ("[X]", "[Z]")), (z, x, ("[Z]", "[X]"))):
                for match in re.finditer(rf"\b{re.escape(first)}\b(.{{1,200}}?)\b{re.escape(second)}\b", text):
                    between = match.group(1)
                    if re.search(r"\w", between) and len(between.split()) <= longest:
                        count[shape[0] + Template.escape(between) + shape[1]] += 1
    return [Template(text) for text, _ in count.most_common(most)]
