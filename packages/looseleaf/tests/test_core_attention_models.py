"""Attached models in the situations that people meet: exact or a counted fallback, never another result."""

from __future__ import annotations

import copy
import dataclasses
import io
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from recording_backends import ALL, PAPER, Halved, Spy, Takes
from torch import nn
from torch.utils.checkpoint import checkpoint

from looseleaf import AttentionBackend, AttentionCall, Geometry, Paper, SlidingWindow, UnsupportedModelError, attach
from looseleaf.testing.common import assert_unchanged, snapshot
from looseleaf.testing.models import seeded, tiny_bert, tiny_gemma3, tiny_llama
from looseleaf.unwrap import unwrapped

SEQ2SEQ = {"vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
           "init_std": 0.3}


def ids_of(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------- cross attention
@pytest.mark.parametrize("name", ["PegasusX", "NllbMoe", "Bart", "T5"])
def test_cross_attention_is_known_where_queries_and_keys_are_equally_many(name: str) -> None:
    import transformers

    if name == "T5":
        config: Any = transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    else:
        extra = {"num_experts": 2, "encoder_sparse_step": 0, "decoder_sparse_step": 0} if name == "NllbMoe" else {}
        config = getattr(transformers, f"{name}Config")(**SEQ2SEQ, **extra)
    model = seeded(lambda: transformers.AutoModelForSeq2SeqLM.from_config(config)).eval()
    targets, mask, target_mask = ids_of(), torch.ones(2, 20, dtype=torch.long), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6], target_mask[1, 9:] = 0, 0
    inputs = {"input_ids": ids_of(), "attention_mask": mask, "decoder_input_ids": targets,
              "decoder_attention_mask": target_mask}
    with torch.no_grad():
        expected = model(**inputs).logits[target_mask.bool()]
        with attach(model, Takes()) as attached:
            torch.testing.assert_close(model(**inputs).logits[target_mask.bool()], expected, atol=1e-4, rtol=1e-4)
    own = [(False, "bidirectional")] * (name != "PegasusX")  # whose encoder has an attention of its own
    calls = attached.backend.calls
    assert [(c.is_cross, c.phase) for c in calls] == [*own, (False, "prefill"), (True, "bidirectional")]
    assert {c.layers for c in calls} == {len(attached.layers)} == {len(own) + 2}


# ---------------------------------------------------------------------- phases
def test_several_queries_after_a_cache_are_verified_exactly() -> None:
    model, ids = tiny_llama(), ids_of(1, 40)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **options)
    backend = Spy()
    with attach(model, backend):
        drafted = model.generate(ids, **options, prompt_lookup_num_tokens=4)
    assert torch.equal(plain, drafted)
    assert {c.phase for c in backend.calls if c.shape[3] < 40} == {"decode"}
    assert any(1 < c.shape[3] < 40 for c in backend.calls), "nothing was drafted: this shows nothing"
    with attach(model, SlidingWindow(sink=1, window=4)) as attached:
        one = model.generate(ids, **options)
        two = model.generate(ids, **options, prompt_lookup_num_tokens=4)
    assert torch.equal(one, two) and {r["phase"] for r in attached.records} == {"prefill", "decode"}


def test_keys_and_values_of_different_sizes() -> None:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    model = seeded(lambda: DeepseekV2ForCausalLM(DeepseekV2Config(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        first_k_dense_replace=2, max_position_embeddings=256))).eval()
    with torch.no_grad():
        expected = model(ids_of()).logits
        with attach(model, Spy()) as attached:
            torch.testing.assert_close(model(ids_of()).logits, expected, atol=1e-5, rtol=1e-4)
    call = attached.backend.calls[0]
    assert call.query.shape[-1] == call.value.shape[-1] == 24, "backends see one size"


