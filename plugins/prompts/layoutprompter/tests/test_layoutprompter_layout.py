"""Layouts as text and back, similarities, metrics, ranking: the card's checks, against the obvious way."""

from __future__ import annotations

import itertools
import math
import random
import xml.etree.ElementTree
from collections.abc import Sequence

import numpy as np
import pytest

from looseleaf import Example
from looseleaf_layoutprompter import (
    CANVASES,
    Canvas,
    Layout,
    LayoutSerializer,
    draw,
    layout_example,
    layout_schema,
    parse,
    rank,
    saliency_boxes,
    select,
)
from looseleaf_layoutprompter.layout import (
    alignment,
    box_similarity,
    coverage_similarity,
    greatest_likeness,
    label_similarity,
    likeness,
    overlap,
    place_relation,
    relations,
    size_relation,
    type_violation,
)
from looseleaf_layoutprompter.optimizer import similarity

LABELS = ("figure", "text", "title", "text button")
CANVAS = Canvas(120, 160)


def some_layout(rng: random.Random, count: int | None = None, labels: Sequence[str] = LABELS) -> Layout:
    count = count or rng.randint(1, 8)
    return Layout(tuple(rng.choices(labels, k=count)), tuple(
        (rng.uniform(0, 0.7), rng.uniform(0, 0.7), rng.uniform(0.05, 0.6), rng.uniform(0.05, 0.6))
        for _ in range(count)))


# ------------------------------------------------------------------------------------------------- text and back
@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES)
@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("output", ["html", "seq", "json"])
def test_a_layout_read_back_is_the_layout_in_whole_pixels(output: str, index: bool, canvas: Canvas) -> None:
    rng = random.Random(0)
    for separator in (True, False):
        serializer = LayoutSerializer(canvas=canvas, labels=LABELS, output=output, index=index, separator=separator)
        for _ in range(50):
            layout = some_layout(rng)
            parsed = parse(serializer.layout(layout), canvas, LABELS, output, index=index)
            assert parsed.problem == "" and parsed.layout.labels == layout.labels
            pixels = np.floor(layout.array * [canvas.width, canvas.height, canvas.width, canvas.height])
            assert np.array_equal(parsed.layout.array, pixels / canvas.scale)  # exactly
            assert serializer.layout(parsed.layout) == serializer.layout(layout)


def test_every_whole_pixel_survives_the_way_through_fractions() -> None:
    for width in range(1, 400, 7):
        values = np.arange(width + 1)
        fractions = values / width
        layout = Layout(("a",) * len(values), [(x, x, x, x) for x in fractions])
        assert np.array_equal(layout.pixels(Canvas(width, width))[:, 0], values)


def test_texts_are_those_of_the_card() -> None:
    layout = Layout(("title", "text"), ((0.5, 0.5, 0.25, 0.125), (0.1, 0.15, 0.375, 0.3)))
    example = layout_example(layout, "gent")
    html = LayoutSerializer(canvas=CANVAS)
    assert html.constraint(example.inputs) == "Element Type Constraint: text 0 | title 1"
    assert html.layout(example.target) == (
        '<html>\n<body>\n<div class="canvas" style="left: 0px; top: 0px; width: 120px; height: 160px"></div>\n'
        '<div class="text" style="index: 0; left: 12px; top: 24px; width: 45px; height: 48px"></div>\n'
        '<div class="title" style="index: 1; left: 60px; top: 80px; width: 30px; height: 20px"></div>\n'
        '</body>\n</html>')
    sequence = LayoutSerializer("gents", CANVAS, output="seq")
    assert sequence.layout(example.target) == "text 0 12 24 45 48 | title 1 60 80 30 20"
    assert sequence.constraint(layout_example(layout, "gents").inputs) == \
        "Element Type and Size Constraint: text 0 45 48 | title 1 30 20"
    inputs = {"labels": ["title", "figure", "text"], "relations": [(1, "larger", 2), (0, "top", "canvas")]}
    assert LayoutSerializer("genr").constraint(inputs) == (
        "Element Type Constraint: figure 0 | text 1 | title 2\n"
        "Element Relationship Constraint: figure 0 larger text 1 | title 2 top canvas")
    assert LayoutSerializer("genr").constraint({**inputs, "relations": []}).count("\n") == 0
    assert LayoutSerializer("completion").constraint(layout_example(layout, "completion").inputs) == \
        "Partial Layout: text 0 12 24 45 48"
    assert LayoutSerializer("refinement").constraint({"noisy": layout}) == \
        "Noise Layout: title 0 60 80 30 20 | text 1 12 24 45 48"
    boxes = [(10 / 120, 20 / 160, 30 / 120, 40 / 160), (0, 0, 1, 1)]
    assert LayoutSerializer("content").constraint({"labels": ["text"], "saliency": boxes}) == (
        "Content Constraint: left 10px, top 20px, width 30px, height 40px | left 0px, top 0px, width 120px, "
        "height 160px\nElement Type Constraint: text 0")
    assert LayoutSerializer("text").constraint({"text": "A page\n\nwith a title"}) == "Text: A page with a title"
    assert "types: text, title." in LayoutSerializer("text", labels=("text", "title")).preamble()
    lines = html.preamble().splitlines()
    assert lines[1:] == ["Task Description: generation conditioned on given element types",
                         "Layout Domain: document layout", "Canvas Size: canvas width is 120px, canvas height is 160px"]


