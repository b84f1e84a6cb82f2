"""mini-clip: a genuine CLIPModel of 4 million weights, trained on emoji and clip art.

Contrastive loss on (picture, name) pairs, and the cosines to frozen EfficientNet-Lite0 and MiniLM features. Names
stand in several templates, because otherwise a prompt would not matter to the model. Held out: a fifth of the finer
classes of the emoji, all stamps, and the other style of the emoji.
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

from looseleaf.files import replacing
from looseleaf.progress import bar
from looseleaf_lab import data, models

TEMPLATES = ("{}", "a picture of a {}", "a drawing of {}", "an emoji of {}", "clip art of a {}", "a photo of a {}",
             "this is {}", "a small picture that shows {}")
TRAINED = TEMPLATES[:5]
"""Templates of training; the others are new to the model."""
SIZE, LENGTH, WIDTH = 64, 32, 128
DATA = ("emoji", "clip-art")


def held_out(sublabels: list[str]) -> set[str]:
    """A fifth of the finer classes, by a hash of their names."""
    return {name for name in set(sublabels) if int(data.key(f"mini-clip {name}"), 16) % 5 == 0}


def pairs(made_up: bool = False) -> tuple[np.ndarray, list[list[str]], data.Pictures]:
    """Pictures of training (n, 64, 64, 3), the names of each, and the held-out emoji.

    Args:
        made_up: take the stand-ins of the data sets, to try the recipe out.
    """
    emoji, art = ((data.stand_in(name, 64) if made_up else data.pictures(name)) for name in DATA)
    assert isinstance(emoji, data.Pictures) and isinstance(art, data.Pictures)
    away = held_out(emoji.column("sublabel"))
    train = [i for i, row in enumerate(emoji.rows) if row["sublabel"] not in away]
    test = [i for i, row in enumerate(emoji.rows) if row["sublabel"] in away]
    images = np.concatenate([on_white(emoji.images[train]), art.images])
    named = [[emoji.rows[i]["caption"]] for i in train]
    for row in art.rows:
        words = row["caption"].split()
        place = row["sublabel"].split("/")[-1] or row["label"]
        # file names end in the author's name, which nobody can tell from the title: the first words are the title's
        named.append([" ".join(words[:2]), words[0] if words else place, f"{place} {words[0] if words else ''}".strip(),
                      place.replace("_", " ")])
    return images, named, emoji[test]


def on_white(images: np.ndarray) -> np.ndarray:
    """RGBA to RGB, uint8."""
    images = np.asarray(images)
    if images.shape[-1] == 3:
        return images
    alpha = images[..., 3:].astype(np.float32) / 255
    return (images[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def make_tokenizer(texts: list[str], length: int = LENGTH, pieces: int = 4096) -> Any:
    """A CLIP tokenizer of at most ``pieces`` pieces trained on ``texts``."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import CLIPTokenizer

    raw = Tokenizer(BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix=""))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(texts, BpeTrainer(
        vocab_size=pieces, special_tokens=["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    model = json.loads(raw.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    vocabulary = dict(model["vocab"])
    for letter in pre_tokenizers.ByteLevel.alphabet():  # every text can be written: each byte inside and at an end
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def make_processor(texts: list[str], folder: Path) -> Any:
    """The tokenizer of :func:`make_tokenizer` and an image processor of 64 pixels."""
    from transformers import CLIPImageProcessor, CLIPProcessor

    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    processor = CLIPProcessor(image_processor=images, tokenizer=make_tokenizer(texts))
    processor.save_pretrained(folder)
    return CLIPProcessor.from_pretrained(folder)


def make_model(tokenizer: Any) -> Any:
    """A new CLIPModel."""
    from transformers import CLIPConfig, CLIPModel

    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3,
                     "num_attention_heads": 4, "max_position_embeddings": LENGTH, "projection_dim": WIDTH, **ends},
        vision_config={"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6,
                       "image_size": SIZE, "patch_size": 8, "projection_dim": WIDTH},
        projection_dim=WIDTH)
    return CLIPModel(config)


def embed(value: Any) -> Tensor:
    """The features in what ``get_image_features`` gives, normalised."""
    return F.normalize(value if isinstance(value, Tensor) else value.pooler_output, dim=-1)


class Pixels:
    """Batches of pictures as the processor makes them, on the fly and with small changes for training."""

    def __init__(self, processor: Any) -> None:
        images = processor.image_processor
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (images.image_mean, images.image_std))

    def __call__(self, images: np.ndarray, rng: torch.Generator | None = None) -> Tensor:
        x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
        if x.shape[-1] != SIZE:
            x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        if rng is not None:
            n, pad = len(x), 6
            flip = torch.rand(n, generator=rng) < 0.5
            x = torch.where(flip.view(n, 1, 1, 1), x.flip(3), x)
            x = F.pad(x, (pad,) * 4, value=1.0)
            at = torch.randint(0, 2 * pad + 1, (n, 2), generator=rng)
            x = torch.stack([x[i, :, a:a + SIZE, b:b + SIZE] for i, (a, b) in enumerate(at.tolist())])
            x = (x * (0.8 + 0.4 * torch.rand(n, 3, 1, 1, generator=rng))).clamp(0, 1)
        return (x - self.mean) / self.std


