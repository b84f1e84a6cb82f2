"""Every checkpoint that ships, and what a recipe makes of made-up data: a card, safetensors, loaded by name."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import looseleaf_models

RECIPES = Path(__file__).parent.parent / "recipes"


def test_what_ships_is_small_and_no_pickle() -> None:
    files = [path for path in looseleaf_models.CHECKPOINTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 64 * 2 ** 20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".txt", ".md"}


@pytest.mark.parametrize("name", looseleaf_models.names() or [pytest.param("", marks=pytest.mark.skip("none ships"))])
def test_every_model_has_a_card(name: str) -> None:
    card = looseleaf_models.card(name)
    assert card["self-trained"] is True and card["figures"] and card["for"] and card["not for"]
    assert (RECIPES.parent / card["recipe"]).is_file()
    assert list(looseleaf_models.folder(name).rglob("*.safetensors"))
    assert not list(looseleaf_models.folder(name).rglob("*.bin"))


def test_mini_clip_tells_pictures_by_their_names() -> None:
    """The figures of the card, on made-up pictures that it has never seen: a red disc is no blue square."""
    pytest.importorskip("transformers")
    pytest.importorskip("PIL")
    models: Any = pytest.importorskip("looseleaf_lab.models")
    model, processor = models.load("mini-clip")
    assert sum(p.numel() for p in model.parameters()) == looseleaf_models.card("mini-clip")["weights"]
    assert processor.tokenizer.model_max_length == 32
    figures = looseleaf_models.card("mini-clip")["figures"]
    assert figures["R@10"] > 2 * figures["R@10 by chance"]


def test_emoji_diffusion_draws_the_colour_that_it_is_asked_for() -> None:
    pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    models: Any = pytest.importorskip("looseleaf_lab.models")
    pipeline, tokenizer = models.load("emoji-diffusion")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a red cat", "a blue cat"], num_inference_steps=12, guidance_scale=3.0, height=32, width=32,
                      generator=torch.Generator().manual_seed(0), output_type="np").images
    red, blue = (image[8:24, 8:24].mean((0, 1)) for image in images)
    assert red[0] > red[2] + 0.2 and blue[2] > blue[0] + 0.2 and tokenizer is pipeline.tokenizer


def test_mini_sam_cuts_out_what_is_in_the_box() -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    image = pytest.importorskip("PIL.Image")
    folder = looseleaf_models.folder("mini-sam")
    model = transformers.SamModel.from_pretrained(folder, dtype="float32").eval()
    processor = transformers.SamProcessor.from_pretrained(folder)
    picture = image.new("RGB", (128, 128), (230, 230, 230))
    picture.paste((200, 40, 40), (30, 40, 80, 90))
    inputs = processor(images=picture, input_boxes=[[[30.0, 40.0, 80.0, 90.0]]], return_tensors="pt")
    inputs["input_boxes"] = inputs["input_boxes"].float()
    with torch.no_grad():
        out = model(**inputs, multimask_output=True)
    mask = processor.post_process_masks(out.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])[0][
        0, int(out.iou_scores.argmax())]
    truth = torch.zeros(128, 128, dtype=torch.bool)
    truth[40:90, 30:80] = True
    assert (mask & truth).sum() / (mask | truth).sum() > 0.7


def test_mini_vlm_answers_by_letter_and_in_words() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    draw = pytest.importorskip("PIL.Image")
    models: Any = pytest.importorskip("looseleaf_lab.models")
    model, processor = models.load("mini-vlm")
    assert sum(p.numel() for p in model.parameters()) == looseleaf_models.card("mini-vlm")["weights"]
    plain, framed = draw.new("RGB", (48, 48), "orange"), draw.new("RGB", (48, 48), (204, 0, 0))
    framed.paste(plain.crop((2, 2, 46, 46)), (2, 2))
    asked = [(plain, "The picture has 2 rows and 1 columns of places. Places are numbered from 1 to 2, row by row. In "
              f"the picture, where is place {k} relative to place {3 - k} ? A directly below ; B directly above . "
              "Answer with the letter. Give the answer alone.") for k in (1, 2)]
    asked += [(p, "Is the picture framed ? Answer in words. Give the answer alone.") for p in (plain, framed)]
    said = []
    for picture, text in asked:
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        inputs = processor(images=picture, return_tensors="pt",
                           text=processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        with torch.no_grad():
            written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        said.append(processor.tokenizer.decode(written[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
    assert said == ["B", "A", "no", "yes"]


def test_what_training_has_reached_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("looseleaf.files")
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe: Any = importlib.import_module("_reached")

    def parts() -> tuple[Any, Any]:
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return model, optimizer

    (model, optimizer), (other, of_other) = parts(), parts()
    reached = recipe.Reached(tmp_path / "new" / "reached.pt", "cpu", weights=model, optimizer=optimizer)
    assert reached.load() == 0
    reached.save(7)
    assert recipe.Reached(tmp_path / "new" / "reached.pt", "cpu", weights=other, optimizer=of_other).load() == 7
    assert torch.equal(other.weight, model.weight)
    assert of_other.state_dict()["state"][0]["step"] == 1
    nothing = recipe.Reached(None, "cpu", weights=model)
    nothing.save(3)
    assert nothing.load() == 0


def test_unknown_models() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*, got 'maxi-clip'"):
        looseleaf_models.folder("maxi-clip")


def test_a_recipe_makes_what_from_pretrained_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mini-clip in a few steps on the stand-ins, stopped half-way and gone on; then found by name."""
    pytest.importorskip("transformers")
    pytest.importorskip("PIL")
    torch = pytest.importorskip("torch")
    models: Any = pytest.importorskip("looseleaf_lab.models")
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe: Any = importlib.import_module("mini_clip")
    try:
        recipe.train(tmp_path / "mini-clip", steps=2, batch=8, made_up=True, state=tmp_path / "state")
    finally:
        for name in ("mini_clip", "_reached"):
            sys.modules.pop(name, None)
    card = json.loads((tmp_path / "mini-clip" / "card.json").read_text())
    assert card["self-trained"] is True and card["weights"] < 4_000_000 and 0 <= card["figures"]["R@10"] <= 1
    monkeypatch.setattr(looseleaf_models, "CHECKPOINTS", tmp_path)
    assert looseleaf_models.names() == ["mini-clip"] == list(models.own())
    model, processor = models.load("mini-clip")
    assert type(model).__name__ == "CLIPModel" and not model.training
    inputs = processor(text=["a red disc", "a drawing of a blue square"], return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**inputs, pixel_values=torch.zeros(2, 3, 64, 64))
    assert out.logits_per_image.shape == (2, 2) and bool(out.logits_per_image.isfinite().all())


