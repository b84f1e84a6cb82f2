"""Which weights of a model understand and which generate, and where its layers, heads and neurons are."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from looseleaf import UnsupportedModelError, unwrapped
from looseleaf.names import match
from looseleaf.pruning.targets import holders

Name = Literal["understanding", "generation"]
NAMES: tuple[Name, Name] = ("understanding", "generation")
Phase = Callable[[Mapping[str, Any]], "str | Tensor"]
"""From the arguments of a layer by name, ``task`` among them, to the component whose tokens it works on, or to a
boolean tensor (B, N) that is True for tokens of generation."""

SUFFIX = "_moe_gen"
"""What the names of the generation half end in [official code, BAGEL]."""
_ATTENTION = (("q_proj", "k_proj", "v_proj", ("o_proj", "out_proj")), ("to_q", "to_k", "to_v", ("to_out.0",)))
_MLPS = ((("gate_proj", "up_proj"), "down_proj"), (("gate_up_proj",), "down_proj"), (("w1", "w3"), "w2"),
         (("fc1",), "fc2"), (("net.0.proj",), "net.2"))
_ELSEWHERE = re.compile(r"vision|visual|vit\b|vit_|vq|audio|connector|aligner", re.I)
_QUANTISED = ("torch.ao.nn.quantized", "torch.nn.quantized", "bitsandbytes")


@dataclasses.dataclass(frozen=True)
class Attention:
    """The projections of an attention that belong to one component: paths of modules.

    ``path`` is the attention itself, ``out`` its output projections, the first of which gets the heads; ``paired``
    where another component has projections in the same attention.
    """

    path: str
    q: str
    k: str
    v: str
    out: tuple[str, ...]
    paired: bool = False


@dataclasses.dataclass(frozen=True)
class Mlp:
    """An MLP: paths of itself, of the layers whose rows are its neurons, and of the layer whose columns are.

    ``packed``: gate and up are one layer, first one half of the rows, then the other.
    """

    path: str
    inner: tuple[str, ...]
    down: str
    packed: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
    """What one layer has of one component; ``layer`` is the path of the layer."""

    layer: str
    attention: Attention | None
    mlps: tuple[Mlp, ...]

    def outputs(self, unit: str = "block") -> list[str]:
        """Paths of the projections through which the attention, the MLPs or both (``"block"``) change the state."""
        attention = list(self.attention.out) if self.attention is not None and unit != "mlp" else []
        return attention + [mlp.down for mlp in self.mlps if unit != "attention"]

    def linears(self) -> list[str]:
        """Paths of all projections."""
        a = self.attention
        return [*((a.q, a.k, a.v, *a.out) if a else ()), *(p for mlp in self.mlps for p in (*mlp.inner, mlp.down))]


@dataclasses.dataclass(frozen=True)
class Components:
    """The two halves of a unified model.

    Attributes:
        kind: ``"pairs"``: each layer has two sets of weights, told apart by their names (BAGEL); ``"shared"``: one
            decoder does both, and a component is a phase: forwards whose new tokens are text, or picture tokens
            (Janus, Emu3, Chameleon, any decoder); ``"pipeline"``: two models (text encoder and transformer of
            diffusers).
        modules: component -> the model that its names belong to, the same for both but in a pipeline.
        parts: component -> what each layer has of it, in the order of the layers.
    """

    kind: Literal["pairs", "shared", "pipeline"]
    modules: Mapping[str, nn.Module]
    parts: Mapping[str, tuple[Part, ...]]

    @classmethod
    def of(cls, model: Any, layers: str | None = None, suffix: str = SUFFIX) -> Components:
        """Find the components of a model by its structure and names.

        Args:
            model: a torch module, or a pipeline of diffusers.
            layers: name pattern of the layers, such as ``"language_model.layers.*"``; None: the one list of layers
                with attention and MLP, vision towers aside.
            suffix: what the names of generation end in, where there are pairs.

        Raises:
            UnsupportedModelError: no layers with an MLP are found.
            ValueError: several lists of layers could be meant, a pattern matches nothing, or weights are quantised.
        """
        inner = getattr(model, "components", None)
        if not isinstance(model, nn.Module) and isinstance(inner, Mapping):
            return cls._of_pipeline(model, inner)
        if not isinstance(model, nn.Module):
            raise UnsupportedModelError(f"model: expected a torch module or a pipeline of diffusers, got "
                                        f"{type(model).__name__}")
        bare = unwrapped(model)
        _refuse_quantised(bare)
        modules = {name.replace("._orig_mod", ""): module for name, module in bare.named_modules()}
        paths = _layers(modules, layers, type(bare).__name__)
        pairs = any(suffix in name for path in paths for name, _ in modules[path].named_modules())
        if not pairs:
            parts = tuple(_part(path, modules[path]) for path in paths) if paths else tuple(_chains(modules))
            if not parts:
                raise UnsupportedModelError(
                    f"{type(bare).__name__} has no layers with an MLP that are known by name (gate_proj, up_proj, "
                    "down_proj; fc1, fc2; net.0.proj, net.2) and no Sequential of Linear, activation, Linear: give "
                    "layers=, a name pattern of the layers")
            return cls("shared", dict.fromkeys(NAMES, model), dict.fromkeys(NAMES, parts))
        return cls("pairs", dict.fromkeys(NAMES, model), {
            "understanding": tuple(_part(path, modules[path], without=suffix) for path in paths),
            "generation": tuple(_part(path, modules[path], suffix) for path in paths)})

    @classmethod
    def _of_pipeline(cls, pipeline: Any, inner: Mapping[str, Any]) -> Components:
        modules: dict[str, Any] = {"understanding": inner.get("text_encoder"), "generation": inner.get("transformer")}
        missing = [name for name, module in modules.items() if not isinstance(module, nn.Module)]
        if missing:
            raise UnsupportedModelError(f"{type(pipeline).__name__}: expected a text_encoder and a transformer, got no "
                                        f"part for {missing[0]} (it has {', '.join(inner)})")
        return cls("pipeline", modules, {name: cls.of(m).parts["understanding"] for name, m in modules.items()})

    def __getitem__(self, name: str) -> tuple[Part, ...]:
        """The parts of a component.

        Raises:
            ValueError: no such component, or the model has none of it.
        """
        if name not in self.parts:
            raise ValueError(f"component: expected {' or '.join(NAMES)}, got {name!r}")
        if not any(part.linears() for part in self.parts[name]):
            raise ValueError(f"component: expected weights of {name} in the layers of this model, got none")
        return self.parts[name]


def weight_names(model: nn.Module) -> dict[int, str]:
    """Id of a parameter -> its name in the model, the first one where it is shared."""
    return {id(place[0]._parameters.get(place[1])): name for name, places in holders(model).items()
            for place in places}


def at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path of the model without its wrappers; of a layer with adapters, the layer itself."""
    module: Any = unwrapped(model)
    for step in filter(None, path.split(".")):
        module = getattr(getattr(module, "_orig_mod", module), step)
    module = getattr(module, "_orig_mod", module)
    base = getattr(module, "base_layer", module)
    return base if isinstance(base, nn.Module) else module  # type: ignore[no-any-return]


