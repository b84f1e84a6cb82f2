"""StackedEncoder: a model of pictures that reads three of them at once, one behind the other in the channels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf import UnsupportedModelError
from looseleaf.budget import costs
from looseleaf.fingerprint import fingerprint
from looseleaf.modes import evaluating, own_random_state
from looseleaf.unwrap import unwrapped
from looseleaf_vision import Preprocess

TOKEN_MODELS = ("vit", "deit", "vit_msn", "dinov2", "dinov2_with_registers", "clip_vision_model")
"""Model types of transformers whose ``embeddings`` give tokens that one more can follow, the first of them CLS."""


Pictures = Sequence[Any] | np.ndarray
"""Pictures of any kind, or what :meth:`StackedEncoder.keep` gave."""


class Encoded(NamedTuple):
    """What the encoder says of each stack.

    Attributes:
        descriptor: (B, descriptor) fp32 of length 1; what retrieval compares.
        features: (B, width) fp32, the CLS token or the pooled features.
        pattern: (B, width) fp32, the pattern token.
        logits: (B, n_patterns) fp32, whether each pattern was applied.
    """

    descriptor: Tensor
    features: Tensor
    pattern: Tensor
    logits: Tensor


class PatternToken(nn.Module):
    """A learned token with a position of its own, put behind all others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, n, width) -> (B, n + 1, width)."""
        own = (self.token + self.position).to(tokens.dtype).expand(len(tokens), -1, -1)
        return torch.cat([tokens, own], 1)


def _follow(module: Any, _: Any, tokens: Tensor) -> Tensor:
    """A hook; it finds the token in the module, so that copies of the encoder have their own."""
    followed: Tensor = module.pattern_token(tokens)
    return followed


class StackedEncoder(nn.Module):
    """A copy of a model of pictures that reads stacks (picture, replica, its original) of nine channels.

    The first convolution gets six more channels. In a vision transformer a pattern token follows the patches; with
    other models the pattern comes from the pooled features by a linear layer. Forward: (B, 9, H, W) -> `Encoded`.

    Args:
        base: a model of transformers (of :data:`TOKEN_MODELS`, or any that gives pooled features), a timm model, or
            a module (B, 3, H, W) -> features (B, width) or (B, width, h, w); ``features`` is called where it is a
            method. Wrapped or not by PEFT or ``torch.compile``, whose copy is not compiled. It is copied.
        n_patterns: outputs of the head of patterns; the authors' 90.
        descriptor: size of descriptors; the authors' 512.
        init: ``zero`` keeps the base's filters and puts zeros on the six new channels, so that the start is the base
            but for the extra token (ours); ``random`` draws the whole convolution, as the authors do.
        preprocess: what pictures are read with, or a source of it; see :class:`looseleaf_vision.Preprocess`. None:
            the size in the model's configuration, without normalisation where none is known.
        size: height and width of pictures; None: that of `preprocess` or of the configuration.
        pattern: ``token``, ``pooled``, or ``auto``: a token where the model is known to take one.
        seed: of all new weights.

    Attributes:
        base: the copy.
        width: of its features.
        pattern_from: ``token`` or ``pooled``.

    Raises:
        UnsupportedModelError: no convolution of three channels, or one that PEFT adapts; no features; no place for a
            pattern token though ``pattern="token"``.
    """

    def __init__(self, base: nn.Module, *, n_patterns: int = 90, descriptor: int = 512,
                 init: Literal["zero", "random"] = "zero", preprocess: Any = None, size: int | None = None,
                 pattern: Literal["auto", "token", "pooled"] = "auto", seed: int = 0) -> None:
        super().__init__()
        for name, value, options in (("init", init, ("zero", "random")),
                                     ("pattern", pattern, ("auto", "token", "pooled"))):
            if value not in options:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")
        if not isinstance(base, nn.Module):
            raise UnsupportedModelError(f"StackedEncoder: expected a torch module, got {type(base).__name__}")
        if n_patterns < 1 or descriptor < 1:
            raise ValueError(f"n_patterns, descriptor: expected integers >= 1, got {n_patterns} and {descriptor}")
        body = unwrapped(base)
        prefix = getattr(body, "base_model_prefix", "")
        body = getattr(body, prefix, body) if prefix else body  # a classifier's encoder
        body = getattr(body, "vision_model", body) if not hasattr(body, "embeddings") else body
        self.preprocess = preprocess if isinstance(preprocess, Preprocess) else _preprocess(body, preprocess, size)
        self.base, self.init, self.seed = copy.deepcopy(body), init, seed
        with own_random_state(seed):
            conv = _widen(self.base, init)
            place = _token_place(self.base)
            if pattern == "token" and place is None:
                raise UnsupportedModelError(f"{type(body).__name__}: expected a vision transformer of timm or one of "
                                            f"{', '.join(TOKEN_MODELS)}, got another model: give pattern='pooled'")
            self.pattern_from = "pooled" if place is None or pattern == "pooled" else "token"
            with torch.no_grad(), evaluating(self.base):
                probe = self._run(conv.weight.new_zeros(2, 9, *self.preprocess.size))
            if not isinstance(probe, Tensor) or not probe.dim() >= 2 or len(probe) != 2:
                got = tuple(probe.shape) if isinstance(probe, Tensor) else type(probe).__name__
                raise UnsupportedModelError(f"{type(body).__name__}: expected features (B, width), (B, width, h, w) or "
                                            f"(B, tokens, width), got {got}: give a module that returns features")
            self.width = int(self._pooled(probe).shape[-1])
            if self.pattern_from == "token":
                assert place is not None
                place.add_module("pattern_token", PatternToken(self.width).to(conv.weight))
                place.register_forward_hook(_follow)
            else:
                self.pattern_head = nn.Linear(self.width, self.width).to(conv.weight.device)
            self.to_descriptor = nn.Linear(self.width, descriptor).to(conv.weight.device)
            self.to_patterns = nn.Linear(self.width, n_patterns).to(conv.weight.device)
        self.n_patterns = n_patterns

    def _run(self, stack: Tensor) -> Any:
        """Whatever the base says of a stack."""
        base = self.base
        if hasattr(base, "forward_features"):
            return base.forward_features(stack)
        if not hasattr(base, "config"):
            own = getattr(base, "features", None)
            return own(stack) if callable(own) and not isinstance(own, nn.Module) else base(stack)
        out = base(pixel_values=stack)
        pooled = getattr(out, "pooler_output", None)
        return out.last_hidden_state if self.pattern_from == "token" or pooled is None else pooled

    def _pooled(self, out: Tensor) -> Tensor:
        if out.dim() == 4:
            return out.mean((1, 2) if getattr(self.base, "output_fmt", "NCHW") == "NHWC" else (2, 3))
        return out if out.dim() == 2 else out[:, 0] if self.pattern_from == "token" else out.mean(1)

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return self.to_descriptor.weight.device

    @property
    def name(self) -> str:
        """The class of the base."""
        return f"stacked {type(self.base).__name__}"

    def fingerprint(self) -> str:
        """A short hash of the weights."""
        return fingerprint(self)

    def read(self, pictures: Sequence[Any]) -> Tensor:
        """Pictures of any mode and size, as :func:`looseleaf_vision.as_image` reads them, normalised (B, 3, H, W)."""
        return self.preprocess.normalize(self.preprocess.read(pictures)).to(self.device)

    def keep(self, pictures: Sequence[Any]) -> np.ndarray:
        """Pictures of any mode and size as uint8 (n, H, W, 3) of the encoder's size, to be kept and edited."""
        rows = [self.preprocess.read([picture])[0] for picture in pictures]
        return np.stack([(row * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy() for row in rows])

    def pixels(self, kept: np.ndarray) -> Tensor:
        """What :meth:`keep` gave, normalised (n, 3, H, W)."""
        return self.preprocess.normalize(torch.from_numpy(kept).permute(0, 3, 1, 2).float() / 255).to(self.device)

    @costs(calls=lambda self, stack: len(stack))
    def forward(self, stack: Tensor) -> Encoded:
        """What the encoder says of stacks (B, 9, H, W), see :func:`stack`; one call for each.

        Raises:
            ValueError: no stacks of nine channels.
        """
        if stack.dim() != 4 or stack.shape[1] != 9:
            raise ValueError(f"stack: expected (B, 9, height, width), three pictures in the channels, got "
                             f"{tuple(stack.shape)}: use stack(pictures, replicas, originals)")
        weight = next(p for p in self.base.parameters() if p.is_floating_point())
        out = self._run(stack.to(weight.dtype))
        features = self._pooled(out).float()
        pattern = out[:, -1].float() if self.pattern_from == "token" else self.pattern_head(features)
        return Encoded(F.normalize(self.to_descriptor(features), dim=-1), features, pattern, self.to_patterns(pattern))


def stack(pictures: Tensor, replicas: Tensor | None = None, originals: Tensor | None = None) -> Tensor:
    """Pictures (B, 3, H, W) with their context in the channels, (B, 9, H, W); without one they are their own.

    Args:
        pictures: queries, references or background pictures.
        replicas, originals: the example of the edit for each; both or none.
    """
    replicas, originals = (pictures if x is None else x for x in (replicas, originals))
    return torch.cat([pictures, replicas, originals], 1)


@torch.no_grad()
def encode(encoder: Any, pictures: Pictures, contexts: tuple[np.ndarray, np.ndarray] | None = None, *,
           batch_size: int = 64) -> Encoded:
    """What an encoder says of pictures, on the CPU; in evaluation mode, which comes back.

    Args:
        encoder: a :class:`StackedEncoder`, metered by a budget or not.
        pictures: see :meth:`StackedEncoder.read`; or what :meth:`StackedEncoder.keep` gave.
        contexts: replicas and originals as :meth:`StackedEncoder.keep` gives them, one of each for each picture; None:
            each picture is stacked on itself.
        batch_size: stacks that run together.

    Raises:
        ValueError: no pictures, or not one context for each.
    """
    if not len(pictures) or (contexts is not None and {len(part) for part in contexts} != {len(pictures)}):
        raise ValueError(f"encode: expected pictures and as many contexts, got {len(pictures)} and "
                         f"{'none' if contexts is None else [len(part) for part in contexts]}")
    parts: list[Encoded] = []
    with evaluating(encoder):
        for at in range(0, len(pictures), batch_size):
            here = slice(at, at + batch_size)
            kept = isinstance(pictures, np.ndarray) and pictures.ndim == 4 and \
                pictures.shape[1:3] == encoder.preprocess.size
            rows = encoder.pixels(pictures[here]) if kept else encoder.read(pictures[here])
            shown = (None, None) if contexts is None else (encoder.pixels(part[here]) for part in contexts)
            parts.append(Encoded(*(x.cpu() for x in encoder(stack(rows, *shown)))))
    return Encoded(*map(torch.cat, zip(*parts, strict=True)))


def _preprocess(body: Any, source: Any, size: int | None) -> Preprocess:
    """What pictures are read with: the source, else what the model itself knows."""
    if source is None and hasattr(body, "pretrained_cfg"):
        source = body
    own = getattr(getattr(body, "config", None), "image_size", None) if source is None else None
    own = tuple(own) if isinstance(own, (list, tuple)) else own
    if size is None and source is None and own is None:
        raise UnsupportedModelError(f"{type(body).__name__}: expected a model that knows the size of its pictures, got "
                                    "none: give size=224, or preprocess= with an image processor")
    return Preprocess(source, size=own if size is None else size)


def _widen(base: nn.Module, init: str) -> nn.Conv2d:
    """Give the first convolution of three channels six more, in place."""
    for name, module in base.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            if "lora" in name or ".base_layer" in f".{name}":
                raise UnsupportedModelError(f"StackedEncoder: expected a plain first convolution, got {name}, which "
                                            "PEFT adapts: merge the adapter (merge_and_unload) first")
            break
    else:
        raise UnsupportedModelError(f"{type(base).__name__}: expected a model whose first convolution reads three "
                                    "channels, got none")
    weight = module.weight.detach()
    wide = weight.new_zeros(weight.shape[0], 9, *weight.shape[2:])
    if init == "zero":
        wide[:, :3] = weight
    module.in_channels, module.weight = 9, nn.Parameter(wide, requires_grad=module.weight.requires_grad)
    if init == "random":
        module.reset_parameters()
    for each in base.modules():  # models of transformers check the channels of what they are given
        if getattr(each, "num_channels", None) == 3:
            setattr(each, "num_channels", 9)  # noqa: B010
    return module


def _token_place(base: nn.Module) -> nn.Module | None:
    """The module behind whose output the pattern token goes; None where there is none known."""
    if hasattr(base, "norm_pre") and hasattr(base, "blocks") and getattr(base, "rope", None) is None:
        found = base.norm_pre if getattr(base, "num_prefix_tokens", 0) else None
    else:
        known = getattr(getattr(base, "config", None), "model_type", None) in TOKEN_MODELS
        found = getattr(base, "embeddings", None) if known else None
    return found if isinstance(found, nn.Module) else None


__all__ = ["TOKEN_MODELS", "Encoded", "PatternToken", "Pictures", "StackedEncoder", "encode", "stack"]
