"""What an attention operation is given: the checks of its tensors, and the numbers that travel with them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from looseleaf_kernels.index import BlockIndex


class Problem(NamedTuple):
    """The numbers of an attention over blocks. The operators take the same six, in this order.

    Attributes:
        scale: factor of the scores.
        causal: whether query row i sees keys only up to i + (key length - query length) of its item.
        block_q, block_k: queries and keys of a block.
        query_lengths, key_lengths: (B,) int64, valid rows of each item.
    """

    scale: float
    causal: bool
    block_q: int
    block_k: int
    query_lengths: Tensor
    key_lengths: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, index: BlockIndex, scale: float | None, query_lengths: Tensor | None,
           key_lengths: Tensor | None) -> Problem:
        """From the arguments of a public operation."""
        return cls(scale_of(scale, query), index.causal, index.block_q, index.block_k,
                   lengths_of(query, query_lengths, "query_lengths"), lengths_of(key, key_lengths, "key_lengths"))

    @property
    def offsets(self) -> Tensor:
        """(B,) the position of each item's first query among its keys."""
        return self.key_lengths - self.query_lengths


def scale_of(scale: float | None, query: Tensor) -> float:
    """The scale, or 1 / sqrt(D)."""
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def lengths_of(x: Tensor, lengths: Tensor | None, name: str) -> Tensor:
    """(B,) int64 on the device of x, (B, H, L, D): the lengths, or L for all.

    Raises:
        ValueError: lengths of another shape.
    """
    if lengths is None:
        return torch.full((x.shape[0],), x.shape[2], dtype=torch.int64, device=x.device)
    if lengths.shape != x.shape[:1]:
        raise ValueError(f"{name}: expected shape ({x.shape[0]},), a length for each item of the batch, got "
                         f"{tuple(lengths.shape)}")
    return lengths.to(device=x.device, dtype=torch.int64)


def statistics_dtype(query: Tensor) -> torch.dtype:
    """The dtype of the sums, scores and statistics: fp32, or fp64 for fp64."""
    return torch.promote_types(query.dtype, torch.float32)


def nothing(query: Tensor) -> tuple[Tensor, Tensor]:
    """The output and log-sum-exp of queries without any key."""
    return torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf, dtype=statistics_dtype(query))


def like_results(query: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors as attention returns them, for the registration of shapes with ``torch.library``."""
    return like(query), query.new_empty(query.shape[:3], dtype=statistics_dtype(query))


def like(x: Tensor) -> Tensor:
    """A contiguous tensor of the same shape and dtype."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def check_heads(query: Tensor, key: Tensor) -> None:
    """Whether queries and keys go together.

    Raises:
        ValueError: they do not.
    """
    if query.dim() != 4 or key.dim() != 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query, key: expected shapes (B, Hq, Lq, D) and (B, Hkv, Lk, D), got {tuple(query.shape)} "
                         f"and {tuple(key.shape)}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"key: expected a number of heads that divides the {query.shape[1]} of the query, got "
                         f"{key.shape[1]}")


def check_attention(query: Tensor, key: Tensor, value: Tensor, **indices: BlockIndex) -> bool:
    """Whether there is anything to attend to, after checking that tensors and indices go together.

    Raises:
        ValueError: they do not.
    """
    check_heads(query, key)
    if value.shape != key.shape or value.dtype != query.dtype or key.dtype != query.dtype:
        raise ValueError(f"key, value: expected equal shapes and the query's dtype, {query.dtype}, got "
                         f"{tuple(key.shape)} {key.dtype} and {tuple(value.shape)} {value.dtype}")
    sizes = (*query.shape[:3], key.shape[2])
    for name, index in indices.items():
        if (index.batch, index.heads, index.q_len, index.k_len) != sizes:
            raise ValueError("{}: expected an index for the tensors' batch {}, {} heads, Lq {}, Lk {}, got one for "
                             "batch {}, {} heads, Lq {}, Lk {}".format(name, *sizes, index.batch, index.heads,
                                                                       index.q_len, index.k_len))
    return bool(query.shape[0] and query.shape[2] and key.shape[2])


def without_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """(B, H, L, D) with 0 beyond the lengths: 0 * NaN is NaN, so that NaN there is replaced and not only masked."""
    return torch.where((torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None, :, None], x, 0)


def visible(lq: int, lk: int, problem: Problem) -> Tensor:
    """(B, Lq, Lk) bool: which valid keys each valid query may see."""
    q, k = (torch.arange(n, device=problem.key_lengths.device) for n in (lq, lk))
    mask = (q < problem.query_lengths[:, None])[:, :, None] & (k < problem.key_lengths[:, None])[:, None]
    if problem.causal:
        mask = mask & (k <= (q + problem.offsets[:, None])[..., None])
    return mask


def check_numbers(name: str, numbers: Tensor, count: int, what: str, once: str) -> None:
    """Whether numbers of things exist, each at most once in a row; looked at on a CPU alone, where it costs little.

    Args:
        name: of the argument.
        numbers: (..., K), -1 for none.
        count: how many things there are.
        what: their name in the error.
        once: the error where ``{}`` comes twice.

    Raises:
        ValueError: a number below -1 or from ``count`` on, or one twice in a row.
    """
    if numbers.device.type != "cpu" or not numbers.numel():
        return
    low, high = int(numbers.min()), int(numbers.max())
    if low < -1 or high >= count:
        raise ValueError(f"{name}: expected {what} from 0 to {count - 1}, or -1 for none, got {low} to {high}")
    order = numbers.sort(-1).values
    twice = (order[..., 1:] == order[..., :-1]) & (order[..., 1:] >= 0)
    if bool(twice.any()):
        raise ValueError(f"{name}: expected {once.format(int(order[..., 1:][twice][0]))}")