def test_options_of_the_input() -> None:
    inputs = {"labels": ["text", "title"], "sizes": [(0.375, 0.3), (0.25, 0.125)]}

    def shown(**options: object) -> str:
        return LayoutSerializer("gents", CANVAS, **options).constraint(inputs).partition(": ")[2]

    assert shown(index=False) == "text 45 48 | title 30 20"
    assert shown(separator=False) == "text 0 45 48 title 1 30 20"
    assert shown(unknown=True) == "text 0 <unk> <unk> 45 48 | title 1 <unk> <unk> 30 20"
    assert '<div class="title" style="index: 1; width: 30px; height: 20px"></div>' in shown(input="html")
    assert "left: <unk>px; top: <unk>px; width: 30px" in shown(input="html", unknown=True)


def test_order_of_elements() -> None:
    layout = Layout(("title", "figure", "title", "text"), ((0.5, 0.1, 0.1, 0.1), (0.2, 0.9, 0.1, 0.1),
                                                           (0.1, 0.1, 0.2, 0.1), (0.1, 0.5, 0.1, 0.1)))
    assert layout_example(layout, "text", text="x").target == layout.take([2, 0, 3, 1])
    assert layout_example(layout, "completion").target == layout.take([2, 0, 3, 1])
    for task in ("gent", "genr", "refinement"):
        assert layout_example(layout, task).target == layout.take([1, 3, 2, 0])
    shuffled = {layout_example(layout, "gents", seed=n).target for n in range(20)}
    assert shuffled == {layout.take([1, 3, 2, 0]), layout.take([1, 3, 0, 2])}
    noisy = layout_example(layout, "refinement", noise=0.5).inputs["noisy"]
    assert noisy.labels == layout.take([1, 3, 2, 0]).labels and noisy.array.min() == 0 and noisy.array.max() == 1


def test_noise_and_relations_have_the_stated_size_and_come_from_the_seed() -> None:
    middle = Layout(("a",) * 500, ((0.5, 0.5, 0.5, 0.5),) * 500)
    moved = layout_example(middle, "refinement").inputs["noisy"].array - 0.5
    assert moved.std() == pytest.approx(0.01, rel=0.05) and abs(moved.mean()) < 0.001
    layout = some_layout(random.Random(1), 6)
    first, again, other = (relations(layout, random.Random(n)) for n in (0, 0, 1))
    assert first == again != other and len(first) == int(0.1 * 2 * math.comb(7, 2)) == 4
    every = relations(layout, random.Random(0), 1.0)
    assert len(set(every)) == len(every) == 42 and sum(a == "canvas" for _, _, a in every) == 12


