"""Promptable segmenters, and the three models together, metered in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from looseleaf import UnsupportedModelError, costs
from looseleaf.fingerprint import content_fingerprint, fingerprint
from looseleaf.unwrap import unwrapped
from looseleaf_gensam.heat import spatial_features
from looseleaf_gensam.namer import History, Namer
from looseleaf_vision import DualEncoder

Function = Callable[[Any, "Tensor | None", "Tensor | None", "Tensor | None"], tuple[Any, Any]]


class Segmenter:
    """A SamModel, SamHQModel or Sam2Model with its processor, or a function.

    Args:
        model: of transformers, or ``f(image, points, labels, box) -> (logits (3, H, W), scores (3,))`` in the
            picture's own pixels, where points (n, 2), labels (n,) and box (4,) may be None.
        processor: of the model; None for a function.
    """

    def __init__(self, model: nn.Module | Function, processor: Any = None) -> None:
        inner: Any = unwrapped(model)
        self.function = None if isinstance(model, nn.Module) else model
        if self.function is None and not hasattr(inner, "get_image_embeddings"):
            raise UnsupportedModelError("Segmenter: expected a SamModel, SamHQModel, Sam2Model or a function, got "
                                        f"{type(inner).__name__}")
        if self.function is None and processor is None:
            raise ValueError("Segmenter: expected the model's processor, got None: "
                             "SamProcessor.from_pretrained(...)")
        self.model: Any = model
        self.processor = processor

    def fingerprint(self) -> str:
        """A short hash of the weights, or of the function's name."""
        return content_fingerprint(self.function) if self.function else fingerprint(unwrapped(self.model))

    def embed(self, image: Any) -> dict[str, Any]:
        """What is computed once for a PIL image: embeddings and sizes."""
        if self.function:
            return {"image": image, "size": (image.height, image.width)}
        model: Any = unwrapped(self.model)
        weight = next(model.parameters())
        inputs = self.processor(images=image, return_tensors="pt")
        pixels = inputs["pixel_values"].to(weight)
        found = model.get_image_embeddings(pixels)
        more: dict[str, Any] = {"image_embeddings": found}
        if isinstance(found, tuple):  # SamHQ
            more = {"image_embeddings": found[0], "intermediate_embeddings": found[1]}
        reshaped = inputs.get("reshaped_input_sizes")
        inside = tuple(pixels.shape[-2:]) if reshaped is None else tuple(int(v) for v in reshaped[0])
        return {"more": more, "size": (image.height, image.width), "inside": inside, "reshaped": reshaped}

    def masks(self, embedded: dict[str, Any], points: Tensor | None, labels: Tensor | None, box: Tensor | None,
              ) -> tuple[Tensor, Tensor]:
        """Logits (3, H, W) of the picture's own size and predicted IoU (3,), float32 on the CPU.

        Args:
            embedded: of :meth:`embed`.
            points: (n, 2) as (x, y) in pixels; None: none.
            labels: (n,) 1 for the object and 0 for what is not.
            box: x1, y1, x2, y2 in pixels; None: none.
        """
        points, labels = (None, None) if points is None or not len(points) else (points, labels)
        height, width = embedded["size"]
        if self.function:
            logits, scores = (torch.as_tensor(v if isinstance(v, Tensor) else np.asarray(v)).detach().float().cpu()
                              for v in self.function(embedded["image"], points, labels, box))
            if logits.dim() != 3 or tuple(logits.shape[1:]) != (height, width) or len(scores) != len(logits):
                raise ValueError(f"segmenter: expected logits (3, {height}, {width}) and 3 scores, got "
                                 f"{tuple(logits.shape)} and {tuple(scores.shape)}")
            return torch.nan_to_num(logits), torch.nan_to_num(scores, nan=-1.0)
        weight = next(unwrapped(self.model).parameters())
        scale = torch.tensor([embedded["inside"][1] / width, embedded["inside"][0] / height])
        prompt: dict[str, Any] = {}
        if points is not None and labels is not None:
            # float32 whatever the weights are: in half precision pixels would run together
            prompt["input_points"] = (points.float() * scale)[None, None].to(weight.device)
            prompt["input_labels"] = labels[None, None].to(weight.device)
        if box is not None:
            prompt["input_boxes"] = (box.float().view(2, 2) * scale).view(1, 1, 4).to(weight.device)
        out = self.model(**embedded["more"], **prompt, multimask_output=True)
        sizes = {} if embedded["reshaped"] is None else {"reshaped_input_sizes": [embedded["inside"]]}
        logits = self.processor.post_process_masks([out.pred_masks[0].float().cpu()], [(height, width)],
                                                   binarize=False, **sizes)[0]
        return torch.nan_to_num(logits.view(-1, height, width)), torch.nan_to_num(
            out.iou_scores.float().cpu().flatten(), nan=-1.0)


