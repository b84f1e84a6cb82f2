"""Windows of tagged text: which there are, what is left out, tags, and every kind of data."""

import types
from collections import Counter

import numpy as np
import pytest

from looseleaf_word_class import Windows, brown_class, labelled, penn_class, tagged, windows
from looseleaf_word_class.tags import BROWN, CLASSES, PENN
from looseleaf_word_class.windows import as_windows, joined, read_tagged

TEXT = [(f"w{n}", "ABC"[n % 3]) for n in range(12)]


def test_every_window_has_nine_words_and_the_class_of_the_tenth():
    found = windows([TEXT, TEXT[:10]])
    assert len(found) == 4
    assert found.contexts[1] == tuple(f"w{n}" for n in range(1, 10))
    assert found.labels == ["A", "B", "C", "A"]
    assert found.last == ["C", "A", "B", "C"]
    assert found.next_words == ["w9", "w10", "w11", "w9"]
    assert found.counts == [2, 1, 1, 2]
    assert found.texts == [0, 0, 0, 1]
    assert found.written[0] == " ".join(f"w{n}" for n in range(9))


def test_stride_and_context():
    found = windows([TEXT], context=3, stride=4)
    assert [c[0] for c in found.contexts] == ["w0", "w4", "w8"]


def test_punctuation_and_unknown_next_words_are_left_out_and_counted():
    text = [("a", "N")] * 3 + [(",", "."), ("la", "X"), ("b", "V"), ("!", "PUNCT"), ("c", None)]
    found = windows([text, text[:2]], context=2)
    assert found.labels == ["N", "V"]
    assert found.left_out == {"punctuation comes next": 2, "the next word's class is unknown": 2,
                              "texts of fewer than 3 words": 1}
    assert found.contexts[1] == (",", "la")  # punctuation is read all the same


def test_a_sample_has_as_many_of_each_class_and_depends_on_the_seed_alone():
    found = windows([[(f"w{n}", "ABBBCC"[n % 6]) for n in range(200)]])
    sample = found.sample(20, seed=3)
    assert Counter(sample.labels) == {"A": 20, "B": 20, "C": 20}
    assert sample == found.sample(20, seed=3)
    assert sample != found.sample(20, seed=4)
    assert Counter(found.sample(40, seed=3).labels) == {"B": 40, "C": 40}  # all classes with enough
    assert found.sample(5, ["C", "A"]).classes == ["A", "C"]
    assert sample.left_out == found.left_out


@pytest.mark.parametrize(("per_class", "classes", "message"), [
    (500, None, "two classes or more with 500 windows each, got 0; there are A"),
    (90, ["A", "B"], "90 windows or more of each, got fewer of A"),
    (5, ["A", "Z"], "got fewer of Z"),
    (5, ["A"], "two classes or more"),
])
def test_too_few_windows_are_refused(per_class, classes, message):
    with pytest.raises(ValueError, match=message):
        windows([[(f"w{n}", "ABBBCC"[n % 6]) for n in range(200)]]).sample(per_class, classes)


def test_words_are_joined_as_english_is_written_or_by_their_own_spaces():
    words = ["He", "said", "(", "or", "so", ")", ",", "do", "n't", "go", "."]
    assert joined([(w, "X") for w in words]) == "He said (or so), don't go."
    assert joined([("a", "X", ""), ("b", "X", "  "), ("c", "X", " ")]) == "ab  c"


@pytest.mark.parametrize(("tag", "name"), [
    ("at", "DET"), ("nn-tl", "NOUN"), ("NN$-TL", "NOUN"), ("bez*", "VERB"), ("*", "PRT"), ("pps+bez", "X"),
    ("fw-nn", "X"), ("jj-hl", "ADJ"), (",-hl", "."), ("--", "."), ("vbd", "VERB"), ("in-nc", "ADP"), ("pp$", "DET"),
    ("wp$", "DET"), ("nil", "X"), ("strange", "X"), ("cd", "NUM"), ("rb$", "ADV"), ("''", "."), ("to", "PRT")])
def test_tags_of_brown(tag, name):
    assert brown_class(tag) == name


def test_tag_maps_give_universal_classes():
    assert {*BROWN.values(), *PENN.values()} == set(CLASSES)
    assert [penn_class(t) for t in ("VBZ", "PRP$", "-LRB-", "NNPS", "?")] == ["VERB", "DET", ".", "NOUN", "X"]


class Token(types.SimpleNamespace):
    """What a token of spaCy has of use here."""


def pipeline(text):
    words = text.replace("\n", " \n ").split(" ")
    return [Token(text=w, pos_="SPACE" if w == "\n" else "NOUN" if len(w) > 3 else "DET", whitespace_=" ",
                  is_space=w == "\n") for w in words]


def test_untagged_texts_go_through_a_pipeline():
    text = "the river has seen the old town again\nand again the people stay"
    found = as_windows(([text], pipeline))
    assert set(found.labels) <= {"NOUN", "DET"}
    assert found.written[0] == "the river has seen the old town again and"
    assert tagged(["ab\ncdef"], pipeline) == [[("ab", "DET", " "), ("cdef", "NOUN", " ")]]
    with pytest.raises(ValueError, match=r"tags word classes.*token.pos_ empty"):
        tagged(["a b"], lambda t: [Token(text="a", pos_="", whitespace_=" ", is_space=False)])


def test_spacy_itself():
    spacy = pytest.importorskip("spacy", reason="needs looseleaf-word-class[spacy]")
    nlp = spacy.blank("en")
    nlp.add_pipe("attribute_ruler").add([[{}]], {"POS": "NOUN"})
    assert tagged(["the dog."], nlp) == [[("the", "NOUN", " "), ("dog", "NOUN", ""), (".", "NOUN", "")]]


def test_labels_of_ones_own():
    found = as_windows((["a short text", "another one"], np.array([3, 5])))
    assert found.labels == [3, 5]
    assert found.contexts == [("a", "short", "text"), ("another", "one")]
    assert (found.last, found.counts) == (None, None)
    assert found.last_words == ["text", "one"]
    assert labelled([["a", "b"]], ["x"], [7]).texts == [7]


def test_two_tagged_texts_are_no_labels_and_windows_stay_windows():
    assert len(as_windows((TEXT, TEXT))) == 6
    found = windows([TEXT])
    assert as_windows(found) is found
    assert isinstance(found, Windows)


def test_a_file_of_tagged_words():
    line = " ".join(f"{w}/{c}" for w, c in TEXT)
    assert as_windows(f"{line}\n\n{line}\n") == windows([TEXT, TEXT])
    assert read_tagged("1/2/NUM") == [[("1/2", "NUM")]]
    with pytest.raises(ValueError, match=r"line 2: expected tagged words .* got 'plain'"):
        read_tagged("a/DET\nplain text")


@pytest.mark.parametrize(("data", "message"), [
    (["a plain text of words"], r"\(word, class\) pairs in text 0, got 'a plain.*\(texts, nlp\)"),
    ([["the", "dog"]], r"pairs in text 0, got 'the'"),
    ([[("", "N")] * 12], "pairs in text 0"),
    ([TEXT[:9]], "texts of 10 words or more with a class each, got 1 texts of at most 9 words"),
    ([[(".", ".")] * 20], "all next words are punctuation or unknown"),
    (7, "tagged texts .* got int"),
    ((["a", "b"], [1]), "one for each of 2 contexts, got 1"),
    ((["a", " "], [1, 2]), "got an empty one, number 1"),
])
def test_bad_data_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        as_windows(data)