def test_relations_by_their_definition() -> None:
    a = (0.4, 0.4, 0.2, 0.2)
    assert [size_relation((0, 0, 0.2, h), a) for h in (0.17, 0.19, 0.21, 0.23)] == [
        "smaller", "equal", "equal", "larger"]
    assert [place_relation(b, a) for b in ((0, 0, 1, 0.4), (0, 0.6, 1, 0.1), (0, 0.5, 0.4, 0.1), (0.6, 0.5, 0.1, 0.1),
                                           (0.5, 0.5, 0.1, 0.1))] == ["top", "bottom", "left", "right", "center"]
    assert [place_relation((0, t, 0.1, 0.1), None) for t in (0.2, 0.4, 0.7)] == ["top", "center", "bottom"]


# ------------------------------------------------------------------------------------------------------ likeness
def brute_force(a: Layout, b: Layout) -> float:
    small, large = sorted((a, b), key=len)
    best = 0.0
    for places in itertools.permutations(range(len(large)), len(small)):
        total = sum(2 ** (-2 * math.dist(small.boxes[n], large.boxes[m]))
                    for n, m in enumerate(places) if small.labels[n] == large.labels[m])
        best = max(best, total)
    return best / len(small)


def test_the_best_matching_is_that_of_brute_force() -> None:
    rng = random.Random(0)
    for _ in range(60):
        a, b = some_layout(rng, rng.randint(1, 6)), some_layout(rng, rng.randint(1, 6))
        found = box_similarity(a.labels, a.array, b.labels, b.array)
        assert found == pytest.approx(brute_force(a, b), abs=1e-12)
        assert likeness(a, b) == pytest.approx(likeness(b, a), abs=1e-12)
    assert likeness(a, a) == pytest.approx(1)
    assert label_similarity(["a", "a", "b"], ["a", "c"]) == 2 / 5


def test_greatest_likeness_is_that_of_all() -> None:
    rng = random.Random(0)
    pool = [some_layout(rng) for _ in range(80)]
    for _ in range(30):
        layout = some_layout(rng)
        assert greatest_likeness(layout, pool) == pytest.approx(max(likeness(layout, o) for o in pool), abs=1e-12)


def test_coverage_counts_pixels() -> None:
    half, quarter = [(0, 0, 0.5, 1)], [(0, 0, 0.5, 0.5), (0, 0, 0.25, 0.25)]
    assert coverage_similarity(half, quarter, Canvas(10, 10)) == (25 + 1) / (50 + 1)
    assert coverage_similarity([], [], Canvas(10, 10)) == 1


def test_saliency_boxes_of_a_picture() -> None:
    picture = np.zeros((400, 500))
    picture[10:110, 20:120] = 255
    picture[40:60, 40:60] = 0  # a hole, with something in it
    picture[48:52, 48:52] = 255
    picture[200:280, 300:380] = 255  # both sides at most 80
    picture[300:390, 100:160] = 101  # 90 x 60 = 5,400 pixels
    picture[300:390, 300:400] = 100  # not above the threshold
    picture[150:240, 0:70] = 101  # 6,300
    assert saliency_boxes(picture) == ((20 / 500, 10 / 400, 100 / 500, 100 / 400), (0, 150 / 400, 70 / 500, 90 / 400))
    with pytest.raises(ValueError, match=r"expected numbers of shape \(height, width\)"):
        saliency_boxes(np.zeros((2, 3, 3)))


# -------------------------------------------------------------------------------------------------------- metrics
def naive_overlap(layout: Layout) -> float:
    total = 0.0
    for n, (l1, t1, w1, h1) in enumerate(layout.boxes):
        for m, (l2, t2, w2, h2) in enumerate(layout.boxes):
            if n != m and w1 * h1 > 0:
                across, down = min(l1 + w1, l2 + w2) - max(l1, l2), min(t1 + h1, t2 + h2) - max(t1, t2)
                total += max(across, 0) * max(down, 0) / (w1 * h1)
    return total / len(layout)


def naive_alignment(layout: Layout) -> float:
    def lines(box: Sequence[float]) -> list[float]:
        return [start + part * size for start, size in zip(box[:2], box[2:], strict=True) for part in (0, 0.5, 1)]

    total = 0.0
    for n, box in enumerate(layout.boxes):
        off = [abs(x - y) for m, other in enumerate(layout.boxes) if m != n
               for x, y in zip(lines(box), lines(other), strict=True)]
        total += -math.log(1 - min(off)) if off else 0
    return total / len(layout)