class Adding(nn.Module):
    """A decoder layer that calculates with the mask it is given, as some models do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, hidden: torch.Tensor, attention_mask: Any = None, **given: Any) -> Any:
        if attention_mask is not None:
            length = hidden.shape[1]
            if attention_mask.dtype == torch.bool:
                far = torch.arange(length)[:, None] - torch.arange(length) > 7
                attention_mask = attention_mask & ~far
                assert attention_mask.shape[-1] == length
                assert (attention_mask == torch.where(far, False, attention_mask)).all()
            else:
                attention_mask = torch.arange(length) * 0.1 + attention_mask
        return self.inner(hidden, attention_mask=attention_mask, **given)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_that_a_model_calculates_with(implementation: str) -> None:
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    model.model.layers[0] = Adding(model.model.layers[0])
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 12:] = 0
    with torch.no_grad():
        expected = model(ids_of(), attention_mask=mask).logits[mask.bool()]
        with attach(model, Spy()) as attached:
            got = model(ids_of(), attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    first, second = attached.backend.calls
    assert first.mask is not None and second.mask is None


def test_masks_on_another_device_stay_descriptions() -> None:
    from transformers.masking_utils import causal_mask_function

    from looseleaf.attention.huggingface import describe

    made: Any = describe(2, 4, 4, mask_function=causal_mask_function, attention_mask=torch.ones(2, 4, dtype=torch.bool))
    assert made.to("cpu") is made and made.to(device=torch.device("cpu")) is made
    assert made.contiguous() is made and type(made.detach()) is type(made), "checkpointing detaches its inputs"
    assert made.shape == (2, 1, 4, 4) and torch.equal(made & True, made.tensor()) and type(made[:1]) is torch.Tensor
    moved = made.to("meta")
    assert type(moved) is type(made) and moved.given["attention_mask"].is_meta and moved.given["device"] == "meta"
    assert made.to(torch.float32).dtype == made.to("cpu", torch.float32).dtype == torch.float32


def test_modules_that_add_keys_of_their_own() -> None:
    """DeepSeek-V4 extends its mask, where it is a tensor, by the keys that it compresses."""
    import transformers

    if not hasattr(transformers, "DeepseekV4ForCausalLM"):
        pytest.skip("this transformers has no DeepSeek-V4")
    config = transformers.DeepseekV4Config(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                           moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2)
    model = seeded(lambda: transformers.DeepseekV4ForCausalLM(config)).eval()
    with torch.no_grad():
        expected = model(ids_of()).logits
        for backend in (Spy(), Takes()):
            with attach(model, backend):
                torch.testing.assert_close(model(ids_of()).logits, expected, atol=1e-4, rtol=1e-3)


def test_under_autocast_all_tensors_of_a_call_have_its_dtype() -> None:
    model = tiny_llama()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(ids_of()).logits
        with attach(model, Spy()) as attached:
            torch.testing.assert_close(model(ids_of()).logits, expected, atol=0.3, rtol=0.1)
    assert {x.dtype for c in attached.backend.calls for x in (c.query, c.key, c.value)} == {torch.bfloat16}


def test_models_that_look_at_the_name_of_their_implementation() -> None:
    model = tiny_llama()
    with attach(model, Spy()):
        name = model.config._attn_implementation
        assert name == "sdpa" and name in ("eager", "sdpa") and name != "eager" and name.startswith("looseleaf")


# ---------------------------------------------------------------------- scores changed after QK, dropout
def changing(name: str) -> Any:
    import transformers

    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.4}
    if name == "t5":
        return transformers.T5EncoderModel(transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)).eval()
    if name == "gpt_oss":
        return transformers.GptOssForCausalLM(transformers.GptOssConfig(
            **small, num_local_experts=2, num_experts_per_tok=1, sliding_window=5,
            layer_types=["sliding_attention", "full_attention"])).eval()
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(
        **small, attn_logit_softcapping=0.5, layer_types=["full_attention"] * 2)).eval()


@pytest.mark.parametrize(("name", "changes"), [("gemma2", "softcap"), ("gpt_oss", "s_aux"), ("t5", "position_bias")])
def test_layers_that_change_their_scores(name: str, changes: str) -> None:
    model = seeded(lambda: changing(name))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0
    with torch.no_grad():
        expected = model(ids_of(), attention_mask=mask)[0][mask.bool()]
        with attach(model, Halved()) as attached:
            got = model(ids_of(), attention_mask=mask)[0][mask.bool()]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        assert [r["fallback"] for r in attached.records] == [f"scores changed by {changes}"] * 2
        with attach(model, Takes()) as attached:
            got = model(ids_of(), attention_mask=mask)[0][mask.bool()]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
    assert all(list(c.score_changes) == [changes] for c in attached.backend.calls)


def test_dropout_is_passed_on_or_taken() -> None:
    model = tiny_llama(attention_dropout=0.4).train()
    with torch.no_grad():
        expected = seeded(lambda: model(ids_of()).logits)
        with attach(model, Halved()) as attached:
            assert torch.equal(seeded(lambda: model(ids_of()).logits), expected)
        assert [r["fallback"] for r in attached.records] == ["dropout in training"] * 2
        with attach(model, Takes()) as attached:
            one, two = (seeded(lambda: model(ids_of()).logits, seed) for seed in (0, 1))
        assert not torch.allclose(one, two) and attached.backend.calls[0].score_changes == {"dropout": 0.4}


# ---------------------------------------------------------------------- gradient checkpointing
@dataclasses.dataclass
class ByStep(Spy):
    """Another factor at each step, and a state that counts."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        call.state.calls = getattr(call.state, "calls", 0) + 1
        return call.dense() * ((call.step or 0) + 1) * call.state.calls


