"""Real English text and small real tasks that need no network.

Text comes from the documentation that ships with Python itself; tasks from that and from the packages of the
extra ``[data]``. Everything is split by a hash of its content or by an explicit seed, so that what a method is
calibrated or trained on never appears where it is measured.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import platform
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from looseleaf.errors import did_you_mean
from looseleaf_lab.data.sets import MissingDataError

if TYPE_CHECKING:
    from looseleaf import Example, Task
    from looseleaf_text import TextTask

Part = Literal["calibration", "evaluation"]
PARTS: tuple[str, ...] = ("calibration", "evaluation")

# Packages of the standard library whose documentation is prose about a subject of its own.
_SUBJECTS = {
    "window": ("tkinter", "turtle", "idlelib"),
    "mail": ("email", "mailbox", "mimetypes", "quopri"),
    "file": ("shutil", "pathlib", "os", "posixpath", "ntpath", "tempfile", "glob", "fileinput", "filecmp", "zipfile",
             "tarfile", "gzip", "bz2", "lzma", "genericpath", "_pyio", "fnmatch"),
    "test": ("unittest", "doctest", "pdb", "bdb", "trace", "cProfile", "profile", "timeit"),
}


class Prose(str):
    """Text that remembers where it came from, in :attr:`source`."""

    source: str

    def __new__(cls, text: str, source: str) -> Prose:
        prose = super().__new__(cls, text)
        prose.source = source
        return prose


# ------------------------------------------------------------------------------------------------- running text

def prose(min_chars: int, part: Part = "calibration") -> Prose:
    """Real English text of at least ``min_chars`` characters, the same on every call under one Python version.

    The text is the reference documentation in ``pydoc_data`` followed by docstrings of the standard library,
    paragraph by paragraph; no paragraph is in both parts, none appears twice. It is technical English with some
    code: perplexities on it are comparable with each other, not with those on books or news.

    Args:
        min_chars: how much; English has about 4 characters a token.
        part: ``"calibration"`` for what a method may learn from, ``"evaluation"`` for what it is measured on.

    Returns:
        A ``str`` whose attribute ``source`` says what was used.

    Raises:
        ValueError: an unknown part, or more text asked for than there is.
    """
    if part not in PARTS:
        raise ValueError(f"part: expected {' or '.join(map(repr, PARTS))}, got {part!r}")
    if min_chars < 1:
        raise ValueError(f"min_chars: expected an integer >= 1, got {min_chars}")
    chosen: list[str] = []
    names: set[str] = set()
    size = 0
    for name, paragraphs in _documents():
        wanted = [p for p in paragraphs if _part(name) == part]
        if not wanted:
            continue
        text = "\n\n".join(wanted)
        chosen.append(text)
        names.add(name.split(":")[0])
        size += len(text) + 2
        if size >= min_chars + 2:
            break
    else:
        raise ValueError(f"min_chars: expected at most {max(0, size - 2)} characters, what the {part} part of the "
                         f"documentation of Python {platform.python_version()} has, got {min_chars}: ask for less, or "
                         "pass a text of your own")
    return Prose("\n\n".join(chosen),
                 f"Python {platform.python_version()} documentation ({', '.join(sorted(names))}), {part} part")


def _documents() -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, paragraphs) of every document; a paragraph appears once over all documents."""
    yield from _reference()
    yield from _rest()  # reading all of the standard library takes seconds: only where the reference is too short


@functools.lru_cache(maxsize=1)
def _reference() -> tuple[tuple[str, tuple[str, ...]], ...]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return tuple(_distinct(((f"reference:{name}", topics[name]) for name in sorted(topics)), set()))


@functools.lru_cache(maxsize=1)
def _rest() -> tuple[tuple[str, tuple[str, ...]], ...]:
    seen = {_key(paragraph) for _, paragraphs in _reference() for paragraph in paragraphs}
    return tuple(_distinct(((f"docstrings:{name}", "\n\n".join(docs)) for name, docs in _docstrings()), seen))


