"""Token ids of texts, whatever a tokenizer puts around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_PROBES = ("a", "b", "the", "1", "a b")
_ANCHORS = ("\n", ":", ".", "a")
"""Texts that a tokenizer is likely to keep apart from what follows."""


class Encoding:
    """A tokenizer of transformers, and what it puts before and after every text.

    Attributes:
        begin, end: ids that come with special tokens, before and after those of the text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        names = ("eos_token_id", "sep_token_id")
        self._ends = {getattr(tokenizer, name, None) for name in names} - {None}
        self._alone: dict[str, list[int]] = {}
        self.begin, self.end = self._around()

    def bare(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of the texts alone, of each without special tokens."""
        if not texts:
            return []
        out = [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
        for n, ids in enumerate(out):  # one told to append </s> may do so all the same
            if len(ids) > 1 and ids[-1] in self._ends and not self._written(texts[n]):
                out[n] = ids[:-1]
        return out

    def _written(self, text: str) -> bool:
        tokenizer = self.tokenizer
        return any(token and text.endswith(str(token)) for token in (
            getattr(tokenizer, "eos_token", None), getattr(tokenizer, "sep_token", None)))

    def opened(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of the texts with :attr:`begin` before them and nothing after: each can be continued."""
        return [[*self.begin, *ids] for ids in self.bare(texts)]

    def _around(self) -> tuple[list[int], list[int]]:
        special = set(getattr(self.tokenizer, "all_special_ids", None) or ())
        wholes = []
        best: tuple[list[int], list[int]] | None = None
        for text in _PROBES:
            whole, bare = list(self.tokenizer([text])["input_ids"][0]), self.bare([text])[0]
            wholes.append(whole)
            found = [(whole[:n], whole[n + len(bare):]) for n in range(len(whole) - len(bare) + 1)
                     if bare and whole[n:n + len(bare)] == bare]
            if len(found) == 1:
                return found[0]
            if found and best is None:  # a text of unknown tokens alone: where all around it is special
                best = next((f for f in found if special.issuperset(f[0] + f[1])), found[0])
        if best is not None:
            return best
        # never as the text alone: what all texts have in common
        head = next((n for n, column in enumerate(zip(*wholes, strict=False)) if len(set(column)) > 1), 0)
        behind = [whole[::-1] for whole in wholes]
        tail = next((n for n, column in enumerate(zip(*behind, strict=False)) if len(set(column)) > 1), 0)
        return wholes[0][:head], behind[0][:tail][::-1]

    def alone(self, text: str) -> list[int]:
        """The ids of a text as it stands in the middle of another, without the space that some put before a text."""
        if text not in self._alone:
            self._alone[text] = self.bare([text])[0]
            for anchor in _ANCHORS:
                head, whole = self.bare([anchor, anchor + text])
                if head and len(whole) > len(head) and whole[:len(head)] == head:
                    self._alone[text] = whole[len(head):]
                    break
        return self._alone[text]

    def pairs(self, prefixes: Sequence[str],
              continuations: Sequence[Sequence[str]]) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Ids of prefixes and of the continuations after them; see :meth:`looseleaf_text.LocalModel.encode_pairs`."""
        stripped = [p.rstrip(" ") for p in prefixes]
        moved = [p[len(b):] for p, b in zip(prefixes, stripped, strict=True)]
        heads = self.bare(stripped)
        joint = iter(self.bare([b + m + c for b, m, row in zip(stripped, moved, continuations, strict=True)
                                for c in row]))
        tails: list[list[list[int]]] = []
        for n, row in enumerate(continuations):
            tails.append([])
            for text in row:
                whole, head = next(joint), heads[n]
                ids = whole[len(head):] if whole[:len(head)] == head and len(whole) > len(head) else \
                    self.alone(moved[n] + text)
                if not ids:
                    raise ValueError(f"the continuation {text!r} has no tokens; give it a text")
                tails[-1].append(ids)
        return [[*self.begin, *head] for head in heads], tails


__all__ = ["Encoding"]
