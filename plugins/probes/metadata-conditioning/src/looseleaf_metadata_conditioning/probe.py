"""The probe: from which length of the prompt on do metadata pay, on one's own model or in the exact toy world."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import torch

from looseleaf import Paper, Probe, Report, Series
from looseleaf.plugin import In
from looseleaf.probes.subject import parts
from looseleaf.statistics import Interval, bootstrap
from looseleaf_metadata_conditioning.collator import MetadataCollator
from looseleaf_metadata_conditioning.grammar import LevelledPCFG
from looseleaf_metadata_conditioning.measures import (
    continuations,
    fit_probe,
    hidden_states,
    share_derived,
    token_losses,
)
from looseleaf_metadata_conditioning.training import (
    excess_loss,
    grammar_collator,
    grammar_rows,
    level_names,
    small_llama,
    train,
    vocabulary_size,
)

Row = Mapping[str, Any]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LEAST = 8
"""Fewest documents that a probe is fitted on, and scored on."""


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents with metadata, and how they become tokens.

    Attributes:
        rows: ``input_ids`` or ``text``, and the fields of the collator.
        collator: makes prefixes; its ``share`` is of no meaning here.
        end: token that ends a document; None: continuations have all the tokens allowed.
        derives: ``(continued tokens, row) -> bool``: whether a continuation is a document that the row's source could
            have written. None: continuations are not checked.
        most: most tokens of a continuation.
        grammar: what wrote the documents, whose fields are the levels from the root down and whose terminals are the
            tokens: the exact posterior is then shown beside the probes.
    """

    rows: Sequence[Row]
    collator: MetadataCollator
    end: int | None = None
    derives: Callable[[list[int], Row], bool] | None = None
    most: int = 64
    grammar: LevelledPCFG | None = None

    @classmethod
    def of(cls, grammar: LevelledPCFG, count: int, depth: int, seed: int = 0) -> Documents:
        """Fresh documents of a grammar, for a model that was trained with ``grammar_collator(grammar, depth)``."""
        names = level_names(grammar)
        return cls(grammar_rows(grammar, grammar.sample(count, seed=seed)), grammar_collator(grammar, depth),
                   grammar.terminals, lambda text, row: grammar.derives(text, [row[name] for name in names]),
                   grammar.longest + 1, grammar)


