"""The method's steps against given numbers and plain references, measures against golden values, bad input."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf import Budget, Example, Prompt, Report, UnsupportedModelError
from looseleaf_gensam import (
    MEASURES,
    FixedWords,
    GenericPrompt,
    GenSAM,
    PointPrompt,
    PromptableModels,
    Segmentation,
    Segmenter,
    clean,
    heat_map,
    mask_task,
    points_of,
    spatial_features,
    toy_mask_task,
    toy_models,
    words_of,
)
from looseleaf_gensam.heat import minmax, similarities
from looseleaf_gensam.optimizer import TEMPLATES, box_of, fuse, toy_segmenter, weighed, widened

pytest.importorskip("transformers")
from looseleaf_vision.testing import toy_clip

SETTINGS: dict[str, Any] = {"depth": 2, "size": 32, "templates": ("a {}", "the {}")}


# ------------------------------------------------------------------------------------------------------ spatial CLIP
def plain_features(model: nn.Module, pixels: Tensor, depth: int, attention: str) -> Tensor:
    """The second path written out: every block by hand, softmax of the projection against itself."""
    tower: Any = model.vision_model
    tower = getattr(tower, "vision_model", tower)
    x = tower.pre_layrnorm(tower.embeddings(pixels, interpolate_pos_encoding=True))
    layers, path = list(tower.encoder.layers), None
    for n, layer in enumerate(layers):
        if n == len(layers) - depth:
            path = x
        attn, normed = layer.self_attn, layer.layer_norm1(x)
        q, k, v = (f(normed).view(*normed.shape[:2], attn.num_heads, -1).transpose(1, 2)
                   for f in (attn.q_proj, attn.k_proj, attn.v_proj))
        scale = q.shape[-1] ** -0.5
        if path is not None:
            one = k if attention == "kk" else v
            own = (one @ one.transpose(-1, -2) * scale).softmax(-1) @ v
            path = path + attn.out_proj(own.transpose(1, 2).flatten(2))
        mixed = (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v
        x = x + attn.out_proj(mixed.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layer_norm2(x))
    path = x if path is None else path
    out: Tensor = model.visual_projection(tower.post_layernorm(torch.cat([x[:, :1], path[:, 1:]], 1)))
    return out


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("attention", ["kk", "vv"])
@torch.no_grad()
def test_the_second_path_is_that_of_a_plain_reference(attention: Any, size: int) -> None:
    model = toy_clip().model.double()
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).double()
    for depth in (0, 1, 2, 3):
        ours = spatial_features(model, pixels, depth, attention)
        torch.testing.assert_close(ours, plain_features(model, pixels, depth, attention), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(spatial_features(model, pixels, 2, "kk"), spatial_features(model, pixels, 2, "vv"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_without_depth_patches_are_plain_and_cls_is_always_that_of_clip() -> None:
    model: Any = toy_clip().model
    pixels = torch.randn(2, 3, 16, 16)
    own = model.get_image_features(pixel_values=pixels)
    own = own if isinstance(own, Tensor) else own.pooler_output
    hidden = model.vision_model(pixels).last_hidden_state
    plain = model.visual_projection(getattr(model.vision_model, "vision_model", model.vision_model).post_layernorm(
        hidden))
    assert torch.equal(spatial_features(model, pixels, 0)[:, 1:], plain[:, 1:])
    for depth in (0, 1, 3):
        torch.testing.assert_close(spatial_features(model, pixels, depth)[:, 0], own, rtol=1e-6, atol=1e-6)


def test_hooks_are_gone_after_an_error_and_other_models_are_refused() -> None:
    model: Any = toy_clip().model
    with pytest.raises(ValueError, match="depth: expected at most 3"):
        spatial_features(model, torch.randn(1, 3, 16, 16), 6)
    with pytest.raises(Exception):  # noqa: B017 - whatever torch says of the shape
        spatial_features(model, torch.randn(1, 4, 16, 16), 2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    from transformers import SiglipConfig, SiglipModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = SiglipModel(SiglipConfig(text_config={**small, "vocab_size": 20},
                                      vision_config={**small, "image_size": 16, "patch_size": 8}))
    with pytest.raises(UnsupportedModelError, match=r"expected a CLIPModel.*got SiglipModel"):
        spatial_features(siglip, torch.randn(1, 3, 16, 16), 1)


# --------------------------------------------------------------------------------------------------- heat and points
def test_heat_maps_have_the_numbers_by_hand() -> None:
    foreground, background = torch.tensor([[0.0, 1, 2, 4], [1, 1, 3, 5]]), torch.tensor([[4.0, 2, 2, 0]])
    assert heat_map(foreground, background).tolist() == [0, 0.3125, 0.5, 1]
    assert heat_map(foreground, background, clamp=True).tolist() == [0, 0, 0, 1]
    assert heat_map(foreground).tolist() == [0, 0.125, 0.5, 1]


def test_flat_and_broken_heat_is_zero_and_has_no_points() -> None:
    for values in (torch.ones(1, 4), torch.full((1, 4), math.nan), torch.full((1, 4), math.inf)):
        assert heat_map(values, values).tolist() == [0] * 4
    points, labels = points_of(torch.zeros(4, 4), (10, 10))
    assert points.shape == (0, 2) and labels.shape == (0,)
    assert minmax(torch.tensor([math.nan, 1.0, 4.0])).tolist() == [0, 0.25, 1]


def test_similarities_leave_out_what_the_empty_text_has() -> None:
    draw = torch.Generator().manual_seed(0)
    features, texts = torch.randn(5, 6, generator=draw), torch.randn(2, 6, generator=draw)
    empty = torch.randn(6, generator=draw)
    for normalize, dim in (("tokens", 0), ("features", 1)):
        scaled = features / features.norm(dim=dim, keepdim=True)
        by_hand = torch.stack([torch.stack([(scaled[n] * (t - empty)).sum() for n in range(1, 5)]) for t in texts])
        torch.testing.assert_close(similarities(features, texts, empty, normalize), by_hand)  # type: ignore[arg-type]
    assert similarities(features, empty[None], empty, "tokens").abs().max() == 0


def test_points_are_cell_centres_as_x_and_y() -> None:
    heat = torch.zeros(2, 2)
    heat[0, 1] = 1.0  # above, on the right
    points, labels = points_of(heat, (40, 80), down_sample=1.0)
    assert points.tolist() == [[60, 10], [20, 10]] and labels.tolist() == [1, 0]
    points, labels = points_of(heat, (40, 80))  # 4 x 4 cells of 20 x 10
    grid = minmax(F.interpolate(heat[None, None], (4, 4), mode="bilinear")[0, 0])
    count = int((grid >= 0.9).sum())
    assert len(points) == 2 * count and labels.tolist() == [1] * count + [0] * count
    for (x, y), label in zip(points.tolist(), labels.tolist(), strict=True):
        assert (x % 20, y % 10) == (10, 5)
        assert (float(grid[y // 10, x // 20]) >= 0.9) == bool(label)


def test_there_are_never_more_points_than_half_the_cells_and_none_outside() -> None:
    heat = torch.ones(4, 4)
    heat[0, 0] = 0
    points, labels = points_of(heat, (3, 2))  # fewer pixels than cells
    assert int(labels.sum()) == 32 and len(labels) == 64
    assert int(points[:, 0].max()) <= 1 and int(points[:, 1].max()) <= 2 and int(points.min()) >= 0


# ------------------------------------------------------------------------------------------------------------- passes
def test_boxes_are_widened_by_the_rule_of_the_official_code() -> None:
    assert widened([50, 60, 150, 160]).tolist() == [40, 50, 161, 171]
    mask = torch.zeros(200, 200, dtype=torch.bool)
    mask[60:160, 50:150] = True
    mask[60:160, 50:150][1:-1, 1:-1] = False  # its box counts, not its pixels
    mask[0:30, 0:30] = True
    found = box_of(mask)
    assert found is not None and found.tolist() == [40, 50, 161, 171]
    assert box_of(torch.zeros(5, 5, dtype=torch.bool)) is None
    one = torch.zeros(5, 5, dtype=torch.bool)
    one[1, 1] = one[2, 2] = True  # connected at a corner
    found = box_of(one)
    assert found is not None and found.tolist() == [1, 1, 4, 4]


def test_the_next_picture_has_the_pixels_as_given() -> None:
    original = torch.full((3, 1, 1), 200 / 255)
    once = weighed(original, original, torch.full((1, 1), 0.5))
    twice = weighed(original, once, torch.ones(1, 1))
    assert [round(float(p[0]) * 255) for p in (once, twice)] == [170, 179]
    faded = weighed(original, original, torch.zeros(1, 1))
    torch.testing.assert_close(faded, original * 0.7)


def test_the_fused_mask_chooses_the_pass_as_given() -> None:
    logits = [torch.tensor([row], dtype=torch.float32) for row in ([5, -1, -1, -1], [-1, 2, -1, 3], [-1, 2, 2, -1])]
    fused, chosen = fuse(logits)
    assert fused.int().tolist() == [[1, 1, 0, 1]] and chosen == 1
    assert fuse([logits[0], logits[0]])[1] == 0  # the first of equals


def by_hand(models: PromptableModels, own: GenSAM, image: np.ndarray) -> list[dict[str, Any]]:
    """The passes written out with numpy and the steps tested above."""
    clip, size = models.clip, image.shape[:2]
    first = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    seen, box, out = first, None, []
    texts = {word: F.normalize(torch.stack([clip.texts([t.format(word)])[0] for t in own.templates]).mean(0), dim=0)
             for word in ("red square", "black disc", "")}
    for n in range(own.recursive + 1):
        pixels = clip.preprocess.normalize(clip.preprocess.read([seen], own.size))
        features = plain_features(clip.model, pixels, own.depth, own.attention)[0]
        scaled = features / features.norm(dim=0, keepdim=True)
        fg, bg = (minmax(scaled[1:] @ (texts[word] - texts[""])) for word in ("red square", "black disc"))
        heat = minmax(fg - bg).view(4, 4)
        points, labels = points_of(heat, size)
        logits, scores = toy_segmenter(image, points, labels, box)
        best = logits[int(scores.argmax())]
        out.append({"heat": heat, "points": points, "box": box, "mask": best > 0, "logits": best})
        found = box_of(best > 0)
        limit = torch.tensor([size[1], size[0]] * 2)
        box = torch.tensor([0, 0, size[1], size[0]]) if found is None else torch.minimum(found.clamp(min=0), limit)
        full = F.interpolate(heat[None, None], size, mode="bilinear")[0, 0]
        seen = first * full * own.weight + seen * (1 - own.weight)
        assert n or out[0]["box"] is None
    return out


@torch.no_grad()
def test_all_six_passes_are_those_of_a_plain_loop() -> None:
    models, own = toy_models(), GenSAM("red square", **SETTINGS)
    image = toy_mask_task().train[0].inputs["image"]
    found = own.on(models).segment(image)
    expected = by_hand(models, own, image)
    assert len(found.passes) == len(expected) == 6
    for ours, plain in zip(found.passes, expected, strict=True):
        torch.testing.assert_close(ours.heat, plain["heat"], rtol=1e-4, atol=1e-4)
        assert ours.points.tolist() == plain["points"].tolist() and torch.equal(ours.mask, plain["mask"])
        assert (ours.box is None) == (plain["box"] is None)
        assert ours.box is None or ours.box.tolist() == plain["box"].tolist()
    fused = torch.stack([p["logits"] for p in expected]).mean(0) > 0
    assert torch.equal(found.fused, fused)
    distances = [((p["mask"].float() - fused.float()) ** 2).sum() for p in expected]
    assert found.chosen == int(torch.stack(distances).argmin())
    assert torch.equal(found.mask, expected[found.chosen]["mask"])


def test_it_finds_a_planted_square_and_depends_on_the_words() -> None:
    """A CLIP whose patches are red or not, and a segmenter that is exact: the object, else what is not it."""
    task, found = toy_mask_task(4), {}
    for word in ("red", "grey"):
        models = toy_models(FixedWords(word, "grey" if word == "red" else "red"))
        vectors = {"red": [1.0, 0], "grey": [0, 1.0], "": [0, 0]}

        def patches(pixels: Tensor, *_: Any) -> Tensor:
            cells = F.avg_pool2d(pixels, 4)
            red = (cells[:, 0] - cells[:, 1]).flatten(1)
            both = torch.stack([red, 1 - red], -1)
            return torch.cat([both.mean(1, keepdim=True), both], 1)

        models.patches = patches  # type: ignore[method-assign, assignment]
        models.texts = lambda names, _, v=vectors: torch.tensor([v[n] for n in names])  # type: ignore[method-assign]
        own = GenSAM("red thing", **{**SETTINGS, "normalize": "features"})
        found[word] = [MEASURES["IoU"](one.mask, e.target) for one, e in zip(
            own.on(models).predict(task.train), task.train, strict=True)]
    assert min(found["red"]) > 0.9 and max(found["grey"]) < 0.2


def test_variants_change_what_they_should() -> None:
    models, image = toy_models(), toy_mask_task().train[0].inputs["image"]
    plain = GenSAM("red square", **SETTINGS).on(models).segment(image)
    single = GenSAM("red square", **SETTINGS, recursive=0).on(models).segment(image)
    assert len(single.passes) == 1 and torch.equal(single.passes[0].heat, plain.passes[0].heat)
    for change in ({"attention": "vv"}, {"background": False}, {"normalize": "features"}, {"depth": 0}, {"size": 16},
                   {"clamp": True}, {"down_sample": 1.0}, {"attn_thr": 0.3}):
        other = GenSAM("red square", **{**SETTINGS, "recursive": 0, **change}).on(models).segment(image)
        one, two = single.passes[0], other.passes[0]
        assert one.heat.shape != two.heat.shape or not torch.equal(one.heat, two.heat) or \
            one.points.tolist() != two.points.tolist(), change
    weights = [GenSAM("red square", **SETTINGS, weight=w).on(models).segment(image) for w in (0.3, 0.9)]
    assert not torch.equal(weights[0].passes[1].heat, weights[1].passes[1].heat)
    assert GenSAM("red square", **SETTINGS, background=False).on(models).segment(image).passes[0].words.background == []


def test_adaptive_stops_when_the_mask_no_longer_changes() -> None:
    models, image = toy_models(), toy_mask_task().train[0].inputs["image"]
    models.segmenter = Segmenter(lambda image, points, labels, box: (np.ones((3, 32, 32)), [0.1, 0.2, 0.3]))
    found = GenSAM("red square", **SETTINGS, adaptive=True).on(models).segment(image)
    assert len(found.passes) == 3  # the first i above 1
    calls = iter(range(100))

    def restless(*_: Any) -> tuple[Any, Any]:
        return np.full((3, 32, 32), (-3.0, 3.0)[next(calls) % 2]), [0.1, 0.2, 0.3]

    models.segmenter = Segmenter(restless)
    assert len(GenSAM("red square", **SETTINGS, adaptive=True).on(models).segment(image).passes) == 6


def test_the_first_box_is_the_whole_picture_only_without_points() -> None:
    """No points: the whole picture, then the box alone; no mask: the whole picture again."""
    asked: list[tuple[Any, Any]] = []

    def empty(image: Any, points: Any, labels: Any, box: Any) -> tuple[Any, Any]:
        asked.append((points, None if box is None else box.tolist()))
        logits = np.full((3, 20, 30), -1.0)
        if len(asked) == 2:
            logits[:, 5:10, 10:20] = 1
        return logits, [0.9, 0.1, 0.2]

    models = toy_models()
    models.segmenter = Segmenter(empty)
    models.patches = lambda pixels, *_: torch.ones(1, 17, 16)  # type: ignore[method-assign, assignment]
    found = GenSAM("red square", **SETTINGS, recursive=3).on(models).segment(np.full((20, 30, 3), 90, np.uint8))
    assert [points for points, _ in asked] == [None] * 4
    assert [box for _, box in asked] == [[0, 0, 30, 20], [0, 0, 30, 20], [9, 5, 22, 11], [0, 0, 30, 20]]
    assert not found.mask.any() and found.heat.max() == 0


# -------------------------------------------------------------------------------------------------------------- words
def test_answers_are_cleaned() -> None:
    for answer, word in (("frog", "frog"), ("Frog.", "Frog"), ('The animal is called "stick insect".', "stick insect"),
                         ("It is a leaf frog.", "leaf frog"), ("This is an owl", "owl"), ("  ", ""),
                         ("\u201cmoth\u201d", "moth"), ("'frog'", "frog"), ('"owl."', "owl")):
        assert clean(answer) == word


def test_one_dialogue_for_each_synonym_and_empty_answers_have_words() -> None:
    asked: list[tuple[str, int, int]] = []

    def ask(question: str, history: Any, seed: int) -> str:
        asked.append((question, len(history), seed))
        return {0: "A frog on leaves.", 1: "", 2: "Leaves."}[len(history)]

    words = words_of(ask, GenSAM().phrases())
    assert [length for _, length, _ in asked] == [0, 1, 2] * 3
    assert words.foreground == ["camouflaged animal", "disguised animal", "hidden animal"]
    assert words.background == ["Leaves"] * 3 and words.captions == ["A frog on leaves."] * 3
    assert len({seed for *_, seed in asked}) == 9
    same = words_of(lambda q, h, s: "Moss.", ["hidden thing"])  # both words alike: the background is dropped
    assert same.foreground == ["Moss"] and same.background == ["background"]
    assert words_of(lambda q, h, s: "", ["x"]).background == ["environment"]
    assert GenSAM("polyp").phrases() == ("polyp",) and GenSAM("polyp", synonyms=("a", "b")).phrases() == ("a", "b")


def test_words_are_asked_anew_in_each_pass_unless_told_otherwise() -> None:
    seen: list[int] = []

    def namer(image: Any, question: str, history: Any) -> str:
        seen.append(len(history))
        return "red square"

    models = PromptableModels(toy_clip(), toy_segmenter, namer)
    image = toy_mask_task().train[0].inputs["image"]
    own = GenSAM("red square", **SETTINGS, recursive=2)
    own.on(models).segment(image)
    assert seen == [0, 1, 2] * 3
    seen.clear()
    dataclasses.replace(own, update_text=False).on(models).segment(image)
    assert seen == [0, 1, 2]


def test_each_word_is_embedded_once_by_85_templates_and_long_answers_are_cut() -> None:
    models, images = toy_models(FixedWords("red " * 60, "")), [e.inputs["image"] for e in toy_mask_task().train[:2]]
    own = GenSAM("camouflaged square", depth=2, size=16, recursive=1)
    budget = Budget()
    predictor = own.on(budget.meter(models))
    found = [predictor.segment(image) for image in images]
    assert len(TEMPLATES) == 85 and len(set(TEMPLATES)) == 85
    # two pictures: 1 embedding, 2 x (patches, mask, 3 x 3 questions); three texts by 85 templates
    assert budget.used["calls"] == 2 * (1 + 2 * (1 + 1 + 9)) + 3 * 85
    assert all(bool(one.passes[0].heat.isfinite().all()) for one in found)
    assert models.fitting("red " * 60, TEMPLATES).split() and models.fitting("x" * 5000, ("a {}",))


# ----------------------------------------------------------------------------------------------------------- measures
def masks() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    y, x = np.mgrid[:40, :52]
    truth = ((y - 18) / 11) ** 2 + ((x - 22) / 15) ** 2 < 1
    soft = np.clip(1.3 - np.hypot((y - 21) / 14, (x - 26) / 17), 0, 1)
    return {"shifted": (((y - 22) / 11) ** 2 + ((x - 27) / 15) ** 2 < 1, truth),
            "soft": ((soft * 255).round() / 255, truth), "part": (truth & (x < 20), truth),
            "two": (truth | ((y > 33) & (x > 40)), truth), "all": (np.ones_like(truth), truth),
            "none": (np.zeros_like(truth), truth)}


GOLDEN = {  # of PySODMetrics 1.x: MAE, S, E at one half, weighted F
    "shifted": (0.1548076923076923, 0.6806934519399558, 0.8522214730389827, 0.6808637247149508),
    "soft": (0.17447586726998493, 0.7831720820522651, 0.8867690605136502, 0.6139537067217568),
    "part": (0.14759615384615385, 0.613627624645523, 0.6530640416463726, 0.6022012555518192),
    "two": (0.03173076923076923, 0.9146731101226515, 0.9643981637508687, 0.8901142618756385),
    "all": (0.7552884615384615, 0.12235576923076923, 0.25012025012025013, 0.2863078911967305),
    "none": (0.24471153846153845, 0.37764423076923076, 0.25012025012025013, 0.0)}


@pytest.mark.parametrize("name", GOLDEN)
def test_measures_are_those_of_pysodmetrics(name: str) -> None:
    prediction, truth = masks()[name]
    found = {key: measure(prediction, truth) for key, measure in MEASURES.items()}
    for key, value in zip(("MAE", "S", "E", "weighted F"), GOLDEN[name], strict=True):
        assert found[key] == pytest.approx(value, abs=1e-9)
    hard = prediction > 0.5
    assert found["IoU"] == (hard & truth).sum() / max(1, (hard | truth).sum())


def test_perfect_empty_and_wrong_masks() -> None:
    truth = masks()["two"][1]
    assert MEASURES["MAE"](truth, truth) == 0
    for name in ("IoU", "S", "E", "weighted F"):
        assert MEASURES[name](truth, truth) == pytest.approx(1, abs=2e-3)
    empty = np.zeros((8, 8), bool)
    assert MEASURES["IoU"](empty, empty) == 1 == MEASURES["S"](empty, empty)
    for mask in (empty, ~empty, np.eye(8, dtype=bool)):
        for target in (empty, ~empty, np.eye(8, dtype=bool), np.pad([[True]], (0, 7))):
            assert all(math.isfinite(measure(mask, target)) for measure in MEASURES.values())
    assert MEASURES["IoU"](torch.from_numpy(truth), truth.astype(np.uint8) * 255) == 1
    with pytest.raises(ValueError, match=r"expected a prediction and a target of one shape"):
        MEASURES["S"](truth, truth[:5])
    with pytest.raises(ValueError, match=r"expected bool or numbers in \[0, 1\].*divide uint8 by 255"):
        MEASURES["S"](truth * 255, truth)


# -------------------------------------------------------------------------------------------------- the user's pictures
@pytest.mark.parametrize("picture", [
    np.full((20, 30, 3), 128, np.uint8), np.arange(600, dtype=np.uint8).reshape(20, 30), np.zeros((1, 1, 3), np.uint8),
    np.full((7, 9, 4), 30, np.uint8), torch.rand(3, 5, 50), np.random.default_rng(0).integers(
        0, 255, (2, 90, 3)).astype(np.uint8)], ids=["flat", "grey", "one-pixel", "rgba", "tensor", "wide"])
def test_any_picture_gives_a_defined_result(picture: Any) -> None:
    found = GenSAM("red square", **SETTINGS, recursive=1).on(toy_models()).segment(picture)
    size = tuple(picture.shape[1:]) if isinstance(picture, Tensor) else picture.shape[:2]
    assert tuple(found.mask.shape) == size == tuple(found.heat.shape)
    for one in found.passes:
        assert bool(one.heat.isfinite().all()) and one.mask.dtype == torch.bool
        assert not len(one.points) or (int(one.points[:, 0].max()) < size[1] and int(one.points[:, 1].max()) < size[0])
        assert one.box is None or (int(one.box[0]) >= 0 and int(one.box[2]) <= size[1] and int(one.box[3]) <= size[0])
    assert all(array.dtype == np.uint8 and max(array.shape) == 64 for array in found.draw(picture, 64))


def test_a_prompt_of_points_is_kept_and_gives_the_mask_of_its_pass(tmp_path: Path) -> None:
    models, example = toy_models(), toy_mask_task().train[0]
    predictor = GenSAM("red square", **SETTINGS).on(models)
    prompt, found = predictor.adapt(example), predictor.segment(example.inputs["image"])
    assert prompt.points.shape[1] == 2 and len(prompt.labels) == len(prompt.points)
    assert prompt.info["passes"] == 6 and prompt.info["chosen"] == found.chosen
    assert prompt.info["words"]["foreground"] == ["red square"] and "predicted IoU" in prompt.info
    prompt.save(tmp_path / "points.json")
    again = PointPrompt.load(tmp_path / "points.json")
    mask, = again.on(models).predict([example])
    assert torch.equal(mask, found.mask)
    settings = GenSAM("red square", **SETTINGS).optimize(toy_mask_task(), models, progress=False)
    settings.save(tmp_path / "settings.json")
    same = Prompt.load(tmp_path / "settings.json")
    assert isinstance(same, GenericPrompt)
    assert torch.equal(same.on(models).predict([example])[0].mask, found.mask)


def test_optimize_tries_the_settings_and_takes_those_of_a_start() -> None:
    task, models = toy_mask_task(6), toy_models()
    prompt = GenSAM("red square", **SETTINGS, recursive=0, trials=3).optimize(task, models, seed=1, progress=False)
    assert prompt.info["evaluations"] == 3 and prompt.info["fitness"] == pytest.approx(np.mean(prompt.info["scores"]))
    assert task.evaluate(prompt.on(models), "dev").score >= 0
    start = GenericPrompt({**GenSAM("black disc", **SETTINGS).hyperparameters(), "recursive": 1})
    other = GenSAM().optimize(task, models, start=start, progress=False)
    assert other.settings["text"] == "black disc" and other.settings["recursive"] == 1
    stopped = GenSAM("red square", **SETTINGS).optimize(task, models, budget=Budget(calls=3), progress=False)
    assert stopped.info["stopped"] == "budget: calls" and stopped.info["fitness"] == 0


def test_a_folder_of_pictures_goes_on_where_it_was(tmp_path: Path) -> None:
    from PIL import Image

    source, target = tmp_path / "pictures", tmp_path / "masks"
    source.mkdir()
    for n, example in enumerate(toy_mask_task().train[:3]):
        Image.fromarray(example.inputs["image"]).save(source / f"{n}.png")
    (source / "notes.txt").write_text("no picture")
    predictor = GenSAM("red square", **SETTINGS, recursive=1).on(toy_models())
    report = predictor.folder(source, target, progress=False)
    assert report.facts["made in this run"] == 3 and len(report.images) == 3
    assert sorted(p.name for p in target.iterdir()) == ["0.png", "1.png", "2.png"]
    mask = np.asarray(Image.open(target / "0.png"))
    expected = predictor.segment(Image.open(source / "0.png")).mask.numpy()
    assert mask.dtype == np.uint8 and ((mask == 255) == expected).all() and set(np.unique(mask)) <= {0, 255}
    (target / "1.png").unlink()
    again = predictor.folder(source, target, progress=False)
    assert again.facts["made in this run"] == 1 and [i.title for i in again.images] == ["1.png"]
    with pytest.raises(ValueError, match="another folder for the masks"):
        predictor.folder(source, source, progress=False)
    Image.fromarray(mask).save(source / "0.bmp")
    with pytest.raises(ValueError, match=r"expected one picture for each mask.*0\.bmp, 0\.png"):
        predictor.folder(source, target, progress=False)
    (source / "0.bmp").unlink()
    (source / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.jpg: expected a picture"):
        predictor.folder(source, target, progress=False)


def test_the_report_has_heat_points_masks_words_and_measures() -> None:
    task = toy_mask_task()
    pictures = [e.inputs["image"] for e in task.train[:2]]
    report = GenSAM("red square", **SETTINGS, recursive=1).on(toy_models()).report(
        pictures, [e.target for e in task.train[:2]], names=["one", "two"])
    assert [images.captions for images in report.images] == [["heat map", "points and box", "mask"]] * 2
    assert report.tables[0].rows[0][:3] == ["one", "red square", "black disc"]
    assert [row[0] for row in report.tables[1].rows] == ["one", "two", "mean"]
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text()
    with pytest.raises(ValueError, match="targets: expected one for each of 2 pictures, got 1"):
        GenSAM("red square", **SETTINGS).on(toy_models()).report(pictures, [task.train[0].target])


# ---------------------------------------------------------------------------------------------------------- bad input
def test_bad_settings_are_refused_with_what_was_expected() -> None:
    for options, message in (({"text": " "}, "text: expected what to look for"), ({"depth": -1}, "depth: expected"),
                             ({"attention": "qq"}, "attention: expected 'kk' or 'vv'"),
                             ({"attn_thr": 0.0}, "attn_thr: expected"), ({"weight": 1.5}, "weight: expected"),
                             ({"templates": ("no braces",)}, "templates: expected texts with one {} each"),
                             ({"synonyms": "animal"}, "synonyms: expected phrases"), ({"recursive": -1}, "recursive")):
        with pytest.raises(ValueError, match=message):
            GenSAM(**options)


def test_bad_models_and_tasks_are_refused() -> None:
    clip = toy_clip()
    with pytest.raises(ValueError, match=r"clip: expected a looseleaf_vision.DualEncoder, got CLIPModel"):
        PromptableModels(clip.model, toy_segmenter, FixedWords("a"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="namer: expected a Namer or a function, got str"):
        PromptableModels(clip, toy_segmenter, "frog")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="expected a SamModel, SamHQModel, Sam2Model or a function"):
        PromptableModels(clip, clip.model, FixedWords("a"))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="GenSAM: expected a PromptableModels"):
        GenSAM().on(clip)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="foreground: expected text"):
        FixedWords(None)  # type: ignore[arg-type]
    picture = np.zeros((5, 6, 3), np.uint8)
    with pytest.raises(ValueError, match=r"train\[0\]: expected a mask \(5, 6\).*got \(6, 5\)"):
        mask_task("wrong", [(picture, np.zeros((6, 5), bool))])
    with pytest.raises(ValueError, match="expected an example with a picture"):
        GenSAM(**SETTINGS).on(toy_models()).predict([Example({"text": "x"})])
    wrong = toy_models()
    wrong.segmenter = Segmenter(lambda *_: (np.zeros((3, 4, 4)), [1, 1, 1]))
    with pytest.raises(ValueError, match=r"segmenter: expected logits \(3, 5, 6\) and 3 scores, got \(3, 4, 4\)"):
        GenSAM("red square", **SETTINGS).on(wrong).segment(picture)
    broken = toy_models()
    broken.segmenter = Segmenter(lambda *_: (np.full((3, 5, 6), math.nan), [math.nan] * 3))
    assert not GenSAM("red square", **SETTINGS).on(broken).segment(picture).mask.any()


def test_the_same_picture_gives_the_same_whatever_is_asked_beside_it() -> None:
    task, models = toy_mask_task(), toy_models()
    predictor = GenSAM("red square", **SETTINGS, recursive=1).on(models)
    together = predictor.predict(task.train)
    alone = [GenSAM("red square", **SETTINGS, recursive=1).on(models).segment(e.inputs["image"]) for e in task.train]
    assert all(isinstance(one, Segmentation) for one in together)
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(together, alone, strict=True))
