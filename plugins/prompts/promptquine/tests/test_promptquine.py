"""What is special to PromptQuine and TAPruning, on the toy model of the kit."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from looseleaf import Budget
from looseleaf_promptquine import PromptQuine, TAPruning
from looseleaf_promptquine.prompt_tokens import PromptTokens, length, without
from looseleaf_promptquine.search import Search, accuracy, reward
from looseleaf_text import CalibratedPrompt, ChatPrompt, LanguageModel, TextPrompt, TextTask
from looseleaf_text.testing import ASKED, ToyLanguageModel, toy_task

SMALL: dict[str, Any] = {"population_size": 8, "reproduction_size": 10, "max_prompts": 60, "min_prompt_length": 5}


def run(optimizer: Any, model: LanguageModel | None = None, task: TextTask | None = None, **more: Any) -> Any:
    return optimizer.optimize(task or toy_task(), model or ToyLanguageModel(), progress=False, **more)


# -- fitness ------------------------------------------------------------------------------------------------------

def test_reward_by_hand() -> None:
    log_probs = [[math.log(p) for p in row] for row in ([0.6, 0.2], [0.5, 0.3], [0.1, 0.3])]
    golds = [0, 1, 1]
    # among the labels 0.75 to 0.25, 0.625 to 0.375, 0.25 to 0.75; class 0: 0.5 * 200; class 1: mean of -0.25 * 180 and
    # 0.5 * 200
    assert reward(log_probs, golds) == pytest.approx((100 + (-45 + 100) / 2) / 2)
    assert accuracy(log_probs, golds) == pytest.approx(2 / 3)
    three = [math.log(p) for p in (0.5, 0.1, 0.4)]
    assert reward([three], [0]) == pytest.approx(20.0)  # against the best of the others
    assert accuracy([[-1.0, -1.0]], [1]) == 0.0  # a tie goes to the first label, as in Task.evaluate


def test_one_confident_mistake_weighs_no_more_than_a_probability_can() -> None:
    """The authors' reward on 16 examples: 15 right by 0.5 nats and one surely wrong; then all right by 0.2."""
    surely = [[-0.474, -0.974]] * 15 + [[-12.0, -0.00001]]
    barely = [[-0.6, -0.8]] * 16
    assert reward(surely, [0] * 16) == pytest.approx(34.67, abs=0.05)
    assert reward(barely, [0] * 16) == pytest.approx(19.93, abs=0.05)


class PruningOfForty:
    """What ``_evolve`` needs of a search, for prompts of 40 tokens whose fitness is a function of their number."""

    def __init__(self, fitness_of: Any) -> None:
        self.fitness_of, self.rng, self.visited = fitness_of, random.Random(0), dict[str, None]()
        self.prompt_tokens = SimpleNamespace(full="1" * 40, text=lambda mask: mask)

    def evaluate(self, masks: Any) -> None:
        self.visited.update(dict.fromkeys(masks))

    def was_visited(self, mask: str) -> bool:
        return mask in self.visited

    def fitness(self, mask: str) -> float:
        return float(self.fitness_of(mask.count("1")))

    def successive_halving(self, masks: Any, stages: int) -> Any:
        return masks


@pytest.mark.parametrize("mode", ["GGA", "SSGA"])
@pytest.mark.parametrize("fitness_of", [lambda n: n, lambda n: 0], ids=["every-pruning-hurts", "none-matters"])
def test_the_population_shrinks_even_where_pruning_does_not_help(mode: Any, fitness_of: Any) -> None:
    search, generations = PruningOfForty(fitness_of), list[list[float]]()
    PromptQuine(mode=mode, max_prompts=600)._evolve(search, generations)  # type: ignore[arg-type]
    assert generations[0][1] == 40 and generations[-1][1] < 30
    assert [mean for _, mean, *_ in generations] == sorted((mean for _, mean, *_ in generations), reverse=True)


# -- tokens -------------------------------------------------------------------------------------------------------

def test_slots_are_protected_and_tokens_join() -> None:
    template = 'Say {"a": 1} of {first} and {second}\nLabel:'
    prompt_tokens = PromptTokens.of(template, {"first", "second"}, ToyLanguageModel().token_texts)
    assert prompt_tokens.text(prompt_tokens.full) == template
    bare = prompt_tokens.text("0" * len(prompt_tokens.full))
    assert bare.replace("{first}", "").replace("{second}", "").strip() == "" and "{first}" in bare
    rng = random.Random(0)
    for _ in range(50):
        mask = "".join(rng.choice("01") for _ in prompt_tokens.full)
        text = prompt_tokens.text(mask)
        assert "{first}" in text and "{second}" in text
        kept = [prompt_tokens.texts[p] for p, bit in zip(prompt_tokens.prunable, mask, strict=True) if bit == "1"]
        at = 0
        for piece in kept:  # in order
            at = text.index(piece, at) + len(piece)
    with pytest.raises(ValueError, match="no slot"):
        PromptTokens.of("nothing", {"text"}, ToyLanguageModel().token_texts)
    with pytest.raises(ValueError, match="nothing to prune"):
        PromptTokens.of("{text}", {"text"}, ToyLanguageModel().token_texts)


