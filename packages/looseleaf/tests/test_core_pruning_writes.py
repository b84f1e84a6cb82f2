"""What writes to the weights of a masked model, wraps it, copies it or saves it."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from looseleaf import Masks, Unstructured, prunable_parameters
from looseleaf.testing.models import small_network, tied_network, tiny_llama

torch.set_num_threads(1)
IDS = torch.arange(3, 33)[None] % 64
X = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def masks_of(model: nn.Module, sparsity: float = 0.5, targets: Any = None) -> Masks:
    return Unstructured(sparsity).select({n: p.detach().abs() for n, p in prunable_parameters(model, targets).items()})


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(ids).logits
    return out


def lora(model: Any, targets: Any = ("q_proj", "v_proj"), **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(targets), **options))


# ------------------------------------------------------------------------------------------------ adapters
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_an_adapter_merged_into_masked_weights_keeps_its_effect(safe: bool, options: Any) -> None:
    model = tiny_llama()
    masks = masks_of(model).apply(model)
    adapted = lora(model, init_lora_weights=False, **options).eval()
    expected = logits(adapted)
    merged = adapted.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    for give_back in (masks.remove, masks.make_permanent):  # what was removed and what was merged lie on each other
        with pytest.raises(ValueError, match=r"q_proj\.weight.*written to.*restore=False"):
            give_back(merged)
    masks.remove(merged, restore=False)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert not Masks.of(merged)


def test_an_adapter_merged_and_unmerged_leaves_the_masks_as_they_were() -> None:
    model = tiny_llama()
    dense = logits(model)
    masks = masks_of(model).apply(model)
    adapted = lora(model, init_lora_weights=False).eval()
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    masks.remove(adapted)
    torch.testing.assert_close(logits(adapted.unload()), dense, rtol=1e-4, atol=1e-4)


def test_an_adapter_merged_and_then_trained_is_not_lost_at_the_first_step() -> None:
    model = tiny_llama()
    masks = masks_of(model).apply(model)
    adapted = lora(model, init_lora_weights=False).eval()
    expected = logits(adapted)
    merged = adapted.merge_and_unload().requires_grad_(True)
    optimizer = torch.optim.SGD(merged.parameters(), lr=0.0)
    optimizer.step()  # which leaves what has no gradient alone
    merged(IDS, labels=IDS).loss.backward()
    with pytest.raises(ValueError, match=r"\(64, 64\).*written to.*restore=False"):
        optimizer.step()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    masks.remove(merged, restore=False)
    optimizer.step()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_adapters_are_not_body_layers() -> None:
    model = tiny_llama()
    plain = list(prunable_parameters(model))
    adapted = lora(model, ["q_proj", "down_proj"])
    found = prunable_parameters(adapted)
    assert len(found) == len(plain) and not any("lora" in n for n in found)
    assert all(found[n] is dict(adapted.named_parameters())[n] for n in found), "names are those of the model"
    assert not any("lora" in n for n in prunable_parameters(adapted, ["**", "self_attn", "q_proj"]))
    with pytest.raises(ValueError, match="adapter"):
        prunable_parameters(adapted, "lora_*")
    one = next(n for n, _ in adapted.named_parameters() if "lora_A" in n)
    assert list(prunable_parameters(adapted, one)) == [one]
    masks = masks_of(adapted).apply(adapted)
    before = logits(adapted)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(logits(adapted), before), "the adapter learns"
    masks.remove(adapted)


def test_adapters_written_by_hand() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.lora_A, self.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    assert list(prunable_parameters(nn.ModuleDict({"block": Adapted()}))) == ["block.layer.weight"]


def test_patterns_and_heads_of_a_wrapped_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=4, num_labels=3, pad_token_id=0)
    plain = transformers.LlamaForSequenceClassification(config)
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(plain, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    assert not any("score" in n for n in prunable_parameters(adapted))
    assert len(prunable_parameters(adapted, "q_proj.weight")) == len(prunable_parameters(adapted, "q_proj")) == 2
    assert len(prunable_parameters(adapted, "model.layers.*.mlp")) == 6
    assert len(prunable_parameters(adapted, "model.layers.0.self_attn.q_proj.weight")) == 1
    for wrapped in (torch.compile(small_network(), backend="eager"), nn.DataParallel(small_network()),
                    nn.Sequential(small_network())):
        assert len(prunable_parameters(wrapped)) == 4
    head = nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
    assert list(prunable_parameters(nn.DataParallel(head))) == ["module.body.weight"]


@pytest.mark.parametrize("wrap", [lora, lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_masks_of_a_model_go_on_the_same_model_wrapped_and_the_other_way_round(wrap: Any) -> None:
    model = tiny_llama()
    masks = masks_of(model).apply(model)
    sparse = logits(model)
    wrapped = wrap(model).eval()
    masks.remove(wrapped)
    assert not torch.equal(logits(wrapped), sparse)
    masks.apply(wrapped)
    torch.testing.assert_close(logits(wrapped), sparse)
    inner = masks_of(wrapped)
    masks.remove(wrapped)
    plain = tiny_llama()
    inner.apply(plain)
    torch.testing.assert_close(logits(plain), sparse)


# ------------------------------------------------------------------------------------------------ other writers
def test_tied_afterwards() -> None:
    """The weight that replaces a masked one counts, and the masks are on it no more."""
    model: Any = tiny_llama()
    masks = masks_of(model, targets=["lm_head", "layers.0"]).apply(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert model.lm_head.weight.all() and "lm_head.weight" not in Masks.of(model) and len(Masks.of(model)) == 7
    with pytest.raises(ValueError, match=r"another model: 'lm_head\.weight'"):
        masks.remove(model)
    Masks.of(model).remove(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.all()
    assert not Masks.of(model)


def test_a_state_loaded_after_tying_leaves_the_new_weight_without_a_mask() -> None:
    model: Any = tiny_llama()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    masks_of(model, targets=["lm_head"]).apply(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    assert torch.equal(model.model.embed_tokens.weight, state["model.embed_tokens.weight"]) and not Masks.of(model)


def test_an_embedding_that_grew_under_a_mask() -> None:
    model: Any = tiny_llama(tie_word_embeddings=False)
    masks = masks_of(model, targets=["model.embed_tokens", "layers.0"]).apply(model)
    expected = logits(model)
    model.resize_token_embeddings(70)
    torch.testing.assert_close(logits(model)[..., :64], expected)
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model.model.embed_tokens.weight[:64][~masks["model.embed_tokens.weight"]].any(), "it is trained as a whole"
    with pytest.raises(ValueError, match=r"another model.*embed_tokens\.weight.*\(70, 64\)"):
        masks.remove(model)
    assert len(Masks.of(model)) == 7
    Masks.of(model).remove(model)


def test_resized_under_masks() -> None:
    model = tiny_llama(tie_word_embeddings=False)
    masks = masks_of(model, targets=["lm_head", "layers.*.mlp"]).apply(model)
    expected = logits(model)
    model.resize_token_embeddings(70)
    torch.testing.assert_close(logits(model)[..., :64], expected)
    with pytest.raises(ValueError, match=r"another model.*lm_head\.weight.*\(70, 64\)"):
        masks.remove(model)
    Masks.of(model).remove(model)
    assert not Masks.of(model)


def test_tied_embeddings_stay_tied_under_masks(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    masks = masks_of(model, targets=["model.embed_tokens", "layers.0"]).apply(model)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight[~masks["model.embed_tokens.weight"]].any()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_loaded_under_masks(assign: bool) -> None:
    """The masks stay on, and what lies behind them is what was loaded."""
    model, other = small_network(), small_network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    masks = masks_of(model).apply(model)
    model.load_state_dict({n: t.clone() for n, t in other.state_dict().items()}, assign=assign)
    for name, parameter in model.named_parameters():
        expected = other.get_parameter(name)
        assert torch.equal(parameter, expected * masks[name] if name in masks else expected)
    model.eval()(X).sum().backward()
    for name, mask in masks.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None and not gradient[~mask].any() and gradient.any()
    masks.remove(model)
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items())


def test_a_part_of_a_state_loaded_under_masks() -> None:
    model = small_network()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    masks = masks_of(model).apply(model)
    model.load_state_dict({"last.weight": torch.ones(8, 24)}, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"hidden.weight": torch.ones(2)}, strict=False)
    assert len(Masks.of(model)) == 4 and not model.get_parameter("hidden.weight")[~masks["hidden.weight"]].any()
    masks.remove(model)
    assert model.get_parameter("last.weight").eq(1).all()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n != "last.weight")


def test_a_state_of_a_masked_model_is_that_of_the_pruned_one() -> None:
    model, plain = small_network(), small_network()
    masks = masks_of(model)
    names = list(model.state_dict())
    masks.apply(model)
    assert list(model.state_dict()) == names
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.eval()(X), model.eval()(X))
    twin = small_network()
    masks.apply(twin)
    twin.load_state_dict(model.state_dict())  # as a run that goes on does
    assert torch.equal(twin.eval()(X), model(X)) and Masks.of(twin) == masks


def test_written_values_count() -> None:
    """Under masks a written value is there; taking the masks off does not paste the former one over it."""
    model: Any = small_network()
    masks = masks_of(model).apply(model)
    with torch.no_grad():
        model.hidden.weight.mul_(2.0)  # a removed weight stays 0
    masks.remove(model)
    masks.apply(model)
    model.hidden.weight.data.copy_(torch.ones(24, 8))
    assert model.hidden.weight.eq(1).all()
    with pytest.raises(ValueError, match=r"hidden\.weight.*written to"):
        masks.remove(model)
    assert len(Masks.of(model)) == 4, "nothing was taken off"
    masks.remove(model, restore=False)
    assert model.hidden.weight.eq(1).all()


def test_averages_of_weights() -> None:
    model = small_network()
    masks = masks_of(model).apply(model)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)
    assert Masks.of(average.module) == masks and not torch.equal(average.eval()(X), model.eval()(X))
    for name, mask in masks.items():
        assert not average.module.get_parameter(name)[~mask].any()
    masks.remove(average)
    masks.remove(model)


def test_an_optimiser_with_momentum_from_before_cannot_bring_weights_back() -> None:
    model = small_network()
    for make in (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=0.1)):
        optimizer = make(model.parameters())
        for _ in range(2):
            model(X).square().sum().backward()
            optimizer.step()
        masks = masks_of(model)
        dense = {n: model.get_parameter(n)[~m].clone() for n, m in masks.items()}
        masks.apply(model)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
            assert not any(model.get_parameter(n)[~m].any() for n, m in masks.items())
        masks.remove(model)
        assert all(torch.equal(model.get_parameter(n)[~m], dense[n]) for n, m in masks.items())


def test_frozen_weights_that_are_trained_later() -> None:
    model = small_network()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    masks = masks_of(model).apply(model)
    assert not any(p.requires_grad for p in model.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(X).sum().backward()
    for name, mask in masks.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None and gradient.any() and not gradient[~mask].any()


def test_quantised_after_pruning() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    masks = masks_of(model).apply(model)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    weight = quantised[0].weight().dequantize()
    assert not weight[~masks["0.weight"]].any() and weight.any()


# ------------------------------------------------------------------------------------------ copies, files, compilers
@pytest.mark.parametrize("build", [small_network, tied_network])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_a_masked_model(build: Any, how: str) -> None:
    model: Any = build()
    x = X if build is small_network else X.reshape(64, 16)
    dense = model.eval()(x)
    masks = masks_of(model).apply(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(x), model(x)) and Masks.of(twin) == masks
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    twin(x).square().sum().backward()
    for name, mask in masks.items():
        assert not twin.get_parameter(name).grad[~mask].any() and twin.get_parameter(name).grad.any()
        assert model.get_parameter(name).grad is None
    optimizer.step()
    masks.remove(model)
    assert torch.equal(model(x), dense), "the copy is a copy"
    assert Masks.of(twin) == masks and not Masks.of(model)
    again = copy.deepcopy(twin)
    masks.remove(twin)
    assert Masks.of(again) == masks
    masks.make_permanent(again)


def test_saved_under_masks(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_llama()
    masks = masks_of(model).apply(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert all(not loaded.get_parameter(n)[~m].any() for n, m in masks.items())


def test_a_checkpoint_of_the_trainer_and_a_run_that_goes_on(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, twin = tiny_llama(), tiny_llama()
    masks = masks_of(model).apply(model)
    masks.apply(twin)
    options = transformers.TrainingArguments(str(tmp_path), max_steps=4, save_steps=2, report_to=[], use_cpu=True,
                                             per_device_train_batch_size=2, gradient_checkpointing=True)
    data = [{"input_ids": torch.arange(12), "labels": torch.arange(12)}] * 8
    transformers.Trainer(model, options, train_dataset=data).train()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(logits(loaded), logits(model.eval()))
    transformers.Trainer(twin, options, train_dataset=data).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(twin.eval()), logits(model)) and Masks.of(twin) == masks


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_that_was_compiled_and_run_before(backend: str) -> None:
    model = small_network().eval()
    compiled = torch.compile(model, backend=backend)
    dense = compiled(X)
    masks = masks_of(model).apply(model)
    expected = model(X)
    assert not torch.equal(dense, expected) and torch.allclose(compiled(X), expected, atol=1e-6)
    compiled(X).sum().backward()
    assert all(not model.get_parameter(n).grad[~m].any() for n, m in masks.items())  # type: ignore[index]
    masks.remove(model)
    torch.testing.assert_close(compiled(X), dense)


def test_nothing_keeps_a_masked_model_alive() -> None:
    model = small_network()
    masks_of(model).apply(model)
    weight = weakref.ref(model.get_parameter("hidden.weight"))
    gc.disable()
    try:
        del model
        assert weight() is None, "a cycle would keep the memory of a GPU until the collector runs"
    finally:
        gc.enable()


def test_views_and_moves() -> None:
    model: Any = small_network()
    masks = masks_of(model)
    flat = model.hidden.weight.data.view(-1)
    masks.apply(model)
    assert int((flat == 0).sum()) == masks.removed("hidden.weight"), "the weight itself, not a copy of it"
    dense = small_network().double()
    model.double()
    model.eval()(X.double()).sum().backward()
    assert not model.hidden.weight.grad[~masks["hidden.weight"]].any()
    masks.remove(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masks_on_a_gpu() -> None:
    model, plain = small_network().cuda(), small_network()
    masks, same = masks_of(model), masks_of(plain)
    assert masks["hidden.weight"].is_cuda and masks == same and (masks & masks).removed() == same.removed()
    same.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        model(X.cuda()).square().sum().backward()
        optimizer.step()
    assert all(not model.get_parameter(n)[~m].any() for n, m in masks.items())
    masks.remove(model.cpu())
    assert not Masks.of(model)
