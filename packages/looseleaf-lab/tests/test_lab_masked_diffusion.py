"""Masked diffusion: generation with models of several families, training, judging."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from looseleaf import AttentionBackend, AttentionCall, attach
from looseleaf_lab import masked_diffusion as md

pytest.importorskip("transformers")
torch.set_num_threads(1)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def dream(**more: Any) -> Any:
    """A Qwen2 with random weights and bidirectional attention: the shape of Dream, cut small."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return md.bidirectional(Qwen2ForCausalLM(Qwen2Config(
            vocab_size=97, num_key_value_heads=2, initializer_range=0.3, **SIZES, **more))).eval()


def encoder(name: str) -> Any:
    import transformers

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(vocab_size=97, initializer_range=0.3, **SIZES, **ids)
        return getattr(transformers, f"{name}ForMaskedLM")(config).eval()


MODELS = {"llada": lambda: md.new_model(97, num_key_value_heads=4, initializer_range=0.3, **SIZES), "dream": dream,
          "bert": lambda: encoder("Bert"), "modernbert": lambda: encoder("ModernBert")}


class Seen(AttentionBackend):
    """Exact attention that keeps the step, the number of steps and the phase of each call."""

    phases = frozenset({"bidirectional"})

    def attend(self, call: AttentionCall) -> Tensor:
        call.record(seen=f"{call.step} of {call.steps}")
        return call.dense()


def prompt(batch: int = 2, tokens: int = 20) -> Tensor:
    return torch.randint(0, 96, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_any_bidirectional_model(name: str) -> None:
    model = MODELS[name]()
    ids = prompt()
    out = md.generate(model, ids, length=24, steps=6, mask_id=96)
    assert torch.equal(out[:, :20], ids) and out.shape == (2, 44) and int(out.max()) < 96
    assert torch.equal(out[1:], md.generate(model, ids[1:], length=24, steps=6, mask_id=96)), "items see each other"
    with attach(model, Seen()) as attached:
        seen = md.generate(model, ids, length=24, steps=6, mask_id=96, attached=attached)
        assert attached.step is None and attached.steps is None
    assert torch.equal(out, seen)
    assert {r["phase"] for r in attached.records} == {"bidirectional"}
    assert [r["seen"] for r in attached.records if r["layer"] == 0] == [f"{t} of 6" for t in range(6)]


def test_every_token_sees_every_other() -> None:
    """Without a backend, with one, and with padding."""
    for name in ("llada", "dream"):
        model = MODELS[name]()
        ids = prompt(1)
        changed = ids.clone()
        changed[0, -1] = (ids[0, -1] + 1) % 96
        with torch.no_grad():
            plain = model(ids).logits
            assert not torch.allclose(plain[:, 0], model(changed).logits[:, 0], atol=1e-4)
            with attach(model, Seen()):
                torch.testing.assert_close(model(ids).logits, plain, atol=1e-4, rtol=1e-4)
                padded = torch.cat([torch.zeros_like(ids[:, :5]), ids], 1)
                mask = torch.cat([torch.zeros_like(ids[:, :5]), torch.ones_like(ids)], 1)
                torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 5:], plain, atol=1e-3,
                                           rtol=1e-3)


def oracle(answer: Tensor, confidence: Tensor) -> Any:
    """A model that knows the answer (B, L), and is the more confident the larger ``confidence`` (L,) at a place."""
    def model(input_ids: Tensor) -> Any:
        logits = torch.zeros(*input_ids.shape, 97)
        logits[..., 96] = 100.0  # it would like masks best
        return SimpleNamespace(logits=logits.scatter(2, answer[..., None], confidence.expand(answer.shape)[..., None]))
    return model


def test_the_most_confident_places_are_filled_first_block_by_block() -> None:
    answer = prompt(2, 32)
    confidence = torch.rand(32, generator=torch.Generator().manual_seed(0)) * 5 + 3
    path: list[Tensor] = []
    out = md.generate(oracle(answer, confidence), answer[:, :8], length=24, steps=10, block_length=12, mask_id=96,
                      watch=lambda step, ids: path.append(ids))
    assert torch.equal(out, answer) and len(path) == 10
    filled = [int((ids[0] != 96).sum()) - 8 for ids in [*path, out]]
    assert filled == [0, 3, 6, 8, 10, 12, 15, 18, 20, 22, 24]
    for block in range(2):
        places = range(8 + 12 * block, 20 + 12 * block)
        order = sorted(places, key=lambda i: -float(confidence[i]))
        for step in range(5 * block, 5 * block + 5):
            done = filled[step] - 12 * block
            assert set((path[step][0] != 96).nonzero().flatten().tolist()) == {*range(8 + 12 * block), *order[:done]}


