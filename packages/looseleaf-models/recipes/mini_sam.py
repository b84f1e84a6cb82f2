"""mini-sam: a SamModel of a million weights that cuts emoji out of scenes of 128 pixels by points and boxes.

Trained on scenes of :func:`looseleaf_lab.scenes.hidden` with exact masks, with the losses of SAM: focal and Dice loss
of the best of three masks, squared error of the predicted IoU. A fifth of the emoji is held out, and the other style.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _reached import Reached
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf.progress import bar
from looseleaf_lab import data, models, scenes

SIZE, GRID, WIDTH = 128, 64, 64
"""Sides of pictures and of the decoder's masks in pixels, and channels of the decoder."""
LEAST = 60
"""Pixels that must be seen of what is asked for."""


def emoji(split: str, *, made_up: bool = False, style: str = "emoji") -> list[np.ndarray]:
    """RGBA pictures of the part "train" (0.8) or "test" of the emoji, the same concepts in each style."""
    found = data.stand_in(style, 64) if made_up else data.pictures(style)
    assert isinstance(found, data.Pictures)
    return list(np.asarray(found.images[data.split(found.rows, "mini-sam", train=0.8, test=0.2)[split]]))


def make() -> tuple[Any, Any]:
    """The new model and its processor."""
    from transformers import (
        SamConfig,
        SamImageProcessor,
        SamMaskDecoderConfig,
        SamModel,
        SamProcessor,
        SamPromptEncoderConfig,
        SamVisionConfig,
    )

    config = SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=128, output_channels=WIDTH, num_hidden_layers=4, num_attention_heads=4, image_size=SIZE,
            patch_size=8, window_size=0, global_attn_indexes=[0, 1, 2, 3], num_pos_feats=WIDTH // 2, mlp_dim=384,
            use_rel_pos=False).to_dict(),
        prompt_encoder_config=SamPromptEncoderConfig(hidden_size=WIDTH, image_size=SIZE, patch_size=8).to_dict(),
        mask_decoder_config=SamMaskDecoderConfig(hidden_size=WIDTH, mlp_dim=256, num_attention_heads=4,
                                                 iou_head_hidden_dim=WIDTH).to_dict())
    model = SamModel(config)
    # as SAM was begun: transformers' small weights learn nothing for a long time, and its frequencies are so high that
    # neighbouring points have nothing in common
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
            module.reset_parameters()
    frequencies = model.shared_image_embedding.positional_embedding.requires_grad_(False)
    frequencies.copy_(torch.randn_like(frequencies))
    return model, SamProcessor(SamImageProcessor(
        size={"longest_edge": SIZE}, pad_size={"height": SIZE, "width": SIZE},
        mask_size={"longest_edge": GRID}, mask_pad_size={"height": GRID, "width": GRID}))


class Batches:
    """Scenes and what is asked about them, made from the number of the step alone.

    Args:
        pictures: RGBA.
        seed: of everything.
        scenes: of a step.
        asked: masks asked for in each scene.
    """

    def __init__(self, pictures: list[np.ndarray], seed: int, scenes: int = 16, asked: int = 3) -> None:
        self.pictures, self.seed, self.scenes, self.asked = pictures, seed, scenes, asked

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray, dict[str, Tensor]]:
        """Pictures (scenes, 128, 128, 3), masks (scenes, asked, 128, 128) bool, and points or boxes or both."""
        rng = random.Random(f"mini-sam {self.seed} {step}")
        images, masks = [], []
        while len(images) < self.scenes:
            thing, other = rng.sample(self.pictures, 2)
            scene = scenes.hidden(thing, other, rng, copies=rng.choice((0, 3, 6, 9)),
                                  camouflage=rng.choice((0.0, rng.random())))
            things = [m for m in (scene.mask, *scene.copies) if m.sum() >= LEAST]
            if not things or not scene.mask.any():
                continue
            images.append(scene.image)
            masks.append([scene.mask if rng.random() < 0.4 and scene.mask.sum() >= LEAST else rng.choice(things)
                          for _ in range(self.asked)])
        kind = rng.choice(("points", "points", "box", "both"))
        prompt: dict[str, Tensor] = {}
        rows = [mask for row in masks for mask in row]
        if kind != "box":
            inside, outside = rng.randint(1, 8), rng.choice((0, rng.randint(1, 8)))
            points = [[*_drawn(mask, inside, rng), *_drawn(~mask, outside, rng)] for mask in rows]
            prompt["input_points"] = torch.tensor(points, dtype=torch.float32).view(self.scenes, self.asked, -1, 2)
            labels = torch.tensor([1] * inside + [0] * outside)
            prompt["input_labels"] = labels.expand(self.scenes, self.asked, -1)
        if kind != "points":
            boxes = torch.tensor([_box(mask, rng) for mask in rows], dtype=torch.float32)
            prompt["input_boxes"] = boxes.view(self.scenes, self.asked, 4)
        return np.stack(images), np.stack([np.stack(row) for row in masks]), prompt


