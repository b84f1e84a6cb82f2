# mypy: disable-error-code="no-untyped-def"
"""Block-sparse attention and block means in Triton. Imported only where Triton is installed and wanted."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from looseleaf_kernels import config

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


@triton.jit
def attention_forward(Q, K, V, O, LSE, ROW_START, ROW_FULL, ROW_END, COL, ORDER, Q_LEN, K_LEN,  # noqa: E741
                      scale_log2, heads, group, nq, lq, lk,
                      D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                      CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    """One query block of one head. Entries up to ROW_FULL need no mask; those up to ROW_END do."""
    row = tl.load(ORDER + tl.program_id(0))
    block = row % nq
    head = (row // nq) % heads
    item = row // (nq * heads)
    kv_head = item * (heads // group) + head // group
    q_len = tl.load(Q_LEN + item)
    k_len = tl.load(K_LEN + item)
    at = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    row_ok = at < q_len
    d_ok = d < D
    q_base = (item * heads + head).to(tl.int64) * lq * D
    k_base = kv_head.to(tl.int64) * lk * D
    q = tl.load(Q + q_base + at[:, None] * D + d[None, :], mask=row_ok[:, None] & d_ok[None, :], other=0.0)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    position = at + k_len - q_len

    for entry in range(tl.load(ROW_START + row), tl.load(ROW_FULL + row)):
        keys = tl.load(COL + entry) * BLOCK_K + tl.arange(0, BLOCK_K)
        k = tl.load(K + k_base + keys[None, :] * D + d[:, None], mask=d_ok[:, None], other=0.0)
        v = tl.load(V + k_base + keys[:, None] * D + d[None, :], mask=d_ok[None, :], other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION) * scale_log2
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.math.exp2(s - new_top[:, None])
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = new_top

    for entry in range(tl.load(ROW_FULL + row), tl.load(ROW_END + row)):
        keys = tl.load(COL + entry) * BLOCK_K + tl.arange(0, BLOCK_K)
        key_ok = keys < k_len
        k = tl.load(K + k_base + keys[None, :] * D + d[:, None], mask=d_ok[:, None] & key_ok[None, :], other=0.0)
        v = tl.load(V + k_base + keys[:, None] * D + d[None, :], mask=d_ok[None, :] & key_ok[:, None], other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION) * scale_log2
        seen = key_ok[None, :]
        if CAUSAL:
            seen = seen & (keys[None, :] <= position[:, None])
        s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # A row that has seen no key yet has a maximum of -inf: subtract 0 there, or -inf - -inf is NaN.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.math.exp2(s - safe[:, None])
        shrink = tl.math.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = new_top

    some = (total > 0) & row_ok
    out = tl.where(some[:, None], acc / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    lse = tl.where(some, (top + tl.math.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453, float("-inf"))
    inside = at < lq
    tl.store(O + q_base + at[:, None] * D + d[None, :], out.to(O.dtype.element_ty),
             mask=inside[:, None] & d_ok[None, :])
    tl.store(LSE + (item * heads + head).to(tl.int64) * lq + at, lse, mask=inside)


@triton.jit
def mean_forward(X, OUT, LENGTHS, heads, length, count,
                 D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """One block of one head."""
    n = tl.program_id(0)
    bh = tl.program_id(1)
    valid = tl.load(LENGTHS + bh // heads)
    rows = n * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    x = tl.load(X + bh.to(tl.int64) * length * D + rows[:, None] * D + d[None, :],
                mask=(rows < valid)[:, None] & (d < D)[None, :], other=0.0)
    many = tl.minimum(tl.maximum(valid - n * BLOCK, 1), BLOCK)
    mean = tl.sum(x.to(tl.float32), 0) / many
    tl.store(OUT + (bh.to(tl.int64) * count + n) * D + d, mean, mask=d < D)


def block_sparse_attention(query: Tensor, key: Tensor, value: Tensor, row_ptr: Tensor, col: Tensor, scale: float,
                           causal: bool, block_q: int, block_k: int, query_lengths: Tensor,
                           key_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference; products in the dtype of the inputs, sums in fp32, P cast to V's dtype before P V."""
    batch, heads, lq, width = query.shape
    lk = key.shape[2]
    nq = -(-lq // block_q)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = torch.empty_like(query)
    lse = torch.empty(batch, heads, lq, dtype=torch.float32, device=query.device)
    if not batch * heads * nq:
        return out, lse
    start, full, end = split_rows(row_ptr, col, causal, block_q, block_k, query_lengths, key_lengths)
    order = torch.argsort(end - start, descending=True, stable=True).to(torch.int32)  # long rows first: an even tail
    launch = config.attention(_arch(query.device), block_q, block_k, width, query.element_size())
    attention_forward[(batch * heads * nq,)](
        query, key, value, out, lse, start, full, end, col, order, query_lengths.to(torch.int32),
        key_lengths.to(torch.int32), scale * LOG2_E, heads, heads // key.shape[1], nq, lq, lk,
        D=width, BLOCK_D=max(16, triton.next_power_of_2(width)), BLOCK_Q=block_q, BLOCK_K=block_k, CAUSAL=causal,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=launch.num_warps, num_stages=launch.num_stages)
    return out, lse


def split_rows(row_ptr: Tensor, col: Tensor, causal: bool, block_q: int, block_k: int, query_lengths: Tensor,
               key_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the entries of each query block begin, where those begin that need a mask, and where they end."""
    batch, heads, pointers = row_ptr.shape
    nq, device = pointers - 1, row_ptr.device
    start = row_ptr[..., :-1].reshape(-1).contiguous()
    end = row_ptr[..., 1:].reshape(-1).contiguous()
    # An entry is full where even the row's first query sees the block's last key.
    row_of_entry = torch.repeat_interleave((end - start).long())
    item = torch.arange(batch, device=device).repeat_interleave(heads * nq)
    bound = key_lengths[item].long()
    if causal:
        first = torch.arange(nq, device=device).repeat(batch * heads) * block_q
        bound = torch.minimum(bound, first + (key_lengths - query_lengths)[item] + 1)
    full = ((col.long() + 1) * block_k <= bound[row_of_entry]).to(torch.int32)
    return start, start + torch.zeros_like(start).index_add_(0, row_of_entry, full), end


def block_mean(x: Tensor, block: int, lengths: Tensor) -> Tensor:
    """As the reference."""
    batch, heads, length, width = x.shape
    count = -(-length // block)
    out = torch.empty(batch, heads, count, width, dtype=torch.float32, device=x.device)
    if out.numel():
        mean_forward[(count, batch * heads)](
            x.contiguous(), out, lengths.to(torch.int32), heads, length, count, D=width,
            BLOCK_D=triton.next_power_of_2(width), BLOCK=block, num_warps=4)
    return out


def _arch(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}"


def compile_jobs(head_dims: tuple[int, ...] = (64, 128), blocks: tuple[int, ...] = (64, 128)) -> list[dict[str, Any]]:
    """What is compiled ahead of time: kernel, signature and constants."""
    jobs: list[dict[str, Any]] = []
    pointers = ["ROW_START", "ROW_FULL", "ROW_END", "COL", "ORDER", "Q_LEN", "K_LEN"]
    for dtype in ("fp16", "bf16"):
        for dim in head_dims:
            for block in blocks:
                for causal in (True, False):
                    signature = {n: f"*{dtype}" for n in ("Q", "K", "V", "O")} | {"LSE": "*fp32"}
                    signature |= {n: "*i32" for n in pointers} | {"scale_log2": "fp32"}
                    signature |= {n: "i32" for n in ("heads", "group", "nq", "lq", "lk")}
                    jobs.append({
                        "name": f"attention_forward {dtype} D{dim} block{block} {'causal' if causal else 'full'}",
                        "kernel": attention_forward, "signature": signature, "head_dim": dim, "block": block,
                        "constants": {"D": dim, "BLOCK_D": dim, "BLOCK_Q": block, "BLOCK_K": block, "CAUSAL": causal,
                                      "PRECISION": "tf32"}})
        jobs.append({
            "name": f"mean_forward {dtype} D128 block128", "kernel": mean_forward, "head_dim": 128, "block": 64,
            "signature": {"X": f"*{dtype}", "OUT": "*fp32", "LENGTHS": "*i32", "heads": "i32", "length": "i32",
                          "count": "i32"},
            "constants": {"D": 128, "BLOCK_D": 128, "BLOCK": 128}})
    return jobs
