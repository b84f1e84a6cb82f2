"""LeMo: leave uninformative blocks of tokens out of attention layers, and inactive neurons out of MLPs' backwards."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from looseleaf import Paper, Report, TokenPruner
from looseleaf.files import load_tensors, save_tensors
from looseleaf.fingerprint import fingerprint
from looseleaf.modes import evaluating, own_random_state
from looseleaf.plugin import In
from looseleaf.progress import bar
from looseleaf_lemo.elimination import Rows, choose, pair_scores, rows_of, true_scores
from looseleaf_lemo.predictor import TARGET_DIVISOR, Fit, Predictor, heads_for, recall
from looseleaf_lemo.training import Rank, Training, attached, decoder, parts_of

FORMAT = "looseleaf.lemo/1"
CACHE_BYTES = 1 << 30
"""Inputs of attention layers that calibration keeps between epochs, at most; beyond, the model is run again."""
REFINE_STEP = 0.1
"""By how much a layer's fraction of kept blocks is moved to see what that does to the loss. [ours]"""


class BlockScores(NamedTuple):
    """Informativeness of blocks in one layer, each (B, n); ``predicted`` is None without a predictor, ``real`` is
    False for blocks of padding."""

    predicted: Tensor | None
    true: Tensor
    real: Tensor


@dataclasses.dataclass
class Calibration:
    """What :meth:`LeMo.calibrate` learned of a model.

    Attributes:
        predictors: of the layers that are cut, by number.
        thresholds: fraction of the largest score from which on a block is kept, by layer.
        structure: class, layers, width, heads and block that it belongs to.
        weights: fingerprint of the model's weights.
        recall: fraction of the truly best blocks that the predictor finds on the calibration texts, by layer.
        losses: mean loss of all predictors by step.
    """

    predictors: dict[int, Predictor]
    thresholds: dict[int, float]
    structure: dict[str, Any]
    weights: str
    recall: dict[int, float]
    losses: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class LeMo(TokenPruner):
    """Fine-tune adapters on long texts with less memory: ``with lemo.training(model): trainer.train()``.

    Within the block, for modules in training mode, (1) the attention of some layers sees and moves only the blocks of
    tokens that score highest; the others pass by on the residual stream. [section 4] (2) The backward of a frozen MLP
    goes through the columns with the largest activations alone. [section 5] (3) Norms are computed again in the
    backward. [section 6; that all norms of a layer are is ours] (4) So are logits, some tokens at a time. [section 6]
    Evaluation is dense.

    Args:
        block: tokens of a block [paper].
        rho: fraction of the blocks that a cut layer keeps [official code]; or one number for each layer, 1 for those
            that are not cut, as the last must be.
        dense_first: fraction of the layers, from the first on, that are not cut [official code: half]; the last is
            not either [paper]. Not read where ``rho`` has a number for each layer.
        selection: "ratio" keeps ``round(rho * n)`` blocks [official code]; "threshold" those that score at least a
            layer's threshold times the largest score [paper], which :meth:`calibrate` sets so that ``rho`` of the
            blocks are kept on its texts.
        scores: "predicted" by small networks, see :meth:`calibrate` [paper]; "exact": from queries and keys, which
            takes the time of an attention map but no calibration.
        mlp_sparsity: fraction p of the columns of an MLP that its backward leaves out [official code: 0.8 in its
            memory figures]; 0: the exact gradient.
        recompute_norms: compute the norms of layers again in the backward.
        loss_chunk: tokens whose logits are in memory at a time [official code]; 0: all, as without LeMo. What TRL or
            Liger put in the place of the loss is left as it is.
        predictor_width: r, width of a predictor's bottleneck [paper; 512 for 7B].
        predictor_steps: training steps of predictors [paper].
        predictor_rate: learning rate of predictors [paper].
        elastic: cut units of predictors that stay dead, every 100 steps [paper].
        seed: random seed of predictors.
    """

    block: Annotated[int, In(">= 1")] = 64
    rho: Annotated[float | Sequence[float], In("(0, 1]")] = 0.4
    dense_first: Annotated[float, In("[0, 1]")] = 0.5
    selection: Literal["ratio", "threshold"] = "ratio"
    scores: Literal["predicted", "exact"] = "predicted"
    mlp_sparsity: Annotated[float, In("[0, 1)")] = 0.8
    recompute_norms: bool = True
    loss_chunk: Annotated[int, In(">= 0")] = 2048
    predictor_width: Annotated[int, In(">= 1")] = 128
    predictor_steps: Annotated[int, In(">= 1")] = 400
    predictor_rate: Annotated[float, In("> 0")] = 2e-5
    elastic: bool = True
    seed: Annotated[int, In(">= 0")] = 0
    calibration: Calibration | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    paper: ClassVar[Paper] = Paper(
        title="LeMo: Enabling LEss Token Involvement for MOre Context Fine-tuning",
        authors=("Tuowei Wang", "Xingyu Chen", "Kun Li", "Ting Cao", "Ju Ren", "Yaoxue Zhang"), year=2025,
        arxiv="2501.09767", venue="USENIX ATC 2025, as Jenga", code="https://github.com/Pairshoe/Jenga-AE",
        summary="Fine-tune on longer texts in the same memory: blocks of tokens and neurons that matter little are "
                "left out of what is kept for the backward.")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: small blocks, exact scores, batches with and without padding."""
        def batches(model: Any) -> list[dict[str, Tensor]]:
            ids = torch.arange(48).view(2, 24) * 7 % 61
            return [{"input_ids": ids}, {"input_ids": ids, "attention_mask": (torch.arange(24) < torch.tensor(
                [[24], [15]])).long()}]

        return {"make": lambda: cls(block=2, dense_first=0.0, scores="exact"), "batches": batches}

    def validate(self) -> None:
        """See :class:`looseleaf.Plugin`."""
        if isinstance(self.rho, Sequence):
            self.check("rho", len(self.rho) > 0 and self.rho[-1] == 1,
                       "a number for each layer that ends with 1, because the last layer is never cut,")

    # ------------------------------------------------------------------ use
    @contextmanager
    def training(self, model: nn.Module, *, rank: Rank | None = None, check_weights: bool = True) -> Iterator[Training]:
        """Fine-tune ``model`` with LeMo in the ``with`` block, by any loop: Trainer, TRL, PEFT or your own.

        Parts of the model that are in evaluation mode, and all of it under ``model.eval()``, compute as ever. What
        cannot be cut is dense, and counted: a cache, less than two blocks of tokens, a mask that is no tensor, packed
        texts or a sliding window without a mask.

        Args:
            model: a decoder of transformers, with adapters or otherwise frozen MLPs; wrappers are looked through.
            rank: scores blocks in the place of the predictors: ``rank(layer, x, rows)`` gives (B, n) for the input
                ``x`` (B, L, H) of layer number ``layer``.
            check_weights: compare the model's weights with those that were calibrated.

        Raises:
            ValueError: no calibration, or that of another model; MLP weights that are trained; another number of
                layers than ``rho`` has numbers; a model that is within such a block.
            UnsupportedModelError: layers that have no attention or MLP of a known form.
        """
        layers = parts_of(model)
        cut = self.cut_layers(len(layers))
        needed = cut and rank is None and (self.scores == "predicted" or self.selection == "threshold")
        if needed and self.calibration is not None:
            self._check_calibration(model, layers, check_weights)
        elif needed:
            raise ValueError("LeMo: expected a calibrated one, got none: call calibrate(model, batches) or LeMo.load, "
                             "or choose scores='exact' and selection='ratio'")
        with attached(self, model, layers, cut, rank or self._rank(layers)) as run:
            yield run

    def keep(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``{"input_ids": (B, L) bool}``, True for tokens that the attention of some cut layer keeps; padding is not.

        :meth:`kept` has the masks by layer. Nothing is trained.

        Raises:
            ValueError: as :meth:`kept`.
        """
        masks = self.kept(model, batch)
        name = "input_ids" if "input_ids" in batch else "inputs_embeds"
        return {name: torch.stack(list(masks.values())).any(0)}

    def kept(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Name of the attention module -> (B, L) bool, True for the tokens that it keeps, in a forward as in training.

        Args:
            model: as of :meth:`training`; MLPs may be anything.
            batch: what the model is called with; labels are left out.

        Raises:
            ValueError: no tokens in the batch, less than two blocks of them, or no layer that is cut.
        """
        inputs = _inputs(batch, self.block)
        layers = parts_of(model)
        cut = self.cut_layers(len(layers))
        if not cut:
            raise ValueError(f"dense_first: expected a fraction that leaves a layer to cut, got {self.dense_first} for "
                             f"{len(layers)} layers, the last of which is never cut")
        dense = dataclasses.replace(self, mlp_sparsity=0.0, recompute_norms=False, loss_chunk=0)
        dense.calibration = self.calibration
        with evaluating(model), torch.no_grad(), dense.training(model) as run:
            run.always = True
            model(**inputs)
        if run.fallbacks:
            raise ValueError(f"the batch: expected one that can be cut, got {', '.join(run.fallbacks)}")
        return run.kept

    def report(self) -> Report:
        """What calibration learned; that of a training is ``run.report()`` of what ``training`` gives."""
        report = Report("LeMo", facts={name: value if isinstance(value, (int, float, str)) else str(value)
                                       for name, value in self.hyperparameters().items()})
        if self.calibration is not None:
            found = self.calibration
            table = report.table("Predictors", ["layer", "parameters", "hidden units", "recall of the best blocks",
                                                "threshold"], note="recall on the calibration texts")
            for index, predictor in found.predictors.items():
                table.add(index, sum(p.numel() for p in predictor.parameters()),
                          " ".join(f"{a}+{b}" for a, b in predictor.sizes().values()), found.recall.get(index),
                          found.thresholds.get(index))
        return report

    def cut_layers(self, count: int) -> dict[int, float]:
        """Number of each layer that is cut -> fraction of blocks that it keeps, for a model of ``count`` layers."""
        if isinstance(self.rho, Sequence):
            self.check("rho", len(self.rho) == count, f"{count} numbers, one for each layer,")
            return {n: rho for n, rho in enumerate(self.rho) if rho < 1}
        return {n: self.rho for n in range(int(count * self.dense_first), count - 1)} if self.rho < 1 else {}

    # ------------------------------------------------------------------ calibration
    def calibrate(self, model: nn.Module, batches: Iterable[Mapping[str, Any]], *, refine: int = 1,
                  progress: bool | None = None) -> Report:
        """Train the predictors of the layers that are cut, and set thresholds. The model is not changed.

        Targets are the largest unscaled scores of all pairs of blocks, not causal, over 1024 [official code]; the loss
        is smooth L1. Thresholds start where ``rho`` of the blocks are kept; then each layer is cut a little more, and
        layers where that costs more loss than in the median layer keep more blocks and the others fewer, as long as
        the loss falls [finite differences as in the paper; which step is ours].

        Args:
            model: as of :meth:`training`, without LeMo.
            batches: what the model is called with, on its device; gone through again and again.
            refine: rounds in which thresholds are refined; only with ``selection="threshold"``.
            progress: show a progress bar; None: only on a terminal.

        Returns:
            :meth:`report`.

        Raises:
            ValueError: no batches, batches of less than two blocks, or no layer that is cut.
        """
        data = [_inputs(batch, self.block) for batch in batches]
        if not data:
            raise ValueError("batches: expected one or more, got none")
        layers = parts_of(model)
        cut = self.cut_layers(len(layers))
        config = layers[0].attention.config
        parts, dim = heads_for(config.hidden_size, config.num_attention_heads)
        with own_random_state(self.seed):
            fits = {n: Fit(Predictor(self.block, parts, dim, self.predictor_width).to(_device(model)),
                           self.predictor_rate, 100 if self.elastic else 0) for n in cut}
        found = Calibration({n: fit.predictor for n, fit in fits.items()}, {}, self._structure(layers),
                            _weights(layers), {})
        kept: dict[int, dict[int, tuple[Tensor, Tensor, Tensor]]] = {}
        room = CACHE_BYTES
        with bar("calibration", self.predictor_steps, progress) as progress_bar:
            for step in range(self.predictor_steps if fits else 0):
                at = step % len(data)
                seen = kept.get(at)
                if seen is None:
                    seen = self._targets(model, layers, cut, data[at])
                    size = sum(t.numel() * t.element_size() for each in seen.values() for t in each)
                    if size <= room:
                        room, kept[at] = room - size, seen
                losses = [fits[n].step(x.float(), target, real) for n, (x, target, real) in seen.items()]
                found.losses.append(sum(losses) / len(losses))
                progress_bar.update()
        for predictor in found.predictors.values():
            predictor.requires_grad_(False)
        self.calibration = found
        scores = [self.block_scores(model, batch) for batch in data]
        for n, rho in cut.items():
            found.recall[n] = sum(_recall(each[n], rho) for each in scores) / len(scores)
        if self.selection == "threshold":
            self._set_thresholds(model, data, scores, dict(cut), refine)
        return self.report()

    @torch.no_grad()
    def block_scores(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[int, BlockScores]:
        """Predicted and true informativeness of blocks by number of the layer, in a dense forward.

        Raises:
            ValueError: no tokens in the batch, or less than two blocks of them.
        """
        layers = parts_of(model)
        predictors = self.calibration.predictors if self.calibration is not None else {}
        out = {}
        for n, x, rows in _attention_inputs(model, layers, self.cut_layers(len(layers)), _inputs(batch, self.block),
                                            self.block):
            predicted = predictors[n].to(x.device).scores(x.float(), rows) if n in predictors else None
            out[n] = BlockScores(predicted, true_scores(layers[n].attention, x, rows), rows.real(x))
        return out

    def _targets(self, model: nn.Module, layers: Any, cut: Iterable[int],
                 batch: Mapping[str, Any]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """Number of the layer -> what its predictor sees, targets, and which blocks are no padding."""
        out = {}
        for n, x, rows in _attention_inputs(model, layers, cut, batch, self.block):
            pairs = pair_scores(layers[n].attention, x, rows, causal=False, scale=1.0)
            out[n] = rows.blanked(x), pairs / TARGET_DIVISOR, rows.real(x)
        return out

    def _set_thresholds(self, model: nn.Module, data: Sequence[Mapping[str, Any]],
                        scores: Sequence[Mapping[int, BlockScores]], keep: dict[int, float], refine: int) -> None:
        """Thresholds by profile, then by finite differences."""
        ratios = {n: torch.cat([_ratios(each[n], self.scores) for each in scores]) for n in keep}

        def put(fractions: Mapping[int, float]) -> None:
            assert self.calibration is not None
            self.calibration.thresholds = {n: float(ratios[n].quantile(1 - rho)) for n, rho in fractions.items()}

        def loss(fractions: Mapping[int, float]) -> float:
            put(fractions)
            exact = dataclasses.replace(self, mlp_sparsity=0.0, recompute_norms=False, loss_chunk=0)
            exact.calibration = self.calibration
            with evaluating(model), torch.no_grad(), exact.training(model) as run:
                run.always = True
                return sum(float(model(**batch, labels=batch["input_ids"]).loss) for batch in data) / len(data)

        best = loss(keep) if refine else 0.0
        for _ in range(refine):
            slopes = {n: loss({**keep, n: max(0.01, rho - REFINE_STEP)}) - best for n, rho in keep.items()}
            middle = sorted(slopes.values())[len(slopes) // 2]
            moved = {n: min(1.0, max(0.05, rho + REFINE_STEP / 2 * ((slopes[n] > middle) - (slopes[n] < middle))))
                     for n, rho in keep.items()}
            now = loss(moved)
            if now >= best or sum(moved.values()) > sum(keep.values()) + 1e-6:
                break
            keep, best = moved, now
        put(keep)

    # ------------------------------------------------------------------ files
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibration and the hyper-parameters to a safetensors file.

        Raises:
            ValueError: it is not calibrated.
            OSError: the file cannot be written.
        """
        found = self.calibration
        if found is None:
            raise ValueError("LeMo.save: expected a calibrated one, got none: call calibrate(model, batches)")
        tensors = {f"{n}.{name}": tensor for n, predictor in found.predictors.items()
                   for name, tensor in predictor.state_dict().items()}
        info = {"hyperparameters": {name: list(v) if isinstance(v, Sequence) and not isinstance(v, str) else v
                                    for name, v in self.hyperparameters().items()},
                "predictors": {n: [p.block, p.heads, p.dim, p.sizes()] for n, p in found.predictors.items()},
                "thresholds": found.thresholds, "structure": found.structure, "weights": found.weights,
                "recall": found.recall, "losses": found.losses}
        save_tensors(path, tensors or {"none": torch.zeros(1)}, info, format=FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LeMo:
        """What :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is something else.
        """
        tensors, info = load_tensors(path, format=FORMAT)
        made = cls(**info["hyperparameters"])
        predictors = {}
        for key, sizes in info["predictors"].items():
            predictor = Predictor.of_sizes(*sizes).requires_grad_(False)
            predictor.load_state_dict({name.removeprefix(f"{key}."): tensor for name, tensor in tensors.items()
                                       if name.startswith(f"{key}.")})
            predictors[int(key)] = predictor
        made.calibration = Calibration(
            predictors, {int(n): v for n, v in info["thresholds"].items()}, info["structure"], info["weights"],
            {int(n): v for n, v in info["recall"].items()}, info["losses"])
        return made

    # ------------------------------------------------------------------ inside
    def _structure(self, layers: Sequence[Any]) -> dict[str, Any]:
        config = layers[0].attention.config
        return {"attention": type(layers[0].attention).__name__, "layers": len(layers), "width": config.hidden_size,
                "heads": config.num_attention_heads, "block": self.block}

    def _check_calibration(self, model: nn.Module, layers: Sequence[Any], weights: bool) -> None:
        found = self.calibration
        assert found is not None
        ours = self._structure(layers)
        if found.structure != ours:
            wrong = next(name for name in ours if found.structure.get(name) != ours[name])
            raise ValueError(f"calibration: expected that of this model, got another's ({wrong}: "
                             f"{found.structure.get(wrong)}, here {ours[wrong]}): call calibrate(model, batches)")
        missing = [n for n in self.cut_layers(len(layers)) if n not in found.predictors or
                   (self.selection == "threshold" and n not in found.thresholds)]
        if missing:
            raise ValueError(f"calibration: expected one of layer {missing[0]}, got that of other layers or another "
                             "selection: call calibrate(model, batches) with these hyper-parameters")
        if weights and found.weights != _weights(layers):
            raise ValueError("calibration: expected that of these weights, got that of others: call calibrate(model, "
                             "batches), or pass check_weights=False where they were trained further or quantised")

    def _rank(self, layers: Sequence[Any]) -> Rank:
        """Predicted scores in the model's own precision, or true ones."""
        if self.scores == "exact" or self.calibration is None:
            return lambda n, x, rows: true_scores(layers[n].attention, x, rows)
        predictors = self.calibration.predictors
        own: dict[tuple[int, Any, Any], Predictor] = {}

        def rank(n: int, x: Tensor, rows: Rows) -> Tensor:
            key = n, x.device, x.dtype
            if key not in own:
                source = predictors[n]
                own[key] = Predictor.of_sizes(source.block, source.heads, source.dim, source.sizes())
                own[key].load_state_dict(source.state_dict())
                own[key].to(x.device, x.dtype).requires_grad_(False)
            return own[key].scores(x, rows)

        return rank


def _inputs(batch: Mapping[str, Any], block: int) -> dict[str, Any]:
    """The batch without labels, checked."""
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if not isinstance(tokens, Tensor):
        raise ValueError(f"the batch: expected input_ids or inputs_embeds, got {', '.join(map(repr, batch)) or 'none'}")
    if tokens.shape[1] < 2 * block:
        raise ValueError(f"the batch: expected {2 * block} tokens or more, two blocks of {block}, got "
                         f"{tokens.shape[1]}: give longer texts, or choose a smaller block")
    return {name: value for name, value in batch.items() if name != "labels"}


def _attention_inputs(model: nn.Module, layers: Sequence[Any], cut: Iterable[int], batch: Mapping[str, Any],
                      block: int) -> list[tuple[int, Tensor, Rows]]:
    """Number, input and rows of each cut layer in a dense forward."""
    out: list[tuple[int, Tensor, Rows]] = []

    def hook(n: int) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            x: Tensor = given["hidden_states"] if "hidden_states" in given else args[0]
            mask = given.get("attention_mask")
            out.append((n, x.detach(), rows_of(x, mask if isinstance(mask, Tensor) else None, block)))
        return see

    handles = [layers[n].attention.register_forward_pre_hook(hook(n), with_kwargs=True) for n in cut]
    try:
        with evaluating(model), torch.no_grad():
            decoder(model)(**{**batch, "use_cache": False})
    finally:
        for handle in handles:
            handle.remove()
    return out


def _ratios(scores: BlockScores, kind: str) -> Tensor:
    """Scores of blocks over the largest of their item."""
    values = scores.predicted if kind == "predicted" and scores.predicted is not None else scores.true
    largest = values.masked_fill(~scores.real, -torch.inf).amax(1, keepdim=True).clamp(min=1e-12)
    return (values / largest)[scores.real].float().clamp(0, 1)


def _recall(scores: BlockScores, rho: float) -> float:
    assert scores.predicted is not None
    return recall(list(choose(scores.predicted, scores.real, rho)), list(choose(scores.true, scores.real, rho)))


def _weights(layers: Sequence[Any]) -> str:
    """Fingerprint of the queries' weights of the first and the last layer, adapters left out, whatever precision."""
    out = {}
    for name, layer in (("first", layers[0]), ("last", layers[-1])):
        linear: Any = getattr(layer.attention, "q_proj", None) or next(layer.attention.children())
        linear = getattr(linear, "base_layer", linear)
        out[name] = next(linear.parameters()).detach().to(torch.bfloat16)
    return fingerprint(out)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


__all__ = ["BlockScores", "Calibration", "LeMo"]
