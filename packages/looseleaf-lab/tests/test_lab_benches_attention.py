"""Attention backends side by side on a tiny random model: figures that must come out, and what each is left out of."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import looseleaf
from looseleaf import AttentionBackend, Paper, Report
from looseleaf_lab import html
from looseleaf_lab.attention import BlockWindow, KeepAttention, SideBySide, attention_map, density_of
from looseleaf_lab.benches import Denoising, Prefill, compare_attention, prefill

PAPER = Paper("A paper", ("Some One",), 2020)


def rows(report: Report, title: str) -> list[dict[str, Any]]:
    table = next(t for t in report.tables if t.title == title)
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


@dataclasses.dataclass
class Exact(AttentionBackend):
    """Exact attention."""

    paper: ClassVar[Paper] = PAPER

    def attend(self, call: Any) -> Any:
        call.record(density=0.5)
        return call.dense()


@dataclasses.dataclass
class Zero(AttentionBackend):
    """No attention at all."""

    paper: ClassVar[Paper] = PAPER

    def attend(self, call: Any) -> Any:
        call.record(density=[0.0, 0.2])
        return torch.zeros_like(call.query)


@dataclasses.dataclass
class Broken(AttentionBackend):
    """Fails."""

    paper: ClassVar[Paper] = PAPER

    def attend(self, call: Any) -> Any:
        raise RuntimeError("out of ideas")


@dataclasses.dataclass
class Learner(Exact):
    """Needs calibration."""

    seen: int = 0

    def calibrate(self, model: Any, batches: Any) -> None:
        self.seen = sum(b["input_ids"].numel() for b in batches)


@dataclasses.dataclass
class Bidirectional(Exact):
    """Exact attention, for bidirectional calls."""

    phases: ClassVar[Any] = frozenset({"bidirectional"})


def test_attention(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    learner = Learner()
    backends = {"exact": Exact(), "zero": Zero(), "broken": Broken(), "learner": learner}
    report = compare_attention(model, tokenizer, backends, [64, 128], rounds=1, last=16, passkeys=1, state=tmp_path)
    assert learner.seen == 2 * 512, "two texts, of as many tokens as the model takes"
    found = {(r["backend"], r["tokens"]): r for r in rows(report, "Prefill")}
    assert set(found) == {(n, c) for n in ("(exact)", "exact", "zero", "learner") for c in (64, 128)}
    assert found["exact", 64]["pass key"] is None and found["exact", 128]["pass key"] == 0
    exact, zero = found["exact", 128], found["zero", 128]
    assert exact["attention error"] < 1e-5 and zero["attention error"] == pytest.approx(1)
    assert exact["density"] == 0.5 and zero["density"] == pytest.approx(0.1)
    assert exact["increase in loss"] == pytest.approx(0, abs=1e-5) and zero["increase in loss"] != 0
    assert exact["low"] <= exact["speed-up"] <= exact["high"]
    assert found["(exact)", 64]["speed-up"] == 1 and exact["speed-up"] > 0
    deep = {r["backend"]: r["50%"] for r in rows(report, "Pass keys by depth at 128 tokens")}
    assert set(deep) == {"(exact)", "exact", "zero", "learner"} and 0 <= deep["exact"] == deep["(exact)"] <= 1
    front = next(f for f in report.figures if f.title == "What speed costs at 128 tokens")
    assert [s.name for s in front.series] == ["(exact)", "exact", "zero", "learner"]
    drawn = {f.title: f.panels for f in report.figures if f.panels}
    assert set(drawn) == {f"Attention of {n}, layer 1, 128 tokens" for n in ("(exact)", "exact", "zero", "learner")}
    left = rows(report, "Left out")
    assert {r["plugin"] for r in left} == {"broken at 64", "broken at 128"}
    assert all("out of ideas" in r["reason"] for r in left)
    again = compare_attention(model, tokenizer, backends, [64, 128], rounds=1, last=16, passkeys=1, state=tmp_path)
    assert rows(again, "Prefill") == rows(report, "Prefill"), "a resumed run shows what was kept"
    html.write(report, tmp_path / "r.html")


def test_attention_leaves_the_model_as_it_was(model: Any, tokenizer: Any) -> None:
    ids = torch.arange(40)[None]
    before = model(ids).logits
    kind = model.config._attn_implementation
    compare_attention(model, tokenizer, {"zero": Zero(), "broken": Broken()}, [32], rounds=1, last=4)
    assert model.config._attn_implementation == kind
    torch.testing.assert_close(model(ids).logits, before)


@pytest.mark.parametrize("contexts", [[8], [513], []])
def test_attention_refuses_contexts(model: Any, tokenizer: Any, contexts: list[int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        compare_attention(model, tokenizer, {}, contexts)


def test_side_by_side_counts_fallbacks(model: Any) -> None:
    both = SideBySide(inner={"window": looseleaf.SlidingWindow(sink=2, window=1000), "other": Bidirectional()})
    with torch.no_grad(), looseleaf.attach(model, both):
        model(torch.arange(40)[None], use_cache=False)
    for name in ("window", "other"):
        found = density_of(both.found[name])
        assert found["density"] == 1.0 and found["fallbacks"] == 2 and found["error"] == 0


def test_pareto_front() -> None:
    points = {"fast": (0.1, 3.0), "good": (0.9, 0.1), "both": (0.5, 0.2), "beaten": (0.5, 0.3), "twin": (0.1, 3.0)}
    assert prefill._front(points) == ["fast", "good", "both", "twin"]


def test_attention_maps_say_what_is_left_out() -> None:
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 64, 8, generator=g) for h in (4, 2, 2))
    call = looseleaf.AttentionCall(query, key, value, 8 ** -0.5, True)
    exact = attention_map(None, call, 16)
    assert exact.shape == (4, 8, 8), "no more cells than the heads have channels"
    scores = torch.einsum("hqd,hkd->hqk", query[0], key[0].repeat_interleave(2, 0)) * 8 ** -0.5
    p = scores.masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(exact, p.view(4, 8, 8, 8, 8).sum(4).mean(2), atol=1e-6, rtol=1e-5)
    window = attention_map(looseleaf.SlidingWindow(sink=8, window=8), call)
    near = torch.arange(8)[:, None] - torch.arange(8)
    seen = ((near >= 0) & (near <= 1)) | ((near > 0) & (torch.arange(8) == 0))
    assert torch.equal(window > 0, seen.expand(4, 8, 8))
    assert not vars(call.state)


def test_who_is_compared_where() -> None:
    for plugin in (Exact, Exact()):
        assert Prefill().suits(plugin) is None
        assert Denoising().suits(plugin) == "for prefill calls, not for bidirectional attention"
    assert Prefill().suits(Bidirectional) == "for bidirectional calls, not for prefill"
    assert Denoising().suits(Bidirectional) is None
    assert Denoising(denoising=()).suits(Bidirectional) == "for denoising models: --denoising text video"
    assert Denoising(denoising=()).suits(Exact) == "for prefill calls, not for bidirectional attention"
    assert Prefill().suits(KeepAttention(layers=(1,))) is None


@pytest.mark.parametrize(("wrong", "message"), [
    ({"context": (8,)}, r"Prefill\.context: expected a sequence of integers >= 16, got \(8,\)"),
    ({"passkeys": -1}, r"Prefill\.passkeys: expected an integer >= 0, got -1"), ({"rounds": 0}, "rounds")])
def test_options_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prefill(**wrong)


def test_a_window_is_always_there(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill.models, "load", lambda name, dtype=None, device=None: (model, tokenizer))
    report = Prefill(context=(32,), passkeys=0, rounds=1).run({"exact": Exact})
    assert {r["backend"] for r in rows(report, "Prefill")} == {"(exact)", "exact", "(window)"}
    report = Prefill(context=(32,), passkeys=0, rounds=1).run({"sliding": looseleaf.SlidingWindow})
    assert {r["backend"] for r in rows(report, "Prefill")} == {"(exact)", "sliding"}
    assert report.facts["model"].startswith("smollm2 (LlamaForCausalLM-")


# ------------------------------------------------------------------------------------------------- its backends

def test_keeps_what_attention_sees_and_changes_nothing() -> None:
    from looseleaf.testing.models import tiny_llama

    model = tiny_llama().eval()
    ids = torch.arange(24)[None]
    keep = KeepAttention(layers=(1,))
    with torch.inference_mode():
        exact = model(ids).logits
        with looseleaf.attach(model, keep):
            kept = model(ids).logits
    assert torch.allclose(kept, exact, atol=1e-5)
    assert list(keep.found) == [1] and all(x.is_contiguous() for x in keep.found[1])
    query, key, value = keep.found[1]
    assert query.shape == (1, 4, 24, query.shape[-1]) and key.shape == value.shape == (1, 2, 24, query.shape[-1])
    # enough to compute the layer again: the output projection of it gives what the module gave
    seen: list[torch.Tensor] = []
    attention = model.model.layers[1].self_attn
    handle = attention.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.inference_mode():
        model(ids)
        handle.remove()
        again = looseleaf.AttentionCall(query, key, value, attention.scaling).dense()
        assert torch.allclose(attention.o_proj(again.transpose(1, 2).flatten(2)), seen[0], atol=1e-5)


def test_decode_steps_do_not_replace_the_prompt() -> None:
    from looseleaf.testing.models import tiny_llama

    model = tiny_llama().eval()
    keep = KeepAttention(layers=(0, 1))
    with torch.inference_mode(), looseleaf.attach(model, keep):
        model.generate(torch.arange(12)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert {layer: q.shape[2] for layer, (q, _, _) in keep.found.items()} == {0: 12, 1: 12}


def test_others_are_not_kept() -> None:
    keep = KeepAttention(layers=(7,))
    keep.attend(looseleaf.AttentionCall(*torch.randn(3, 1, 2, 8, 4), 0.2, layer=3))
    assert keep.found == {}
    assert keep.hyperparameters() == {"layers": (7,)}


@pytest.mark.parametrize("layers", [(), (-1,), ("3",)])
def test_layers_that_cannot_be(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"KeepAttention\.layers: expected (one layer|a sequence of integers >= 0)"):
        KeepAttention(layers=layers)


def test_window_sees_the_nearest_blocks() -> None:
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 70, 16, generator=g) for h in (4, 2, 2))
    call = looseleaf.AttentionCall(query, key, value, 0.25, False, phase="bidirectional", step=0)
    blocks = torch.arange(70) // 16
    first = (torch.arange(5) - 1).clamp(0, 3)[blocks][:, None]
    mask = (blocks >= first) & (blocks < first + 2)
    exact = dataclasses.replace(call, mask=mask[None, None]).dense()
    recorded: dict[str, Any] = {}
    call.record = recorded.update
    torch.testing.assert_close(BlockWindow(density=0.4, block=16).attend(call), exact, atol=1e-5, rtol=1e-4)
    assert recorded == {"density": 0.4}
    assert torch.equal(BlockWindow(full_steps=1).attend(call), call.dense()) and recorded == {"density": 1.0}
    with pytest.raises(ValueError, match=r"BlockWindow.density: expected a number in \(0, 1\], got 0.0"):
        BlockWindow(density=0.0)
