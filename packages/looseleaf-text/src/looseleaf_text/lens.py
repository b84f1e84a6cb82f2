"""The logit lens: what a decoder would predict if it stopped after each of its layers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf.errors import UnsupportedModelError, did_you_mean
from looseleaf.probes.hooks import capture
from looseleaf.unwrap import named_modules, unwrapped
from looseleaf_text.layers import decoder_layers

NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "final_norm", "norm_f", "ln_out")
"""What the final norm is called in transformers, beside the list of layers."""


class LogitLens:
    """Final norm and unembedding, applied to the residual stream of any layer.

    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020). At the last layer the lens is the model's own
    output; :meth:`log_probs` checks that it is, so a model that does more after its layers is rejected, not misread.

    Args:
        model: a decoder of transformers with a language-model head.
        norm: name of the final norm, such as ``"model.norm"``; ``"none"`` where the model has none; None: it is found.
        head: name of the unembedding, such as ``"lm_head"``; None: the model's output embeddings.
        layers: name of the list of layers; None: it is found.

    Attributes:
        names: module names of the layers, first to last.
        norm, head: the modules.

    Raises:
        ValueError: norm, head or layers are unknown or cannot be found; near names are given.
        UnsupportedModelError: the model has no stack of decoder layers.
    """

    def __init__(self, model: nn.Module, *, norm: str | None = None, head: str | None = None,
                 layers: str | None = None) -> None:
        self.model = model
        self.names = list(decoder_layers(model, layers))
        modules = named_modules(model)
        self.norm = _final_norm(model, modules, self.names[0].rpartition(".")[0], norm)
        inner = unwrapped(model)
        self.head = _head(inner, modules, head)
        config: Any = getattr(inner, "config", None)
        self._config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._keeps = "logits_to_keep" in inspect.signature(inner.forward).parameters

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) of a residual stream (..., hidden size), in the model's dtype."""
        logits: Tensor = self.head(self.norm(hidden))
        for name, scaled in (("logit_scale", lambda x, s: x * s), ("logits_scaling", lambda x, s: x / s),
                             ("lm_head_multiplier", lambda x, s: x * s)):
            scale = getattr(self._config, name, None)
            if scale is not None:
                logits = scaled(logits, scale)
        cap = getattr(self._config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @torch.no_grad()
    def log_probs(self, inputs: Mapping[str, Tensor], positions: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Log-probabilities under the lens, after every layer, from one forward pass.

        Args:
            inputs: of the model, such as ``input_ids`` and ``attention_mask`` (B, L).
            positions: (B, P) int64, the places whose residual stream is read; negative ones count from the end. The
                stream at a place predicts the token after it.
            tokens: (B, P) int64, the tokens whose log-probability is wanted at each place; or None.

        Returns:
            float32, natural log: (layers, B, P) for ``tokens``, else (layers, B, P, vocabulary).

        Raises:
            ValueError: shapes that do not fit.
            UnsupportedModelError: at the last layer the lens does not give the model's own output.
        """
        batch, length = next(iter(inputs.values())).shape[:2]
        if positions.dim() != 2 or len(positions) != batch or int(positions.min()) < -length or \
                int(positions.max()) >= length:
            raise ValueError(f"positions: expected the shape ({batch}, P) and places in [{-length}, {length - 1}], got "
                             f"the shape {tuple(positions.shape)} and {positions.tolist()!r:.80}")
        if tokens is not None and tokens.shape != positions.shape:
            raise ValueError(f"tokens: expected the shape of positions, {tuple(positions.shape)}, got "
                             f"{tuple(tokens.shape)}")
        rows = torch.arange(batch)[:, None]

        def at(stream: Tensor) -> Tensor:
            return stream[rows.to(stream.device), positions.to(stream.device)]

        with capture(self.model, self.names, reduce=at) as streams:
            if self._keeps:  # logits of all places would be the largest tensor by far
                wanted, places = torch.unique(positions % length, return_inverse=True)
                device = next(iter(inputs.values())).device
                logits = self.model(**inputs, logits_to_keep=wanted.to(device)).logits
                own = logits[rows.to(logits.device), places.to(logits.device)]
            else:
                own = at(self.model(**inputs).logits)
        out = []
        for name in self.names:
            if not streams[name]:
                raise UnsupportedModelError(f"{name} was not run by the model, so it has no residual stream to read")
            logits = self(streams[name][0])
            if name == self.names[-1]:
                self._compare(logits, own)
            values = torch.log_softmax(logits.float(), -1)
            for n in range(batch):
                if not bool(values[n].amax(-1).isfinite().all()):
                    raise ValueError(f"{type(unwrapped(self.model)).__name__}: expected finite logits after {name}, "
                                     f"got others for row {n}: a weight is NaN or infinite, or its dtype overflows")
            if tokens is not None:
                values = values.gather(-1, tokens.to(values.device)[..., None])[..., 0]
            out.append(values.to(own.device))
        return torch.stack(out)

    def _compare(self, logits: Tensor, own: Tensor) -> None:
        gap = float((logits.float() - own.float()).abs().max())
        # matrix products of other shapes may round otherwise
        tolerance = 64 * torch.finfo(own.dtype).eps * max(1.0, float(own.abs().max()))
        if not gap <= tolerance:
            raise UnsupportedModelError(
                f"at the last layer the lens differs from the output of {type(self.model).__name__} by {gap:.3g} "
                f"(expected at most {tolerance:.3g}): the model does more after its layers than a norm and a head. "
                "Check norm=... and head=..., or subclass LogitLens and say in __call__ what the model does")


def _final_norm(model: nn.Module, modules: dict[str, nn.Module], layers: str, norm: str | None) -> nn.Module:
    if norm == "none":
        return nn.Identity()
    outside = [name for name in modules if name and not name.startswith(f"{layers}.")]
    norms = [name for name in outside if "norm" in type(modules[name]).__name__.lower()]
    if norm is not None:
        if norm not in modules:
            raise ValueError(f"norm: expected 'none' or a module of {type(model).__name__}, such as "
                             f"{', '.join(norms[:3]) or ', '.join(outside[:3])}, got {norm!r}."
                             f"{did_you_mean(norm, outside)}")
        return modules[norm]
    parent = layers.rpartition(".")[0]
    beside = [f"{parent}.{name}".lstrip(".") for name in NORM_NAMES]
    found = next((name for name in beside if name in modules), None)
    if found is None:
        near = [name for wanted in beside if (hint := did_you_mean(wanted, outside)) for name in outside
                if repr(name) in hint]
        offered = list(dict.fromkeys([*norms, *near])) or outside
        raise ValueError(f"no final norm of {type(model).__name__} could be found: looked for {', '.join(beside)}. "
                         f"Near names are {', '.join(offered[:4])}: pass norm='...', or norm='none' where the model "
                         "has none")
    return modules[found]


def _head(model: nn.Module, modules: dict[str, nn.Module], head: str | None) -> nn.Module:
    if head is not None:
        if head not in modules:
            raise ValueError(f"head: expected a module of {type(model).__name__}, got {head!r}."
                             f"{did_you_mean(head, modules)}")
        return modules[head]
    ask = getattr(model, "get_output_embeddings", None)
    found = ask() if callable(ask) else None
    if not isinstance(found, nn.Module):
        raise ValueError(f"{type(model).__name__} has no output embeddings: load it with AutoModelForCausalLM, or pass "
                         f"head='...'.{did_you_mean('lm_head', modules)}")
    return found


__all__ = ["NORM_NAMES", "LogitLens"]
