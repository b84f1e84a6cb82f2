"""The conformance kit: what every plugin must pass, ours and yours.

```python
from looseleaf.testing import conformance_tests
from my_package import MyBackend

test_conformance = conformance_tests(MyBackend)
```

What the kit is given comes from :meth:`looseleaf.Plugin.conformance`, or from keyword arguments. All kinds take
``make``, a function that makes an instance whose method is at work on the kit's small inputs; the others are in
:class:`looseleaf.testing.attention.AttentionKit`, :class:`looseleaf.testing.pruners.PrunerKit`,
:class:`looseleaf.testing.prompts.PromptKit` and :class:`looseleaf.testing.probes.ProbeKit`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from looseleaf.testing.common import Check, Outcome, Skip, run

_KITS = {"attention": "AttentionKit", "pruners": "PrunerKit", "prompts": "PromptKit", "probes": "ProbeKit"}
__all__ = ["check", "checks", "conformance_tests", "outcomes"]


def checks(cls: Any, **given: Any) -> list[Check]:
    """The named checks of a plugin class; the kit is ``given`` what replaces that of ``cls.conformance()``.

    Raises:
        ValueError: ``cls`` is not a plugin of a known kind.
        TypeError: the kit of this kind takes no such argument.
    """
    kind = getattr(cls, "kind", None)
    if kind not in _KITS:
        raise ValueError(f"{cls!r}: expected a plugin of the kind {', '.join(_KITS)}, got the kind {kind!r}")
    kit = getattr(importlib.import_module(f"looseleaf.testing.{kind}"), _KITS[kind])
    found: list[Check] = kit(cls, **{**cls.conformance(), **given}).checks()
    return found


def outcomes(cls: type, **given: Any) -> list[Outcome]:
    """What comes out of all checks of a plugin class; see :func:`checks`."""
    return run(checks(cls, **given))


def check(cls: type, **given: Any) -> None:
    """AssertionError with every check that a plugin class fails, one a line."""
    failed = [f"\n  - {o.name}: {o.problem}" for o in outcomes(cls, **given) if o.problem is not None]
    assert not failed, f"{cls.__name__} fails {len(failed)} conformance checks:{''.join(failed)}"


def conformance_tests(cls: type, variants: Mapping[str, Mapping[str, Any]] | None = None,
                      **given: Any) -> Callable[..., None]:
    """A pytest test with one case for each check: ``test_conformance = conformance_tests(MyPlugin)``.

    Args:
        cls: the plugin.
        variants: name -> what the kit is given; each is checked. None: once, with ``given``.
        given: what the kit is given in every variant.
    """
    import pytest

    cases = [pytest.param(c, id=f"{name}{name and ': '}{c.name}".replace(" ", "-"))
             for name, own in (variants or {"": {}}).items() for c in checks(cls, **{**given, **own})]

    @pytest.mark.parametrize("one", cases)
    def test(one: Check) -> None:
        try:
            one.function()
        except Skip as reason:
            pytest.skip(str(reason))

    return test
