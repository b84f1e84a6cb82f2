"""Pictures as models read them: from files, arrays and tensors to pixels between 0 and 1, and what normalises them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf.fingerprint import fingerprint
from looseleaf.tasks import Example
from looseleaf.unwrap import unwrapped

INPUTS = ("image", "picture")
"""Names under which an example may have its picture."""


def picture_of(example: Example) -> Any:
    """The picture of an example, under one of :data:`INPUTS`.

    Raises:
        ValueError: it has none.
    """
    for name in INPUTS:
        if name in example.inputs:
            return example.inputs[name]
    raise ValueError(f"expected an example with a picture, Example({{'image': ...}}, target), got the inputs "
                     f"{sorted(example.inputs)}")


def as_image(picture: Any, mode: str = "RGB") -> Any:
    """A picture as a PIL image; transparent parts become white.

    Args:
        picture: a PIL image, uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or a tensor of fractions (C, H, W).
        mode: ``RGB`` or ``L``.

    Raises:
        ValueError: it is none of these.
    """
    from PIL import Image

    if isinstance(picture, Tensor) and picture.is_floating_point():
        picture = (picture.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
        picture = picture.permute(1, 2, 0) if picture.dim() == 3 else picture
    if not hasattr(picture, "convert"):
        array = np.asarray(picture.cpu() if isinstance(picture, Tensor) else picture)
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)):
            raise ValueError("picture: expected a PIL image, uint8 of the shape (height, width[, 1, 3 or 4]), or a "
                             f"tensor of fractions (channels, height, width), got {array.dtype} {array.shape}")
        picture = Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1:] == (1,) and array.ndim == 3
                                                       else array))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        clear = picture.convert("RGBA")
        white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, clear)
    return picture.convert(mode)


class Preprocess:
    """What turns pictures into the pixels of a model.

    Args:
        source: an image processor of transformers, the ``transforms()`` of torchvision's weights, a timm model (its
            ``pretrained_cfg`` is read), a function of a PIL image that gives (C, H, W), or None.
        size: height and width of the model's input; None: that of the source.
        mean, std: subtracted from, and divided through, values between 0 and 1; None: those of the source, else 0
            and 1.

    Raises:
        ValueError: no size is known.
    """

    def __init__(self, source: Any = None, *, size: int | tuple[int, int] | None = None,
                 mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        settings = _settings(source)
        size = size if size is not None else settings["size"]
        if size is None:
            raise ValueError(f"Preprocess: expected the size of the model's input, got none from "
                             f"{type(source).__name__}: give size=224")
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.mean = tuple(float(v) for v in (mean if mean is not None else settings["mean"]))
        self.std = tuple(float(v) for v in (std if std is not None else settings["std"]))
        self.processor, self.function = settings["processor"], settings["function"]
        self.resize, self.resample = settings["resize"], settings["resample"]
        self.mode = "L" if len(self.mean) == 1 else "RGB"

    def read(self, pictures: Sequence[Any], size: int | None = None) -> Tensor:
        """Pictures as fractions (B, C, H, W), not normalised yet; see :func:`as_image`.

        Tensors of fractions keep their precision, and are only resized where their size is another.

        Args:
            pictures: see :func:`as_image`.
            size: height and width to which they are squeezed (bicubic; a picture of that size stays as it is), for
                learned pixels around them; None: the model's own way to its own size.
        """
        rows: list[Tensor] = []
        wanted = self.size if size is None else (size, size)
        for picture in pictures:
            if isinstance(picture, Tensor) and picture.is_floating_point() and picture.dim() == 3 \
                    and picture.shape[0] == len(self.mean):
                one = picture.detach().float()[None]
                if tuple(one.shape[-2:]) != wanted:
                    one = F.interpolate(one, wanted, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
                rows.append(one[0].cpu())
                continue
            image = as_image(picture, self.mode)
            if size is not None:
                rows.append(_pixels(image if image.size == wanted else image.resize(wanted, 3)))
            elif self.processor is not None:
                rows.append(self.processor(images=image, do_normalize=False, return_tensors="pt").pixel_values[0])
            elif self.function is not None:
                rows.append(self.function(image))
            else:
                rows.append(_pixels(_fitted(image, self.resize, self.size, self.resample)))
        return torch.stack(rows)

    def crops(self, pictures: Sequence[Any], generator: torch.Generator, scale: tuple[float, float] = (0.08, 1.0),
              flip: bool = True) -> Tensor:
        """Random parts of pictures as fractions (B, C, H, W): those of RandomResizedCrop, bicubic, and mirrored.

        Args:
            pictures: see :meth:`read`.
            generator: of all randomness.
            scale: smallest and largest fraction of the area; the sides' ratio is in [3/4, 4/3].
            flip: mirror every second picture.
        """
        rows = []
        for picture in pictures:
            image = as_image(picture, self.mode)
            box, mirrored = _box(image.size, generator, scale), float(torch.rand(1, generator=generator)) < 0.5
            row = _pixels(image.resize(self.size[::-1], 3, box=box))
            rows.append(row.flip(-1) if flip and mirrored else row)
        return torch.stack(rows)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Fractions (B, C, H, W) as the model was trained on."""
        mean, std = (pixels.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std


class PictureModel:
    """A model of pictures and what it reads them with; the base of dual encoders and image classifiers.

    Args:
        model: a torch module; left as it is.
        preprocess: see :class:`Preprocess`.

    Attributes:
        batch_size: pictures, or texts, that go through the model at a time where nothing else is asked for.
    """

    batch_size = 64

    def __init__(self, model: nn.Module, preprocess: Preprocess) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"{type(self).__name__}: expected a torch module, got {type(model).__name__}")
        self.model, self.preprocess = model, preprocess

    @property
    def name(self) -> str:
        """The class of the model."""
        return type(unwrapped(self.model)).__name__

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the model's weights."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def fingerprint(self) -> str:
        """A short hash of the weights."""
        return fingerprint(unwrapped(self.model))

    def read(self, examples: Sequence[Example], size: int | None = None) -> Tensor:
        """The pictures of examples as fractions (B, C, H, W), on the model's device; see :meth:`Preprocess.read`."""
        return self.preprocess.read([picture_of(e) for e in examples], size).to(self.device)

    def crops(self, examples: Sequence[Example], generator: torch.Generator,
              scale: tuple[float, float] = (0.08, 1.0), flip: bool = True) -> Tensor:
        """Random parts of the pictures of examples; see :meth:`Preprocess.crops`."""
        return self.preprocess.crops([picture_of(e) for e in examples], generator, scale, flip).to(self.device)


