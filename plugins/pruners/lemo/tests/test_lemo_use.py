"""LeMo on people's own models and training loops; calibration; what it refuses."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from looseleaf.errors import UnsupportedModelError
from looseleaf.testing.common import assert_unchanged, mixed_modes, snapshot
from looseleaf.testing.models import tiny_gemma3, tiny_llama
from looseleaf_lemo import LeMo
from looseleaf_lemo.elimination import choose, rows_of
from looseleaf_lemo.predictor import Fit, Predictor, recall

SMALL = {"block": 4, "dense_first": 0.0, "scores": "exact", "loss_chunk": 16}


def three():
    return tiny_llama(num_hidden_layers=3)


# ---------------------------------------------------------------------------------------------------- calibration
def test_predictor_learns_planted_scores():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(24, 32, 8, generator=draw)
    loud = torch.rand(24, 8, generator=draw) < 0.4  # loud blocks score against everything
    x = x + 3 * loud.repeat_interleave(4, 1)[..., None]
    target = (loud[:, :, None] | loud[:, None, :]).float()
    rows = rows_of(x, None, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fit = Fit(Predictor(4, 2, 4, 8), 3e-3, 50)
    before = sum(p.numel() for p in fit.predictor.parameters())
    losses = [fit.step(x, target, rows.real(x)) for _ in range(200)]
    assert losses[-1] < losses[0] / 3
    found = fit.predictor.scores(x, rows)
    chosen = choose(found, rows.real(x), 0.25)
    assert loud.gather(1, chosen.long())[loud.sum(1) >= 2].float().mean() > 0.95
    assert recall(list(chosen), list(chosen)) == 1 and recall([chosen[0]], [7 - chosen[0]]) < 1
    sizes = fit.predictor.sizes()
    assert fit.cuts == 4 and sum(p.numel() for p in fit.predictor.parameters()) < before, sizes


def test_cutting_dead_units_changes_nothing():
    predictor = Predictor(4, 2, 4, 8)
    with torch.no_grad():
        for layer in (predictor.query[0], predictor.key[1]):
            layer.bias[:3] = -100.0
    x = torch.randn(1, 16, 8)
    expected = predictor(x)
    predictor.cut("query", 0, torch.arange(3, 8))
    predictor.cut("key", 1, torch.arange(3, 16))
    torch.testing.assert_close(predictor(x), expected)
    assert predictor.sizes() == {"query": [5, 16], "key": [8, 13]}


def test_padding_does_not_move_predictions():
    predictor = Predictor(4, 2, 4, 8)
    x = torch.randn(2, 24, 8)
    valid = torch.arange(24) >= torch.tensor([[0], [10]])
    rows = rows_of(x, valid.long(), 4)
    alone = x[1:, 10:]
    torch.testing.assert_close(predictor.scores(x, rows)[1:, :4], predictor.scores(alone, rows_of(alone, None, 4)))


@pytest.mark.parametrize("selection", ["ratio", "threshold"])
def test_calibrate_save_and_load(tmp_path, selection, ids, adapted, gradients):
    model = adapted(three())
    lemo = LeMo(**{**SMALL, "scores": "predicted"}, selection=selection, predictor_steps=120, predictor_width=16,
                predictor_rate=1e-3)
    before = snapshot(model)
    report = lemo.calibrate(model, [ids(40, 33, seed=n) for n in range(2)], progress=False)
    assert_unchanged(before, model)
    assert lemo.calibration.losses[-1] < lemo.calibration.losses[0] and len(lemo.calibration.losses) == 120
    assert set(lemo.calibration.recall) == {0, 1} and len(report.tables[0].rows) == 2
    assert set(lemo.calibration.thresholds) == ({0, 1} if selection == "threshold" else set())
    lemo.save(tmp_path / "lemo.safetensors")
    loaded = LeMo.load(tmp_path / "lemo.safetensors")
    assert loaded == lemo
    batch = ids(40, 33)
    one, two = lemo.kept(model, batch), loaded.kept(model, batch)
    assert list(one) == list(two) and all(torch.equal(one[n], two[n]) for n in one)
    kept = float(torch.stack(list(one.values())).float().mean())
    assert 0.2 < kept < 0.65, "about rho is kept"
    model.train()
    with loaded.training(model) as run:
        model(**batch).loss.backward()
    assert gradients(model) and not run.fallbacks and "Kept by layer" in run.report().to_text()
    scores = lemo.block_scores(model, batch)
    assert set(scores) == {0, 1} and scores[0].predicted.shape == scores[0].true.shape == (2, 10)


# ---------------------------------------------------------------------------------------------------- use
def test_evaluation_is_dense_and_everything_comes_back(ids, adapted):
    model, batch = mixed_modes(adapted(three())), ids(45, 21)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    before, forwards = snapshot(model), {n: vars(m).get("forward") for n, m in model.named_modules()}
    modes = {n: m.training for n, m in model.named_modules()}
    model.eval()
    expected = model(**batch).logits
    for name, module in model.named_modules():
        module.training = modes[name]
    with pytest.raises(RuntimeError, match="stop"), LeMo(**SMALL).training(model):
        model.eval()
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)
        for name, module in model.named_modules():
            module.training = modes[name]
        model(**batch)
        raise RuntimeError("stop")
    assert_unchanged(before, model)
    assert {n: vars(m).get("forward") for n, m in model.named_modules()} == forwards
    assert model.config.use_cache is True


def test_trainer_of_transformers(tmp_path, ids, adapted):
    from transformers import Trainer, TrainingArguments

    model = adapted(three())
    rows = [{k: v[0] for k, v in ids(48, seed=n).items()} for n in range(4)]
    arguments = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
                                  save_strategy="no", logging_strategy="no", disable_tqdm=True, eval_strategy="no")
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:2])
    former = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    with LeMo(**SMALL).training(model) as run:
        result = trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
    assert result.global_step == 2 and run.counts[0][2] == 2 and not run.fallbacks
    assert run.loss == "in chunks of 16 tokens"
    assert evaluated == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5), "evaluation is dense"
    assert any(not torch.equal(p, former[n]) for n, p in model.named_parameters() if n in former)


def test_sft_of_trl(tmp_path, adapted):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    peft = pytest.importorskip("peft")
    from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer

    data = datasets.Dataset.from_dict({"text": ["The quick brown fox jumps over the lazy dog. " * 2] * 4})
    arguments = trl.SFTConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
                              save_strategy="no", logging_strategy="no", disable_tqdm=True, bf16=False, max_length=64)
    trainer = trl.SFTTrainer(model=tiny_text_llama(), args=arguments, train_dataset=data,
                             processing_class=tiny_tokenizer(),
                             peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with LeMo(**SMALL).training(trainer.model) as run:
        result = trainer.train()
    assert result.global_step == 2 and run.counts[0][0] < run.counts[0][1]
    assert not set(run.fallbacks) - {"less than two blocks"}
    assert "TRL" in run.loss, "TRL computes the loss in chunks itself"


def test_torch_compile(ids, gradients):
    model, batch = tiny_llama().train(), ids(45, 45)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name)
    with LeMo(**SMALL).training(model) as run:
        model(**batch).loss.backward()
        expected = gradients(model)
        torch.compile(model, backend="eager")(**batch).loss.backward()
    assert run.counts[0][2] == 2
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


def test_what_cannot_be_cut_is_dense_and_counted(ids, adapted):
    model = adapted(three()).train()
    with LeMo(**SMALL).training(model) as run:
        model(**ids(7))
        assert run.fallbacks == {"less than two blocks": 2}
        model(**ids(20), use_cache=True)
        assert run.fallbacks["a cache"] == 2
        out = model(**ids(20, 0))
        assert torch.isfinite(out.loss) and run.kept and not next(iter(run.kept.values()))[1].any(), "padding alone"
        empty = ids(20, 20)
        empty["attention_mask"][:] = 0
        model(**{**empty, "labels": None})
    assert "less than two blocks" in run.report().to_text()
    windowed = tiny_gemma3()
    windowed.train().requires_grad_(False)
    with LeMo(**SMALL, mlp_sparsity=0.0).training(windowed) as run:
        windowed(input_ids=ids(40)["input_ids"])
    assert not run.fallbacks and run.kept, "windows come as masks"


def test_per_layer_fractions(ids):
    model = three()
    lemo = LeMo(**SMALL, rho=(1.0, 0.25, 1))
    masks = lemo.kept(model, ids(40))
    assert list(masks) == ["model.layers.1.self_attn"] and int(masks["model.layers.1.self_attn"].sum()) == 8
    with pytest.raises(ValueError, match=r"rho: expected 3 numbers.*got \(0.5, 1\)"):
        dataclasses.replace(lemo, rho=(0.5, 1)).kept(model, ids(40))


# ---------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("field, value", [("rho", 0.0), ("rho", 1.5), ("rho", (1.0, 0.4)), ("rho", (0.0, 1.0)),
                                          ("block", 0), ("mlp_sparsity", 1.0), ("scores", "guess"),
                                          ("dense_first", -0.1), ("predictor_rate", 0.0)])
def test_fields(field, value):
    with pytest.raises(ValueError, match=f"LeMo.{field}: expected"):
        LeMo(**{field: value})


def test_calibration_of_another_model(tmp_path, ids, adapted):
    model = adapted(three())
    lemo = LeMo(**{**SMALL, "scores": "predicted"}, predictor_steps=1, predictor_width=2)
    with pytest.raises(ValueError, match="expected a calibrated one, got none"), lemo.training(model):
        pass
    with pytest.raises(ValueError, match="expected a calibrated one"):
        lemo.save(tmp_path / "x")
    lemo.calibrate(model, [ids(20)], progress=False)
    with pytest.raises(ValueError, match="another's \\(layers: 3, here 4\\)"), \
            lemo.training(adapted(tiny_llama(num_hidden_layers=4))):
        pass
    other = adapted(tiny_llama(seed=5, num_hidden_layers=3))
    with pytest.raises(ValueError, match="of these weights, got that of others"), lemo.training(other):
        pass
    with lemo.training(other, check_weights=False):
        pass
    with lemo.training(adapted(three()).to(torch.bfloat16)):
        pass
    cut_more = dataclasses.replace(lemo, rho=(0.5, 0.5, 1.0), selection="threshold")
    cut_more.calibration = lemo.calibration
    with pytest.raises(ValueError, match="expected one of layer 0"), cut_more.training(model):
        pass
    (tmp_path / "y").write_text("no")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        LeMo.load(tmp_path / "y")


def test_bad_batches(ids):
    lemo, model = LeMo(**SMALL), three()
    for batch, text in (({}, "expected input_ids"), (ids(7), "expected 8 tokens or more, two blocks of 4, got 7")):
        with pytest.raises(ValueError, match=text):
            lemo.keep(model, batch)
    with pytest.raises(ValueError, match="batches: expected one or more"):
        lemo.calibrate(model, [], progress=False)
    with pytest.raises(ValueError, match="leaves a layer to cut"):
        LeMo(block=4, scores="exact", dense_first=1.0).keep(model, ids(20))
    assert not lemo.keep(model, ids(20, 0))["input_ids"][1].any()


def test_blocks_do_not_stack(ids, adapted):
    model = adapted(three())
    with LeMo(**SMALL).training(model):
        with pytest.raises(ValueError, match="expected a model without LeMo"), LeMo(**SMALL).training(model):
            pass
        model.train()(**ids(20)).loss.backward()
    assert not any("forward" in vars(module) for module in model.modules())


def test_models_it_is_not_for(ids, adapted):
    from transformers import GPT2Config, GPT2LMHeadModel

    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="mlp_sparsity: expected an MLP whose weights are frozen"), \
            LeMo(**SMALL).training(three()):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        everywhere = peft.get_peft_model(three(), peft.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="being trained: put adapters on the attention alone"), \
            LeMo(**SMALL).training(everywhere):
        pass
    with LeMo(**SMALL, mlp_sparsity=0.0).training(everywhere):
        pass
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=64))
    with pytest.raises(UnsupportedModelError, match="expected an attention that takes hidden_states"), \
            LeMo(**SMALL).training(gpt2):
        pass
