"""Which blocks are kept: counts, parts, lengths, and the importance that says so."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from looseleaf import AttentionCall
from looseleaf.testing.attention import tensors
from looseleaf_sparsed import SparseD, blocks_kept, prompt_blocks, select_blocks


def call_of(q: Tensor, k: Tensor, v: Tensor, **given: object) -> AttentionCall:
    return AttentionCall(q, k, v, q.shape[-1] ** -0.5, is_causal=False, phase="bidirectional", **given)


def materialised(q: Tensor, k: Tensor, block: int) -> Tensor:
    """(H, Nq, Nk) mean probability of each block of one item, from the whole L x L matrix, the last blocks padded."""
    group = len(q) // len(k)
    a = torch.softmax(q @ k.repeat_interleave(group, 0).transpose(1, 2) * q.shape[-1] ** -0.5, -1)
    rows, columns = (-(-n // block) for n in a.shape[1:])
    out = torch.zeros(len(q), rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = a[:, i * block:(i + 1) * block, j * block:(j + 1) * block]
            out[:, i, j] = part.abs().sum((1, 2)) / block ** 2
    return out


def written_out(importance: Tensor, length: int, prompt: int, block: int, select: float) -> Tensor:
    """The kept blocks of one item, (H, Nq, Nk), from the definition."""
    blocks = range(-(-length // block))
    boundary = [j for j in blocks if j * block < prompt] if 0 < prompt < length else []
    first, second = boundary, [j for j in blocks if j not in boundary]
    if not second:
        first, second = boundary[:-1], boundary[-1:]
    kept = torch.zeros_like(importance, dtype=torch.bool)
    for h in range(importance.shape[0]):
        for i in range(importance.shape[1]):
            for part in (first, second):
                k = max(1, math.floor(len(part) * select) + 1)
                for j in sorted(part, key=lambda j: -float(importance[h, i, j]))[:k]:
                    kept[h, i, j] = True
    return kept


@pytest.mark.parametrize(("blocks", "select", "kept"), [
    (16, 0.3, 5), (10, 0.3, 4), (10, 0.5, 6), (2, 0.3, 1), (1, 0.3, 1), (0, 0.3, 0), (7, 1.0, 7), (100, 0.29, 30)])
def test_one_block_more_than_the_fraction(blocks: int, select: float, kept: int) -> None:
    assert blocks_kept(blocks, select) == kept


@pytest.mark.parametrize(("prompt", "length", "blocks"), [
    (64, 256, 2),  # between blocks
    (65, 256, 3), (95, 256, 3),  # inside a block: it is the prompt's
    (230, 256, 7), (240, 250, 7),  # inside the last block: that is the response's
    (0, 256, 0), (256, 256, 0), (300, 256, 0),  # one part only
    (5, 20, 0)])  # all in one block
def test_the_boundary_of_prompt_and_response(prompt: int, length: int, blocks: int) -> None:
    assert prompt_blocks(prompt, length, 32) == blocks


def test_ties_go_to_the_first_blocks() -> None:
    kept = select_blocks(torch.ones(1, 1, 1, 10), [160], [80], 16, 0.3)
    assert kept[0, 0, 0].nonzero().flatten().tolist() == [0, 1, 5, 6]


@pytest.mark.parametrize(("length", "prompt"), [(256, None), (250, 96), (250, 100), (250, 245), (97, 10)])
def test_the_pattern_is_that_of_the_materialised_matrix(length: int, prompt: int | None) -> None:
    q, k, v = tensors(length)
    plugin = SparseD(block_size=16, min_length=1, prompt_tokens=prompt)
    index, density = plugin.pattern(call_of(q, k, v))
    mask = index.to_mask()
    for b in range(2):
        wanted = written_out(materialised(q[b], k[b], 16), length, prompt or 0, 16, plugin.select)
        assert torch.equal(mask[b], wanted), (b, (mask[b] != wanted).nonzero()[:5])
    assert float(density) == pytest.approx(float(mask.float().mean())) and float(density) < 0.5


@pytest.mark.parametrize("lengths", [(330, 301), (330, 17), (200, 330)])
def test_padding_does_not_vote(lengths: tuple[int, int]) -> None:
    """Each item of a padded batch keeps the blocks that it keeps alone, whatever stands in the padding."""
    q, k, v = tensors(330)
    alone = []
    for b, n in enumerate(lengths):
        plugin = SparseD(block_size=16, min_length=1, prompt_tokens=[100, 10][b])
        alone.append(plugin.pattern(call_of(*(x[b:b + 1, :, :n].clone() for x in (q, k, v))))[0].to_mask()[0])
        for x in (q, k, v):
            x[b, :, n:] = torch.nan
    valid = torch.tensor(lengths)
    plugin = SparseD(block_size=16, min_length=1, prompt_tokens=[100, 10])
    index, density = plugin.pattern(call_of(q, k, v, query_lengths=valid, key_lengths=valid))
    mask = index.to_mask()
    for b, n in enumerate(lengths):
        blocks = -(-n // 16)
        assert torch.equal(mask[b, :, :blocks, :blocks], alone[b])
        assert not mask[b, :, blocks:].any() and not mask[b, :, :, blocks:].any()
    possible = sum((-(-n // 16)) ** 2 for n in lengths) * 4
    assert float(density) == pytest.approx(sum(int(m.sum()) for m in alone) / possible)


def test_short_items_of_a_batch_are_exact() -> None:
    q, k, v = tensors(330)
    valid = torch.tensor([330, 60])
    mask = SparseD(block_size=16, min_length=64).pattern(
        call_of(q, k, v, query_lengths=valid, key_lengths=valid))[0].to_mask()
    assert mask[1, :, :4, :4].all() and not mask[0].all()


def test_prompts_for_each_item() -> None:
    assert SparseD().prompts([9, 5]) == [0, 0] and SparseD(prompt_tokens=5).prompts([9, 5]) == [5, 5]
    assert SparseD(prompt_tokens=(3, 4)).prompts([9, 5]) == [3, 4]
    for given in (10, [3], [3, 4, 5], [1, 10]):
        with pytest.raises(ValueError, match=r"SparseD\.prompt_tokens: expected .* of 2 items, .* 9, 5 tokens .*, got"):
            SparseD(prompt_tokens=given).prompts([9, 5])


@pytest.mark.parametrize(("field", "value"), [
    ("skip", -0.1), ("skip", 1.1), ("select", 0.0), ("select", 1.5), ("block_size", 48), ("min_length", 0),
    ("min_length", 1.5), ("prompt_tokens", -1), ("prompt_tokens", 2.5), ("prompt_tokens", [3, -1])])
def test_bad_parameters(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"SparseD\.{field}: expected .*, got "):
        SparseD(**{field: value})
