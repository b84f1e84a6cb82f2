"""A decoder of transformers while it is trained with LeMo: what its layers do in the place of their own forward."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from looseleaf import Report
from looseleaf.errors import UnsupportedModelError
from looseleaf.unwrap import unwrapped
from looseleaf_lemo.elimination import Rows, choose, cut_mask, padding_only, put_back, rows_of, take
from looseleaf_lemo.saving import chunked_loss, cut_mlp, mlp_parts, recomputed
from looseleaf_text.layers import decoder_layers

if TYPE_CHECKING:
    from looseleaf_lemo.pruner import LeMo

Rank = Callable[[int, Tensor, Rows], Tensor]
"""``rank(layer, x, rows)``: scores (B, n) of the blocks of a layer's input (B, L, H)."""
TAKEN = {"hidden_states", "position_embeddings", "attention_mask"}
"""What an attention that can be cut takes."""
SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
"""What configurations call a factor of the logits, which a loss in chunks would have to know."""


@dataclasses.dataclass
class Layer:
    """The parts of a decoder layer.

    Attributes:
        name: of the attention module.
        attention, mlp: modules; there is no MLP where none could be told.
        norms: direct children of the layer.
        signature: of the attention's forward.
        rows: of the last forward, for the MLP behind the attention.
    """

    name: str
    attention: Any
    mlp: nn.Module | None
    norms: list[nn.Module]
    signature: inspect.Signature
    rows: Rows | None = None


def parts_of(model: nn.Module) -> list[Layer]:
    """The layers of a decoder, first to last.

    Raises:
        UnsupportedModelError: a layer without an attention that takes hidden_states and position_embeddings.
    """
    out = []
    for name, layer in decoder_layers(model).items():
        children = {child: unwrapped(module) for child, module in layer.named_children()}
        child = next((n for n, m in children.items() if TAKEN.issubset(_parameters(m))), "")
        if not child:
            raise UnsupportedModelError(
                f"{name} ({type(layer).__name__}): expected an attention that takes hidden_states, position_embeddings "
                f"and attention_mask, got {', '.join(children)}: LeMo works on decoders with rotary embeddings such as "
                "Llama, Qwen and Gemma")
        mlp = next((m for other, m in children.items() if other in ("mlp", "feed_forward", "ffn")), None)
        norms = [m for m in children.values() if "norm" in type(m).__name__.lower()]
        signature = inspect.signature(type(children[child]).forward)
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])  # without self
        out.append(Layer(f"{name}.{child}", children[child], mlp, norms, signature))
    return out


def _parameters(module: nn.Module) -> set[str]:
    return set(inspect.signature(type(module).forward).parameters)


def decoder(model: nn.Module) -> nn.Module:
    """The decoder below the output embeddings; adapters of PEFT are inside."""
    inner = unwrapped(model)
    return getattr(inner, "base_model", inner)  # type: ignore[no-any-return]


