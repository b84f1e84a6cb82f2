"""The conformance kit of pruners."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf.pruning.masks import Masks
from looseleaf.pruning.pruner import Pruner
from looseleaf.pruning.selection import Selection
from looseleaf.pruning.targets import holders, input_dims, stored_parameter
from looseleaf_tickets.training import TrainingRun
from looseleaf.testing.common import Findings, check_plugin


def check_pruner(cls: type[Pruner], make: Callable[[], Pruner] | None = None, *,
                 data: Callable[[nn.Module], Any] | None = None) -> None:
    """Everything a pruner must do.

    Its masks must follow its own rule (``selection().violations(masks)`` is empty), be the same each time, cover
    what the pruner says it removes, and fit it; the model must be untouched by scoring and pruning, also when they
    fail.

    Args:
        cls: the pruner class.
        make: how to make one for the checks; None: as ``cls.conformance()`` says, or by the defaults.
        data: what to hand to ``prune(model, data)``, made for each model; None: as ``cls.conformance()`` says, or no data;
            :func:`earlier` and :func:`training` serve pruners of updates and of several rounds. The models are a small
            convolutional network (input (B, 8, 8, 8)), one with tied weights (input (B, 16)) and, where transformers is
            installed, a random Llama (token ids below 64); a pruner of tokens meets the Llama only, and its data are
            batches.

    Raises:
        AssertionError: with every check that failed, one a line.
    """
    make = make or cls.conformance().get("make", cls)
    findings = Findings(cls.__name__)
    check_plugin(findings, cls, Pruner, make)
    if any(f.startswith(("is a dataclass", "constructs")) for f in findings.failures):
        findings.finish()
    give = data or cls.conformance().get("data", lambda model: None)
    models: list[tuple[str, Callable[[], nn.Module], Tensor]] = []
    if cls.removes != "tokens":
        _parameters(findings, make, give)
        models = [("small network", small_network, torch.randn(2, 8, 8, 8, generator=_generator(1))),
                  ("tied weights", tied_network, torch.randn(2, 16, generator=_generator(2)))]
    with contextlib.suppress(ImportError):  # transformers is no dependency of the core
        tiny_llama()
        models.append(("Llama", tiny_llama, torch.arange(24).view(2, 12) * 7 % 61))
    for title, build, inputs in models:
        _model(findings, title, make, give, build, inputs)
    findings.finish()


def earlier(model: nn.Module) -> dict[str, Tensor]:
    """A state that ``model`` could have been trained from: data for pruners of updates."""
    generator = _generator(5)
    return {name: p.detach() + 0.01 * torch.randn(p.shape, generator=generator)
            for name, p in model.named_parameters()}


def training(model: nn.Module) -> Callable[[nn.Module, TrainingRun], None]:
    """A function that trains a model of the kit for 20 steps of Adam, which it tells: data for pruners of several
    rounds."""
    if hasattr(model, "config"):
        inputs = torch.arange(24).view(2, 12) * 7 % 61
    else:
        inputs = torch.randn((2, 16) if hasattr(model, "again") else (2, 8, 8, 8), generator=_generator(0))

    def train(model: nn.Module, run: TrainingRun) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
        for _ in run.steps(20):
            optimizer.zero_grad()
            out: Any = model(inputs)
            (out.logits if hasattr(out, "logits") else out).square().mean().backward()
            optimizer.step()

    return train


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 8, 3)
        self.hidden = nn.Linear(8, 24)
        self.last = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.hidden(self.second(x).mean((2, 3)))))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = nn.Linear(16, 16)
        self.other = nn.Linear(16, 8)
        self.again.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.again(torch.tanh(self.first(x)))))


def small_network() -> nn.Module:
    """Two convolutions, a batch norm and two Linear layers; all widths are multiples of 8."""
    return _seeded(_Small)


def tied_network() -> nn.Module:
    """Two Linear layers that share a weight, and a third."""
    return _seeded(_Tied)


def tiny_llama() -> Any:
    """A Llama with random weights: 2 layers, width 32, vocabulary 64, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=64, max_position_embeddings=128, tie_word_embeddings=True)
    return _seeded(lambda: LlamaForCausalLM(config)).eval()


