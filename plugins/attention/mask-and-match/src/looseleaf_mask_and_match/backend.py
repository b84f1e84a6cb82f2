"""Stage 2, a map of where to look learned without labels, and stage 3, that map as a prior on cross-attention."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf import AttentionBackend, AttentionCall, Geometry, Paper, Report, UnsupportedModelError
from looseleaf.attention.call import Phase
from looseleaf.attention.huggingface import attention_layers
from looseleaf.files import load_tensors, save_tensors
from looseleaf.modes import evaluating, frozen, own_random_state, with_gradients
from looseleaf.plugin import In
from looseleaf.progress import bar
from looseleaf.unwrap import unwrapped
from looseleaf_mask_and_match.contrast import duplicates, feature_map, nt_xent
from looseleaf_mask_and_match.masking import (
    MaskMode,
    Schedule,
    entropy,
    hidden_cells,
    hide,
    hiding_order,
    ink_in_cells,
    ink_of,
    masked_softmax,
    ratio_at,
    valid_cells,
)

FORMAT = "looseleaf.mask-and-match/1"
LEAST = 1e-6
"""Below this the prior is cut, so that its logarithm is finite."""
CROSS = re.compile(r"(encoder_attn|cross_?attn|cross_?attention|encdecattention|encoder_decoder_attention)", re.I)
"""Names of cross-attention modules in transformers."""


class Beta(nn.Module):
    """The strength of the prior in one layer, never below 0 [choice: an absolute value, so that 0 stays 0]."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(start))

    def forward(self) -> Tensor:
        """The strength, a scalar."""
        return self.value.abs()