def test_metrics_are_those_of_their_formulas() -> None:
    rng = random.Random(0)
    for _ in range(50):
        layout = some_layout(rng)
        assert overlap(layout) == pytest.approx(naive_overlap(layout), abs=1e-12)
        assert alignment(layout) == pytest.approx(naive_alignment(layout), abs=1e-12)
    assert overlap(Layout(("a", "b"), ((0, 0, 0, 0), (0, 0, 1, 1)))) == 0
    assert alignment(Layout(("a",), ((0.1, 0.2, 0.3, 0.4),))) == 0
    assert type_violation(Layout(("a", "b"), ((0, 0, 1, 1),) * 2), ["a", "c", "c"]) == pytest.approx(2 / 3)


def test_the_ranker_takes_the_planted_layout_and_does_not_see_the_order_of_elements() -> None:
    rng = random.Random(0)
    validation = [some_layout(rng, 5, ("figure", "text")) for _ in range(20)]
    tidy = Layout(("text",) * 3, ((0.1, 0.1, 0.8, 0.2), (0.1, 0.4, 0.8, 0.2), (0.1, 0.7, 0.8, 0.2)))
    for _ in range(6):
        answers = [some_layout(rng, 5, ("figure", "text")) for _ in range(9)]
        assert rank([*answers, tidy])[0][0] == 9
        assert rank([*answers, validation[3]], validation, (0, 0, 1))[0][0] == 9
        order, quality = rank(answers, validation)
        shuffled = [layout.take(rng.sample(range(5), 5)) for layout in answers]
        again, values = rank(shuffled, validation)
        assert again == order and values == pytest.approx(quality, abs=1e-6)
        assert quality == pytest.approx(naive_quality(answers, validation), abs=1e-6)


def naive_quality(layouts: list[Layout], validation: list[Layout]) -> list[float]:
    def scaled(values: list[float]) -> list[float]:
        low, high = min(values), max(values)
        return [(v - low) / (high - low) for v in values]

    columns = (scaled([naive_alignment(x) for x in layouts]), scaled([naive_overlap(x) for x in layouts]),
               scaled([max(likeness(x, v) for v in validation) for x in layouts]))
    return [0.2 * a + 0.2 * o + 0.6 * (1 - m) for a, o, m in zip(*columns, strict=True)]


def test_equal_metrics_are_scaled_to_zero() -> None:
    layout = some_layout(random.Random(0), 3)
    assert rank([layout] * 3, [layout]) == ([0, 1, 2], [0.6] * 3)
    assert rank([layout] * 3) == ([0, 1, 2], [0.0] * 3)
    assert rank([]) == ([], [])


# ------------------------------------------------------------------------------------------------------ exemplars
@pytest.mark.parametrize("task", ["gent", "gents", "genr", "completion", "refinement", "content", "text"])
def test_the_most_similar_are_selected_and_shuffled_by_the_seed(task: str) -> None:
    rng = random.Random(0)

    def example(n: int) -> Example:
        more = {"content": {"saliency": [some_layout(rng, 1).boxes[0]]},
                "text": {"text": str(n), "embedding": [rng.gauss(0, 1) for _ in range(4)]}}.get(task, {})
        return layout_example(some_layout(rng, labels=("a", "b")), task, seed=n, **more)

    pool, query, serializer = [example(n) for n in range(40)], example(40), LayoutSerializer(task, CANVAS)
    chosen = select(query, pool, serializer, 6, seed=1)
    least = min(similarity(query, e, serializer) for e in chosen)
    assert len(chosen) == 6 and all(similarity(query, e, serializer) <= least for e in pool if e not in chosen)
    assert select(query, pool, serializer, 6, seed=1) == chosen
    other = select(query, pool, serializer, 6, seed=2)
    assert set(other) == set(chosen) and other != chosen
    assert select(query, [*pool, query], serializer, 6, seed=1) == chosen  # never its own exemplar
    assert set(select(query, pool, serializer, 6, retrieve=False)) != set(chosen)
    assert LayoutSerializer(task, CANVAS).prompt(query, chosen).count("\n\n") == 7


