"""The conformance kit of attention backends."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looseleaf.attention.attach import attach
from looseleaf.attention.attached import Attached
from looseleaf.attention.call import AttentionBackend, AttentionCall
from looseleaf.pruning.masks import Masks
from looseleaf.testing.common import Kit, Skip, assert_unchanged, mixed_modes, same_random_state, snapshot
from looseleaf.testing.models import seeded, tiny_bert, tiny_gemma3, tiny_llama

ATOL, RTOL = 2e-4, 2e-3
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
        self.length, self.keeps_own_key = length, keeps_own_key
        self.causal = "bidirectional" not in cls.phases
        self.phase = next(p for p in ("bidirectional", "prefill", "decode") if p in cls.phases)
        rows = 1 if self.phase == "decode" else length
        query, self.key, self.value = tensors(length)
        self.query = query[:, :, length - rows:]

    def call(self, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> AttentionCall:
        """A call in the phase that the method is for."""
        return AttentionCall(query, key, value, query.shape[-1] ** -0.5,
                             **{"is_causal": self.causal, "phase": self.phase, **given})

    @torch.no_grad()
    def run(self, query: Tensor, key: Tensor, value: Tensor, backend: Any = None, records: Any = None,
            **given: Any) -> list[Tensor]:
        """The outputs of one causal call, or of a run of bidirectional calls with the same tensors."""
        backend, state = backend or self.make(), SimpleNamespace()
        steps: list[Any] = [None] if self.causal else list(range(STEPS))
        out = []
        for step in steps:
            call = self.call(query, key, value, state=state, **given)
            call.layers, call.step, call.steps = 2, step, None if step is None else STEPS
            values: dict[str, Any] = {}
            call.record = lambda values=values, **recorded: values.update(recorded)
            out.append(backend.compute(call))
            if records is not None:
                records.append(values)
        return out

    def same(self, one: list[Tensor], two: list[Tensor], message: str) -> None:
        """AssertionError with ``message`` unless two runs gave the same."""
        for step, (a, b) in enumerate(zip(one, two, strict=True)):
            _same(a, b, message if len(one) == 1 else f"step {step}: {message}")

    # ------------------------------------------------------------------ calls
    def check_the_method_is_at_work(self) -> None:
        records: list[dict[str, Any]] = []
        outs = self.run(self.query, self.key, self.value, records=records)
        own = [(out, r) for out, r in zip(outs, records) if "fallback" not in r]
        assert own, f"every call fell back ({records[-1].get('fallback')}): give the kit a make() whose method is at " \
                    f"work on {self.length} tokens, in conformance()"
        exact = self.call(self.query, self.key, self.value).dense()
        sparse = any(float(torch.as_tensor(r.get("density", 1.0))) < 1 for _, r in own)
        assert sparse or not all(torch.allclose(out, exact, atol=ATOL, rtol=RTOL) for out, _ in own), \
            "the output is that of exact attention, and no density below 1 is recorded"

    def check_shape_and_dtype(self) -> None:
        q, k, v = self.query, self.key, self.value
        for dtype in (torch.float32, torch.bfloat16):
            for out in self.run(q.to(dtype), k.to(dtype), v.to(dtype)):
                assert out.shape == q.shape and out.dtype == dtype, \
                    f"{tuple(out.shape)} {out.dtype} from a query of {tuple(q.shape)} {dtype}"
                assert bool(torch.isfinite(out).all()), f"not finite for {dtype}"
        narrow = self.run(q, k, v[..., :16])[-1]
        assert narrow.shape == (*q.shape[:3], 16) and bool(torch.isfinite(narrow).all()), "values smaller than keys"

    def check_inputs_are_left_unchanged(self) -> None:
        given = (self.query, self.key, self.value)
        copies = [x.clone() for x in given]
        self.run(*given)
        assert all(torch.equal(a, b) for a, b in zip(copies, given)), "attend wrote into its inputs"

    def check_determinism(self) -> None:
        one, two = (self.run(self.query, self.key, self.value) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, two)), "two runs differ"

    def check_causality(self) -> None:
        if self.phase != "prefill":
            raise Skip("not for causal prefill")
        at = self.length // 2
        later = self.value.clone()
        later[:, :, at:] = 100.0
        one, two = (self.run(self.query, self.key, v)[0][:, :, :at] for v in (self.value, later))
        _same(one, two, "later values reach earlier queries")

    def check_batch_items_do_not_see_each_other(self) -> None:
        given, order = (self.query, self.key, self.value), torch.tensor([1, 0])
        outs = self.run(*given)
        self.same([out[order] for out in outs], self.run(*(x[order] for x in given)),
                  "swapping the batch items does not swap the outputs")
        self.same([out[:1] for out in outs], self.run(*(x[:1] for x in given)), "an item differs from the item alone")

    def check_grouped_query_attention(self) -> None:
        self.same(self.run(self.query, self.key, self.value),
                  self.run(self.query, self.key.repeat_interleave(2, 1), self.value.repeat_interleave(2, 1)),
                  "differs from the same with keys and values repeated")

    def check_padding(self) -> None:
        q, k, v = self.query, self.key, self.value
        short = self.length - self.length // 3
        keys = torch.tensor([self.length, short])
        queries = keys.clamp(max=q.shape[2])
        padded = [x.clone() for x in (q, k, v)]
        for x in padded:
            x[1, :, short:] = torch.nan
        outs = self.run(*padded, query_lengths=queries, key_lengths=keys)
        self.same([o[:1] for o in outs], self.run(q[:1], k[:1], v[:1]), "the full item differs from the item alone")
        if self.causal:
            alone = self.run(q[1:, :, :short], k[1:, :, :short], v[1:, :, :short])
        else:  # methods that know their number of tokens are padded alone, too
            alone = self.run(q[1:], k[1:], v[1:], query_lengths=queries[1:], key_lengths=keys[1:])
        self.same([o[1:, :, :short] for o in outs], [o[:, :, :short] for o in alone],
                  "what lies in the padding, or the other item, changes the padded item")

    def check_a_row_that_is_all_padding(self) -> None:
        keys = torch.tensor([self.length, 0])
        outs = self.run(self.query, self.key, self.value, query_lengths=keys.clamp(max=self.query.shape[2]),
                        key_lengths=keys)
        self.same([o[:1] for o in outs], self.run(self.query[:1], self.key[:1], self.value[:1]),
                  "it changes the other item")

    def check_other_phases_are_exact(self) -> None:
        q, k, v = tensors(self.length)
        for phase, lq, causal in (("decode", 1, True), ("decode", 5, True), ("prefill", self.length, True),
                                  ("bidirectional", self.length, False)):
            if phase not in self.cls.phases:  # type: ignore[attr-defined]
                call = self.call(q[:, :, -lq:], k, v, phase=phase, is_causal=causal)
                _same(self.make().compute(call), call.dense(), f"a {phase} call differs from exact attention")

    def check_an_extra_mask_is_honoured(self) -> None:
        rows, g = self.query.shape[2], torch.Generator().manual_seed(1)
        mask = torch.rand(1, 1, rows, self.length, generator=g) > 0.5
        mask[..., -1] |= True
        changed = self.value.clone()
        changed[:, :, ~mask[0, 0, -1]] += 100.0
        one, two = (self.run(self.query, self.key, v, mask=mask) for v in (self.value, changed))
        self.same([o[:, :, -1] for o in one], [o[:, :, -1] for o in two], "the last query sees a hidden key")

    def check_chunked_prefill(self) -> None:
        if self.phase != "prefill":
            raise Skip("not for causal prefill")
        query, later = self.query[:, :, self.length // 2:], self.value.clone()
        later[:, :, -1] += 100.0
        one, two = (self.run(query, self.key, v)[0] for v in (self.value, later))
        assert one.shape == query.shape and bool(torch.isfinite(one).all())
        _same(one[:, :, :-1], two[:, :, :-1], "with Lq < Lk the last key reaches earlier queries")

    def check_short_and_empty_input(self) -> None:
        if not self.causal:
            raise Skip("bidirectional methods may know their number of tokens")
        for n in (0, 1, 2, 7):
            q, k, v = (x[:, :, :n] for x in (self.query, self.key, self.value))
            out = self.run(q, k, v)[0]
            assert out.shape == q.shape, f"{tuple(out.shape)} from a query of {tuple(q.shape)}"
            _same(out[:, :, :1], self.call(q, k, v).dense()[:, :, :1], f"the first query of {n}")

    def check_own_key(self) -> None:
        """Where a query's own key outweighs all others, nearly its value comes out, for the last rows too."""
        if not self.keeps_own_key:
            raise Skip("the method may leave out a query's own key")
        rows, keys = self.query.shape[2], torch.tensor([self.length, self.length - 5])
        key = F.normalize(self.key, dim=-1) * 24
        query = key.repeat_interleave(2, 1)[:, :, self.length - rows:]
        value = self.value.repeat_interleave(2, 1)[:, :, self.length - rows:]
        lengths = {"query_lengths": keys.clamp(max=rows), "key_lengths": keys} if rows > 1 else {}
        for out in self.run(query, key, self.value, **lengths):
            for item, n in enumerate(keys.clamp(max=rows).tolist()):
                gap = (out[item, :, :n] - value[item, :, :n]).abs().amax((0, 2))
                assert bool((gap < 0.2).all()), f"item {item}, row {int(gap.argmax())} of {n}: its own key is left out"

    def check_large_scores(self) -> None:
        for out in self.run(self.query * 1e4, self.key, self.value):
            assert bool(torch.isfinite(out).all()), "not finite for scores of 1e4"

    def check_signature_of_scaled_dot_product_attention(self) -> None:
        if self.phase != "prefill":
            raise Skip("needs no state in causal prefill only")
        q, k, v = self.query, self.key, self.value
        _same(self.make()(q, k, v, is_causal=True, enable_gqa=True), self.run(q, k, v)[0], "differs from attend")

    # ------------------------------------------------------------------ in models
    def model(self, dropout: float = 0.0) -> Any:
        """A decoder, or for bidirectional methods an encoder, with attention dropout."""
        return tiny_llama(attention_dropout=dropout) if self.causal else tiny_bert(attention_probs_dropout_prob=dropout)

    def ids(self) -> Tensor:
        """Token ids, (2, length)."""
        return torch.arange(2 * self.length).view(2, self.length) * 7 % 61

    def attach(self, model: Any, backend: AttentionBackend | None = None, **given: Any) -> Attached:
        """The backend in a model, at denoising step 0 for bidirectional methods."""
        attached = attach(model, backend or self.make(), steps=None if self.causal else STEPS, **given)
        attached.step = None if self.causal else 0
        return attached

    def attended(self, model: Any, attached: Attached, **inputs: Any) -> Tensor:
        """A model's output, at the last denoising step for bidirectional methods."""
        for step in [None] if self.causal else range(STEPS):
            attached.step = step
            out = model(**{"input_ids": self.ids(), **inputs})[0]
        found: Tensor = out
        return found

    def check_in_a_model_nothing_is_left_behind(self) -> None:
        model = mixed_modes(self.model())
        config: Any = model.config
        before, name = snapshot(model), config._attn_implementation
        backend = self.make()
        with same_random_state(), torch.no_grad():
            plain = model(self.ids())[0]
            with self.attach(model, backend) as attached:
                self.attended(model, attached)
                assert attached.records and attached.report().to_text(), "nothing recorded"
        assert_unchanged(before, model)
        backend.attend = _broken  # type: ignore[method-assign]
        for where in ("forward", "block"):
            try:
                with self.attach(model, backend) as attached:
                    if where == "forward":
                        self.attended(model, attached)
                    raise _Stop
            except _Stop:
                pass
            assert_unchanged(before, model)
        assert config._attn_implementation == name, "the model keeps the backend after an exception"
        with torch.no_grad():
            assert torch.equal(model(self.ids())[0], plain), "the model computes something else than before"

    @torch.no_grad()
    def check_in_a_model_left_and_right_padding(self) -> None:
        model, ids = self.model(), self.ids()
        short = self.length - self.length // 4
        mask, positions = torch.ones_like(ids), torch.arange(self.length).expand(2, -1)
        mask[1, short:] = 0
        seen: dict[str, Any] = {}
        outs = []
        for side in ("right", "left"):
            shift = self.length - short if side == "left" else 0
            padded, at, place = (torch.stack([x[0], x[1].roll(shift)]) for x in (ids, mask, positions))
            backend = self.make()
            with self.attach(model, backend) as attached:
                attached.context["position"] = place
                attend = backend.attend
                backend.attend = lambda call, attend=attend: (seen.update(call.context), attend(call))[1]  # type: ignore
                outs.append(self.attended(model, attached, input_ids=padded, attention_mask=at, position_ids=place)
                            [1, shift:shift + short])
            if seen:
                assert torch.equal(seen["position"][1, :short], positions[1, :short]), "context does not move"
        _same(outs[0], outs[1], "the side of the padding changes the item")
        if self.causal:
            with self.attach(model) as attached:
                _same(self.attended(model, attached, input_ids=ids[1:, :short])[0], outs[0],
                      "the padded item differs from the item alone")

    @torch.no_grad()
    def check_in_a_model_layers_with_a_sliding_window_are_left_alone(self) -> None:
        model, ids = tiny_gemma3(), self.ids()
        before = model(ids).logits
        with self.attach(model) as attached:
            self.attended(model, attached)
            assert {r["layer"] for r in attached.records} == {1}, "layer 0 has a window of its own"
        assert torch.equal(model(ids).logits, before), "the model is another now"

    @torch.no_grad()
    def check_in_a_model_generation_and_speculation(self) -> None:
        if not self.causal:
            raise Skip("not for causal prefill")
        model = tiny_llama()
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        ids = torch.cat([self.ids()[:1]] * 2, 1)[:, :self.length]
        with self.attach(model) as attached:
            plain = model.generate(ids, **options)
            attached.reset()
            drafted = model.generate(ids, **options, prompt_lookup_num_tokens=3)
        assert torch.equal(plain, drafted), "speculative greedy decoding gives other tokens"

    def check_in_training(self) -> None:
        """Dropout is passed on, a recomputed forward is the forward, and what has no gradient says so."""
        model, ids = self.model(dropout=0.3).train(), self.ids()
        if "dropout" not in self.cls.score_changes:  # type: ignore[attr-defined]
            with torch.no_grad():
                plain = seeded(lambda: model(ids)[0])
                with self.attach(model) as attached:
                    assert torch.equal(seeded(lambda: model(ids)[0]), plain), "attention dropout is lost"
                assert attached.records and all("fallback" in r for r in attached.records), "dropout is not counted"
        model, gradients = self.model().train(), []
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.zero_grad()
            with self.attach(model) as attached:
                loss = self.attended(model, attached, **({"use_cache": False} if self.causal else {})).square().mean()
            try:
                loss.backward()
            except (NotImplementedError, RuntimeError) as error:
                assert not checkpointed, f"the backward pass fails behind the with-block: {error}"
                raise Skip(f"the method has no gradient, and says so: {error}") from None
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
            assert bool(torch.isfinite(gradients[-1]).all()), "a gradient is not finite"
        _same(gradients[0], gradients[1], "gradient checkpointing gives another gradient behind the with-block")

    # ------------------------------------------------------------------ together with other parts
    @torch.no_grad()
    def check_together_with_masks_on_the_weights(self) -> None:
        model = self.model()
        masks = Masks({n: torch.rand(p.shape, generator=torch.Generator().manual_seed(i)) > 0.5
                       for i, (n, p) in enumerate(model.named_parameters()) if ".layer" in n and p.dim() == 2})
        pruned = copy.deepcopy(model)
        masks.make_permanent(pruned)
        with self.attach(pruned) as attached:
            expected = self.attended(pruned, attached)
        before = snapshot(model)
        masks.apply(model)
        with self.attach(model) as attached:
            _same(self.attended(model, attached), expected, "masks and backend together give something else")
            masks.remove(model)
        assert_unchanged(before, model)

    @torch.no_grad()
    def check_together_with_adapters(self) -> None:
        if importlib.util.find_spec("peft") is None:
            raise Skip("peft is not installed")
        from peft import LoraConfig, get_peft_model

        model, names = self.model(), ["q_proj", "v_proj"] if self.causal else ["query", "value"]
        with self.attach(model) as attached:
            plain = self.attended(model, attached)
        adapted: Any = seeded(lambda: get_peft_model(model, LoraConfig(target_modules=names, init_lora_weights=False)))
        with self.attach(adapted) as attached:
            out = self.attended(adapted, attached)
            assert attached.records and not torch.allclose(out, plain), "the backend or the adapters were not at work"
            with adapted.disable_adapter():
                _same(self.attended(adapted, attached), plain, "without adapters it is another model")
        with self.attach(adapted.get_base_model()) as attached:
            _same(self.attended(adapted, attached), out, "attached inside the wrapper it gives something else")

    @torch.no_grad()
    def check_together_with_compile_and_copies(self) -> None:
        """In a module of somebody's own, compiled and run before; a copy made meanwhile is a plain model."""
        model = seeded(_Small).eval()
        hidden = seeded(lambda: torch.randn(2, self.length, 64))
        compiled: Any = torch.compile(model, backend="eager")
        plain = compiled(hidden, self.causal)

        def attended(run: Any, attached: Attached) -> Tensor:
            for step in [None] if self.causal else range(STEPS):
                attached.step = step
                out = run(hidden, self.causal)
            found: Tensor = out
            return found

        with self.attach(model, layers="blocks.*") as attached:
            expected = attended(model, attached)
        with self.attach(compiled, layers="blocks.*") as attached:
            _same(attended(compiled, attached), expected, "a compiled model gives something else")
            assert len({r["layer"] for r in attached.records}) == 2, "a compiled model passes the backend by"
            copied = copy.deepcopy(model)
        for name, run in (("the model", compiled), ("a copy made while it was attached", copied)):
            _same(run(hidden, self.causal), plain, f"{name} computes something else afterwards")

    def check_learned_modules(self) -> None:
        model, backend = self.model(), self.make()
        plain = [id(p) for p in model.parameters()]
        with self.attach(model, backend):
            learned = [p for m in backend.modules.values() for p in m.parameters()]
            if not learned:
                raise Skip("nothing is learned in modules")
            own = {id(p) for p in model.parameters()}
            assert all(id(p) in own for p in learned), "learned parameters are not among the model's while attached"
        assert [id(p) for p in model.parameters()] == plain, "the model keeps learned parameters"
        with tempfile.TemporaryDirectory() as folder:
            backend.save(Path(folder) / "learned.safetensors")
            loaded = self.make()
            loaded.load(Path(folder) / "learned.safetensors")
        with self.attach(model, loaded):
            for layer, module in backend.modules.items():
                for name, tensor in module.state_dict().items():
                    assert torch.equal(loaded.modules[layer].state_dict()[name], tensor), f"{name} is lost in a file"


class _Small(nn.Module):
    """Two blocks of self-attention that call ``scaled_dot_product_attention``, for (B, L, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(2))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        for block in self.blocks:
            x = x + block(x, causal)
        return x


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class _Stop(Exception):
    pass


def _broken(call: AttentionCall) -> Tensor:
    raise _Stop


def _same(one: Tensor, two: Tensor, message: str) -> None:
    assert one.shape == two.shape, f"{message}: shapes {tuple(one.shape)} and {tuple(two.shape)}"
    gap = float((one.float() - two.float()).abs().max()) if one.numel() else 0.0
    assert torch.allclose(one.float(), two.float(), atol=ATOL, rtol=RTOL), f"{message} (largest difference {gap:.3g})"


__all__ = ["AttentionKit", "tensors"]
