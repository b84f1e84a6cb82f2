"""Effective KQ and OV of the attention layers of a transformers decoder, measured by running them on unit vectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from looseleaf import AttentionBackend, AttentionCall, Paper, UnsupportedModelError, attach
from looseleaf import progress as progress_
from looseleaf.modes import evaluating
from looseleaf.probes.hooks import first_tensor, uncompiled

ROWS = 512
"""Unit vectors that are run together."""


@dataclasses.dataclass
class EffectiveHeads:
    """The linear maps of one attention layer, between what its module reads and what it writes, float32.

    For one token z_q that looks at tokens z: output = sum_h OV_h z softmax(z^T KQ_h z_q), the scale of the scores
    included in KQ. What it reads is the residual stream after its normalisation. Rotary positions are taken at distance
    zero (the content part). Constant parts (biases) and the scale of normalised queries and keys, which depends on the
    token, are left out.

    Attributes:
        name: of the module.
        key, query: (H, r, D), KQ_h = key_h^T query_h. Heads that share a key (grouped queries) have it repeated.
        value: (H, s, D). output: (H, D, s), OV_h = output_h value_h.
    """

    name: str
    key: Tensor
    query: Tensor
    value: Tensor
    output: Tensor

    def kq(self, head: int | None = None) -> Tensor:
        """KQ of one head (D, D), or of all (H, D, D)."""
        if head is not None:
            return self.key[head].T @ self.query[head]
        return self.key.transpose(1, 2) @ self.query

    def ov(self, head: int | None = None) -> Tensor:
        """OV of one head (D, D), or of all (H, D, D)."""
        return self.output @ self.value if head is None else self.output[head] @ self.value[head]


def probe_attention(model: Any, layer: int | str = 0) -> EffectiveHeads:
    """Effective KQ and OV of one layer.

    Args:
        model: a transformers decoder; it is run, not changed.
        layer: index, name or name pattern of the attention module.

    Raises:
        UnsupportedModelError: no such attention, or one that is not linear in what it reads.
        ValueError: an unknown layer.
    """
    return next(iter(probe_layers(model, [layer])))


def probe_layers(model: Any, layers: Sequence[int | str] | None = None, *,
                 progress: bool | None = None) -> list[EffectiveHeads]:
    """:func:`probe_attention` for several layers at the cost of one: all are measured in the same runs.

    Args:
        model: a transformers decoder.
        layers: indices, names or name patterns; None: all that do plain attention.
        progress: show a progress bar; None: only on a terminal.
    """
    body = getattr(model, "base_model", None)
    if not isinstance(body, nn.Module) or not hasattr(model, "get_input_embeddings"):
        raise UnsupportedModelError("expected a decoder of transformers, such as AutoModelForCausalLM gives, got "
                                    f"{type(model).__name__}. For matrices of your own, call head_signature")
    reader = _Reader()
    width = int(model.config.get_text_config().hidden_size)
    check = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    units = torch.cat([torch.zeros(1, width), torch.eye(width), check])
    with evaluating(model), uncompiled(model), torch.no_grad(), attach(model, reader, layers) as attached, \
            progress_.bar("attention layers", 2, progress) as progress_bar:
        modules = {i: model.get_submodule(attached.layers[i]) for i in sorted(attached.chosen)}
        read = _run(model, body, reader, modules, units, None)
        progress_bar.update()
        silent = [attached.layers[i] for i in modules if i not in read]
        if silent and (layers is not None or len(silent) == len(modules)):
            reasons = {str(record["fallback"]) for record in attached.records if "fallback" in record}
            raise UnsupportedModelError(
                f"{silent[0]} does no plain attention ({', '.join(sorted(reasons)) or 'it is not called'}): name other "
                "layers, or call head_signature on matrices of your own")
        sizes = {i: (query.shape[1], value.shape[2]) for i, (query, _, value, _) in read.items()}
        inner = max(heads * size for heads, size in sizes.values())
        wrote = _run(model, body, reader, {i: modules[i] for i in read}, torch.zeros(1, width),
                     torch.cat([torch.zeros(1, inner), torch.eye(inner)]))
        progress_bar.update()
    return [_effective(attached.layers[i], read[i], wrote[i][3], sizes[i]) for i in read]


@dataclasses.dataclass
class _Reader(AttentionBackend):
    """Keeps the queries, keys and values of every layer, and gives :attr:`outputs` where that is not None."""

    paper: ClassVar[Paper] = Paper("In-Context Linear Regression Demystified", ("Jianliang He",), 2025, "2503.12734",
                                   summary="Reads the maps of attention layers.")

    phases: ClassVar[frozenset[Any]] = frozenset({"prefill", "decode", "bidirectional"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.outputs: Tensor | None = None
        self.inputs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """The numbers of :attr:`outputs`, a row for each batch item, cut to the layer's size; else exact attention."""
        if call.phase == "bidirectional":
            raise UnsupportedModelError("expected a decoder (causal attention), got bidirectional attention")
        query, key, value = (x[:, :, 0] for x in (call.query * call.scale, call.key, call.value))
        self.inputs[call.layer] = query, key, value
        batch, heads, size = len(query), query.shape[1], value.shape[-1]
        if self.outputs is None:
            return value.repeat_interleave(heads // value.shape[1], 1)[:, :, None]  # a token alone sees itself
        return self.outputs[:, :heads * size].view(batch, heads, 1, size).to(call.value)


Seen = tuple[Tensor, Tensor, Tensor, Tensor]


def _run(model: nn.Module, body: nn.Module, reader: _Reader, modules: dict[int, nn.Module], states: Tensor,
         attended: Tensor | None) -> dict[int, Seen]:
    """Run the body with ``states`` (n, D) in place of what each attention module reads, one token a sequence.

    ``attended`` (n, H s), where given, takes the place of the attention's outputs.

    A sequence of one token has position 0, where rotary positions are the identity.

    Returns:
        Layer -> queries (n, H, r), keys, values and the module's output (n, D), float32; without layers whose attention
        did not come to the reader.
    """
    batches: dict[int, list[Seen]] = {i: [] for i in modules}
    rows = len(states) if attended is None else len(attended)
    device = next(model.parameters()).device
    for start in range(0, rows, ROWS):
        part = slice(start, min(start + ROWS, rows))
        count = part.stop - part.start
        now = (states[part] if attended is None else states.expand(count, -1)).to(device)
        reader.outputs = None if attended is None else attended[part].to(device)
        reader.inputs.clear()
        written: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for i, module in modules.items():
                _hold(hooks, module.register_forward_pre_hook(_reading(now), with_kwargs=True))
                _hold(hooks, module.register_forward_hook(_writing(written, i)))
                for norm in module.modules():
                    if "RMSNorm" in type(norm).__name__:
                        _hold(hooks, norm.register_forward_hook(_gain_only))
            # a mask of four dimensions is taken as it is, whatever windows the layers have
            mask = torch.zeros(count, 1, 1, 1, device=device, dtype=next(model.parameters()).dtype)
            ids = torch.zeros(count, 1, dtype=torch.long, device=device)
            body(input_ids=ids, attention_mask=mask, use_cache=False)
        for i in reader.inputs:
            batches[i].append(tuple(x.float().cpu() for x in (*reader.inputs[i], written[i])))  # type: ignore[arg-type]
    return {i: tuple(torch.cat(x) for x in zip(*parts, strict=True)) for i, parts in batches.items() if parts}  # type: ignore[misc]


def _hold(stack: ExitStack, handle: Any) -> None:
    stack.callback(handle.remove)


def _reading(states: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": states[:, None].to(kwargs["hidden_states"])}
        return (states[:, None].to(args[0]), *args[1:]), kwargs

    return hook


def _writing(written: dict[int, Tensor], layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        written[layer] = first_tensor(output)[:, 0].clone()

    return hook


def _gain_only(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A normalisation of queries or keys without its division, which depends on the token: the gain stays."""
    return args[0] * module.forward(torch.ones_like(args[0][..., :1, :]))


def _effective(name: str, read: Seen, written: Tensor, size: tuple[int, int]) -> EffectiveHeads:
    heads, inner = size
    maps = []
    for what, seen in zip(("query", "key", "value"), read[:3], strict=True):
        linear = (seen[1:-1] - seen[0]).permute(1, 2, 0)  # (heads, r, D)
        check = torch.randn(1, linear.shape[2], generator=torch.Generator().manual_seed(0))[0]
        gap = float((linear @ check - (seen[-1] - seen[0])).norm() / (seen[-1] - seen[0]).norm().clamp(min=1e-12))
        if gap > 0.05:
            raise UnsupportedModelError(f"the {what} of {name} is not linear in what the layer reads (off by "
                                        f"{gap:.0%}): it has no effective KQ and OV")
        maps.append(linear.repeat_interleave(heads // len(linear), 0))
    columns = written[1:heads * inner + 1] - written[0]  # (heads * s, D)
    if columns.shape[0] == columns.shape[1] and torch.equal(columns, torch.eye(len(columns))):
        raise UnsupportedModelError(f"{name} has its output projection elsewhere, as in BERT: OV cannot be read")
    output = columns.view(heads, inner, -1).transpose(1, 2)
    query, key, value = maps
    return EffectiveHeads(name, key.contiguous(), query.contiguous(), value.contiguous(), output.contiguous())


__all__ = ["EffectiveHeads", "probe_attention", "probe_layers"]