@pytest.mark.parametrize("way", ["plain", "non-reentrant", "reentrant", "whole model"])
@pytest.mark.parametrize("where", ["inside", "behind", "behind, another attached"])
def test_recomputation_is_the_forward_that_was(way: str, where: str) -> None:
    model = tiny_llama(num_hidden_layers=1).train()
    if way.endswith("reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
    embedded = model.get_input_embeddings()(ids_of()).detach().requires_grad_()

    def loss() -> torch.Tensor:
        found: torch.Tensor = model(inputs_embeds=embedded, use_cache=False).logits.square().mean()
        return found

    attached = attach(model, ByStep())
    attached.step = 1
    out = checkpoint(loss, use_reentrant=False) if way == "whole model" else loss()
    attached.step, attached._states[0].calls = 5, 9
    if where != "inside":
        attached.detach()
    other = attach(model, Halved()) if where.endswith("another attached") else None
    out.backward()
    if other is not None:
        assert not other.records
        other.detach()
    attached.detach()
    assert len(attached.records) == 1 and attached.step == 5, "the recomputation is recorded, or the step is another"
    once = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_disable()
    with attach(model, ByStep()) as plain:
        plain.step = 1
        loss().backward()
    torch.testing.assert_close(once, model.model.layers[0].self_attn.q_proj.weight.grad)
    model.zero_grad()
    loss().backward()
    assert not torch.allclose(once, model.model.layers[0].self_attn.q_proj.weight.grad), "this shows nothing"


def test_checkpointing_of_torch_is_as_it_was() -> None:
    from torch.utils import checkpoint as module

    names = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
    before = [getattr(module, name) for name in names]
    one, two = tiny_llama(), tiny_llama()
    with attach(one, Spy()):
        attached = attach(two, Spy())
    assert [getattr(module, name) for name in names] != before
    attached.detach()
    assert [getattr(module, name) for name in names] == before


# ---------------------------------------------------------------------- copies, files, wrappers
def test_copies_made_while_attached_are_plain_models(tmp_path: Path) -> None:
    model = tiny_llama()
    expected = model(ids_of()).logits
    before = snapshot(model)
    with attach(model, Halved()):
        copied = copy.deepcopy(model)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        file = io.BytesIO()
        torch.save(model, file)
        model.save_pretrained(tmp_path)
        assert not torch.allclose(model(ids_of()).logits, expected)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    again = type(model).from_pretrained(tmp_path)
    for other in (model, copied, averaged, read, again):
        torch.testing.assert_close(other(ids_of()).logits, expected)
    for other in (copied, read):
        assert_unchanged({name: before[name] for name in ("hooks", "classes", "modes")}, other)
        assert type(other.model.layers[0].self_attn) is type(tiny_llama().model.layers[0].self_attn)
        assert not [n for m in other.modules() for n in m.__dict__ if "looseleaf" in n]
        with attach(other, Halved()):
            assert not torch.allclose(other(ids_of()).logits, expected)
    assert_unchanged(before, model)


def wrappers() -> dict[str, Any]:
    def peft(model: Any) -> Any:
        peft = pytest.importorskip("peft")
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))

    def compiled(model: Any) -> Any:
        return torch.compile(model, backend="eager")

    def prefix(model: Any) -> Any:
        peft = pytest.importorskip("peft")
        return peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))

    return {"peft": peft, "prefix": prefix, "compile": compiled, "data-parallel": nn.DataParallel,
            "average": torch.optim.swa_utils.AveragedModel}


