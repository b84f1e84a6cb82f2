"""The conformance kit of attention backends."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from looseleaf.attention.attach import attach
from looseleaf.attention.call import AttentionBackend, AttentionCall
from looseleaf.testing.common import Findings, check_plugin

ATOL, RTOL = 2e-4, 2e-3


def check_attention_backend(cls: type[AttentionBackend], make: Callable[[], AttentionBackend] | None = None, *,
                            length: int = 384) -> None:
    """Everything an attention backend must do.

    Args:
        cls: the backend class.
        make: how to make one for the checks, such as one with small blocks so that the method is at work on short
            inputs; None: as ``cls.conformance()`` says, or by the defaults.
        length: tokens of the test inputs.

    Raises:
        AssertionError: with every check that failed, one a line.
    """
    make = make or cls.conformance().get("make", cls)
    findings = Findings(cls.__name__)
    check_plugin(findings, cls, AttentionBackend, make)
    if any(f.startswith(("is a dataclass", "constructs")) for f in findings.failures):
        findings.finish()
    with torch.no_grad():
        _calls(findings, make, length)
        _models(findings, make, length)
        if cls.changes == "encode":
            _denoising(findings, make, length)
    findings.finish()


def tensors(length: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, keys: int | None = None,
            width: int = 32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, Hq, L, D), key and value (B, Hkv, keys, D) with some structure: a few keys that everybody likes."""
    g = torch.Generator().manual_seed(seed)
    keys = length if keys is None else keys
    query = torch.randn(batch, heads, length, width, generator=g)
    key = torch.randn(batch, kv_heads, keys, width, generator=g)
    value = torch.randn(batch, kv_heads, keys, width, generator=g)
    if keys:
        key[:, :, 0] += query.mean((1, 2))[:, None] * 8
    return query, key, value


def _call(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> AttentionCall:
    given = {"is_causal": True, "phase": "prefill", **given}
    return AttentionCall(query, key, value, query.shape[-1] ** -0.5, **given)


def _calls(findings: Findings, make: Callable[[], AttentionBackend], length: int) -> None:
    q, k, v = tensors(length)
    with findings.check("shape and dtype"):
        for dtype in (torch.float32, torch.bfloat16):
            out = make().attend(_call(q.to(dtype), k.to(dtype), v.to(dtype)))
            assert out.shape == q.shape and out.dtype == dtype, \
                f"{tuple(out.shape)} {out.dtype} from a query of {tuple(q.shape)} {dtype}"
            assert bool(torch.isfinite(out).all()), f"not finite for {dtype}"
    with findings.check("inputs are left unchanged"):
        copies = [x.clone() for x in (q, k, v)]
        make().attend(_call(q, k, v))
        assert all(torch.equal(a, b) for a, b in zip(copies, (q, k, v), strict=True)), "attend wrote into its inputs"
    with findings.check("determinism"):
        assert torch.equal(make().attend(_call(q, k, v)), make().attend(_call(q, k, v))), "two runs differ"
    with findings.check("causality"):
        backend, at = make(), length // 2
        changed_k, changed_v = k.clone(), v.clone()
        changed_v[:, :, at:] = 100.0
        one, two = backend.attend(_call(q, k, v)), make().attend(_call(q, changed_k, changed_v))
        _same(one[:, :, :at], two[:, :, :at], "later values reach earlier queries")
    with findings.check("batch items do not see each other"):
        order = torch.tensor([1, 0])
        _same(make().attend(_call(q, k, v))[order], make().attend(_call(q[order], k[order], v[order])),
              "swapping the batch items does not swap the outputs")
    with findings.check("grouped-query attention"):
        _same(make().attend(_call(q, k, v)),
              make().attend(_call(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))),
              "differs from the same with keys and values repeated")
    with findings.check("padding"):
        short = length - length // 3
        lengths = torch.tensor([length, short])
        pq, pk, pv = q.clone(), k.clone(), v.clone()
        for x in (pq, pk, pv):
            x[1, :, short:] = torch.nan
        out = make().attend(_call(pq, pk, pv, query_lengths=lengths, key_lengths=lengths))
        alone = make().attend(_call(q[1:, :, :short], k[1:, :, :short], v[1:, :, :short]))
        _same(out[:1], make().attend(_call(q[:1], k[:1], v[:1])), "the full item differs from the item alone")
        _same(out[1:, :, :short], alone, "the padded item differs from the item alone")
    with findings.check("a row that is all padding"):
        lengths = torch.tensor([length, 0])
        out = make().attend(_call(q, k, v, query_lengths=lengths, key_lengths=lengths))
        _same(out[:1], make().attend(_call(q[:1], k[:1], v[:1])), "it changes the other item")
    with findings.check("decode is exact"):
        call = _call(q[:, :, -1:], k, v, phase="decode")
        _same(make().attend(call), call.dense(), "a single query differs from exact attention")
    with findings.check("an extra mask is honoured"):
        g = torch.Generator().manual_seed(1)
        mask = torch.rand(1, 1, length, length, generator=g) > 0.5
        mask |= torch.eye(length, dtype=torch.bool)
        changed = v.clone()
        hidden = int(torch.arange(length)[~mask[0, 0, -1]][0])
        changed[:, :, hidden] += 100.0
        one = make().attend(_call(q, k, v, mask=mask))
        two = make().attend(_call(q, k, changed, mask=mask))
        _same(one[:, :, -1], two[:, :, -1], "the last query sees a key that the mask hides")
    with findings.check("chunked prefill"):
        half = length // 2
        out = make().attend(_call(q[:, :, half:], k, v))
        assert out.shape == q[:, :, half:].shape and bool(torch.isfinite(out).all())
        later = v.clone()
        later[:, :, -1] += 100.0
        _same(out[:, :, :-1], make().attend(_call(q[:, :, half:], k, later))[:, :, :-1],
              "with Lq < Lk the last key reaches earlier queries")
    with findings.check("short input"):
        for n in (1, 2, 7):
            call = _call(q[:, :, :n], k[:, :, :n], v[:, :, :n])
            assert make().attend(call).shape == (2, 4, n, 32), f"length {n}"
            _same(make().attend(call)[:, :, :1], call.dense()[:, :, :1], f"the first query of {n} sees only itself")
    with findings.check("empty input"):
        assert make().attend(_call(q[:, :, :0], k[:, :, :0], v[:, :, :0])).shape == (2, 4, 0, 32)
    with findings.check("signature of scaled_dot_product_attention"):
        _same(make()(q, k, v, is_causal=True, enable_gqa=True), make().attend(_call(q, k, v)), "differs from attend")
    with findings.check("large scores"):
        out = make().attend(_call(q * 1e4, k, v))
        assert bool(torch.isfinite(out).all()), "not finite for scores of 1e4"