@dataclasses.dataclass
class MaskAndMatch(AttentionBackend):
    """Let the decoder of an image-to-text model look where a map says, learned without labels (arXiv 2508.06107).

    The paper's abstract names the stages: an encoder learned by contrast (:class:`ContrastivePretraining`), a network
    of attention that must match what it sees through growing masks (:meth:`calibrate`), and supervised fine-tuning.
    Only the abstract was at hand: the equations here are ours [choice], and so are all defaults.

    A map a, one number for each key that sums to 1, comes from ``attached.context["map"]``, (B, Lk). Cross-attention
    becomes softmax(q.k s + beta log(n a)) over n valid keys: a uniform map or beta 0 change nothing. Calls without a
    map, and self-attention, are exact and counted.

    Args:
        temperature: T of NT-Xent [choice].
        mask_start: fraction of the ink that is hidden when training begins [choice].
        mask_end: fraction of the ink that is hidden when it ends [choice].
        schedule: how the fraction grows [choice].
        mask_mode: which cells are hidden: random ones, a block, or those most attended to, so that the network must
            find the next evidence [choice].
        match: what makes the attended vector of the masked image that of the full one: ``contrast`` in the batch, or
            ``cosine`` similarity alone [choice].
        kl_weight: factor of KL(full map on visible cells || masked map) [choice].
        floor: fraction of the map that is spread evenly, against maps of a single cell [choice].
        beta: strength of the prior before fine-tuning [choice].
        learn_beta: train it, one for each layer of cross-attention.
        freeze: the encoder stays as it is in :meth:`calibrate`; False: it learns at a tenth of the rate.
        width: channels inside the network; 0: those of the features.
    """

    temperature: Annotated[float, In("> 0")] = 0.1
    mask_start: Annotated[float, In("[0, 1)")] = 0.1
    mask_end: Annotated[float, In("[0, 1)")] = 0.6
    schedule: Schedule = "linear"
    mask_mode: MaskMode = "random"
    match: Literal["contrast", "cosine"] = "contrast"
    kl_weight: Annotated[float, In(">= 0")] = 0.5
    floor: Annotated[float, In("[0, 1)")] = 0.0
    beta: Annotated[float, In(">= 0")] = 1.0
    learn_beta: bool = True
    freeze: bool = True
    width: Annotated[int, In(">= 0")] = 0
    # Cross-attention has no order of queries and keys: to the core it is bidirectional, when decoding, too.
    phases: ClassVar[frozenset[Phase]] = frozenset({"bidirectional"})
    # The prior is a position bias, which exact attention knows how to join with all of these.
    score_changes: ClassVar[frozenset[str]] = frozenset({"softcap", "s_aux", "position_bias", "dropout"})
    paper: ClassVar[Paper] = Paper(
        title="Mask & Match: Learning to Recognize Handwritten Math with Self-Supervised Attention",
        authors=("Shree Mitra", "Ritabrata Chakraborty", "Nilkanta Sahu"), year=2025, arxiv="2508.06107",
        summary="Learns where to look in formula images by matching them through growing masks, without labels.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.network: nn.Module | None = None
        self.history: list[dict[str, float]] = []

    def validate(self) -> None:
        """Masks only grow."""
        self.check("mask_end", self.mask_end >= self.mask_start, f"a number >= mask_start ({self.mask_start})")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """A backend that takes every call for cross-attention with a map: the kit's models have neither."""
        return {"make": lambda: _WithMap(learn_beta=True), "keeps_own_key": False}

    # ---------------------------------------------------------------------------------------- stage 3: the prior
    def prepare(self, model: Any, geometry: Geometry) -> None:
        """Give each layer of cross-attention its beta.

        Raises:
            UnsupportedModelError: an encoder-decoder whose cross-attention does not go through the interface.
        """
        layers = attention_layers(model)
        cross = [n for n, name in enumerate(layers or ()) if CROSS.search(name)]
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and not cross:
            raise UnsupportedModelError(
                f"expected cross-attention that goes through AttentionInterface, got {type(model).__name__} with none: "
                "TrOCR's decoder has its own; take one like mBART's (Donut, Nougat, PP-FormulaNet)")
        if self.learn_beta:
            wanted = cross or range(geometry.layers)
            self.modules = {n: self.modules.get(n) or Beta(self.beta) for n in wanted}

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention with its prior, (B, Hq, Lq, D)."""
        if not call.is_cross:
            return call.fall_back("self-attention")
        attention = call.context.get("map")
        if attention is None or attention.shape[1] != call.shape[4]:
            return call.fall_back("no context 'map' for these keys")
        module = self.modules.get(call.layer)
        beta = module() if module is not None else torch.tensor(self.beta)
        prior = log_prior(attention.to(call.query.device), call.lengths()[1])
        call.record(beta=beta.detach(), entropy=entropy(prior.detach().softmax(-1)[:, None]).mean())
        bias = (beta.to(prior) * prior)[:, None, None]
        if (present := call.score_changes.get("position_bias")) is not None:
            bias = bias + present
        return dataclasses.replace(call, score_changes={**call.score_changes, "position_bias": bias}).dense()

    # ------------------------------------------------------------------------------------------ stage 2: the map
    def calibrate(self, model: nn.Module, batches: Any, *, epochs: int = 1, lr: float = 1e-3, seed: int = 0,
                  grid: tuple[int, int] | None = None, progress: bool | None = None) -> None:
        """Stage 2: learn the map on the model's own encoder, from images alone.

        ``history`` has loss, hidden fraction, entropy of the map and its part on ink for each step.

        Args:
            model: an image-to-text model with ``get_encoder()``, or an encoder; see
                :func:`~looseleaf_mask_and_match.contrast.feature_map`.
            batches: tensors (B, C, H, W), or dicts with ``pixel_values`` and maybe ``pixel_mask``; gone through once
                for each epoch, such as a DataLoader or a list.
            epochs, lr: of AdamW [choice].
            seed: of the network and of masks.
            grid: rows and columns of the features, where they cannot be guessed.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: no batches, a batch of one with ``match="contrast"``, an image without ink or smaller than the
                encoder's stride.
        """
        encoder = encoder_of(model)
        batches = batches if hasattr(batches, "__len__") else list(batches)
        total, self.grid, self.history = epochs * len(batches), grid, []
        if total < 1:
            raise ValueError(f"batches: expected one or more, got {len(batches)} in {epochs} epochs")
        draw, optimizer = torch.Generator().manual_seed(seed), None
        keep = frozen(encoder) if self.freeze else nullcontext()
        with with_gradients(), evaluating(encoder), keep, own_random_state(seed), \
                bar("stage 2", total, progress) as shown:
            for step, given in enumerate(batch for _ in range(epochs) for batch in batches):
                images, pixel_mask = _images(given, encoder)
                if step == 0:
                    channels = feature_map(encoder, images, grid)[0].shape[1]
                    self.network = attention_network(channels, self.width or channels).to(images.device)
                    groups = [{"params": list(self.network.parameters()), "lr": lr}]
                    if not self.freeze:
                        groups.append({"params": [p for p in encoder.parameters() if p.requires_grad], "lr": lr / 10})
                    optimizer = torch.optim.AdamW(groups)
                ratio = ratio_at(step / max(1, total - 1), self.mask_start, self.mask_end, self.schedule)
                loss, facts = self.matching_loss(encoder, images, ratio, draw, pixel_mask)
                assert optimizer is not None
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                self.history.append({"loss": float(loss.detach()), "ratio": ratio, **facts})
                shown.update()

    def matching_loss(self, encoder: Any, images: Tensor, ratio: float, draw: torch.Generator,
                      pixel_mask: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:
        """Match of the masked images with the full ones plus the KL of their maps, and what to watch.

        Args:
            encoder: see :meth:`calibrate`.
            images: (B, C, H, W).
            ratio: fraction of the ink to hide.
            draw: draws the masks, on the CPU.
            pixel_mask: (B, H, W), 0 where an image is padded.
        """
        if len(images) < 2 and self.match == "contrast":
            raise ValueError(f"batch: expected two images or more for match='contrast', got {len(images)}: make "
                             "batches larger, or take match='cosine'")
        ink = ink_of(images, pixel_mask)
        full, valid = self._features(encoder, images, pixel_mask)
        a = self._map(full, valid)
        cells = ink_in_cells(ink, (a.shape[1], a.shape[2]))
        hidden = hidden_cells(hiding_order(cells, self.mask_mode, draw, a.detach()), cells, ratio)
        masked, _ = self._features(encoder, hide(images, hidden, pixel_mask), pixel_mask)
        b = self._map(masked, valid)
        seen, target = attended(masked, b), attended(full, a).detach()
        if self.match == "contrast":
            loss = nt_xent(seen, target, self.temperature, duplicates(images))
        else:
            loss = (1 - F.cosine_similarity(seen, target)).mean()
        if self.kl_weight:
            visible = a.detach() * ~hidden
            visible = visible / visible.flatten(1).sum(1).clamp(min=1e-12)[:, None, None]
            kl = torch.special.xlogy(visible, visible) - visible * b.clamp(min=1e-12).log()
            loss = loss + self.kl_weight * kl.flatten(1).sum(1).mean()
        return loss, {"entropy": float(entropy(a.detach()).mean()),
                      "on_ink": float((a.detach() * (cells > 0)).flatten(1).sum(1).mean())}

    def grid_maps(self, model: Any, images: Any, pixel_mask: Tensor | None = None,
                  grid: tuple[int, int] | None = None) -> Tensor:
        """The map of each image on the encoder's grid, (B, rows, columns) float32: sums to 1, 0 on padding.

        Args:
            model: what :meth:`calibrate` was given, or another of its kind.
            images: a batch as there.
            pixel_mask: (B, H, W), 0 where an image is padded.
            grid: as there; None: the one given there.
        """
        return self._grid_maps(model, images, pixel_mask, grid)[0]

    def maps(self, model: Any, images: Any, pixel_mask: Tensor | None = None,
             grid: tuple[int, int] | None = None) -> Tensor:
        """The map of each image as the decoder's keys have it, (B, Lk): for ``attached.context["map"]``.

        Class tokens and the like before the patches get the mean of the map, so that the prior leaves them alone. See
        :meth:`grid_maps`; gradients reach network and encoder where they are recorded.
        """
        found, prefix = self._grid_maps(model, images, pixel_mask, grid)
        flat = found.flatten(1)
        count = flat.shape[1]
        whole = torch.cat([flat.new_full((len(flat), prefix), 1 / count), flat], 1)
        return whole * (count / (count + prefix))

    def heat_map(self, model: Any, images: Any, pixel_mask: Tensor | None = None,
                 grid: tuple[int, int] | None = None) -> Report:
        """The maps drawn over their images, as a report; see :meth:`grid_maps`."""
        encoder = encoder_of(model)
        pixels, mask = _images(images, encoder)
        mask = mask if pixel_mask is None else pixel_mask
        with torch.no_grad(), evaluating(encoder):
            found = self.grid_maps(model, pixels, mask, grid)
        ink = ink_of(pixels, mask)
        report = Report("Where Mask & Match looks", facts={"grid": f"{found.shape[1]} x {found.shape[2]}"})
        report.image("Maps", [draw_map(i, m) for i, m in zip(ink, found, strict=True)],
                     "the redder, the more attention; brightest at the most attended cell of each image",
                     captions=[f"entropy {value:.2f}" for value in entropy(found).tolist()])
        return report

    def save(self, path: str | Path) -> None:
        """Write the network of the map and each layer's beta as safetensors; ValueError: nothing was learned."""
        if self.network is None:
            raise ValueError(f"{type(self).__name__}.save: expected a map, got none: calibrate first")
        tensors = {f"network.{name}": x for name, x in self.network.state_dict().items()}
        tensors |= {f"{n}.{name}": x for n, m in self.modules.items() for name, x in m.state_dict().items()}
        save_tensors(path, tensors, {"hyperparameters": self.hyperparameters(), "grid": getattr(self, "grid", None)},
                     format=FORMAT)

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote; hyper-parameters stay those of this object."""
        tensors, info = load_tensors(path, format=FORMAT)
        weights = {name.removeprefix("network."): x for name, x in tensors.items() if name.startswith("network.")}
        inner, channels = weights["0.weight"].shape[:2]
        self.network = attention_network(channels, inner)
        self.network.load_state_dict(weights)
        self.grid = tuple(info["grid"]) if info.get("grid") else None
        self._loaded = {}
        for name, x in tensors.items():
            layer, _, rest = name.partition(".")
            if layer != "network":
                self._loaded.setdefault(int(layer), {})[rest] = x
        self.fill()

    def _features(self, encoder: Any, images: Tensor, pixel_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        features, _ = feature_map(encoder, images, getattr(self, "grid", None))
        grid = (features.shape[2], features.shape[3])
        if min(images.shape[-2] // grid[0], images.shape[-1] // grid[1]) < 1:
            raise ValueError(f"images: expected at least one pixel for each of {grid} cells, got {tuple(images.shape)}")
        return features.float(), None if pixel_mask is None else valid_cells(pixel_mask, grid)

    def _map(self, features: Tensor, valid: Tensor | None) -> Tensor:
        if self.network is None:
            raise ValueError(f"{type(self).__name__}: expected a learned map, got none: call calibrate(model, images), "
                             "or load(path)")
        channels = self.network[0].in_channels  # type: ignore[index]
        if features.shape[1] != channels:
            raise ValueError(f"encoder: expected features of {channels} channels, as the map was learned on, got "
                             f"{features.shape[1]}")
        found = masked_softmax(self.network(features)[:, 0], valid)
        if self.floor:
            even = masked_softmax(torch.zeros_like(found), valid)
            found = (1 - self.floor) * found + self.floor * even
        return found

    def _grid_maps(self, model: Any, images: Any, pixel_mask: Tensor | None,
                   grid: tuple[int, int] | None) -> tuple[Tensor, int]:
        encoder = encoder_of(model)
        pixels, mask = _images(images, encoder)
        mask = mask if pixel_mask is None else pixel_mask
        features, prefix = feature_map(encoder, pixels, grid or getattr(self, "grid", None))
        valid = None if mask is None else valid_cells(mask, (features.shape[2], features.shape[3]))
        if self.network is not None:
            self.network.to(features.device)
        return self._map(features.float(), valid), prefix


@dataclasses.dataclass
class _WithMap(MaskAndMatch):
    """What the conformance kit is given: every call is cross-attention, with a map that falls from key to key."""

    def attend(self, call: AttentionCall) -> Tensor:
        falling = 1 / torch.arange(1, call.shape[4] + 1, device=call.query.device).expand(len(call.query), -1)
        return super().attend(dataclasses.replace(call, is_cross=True, context={**call.context, "map": falling}))

    def save(self, path: str | Path) -> None:
        if self.network is None:
            self.network = attention_network(2, 2)
        super().save(path)


def attention_network(channels: int, width: int) -> nn.Sequential:
    """Features (B, C, rows, columns) to logits (B, 1, rows, columns): 3x3, ReLU, 1x1 [choice]."""
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 1))


def attended(features: Tensor, attention: Tensor) -> Tensor:
    """The vector that a map sees, (B, C): the sum of a_ij F_ij."""
    return torch.einsum("bchw,bhw->bc", features, attention)


def log_prior(attention: Tensor, keys: Tensor) -> Tensor:
    """log(n a) of each key, (B, Lk) float32, a cut at 1e-6; over the n valid keys a is made to sum to 1.

    Args:
        attention: (B, Lk), not negative.
        keys: valid keys of each item, (B,).

    Raises:
        ValueError: a negative or not finite map, or one that is 0 on all valid keys.
    """
    inside = torch.arange(attention.shape[1], device=attention.device) < keys.to(attention.device)[:, None]
    a = torch.where(inside, attention.float(), 0.0)
    total = a.sum(1, keepdim=True)
    if not bool(((a >= 0) & torch.isfinite(a)).all()) or bool(((total <= 0) & inside.any(1, keepdim=True)).any()):
        raise ValueError("context['map']: expected numbers >= 0 that are not all 0 on the valid keys of an item, got "
                         f"{float(a.min()):.3g} to {float(a.max()):.3g}")
    a = (a / total.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=LEAST)
    return torch.where(inside, (a * keys.to(a)[:, None].clamp(min=1)).log(), 0.0)


def encoder_of(model: Any) -> Any:
    """The encoder of an image-to-text model; an encoder itself is given back."""
    inner = unwrapped(model)
    if hasattr(inner, "feature_map"):
        return inner
    config = getattr(inner, "config", None)
    if getattr(config, "is_encoder_decoder", False) and hasattr(inner, "get_encoder"):
        return inner.get_encoder()
    return inner


def draw_map(ink: Any, attention: Any) -> np.ndarray:
    """A map over its image, (H, W, 3) float32 in [0, 1]: black ink on white paper, the redder the more attention.

    Args:
        ink: (H, W) in [0, 1].
        attention: (rows, columns), not negative.
    """
    seen = torch.as_tensor(attention, dtype=torch.float32)[None, None]
    black = torch.as_tensor(ink, dtype=torch.float32).cpu()
    heat = F.interpolate(seen.cpu() / seen.max().clamp(min=1e-12).cpu(), size=tuple(black.shape), mode="bilinear")[0, 0]
    paper = torch.stack([torch.ones_like(heat), 1 - 0.75 * heat, 1 - 0.9 * heat], -1)
    return np.asarray((paper * (1 - black[..., None])).clamp(0, 1).numpy(), dtype=np.float32)


def _images(batch: Any, encoder: Any) -> tuple[Tensor, Tensor | None]:
    """Pixels and their mask, on the encoder's device and in its dtype."""
    given: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {"pixel_values": batch}
    images, mask = given.get("pixel_values"), given.get("pixel_mask")
    if not isinstance(images, Tensor) or images.dim() != 4:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: expected a tensor (B, C, H, W), or a dict with it in 'pixel_values', got {got}")
    like = next(encoder.parameters(), None) if isinstance(encoder, nn.Module) else None
    images = images if like is None else images.to(like.device, like.dtype)
    return images, None if mask is None else mask.to(images.device)


__all__ = ["MaskAndMatch", "attended", "attention_network", "draw_map", "encoder_of", "log_prior"]
