"""Layers that are run several times over (Saunshi et al. 2025): a loop in a model, and a model that is one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from looseleaf import UnsupportedModelError
from looseleaf.probes.hooks import uncompiled
from looseleaf.unwrap import unwrapped
from looseleaf_text import decoder_layers


@contextmanager
def loop_layers(model: nn.Module, i: int, j: int, times: int, *, layers: str | None = None) -> Iterator[nn.Module]:
    """Layers i to j-1 of a decoder are run ``times`` times in the ``with`` block, with shared weights.

    Repeated layers are shallow copies with a ``layer_idx`` of their own, so that each repetition has its own keys and
    values in the cache; so have the layers behind the loop. Weights are not copied: training in the block trains the
    model, and a layer collects the gradients of all its repetitions. ``times=1`` changes nothing, bit for bit.

    Args:
        model: a decoder of transformers, wrapped or not; run uncompiled in the block.
        i, j: first layer of the loop, and the layer behind it; counted from 0.
        times: how often; 1 or more.
        layers: name of the list of layers; None: it is found.

    Yields:
        The model itself; after the block its layers and configuration are as they were.

    Raises:
        ValueError: not ``0 <= i < j <=`` the number of layers, or ``times`` below 1.
        UnsupportedModelError: no stack of layers, or one whose forward is taken over by a hook of accelerate.
    """
    names = list(decoder_layers(model, layers))
    count = len(names)
    if not (isinstance(i, int) and isinstance(j, int) and 0 <= i < j <= count):
        raise ValueError(f"loop_layers: expected 0 <= i < j <= {count}, the number of layers, got i={i!r}, j={j!r}")
    if not isinstance(times, int) or isinstance(times, bool) or times < 1:
        raise ValueError(f"loop_layers: expected times to be an integer >= 1, got {times!r}")
    if times == 1:
        yield model
        return
    inner = unwrapped(model)
    order = [*range(j), *(n for _ in range(times - 1) for n in range(i, j)), *range(j, count)]
    parent = inner.get_submodule(names[0].rpartition(".")[0].rpartition(".")[0])
    attribute = names[0].rpartition(".")[0].rpartition(".")[2]
    former: Any = getattr(parent, attribute)
    repeated = nn.ModuleList([_copy(former[n], at) for at, n in enumerate(order)])
    repeated.training = former.training
    with uncompiled(model), _config(inner, order), _recorders(inner):
        setattr(parent, attribute, repeated)
        try:
            yield model
        finally:
            setattr(parent, attribute, former)


def _copy(module: nn.Module, index: int) -> nn.Module:
    """The module with the same weights, whose own ``layer_idx`` and that of its parts is ``index``."""
    if hasattr(module, "_hf_hook"):
        raise UnsupportedModelError(f"{type(module).__name__}: expected layers whose forward is their own, got one "
                                    "taken over by accelerate (device_map, offloading): load the model on one device")
    twin: Any = copy.copy(module)
    for name, hooks in vars(module).items():
        if "_hooks" in name and isinstance(hooks, dict):  # what hooks the copy gets is none of the original's
            setattr(twin, name, copy.copy(hooks))
    if "layer_idx" in vars(twin):
        twin.layer_idx = index
    twin._modules = {name: None if child is None else _copy(child, index) for name, child in module._modules.items()}
    return twin


@contextmanager
def _recorders(model: nn.Module) -> Iterator[None]:
    """A model that is first asked for its hidden states in the block is prepared for it anew behind the block.

    transformers then puts hooks on all layers, once for each model; these would be lost with the copies.
    """
    flag = "_output_capturing_hooks_installed"
    unprepared = [module for module in model.modules() if not getattr(module, flag, False)]
    try:
        yield
    finally:
        for module in unprepared:
            vars(module).pop(flag, None)


@contextmanager
def _config(model: Any, order: Sequence[int]) -> Iterator[None]:
    """The configuration counts the repeated layers, and lists of one entry a layer are in their order."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = max(order) + 1
    changed = {name: value for name, value in vars(text).items()
               if isinstance(value, (list, tuple)) and len(value) == count}
    counts = {name: getattr(text, name) for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
              if vars(text).get(name) == count}
    try:
        for name, value in changed.items():
            vars(text)[name] = type(value)(value[n] for n in order)
        for name in counts:
            vars(text)[name] = len(order)
        yield
    finally:
        vars(text).update({**changed, **counts})


class LoopedLM(nn.Module):
    """A language model of k layers that is run ``times`` times over: k layers' weights, k x ``times`` layers' depth.

    Args:
        config: of a decoder of transformers with k layers; its weights are drawn from the global generator.
        times: how often all layers are run.

    Attributes:
        base: the model of k layers; save and load it, and the number ``times``.
    """

    def __init__(self, config: Any, times: int) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__()
        if not isinstance(times, int) or isinstance(times, bool) or times < 1:
            raise ValueError(f"LoopedLM.times: expected an integer >= 1, got {times!r}")
        self.base = AutoModelForCausalLM.from_config(config)
        self.times = times
        self.k = len(decoder_layers(self.base))

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """As the base model's, with the loop in it."""
        with loop_layers(self.base, 0, self.k, self.times):
            return self.base(*arguments, **options)

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """As the base model's, with the loop in it."""
        with loop_layers(self.base, 0, self.k, self.times):
            return self.base.generate(*arguments, **options)
