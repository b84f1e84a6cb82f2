"""The parts of LinEAS against closed forms, and what steering must guarantee."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from looseleaf import capture
from looseleaf.testing.common import assert_unchanged, mixed_modes, snapshot
from looseleaf.testing.models import tiny_llama, tiny_text_llama, tiny_tokenizer
from looseleaf_lineas import LinEAS, Steering, data, difference_in_means, lin_act, squared_w2
from looseleaf_lineas.probe import encode, layer_losses, pooled, shrink, token_weights

SOURCE, TARGET = data.SOURCE[:6], data.TARGET[:6]


@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 6), (3, 7), (1, 4)])
def test_w2_is_optimal_transport(n: int, m: int) -> None:
    g = torch.Generator().manual_seed(n * m)
    x, y = torch.randn(n, 3, generator=g), torch.randn(m, 3, generator=g)
    for k in range(3):
        cost = (x[:, None, k] - y[None, :, k]).square().numpy().ravel()
        rows = np.kron(np.eye(n), np.ones(m))
        columns = np.kron(np.ones(n), np.eye(m))
        best = linprog(cost, A_eq=np.vstack([rows, columns]), b_eq=np.r_[np.full(n, 1 / n), np.full(m, 1 / m)])
        assert float(squared_w2(x, y)[k]) == pytest.approx(best.fun, abs=1e-5)


def test_w2_of_shifted_samples_is_the_shift_squared() -> None:
    x = torch.randn(50, 4)
    torch.testing.assert_close(squared_w2(x, x[torch.randperm(50)] + 1.5), torch.full((4,), 2.25))


@pytest.mark.parametrize(("one", "group"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.4), (0.5, 0.3), (5.0, 0.0), (0.0, 5.0)])
def test_shrink_is_the_proximal_operator(one: float, group: float) -> None:
    x = torch.tensor([1.5, -0.8, 0.1, 2.0], dtype=torch.float64)
    rate = 0.5

    def objective(u: np.ndarray) -> float:
        return float(0.5 * ((u - x.numpy()) ** 2).sum()
                     + rate * (one * np.abs(u).sum() + group * 2.0 * np.sqrt((u ** 2).sum())))

    found = shrink(x, rate, one, group)
    value = objective(found.numpy())
    for start in (x.numpy(), np.zeros(4), found.numpy() + 0.05):
        assert value <= minimize(objective, start, method="Nelder-Mead", options={"maxiter": 4000}).fun + 1e-6


def test_loss_falls_and_distances_shrink() -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    steering = LinEAS(steps=150, lr=2.0).fit(model, SOURCE, TARGET, tokenizer)
    losses, w2 = steering.info["loss"], steering.info["w2"]
    assert losses[-1] < 0.5 * losses[0]  # random weights leave more than a trained model does; see reproduction.py
    assert sum(after < before for before, after in w2.values()) >= 0.9 * len(w2)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_later_layers_see_earlier_maps() -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    plugin = LinEAS(steps=3, lr=1.0)
    steering = plugin.fit(model, SOURCE, TARGET, tokenizer)
    goal = pooled(model, "*layernorm", encode(tokenizer, TARGET, torch.device("cpu")), True)
    with steering.apply(model):
        seen = pooled(model, "*layernorm", encode(tokenizer, SOURCE, torch.device("cpu")), True)
    total = sum(float(squared_w2(seen[n], goal[n]).mean()) for n in seen)
    assert total == pytest.approx(steering.info["loss"][-1], rel=1e-4)


def test_gradient_of_the_loss() -> None:
    model, tokenizer = tiny_text_llama().double(), tiny_tokenizer()
    batch = encode(tokenizer, SOURCE[:3], torch.device("cpu"))
    goal = {n: v.double() for n, v in pooled(model, "*layernorm", encode(tokenizer, TARGET[:3], torch.device("cpu")),
                                             True).items()}
    mean = token_weights(batch["attention_mask"], True).double()
    names = list(goal)

    def loss(scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        omega = {n: torch.ones(64, dtype=torch.float64) * scale[i] for i, n in enumerate(names)}
        bias = {n: torch.ones(64, dtype=torch.float64) * shift[i] for i, n in enumerate(names)}
        return torch.stack(list(layer_losses(model, batch, mean, goal, omega, bias).values())).sum()

    scale = torch.tensor([1.1, 0.9, 1.05, 1.0], dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([0.1, -0.1, 0.0, 0.05], dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(loss(scale, shift), [scale, shift])
    with torch.no_grad():
        for which, at in ((0, 0), (0, 2), (1, 1), (1, 3)):
            step = torch.zeros(4, dtype=torch.float64)
            step[at] = 1e-3
            pair = [(scale + s * step, shift) if which == 0 else (scale, shift + s * step) for s in (1, -1)]
            numeric = float(loss(*pair[0]) - loss(*pair[1])) / 2e-3
            # float32 inside the pooled activations bounds the accuracy of the difference
            assert float(gradient[which][at]) == pytest.approx(numeric, rel=2e-2)


def test_l1_leaves_neurons_and_groups_leave_layers() -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    assert LinEAS(steps=20, lr=1.0).fit(model, SOURCE, TARGET, tokenizer).sparsity() < 0.1
    neurons = LinEAS(steps=20, lr=1.0, lambda_1=0.003).fit(model, SOURCE, TARGET, tokenizer)
    assert 0.1 < neurons.sparsity() < 1
    layers = LinEAS(steps=20, lr=1.0, lambda_G=1.0).fit(model, SOURCE, TARGET, tokenizer)
    assert layers.sparsity() == 1.0


def test_strength() -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    steering = LinEAS(steps=5, lr=1.0).fit(model, SOURCE, TARGET, tokenizer)
    batch = encode(tokenizer, SOURCE[:2], torch.device("cpu"))
    identity = Steering({n: torch.ones_like(t) for n, t in steering.omega.items()},
                        {n: torch.zeros_like(t) for n, t in steering.bias.items()})
    with torch.no_grad():
        plain = model(**batch).logits
        for same, strength in ((steering, 0.0), (identity, 1.0)):
            with same.apply(model, strength):
                assert torch.equal(model(**batch).logits, plain)
        with steering.apply(model, 0.5):
            half = model(**batch).logits
        with steering.scaled(0.5).apply(model):
            torch.testing.assert_close(model(**batch).logits, half)
        with warnings.catch_warnings(record=True) as caught, steering.apply(model, 1.5):
            warnings.simplefilter("always")
        assert torch.equal(model(**batch).logits, plain)
    with pytest.warns(UserWarning, match="lies outside"), steering.apply(model, 1.5):
        pass
    with pytest.raises(ValueError, match=r"strength: expected a number, .* got nan"), \
            steering.apply(model, float("nan")):
        pass
    del caught


def test_hooks_go_after_an_exception() -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    steering = difference_in_means(model, SOURCE, TARGET, tokenizer)
    with pytest.raises(ZeroDivisionError), steering.apply(model):
        raise ZeroDivisionError
    assert not any(m._forward_hooks for m in model.modules())


def test_folding_is_exact() -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    steering = LinEAS(steps=10, lr=1.0).fit(model, SOURCE, TARGET, tokenizer)
    batch = encode(tokenizer, SOURCE[:2], torch.device("cpu"))
    with torch.no_grad():
        with steering.apply(model, 0.7):
            wanted = model(**batch).logits
        steering.merge(model, batch, 0.7)
        torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-4, rtol=1e-4)
    whole = Steering({"model.norm": torch.ones(64), "model.layers.0.mlp": torch.ones(64)},
                     {"model.norm": torch.zeros(64), "model.layers.0.mlp": torch.ones(64)})
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="use apply"):
        whole.merge(model, batch)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_baselines() -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    x = pooled(model, "*layernorm", encode(tokenizer, SOURCE, torch.device("cpu")), True)
    y = pooled(model, "*layernorm", encode(tokenizer, TARGET, torch.device("cpu")), True)
    shift = difference_in_means(model, SOURCE, TARGET, tokenizer)
    name = "model.layers.0.input_layernorm"
    torch.testing.assert_close(x[name].mean(0) + shift.bias[name], y[name].mean(0))
    affine = lin_act(model, SOURCE, TARGET, tokenizer)
    # the first map is the least-squares line through the sorted activations
    a, b = x[name].sort(0).values.double(), y[name].sort(0).values.double()
    slope, offset = zip(*(np.polyfit(a[:, k], b[:, k], 1) for k in range(a.shape[1])))
    np.testing.assert_allclose(affine.omega[name], slope, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(affine.bias[name], offset, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(affine.low[name], x[name].amin(0))
    torch.testing.assert_close(affine.high[name], x[name].amax(0))


def test_lin_act_moves_activations_inside_the_source_range_alone(tmp_path: Path) -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    affine = lin_act(model, SOURCE, TARGET, tokenizer)
    name = "model.layers.0.input_layernorm"
    batch = encode(tokenizer, SOURCE, torch.device("cpu"))
    with torch.no_grad(), capture(model, name) as seen:
        model(**batch)
    with torch.no_grad(), affine.apply(model, 0.5), capture(model, name) as moved:
        model(**batch)
    z, changed = seen[name][0], moved[name][0]
    inside = (z > affine.low[name]) & (z < affine.high[name])
    assert 0 < inside.float().mean() < 1
    assert torch.equal(changed[~inside], z[~inside])
    wanted = 0.5 * z + 0.5 * (affine.omega[name] * z + affine.bias[name])
    torch.testing.assert_close(changed[inside], wanted[inside])
    affine.scaled(0.5).save(tmp_path / "map.safetensors")
    with torch.no_grad(), Steering.load(tmp_path / "map.safetensors").apply(model), capture(model, name) as again:
        model(**batch)
    torch.testing.assert_close(again[name][0], changed)
    for refused in (lambda: affine.merge(model, batch), lambda: Steering.mean([affine]), lambda: affine.then(affine),
                    lambda: Steering(affine.omega, affine.bias).then(affine)):
        with pytest.raises(ValueError, match="affine everywhere"):
            refused()


def test_padding_and_the_first_token_are_left_out() -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    texts = ["Short one.", "A much longer sentence that needs padding."]
    both = pooled(model, "*layernorm", encode(tokenizer, texts, torch.device("cpu")), True)
    for i, text in enumerate(texts):
        alone = pooled(model, "*layernorm", encode(tokenizer, [text], torch.device("cpu")), True)
        for n in alone:
            torch.testing.assert_close(both[n][i], alone[n][0], atol=1e-5, rtol=1e-4)
    kept = pooled(model, "*layernorm", encode(tokenizer, texts, torch.device("cpu")), False)
    assert not torch.allclose(kept[n], both[n])


def test_composition() -> None:
    one = Steering({"a": torch.tensor([2.0])}, {"a": torch.tensor([1.0])})
    two = Steering({"a": torch.tensor([3.0])}, {"a": torch.tensor([0.5])})
    both = one.then(two)
    assert float(both.omega["a"]) == 6.0 and float(both.bias["a"]) == 3.5
    mean = Steering.mean([one, two, Steering({"b": torch.tensor([4.0])}, {"b": torch.tensor([0.0])})])
    assert float(mean.omega["a"]) == pytest.approx(2.0) and float(mean.omega["b"]) == pytest.approx(2.0)


def test_save_and_load(tmp_path: Path) -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    steering = difference_in_means(model, SOURCE, TARGET, tokenizer)
    path = tmp_path / "steering.safetensors"
    steering.save(path)
    again = Steering.load(path)
    assert again.info == steering.info
    assert all(torch.equal(again.bias[n], steering.bias[n]) for n in steering.bias)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        Steering.load(path)
    with pytest.raises(FileNotFoundError, match=r"steering\.x: expected a file"):
        Steering.load(tmp_path / "steering.x")
    steering.save(tmp_path / "new" / "x.safetensors")
    assert (tmp_path / "new" / "x.safetensors").is_file()
    with pytest.raises(ValueError, match="made for another model"), \
            Steering({"other": torch.ones(3)}, {"other": torch.ones(3)}).apply(model):
        pass


def test_each_submodule_has_its_own_mode_again() -> None:
    model, tokenizer = mixed_modes(tiny_llama(vocabulary=128, attention_dropout=0.5)), tiny_tokenizer()
    before = snapshot(model)
    steering = LinEAS(steps=2).fit(model, SOURCE, TARGET, tokenizer)
    difference_in_means(model, SOURCE, TARGET, tokenizer)
    lin_act(model, SOURCE, TARGET, tokenizer)
    with pytest.raises(ValueError, match="choose a smaller lr"):
        LinEAS(lr=1e30, steps=20).fit(model, SOURCE, TARGET, tokenizer)
    assert_unchanged(before, model)
    # dropout is off while it learns, whatever the mode
    plain = LinEAS(steps=2).fit(tiny_llama(vocabulary=128), SOURCE, TARGET, tokenizer)
    assert steering.info["loss"] == plain.info["loss"]
    steering.merge(model, encode(tokenizer, SOURCE[:2], torch.device("cpu")))
    assert snapshot(model)["modes"] == before["modes"]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_steered_and_merged(in_place: bool) -> None:
    tokenizer = tiny_tokenizer()
    batch = encode(tokenizer, SOURCE[:2], torch.device("cpu"))
    plain, model = tiny_text_llama(), tiny_text_llama()
    if in_place:
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    with torch.no_grad():
        model(**batch)
        steering = LinEAS(steps=2, lr=1.0).fit(model, SOURCE, TARGET, tokenizer)
        assert list(steering.omega) == list(LinEAS(steps=2).fit(plain, SOURCE, TARGET, tokenizer).omega)
        with steering.apply(plain):
            wanted = plain(**batch).logits
        with steering.apply(model):
            torch.testing.assert_close(model(**batch).logits, wanted)
        steering.merge(model, batch)
        torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-4, rtol=1e-4)


def test_subjects_and_data() -> None:
    pair = tiny_text_llama(), tiny_tokenizer()
    given = {"source": SOURCE, "target": TARGET, "prompts": data.PROMPTS[:1]}
    report = LinEAS(steps=1).run(pair, given, progress=False)
    assert [t.title for t in report.tables] == ["Squared Wasserstein-2 distance, mean over neurons",
                                                "Effect on held-out sentences"]
    assert report.facts["source sentences"] == 5 and len(report.examples) == 3
    with pytest.raises(ValueError, match=r"subject: expected a \(model, tokenizer\) pair, got LlamaForCausalLM alone"):
        LinEAS().run(pair[0])
    with pytest.raises(ValueError, match=r"data: expected .* 'source', 'target' .* got list"):
        LinEAS().run(pair, ["a"])
    with pytest.raises(ValueError, match=r"expected 4 sentences or more of each kind, .* got 3"):
        LinEAS().run(pair, {**given, "source": SOURCE[:3]})


def test_bad_input() -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    with pytest.raises(ValueError, match=r"source: expected a list of 2 sentences or more, .* got 1"):
        LinEAS().fit(model, SOURCE[:1], TARGET, tokenizer)
    with pytest.raises(ValueError, match="Near names are"):
        LinEAS(modules="*.layer_norm").fit(model, SOURCE, TARGET, tokenizer)
    with pytest.raises(ValueError, match="has no token"):
        LinEAS().fit(model, ["", "a"], TARGET, tokenizer)
    with pytest.raises(ValueError, match="choose a smaller lr"):
        LinEAS(lr=1e30, steps=20).fit(model, SOURCE, TARGET, tokenizer)
    with pytest.raises(ValueError, match=r"LinEAS\.steps: expected an integer >= 1, got 0"):
        LinEAS(steps=0)
    with pytest.raises(ValueError, match=r"LinEAS\.modules: expected a name pattern"):
        LinEAS(modules="two words")
    with pytest.raises(ValueError, match="expected as many source as target sentences, got 6 and 5"):
        lin_act(model, SOURCE, TARGET[:5], tokenizer)
