"""Levelled probabilistic context-free grammars: sampling, and exact likelihoods, posteriors and predictions.

The symbols of a level expand into symbols of the next level only, so nothing is recursive: a document is finite, and
the stack of symbols still to be expanded takes finitely many values. Read from left to right each of the K^D grammars
is thus a hidden Markov model whose states are those stacks, and its forward algorithm gives the probabilities of all
prefixes of many texts in one go. :func:`inside` computes the same numbers level by level, one text at a time.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Expansion = tuple[float, tuple[int, ...]]
"""Probability of a rule, and the symbols of the next level that it writes."""
Rules = tuple[tuple[tuple[tuple[Expansion, ...], ...], ...], ...]
"""``rules[level][set][symbol]`` are the expansions of a symbol under one rule set of its level."""
SCHEMA = "looseleaf.levelled-pcfg/1"
STACKS = 200_000
"""Most states of all grammars together; more would take minutes a document."""
TOGETHER = 32
"""Texts that are read side by side: as many as keep the working memory in the processor's caches."""


class Document(NamedTuple):
    """A text and the rule sets that wrote it.

    Attributes:
        text: terminals, integers from 0 on, without the end of the text.
        metadata: ``j``: the rule set used at each level, from the root down.
    """

    text: tuple[int, ...]
    metadata: tuple[int, ...]


