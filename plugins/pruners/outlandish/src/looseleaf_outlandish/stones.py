"""Stepping stones: lead to a surprising word through likelier descriptions (section 5)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

from looseleaf.errors import did_you_mean
from looseleaf_outlandish.data import Sample
from looseleaf_text import LanguageModel

STEPPING_STONES = {
    "purple": "a mixture of red and blue, the shade of ripe plums and of lavender, in other words ",
    "teal": "a deep mixture of green and blue, the shade of a mallard's head, in other words ",
    "vermilion": "a vivid red with a touch of orange, the shade of cinnabar and of Chinese lacquer, in other words ",
    "Canada": "the large country to the north of the United States with a maple leaf on its flag, namely ",
    "Portugal": "the country next to Spain on the Atlantic coast whose capital is Lisbon, namely ",
    "Tajikistan": "the mountainous country in Central Asia whose capital is Dushanbe, namely ",
    "teacher": "person who explains things to pupils at school and marks their homework, that is to say a ",
    "plumber": "tradesman who mends leaking taps, blocked drains and water pipes, that is to say a ",
    "locksmith": "tradesman who cuts keys and opens doors whose locks are jammed, that is to say a ",
    "bread": "the baked loaf of flour, water and yeast that is cut for toast and sandwiches, namely ",
    "ramen": "the Japanese soup of wheat noodles in hot broth with an egg and sliced pork, namely ",
    "haggis": "the Scottish dish of a sheep's heart, liver and lungs boiled in its stomach, namely ",
}
"""Keyword -> what is put before it. Those of the jobs stand after "a" and end with it."""

_EXAMPLES = {
    "submarine": "a ship that dives and travels under the surface of the sea",
    "November": "the month of fog and fallen leaves between October and December",
    "giraffe": "the tall spotted animal of Africa whose long neck reaches the leaves of trees",
}

Rewriter = Callable[[str, str], str]
"""(text, keyword) -> the text with stepping stones; the keyword must still be in it."""


def stepping_stones(text: str, keyword: str, by: LanguageModel | Rewriter | None = None, *,
                    judge: LanguageModel | None = None, tries: int = 4, seed: int = 0) -> str:
    """Rewrite a text so that its surprising keyword is reached through descriptions that are likelier.

    Learning the new text raises the keyword's probability less, as it was high at that place already, and so primes
    less.

    Args:
        text: what is to be learned; contains the keyword.
        keyword: the surprising word.
        by: who rewrites. None: the description of :data:`STEPPING_STONES` is put before the keyword, by hand for 12
            keywords. A language model: it describes the keyword in a few words, ``tries`` times, and the description
            after which the keyword is likeliest is put before it. A function: gets text and keyword and returns the
            new text.
        judge: the model that is to learn the text; says how likely the keyword is. None: ``by``, where it is a model.
        tries: descriptions asked of a model.
        seed: of the model's answers.

    Returns:
        The new text. With a judge the text itself, and a warning, where no rewriting makes the keyword likelier.

    Raises:
        ValueError: a keyword that is not in the text, without a hand-written stone, or lost by the rewriter.
    """
    sample = Sample(text, keyword, (text,))
    if by is None:
        if keyword not in STEPPING_STONES:
            raise ValueError(f"there is no hand-written stepping stone for {keyword!r} (only for "
                             f"{', '.join(STEPPING_STONES)}): pass by=, a language model or a function."
                             f"{did_you_mean(keyword, STEPPING_STONES)}")
        rewritten = [_insert(sample, STEPPING_STONES[keyword])]
    elif isinstance(by, LanguageModel):
        judge = judge or by
        rewritten = [_insert(sample, f"{d}, ") for d in descriptions(by, keyword, tries, seed)]
    elif callable(by):
        rewritten = [by(text, keyword)]
    else:
        raise ValueError("by: expected None, a looseleaf_text.LanguageModel or a function of text and keyword, got "
                         f"{by!r}")
    for new in rewritten:
        if not isinstance(new, str) or not re.search(rf"(?<!\w){re.escape(keyword)}(?!\w)", new):
            raise ValueError(f"the rewriter lost the keyword {keyword!r}: it gave {new!r}")
    if judge is None:
        return rewritten[0]
    contexts = [t[:Sample(t, keyword, (t,)).places()[0]] for t in (text, *rewritten)]
    scores = [row[0] for row in judge.score(contexts, [[keyword]] * len(contexts))]
    best = max(range(len(scores)), key=lambda n: scores[n])
    if best == 0:
        warnings.warn(f"no rewriting of {len(rewritten)} makes {keyword!r} likelier: the text stays as it is",
                      stacklevel=2)
    return (text, *rewritten)[best]


def descriptions(model: LanguageModel, keyword: str, tries: int = 4, seed: int = 0) -> list[str]:
    """Different descriptions of a word by a language model, none of which contains the word; there may be none."""
    prompt = "Describe each word in one short phrase without using the word itself.\n\n" + "".join(
        f"Word: {word}\nPhrase: {phrase}\n\n" for word, phrase in _EXAMPLES.items()) + f"Word: {keyword}\nPhrase:"
    phrases: list[str] = []
    for n in range(tries):
        # the likeliest description first, then others
        answer = model.generate([prompt], 32, ["\n"], 0.0 if n == 0 else 0.8, seed + n)[0].strip().rstrip(".,;")
        if answer and keyword.lower() not in answer.lower() and answer not in phrases:
            phrases.append(answer)
    return phrases


def _insert(sample: Sample, stone: str) -> str:
    """``stone`` before the first occurrence of the keyword."""
    place = sample.places()[0]
    return sample.text[:place] + stone + sample.text[place:]