STEPS = 5
"""Denoising steps of a run in the checks."""


def _denoise(backend: AttentionBackend, query: Tensor, key: Tensor, value: Tensor,
             lengths: Tensor | None = None) -> list[Tensor]:
    """The outputs of a run of bidirectional calls with the same tensors."""
    state = SimpleNamespace()
    return [backend.attend(_call(query, key, value, is_causal=False, phase="encode", step=step, steps=STEPS,
                                 state=state, query_lengths=lengths, key_lengths=lengths)) for step in range(STEPS)]


def _denoising(findings: Findings, make: Callable[[], AttentionBackend], length: int) -> None:
    q, k, v = tensors(length)

    def same(one: list[Tensor], two: list[Tensor], message: str) -> None:
        for step, (a, b) in enumerate(zip(one, two, strict=True)):
            _same(a, b, f"step {step}: {message}")

    with findings.check("denoising: at work"):
        said: list[dict[str, Any]] = []
        backend, state = make(), SimpleNamespace()
        for step in range(STEPS):
            said.append({})
            backend.attend(_call(q, k, v, is_causal=False, phase="encode", step=step, steps=STEPS, state=state,
                                 record=said[-1].update))
        assert not all("fallback" in r for r in said), \
            f"every call fell back ({said[-1].get('fallback')}): give the kit one that is at work on {length} tokens"
    with findings.check("denoising: shape and dtype"):
        for dtype in (torch.float32, torch.bfloat16):
            for out in _denoise(make(), q.to(dtype), k.to(dtype), v.to(dtype)):
                assert out.shape == q.shape and out.dtype == dtype and bool(torch.isfinite(out).all()), \
                    f"{tuple(out.shape)} {out.dtype} from a query of {tuple(q.shape)} {dtype}, or not finite"
    with findings.check("denoising: inputs are left unchanged, two runs agree"):
        copies = [x.clone() for x in (q, k, v)]
        one, two = _denoise(make(), q, k, v), _denoise(make(), q, k, v)
        assert all(torch.equal(a, b) for a, b in zip(copies, (q, k, v), strict=True)), "attend wrote into its inputs"
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), "two runs differ"
    with findings.check("denoising: batch items do not see each other"):
        order = torch.tensor([1, 0])
        same([o[order] for o in _denoise(make(), q, k, v)], _denoise(make(), q[order], k[order], v[order]),
             "swapping the batch items does not swap the outputs")
    with findings.check("denoising: grouped-query attention"):
        same(_denoise(make(), q, k, v), _denoise(make(), q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)),
             "differs from the same with keys and values repeated")
    with findings.check("denoising: padding"):
        short = length - length // 3
        lengths = torch.tensor([length, short])
        padded = [x.clone() for x in (q, k, v)]
        for x in padded:
            x[1, :, short:] = torch.nan
        outs = _denoise(make(), padded[0], padded[1], padded[2], lengths)
        same([o[:1] for o in outs], _denoise(make(), q[:1], k[:1], v[:1]), "the full item differs from the item alone")
        alone = _denoise(make(), q[1:], k[1:], v[1:], lengths[1:])
        same([o[1:, :, :short] for o in outs], [o[:, :, :short] for o in alone],
             "what lies in the padding, or the other item, changes the padded item")