def test_shifted_logits() -> None:
    answer = prompt(1, 16)
    ahead = answer.roll(-1, 1)
    out = md.generate(oracle(ahead, torch.full((16,), 9.0)), answer[:, :8], length=8, steps=2, mask_id=96, shift=True)
    assert torch.equal(out, answer)
    model = MODELS["dream"]()
    without = md.generate(model, answer[:, :8], length=8, steps=2, mask_id=96)
    model.config.shift_logits = True
    by_config = md.generate(model, answer[:, :8], length=8, steps=2, mask_id=96)
    assert not torch.equal(by_config, without)
    assert torch.equal(by_config, md.generate(model, answer[:, :8], length=8, steps=2, mask_id=96, shift=True))
    assert torch.equal(without, md.generate(model, answer[:, :8], length=8, steps=2, mask_id=96, shift=False))


def test_temperature_draws_by_the_seed() -> None:
    model = MODELS["llada"]()
    draws = [md.generate(model, prompt(), length=16, steps=4, mask_id=96, temperature=1.0, seed=s) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert all(int(d.max()) < 96 for d in draws)


def test_random_remasking() -> None:
    """Places are filled in an order that the seed draws, and does not depend on what is sure."""
    answer = prompt(1, 40)
    def order(seed: int, confidence: Tensor) -> list[list[int]]:
        path: list[list[int]] = []
        out = md.generate(oracle(answer, confidence), answer[:, :8], length=32, steps=8, mask_id=96, seed=seed,
                          remasking="random", watch=lambda step, ids: path.append((ids[0] != 96).nonzero().tolist()))
        assert torch.equal(out, answer)
        return path
    first = order(0, torch.full((40,), 9.0))
    assert [len(p) for p in first] == list(range(8, 40, 4))
    assert first == order(0, torch.arange(40) + 9.0) != order(1, torch.full((40,), 9.0))


def test_left_padding_of_prompts() -> None:
    model = MODELS["dream"]()
    short = prompt(1, 12)
    both = torch.cat([prompt(1, 20), torch.cat([torch.zeros(1, 8, dtype=torch.int64), short], 1)])
    mask = torch.ones_like(both)
    mask[1, :8] = 0
    alone = md.generate(model, short, length=16, steps=8, mask_id=96)
    out = md.generate(model, both, length=16, steps=8, mask_id=96, attention_mask=mask)
    assert torch.equal(out[1, 20:], alone[0, 12:])


@pytest.mark.parametrize(("given", "message"), [
    ({"length": 0}, "length: expected an integer >= 1 and a multiple of block_length=None, got 0"),
    ({"length": 10, "block_length": 4}, "length: expected an integer >= 1 and a multiple of block_length=4, got 10"),
    ({"steps": 3, "block_length": 8}, "steps: expected a multiple of 2 blocks of 8 tokens, at most 16, .*got 3"),
    ({"steps": 17}, "steps: expected a multiple of 1 blocks .*got 17"),
    ({"temperature": -1.0}, r"temperature: expected a number >= 0, got -1\.0"),
    ({"remasking": "best"}, "remasking: expected 'low_confidence' or 'random', got 'best'")])
def test_what_cannot_be_generated(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        md.generate(None, prompt(), **{"length": 16, "steps": 4, "mask_id": 96, **given})


def test_steps_are_given_back_after_an_error() -> None:
    model = MODELS["llada"]()

    def fail(step: int, ids: Tensor) -> None:
        raise KeyboardInterrupt

    with attach(model, Seen(), steps=3) as attached:
        attached.step = 2
        with pytest.raises(KeyboardInterrupt):
            md.generate(model, prompt(), length=8, steps=4, mask_id=96, attached=attached, watch=fail)
        assert (attached.step, attached.steps) == (2, 3)


def test_nll_of_known_models() -> None:
    ids = prompt(3, 30)
    def even(input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 97))
    bound = md.nll(even, ids, mask_id=96, prompt_tokens=10)
    torch.testing.assert_close(bound, torch.full((3,), 97.0, dtype=torch.float64).log(), atol=1e-5, rtol=0)
    seen: list[Tensor] = []
    def watched(input_ids: Tensor) -> Any:
        seen.append(input_ids)
        return even(input_ids)
    md.nll(watched, ids, mask_id=96, prompt_tokens=10, draws=4)
    assert [int((x == 96).sum(1)[0]) for x in seen] == [2, 8, 12, 18]  # eighths of 20, the odd ones, rounded
    assert not (torch.stack(seen)[:, :, :10] == 96).any()
    with pytest.raises(ValueError, match="30 tokens with prompt_tokens=30"):
        md.nll(even, ids, mask_id=96, prompt_tokens=30)


def test_the_loss_is_the_bound_in_expectation() -> None:
    """For a model that knows each token with the same probability the weighted loss is its entropy on average."""
    ids = prompt(4, 200)
    def even(input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 97))
    g = torch.Generator().manual_seed(0)
    losses = torch.stack([md.masked_loss(even, ids, 96, g) for _ in range(400)])
    wanted = float(torch.tensor(97.0).log())
    assert abs(float(losses.mean()) - wanted) < 4 * float(losses.std()) / 20


