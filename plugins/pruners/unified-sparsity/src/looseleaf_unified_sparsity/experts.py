"""Dense MLPs as experts: half of the neurons for each token, chosen by a router, instead of the same half for all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf import UnsupportedModelError
from looseleaf.files import load_tensors, save_tensors
from looseleaf_unified_sparsity.components import Components, Mlp, at, linear, weight_names
from looseleaf_unified_sparsity.shrinking import replace_module

FORMAT = "looseleaf.unified-sparsity.experts/1"
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


def deal(importance: Tensor, experts: int, shared: float = 0.0) -> tuple[Tensor, Tensor]:
    """Which neurons the shared expert and each expert get: (s,) and (experts, n) indices, the most important first.

    The first ``int(shared * I)`` of I neurons are shared; the others are dealt in snake order, row by row and every
    other row from right to left, so that all experts have as much importance [official code].

    Args:
        importance: (I,), of each neuron; among equals the first comes first.
        experts: how many.
        shared: fraction of the neurons that every token uses, in [0, 1).

    Raises:
        ValueError: the neurons that are left do not divide by ``experts``.
    """
    order = importance.argsort(descending=True, stable=True)
    count = int(shared * len(order))
    rest = order[count:]
    if experts < 1 or not len(rest) or len(rest) % experts:
        raise ValueError(f"experts: expected a number that divides the {len(rest)} neurons which are not shared (of "
                         f"{len(order)}), got {experts}")
    rows = rest.view(-1, experts).clone()
    rows[1::2] = rows[1::2].flip(1)
    return order[:count], rows.T.contiguous()


class Experts(nn.Module):
    """An MLP whose neurons are dealt to experts, of which each token uses ``top_k``.

    ``out = sum_k f_e(x) (1 + w_e) + f_shared(x) (1 + w_s) + bias``, with raw logits w of routers that start at zero and
    no softmax, so that with all experts it is the dense MLP at first. Among equal logits the first expert is chosen
    [ours], so that before learning all tokens use the same experts.

    Attributes:
        routers: name -> Linear(H, experts) without bias. One, ``"all"``, or two, ``"text"`` and ``"picture"``.
        pictures: with two routers, which tokens are of pictures: True or False for all, or a boolean tensor with an
            entry for each token; see :func:`routing`.
        mlp: the neurons, in the order of the experts and behind them the shared ones; see ``order``.
    """

    order: Tensor

    def __init__(self, inner: Sequence[nn.Linear], down: nn.Linear, act: Callable[[Tensor], Tensor],
                 shared_neurons: Tensor, dealt: Tensor, top_k: int, routers: Iterable[str] = ("all",)) -> None:
        super().__init__()
        experts, self.size = dealt.shape
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k: expected an integer from 1 to experts={experts}, got {top_k}")
        self.top_k, self.act = top_k, act
        order = torch.cat([dealt.reshape(-1), shared_neurons]).to(down.weight.device)
        self.register_buffer("order", order)
        self.inner = nn.ModuleList(_taken(layer, 0, order) for layer in inner)
        self.down = _taken(down, 1, order)
        options: dict[str, Any] = {"device": down.weight.device, "dtype": down.weight.dtype}
        width = inner[0].in_features
        self.routers = nn.ModuleDict({name: nn.Linear(width, experts, bias=False, **options) for name in routers})
        self.shared_gate = nn.Linear(width, 1, bias=False, **options) if len(shared_neurons) else None
        for layer in (*self.routers.values(), *([self.shared_gate] if self.shared_gate is not None else ())):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
        self.pictures: bool | Tensor = False

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return int(next(iter(self.routers.values())).out_features)  # type: ignore[arg-type]

    @property
    def idle_parameters(self) -> int:
        """Weights of experts that a token does not use."""
        rows = sum(p.numel() // len(self.order) for layer in self.inner for p in layer.parameters())
        return (rows + self.down.out_features) * self.size * (self.experts - self.top_k)

    def logits(self, x: Tensor) -> Tensor:
        """Raw logits (n, experts) of the tokens (n, H)."""
        if len(self.routers) == 1:
            return next(iter(self.routers.values()))(x)  # type: ignore[no-any-return]
        pictures = self.pictures
        if isinstance(pictures, bool):
            return self.routers["picture" if pictures else "text"](x)  # type: ignore[no-any-return]
        if pictures.numel() != len(x):
            raise ValueError(f"routing: expected an entry for each of {len(x)} tokens, got {pictures.numel()}")
        which = pictures.reshape(-1, 1).to(x.device)
        return torch.where(which, self.routers["picture"](x), self.routers["text"](x))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.logits(x)
        # a stable sort: topk does not say which of equal logits it takes
        chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, :self.top_k]
        out = torch.zeros_like(x)
        for expert in range(self.experts):
            tokens = (chosen == expert).any(-1).nonzero()[:, 0]
            if len(tokens):
                some = x[tokens]
                out = out.index_add(0, tokens, self._part(some, expert * self.size, self.size)
                                    * (1 + logits[tokens, expert, None]))
        if self.shared_gate is not None:
            first = self.experts * self.size
            out = out + self._part(x, first, len(self.order) - first) * (1 + self.shared_gate(x))
        if self.down.bias is not None:
            out = out + self.down.bias
        return out.view(hidden_states.shape)

    def _part(self, x: Tensor, first: int, count: int) -> Tensor:
        """What some of the neurons give."""
        rows = [F.linear(x, layer.weight[first:first + count],  # type: ignore[index]
                         None if layer.bias is None else layer.bias[first:first + count])  # type: ignore[index]
                for layer in self.inner]
        a = self.act(rows[0])
        return F.linear(a * rows[1] if len(rows) == 2 else a, self.down.weight[:, first:first + count])


def to_experts(model: Any, scores: Mapping[str, Tensor], experts: int = 32, top_k: int = 16, shared: float = 0.0, *,
               component: str = "generation", keep_ends: bool = True, layers: str | None = None) -> list[str]:
    """Turn the dense MLPs of a component into :class:`Experts`, in place, and return their paths.

    The MLPs of understanding get a router for text and one for pictures; see :func:`routing`.

    Args:
        model: a torch module; for a pipeline its part.
        scores: of :meth:`UnifiedSparsity.score` with ``what="width"`` and the same component.
        experts: how many experts; 32 of which 16, or 16 of which 8, in the paper.
        top_k: how many of them a token uses.
        shared: fraction of the neurons that every token uses, in [0, 1).
        component: whose MLPs; where both share a decoder, both use them.
        keep_ends: leave the first and the last layer dense, as the paper does.
        layers: see :meth:`Components.of`.

    Raises:
        ValueError: experts do not divide the neurons, ``top_k`` is above ``experts``, no scores of an MLP, or no MLP is
            left to convert; nothing is changed then.
        UnsupportedModelError: an MLP that is not built of two or three Linear layers and an activation.
    """
    if not 0 <= shared < 1:
        raise ValueError(f"shared: expected a number in [0, 1), got {shared!r}")
    components = Components.of(model, layers)
    if components.kind == "pipeline":
        raise ValueError("to_experts: expected the part of the pipeline that the scores are for, such as "
                         "pipeline.transformer, got the pipeline")
    parts = components[component][1:-1] if keep_ends else components[component]
    mlps = [mlp for part in parts for mlp in part.mlps]
    if not mlps:
        raise ValueError("to_experts: expected MLPs between the first and the last layer, got none: keep_ends=False "
                         "converts those as well")
    known, made = weight_names(model), {}
    for mlp in mlps:
        down = linear(model, mlp.down)
        name = known[id(down.weight)]
        if name not in scores:
            raise ValueError(f"scores: expected those of {name!r}, got none: UnifiedSparsity(what='width', "
                             f"component={component!r}).score(model, data) gives them")
        if scores[name].shape != down.weight.shape:
            raise ValueError(f"scores: expected the shape {tuple(down.weight.shape)} for {name!r}, got "
                             f"{tuple(scores[name].shape)}")
        # the sum over a column is the neuron's score, but for a factor that all have
        ours, dealt = deal(scores[name].sum(0, dtype=torch.float64), experts, shared)
        made[mlp.path] = _converted(model, mlp, ours, dealt, top_k,
                                    ("text", "picture") if component == "understanding" else ("all",))
    for path, module in made.items():
        replace_module(model, path, module)
    return list(made)


def _converted(model: nn.Module, mlp: Mlp, shared: Tensor, dealt: Tensor, top_k: int,
               routers: tuple[str, ...]) -> Experts:
    owner: Any = at(model, mlp.path)
    act = next((getattr(owner, name) for name in _ACTIVATIONS if callable(getattr(owner, name, None))), None)
    if act is None or mlp.packed or not mlp.inner:
        raise UnsupportedModelError(f"{mlp.path}: expected an MLP with act_fn and gate_proj, up_proj, down_proj or "
                                    f"fc1, fc2, got {type(owner).__name__}: it cannot be split")
    return Experts([linear(model, path) for path in mlp.inner], linear(model, mlp.down), act, shared, dealt, top_k,
                   routers)


def _taken(layer: nn.Linear, dim: int, order: Tensor) -> nn.Linear:
    """A Linear layer whose rows (dim 0) or columns are in another order."""
    taken = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    weight = layer.weight.detach().index_select(dim, order).clone()
    taken.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        bias = layer.bias.detach().clone() if dim else layer.bias.detach().index_select(0, order).clone()
        taken.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
    return taken


def experts_of(model: nn.Module) -> dict[str, Experts]:
    """All :class:`Experts` of a model, by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def freeze_experts(model: nn.Module) -> list[nn.Parameter]:
    """Freeze everything but the routers (and gates of shared experts), which are given for an optimiser: the paper's
    first way to tune. Switch ``requires_grad`` of the rest back on for the second.

    Raises:
        ValueError: the model has no experts.
    """
    found = experts_of(model)
    if not found:
        raise ValueError("freeze_experts: expected a model with experts, got none: call to_experts first")
    model.requires_grad_(False)
    routers = [p for module in found.values() for layer in (*module.routers.values(), module.shared_gate)
               if layer is not None for p in layer.parameters()]
    for parameter in routers:
        parameter.requires_grad_(True)
    return routers


