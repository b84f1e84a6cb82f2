"""Sensitivities: exact, independent of the batch, in float32, loud about NaN."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from looseleaf import UnsupportedModelError
from looseleaf.testing.models import tied_llama as tiny_llama
from looseleaf_leaf import input_gradient_norms
from looseleaf_leaf.sensitivity import min_max

torch.set_num_threads(1)


class Toy(nn.Module):
    """Embeddings, a causal mean, a nonlinear layer: small enough for finite differences."""

    def __init__(self, vocabulary: int = 11, width: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.out = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.drop = nn.Dropout(dropout)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
                attention_mask: Tensor | None = None) -> Any:
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        weight = torch.ones(x.shape[:2]) if attention_mask is None else attention_mask
        weight = weight.to(x.dtype)[..., None]
        mean = (x * weight).cumsum(1) / weight.cumsum(1).clamp(min=1)
        return SimpleNamespace(logits=self.out(torch.tanh(self.drop(mean))))


def sample(ids: list[int], response: int) -> dict[str, Tensor]:
    tokens = torch.tensor([ids])
    labels = tokens.clone()
    labels[:, :-response] = -100
    return {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}


def padded(samples: list[dict[str, Tensor]], left: bool, fill: int = 0) -> dict[str, Tensor]:
    width = max(s["input_ids"].shape[1] for s in samples)
    out = {}
    for key, empty in (("input_ids", fill), ("labels", -100), ("attention_mask", 0)):
        out[key] = torch.cat([nn.functional.pad(s[key], (gap, 0) if left else (0, gap), value=empty)
                              for s in samples for gap in [width - s[key].shape[1]]])
    return out


def test_norms_are_those_of_finite_differences() -> None:
    model, batch, step = Toy().double(), sample([3, 1, 4, 1, 5, 9, 2], 3), 1e-6
    embedded = model.embed(batch["input_ids"]).detach()

    @torch.no_grad()
    def loss(x: Tensor) -> float:
        logits = model(inputs_embeds=x).logits[0, 3:6]
        return float(nn.functional.cross_entropy(logits, batch["labels"][0, 4:]))

    expected = torch.zeros(7, dtype=torch.float64)
    for token in range(7):
        for axis in range(3):
            bump = torch.zeros_like(embedded)
            bump[0, token, axis] = step
            expected[token] += ((loss(embedded + bump) - loss(embedded - bump)) / (2 * step)) ** 2
    norms = input_gradient_norms(model, batch)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms[0], expected.sqrt(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("build", [Toy, tiny_llama])
def test_a_row_is_what_it_is_alone(build: Callable[[], Any], left: bool) -> None:
    model = build()
    samples = [sample([3, 1, 4, 1, 5, 9, 2], 2), sample([8, 7, 1], 1), sample([2, 2, 6, 6, 4], 3)]
    together = input_gradient_norms(model, padded(samples, left))
    for row, alone in enumerate(samples):
        length = alone["input_ids"].shape[1]
        mine = together[row, -length:] if left else together[row, :length]
        torch.testing.assert_close(mine, input_gradient_norms(model, alone)[0], rtol=1e-4, atol=1e-7)
        rest = together[row, :-length] if left else together[row, length:]
        assert not rest.any()


def test_what_stands_in_padding_does_not_matter() -> None:
    model, samples = tiny_llama(), [sample([3, 1, 4, 1, 5], 2), sample([8, 7, 1], 1)]
    a, b = (input_gradient_norms(model, padded(samples, False, fill=fill)) for fill in (0, 9))
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_norms(dtype: torch.dtype) -> None:
    batch = sample([3, 1, 4, 1, 5, 9, 2], 3)
    exact = input_gradient_norms(tiny_llama(), batch)
    norms = input_gradient_norms(tiny_llama().to(dtype), batch)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, exact, rtol=0.1, atol=0.02 * float(exact.max()))


def test_small_float16_gradients_do_not_underflow() -> None:
    class Sure(Toy):  # certain of its answer: the gradient on its logits is about 1e-7
        def forward(self, *given: Any, **named: Any) -> Any:
            out = super().forward(*given, **named).logits
            bonus = torch.zeros_like(out)
            bonus[..., 2] = 16.0
            return SimpleNamespace(logits=out + bonus)

    batch = sample([3, 1, 4, 2], 1)
    exact, half = input_gradient_norms(Sure(), batch), input_gradient_norms(Sure().half(), batch)
    assert 0 < float(exact.max()) < 1e-6
    torch.testing.assert_close(half / half.max(), exact / exact.max(), rtol=0.02, atol=0.02)


def test_one_large_float16_gradient_does_not_overflow() -> None:
    model = Toy().half()
    with torch.no_grad():
        model.out.weight.mul_(100)
    assert bool(input_gradient_norms(model, sample([3, 1, 4, 2], 1)).isfinite().all())


def test_gradients_that_are_no_numbers_are_named() -> None:
    model = Toy()
    with torch.no_grad():
        model.embed.weight[9] = torch.nan
    batch = padded([sample([3, 1, 4], 1), sample([3, 9, 4], 1)], False)
    with pytest.raises(ValueError, match=r"the student are NaN or infinite in rows \[1\]"):
        input_gradient_norms(model, batch, "student")


def test_the_model_is_left_as_it_was_even_after_an_error() -> None:
    model = Toy(dropout=0.5).train()
    model.embed.eval()
    batch = sample([3, 1, 4, 2], 1)
    assert torch.equal(input_gradient_norms(model, batch), input_gradient_norms(model, batch)), "dropout is off"
    with torch.no_grad():
        model.out.weight.fill_(torch.nan)
    with pytest.raises(ValueError):
        input_gradient_norms(model, batch)
    assert model.training and model.drop.training and not model.embed.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_works_where_gradients_are_off_and_for_frozen_models() -> None:
    model, batch = Toy(), sample([3, 1, 4, 2], 1)
    expected = input_gradient_norms(model, batch)
    with torch.no_grad():
        assert torch.equal(input_gradient_norms(model, batch), expected)
    with torch.inference_mode():
        assert torch.equal(input_gradient_norms(model, batch), expected)
    assert torch.equal(input_gradient_norms(model.requires_grad_(False), batch), expected)


def test_min_max() -> None:
    values = torch.tensor([[1.0, 3.0, 2.0, 99.0], [0.5, 0.5, 0.5, 0.0], [4.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False]] * 2 + [[False] * 4])
    assert min_max(values, mask).tolist() == [[0.0, 1.0, 0.5, 0.0], [0.5, 0.5, 0.5, 0.0], [0.0] * 4]


def test_token_ids_of_another_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"teacher knows 0 to 10.*teacher_tokenizer"):
        input_gradient_norms(Toy(), sample([3, 11, 4], 1), "teacher")


def test_a_model_without_embeddings() -> None:
    with pytest.raises(UnsupportedModelError, match="input embeddings"):
        input_gradient_norms(nn.Linear(2, 2), sample([3, 1, 4], 1))
