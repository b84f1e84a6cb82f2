"""The parts against known values, each with its identity, and what bad input says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from looseleaf.testing.common import assert_unchanged, mixed_modes, snapshot
from looseleaf.testing.models import seeded, tiny_gemma3, tiny_llama, tiny_text_llama, tiny_tokenizer
from looseleaf_implicit_reasoning import (
    BridgeRecall,
    ChainOfEmbedding,
    ContinuousThought,
    DynamicPauses,
    Internalize,
    LinearJump,
    LoopedLM,
    Pauses,
    PremiseOrder,
    Problem,
    ReasoningData,
    SoftThinking,
    StepProbe,
    TwoHop,
    chain,
    chain_of_embedding,
    consistency,
    encode,
    facts,
    loop_layers,
    planted,
    taxonomy,
)
from looseleaf_implicit_reasoning.controls import PlantedTwoHop
from looseleaf_implicit_reasoning.data import ORDERS, prose
from looseleaf_implicit_reasoning.order import score
from looseleaf_implicit_reasoning.recall import COMPARISONS
from looseleaf_implicit_reasoning.states import is_right, linear_maps, marked, sign_test
from looseleaf_implicit_reasoning.training import IGNORED
from looseleaf_text import LocalModel, decoder_layers

IDS = torch.tensor([[5, 9, 14, 3, 22, 8, 31, 40, 7, 11], [6, 19, 4, 33, 2, 18, 3, 41, 17, 12]])


def small(model: str, config: str, **sizes: Any) -> Any:
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
             "num_attention_heads": 4, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, **sizes}
    made = getattr(transformers, config)(**sizes)
    return seeded(lambda: getattr(transformers, model)(made)).eval()


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(vocabulary=128, num_hidden_layers=3),
    "gemma3": tiny_gemma3,
    "gpt2": lambda: small("GPT2LMHeadModel", "GPT2Config"),
    "qwen3": lambda: small("Qwen3ForCausalLM", "Qwen3Config", num_key_value_heads=2, head_dim=8),
    "gpt-neox": lambda: small("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "opt": lambda: small("OPTForCausalLM", "OPTConfig", ffn_dim=48, word_embed_proj_dim=32),
}


def log(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


# ------------------------------------------------------------------------------------------------------------- the map
def test_the_map_has_every_method_of_the_survey() -> None:
    table = taxonomy()
    names = [row[0] for row in table.rows]
    assert len(table.rows) == len(set(names)) == len({row[2] for row in table.rows}) == 71
    assert len(taxonomy(paradigm="latent optimization").rows) == 38
    assert len(taxonomy(paradigm="signal-guided control").rows) == 9
    assert len(taxonomy(paradigm="layer-recurrent execution").rows) == 7
    assert len(taxonomy(paradigm="evidence").rows) == 17
    import looseleaf_implicit_reasoning as package

    parts = {part for row in table.rows for part in str(row[-1] or "").split("; ") if part}
    assert parts <= set(package.__all__) and len(parts) == 11
    with pytest.raises(ValueError, match="no column"):
        taxonomy(kind="token")


# ------------------------------------------------------------------------------------------------- layers that repeat
@pytest.mark.parametrize("name", FAMILIES)
def test_a_loop_with_cache_is_the_loop_without(name: str) -> None:
    model = FAMILIES[name]()
    count = len(decoder_layers(model))
    with torch.no_grad():
        plain = model(IDS).logits
        with loop_layers(model, 0, count - 1, 1) as same:
            assert same is model and torch.equal(model(IDS).logits, plain)  # times=1: bit for bit
        with loop_layers(model, 0, count - 1, 3):
            whole = model(IDS, use_cache=False).logits
            out = model(IDS[:, :6], use_cache=True)
            logits = [out.logits]
            for n in range(6, IDS.shape[1]):
                out = model(IDS[:, n:n + 1], past_key_values=out.past_key_values)
                logits.append(out.logits)
            assert len(out.past_key_values.layers) == count + 2 * (count - 1)
            hidden = model(IDS, output_hidden_states=True).hidden_states
        scale = max(1.0, float(whole.abs().max()))
        torch.testing.assert_close(torch.cat(logits, 1) / scale, whole / scale, atol=1e-5, rtol=0)
        assert (whole - plain).abs().max() > 1e-3 and len(hidden) == count + 2 * (count - 1) + 1
        assert torch.equal(model(IDS).logits, plain)
        assert len(model(IDS, output_hidden_states=True).hidden_states) == count + 1


def test_a_loop_is_the_layers_written_out() -> None:
    model = tiny_llama(num_hidden_layers=3)
    deep = tiny_llama(num_hidden_layers=5)
    state = model.state_dict()
    for name, value in deep.state_dict().items():
        parts = name.split(".")
        if "layers" in parts:
            at = parts.index("layers") + 1
            parts[at] = str([0, 1, 0, 1, 2][int(parts[at])])
        value.copy_(state[".".join(parts)])
    with torch.no_grad(), loop_layers(model, 0, 2, 2):
        torch.testing.assert_close(model(IDS).logits, deep(IDS).logits)


def test_a_loop_leaves_the_model_as_it_was_and_trains_it() -> None:
    model = mixed_modes(tiny_llama(num_hidden_layers=3))
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), loop_layers(model, 1, 3, 2):
        assert model.config.num_hidden_layers == 5
        raise KeyboardInterrupt
    assert_unchanged(before, model)
    assert model.config.num_hidden_layers == 3
    model = tiny_llama(num_hidden_layers=2)
    with loop_layers(model, 0, 2, 2):
        model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_looped_lm() -> None:
    config = tiny_llama().config
    looped = seeded(lambda: LoopedLM(config, 3)).eval()
    assert sum(p.numel() for p in looped.parameters()) == sum(p.numel() for p in looped.base.parameters())
    with torch.no_grad():
        once = seeded(lambda: LoopedLM(config, 1)).eval()
        assert torch.equal(once(IDS).logits, once.base(IDS).logits)
        assert not torch.allclose(looped(IDS).logits, looped.base(IDS).logits)
        assert looped.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 13)


@pytest.mark.parametrize(("i", "j", "times", "message"), [
    (2, 2, 2, "expected 0 <= i < j <= 3"), (0, 4, 2, "i < j <= 3"), (2, 1, 2, "i < j"), (0, 1, 0, "times")])
def test_loops_refuse(i: int, j: int, times: int, message: str) -> None:
    with pytest.raises(ValueError, match=message), loop_layers(tiny_llama(num_hidden_layers=3), i, j, times):
        pass


# -------------------------------------------------------------------------------------------------------- soft thinking
def test_the_mixture() -> None:
    soft = SoftThinking(top=2, temperature=1.0, top_p=1.0)
    ids, weights, entropy = soft.mix(log(0.5, 0.25, 0.125, 0.125)[None])
    assert ids.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[2 / 3, 1 / 3]]))
    assert float(entropy) == pytest.approx(1.75 * math.log(2), abs=1e-6)  # of all four, before the filters
    ids, weights, _ = SoftThinking(temperature=1.0, top_p=0.6).mix(log(0.5, 0.25, 0.125, 0.125)[None])
    torch.testing.assert_close(weights[0, :2], torch.tensor([2 / 3, 1 / 3]))  # the smallest set with 0.6
    assert float(weights[0, 2:].sum()) == 0
    noisy = SoftThinking(temperature=1.0, top_p=1.0, gumbel=0.5)
    rows = log(0.7, 0.3)[None].expand(20000, 2)
    first, second = (noisy.mix(rows, torch.Generator().manual_seed(s))[1] for s in (0, 1))
    assert not torch.equal(first, second)
    assert float((first[:, 0] > 0.5).float().mean()) == pytest.approx(0.7, abs=0.02)  # Gumbel-max


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_no_thought_and_one_token_are_greedy_decoding(name: str) -> None:
    model = tiny_text_llama() if name == "llama" else FAMILIES[name]()
    tokenizer = tiny_tokenizer()
    prompts = ["abc d", "1 + 2 = 3", " x"]
    if name == "gemma3":  # its vocabulary has 64 tokens
        prompts = ["123 4", "1 + 2 = 3", " 5"]
    greedy = LocalModel(model, tokenizer).generate(prompts, 8)
    assert [t.text for t in SoftThinking(max_thoughts=0).generate(model, tokenizer, prompts, max_tokens=8)] == greedy
    one = SoftThinking(top=1, max_thoughts=3).generate(model, tokenizer, prompts, max_tokens=5)
    assert ["".join(t.thoughts) + t.text for t in one] == greedy
    assert all(w == 1 for t in one for w in t.top)


def test_soft_thoughts_do_not_depend_on_the_batch_and_are_soft() -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    prompts = ["abc d", "hello world this", " x"]
    soft = SoftThinking(max_thoughts=4)
    together = soft.generate(model, tokenizer, prompts, max_tokens=4)
    alone = [soft.generate(model, tokenizer, [p], max_tokens=4)[0] for p in prompts]
    for one, two in zip(together, alone, strict=True):
        assert (one.text, one.thoughts, one.ended) == (two.text, two.thoughts, two.ended)
        assert one.top == pytest.approx(two.top, abs=1e-3)
    assert max(w for t in together for w in t.top) < 1
    table = model.get_input_embeddings().weight
    with torch.no_grad():  # the first thought by hand
        ids, weights, _ = soft.mix(model(torch.tensor([tokenizer("abc d")["input_ids"]])).logits[:, -1])
        row = torch.cat([table[tokenizer("abc d")["input_ids"]], weights @ table[ids[0]]])
        _, second, _ = soft.mix(model(inputs_embeds=row[None]).logits[:, -1])
    assert together[0].top[1] == pytest.approx(float(second.max()), abs=1e-3)


def test_thinking_ends() -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    free = SoftThinking(max_thoughts=6).generate(model, tokenizer, ["abc d"], max_tokens=4)[0]
    assert free.ended == "limit" and len(free.thoughts) == 6
    sure = SoftThinking(max_thoughts=6, tau=1e9, patience=3).generate(model, tokenizer, ["abc d"], max_tokens=4)[0]
    assert sure.ended == "low entropy" and len(sure.thoughts) == 2
    off = SoftThinking(max_thoughts=6, tau=0.0, patience=1).generate(model, tokenizer, ["abc d"], max_tokens=4)[0]
    assert off == free
    end = free.thoughts[1]
    ended = SoftThinking(max_thoughts=6, end=end).generate(model, tokenizer, ["abc d"], max_tokens=4)[0]
    assert ended.ended == "end of thought" and ended.thoughts == free.thoughts[:ended.thoughts.__len__()]
    assert len(ended.thoughts) < 6
    with pytest.raises(ValueError, match=r"one token of the vocabulary, got '</think>'"):
        SoftThinking(end="</think>").generate(model, tokenizer, ["abc"])
    with pytest.raises(ValueError, match="at most 2048 positions"):
        SoftThinking(max_thoughts=3000).generate(model, tokenizer, ["abc"])


# ------------------------------------------------------------------------------------------------- continuous thoughts
def examples() -> Any:
    return encode(chain(2, 1) + chain(2, 3), tiny_tokenizer())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3", "opt"])
def test_without_slots_the_model_is_itself_and_with_them_the_cache_changes_nothing(name: str) -> None:
    model = FAMILIES[name]()
    part, few = ContinuousThought(c=2, stages=2), [dataclasses.replace(
        e, question=tuple(t % 64 for t in e.question), answer=tuple(t % 64 for t in e.answer),
        steps=tuple(tuple(t % 64 for t in s) for s in e.steps)) for e in examples()]
    with torch.no_grad():
        batch = part.batch(few, 0)
        assert int(batch["slots"].max()) == 0
        logits = part.logits(model, batch)
        for n, e in enumerate(few):
            row = [*e.question, *(t for s in e.steps for t in s), *e.answer]
            own = model(torch.tensor([row])).logits[0]
            real = batch["attention_mask"][n].bool()
            assert batch["input_ids"][n][real].tolist() == row
            torch.testing.assert_close(logits[n][real], own, atol=2e-4, rtol=1e-4)
        for stage in (1, 3):
            batch = part.batch(few, stage)
            real = batch["attention_mask"].bool()
            cached = part.logits(model, batch)
            again = dataclasses.replace(part, cache=False).logits(model, batch)
            torch.testing.assert_close(cached[real], again[real], atol=2e-4, rtol=1e-4)


def test_a_slot_reads_the_hidden_state_before_it() -> None:
    model, [e, *_] = tiny_text_llama(), examples()
    part = ContinuousThought(c=2, stages=1)
    with torch.no_grad():
        logits = part.logits(model, part.batch([e], 1))
        rows = model.get_input_embeddings()(torch.tensor([e.question]))
        for _ in range(2):
            rows = torch.cat([rows, model(inputs_embeds=rows, output_hidden_states=True).hidden_states[-1][:, -1:]], 1)
        rows = torch.cat([rows, model.get_input_embeddings()(torch.tensor([e.answer]))], 1)
        torch.testing.assert_close(logits, model(inputs_embeds=rows).logits, atol=2e-4, rtol=1e-4)


def test_stages_take_steps_away() -> None:
    part, few = ContinuousThought(c=2, stages=2), examples()
    for stage, slots, left in ((0, [0, 0, 0, 0], [1, 1, 3, 3]), (1, [2, 2, 2, 2], [0, 0, 2, 2]),
                               (2, [4, 4, 4, 4], [0, 0, 1, 1]), (3, [2, 2, 4, 4], [0, 0, 0, 0])):
        batch = part.batch(few, stage)
        assert batch["slots"].tolist() == slots
        for n, e in enumerate(few):
            kept = [t for s in (e.steps[len(e.steps) - left[n]:]) for t in s]
            assert batch["labels"][n][batch["labels"][n] != IGNORED].tolist() == [*kept, *e.answer]
            column = int(batch["column"])  # where the slots begin is the same for all
            assert batch["input_ids"][n, column - len(e.question):column].tolist() == list(e.question)
            assert batch["position_ids"][n, column] == len(e.question)
    assert ContinuousThought(c=2, stages=2, pad=True).batch(few, 3)["slots"].tolist() == [4, 4, 4, 4]
    assert ContinuousThought(c=0).batch(few, 2)["slots"].tolist() == [0, 0, 0, 0]


def test_answers_do_not_depend_on_the_batch_and_gradients_reach_the_question() -> None:
    model, few = tiny_text_llama(), examples()
    part = ContinuousThought(c=1, stages=2)
    together = part.answer(model, part.questions(few, 2), 4)
    assert together == [part.answer(model, part.questions([e], 2), 4)[0] for e in few]
    part.loss(model, part.batch(few, 3)).backward()
    gradient = model.get_input_embeddings().weight.grad
    assert float(gradient[few[0].question[0]].abs().sum()) > 0
    with pytest.raises(ValueError, match="nothing behind them"):
        part.answer(model, part.batch(few, 1), 2)
    with pytest.raises(ValueError, match="at most 2048 positions"):
        part.logits(model, part.questions(few, 2048))


# -------------------------------------------------------------------------------------------------- internalised steps
def test_tokens_go_from_the_left() -> None:
    part, [e, *_] = Internalize(), examples()
    steps = [t for s in e.steps for t in s]
    for removed in (0, 1, 5, len(steps), len(steps) + 9):
        batch = part.batch([e], removed)
        labels = batch["labels"][0]
        assert labels[labels != IGNORED].tolist() == [*steps[removed:], *e.answer]
    assert [part.due(step, 16) for step in (0, 1, 2, 15, 16, 40)] == [0, 0, 1, 7, 8, 20]  # one each 16 / 8 steps
    bound = Internalize(bound=3).batch([e], 3)["labels"][0]
    assert bound[bound != IGNORED].tolist() == list(e.answer)
    assert Internalize(per_epoch=0).due(1000, 16) == 0


def test_the_jitter() -> None:
    draws = torch.tensor(Internalize(smoothing=4.0).jitter(200_000, torch.Generator().manual_seed(0)))
    assert 1 - math.exp(-4) == pytest.approx(0.9816844, abs=1e-7)
    assert float((draws == 0).double().mean()) == pytest.approx(0.9816844, abs=1e-3)
    assert float((draws == 1).double().mean()) == pytest.approx(0.9816844 * math.exp(-4), abs=1e-3)
    assert Internalize(smoothing=math.inf).jitter(5, torch.Generator()) == [0] * 5


# -------------------------------------------------------------------------------------------------------------- pauses
def test_pauses_stand_before_the_answer_without_loss() -> None:
    model, few = tiny_text_llama(), examples()
    batch = Pauses(3, "filler").batch(few, 40)
    for n, e in enumerate(few):
        real = batch["attention_mask"][n].bool()
        assert batch["input_ids"][n][real].tolist() == [*e.question, 40, 40, 40, *e.answer]
        assert batch["labels"][n][batch["labels"][n] != IGNORED].tolist() == list(e.answer)
    none = Pauses(0).batch(few, 40)
    for name, value in ContinuousThought(c=0, stages=0).batch(few, 1).items():
        assert torch.equal(none[name], value)  # n=0 is no pause at all
    assert Pauses(0).prepare(model, tiny_tokenizer()) == (model, 0)
    with pytest.raises(ValueError, match="one token of the vocabulary"):
        Pauses(2, "filler", filler="and so on").prepare(model, tiny_tokenizer())


def test_dynamic_pauses_stand_before_the_least_likely_tokens() -> None:
    model, few = tiny_text_llama(), examples()
    part = DynamicPauses(2)
    plain = DynamicPauses(0).batch(few, model, 40)
    for name, value in Internalize().batch(few, 0).items():
        assert torch.equal(plain[name], value)
    batch = part.batch(few, model, 120)
    for n, e in enumerate(few):
        text = [*(t for s in e.steps for t in s), *e.answer]
        with torch.no_grad():
            logits = model(torch.tensor([[*e.question, *text]])).logits[0, len(e.question) - 1:-1]
        own = torch.log_softmax(logits, -1)[range(len(text)), text]
        lowest = set(own.argsort()[:2].tolist())
        expected = [t for at, token in enumerate(text) for t in ((120, token) if at in lowest else (token,))]
        real = batch["attention_mask"][n].bool()
        assert batch["input_ids"][n][real].tolist() == [*e.question, *expected]
        assert batch["labels"][n][batch["labels"][n] != IGNORED].tolist() == text
    assert int((DynamicPauses(999).batch(few, model, 120)["input_ids"] == 120).sum()) == sum(
        len(e.answer) + sum(map(len, e.steps)) for e in few)


# ------------------------------------------------------------------------------------------------- recall of the bridge
def test_consistency() -> None:
    p, q = log(0.7, 0.2, 0.1), log(0.1, 0.3, 0.6)
    assert float(consistency(p, q)) == pytest.approx(-1.9018683, abs=1e-7)
    assert float(consistency(q, p)) == pytest.approx(-1.9018683, abs=1e-7)
    third = log(1 / 3, 1 / 3, 1 / 3)
    assert float(consistency(third, third)) == pytest.approx(-1.0986123, abs=1e-7)  # minus the entropy, not 0


@pytest.mark.parametrize(("recall", "answer", "seed"), [(2, 4, 0), (1, 2, 1), (4, 5, 2)])
def test_recall_and_probe_find_the_planted_layer(recall: int, answer: int, seed: int) -> None:
    model, tokenizer, hops, problems = planted(recall=recall, answer=answer, seed=seed)
    with torch.no_grad():
        for fact in hops[:8]:
            for prompt in (fact.two_hop, fact.bridge_prompt):
                logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits
                assert tokenizer.decode(logits[0, -1].argmax()) == fact.e3
    found = BridgeRecall().measure(model, tokenizer, hops[:32], seed=seed)
    assert found.first_layer() == recall
    for layer in range(6):
        interval = found.fraction("other entity", layer)
        assert interval is not None and interval.value == (1.0 if layer >= recall else 0.5)
    control = found.fraction(COMPARISONS[-1], recall)
    assert control is not None and control.low <= 0.5 <= control.high
    # the answer is read one layer before it is looked up, so that more recall helps until then
    assert [found.positive(n).value for n in range(5)] == [1.0 if n < answer else 0.0 for n in range(5)]
    result = StepProbe().measure(model, tokenizer, problems, seed=seed)
    assert [result.first_layer(0, place) for place in range(2)] == [recall, None]


def test_slopes_are_derivatives() -> None:
    model, tokenizer, hops, _ = planted()
    model = model.double()
    fact, *others = [h for h in hops if h.r1 == "r0"]
    found = BridgeRecall().measure(model, tokenizer, [fact, *others])
    local = LocalModel(model, tokenizer)
    head, tail = fact.split()
    ids = torch.tensor([tokenizer(head + tail)["input_ids"]])
    place, bridge = len(tokenizer(head)["input_ids"]) - 1, tokenizer(fact.e2)["input_ids"][0]
    q = torch.log_softmax(model(torch.tensor([tokenizer(fact.bridge_prompt)["input_ids"]])).logits[0, -1], -1).detach()
    assert local.device.type == "cpu"
    for layer in (0, 2, 3):
        stream: dict[str, torch.Tensor] = {}

        def moved(step: float, layer: int = layer, stream: Any = stream) -> float:
            def hook(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
                stream.setdefault("h", out[0, place].detach().clone())
                if step:
                    h = stream["h"].clone().requires_grad_(True)
                    value = torch.log_softmax(model.lm_head(h), -1)[bridge]
                    [g] = torch.autograd.grad(value, h)
                    out = out.clone()
                    out[0, place] += step * g
                return out

            handle = list(decoder_layers(model).values())[layer].register_forward_hook(hook)
            value = consistency(torch.log_softmax(model(ids).logits[0, -1], -1), q)
            handle.remove()
            return float(value)

        moved(0.0)
        numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert found.slope[layer, 0] == pytest.approx(numeric, rel=1e-3)


def test_a_model_that_recalls_nothing_is_not_found_to() -> None:
    _, tokenizer, hops, problems = planted()
    wrong = planted(seed=7)[0]  # looks up other bridges than the facts say
    for model in (wrong, PlantedTwoHop(torch.zeros_like(wrong.model["layers"][2].mlp.table),
                                       torch.zeros_like(wrong.model["layers"][2].mlp.table))):
        assert BridgeRecall(slope=False).measure(model, tokenizer, hops).first_layer() is None
    result = StepProbe().measure(PlantedTwoHop(*torch.zeros(2, *[len(tokenizer)] * 3)), tokenizer, problems)
    assert [result.first_layer(0, place) for place in range(2)] == [None, None]


def test_facts_that_cannot_be_compared_are_left_out() -> None:
    model, tokenizer, hops, _ = planted()
    same = [dataclasses.replace(h, e2="b0") for h in hops[:4]]  # all entities share their first token
    with pytest.raises(ValueError, match="different first tokens, got 0 of 4"):
        BridgeRecall().measure(model, tokenizer, same)
    with pytest.raises(ValueError, match="got 0 of 0"):
        BridgeRecall().measure(model, tokenizer, [])
    found = BridgeRecall(slope=False).measure(model, tokenizer, [
        *(h for h in hops if h.r1 == "r0"), dataclasses.replace(hops[1], r1="r99x")])
    assert list(found.left_out.values()) == ["no other fact of its first relation whose bridge has another first token"]


def test_two_hop_refuses() -> None:
    assert TwoHop("Paris", "country", "France", "capital", "x").two_hop == "The capital of the country of Paris is"
    for bad, message in (({"prompt": "The {r2} is"}, "expected a prompt with {mention}"),
                         ({"mention": "the {r1}"}, "a mention with {r1} and {e1}"),
                         ({"one_hop": "The {r2} is"}, "names the bridge"), ({"e2": "paris"}, "does not name"),
                         ({"e2": ""}, "does not name")):
        with pytest.raises(ValueError, match=message):
            TwoHop(**{"e1": "Paris", "r1": "country", "e2": "France", "r2": "capital", "e3": "x", **bad})
    assert len({f.two_hop for f in facts()}) == len(facts())


# ---------------------------------------------------------------------------------------------------------- the states
def test_the_map_at_the_last_layer_is_the_identity() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, dtype=torch.float64, generator=draw)
    [found] = linear_maps(x, x)
    torch.testing.assert_close(found, torch.eye(12, dtype=torch.float64))
    wanted = torch.randn(12, 12, dtype=torch.float64, generator=draw)
    torch.testing.assert_close(linear_maps(x, x @ wanted)[0], wanted)
    jump = LinearJump().measure(tiny_text_llama(), tiny_tokenizer(), prose(40))
    assert jump.r2[-1] == pytest.approx(1, abs=1e-9) and jump.agreement[-1].value == 1
    assert jump.identity_r2[-1] == 1 and jump.identity_agreement[-1].value == 1
    assert jump.shuffled_agreement[-1].value < 0.3 and jump.r2[0] < jump.r2[1] < 1
    assert all(ours >= own - 0.02 for ours, own in zip(jump.r2, jump.identity_r2, strict=True))
    with pytest.raises(ValueError, match="expected 64 positions or more"):
        LinearJump().measure(tiny_text_llama(), tiny_tokenizer(), ["abc", "def"])
    with pytest.raises(ValueError, match="two or more"):
        LinearJump().measure(tiny_text_llama(), tiny_tokenizer(), ["abc"])


def test_controls_of_linear_probes_are_at_chance() -> None:
    model, tokenizer, _, problems = planted(entities=12, relations=12)
    found = [StepProbe().measure(model, tokenizer, problems, seed=s) for s in range(4)]
    control = np.mean([f.control for f in found])
    assert 0.15 < control < 0.35  # four bridges
    assert all(0.1 < f.frequency[0] < 0.5 and (f.last_word < 0.5).all() for f in found)
    # the answer, from the planted layer 4 on, says something of the bridge
    assert all((f.accuracy[0, 3:, 0] > 0.95).all() and (f.accuracy[0, :5, 1] < 0.5).all() for f in found)
    assert all((f.selectivity == f.accuracy - f.control).all() for f in found)
    # a result that the word at hand gives away is not found, though the probe is always right
    last = [dataclasses.replace(p, results=(p.question.split()[-2],)) for p in problems]
    given_away = StepProbe().measure(model, tokenizer, last)
    assert (given_away.accuracy[0, :, 0] > 0.95).all() and given_away.first_layer(0, 0) is None
    # nor one that is nearly always the same
    constant = [dataclasses.replace(p, results=("b0" if n % 20 else "b1",)) for n, p in enumerate(problems)]
    assert StepProbe().measure(model, tokenizer, constant).first_layer(0, 0) is None


def test_sign_test() -> None:
    ours, others = np.array([1, 1, 1, 1, 0, 1.0]), np.array([0, 0, 0, 0, 1, 1.0])
    assert sign_test(ours, others) == pytest.approx(6 / 32)
    assert sign_test(ours, ours) == 1


def test_positions_are_the_ends_of_premises() -> None:
    local = LocalModel(tiny_text_llama(), tiny_tokenizer())
    for problem in chain(3, 2):
        ids, places = marked(local, problem)
        assert ids == local.encode_pairs([problem.question], [[" "]])[0][0]
        text = problem.question
        ends = [len(" ".join(problem.premises[:n + 1])) - 1 for n in range(3)] + [len(text) - 1]
        assert places == ends  # one token a character
    with pytest.raises(ValueError, match="as many in each"):
        StepProbe().measure(local.model, local.tokenizer, [*chain(3, 1), *chain(3, 2)])


def test_chain_of_embedding() -> None:
    r, c = chain_of_embedding(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    assert (r, c) == (pytest.approx(0.2071068, abs=1e-7), pytest.approx(0.7071068, abs=1e-7))
    for bad in (torch.ones(1, 3), torch.ones(3, 3), torch.ones(3)):
        with pytest.raises(ValueError, match="expected"):
            chain_of_embedding(bad)


def test_confidence_is_measured_on_the_states_that_predict_the_answer() -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    prompts = ["abc d", "hello world this", "1 + 1 ="]
    answer = LocalModel(model, tokenizer).generate(prompts[:1], 3)[0]
    found = ChainOfEmbedding(max_tokens=3).measure(model, tokenizer, prompts, [answer, "x", "y"])
    assert found.right == [True, False, False]
    ids = tokenizer(prompts[0] + answer)["input_ids"]
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
    way = torch.stack([h[0, -4:-1] for h in out.hidden_states]).mean(1)
    assert (found.scores["CoE-R"][0], found.scores["CoE-C"][0]) == pytest.approx(chain_of_embedding(way), abs=1e-4)
    p = torch.softmax(out.logits[0, -4:-1].double(), -1)
    assert found.scores["max-prob"][0] == pytest.approx(float(p.max(-1).values.mean()), abs=1e-4)
    assert found.scores["entropy"][0] == pytest.approx(float((p * p.log()).sum(-1).mean()), abs=1e-3)
    assert found.scores["perplexity"][0] == pytest.approx(-float(torch.exp(-p.max(-1).values.log().mean())), abs=1e-3)
    assert found.auroc("CoE-R") is not None
    assert not is_right("12", "1") and is_right(" 1.", "1") and not is_right("", "1")


# --------------------------------------------------------------------------------------------------- order of premises
def test_the_same_problem_in_every_order() -> None:
    made = {order: chain(20, 3, order, seed=3) for order in ORDERS}
    for order, problems in made.items():
        for n, p in enumerate(problems):
            first = made["in order"][n]
            assert (p.answer, p.results) == (first.answer, first.results)
            values: dict[str, int] = {}
            for premise in (first.premises if order != "subtrahend" else p.premises):
                name, _, value = premise.rstrip(".").partition(" = ")
                values[name] = int(eval(value, {}, values))
            assert str(values[p.question.split()[-2]]) == p.answer and all(0 <= v <= 9 for v in values.values())
            if order != "subtrahend":
                assert sorted(p.premises) == sorted(first.premises)
            if order == "reversed":
                assert p.premises == first.premises[::-1]
            if order == "subtrahend":
                assert all(f"- {name}." in " ".join(p.premises) for name in list(values)[:-1])
    assert chain(3, 2, seed=1) == chain(3, 2, seed=1) != chain(3, 2, seed=2)
    with pytest.raises(ValueError, match="'in order', 'reversed'"):
        chain(1, 2, "sideways")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"steps: expected an integer in"):
        chain(1, 0)


def test_shortcuts_are_scored_beside_the_model() -> None:
    problems = [Problem("a = 1. b = a + 2. b =", "3"), Problem("a = 5. b = a - 2. b =", "3"),
                Problem("a = 4. b = a + 4. b =", "8"), Problem("a = 8. b = a - 4. b =", "4")]
    found = score("in order", 1, problems, ["3", "1", "8", "1"])
    assert (found.right, found.frequency, found.last_number) == ([1, 0, 1, 0], 0.5, 0.25)
    scores = PremiseOrder((1,), 6, 1).measure(tiny_text_llama(), tiny_tokenizer())
    assert [s.order for s in scores] == list(ORDERS) and all(len(s.right) == 6 for s in scores)


# ---------------------------------------------------------------------------------------------------------------- data
def test_data_as_json() -> None:
    data = ReasoningData(tuple(chain(2, 2)), tuple(facts()[:2]), ("A text.",))
    assert ReasoningData.from_json(data.to_json()) == data
    for bad in ("[]", "{", '{"problems": [{"q": 1}]}'):
        with pytest.raises(ValueError, match="data: expected JSON with problems"):
            ReasoningData.from_json(bad)
    with pytest.raises(ValueError, match="expected a question and an answer"):
        Problem("", "1")
    with pytest.raises(ValueError, match="parts that the question begins with"):
        Problem("a = 1. a =", "1", premises=("b = 1.",))