@dataclass(frozen=True)
class LevelledPCFG:
    """A family of grammars over D levels, one for each choice of a rule set at every level.

    Args:
        rules: ``rules[level][set][symbol]``: a list of ``(probability, symbols of the next level)``. Every level has
            the same number K of rule sets; level 0 has one symbol, the root.

    Raises:
        ValueError: probabilities that do not sum to 1, unknown symbols, empty expansions, or levels that do not fit.
    """

    rules: Rules

    def __post_init__(self) -> None:
        rules = tuple(tuple(tuple(tuple((float(p), tuple(map(int, text))) for p, text in expansions)
                                  for expansions in symbols) for symbols in sets) for sets in self.rules)
        object.__setattr__(self, "rules", rules)
        if not rules or not rules[0]:
            raise ValueError("rules: expected one level or more, each with one rule set or more, got none")
        for level, sets in enumerate(rules):
            if len(sets) != len(rules[0]):
                raise ValueError(f"level {level}: expected {len(rules[0])} rule sets as at level 0, got {len(sets)}")
            wanted = 1 if level == 0 else self.symbols[level]
            following = self.symbols[level + 1] if level + 1 < len(rules) else None
            for k, symbols in enumerate(sets):
                if len(symbols) != wanted:
                    what = "1 symbol, the root" if level == 0 else f"{wanted} symbols as in its other rule sets"
                    raise ValueError(f"level {level}, rule set {k}: expected {what}, got {len(symbols)}")
                for symbol, expansions in enumerate(symbols):
                    _check(f"level {level}, rule set {k}, symbol {symbol}", expansions, following)

    @classmethod
    def random(cls, levels: int = 5, *, symbols: Sequence[int] = (), rule_sets: int = 2, rules_per_symbol: int = 2,
               rule_lengths: Sequence[int] = (2, 3), seed: int = 0) -> LevelledPCFG:
        """Random rules of equal probability.

        Within a rule set no two rules write the same symbols, so that an expansion has one origin; rule sets are drawn
        independently and may share rules. Lengths are drawn first, evenly. The sizes are this project's.

        Args:
            levels: D.
            symbols: number of symbols of each level, root and terminals included; empty: 1, then 3 at every level.
            rule_sets: K.
            rules_per_symbol: rules of each symbol in each rule set.
            rule_lengths: lengths that rules may have.
            seed: random seed of the rules.

        Raises:
            ValueError: a value out of range, or too few different expansions for so many rules.
        """
        sizes = tuple(symbols) or (1, *[3] * levels)
        for name, value in (("levels", levels), ("rule_sets", rule_sets), ("rules_per_symbol", rules_per_symbol)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        if len(sizes) != levels + 1 or sizes[0] != 1 or min(sizes) < 1:
            raise ValueError(f"symbols: expected {levels + 1} numbers >= 1 for {levels} levels, the first of them 1, "
                             f"got {sizes}")
        if not rule_lengths or min(rule_lengths) < 1:
            raise ValueError(f"rule_lengths: expected integers >= 1, got {tuple(rule_lengths)}")
        draw = np.random.default_rng(seed)
        rules = []
        for size, following in itertools.pairwise(sizes):
            pools = {length: list(itertools.product(range(following), repeat=length)) for length in set(rule_lengths)}
            needed, there = size * rules_per_symbol, sum(map(len, pools.values()))
            if needed > there:
                raise ValueError(f"rules_per_symbol: expected at most {there // size}, as {following} symbols make "
                                 f"{there} expansions of the lengths {tuple(rule_lengths)}, got {rules_per_symbol}")
            sets = []
            for _ in range(rule_sets):
                left = {length: list(pool) for length, pool in pools.items()}
                texts: list[tuple[int, ...]] = []
                while len(texts) < needed:
                    pool = left[int(draw.choice(rule_lengths))]
                    if pool:
                        texts.append(pool.pop(int(draw.integers(len(pool)))))
                sets.append(tuple(tuple((1 / rules_per_symbol, text) for text in texts[n:n + rules_per_symbol])
                                  for n in range(0, needed, rules_per_symbol)))
            rules.append(tuple(sets))
        return cls(tuple(rules))

    @property
    def levels(self) -> int:
        """D: how many levels have rules, which is also how many numbers the metadata are."""
        return len(self.rules)

    @property
    def rule_sets(self) -> int:
        """K: rule sets of each level."""
        return len(self.rules[0])

    @property
    def symbols(self) -> tuple[int, ...]:
        """Number of symbols of each level, from the root to the terminals."""
        last = 1 + max(max(text) for symbols in self.rules[-1] for expansions in symbols for _, text in expansions)
        return (*(len(sets[0]) for sets in self.rules), last)

    @property
    def terminals(self) -> int:
        """Number of terminals; the end of the text has this number in predictions."""
        return self.symbols[-1]

    @property
    def longest(self) -> int:
        """Terminals of the longest text."""
        return math.prod(max(len(text) for symbols in sets for expansions in symbols for _, text in expansions)
                         for sets in self.rules)

    @cached_property
    def metadata(self) -> np.ndarray:
        """All values of the metadata in the order of posteriors, int64 (K^D, D)."""
        return np.array(list(itertools.product(range(self.rule_sets), repeat=self.levels)))

    def index(self, metadata: Sequence[int]) -> np.ndarray:
        """Which of the K^D grammars have metadata that begin so, bool (K^D,); empty metadata: all.

        Raises:
            ValueError: more numbers than levels, or a rule set that does not exist.
        """
        j = tuple(metadata)
        if len(j) > self.levels or not all(0 <= k < self.rule_sets for k in j):
            raise ValueError(f"metadata: expected at most {self.levels} integers in [0, {self.rule_sets - 1}], got {j}")
        return np.asarray((self.metadata[:, :len(j)] == np.array(j, dtype=np.int64)).all(1))

    def sample(self, count: int, *, seed: int = 0, metadata: Sequence[int] | None = None) -> list[Document]:
        """Draw documents.

        Args:
            count: how many.
            seed: random seed.
            metadata: of all of them; None: drawn evenly for each document.

        Raises:
            ValueError: no document, or metadata that do not exist or are not one number for each level.
        """
        if count < 1:
            raise ValueError(f"count: expected an integer >= 1, got {count!r}")
        draw = np.random.default_rng(seed)
        if metadata is None:
            j = draw.integers(self.rule_sets, size=(count, self.levels))
        else:
            self.index(metadata)
            if len(metadata) != self.levels:
                raise ValueError(f"metadata: expected {self.levels} integers, one for each level, got {metadata!r}")
            j = np.tile(np.array(metadata), (count, 1))
        of, text = np.arange(count), np.zeros(count, dtype=np.int64)
        for level in range(self.levels):
            limits, strings, lengths = self._tables[level]
            k = j[of, level]
            rule = (draw.random(len(text))[:, None] >= limits[k, text]).sum(1)
            filled = np.arange(strings.shape[-1]) < lengths[k, text, rule][:, None]
            of = np.broadcast_to(of[:, None], filled.shape)[filled]
            text = strings[k, text, rule][filled]
        ends = np.cumsum(np.bincount(of, minlength=count))[:-1]
        return [Document(tuple(part.tolist()), tuple(own.tolist()))
                for part, own in zip(np.split(text, ends), j, strict=True)]

    def scan(self, texts: Sequence[Sequence[int]]) -> Scan:
        """Probabilities of all prefixes of many texts under all K^D grammars.

        A token that is no terminal makes a text impossible. Memory: 8 bytes x texts x (longest + 1) x K^D x
        (terminals + 1); give it parts of a large set.

        Raises:
            ValueError: no text.
        """
        if not len(texts):
            raise ValueError("texts: expected one text or more, got none")
        n, lengths = len(texts), torch.tensor([len(text) for text in texts])
        width, grammars = int(lengths.max()), len(self.metadata)
        tokens = torch.full((n, width), -1)
        for row, text in zip(tokens, texts, strict=True):
            row[:len(text)] = torch.tensor([int(x) for x in text])
        log_prefix = torch.zeros(n, width + 1, grammars, dtype=torch.float64)
        following = torch.zeros(n, width + 1, grammars, self.terminals + 1, dtype=torch.float64)
        for first in range(0, n, TOGETHER):
            part = slice(first, first + TOGETHER)
            self._forward(tokens[part], log_prefix[part], following[part])
        rows = torch.arange(n)
        log_prob = log_prefix[rows, lengths] + following[rows, lengths, :, -1].log()
        return Scan(self, lengths, log_prefix, log_prob, following)

    def log_prob(self, text: Sequence[int], metadata: Sequence[int] = ()) -> float:
        """Logarithm of the probability of a whole text in nats; -inf where no derivation writes it.

        Args:
            text: terminals.
            metadata: j, or its first numbers: the others are averaged over.
        """
        return self._average(self.scan([text]).log_prob[0], metadata)

    def prefix_log_prob(self, text: Sequence[int], metadata: Sequence[int] = ()) -> float:
        """Logarithm of the probability that a text begins with ``text``, see :meth:`log_prob`."""
        return self._average(self.scan([text]).log_prefix[0, len(text)], metadata)

    def posterior(self, prefix: Sequence[int]) -> np.ndarray:
        """P(j | the text begins so), float64 (K, ..., K) with one axis for each level.

        Raises:
            ValueError: no text begins so.
        """
        return self.scan([prefix]).posterior()[0, len(prefix)].view((self.rule_sets,) * self.levels).numpy()

    def predict(self, prefix: Sequence[int], metadata: Sequence[int] = ()) -> np.ndarray:
        """The Bayes-optimal prediction of the next token, float64 (terminals + 1,), the end of the text last.

        Args:
            prefix: terminals so far.
            metadata: what is known of j: all of it, its first numbers, or nothing.

        Raises:
            ValueError: no text begins so, given the metadata; or metadata that do not exist.
        """
        self.index(metadata)
        return self.scan([prefix]).predict([tuple(metadata)])[0, len(prefix)].numpy()

    def derives(self, text: Sequence[int], metadata: Sequence[int] = ()) -> bool:
        """Whether a grammar whose metadata begin so writes this text; without metadata: whether any does."""
        return self.log_prob(text, metadata) > -math.inf

    def to_json(self) -> str:
        """The rules as JSON text."""
        return json.dumps({"schema": SCHEMA, "rules": self.rules})

    @classmethod
    def from_json(cls, text: str) -> LevelledPCFG:
        """A grammar from what :meth:`to_json` wrote.

        Raises:
            ValueError: other JSON.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"expected a grammar of the schema {SCHEMA!r}, got "
                             f"{data.get('schema') if isinstance(data, dict) else type(data).__name__!r}")
        return cls(data["rules"])

    def _forward(self, tokens: Tensor, log_prefix: Tensor, following: Tensor) -> None:
        """The forward algorithm on texts (N, T), padded with -1; fills what is zeros, see :class:`Scan`.

        Few states are possible at a time, so that these alone are kept: as pairs of a text and a state.
        """
        chains, (n, width) = self._chains, tokens.shape
        grammars, states = len(self.metadata), len(chains.owner)
        first = chains.start.nonzero()[:, 0]
        text, state = torch.arange(n).repeat_interleave(len(first)), first.repeat(n)
        weight = chains.start[state]
        sums, last = torch.zeros(n * states, dtype=torch.float64), torch.zeros(n * states, dtype=torch.long)
        for t in range(width + 1):
            grammar, terminal = chains.owner[state], chains.terminal[state]
            coming = torch.zeros(n * grammars * self.terminals, dtype=torch.float64)
            coming.index_add_(0, (text * grammars + grammar) * self.terminals + terminal, weight)
            following[:, t, :, :-1] = coming.view(n, grammars, -1)
            if t == width:
                return
            here = terminal == tokens[text, t]
            text, state, weight = text[here], state[here], weight[here]
            place = text * grammars + chains.owner[state]
            total = torch.zeros(n * grammars, dtype=torch.float64).index_add_(0, place, weight)
            log_prefix[:, t + 1] = log_prefix[:, t] + total.view(n, grammars).log()
            weight = weight / total[place]
            ending = torch.zeros(n * grammars, dtype=torch.float64).index_add_(0, place, weight * chains.ends[state])
            following[:, t + 1, :, -1] = ending.view(n, grammars)
            # one entry for each edge that leaves a possible state
            count = chains.edges[state]
            origin = torch.arange(len(state)).repeat_interleave(count)
            edge = chains.first[state][origin] + torch.arange(len(origin)) - (count.cumsum(0) - count)[origin]
            text, state, weight = text[origin], chains.target[edge], weight[origin] * chains.probability[edge]
            # where several lead to one state, the last of them takes the sum
            at, number = text * states + state, torch.arange(len(text))
            last[at] = number
            sums.index_add_(0, at, weight)
            weight = sums[at]
            sums[at] = 0.0
            once = last[at] == number
            text, state, weight = text[once], state[once], weight[once]

    def _average(self, log_probs: Tensor, metadata: Sequence[int]) -> float:
        """Mean probability over the grammars whose metadata begin so, as a logarithm."""
        mask = torch.from_numpy(self.index(metadata))
        return float(log_probs[mask].logsumexp(0) - math.log(int(mask.sum())))

    @cached_property
    def _tables(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """By level: where rules end in [0, 1), what they write (padded), and how much; (K, symbols, rules, ...)."""
        out = []
        for sets in self.rules:
            flat = [expansions for symbols in sets for expansions in symbols]
            most, longest = max(map(len, flat)), max(len(text) for expansions in flat for _, text in expansions)
            limits = np.ones((len(flat), most))
            strings, lengths = np.zeros((len(flat), most, longest), int), np.zeros((len(flat), most), int)
            for n, expansions in enumerate(flat):
                sums = np.cumsum([p for p, _ in expansions])
                # the last rule ends at 1 exactly, whatever rounding says: 2 is never reached
                limits[n, :len(expansions)], limits[n, len(expansions) - 1:] = sums, 2.0
                for r, (_, text) in enumerate(expansions):
                    strings[n, r, :len(text)], lengths[n, r] = text, len(text)
            shape = (len(sets), len(sets[0]))
            out.append(tuple(a.reshape(*shape, *a.shape[1:]) for a in (limits, strings, lengths)))
        return out  # type: ignore[return-value]

    @cached_property
    def _chains(self) -> _Chains:
        """All grammars as hidden Markov models, side by side."""
        terminal: list[int] = []
        owner: list[int] = []
        ends: list[float] = []
        start: list[float] = []
        moves: dict[tuple[int, int], float] = {}
        for g, metadata in enumerate(self.metadata.tolist()):
            first = len(terminal)
            states: dict[tuple[int, Stack], int] = {}
            expansions = _expansions([sets[k] for sets, k in zip(self.rules, metadata, strict=True)])
            begin = expansions[0][0]
            pending = list(dict.fromkeys((x, stack) for _, x, stack in begin))
            states.update((state, first + n) for n, state in enumerate(pending))
            moved: list[tuple[int, tuple[int, Stack], float]] = []
            while pending:
                state = pending.pop()
                for p, following in _successors(expansions, state[1]):
                    if following not in states:
                        states[following] = first + len(states)
                        pending.append(following)
                    moved.append((states[state], following, p))
                if first + len(states) > STACKS:
                    raise ValueError(f"expected grammars of at most {STACKS} states together, got more: choose fewer "
                                     "levels, rule sets, rules or shorter rules")
            for origin, following, p in moved:
                at = (origin, states[following])
                moves[at] = moves.get(at, 0.0) + p
            terminal += [x for x, _ in states]
            owner += [g] * len(states)
            ends += [float(not any(stack)) for _, stack in states]
            weights = dict.fromkeys(states, 0.0)
            for p, x, stack in begin:
                weights[x, stack] += p
            start += weights.values()
        edges = sorted(moves)
        count = torch.bincount(torch.tensor([origin for origin, _ in edges], dtype=torch.long),
                               minlength=len(terminal))
        return _Chains(
            torch.tensor(start, dtype=torch.float64), torch.tensor(terminal), torch.tensor(owner),
            torch.tensor(ends, dtype=torch.float64), count, count.cumsum(0) - count,
            torch.tensor([target for _, target in edges], dtype=torch.long),
            torch.tensor([moves[edge] for edge in edges], dtype=torch.float64))


@dataclass(frozen=True)
class Scan:
    """What N texts of at most T terminals tell of G = K^D grammars.

    Attributes:
        grammar: the grammars.
        lengths: int64 (N,).
        log_prefix: log P(x_<t | j) in nats, float64 (N, T + 1, G); of no meaning behind the end of a text.
        log_prob: log P(x | j), the end included, float64 (N, G).
        following: P(x_t | x_<t, j), float64 (N, T + 1, G, terminals + 1), the end of the text last; zeros under
            grammars that write no text which begins so.
    """

    grammar: LevelledPCFG
    lengths: Tensor
    log_prefix: Tensor
    log_prob: Tensor
    following: Tensor

    def posterior(self) -> Tensor:
        """P(j | x_<t) under even odds at the start, float64 (N, T + 1, G); zeros behind the end of a text.

        Raises:
            ValueError: a text that no grammar writes.
        """
        return self._given(self.log_prefix)

    def marginals(self) -> Tensor:
        """P(j_d | x_<t), float64 (N, T + 1, D, K); raises as :meth:`posterior`."""
        chosen = torch.nn.functional.one_hot(torch.from_numpy(self.grammar.metadata), self.grammar.rule_sets)
        return torch.einsum("ntg,gdk->ntdk", self.posterior(), chosen.double())

    def predict(self, metadata: Sequence[Sequence[int]] | None = None) -> Tensor:
        """P(x_t | x_<t, what is known of j), float64 (N, T + 1, terminals + 1), the end of the text last.

        Args:
            metadata: what is known of each text's j: its first numbers, possibly none; None: nothing of any.

        Raises:
            ValueError: a text that no grammar writes which has these metadata.
        """
        weights = self.log_prefix
        if metadata is not None:
            masks = torch.from_numpy(np.stack([self.grammar.index(j) for j in metadata]))
            weights = weights.masked_fill(~masks[:, None], -torch.inf)
        return torch.einsum("ntg,ntgv->ntv", self._given(weights), self.following)

    def _given(self, log_weights: Tensor) -> Tensor:
        inside = torch.arange(log_weights.shape[1]) <= self.lengths[:, None]
        impossible = (log_weights.isneginf().all(-1) & inside).any(1)
        if impossible.any():
            raise ValueError(f"text {int(impossible.nonzero()[0])}: expected one that a grammar with these metadata "
                             "writes, got one that none does")
        return log_weights.softmax(-1).masked_fill(~inside[..., None], 0.0)


def inside(grammar: LevelledPCFG, text: Sequence[int], metadata: Sequence[int], *, prefix: bool = False) -> float:
    """P(text | j), or P(a text begins so | j), by the inside algorithm, level by level: the plain reference.

    ``whole[a][s, e]`` is the probability that symbol ``a`` writes ``text[s:e]``; ``begun[a][s]`` that what it writes
    goes on at least to the end of ``text[s:]``, which is not empty, and agrees with it.
    """
    size, j = len(text), tuple(metadata)
    if not size:
        return 1.0 if prefix else 0.0
    whole = [np.zeros((size + 1, size + 1)) for _ in range(grammar.terminals)]
    begun = [np.zeros(size + 1) for _ in range(grammar.terminals)]
    for s, x in enumerate(text):
        if 0 <= x < grammar.terminals:
            whole[x][s, s + 1] = 1.0
            begun[x][s] = float(s == size - 1)
    for sets, k in zip(reversed(grammar.rules), reversed(j), strict=True):
        whole_above, begun_above = [], []
        for expansions in sets[k]:
            all_of_it, beginning = np.zeros((size + 1, size + 1)), np.zeros(size + 1)
            for p, symbols in expansions:
                before = np.eye(size + 1)  # the children so far write text[s:u]
                for symbol in symbols:
                    beginning += p * before @ begun[symbol]
                    before = before @ whole[symbol]
                all_of_it += p * before
            whole_above.append(all_of_it)
            begun_above.append(beginning)
        whole, begun = whole_above, begun_above
    return float(begun[0][0] if prefix else whole[0][0, size])


def enumerate_texts(grammar: LevelledPCFG, metadata: Sequence[int]) -> dict[tuple[int, ...], float]:
    """Every text of one grammar with its probability; for grammars of few texts, as their number grows very fast."""
    below: list[dict[tuple[int, ...], float]] = [{(x,): 1.0} for x in range(grammar.terminals)]
    for sets, k in zip(reversed(grammar.rules), reversed(tuple(metadata)), strict=True):
        above = []
        for expansions in sets[k]:
            texts: dict[tuple[int, ...], float] = {}
            for p, symbols in expansions:
                for parts in itertools.product(*(below[symbol].items() for symbol in symbols)):
                    text = tuple(itertools.chain.from_iterable(own for own, _ in parts))
                    texts[text] = texts.get(text, 0.0) + p * math.prod(q for _, q in parts)
            above.append(texts)
        below = above
    return below[0]


Stack = tuple[tuple[int, ...], ...]
"""The symbols of levels 1 to D still to be expanded, level by level, leftmost first."""


class _Chains(NamedTuple):
    """Hidden Markov models side by side, S states and E edges in all.

    ``start``, ``ends`` (S,): probability of the first state, and of no further one; ``terminal``, ``owner`` (S,): what
    a state writes, and of which grammar it is; ``edges``, ``first`` (S,): how many edges leave a state, and the first
    of them; ``target``, ``probability`` (E,).
    """

    start: Tensor
    terminal: Tensor
    owner: Tensor
    ends: Tensor
    edges: Tensor
    first: Tensor
    target: Tensor
    probability: Tensor


def _expansions(rules: Sequence[Sequence[Sequence[Expansion]]]) -> list[list[list[tuple[float, int, Stack]]]]:
    """By level and symbol, what it may begin with: probability, first terminal, what is left to expand below it."""
    last = 1 + max(max(text) for expansions in rules[-1] for _, text in expansions)
    out: list[list[list[tuple[float, int, Stack]]]] = [[[(1.0, terminal, ())] for terminal in range(last)]]
    for symbols in reversed(rules):
        above = []
        for expansions in symbols:
            sums: dict[tuple[int, Stack], float] = {}
            for p, text in expansions:
                for q, terminal, stack in out[0][text[0]]:
                    state = (terminal, (text[1:], *stack))
                    sums[state] = sums.get(state, 0.0) + p * q
            above.append([(p, *state) for state, p in sums.items()])
        out.insert(0, above)
    return out


def _successors(expansions: list[list[list[tuple[float, int, Stack]]]],
                stack: Stack) -> Iterator[tuple[float, tuple[int, Stack]]]:
    """The states behind one with this stack; none where the text ends."""
    place = max((n for n, symbols in enumerate(stack) if symbols), default=None)
    if place is None:
        return
    symbol, *rest = stack[place]
    for p, terminal, below in expansions[place + 1][symbol]:
        yield p, (terminal, (*stack[:place], tuple(rest), *below))


def _check(where: str, expansions: Sequence[Expansion], following: int | None) -> None:
    """Raise ValueError for rules of a symbol that are none."""
    if not expansions or any(not math.isfinite(p) or p < 0 for p, _ in expansions) or \
            abs(sum(p for p, _ in expansions) - 1) > 1e-9:
        raise ValueError(f"{where}: expected probabilities >= 0 that sum to 1, got {[p for p, _ in expansions]}")
    for _, text in expansions:
        if not text or min(text) < 0 or (following is not None and max(text) >= following):
            limit = f"in [0, {following - 1}]" if following is not None else ">= 0"
            raise ValueError(f"{where}: expected one symbol of the next level or more, integers {limit}, got {text}")


__all__ = ["Document", "LevelledPCFG", "Scan", "enumerate_texts", "inside"]
