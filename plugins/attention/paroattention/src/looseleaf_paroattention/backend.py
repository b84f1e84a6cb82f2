"""PAROAttention as an attention backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import Tensor

from looseleaf import AttentionBackend, AttentionCall, Paper
from looseleaf.attention.call import Phase
from looseleaf.plugin import In, OneOf
from looseleaf_kernels import BlockIndex, block_sparse_attention, quantized_block_sparse_attention
from looseleaf_paroattention.calibration import LayerStatistics, make_layers, observe
from looseleaf_paroattention.grid import PERMUTATIONS, TokenGrid, inverse, permute
from looseleaf_paroattention.plan import SETTINGS, LayerPlan, Plan

if TYPE_CHECKING:
    from looseleaf import Attached

BITS = ((8, 8), (8, 4), (8, 16), (16, 16))
"""What there is a kernel for: bits of Q and K, and of P and V. 16 is the dtype of the tensors."""


@dataclasses.dataclass(frozen=True)
class _Ready:
    """What one layer needs for calls of one shape.

    Attributes:
        layer: what it was made from.
        order, back: (B or 1, Hq, L) int64, the order of each query head and its inverse.
        shared: (B or 1, Hkv, L), the order of each key head; None where its query heads differ.
        index: the blocks.
    """

    layer: LayerPlan
    order: Tensor
    back: Tensor
    shared: Tensor | None
    index: BlockIndex


@dataclasses.dataclass
class PAROAttention(AttentionBackend):
    """Attention of image and video models in which each head has its own order of tokens (arXiv 2506.16054).

    In the right order the attention of a head lies in few dense blocks: the others are skipped, always the same ones,
    and the computed ones are uniform enough for small integers. Orders and blocks are found by :meth:`calibrate`.
    Cross attention, causal attention and masks of the caller's own are computed exactly.

    Args:
        grid: frames, height and width of the token grid, (F, H, W), F = 1 for images; None: not known yet, every
            self-attention call is an error that says how many tokens it has.
        text_tokens: tokens of text in the same sequence, which keep their order.
        permutations: ``auto`` for the best of each head; one of ``FHW``, ``FWH``, ``HFW``, ``HWF``, ``WFH``, ``WHF``
            for all heads (axes from the slowest to the fastest; ``FHW`` reorders nothing); or a dictionary from layer
            to one name or to a list of one for each head, other layers being ``auto``.
        density: fraction of the blocks of each head that is computed, in (0, 1].
        qk_bits: bits of queries and keys: 8, or 16 for the dtype of the tensors. Of keys with 8 bits their mean over
            the tokens is subtracted first.
        pv_bits: bits of probabilities and values: 8, 4, or 16; with ``qk_bits`` 16 only 16.
        alpha: weight of uniform blocks against empty blocks in the choice of the order, 0 to 1.
        block: tokens of a block: 16, 32, 64 or 128.
        dense_steps: number of initial denoising steps that are exact.
        step_groups: parts of a run of denoising steps with masks of their own; 1, or 2 for two halves, or more. The
            authors' plan for CogVideoX has 10, and heads of which nothing is computed, which are not made here.
        threshold: keep the blocks that hold at least this fraction of their rows' attention, instead of a
            ``density``; in (0, 1], or None.
        eps: blocks with a smaller fraction of their rows' attention count as empty in the choice of the order.
        text_first: text stands before the grid (CogVideoX, Flux), else after it (Stable Diffusion 3).

    Attributes:
        plan: what was found for each layer; None before :meth:`calibrate` or :meth:`load`.
    """

    grid: tuple[int, int, int] | None = None
    text_tokens: Annotated[int, In(">= 0")] = 0
    permutations: Any = "auto"
    density: Annotated[float, In("(0, 1]")] = 0.3
    qk_bits: Annotated[int, OneOf(8, 16)] = 8
    pv_bits: Annotated[int, OneOf(4, 8, 16)] = 8
    alpha: Annotated[float, In("[0, 1]")] = 0.5
    block: Annotated[int, OneOf(16, 32, 64, 128)] = 64
    dense_steps: Annotated[int, In(">= 0")] = 0
    step_groups: Annotated[int, In(">= 1")] = 1
    threshold: Annotated[float | None, In("(0, 1]")] = None
    eps: Annotated[float, In("(0, 1)")] = 1e-3
    text_first: bool = True
    phases: ClassVar[frozenset[Phase]] = frozenset({"bidirectional"})
    paper: ClassVar[Paper] = Paper(
        title="PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual "
              "Generation Models",
        authors=("Tianchen Zhao", "Ke Hong", "Xinhao Yang", "Xuefeng Xiao", "Huixia Li", "Feng Ling", "Ruiqi Xie",
                 "Siqi Chen", "Hongyu Zhu", "Yichong Zhang", "Yu Wang"),
        year=2025, arxiv="2506.16054", venue="NeurIPS 2025", code="https://github.com/thu-nics/PAROAttention",
        summary="Image and video generation with few attention blocks and 8 or 4 bits, after reordering the tokens.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.plan: Plan | None = None

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """A plan for the kit's inputs: of 384 tokens in 4 heads, 256 are a grid, and a third of the blocks is kept."""
        blocks = torch.arange(6)
        masks = (blocks[:, None] + blocks + torch.arange(4)[:, None, None]) % 3 == 0
        masks |= torch.eye(6, dtype=torch.bool)

        def make() -> PAROAttention:
            backend = cls(grid=(4, 8, 8), text_tokens=128)
            layer = LayerPlan(("WHF", "WHF", "HFW", "FHW"), masks[None])
            backend.plan = Plan(backend.settings(), {0: layer, 1: layer})
            return backend

        return {"make": make}

    def validate(self) -> None:
        grid = self.grid
        self.check("grid", grid is None or (isinstance(grid, (tuple, list)) and len(grid) == 3 and all(
            isinstance(n, int) and n >= 1 for n in grid)), "None or three integers >= 1: frames, height, width")
        if grid is not None:
            self.grid = (grid[0], grid[1], grid[2])
        self.check("pv_bits", (self.qk_bits, self.pv_bits) in BITS,
                   ", ".join(str(p) for q, p in BITS if q == self.qk_bits) + f" with qk_bits={self.qk_bits}")
        names = self.permutations
        expected = f"auto, {', '.join(PERMUTATIONS)}, or a dictionary from layer to one of these names or to a list"
        if not isinstance(names, Mapping):
            self.check("permutations", names == "auto" or names in PERMUTATIONS, expected)
            return
        for layer, of_layer in names.items():
            listed = [of_layer] if isinstance(of_layer, str) else of_layer
            self.check("permutations", isinstance(layer, int) and layer >= 0 and isinstance(listed, Sequence)
                       and len(listed) > 0 and all(name in PERMUTATIONS for name in listed), expected)

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention over the blocks of each head's plan, (B, Hq, Lq, D), in the dtype of the query.

        Raises:
            ValueError: the number of tokens is not that of grid and text, there is no plan for this layer, or the
                denoising step is needed and not known.
        """
        grid = self.token_grid
        reason = grid.not_for(call)
        if reason:
            return call.fall_back(reason)
        lengths = grid.item_lengths(call)
        group = grid.step_group(call)
        if group is None:
            return call.fall_back(f"one of the first {self.dense_steps} steps")
        layer = self.layer_plan(call)
        ready = self._prepared(call, layer, group, lengths)
        key, value, order = call.key, call.value, ready.shared
        if order is None:  # query heads of one key head want different orders: each gets the keys in its own
            copies = call.shape[1] // call.shape[2]
            key, value, order = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1), ready.order
        out = self._compute(call, permute(call.query, ready.order), permute(key, order), permute(value, order),
                            ready.index)
        density = layer.masks[group].float().mean((1, 2))
        call.record(density=density.mean(), density_by_head=density,
                    reordered_heads=sum(n != PERMUTATIONS[0] for n in layer.permutations) / len(layer.permutations))
        return permute(out, ready.back)

    def _compute(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, index: BlockIndex) -> Tensor:
        if self.qk_bits == 16:
            return block_sparse_attention(query, key, value, index, scale=call.scale, key_lengths=call.key_lengths,
                                          query_lengths=call.query_lengths)[0]
        return quantized_block_sparse_attention(
            query, key, value, index, scale=call.scale, key_lengths=call.key_lengths,
            query_lengths=call.query_lengths, qk_bits=self.qk_bits, pv_bits=self.pv_bits)[0]

    @property
    def token_grid(self) -> TokenGrid:
        """Which calls the method is for and how their tokens are reordered, by the fields of this backend."""
        return TokenGrid(self.grid, self.text_tokens, self.text_first, self.permutations, self.dense_steps,
                         self.step_groups)

    def settings(self) -> dict[str, Any]:
        """What a plan depends on."""
        return {name: getattr(self, name) for name in SETTINGS}

    def layer_plan(self, call: AttentionCall) -> LayerPlan:
        """What was found for the layer of a call.

        Raises:
            ValueError: nothing was, or it is for another number of heads or other settings.
        """
        heads, tokens = call.shape[1], call.shape[3]
        if self.plan is None:
            names = self.token_grid.requested(call.layer, heads)
            if names is None or self.density < 1 or self.threshold is not None:
                raise ValueError("PAROAttention: expected a plan, or density=1 with permutations given, got neither. "
                                 "Run calibrate(model, batches) or load(path) first")
            blocks = -(-tokens // self.block)
            return LayerPlan(names, torch.ones(self.step_groups, heads, blocks, blocks, dtype=torch.bool))
        self.plan.check_settings(self.settings())
        layer = self.plan.layers.get(call.layer)
        if layer is None:
            raise ValueError(f"plan: expected layer {call.layer}, which the model calls, among its layers, got "
                             f"{sorted(self.plan.layers)}. Attach only those, or make a plan of this model with "
                             "calibrate()")
        if len(layer.permutations) != heads:
            raise ValueError(f"plan: expected {heads} heads in layer {call.layer}, as the model has, got "
                             f"{len(layer.permutations)}. Make a plan of this model with calibrate()")
        return layer

    def _prepared(self, call: AttentionCall, layer: LayerPlan, group: int, lengths: tuple[int, ...] | None) -> _Ready:
        """Orders and blocks on the device of the call; kept for the next call of this layer."""
        batch, heads, kv_heads, tokens, _, _ = call.shape
        known: dict[Any, _Ready] = call.state.__dict__.setdefault("ready", {})
        key = (group, batch, lengths, call.query.device)
        ready = known.get(key)
        if ready is None or ready.layer is not layer:  # calibrated or loaded anew
            order = self.token_grid.orders(layer.permutations, tokens, lengths)
            shared = order[:, ::heads // kv_heads]
            same = torch.equal(shared.repeat_interleave(heads // kv_heads, 1), order)
            mask = layer.masks[group].expand(batch, -1, -1, -1).to(call.query.device)
            index = BlockIndex.from_mask(mask, block_q=self.block, block_k=self.block, q_len=tokens, k_len=tokens,
                                         causal=False)
            device = call.query.device
            ready = known[key] = _Ready(layer, order.to(device), inverse(order).to(device),
                                        shared.to(device) if same else None, index)
        return ready

    def calibrate(self, model: Any, batches: Iterable[Any] | Callable[[Attached], Any], *, steps: int | None = None,
                  progress: bool | None = None) -> None:
        """Find the order of the tokens and the blocks of each head, from exact runs of the model.

        The paper takes a few prompts; what was found holds for all steps and prompts. Memory on the CPU: six block
        maps, of N x N numbers for N blocks, for each head and step group.

        Args:
            model: a diffusers pipeline or model, or anything that :func:`looseleaf.attach` takes.
            batches: keyword arguments of the model or pipeline, in one dictionary or several; or a function that runs
                it, given what :func:`looseleaf.attach` returned, for a sampling loop of your own.
            steps: denoising steps of a run, for ``step_groups`` where no pipeline reports them.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: no layer was seen that the method is for, or the tokens are not those of grid and text.
        """
        self.fit(observe(model, batches, self.token_grid, block=self.block, eps=self.eps, steps=steps,
                         progress=progress))

    def fit(self, statistics: Mapping[int, LayerStatistics]) -> None:
        """Make the plan from what :func:`looseleaf_paroattention.calibration.observe` gathered.

        Raises:
            ValueError: a step group was never seen, or a permutation was not observed.
        """
        self.plan = Plan(self.settings(), make_layers(statistics, self.token_grid, alpha=self.alpha,
                                                      density=self.density, threshold=self.threshold))

    def save(self, path: str | Path) -> None:
        """Write the plan to a safetensors file.

        Raises:
            ValueError: there is none yet.
        """
        if self.plan is None:
            raise ValueError("there is no plan to save: run calibrate() or load() first")
        self.plan.save(path)

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it cannot be read, or was made with another grid, text, block or number of step groups.
        """
        plan = Plan.load(path)
        plan.check_settings(self.settings())
        self.plan = plan
