"""MInference as an attention backend, and the files that give each head its pattern: ours, and the authors'."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from looseleaf import AttentionBackend, AttentionCall, Paper
from looseleaf.attention.call import Phase
from looseleaf.errors import did_you_mean
from looseleaf.files import write_text
from looseleaf.plugin import In, OneOf
from looseleaf_minference import search
from looseleaf_minference.patterns import DEFAULT, NAMES, Keys, Pattern, Selector, layer_of
from looseleaf_minference.search import VERTICAL_SLASH, Assignment

OFFICIAL_NAMES = {"stream_llm": "a_shape", "vertical_and_slash": "vertical_slash", "block_sparse": "block_sparse"}
OFFICIAL_BLOCKS = 100
"""The authors' code gives every block-sparse head 100 blocks, whatever its file says."""


@dataclasses.dataclass
class MInference(AttentionBackend):
    """Causal prefill with one of three sparse patterns for each head, found once per model (arXiv 2407.02490).

    Decode steps, bidirectional calls, masks of the caller's own and short prompts are computed exactly.

    Args:
        last_q: how many of the last queries decide which columns and diagonals matter.
        starting_layer: layers before this one are exact.
        config: the pattern of each head: a file of :meth:`save` or of the authors' code, or what such a file holds;
            None: 1000 columns and 6096 diagonals for all heads until :meth:`calibrate` or :meth:`load`.
        min_length: keys up to which attention is exact.
        block_size: tokens of a block: 16, 32, 64 or 128.
        forced_columns: number of first columns that are always among the columns of a head.
        forced_offsets: number of nearest diagonals that are always among the diagonals of a head.
    """

    last_q: Annotated[int, In(">= 1")] = 64
    starting_layer: Annotated[int, In(">= 0")] = 0
    config: Any = None
    min_length: Annotated[int, In(">= 1")] = 1024
    block_size: Annotated[int, OneOf(16, 32, 64, 128)] = 64
    forced_columns: Annotated[int, In(">= 0")] = 30
    forced_offsets: Annotated[int, In(">= 1")] = 100
    phases: ClassVar[frozenset[Phase]] = frozenset({"prefill"})
    paper: ClassVar[Paper] = Paper(
        title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
        authors=("Huiqiang Jiang", "Yucheng Li", "Chengruidong Zhang", "Qianhui Wu", "Xufang Luo", "Surin Ahn",
                 "Zhenhua Han", "Amir H. Abdi", "Dongsheng Li", "Chin-Yew Lin", "Yuqing Yang", "Lili Qiu"),
        year=2024, arxiv="2407.02490", venue="NeurIPS 2024", code="https://github.com/microsoft/MInference",
        summary="Shorter time to first token on long prompts; the pattern of each head is calibrated once.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.assignment: Assignment | None = None if self.config is None else read(self.config)

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """All three patterns in each of the kit's two layers, in blocks small enough for its 384 tokens."""
        heads = [["a_shape", 20, 40], ["vertical_slash", 40, 60], ["block_sparse", 5, 0], ["vertical_slash", 64, 50]]
        config = {layer: dict(enumerate(heads)) for layer in range(2)}
        return {"make": lambda: cls(config=config, min_length=48, block_size=16, last_q=16, forced_offsets=20)}

    def validate(self) -> None:
        self.check("config", self.config is None or isinstance(self.config, (str, Path, Mapping, Sequence)),
                   "None, a path, or the content of a configuration file")

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention over the keys of each head's pattern, (B, Hq, Lq, D), in the dtype of the query.

        Raises:
            ValueError: the configuration is for another number of layers or heads.
        """
        if call.phase != "prefill" or not call.is_causal:
            return call.fall_back("only causal prefill is sparse")
        if call.mask is not None:
            return call.fall_back("a mask of the caller's own")
        layer = layer_of(call)
        if layer < self.starting_layer:
            return call.fall_back("a layer before starting_layer")
        patterns = self.patterns(call, layer)
        if call.shape[4] <= self.min_length or not call.shape[3]:
            return call.fall_back(f"no longer than {self.min_length} tokens")
        keys = self.select(call, patterns)
        density = keys.density()
        call.record(density=density.mean(), density_by_head=density.mean(0), **{
            f"{name}_heads": sum(p.name == name for p in patterns) / len(patterns) for name in NAMES})
        return keys.attention(call)

    def patterns(self, call: AttentionCall, layer: int) -> list[Pattern]:
        """The pattern of each query head of a layer.

        Raises:
            ValueError: the configuration is for another number of layers or heads.
        """
        heads = call.shape[1]
        if self.assignment is None:
            return [DEFAULT] * heads
        remedy = "Make one for this model with calibrate()"
        layers = getattr(getattr(call.module, "config", None), "num_hidden_layers", None)
        configured = len(self.assignment)
        if layers is not None and layers != configured:
            raise ValueError(f"config: expected {layers} layers, as the model has, got {configured}. {remedy}")
        if layer >= configured:
            raise ValueError(f"config: expected layer {layer}, which the model calls, among its layers, got "
                             f"{configured} layers. {remedy}")
        if len(self.assignment[layer]) != heads:
            raise ValueError(f"config: expected {heads} heads in layer {layer}, as the model has, got "
                             f"{len(self.assignment[layer])}. {remedy}")
        return self.assignment[layer]

    @property
    def selector(self) -> Selector:
        """How keys are selected, by the fields of this backend."""
        return Selector(self.block_size, self.last_q, self.min_length, self.forced_columns, self.forced_offsets)

    def select(self, call: AttentionCall, patterns: Sequence[Pattern]) -> Keys:
        """What each query block of a causal call attends to; ``patterns`` has one for each query head."""
        first, second = (torch.tensor([getattr(p, size) for p in patterns], device=call.query.device)
                         for size in ("first", "second"))
        return self.selector.keys(call, [p.name for p in patterns], first, second)

    def calibrate(self, model: torch.nn.Module, batches: Iterable[Any], *,
                  candidates: Sequence[Pattern | tuple[str, int, int]] = VERTICAL_SLASH, match_flops: bool = True,
                  density: float | None = None, error: str = "relative_l2", progress: bool | None = None) -> None:
        """Find the pattern of each head (section 3.2, algorithm 1): run each candidate, keep the one nearest to dense.

        Args:
            model: a transformers decoder, or anything that :func:`looseleaf.attach` takes.
            batches: dicts of model inputs, or one, longer than ``min_length``; the paper takes one long text.
            candidates: patterns, or tuples (name, first, second): :data:`VERTICAL_SLASH`, as nearly all heads have in
                the files that the authors publish, or :data:`CANDIDATES`, all three patterns of the paper.
            match_flops: first give all candidates of a head the same cost, counted in score elements of the kernels
                and of the estimation of the indices, by making their sizes larger or smaller; on the first batch.
            density: that cost, as a fraction of all causal blocks, in (0, 1]; None: the median cost of the candidates
                as given, and 0.5 at most.
            error: ``relative_l2``, or ``count`` of output elements that differ by more than 5e-3, as one search of the
                authors' code has it.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: no batch was long enough for this method, or an argument is out of range.
        """
        self.assignment = search.calibrate(self.selector, model, batches, candidates, match_flops=match_flops,
                                           density=density, error=error, progress=progress)

    def save(self, path: str | Path) -> None:
        """Write the pattern of each head as JSON, ``{layer: {head: [pattern, first, second, score]}}``, atomically.

        Raises:
            ValueError: there is none yet.
        """
        if self.assignment is None:
            raise ValueError("there is no pattern to save: run calibrate() or load() first")
        content = {str(layer): {str(h): [p.name, p.first, p.second, p.score] for h, p in enumerate(heads)}
                   for layer, heads in enumerate(self.assignment)}
        write_text(path, json.dumps(content, indent=1) + "\n")

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote, or a file of the authors' code.

        Raises:
            ValueError: the first layer and head that cannot be read, and why.
        """
        self.assignment = read(path)


def read(source: str | Path | Mapping[Any, Any] | Sequence[Any]) -> Assignment:
    """The pattern of each head from a file, or from what such a file holds.

    Args:
        source: a path; ``{layer: {head: [pattern, n_v, n_s, score]}}``, the format of :meth:`MInference.save`; or a
            list over layers of ``{head: [type, n_v, n_s, score]}``, the format of the authors' code. A list may also
            hold lists, of rows in our format or of :class:`Pattern`.

    Raises:
        ValueError: the first layer and head that cannot be read, and why.
    """
    where = ""
    if isinstance(source, (str, Path)):
        where = f"{source}: "
        try:
            source = json.loads(Path(source).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"config: expected an existing file, got {str(source)!r}. Make one with calibrate() and "
                             "save(), or leave config=None") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{where}expected JSON, got {error}") from None
    if not isinstance(source, (Mapping, Sequence)) or not len(source):
        raise ValueError(f"{where}config: expected {{layer: {{head: [pattern, n_v, n_s, score]}}}} or a list over "
                         f"layers of {{head: [...]}}, got {source!r}")
    listed = not isinstance(source, Mapping)
    layers = _in_order(source, f"{where}config", "layer") if isinstance(source, Mapping) else list(source)
    assignment: Assignment = []
    for number, heads in enumerate(layers):
        place = f"{where}layer {number}"
        if not isinstance(heads, (Mapping, Sequence)) or isinstance(heads, str) or not len(heads):
            raise ValueError(f"{place}: expected {{head: [pattern, n_v, n_s, score]}}, got {heads!r}")
        rows = _in_order(heads, place, "head") if isinstance(heads, Mapping) else list(heads)
        official = listed and isinstance(heads, Mapping)
        assignment.append([_pattern(row, f"{place}, head {h}", official) for h, row in enumerate(rows)])
    return assignment


def _in_order(entries: Mapping[Any, Any], place: str, what: str) -> list[Any]:
    """The values by the numbers 0, 1, 2 ... that are their keys."""
    numbered: dict[int, Any] = {}
    for key, value in entries.items():
        try:
            numbered[int(key)] = value
        except (TypeError, ValueError):
            raise ValueError(f"{place}: expected integers >= 0 as the names of its {what}s, got {key!r}") from None
    missing = [i for i in range(len(numbered)) if i not in numbered]
    if missing:
        raise ValueError(f"{place}: expected {what}s 0 to {len(numbered) - 1}, got no {what} {missing[0]}")
    return [numbered[i] for i in range(len(numbered))]


def _pattern(row: Any, place: str, official: bool) -> Pattern:
    if isinstance(row, Pattern):
        return row
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) not in (3, 4):
        raise ValueError(f"{place}: expected [pattern, n_v, n_s, score], got {row!r}")
    name, first, second, score = (*row, 0.0)[:4]
    known = {**OFFICIAL_NAMES, **{n: n for n in NAMES}}
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{place}: expected the pattern {', '.join(known)}, got {name!r}."
                         f"{did_you_mean(str(name), known)}")
    name = known[name]
    if official and name == "block_sparse":
        first, second = OFFICIAL_BLOCKS, 0
    try:
        return Pattern(name, first, second, float(score))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None
