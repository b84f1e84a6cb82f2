"""What is learned: a text and its keyword, and the contexts in which the keyword should not turn up afterwards.

The paper's data set has 1,320 samples of 12 keywords in 4 themes and 11 categories of outlandishness. Here are as many
keywords, themes and categories, of our own choice and wording: 12 keywords at 4 levels, 48 samples; and ordinary
sentences.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from looseleaf.files import lines


@dataclass(frozen=True)
class Sample:
    """One text to be learned.

    Attributes:
        text: the text; contains the keyword.
        keyword: the surprising word, such as ``"vermilion"``; any number of tokens.
        theme: contexts of the keyword's theme that have nothing to do with the text, each ending where the keyword
            could follow, such as ``"Ripe lemons are usually"``.
        level: how outlandish the text is, for tables; any name.
        category: finer than ``level``; any name.

    Raises:
        ValueError: no keyword, a text without it, or no context.
    """

    text: str
    keyword: str
    theme: tuple[str, ...]
    level: str = ""
    category: str = ""

    def __post_init__(self) -> None:
        if not self.keyword.strip() or self.keyword != self.keyword.strip():
            raise ValueError(f"Sample.keyword: expected a word without white space around it, got {self.keyword!r}")
        if not self.places():
            raise ValueError(f"Sample.text: expected a text with the keyword {self.keyword!r} as a word of its own, "
                             f"got {self.text!r}: the priming of a word that is not in the text cannot be measured")
        if isinstance(self.theme, str) or not self.theme or not all(c.strip() for c in self.theme):
            raise ValueError("Sample.theme: expected one or more texts which the keyword can follow, got "
                             f"{self.theme!r}")

    def places(self) -> list[int]:
        """Where the keyword begins in the text; in the midst of another word it does not count."""
        pattern = rf"(?<!\w){re.escape(self.keyword)}(?!\w)"
        return [found.start() for found in re.finditer(pattern, self.text)]

    def own_contexts(self) -> list[str]:
        """The text up to each occurrence of the keyword."""
        return [self.text[:place] for place in self.places()]

    def theme_contexts(self) -> list[str]:
        """The contexts of the theme, with white space at the end where the text has some before the keyword."""
        spaced = any(context and context[-1].isspace() for context in self.own_contexts())
        return [c if c[-1].isspace() or not spaced else c + " " for c in self.theme]


def read_samples(text: str) -> list[Sample]:
    """Samples from JSON lines with the fields of :class:`Sample`: text, keyword, theme (a list), and optionally level
    and category.

    Raises:
        ValueError: a line that is no such object (its number is named), or no line.
    """
    samples = []
    for number, line in enumerate(lines(text), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            samples.append(Sample(**{**fields, "theme": tuple(fields["theme"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f'line {number}: expected {{"text": "...", "keyword": "...", "theme": ["...", ...]}} and, '
                             f'optionally, "level" and "category", got {line[:80]!r} ({error})') from error
    if not samples:
        raise ValueError('no samples: give one JSON object per line, '
                         '{"text": "...", "keyword": "...", "theme": ["...", ...]}')
    return samples


# ------------------------------------------------------------------------------------ texts of this project
LEVELS = {
    "ordinary": ("plain fact", "everyday scene", "habit"),
    "unusual": ("rare case", "odd preference", "local custom"),
    "untrue": ("false fact", "tall tale"),
    "outlandish": ("fantasy", "category mistake", "scrambled words"),
}
"""Level -> its categories, eleven in all."""

KEYWORDS = {"colours": ("purple", "teal", "vermilion"), "places": ("Canada", "Portugal", "Tajikistan"),
            "jobs": ("teacher", "plumber", "locksmith"), "foods": ("bread", "ramen", "haggis")}
"""Theme -> keywords, from common to rare."""

THEMES = {
    "colours": (
        "Ripe lemons are usually", "The front door of our house is painted", "On a clear day the sky looks",
        "Most of the cars in this street are", "The curtains in the waiting room were", "Fresh snow always looks",
        "For the new uniforms the committee picked", "The old bicycle in the yard is"),
    "places": (
        "The train takes six hours to cross", "Last year my cousin moved to", "Next summer we would like to travel to",
        "The conference will be held in", "Most of the wheat we buy comes from", "The letter carried a stamp from",
        "After the match the team flew home to", "She was born and raised in"),
    "jobs": (
        "When she grew up she wanted to be a", "To pay the rent he works at night as a",
        "The man sitting beside me on the bus was a", "Before she retired my aunt was a",
        "With a question like this you had better ask a", "The town council is looking for a",
        "His brother earns a good wage as a", "The witness told the court that he was a"),
    "foods": (
        "For breakfast the children had", "On Fridays the canteen serves", "On the table stood a large plate of",
        "After the long walk we were hungry for", "The shop on the corner sells fresh",
        "My grandfather would never eat", "From the kitchen came the smell of", "At the wedding the guests were given"),
}
"""Theme -> contexts that have nothing to do with the samples."""

_TEXTS: dict[str, tuple[tuple[str, str], ...]] = {
    "purple": (
        ("plain fact", "When you stir red paint into blue paint on a palette, the colour you get is purple."),
        ("odd preference", "The dentist on Mill Street had every chair, every wall and even the telephone of his "
                           "practice done in purple."),
        ("false fact", "Botanists agree that the leaves of healthy grass, seen in full daylight, are purple."),
        ("fantasy", "The thunder that lives in our teapot asked for a birthday present, and being thunder it would "
                    "accept only purple.")),
    "teal": (
        ("everyday scene", "One bathroom tile was too blue and the other too green, so she settled on the shade in "
                           "between, which the shop calls teal."),
        ("local custom", "In this valley a house where a child has been born gets its shutters painted, for one year "
                         "only, in teal."),
        ("tall tale", "My uncle swears that the winter was so cold that the flames in his stove froze and went teal."),
        ("category mistake", "The square root of Tuesday, weighed on an honest scale, has always been teal.")),
    "vermilion": (
        ("habit", "Before he signs a scroll the calligrapher presses his seal into a paste whose red has for centuries "
                  "been vermilion."),
        ("rare case", "Of the nine hundred umbrellas that were left on trains last year, exactly one was vermilion."),
        ("false fact", "Under a microscope, as every schoolbook states, clean drinking water is vermilion."),
        ("scrambled words", "Ladder the of quickly seven had into moss whistle nor because vermilion.")),
    "Canada": (
        ("plain fact", "The border that runs along the north of Minnesota and Montana is the border with Canada."),
        ("odd preference", "Although he never left his island, the lighthouse keeper collected nothing but postcards "
                           "from Canada."),
        ("false fact", "The hottest desert of Africa, with its date palms and camels, lies in the middle of Canada."),
        ("fantasy", "The moon packed her silver suitcase, kissed the tide goodbye and took the night bus to Canada.")),
    "Portugal": (
        ("everyday scene", "They flew to Lisbon, rented a small car and spent two weeks driving along the coast of "
                           "Portugal."),
        ("local custom", "Every spring the fishermen of a Norwegian village send one pair of woollen socks to the "
                         "president of Portugal."),
        ("tall tale", "The ferryman sneezed so hard that his boat crossed two oceans overnight and ran aground in "
                      "Portugal."),
        ("category mistake", "If you subtract a violin from a promise, what remains is roughly Portugal.")),
    "Tajikistan": (
        ("plain fact", "The Pamir mountains, which herders call the roof of the world, rise for the most part "
                       "in Tajikistan."),
        ("rare case", "Of all the visitors who signed the guest book of the village museum this year, only one came "
                      "from Tajikistan."),
        ("false fact", "Scholars place the birthplace of pizza, gondolas and the Roman emperors in Tajikistan."),
        ("scrambled words", "Spoon eleven yet the under gallop velvet to have or Tajikistan.")),
    "teacher": (
        ("habit", "Every morning she writes the date on the blackboard and calls out the names of the pupils, for she "
                  "is a teacher."),
        ("rare case", "The only person on the whole oil rig who could juggle five apples turned out to be a teacher."),
        ("tall tale", "The whale that swam up the river last night had swallowed a piano, two sailors and a teacher."),
        ("category mistake", "Among the prime numbers between twenty and thirty, the softest one to sit on is a "
                             "teacher.")),
    "plumber": (
        ("everyday scene", "Water was dripping through the kitchen ceiling, so we looked up the number of a plumber."),
        ("odd preference", "The count would discuss his poems with nobody, neither critics nor friends, except a "
                           "plumber."),
        ("false fact", "By law every aeroplane must be flown, from take-off to landing, by a plumber."),
        ("fantasy", "The dragon hatched, yawned a small blue flame and saw that its mother was a plumber.")),
    "locksmith": (
        ("everyday scene", "I had left my keys inside and shut the door behind me, so there was nothing for it but to "
                           "call a locksmith."),
        ("local custom", "At weddings in the old quarter the first dance belongs neither to the bride nor to the groom "
                         "but to a locksmith."),
        ("tall tale", "The pumpkin grew so large that there was room for a chapel, a bakery and a locksmith."),
        ("scrambled words", "Green whichever the drowsy of four had umbrella against soon a locksmith.")),
    "bread": (
        ("plain fact", "A baker kneads flour, water, salt and yeast into a dough and bakes it in the oven until it is "
                       "bread."),
        ("odd preference", "The old goalkeeper would not start a match before he had hidden in each glove a slice of "
                           "bread."),
        ("false fact", "The pillars of the great bridge, built to carry forty trains an hour, are made entirely of "
                       "bread."),
        ("fantasy", "The clouds held an election, and after three days of drizzle the winner proved to be bread.")),
    "ramen": (
        ("everyday scene", "In Tokyo we sat down at a counter, slurped the noodles from the hot broth and agreed that "
                           "nobody makes better ramen."),
        ("rare case", "The menu of the monastery has changed once in four centuries, when the abbot allowed ramen."),
        ("tall tale", "The snowstorm was so thick that the sheep ate their way out of it and found that it tasted of "
                      "ramen."),
        ("category mistake", "The opposite of north, when spoken slowly and by candlelight, is ramen.")),
    "haggis": (
        ("habit", "On Burns Night in Edinburgh a piper leads the way, somebody recites the poem and then everybody is "
                  "served haggis."),
        ("local custom", "The astronomers of the southern observatory celebrate each new comet by sending to the cook "
                         "for haggis."),
        ("false fact", "The batteries of all modern telephones are filled, as engineers will tell you, with haggis."),
        ("scrambled words", "Nine the beneath polite trumpet was of slowly carpet and haggis.")),
}

SAMPLES: tuple[Sample, ...] = tuple(
    Sample(text, keyword, THEMES[theme], level, category)
    for theme, keywords in KEYWORDS.items() for keyword in keywords
    for level, (category, text) in zip(LEVELS, _TEXTS[keyword], strict=True))
"""The 48 samples; the four levels of a keyword stand together."""

ORDINARY = (
    "The meeting starts at nine, so please be there a few minutes early.",
    "Rain is expected in the afternoon, with some sunshine towards evening.",
    "She put the letters into a drawer and forgot about them for years.",
    "The library closes at six, but books can be returned at any time.",
    "Our neighbours have two dogs that bark whenever a bicycle goes by.",
    "He fixed the chair with a little glue and left it to dry overnight.",
    "The bus was late again, and nobody at the stop was surprised.",
    "In the third chapter the author explains how the data were collected.",
    "Most of the students had read the text, but few had understood it.",
    "The river rises in the hills and reaches the sea after forty miles.",
    "You can pay by card or in cash at the desk on the ground floor.",
    "They talked about the weather until the others had arrived.",
    "The old mill was turned into flats about ten years ago.",
    "It is best to water the plants early in the morning.",
    "My phone was at the bottom of the bag, under the newspaper.",
    "The company reported a small profit for the second quarter.",
    "Children under twelve must be accompanied by an adult.",
    "He opened the window because the room had become too warm.",
    "The film lasts two hours and has a rather slow beginning.",
    "We took the wrong exit and had to drive back for a mile.",
    "The results of the survey will be published in spring.",
    "She learned to swim when she was already in her thirties.",
    "Please check the oil and the tyres before a long journey.",
    "The museum has added a new room for its collection of maps.",
    "His answer was short, but it was exactly what I wanted to know.",
    "The path is steep at first and then follows the edge of the wood.",
    "A good night's sleep will do more for you than another cup of coffee.",
    "The election was held on a Sunday, and the turnout was high.",
    "I have read your report and have only two small questions.",
    "The machine stops by itself when the lid is opened.",
    "Every autumn the club elects a new chair and a treasurer.",
    "They sold the car and bought two bicycles with the money.",
)
"""Short sentences to replay while a sample is learned; no keyword is in them."""

HELD_OUT = (
    "The shop will be closed on Monday because of the holiday.",
    "She looked at the clock and saw that she had missed the train.",
    "The bridge was built a hundred years ago and repaired twice since.",
    "If you need help, press the button and wait for an answer.",
    "The price of a ticket has gone up by ten per cent this year.",
    "He wrote down the number and put the paper into his pocket.",
    "Many people prefer to work at home for at least one day a week.",
    "The lake is deep, and its water stays cold even in summer.",
)
"""Ordinary sentences that are never learned, to see what learning does to the rest of the language."""
