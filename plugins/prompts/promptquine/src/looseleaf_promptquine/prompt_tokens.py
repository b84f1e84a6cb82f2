"""A prompt as a row of tokens, some of which may be switched off."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

_SLOT = re.compile(r"(\{[A-Za-z_]\w*\})")


@dataclasses.dataclass(frozen=True)
class PromptTokens:
    """The tokens of a prompt with slots.

    A mask is a text of ``0`` and ``1``, one for each prunable token: short to store and easy to compare.

    Attributes:
        texts: tokens and slots, in order; they join to the prompt.
        prunable: places of the tokens a mask speaks of; slots are never among them.
    """

    texts: tuple[str, ...]
    prunable: tuple[int, ...]

    @classmethod
    def of(cls, template: str, names: set[str], token_texts: Callable[[str], list[str]]) -> PromptTokens:
        """Cut ``template`` into slots of ``names``, which are protected, and tokens, which are not.

        Args:
            template: the whole prompt with slots such as ``{text}``.
            names: what counts as a slot; other braces are ordinary text.
            token_texts: cuts a text where its tokens are.

        Raises:
            ValueError: the template has none of the slots, or nothing but slots.
        """
        texts: list[str] = []
        prunable: list[int] = []
        for part in _SLOT.split(template):
            if part[1:-1] in names and _SLOT.fullmatch(part):
                texts.append(part)
            elif part:
                tokens = token_texts(part)
                prunable += range(len(texts), len(texts) + len(tokens))
                texts += tokens
        if len(prunable) == len(texts):
            raise ValueError(f"the prompt {template!r:.200} has no slot of {sorted(names)}: "
                             "write for example {text} where the example goes")
        if not prunable:
            raise ValueError(f"the prompt {template!r:.200} has nothing but slots: there is nothing to prune")
        return cls(tuple(texts), tuple(prunable))

    @property
    def full(self) -> str:
        """The mask that keeps everything."""
        return "1" * len(self.prunable)

    def text(self, mask: str) -> str:
        """The prompt with what ``mask`` leaves out."""
        dropped = {place for place, bit in zip(self.prunable, mask, strict=True) if bit == "0"}
        return "".join(t for n, t in enumerate(self.texts) if n not in dropped)


def length(mask: str) -> int:
    """How many prunable tokens ``mask`` keeps."""
    return mask.count("1")


def without(mask: str, places: list[int]) -> str:
    """``mask`` with ``places`` switched off as well."""
    bits = list(mask)
    for place in places:
        bits[place] = "0"
    return "".join(bits)
