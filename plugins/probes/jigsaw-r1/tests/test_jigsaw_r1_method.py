"""Puzzles, verifiers and the probe: what the paper defines, and models whose answers are known."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from looseleaf_jigsaw_r1 import (
    Jigsaw,
    JigsawProbe,
    PlantedSolver,
    SeamBaseline,
    accuracy_reward,
    advantages,
    binary_reward,
    example_pictures,
    format_reward,
    grpo_loss,
    puzzles,
    reassemble,
    split,
)
from looseleaf_jigsaw_r1.baselines import constant_answer, random_answer, solve_by_seams
from looseleaf_jigsaw_r1.probe import score, wilson
from looseleaf_jigsaw_r1.puzzles import QUESTIONS, invert, pictures, relation, relation_rates, relations, staged
from looseleaf_jigsaw_r1.verifiers import accuracy, keywords, parse_arrangement, well_formed
from looseleaf_text.testing.models import toy_llava, toy_qwen

NOISE = np.random.default_rng(0).integers(0, 256, (53, 47, 3), dtype=np.uint8)


def test_forward_and_backward_are_inverse() -> None:
    assert invert([4, 1, 3, 2]) == [2, 4, 3, 1] and invert([2, 4, 3, 1]) == [4, 1, 3, 2]


def test_relations_of_the_paper() -> None:
    forward = [4, 1, 3, 2]
    said = {(a, b): relation(forward[a - 1], forward[b - 1], 2) for a, b in itertools.permutations(range(1, 5), 2)}
    assert said[1, 2] == "lower right" and said[1, 3] == "directly right" and said[2, 1] == "upper left"
    assert relation(1, 3, 3) == "directly left", "direct, though not adjacent"
    rates = relation_rates(2, 2)
    assert all(math.isclose(rate, 1 / 6 if name.startswith("directly") else 1 / 12) for name, rate in rates.items())
    assert Jigsaw(2, 2).chance().best_constant == pytest.approx(1 / 6) and Jigsaw(2, 2).chance().uniform == 1 / 8
    assert relations(3, 1) == ["directly above", "directly below"] and Jigsaw(3, 1).chance().uniform == 0.5


@pytest.mark.parametrize("size", [(2, 1), (1, 3), (2, 2), (3, 2)])
def test_reassembled_is_the_trimmed_original(size: tuple[int, int]) -> None:
    m, n = size
    for seed in range(5):
        puzzle = Jigsaw(m, n, "full")(NOISE, seed)
        back = np.asarray(reassemble(puzzle))
        assert np.array_equal(back, NOISE[:53 // m * m, :47 // n * n])
        again = Jigsaw(m, n, "full")(NOISE, seed)
        assert again.solution == puzzle.solution and again.image.tobytes() == puzzle.image.tobytes()
        backward = Jigsaw(m, n, "full", forward=False)(NOISE, seed)
        assert list(map(int, backward.solution.split())) == invert(puzzle.permutation)


def test_every_arrangement_is_as_likely() -> None:
    tiny = NOISE[:3, :1]
    seen = [Jigsaw(3, 1, "full")(tiny, seed).permutation for seed in range(1200)]
    counts = [seen.count(p) for p in itertools.permutations((1, 2, 3))]
    assert sum((c - 200) ** 2 / 200 for c in counts) < 20.5, "chi-square with 5 degrees of freedom, p = 0.001"


def test_random_arrangements_get_chance() -> None:
    for m, n in ((3, 1), (2, 2)):
        mn, target = m * n, " ".join(str(k) for k in range(1, m * n + 1))
        rewards = [accuracy(" ".join(map(str, p)), target, "full", False, mn)
                   for p in itertools.permutations(range(1, mn + 1))]
        assert np.mean(rewards) == pytest.approx(1 / mn)
        assert np.mean([r == 1 for r in rewards]) == pytest.approx(1 / math.factorial(mn))
    assert accuracy("1 1 1 1", "4 1 3 2", "full", False, 4) == 1 / 4, "repeated indices are allowed"


def test_advantages() -> None:
    rewards = torch.tensor([1.5, 1.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    expected = torch.tensor([1.5019] * 2 + [-0.2146] * 4 + [-1.0728] * 2, dtype=torch.float64)
    torch.testing.assert_close(advantages(rewards), expected, atol=5e-5, rtol=0)
    assert torch.equal(advantages(torch.ones(2, 8)), torch.zeros(2, 8))


def test_loss_of_grpo() -> None:
    log_p = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -1.0, -1.5]], requires_grad=True)
    mask, advantage = torch.tensor([[1.0, 1, 0], [1, 1, 1]]), torch.tensor([1.0, -2.0])
    old = log_p.detach()
    loss = grpo_loss(log_p, old, old, advantage, mask)
    assert loss.item() == pytest.approx(0.5), "ratio 1, no divergence: minus the mean advantage"
    loss.backward()
    assert log_p.grad is not None
    torch.testing.assert_close(log_p.grad, torch.tensor([[-0.25, -0.25, 0], [1 / 3, 1 / 3, 1 / 3]]))
    far = grpo_loss(old + 1, old, old, torch.tensor([1.0, 1.0]), mask, beta=0.0)
    assert far.item() == pytest.approx(-1.2), "the ratio is clipped at 1 + epsilon"
    apart = grpo_loss(old, old, old + 1, torch.zeros(2), mask)
    assert apart.item() == pytest.approx(0.04 * (math.e - 2)), "k3"


def test_parsing() -> None:
    assert parse_arrangement("`4`, 1;3\n2", 4) == [4, 1, 3, 2]
    assert parse_arrangement("4 1 3 5", 4) is None and parse_arrangement("4 1 x 2", 4) is None
    assert parse_arrangement("", 4) is None
    assert accuracy("4 1 3", "4 1 3 2", "full", False, 4) == 0, "a wrong count"
    assert accuracy("B. I think so", "B", "pair", False, 2) == 0, "the last capital counts"
    assert accuracy("I think B", "B", "pair", False, 2) == 1 and not well_formed("I think B", "pair", False, 2)
    assert well_formed("b: B", "pair", False, 2) and not well_formed("", "pair", False, 2)
    boxes = accuracy_reward(["0 0 10 10", "5 0 15 10", "0 0 10", "9 9 0 0"], ["0 0 10 10"] * 4, ["box"] * 4,
                            [False] * 4, [4] * 4)
    assert boxes == pytest.approx([1, 1 / 3, 0, 0])
    good = "<think>above</think> \n<answer>A</answer>"
    assert format_reward([good, "so " + good, good + good, "A"], ["pair"] * 4, [True] * 4, [2] * 4) == [1, 0, 0, 0]
    messages = [[{"role": "assistant", "content": good}]]
    assert accuracy_reward(messages, ["A"], ["pair"], [True], [2], prompts=[], trainer_state=None) == [1]
    assert binary_reward(["4 1 2 3", "4 1 3 2"], ["4 1 3 2"] * 2, ["full"] * 2, [False] * 2, [4] * 2) == [0, 1]
    words = keywords(["let me re-check and work backwards", "no"])
    assert (words.recheck, words.backwards, words.length) == (500, 500, 3.5)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("thinking", [False, True])
def test_every_question_has_its_key(question: Any, thinking: bool) -> None:
    for number, puzzle in enumerate(puzzles([NOISE], Jigsaw(2, 2, question, thinking), 12)):
        assert score([puzzle], [puzzle.gold]).right == 1 and score([puzzle], [puzzle.gold]).form == 1, puzzle
        if question != "rotation":
            assert puzzle.answer(puzzle.permutation) == puzzle.solution
        made = random_answer(puzzle, random.Random(number))
        for text in (made, constant_answer(puzzle)):
            assert well_formed(text, question, False, 4)
        if question == "box":
            k = puzzle.asked[0]
            assert puzzle.permutation[k - 1] != k, "the patch has moved"
            source = puzzle.boxes[puzzle.permutation[k - 1] - 1]
            assert puzzle.image.crop(puzzle.boxes[k - 1]).tobytes() == puzzle.original.crop(source).tobytes()
            assert np.array_equal(np.asarray(reassemble(puzzle)), np.asarray(puzzle.original))
        if question == "rotation":
            assert puzzle.image.width == puzzle.image.height == 47


def test_masks_swaps_and_recompression() -> None:
    white = np.full((40, 60, 3), 255, dtype=np.uint8)
    masked = np.asarray(Jigsaw(2, 1, mask_ratio=0.2)(white).image)
    assert not masked[18:22].any() and masked[:18].all() and masked[22:].all()
    sizes = {(p.m, p.n) for p in puzzles([NOISE], Jigsaw(3, 1, "full", shuffle_mn=True), 20)}
    assert sizes == {(3, 1), (1, 3)}
    plain, jpeg = (Jigsaw(2, 2, jpeg_quality=q)(NOISE, 1) for q in (None, 60))
    assert plain.solution == jpeg.solution and plain.image.tobytes() != jpeg.image.tobytes()


def test_pictures_of_any_kind(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 7).save(tmp_path / "grey.png")
    (tmp_path / "deeper").mkdir()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "deeper" / "clear.png")
    found = list(puzzles(tmp_path, Jigsaw(), 4))
    assert {p.image.getpixel((0, 0)) for p in found} == {(7, 7, 7), (255, 255, 255)}
    train, test = split(tmp_path, 0.5)
    assert len(train) == len(test) == 1 and train != test


def test_curriculum_counts_over_the_whole_training() -> None:
    plan = [(Jigsaw(3, 1), 2), (Jigsaw(4, 1), 2)]
    assert [staged(plan, number).m for number in range(6)] == [3, 3, 4, 4, 4, 4]


def test_seams_solve_smooth_pictures() -> None:
    for size in ((2, 1), (3, 1), (2, 2)):
        asked = list(puzzles(example_pictures(12), Jigsaw(*size, "full"), 12))
        solved = score(asked, [SeamBaseline()(p) or "" for p in asked])
        assert solved.right >= 10
    with pytest.raises(ValueError, match="at most 6 patches, got 3 x 3"):
        solve_by_seams(NOISE, 3, 3)


@pytest.mark.parametrize("right", [1.0, 0.75, 0.0])
def test_a_planted_model_is_found_out(right: float) -> None:
    probe = JigsawProbe(sizes=("2x1", "2x2"), questions=("pair", "full"), puzzles=40)
    images = example_pictures(40)
    asked = [p for kind in probe.kinds() for p in puzzles(images, kind, 40)]
    for kind in range(4):
        part = asked[40 * kind:40 * kind + 40]
        assert score(part, [PlantedSolver(part, right)(p.image, p.text) for p in part]).right == 40 * right
    report = probe.run(PlantedSolver(asked, right), images, progress=False)
    rows = report.tables[0].rows
    assert sum(row[3] for row in rows) / 4 == pytest.approx(right)  # type: ignore[misc]
    assert all(row[8] == (right > 0.7) for row in rows if row[1] == "2x2"), "above chance only where it is"
    assert all(row[-1] == 0 for row in rows), "nothing is right without the picture"
    assert all(row[-1] == 1 for row in report.tables[1].rows)


def test_a_model_that_does_not_look_is_not_above_chance() -> None:
    seen: list[str] = []

    def constant(image: Any, text: str) -> str:
        seen.append(text)
        return "A"

    report = JigsawProbe(sizes=("2x1", "2x2"), questions=("pair", "multiple"), puzzles=60).run(constant, progress=False)
    assert not any(row[8] for row in report.tables[0].rows) and len(seen) == 480
    assert all(row[3] == row[-1] for row in report.tables[0].rows)


@pytest.mark.parametrize("make", [toy_llava, toy_qwen])
def test_models_of_two_families(make: Any) -> None:
    model, processor = make()
    model.train()
    model.model.language_model.eval()
    modes = [module.training for module in model.modules()]
    probe = JigsawProbe(sizes=("2x1", "2x2"), questions=("pair", "box"), puzzles=2, max_tokens=3)
    report = probe.run((model, processor), example_pictures(4, 32), progress=False)
    assert [module.training for module in model.modules()] == modes
    assert [row[2] for row in report.tables[0].rows] == [2] * 4 and len(report.images[0].pngs) == 6


def test_wilson() -> None:
    assert wilson(50, 100) == pytest.approx((0.5, 0.4038, 0.5962), abs=1e-4)
    assert wilson(0, 10)[1:] == pytest.approx((0, 0.2775), abs=1e-4)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Jigsaw(1, 1), "expected m n >= 2, got 1 x 1"),
    (lambda: Jigsaw(0, 2), r"Jigsaw.m: expected an integer >= 1, got 0"),
    (lambda: Jigsaw(forward=False), "expected forward=True with question='pair'"),
    (lambda: Jigsaw(mask_ratio=1), r"expected a number in \[0, 1\)"),
    (lambda: Jigsaw(question="triple"), "expected one of full, pair"),  # type: ignore[arg-type]
    (lambda: Jigsaw(3, 1)(NOISE[:2]), "expected at least 1 x 3 pixels"),
    (lambda: Jigsaw(2, 1, mask_ratio=0.9)(NOISE[:2]), "expected some pixels left"),
    (lambda: Jigsaw()("no such file.png"), "expected a picture, got 'no such file.png'"),
    (lambda: pictures([]), "got an empty list"),
    (lambda: pictures("no such folder"), "expected a folder"),
    (lambda: JigsawProbe(sizes=("2by1",)), "rows x columns"),
    (lambda: JigsawProbe(sizes=("1x1",)), "expected m n >= 2"),
    (lambda: JigsawProbe(questions=("pairs",)), "one or more of full"),
    (lambda: JigsawProbe().run(toy_llava()[0]), "processor"),
])
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got none in"):
        JigsawProbe().run(lambda image, text: "A", tmp_path)