def batches(examples: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """``examples`` in pieces of at most ``size``."""
    return [examples[at:at + size] for at in range(0, len(examples), size)]


def _pixels(image: Any) -> Tensor:
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255


def _fitted(image: Any, resize: int | None, size: tuple[int, int], resample: int) -> Any:
    """Squeezed to ``size``, or with the shorter side ``resize`` and cut to ``size`` in the middle."""
    if resize is None:
        return image.resize(size[::-1], resample)
    scale = resize / min(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], resample)
    left, top = (image.width - size[1]) // 2, (image.height - size[0]) // 2
    return image.crop((left, top, left + size[1], top + size[0]))


def _box(size: tuple[int, int], generator: torch.Generator, scale: tuple[float, float]) -> tuple[float, ...]:
    """The box of torchvision's RandomResizedCrop."""
    width, height = size
    for _ in range(10):
        area, shape, x, y = torch.rand(4, generator=generator).tolist()
        area = width * height * (scale[0] + area * (scale[1] - scale[0]))
        ratio = math.exp(math.log(3 / 4) + shape * (math.log(4 / 3) - math.log(3 / 4)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(x * (width - wide + 1)), int(y * (height - high + 1))
            return (left, top, left + wide, top + high)
    side = min(width, height)
    return ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)


def _settings(source: Any) -> dict[str, Any]:
    """Size, normalisation and what reads a picture, as a source has them."""
    out: dict[str, Any] = {"size": None, "mean": (0.0,) * 3, "std": (1.0,) * 3, "processor": None, "function": None,
                           "resize": None, "resample": 3}
    configured = getattr(source, "pretrained_cfg", None) or getattr(source, "default_cfg", None)
    if source is None:
        return out
    if hasattr(source, "image_mean") and hasattr(source, "preprocess"):  # an image processor of transformers
        size = (getattr(source, "crop_size", None) if getattr(source, "do_center_crop", False) else None) or source.size
        read: Callable[[str], Any] = lambda name: (size.get(name) if hasattr(size, "get") else None) or getattr(  # noqa: E731
            size, name, None)
        edge = read("shortest_edge")
        out["size"] = (read("height") or edge, read("width") or edge) if read("height") or edge else None
        if getattr(source, "do_normalize", True):
            out["mean"], out["std"] = tuple(source.image_mean), tuple(source.image_std)
        out["processor"] = source
    elif isinstance(configured, dict) or hasattr(configured, "input_size"):  # timm
        given = configured if isinstance(configured, dict) else vars(configured)
        out["size"] = tuple(given["input_size"][-2:])
        out["mean"], out["std"] = given["mean"], given["std"]
        out["resize"] = round(min(out["size"]) / float(given.get("crop_pct") or 1.0))
        out["resample"] = {"bilinear": 2, "bicubic": 3}.get(given.get("interpolation", "bicubic"), 3)
    elif hasattr(source, "crop_size") and hasattr(source, "mean"):  # torchvision's presets
        first: Callable[[Any], int] = lambda value: int(value[0] if isinstance(value, (list, tuple)) else value)  # noqa: E731
        out["size"], out["resize"] = (first(source.crop_size),) * 2, first(source.resize_size)
        out["mean"], out["std"] = tuple(source.mean), tuple(source.std)
        out["resample"] = 3 if "bicubic" in str(getattr(source, "interpolation", "")).lower() else 2
    elif callable(source) and not isinstance(source, nn.Module):
        out["function"] = source
        shape = source(as_image(np.zeros((64, 64, 3), np.uint8))).shape
        out["size"], out["mean"], out["std"] = tuple(shape[-2:]), (0.0,) * shape[0], (1.0,) * shape[0]
    return out


__all__ = ["INPUTS", "PictureModel", "Preprocess", "as_image", "batches", "picture_of"]