@dataclasses.dataclass
class MetadataProbe(Probe):
    """From which prompt length on does it pay to tell a model a document's source (arXiv 2504.17562)?

    Args:
        fields: metadata of the rows, in the order of the prefix; empty: all that rows have beside text and input_ids.
        template: text of the prefix, such as ``"Genre: {genre}\\n"``; empty: one line with all fields.
        prompt_lengths: tokens of a document that are read before the metadata are guessed, or it is continued.
        layers: indices of the decoder layers that are probed; empty for all.
        documents: how many are drawn where the data are the built-in grammar.
        max_tokens: longest sequence; documents lose their end.
        levels: D of the built-in grammar; 5 in the paper [memory].
        symbols: symbols of each level, root and terminals included; empty: 1, then 3 at every level (ours).
        rule_sets: K of the built-in grammar; 2 in the paper [2nd].
        rules_per_symbol: rules of a symbol in a rule set (ours).
        rule_lengths: lengths of rules; 2 and 3 in the paper [memory].
        depths: levels that are told in training, one small model each, where the subject is None; 0: never any. Those
            of the default that are above ``levels`` are left out.
        share: fraction of the training documents that have metadata [memory].
        cooldown: last fraction of the steps without metadata, as an arm of its own at the largest depth; 0: no such
            arm.
        steps: training steps of a small model.
        batch: documents of a step.
        hidden: width of the small models; 768 in the paper [2nd].
        hidden_layers: their layers; 12 in the paper [2nd].
        lr: their highest learning rate (ours).
    """

    fields: tuple[str, ...] = ()
    template: str = ""
    prompt_lengths: Annotated[tuple[int, ...], In(">= 1")] = (1, 5, 10, 25, 50)
    layers: tuple[int, ...] = ()
    documents: Annotated[int, In(f">= {2 * LEAST}")] = 256
    max_tokens: Annotated[int, In(">= 2")] = 256
    levels: Annotated[int, In(">= 1")] = 5
    symbols: tuple[int, ...] = ()
    rule_sets: Annotated[int, In(">= 2")] = 2
    rules_per_symbol: Annotated[int, In(">= 1")] = 2
    rule_lengths: Annotated[tuple[int, ...], In(">= 1")] = (2, 3)
    depths: Annotated[tuple[int, ...], In(">= 0")] = (0, 1, 3, 5)
    share: Annotated[float, In("[0, 1]")] = 0.5
    cooldown: Annotated[float, In("[0, 1)")] = 0.1
    steps: Annotated[int, In(">= 1")] = 2000
    batch: Annotated[int, In(">= 1")] = 64
    hidden: Annotated[int, In(">= 16")] = 64
    hidden_layers: Annotated[int, In(">= 1")] = 3
    lr: Annotated[float, In("> 0")] = 4e-3
    paper: ClassVar[Paper] = Paper(
        title="When Does Metadata Conditioning (NOT) Work for Language Model Pre-Training? A Study with Context-Free "
              "Grammars",
        authors=("Rei Higuchi", "Ryotaro Kawata", "Naoki Nishikawa", "Kazusato Oko", "Shoichiro Yamaguchi",
                 "Sosuke Kobayashi", "Seiya Tokui", "Kohei Hayashi", "Daisuke Okanohara", "Taiji Suzuki"),
        year=2025, arxiv="2504.17562", venue="COLM 2025",
        summary="From which prompt length on does it pay to tell a model where a document comes from?")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: few documents of a small grammar."""
        return {"make": lambda: cls(levels=2, documents=24, depths=(0, 2), prompt_lengths=(1, 3))}

    def validate(self) -> None:
        """See :meth:`looseleaf.Plugin.validate`."""
        self.check("prompt_lengths", bool(self.prompt_lengths), "one length or more")
        self.check("layers", isinstance(self.layers, (tuple, list)) and all(isinstance(i, int) for i in self.layers),
                   "a tuple of indices, empty for all layers")
        self.check("fields", not isinstance(self.fields, str), "a tuple of names")
        if self.levels != type(self).levels and self.depths == type(self).depths:
            self.depths = tuple(d for d in self.depths if d <= self.levels)
        self.check("depths", bool(self.depths) and max(self.depths) <= self.levels,
                   f"integers in [0, {self.levels}], as there are {self.levels} levels")

    def grammar(self, seed: int = 0) -> LevelledPCFG:
        """The built-in grammar of a seed."""
        return LevelledPCFG.random(self.levels, symbols=self.symbols, rule_sets=self.rule_sets, seed=seed,
                                   rules_per_symbol=self.rules_per_symbol, rule_lengths=self.rule_lengths)

    def run(self, subject: Any, data: Documents | Sequence[Row] | None = None, *, seed: int = 0,
            progress: bool | None = None) -> Report:
        """Losses with metadata in front and without, by position; what the layers know of the metadata; continuations.

        Args:
            subject: a causal language model of transformers, with its tokenizer unless ``data`` is
                :class:`Documents` of tokens; a text pipeline or a LocalModel. None: a small model for each of
                ``depths`` is trained on the built-in grammar, and all of them are measured.
            data: rows with ``text`` and metadata, or :class:`Documents`. None: documents of the built-in grammar,
                written in letters.
            seed: of the grammar, the split into documents that probes are fitted on and scored on, the draws and the
                trained models.
            progress: show progress bars; None: only on a terminal.

        Raises:
            TypeError: another subject.
            ValueError: no tokenizer, rows without the fields, too few documents, or metadata of one value.
            UnsupportedModelError: the model's layers could not be found.
        """
        if subject is None:
            return self._run_small(data, seed, progress)
        documents, model = data, None
        if isinstance(data, Documents):
            model, _ = parts(subject)
        else:
            model, tokenizer = parts(subject, needs="tokenizer")
            rows = _letters(self.grammar(seed), self.documents, seed) if data is None else data
            documents = Documents(rows, self._collator(rows, tokenizer), getattr(tokenizer, "eos_token_id", None))
        assert isinstance(documents, Documents)
        report = Report("Metadata in front of the text", {
            "documents": len(documents.rows), "fields": ", ".join(documents.collator.fields),
            "model": type(model).__name__, "seed": seed})
        show_losses(report, model, documents, progress)
        show_probes(report, model, documents, self.prompt_lengths, self.layers, seed, progress)
        if documents.derives is not None:
            show_continuations(report, model, documents, self.prompt_lengths, seed, progress)
        return report

    def _collator(self, rows: Any, tokenizer: Any) -> MetadataCollator:
        if isinstance(rows, (str, Mapping)) or not len(rows) or not isinstance(rows[0], Mapping):
            raise ValueError("data: expected None, Documents, or rows such as {'text': ..., 'genre': ...}, got "
                             f"{type(rows).__name__}")
        fields = tuple(self.fields) or tuple(n for n in rows[0] if n not in ("text", "input_ids", "attention_mask"))
        if not fields:
            raise ValueError(f"data: expected rows with metadata beside the text, got {', '.join(rows[0])}")
        template = self.template or "; ".join(f"{name}: {{{name}}}" for name in fields) + "\n"
        return MetadataCollator(fields, template=template, tokenizer=tokenizer, max_length=self.max_tokens)

    def _run_small(self, data: Any, seed: int, progress: bool | None) -> Report:
        """Train a small model for each depth, and measure each as it is tested in the paper: without metadata."""
        if data is not None:
            raise ValueError("data: expected None without a subject, as small models are trained on the built-in "
                             f"grammar, got {type(data).__name__}")
        grammar = self.grammar(seed)
        report = Report("Metadata conditioning: small models on a levelled grammar", {
            **{n: v for n, v in self.hyperparameters().items() if n not in ("fields", "template", "max_tokens")},
            "tokens of the longest document": grammar.longest, "seed": seed})
        rows = grammar_rows(grammar, grammar.sample(self.steps * self.batch, seed=seed + 1))
        table = report.table(
            "Excess loss", ["trained with", "tested without metadata", "low", "high", "tested with its metadata", "low",
                            "high"],
            note="KL of the model's prediction from the exact one, nats a token; means over documents, 95 % bootstrap. "
                 "Exact: without metadata, and with as many levels as the model is told")
        fresh = grammar.sample(self.documents, seed=seed + 2)
        curves = []
        for name, depth, cooldown in self.arms():
            model = small_llama(vocabulary_size(grammar), hidden=self.hidden, layers=self.hidden_layers, seed=seed)
            train(model, rows, grammar_collator(grammar, depth, self.share, seed), batch=self.batch, lr=self.lr,
                  cooldown=cooldown, label=name, progress=progress)
            without = excess_loss(model, grammar, fresh, 0)
            told = excess_loss(model, grammar, fresh, depth) if depth else without
            table.add(name, *_mean(without), *(_mean(told) if depth else (None, None, None)))
            curves.append(Series(name, list(range(without.shape[1])), without.nanmean(0).tolist(), style="line"))
            own = Documents.of(grammar, self.documents, depth, seed + 2)
            part = Report(name)
            show_losses(part, model, own, progress)
            show_probes(part, model, own, self.prompt_lengths, self.layers, seed, progress)
            show_continuations(part, model, own, self.prompt_lengths, seed, progress)
            report.extend(part, prefix=f"{name}: ")
        report.figure("Excess loss without metadata at test", x_label="terminals read", y_label="KL, nats",
                      series=curves)
        return report

    def arms(self) -> list[tuple[str, int, float]]:
        """The small models: name, levels told in training, and last fraction of steps without any."""
        arms = [("no metadata" if depth == 0 else f"{depth} of {self.levels} levels", depth, 0.0)
                for depth in self.depths]
        deepest = max(self.depths)
        if self.cooldown and deepest:
            arms.append((f"{deepest} of {self.levels} levels, cooldown", deepest, self.cooldown))
        return arms


def show_losses(report: Report, model: Any, documents: Documents, progress: bool | None = None) -> None:
    """Loss without the metadata, with them, and the difference, by position."""
    rows, collator = documents.rows, documents.collator
    plain = token_losses(model, rows, collator, False, progress=progress)
    told = token_losses(model, rows, collator, True, progress=progress)
    # compared on the same tokens: a first token that nothing precedes has no loss without a prefix
    pairs = [(a[:n], np.where(np.isnan(a[:n]), np.nan, b[:n])) for a, b in zip(plain, told, strict=True)
             for n in (min(len(a), len(b)),) if n]
    longest = max(len(a) for a, _ in pairs)
    table = report.table("Loss by position", [
        "tokens", "documents", "without metadata", "with metadata", "gain", "low", "high"],
        note="nats a token; gain: what the metadata in front take off; means over documents, 95 % bootstrap")
    bins: list[tuple[int, int, Interval]] = []
    edges = [0, *(2 ** n for n in range(longest.bit_length())), longest]
    for low, high in [*itertools.pairwise(edges), (0, longest)]:
        means = [(np.nanmean(a[low:high]), np.nanmean(b[low:high])) for a, b in pairs
                 if len(a) > low and np.isfinite(a[low:high]).any()]
        if not means:
            continue
        gain = bootstrap([a - b for a, b in means])
        last = low == 0 and high == longest
        table.add("all" if last else _span(low, high), len(means),
                  *(float(m) for m in np.mean(means, 0)), *gain)
        if not last:
            bins.append((low, high, gain))
        else:
            report.facts["gain of the metadata, nats a token"] = f"{gain:.4f}"
    report.facts["tokens where the metadata pay"] = ", ".join(
        _span(low, high) for low, high, gain in bins if gain.low > 0) or "none"
    report.figure("Gain of the metadata by position", x_label="token of the document", y_label="nats", x_log=True,
                  series=[Series("loss without less loss with", [(low + 1 + high) / 2 for low, high, _ in bins],
                                 [g.value for *_, g in bins], [g.low for *_, g in bins], [g.high for *_, g in bins])])


def show_probes(report: Report, model: Any, documents: Documents, lengths: Sequence[int], layers: Sequence[int] = (),
                seed: int = 0, progress: bool | None = None) -> None:
    """Accuracy of linear probes for each field, by prompt length and layer, without metadata in front.

    Probes are fitted on one half of the documents and scored on the other.
    """
    names = list(documents.collator.fields)
    values = [sorted({row[name] for row in documents.rows}, key=str) for name in names]
    for name, seen in zip(names, values, strict=True):
        if len(seen) < 2:
            raise ValueError(f"{name}: expected documents of two values or more, got {seen}: leave the field out")
    labels = torch.tensor([[seen.index(row[name]) for name, seen in zip(names, values, strict=True)]
                           for row in documents.rows])
    states, modules = hidden_states(model, documents.rows, documents.collator, lengths, layers, progress=progress)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    fit, score = order[:len(order) // 2], order[len(order) // 2:]
    ceiling = exact_guesses(documents, lengths) if documents.grammar is not None else None
    table = report.table("Probes of the metadata", [
        "field", "tokens read", "documents", "majority", *(["exact posterior"] if ceiling is not None else []),
        "last layer", "low", "high", "best layer", "its accuracy"],
        note="accuracy of logistic regressions on documents that they were not fitted on, 95 % bootstrap over "
             "documents; majority: the class most frequent among those fitted on. The best layer is chosen on the "
             "documents scored, so that its accuracy is a little high")
    skipped: dict[int, int] = {}
    curves: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    images: dict[str, list[list[float]]] = {name: [] for name in names}
    for place, length in enumerate(lengths):
        there = ~states[-1, place].isnan().any(-1)
        a, b = fit[there[fit]], score[there[score]]
        if int((~there).sum()):
            skipped[length] = int((~there).sum())
        usable = [n for n in range(len(names)) if len(a) >= LEAST <= len(b) and len(labels[a, n].unique()) > 1]
        if not usable:
            continue
        classes = [len(values[n]) for n in usable]
        right = torch.stack([fit_probe(layer[a], labels[a][:, usable], classes).predict(layer[b]) ==
                             labels[b][:, usable] for layer in states[:, place]]).double()
        for at, n in enumerate(usable):
            by_layer = right[..., at].mean(1)
            last = bootstrap(right[-1, :, at].tolist())
            majority = float((labels[b, n] == labels[a, n].mode().values).double().mean())
            exact = [] if ceiling is None else [float((ceiling[b, place, n] == labels[b, n]).double().mean())]
            best = int(by_layer.argmax())
            table.add(names[n], length, len(b), majority, *exact, *last, modules[best], float(by_layer[best]))
            curves[names[n]][0].append(float(length))
            curves[names[n]][1].append(last.value)
            images[names[n]].append(by_layer.tolist())
    if not table.rows:
        raise ValueError(f"documents: expected {2 * LEAST} or more with {min(lengths)} tokens or more, got fewer of "
                         f"{len(labels)}: give more or longer documents, or smaller prompt_lengths")
    report.facts["documents shorter than a prompt length (skipped)"] = ", ".join(
        f"{count} at {length}" for length, count in skipped.items()) or "none"
    report.figure("Accuracy of the probes, last layer", x_label="tokens read", y_label="accuracy", x_log=True,
                  series=[Series(name, x, y) for name, (x, y) in curves.items()])
    report.figure("Accuracy of the probes by layer", x_label="layer", y_label="prompt length, from the shortest",
                  panels={name: image for name, image in images.items() if image})


def exact_guesses(documents: Documents, lengths: Sequence[int]) -> torch.Tensor:
    """The likeliest value of each level under the exact posterior, int64 (N, lengths, D); -1 behind a document."""
    grammar = documents.grammar
    assert grammar is not None
    scan = grammar.scan([[x for x in row["input_ids"] if x < grammar.terminals] for row in documents.rows])
    guesses = scan.marginals().argmax(-1)
    out = torch.full((len(guesses), len(lengths), grammar.levels), -1)
    for place, length in enumerate(lengths):
        there = scan.lengths >= length
        if there.any():
            out[there, place] = guesses[there, length]
    return out


def show_continuations(report: Report, model: Any, documents: Documents, lengths: Sequence[int], seed: int = 0,
                       progress: bool | None = None) -> None:
    """Which fraction of continuations ``documents.derives`` accepts, by prompt length, without metadata and with."""
    derives, rows = documents.derives, documents.rows
    assert derives is not None
    table = report.table("Continuations", ["tokens given", "documents", "right without metadata", "low", "high",
                                           "right with metadata", "low", "high"],
                         note="drawn at temperature 1; fraction that the document's own source could have written, "
                              "95 % bootstrap over documents")
    series: dict[str, list[Interval]] = {"without metadata": [], "with metadata": []}
    used = []
    for length in lengths:
        intervals = []
        for shown in (False, True):
            texts = continuations(model, rows, documents.collator, length, documents.end, documents.most, shown=shown,
                                  seed=seed, progress=progress)
            right = share_derived(texts, lambda n, text: derives(text, rows[n]))
            if right:
                intervals.append(bootstrap(right))
        if len(intervals) == 2:
            used.append(float(length))
            table.add(length, len(right), *intervals[0], *intervals[1])
            for own, interval in zip(series.values(), intervals, strict=True):
                own.append(interval)
    report.figure("Continuations that their source could have written", x_label="tokens given", y_label="fraction",
                  x_log=True, series=[Series(name, used, [i.value for i in own], [i.low for i in own],
                                             [i.high for i in own]) for name, own in series.items()])


def _span(low: int, high: int) -> str:
    """Tokens ``low + 1`` to ``high`` in words."""
    return f"{low + 1} to {high}" if high > low + 1 else str(high)


def _letters(grammar: LevelledPCFG, count: int, seed: int) -> list[dict[str, Any]]:
    """Documents of a grammar as text, a letter for each terminal, so that any tokenizer reads them."""
    names = level_names(grammar)
    return [{"text": " ".join(LETTERS[x % len(LETTERS)] for x in text), **dict(zip(names, metadata, strict=True))}
            for text, metadata in grammar.sample(count, seed=seed)]


def _mean(losses: torch.Tensor) -> Interval:
    return bootstrap(losses.nanmean(1).tolist())


__all__ = ["Documents", "MetadataProbe", "exact_guesses", "show_continuations", "show_losses", "show_probes"]
