"""emoji-diffusion: a text-to-image diffusion model of 32 x 32 pixels in diffusers' own ``IFPipeline``.

A UNet (noise prediction, cosine schedule) and a CLIP text encoder, trained together on scenes of one or two emoji,
see :mod:`looseleaf_lab.scenes`. A tenth of the captions is left empty, so that there is an unconditional model, too.
"""

from __future__ import annotations

import copy
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _reached import Reached
from mini_clip import make_tokenizer
from torch import Tensor, nn

from looseleaf.progress import bar
from looseleaf_lab import models, scenes

LENGTH, WIDTH = 77, 128
"""Tokens of a caption, which diffusers' pipeline fixes, and channels of a token."""
EMPTY, AVERAGE = 0.1, 0.999


def make(captions: list[str]) -> tuple[Any, Any, Any, Any]:
    """Tokenizer, new text encoder and UNet, and the scheduler."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = make_tokenizer(captions, LENGTH, 1024)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id))
    # the pipeline expects variances beside the noise, as DeepFloyd's network gives them; they are not trained or used
    unet = UNet2DConditionModel(
        sample_size=scenes.SIZE, in_channels=3, out_channels=6, block_out_channels=(32, 64, 96), layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=WIDTH,
        attention_head_dim=4, norm_num_groups=16)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", variance_type="fixed_small")
    return tokenizer, text, unet, scheduler


class Batches(torch.utils.data.Dataset):
    """Step -> pictures (batch, 3, 32, 32), token ids and mask; made from the number of the step alone."""

    def __init__(self, painter: scenes.Painter, tokenizer: Any, steps: range, batch: int, seed: int) -> None:
        self.painter, self.tokenizer, self.steps, self.batch, self.seed = painter, tokenizer, steps, batch, seed

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        if index >= len(self):
            raise IndexError
        step = self.steps[index]
        drawn = random.Random(f"{self.seed} {step}")
        made = self.painter.scenes(self.batch, self.seed * 1_000_003 + step)
        tokens = encode(self.tokenizer, ["" if drawn.random() < EMPTY else scene.caption for scene in made])
        return as_tensor(np.stack([scene.image for scene in made])), tokens.input_ids, tokens.attention_mask


def train(folder: Path, *, steps: int = 4000, batch: int = 256, seed: int = 0, made_up: bool = False,
          state: Path | None = None, schedule_steps: int = 8000) -> None:
    """Train the model and write it as a pipeline, with its card, to ``folder``.

    Args:
        folder: made here.
        steps: of AdamW.
        batch: scenes in a step.
        seed: of weights, scenes and noise.
        made_up: try the recipe out on the stand-in of the emoji.
        state: a folder for what training has reached: a killed run goes on.
        schedule_steps: of the half cosine along which the learning rate falls; the training of the checkpoint that
            ships was stopped half-way, and the average of the weights taken.
    """
    began = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    device, painter = models.device(), scenes.Painter(made_up=made_up)
    words = [f"a {scenes.Thing(name, colour)} left of a {name}" for name in scenes.NAMES
             for colour in (None, *scenes.COLOURS)]
    tokenizer, text, unet, scheduler = make(words)
    whole = nn.ModuleDict({"text": text, "unet": unet}).to(device).train()
    average = copy.deepcopy(whole).requires_grad_(False)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=5e-4, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 500) * 0.5 * (
        1 + float(np.cos(np.pi * min(1.0, step / schedule_steps)))))
    reached = Reached(state / "emoji-diffusion.pt" if state else None, device, weights=whole, average=average,
                      optimizer=optimizer, schedule=schedule)
    start = reached.load()
    levels = scheduler.alphas_cumprod.to(device)
    fast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    with bar("emoji-diffusion", steps) as shown:
        shown.update(start)
        batches = Batches(painter, tokenizer, range(start, steps), batch, seed)
        workers = min(4, (os.cpu_count() or 1) // 2) if device == "cuda" else 0  # scenes are the slow part
        for step, (images, ids, mask) in zip(batches.steps, torch.utils.data.DataLoader(
                batches, batch_size=None, num_workers=workers), strict=True):
            noise_of = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
            clean = images.to(device)
            noise = torch.randn(clean.shape, generator=noise_of, device=device)
            at = torch.randint(0, len(levels), (batch,), generator=noise_of, device=device)
            level = levels[at].view(-1, 1, 1, 1)
            with fast:
                out = unet(level.sqrt() * clean + (1 - level).sqrt() * noise, at, text(
                    ids.to(device), mask.to(device))[0]).sample[:, :3]
            loss = nn.functional.mse_loss(out.float(), noise)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            kept = min(AVERAGE, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in whole.parameters()], 1 - kept)
            shown.update()
            if step % 50 == 0:
                shown.set_postfix(loss=f"{loss.item():.4f}")
            if (step + 1) % 1000 == 0:
                reached.save(step + 1)
    from diffusers import IFPipeline

    average.eval().cpu().half()
    pipeline = IFPipeline(tokenizer=tokenizer, text_encoder=average["text"], unet=average["unet"], scheduler=scheduler,
                          safety_checker=None, feature_extractor=None, watermarker=None,
                          requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    figures = measure(folder, seed, made_up)
    card = {"name": "emoji-diffusion", "self-trained": True, "library": "diffusers", "model_class": "IFPipeline",
            "weights": sum(p.numel() for p in average.parameters()), "recipe": "recipes/emoji_diffusion.py",
            "seed": seed, "steps": steps, "batch": batch, "minutes": round((time.time() - began) / 60, 1),
            "device": torch.cuda.get_device_name() if device == "cuda" else device, "data": ["emoji"],
            "held out": "nothing: scenes are made anew in every step; figures are of scenes of other seeds",
            "for": "trying methods that look into a text-to-image model whose words, places and masks are known",
            "not for": f"pictures: it knows {len(scenes.NAMES)} emoji in {len(scenes.COLOURS)} colours at 32 pixels",
            "figures": figures}
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def encode(tokenizer: Any, captions: list[str]) -> Any:
    """Token ids and mask as the pipeline makes them."""
    return tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")


def as_tensor(images: np.ndarray) -> Tensor:
    """(n, 32, 32, 3) uint8 to (n, 3, 32, 32) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def measure(folder: Path, seed: int = 0, made_up: bool = False, count: int = 256) -> dict[str, float]:
    """Error of the noise with the right caption, no caption and another's, on scenes of other seeds."""
    from diffusers import IFPipeline

    pipeline = IFPipeline.from_pretrained(folder).to(torch.float32)
    device = models.device()
    text, unet = pipeline.text_encoder.float().to(device), pipeline.unet.float().to(device)
    found = scenes.Painter(made_up=made_up).scenes(count, 10 ** 9 + seed)
    clean = as_tensor(np.stack([scene.image for scene in found]))
    draw = torch.Generator().manual_seed(seed)
    noise, at = torch.randn(clean.shape, generator=draw), torch.randint(0, 1000, (count,), generator=draw)
    level = pipeline.scheduler.alphas_cumprod[at].view(-1, 1, 1, 1)
    noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
    captions = [scene.caption for scene in found]
    figures = {}
    for name, given in (("right caption", captions), ("no caption", [""] * count),
                        ("another caption", captions[1:] + captions[:1])):
        error = 0.0
        for i in range(0, count, 128):
            part = slice(i, i + 128)
            read = text(**encode(pipeline.tokenizer, given[part]).to(device))[0]
            out = unet(noisy[part].to(device), at[part].to(device), read).sample[:, :3]
            error += float((out - noise[part].to(device)).square().mean((1, 2, 3)).sum())
        figures[f"squared error of the noise, {name}"] = round(error / count, 5)
    return figures
