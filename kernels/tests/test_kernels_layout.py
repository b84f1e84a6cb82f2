"""The geometry of causal blocks, against itself written out token by token."""

from __future__ import annotations

import pytest
import torch

from looseleaf_kernels import Layout


@pytest.mark.parametrize(("lq", "lk"), [(64, 64), (50, 70), (16, 90), (70, 33)])
def test_causal_blocks_are_those_with_a_visible_pair(lq: int, lk: int) -> None:
    q, k = torch.zeros(2, 1, lq, 4), torch.zeros(2, 1, lk, 4)
    lengths = torch.tensor([lq, lq // 3]), torch.tensor([lk, lk // 2])
    layout = Layout.of(q, k, 16, *lengths)
    assert (layout.rows, layout.columns) == (-(-lq // 16), -(-lk // 16))
    causal, blocks = torch.zeros(2, 1, layout.rows, layout.columns, dtype=torch.bool), layout.key_blocks
    for b in range(2):
        n, m = int(lengths[0][b]), int(lengths[1][b])
        for i in range(n):
            for j in range(min(m, max(0, i + m - n + 1))):
                causal[b, 0, i // 16, j // 16] = True
        assert blocks[b, 0].tolist() == [s < m for s in range(0, lk, 16)]
        first, last = (x[b].tolist() for x in layout.row_ends)
        for r in range(layout.rows):
            assert first[r] == r * 16 + m - n and last[r] == min(n, r * 16 + 16) - 1 + m - n
    assert torch.equal(layout.causal, causal)
    assert torch.equal(layout.index(causal).to_mask(), causal)


def test_lengths_default_to_all_rows_and_blocks_are_checked() -> None:
    q, k = torch.zeros(2, 1, 20, 4), torch.zeros(2, 1, 30, 4)
    layout = Layout.of(q, k, 16)
    assert layout.query_lengths.tolist() == [20, 20] and layout.key_lengths.tolist() == [30, 30]
    with pytest.raises(ValueError, match="block: expected an integer >= 1, got 0"):
        Layout.of(q, k, 0)
