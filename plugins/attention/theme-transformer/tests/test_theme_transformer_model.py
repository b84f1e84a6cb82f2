"""The model: gate identities, causality, caches, padding, generation; and the gate on foreign models."""

import math

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, StoppingCriteriaList, WhisperConfig
from transformers import WhisperForConditionalGeneration as Whisper

import looseleaf
from looseleaf_theme_transformer import (
    Note,
    Piece,
    PromptTransformer,
    SequentialTransformer,
    ThemeGate,
    ThemeTokenizer,
    ThemeTransformer,
    ThemeTransformerConfig,
    follow,
)
from looseleaf_theme_transformer.model import nucleus
from looseleaf_theme_transformer.tokens import theme_labels

MELODY = Piece([Note(2 * n, 2, 60 + n % 5) for n in range(16)], themes=[(0, 2)])
WORDS = ThemeTokenizer.fit([MELODY])
SIZES = {"tokenizer": WORDS.to_dict(), "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
         "encoder_layers": 2, "decoder_layers": 4}


def small(cls=ThemeTransformer, **given):
    torch.manual_seed(0)
    model = cls(ThemeTransformerConfig(**{**SIZES, **given})).eval().double()
    for p in model.parameters():  # biases, too
        torch.nn.init.normal_(p, std=0.2)
    return model


def inputs(length: int = 60, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, len(WORDS) - 2, (batch, length), generator=g)
    for start, end in ((5, 20), (35, 50)):
        ids[:, start], ids[:, end] = WORDS.id("Theme_Start"), WORDS.id("Theme_End")
    return ids, torch.randint(1, len(WORDS) - 2, (batch, 17), generator=g)


def reference(model: ThemeTransformer, ids: list[int], theme: list[int]) -> torch.Tensor:
    """The card's equations for one sequence, in plain loops over heads and layers; (L, vocabulary) float64."""
    config, size = model.config, model.config.hidden_size
    head = size // config.num_attention_heads

    def pe(position: float) -> torch.Tensor:
        out = torch.zeros(size, dtype=torch.float64)
        for i in range(0, size, 2):
            out[i], out[i + 1] = (f(position / 10000 ** (i / size)) for f in (math.sin, math.cos))
        return out

    def attend(module, x, memory, causal):
        q, k, v = module.q_proj(x), module.k_proj(memory), module.v_proj(memory)
        rows = []
        for t in range(len(x)):
            parts = []
            for h in range(config.num_attention_heads):
                s = slice(h * head, (h + 1) * head)
                last = t + 1 if causal else len(memory)
                weights = (k[:last, s] @ q[t, s] / math.sqrt(head)).softmax(0)
                parts.append(weights @ v[:last, s])
            rows.append(torch.cat(parts))
        return module.out_proj(torch.stack(rows))

    m = model.embedding(torch.tensor(theme)) + torch.stack([pe(n + 0.1) for n in range(len(theme))])
    for layer in model.encoder:
        m = layer.attention_norm(m + attend(layer.self_attn, m, m, False))
        m = layer.final_norm(m + layer.feed_forward(m))
    m = model.encoder_norm(m)
    labels = theme_labels(torch.tensor(ids), config.theme_start_id, config.theme_end_id).tolist()
    x = model.embedding(torch.tensor(ids))
    for layer, e in zip(model.decoder, config.exclusive):
        at = x + torch.stack([pe(t) for t in range(len(ids))])
        u = attend(layer.self_attn, at, at, True)
        c = attend(layer.cross_attn, x + torch.stack([pe(n) for n in labels]), m, False)
        g = torch.tensor([[float(n > 0)] for n in labels], dtype=torch.float64)
        x = layer.attention_norm(x + ((1 - e * g) * u + g * c) / 2)
        x = layer.final_norm(x + layer.feed_forward(x))
    return model.head(model.decoder_norm(x))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_is_its_equations(attention: str) -> None:
    model, (ids, themes) = small(), inputs()
    model.set_attn_implementation(attention)
    logits = model(ids, themes).logits
    for row in range(2):
        expected = reference(model, ids[row].tolist(), themes[row].tolist())
        torch.testing.assert_close(logits[row], expected, atol=2e-5, rtol=1e-5)  # pe in float32


