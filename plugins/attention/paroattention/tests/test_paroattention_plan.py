"""Plans on disk, and calibration of models of diffusers and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from looseleaf import AttentionCall, attach
from looseleaf.files import load_tensors, save_tensors
from looseleaf.testing.common import assert_unchanged, mixed_modes, snapshot
from looseleaf.testing.models import tiny_llama
from looseleaf_paroattention import PERMUTATIONS, PAROAttention, Plan
from looseleaf_paroattention.calibration import Observer, observe, planted
from looseleaf_paroattention.plan import FORMAT

PLAIN: dict[str, Any] = {"qk_bits": 16, "pv_bits": 16}


@pytest.fixture
def small() -> PAROAttention:
    """Calibrated on planted heads."""
    plugin = PAROAttention(grid=(4, 8, 8), block=16, density=0.3)
    observer = Observer(plugin.token_grid, plugin.block, plugin.eps)
    observer.attend(AttentionCall(*planted((4, 8, 8)), 1.0, False, phase="bidirectional"))
    plugin.fit(observer.layers)
    return plugin


def test_saved_and_loaded(tmp_path: Path, small: PAROAttention) -> None:
    small.save(tmp_path / "new" / "plan.safetensors")
    again = PAROAttention(grid=(4, 8, 8), block=16)
    again.load(tmp_path / "new" / "plan.safetensors")
    assert small.plan is not None and again.plan is not None and again.plan.settings == small.plan.settings
    one, two = small.plan.layers[0], again.plan.layers[0]
    assert one.permutations == two.permutations == PERMUTATIONS and torch.equal(one.masks, two.masks)
    assert one.sparsity == two.sparsity and one.incoherence == two.incoherence
    call = AttentionCall(*planted((4, 8, 8), 1), 1.0, False, phase="bidirectional")
    assert torch.equal(small.attend(call), again.attend(call))
    assert float(one.masks.float().mean()) == pytest.approx(0.3, abs=0.01)
    _, written = load_tensors(tmp_path / "new" / "plan.safetensors", format=FORMAT)
    assert written["grid"] == [4, 8, 8] and written["layers"]["0"]["permutations"] == list(PERMUTATIONS)
    with pytest.raises(ValueError, match=r"plan: expected one for block=32, got one for block=16"):
        PAROAttention(grid=(4, 8, 8), block=32).load(tmp_path / "new" / "plan.safetensors")


def test_what_cannot_be_loaded(tmp_path: Path, small: PAROAttention) -> None:
    path = tmp_path / "plan.safetensors"
    with pytest.raises(FileNotFoundError, match=r"plan\.safetensors: expected a file of the format"):
        Plan.load(path)
    small.save(path)
    tensors, info = load_tensors(path, format=FORMAT)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        Plan.load(path)
    save_tensors(path, tensors, info, format="x/1")
    with pytest.raises(ValueError, match=r"expected a file of the format 'looseleaf\.paroattention/2', got 'x/1'"):
        Plan.load(path)
    layer = info["layers"]["0"]
    for change in ({"layers": {"0": {}}}, {"layers": {"0": {**layer, "permutations": ["FHW"]}}},
                   {"layers": {"0": {**layer, "permutations": ["FHX"] * 6}}}, {"layers": {"1": layer}}, {"grid": None}):
        save_tensors(path, tensors, {**info, **change}, format=FORMAT)
        with pytest.raises(ValueError, match="expected a whole plan, got one without"):
            Plan.load(path)


def seeded(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def test_cogvideox(tmp_path: Path) -> None:
    """Text and video in one sequence; calibrated, saved, loaded, attached and detached."""
    diffusers = pytest.importorskip("diffusers")
    model = seeded(lambda: diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=2, out_channels=2, time_embed_dim=16,
        text_embed_dim=8, num_layers=2, sample_width=16, sample_height=8, sample_frames=4, patch_size=2,
        temporal_compression_ratio=1, max_text_seq_length=5))
    g = torch.Generator().manual_seed(0)
    inputs = {"hidden_states": torch.randn(2, 4, 2, 8, 16, generator=g),
              "encoder_hidden_states": torch.randn(2, 5, 8, generator=g), "timestep": torch.tensor([500, 500])}
    before = model(**inputs)[0]
    plugin = PAROAttention(grid=(4, 4, 8), text_tokens=5, block=16, density=0.5)
    mixed_modes(model)
    state = snapshot(model)
    plugin.calibrate(model, inputs, progress=False)
    assert_unchanged(state, model)
    with pytest.raises(TypeError):
        plugin.calibrate(model, {"no_such_input": torch.zeros(1)}, progress=False)
    assert_unchanged(state, model)
    model.eval().requires_grad_(True)
    assert plugin.plan is not None and sorted(plugin.plan.layers) == [0, 1]
    assert plugin.plan.layers[0].masks.shape == (1, 2, 9, 9)
    plugin.save(tmp_path / "plan.safetensors")
    for bits, density, limit in (((16, 16), 1.0, 1e-5), ((8, 8), 1.0, 2e-2)):
        exact = PAROAttention(grid=(4, 4, 8), text_tokens=5, block=16, density=density, permutations="WHF",
                              qk_bits=bits[0], pv_bits=bits[1])
        with torch.no_grad(), attach(model, exact):
            assert float((model(**inputs)[0] - before).norm() / before.norm()) < limit
    again = PAROAttention(grid=(4, 4, 8), text_tokens=5, block=16)
    again.load(tmp_path / "plan.safetensors")
    with torch.no_grad(), attach(model, again) as attached:
        sparse = model(**inputs)[0]
        assert [r["density"] for r in attached.records] == [pytest.approx(0.5, abs=0.01)] * 2
        assert "density by head" in [f.title for f in attached.report().figures]
    with torch.no_grad(), attach(model, plugin):
        assert torch.equal(model(**inputs)[0], sparse)
    assert torch.equal(model(**inputs)[0], before)
    with pytest.raises(ValueError, match="133"), torch.no_grad(), attach(model, PAROAttention(grid=(4, 4, 4))):
        model(**inputs)


def test_images_and_cross_attention() -> None:
    """DiT has self-attention only; a PixArt model also has cross-attention, which stays exact."""
    diffusers = pytest.importorskip("diffusers")
    g = torch.Generator().manual_seed(0)
    image = torch.randn(2, 4, 16, 16, generator=g)
    dit = seeded(lambda: diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=16, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=2))
    inputs: dict[str, Any] = {"hidden_states": image, "timestep": torch.tensor([5, 5]),
                              "class_labels": torch.tensor([1, 2])}
    plugin = PAROAttention(grid=(1, 8, 8), block=16, density=0.5)
    plugin.calibrate(dit, [inputs, inputs], progress=False)
    assert plugin.plan is not None and set(plugin.plan.layers[0].sparsity) == {"FHW", "FWH"}
    with torch.no_grad(), attach(dit, plugin) as attached:
        assert dit(**inputs)[0].shape[0] == 2
    assert all(r["density"] == 0.5 for r in attached.records)

    pixart = seeded(lambda: diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=16,
        patch_size=2, cross_attention_dim=32, caption_channels=8, num_embeds_ada_norm=10))
    words = {"hidden_states": image, "timestep": torch.tensor([5, 5]),
             "encoder_hidden_states": torch.randn(2, 64, 8, generator=g),  # as many words as tokens
             "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    plugin = PAROAttention(grid=(1, 8, 8), block=16, density=1.0, **PLAIN)
    plugin.calibrate(pixart, words, progress=False)
    assert plugin.plan is not None and sorted(plugin.plan.layers) == [0, 2]
    with torch.no_grad():
        before = pixart(**words)[0]
        with attach(pixart, plugin) as attached:
            torch.testing.assert_close(pixart(**words)[0], before, atol=1e-5, rtol=1e-4)
    assert [r.get("fallback") for r in attached.records] == [None, "cross attention"] * 2


def test_steps_of_a_sampler() -> None:
    diffusers = pytest.importorskip("diffusers")
    dit = seeded(lambda: diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=2))
    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def run(attached: Any = None) -> None:
        with torch.no_grad():
            for time in (900, 600, 300, 0):
                dit(hidden_states=image, timestep=torch.tensor([time]), class_labels=torch.tensor([1]))

    plugin = PAROAttention(grid=(1, 4, 4), block=16, dense_steps=1, step_groups=2)
    plugin.calibrate(dit, run, steps=4, progress=False)
    with attach(dit, plugin, steps=4) as attached:
        run()
        run()
    exact = "one of the first 1 steps"
    assert [r.get("fallback") for r in attached.records] == [exact, None, None, None] * 2
    with attach(dit, plugin), pytest.raises(ValueError, match="expected the number of denoising steps"):
        run()


def test_an_encoder_of_transformers() -> None:
    """The class token of a vision transformer counts as text."""
    from transformers import ViTConfig, ViTModel

    model = seeded(lambda: ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                            intermediate_size=32, image_size=32, patch_size=4)))
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    plugin = PAROAttention(grid=(1, 8, 8), text_tokens=1, block=16, density=1.0, **PLAIN)
    plugin.calibrate(model, inputs, progress=False)
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        with attach(model, plugin) as attached:
            torch.testing.assert_close(model(**inputs).last_hidden_state, before, atol=1e-5, rtol=1e-4)
    assert all(r["density"] == 1 for r in attached.records) and len(attached.records) == 2


def test_nothing_to_calibrate_on() -> None:
    ids = torch.arange(16)[None]
    with pytest.raises(ValueError, match=r"expected self-attention .* got none .*causal attention"):
        PAROAttention(grid=(1, 4, 4)).calibrate(tiny_llama(), {"input_ids": ids}, progress=False)
    with pytest.raises(ValueError, match=r"got none \(exact calls: none\)"):
        observe(tiny_llama(), [], PAROAttention(grid=(1, 4, 4)).token_grid, progress=False)