def test_without() -> None:
    assert without("11011", [0, 3]) == "01001" and length("01001") == 2


# -- the searches -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [
    lambda: PromptQuine(**SMALL), lambda: PromptQuine(**SMALL, mode="SSGA"),
    lambda: PromptQuine(**SMALL, initialize_duplicate=False), lambda: PromptQuine(**SMALL, reward_driven=False),
    lambda: TAPruning(max_prompts=60), lambda: TAPruning(max_prompts=60, shuffle=True)])
def test_searches_improve_on_their_start(make: Callable[[], Any]) -> None:
    gains = []
    for seed in range(6):
        prompt = run(make(), seed=seed)
        info = prompt.info
        assert info["evaluations"] <= 60 and info["stopped"] == "done"
        assert len(info["explored"]) == info["evaluations"]
        assert info["tokens"] <= info["start_tokens"] and "{text}" in prompt.text
        best = max(e[1] for e in info["explored"])
        gains.append(best - info["start_fitness"])
        calls, values = zip(*info["history"], strict=True)
        assert values[0] == info["start_fitness"] and values[-1] == best and list(values) == sorted(values)
        assert list(calls) == sorted(calls) and calls[-1] == info["evaluations"] * info["examples"]["fitness"]
    assert min(gains) >= 0 and sum(g > 0 for g in gains) >= 3  # accuracy can be full at the start


def test_lineages_only_lose_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    parents: list[tuple[list[str], list[str]]] = []
    plain = PromptQuine._offspring

    def watch(self: Any, rng: Any, search: Any, population: list[str], wanted: int) -> list[str]:
        out = plain(self, rng, search, population, wanted)
        parents.append((list(population), out))
        return out

    monkeypatch.setattr(PromptQuine, "_offspring", watch)
    prompt = run(PromptQuine(**SMALL), seed=1)
    assert len(parents) > 3
    for population, children in parents:
        for child in children:
            assert any(0 < length(p) - length(child) <= 4 and all(
                a == "1" for a, b in zip(p, child, strict=True) if b == "1") for p in population)
    generations = prompt.info["generations"]
    assert [g[4] for g in generations] == sorted(g[4] for g in generations)
    assert generations[-1][1] < generations[0][1]


def test_search_ends_at_the_shortest_mean_length() -> None:
    prompt = run(PromptQuine(population_size=8, reproduction_size=10, min_prompt_length=8))
    assert prompt.info["generations"][-1][1] <= 8 < prompt.info["generations"][-2][1]
    assert run(PromptQuine(min_prompt_length=1000)).info["evaluations"] == 1


def test_search_ends_when_the_neighbourhood_is_used_up() -> None:
    task = dataclasses.replace(toy_task(), template="{text}", answer_prefix=" so")
    prompt = run(PromptQuine(min_prompt_length=0), task=task, start=TextPrompt("a b {text} so", labels=task.labels))
    assert prompt.info["stopped"] == "done" and prompt.info["evaluations"] <= 2 ** 4


def test_a_given_start_is_pruned() -> None:
    start = TextPrompt.for_task(toy_task(), "Tell me honestly what is felt here.", toy_task().train[:2])
    prompt = run(PromptQuine(**SMALL), start=start)
    assert prompt.info["start_text"] == start.as_template()


def test_demonstrations_are_not_among_the_fitness_examples() -> None:
    search = Search(PromptQuine(), toy_task(), ToyLanguageModel(), shots=3, num_shots=16, reward_driven=True,
                    rerank_top=0.1, most=None, progress=False)
    assert len(search.start.exemplars) == 3
    assert not {id(e) for e in search.start.exemplars} & {id(e) for e in search.fit}
    assert {id(e) for e in search.held} == {id(e) for e in toy_task().dev} or len(search.held) == 16


def test_reranking_without_dev_uses_the_other_half() -> None:
    task = dataclasses.replace(toy_task(size=32), dev=[])
    prompt = run(PromptQuine(**SMALL), task=task)
    assert prompt.info["examples"] == {"fitness": 15, "heldout": 16}
    assert prompt.info["heldout_fitness"] is not None


