"""Candidate instructions, written by the model itself from demonstrations (as in APE)."""

from __future__ import annotations

from looseleaf_text import LanguageModel, Prompt
from looseleaf_ease.arms import generator

DEMONSTRATIONS = 10
"""Shown for each proposal, as in the authors' code."""
QUESTION = "The instruction was to"
LONGEST = 40
"""Tokens of a proposal at most."""


def context(prompt: Prompt) -> str:
    """What of a prompt stands before the example: instruction and exemplars."""
    whole = prompt.as_template(())
    asked = Prompt(template=prompt.template, answer_prefix=prompt.answer_prefix).as_template(())
    return whole.removesuffix(asked).removesuffix(prompt.separator)


def propose(model: LanguageModel, base: Prompt, pool: list, count: int, seed: int) -> list[str]:
    """At most ``count`` instructions, each made from other demonstrations; empty and repeated ones are left out.

    Greedy, so that a server's random numbers play no part; the demonstrations differ instead.

    Args:
        model: who writes them; one call each.
        base: how examples are shown.
        pool: examples.
        count: how many are asked for.
        seed: decides which demonstrations are shown.
    """
    rng = generator(seed, "instructions")
    asked = []
    for _ in range(count):
        chosen = rng.permutation(len(pool))[:DEMONSTRATIONS]
        shown = Prompt(exemplars=[pool[n] for n in chosen], template=base.template, labels=base.labels,
                       answer_prefix=base.answer_prefix, separator=base.separator)
        asked.append(f"{context(shown)}{base.separator}{QUESTION}")
    answers = [answer.strip() for answer in model.generate(asked, LONGEST, ["\n"])] if asked else []
    return [a[0].upper() + a[1:] for a in dict.fromkeys(answers) if a]
