"""Data sets by short name: what they hold, how they are split, and their stand-ins."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from looseleaf_lab import data
from looseleaf_lab.data.made import _expression
from looseleaf_lab.data.words import alternatives, plain_wiki


@pytest.mark.parametrize("name", sorted(data.SETS))
def test_every_set_says_what_it_is_and_has_a_stand_in(name: str) -> None:
    found = data.find(name)
    assert found.about and found.license and found.source
    made = data.stand_in(name, 8)
    rows = made.rows if isinstance(made, data.Pictures) else made
    assert len(rows) == 8 and all(set(found.fields) >= set(row) - {"key"} for row in rows)
    assert all(len(archive.sha256) == 64 for archive in found.archives)
    if isinstance(made, data.Pictures):
        assert made.images.shape == (8, *(found.pictures or ())) and made.images.dtype == np.uint8
    again = data.stand_in(name, 8)
    assert (again.rows if isinstance(again, data.Pictures) else again) == rows


def test_unknown_sets() -> None:
    with pytest.raises(ValueError, match="Did you mean 'mnist'"):
        data.rows("mnits")
    with pytest.raises(ValueError, match=r"expected one with pictures .*got 'brown'"):
        data.pictures("brown")
    with pytest.raises(ValueError, match="which is a set already"):
        data.register(data.find("mnist"))


def test_a_split_is_by_content() -> None:
    rows = [{"key": data.key(str(i))} for i in range(2000)]
    parts = data.split(rows, train=0.7, test=0.2)
    assert abs(len(parts["train"]) - 1400) < 80 and abs(len(parts["test"]) - 400) < 60
    assert not set(parts["train"]) & set(parts["test"])
    turned = data.split(rows[::-1], train=0.7, test=0.2)
    assert {1999 - i for i in turned["test"]} == set(parts["test"])
    assert data.split(rows, "other", train=0.7, test=0.2) != parts
    for wrong in ({}, {"train": 0.0}, {"train": 0.9, "test": 0.2}):
        with pytest.raises(ValueError, match="expected shares"):
            data.split(rows, **wrong)


def test_a_set_is_converted_once_with_its_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from looseleaf_lab import cache

    source = tmp_path / "source.tgz"
    import tarfile
    (tmp_path / "LICENSE").write_text("free")
    with tarfile.open(source, "w:gz") as tar:
        tar.add(tmp_path / "LICENSE", "package/LICENSE")
    monkeypatch.setenv("LOOSELEAF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "fetch", lambda archive: source)
    calls = []

    def build(content: list[Path], folder: Path) -> list[data.Row]:
        calls.append([path.name for path in content[0].iterdir()])
        return [{"text": "é\u2028line"}, {"text": "b"}]

    archive = cache.Archive("npm", "thing", "1.0", cache.sha256(source), 0.1)
    monkeypatch.setitem(data.SETS, "thing", data.DataSet("thing", "a thing", "free", {"text": ""}, build, (archive,),
                                                         ("package/LICENSE*",)))
    for _ in range(2):
        assert [row["text"] for row in data.rows("thing")] == ["é\u2028line", "b"]
    assert calls == [["package"]]
    names = sorted(path.name.split("-")[0] for path in data.get("thing").iterdir())
    assert names == ["LICENSE", "about.json", "rows.jsonl"]
    assert json.loads((data.get("thing") / "about.json").read_text())["rows"] == 2


def test_what_a_package_makes_needs_that_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib

    monkeypatch.setenv("LOOSELEAF_CACHE", str(tmp_path))
    real = importlib.import_module

    def without(name: str, *more: str) -> object:
        if name.split(".")[0] in ("music21", "gymnasium", "metaworld"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *more)

    monkeypatch.setattr(importlib, "import_module", without)
    for name, extra in (("fiddle-tunes", "music"), ("grid-worlds", "control"), ("manipulation", "control")):
        with pytest.raises(data.MissingDataError, match=rf"looseleaf-lab\[{extra}\]"):
            data.rows(name)


@pytest.mark.parametrize(("pattern", "texts"), [
    ("Algiers", ["Algiers"]), ("lion|tiger", ["lion", "tiger"]), ("D{istrict }C{olumbia}", ["District Columbia",
     "District C", "DColumbia", "DC"]), ("[a|b] c", ["a c", "b c"]), ("{{x}y}z", ["xyz", "yz", "z"])])
def test_patterns_of_the_quiz(pattern: str, texts: list[str]) -> None:
    assert alternatives(pattern) == texts


def test_wiki_markup() -> None:
    text = plain_wiki("{{Infobox|a={{b}}}}'''Acid''' is a [[chemistry|chemical]] [[substance]]<ref>x</ref>.\n"
                      "[[File:a.png|thumb|with [[link]]]]\n== See also ==\n* other")
    assert text == "Acid is a chemical substance."


def test_expressions_have_a_label_for_every_symbol() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        box = _expression(rng, 0)
        assert box.width > 0 and box.latex.count("{") == box.latex.count("}")
        assert all(w > 0 and h > 0 and x >= -1e-9 and x + w <= box.width + 1e-9 for _, x, _, w, h in box.symbols)
        assert all(-box.above - 1e-9 <= y and y + h <= box.below + 1e-9 for _, _, y, _, h in box.symbols)


# ---------------------------------------------------------------------------------------------------------- real data
@pytest.mark.data("mnist")
def test_mnist() -> None:
    digits = data.pictures("mnist")
    assert digits.images.shape == (10000, 28, 28) and sorted(set(digits.column("label"))) == list(range(10))
    assert 0.12 < digits.images.mean() / 255 < 0.14
    with pytest.raises(ValueError, match="expected one of key, label"):
        digits.column("caption")


@pytest.mark.data("vader-reviews")
def test_reviews() -> None:
    rows = data.rows("vader-reviews")
    domains = {domain: sum(row["domain"] == domain for row in rows) for domain in
               ("movies", "editorials", "tweets", "products")}
    assert domains == {"movies": 10605, "editorials": 5190, "tweets": 4200, "products": 3708}
    assert all(-4 <= row["score"] <= 4 for row in rows)
    assert sum(abs(row["score"]) > 1 for row in rows if row["domain"] == "movies") == 9023


@pytest.mark.data("brown")
def test_brown() -> None:
    rows = data.rows("brown")
    assert len({row["genre"] for row in rows}) == 15 and len({row["file"] for row in rows}) == 500
    assert 1_100_000 < sum(len(row["words"]) for row in rows) < 1_200_000
    assert all(len(row["words"]) == len(row["tags"]) for row in rows)


@pytest.mark.data("quiz")
def test_quiz() -> None:
    capitals = {row["answers"]["country"][0]: row["answers"]["capital"] for row in data.rows("quiz")
                if row["topic"] == "capitals"}
    assert capitals["Algeria"] == ["Algiers"] and len(capitals) > 150


@pytest.mark.data("molecules")
def test_molecules() -> None:
    rows = data.rows("molecules")
    assert sum(row["set"] == "freesolv" for row in rows) == 642
    labels = [row["label"] for row in rows if row["set"] == "solubility"]
    assert len(labels) == 1282 and set(labels) == {"low", "medium", "high"}


@pytest.mark.sweep
@pytest.mark.data("wordnet", "news-similarity", "wordsim", "mails", "recipes", "analogies", "wikipedia-excerpts")
def test_larger_sets() -> None:
    nouns = [row for row in data.rows("wordnet") if row["pos"] == "noun"]
    assert len(nouns) == 82192 and len({row["id"] for row in nouns}) == len(nouns)
    assert len(data.rows("news-similarity")) == 1225 and len(data.rows("analogies")) == 19544
    assert {row["source"]: 0 for row in data.rows("wordsim")} == {"wordsim353": 0, "simlex999": 0}
    mails = data.rows("mails")
    assert {group: sum(row["group"] == group for row in mails) for group in ("easy-ham", "hard-ham", "spam")} == {
        "easy-ham": 3900, "hard-ham": 250, "spam": 1896}
    assert len(data.rows("recipes")) == 3129
    assert sum(len(row["text"]) for row in data.rows("wikipedia-excerpts")) > 1_000_000


@pytest.mark.sweep
@pytest.mark.data("emoji", "emoji-other-style")
def test_emoji_of_two_styles_have_the_same_splits() -> None:
    first, second = data.pictures("emoji"), data.pictures("emoji-other-style")
    assert len(first) == 1911 and first.images.shape[1:] == (64, 64, 4)
    parts = [{found.rows[i]["caption"] for i in data.split(found.rows, test=0.2)["test"]} for found in (first, second)]
    assert len(parts[0] & parts[1]) > 0.95 * len(parts[0])


def test_pages_ship_with_the_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOSELEAF_CACHE", str(tmp_path))
    rows = data.rows("pages")
    assert len(rows) == 400 and len({row["journal"] for row in rows}) > 20
    labels = {label for row in rows for label in row["labels"]}
    assert labels <= {"text", "title", "figure", "figure_caption", "table", "table_caption", "header", "footer",
                      "reference", "equation"} and len(labels) > 6
    assert all(len(row["labels"]) == len(row["boxes"]) and 4 <= len(row["boxes"]) <= 16 for row in rows)
    assert all(0 <= v <= 1 for row in rows for box in row["boxes"] for v in box)