def test_outside_a_region_nothing_depends_on_the_theme() -> None:
    model, (ids, themes) = small(), inputs()
    first, second = (model(ids, x).logits for x in (themes, themes.flip(1)))
    assert torch.equal(first[:, :5], second[:, :5])  # before the first region; behind it through the past
    assert (first - second).abs().amax((0, 2))[5:20].min() > 1e-4
    alone = torch.zeros_like(ids)
    first, second = (model(ids, x, theme_labels=alone).logits for x in (themes, themes.flip(1)))
    assert torch.equal(first, second)


def test_exclusive_rows_do_not_see_their_past_in_that_layer() -> None:
    model = small()
    x = torch.randn(1, 12, 32, dtype=torch.float64)
    changed = x.clone()
    changed[:, :6] += 1
    place, memory = torch.randn_like(x), torch.randn(1, 5, 32, dtype=torch.float64)
    gate = (torch.arange(12) >= 6).double()[None, :, None]
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    for layer, exclusive in zip(model.decoder, model.config.exclusive, strict=True):
        one, two = (layer(h, place, place, gate, memory, mask) for h in (x, changed))
        same = torch.equal(one[:, 6:], two[:, 6:])
        assert same == bool(exclusive), f"exclusive {exclusive}"


@pytest.mark.parametrize("cls", [ThemeTransformer, SequentialTransformer, PromptTransformer])
@torch.no_grad()
def test_causality_padding_and_caches(cls) -> None:
    model, (ids, themes) = small(cls), inputs()
    full = model(ids, themes).logits
    changed = ids.clone()
    changed[:, 30:] = ids[:, 30:].flip(1)
    torch.testing.assert_close(model(changed, themes).logits[:, :30], full[:, :30], atol=1e-12, rtol=0)
    for left in (3, 0):
        padded = torch.nn.functional.pad(ids, (left, 4))
        theme = torch.nn.functional.pad(themes, (0, 5))
        out = model(padded, theme).logits[:, left:left + 60]
        torch.testing.assert_close(out, full, atol=1e-10, rtol=0)
    labels, cache, parts = WORDS.labels(ids), None, []
    for low, high in ((0, 7), (7, 8), *((n, n + 1) for n in range(8, 60))):
        out = model(ids[:, low:high], themes if cache is None or cls is not PromptTransformer else None,
                    theme_labels=labels[:, low:high], past_key_values=cache, use_cache=True,
                    encoder_outputs=(None,) if cls is PromptTransformer and cache is not None else None)
        cache, parts = out.past_key_values, [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-10, rtol=0)


@torch.no_grad()
def test_cached_logits_are_the_full_ones_up_to_512() -> None:
    model = small(encoder_layers=1, decoder_layers=2)
    ids, themes = inputs(512, 1)
    labels, full = WORDS.labels(ids), model(ids, themes).logits
    out = model(ids[:, :400], themes, theme_labels=labels[:, :400], use_cache=True)
    parts = [out.logits]
    for n in range(400, 512):
        out = model(ids[:, n:n + 1], encoder_outputs=(out.encoder_last_hidden_state,),
                    theme_labels=labels[:, n:n + 1], past_key_values=out.past_key_values)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-10, rtol=0)


def test_loss_leaves_out_padding_and_is_shifted() -> None:
    model, (ids, themes) = small(), inputs()
    out = model(ids, themes, labels=ids)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    padded = torch.nn.functional.pad(ids, (0, 6))
    torch.testing.assert_close(model(padded, themes, labels=padded).loss, expected)
    out.loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("cls", [ThemeTransformer, SequentialTransformer, PromptTransformer])
def test_every_generated_piece_parses(cls) -> None:
    """With random weights, beyond the window, in both ways to forget."""
    model = small(cls, window=48).float().train()
    modes = [m.training for m in model.modules()]
    for seed, hop in ((0, 1), (1, 16), (2, 40)):
        pieces = model.generate_several(MELODY, 3, 2, seed=seed, hop=hop)
        for piece in pieces:
            assert piece.bars <= 3 and piece.themes[0][0] == 0
            assert WORDS.decode(WORDS.encode(piece)).notes == piece.notes if piece.notes else True
    assert [m.training for m in model.modules()] == modes
    again = model.generate_several(MELODY, 3, 2, seed=2, hop=40)
    assert [p.notes for p in again] == [p.notes for p in pieces]
    assert model.generate(MELODY, 1, tempo=200).tempos == [(0, 194.0)]


