"""A causal language model of transformers, scored in batches that share what their prompts share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from looseleaf.budget import costs
from looseleaf.errors import UnsupportedModelError
from looseleaf.fingerprint import fingerprint
from looseleaf.unwrap import unwrapped
from looseleaf_text.batching import (
    Batching,
    batching,
    choice,
    device_of,
    expect_eval,
    positions,
    reach,
    reading,
    select,
    text_config,
)
from looseleaf_text.encoding import Encoding
from looseleaf_text.model import LanguageModel, not_finite

if TYPE_CHECKING:
    import numpy as np

Ids = Sequence[int]
STRETCH = 400
"""Rows planned together; also the deepest the plan can recurse."""


class LocalModel(LanguageModel):
    """A transformers causal language model and its tokenizer.

    Scoring forwards what prompts have in common once (their keys and values are kept and shared), the rest in
    batches. What comes out equals scoring every prompt by itself, up to rounding: the first call tries on a few short
    rows which kinds of padding and sharing the model undoes, and goes without the others, one row at a time if need
    be. The model's mode and weights are left as they are; its dropout must be off (``model.eval()``), as it is after
    ``from_pretrained``.

    Args:
        model: any ``AutoModelForCausalLM``, wrapped or not; moved nowhere, evaluated where it is.
        tokenizer: its tokenizer. Special tokens that it puts before a text are kept, those after a text left out.
        batch_tokens: most positions (rows x longest row, shared parts included) in memory at once. A single prompt
            longer than this is still forwarded, alone.
        share_prefixes: False forwards every prompt in full; for comparison.

    Attributes:
        forwarded: positions forwarded, padding included, the trial aside; ``tokens`` counts as if nothing were shared.

    Raises:
        UnsupportedModelError: an encoder with a decoder; when it is first run, a model that is not causal.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int = 8192, *, share_prefixes: bool = True) -> None:
        if not isinstance(batch_tokens, int) or batch_tokens < 1:
            raise ValueError(f"LocalModel.batch_tokens: expected an integer >= 1, got {batch_tokens!r}")
        inner = unwrapped(model)  # a wrapper's own signature and configuration say nothing
        if not callable(model) or not hasattr(inner, "config"):
            raise ValueError(f"LocalModel: expected a transformers causal language model, got {type(model).__name__}")
        if getattr(inner.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(f"LocalModel: expected a causal language model, got {type(inner).__name__}, an "
                                        "encoder with a decoder, which reads a prompt otherwise than it continues it: "
                                        "use a decoder alone, or a server that generates (EndpointModel)")
        if not callable(tokenizer):
            raise ValueError(f"LocalModel: expected the model's tokenizer, got {type(tokenizer).__name__}")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.share_prefixes = share_prefixes
        self.calls = 0
        self.tokens = 0
        self.forwarded = 0
        self.name = f"{type(inner).__name__}-{sum(p.numel() for p in model.parameters())}"
        self._inner = inner
        self._wrapper = (id(model), type(model).__name__)
        accepted = inspect.signature(inner.forward).parameters
        self._accepted = None if any(p.kind is p.VAR_KEYWORD for p in accepted.values()) else set(accepted)
        self._keeps = "logits_to_keep" in accepted
        self._positions = "position_ids" in accepted
        self._limit: int | None = positions(text_config(inner))
        self._reach, self._choice = reach(text_config(inner)), choice(text_config(inner))

    def _batching(self, window: int | None = None) -> Batching:
        """What a batch means to the model, measured once; ``window``: for rows longer than that."""
        key = (*self._wrapper, str(getattr(self._inner.config, "_attn_implementation_internal", "")))
        before, model = self.forwarded, self.model
        try:
            # a compiled model is tried uncompiled: each new shape would compile it again
            self.model = getattr(model, "_orig_mod", model)
            return batching(self._inner, key, self._forward, self.tokenizer, self._limit, window)
        finally:
            self.forwarded, self.model = before, model

    def fingerprint(self) -> str:
        """Of the weights as they are now, see :func:`looseleaf.fingerprint.fingerprint`."""
        return fingerprint(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model's input goes."""
        return device_of(self.model)

    # -- text and ids ---------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens."""
        return self._encoding.bare([text])[0]

    def detokenize(self, ids: list[int]) -> str:
        """The text of ``ids``; special tokens are kept."""
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    @functools.cached_property
    def _encoding(self) -> Encoding:
        return Encoding(self.tokenizer)

    def encode_pairs(self, prefixes: Sequence[str],
                     continuations: Sequence[Sequence[str]]) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Ids of prefixes and of the continuations after them.

        Spaces at the end of a prefix go with the continuation, since tokenizers put them there. Where the two together
        are tokenized otherwise than prefix first, each is tokenized by itself. Nothing comes after a prefix: neither
        here nor before a text is generated does a tokenizer's end of text.

        Raises:
            ValueError: a continuation has no tokens.
        """
        return self._encoding.pairs(prefixes, continuations)

    # -- log-likelihood -------------------------------------------------------------------------------------------

    def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        """See :meth:`LanguageModel.score`."""
        _same_length(prefixes, continuations)
        return self.score_ids(*self.encode_pairs(prefixes, continuations))

    @costs(calls=lambda model, prefix_ids, continuation_ids: len(prefix_ids),
           tokens=lambda model, prefix_ids, continuation_ids: sum(map(len, prefix_ids)) + sum(
               max(map(len, row)) for row in continuation_ids))
    @torch.no_grad()  # not inference_mode: what a model keeps of it could never be trained again
    def score_ids(self, prefix_ids: Sequence[Ids], continuation_ids: Sequence[Sequence[Ids]]) -> list[list[float]]:
        """As :meth:`score`, of token ids.

        Args:
            prefix_ids: n lists of ids. An empty one is read as the beginning-of-text token.
            continuation_ids: for each prefix the lists of ids to score, each of at least one.
        """
        _same_length(prefix_ids, continuation_ids)
        heads = [list(p) or [self._begin()] for p in prefix_ids]
        for n, row in enumerate(continuation_ids):
            if not row or not all(len(c) for c in row):
                raise ValueError(f"continuations of prefix {n}: expected one or more, each with one token or more, got "
                                 f"{list(row)!r}")
        longest = max((len(h) + max(map(len, row)) - 1 for h, row in zip(heads, continuation_ids, strict=True)),
                      default=0)
        measured = self._check(longest)
        self.calls += len(heads)
        self.tokens += sum(map(len, heads)) + sum(max(len(c) for c in row) - 1 for row in continuation_ids)
        if not measured.left:
            out = self._score_exact(heads, continuation_ids, measured)
        else:
            out = [[] for _ in heads]
            for start, rows in self._batches(heads, continuation_ids):
                for n, values in zip(rows, self._score_batch(heads, continuation_ids, start, rows), strict=True):
                    out[n] = values
        for n, values in enumerate(out):
            if not all(map(math.isfinite, values)):
                raise not_finite(self.name, "log-probabilities", values, n, self.detokenize(heads[n]))
        return out

    def _check(self, positions: int) -> Batching:
        """How rows of so many positions may be batched; errors for a model or a length that cannot be scored."""
        expect_eval(self.model)
        measured = self._batching()
        if measured.refused:
            raise UnsupportedModelError(f"{type(self._inner).__name__} cannot be scored: {measured.refused}")
        before = int(getattr(self.model, "length", 0))  # of a soft prompt
        limits = [n for n in (self._limit, measured.longest) if n is not None]
        if limits and positions + before > min(limits):
            raise ValueError(f"expected prompts of at most {min(limits) - before} positions (the model's "
                             f"max_position_embeddings), got one of {positions}: shorten it")
        if self._choice is not None and positions + before > self._choice:
            return dataclasses.replace(measured, left=False, right=False, shares=False)
        if self._reach is not None and positions + before > self._reach:
            return dataclasses.replace(self._batching(self._reach), left=False)
        return measured

    def _begin(self) -> int:
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self.tokenizer, name, None)
            if value is not None:
                return int(value)
        raise ValueError("an empty prefix cannot be scored: the tokenizer has no beginning-of-text token")

    def _batches(self, heads: list[list[int]],
                 tails: Sequence[Sequence[Ids]]) -> Iterator[tuple[list[tuple[int, int]], list[int]]]:
        """Batches as ([(rows of a group, length of what they share)], rows in the order of the groups)."""
        order = sorted(range(len(heads)), key=lambda n: heads[n])
        groups: list[tuple[list[int], int]] = []
        # The plan looks at a bounded stretch of sorted rows: planning stays far cheaper than the work.
        for begin in range(0, len(order), STRETCH):
            groups += self._plan(heads, order[begin:begin + STRETCH])
        ready: list[tuple[list[int], int]] = []
        for members, shared in groups:
            extra = max((len(heads[n]) + max(map(len, tails[n]))) * _distinct(tails[n]) for n in members)
            size = max(1, self.batch_tokens // extra)
            members = sorted(members, key=lambda n: len(heads[n]))
            ready += [(members[i:i + size], shared) for i in range(0, len(members), size)]
        # Groups of like shape go together, so that little is padding.
        ready.sort(key=lambda g: (g[1] == 0, g[1], max(len(heads[n]) for n in g[0])))
        batch: list[tuple[list[int], int]] = []
        for group in ready:
            wanted = [*batch, group]
            rows = [n for members, _ in wanted for n in members]
            longest = max(s for _, s in wanted) + max(len(heads[n]) - s for m, s in wanted for n in m)
            longest += max(len(c) for n in rows for c in tails[n])
            copies = max(_distinct(tails[n]) for n in rows)
            mixed = (batch[0][1] == 0) != (group[1] == 0) if batch else False
            if batch and (mixed or len(rows) * copies * longest > self.batch_tokens):
                yield [(len(m), s) for m, s in batch], [n for m, _ in batch for n in m]
                batch = []
            batch.append(group)
        if batch:
            yield [(len(m), s) for m, s in batch], [n for m, _ in batch for n in m]

    def _score_batch(self, heads: list[list[int]], tails: Sequence[Sequence[Ids]], groups: list[tuple[int, int]],
                     rows: list[int]) -> list[list[float]]:
        shared = [s for size, s in groups for _ in range(size)]
        share = max(shared) > 0
        cache, mask = None, None
        if share:
            firsts, at = [], 0
            for size, length in groups:
                firsts.append(heads[rows[at]][:length])
                at += size
            _, cache, mask = self._forward(firsts, keep=1)
        group_of = [g for g, (size, _) in enumerate(groups) for _ in range(size)]
        bodies = [heads[n][s:] for n, s in zip(rows, shared, strict=True)]
        totals: list[list[float]] = [[] for _ in rows]
        for part in self._even(bodies):
            own: tuple[Any, Tensor | None] = (None, None)
            if mask is not None:
                index = torch.tensor([group_of[r] for r in part], device=mask.device)
                own = select(cache, index), mask[index]
            values = self._score_part([bodies[r] for r in part], [tails[rows[r]] for r in part], *own)
            for r, row in zip(part, values, strict=True):
                totals[r] = row
        return totals

    def _plan(self, heads: list[list[int]], order: list[int]) -> list[tuple[list[int], int]]:
        return plan(heads, order) if self.share_prefixes else [([n], 0) for n in order]

    def _even(self, bodies: list[list[int]]) -> Iterator[list[int]]:
        """Places of ``bodies`` in parts of like length, each large enough to be worth a forward of its own."""
        enough = 256 if self.device.type == "cpu" else 8192
        part: list[int] = []
        for r in sorted(range(len(bodies)), key=lambda r: len(bodies[r])):
            width = len(bodies[r])
            if part and width > 1.2 * len(bodies[part[0]]) and width * len(part) >= enough:
                yield part
                part = []
            part.append(r)
        if part:
            yield part

    def _score_part(self, bodies: list[list[int]], tails: list[Sequence[Ids]], cache: Any,
                    mask: Tensor | None) -> list[list[float]]:
        """Log-probabilities of ``tails`` after ``bodies`` after what ``cache`` holds."""
        more = any(len(c) > 1 for row in tails for c in row)
        logits, kept, whole = self._forward(bodies, cache, mask, keep=1, use_cache=more or cache is not None)
        first = torch.log_softmax(logits[:, -1].float(), dim=-1)
        totals = [[0.0] * len(row) for row in tails]
        picks = [(r, k, ids[0]) for r, row in enumerate(tails) for k, ids in enumerate(row)]
        got = first[torch.tensor([p[0] for p in picks], device=first.device),
                    torch.tensor([p[2] for p in picks], device=first.device)].tolist()
        for (r, k, _), value in zip(picks, got, strict=True):
            totals[r][k] = value
        if more:
            self._add_tails(totals, tails, kept, whole)
        return totals

    def _add_tails(self, totals: list[list[float]], tails: list[Sequence[Ids]], cache: Any, mask: Tensor) -> None:
        """Add the log-probabilities of second and later tokens, given the cache after each row's prefix."""
        runs: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for r, row in enumerate(tails):
            for k, ids in enumerate(row):
                if len(ids) > 1:  # continuations that differ in the last token alone share one row
                    runs.setdefault((r, tuple(ids[:-1])), []).append(k)
        keys = list(runs)
        index = torch.tensor([r for r, _ in keys], device=mask.device)
        logits, _, _ = self._forward([list(ids) for _, ids in keys], select(cache, index), mask[index],
                                     keep=max(len(ids) for _, ids in keys), use_cache=True)
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        for j, (r, ids) in enumerate(keys):
            for k in runs[r, ids]:
                targets = torch.tensor(list(tails[r][k][1:]), device=log_probs.device)
                totals[r][k] += float(log_probs[j, -len(ids):].gather(1, targets[:, None]).sum())

    def _score_exact(self, heads: list[list[int]], tails: Sequence[Sequence[Ids]],
                     measured: Batching) -> list[list[float]]:
        """The careful way: nothing lies between the tokens of a row, and padding only after them."""
        order = sorted(range(len(heads)), key=lambda n: heads[n])
        by_shared: dict[int, list[int]] = {}
        for begin in range(0, len(order), STRETCH):
            stretch = order[begin:begin + STRETCH]
            for members, shared in self._plan(heads, stretch) if measured.shares else [(stretch, 0)]:
                by_shared.setdefault(shared, []).extend(members)
        totals = [[0.0] * len(row) for row in tails]
        for shared, rows in by_shared.items():
            flat = sorted(((n, run) for n in rows for run in dict.fromkeys(tuple(c[:-1]) for c in tails[n])),
                          key=lambda entry: len(heads[entry[0]]) + len(entry[1]))
            lengths = [len(heads[n]) + len(run) for n, run in flat]
            for part in self._parts(lengths, lambda at, end: measured.right):
                self._score_flat(heads, tails, flat[part], shared, totals)
        return totals

    def _parts(self, lengths: Sequence[int], together: Callable[[int, int], bool]) -> Iterator[slice]:
        """Divide rows, the shortest first, into batches of at most ``batch_tokens`` positions, or of one row.

        ``together(at, end)``: whether row ``end`` may be in the batch that begins with row ``at``.
        """
        at = 0
        while at < len(lengths):
            end = at + 1
            while end < len(lengths) and (end + 1 - at) * lengths[end] <= self.batch_tokens and together(at, end):
                end += 1
            yield slice(at, end)
            at = end

    def _score_flat(self, heads: list[list[int]], tails: Sequence[Sequence[Ids]],
                    flat: list[tuple[int, tuple[int, ...]]], shared: int, totals: list[list[float]]) -> None:
        """Fill in ``totals`` of the prefixes n and of their continuations that begin with a run, (n, run) in ``flat``.

        The first ``shared`` tokens of each prefix are forwarded once for all that have them.
        """
        firsts = {first: g for g, first in enumerate(dict.fromkeys(tuple(heads[n][:shared]) for n, _ in flat))}
        cache, mask = None, None
        if shared:
            _, cache, mask = self._forward([list(first) for first in firsts], keep=1, left=False)
        bodies = [[*heads[n][shared:], *run] for n, run in flat]
        for part in self._even(bodies):
            own: tuple[Any, Tensor | None] = (None, None)
            if mask is not None:
                index = torch.tensor([firsts[tuple(heads[flat[i][0]][:shared])] for i in part], device=mask.device)
                own = select(cache, index), mask[index]
            width = max(len(bodies[i]) for i in part)
            starts = [len(heads[flat[i][0]]) - shared - 1 for i in part]
            low = min(starts)
            logits, _, _ = self._forward([bodies[i] for i in part], *own, keep=width - low, left=False,
                                         use_cache=own[0] is not None)
            places = [(j, p) for j, i in enumerate(part) for p in range(starts[j], len(bodies[i]))]
            where = {place: m for m, place in enumerate(places)}
            j_of, p_of = (torch.tensor(column, device=logits.device) for column in zip(*places, strict=True))
            log_probs = torch.log_softmax(logits[j_of, p_of - low].float(), dim=-1)
            wanted = [(flat[i][0], k, [where[j, starts[j] + m] for m in range(len(c))], list(c))
                      for j, i in enumerate(part) for k, c in enumerate(tails[flat[i][0]])
                      if tuple(c[:-1]) == flat[i][1]]
            picked = iter(log_probs[torch.tensor([m for w in wanted for m in w[2]], device=logits.device),
                                    torch.tensor([t for w in wanted for t in w[3]], device=logits.device)].tolist())
            for n, k, _, ids in wanted:
                totals[n][k] = sum(next(picked) for _ in ids)

    def _forward(self, rows: Sequence[Sequence[int]], cache: Any = None, mask: Tensor | None = None, *, keep: int,
                 use_cache: bool = True, left: bool = True) -> tuple[Tensor, Any, Tensor]:
        """Forward ``rows`` after ``cache``, padded on the left with their positions given, or on the right without.

        Returns:
            logits (rows, keep, vocabulary) of the last ``keep`` positions, the cache, and the mask (rows, length)
            of what the cache holds.
        """
        ids, own = padded(rows, self.device, left=left)
        width = ids.shape[1]
        whole = own if mask is None else torch.cat([mask, own], dim=1)
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": whole, "use_cache": use_cache}
        if self._positions and left:
            arguments["position_ids"] = (whole.cumsum(1) - 1).clamp(min=0)[:, -width:]
        if self._keeps:
            arguments["logits_to_keep"] = min(keep, width)
        if cache is not None:
            arguments["past_key_values"] = cache
        if self._accepted is not None:
            arguments = {name: value for name, value in arguments.items() if name in self._accepted}
        with reading(self.model):
            out = self.model(**arguments)
        self.forwarded += ids.numel()
        return out.logits[:, -keep:], getattr(out, "past_key_values", None), whole

    # -- generation and embeddings --------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, prompts: list[str], max_tokens: int, stop: list[str] | None = None,
                 temperature: float = 0.0, seed: int = 0) -> list[str]:
        """See :meth:`LanguageModel.generate`; temperature 0 takes the likeliest token.

        Raises:
            ValueError: ``max_tokens`` below 1 or a negative temperature.
        """
        if max_tokens < 1 or temperature < 0:
            raise ValueError("generate: expected max_tokens >= 1 and temperature >= 0, got "
                             f"max_tokens={max_tokens!r}, temperature={temperature!r}")
        heads = [ids or [self._begin()] for ids in self._encoding.opened(prompts)]
        measured = self._check(max(map(len, heads), default=0) + max_tokens - 1)  # the last token is not read again
        generator = torch.Generator().manual_seed(seed)
        out = [""] * len(heads)
        order = sorted(range(len(heads)), key=lambda n: len(heads[n]))
        lengths = [len(heads[n]) + max_tokens for n in order]
        self.calls += len(heads)
        for part in self._parts(lengths, lambda at, end: measured.left or (
                measured.right and lengths[at] == lengths[end])):
            rows = order[part]
            for n, ids in zip(rows, self._generate([heads[n] for n in rows], rows, max_tokens, stop, temperature,
                                                   generator, measured), strict=True):
                self.tokens += len(heads[n]) + len(ids)
                out[n] = cut(self._text(ids), stop)
        return out

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _generate(self, heads: list[list[int]], numbers: Sequence[int], max_tokens: int, stop: list[str] | None,
                  temperature: float, generator: torch.Generator, measured: Batching) -> list[list[int]]:
        ends = self._ends()
        generated: list[list[int]] = [[] for _ in heads]
        live = [True] * len(heads)
        rows, cache, mask = heads, None, None
        continues = measured.continues
        for _ in range(max_tokens):
            logits, cache, mask = self._forward(rows, cache, mask, keep=1, left=measured.left,
                                                use_cache=continues)
            last = logits[:, -1].float()
            for r, highest in enumerate(last.amax(-1).tolist()):
                # some models rule tokens out by minus infinity
                if live[r] and not math.isfinite(highest):
                    raise not_finite(self.name, "logits", highest, numbers[r], self.detokenize(heads[r]))
            if temperature > 0:
                probabilities = torch.softmax(last / temperature, dim=-1).cpu()
                picked = torch.multinomial(probabilities, 1, generator=generator)[:, 0].tolist()
            else:
                picked = last.argmax(-1).tolist()
            for r, token in enumerate(picked):
                if live[r] and token in ends:
                    live[r] = False
                elif live[r]:
                    generated[r].append(token)
                    text = self._text(generated[r]) if stop else ""
                    live[r] = not any(s in text for s in stop or ())
            if not any(live):
                break
            rows = [[token] for token in picked]
            if not continues:  # a model without a cache that can be continued starts over each time
                heads = [[*head, token] for head, token in zip(heads, picked, strict=True)]
                rows, cache, mask = heads, None, None
        return generated

    def _ends(self) -> set[int]:
        ends: set[int] = set()
        for value in (getattr(getattr(self._inner, "generation_config", None), "eos_token_id", None),
                      getattr(self.tokenizer, "eos_token_id", None)):
            ends.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
        return ends

    @torch.no_grad()
    def embed(self, texts: list[str]) -> np.ndarray:
        """The mean of the last hidden states over each text's tokens, float32 of shape (n, hidden)."""
        import numpy as np

        rows = [ids + self._encoding.end or [self._begin()] for ids in self._encoding.opened(texts)]
        measured = self._check(max(map(len, rows), default=0))
        out: list[Any] = [None] * len(rows)
        self.calls += len(rows)
        self.tokens += sum(map(len, rows))
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        for part in self._parts([len(rows[n]) for n in order], lambda at, end: measured.right):
            # nothing after a token reaches it in a causal model
            ids, mask = padded([rows[n] for n in order[part]], self.device, left=False)
            model = unwrapped(self.model)
            headless = model.base_model is not model  # a few families keep their body under another name
            with reading(model):
                output = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False,
                                          output_hidden_states=not headless)
            hidden = output.last_hidden_state if headless else output.hidden_states[-1]
            self.forwarded += ids.numel()
            weight = mask[..., None].to(hidden.dtype)
            mean = ((hidden * weight).sum(1) / weight.sum(1)).float().cpu().numpy()
            for r, n in enumerate(order[part]):
                out[n] = mean[r]
                if not np.isfinite(mean[r]).all():
                    raise not_finite(self.name, "hidden states", "others", n, texts[n])
        return np.stack(out) if out else np.zeros((0, 0), dtype=np.float32)