@contextlib.contextmanager
def routing(model: nn.Module, pictures: bool | Tensor) -> Iterator[None]:
    """Which tokens are of pictures, for the MLPs of understanding, in the length of a ``with`` block.

    Args:
        model: with experts.
        pictures: True or False for all tokens, or a boolean tensor with an entry for each, such as (B, N).
    """
    found = list(experts_of(model).values())
    former = [module.pictures for module in found]
    try:
        for module in found:
            module.pictures = pictures
        yield
    finally:
        for module, value in zip(found, former, strict=True):
            module.pictures = value


def save_experts(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the experts of a model to one safetensors file; the other weights are the model's own matter.

    Raises:
        ValueError: the model has no experts.
    """
    found = experts_of(model)
    if not found:
        raise ValueError("save_experts: expected a model with experts, got none: call to_experts first")
    tensors = {f"{name}|{key}": tensor for name, each in found.items() for key, tensor in each.state_dict().items()}
    info = {name: {"size": each.size, "experts": each.experts, "top_k": each.top_k, "routers": list(each.routers)}
            for name, each in found.items()}
    save_tensors(path, tensors, {"experts": info}, format=FORMAT)


def load_experts(model: Any, path: str | os.PathLike[str], layers: str | None = None) -> list[str]:
    """Put the experts that :func:`save_experts` wrote into the dense model that they were made of, in place.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds something else, or the experts of another model.
    """
    tensors, info = load_tensors(path, format=FORMAT)
    components = Components.of(model, layers)
    mlps = {mlp.path: mlp for parts in components.parts.values() for part in parts for mlp in part.mlps}
    made = {}
    for name, about in info["experts"].items():
        state = {key.partition("|")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}|")}
        mlp = next((mlp for where, mlp in mlps.items() if name == where or name.endswith(f".{where}")), None)
        if mlp is None or linear(model, mlp.down).weight.shape != state["down.weight"].shape:
            raise ValueError(f"{path}: expected experts of this {type(model).__name__}, got those of {name!r}, which "
                             "it does not have in that size: load the dense model that they were made of first")
        neurons = about["experts"] * about["size"]
        made[mlp.path] = _converted(model, mlp, state["order"][neurons:],
                                    state["order"][:neurons].view(about["experts"], -1), about["top_k"],
                                    tuple(about["routers"]))
        made[mlp.path].load_state_dict(state)
    for where, module in made.items():
        replace_module(model, where, module)
    return list(made)