def test_unigram_entropy() -> None:
    assert md.unigram_entropy(torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]), 97) == pytest.approx(1.3862943611)


def test_training_learns_and_repeats() -> None:
    """A text of repeated words: far below the unigram entropy within a hundred steps."""
    tokenizer = md.Characters()
    ids = tokenizer.encode("the quick brown fox jumps over the lazy dog. " * 60)

    def trained(steps: int) -> tuple[Any, list[float]]:
        model = md.new_model(tokenizer.vocabulary, **SIZES)
        return model, md.train(model, ids, mask_id=96, steps=steps, batch=8, length=64, rate=1e-2, progress=False)
    model, losses = trained(150)
    assert not model.training and len(losses) == 150
    bound = float(md.nll(model, ids[:64 * 8].view(8, 64), mask_id=96).mean())
    assert bound < 0.8 * md.unigram_entropy(ids, 97) < 2.5
    assert trained(3)[1] == trained(3)[1]
    with pytest.raises(ValueError, match="ids: expected one window of length=64 tokens or more, got 10"):
        md.train(model, ids[:10], mask_id=96, steps=1, length=64)


def test_the_small_model_is_trained_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOOSELEAF_CACHE", str(tmp_path))
    monkeypatch.setattr(md, "SIZES", SIZES)
    monkeypatch.setattr(md, "STEPS", 3)
    monkeypatch.setattr(md, "TEXT", 20_000)
    model, tokenizer = md.small_model(progress=False)
    monkeypatch.setattr(md, "train", None)
    again, _ = md.small_model(progress=False)
    assert not model.config.is_causal and not again.training and again.config.shift_logits
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    ids = tokenizer.encode("A prompt.")[None]
    assert torch.equal(md.generate(model, ids, length=8, steps=2, mask_id=96),
                       md.generate(again, ids, length=8, steps=2, mask_id=96))
    assert len(list((tmp_path / "models").glob("masked-diffusion-*/model.safetensors"))) == 1


def test_characters() -> None:
    tokenizer = md.Characters()
    text = "".join(map(chr, range(32, 127))) + "\n"
    ids = tokenizer.encode(text)
    assert sorted(ids.tolist()) == list(range(96)) and tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("na\u00efve\t")) == "na?ve?"
    assert tokenizer.decode(torch.tensor([96, 33])) == "\u2423A"


def test_names_of_published_weights() -> None:
    """LLaDA's weights, by their published names, give the same model; Dream's names are Qwen2's."""
    model = MODELS["llada"]()
    inside = {"self_attn.q_proj": "q_proj", "self_attn.k_proj": "k_proj", "self_attn.v_proj": "v_proj",
              "self_attn.o_proj": "attn_out", "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj",
              "mlp.down_proj": "ff_out", "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm"}
    published = {"model.transformer.wte.weight": model.model.embed_tokens.weight,
                 "model.transformer.ln_f.weight": model.model.norm.weight,
                 "model.transformer.ff_out.weight": model.lm_head.weight}
    for i, layer in enumerate(model.model.layers):
        for ours, theirs in inside.items():
            published[f"model.transformer.blocks.{i}.{theirs}.weight"] = layer.get_submodule(ours).weight
    other = md.new_model(97, seed=5, num_key_value_heads=4, **SIZES)
    other.load_state_dict({md.llama_name(name): weight for name, weight in published.items()})
    ids = prompt()
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert all(md.llama_name(name) == name for name in dream().state_dict())