def test_reranking_looks_at_the_top_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = Search._values

    def watch(self: Any, masks: Any, examples: Any) -> Any:
        if examples is self.held:
            asked.append(len(masks))
        return plain(self, masks, examples)

    monkeypatch.setattr(Search, "_values", watch)
    prompt = run(PromptQuine(**SMALL))
    assert sum(asked) == 6 and prompt.info["evaluations"] == 60
    fittest = run(PromptQuine(**SMALL, rerank_top=0.0))
    assert sum(asked) == 6 and fittest.info["fitness"] == max(e[1] for e in fittest.info["explored"])


@pytest.mark.parametrize("make", [lambda: PromptQuine(), lambda: TAPruning()])
@pytest.mark.parametrize("calls", [1, 40, 333])
def test_budgets_leave_room_for_reranking(make: Callable[[], Any], calls: int) -> None:
    model, budget = ToyLanguageModel(), Budget(calls=calls)
    prompt = run(make(), model, budget=budget)
    assert model.calls == budget.used["calls"] <= calls
    if prompt.info["stopped"] == "budget: calls" and prompt.info["evaluations"]:
        assert prompt.info["heldout_fitness"] is not None
        assert calls - model.calls < 2 * 16 + 16 * 2  # nothing worth a further prompt is left


def test_threshold_accepting_with_negative_fitness() -> None:
    class Liar(ToyLanguageModel):
        """Always wrong: every margin is negative."""

        def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
            self._request(prefixes)
            said = [p.split()[-8:] for p in prefixes]
            good = [any(w in ("lovely", "bright", "warm", "clever", "fresh", "brisk") for w in s) for s in said]
            return [[-5.0 - len(p) / 100, -1.0] if g else [-1.0, -5.0 - len(p) / 100]
                    for p, g in zip(prefixes, good, strict=True)]

    prompt = run(TAPruning(rerank_top=0.0), Liar())
    assert prompt.info["start_fitness"] < 0
    # Shorter is better for this model, so everything can go.
    assert prompt.info["tokens"] == 0


def test_generation_tasks_take_the_metric() -> None:
    prompt = run(PromptQuine(**SMALL), task=toy_task(generation=True))
    assert 0 <= prompt.info["fitness"] <= 1 and prompt.info["fitness"] == prompt.info["accuracy"]


def test_calibration_is_stored_and_respected() -> None:
    task, model = toy_task(), ToyLanguageModel()
    prompt = run(PromptQuine(**SMALL, calibrate=True), model, task)
    assert isinstance(prompt, CalibratedPrompt)
    assert len(prompt.offsets) == 2 and prompt.offsets[0] != prompt.offsets[1]
    fit = Search(PromptQuine(), task, model, shots=1, num_shots=16, reward_driven=True, rerank_top=0.1, most=None,
                 progress=False).fit
    assert task.evaluate(prompt.on(model), fit).score == prompt.info["accuracy"]
    rows, plain = prompt.on(model).scores(task.dev), prompt.prompt.on(model).scores(task.dev)
    assert rows[0] == [a - b for a, b in zip(plain[0], prompt.offsets, strict=True)]


def test_halving_saves_calls_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    considered: list[int] = []
    plain = Search.successive_halving

    def watch(self: Any, masks: list[str], stages: int) -> list[str]:
        out = plain(self, masks, stages)
        considered.append(len(masks))
        return out

    monkeypatch.setattr(Search, "successive_halving", watch)
    task = toy_task(size=32, generation=True)
    few, many = ToyLanguageModel(), ToyLanguageModel()
    halved = PromptQuine(**SMALL, halving_stages=3)
    prompt = run(halved, few, task, budget=Budget(calls=3000))
    looked_at = sum(considered)
    full = run(PromptQuine(**SMALL), many, task, budget=Budget(calls=3000))
    # Half of the offspring are given up after a quarter of the examples, half of the others after a half.
    assert few.calls / looked_at < 0.7 * many.calls / full.info["evaluations"]
    killed = run(halved, task=task, budget=Budget(calls=300), state_dir=tmp_path)
    assert killed.info["stopped"] == "budget: calls"
    again = run(halved, task=task, budget=Budget(calls=3000), state_dir=tmp_path)
    assert (again.text, again.info["evaluations"]) == (prompt.text, prompt.info["evaluations"])


@pytest.mark.parametrize(("field", "wrong"), [
    ("mode", "XYZ"), ("mutation_sizes", ()), ("mutation_sizes", (0,)), ("tournament", 0.0), ("rerank_top", 1.5),
    ("num_shots", 1), ("population_size", 0), ("shots", 0), ("halving_stages", 0)])
def test_bad_parameters(field: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=rf"PromptQuine\.{field}: expected .*, got"):
        PromptQuine(**{field: wrong})


