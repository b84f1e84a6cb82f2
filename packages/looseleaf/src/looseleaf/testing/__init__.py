"""The conformance kit: what every plugin must pass, ours and yours.

```python
from looseleaf.testing import conformance_tests
from my_package import MyBackend

test_conformance = conformance_tests(MyBackend)
```

What the kit is given comes from :meth:`looseleaf.Plugin.conformance`, or from keyword arguments:

- all kinds: ``make``, a function that makes an instance whose method is at work on the kit's small inputs;
- attention: see :class:`looseleaf.testing.attention.AttentionKit`;
- pruners: see :class:`looseleaf.testing.pruners.PrunerKit`;
- prompts: see :class:`looseleaf.testing.prompts.PromptKit`;
- probes: see :class:`looseleaf.testing.probes.ProbeKit`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from looseleaf.testing.common import Check, Kit, Outcome

_KITS = {"attention": "attention:AttentionKit", "pruners": "pruners:PrunerKit", "prompts": "prompts:PromptKit",
         "probes": "probes:ProbeKit"}
__all__ = ["check", "checks", "conformance_tests", "outcomes"]


def checks(cls: type, **given: Any) -> list[Check]:
    """The named checks of a plugin class.

    Args:
        cls: the plugin.
        given: what the kit is given, over what ``cls.conformance()`` says.

    Raises:
        ValueError: ``cls`` is not a plugin of a known kind.
        TypeError: the kit of this kind takes no such argument.
    """
    kind = getattr(cls, "kind", None)
    if kind not in _KITS:
        raise ValueError(f"{cls!r}: expected a plugin of the kind {', '.join(_KITS)}, got the kind {kind!r}")
    module, name = _KITS[kind].split(":")
    kit: type[Kit] = getattr(importlib.import_module(f"looseleaf.testing.{module}"), name)
    return kit(cls, **{**cls.conformance(), **given}).checks()  # type: ignore[attr-defined]


def outcomes(cls: type, **given: Any) -> list[Outcome]:
    """Run all checks of a plugin class; see :func:`checks`."""
    from looseleaf.testing.common import run

    return run(checks(cls, **given))


def check(cls: type, **given: Any) -> None:
    """Run all checks of a plugin class.

    Raises:
        AssertionError: with every check that failed, one a line.
    """
    failed = [o for o in outcomes(cls, **given) if o.problem is not None]
    if failed:
        lines = "\n".join(f"  - {o.name}: {o.problem}" for o in failed)
        raise AssertionError(f"{cls.__name__} fails {len(failed)} conformance checks:\n{lines}")


def conformance_tests(cls: type, variants: Mapping[str, Mapping[str, Any]] | None = None,
                      **given: Any) -> Callable[..., None]:
    """A pytest test with one case for each check: ``test_conformance = conformance_tests(MyPlugin)``.

    Args:
        cls: the plugin.
        variants: name -> what the kit is given; each is checked. None: once, with ``given``.
        given: what the kit is given in every variant.
    """
    import pytest

    from looseleaf.testing.common import Skip

    found = [(f"{name}: {c.name}" if name else c.name, c)
             for name, own in (variants or {"": {}}).items() for c in checks(cls, **{**given, **own})]

    @pytest.mark.parametrize("one", [c for _, c in found], ids=[name.replace(" ", "-") for name, _ in found])
    def test(one: Check) -> None:
        try:
            one.function()
        except Skip as reason:
            pytest.skip(str(reason))

    return test
