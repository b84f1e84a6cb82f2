"""Attaching to models of transformers and diffusers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from looseleaf import AttentionBackend, AttentionCall, Paper, SlidingWindow, UnsupportedModelError, attach
from looseleaf.attention.call import Phase
from looseleaf.attention.dense import LazyMask
from looseleaf.testing.models import tiny_llama

ALL_PHASES: frozenset[Phase] = frozenset({"prefill", "decode", "bidirectional"})


@dataclasses.dataclass
class Spy(AttentionBackend):
    """Exact attention that remembers what it was called with."""

    calls: list[AttentionCall] = dataclasses.field(default_factory=list)
    phases = ALL_PHASES
    paper: ClassVar[Paper] = SlidingWindow.paper

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call)
        if len(self.calls) == 99:
            raise RuntimeError("too many calls")
        return call.dense()


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, head_dim=8))


def gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"]))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128))


def made(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


DECODERS = {"llama": tiny_llama, "qwen3": qwen3, "gemma3": gemma3, "gpt2": gpt2}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_compute_what_they_did(name: str) -> None:
    model = made(DECODERS[name])
    ids = torch.randint(0, 64, (3, 40), generator=torch.Generator().manual_seed(1))
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[1, :13], left[2, :39] = 0, 0
    right[1, 20:] = 0
    with torch.no_grad():
        for mask in (None, left, right):
            before = model(ids, attention_mask=mask).logits
            with attach(model, Spy()) as attached:
                after = model(ids, attention_mask=mask).logits
            seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            torch.testing.assert_close(after[seen], before[seen], atol=2e-4, rtol=1e-4)
            assert all(c.is_causal and c.mask is None and c.phase == "prefill" for c in attached.backend.calls)
        assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_unchanged(name: str, cache: str) -> None:
    model = made(DECODERS[name])
    ids = torch.randint(0, 64, (2, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "cache_implementation": cache,
               "pad_token_id": 0}
    before = model.generate(ids, **options)
    with attach(model, Spy()) as attached:
        after = model.generate(ids, **options)
    assert torch.equal(before, after)
    phases = {c.phase for c in attached.backend.calls}
    assert phases == {"prefill", "decode"}


def test_chunked_prefill() -> None:
    model = made(tiny_llama)
    ids = torch.randint(0, 64, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids).logits
        with attach(model, Spy(), chunked_prefill=True) as attached:
            first = model(ids[:, :17])
            second = model(ids[:, 17:], past_key_values=first.past_key_values)
        torch.testing.assert_close(second.logits, whole[:, 17:], atol=1e-4, rtol=1e-4)
        assert attached.backend.calls[-1].shape == (1, 4, 2, 13, 30, 16) and attached.backend.calls[-1].is_causal
        assert attached.backend.calls[-1].phase == "prefill"


def test_packed_sequences() -> None:
    model = made(tiny_llama)
    ids = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    with torch.no_grad():
        alone = torch.cat([model(ids[:, :12]).logits, model(ids[:, 12:]).logits], 1)
        with attach(model, Spy()) as attached:
            packed = model(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
        assert isinstance(attached.backend.calls[0].mask, LazyMask)


def test_a_mask_of_the_users_own() -> None:
    model = made(tiny_llama)
    ids = torch.randint(0, 64, (1, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, 10, 10).tril()
    mask[..., 5:, 2] = 0
    additive = (1 - mask) * torch.finfo(torch.float32).min
    with torch.no_grad():
        before = model(ids, attention_mask=additive).logits
        with attach(model, Spy()):
            torch.testing.assert_close(model(ids, attention_mask=additive).logits, before, atol=1e-4, rtol=1e-4)


def test_sliding_layers_stay_exact() -> None:
    model = made(gemma3)
    ids = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), attach(model, Spy()) as attached:
        model(ids)
    assert {c.layer for c in attached.backend.calls} == {1}


def test_encoders_compute_what_they_did() -> None:
    from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, ViTConfig, ViTModel

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = torch.randint(1, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    ids[ids == 63] = 1
    ids[0, -1] = ids[1, 10:] = 63
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    bert = made(lambda: BertModel(BertConfig(vocab_size=64, **small)))
    vit = made(lambda: ViTModel(ViTConfig(image_size=32, patch_size=8, **small)))
    clip = made(lambda: CLIPModel(CLIPConfig(
        text_config={"vocab_size": 64, "max_position_embeddings": 32, "eos_token_id": 63, **small},
        vision_config={"image_size": 32, "patch_size": 8, **small}, projection_dim=16)))
    with torch.no_grad():
        before = bert(ids, attention_mask=mask).last_hidden_state
        with attach(bert, Spy()) as attached:
            after = bert(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(after[mask.bool()], before[mask.bool()], atol=1e-5, rtol=1e-4)
        assert {c.phase for c in attached.backend.calls} == {"bidirectional"} and len(attached.layers) == 2
        before = vit(pixels).last_hidden_state
        with attach(vit, Spy()) as attached:
            torch.testing.assert_close(vit(pixels).last_hidden_state, before, atol=1e-5, rtol=1e-4)
        assert {c.phase for c in attached.backend.calls} == {"bidirectional"}
        before = clip(input_ids=ids, pixel_values=pixels, attention_mask=mask).logits_per_image
        with attach(clip, Spy()) as attached:
            torch.testing.assert_close(clip(input_ids=ids, pixel_values=pixels, attention_mask=mask).logits_per_image,
                                       before, atol=1e-5, rtol=1e-4)
        assert {c.phase for c in attached.backend.calls} == {"bidirectional", "prefill"} and len(attached.layers) == 4


def test_encoder_decoder_with_cross_attention() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    model = made(lambda: BartForConditionalGeneration(BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64)))
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with torch.no_grad():
        before = model(ids, attention_mask=mask, decoder_input_ids=ids).logits
        with attach(model, Spy()):
            after = model(ids, attention_mask=mask, decoder_input_ids=ids).logits
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_training_with_checkpointing_and_dropout() -> None:
    model = made(tiny_llama).train()
    model.gradient_checkpointing_enable()
    ids = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(1))
    model(ids, labels=ids).loss.backward()
    before = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    with attach(model, Spy()):
        model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight.grad, before, atol=1e-5, rtol=1e-4)
    dropping = made(gpt2).train()
    with attach(dropping, Spy()) as attached:
        dropping(ids)
    assert all(r["fallback"] == "dropout in training" for r in attached.records)


def test_compiled_model() -> None:
    model = made(tiny_llama)
    ids = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits
        with attach(model, Spy()) as attached:
            compiled = torch.compile(model, backend="eager")
            torch.testing.assert_close(compiled(ids).logits, before, atol=1e-4, rtol=1e-4)
        assert attached.backend.calls


def test_two_models_do_not_interfere() -> None:
    one, two = made(tiny_llama), made(tiny_llama)
    ids = torch.arange(20)[None]
    with torch.no_grad(), attach(one, Spy()) as a, attach(two, SlidingWindow(1, 4)) as b:
        one(ids)
        two(ids)
    assert len(a.backend.calls) == 2 and len(a.records) == 2 and len(b.records) == 2


def test_layers_can_be_chosen() -> None:
    model = made(tiny_llama)
    with torch.no_grad(), attach(model, Spy(), layers=["*.layers.1.*"]) as attached:
        model(torch.arange(20)[None])
    assert [c.layer for c in attached.backend.calls] == [1]
    with pytest.raises(ValueError, match="Near names are"):
        attach(model, Spy(), layers=["model.layers.7.self_attn"])
    assert model.config._attn_implementation == "sdpa"


def test_attach_twice_detach_twice() -> None:
    model = made(tiny_llama)
    attached = attach(model, Spy())
    with pytest.raises(UnsupportedModelError, match="attached already"):
        attach(model, Spy())
    with pytest.raises(UnsupportedModelError, match="attached already"):
        attach(model.model, Spy())
    attached.detach()
    attached.detach()
    with attach(model, Spy()):
        pass
    assert model.config._attn_implementation == "sdpa"


def test_exception_inside_restores_and_leaves_nothing_registered() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    model = made(tiny_llama)
    with pytest.raises(ZeroDivisionError), attach(model, Spy()):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    for interface in (AttentionInterface, AttentionMaskInterface):
        assert not [n for n in interface._global_mapping if n.startswith("looseleaf")]


def test_unsupported_models() -> None:
    with pytest.raises(UnsupportedModelError, match="expected a transformers model whose attention goes through"):
        attach(torch.nn.Linear(2, 2), SlidingWindow())
    with pytest.raises(TypeError, match=r"expected an instance of an AttentionBackend.*got the class SlidingWindow"):
        attach(made(tiny_llama), SlidingWindow)


def test_state_and_reset() -> None:
    @dataclasses.dataclass
    class Counting(Spy):
        """Counts its calls in the state."""

        def attend(self, call: AttentionCall) -> torch.Tensor:
            call.state.n = getattr(call.state, "n", 0) + 1
            call.record(n=call.state.n, pattern="odd" if call.state.n % 2 else "even")
            return call.dense()

    model = made(tiny_llama)
    with torch.no_grad(), attach(model, Counting()) as attached:
        model(torch.arange(9)[None])
        model(torch.arange(9)[None])
        assert [r["n"] for r in attached.records] == [1, 1, 2, 2]
        report = attached.report()
        assert "1 x odd, 1 x even" in report.to_text() and report.facts["calls"] == 4
        attached.reset()
        assert attached.records == []
        model(torch.arange(9)[None])
        assert [r["n"] for r in attached.records] == [1, 1]


def test_shortest_sequences() -> None:
    model = made(tiny_llama)
    with torch.no_grad(), attach(model, SlidingWindow()):
        assert model(torch.zeros(1, 1, dtype=torch.long)).logits.shape == (1, 1, 64)
    empty = torch.zeros(1, 0, dtype=torch.long)
    with pytest.raises(RuntimeError) as plainly:  # transformers itself takes no empty input
        model(empty)
    with pytest.raises(RuntimeError) as attached, attach(model, SlidingWindow()):
        model(empty)
    assert str(plainly.value) == str(attached.value) and model.config._attn_implementation == "sdpa"


def test_all_padding_row() -> None:
    model = made(tiny_llama)
    ids = torch.arange(20).view(2, 10)
    mask = torch.ones_like(ids)
    mask[1] = 0
    with torch.no_grad():
        before = model(ids[:1]).logits
        with attach(model, SlidingWindow(1, 3)), attach(made(tiny_llama), Spy()):
            after = model(ids, attention_mask=mask).logits
        with attach(model, Spy()):
            torch.testing.assert_close(model(ids, attention_mask=mask).logits[:1], before, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(after[:1]).all()


def test_diffusers_processors_and_steps() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2,
                                            sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=2,
                                            out_channels=4)
    model.eval()
    x, label = torch.randn(1, 4, 8, 8), torch.tensor([1])
    with torch.no_grad():
        before = [model(x, timestep=torch.tensor([t]), class_labels=label).sample for t in (9, 5, 1)]
        with attach(model, Spy()) as attached:
            after = [model(x, timestep=torch.tensor([t]), class_labels=label).sample for t in (9, 5, 1)]
            model(x, timestep=torch.tensor([9]), class_labels=label)
            with pytest.raises(UnsupportedModelError, match="attached already"):
                attach(model, Spy())
        for one, two in zip(before, after, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
        calls = attached.backend.calls
        assert [c.step for c in calls] == [0, 0, 1, 1, 2, 2, 0, 0]
        assert {c.phase for c in calls} == {"bidirectional"} and len(attached.layers) == 2
        assert torch.equal(model(x, timestep=torch.tensor([9]), class_labels=label).sample, before[0])
        assert not model._forward_pre_hooks


def test_step_and_steps_of_an_own_loop_reach_every_call() -> None:
    model = made(tiny_llama)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad(), attach(model, Spy(), steps=4) as attached:
        model(ids)
        for step in (0, 1):
            attached.step = step
            model(ids)
        attached.reset()
        model(ids)
    layers = len(attached.layers)
    assert [c.step for c in attached.backend.calls] == [s for s in (None, 0, 1, None) for _ in range(layers)]
    assert {c.steps for c in attached.backend.calls} == {4}


@pytest.mark.parametrize("told", [None, 7])
def test_steps_come_from_the_scheduler_unless_told(told: int | None) -> None:
    diffusers = pytest.importorskip("diffusers")
    transformer = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4,
                                                  num_layers=1, sample_size=8, patch_size=2, num_embeds_ada_norm=10,
                                                  norm_num_groups=2, out_channels=4)
    pipeline = SimpleNamespace(transformer=transformer, scheduler=diffusers.DDIMScheduler(num_train_timesteps=10))
    x, label = torch.randn(1, 4, 8, 8), torch.tensor([1])
    with torch.no_grad(), attach(pipeline, Spy(), steps=told) as attached:
        for count in (3, 5):
            pipeline.scheduler.set_timesteps(count)
            for t in pipeline.scheduler.timesteps:
                transformer(x, timestep=t[None], class_labels=label)
    calls = attached.backend.calls
    assert [c.step for c in calls] == [0, 1, 2, 0, 1, 2, 3, 4]
    assert [c.steps for c in calls] == ([told] * 8 if told else [3] * 3 + [5] * 5)


def test_an_own_count_of_steps_is_left_alone_in_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1,
                                            sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=2,
                                            out_channels=4)
    x, label = torch.randn(1, 4, 8, 8), torch.tensor([1])
    with torch.no_grad(), attach(model, Spy(), steps=3) as attached:
        for step, t in enumerate((9, 5, 1)):
            attached.step = step
            model(x, timestep=torch.tensor([t]), class_labels=label)
        attached.reset()
        for t in (9, 5):
            model(x, timestep=torch.tensor([t]), class_labels=label)
    assert [c.step for c in attached.backend.calls] == [0, 1, 2, 0, 1]


def test_rotary_embeddings_reach_the_processors_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=4, use_rotary_positional_embeddings=True).eval()
    g = torch.Generator().manual_seed(1)
    given = {"hidden_states": torch.randn(1, 3, 4, 8, 8, generator=g), "timestep": torch.tensor([5]),
             "encoder_hidden_states": torch.randn(1, 4, 8, generator=g)}
    angle = torch.rand(48, 8, generator=g).repeat_interleave(2, 1) * 6
    with torch.no_grad():
        plain = model(**given, image_rotary_emb=None).sample
        before = model(**given, image_rotary_emb=(angle.cos(), angle.sin())).sample
        with attach(model, Spy()) as attached:
            after = model(**given, image_rotary_emb=(angle.cos(), angle.sin())).sample
    assert not torch.allclose(plain, before, atol=1e-3), "rotary embeddings change nothing: this shows nothing"
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    assert len(attached.backend.calls) == 2


def test_steps_below_one() -> None:
    model = made(tiny_llama)
    with pytest.raises(ValueError, match="steps: expected None or an integer >= 1, got 0"):
        attach(model, Spy(), steps=0)
    with attach(model, Spy()):
        pass


def test_cross_and_joint_attention_of_diffusers_and_their_recomputation() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"), mid_block_type=None, cross_attention_dim=16, attention_head_dim=8)
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 64, 16, generator=g)

    def run() -> torch.Tensor:
        out: torch.Tensor = unet(x, torch.tensor([5]), encoder_hidden_states=text).sample
        return out

    before = run()
    with attach(unet, Spy()) as attached:
        torch.testing.assert_close(run(), before)
        copied = copy.deepcopy(unet)
    assert [c.is_cross for c in attached.backend.calls] == [False, True], "as many tokens of text as of the image"
    assert not [n for m in copied.modules() for n in m.__dict__ if "looseleaf" in n]
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        with attach(unet, SquaredSpy()) as attached:
            loss = run().square().mean()
        loss.backward()
        gradients.append(unet.conv_in.weight.grad.clone())
        assert len(attached.records) == 2
    torch.testing.assert_close(*gradients)
    flux = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=0, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8)).eval()
    with torch.no_grad(), attach(flux, Spy()) as attached:
        flux(hidden_states=torch.randn(1, 16, 4), encoder_hidden_states=torch.randn(1, 5, 8),
             timestep=torch.tensor([1.0]), pooled_projections=torch.randn(1, 8),
             img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(5, 3))
    assert [(c.is_cross, c.shape[3]) for c in attached.backend.calls] == [(False, 21)], "text and image together"


@dataclasses.dataclass
class SquaredSpy(Spy):
    """Not exact."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        return super().attend(call).square()