def padded(rows: Sequence[Ids], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of ids in one tensor, and where they are, both int64 (rows, longest); padded on the left or on the right.

    The padding's id is never looked at: it is masked as a key, and its own output is not read.
    """
    width = max(map(len, rows))
    ids, own = torch.zeros(2, len(rows), width, dtype=torch.long)
    for r, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[r, place] = torch.tensor(row, dtype=torch.long)
        own[r, place] = 1
    return ids.to(device), own.to(device)


def plan(heads: Sequence[Ids], order: Sequence[int]) -> list[tuple[list[int], int]]:
    """Group rows that begin alike so that the fewest tokens are forwarded.

    With rows sorted, the common beginnings form a tree; each node is either one group (its common part once, then
    the rest of every row) or what its children are, whichever is cheaper.

    Args:
        heads: all rows.
        order: indices of the rows to plan for, sorted by content.

    Returns:
        (row indices, length of the common beginning) per group. At least one token of each row is left to forward.
    """
    common = [_common(heads[a], heads[b]) for a, b in itertools.pairwise(order)]

    def best(low: int, high: int) -> tuple[int, list[tuple[list[int], int]]]:
        rows = list(order[low:high])
        total = sum(len(heads[n]) for n in rows)
        if len(rows) == 1:
            return total, [(rows, 0)]
        least = min(common[low:high - 1])
        # Two rows may be equal, or one the beginning of another: the last token must still give logits.
        length = min(least, min(len(heads[n]) for n in rows) - 1)
        together = total - length * (len(rows) - 1)
        cuts = [i + 1 for i in range(low, high - 1) if common[i] == least]
        cost = 0
        groups: list[tuple[list[int], int]] = []
        for a, b in zip([low, *cuts], [*cuts, high], strict=True):
            part_cost, part = best(a, b)
            cost += part_cost
            groups += part
        return (together, [(rows, length)]) if length > 0 and together <= cost else (cost, groups)

    return _merge_single(best(0, len(order))[1]) if order else []


def _merge_single(groups: list[tuple[list[int], int]]) -> list[tuple[list[int], int]]:
    return [(rows, 0 if len(rows) == 1 else length) for rows, length in groups]


def _common(a: Ids, b: Ids) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def _distinct(tails: Sequence[Ids]) -> int:
    """How many rows of their own the continuations need beside the prefix's."""
    return max(1, len({tuple(c[:-1]) for c in tails if len(c) > 1}))


def cut(text: str, stop: Sequence[str] | None) -> str:
    """``text`` up to the first of ``stop``."""
    places = [text.find(s) for s in stop or () if s and s in text]
    return text[:min(places)] if places else text


def _same_length(prefixes: Sequence[Any], continuations: Sequence[Any]) -> None:
    if len(prefixes) != len(continuations):
        raise ValueError(f"expected one list of continuations for each of {len(prefixes)} prefixes, got "
                         f"{len(continuations)}")
