"""Built-in pairs of general instructions and responses, written for this package, for ranking and for adherence."""

from __future__ import annotations

from looseleaf_implicit_instruction_tuning.pairs import Pair

PAIRS = [Pair(*row) for row in (
    ("Why is the sky blue?", "Air scatters blue light more than red light, so that blue reaches us from all sides."),
    ("How do I boil an egg?", "Put the egg into boiling water for eight minutes, then cool it under cold water."),
    ("What is photosynthesis?", "Plants use sunlight to turn water and carbon dioxide into sugar and oxygen."),
    ("Give me a tip for learning a language.", "Practice a little every day, and speak with people who know it well."),
    ("Who was Marie Curie?", "She was a physicist and chemist who studied radioactivity and won two Nobel Prizes."),
    ("Write a sentence about the sea.", "Waves rolled onto the beach while gulls cried above the water."),
    ("How does a bicycle stay upright?", "A moving bicycle steers into a fall, with its wheels under the rider."),
    ("What should I do when I catch a cold?", "Rest, drink plenty of water, and see a doctor if the fever stays high."),
    ("Explain what inflation is.", "Inflation means that prices rise over time, so that money buys less than before."),
    ("How can I sleep better?", "Go to bed at the same time each night and keep your bedroom dark and quiet."),
    ("What does a programmer do?", "A programmer writes and tests the code that tells a computer what to do."),
    ("Describe a desert.", "A desert is a dry place with little rain, few plants, hot days and cold nights."),
    ("Why do cats purr?", "Cats purr when they are content, and sometimes to calm themselves when they are hurt."),
    ("How do vaccines work?", "A vaccine shows the immune system a harmless part of a germ, so that it can fight it."),
    ("What is the use of a compass?", "A compass needle points north, which helps travelers find their way."),
    ("Suggest a name for a bakery.", "You could call your bakery The Golden Crust."),
    ("How is paper made?", "Wood is ground into pulp, spread over a screen, pressed and dried into sheets."),
    ("What causes earthquakes?", "Plates of the Earth's crust slide past each other and suddenly release stress."),
    ("How do I write a good letter of application?", "Say which job you want and why you fit it."),
    ("What is jazz?", "Jazz is a style of music from New Orleans, with swing rhythm and improvised solos."),
    ("How do I water a cactus?", "Water a cactus only when its soil is dry, about every two weeks."),
    ("Why do leaves fall in autumn?", "Trees drop their leaves to save water and energy during the winter."),
    ("What is a budget?", "A budget is a plan for how you will spend and save your money each month."),
    ("How do airplanes fly?", "The wings push air down as the plane moves forward, which lifts it up."),
)]
"""Instruction and response, one sentence each."""

__all__ = ["PAIRS"]