@pytest.mark.parametrize("hop", [1, 5])
def test_generation_is_the_same_without_a_cache(hop: int) -> None:
    """Each token is drawn from the logits of the last tokens of the window, with positions from 0 and labels on."""
    model = small(window=24).float()
    piece = model.generate(MELODY, 4, seed=3, hop=hop)
    theme, seen = torch.tensor([WORDS.theme(MELODY)]), []
    original = ThemeTransformer.forward

    def watched(self, input_ids, *args, **kwargs):
        out = original(self, input_ids, *args, **kwargs)
        seen.append((input_ids, kwargs["theme_labels"], out.logits[:, -1]))
        return out

    ThemeTransformer.forward = watched
    try:
        assert model.generate(MELODY, 4, seed=3, hop=hop).notes == piece.notes
    finally:
        ThemeTransformer.forward = original
    rows = torch.cat([x[:, -1:] for x, _, _ in seen[1:]], 1)
    rows = torch.cat([seen[0][0], rows], 1)
    labels = WORDS.labels(rows)
    assert rows.shape[1] > 38 and torch.equal(labels[0, 2:], torch.cat([x[0, -1:] for _, x, _ in seen[1:]]))
    length = 2
    for n, (_, _, logits) in enumerate(seen):
        if length > 24:
            length = 24 - hop + 1
        end = n + 2
        with torch.no_grad():
            full = model(rows[:, end - length:end], theme, theme_labels=labels[:, end - length:end]).logits[:, -1]
        torch.testing.assert_close(logits, full, atol=1e-4, rtol=1e-4)
        length += 1


def test_nucleus() -> None:
    p = nucleus(torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), 0.79)
    torch.testing.assert_close(p, torch.tensor([[0.625, 0.375, 0, 0]]))
    assert nucleus(torch.tensor([[0.9, 0.1]]).log(), 0.01).tolist() == [[1, 0]]


@pytest.mark.parametrize(("given", "message"), [
    ({"bars": 0}, "bars: expected a number >= 1, got 0"), ({"top_p": 0}, "top_p: expected a number in"),
    ({"temperature": 0}, "temperature"), ({"hop": 512}, "hop: expected a number from 1 to 511"),
    ({"theme": [1, 2, 3]}, "theme: expected a Piece, or ids from Theme_Start"),
    ({"theme": Piece([], themes=[(0, 1)])}, "bar 1: expected a theme with notes"),
    ({"theme": [WORDS.id("Theme_Start"), 9999, WORDS.id("Theme_End")]}, "expected an id from 0")])