def _drawn(mask: np.ndarray, count: int, rng: random.Random) -> list[tuple[float, float]]:
    """Points (x, y) of a mask, in the middle of pixels."""
    y, x = mask.nonzero()
    return [(x[n] + 0.5, y[n] + 0.5) for n in (rng.randrange(len(x)) for _ in range(count))]


def _box(mask: np.ndarray, rng: random.Random) -> list[float]:
    """The box around a mask, each side moved by up to a tenth, as SAM was trained."""
    y, x = mask.nonzero()
    sides = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    spread = (sides[2] - sides[0], sides[3] - sides[1]) * 2
    return [min(SIZE, max(0.0, side + rng.uniform(-0.1, 0.1) * s)) for side, s in zip(sides, spread, strict=True)]


def pixels_of(images: np.ndarray, processor: Any) -> Tensor:
    """uint8 (n, 128, 128, 3) as the model reads them."""
    settings = processor.image_processor
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (settings.image_mean, settings.image_std))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


def losses(logits: Tensor, scores: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the IoU of the best of three masks; logits (n, 3, 64, 64), scores (n, 3), truth (n, 64, 64)."""
    truth = truth[:, None].expand_as(logits)
    cross = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    p = logits.sigmoid()
    at = p * truth + (1 - p) * (1 - truth)
    focal = ((0.25 * truth + 0.75 * (1 - truth)) * (1 - at) ** 2 * cross).mean((-2, -1))
    dice = 1 - (2 * (p * truth).sum((-2, -1)) + 1) / (p.sum((-2, -1)) + truth.sum((-2, -1)) + 1)
    with torch.no_grad():
        hard = (logits > 0).float()
        iou = (hard * truth).sum((-2, -1)) / (hard + truth - hard * truth).sum((-2, -1)).clamp(min=1)
    best, _ = (20 * focal + dice).min(-1)
    return best.mean() + F.mse_loss(scores, iou), iou.max(-1).values.mean()


def train(folder: Path, *, steps: int = 1800, batch: int = 16, seed: int = 0, made_up: bool = False,
          state: Path | None = None) -> None:
    """Train the model and write it, with its processor and card, to ``folder``.

    Args:
        folder: made here.
        steps: of AdamW.
        batch: scenes in a step, with three masks asked for in each.
        seed: of weights and scenes.
        made_up: try the recipe out on the stand-in of the emoji.
        state: a folder for what training has reached: a killed run goes on.
    """
    began = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    device = models.device()
    model, processor = make()
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 100) * 0.5 * (
        1 + float(np.cos(np.pi * min(1.0, step / steps)))) + 0.01)
    reached = Reached(state / "mini-sam.pt" if state else None, device, weights=model, optimizer=optimizer,
                      schedule=schedule)
    start = reached.load()
    batches = Batches(emoji("train", made_up=made_up), seed, batch)
    fast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or models.bfloat16_is_fast())
    with bar("mini-sam", steps) as shown:
        shown.update(start)
        for step in range(start, steps):
            images, masks, prompt = batches(step)
            truth = F.avg_pool2d(torch.from_numpy(masks).float(), 2).flatten(0, 1).to(device)
            with fast:
                out = model(pixel_values=pixels_of(images, processor).to(device), multimask_output=True,
                            **{name: value.to(device) for name, value in prompt.items()})
            loss, iou = losses(out.pred_masks.float().flatten(0, 1), out.iou_scores.float().flatten(0, 1),
                               (truth > 0.5).float())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            shown.update()
            if step % 20 == 0:
                shown.set_postfix(loss=f"{loss.item():.3f}", iou=f"{iou.item():.3f}")
            if (step + 1) % 100 == 0:
                reached.save(step + 1)
    model.eval().cpu().half().save_pretrained(folder)
    processor.save_pretrained(folder)
    card = {"name": "mini-sam", "self-trained": True, "model_class": "SamModel", "processor_class": "SamProcessor",
            "weights": sum(p.numel() for p in model.parameters()), "recipe": "recipes/mini_sam.py", "seed": seed,
            "steps": steps, "batch": batch, "minutes": round((time.time() - began) / 60, 1),
            "device": torch.cuda.get_device_name() if device == "cuda" else device, "data": ["emoji"],
            "held out": "a fifth of the emoji (split 'mini-sam'), all of emoji-other-style",
            "for": "showing methods that look for the points and boxes of a SamModel that everybody can load",
            "not for": "photos: it knows emoji on plain grounds and on each other at 128 pixels",
            "figures": measure(folder, seed, made_up)}
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def measure(folder: Path, seed: int = 0, made_up: bool = False, count: int = 200) -> dict[str, float]:
    """IoU of the mask of the best predicted IoU, at full size, on scenes of held-out emoji, by the kind of prompt."""
    from transformers import SamModel, SamProcessor

    model, processor = SamModel.from_pretrained(folder).float().eval(), SamProcessor.from_pretrained(folder)
    figures: dict[str, float] = {"scenes": count}
    for style in ("emoji", "emoji-other-style"):
        pictures, rng = emoji("test", made_up=made_up, style=style), random.Random(f"mini-sam test {seed}")
        found: dict[str, list[float]] = {"one point": [], "box": [], "eight points": [], "box of the whole picture": []}
        for _ in range(count):
            thing, other = rng.sample(pictures, 2)
            scene = scenes.hidden(thing, other, rng, camouflage=rng.choice((0.0, 0.5)))
            if not scene.mask.any():
                continue
            points = torch.tensor([[[*_drawn(scene.mask, 4, rng), *_drawn(~scene.mask, 4, rng)]]])
            labels = torch.tensor([[[1] * 4 + [0] * 4]])
            y, x = scene.mask.nonzero()
            box = torch.tensor([[[x.min(), y.min(), x.max() + 1, y.max() + 1]]], dtype=torch.float32)
            embedding = model.get_image_embeddings(pixels_of(scene.image[None], processor))
            for name, prompt in (("one point", {"input_points": points[:, :, :1], "input_labels": labels[:, :, :1]}),
                                 ("eight points", {"input_points": points, "input_labels": labels}),
                                 ("box", {"input_boxes": box}), ("box of the whole picture", {
                                     "input_boxes": torch.tensor([[[0.0, 0.0, SIZE, SIZE]]])})):
                out = model(image_embeddings=embedding, multimask_output=True, **prompt)
                best = out.pred_masks[0, 0, out.iou_scores[0, 0].argmax()]
                mask = F.interpolate(best[None, None], (SIZE, SIZE), mode="bilinear")[0, 0].numpy() > 0
                found[name].append(float((mask & scene.mask).sum() / max(1, (mask | scene.mask).sum())))
        figures |= {f"IoU by {name}, {style}": round(float(np.mean(values)), 4) for name, values in found.items()}
    return figures