def test_start_without_a_slot_gets_the_tasks_template() -> None:
    prompt = run(PromptQuine(**SMALL), start=TextPrompt.for_task(toy_task(), "Judge the film."))
    assert prompt.info["start_text"] == f"Judge the film.\n\n{ASKED}\nReview: {{text}}\nSentiment:"
    with pytest.raises(ValueError, match="ChatPrompt"):
        run(PromptQuine(**SMALL), start=ChatPrompt([{"role": "user", "content": "{text}"}]))


# -- stopping and resuming ----------------------------------------------------------------------------------------

SCRIPT = """
    import sys
    from looseleaf_text.testing import ToyLanguageModel, toy_task
    from looseleaf_promptquine import PromptQuine, TAPruning
    cls = {"PromptQuine": PromptQuine, "TAPruning": TAPruning}[sys.argv[1]]
    print("ready", flush=True)
    prompt = cls(max_prompts=150).optimize(toy_task(), ToyLanguageModel(delay=float(sys.argv[3])), seed=5,
                                           state_dir=sys.argv[2], progress=False)
    print(repr((prompt.text, prompt.info["fitness"], prompt.info["evaluations"])))
"""


@pytest.mark.parametrize("name", ["PromptQuine", "TAPruning"])
def test_kill_9_and_resume(name: str, tmp_path: Path) -> None:
    def start(folder: str, delay: float) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", textwrap.dedent(SCRIPT), name, str(tmp_path / folder),
                                 str(delay)], stdout=subprocess.PIPE, text=True, env={**os.environ})

    expected = start("whole", 0.0).communicate(timeout=120)[0].splitlines()[-1]
    slow = start("killed", 0.002)
    state = tmp_path / "killed" / "state.json"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (state.exists() and len(state.read_text()) > 3000):
        time.sleep(0.02)
    slow.send_signal(signal.SIGKILL)
    slow.communicate(timeout=30)
    assert slow.returncode == -signal.SIGKILL, "it should still have been at work"
    assert start("killed", 0.0).communicate(timeout=120)[0].splitlines()[-1] == expected


def test_a_search_with_more_budget_goes_on(tmp_path: Path) -> None:
    first = run(PromptQuine(**SMALL), budget=Budget(calls=300), state_dir=tmp_path)
    assert first.info["stopped"] == "budget: calls"
    model = ToyLanguageModel()
    more = run(PromptQuine(**SMALL), model, budget=Budget(calls=5000), state_dir=tmp_path)
    assert more.info["stopped"] == "done" and more.info["evaluations"] == 60
    fresh = ToyLanguageModel()
    assert run(PromptQuine(**SMALL), fresh).text == more.text
    assert model.calls < fresh.calls


def test_on_a_local_model() -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    from looseleaf_text import LocalModel

    made = Tokenizer(models.WordLevel({"<s>": 0, **{chr(c): c - 31 for c in range(32, 127)}, "\n": 96},
                                      unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    made.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=400)).eval()
    model = LocalModel(network, tokenizer)
    optimizer = PromptQuine(population_size=4, reproduction_size=5, max_prompts=12)
    prompt = run(optimizer, model, task=toy_task(size=8), seed=2)
    # Text and tokens say the same: scoring the stored prompt anew gives the fitness found.
    again = Search(optimizer, toy_task(size=8), model, shots=1, num_shots=16, reward_driven=True, rerank_top=0.1,
                   most=None, seed=2, progress=False)
    again.evaluate([prompt.info["mask"]])
    assert again.fitness(prompt.info["mask"]) == pytest.approx(prompt.info["fitness"], rel=1e-3)
    assert again.prompt_tokens.text(prompt.info["mask"]) == prompt.text
    assert model.forwarded < model.tokens


def test_through_a_server() -> None:
    """Against an OpenAI-compatible server that echoes log-probabilities, and by what it generates."""
    from looseleaf_text import EndpointModel
    from looseleaf_text.testing.servers import toy_server

    optimizer = PromptQuine(population_size=3, reproduction_size=4, max_prompts=8)
    task = toy_task(size=8)
    local = run(optimizer, task=task)
    with toy_server() as url:
        remote = run(optimizer, EndpointModel(url, "toy"), task)
        by_text = run(dataclasses.replace(optimizer, reward_driven=False),
                      EndpointModel(url, "toy", scoring="generate"), task)
    assert (remote.text, remote.info["fitness"]) == (local.text, pytest.approx(local.info["fitness"]))
    by_score = run(dataclasses.replace(optimizer, reward_driven=False), task=task)
    assert by_text.info["start_accuracy"] == by_score.info["start_accuracy"]