def _models(findings: Findings, make: Callable[[], AttentionBackend], length: int) -> None:
    model = tiny_llama()
    ids = torch.arange(2 * length).view(2, length) * 7 % 61
    before = model(ids).logits
    with findings.check("in a model: restored after an exception"):
        name = model.config._attn_implementation
        try:
            with attach(model, make()):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert model.config._attn_implementation == name, "the model keeps the backend"
        assert torch.equal(model(ids).logits, before), "the model computes something else than before"
    with findings.check("in a model: left and right padding"):
        short = length - length // 4
        with attach(model, make()) as attached:
            alone = model(ids[1:, :short]).logits
            attached.reset()
            padded = ids.clone()
            padded[1, short:] = 0
            mask = torch.ones_like(ids)
            mask[1, short:] = 0
            _same(model(padded, attention_mask=mask).logits[1:, :short], alone, "right padding changes the item")
            attached.reset()
            left, mask = padded.roll(length - short, 1), mask.roll(length - short, 1)
            left[0], mask[0] = padded[0], 1
            position = (mask.cumsum(1) - 1).clamp(min=0)
            _same(model(left, attention_mask=mask, position_ids=position).logits[1:, length - short:], alone,
                  "left padding changes the item")
            assert attached.records and attached.report().to_text(), "nothing recorded"
    with findings.check("in a model: layers with a sliding window are left alone"):
        windowed = tiny_gemma3()
        before = windowed(ids).logits
        with attach(windowed, make()) as attached:
            after = windowed(ids).logits
            assert {r["layer"] for r in attached.records} == {1}, "layer 0 has a window of its own"
        assert after.shape == before.shape and torch.equal(windowed(ids).logits, before), "the model is another now"
    with findings.check("in a model: generation"):
        with attach(model, make()):
            out = model.generate(ids[:, :40], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert out.shape == (2, 43)


def tiny_llama(seed: int = 0, vocabulary: int = 64) -> Any:
    """A small Llama with random weights: 2 layers, 4 query heads, 2 key heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                             initializer_range=0.2)
        return LlamaForCausalLM(config).eval()


def tiny_gemma3(seed: int = 0) -> Any:
    """A small Gemma 3 with random weights, whose layer 0 has a sliding window."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Gemma3ForCausalLM(Gemma3TextConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, sliding_window=32, max_position_embeddings=2048,
            layer_types=["sliding_attention", "full_attention"])).eval()


def _same(one: Tensor, two: Tensor, message: str) -> None:
    assert one.shape == two.shape, f"{message}: shapes {tuple(one.shape)} and {tuple(two.shape)}"
    gap = float((one.float() - two.float()).abs().max()) if one.numel() else 0.0
    assert torch.allclose(one.float(), two.float(), atol=ATOL, rtol=RTOL), f"{message} (largest difference {gap:.3g})"


__all__ = ["check_attention_backend", "tensors", "tiny_llama"]