def default_phase(inputs: Mapping[str, Any]) -> str | Tensor:
    """Which component the tokens of a layer's call belong to [ours].

    ``mode`` says so where the layer has it (``"und"`` and ``"gen"``, BAGEL). Otherwise all tokens of the task
    understanding are text and input pictures; while drawing, the first call with an empty cache reads the prompt, and
    those after it draw. With guidance, both halves of the batch count.
    """
    mode = inputs.get("mode")
    if mode in ("und", "gen"):
        return "understanding" if mode == "und" else "generation"
    if inputs["task"] == "understanding":
        return "understanding"
    cache, layer = inputs.get("past_key_values"), inputs.get("layer_idx") or 0
    if cache is not None and hasattr(cache, "get_seq_length"):
        return "generation" if int(cache.get_seq_length(layer)) > 0 else "understanding"
    return "unknown"


def _layers(modules: dict[str, nn.Module], pattern: str | None, model: str) -> list[str]:
    if pattern is not None:
        return match([name for name in modules if name], pattern)
    lists = {}
    for name, module in modules.items():
        if isinstance(module, nn.ModuleList) and len(module):
            # one of both will do for a layer: the other may have been dropped
            has = [(_has(layer, _attention_of), _has(layer, _mlp_of)) for layer in module]
            if all(map(any, has)) and all(map(any, zip(*has, strict=True))):
                lists[name] = [f"{name}.{n}" for n, _ in module.named_children()]
    outer = {name: paths for name, paths in lists.items()
             if not any(name != other and name.startswith(f"{other}.") for other in lists)}
    main = {name: paths for name, paths in outer.items() if not _ELSEWHERE.search(name)} or outer
    if len(main) > 1:
        raise ValueError(f"{model} has several lists of layers, {', '.join(main)}: expected one; say which with "
                         f"layers={f'{next(iter(main))}.*'!r}")
    return next(iter(main.values()), [])


def has_attention(layer: nn.Module) -> bool:
    """Whether there is an attention in a layer that is known by its names."""
    return _has(layer, _attention_of)


def _has(layer: nn.Module, find: Callable[[nn.Module], Any]) -> bool:
    return any(find(child) is not None for child in layer.modules())


def _child(module: nn.Module, path: str) -> nn.Module | None:
    for step in path.split("."):
        module = getattr(module, step, None)  # type: ignore[assignment]
        if not isinstance(module, nn.Module):
            return None
    return module


def _attention_of(module: nn.Module, suffix: str = "") -> tuple[str, str, str, str] | None:
    for q, k, v, outs in _ATTENTION:
        for out in outs:
            names = (q + suffix, k + suffix, v + suffix, out + suffix)
            if all(_child(module, name) is not None for name in names):
                return names
    return None


