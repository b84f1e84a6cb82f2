"""Sparsifiner as an attention backend, and what all methods with a list of keys for each row share."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from looseleaf import AttentionBackend, AttentionCall, Paper, Report, attach
from looseleaf.attention.call import Phase
from looseleaf.files import load_tensors, save_tensors
from looseleaf.modes import evaluating, own_random_state
from looseleaf.plugin import In
from looseleaf_kernels import row_sparse_attention
from looseleaf_sparsifiner.predictor import Predictor, budget, index_of, macs, top_keys
from looseleaf_sparsifiner.training import WARMUP, Observer, distill, run_model, train_predictors

if TYPE_CHECKING:
    from torch.nn import Module

ELEMENTS = 1 << 24
"""Guessed scores held at a time, unless one row of all items and heads has more."""
LONG, BREAK_EVEN = 1024, 0.03
"""From how many tokens on, and up to which fraction of the keys, gathering keys is faster than a mask on a CPU."""
FORMAT = "looseleaf.sparsifiner/1"
SETTINGS = ("prefix_tokens", "scale")


@dataclasses.dataclass
class RowKeys(AttentionBackend):
    """Each row attends to its own few keys, those that a subclass finds most important; softmax over these alone.

    The first ``prefix_tokens`` rows (class token, registers) attend to everything; their columns have no privilege.
    Causal calls, cross attention and masks of the caller's own are computed exactly.

    Args:
        keep_rate: fraction of the keys that each row keeps, in (0, 1]; rounded up.
        prefix_tokens: tokens before the patches, whose rows are full.
        compute_with: ``masked`` for dense attention under a mask, ``gather`` for the kernel that reads kept keys alone;
            ``auto``: the faster of the two by our measurements, which is the mask but for few keys of many.
    """

    keep_rate: Annotated[float, In("(0, 1]")] = 0.25
    prefix_tokens: Annotated[int, In(">= 0")] = 1
    compute_with: Literal["auto", "masked", "gather"] = "auto"
    phases: ClassVar[frozenset[Phase]] = frozenset({"bidirectional"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._watched: dict[int, Tensor] | None = None

    @abstractmethod
    def importance(self, call: AttentionCall, start: int, stop: int) -> Tensor:
        """How important all keys are to the rows from ``start`` to ``stop``, broadcastable to (B, H, rows, N)."""

    def tokens(self, call: AttentionCall) -> int:
        """The number of tokens that the method is for in a layer; by default that of the tensors."""
        return call.shape[3]

    def alive(self, call: AttentionCall) -> Tensor | None:
        """(B, N) bool, tokens that were not dropped in earlier layers; None: all."""
        return None

    def costs(self, call: AttentionCall, pairs: Any) -> dict[str, Any]:
        """Multiply-adds of an item, see :func:`looseleaf_sparsifiner.macs`; ``pairs``: kept ones of a head."""
        _, heads, kv_heads, tokens, _, head_dim = call.shape
        return macs(tokens, heads, head_dim, pairs, kv_heads=kv_heads, prefix=self.prefix_tokens)

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention over the kept keys, (B, H, N, D), in the dtype of the query; items of other lengths exactly."""
        if call.mask is not None:
            return call.fall_back("a mask of the caller's own")
        if call.is_causal or call.is_cross:
            return call.fall_back("causal or cross attention")
        tokens = self.tokens(call)
        whole = call.query_lengths is None and call.key_lengths is None
        if whole and call.shape[3] == call.shape[4] == tokens:
            return self.sparse(call, self.alive(call))
        fits = torch.ones_like(call.lengths()[0], dtype=torch.bool)
        for lengths in call.lengths():
            fits &= lengths == tokens
        if not bool(fits.any()):
            return call.fall_back(f"another number of tokens than {tokens}")
        out = call.query.new_zeros(*call.query.shape[:3], call.value.shape[-1])
        out[fits, :, :tokens] = self.sparse(_items(call, fits, tokens), self.alive(call))
        out[~fits] = _items(call, ~fits).dense()
        call.record(exact_items=int((~fits).sum()))
        return out

    def sparse(self, call: AttentionCall, alive: Tensor | None) -> Tensor:
        """:meth:`attend` for items without padding."""
        tokens, prefix = call.shape[3], self.prefix_tokens
        if prefix >= tokens:
            return call.fall_back(f"no more tokens than the {prefix} of the prefix")
        count = self.count(tokens, alive)
        gather = self.compute_with == "gather" or (
            self.compute_with == "auto" and tokens >= LONG and count <= BREAK_EVEN * tokens)
        if gather and self._watched is None:
            out, pairs = self._gathered(call, alive, count)
        else:
            full = torch.ones_like(call.query[:, :, :prefix, :1], dtype=torch.bool).expand(-1, -1, -1, tokens)
            if alive is not None:
                full = full & alive[:, None, None]
            mask = torch.cat([full, *self.kept(call, alive, count)], 2)
            pairs = torch.tensor(float((tokens - prefix) * count + prefix * tokens))
            if self.varies or alive is not None:
                pairs = mask.sum((2, 3)).float().mean()
            if self._watched is not None:
                self._watched[call.layer] = mask
            out = dataclasses.replace(call, mask=mask).dense()
        if alive is not None:
            out = out.masked_fill(~alive[:, None, :, None], 0)
        costs = self.costs(call, pairs)
        call.record(density=pairs / tokens ** 2, mega_macs=costs["total"] / 1e6, dense_mega_macs=costs["dense"] / 1e6)
        return out

    def count(self, tokens: int, alive: Tensor | None) -> int:
        """Keys of a row: of the budget, no more than there are alive."""
        count = budget(self.keep_rate, tokens)
        return count if alive is None else min(count, int(alive.sum(1).min()))

    @property
    def varies(self) -> bool:
        """Whether rows keep different numbers of keys."""
        return False

    def select(self, scores: Tensor, count: int) -> Tensor:
        """Which keys of (B, H, rows, N) scores are kept, bool."""
        return top_keys(scores, count)

    @torch.no_grad()
    def kept(self, call: AttentionCall, alive: Tensor | None, count: int) -> Iterator[Tensor]:
        """Masks of the rows behind the prefix, (B, H, rows, N) bool, some rows at a time."""
        batch, heads, _, tokens, _, _ = call.shape
        rows = max(1, ELEMENTS // (batch * heads * tokens))
        for start in range(self.prefix_tokens, tokens, rows):
            stop = min(tokens, start + rows)
            scores = self.importance(call, start, stop).expand(batch, heads, stop - start, tokens)
            if alive is not None:
                scores = scores.masked_fill(~alive[:, None, None], -torch.inf)
            yield self.select(scores, count)

    def _gathered(self, call: AttentionCall, alive: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        """Output and kept pairs of a head, by the kernel that reads the kept keys alone."""
        prefix, tokens = self.prefix_tokens, call.shape[3]
        parts = [index_of(mask) for mask in self.kept(call, alive, count)]
        longest = max(part.shape[-1] for part in parts)
        index = torch.cat([nn.functional.pad(part, (0, longest - part.shape[-1]), value=-1) for part in parts], 2)
        rows, _ = row_sparse_attention(call.query[:, :, prefix:], call.key, call.value, index, scale=call.scale)
        first = dataclasses.replace(call, query=call.query[:, :, :prefix],
                                    mask=None if alive is None else alive[:, None, None]).dense()
        seen = tokens if alive is None else alive.sum(1).float().mean()
        return torch.cat([first, rows], 2), (index >= 0).sum((2, 3)).float().mean() + prefix * seen

    @torch.no_grad()
    def masks(self, model: Any, batch: Any, layers: Any = None) -> dict[int, Tensor]:
        """The masks of every layer for one batch, layer -> (B, H, N, N) bool on the CPU; True: attended to.

        Args:
            model: what :func:`looseleaf.attach` takes, without a backend.
            batch: a dictionary of the model's arguments, or its only argument.
            layers: as for :func:`looseleaf.attach`.
        """
        self._watched = {}
        try:
            with evaluating(model), attach(model, self, layers):
                run_model(model, batch)
            return {layer: mask.cpu() for layer, mask in sorted(self._watched.items())}
        finally:
            self._watched = None


@dataclasses.dataclass
class Sparsifiner(RowKeys):
    """Attention of vision transformers in which each patch attends to the keys that a predictor guesses (2303.13755).

    The predictor of a layer is small, learned once by :meth:`calibrate` from the model's own attention, and made for
    one number of tokens: items with another one are computed exactly and counted, as are causal calls, cross attention
    and masks of the caller's own.

    Args:
        keep_rate: fraction of the keys that each patch keeps, in (0, 1]; rounded up (paper: 0.25).
        prefix_tokens: tokens before the patches: 1 for a class token, 5 for DINOv2 with registers, 0 for SigLIP. Their
            rows attend to everything, and nothing is guessed for them.
        compute_with: ``masked`` for dense attention under a mask, ``gather`` for the kernel that reads kept keys alone;
            ``auto``: the faster of the two by our measurements, which is the mask but for few keys of many [ours].
        reduce_n: tokens over mixtures of tokens in the predictor.
        reduce_c: head size over channels in the predictor.
        share_inout_proj: one matrix mixes tokens and turns coefficients into a map.
        basis_threshold: entries of the basis up to this size are 0.
        coef_topk: coefficients of a row that are not 0.
        mask_threshold: keep all keys with a larger guess, and the best one, instead of a ``keep_rate``; the authors'
            other rule, with 1e-4.
        token_rate: fraction of the patches that is kept behind each of ``token_layers``, of those before it.
        token_layers: layers, counted from 0, behind which the patches with the least attention of the first token are
            dropped: no later layer has them as keys, and their attention is 0.
        scale: factor of the predictor's scores; None: 1 / sqrt(heads), as in the authors' code.

    Attributes:
        modules: layer -> :class:`Predictor`; empty before :meth:`calibrate` or :meth:`load`.
        losses: of each step of the last :meth:`calibrate`.
    """

    reduce_n: Annotated[int, In(">= 1")] = 6
    reduce_c: Annotated[int, In(">= 1")] = 2
    share_inout_proj: bool = False
    basis_threshold: Annotated[float, In(">= 0")] = 0.02
    coef_topk: Annotated[int, In(">= 1")] = 8
    mask_threshold: Annotated[float | None, In(">= 0")] = None
    token_rate: Annotated[float, In("(0, 1]")] = 1.0
    token_layers: tuple[int, ...] = ()
    scale: Annotated[float | None, In("> 0")] = None
    paper: ClassVar[Paper] = Paper(
        title="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
        authors=("Cong Wei", "Brendan Duke", "Ruowei Jiang", "Parham Aarabi", "Graham W. Taylor", "Florian Shkurti"),
        year=2023, arxiv="2303.13755", venue="CVPR 2023", code="https://github.com/lim142857/Sparsifiner",
        summary="Vision transformers whose patches attend to the few keys that a small predictor guesses.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.losses: list[float] = []
        self._alive: dict[int, Tensor] = {}

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """Predictors with random weights for the kit's 384 tokens, of whatever head size the model has."""

        def make() -> Sparsifiner:
            backend = cls()

            def prepare(model: Any, geometry: Any) -> None:
                size = geometry.head_dim or 16  # the kit has a model that does not say
                if any(module.head_dim != size for module in backend.modules.values()) or not backend.modules:
                    with own_random_state(0):
                        backend.modules = {layer: backend.predictor(size, 384, 4) for layer in range(geometry.layers)}

            with own_random_state(0):
                backend.modules = {layer: backend.predictor(32, 384, 4) for layer in range(2)}
            vars(backend)["prepare"] = prepare
            return backend

        return {"make": make, "keeps_own_key": False}

    def validate(self) -> None:
        layers = self.token_layers
        self.check("token_layers", isinstance(layers, (tuple, list)) and all(
            isinstance(n, int) and n >= 0 for n in layers) and list(layers) == sorted(set(layers)),
            "different integers >= 0 in rising order")
        self.token_layers = tuple(layers)
        self.check("token_layers", not layers or self.prefix_tokens > 0, "none where no class token says what to drop")

    # ------------------------------------------------------------------------------------------------- the method
    def predictor(self, head_dim: int, tokens: int, heads: int, kv_heads: int | None = None) -> Predictor:
        """A new predictor, with random weights of torch's global generator, for layers of these sizes.

        Raises:
            ValueError: ``reduce_n`` or ``reduce_c`` leaves nothing.
        """
        return Predictor(head_dim, tokens, heads, kv_heads, reduce_n=self.reduce_n, reduce_c=self.reduce_c,
                         shared=self.share_inout_proj)

    def scale_for(self, heads: int) -> float:
        """Factor of the predictor's scores in a layer of so many heads."""
        return heads ** -0.5 if self.scale is None else self.scale

    def of_layer(self, call: AttentionCall) -> Predictor:
        """The predictor for the layer of a call.

        Raises:
            ValueError: there is none, or one for another head size.
        """
        if not self.modules:
            raise ValueError("Sparsifiner: expected predictors, got none. Run calibrate(model, batches) or load(path) "
                             "first")
        found = self.modules.get(call.layer)
        if found is None:
            raise ValueError(f"Sparsifiner: expected layer {call.layer}, which the model calls, among the calibrated "
                             f"layers, got {sorted(self.modules)}. Attach only those, or run calibrate() on this model")
        assert isinstance(found, Predictor)
        if found.head_dim != call.shape[5]:
            raise ValueError(f"Sparsifiner: expected heads of {found.head_dim} in layer {call.layer}, as calibrated, "
                             f"got {call.shape[5]}. Run calibrate() on this model")
        return found

    def tokens(self, call: AttentionCall) -> int:
        """The number of tokens of the calibration."""
        return self.of_layer(call).tokens

    def importance(self, call: AttentionCall, start: int, stop: int) -> Tensor:
        """The guessed attention of the rows from ``start`` to ``stop``, (B, H, rows, N)."""
        predictor = self.of_layer(call)
        coefficients = predictor.coefficients(call.query[:, :, start:stop], call.key, self.scale_for(call.shape[1]))
        return predictor.sparse_map(coefficients, self.basis_threshold, self.coef_topk)

    @property
    def varies(self) -> bool:
        """With a threshold rows keep different numbers of keys."""
        return self.mask_threshold is not None

    def select(self, scores: Tensor, count: int) -> Tensor:
        """The ``count`` largest scores, or those above the threshold and the largest, (B, H, rows, N) bool."""
        return top_keys(scores, count) if self.mask_threshold is None else (
            (scores > self.mask_threshold) | top_keys(scores, 1))

    def costs(self, call: AttentionCall, pairs: Any) -> dict[str, Any]:
        """Multiply-adds of an item, the predictor's included."""
        _, heads, kv_heads, tokens, _, head_dim = call.shape
        return self._macs(self.of_layer(call), heads, kv_heads, tokens, head_dim, pairs)

    def _macs(self, predictor: Predictor, heads: int, kv_heads: int, tokens: int, head_dim: int,
              pairs: Any) -> dict[str, Any]:
        return macs(tokens, heads, head_dim, pairs, kv_heads=kv_heads, rank=predictor.rank, width=predictor.width,
                    coefficients=min(self.coef_topk, predictor.rank), prefix=self.prefix_tokens,
                    basis_density=(predictor.basis(self.basis_threshold) > 0).float().mean())

    # ---------------------------------------------------------------------------------------------- dropped tokens
    def attend(self, call: AttentionCall) -> Tensor:
        """See :meth:`RowKeys.attend`; ValueError: no predictor for this layer."""
        self._alive.pop(call.layer, None)  # that of the last forward; a layer that falls back drops nothing
        return super().attend(call)

    def alive(self, call: AttentionCall) -> Tensor | None:
        """(B, N) bool, what earlier layers of ``token_layers`` left; None: everything."""
        before = [layer for layer in self.token_layers if layer < call.layer]
        return self._alive.get(before[-1]) if before else None

    def sparse(self, call: AttentionCall, alive: Tensor | None) -> Tensor:
        """Attention over the kept keys; behind a layer of ``token_layers`` also what is dropped from there on."""
        if call.layer in self.token_layers:
            self._alive[call.layer] = self.drop(call, alive)
        return super().sparse(call, alive)

    @torch.no_grad()
    def drop(self, call: AttentionCall, alive: Tensor | None) -> Tensor:
        """(B, N) bool, what is left behind this layer: the prefix, and the patches that the first token looks at most.

        The authors' code leaves dropped tokens a score of 0 in the row of the class token, and so a part of its
        attention; here they have none.
        """
        batch, heads, kv_heads, tokens, _, _ = call.shape
        prefix, rank = self.prefix_tokens, self.token_layers.index(call.layer) + 1
        key = call.key.repeat_interleave(heads // kv_heads, 1)
        scores = (call.query[:, :, :1] @ key.mT).float() * call.scale
        if alive is not None:
            scores = scores.masked_fill(~alive[:, None, None], -torch.inf)
        attention = torch.softmax(scores, -1).mean((1, 2))[:, prefix:]
        if alive is not None:
            attention = attention.masked_fill(~alive[:, prefix:], -1)
        kept = top_keys(attention, budget(self.token_rate ** rank, tokens - prefix))
        return torch.cat([torch.ones(batch, prefix, dtype=torch.bool, device=kept.device), kept], 1)

    # --------------------------------------------------------------------------------------------------- learning
    def calibrate(self, model: Module, batches: Any, *, layers: Any = None, epochs: int = 5,
                  lr: tuple[float, float] = (3e-4, 2e-4), warmup: float = WARMUP, weight_decay: float = 0.05,
                  reduction: Literal["sum", "mean"] = "sum", seed: int = 0, progress: bool | None = None) -> None:
        """Learn the predictors from the attention of the model, which stays dense and as it is (first stage).

        The loss is 0.01 times the mean over layers of the sum of squared differences between guessed and true
        attention of the patches. Its size grows with batch and tokens; AdamW's steps hardly depend on it.

        Args:
            model: what :func:`looseleaf.attach` takes.
            batches: the model's inputs: a dictionary of its arguments, its only argument, or several of these, such as
                a DataLoader; or a function that runs the model, given what ``attach`` returned.
            layers: as for :func:`looseleaf.attach`.
            epochs: how often ``batches`` are gone through.
            lr: learning rate after a linear warm-up, and the last one, along a cosine. With much larger ones all
                mixtures learn the same, and guesses hardly depend on the query.
            warmup: fraction of the steps of the warm-up.
            weight_decay: of AdamW.
            reduction: ``mean`` divides the loss by the number of entries of the maps.
            seed: of the first weights.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: no layer was seen that the method is for; ``reduce_n`` or ``reduce_c`` leaves nothing.
        """
        observer = Observer(self.predictor, self.scale_for, self.prefix_tokens, reduction)
        self.losses = train_predictors(model, observer, batches, layers=layers, epochs=epochs, lr=lr,
                                       warmup=warmup, weight_decay=weight_decay, seed=seed, progress=progress)
        self.modules = dict(sorted(observer.predictors.items()))

    def finetune(self, model: Module, batches: Any, teacher: Module | None = None, **options: Any) -> list[float]:
        """Adapt the model to its masks, the predictors frozen (second stage); see :func:`distill`."""
        return distill(model, self, batches, teacher, **options)

    def flops(self) -> Report:
        """Multiply-adds of the attention of each calibrated layer, dense and ours, for one item.

        The density of the basis is counted; ``mask_threshold`` and dropped tokens are not, as they depend on the item:
        ``attached.report()`` has the counts of what was computed.

        Raises:
            ValueError: not calibrated.
        """
        if not self.modules:
            raise ValueError("Sparsifiner.flops: expected predictors, got none. Run calibrate() or load() first")
        report = Report("Sparsifiner: multiply-adds of attention")
        table = report.table("Millions of multiply-adds for one item", [
            "layer", "tokens", "keys of a patch", "density of the basis", "dense", "ours", "predictor", "saved"])
        totals = {"dense": 0.0, "total": 0.0}
        for layer, found in self.modules.items():
            assert isinstance(found, Predictor)
            n, p, count = found.tokens, self.prefix_tokens, budget(self.keep_rate, found.tokens)
            cost = self._macs(found, found.heads, found.kv_heads, n, found.head_dim, (n - p) * count + p * n)
            cost = {name: float(value) for name, value in cost.items()}
            totals = {name: total + cost[name] for name, total in totals.items()}
            table.add(layer, n, count, float((found.basis(self.basis_threshold) > 0).float().mean()),
                      cost["dense"] / 1e6, cost["total"] / 1e6, (cost["total"] - cost["attention"]) / 1e6,
                      1 - cost["total"] / cost["dense"])
        report.facts |= {"keep rate": self.keep_rate, "dense, millions": totals["dense"] / 1e6,
                         "ours, millions": totals["total"] / 1e6, "saved": 1 - totals["total"] / totals["dense"]}
        return report

    # ------------------------------------------------------------------------------------------------------- files
    def save(self, path: str | Path) -> None:
        """Write the predictors to a safetensors file; ValueError: there are none."""
        if not self.modules:
            raise ValueError("Sparsifiner.save: expected predictors, got none. Run calibrate() first")
        sizes = {str(layer): [getattr(module, name) for name in ("head_dim", "tokens", "heads", "kv_heads")]
                 for layer, module in self.modules.items()}
        tensors = {f"{layer}.{name}": tensor for layer, module in self.modules.items()
                   for name, tensor in module.state_dict().items()}
        save_tensors(path, tensors, {**{name: getattr(self, name) for name in SETTINGS}, "layers": sizes},
                     format=FORMAT)

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: something else, or predictors for another ``prefix_tokens`` or ``scale``.
        """
        tensors, info = load_tensors(path, format=FORMAT)
        wrong = [name for name in SETTINGS if info.get(name) != getattr(self, name)]
        if wrong:
            ours, theirs = (", ".join(f"{name}={of(name)}" for name in wrong)
                            for of in (lambda name: getattr(self, name), info.get))
            raise ValueError(f"{path}: expected predictors for {ours}, got some for {theirs}. Make Sparsifiner with "
                             "the values of the file, or calibrate again")
        modules: dict[int, Module] = {}
        for layer, (head_dim, tokens, heads, kv_heads) in sorted((int(n), of) for n, of in info["layers"].items()):
            weights = {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{layer}.")}
            rank, width = weights["down"].shape[1], weights["query.weight"].shape[0]
            module = Predictor(head_dim, tokens, heads, kv_heads, reduce_n=tokens // rank, reduce_c=head_dim // width,
                               shared="up" not in weights).to(weights["down"].dtype)
            module.load_state_dict(weights)
            modules[layer] = module
        self.modules = modules


def _items(call: AttentionCall, which: Tensor, tokens: int | None = None) -> AttentionCall:
    """Some items of a call; with ``tokens`` so many rows of them, all of which are valid."""
    query, key, value = (x[which][:, :, :tokens] for x in (call.query, call.key, call.value))
    lengths = [None if tokens is not None or lengths is None else lengths[which]
               for lengths in (call.query_lengths, call.key_lengths)]
    return dataclasses.replace(call, query=query, key=key, value=value, query_lengths=lengths[0],
                               key_lengths=lengths[1])


__all__ = ["BREAK_EVEN", "LONG", "RowKeys", "Sparsifiner"]
