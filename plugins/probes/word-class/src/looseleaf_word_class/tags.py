"""Tags of corpora -> the twelve universal word classes of Petrov et al. (2012); the maps are this project's."""

from __future__ import annotations

from collections.abc import Mapping

CLASSES = ("NOUN", "VERB", "ADJ", "ADV", "PRON", "DET", "ADP", "NUM", "CONJ", "PRT", ".", "X")
"""``.`` is punctuation; ``X`` whatever has no class here: foreign words, interjections, two words written as one."""


def _table(rows: Mapping[str, str]) -> dict[str, str]:
    return {tag: name for name, tags in rows.items() for tag in tags.split()}


BROWN: dict[str, str] = _table({
    "NOUN": "nn nns np nps nr nrs",
    "VERB": "be bed bedz beg bem ben ber bez do dod doz hv hvd hvg hvn hvz md vb vbd vbg vbn vbz",
    "ADJ": "jj jjr jjs jjt od",
    "ADV": "rb rbr rbt rn ql qlp wql wrb",
    "PRON": "pn ppl ppls ppo pps ppss pp$$ wpo wps ex",
    "DET": "at dt dti dts dtx abl abn abx ap pp$ wdt wp$",
    "ADP": "in",
    "NUM": "cd",
    "CONJ": "cc cs",
    "PRT": "to rp *",
    ".": ". , : ; ? ! ( ) -- ' '' `` \" -",
    "X": "uh nil fw",
})
"""Tag of the Brown corpus, without its endings, -> class."""
PENN: dict[str, str] = _table({
    "NOUN": "NN NNS NNP NNPS",
    "VERB": "VB VBD VBG VBN VBP VBZ MD",
    "ADJ": "JJ JJR JJS",
    "ADV": "RB RBR RBS WRB",
    "PRON": "PRP WP EX",
    "DET": "DT PDT PRP$ WDT WP$",
    "ADP": "IN",
    "NUM": "CD",
    "CONJ": "CC",
    "PRT": "TO RP POS",
    ".": ". , : `` '' \" -LRB- -RRB- ( ) # $ HYPH NFP",
    "X": "FW UH LS SYM ADD AFX XX",
})
"""Tag of the Penn Treebank -> class; ``IN`` is ADP also where it is a subordinating conjunction."""


def brown_class(tag: str) -> str:
    """The class of a tag of the Brown corpus, such as ``nn-tl`` or ``bez*``.

    Marks of titles, headlines and citations (``-tl``, ``-hl``, ``-nc``), of possession and of negation are looked
    through. Two words written as one (``pps+bez``), foreign words and unknown tags are ``X``.
    """
    tag = tag.lower()
    if tag.startswith("fw-") or "+" in tag:
        return "X"
    if tag in BROWN:
        return BROWN[tag]
    tag = tag.split("-")[0] or tag
    return BROWN.get(tag) or BROWN.get(tag.rstrip("*") or tag) or BROWN.get(tag.rstrip("$") or tag, "X")


def penn_class(tag: str) -> str:
    """The class of a tag of the Penn Treebank; ``X`` where it is unknown."""
    return PENN.get(tag, "X")


__all__ = ["BROWN", "CLASSES", "PENN", "brown_class", "penn_class"]