class PromptableModels:
    """The three models of the method together; its methods are what a budget is charged for.

    Args:
        clip: a :class:`looseleaf_vision.DualEncoder` around a CLIPModel.
        segmenter: a :class:`Segmenter`, or a function as it takes them.
        namer: a :class:`Namer`, or ``f(image, question, history) -> str``.
    """

    def __init__(self, clip: DualEncoder, segmenter: Segmenter | Function, namer: Namer | Callable[..., str]) -> None:
        if not isinstance(clip, DualEncoder):
            raise ValueError(f"clip: expected a looseleaf_vision.DualEncoder, got {type(clip).__name__}: "
                             "DualEncoder(model, processor)")
        if not isinstance(namer, Namer) and not callable(namer):
            raise ValueError(f"namer: expected a Namer or a function, got {type(namer).__name__}: "
                             "FixedWords('frog', 'leaves')")
        self.clip, self.namer = clip, namer
        self.segmenter = segmenter if isinstance(segmenter, Segmenter) else Segmenter(segmenter)
        # plain attributes, so that whoever looks for torch modules sees them
        self.clip_network, self.segmenter_network = clip.model, self.segmenter.model
        self.namer_network = getattr(namer, "model", None)

    @property
    def networks(self) -> list[nn.Module]:
        """The torch modules among the three."""
        three = (self.clip_network, self.segmenter_network, self.namer_network)
        return [network for network in three if isinstance(network, nn.Module)]

    def read(self, picture: Tensor, size: int) -> Tensor:
        """Fractions (1, 3, size, size) of a picture (3, H, W), squeezed."""
        return self.clip.preprocess.read([picture], size)

    def fitting(self, name: str, templates: Sequence[str]) -> str:
        """The name, or as many words or letters of its beginning as CLIP reads within every template."""
        while name:
            try:
                self.clip.tokens([[template.format(name)] for template in templates])
            except ValueError:
                name = name.rsplit(None, 1)[0] if len(name.split()) > 1 else name[:len(name) // 2]
            else:
                break
        return name

    def fingerprint(self) -> str:
        """A short hash of all three."""
        return content_fingerprint([self.clip.fingerprint(), self.segmenter.fingerprint(), self.namer])

    @costs(calls=lambda self, *_, **__: 1)
    def ask(self, image: Any, question: str, history: History, seed: int = 0) -> str:
        """An answer of the namer, see :meth:`Namer.ask`."""
        answer = self.namer.ask(image, question, history, seed) if isinstance(self.namer, Namer) else \
            self.namer(image, question, history)
        return answer if isinstance(answer, str) else ""

    @costs(calls=lambda self, pixels, *_, **__: len(pixels))
    def patches(self, pixels: Tensor, depth: int, attention: Any) -> Tensor:
        """:func:`spatial_features` of fractions (B, 3, H, W)."""
        values = self.clip.preprocess.normalize(pixels.to(self.clip.device)).to(self.clip.dtype)
        return spatial_features(self.clip.model, values, depth, attention).float().cpu()

    @costs(calls=lambda self, names, templates: len(names) * len(templates))
    def texts(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Features (N, d) of names: the normalised mean of the normalised features of all templates."""
        return self.clip.ensemble(list(names), list(templates)).float().cpu()

    @costs(calls=lambda self, image: 1)
    def embed(self, image: Any) -> dict[str, Any]:
        """See :meth:`Segmenter.embed`."""
        return self.segmenter.embed(image)

    @costs(calls=lambda self, *_, **__: 1)
    def masks(self, embedded: dict[str, Any], points: Tensor | None, labels: Tensor | None, box: Tensor | None,
              ) -> tuple[Tensor, Tensor]:
        """See :meth:`Segmenter.masks`."""
        return self.segmenter.masks(embedded, points, labels, box)


__all__ = ["Function", "PromptableModels", "Segmenter"]
