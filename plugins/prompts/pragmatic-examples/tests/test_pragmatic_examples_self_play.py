"""Self-play: with exact models it is exact RSA; models of transformers; killed and resumed; ranking programs."""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from looseleaf.resume import StateError
from looseleaf_pragmatic_examples import (
    ExactSpeaker,
    ModelListener,
    ModelSpeaker,
    RegexDomain,
    SelfPlay,
    agreement,
    listener_rows,
    random_specs,
    rank,
    rank_by_rsa,
    rsa,
    speaker_rows,
    strings,
)
from looseleaf_pragmatic_examples.regexes import full_match
from looseleaf_pragmatic_examples.self_play import allowed

transformers = pytest.importorskip("transformers")
PROGRAMS = ["a", "b", "a+", "b+", "[ab]", "[ab]+", "ab?", "a?b", "a{2}", "[ab]{2}"]
UTTERANCES = sorted((s, label) for s in strings("ab", 3) for label in "+-")


def agrees(program: str, utterance: tuple[str, str]) -> bool:
    found = full_match(program, utterance[0])
    return found is not None and found == (utterance[1] == "+")


class Exhaustive:
    """A listener and a speaker that propose all there is, and what is wrong as well; training is remembered."""

    def __init__(self, proposals: list[Any], rows: Any = ()) -> None:
        self.proposals, self.rows, self.asked = proposals, list(rows), 0

    def propose(self, asked: Any, n: int, seed: int) -> list[list[Any]]:
        self.asked += 1
        if self.asked > 10_000:
            raise KeyboardInterrupt
        return [random.Random(f"{seed}").sample(self.proposals, len(self.proposals)) for _ in asked]

    def train(self, rows: Any, seed: int) -> Any:
        return type(self)(self.proposals, [*self.rows, *rows])

    def save(self, path: Path) -> None:
        path.write_text(repr(self.rows))

    def load(self, path: Path) -> Any:
        import ast

        return type(self)(self.proposals, ast.literal_eval(path.read_text()))


def exact_play(**options: Any) -> SelfPlay:
    return SelfPlay(Exhaustive([*PROGRAMS, "(a", "["]), Exhaustive(UTTERANCES), agrees,
                    **{"rounds": 2, "programs_per_round": len(PROGRAMS), "turns": 3, **options})


def test_with_exact_models_it_is_exact_rsa() -> None:
    played = exact_play().run(lambda n, seed: PROGRAMS[:n])
    speaker = ExactSpeaker(agreement(PROGRAMS, UTTERANCES, agrees))
    for target, spec in played.specs[0]:
        assert spec == [UTTERANCES[u] for u in speaker.choose(PROGRAMS.index(target), 3)], target


def test_rows_are_all_prefixes_and_training_is_from_scratch_on_all_rounds() -> None:
    specs = [("a", [("a", "+"), ("b", "-")])]
    assert listener_rows(specs) == [([("a", "+")], "a"), ([("a", "+"), ("b", "-")], "a")]
    assert speaker_rows(specs) == [("a", [], ("a", "+")), ("a", [("a", "+")], ("b", "-"))]
    scratch = exact_play().run(lambda n, seed: PROGRAMS[:n])
    assert len(scratch.listener.rows) == len(scratch.speaker.rows) == 2 * sum(len(s) for _, s in scratch.specs[0])
    last = exact_play(from_scratch=False).run(lambda n, seed: PROGRAMS[:n])
    assert last.listener.rows == scratch.listener.rows  # one after the other


def test_the_context_is_a_conjunction_and_unusable_examples_are_left_out() -> None:
    play = exact_play()
    context = [("a", "+"), ("aa", "-")]
    assert play.next_example("a", context, ["a+", "[ab]"], [("aaa", "-"), ("b", "-")]) == ("b", "-")  # a+ is ruled out
    assert play.next_example("a", context, ["[ab]"], [("a", "+"), ("b", "+"), ("x" * 26, "-"), ("b b", "-")]) is None
    assert play.next_example("a", [], [], [("b", "-"), ("a", "+")]) == ("a", "+")  # no programs: the first in order
    assert allowed(("a" * 25, "+")) and not allowed(("\t", "+"))
    with pytest.raises(ValueError, match="expected examples of some of 1 targets, got none that agrees"):
        SelfPlay(Exhaustive(PROGRAMS), Exhaustive([("b", "+")]), agrees, rounds=1).run(lambda n, seed: ["a"])