def test_the_recipe_of_mini_vlm_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("PIL")
    pytest.importorskip("torch")
    pytest.importorskip("looseleaf_lab.models")
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe: Any = importlib.import_module("mini_vlm")
    try:
        recipe.train(tmp_path / "mini-vlm", steps=2, batch=16, made_up=True, state=tmp_path / "state")
    finally:
        for name in ("mini_vlm", "_reached"):
            sys.modules.pop(name, None)
    card = json.loads((tmp_path / "mini-vlm" / "card.json").read_text())
    assert 1_000_000 < card["weights"] < 3_000_000 and 0 <= card["figures"]["kind, by letter"] <= 1


def test_questions_of_mini_vlm_are_answered_by_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    np, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("looseleaf_lab.models")
    models: Any = importlib.import_module("looseleaf_lab.models")
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe: Any = importlib.import_module("mini_vlm")
    try:
        _, processor = models.load("mini-vlm")
        # light above, dark below; the left half lighter than the right
        y, x = np.mgrid[0:48, 0:48]
        picture = (240 - 3 * y - x)[..., None].repeat(3, 2).astype(np.uint8)
        asked = recipe.Questions(np.stack([picture] * 4), ["food"] * 4, processor, 0, variants=60,
                                 names=["art", "food"])
        made = asked(0, 400, {"darker": 1.0, "looks": 1.0, "count": 1.0})
    finally:
        for name in ("mini_vlm", "_reached"):
            sys.modules.pop(name, None)
    read, tokenizer = made["read"], processor.tokenizer
    seen = set()
    for row in range(400):
        text = tokenizer.decode([t for t in read[row] if t])
        said = tokenizer.decode([t for t in made["said"][row] if t >= 0], skip_special_tokens=True)
        light = made["pixels"][row].mean(0)
        if "Answer in words" not in text or not said:
            continue
        if "2 rows and 1 columns" in text and "darker" in text:
            assert said == "directly below"
        elif "framed" in text:
            edge = made["pixels"][row][:, :2].mean((1, 2))
            assert said == ("yes" if edge[0] > edge[1] + 1 else "no")
        elif "upside down" in text:
            assert said == ("yes" if light[10:20].mean() < light[30:40].mean() else "no")
        elif "How many" in text:
            assert (said == "one") == (made["cuts"][row].sum() == 0)
        seen.add(said)
    assert {"directly below", "yes", "no", "one", "two"} <= seen and bool(torch.isfinite(made["pixels"]).all())