def _mlp_of(module: nn.Module) -> tuple[tuple[str, ...], str] | None:
    for inner, down in _MLPS:
        if all(_child(module, name) is not None for name in (*inner, down)):
            return inner, down
    return None


def _part(path: str, layer: nn.Module, suffix: str = "", without: str | None = None) -> Part:
    """What a layer has whose names end in ``suffix``, or do not have ``without`` in them."""
    attention: Attention | None = None
    mlps: list[Mlp] = []
    for name, module in layer.named_modules():
        full = f"{path}.{name}" if name else path
        below = f"{full}." if full else ""
        own = suffix in name if suffix else without is None or without not in name
        # the suffix is on the projections, or on an attention of its own
        found = _attention_of(module, "" if suffix and own else suffix) if suffix or own else None
        if found and attention is None:
            added = ("to_add_out",) if _child(module, "to_add_out") is not None else ()
            q, k, v, out = (below + n for n in found)
            paired = bool(suffix and not own) or bool(without and _attention_of(module, without))
            attention = Attention(full, q, k, v, (out, *(below + n for n in added)), paired)
        neurons = _mlp_of(module) if own else None
        if neurons and not (mlps and full.startswith(f"{mlps[-1].path}.")):
            inner, down = neurons
            rows, columns = _child(module, inner[0]), _child(module, down)
            packed = len(inner) == 1 and _size(rows, 0) == 2 * _size(columns, 1)
            mlps.append(Mlp(full, tuple(below + n for n in inner), below + down, packed))
    return Part(path, attention, tuple(mlps))


def _size(module: Any, dim: int) -> int:
    return int(getattr(module, "base_layer", module).weight.shape[dim])


def _chains(modules: Mapping[str, nn.Module]) -> Iterator[Part]:
    """Linear, activation, Linear inside a Sequential, but for weights that several layers share."""
    count: dict[int, int] = {}
    for module in modules.values():
        for parameter in module._parameters.values():
            count[id(parameter)] = count.get(id(parameter), 0) + 1
    for path, module in modules.items():
        if not isinstance(module, nn.Sequential):
            continue
        last: str | None = None
        for name, child in module.named_children():
            full = f"{path}.{name}" if path else name
            linear = getattr(child, "base_layer", child)
            if isinstance(linear, nn.Linear):
                if last is not None and count[id(linear.weight)] == 1:
                    # rows of a shared weight are neurons of another layer as well
                    alone = count[id(modules[last]._parameters.get("weight"))] == 1
                    yield Part(path, None, (Mlp(path, (last,) if alone else (), full),))
                last = full
            elif not isinstance(child, (nn.Identity, nn.Dropout)) and \
                    type(child).__module__ not in ("torch.nn.modules.activation", "transformers.activations"):
                last = None


def _refuse_quantised(model: nn.Module) -> None:
    odd = next((f"{name!r} of the type {type(m).__name__}" for name, m in model.named_modules()
                if type(m).__module__.startswith(_QUANTISED)), None)
    odd = odd or next((f"integers in {name!r}" for name, p in model.named_parameters()
                       if not p.is_floating_point() and not p.is_complex()), None)
    if odd is None and getattr(model, "is_quantized", False):
        odd = "a quantised model"
    if odd is not None:
        raise ValueError(f"model: expected weights that are floating-point numbers, got {odd}: load the model without "
                         "quantisation, prune it, and quantise what is left")


def linear(model: nn.Module, path: str) -> nn.Linear:
    """The Linear layer at a path.

    Raises:
        UnsupportedModelError: there is another layer.
    """
    layer = at(model, path)
    if not isinstance(layer, nn.Linear):
        raise UnsupportedModelError(f"{path}: expected a Linear layer, got {type(layer).__name__}: only Linear layers "
                                    "are scored, made smaller or split")
    return layer


def head_dim(model: nn.Module, attention: Attention) -> int:
    """Size of a head of an attention.

    Raises:
        UnsupportedModelError: the attention does not say.
    """
    module: Any = at(model, attention.path)
    for name in ("head_dim", "attention_head_size"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    for name in ("num_heads", "num_attention_heads", "heads"):
        if isinstance(getattr(module, name, None), int):
            return linear(model, attention.q).out_features // int(getattr(module, name))
    raise UnsupportedModelError(f"{attention.path}: expected an attribute head_dim or num_heads, got none: heads of "
                                f"{type(module).__name__} are not known")


def first_tensor(value: Any) -> Tensor | None:
    """The state in what a layer takes or gives: the value, the last tensor of two (text and picture stream, as blocks
    of diffusers have it), else the first of a tuple."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)) and value:
        streams = len(value) == 2 and all(isinstance(v, Tensor) and v.dim() == 3 for v in value)
        return value[-1] if streams else first_tensor(value[0])
    return None
