"""The paper behind both plugins of this package."""

from looseleaf import Paper

PAPER = Paper(
    title="How new data permeates LLM knowledge and how to dilute it",
    authors=("Chen Sun", "Renat Aksitov", "Andrey Zhmoginov", "Nolan Andrew Miller", "Max Vladymyrov",
             "Ulrich Rueckert", "Been Kim", "Mark Sandler"), year=2025, arxiv="2504.09522", venue="ICLR 2025",
    summary="Teach a model a new fact without the fact leaking into unrelated contexts, and measure how far it leaks.")
