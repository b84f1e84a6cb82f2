"""Backends by name: ``attn_implementation=name`` in from_pretrained, pipelines, set_attn_implementation and lm-eval."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recording_backends import Spy

import looseleaf
from looseleaf import AttentionCall, SlidingWindow, attach, register_attention
from looseleaf.testing.models import tiny_bert, tiny_llama, tiny_text_llama, tiny_tokenizer

BACKEND = SlidingWindow(sink=1, window=6)


@dataclasses.dataclass
class Near(Spy):
    """Bidirectional attention to the three nearest keys on each side."""

    phases = frozenset({"bidirectional"})

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call)
        rows, keys = torch.arange(call.shape[3])[:, None], torch.arange(call.shape[4])
        return dataclasses.replace(call, mask=(rows - keys).abs() <= 3).dense()


@pytest.fixture
def window() -> Iterator[Any]:
    registered = register_attention("near-window", BACKEND)
    yield registered
    registered.unregister()


@pytest.fixture
def saved(tmp_path: Path) -> str:
    tiny_text_llama().save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def padded(side: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if side == "left":
        mask[1, :9] = 0
    else:
        mask[1, 15:] = 0
    return ids, {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("side", ["left", "right"])
def test_it_computes_what_attach_does(window: Any, side: str) -> None:
    ids, given = padded(side)
    model, seen = tiny_llama(), given["attention_mask"].bool()
    with torch.no_grad():
        plain = model(ids, **given).logits[seen]
        with attach(model, BACKEND) as attached:
            expected = model(ids, **given).logits[seen]
        model.set_attn_implementation("near-window")
        torch.testing.assert_close(model(ids, **given).logits[seen], expected)
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(ids, **given).logits[seen], plain)
    assert not torch.allclose(plain, expected)
    strip = lambda records: [{k: v for k, v in r.items() if k != "seconds"} for r in records]  # noqa: E731
    assert strip(window.records) == strip(attached.records)
    assert [row[1] for row in window.report().tables[0].rows] == ["llama.LlamaAttention.0", "llama.LlamaAttention.1"]
    window.reset()
    assert not window.records


@pytest.mark.parametrize("side", ["left", "right"])
def test_encoders_from_their_first_call_on(side: str) -> None:
    ids, given = padded(side)
    model, backend = tiny_bert(), Near()
    seen, mask = given["attention_mask"].bool(), {"attention_mask": given["attention_mask"]}
    with torch.no_grad(), attach(model, backend):
        expected = model(ids, **mask)[0][seen]
    registered = register_attention("near", backend)
    try:
        model.set_attn_implementation("near")
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(model(ids, **mask)[0][seen], expected)
        registered.context["place"] = torch.arange(24).expand(2, -1)
        with torch.no_grad():
            model(ids, **mask)
        assert backend.calls[-1].context["place"][1, 0] == (9 if side == "left" else 0)
        assert backend.calls[-1].layers == 2
    finally:
        registered.unregister()


def test_cross_attention_is_known_from_the_first_call_on() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    model = BartForConditionalGeneration(BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64)).eval()
    ids, given = padded("right")
    backend = Near()
    registered = register_attention("near", backend)
    try:
        model.set_attn_implementation("near")
        with torch.no_grad():
            for _ in range(2):
                model(ids, attention_mask=given["attention_mask"], decoder_input_ids=ids)
        assert [c.is_cross for c in backend.calls] == [False, True] * 2
        assert [c.query_lengths is None for c in backend.calls] == [False, True] * 2
    finally:
        registered.unregister()


def test_from_pretrained_pipeline_and_generation(window: Any, saved: str) -> None:
    from transformers import AutoModelForCausalLM, pipeline

    text = "the quick brown fox jumps over the lazy dog"
    model = AutoModelForCausalLM.from_pretrained(saved, attn_implementation="near-window")
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    inputs = tokenizer([text, text[:20]], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    plain = AutoModelForCausalLM.from_pretrained(saved)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with attach(plain, BACKEND):
        expected = plain.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert {r["phase"] for r in window.records} == {"prefill", "decode"}
    window.reset()
    generator = pipeline("text-generation", model=saved, tokenizer=saved, device="cpu",
                         model_kwargs={"attn_implementation": "near-window"})
    generator(text, **{k: v for k, v in options.items() if k != "pad_token_id"})
    assert any("density" in r for r in window.records)


def test_lm_eval(window: Any, saved: str) -> None:
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, ("a longer context than the window", answer), i)
                for i, answer in enumerate((" yes", " no", " something else"))]

    def ask(arguments: str) -> Any:
        model = lm_eval.HFLM.create_from_arg_string(f"pretrained={saved}{arguments}",
                                                    {"batch_size": 2, "device": "cpu"})
        return model, [score for score, _ in model.loglikelihood(requests, disable_tqdm=True)]

    _, by_name = ask(",attn_implementation=near-window")
    plain, exact = ask("")
    with attach(plain.model, BACKEND):
        attached = [score for score, _ in plain.loglikelihood(requests, disable_tqdm=True)]
    assert by_name == pytest.approx(attached, abs=1e-4) and by_name != pytest.approx(exact, abs=1e-4)
    assert window.report().facts["calls"] > 0


def test_models_come_and_go(window: Any) -> None:
    one, two = (tiny_llama(seed) for seed in range(2))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        for model in (one, two, one):
            model.set_attn_implementation("near-window")
            model(ids)
        copied = copy.deepcopy(one)
        torch.testing.assert_close(copied(ids).logits, one(ids).logits)
    assert len(window.report().tables[0].rows) == 6, "the layers of three models"
    with torch.no_grad(), attach(one, SlidingWindow(sink=0, window=1)) as attached:
        assert not torch.allclose(one(ids).logits, copied(ids).logits)
    assert len(attached.records) == 2 and one.config._attn_implementation == "near-window"
    gone = weakref.ref(two)
    del two, model
    gc.collect()
    assert gone() is None, "a registered backend keeps models alive"
    window.unregister()
    assert type(one.model.layers[0].self_attn) is type(tiny_llama().model.layers[0].self_attn)
    one.set_attn_implementation("sdpa")
    with pytest.raises(KeyError, match="near-window"):
        copied(ids)


def test_names_and_backends_that_cannot_be_registered(window: Any) -> None:
    for name in ("sdpa", "eager", "near-window", "flash_mine", "my/kernel", "paged|mine", ""):
        with pytest.raises(ValueError, match="name: expected a new name of letters, digits, - and _ without 'flash'"):
            register_attention(name, BACKEND)
    with pytest.raises(TypeError, match="backend: expected an instance of an AttentionBackend"):
        register_attention("mine", SlidingWindow)  # type: ignore[arg-type]

    @dataclasses.dataclass
    class Prepared(Near):
        """Wants to see the model."""

        def prepare(self, model: Any, geometry: Any) -> None:
            pass

    with pytest.raises(ValueError, match=r"got Prepared: use looseleaf\.attach\(model, backend\)"):
        looseleaf.register_attention("mine", Prepared())
