"""Dual encoders: CLIP and its kin, with vectors of one's own in the place of tokens."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf.budget import costs
from looseleaf.errors import UnsupportedModelError
from looseleaf.unwrap import unwrapped
from looseleaf_vision.pictures import PictureModel, Preprocess

Piece = str | int
"""A part of a text: words, or a number of vectors that stand there."""
EMBEDDINGS = ("token_embedding", "word_embeddings", "embed_tokens", "tok_embeddings", "wte")


@dataclasses.dataclass
class Tokens:
    """Texts as the text tower reads them, with vectors in the place of some tokens.

    Attributes:
        ids: (N, L) token numbers; where a vector stands, that of some small ordinary token.
        mask: (N, L), 1 for text and 0 for padding; None where the model takes no mask.
        slots: (N, L), number of the vector that stands there; -1: the token's own embedding.
        vectors: (slots, width) for all texts, or (N, slots, width); None: there are none.
        deep: for layer 1, 2, ...: vectors of the same shapes, which take the places of the slots before that layer.
    """

    ids: Tensor
    mask: Tensor | None
    slots: Tensor
    vectors: Tensor | None = None
    deep: Sequence[Tensor] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def with_vectors(self, vectors: Tensor | None, deep: Sequence[Tensor] = ()) -> Tokens:
        """The same texts with these vectors."""
        return dataclasses.replace(self, vectors=vectors, deep=tuple(deep))

    def repeated(self, times: int) -> Tokens:
        """All texts ``times`` times over, in the order 1, 2, 3, 1, 2, 3; vectors are left out."""
        mask = None if self.mask is None else self.mask.repeat(times, 1)
        return Tokens(self.ids.repeat(times, 1), mask, self.slots.repeat(times, 1))

    def part(self, rows: slice) -> Tokens:
        """Some of the texts."""
        def cut(vectors: Tensor) -> Tensor:
            return vectors[rows] if vectors.dim() == 3 else vectors

        return Tokens(self.ids[rows], None if self.mask is None else self.mask[rows], self.slots[rows],
                      None if self.vectors is None else cut(self.vectors), tuple(map(cut, self.deep)))


class DualEncoder(PictureModel):
    """A model that embeds pictures and texts in one space: CLIP, SigLIP, AltCLIP, ChineseCLIP, MetaCLIP 2 and so on.

    What is computed is the model's own code; vectors of prompts are put in by hooks, which are gone after each call.

    Args:
        model: of transformers, with ``get_image_features``, ``get_text_features`` and ``logit_scale``; may be wrapped
            (PEFT). It is run as it is, so put it into evaluation mode.
        processor: its processor, or any object with the attributes ``tokenizer`` and ``image_processor``.

    Raises:
        UnsupportedModelError: the model is no dual encoder.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        inner: Any = unwrapped(model)
        wanted = ("get_image_features", "get_text_features", "text_model", "vision_model", "logit_scale")
        if not all(hasattr(inner, name) for name in wanted):
            raise UnsupportedModelError("DualEncoder: expected a model like CLIPModel or SiglipModel, which embeds "
                                        f"pictures and texts, got {type(inner).__name__}")
        missing = [name for name in ("tokenizer", "image_processor") if not hasattr(processor, name)]
        if missing:
            raise ValueError(f"DualEncoder: expected a processor with tokenizer and image_processor, got "
                             f"{type(processor).__name__} without {', '.join(missing)}")
        super().__init__(model, Preprocess(processor.image_processor, size=_image_size(inner)))
        self.tokenizer = processor.tokenizer
        self._text, self._vision = inner.text_model, inner.vision_model
        self._kind = str(inner.config.model_type)
        self._prefix, self._suffix = self._special()

    @classmethod
    def from_pretrained(cls, source: str, **options: Any) -> DualEncoder:
        """The model and processor of a folder or hub id, in evaluation mode; ``options`` go to the model."""
        from transformers import AutoModel, AutoProcessor

        return cls(AutoModel.from_pretrained(source, **options).eval(), AutoProcessor.from_pretrained(source))

    # ------------------------------------------------------------------------------------------------- features
    @costs(calls=lambda self, pixels, *_, **__: len(pixels))
    def images(self, pixels: Tensor, tokens: Sequence[Tensor] = (), *, normalize: bool = True) -> Tensor:
        """L2-normalised features (B, d), float32, of fractions (B, 3, H, W); see :meth:`PictureModel.read`.

        Args:
            pixels: between 0 and 1, before normalisation.
            tokens: vectors (n, width) or (B, n, width) that the vision tower reads beside the patches: the first
                joins them after the position embedding, the others take its places before layer 1, 2, ...
            normalize: False: features as the projection gives them.
        """
        model: Any = unwrapped(self.model)
        values = self.preprocess.normalize(pixels).to(self.dtype)
        with contextlib.ExitStack() as hooks:
            if len(tokens):
                self._join(tokens, len(pixels), hooks)
            found = model.get_image_features(pixel_values=values)
        return _features(found, normalize)

    @costs(calls=lambda self, texts, *_, **__: len(texts))
    def texts(self, texts: Sequence[str] | Tokens, *, normalize: bool = True) -> Tensor:
        """L2-normalised features (N, d), float32, of texts or of :class:`Tokens` with vectors in them.

        Args:
            texts: padded as the model was trained; CLIP's are as long as the longest of them.
            normalize: False: features as the projection gives them.
        """
        tokens = texts if isinstance(texts, Tokens) else self.tokens([[text] for text in texts])
        rows = range(0, len(tokens), 4 * self.batch_size)
        return torch.cat([self._encode(tokens.part(slice(at, at + 4 * self.batch_size)), normalize)
                          for at in rows])

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scaled cosines (B, C) of features (B, d) and (C, d), or (B, C, d) where each picture has texts of its own."""
        inner: Any = unwrapped(self.model)
        cosines = images @ texts.T if texts.dim() == 2 else torch.einsum("bd,bcd->bc", images, texts)
        scaled = cosines * inner.logit_scale.detach().float().exp()
        bias = getattr(inner, "logit_bias", None)
        return scaled if bias is None else scaled + bias.detach().float()

    @costs(calls=lambda self, examples, *_, **__: len(examples))
    def all_images(self, examples: Sequence[Any], tokens: Sequence[Tensor] = ()) -> Tensor:
        """:meth:`images` of the pictures of examples, a batch at a time."""
        return torch.cat([self.images(self.read(examples[at:at + self.batch_size]), tokens)
                          for at in range(0, len(examples), self.batch_size)])

    @costs(calls=lambda self, names, templates: len(names) * len(templates))
    def ensemble(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """(C, d): for each name the normalised mean of the features of all templates, which have one ``{}``."""
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"template: expected text with one {{}} where the name goes, got {template!r}")
        features = self.texts([t.format(spaced(n)) for t in templates for n in names])
        return F.normalize(features.view(len(templates), len(names), -1).mean(0), dim=-1)

    # ------------------------------------------------------------------------------------------------- texts
    @property
    def width(self) -> int:
        """Width of the text tower's token embeddings."""
        return int(self.embedding.embedding_dim)

    @property
    def vision_width(self) -> int:
        """Width of the vision tower's tokens."""
        return int(self._vision.config.hidden_size)

    @property
    def dim(self) -> int:
        """Width of the features."""
        inner: Any = unwrapped(self.model)
        projection = getattr(inner, "visual_projection", None)
        return int(projection.out_features) if projection is not None else self.vision_width

    @property
    def depth(self) -> tuple[int, int]:
        """Layers of the text tower and of the vision tower."""
        return len(_layers(self._text)), len(_layers(self._vision))

    @property
    def embedding(self) -> nn.Embedding:
        """The text tower's table of token embeddings."""
        tables = {n: m for n, m in self._text.named_modules() if isinstance(m, nn.Embedding)}
        for ending in EMBEDDINGS:
            for name, table in tables.items():
                if name.rpartition(".")[2] == ending:
                    return table
        raise UnsupportedModelError(f"{self.name}: expected a text tower with token embeddings called "
                                    f"{', '.join(EMBEDDINGS)}, got {', '.join(tables)}")

    @property
    def max_length(self) -> int:
        """The longest text in tokens, special ones included."""
        positions = int(self._text.config.max_position_embeddings)
        owner = next((m for m in self._text.modules() if self.embedding in m.children()), None)
        offset = getattr(owner, "padding_idx", None)  # such models count positions from there
        positions -= 0 if offset is None else int(offset) + 1
        return min(positions, int(getattr(self.tokenizer, "model_max_length", None) or positions))

    def count_tokens(self, text: str) -> int:
        """How many tokens ``text`` has, special ones left out."""
        return len(self._ids(text))

    def embed_tokens(self, text: str) -> Tensor:
        """The token embeddings (tokens, width) of ``text``, float32, detached; special tokens left out."""
        table = self.embedding
        ids = torch.tensor(self._ids(text), dtype=torch.long, device=table.weight.device)
        return table.weight.detach()[ids].float().clone()

    def tokens(self, texts: Sequence[Sequence[Piece]]) -> Tokens:
        """Texts in pieces, as :class:`Tokens` without vectors yet: ``[4, "cat."]`` is four vectors before ``cat.``

        Pieces are read one by one and begin at the boundary of a word. Padding is what the model was trained with.

        Raises:
            ValueError: a text is longer than :attr:`max_length`; it is named.
        """
        rows: list[tuple[list[int], list[int]]] = []
        own = self._placeholder
        for text in texts:
            ids, slots, number = list(self._prefix), [-1] * len(self._prefix), 0
            for piece in text:
                if isinstance(piece, str):
                    found = self._ids(piece)
                    ids, slots = ids + found, slots + [-1] * len(found)
                else:
                    ids, slots = ids + [own] * piece, slots + list(range(number, number + piece))
                    number += piece
            ids, slots = ids + self._suffix, slots + [-1] * len(self._suffix)
            if len(ids) > self.max_length:
                shown = " ".join(p if isinstance(p, str) else f"<{p} vectors>" for p in text)
                raise ValueError(f"text: expected at most {self.max_length} tokens, which {self.name} reads, got "
                                 f"{len(ids)} for {shown!r}: shorten the name or learn fewer vectors")
            rows.append((ids, slots))
        # SigLIP pools at the last place, padding or not; the others do not look at padding
        length = self.max_length if self._kind.startswith("siglip") else max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else self.tokenizer.eos_token_id or 0
        ids_, slots_ = (torch.tensor([row + [fill] * (length - len(row)) for row in column], device=self.device)
                        for column, fill in (([r[0] for r in rows], pad), ([r[1] for r in rows], -1)))
        masked = "attention_mask" in getattr(self.tokenizer, "model_input_names", ("attention_mask",))
        mask = torch.tensor([[1] * len(r[0]) + [0] * (length - len(r[0])) for r in rows], device=self.device)
        return Tokens(ids_, mask if masked else None, slots_)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _special(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        body, whole = self._ids("a"), list(self.tokenizer("a")["input_ids"])
        for at in range(len(whole) - len(body) + 1):
            if whole[at:at + len(body)] == body:
                return whole[:at], whole[at + len(body):]
        raise UnsupportedModelError(f"{self.name}: expected a tokenizer that puts special tokens around a text, got "
                                    f"{type(self.tokenizer).__name__}")

    @property
    def _placeholder(self) -> int:
        """A small token number: models whose configuration says 2 for the end of text pool at the largest."""
        special = {*self.tokenizer.all_special_ids, self._text.config.eos_token_id, self._text.config.pad_token_id}
        return next(n for n in range(len(self.tokenizer)) if n not in special)

    def _encode(self, tokens: Tokens, normalize: bool) -> Tensor:
        model: Any = unwrapped(self.model)
        mask = {} if tokens.mask is None else {"attention_mask": tokens.mask}
        with contextlib.ExitStack() as hooks:
            if tokens.vectors is not None:
                hooks.enter_context(_replaced(self.embedding, tokens.slots, tokens.vectors))
            layers = _layers(self._text) if tokens.deep else []
            if len(tokens.deep) >= len(layers) > 0:
                raise ValueError(f"deep: expected vectors for at most {len(layers) - 1} layers of the text tower, got "
                                 f"{len(tokens.deep)}")
            for layer, vectors in zip(layers[1:], tokens.deep):
                hooks.enter_context(_before(layer, _writer(tokens.slots, vectors)))
            return _features(model.get_text_features(input_ids=tokens.ids, **mask), normalize)

    # ------------------------------------------------------------------------------------------------- vision
    def _join(self, tokens: Sequence[Tensor], rows: int, hooks: contextlib.ExitStack) -> None:
        """Put vectors beside the patches while ``hooks`` last."""
        embeddings, layers = getattr(self._vision, "embeddings", None), _layers(self._vision)
        if embeddings is None or not layers:
            raise UnsupportedModelError(f"{self.name}: expected a vision tower that is a transformer, got "
                                        f"{type(self._vision).__name__}")
        count = tokens[0].shape[-2]
        if any(t.shape[-2:] != (count, self.vision_width) for t in tokens) or len(tokens) > len(layers):
            raise ValueError(f"tokens: expected at most {len(layers)} tensors of the shape ({count}, "
                             f"{self.vision_width}), got {[tuple(t.shape) for t in tokens]}")

        def spread(vectors: Tensor, like: Tensor) -> Tensor:
            return vectors.to(like).expand(rows, -1, -1)

        def append(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
            return torch.cat([output, spread(tokens[0], output)], dim=1)

        handle = embeddings.register_forward_hook(append)
        hooks.callback(handle.remove)
        for layer, vectors in zip(layers[1:], tokens[1:]):
            hooks.enter_context(_before(layer, lambda x, v=vectors: torch.cat(  # type: ignore[misc]
                [x[:, :-count], spread(v, x)], dim=1)))


def spaced(name: Any) -> str:
    """The name of a class as text: underscores become spaces."""
    return str(name).replace("_", " ")


def _features(found: Any, normalize: bool) -> Tensor:
    features = (found if isinstance(found, Tensor) else found.pooler_output).float()
    return F.normalize(features, dim=-1) if normalize else features


def _image_size(model: Any) -> int | tuple[int, int] | None:
    size = getattr(model.vision_model.config, "image_size", None)
    return tuple(size) if isinstance(size, (list, tuple)) else size


def _layers(tower: nn.Module) -> list[nn.Module]:
    """The layers of a transformer, in order."""
    count = getattr(getattr(tower, "config", None), "num_hidden_layers", None)
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    return []


def _writer(slots: Tensor, vectors: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that puts vectors into hidden states (N, L, width) where their slots are."""
    def write(x: Tensor) -> Tensor:
        at = slots.clamp(min=0)
        rows = vectors[at] if vectors.dim() == 2 else \
            vectors.gather(1, at[..., None].expand(*at.shape, vectors.shape[-1]))
        return torch.where((slots >= 0)[..., None], rows.to(x), x)

    count, needed = vectors.shape[-2], int(slots.max()) + 1
    if count != needed:
        raise ValueError(f"vectors: expected {needed}, as many as the texts have slots, got {count}")
    return write


@contextlib.contextmanager
def _replaced(module: nn.Module, slots: Tensor, vectors: Tensor) -> Iterator[None]:
    """``module`` gives ``vectors`` at the slots for as long as the block lasts."""
    write = _writer(slots, vectors)
    handle = module.register_forward_hook(lambda _, __, output: write(output))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _before(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """``change`` is made to the hidden states that ``layer`` gets, for as long as the block lasts."""
    def hook(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if arguments:
            return (change(arguments[0]), *arguments[1:]), options
        return arguments, {**options, "hidden_states": change(options["hidden_states"])}

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


__all__ = ["DualEncoder", "Piece", "Tokens", "spaced"]