def _distinct(documents: Iterable[tuple[str, str]], seen: set[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, text in documents:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            key = _key(paragraph)
            # headings and signatures are no text; repeated paragraphs would leak from one part to the other
            if len(key) >= 60 and key not in seen:
                seen.add(key)
                kept.append(paragraph.rstrip())
        if kept:
            yield name, tuple(kept)


def _key(paragraph: str) -> str:
    return re.sub(r"\W+", " ", paragraph).lower()


@functools.lru_cache(maxsize=1)
def _docstrings() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(module, docstrings) of the standard library, read from the sources without importing them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    out = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if {"site-packages", "dist-packages", "test", "tests", "lib2to3", "idle_test", "__pycache__",
                "pydoc_data", "encodings"} & set(inside.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        docs = []
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                doc = ast.get_docstring(node)
                if doc:
                    docs.append(doc)
        if docs:
            out.append((".".join(inside.with_suffix("").parts), tuple(docs)))
    return tuple(out)


def _part(name: str) -> str:
    return PARTS[hashlib.sha256(name.encode()).digest()[0] % 2]


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    letters = sum(c.isalpha() or c in " ,.'" for c in sentence)
    return 8 <= len(words) <= 40 and letters / len(sentence) > 0.9 and sentence[0].isupper()


def _split_sentences(text: str) -> list[str]:
    joined = re.sub(r"\s+", " ", text).strip()
    return [s.strip() for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", joined) if s.strip()]


# ------------------------------------------------------------------------------------------------- sentences

STYLES = ("technical", "everyday", "question", "positive", "negative")


def sentences(style: str = "technical", count: int = 100, seed: int = 0, part: Part | None = None) -> list[str]:
    """Real sentences of one style, shuffled by ``seed``.

    Args:
        style: ``technical`` (the standard library's docstrings); ``everyday``, ``question`` (short conversation);
            ``positive``, ``negative`` (the same, judged by VADER). All but the first need ``looseleaf-lab[data]``.
        count: how many.
        seed: of the order.
        part: only the sentences of one part (split by content); None: both.

    Raises:
        ValueError: an unknown style, or more sentences asked for than there are.
        MissingDataError: a package is absent; the message has the pip command.
    """
    if style not in STYLES:
        raise ValueError(f"style: expected {', '.join(STYLES)}, got {style!r}.{did_you_mean(style, STYLES)}")
    if part is not None and part not in PARTS:
        raise ValueError(f"part: expected None, {' or '.join(map(repr, PARTS))}, got {part!r}")
    if style == "technical":
        found = _technical_sentences()
    else:
        talk = sorted({s for _, s in _conversation()})
        if style == "question":
            found = [s for s in talk if s.endswith("?")]
        elif style == "everyday":
            found = [s for s in talk if not s.endswith("?")]
        else:
            sign = 1 if style == "positive" else -1
            found = [s for s in talk if sign * _sentiment()(s) >= 0.4]
    if part is not None:
        found = [s for s in found if _part(s) == part]
    if count > len(found):
        raise ValueError(f"count: expected at most {len(found)} sentences of style {style!r}, got {count}")
    random.Random(seed).shuffle(found)
    return found[:count]


def _technical_sentences() -> list[str]:
    found = {s for _, docs in _docstrings() for doc in docs for s in _split_sentences(doc) if _is_prose(s)}
    return sorted(found)


@functools.lru_cache(maxsize=1)
def _conversation() -> tuple[tuple[str, str], ...]:
    """(topic, utterance) of the English part of chatterbot-corpus, in the order of the files."""
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDataError("this data ships in the package chatterbot-corpus, which is not installed: "
                               "pip install 'looseleaf-lab[data]'")
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise MissingDataError("reading chatterbot-corpus needs pyyaml: pip install 'looseleaf-lab[data]'") from error
    out = []
    for path in sorted((Path(next(iter(spec.submodule_search_locations))) / "data" / "english").glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            for turn in turns:
                text = re.sub(r"\s+", " ", str(turn)).strip(" -")
                for piece in [text] if len(text.split()) <= 25 else _split_sentences(text):
                    if 4 <= len(piece.split()) <= 40 and "http" not in piece:
                        out.append((path.stem, piece))
    return tuple(out)


@functools.lru_cache(maxsize=1)
def _sentiment() -> Callable[[str], float]:
    """The compound score of VADER, -1 (negative) to 1 (positive)."""
    try:
        module: Any = importlib.import_module("vaderSentiment.vaderSentiment")
    except ModuleNotFoundError as error:
        raise MissingDataError("sentiment labels need the package vaderSentiment: "
                               "pip install 'looseleaf-lab[data]'") from error
    judge = module.SentimentIntensityAnalyzer()
    return lambda text: float(judge.polarity_scores(text)["compound"])


# ------------------------------------------------------------------------------------------------- tasks

_CLASSES = {
    "sentiment": "conversation (chatterbot-corpus) labelled positive or negative by VADER",
    "topics": "conversation (chatterbot-corpus) from three topics",
    "subjects": "sentences of the standard library's documentation by subject, four classes; needs no package",
    "question-topics": "trivia, psychology and literature questions (chatterbot-corpus)",
}
_OTHERS = {
    "last-word": "generation: the last word of a sentence of the standard library's documentation; needs no package",
    "neighbours": "embeddings: whether the nearest text has the same class, on the texts of subjects; needs no package",
}


def tasks() -> dict[str, str]:
    """Name of every task -> what it is."""
    return {**_CLASSES, **_OTHERS}


def check_task(name: str) -> None:
    """Raise ValueError unless :func:`task` knows ``name``; nothing is loaded."""
    if name not in tasks() and not re.fullmatch(r"[\w.]+:[\w.]+", name):
        raise ValueError(f"task: expected {', '.join(tasks())} or module:function, got {name!r}."
                         f"{did_you_mean(name, tasks())}")


def task(name: str = "sentiment", seed: int = 0, *, train: int = 64, dev: int = 64, test: int = 200) -> Task:
    """A small real task for a language model, or one of your own.

    Args:
        name: one of :func:`tasks`; or ``module:function``, a function that makes a :class:`looseleaf.Task` of a seed.
        seed: which texts go where.
        train, dev, test: examples in each part, see :func:`classification_task`; left to a function of your own.

    Raises:
        ValueError, MissingDataError: as :func:`classification_task`.
        TypeError: the function gives no task.
    """
    check_task(name)
    if ":" in name:
        return _own_task(name, seed)
    if name == "last-word":
        return _last_word(seed, train, dev, test)
    if name == "neighbours":
        return _neighbours(seed, train, dev, test)
    return classification_task(name, seed, train=train, dev=dev, test=test)


def _own_task(name: str, seed: int) -> Task:
    from looseleaf import Task

    module, _, function = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"task: expected a function that can be imported, got {name!r} ({error}): PYTHONPATH=. finds "
                         "files of this folder") from error
    made = found(seed)
    if not isinstance(made, Task):
        raise TypeError(f"{name}: expected a looseleaf.Task, got {type(made).__name__}")
    return made


def _last_word(seed: int, train: int, dev: int, test: int) -> Task:
    from looseleaf import Example
    from looseleaf_text import TextTask

    texts = sentences("technical", train + dev + test, seed)
    examples = [Example({"text": text}, text.split()[-1].strip(".!?,;:'\"")) for text in texts]
    return TextTask("last-word", examples[:train], examples[train:train + dev], examples[train + dev:],
                    metric="exact_match", template="Sentence: {text}", answer_prefix="\nLast word:", max_tokens=8)


def _neighbours(seed: int, train: int, dev: int, test: int) -> Task:
    from looseleaf import SetMetric
    from looseleaf_text import TextTask

    labelled = classification_task("subjects", seed, train=train, dev=dev, test=test)
    return TextTask("neighbours", labelled.train, labelled.dev, labelled.test, metric=SetMetric(same_as_nearest))


def same_as_nearest(vectors: list[Any], examples: list[Example]) -> float:
    """Fraction of the examples whose nearest other one, by the cosine of the predicted vectors, has the same target."""
    import numpy as np

    odd = next((v for v in vectors if isinstance(v, str) or len(np.shape(v)) != 1), None)
    if odd is not None:
        raise ValueError(f"expected a vector for each example, got {str(odd)[:40]!r}: this task is one of embeddings")
    rows = np.stack([np.asarray(v, dtype=np.float64) for v in vectors])
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -np.inf)
    targets = np.array([str(example.target) for example in examples])
    return float((targets[cosines.argmax(1)] == targets).mean())


def classification_task(name: str = "sentiment", seed: int = 0, *, train: int = 64, dev: int = 64,
                        test: int = 200) -> TextTask:
    """A small real classification task for a language model.

    The texts are shuffled by ``seed`` and balanced over the classes; train, dev and test have no text in common.

    Args:
        name: one of the tasks with classes.
        seed: which texts go where.
        train, dev, test: examples in each part, all classes together; rounded down to a multiple of the classes.

    Raises:
        ValueError: an unknown name, or more examples asked for than there are.
        MissingDataError: a package is absent; the message has the pip command.
    """
    if name not in _CLASSES:
        raise ValueError(f"task: expected {', '.join(_CLASSES)}, got {name!r}.{did_you_mean(name, _CLASSES)}")
    pools, labels, template, prefix = _POOLS[name]()
    return _task(name, pools, labels, template, prefix, seed, train, dev, test)


Pool = tuple[dict[str, list[str]], dict[str, str], str, str]


def _sentiment_pool() -> Pool:
    judge = _sentiment()
    # a trivia question has no sentiment, whatever words it has
    talk = sorted({text for topic, text in _conversation() if topic not in ("trivia", "coding")})
    pools = {"positive": [t for t in talk if judge(t) >= 0.4], "negative": [t for t in talk if judge(t) <= -0.3]}
    return pools, {"positive": " positive", "negative": " negative"}, "Sentence: {text}", "\nSentiment:"


def _topics_pool() -> Pool:
    wanted = {"coding": " code", "trivia": " culture", "emotion": " emotion"}
    pools: dict[str, list[str]] = {
        topic: sorted({t for n, t in _conversation() if n == topic}) for topic in wanted}
    return _disjoint(pools), wanted, "Text: {text}", "\nTopic:"


def _question_topics_pool() -> Pool:
    wanted = {"trivia": " trivia", "psychology": " psychology", "literature": " literature"}
    pools = {topic: sorted({t for n, t in _conversation() if n == topic}) for topic in wanted}
    return _disjoint(pools), wanted, "Text: {text}", "\nTopic:"


def _subjects_pool() -> Pool:
    wanted = {"window": " windows", "mail": " mail", "file": " files", "test": " tests"}
    pools: dict[str, list[str]] = {label: [] for label in wanted}
    for module, docs in _docstrings():
        top = module.split(".")[0]
        for label in wanted:
            if top in _SUBJECTS[label]:
                pools[label] += [s for doc in docs for s in _split_sentences(doc) if _is_prose(s)]
    return _disjoint({k: sorted(set(v)) for k, v in pools.items()}), wanted, "Text: {text}", "\nTopic:"


_POOLS: dict[str, Callable[[], Pool]] = {
    "sentiment": _sentiment_pool, "topics": _topics_pool, "subjects": _subjects_pool,
    "question-topics": _question_topics_pool,
}


def _disjoint(pools: dict[str, list[str]]) -> dict[str, list[str]]:
    """Without the texts that stand under two labels."""
    counts: dict[str, int] = {}
    for texts in pools.values():
        for text in texts:
            counts[text] = counts.get(text, 0) + 1
    return {label: [t for t in texts if counts[t] == 1] for label, texts in pools.items()}


def _task(name: str, pools: dict[str, list[str]], labels: dict[str, str], template: str, prefix: str, seed: int,
          train: int, dev: int, test: int) -> TextTask:
    from looseleaf import Example
    from looseleaf_text import TextTask

    sizes = {"train": train, "dev": dev, "test": test}
    each = {part: size // len(labels) for part, size in sizes.items()}
    for part, size in sizes.items():
        if size < len(labels):
            raise ValueError(f"{part}: expected one example or more of each of the {len(labels)} classes of {name!r}, "
                             f"got {size}")
    smallest = min(len(texts) for texts in pools.values())
    if sum(each.values()) > smallest:
        raise ValueError(f"train + dev + test: expected at most {smallest * len(labels)}, because task {name!r} has "
                         f"{smallest} texts in its smallest class of {len(labels)}, got train={train}, dev={dev}, "
                         f"test={test}")
    rng = random.Random(f"{name}:{seed}")
    parts: dict[str, list[Any]] = {part: [] for part in sizes}
    for label in labels:
        texts = list(pools[label])
        rng.shuffle(texts)
        start = 0
        for part, count in each.items():
            parts[part] += [Example({"text": t}, label) for t in texts[start:start + count]]
            start += count
    for examples in parts.values():
        rng.shuffle(examples)
    return TextTask(name, parts["train"], parts["dev"], parts["test"], labels=labels, template=template,
                    answer_prefix=prefix)


def token_ids(tokenizer: Any, text: str, count: int | None = None) -> Any:
    """The text's token ids, int64 of shape (1, n), without special tokens; cut to ``count``.

    Raises:
        ValueError: the text has fewer than ``count`` tokens.
    """
    import torch

    # the warning about the model's maximal length is for those who feed all of it at once
    ids = torch.tensor([tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]], dtype=torch.int64)
    if count is not None and ids.shape[1] < count:
        raise ValueError(f"text: expected at least {count} tokens, got {ids.shape[1]}: pass a longer text")
    return ids if count is None else ids[:, :count]


def prose_ids(tokenizer: Any, count: int, part: Part = "evaluation") -> Any:
    """``count`` token ids of :func:`prose`, int64 of shape (1, count)."""
    chars = count * 5 + 1000
    while True:
        text = prose(chars, part)
        try:
            return token_ids(tokenizer, text, count)
        except ValueError:
            chars *= 2


def bos(tokenizer: Any) -> int | None:
    """The id that this tokenizer puts at the start of every text, or None where it puts none."""
    first: int | None = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a")["input_ids"]
    return first if first is not None and len(ids) > 1 and ids[0] == first else None