def test_similarities_are_those_of_the_card() -> None:
    a = Layout(("text", "title"), ((0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.1, 0.2)))
    b = Layout(("text",), ((0.2, 0.2, 0.3, 0.1),))
    for task, expected in (
            ("gent", 2 / 3), ("genr", 2 / 3), ("gents", 0.5 * 2 / 3 + 0.5 * 2 ** (-2 * 0.3)),
            ("completion", 2 ** (-2 * math.hypot(0.1, 0.3)))):
        query, candidate = (layout_example(layout, task, fraction=0.0) for layout in (a, b))
        assert similarity(query, candidate, LayoutSerializer(task)) == pytest.approx(expected)
    query = Example({"noisy": a})
    assert similarity(query, layout_example(b, "refinement"), LayoutSerializer("refinement")) == pytest.approx(
        0.5 * 2 / 3 + 0.5 * 2 ** (-2 * math.hypot(0.1, 0.3)))  # the candidate without its noise


def test_exemplars_without_a_whole_pixel_are_left_out_and_the_prompt_keeps_its_length() -> None:
    thin = layout_example(Layout(("text",), ((0.1, 0.1, 0.001, 0.5),)))
    good = layout_example(Layout(("title",), ((0.1, 0.1, 0.5, 0.5),)))
    serializer = LayoutSerializer(canvas=CANVAS)
    query = Example({"labels": ["text"]})
    assert select(query, [thin, good], serializer) == [good]
    with pytest.raises(ValueError, match="expected examples whose elements are at least a pixel"):
        select(query, [thin], serializer)
    whole = serializer.prompt(query, [good] * 3, 10_000)
    assert serializer.prompt(query, [good] * 9, len(whole)) == whole
    assert serializer.prompt(query, [good] * 9, len(whole) - 1) == serializer.prompt(query, [good] * 2)


# -------------------------------------------------------------------------------------------------------- answers
def test_parsing_survives_every_malformed_answer() -> None:
    rng = random.Random(0)
    for output in ("html", "seq", "json"):
        serializer = LayoutSerializer(canvas=CANVAS, labels=LABELS, output=output)
        for _ in range(400):
            text = serializer.layout(some_layout(rng))
            for _ in range(rng.randint(1, 6)):
                a, b = sorted(rng.choices(range(len(text) + 1), k=2))
                text = rng.choice([text[:a], text[:a] + text[b:], text[:b] + text[a:], text[:a] + rng.choice(
                    ["-", "1e999", "NaN", "null", '"', "\x00", "px", "{", "9" * 5000, "é", "٣"]) + text[a:]])
            parsed = parse(text, CANVAS, LABELS, output)
            assert (parsed.layout is None) == bool(parsed.problem)
    assert parse("[" * 100_000 + "{" * 100_000, CANVAS, LABELS, "json").layout is None
    assert parse('{"a":' * 100_000, CANVAS, LABELS, "json").layout is None


@pytest.mark.parametrize(("output", "text", "problem"), [
    ("html", "", "no elements"),
    ("html", '<div class="text" style="left: 1px; top: 2px; width: 3px"></div>', "0 numbers for height"),
    ("html", '<div class="map" style="left: 1px; top: 2px; width: 3px; height: 4px"></div>', "unknown label 'map'"),
    ("seq", "text 0 1 2 3 | title 1 1 2 3 4", "no element of this form: 'text 0 1 2 3'"),
    ("seq", "map 0 1 2 3 4", "no element of this form"),
    ("json", '{"elements": [{"type": "text", "left": true, "top": 1, "width": 1, "height": 1}]}', "left True"),
    ("json", '{"elements": 3}', "no list of elements"), ("json", "text", "no JSON object")])
def test_what_is_wrong_with_an_answer_is_said(output: str, text: str, problem: str) -> None:
    parsed = parse(text, CANVAS, LABELS, output)
    assert parsed.layout is None and problem in parsed.problem


