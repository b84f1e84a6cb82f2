"""Log-probabilities as servers write them: of an echoed text, and of the likeliest next tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

UNKNOWN = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
# How byte-level vocabularies write bytes (GPT-2): printable ones as themselves, the others by characters after 255.
_BYTES = {chr(b): b for b in _PRINTED} | {
    chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in _PRINTED)}


def span_log_prob(tokens: Sequence[str], log_probs: Sequence[float | None], prefix: str,
                  continuation: str) -> float | None:
    """Sum of the log-probabilities of the tokens that make up ``continuation`` in an echoed text.

    Args:
        tokens: texts of the tokens, possibly with a beginning-of-text token before and generated ones after.
        log_probs: theirs; None for the first.

    Returns:
        The sum, or None where the tokens are not those of the text or have no values.
    """
    places = align("".join(tokens), prefix + continuation)
    if places is None or len(log_probs) < len(tokens):
        return None
    # White space at the end of the prefix is part of the continuation's first token.
    begin, end = places[len(prefix.rstrip(" "))], places[-1]
    total, at, any_token = 0.0, 0, False
    for token, value in zip(tokens, log_probs, strict=False):
        if at < end and at + len(token) > begin and token:
            if value is None:
                return None
            total, any_token = total + float(value), True
        at += len(token)
    return total if any_token else None


def align(echoed: str, text: str) -> list[int] | None:
    """Where each character of ``text`` begins in ``echoed``, and where the last ends; None where it is not there.

    A character of several tokens is echoed as one U+FFFD or more, one for each byte at most.
    """
    start = echoed.find(text)
    if start >= 0 or UNKNOWN not in echoed:
        return None if start < 0 else list(range(start, start + len(text) + 1))
    # As many for each character, if that is possible: otherwise two in a row could be cut anywhere.
    for counts in ((1,), (2,), (3,), (4,), (1, 2, 3, 4)):
        for start in range(len(echoed)):
            places = _align_from(echoed, text, start, counts)
            if places is not None:
                return places
    return None


def _align_from(echoed: str, text: str, start: int, counts: Sequence[int]) -> list[int] | None:
    """See :func:`align`; of a text that begins at ``start``, with so many U+FFFD for each character that has any."""
    # (characters done, U+FFFD of the next one seen) -> the state before, for each character of the echo
    steps: list[dict[tuple[int, int], tuple[int, int]]] = [{(0, 0): (0, 0)}]
    for at in range(start, len(echoed)):
        after: dict[tuple[int, int], tuple[int, int]] = {}
        for done, seen in steps[-1]:
            if done == len(text):
                continue
            if echoed[at] == text[done] and not seen:
                after.setdefault((done + 1, 0), (done, seen))
            elif echoed[at] == UNKNOWN and ord(text[done]) > 127:
                if seen + 1 in counts:
                    after.setdefault((done + 1, 0), (done, seen))
                if seen + 1 < min(max(counts), len(text[done].encode("utf-8", "surrogatepass"))):
                    after.setdefault((done, seen + 1), (done, seen))
        if not after:
            return None
        steps.append(after)
        if (len(text), 0) in after and (at + 1 == len(echoed) or echoed[at + 1] != UNKNOWN):
            places, state = [0] * len(text) + [at + 1], (len(text), 0)
            for n in range(len(steps) - 1, 0, -1):
                state = steps[n][state]
                places[state[0]] = start + n - 1
            return places
    return None


def first_token(continuation: str, table: dict[str, float], strip: bool = False) -> str | None:
    """The longest token of ``table`` that ``continuation`` begins with; ``strip`` leaves white space aside."""
    wanted = (continuation.strip() if strip else continuation).encode("utf-8", "surrogateescape")
    fits = [t for t in table if t.strip() and wanted.startswith((t.strip() if strip else t).encode(
        "utf-8", "surrogateescape"))]
    return max(fits, key=lambda t: (len(t.strip()), table[t])) if fits else None


def first_table(log_probs: dict[str, Any] | None) -> dict[str, float]:
    """Likeliest first tokens, from the form of completions or that of chats (which some servers use for both)."""
    content = (log_probs or {}).get("content") or []
    listed: list[tuple[str, float]] = []
    if content:
        for entry in content[0].get("top_logprobs") or []:
            raw = entry.get("bytes")
            text = bytes(raw).decode("utf-8", "surrogateescape") if raw else str(entry["token"])
            listed.append((text, float(entry["logprob"])))
    else:
        top = ((log_probs or {}).get("top_logprobs") or [None])[0] or {}
        listed = [(str(k), float(v)) for k, v in top.items()]
    table: dict[str, float] = {}
    for text, value in zip(plain_tokens([t for t, _ in listed]), (v for _, v in listed), strict=True):
        table[text] = max(value, table.get(text, value))
    return table


def plain_tokens(tokens: Sequence[str]) -> list[str]:
    """Tokens as they stand in a text, where a server writes them as its vocabulary does.

    Byte-level vocabularies write a space as U+0120 and each byte as a character of its own, others a space as U+2581
    and single bytes as ``<0x0A>``. Bytes that are no whole character become surrogates (``surrogateescape``).
    """
    if any(t[:1] in ("\u0120", "\u010a") for t in tokens):
        return [bytes(_BYTES[c] for c in t).decode("utf-8", "surrogateescape") if all(c in _BYTES for c in t) else t
                for t in tokens]
    out = []
    for token in tokens:
        byte = _BYTE.fullmatch(token)
        out.append(bytes([int(byte[1], 16)]).decode("utf-8", "surrogateescape") if byte
                   else token.replace("\u2581", " "))
    return out


__all__ = ["align", "first_table", "first_token", "plain_tokens", "span_log_prob"]