def test_bad_generation(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        small().generate(**{"theme": MELODY, "bars": 2, **given})


def test_bad_sizes_and_no_theme() -> None:
    with pytest.raises(ValueError, match="exclusive: expected one number for each of 6 layers"):
        ThemeTransformerConfig(exclusive=[0, 1])
    with pytest.raises(ValueError, match="theme_ids: expected the tokens of a theme"):
        small()(inputs()[0])


def test_saved_and_loaded(tmp_path) -> None:
    model, (ids, themes) = small().float(), inputs()
    model.save_pretrained(tmp_path)
    loaded = ThemeTransformer.from_pretrained(tmp_path)
    assert loaded.tokenizer == WORDS and loaded.config.exclusive == [0, 0, 1, 1]
    torch.testing.assert_close(loaded(ids, themes).logits, model(ids, themes).logits)


def test_any_backend_attaches_to_both_branches() -> None:
    model, (ids, themes) = small().float(), inputs()
    plain = model(ids, themes).logits
    with looseleaf.attach(model, looseleaf.SlidingWindow(sink=1, window=8)) as attached:
        out = model(ids, themes).logits
        calls = {(attached.layers[r["layer"]].rpartition(".")[2], "fallback" in r) for r in attached.records}
    assert calls == {("self_attn", True), ("self_attn", False), ("cross_attn", True)}  # the encoder stays exact
    assert not torch.allclose(out, plain) and torch.equal(model(ids, themes).logits, plain)


# ---------------------------------------------------------------------- the gate on foreign models
def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    return BartForConditionalGeneration(BartConfig(
        vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=4, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        attention_dropout=0.0, dropout=0.0, forced_eos_token_id=None)).eval()


def gated_by_hand(model, exclusive: list[float], gate: torch.Tensor):
    """Hooks that do to BART's projections what the gate does in front of them."""
    handles = []
    for layer, e in zip(model.model.decoder.layers, exclusive):
        for module, factor in ((layer.self_attn, 1 - e * gate), (layer.encoder_attn, gate)):
            handles.append(module.out_proj.register_forward_pre_hook(
                lambda m, args, factor=factor: (args[0] * factor[..., None],)))
    return handles


def test_gate_on_bart_is_the_gate_by_hand() -> None:
    model = bart()
    source, target = torch.randint(4, 50, (2, 9)), torch.randint(4, 50, (2, 12))
    labels = torch.zeros(2, 12, dtype=torch.int64)
    labels[0, 3:8], labels[1, 6:] = torch.arange(1, 6), torch.arange(1, 7)
    handles = gated_by_hand(model, [0, 0, 1, 1], (labels > 0).float())
    expected = model(source, decoder_input_ids=target).logits
    [h.remove() for h in handles]
    with looseleaf.attach(model, ThemeGate()) as attached:
        attached.context["theme"] = labels
        out = model(source, decoder_input_ids=target).logits
        other = model(source.flip(1), decoder_input_ids=target).logits
        assert {r["part"] for r in attached.records} == {"self", "cross", "encoder, exact"}
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(out[0, :3], other[0, :3]) and not torch.allclose(out[0, 3:8], other[0, 3:8])
    with looseleaf.attach(model, ThemeGate()) as attached:
        plain = model(source, decoder_input_ids=target).logits
        reasons = {r.get("fallback") for r in attached.records if r["layer"] >= 2}
    assert reasons == {"no context 'theme' for these queries"}
    torch.testing.assert_close(plain, model(source, decoder_input_ids=target).logits, atol=1e-6, rtol=1e-5)


def test_gate_on_a_padded_batch_is_that_of_single_items() -> None:
    model = bart()
    source, target = torch.randint(4, 50, (2, 9)), torch.randint(4, 50, (2, 12))
    labels = (torch.arange(12).expand(2, 12) % 5 > 2).long()
    seen = torch.ones(2, 9, dtype=torch.int64)
    seen[1, :3] = 0
    decoder_seen = torch.ones(2, 12, dtype=torch.int64)
    decoder_seen[1, 8:] = 0
    with looseleaf.attach(model, ThemeGate()) as attached:
        attached.context["theme"] = labels
        both = model(source, attention_mask=seen, decoder_input_ids=target, decoder_attention_mask=decoder_seen).logits
        attached.context["theme"] = labels[:1]
        torch.testing.assert_close(model(source[:1], decoder_input_ids=target[:1]).logits[0], both[0])
        attached.context["theme"] = labels[1:, :8]
        alone = model(source[1:], attention_mask=seen[1:], decoder_input_ids=target[1:, :8]).logits[0]
    torch.testing.assert_close(alone, both[1, :8], atol=1e-5, rtol=1e-5)


def test_gate_follows_generate() -> None:
    model = bart()
    source = torch.randint(4, 50, (2, 9))

    def labels(ids: torch.Tensor) -> torch.Tensor:  # a schedule in time
        return (torch.arange(ids.shape[1]) % 6).expand(ids.shape) // 3

    start = torch.full((2, 1), 2)
    with looseleaf.attach(model, ThemeGate()) as attached:
        watch = StoppingCriteriaList([follow(attached, labels, start)])
        cached = model.generate(source, decoder_input_ids=start, stopping_criteria=watch, max_new_tokens=14,
                                min_new_tokens=14, do_sample=False)
        ids = start
        for _ in range(14):
            attached.context["theme"] = labels(ids)
            logits = model(source, decoder_input_ids=ids, use_cache=False).logits[:, -1]
            logits[:, model.config.eos_token_id] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        assert not any("fallback" in r for r in attached.records)
    assert torch.equal(cached, ids)


def test_gate_on_whisper_and_with_dropout() -> None:
    torch.manual_seed(0)
    model = Whisper(WhisperConfig(
        vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10,
        max_target_positions=20, pad_token_id=0, decoder_start_token_id=1, attention_dropout=0.2)).eval()
    sound, target = torch.randn(1, 8, 20), torch.randint(2, 60, (1, 7))
    with looseleaf.attach(model, ThemeGate()) as attached:
        attached.context["theme"] = torch.tensor([[0, 0, 1, 2, 3, 0, 0]])
        one = model(sound, decoder_input_ids=target).logits
        two = model(sound.flip(2), decoder_input_ids=target).logits
        assert torch.equal(one[:, :2], two[:, :2]) and not torch.allclose(one[:, 2:], two[:, 2:])
        model.train()
        model(sound, decoder_input_ids=target).logits.sum().backward()
        assert not any("fallback" in r for r in attached.records)
