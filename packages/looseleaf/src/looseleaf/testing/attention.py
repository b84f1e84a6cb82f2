"""The conformance kit of attention backends."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looseleaf.attention.attach import attach
from looseleaf.attention.call import AttentionBackend, AttentionCall
from looseleaf.pruning.masks import Masks
from looseleaf.testing.common import Kit, Skip, assert_unchanged, interrupt, needs, reloaded, snapshot
from looseleaf.testing.models import seeded, tiny_bert, tiny_gemma3, tiny_llama

STEPS = 5
"""Denoising steps of a run in the checks."""


def tensors(length: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, keys: int | None = None,
            head_dim: int = 32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, Hq, L, D), key and value (B, Hkv, keys, D) with a key that every query attends to."""
    g = torch.Generator().manual_seed(seed)
    keys = length if keys is None else keys
    query = torch.randn(batch, heads, length, head_dim, generator=g)
    key = torch.randn(batch, kv_heads, keys, head_dim, generator=g)
    value = torch.randn(batch, kv_heads, keys, head_dim, generator=g)
    if keys:
        key[:, :, 0] += query.mean((1, 2))[:, None] * 8
    return query, key, value


class AttentionKit(Kit):
    """What an attention backend must do, in the phases that it is for.

    Calls have 2 items, 4 query heads and 2 key heads; models have 2 layers. Bidirectional methods see a run of
    :data:`STEPS` denoising steps.

    Args:
        cls: the backend class.
        make: makes an instance whose method is at work on ``length`` tokens, such as one with small blocks; None:
            ``cls``.
        length: tokens of the inputs.
        keeps_own_key: a query always attends to the key at its own place.
    """

    interface = AttentionBackend

    def __init__(self, cls: type[AttentionBackend], make: Callable[[], AttentionBackend] | None = None,
                 length: int = 384, keeps_own_key: bool = True) -> None:
        super().__init__(cls, make)
        self.length, self.keeps_own_key, self.phases = length, keeps_own_key, cls.phases
        self.causal = "bidirectional" not in cls.phases
        self.phase = next(p for p in ("bidirectional", "prefill", "decode") if p in cls.phases)
        self.total = None if self.causal else STEPS
        self.steps: list[int | None] = [None] if self.causal else [*range(STEPS)]
        self.rows = 1 if self.phase == "decode" else length
        query, key, value = tensors(length)
        self.qkv = query[:, :, length - self.rows:], key, value
        self.ids = torch.arange(2 * length).view(2, length) * 7 % 61
        self.records: list[dict[str, Any]] = []

    def call(self, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> AttentionCall:
        """A call in the phase that the method is for."""
        return AttentionCall(query, key, value, query.shape[-1] ** -0.5,
                             **{"is_causal": self.causal, "phase": self.phase, **given})

    @torch.no_grad()
    def run(self, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        """The outputs of one causal call, or of a run of bidirectional calls with the same tensors: (steps, ...)."""
        backend, given = self.make(), {"state": SimpleNamespace(), "layers": 2, "steps": self.total, **given}
        self.records = [{} for _ in self.steps]
        outs = [backend.compute(self.call(query, key, value, step=step, record=values.update, **given))
                for step, values in zip(self.steps, self.records)]
        assert {out.dtype for out in outs} == {query.dtype}, f"{outs[0].dtype} from a query of {query.dtype}"
        return torch.stack(outs)

    def model(self, dropout: float = 0.0) -> Any:
        """A decoder, or for bidirectional methods an encoder, with attention dropout."""
        return tiny_llama(attention_dropout=dropout) if self.causal else tiny_bert(attention_probs_dropout_prob=dropout)

    def attended(self, model: Any, *inputs: Tensor, host: Any = None, backend: Any = None, layers: Any = None,
                 context: Any = None, then: Callable[[], Any] = lambda: None, **named: Any) -> Tensor:
        """What a model computes, at the last step for bidirectional methods, with the backend in it or in ``host``.

        ``then`` is called before the model gets its own attention back.
        """
        with attach(model if host is None else host, backend or self.make(), layers, steps=self.total) as attached:
            attached.context.update(context or {})
            for attached.step in self.steps:
                out = model(*inputs or (self.ids,), **named)
            then()
        self.records = attached.records
        assert self.records and attached.report().to_text(), "nothing recorded"
        found: Tensor = out if isinstance(out, Tensor) else out[0]
        return found

    @torch.no_grad()
    def use(self, subject: Any) -> dict[str, Tensor]:
        return {"the output": self.run(**subject) if isinstance(subject, dict) else self.attended(subject)}

    def inputs(self) -> dict[str, Tensor]:
        """The tensors of a call."""
        return {name: x.clone() for name, x in zip(("query", "key", "value"), self.qkv)}

    def check_the_method_is_at_work(self) -> None:
        outs, exact = self.run(*self.qkv), self.call(*self.qkv).dense()
        own = [(out, r) for out, r in zip(outs, self.records) if "fallback" not in r]
        assert own, f"every call fell back ({self.records[-1].get('fallback')}): give the kit a make() whose method " \
                    f"is at work on {self.length} tokens, in conformance()"
        sparse = any(float(torch.as_tensor(r.get("density", 1.0))) < 1 for _, r in own)
        assert sparse or any(_far(out, exact).any() for out, _ in own), \
            "the output is that of exact attention, and no density below 1 is recorded"

    def check_shape_and_dtype(self) -> None:
        q, k, v = self.qkv
        for dtype, size in ((torch.float32, 32), (torch.bfloat16, 32), (torch.float32, 16)):
            out = self.run(q.to(dtype), k.to(dtype), v[..., :size].to(dtype))
            assert out.shape[1:] == (*q.shape[:3], size), \
                f"{tuple(out.shape[1:])} from a query of {tuple(q.shape)} and values of size {size}"
            assert bool(torch.isfinite(out).all()), f"not finite for {dtype} and values of size {size}"

    def check_inputs_are_left_unchanged(self) -> None:
        self.leaves_subject(self.inputs)

    def check_determinism(self) -> None:
        self.same_result(self.inputs)

    def unseen(self, hidden: Tensor, rows: slice, message: str, first_query: int = 0, **given: Any) -> None:
        """AssertionError unless rows of the output are the same whatever the values of ``hidden`` keys (L,) are."""
        q, k, v = self.qkv
        one, two = (self.run(q[:, :, first_query:], k, x, **given) for x in (v, v.masked_fill(hidden[:, None], 100.0)))
        assert one.shape[3] == self.rows - first_query and bool(torch.isfinite(one).all()), "not finite, or other rows"
        _same(one[..., rows, :], two[..., rows, :], message)

    def check_causality(self) -> None:
        needs(self.phase == "prefill", "not for causal prefill")
        half = self.length // 2
        self.unseen(torch.arange(self.length) >= half, slice(half), "later values reach earlier queries")

    def check_batch_items_do_not_see_each_other(self) -> None:
        outs = self.run(*self.qkv)
        _same(outs.flip(1), self.run(*(x.flip(0) for x in self.qkv)),
              "swapping the batch items does not swap the outputs")
        _same(outs[:, :1], self.run(*(x[:1] for x in self.qkv)), "an item differs from the item alone")

    def check_grouped_query_attention(self) -> None:
        q, k, v = self.qkv
        _same(self.run(q, k, v), self.run(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)),
              "differs from the same with keys and values repeated")

    def check_padding(self) -> None:
        short = self.length - self.length // 3
        keys = torch.tensor([self.length, short])
        queries = keys.clamp(max=self.rows)
        padded = self.inputs()
        for x in padded.values():
            x[1, :, short:] = torch.nan
        outs = self.run(**padded, query_lengths=queries, key_lengths=keys)
        _same(outs[:, :1], self.run(*(x[:1] for x in self.qkv)), "the full item differs from the item alone")
        if self.causal:
            alone = self.run(*(x[1:, :, :short] for x in self.qkv))
        else:  # methods that know their number of tokens are padded alone, too
            alone = self.run(*(x[1:] for x in self.qkv), query_lengths=queries[1:], key_lengths=keys[1:])
        _same(outs[:, 1:, :, :short], alone[:, :, :, :short],
              "what lies in the padding, or the other item, changes the padded item")

    def check_a_row_that_is_all_padding(self) -> None:
        keys = torch.tensor([self.length, 0])
        outs = self.run(*self.qkv, query_lengths=keys.clamp(max=self.rows), key_lengths=keys)
        _same(outs[:, :1], self.run(*(x[:1] for x in self.qkv)), "it changes the other item")

    def check_other_phases_are_exact(self) -> None:
        q, k, v = tensors(self.length)
        for phase, rows in (("decode", 1), ("decode", 5), ("prefill", self.length), ("bidirectional", self.length)):
            if phase not in self.phases:
                call = self.call(q[:, :, -rows:], k, v, phase=phase, is_causal=phase != "bidirectional")
                _same(self.make().compute(call), call.dense(), f"a {phase} call differs from exact attention")

    def check_an_extra_mask_is_honoured(self) -> None:
        mask = torch.rand(1, 1, self.rows, self.length, generator=torch.Generator().manual_seed(1)) > 0.5
        mask[..., -1] |= True
        self.unseen(~mask[0, 0, -1], slice(-1, None), "the last query sees a hidden key", mask=mask)

    def check_chunked_prefill(self) -> None:
        needs(self.phase == "prefill", "not for causal prefill")
        self.unseen(torch.arange(self.length) == self.length - 1, slice(-1),
                    "with Lq < Lk the last key reaches earlier queries", first_query=self.length // 2)

    def check_short_and_empty_input(self) -> None:
        needs(self.causal, "bidirectional methods may know their number of tokens")
        for n in (0, 1, 2, 7):
            qkv = [x[:, :, :n] for x in self.qkv]
            out = self.run(*qkv)[0]
            assert out.shape == qkv[0].shape, f"{tuple(out.shape)} from a query of {tuple(qkv[0].shape)}"
            _same(out[:, :, :1], self.call(*qkv).dense()[:, :, :1], f"the first query of {n}")

    def check_own_key(self) -> None:
        """Where a query's own key outweighs all others, nearly its value comes out, for the last rows too."""
        needs(self.keeps_own_key, "the method may leave out a query's own key")
        keys = torch.tensor([self.length, self.length - 5])
        lengths = {"query_lengths": keys, "key_lengths": keys} if self.rows > 1 else {}
        key = F.normalize(self.qkv[1], dim=-1) * 24
        query, own = (x.repeat_interleave(2, 1)[:, :, self.length - self.rows:] for x in (key, self.qkv[2]))
        gaps = (self.run(query, key, self.qkv[2], **lengths) - own).abs().amax((0, 2, 4))  # (item, row)
        for item, n in enumerate(keys.clamp(max=self.rows).tolist()):
            gap = gaps[item, :n]
            assert bool((gap < 0.2).all()), f"item {item}, row {int(gap.argmax())} of {n}: its own key is left out"

    def check_large_scores(self) -> None:
        q, k, v = self.qkv
        assert bool(torch.isfinite(self.run(q * 1e4, k, v)).all()), "not finite for scores of 1e4"

    def check_signature_of_scaled_dot_product_attention(self) -> None:
        needs(self.phase == "prefill", "needs no state in causal prefill only")
        _same(self.make()(*self.qkv, is_causal=True, enable_gqa=True), self.run(*self.qkv)[0], "differs from attend")

    @torch.no_grad()
    def check_in_a_model_nothing_is_left_behind(self) -> None:
        self.leaves_random_state(self.model)
        self.leaves_subject(self.model)
        self.leaves_subject_after_exception(self.model)
        plain = self.model()(self.ids)[0]
        model, backend = self.in_use(self.model), self.make()
        backend.attend = interrupt
        with self.left_as_it_was(model):
            with contextlib.suppress(KeyboardInterrupt):
                self.attended(model, backend=backend)
            assert torch.equal(model(self.ids)[0], plain), "the model computes something else than before"

    @torch.no_grad()
    def check_in_a_model_left_and_right_padding(self) -> None:
        model, short = self.model(), self.length - self.length // 4
        mask, positions = torch.ones_like(self.ids), torch.arange(self.length).expand(2, -1)
        mask[1, short:] = 0
        outs: list[Tensor] = []
        for shift in (0, self.length - short):
            padded, at, place = (torch.stack([x[0], x[1].roll(shift)]) for x in (self.ids, mask, positions))
            backend, seen = self.make(), {"position": positions}
            attend = backend.attend
            backend.attend = lambda call, attend=attend, seen=seen: attend(seen.update(call.context) or call)
            out = self.attended(model, padded, backend=backend, context={"position": place}, attention_mask=at,
                                position_ids=place)
            outs.append(out[1, shift:shift + short])
            assert torch.equal(seen["position"][1, :short], positions[1, :short]), "context does not move"
        _same(outs[0], outs[1], "the side of the padding changes the item")
        if self.causal:
            _same(self.attended(model, self.ids[1:, :short])[0], outs[0], "the padded item differs from the item alone")

    @torch.no_grad()
    def check_in_a_model_layers_with_a_sliding_window_are_left_alone(self) -> None:
        model = tiny_gemma3()
        before = model(self.ids).logits
        self.attended(model)
        assert {r["layer"] for r in self.records} == {1}, "layer 0 has a window of its own"
        assert torch.equal(model(self.ids).logits, before), "the model is another now"

    @torch.no_grad()
    def check_in_a_model_generation_and_speculation(self) -> None:
        needs(self.causal, "not for causal prefill")
        model, ids = tiny_llama(), torch.cat([self.ids[:1]] * 2, 1)[:, :self.length]
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        with attach(model, self.make()) as attached:
            plain = model.generate(ids, **options)
            attached.reset()
            drafted = model.generate(ids, **options, prompt_lookup_num_tokens=3)
        assert torch.equal(plain, drafted), "speculative greedy decoding gives other tokens"

    def check_in_training(self) -> None:
        """Dropout is passed on, a recomputed forward is the forward, and what has no gradient says so."""
        model = self.model(dropout=0.3).train()
        if "dropout" not in self.cls.score_changes:  # type: ignore[attr-defined]
            with torch.no_grad(), attach(model, self.make()) as attached:
                out = seeded(lambda: model(self.ids)[0])
            assert torch.equal(seeded(lambda: model(self.ids)[0]), out), "attention dropout is lost"
            assert attached.records and all("fallback" in r for r in attached.records), "dropout is not counted"
        model, gradients = self.model().train(), []
        options: dict[str, Any] = {"use_cache": False} if self.causal else {}
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.zero_grad()
            loss = self.attended(model, **options).square().mean()
            try:
                loss.backward()
            except (NotImplementedError, RuntimeError) as error:
                assert not checkpointed, f"the backward pass fails behind the with-block: {error}"
                raise Skip(f"the method has no gradient, and says so: {error}") from None
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
            assert bool(torch.isfinite(gradients[-1]).all()), "a gradient is not finite"
        _same(gradients[0], gradients[1], "gradient checkpointing gives another gradient behind the with-block")

    @torch.no_grad()
    def check_together_with_masks_on_the_weights(self) -> None:
        model = self.model()
        masks = Masks({n: torch.rand(p.shape, generator=torch.Generator().manual_seed(i)) > 0.5
                       for i, (n, p) in enumerate(model.named_parameters()) if ".layer" in n and p.dim() == 2})
        pruned = copy.deepcopy(model)
        masks.make_permanent(pruned)
        before = snapshot(model)
        masks.apply(model)
        out = self.attended(model, then=lambda: masks.remove(model))
        _same(out, self.attended(pruned), "masks and backend together give something else")
        assert_unchanged(before, model)

    @torch.no_grad()
    def check_together_with_adapters(self) -> None:
        needs(importlib.util.find_spec("peft"), "peft is not installed")
        from peft import LoraConfig, get_peft_model

        model, names = self.model(), ["q_proj", "v_proj"] if self.causal else ["query", "value"]
        plain = self.attended(model)
        adapted: Any = seeded(lambda: get_peft_model(model, LoraConfig(target_modules=names, init_lora_weights=False)))
        out = self.attended(adapted)
        assert _far(out, plain).any(), "the backend or the adapters were not at work"
        with adapted.disable_adapter():
            _same(self.attended(adapted), plain, "without adapters it is another model")
        _same(self.attended(adapted, host=adapted.get_base_model()), out,
              "attached inside the wrapper it gives something else")

    @torch.no_grad()
    def check_together_with_compile_and_copies(self) -> None:
        """In a module of somebody's own, compiled and run before; a copy made meanwhile is a plain model."""
        model = seeded(lambda: nn.Sequential(_Block(self.causal), _Block(self.causal))).eval()
        hidden = seeded(lambda: torch.randn(2, self.length, 64))
        compiled: Any = torch.compile(model, backend="eager")
        plain = compiled(hidden)
        others = {"the model": compiled}
        expected = self.attended(model, hidden, layers=["0", "1"])
        out = self.attended(compiled, hidden, layers=["0", "1"], then=lambda: others.update(
            {"a copy made while it was attached": copy.deepcopy(model)}))
        _same(out, expected, "a compiled model gives something else")
        assert len({r["layer"] for r in self.records}) == 2, "a compiled model passes the backend by"
        for name, other in others.items():
            _same(other(hidden), plain, f"{name} computes something else afterwards")

    def check_learned_modules(self) -> None:
        model, backend, loaded = self.model(), self.make(), self.make()
        plain = [id(p) for p in model.parameters()]
        with attach(model, backend, steps=self.total):
            learned = {id(p) for m in backend.modules.values() for p in m.parameters()}
            needs(learned, "nothing is learned in modules")
            assert learned <= {id(p) for p in model.parameters()}, \
                "learned parameters are not among the model's while attached"
        assert [id(p) for p in model.parameters()] == plain, "the model keeps learned parameters"
        reloaded(backend.save, loaded.load)
        with attach(model, loaded, steps=self.total):
            for layer, module in backend.modules.items():
                assert_unchanged(snapshot(module.state_dict()), loaded.modules[layer].state_dict())


class _Block(nn.Module):
    """A layer of self-attention that calls ``scaled_dot_product_attention``, (B, L, 64) -> (B, L, 64)."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.qkv, self.causal = nn.Linear(64, 192), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)


def _far(one: Tensor, two: Tensor) -> Tensor:
    return ~torch.isclose(one.float(), two.float(), atol=2e-4, rtol=2e-3)


def _same(one: Tensor, two: Tensor, message: str) -> None:
    assert one.shape == two.shape, f"{message}: shapes {tuple(one.shape)} and {tuple(two.shape)}"
    far = _far(one, two).nonzero()
    if len(far):
        step = f"step {int(far[0, 0])}: " if one.dim() == 5 and len(one) > 1 else ""
        raise AssertionError(f"{step}{message} (largest difference {float((one - two).abs().max()):.3g})")


__all__ = ["AttentionKit", "tensors"]
