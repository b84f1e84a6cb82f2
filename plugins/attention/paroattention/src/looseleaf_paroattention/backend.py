"""PAROAttention as an attention backend."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from looseleaf import AttentionBackend, AttentionCall, Paper
from looseleaf.attention.call import Phase
from looseleaf.errors import did_you_mean
from looseleaf_kernels import BlockIndex, block_sparse_attention, quantized_block_sparse_attention
from looseleaf_paroattention.permutations import PERMUTATIONS, inverse, permute, token_orders
from looseleaf_paroattention.plan import LayerPlan, Plan

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
        text_tokens: tokens of text in the same sequence, which keep their order; 0 or more.
        permutations: ``auto`` for the best of each head; one of ``FHW``, ``FWH``, ``HFW``, ``HWF``, ``WFH``, ``WHF``
            for all heads (axes from the slowest to the fastest; ``FHW`` reorders nothing); or a dictionary from layer
            to one name or to a list of one for each head, other layers being ``auto``.
        density: share of the blocks of each head that is computed; above 0 and up to 1.
        qk_bits: bits of queries and keys: 8, or 16 for the dtype of the tensors.
        pv_bits: bits of probabilities and values: 8, 4, or 16; with ``qk_bits`` 16 only 16.
        alpha: weight of uniform blocks against empty blocks in the choice of the order; 0 to 1.
        block: tokens of a block: 16, 32, 64 or 128.
        dense_steps: so many first denoising steps are exact; 0 or more.
        step_groups: parts of a run of denoising steps with masks of their own; 1, or 2 for two halves, or more.
        threshold: keep the blocks that hold at least this share of their rows' attention, instead of a ``density``;
            above 0 and up to 1, or None.
        eps: blocks with a smaller share of their rows' attention count as empty in the choice of the order; above 0
            and below 1.
        text_first: text stands before the grid (CogVideoX, Flux), else after it (Stable Diffusion 3).
    """

    grid: tuple[int, int, int] | None = None
    text_tokens: int = 0
    permutations: Any = "auto"
    density: float = 0.3
    qk_bits: int = 8
    pv_bits: int = 8
    alpha: float = 0.5
    block: int = 64
    dense_steps: int = 0
    step_groups: int = 1
    threshold: float | None = None
    eps: float = 1e-3
    text_first: bool = True
    changes: ClassVar[Phase] = "encode"
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
            made = cls(grid=(4, 8, 8), text_tokens=128)
            layer = LayerPlan(("WHF", "WHF", "HFW", "FHW"), masks[None])
            made.plan = Plan(made.settings(), {0: layer, 1: layer})
            return made

        return {"make": make}

    def validate(self) -> None:
        grid = self.grid
        self.check("grid", grid is None or (isinstance(grid, (tuple, list)) and len(grid) == 3 and all(
            isinstance(n, int) and n >= 1 for n in grid)), "None, or three whole numbers from 1: frames, height, width")
        if grid is not None:
            self.grid = (grid[0], grid[1], grid[2])
        for field, least in (("text_tokens", 0), ("dense_steps", 0), ("step_groups", 1)):
            value = getattr(self, field)
            self.check(field, isinstance(value, int) and value >= least, f"a whole number from {least}")
        self.check("density", 0 < self.density <= 1, "a number above 0 and up to 1")
        self.check("qk_bits", self.qk_bits in {q for q, _ in BITS}, "8 or 16")
        self.check("pv_bits", (self.qk_bits, self.pv_bits) in BITS,
                   ", ".join(str(p) for q, p in BITS if q == self.qk_bits) + f" with qk_bits={self.qk_bits}")
        self.check("alpha", 0 <= self.alpha <= 1, "a number from 0 to 1")
        self.check("block", self.block in (16, 32, 64, 128), "16, 32, 64 or 128")
        self.check("threshold", self.threshold is None or 0 < self.threshold <= 1,
                   "None, or a number above 0 and up to 1")
        self.check("eps", 0 < self.eps < 1, "a number above 0 and below 1")
        self._validate_permutations()

    def _validate_permutations(self) -> None:
        given = self.permutations
        allowed = f"auto, {', '.join(PERMUTATIONS)}, or a dictionary from layer to one of these names or a list of them"
        if not isinstance(given, Mapping):
            self.check("permutations", given == "auto" or given in PERMUTATIONS,
                       allowed + "." + did_you_mean(str(given), PERMUTATIONS))
            return
        for layer, names in given.items():
            listed = [names] if isinstance(names, str) else names
            self.check("permutations", isinstance(layer, int) and layer >= 0 and isinstance(listed, Sequence)
                       and len(listed) > 0 and all(name in PERMUTATIONS for name in listed), allowed)

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention over the blocks of each head's plan, (B, Hq, Lq, D), in the dtype of the query.

        Raises:
            ValueError: the number of tokens is not that of grid and text, there is no plan for this layer, or the
                denoising step is needed and not known.
        """
        reason = self.not_for(call)
        if reason:
            return call.fall_back(reason)
        lengths = self.item_lengths(call)
        group = self.step_group(call)
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
        mask = layer.masks[group]
        density = mask.float().mean((1, 2))
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

    def not_for(self, call: AttentionCall) -> str | None:
        """Why a call is computed exactly, or None."""
        _, _, _, lq, lk, _ = call.shape
        if call.is_causal or call.phase != "encode":
            return "causal attention"
        if getattr(call.module, "is_cross_attention", False) or lq != lk:
            return "cross attention"
        if call.mask is not None:
            return "a mask of the caller's own"
        if call.value.shape != call.key.shape:
            return "values of another size than keys"
        if call.query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"{call.query.dtype}"
        if not lq:
            return "no tokens"
        return None

    def item_lengths(self, call: AttentionCall) -> tuple[int, ...] | None:
        """Valid tokens of each batch item; None where all are.

        Raises:
            ValueError: they are not the tokens of grid and text.
        """
        tokens = call.query.shape[2]
        if self.grid is None:
            side = math.isqrt(max(0, tokens - self.text_tokens))
            square = f", such as (1, {side}, {side})" if side and side * side == tokens - self.text_tokens else ""
            raise ValueError(f"PAROAttention.grid=None and a self-attention call has {tokens} tokens: allowed is "
                             f"grid=(frames, height, width) whose product and text_tokens={self.text_tokens} make "
                             f"{tokens}{square}. Pass the size of the latents in patches")
        cells = math.prod(self.grid)
        if cells + self.text_tokens != tokens:
            raise ValueError(
                f"grid={self.grid} has {cells} tokens and text_tokens={self.text_tokens}, {cells + self.text_tokens} "
                f"together, and a self-attention call has {tokens}: allowed is equally many. Pass the size of the "
                "latents in patches, and leave layers of another size out with attach(..., layers=...)")
        if call.query_lengths is None and call.key_lengths is None:
            return None
        given = [[tokens] * len(call.query) if n is None else n.tolist()
                 for n in (call.query_lengths, call.key_lengths)]
        for queries, keys in zip(*given, strict=True):
            if queries != keys or (keys and keys < cells):
                raise ValueError(f"a batch item has {queries} queries and {keys} keys: allowed is equally many, the "
                                 f"{cells} tokens of grid={self.grid} and up to {self.text_tokens} of text, or none")
        return tuple(given[1])

    def step_group(self, call: AttentionCall) -> int | None:
        """The step group of a call, from 0; None for one of the first ``dense_steps``.

        Raises:
            ValueError: the step, or the number of steps, is needed and not known.
        """
        if (self.dense_steps or self.step_groups > 1) and call.step is None:
            raise ValueError(f"dense_steps={self.dense_steps} and step_groups={self.step_groups} need the denoising "
                             "step, which nobody said: attach to a diffusers pipeline or model, or set attached.step "
                             "before each step of your sampling loop")
        if call.step is not None and call.step < self.dense_steps:
            return None
        if self.step_groups == 1:
            return 0
        if not call.steps:
            raise ValueError(f"step_groups={self.step_groups} needs the number of denoising steps, which nobody said: "
                             "attach to a diffusers pipeline, or say attach(..., steps=...)")
        return min((call.step or 0) * self.step_groups // call.steps, self.step_groups - 1)

    def layer_plan(self, call: AttentionCall) -> LayerPlan:
        """What was found for the layer of a call.

        Raises:
            ValueError: nothing was, or it is for another number of heads or other settings.
        """
        heads, tokens = call.shape[1], call.shape[3]
        if self.plan is None:
            names = self.given_permutations(call.layer, heads)
            if names is None or self.density < 1 or self.threshold is not None:
                raise ValueError("PAROAttention has no plan: run calibrate(model, batches) or load(folder) first. "
                                 "Without one, allowed is density=1 with permutations given")
            blocks = -(-tokens // self.block)
            return LayerPlan(names, torch.ones(self.step_groups, heads, blocks, blocks, dtype=torch.bool))
        mine = self.settings()
        if mine != self.plan.settings:
            wrong = [k for k in mine if mine[k] != self.plan.settings[k]]
            raise ValueError(f"the plan was made with {', '.join(f'{k}={self.plan.settings[k]}' for k in wrong)} and "
                             f"this is {', '.join(f'{k}={mine[k]}' for k in wrong)}: allowed is the same. Make a plan "
                             "for it with calibrate()")
        found = self.plan.layers.get(call.layer)
        if found is None:
            raise ValueError(f"the plan has no layer {call.layer}, it has {sorted(self.plan.layers)}: attach only "
                             "those, or make a plan of this model with calibrate()")
        if len(found.permutations) != heads:
            raise ValueError(f"layer {call.layer} of the plan has {len(found.permutations)} heads and that of the "
                             f"model {heads}: allowed is equally many. Make a plan of this model with calibrate()")
        return found

    def settings(self) -> dict[str, Any]:
        """What a plan depends on."""
        return {name: getattr(self, name) for name in ("grid", "text_tokens", "text_first", "block", "step_groups")}

    def given_permutations(self, layer: int, heads: int) -> tuple[str, ...] | None:
        """The permutation of each head that the caller asked for; None: to be found.

        Raises:
            ValueError: names for another number of heads.
        """
        given = self.permutations
        if isinstance(given, Mapping):
            given = given.get(layer, "auto")
        if given == "auto":
            return None
        names = (given,) * heads if isinstance(given, str) else tuple(given)
        if len(names) != heads:
            raise ValueError(f"permutations names {len(names)} for layer {layer}, which has {heads} heads: allowed is "
                             "one for each head, or one name for all")
        return names

    def orders(self, names: Sequence[str], tokens: int, lengths: Sequence[int] | None) -> Tensor:
        """:func:`token_orders` for this grid, (B or 1, H, tokens) int64 on the CPU."""
        assert self.grid is not None
        return token_orders(names, self.grid, tokens, self.text_first, lengths)

    def _prepared(self, call: AttentionCall, layer: LayerPlan, group: int, lengths: tuple[int, ...] | None) -> _Ready:
        """Orders and blocks on the device of the call; kept for the next call of this layer."""
        batch, heads, kv_heads, tokens, _, _ = call.shape
        known: dict[Any, _Ready] = call.state.__dict__.setdefault("ready", {})
        key = (group, batch, lengths, call.query.device)
        found = known.get(key)
        if found is None or found.layer is not layer:  # calibrated or loaded anew
            order = self.orders(layer.permutations, tokens, lengths)
            shared = order[:, ::heads // kv_heads]
            same = torch.equal(shared.repeat_interleave(heads // kv_heads, 1), order)
            mask = layer.masks[group].expand(batch, -1, -1, -1).to(call.query.device)
            index = BlockIndex.from_mask(mask, block_q=self.block, block_k=self.block, q_len=tokens, k_len=tokens,
                                         causal=False)
            device = call.query.device
            found = known[key] = _Ready(layer, order.to(device), inverse(order).to(device),
                                        shared.to(device) if same else None, index)
        return found

    def calibrate(self, model: Any, batches: Iterable[Any] | Callable[[Attached], Any], *, steps: int | None = None,
                  progress: bool | None = None) -> None:
        """Find the order of the tokens and the blocks of each head, from exact runs of the model.

        The paper takes a few prompts; what was found holds for all steps and prompts. Memory on the CPU: six block
        maps, of N x N numbers for N blocks, for each head and step group.

        Args:
            model: a diffusers pipeline or model, or anything that :func:`looseleaf.attach` takes.
            batches: keyword arguments of the model or pipeline, in one dictionary or several; or a function that runs
                it, given what :func:`looseleaf.attach` returned, for a sampling loop of your own.
            steps: denoising steps of a run, for ``step_groups`` where no pipeline says so.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: no layer was seen that the method is for, or the tokens are not those of grid and text.
        """
        from looseleaf_paroattention.calibration import make_plan, observe

        self.plan = make_plan(self, observe(self, model, batches, steps=steps, progress=progress))

    def save(self, path: str | Path) -> None:
        """Write the plan to a folder: ``plan.json`` and ``masks.safetensors``.

        Raises:
            ValueError: there is none yet.
        """
        if self.plan is None:
            raise ValueError("there is no plan to save: run calibrate() or load() first")
        self.plan.save(path)

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: it cannot be read, or was made with another grid, text, block or number of step groups.
        """
        plan = Plan.load(path)
        mine = self.settings()
        wrong = [name for name in mine if mine[name] != plan.settings[name]]
        if wrong:
            raise ValueError(f"{path} is a plan for {', '.join(f'{k}={plan.settings[k]}' for k in wrong)} and this is "
                             f"{', '.join(f'{k}={mine[k]}' for k in wrong)}: allowed is the same. Make "
                             "PAROAttention with the values of the plan, or calibrate() anew")
        self.plan = plan