def test_equal_languages_count_once_where_asked() -> None:
    pytest.importorskip("greenery")
    domain = RegexDomain(alphabet="ab")
    examples, rivals = [("a", "+"), ("ab", "+")], ["a+", "aa*", "a{1,}", "[ab]b?", "ab"]
    by_text = exact_play().next_example("ab?", [], rivals, examples)
    by_language = exact_play(dedupe="language", key=domain.key).next_example("ab?", [], [*rivals, "(ab?)"], examples)
    assert (by_text, by_language) == (("ab", "+"), ("a", "+"))
    assert exact_play(dedupe="language", key=domain.key).next_example("ab?", [], ["a+", "[ab]b?", "ab"],
                                                                      examples) == by_language


def test_killed_and_resumed(tmp_path: Path) -> None:
    def sample(n: int, seed: int) -> list[str]:
        return random.Random(seed).sample(PROGRAMS, 4)

    whole = exact_play(rounds=3, programs_per_round=4).run(sample, seed=3)
    stopped = exact_play(rounds=3, programs_per_round=4)
    stopped.listener.asked = 10_000 - 5  # in the second round
    with pytest.raises(KeyboardInterrupt):
        stopped.run(sample, seed=3, state_dir=tmp_path)
    again = exact_play(rounds=3, programs_per_round=4)
    resumed = again.run(sample, seed=3, state_dir=tmp_path)
    assert resumed.specs == whole.specs and resumed.listener.rows == whole.listener.rows
    assert again.listener.asked < 3 * 3 + 1
    final = exact_play(rounds=3, programs_per_round=4).run(sample, seed=3, state_dir=tmp_path)
    assert final.listener.rows == whole.listener.rows
    with pytest.raises(StateError, match="belongs to another search"):
        exact_play(rounds=3, programs_per_round=4).run(sample, seed=4, state_dir=tmp_path)
    (tmp_path / "listener-3").unlink()
    lost = exact_play(rounds=3, programs_per_round=4).run(sample, seed=3, state_dir=tmp_path)
    assert lost.listener.rows == whole.listener.rows


@pytest.mark.parametrize(("change", "message"), [
    ({"turns": 0}, r"turns: expected an integer >= 1, got 0"),
    ({"dedupe": "language"}, r"key: expected a function for dedupe='language'"),
    ({"listener": object()}, r"listener: expected propose, train, save and load, got object.*ModelListener"),
])
def test_bad_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfPlay(**{"listener": Exhaustive([]), "speaker": Exhaustive([]), "consistent": agrees, **change})


# ---------------------------------------------------------------------- models of transformers
def tokenizer() -> Any:
    return transformers.ByT5Tokenizer()


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0))


def bart() -> Any:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(
        vocab_size=384, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_ffn_dim=16,
        decoder_attention_heads=2, encoder_ffn_dim=16, pad_token_id=0, bos_token_id=2, eos_token_id=1,
        decoder_start_token_id=1, forced_eos_token_id=None, max_position_embeddings=128))


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=384, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, bos_token_id=None, eos_token_id=1))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=384, n_embd=16, n_layer=1, n_head=2, n_positions=128, bos_token_id=None, eos_token_id=1))


FAST = {"learning_rate": 3e-2, "num_train_epochs": 4, "per_device_train_batch_size": 8}
SPECS = [[("a", "+")], [("ab", "-"), ("b", "+"), ("aaa", "-")]]


@pytest.fixture(params=[t5, bart, llama, gpt2])
def model(request: pytest.FixtureRequest) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return request.param().eval()


def test_log_probabilities_are_those_of_each_text_alone(model: Any) -> None:
    listener = ModelListener(model, tokenizer())
    programs = ["a+", "b{2}[ab]"]
    together = listener.log_probs([listener.source(s) for s in SPECS], programs)
    for spec, program, ours in zip(SPECS, programs, together, strict=True):
        source = listener.tokenizer(listener.source(spec), add_special_tokens=listener.encoder_decoder)["input_ids"]
        target = [*listener.tokenizer(program, add_special_tokens=False)["input_ids"], 1]
        with torch.no_grad():
            if listener.encoder_decoder:
                first = model.config.decoder_start_token_id
                logits = model(input_ids=torch.tensor([source]),
                               decoder_input_ids=torch.tensor([[first, *target[:-1]]])).logits[0]
            else:
                logits = model(torch.tensor([source + target])).logits[0, len(source) - 1:-1]
        naive = logits.log_softmax(-1)[range(len(target)), target].sum()
        assert ours == pytest.approx(float(naive), abs=1e-4)


def test_models_learn_and_are_left_as_they_were(model: Any) -> None:
    model.train()
    next(model.modules()).training = False  # mixed
    next(model.parameters()).requires_grad_(False)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state, numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    listener = ModelListener(model, tokenizer(), max_new_tokens=4, training=FAST)
    trained = listener.train([(spec, "a") for spec in SPECS * 8], 0)
    assert trained.score(SPECS[0], ["a"])[0] > listener.score(SPECS[0], ["a"])[0] + 0.5
    assert torch.equal(next(trained.model.parameters()), next(model.parameters()))  # frozen
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()] == [m.training for m in trained.model.modules()]
    samples = trained.propose(SPECS, 6, 1)
    assert [len(s) for s in samples] == [6, 6] and samples == trained.propose(SPECS, 6, 1)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy).all()