def test_pitfalls_of_the_authors_code_are_none_here() -> None:
    element = 'class="text" style="index: 0; left: -3px; top: 2.5px; width: 600px; height: 4px"'
    parsed = parse(f"<div {element}></div>\n</html>\n<div class=", CANVAS, LABELS)  # no canvas, and more behind
    assert parsed.layout == Layout(("text",), ((0, 2.5 / 160, 1, 4 / 160),))
    assert parse("text 7 12 24 45 48", CANVAS, LABELS, "seq").layout.pixels(CANVAS).tolist() == [[12, 24, 45, 48]]
    assert len(parse("text 0 1 2 3 4|text 1 5 6 7 8 |", CANVAS, LABELS, "seq").layout) == 2
    assert parse("text button 0 1 2 3 4", CANVAS, LABELS, "seq").layout.labels == ("text button",)
    assert parse("text 1 2 3 4\ntext 1 2", CANVAS, LABELS, "seq", index=False).layout.labels == ("text",)


def test_the_schema_accepts_layouts_and_nothing_else() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    import json

    schema = layout_schema(CANVAS, LABELS)
    text = LayoutSerializer(canvas=CANVAS, output="json").layout(some_layout(random.Random(0)))
    jsonschema.validate(json.loads(text), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"elements": [{"type": "map", "left": 0, "top": 0, "width": 1, "height": 1}]}, schema)


# ------------------------------------------------------------------------------------------- pictures and bad input
def test_drawings_are_xml_with_every_element() -> None:
    layouts = [Layout(("text", "a & b's"), ((0.1, 0.1, 0.5, 0.5), (0, 0, 1, 1))), some_layout(random.Random(0), 4)]
    root = xml.etree.ElementTree.fromstring(draw(layouts, CANVAS, titles=["<one>", "two"]))
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}svg")) == 2 and len(root.findall(f".//{space}rect")) == 2 + 6
    assert "a & b's" in [e.text for e in root.iter(f"{space}text")]
    with pytest.raises(ValueError, match="expected one layout or more"):
        draw([])


@pytest.mark.parametrize(("labels", "boxes", "message"), [
    ((), (), "expected one label or more"),
    (("a",), ((0, 0, 1, 1.2),), r"expected fractions of the canvas in \[0, 1\]"),
    (("a",), ((0, -0.1, 1, 1),), "expected fractions"), (("a",), ((0, math.nan, 1, 1),), "expected fractions"),
    (("a", "b"), ((0, 0, 1, 1),), "expected a box for each of 2 labels"), (("a",), ((0, 0, 1),), "expected 4 numbers"),
    (("a",), "boxes", "expected 4 numbers"), ("ab", ((0, 0, 1, 1),) * 2, "expected one label or more"),
    (('a"b',), ((0, 0, 1, 1),), "expected words without quotes"),
    (("canvas",), ((0, 0, 1, 1),), "other than 'canvas'")])
def test_bad_layouts(labels: tuple[str, ...], boxes: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(labels, boxes)


@pytest.mark.parametrize(("task", "inputs", "message"), [
    ("gent", {}, "expected the input labels of the task 'gent', got none"),
    ("gents", {"labels": ["a"], "sizes": [(1, 1), (1, 1)]}, "expected a width and height for each of 1"),
    ("genr", {"labels": ["a"], "relations": [(0, "above", "canvas")]}, "expected .place, one of smaller"),
    ("genr", {"labels": ["a"], "relations": [(0, "top", 1)]}, "places from 0 to 0"),
    ("completion", {"partial": [1]}, "partial: expected a Layout, got list"),
    ("content", {"labels": ["a"], "saliency": [(0, 0, 9, 9)]}, "saliency: expected fractions"),
    ("text", {"text": " "}, "text: expected words"), ("gent", {"labels": ["b"]}, "expected labels among a, got 'b'")])
def test_bad_queries(task: str, inputs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayoutSerializer(task, labels=("a",)).constraint(inputs)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"LayoutSerializer\.output: expected 'html', 'seq' or 'json', got 'xml'"):
        LayoutSerializer(output="xml")
    with pytest.raises(ValueError, match=r"Canvas\.width: expected an integer >= 1"):
        Canvas(0, 10)
    with pytest.raises(ValueError, match="expected the inputs labels, got text too"):
        layout_example(some_layout(random.Random(0)), "gent", text="x")
    with pytest.raises(ValueError, match="expected the input saliency of the task"):
        layout_example(some_layout(random.Random(0)), "content")
    with pytest.raises(ValueError, match="task: expected one of gent"):
        layout_example(some_layout(random.Random(0)), "generate")
