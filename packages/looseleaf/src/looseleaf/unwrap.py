"""Looking through the wrappers that training and serving libraries put around a model."""

from __future__ import annotations

import sys
from typing import Any

_WRAPPERS = ("torch.nn.parallel", "torch.distributed", "torch.optim.swa_utils", "accelerate", "lightning.fabric")


def unwrapped(model: Any) -> Any:
    """The model inside PEFT, ``torch.compile``, DataParallel, DDP, FSDP, accelerate or DeepSpeed wrappers.

    What a model *can do* (its configuration, embeddings, layers, ``generate``) is asked of this object; it is *run*
    through the wrapper. Wrappers may lie in one another; a model without any, and anything that is no model, comes
    back as it is. Adapters of PEFT stay in place: they are modules inside the model.
    """
    seen: set[int] = set()
    while id(model) not in seen:
        seen.add(id(model))
        inner = _inner(model)
        model = model if inner is None else inner
    return model


def named_modules(model: Any) -> dict[str, Any]:
    """The parts of a model by the names that they have inside all wrappers, those around a compiled part included."""
    return {name.replace("._orig_mod", ""): module for name, module in unwrapped(model).named_modules() if name}


def _inner(model: Any) -> Any:
    """What one wrapper holds; None where ``model`` is none."""
    home, name = type(model).__module__, type(model).__name__
    if home.startswith("torch._dynamo"):
        return getattr(model, "_orig_mod", None)
    if home.split(".")[0] == "peft":
        peft = sys.modules["peft"]
        if isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
            return model.get_base_model()
        return getattr(model, "model", None)  # a tuner by itself, such as LoraModel
    if home.startswith(_WRAPPERS) or (home.startswith("deepspeed") and name.endswith("Engine")):
        return getattr(model, "module", None)
    return None


__all__ = ["named_modules", "unwrapped"]