def test_padding_does_not_change_what_a_short_spec_gets(model: Any) -> None:
    sharp = ModelListener(model, tokenizer(), temperature=1e-3, max_new_tokens=5)
    assert sharp.propose(SPECS[:1], 1, 0)[0] == sharp.propose(SPECS, 1, 0)[0]


def test_self_play_with_models_saves_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("greenery")
    domain = RegexDomain(alphabet="ab", atoms=("a", "b"), quantifiers=("", "+"), parts=1, longest=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        listener = ModelListener(t5(), tokenizer(), max_new_tokens=3, training=FAST)
        speaker = ModelSpeaker(llama(), tokenizer(), max_new_tokens=4, training=FAST)
    specs = random_specs(domain.sample(16, 0), domain.examples, 3, 0)
    assert all(spec and all(domain.agrees(p, u) for u in spec) for p, spec in specs)
    literal = listener.train(listener_rows(specs), 0), speaker.train(speaker_rows(specs), 0)
    play = SelfPlay(*literal, domain.agrees, rounds=2, programs_per_round=6, turns=2, listener_samples=6,
                    speaker_samples=30)
    whole = play.run(domain.sample, progress=False)
    assert all(domain.agrees(p, u) for one in whole.specs for p, spec in one for u in spec)
    dataclasses.replace(play, rounds=1).run(domain.sample, state_dir=tmp_path)
    resumed = play.run(domain.sample, state_dir=tmp_path)
    assert resumed.specs == whole.specs
    assert all(map(torch.equal, resumed.listener.model.state_dict().values(),
                   whole.listener.model.state_dict().values()))
    whole.listener.save_pretrained(tmp_path / "final")
    again = ModelListener(transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "final"), tokenizer())
    assert again.score(SPECS[0], ["a"]) == pytest.approx(whole.listener.score(SPECS[0], ["a"]), abs=1e-5)
    ranked = rank(whole.listener, [[("a", "+")], [("a", "+"), ("b", "+")]], domain.agrees, n=30)
    assert [s for _, s in ranked[0]] == sorted((s for _, s in ranked[0]), reverse=True)
    assert len({p for p, _ in ranked[0]}) == len(ranked[0]) and all(domain.agrees(p, ("a", "+")) for p, _ in ranked[0])
    alone = whole.listener.rank([("a", "+")], domain.agrees, n=30)
    by_rsa = rank_by_rsa(whole.listener, whole.speaker, [[("a", "+")]], domain.agrees, n=30, heard=5)[0]
    assert {p for p, _ in by_rsa} == {p for p, _ in alone}


def test_rsa_at_inference_is_l1_over_the_last_example() -> None:
    class Said(Exhaustive):
        source = staticmethod(str)

        def log_probs(self, sources: Any, programs: Any) -> list[float]:
            return [-float(len(p)) for p in programs]

    spec = [("b", "-"), ("aa", "+")]
    ranked = rank_by_rsa(Said(PROGRAMS), Exhaustive(UTTERANCES), [spec], agrees, n=10, heard=10)[0]  # type: ignore[arg-type]
    programs = [p for p in PROGRAMS if all(agrees(p, u) for u in spec)]
    columns = [spec[-1], *(u for u in UTTERANCES if u not in spec)]
    last = rsa(agreement(programs, columns, agrees)).L1[:, 0]
    assert dict(ranked) == pytest.approx(dict(zip(programs, last, strict=True)))
    assert [s for _, s in ranked] == sorted(last, reverse=True)


def test_peft_models_train_the_adapter_alone() -> None:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    speaker = ModelSpeaker(wrapped, tokenizer(), max_new_tokens=4, training=FAST)
    trained = speaker.train([("a", [], ("a", "+"))] * 8, 0)
    changed = {n for (n, a), b in zip(wrapped.state_dict().items(), trained.model.state_dict().values(), strict=True)
               if not torch.equal(a, b)}
    assert changed and all("lora" in name for name in changed)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ModelListener(torch.nn.Linear(1, 1), tokenizer()), "expected a model of transformers with generate"),
    (lambda: ModelListener(t5(), object()), "expected one with an end-of-text token"),
    (lambda: ModelListener(t5(), tokenizer(), top_p=0), r"expected top_p in \(0, 1\]"),
    (lambda: ModelListener(t5(), tokenizer()).train([], 0), "training: expected pairs of source and target, got none"),
])
def test_bad_models(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