def _seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _parameters(findings: Findings, make: Callable[[], Pruner], give: Callable[[nn.Module], Any]) -> None:
    if "sparsity" not in make().hyperparameters():
        return
    replace: Any = dataclasses.replace
    with findings.check("sparsity is validated"):
        for wrong in (1.0, 1.5, -0.1, float("nan")):
            try:
                replace(make(), sparsity=wrong)
            except ValueError as error:
                assert "sparsity" in str(error), f"the error for sparsity={wrong} does not name the field: {error}"
                continue
            raise AssertionError(f"sparsity={wrong} is accepted: allowed is 0 <= sparsity < 1")
    with findings.check("sparsity 0 keeps everything"):
        try:
            pruner = replace(make(), sparsity=0.0)
        except ValueError:  # a pattern such as 2:4 fixes the sparsity
            return
        model = small_network()
        assert pruner.prune(model, give(model)).removed() == 0, "weights are removed"


def _model(findings: Findings, title: str, make: Callable[[], Pruner], give: Callable[[nn.Module], Any],
           build: Callable[[], nn.Module], inputs: Tensor) -> None:
    model = build()
    before = _state(model)
    made: list[Masks] = []
    with findings.check(f"{title}: prune"):
        made.append(make().prune(model, give(model)))
    with findings.check(f"{title}: prune leaves the model as it was"):
        _unchanged(before, model)
    if not made:
        return  # everything below needs masks
    masks, removes = made[0], make().removes
    with findings.check(f"{title}: masks fit the {'batch' if removes == 'tokens' else 'model'}"):
        assert isinstance(masks, Masks), f"prune returns {type(masks).__name__}: allowed is looseleaf.Masks"
        assert len(masks), "prune returns no masks"
        known = {k: v for k, v in give(model).items() if isinstance(v, Tensor)} if removes == "tokens" else \
            {name: stored_parameter(*found[0]) for name, found in holders(model).items()}
        where = "tensor of the batch" if removes == "tokens" else "parameter of the model"
        for name, mask in masks.items():
            assert name in known, f"{name!r} is no {where} (a tied weight has its first name)"
            assert mask.shape == known[name].shape, \
                f"{name!r} has shape {tuple(known[name].shape)}, its mask {tuple(mask.shape)}"
            assert removes != "weights" or mask.ndim > 1, \
                f"{name!r} is a bias or norm: only weights of Linear and Conv are pruned"
    with findings.check(f"{title}: scores"):
        scores = make().score(model, give(model))
        assert scores, "no scores"
        for name, score in scores.items():
            assert name in masks, f"{name!r} has scores but no mask"
            assert score.shape == masks[name].shape, f"scores of {name!r} have shape {tuple(score.shape)}"
            assert score.is_floating_point(), f"scores of {name!r} are {score.dtype}"
            assert not score.isnan().any(), f"scores of {name!r} have NaN"
            assert not score.requires_grad, f"scores of {name!r} carry a graph: detach them"
        _unchanged(before, model)
    with findings.check(f"{title}: exact counts"):
        rule = make().selection()
        assert isinstance(rule, Selection), f"selection() returns {type(rule).__name__}"
        if hasattr(rule, "dims") and removes == "weights":
            rule = dataclasses.replace(rule, dims=input_dims(model, masks))  # type: ignore[type-var]
        wrong = rule.violations(masks)
        assert not wrong, "; ".join(wrong[:3])
    with findings.check(f"{title}: determinism"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(12345)
            again = make().prune(model, give(model))
        assert again == masks, "two runs give different masks: take randomness from an explicit seed only"
        assert make().prune(build(), give(model)) == masks, "an equal model gives different masks"
    with findings.check(f"{title}: global random state"):
        state = torch.get_rng_state()
        make().prune(model, give(model))
        assert torch.equal(state, torch.get_rng_state()), "prune draws from the global random state"
    with findings.check(f"{title}: file"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "masks.safetensors"
        masks.save(path, {"by": "kit"})
        loaded = Masks.load(path)
        assert loaded == masks and loaded.metadata["by"] == "kit", "a saved and loaded mask differs"
    if removes == "tokens":
        return  # the rest is about parameters
    with findings.check(f"{title}: a NaN weight"):
        broken = build()
        last = list(masks)[-1]
        with torch.no_grad():
            dict(broken.named_parameters())[last].view(-1)[0] = torch.nan
        was = _state(broken)
        try:
            out = make().prune(broken, give(broken))
            assert not out[last].view(-1)[0], f"{last!r} has a NaN weight and it is kept without a word"
        except ValueError as error:
            assert last in str(error), f"the error does not name {last!r}: {error}"
        _unchanged(was, broken)
    with findings.check(f"{title}: an exception in the data leaves the model as it was"):
        with contextlib.suppress(_Stop, TypeError, ValueError):
            make().prune(model, _stop if callable(give(model)) else _stopping())
        _unchanged(before, model)
    if removes == "updates":
        return  # the rest is about masks on weights
    with findings.check(f"{title}: masks on the model"):
        _round_trip(masks, build(), inputs)
    with findings.check(f"{title}: training under masks"):
        _training(masks, build(), inputs)
    if hasattr(model, "save_pretrained"):
        with findings.check(f"{title}: save_pretrained after make_permanent"), tempfile.TemporaryDirectory() as folder:
            masks.apply(model)
            expected = _run(model, inputs)
            masks.make_permanent(model)
            model.save_pretrained(folder)  # type: ignore[operator]
            plain = type(model).from_pretrained(folder)  # type: ignore[attr-defined]
            assert torch.equal(_run(plain, inputs), expected), "the saved model computes something else"


def _round_trip(masks: Masks, model: nn.Module, inputs: Tensor) -> None:
    model.eval()
    before, dense = _state(model), _run(model, inputs)
    masks.apply(model)
    once = _run(model, inputs)
    masks.apply(model)
    assert torch.equal(_run(model, inputs), once), "applying twice differs from applying once"
    masks.remove(model)
    _unchanged(before, model)
    assert torch.equal(_run(model, inputs), dense), "after remove the model computes something else"
    masks.make_permanent(model)
    assert torch.equal(_run(model, inputs), once), "make_permanent computes something else than apply"
    for name, parameter in model.named_parameters():
        if name in masks:
            assert not parameter[~masks[name]].any(), f"{name} is not zero where it is removed"
            kept = before["values"][name][masks[name]]
            assert torch.equal(parameter.detach()[masks[name]], kept), f"{name}: make_permanent changes kept weights"
        else:
            assert torch.equal(parameter.detach(), before["values"][name]), f"make_permanent changes {name}, which has no mask"


def _training(masks: Masks, model: nn.Module, inputs: Tensor) -> None:
    model.train()
    masks.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        out: Any = model(inputs)
        (out.logits if hasattr(out, "logits") else out).square().mean().backward()
        optimizer.step()
    for name, found in holders(model).items():
        if name in masks:
            gradient = stored_parameter(*found[0]).grad
            assert gradient is None or not gradient[~masks[name]].any(), f"removed weights of {name} get a gradient"
            for module, attribute in found:
                assert not getattr(module, attribute)[~masks[name]].any(), f"removed weights of {name} come back"


class _Stop(Exception):
    pass


def _stop(*given: Any, **named: Any) -> None:
    raise _Stop


def _stopping() -> Iterator[Any]:
    raise _Stop
    yield


def _run(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        out: Any = model.eval()(inputs)
    return (out.logits if hasattr(out, "logits") else out).clone()


def _state(model: nn.Module) -> dict[str, Any]:
    """All of a model that pruning must not change."""
    return {
        "values": {n: p.detach().clone() for n, p in model.named_parameters()},
        "buffers": {n: b.detach().clone() for n, b in model.named_buffers()},
        "objects": [id(p) for p in model.parameters()],
        "gradients": {n: p.grad is None for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
                  for n, m in model.named_modules()},
        "classes": {n: type(m).__name__ for n, m in model.named_modules()},
    }


def _unchanged(before: dict[str, Any], model: nn.Module) -> None:
    now = _state(model)
    for what, old in before.items():
        new = now[what]
        if what in ("values", "buffers"):
            assert list(old) == list(new), f"the {what} have other names or another order"
            for name, tensor in old.items():
                same = torch.equal(tensor.nan_to_num(), new[name].nan_to_num()) \
                    and torch.equal(tensor.isnan(), new[name].isnan())
                assert same, f"{name} has changed"
        else:
            assert old == new, f"the {what} of the model have changed"
