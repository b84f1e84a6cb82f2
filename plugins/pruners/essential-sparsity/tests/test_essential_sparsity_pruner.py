"""What is special to magnitude pruning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from looseleaf import UnsupportedModelError, get, prunable_parameters
from looseleaf.testing.models import small_network, tied_network
from looseleaf_essential_sparsity import MagnitudePruner

torch.set_num_threads(1)


@pytest.mark.parametrize("fields, word", [
    ({"sparsity": 1.0}, "sparsity"), ({"sparsity": -0.1}, "sparsity"), ({"sparsity": float("nan")}, "sparsity"),
    ({"sparsity": "half"}, "sparsity"), ({"sparsity": None}, "sparsity"), ({"sparsity": True}, "sparsity"),
    ({"scope": "model"}, "scope"), ({"pattern": "4:2"}, "pattern"), ({"pattern": "4:4"}, "pattern"),
    ({"pattern": "0:4"}, "pattern"), ({"pattern": "two to four"}, "pattern"), ({"pattern": 24}, "pattern"),
    ({"pattern": "1:4"}, "0.75"), ({"pattern": "2:4", "sparsity": 0.3}, "0.5"),
    ({"targets": ()}, "targets"), ({"targets": ("",)}, "targets"), ({"exclude": (3,)}, "exclude"),
    ({"targets": 5}, "targets")])
def test_bad_values(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word) as caught:
        MagnitudePruner(**fields)
    assert "expected" in str(caught.value) and "got" in str(caught.value)


def test_the_pooler_is_left_out() -> None:
    """As the authors do with BERT; it can be named."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=64, num_labels=2)
    model = transformers.BertForSequenceClassification(config)
    masks = MagnitudePruner(0.5).prune(model)
    assert masks.total() == sum(w.numel() for n, w in model.named_parameters() if w.ndim == 2 and ".encoder." in n)
    assert list(MagnitudePruner(0.5, targets=("bert.pooler",)).prune(model)) == ["bert.pooler.dense.weight"]


def test_by_name() -> None:
    assert isinstance(get("essential-sparsity", sparsity=0.3), MagnitudePruner)


def test_lists_and_single_patterns_become_tuples() -> None:
    made = MagnitudePruner(targets="hidden", exclude=["last"])  # type: ignore[arg-type]
    assert made.targets == ("hidden",) and made.exclude == ("last",)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.333, 0.5, 0.9, 0.999])
def test_exactly_the_smallest_go(scope: Any, sparsity: float) -> None:
    model = small_network()
    weights = {n: p.detach().abs() for n, p in prunable_parameters(model).items()}
    masks = MagnitudePruner(sparsity, scope=scope).prune(model)
    groups = [list(weights)] if scope == "global" else [[n] for n in weights]
    for names in groups:
        magnitudes = torch.cat([weights[n].flatten() for n in names])
        kept = torch.cat([masks[n].flatten() for n in names])
        assert int((~kept).sum()) == round(sparsity * len(kept))
        if 0 < kept.sum() < len(kept):
            assert magnitudes[~kept].max() <= magnitudes[kept].min()


def test_pruning_what_is_pruned_gives_the_same_masks() -> None:
    model = small_network()
    for pruner in (MagnitudePruner(0.6), MagnitudePruner(0.6, scope="layer"), MagnitudePruner(pattern="2:4")):
        masks = pruner.prune(model).make_permanent(model)
        assert pruner.prune(model) == masks


def test_masks_on_the_model_do_not_change_what_is_measured() -> None:
    model = small_network()
    masks = MagnitudePruner(0.5).prune(model).apply(model)
    assert MagnitudePruner(0.5).prune(model) == masks


def test_higher_sparsity_removes_more_of_the_same() -> None:
    model = small_network()
    low, high = MagnitudePruner(0.3).prune(model), MagnitudePruner(0.7).prune(model)
    assert (low & high) == high


def test_says_what_was_counted() -> None:
    model = tied_network()
    facts = MagnitudePruner(0.5).prune(model).metadata
    assert facts["prunable"] == 16 * 16 + 16 * 8 and facts["parameters"] == 16 * 16 + 16 * 8 + 16 + 16 + 8
    assert facts["plugin"] == "essential-sparsity" and facts["rule"] == "Unstructured"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_weights_that_are_no_numbers_are_named(bad: float, pattern: str) -> None:
    model: Any = small_network()
    with torch.no_grad():
        model.hidden.weight[1, 1] = bad
    with pytest.raises(ValueError, match=r"hidden\.weight"):
        MagnitudePruner(pattern=pattern).prune(model)
    MagnitudePruner(pattern=pattern, exclude=("hidden",)).prune(model)


def test_inputs_that_are_no_multiple() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"multiple of 4 inputs, '1\.weight' has 6"):
        MagnitudePruner(pattern="2:4").prune(model)
    assert len(MagnitudePruner(pattern="2:4", exclude=("1",)).prune(model)) == 1


def test_unknown_target_names_near_names() -> None:
    with pytest.raises(ValueError, match="hidden"):
        MagnitudePruner(targets=("hiden",)).prune(small_network())


def test_a_model_without_weights() -> None:
    with pytest.raises(UnsupportedModelError):
        MagnitudePruner().prune(nn.LayerNorm(4))


def test_a_model_on_the_meta_device() -> None:
    with pytest.raises(ValueError, match="meta device"):
        MagnitudePruner().prune(nn.Linear(8, 8, device="meta"))


def test_transposed_weights_group_their_inputs() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    masks = MagnitudePruner(pattern="2:4").prune(model)
    name = "transformer.h.0.attn.c_attn.weight"  # (in, out)
    assert bool((masks[name].view(4, 4, 48).sum(1) == 2).all())
    assert not any("wte" in n or "lm_head" in n for n in masks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = small_network().to(dtype)
    masks = MagnitudePruner(0.4).prune(model)
    assert masks.removed() == round(0.4 * masks.total())
    masks.apply(model)
    assert next(iter(model.parameters())).dtype == dtype
    masks.remove(model)


def test_ties_in_a_coarse_dtype_are_exact() -> None:
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.copy_((layer.weight * 20).round())
    masks = MagnitudePruner(0.37).prune(layer)
    assert masks.removed() == round(0.37 * 4096)


@pytest.mark.gpu
def test_two_to_four_is_what_the_hardware_takes() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from torch.sparse import to_sparse_semi_structured

    layer = nn.Linear(128, 128, bias=False).half().cuda()
    MagnitudePruner(pattern="2:4").prune(layer).make_permanent(layer)
    x = torch.randn(64, 128, device="cuda", dtype=torch.half)
    dense = layer(x)
    layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach()))
    torch.testing.assert_close(layer(x), dense, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2_counts_and_reloads(tmp_path: Any) -> None:
    models = pytest.importorskip("looseleaf_lab.models")
    transformers = pytest.importorskip("transformers")
    model, tokenizer = models.load("smollm2")
    masks = MagnitudePruner(0.1).prune(model)
    facts = masks.metadata
    assert facts["prunable"] == 106_168_320 and facts["tensors"] == 210 and facts["parameters"] == 134_515_008
    assert masks.removed() == round(0.1 * 106_168_320)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        dense = model(ids).logits
        masks.apply(model)
        sparse = model(ids).logits
        masks.remove(model)
        assert torch.equal(model(ids).logits, dense) and not torch.equal(sparse, dense)
        masks.make_permanent(model).save(tmp_path / "masks.safetensors")
        model.save_pretrained(tmp_path)
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(plain(ids).logits, sparse)
