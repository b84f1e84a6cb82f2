"""The survey that this package puts into code."""

from looseleaf import Paper

PAPER = Paper(
    title="Pre-train, Prompt, and Predict: A Systematic Survey of Prompting Methods in Natural Language Processing",
    authors=("Pengfei Liu", "Weizhe Yuan", "Jinlan Fu", "Zhengbao Jiang", "Hiroaki Hayashi", "Graham Neubig"),
    year=2023, arxiv="2107.13586", venue="ACM Computing Surveys",
    summary="Words your question in several ways and weighs the answers; the parts of every prompting method to "
            "build on.")