def teachers(images: np.ndarray, texts: list[str], made_up: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Features of the frozen models: (n, 1280) of the pictures, (384,) of each text."""
    if made_up:
        rng = torch.Generator().manual_seed(0)
        return torch.randn(len(images), 1280, generator=rng), {t: torch.randn(384, generator=rng) for t in texts}
    net, preprocess = models.load("efficientnet-lite0")
    seen = []
    with torch.no_grad():
        for at in range(0, len(images), 64):
            # a size between ours and the network's: half the time for nearly the same features
            small = F.interpolate(preprocess(images[at:at + 64]), (160, 160), mode="bilinear", align_corners=False)
            seen.append(net.features(small))
    read = models.sentence_embeddings(models.load("minilm"), texts, batch=256).clone()  # training may keep it
    return torch.cat(seen), dict(zip(texts, read, strict=True))


def train(folder: Path, *, steps: int = 4000, batch: int = 128, seed: int = 0, made_up: bool = False,
          state: Path | None = None) -> None:
    """Train the model and write it, with its processor and card, to ``folder``.

    Args:
        folder: made here.
        steps: of AdamW.
        batch: pairs in a step.
        seed: of weights, order, names and small changes.
        made_up: try the recipe out on stand-ins.
        state: a folder for features of the frozen models and what training has reached: a killed run goes on.
    """
    began = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    images, named, test = pairs(made_up)
    texts = sorted({name for row in named for name in row})
    processor = make_processor([t.format(name) for name in texts for t in TRAINED], folder)
    model, pixels = make_model(processor.tokenizer), Pixels(processor)
    cached = state / "teachers.pt" if state else None
    if cached and cached.is_file():
        kept = torch.load(cached, weights_only=True)
        of_pictures, of_texts = kept["pictures"], kept["texts"]
    else:
        of_pictures, of_texts = teachers(images, texts, made_up)
        of_pictures, of_texts = of_pictures.half(), {text: row.half() for text, row in of_texts.items()}
        if cached:
            cached.parent.mkdir(parents=True, exist_ok=True)
            with replacing(cached) as part:
                torch.save({"pictures": of_pictures, "texts": of_texts}, part)
    of_pictures = of_pictures - of_pictures.float().mean(0)
    to_pictures, to_texts = nn.Linear(WIDTH, 1280), nn.Linear(WIDTH, 384)
    heads = nn.ModuleList([to_pictures, to_texts])
    device = models.device()
    whole = nn.ModuleList([model, heads]).to(device)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 100) * 0.5 * (
        1 + float(np.cos(np.pi * min(1.0, step / steps)))))
    reached = Reached(state / "reached.pt" if state else None, device, weights=whole, optimizer=optimizer,
                      schedule=schedule)
    start = reached.load()
    whole.train()
    with bar("mini-clip", steps) as shown:
        shown.update(start)
        for step in range(start, steps):
            rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
            words = random.Random(f"{seed} {step}")
            chosen = torch.randint(0, len(images), (batch,), generator=rng)
            names = [words.choice(named[i]) for i in chosen.tolist()]
            tokens = processor.tokenizer([words.choice(TRAINED).format(n) for n in names], padding=True,
                                         truncation=True, max_length=LENGTH, return_tensors="pt")
            seen = embed(model.get_image_features(pixel_values=pixels(images[chosen.numpy()], rng).to(device)))
            read = embed(model.get_text_features(**tokens.to(device)))
            logits = model.logit_scale.exp().clamp(max=100) * seen @ read.T
            same = torch.tensor([[a == b for b in names] for a in names], dtype=torch.float32, device=device)
            goal = same / same.sum(1, keepdim=True)  # pairs of one name are no negatives of each other
            loss = (F.cross_entropy(logits, goal) + F.cross_entropy(logits.T, goal)) / 2
            loss = loss + 1 - F.cosine_similarity(to_pictures(seen), of_pictures[chosen].to(device).float()).mean()
            loss = loss + 1 - F.cosine_similarity(to_texts(read), torch.stack([of_texts[n] for n in names]).to(
                device).float()).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            shown.update()
            shown.set_postfix(loss=f"{loss.item():.3f}")
            if (step + 1) % 100 == 0:
                reached.save(step + 1)
    model.eval().cpu().half().save_pretrained(folder)
    figures = measure(folder, test, made_up)
    card = {"name": "mini-clip", "self-trained": True, "model_class": "CLIPModel", "processor_class": "CLIPProcessor",
            "weights": sum(p.numel() for p in model.parameters()), "recipe": "recipes/mini_clip.py", "seed": seed,
            "steps": steps, "batch": batch, "minutes": round((time.time() - began) / 60, 1),
            "device": torch.cuda.get_device_name() if device == "cuda" else device, "data": list(DATA),
            "pictures": len(images), "held out": "a fifth of the finer classes of emoji, all stamps, emoji-other-style",
            "for": "showing prompt learning, mask tuning and base-to-new splits on a CLIP that everybody can load",
            "not for": "telling what real photos show: it knows emoji and clip art at 64 pixels",
            "figures": figures}
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def measure(folder: Path, test: data.Pictures, made_up: bool = False) -> dict[str, float]:
    """Figures on held-out pictures: retrieval of names, and zero-shot classes."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).float().eval(), CLIPProcessor.from_pretrained(folder)
    pixels = Pixels(processor)

    def pictures(images: np.ndarray) -> Tensor:
        return torch.cat([embed(model.get_image_features(pixel_values=pixels(on_white(images[i:i + 128]))))
                          for i in range(0, len(images), 128)])

    def names(texts: list[str]) -> Tensor:
        return F.normalize(torch.stack([embed(model.get_text_features(**processor.tokenizer(
            [t.format(text.replace("-", " ").replace("_", " ")) for text in texts], padding=True, truncation=True,
            max_length=LENGTH, return_tensors="pt"))) for t in TEMPLATES]).mean(0), dim=-1)

    def zero_shot(found: data.Pictures, column: str, least: int) -> tuple[float, float, int]:
        labels = found.column(column)
        classes = sorted({label for label in labels if labels.count(label) >= least})
        rows = [i for i, label in enumerate(labels) if label in classes]
        best = (pictures(found.images[rows]) @ names(classes).T).argmax(1).tolist()
        truth = [classes.index(labels[i]) for i in rows]
        return (float(np.mean([a == b for a, b in zip(best, truth)])), max(map(truth.count, set(truth))) / len(truth),
                len(classes))

    captions = test.column("caption")
    scores = pictures(test.images) @ names(captions).T
    rank = (scores > scores.diagonal()[:, None]).sum(1)
    figures = {"held-out emoji": len(captions), "R@1": float((rank < 1).float().mean()),
               "R@10": float((rank < 10).float().mean()), "R@10 by chance": min(1.0, 10 / len(captions))}
    other = data.stand_in("emoji-other-style", 48) if made_up else data.pictures("emoji-other-style")
    assert isinstance(other, data.Pictures)
    away = held_out(other.column("sublabel"))
    known = other[[i for i, row in enumerate(other.rows) if row["sublabel"] not in away]]
    scores = pictures(known.images) @ names(known.column("caption")).T
    rank = (scores > scores.diagonal()[:, None]).sum(1)
    figures |= {"emoji of trained names, other style": len(known.rows), "R@1 there": float((rank < 1).float().mean()),
                "R@10 there": float((rank < 10).float().mean())}
    stamps = data.stand_in("stamps", 48) if made_up else data.pictures("stamps")
    assert isinstance(stamps, data.Pictures)
    for name, found, column, least in (("emoji-other-style", other, "sublabel", 5), ("stamps", stamps, "sublabel", 10)):
        accuracy, majority, classes = zero_shot(found, column, least)
        figures |= {f"zero-shot {name}": accuracy, f"majority class {name}": majority, f"classes {name}": classes}
    return {key: round(value, 4) for key, value in figures.items()}

