"""The conformance kit: what every plugin must pass, ours and yours.

```python
from looseleaf.testing import check_attention_backend
from my_package import MyBackend

def test_conformance():
    check_attention_backend(MyBackend)
```
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "check_attention_backend": "attention",
    "check_pruner": "pruners",
    "check_prompt_optimizer": "prompts",
    "check_probe": "probes",
}
__all__ = ["check", *sorted(_HOME)]

if TYPE_CHECKING:
    from looseleaf.testing.attention import check_attention_backend
    from looseleaf.testing.probes import check_probe
    from looseleaf.testing.prompts import check_prompt_optimizer
    from looseleaf.testing.pruners import check_pruner


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'looseleaf.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"looseleaf.testing.{_HOME[name]}"), name)


def check(cls: type) -> None:
    """Run the kit for the kind of ``cls``.

    Raises:
        AssertionError: with every check that failed, one a line.
        ValueError: ``cls`` is not a plugin of a known kind.
    """
    kits = {"attention": "check_attention_backend", "pruners": "check_pruner",
            "prompts": "check_prompt_optimizer", "probes": "check_probe"}
    kind = getattr(cls, "kind", None)
    if kind not in kits:
        raise ValueError(f"{cls!r} has kind {kind!r}: allowed is {', '.join(kits)}")
    __getattr__(kits[kind])(cls)
