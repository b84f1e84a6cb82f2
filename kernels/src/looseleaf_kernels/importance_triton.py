# mypy: disable-error-code="no-untyped-def"
"""Block importance in Triton. Imported only where Triton is installed and wanted."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from looseleaf_kernels import config
from looseleaf_kernels.triton_kernels import LOG2_E, _arch


@triton.jit
def importance_forward(Q, K, OUT, Q_LEN, K_LEN, scale_log2, heads, group, nq, nk, lq, lk,
                       D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                       CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    """One query block of one head: first the log-sum-exp of each row, then the sum of each block. All sums are fp32."""
    block = nq - 1 - tl.program_id(0)  # long rows first: an even tail
    head = tl.program_id(1) % heads
    item = tl.program_id(1) // heads
    q_len = tl.load(Q_LEN + item)
    k_len = tl.load(K_LEN + item)
    at = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_K)
    d_ok = d < D
    q_base = (item * heads + head).to(tl.int64) * lq * D
    k_base = (item * (heads // group) + head // group).to(tl.int64) * lk * D
    out_base = ((item * heads + head).to(tl.int64) * nq + block) * nk
    row_ok = at < q_len
    q = tl.load(Q + q_base + at[:, None] * D + d[None, :], mask=row_ok[:, None] & d_ok[None, :], other=0.0)
    last = tl.where(row_ok, k_len - 1, -1)
    if CAUSAL:
        last = tl.minimum(last, at + k_len - q_len)
    blocks = (tl.max(last, 0) + BLOCK_K) // BLOCK_K  # those with a key that some row sees
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)

    for n in range(0, blocks):
        keys = n * BLOCK_K + lane
        k = tl.load(K + k_base + keys[None, :] * D + d[:, None], mask=d_ok[:, None] & (keys < k_len)[None, :],
                    other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION) * scale_log2
        s = tl.where(keys[None, :] <= last[:, None], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # A row that has seen no key yet has a maximum of -inf: subtract 0 there, or -inf - -inf is NaN.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.math.exp2(top - safe) + tl.sum(tl.math.exp2(s - safe[:, None]), 1)
        top = new_top

    lse = tl.where(total > 0, top + tl.math.log2(tl.where(total > 0, total, 1.0)), 0.0)
    for n in range(0, nk):
        found = 0.0
        if n < blocks:
            keys = n * BLOCK_K + lane
            k = tl.load(K + k_base + keys[None, :] * D + d[:, None], mask=d_ok[:, None] & (keys < k_len)[None, :],
                        other=0.0)
            s = tl.dot(q, k, input_precision=PRECISION) * scale_log2
            s = tl.where(keys[None, :] <= last[:, None], s, float("-inf"))
            found = tl.sum(tl.sum(tl.math.exp2(s - lse[:, None]), 1), 0)
        tl.store(OUT + out_base + n, found)


def block_importance(query: Tensor, key: Tensor, block_q: int, block_k: int, scale: float, causal: bool,
                     query_lengths: Tensor, key_lengths: Tensor) -> Tensor:
    """As the reference; products in the dtype of the inputs, everything else in fp32."""
    batch, heads, lq, width = query.shape
    lk = key.shape[2]
    nq, nk = -(-lq // block_q), -(-lk // block_k)
    out = torch.zeros(batch, heads, nq, nk, dtype=torch.float32, device=query.device)
    if out.numel():
        launch = config.attention(_arch(query.device), block_q, block_k, width, query.element_size())
        importance_forward[(nq, batch * heads)](
            query.contiguous(), key.contiguous(), out, query_lengths.to(torch.int32), key_lengths.to(torch.int32),
            scale * LOG2_E, heads, heads // key.shape[1], nq, nk, lq, lk, D=width,
            BLOCK_D=max(16, triton.next_power_of_2(width)), BLOCK_Q=block_q, BLOCK_K=block_k, CAUSAL=causal,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=launch.num_warps,
            num_stages=launch.num_stages)
    return out


def compile_jobs() -> list[dict[str, Any]]:
    """What is compiled ahead of time: kernel, signature and constants."""
    jobs = []
    for dtype in ("fp16", "bf16"):
        for dim in (64, 128):
            for block in (64, 128):
                for causal in (True, False):
                    signature = {"Q": f"*{dtype}", "K": f"*{dtype}", "OUT": "*fp32", "Q_LEN": "*i32", "K_LEN": "*i32",
                                 "scale_log2": "fp32"}
                    signature |= {n: "i32" for n in ("heads", "group", "nq", "nk", "lq", "lk")}
                    jobs.append({
                        "name": f"importance_forward {dtype} D{dim} block{block} {'causal' if causal else 'full'}",
                        "kernel": importance_forward, "signature": signature, "head_dim": dim, "block": block,
                        "constants": {"D": dim, "BLOCK_D": dim, "BLOCK_Q": block, "BLOCK_K": block, "CAUSAL": causal,
                                      "PRECISION": "tf32"}})
    return jobs