def test_wrappers_in_wrappers() -> None:
    model, wrap = tiny_llama(num_hidden_layers=1), wrappers()
    assert unwrapped(nn.DataParallel(wrap["compile"](model))) is model
    assert unwrapped(wrap["compile"](wrap["peft"](model))) is model


@pytest.mark.parametrize("name", wrappers())
def test_wrappers_are_looked_through(name: str) -> None:
    model = tiny_llama(num_hidden_layers=1)
    wrapped = wrappers()[name](model).eval()
    inner = unwrapped(wrapped)
    assert type(inner) is type(model) and (inner is model) == (name != "average")
    assert unwrapped(model) is model and unwrapped("text") == "text"
    with torch.no_grad():
        before = wrapped(ids_of()).logits  # compiled and run before
        with attach(wrapped, Halved()) as attached:
            assert not torch.allclose(wrapped(ids_of()).logits, before) and len(attached.records) == 1
            with pytest.raises(UnsupportedModelError, match="attached already"):
                attach(inner, Spy())
        torch.testing.assert_close(wrapped(ids_of()).logits, before)


def test_offloaded_modules_are_attached_to() -> None:
    """accelerate puts a forward of its own on the instance."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_bert()
    expected = model(ids_of())[0]
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu"))
    mask = torch.ones(2, 20, dtype=torch.long)
    with torch.no_grad(), attach(model, Spy()) as attached:
        torch.testing.assert_close(model(ids_of(), attention_mask=mask)[0], expected, atol=1e-5, rtol=1e-4)
    assert len(attached.backend.calls) == 2


# ---------------------------------------------------------------------- context
def test_context_moves_with_the_padding() -> None:
    model, ids = tiny_llama(num_hidden_layers=1), ids_of()
    mask, places = torch.ones_like(ids), torch.arange(20).expand(2, -1)
    mask[1, :8] = 0
    with torch.no_grad(), attach(model, Spy()) as attached:
        attached.context["place"] = places
        model(ids, attention_mask=mask)
        call = attached.backend.calls[-1]
        assert call.context["place"][0].tolist() == list(range(20))
        assert call.context["place"][1, :12].tolist() == list(range(8, 20)) and call.query_lengths.tolist() == [20, 12]
        attached.context["place"] = places[:, :11]
        model(ids, attention_mask=mask)
        assert not attached.backend.calls[-1].context, "a length that fits neither queries nor keys"
        attached.context["place"] = places[:, :, None]
        with pytest.raises(ValueError, match=r"context\['place'\]: expected \(B, Lq\) or \(B, Lk\), got \(2, 20, 1\)"):
            model(ids)
        attached.context["place"] = torch.zeros(3, 20)
        with pytest.raises(ValueError, match=r"context\['place'\]: expected a batch of 2, got 3"):
            model(ids)


def test_context_of_keys_in_cross_attention_and_beams() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    model = seeded(lambda: BartForConditionalGeneration(BartConfig(**SEQ2SEQ))).eval()
    ids, mask = ids_of(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad(), attach(model, Spy()) as attached:
        attached.context["map"] = torch.arange(24).view(2, 12)
        model.generate(ids, attention_mask=mask, num_beams=2, max_new_tokens=2, do_sample=False)
    crossing = [c for c in attached.backend.calls if c.is_cross]
    assert crossing and all(c.context["map"].shape == (4, 12) for c in crossing)
    assert crossing[0].context["map"][2, :7].tolist() == list(range(17, 24)) and crossing[0].key_lengths[2] == 7
    with torch.no_grad(), attach(model, Spy()) as attached:
        attached.context["map"] = torch.arange(24).view(2, 12)
        with pytest.raises(ValueError, match="expected another number of keys than queries"):
            model(ids, attention_mask=mask, decoder_input_ids=ids)


# ---------------------------------------------------------------------- learned modules and geometry
@dataclasses.dataclass
class Learned(AttentionBackend):
    """A learned factor for each head.

    Args:
        start: of the factors.
    """

    start: float = 1.0
    phases = ALL
    paper: ClassVar[Paper] = PAPER

    def prepare(self, model: Any, geometry: Geometry) -> None:
        self.geometry = geometry
        if not self.modules:
            self.modules = {layer: nn.Linear(geometry.heads or 1, 1, bias=False) for layer in range(geometry.layers)}
            for module in self.modules.values():
                nn.init.constant_(module.weight, self.start)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        weight = self.modules[call.layer].weight
        return call.dense() * weight.view(1, -1, 1, 1)


def test_learned_modules_are_trained_with_the_model_and_kept_by_the_backend(tmp_path: Path) -> None:
    model, backend = tiny_llama().to(torch.bfloat16), Learned(start=0.5)
    before, names = snapshot(model), [n for n, _ in model.named_parameters()]
    with attach(model, backend):
        learned = [n for n, _ in model.named_parameters() if n not in names]
        assert len(learned) == 2 and all("self_attn" in n for n in learned)
        weight = backend.modules[1].weight
        assert weight.dtype == torch.bfloat16 and backend.geometry == Geometry(2, 4, 2, 16)
        optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n in learned], lr=10.0)
        model(ids_of(), labels=ids_of()).loss.backward()
        optimizer.step()
        assert not torch.equal(backend.modules[1].weight, torch.full_like(weight, 0.5))
        trained = model(ids_of()).logits
    model.zero_grad()
    assert_unchanged({n: v for n, v in before.items() if n != "gradients"}, model)
    backend.save(tmp_path / "learned.safetensors")
    other = Learned()
    other.load(tmp_path / "learned.safetensors")
    with attach(model, other):
        assert torch.equal(model(ids_of()).logits, trained)
    with pytest.raises(ValueError, match="expected something learned, got no modules: attach it first"):
        Learned().save(tmp_path / "nothing")
    small = Learned()
    small.modules = {5: nn.Linear(4, 1)}
    with pytest.raises(ValueError, match="modules: expected layers from 0 to 1, got 5"):
        attach(model, small)
    assert_unchanged({n: v for n, v in before.items() if n != "gradients"}, model)


def test_geometry_says_what_is_known() -> None:
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vit = ViTModel(ViTConfig(image_size=32, patch_size=8, **small))
    clip = CLIPModel(CLIPConfig(text_config={"vocab_size": 64, **small, "num_attention_heads": 2},
                                vision_config={"image_size": 32, "patch_size": 8, **small}, projection_dim=16))
    for model, layers, expected in ((vit, None, Geometry(2, 4, 4, 8, (1, 4, 4))),
                                    (clip, "vision_model.**", Geometry(4, 4, 4, 8, (1, 4, 4))),
                                    (clip, None, Geometry(4, None, None, None)),
                                    (tiny_gemma3(), None, Geometry(2, 4, 2, 16))):
        backend = Learned()
        with attach(model, backend, layers=layers):
            assert dataclasses.replace(backend.geometry, grid=expected.grid) == expected
            assert expected.grid is None or backend.geometry.grid == expected.grid