class Training:
    """What happens in a ``with lemo.training(model)`` block.

    Attributes:
        kept: attention module -> (B, L) bool, the tokens that it kept in its last forward.
        fallbacks: why forwards of layers were dense -> how many, recomputations included.
        loss: who computes the loss, in words.
        always: cut in evaluation mode as well.
    """

    def __init__(self, lemo: LeMo, layers: Sequence[Layer], cut: Mapping[int, float], rank: Rank) -> None:
        self.lemo, self.layers, self.cut, self.rank = lemo, layers, cut, rank
        self.always = False
        self.kept: dict[str, Tensor] = {}
        self.fallbacks: Counter[str] = Counter()
        self.loss = "the model's own"
        self.counts = {n: [0, 0, 0] for n in cut}  # kept blocks, blocks, forwards
        self._read: tuple[Any, Rows, bool] | None = None

    # ------------------------------------------------------------------ attention
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def attend(self, n: int, former: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of a layer's attention."""
        layer = self.layers[n]
        layer.rows = None
        if not (layer.attention.training or self.always):
            return former(*args, **kwargs)
        bound = layer.signature.bind(*args, **kwargs)
        given = bound.arguments
        more = given.get(next((p.name for p in layer.signature.parameters.values() if p.kind is p.VAR_KEYWORD), ""), {})
        x, mask = given["hidden_states"], given.get("attention_mask")
        rows, plain = self._rows(x, mask)
        layer.rows = rows
        if n not in self.cut:
            return former(*args, **kwargs)
        reason = self._obstacle(layer, x, given, more)
        if reason:
            self.fallbacks[reason] += 1
            return former(*args, **kwargs)
        blocks = self._blocks(n, x.detach(), rows)
        if blocks.shape[1] == 0 or (blocks.shape[1] == rows.blocks and bool((blocks >= 0).all())):
            return former(*args, **kwargs)  # nothing but padding, or nothing to leave out
        cos, sin = given["position_embeddings"]
        given["hidden_states"] = take(x, rows, blocks)
        given["position_embeddings"] = tuple(take(t.expand(len(x), -1, -1), rows, blocks) for t in (cos, sin))
        implementation = getattr(layer.attention.config, "_attn_implementation", None)
        given["attention_mask"] = None if plain and implementation == "sdpa" else cut_mask(mask, rows, blocks)
        for places in (given, more):
            if "position_ids" in places:  # those of a whole text would be taken for those of packed ones
                places["position_ids"] = None
        out, *others = former(*bound.args, **bound.kwargs)
        return put_back(out, rows, blocks), *others

    def _rows(self, x: Tensor, mask: Any) -> tuple[Rows, bool]:
        """Where items lie, and whether their mask says no more; read once for all layers with the same mask."""
        block = self.lemo.block
        if not isinstance(mask, Tensor) or mask.shape[-1] != x.shape[1]:
            return Rows(x.shape[1], block), False
        if self._read is None or self._read[0]() is not mask or self._read[1].length != x.shape[1]:
            rows = rows_of(x, mask, block)
            self._read = weakref.ref(mask), rows, padding_only(mask, rows.valid)
        return self._read[1], self._read[2]

    def _obstacle(self, layer: Layer, x: Tensor, given: Mapping[str, Any], more: Mapping[str, Any]) -> str:
        """Why this forward cannot be cut; empty where it can."""
        mask, length = given.get("attention_mask"), x.shape[1]
        window = getattr(layer.attention, "sliding_window", None)
        whole = isinstance(mask, Tensor) and mask.ndim == 4
        positions = given.get("position_ids", more.get("position_ids"))
        if given.get("past_key_values") is not None or more.get("past_key_values") is not None:
            return "a cache"
        if length < 2 * self.lemo.block:
            return "less than two blocks"
        if given.get("position_embeddings") is None:
            return "no position embeddings"
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape[-1] != length):
            return "a mask of another form"
        if not whole and window is not None and window < length:
            return "a sliding window without a mask"
        if not whole and ("cu_seq_lens_q" in more or (isinstance(positions, Tensor) and bool(
                (positions.diff(dim=-1) != 1).any()) and mask is None)):
            return "packed texts without a mask"
        return ""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _blocks(self, n: int, x: Tensor, rows: Rows) -> Tensor:
        """The blocks that a layer keeps."""
        real, found = rows.real(x), self.lemo.calibration
        threshold = found.thresholds.get(n) if found is not None and self.lemo.selection == "threshold" else None
        blocks = choose(self.rank(n, x, rows), real, self.cut[n], threshold, rows.short())
        self.kept[self.layers[n].name] = rows.mask_of(blocks)
        for at, count in enumerate((int((blocks >= 0).sum()), int(real.sum()), 1)):
            self.counts[n][at] += count
        return blocks

    # ------------------------------------------------------------------ the rest of a layer, and the loss
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def multiply(self, n: int, parts: Any, former: Callable[..., Tensor], x: Tensor) -> Tensor:
        """The forward of a layer's MLP."""
        mlp, rows = self.layers[n].mlp, self.layers[n].rows
        assert mlp is not None
        if not (mlp.training and torch.is_grad_enabled() and x.requires_grad and x.ndim == 3):
            return former(x)
        valid = rows.valid if rows is not None and rows.valid is not None and rows.valid.shape == x.shape[:2] else None
        return cut_mlp(x, parts, self.lemo.mlp_sparsity, valid)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def normalize(self, norm: nn.Module, former: Callable[..., Tensor], x: Tensor) -> Tensor:
        """The forward of a norm."""
        if not (norm.training and torch.is_grad_enabled() and x.requires_grad):
            return former(x)
        return recomputed(former, x, *(p for p in norm.parameters() if p.requires_grad))

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def lose(self, model: Any, former: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of a language model, the loss in chunks."""
        labels = kwargs.get("labels")
        odd = any(kwargs.get(name) is not None for name in ("logits_to_keep", "shift_labels", "output_router_logits"))
        if labels is None or not model.training or odd or kwargs.get("return_dict") is False:
            return former(*args, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        rest = {name: value for name, value in kwargs.items() if name not in ("labels", "num_items_in_batch")}
        found = model.base_model(*args, **rest)
        text = model.config.get_text_config()
        loss = chunked_loss(found.last_hidden_state, model.get_output_embeddings(), labels, self.lemo.loss_chunk,
                            softcap=getattr(text, "final_logit_softcapping", None),
                            items=kwargs.get("num_items_in_batch"))
        return CausalLMOutputWithPast(loss=loss, past_key_values=found.get("past_key_values"),
                                      hidden_states=found.get("hidden_states"), attentions=found.get("attentions"))

    def loss_obstacle(self, model: Any) -> str:
        """Why the loss is left as it is; empty where it need not be."""
        text = model.config.get_text_config() if hasattr(model, "config") else None
        if not self.lemo.loss_chunk:
            return "the model's own: loss_chunk is 0"
        if "forward" in vars(model) or not type(model).forward.__module__.startswith("transformers."):
            return "left to what took the place of the model's forward, such as TRL or Liger"
        if getattr(getattr(model, "loss_function", None), "__name__", "") != "ForCausalLMLoss" or not hasattr(
                model, "base_model") or model.get_output_embeddings() is None:
            return "the model's own: it is not that of a language model of transformers"
        scaled = [name for name in SCALES if getattr(text, name, None) not in (None, 1, 1.0)]
        return f"the model's own: its logits have a {scaled[0]}" if scaled else ""

    def report(self) -> Report:
        """How much was kept, layer by layer, what was dense, and the masks of the last forward as a picture."""
        lemo = self.lemo
        report = Report("LeMo: a training", facts={
            "block": lemo.block, "columns of MLPs left out of the backward": lemo.mlp_sparsity, "loss": self.loss,
            "layers that are cut": len(self.cut), "layers": len(self.layers)})
        table = report.table("Kept by layer", ["layer", "blocks kept", "of", "fraction", "forwards"],
                             note="recomputations of checkpointing included; other layers keep all")
        for n, (kept, blocks, forwards) in self.counts.items():
            table.add(n, kept, blocks, kept / blocks if blocks else None, forwards)
        if self.fallbacks:
            report.table("Dense all the same", ["reason", "forwards of layers"], self.fallbacks.items())
        if self.kept:
            rows = [mask[0][::lemo.block].float().tolist() for mask in self.kept.values()]
            report.figure("Blocks kept in the last forward, first text", x_label="block", y_label="cut layer",
                          image=rows)
        return report


@contextmanager
def attached(lemo: LeMo, model: nn.Module, layers: Sequence[Layer], cut: Mapping[int, float],
             rank: Rank) -> Iterator[Training]:
    """The model with forwards of LeMo in the place of its own, until the block ends."""
    run = Training(lemo, layers, cut, rank)
    inner: Any = unwrapped(model)
    with ExitStack() as undo:
        for n, layer in enumerate(layers):
            if lemo.mlp_sparsity:
                if layer.mlp is None:
                    raise UnsupportedModelError(f"{type(inner).__name__}: expected layers with an MLP, got none in "
                                                f"layer {n}: set mlp_sparsity=0")
                undo.enter_context(_forward(layer.mlp, functools.partial(run.multiply, n, mlp_parts(layer.mlp))))
            if n in cut or lemo.mlp_sparsity:
                undo.enter_context(_forward(layer.attention, functools.partial(run.attend, n)))
            for norm in layer.norms if lemo.recompute_norms else ():
                undo.enter_context(_forward(norm, functools.partial(run.normalize, norm)))
        obstacle = run.loss_obstacle(inner)
        if not obstacle:
            undo.enter_context(_forward(inner, functools.partial(run.lose, inner)))
        run.loss = obstacle or f"in chunks of {lemo.loss_chunk} tokens"
        config = getattr(inner, "config", None)
        text = config.get_text_config() if config is not None else None
        if text is not None and getattr(text, "use_cache", None):  # a training that asks for none should not get one
            undo.callback(setattr, text, "use_cache", text.use_cache)
            text.use_cache = False
        yield run


@contextmanager
def _forward(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """``function(former forward, ...)`` in the place of a module's forward."""
    own = vars(module).get("forward")
    if getattr(own, "of_lemo", False):
        raise ValueError(f"{type(module).__name__}: expected a model without LeMo, got one within a training block: "
                         "leave that first")
    former = module.forward
    module.forward = functools.wraps(former)(functools.partial(function, former))
    module.forward.of_lemo = True
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


__all__ = ["Layer", "Rank", "Training", "attached", "decoder", "parts_of"]
