"""What tests of methods for pictures need: small models from their configurations, and tasks of made-up pictures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf.tasks import Example, Task
from looseleaf.testing.models import seeded
from looseleaf_vision.classifier import ImageClassifier
from looseleaf_vision.encoder import DualEncoder

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.1), "blue": (0.1, 0.1, 0.9), "yellow": (0.9, 0.9, 0.1),
           "black": (0.05, 0.05, 0.05), "white": (0.95, 0.95, 0.95)}
TEXT = ("a an the photo picture drawing of this is that shows small large good bad many type pet texture cartoon red "
        "green blue yellow black white left right disc square . , cat dog car tree house bird fish")
WORDS = TEXT.split()
SIZE = 16


def toy_tokenizer(style: str = "clip", length: int = 40) -> Any:
    """A tokenizer of whole words, with the special tokens of CLIP, SigLIP (``siglip``) or BERT (``bert``)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    first, last = ("[CLS]", "[SEP]") if style == "bert" else ("<s>", "</s>")
    # the end of text has the largest number, as in CLIP
    order = ["<pad>", "<unk>", first, *WORDS, last] if style == "bert" else ["<pad>", "<unk>", *WORDS, first, last]
    numbers = {word: n for n, word in enumerate(order)}
    raw = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    raw.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    around = f"{first} $A {last}" if style != "siglip" else f"$A {last}"
    raw.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=around, special_tokens=[(name, numbers[name]) for name in (first, last)])
    names = ["input_ids"] if style == "siglip" else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", bos_token=first,
                                   eos_token=last, model_max_length=length, model_input_names=names)


def toy_processor(tokenizer: Any) -> Any:
    """A tokenizer and an image processor of 16 pixels, as a processor of transformers has them."""
    from transformers import CLIPImageProcessor

    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return SimpleNamespace(tokenizer=tokenizer, image_processor=images)


def toy_clip(layers: int = 3, width: int = 24, seed: int = 0, **text: Any) -> DualEncoder:
    """A CLIPModel with random weights: 16 pixels, patches of 8, texts of up to 40 tokens; ``text`` overrides."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = toy_tokenizer()
    shape = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2,
             "projection_dim": 16, "initializer_factor": 3.0}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}
    config = CLIPConfig(
        text_config={**shape, "vocab_size": len(tokenizer), "max_position_embeddings": 40, **ends, **text},
        vision_config={**shape, "hidden_size": width + 8, "image_size": SIZE, "patch_size": 8}, projection_dim=16)
    return DualEncoder(seeded(lambda: CLIPModel(config), seed).eval(), toy_processor(tokenizer))


class ToyNetwork(nn.Module):
    """A small network with a batch norm: (B, 3, 16, 16) -> (B, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.last = nn.Linear(8 * 16, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, 16, 16) -> (B, classes)."""
        x = torch.relu(self.norm(self.first(pixels)))
        return self.last(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))  # type: ignore[no-any-return]


def toy_classifier(classes: int = 12, seed: int = 0) -> ImageClassifier:
    """An :class:`ImageClassifier` around a :class:`ToyNetwork` with random weights."""
    network = seeded(lambda: ToyNetwork(classes), seed).eval()
    return ImageClassifier(network, size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3, classes=range(classes))


def toy_pictures(classes: int = 4, each: int = 4, seed: int = 0, size: int = SIZE) -> Task:
    """Noisy squares of one colour on grey, uint8; the colours are the classes.

    Args:
        classes: 2 to 6.
        each: examples of each class in each of train, dev and test.
        seed: of the noise.
        size: of the pictures.
    """
    draw, names = torch.Generator().manual_seed(seed), list(COLOURS)[:classes]

    def example(name: str) -> Example:
        pixels = 0.5 + 0.15 * torch.randn(size, size, 3, generator=draw)
        at = int(torch.randint(0, size // 2, (1,), generator=draw))
        pixels[at:at + size // 2, at:at + size // 2] = torch.tensor(COLOURS[name]) + 0.05 * torch.randn(
            size // 2, size // 2, 3, generator=draw)
        return Example({"image": (pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()}, name)

    train, dev, test = ([example(name) for _ in range(each) for name in names] for _ in range(3))
    return Task("colours", train, dev, test, classes=names)


__all__ = ["COLOURS", "SIZE", "WORDS", "ToyNetwork", "toy_classifier", "toy_clip", "toy_pictures", "toy_processor",
           "toy_tokenizer"]
