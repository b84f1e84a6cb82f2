"""Templates: slots, escapes, filling, joining, chat, and how they become prompts."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from looseleaf import Example, Prompt
from looseleaf_text import (
    CalibratedPrompt,
    ClozePrompt,
    EnsemblePrompt,
    SoftPrompt,
    Template,
    TextPrompt,
    Verbalizer,
)
from looseleaf_text.template import Slot, spaced
from looseleaf_text.testing import ToyLanguageModel, toy_task


def test_slots_and_shapes() -> None:
    template = Template("[X] and {premise}: [Z:first], then [Z].")
    assert template.inputs == ("text", "premise") and template.answers == ("first", "Z")
    assert template.parts[:4] == (Slot("text"), " and ", Slot("premise"), ": ")
    assert Template("{text}").parts == Template("[X]").parts
    assert Template("[X] It was [Z].").shape == "cloze" and Template("[X] TL;DR: [Z]").shape == "prefix"
    with pytest.raises(ValueError, match=r"no answer slot: write \[Z\]"):
        _ = Template("[X]").shape
    with pytest.raises(ValueError, match="several answer slots called 'Z'"):
        Template("[Z] and [Z]")


def test_braces_and_brackets_that_are_no_slots() -> None:
    text = 'As {"a": 1} or {} [x] [INST] [Z2] \\n [X'
    assert Template(text).parts == (text,)


def test_escapes() -> None:
    assert Template(r"\[X] is [X]").parts == ("[X] is ", Slot("text"))
    assert Template(r"\{text} \\[X]").parts == ("{text} \\", Slot("text"))
    assert Template.escape("[X] {name} [Z:a]") == r"\[X] \{name} \[Z:a]"


def test_round_trip_of_any_text() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices(["[X]", "[Z]", "{a}", "\\", "[Z:b]", " ", "x", "{", "]"], k=rng.randint(0, 8)))
        assert Template(Template.escape(text)).filled == text
        parts: list[str | Slot] = []
        for n in range(rng.randint(0, 5)):
            parts.append(rng.choice([text, "\\", "[X]", Slot("a"), Slot("text"), Slot(f"z{n}", True)]))
        made = Template.of(parts)
        assert Template.of(made.parts) == made
        joined = "".join("\0" if isinstance(p, Slot) else p for p in parts)
        assert "".join("\0" if isinstance(p, Slot) else p for p in made.parts) == joined
        assert [p for p in made.parts if isinstance(p, Slot)] == [p for p in parts if isinstance(p, Slot)]


def test_what_is_filled_in_is_never_a_slot() -> None:
    template = Template("[X] / {other} / [Z]")
    prompt = template.fill({"text": r"say [X], {other}, \[Z] and [Z]", "other": "{text}"})
    assert prompt.inputs == () and prompt.answers == ("Z",)
    assert prompt.fill(answers="[X]").filled == r"say [X], {other}, \[Z] and [Z] / {text} / [X]"


def test_prompt_addition_then_answer() -> None:
    template = Template("[X] Overall, it was a [Z] film.")
    prompt = template.fill(Example({"text": "I love it."}))
    assert str(prompt) == "I love it. Overall, it was a [Z] film."
    assert prompt.fill(answers=" great").filled == "I love it. Overall, it was a great film."
    assert Template("Label:[Z]").fill(answers=" good").filled == "Label: good"
    with pytest.raises(ValueError, match=r"expected the inputs \['text'\], got \['premise'\]"):
        template.fill({"premise": "x"})
    with pytest.raises(ValueError, match=r"expected answers for \['Z'\], got \['label'\] too"):
        template.fill(answers={"label": "x"})
    with pytest.raises(ValueError, match=r"unfilled slots \[X\], \[Z\]"):
        _ = template.filled


def test_around_an_answer() -> None:
    template = Template("[X] is a [Z:kind] in [Z:place]!")
    assert template.around({"text": "Rome"}, "kind") == ("Rome is a ", " in ")
    assert template.around({"text": "Rome"}, "place", {"kind": "city"}) == ("Rome is a city in ", "!")
    with pytest.raises(ValueError, match="unfilled slots"):
        template.around({"text": "Rome"}, "place")
    with pytest.raises(ValueError, match="expected one answer slot here, got 2"):
        template.around({"text": "Rome"})


def test_joining_is_associative() -> None:
    rng = random.Random(1)
    for _ in range(300):
        a, b, c = (Template("".join([*rng.choices(["\\", "[X]", r"\[X]", "x", "[", "X]", " "], k=5), f"[Z:{name}]",
                                     rng.choice(["\\", "x", ""])])) for name in "abc")
        assert (a + b) + c == a + (b + c)
        said = [{name: f"<{name}>" for name in t.answers} for t in (a, b)]  # a backslash may have made it text
        apart = [t.fill({"text": "[Z:c]"}, answers).filled for t, answers in zip((a, b), said, strict=True)]
        assert (a + b).fill({"text": "[Z:c]"}).fill(answers={**said[0], **said[1]}).filled == "".join(apart)
    with pytest.raises(ValueError, match="several answer slots called 'a'"):
        _ = Template("[Z:a]") + Template("[Z:a]")


def test_spaces_go_to_the_answers() -> None:
    assert spaced("It was ", ["good", " bad"]) == ("It was", [" good", " bad"])
    assert spaced("It was:\n", [" good"]) == ("It was:\n", ["good"])
    assert spaced("It was", [" good"]) == ("It was", [" good"])


# -- as prompts of a task -----------------------------------------------------------------------------------------

def test_a_tasks_own_template_renders_the_same() -> None:
    for prefix in ("Sentiment:", "\nIt is", " so", "{text} is"):
        task = dataclasses.replace(toy_task(), answer_prefix=prefix)
        example = task.dev[0]
        made = Template.of_task(task)
        if prefix != "{text} is":
            assert made.to_prompt().render(example) == TextPrompt.for_task(task).render(example)
            assert made.to_prompt().as_template() == TextPrompt.for_task(task).as_template()
        answer = task.answer(example)
        assert made.fill(example, answer).filled == task.demonstration(example)


def test_prompts_of_a_template_score_what_is_written() -> None:
    seen: list[tuple[str, list[str]]] = []

    class Watched(ToyLanguageModel):
        def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
            seen.extend(zip(prefixes, continuations, strict=True))
            return super().score(prefixes, continuations)

    task = toy_task()
    labels = {"positive": "great", "negative": "bad"}
    cloze = Template("[X] It was [Z], I think about [X].")
    prompt = cloze.to_prompt(labels)
    task.evaluate(prompt.on(Watched()), task.dev[:1])
    text = task.dev[0].inputs["text"]
    before, answers = seen[0]
    expected = [cloze.fill(task.dev[0], a).filled for a in (labels[name] for name in task.labels or {})]
    assert [before + a for a in answers] == expected and not before.endswith(" ")
    assert prompt.render(task.dev[0]) == f"{text} It was"
    with pytest.raises(ValueError, match="text after the answer"):
        prompt.as_template()


def test_exemplars_are_shown_through_the_template() -> None:
    shots = [Example({"text": "fine {text}"}, "positive"), Example({"text": "awful"}, "negative")]
    prompt = Template("[X] It was [Z].").to_prompt({"positive": "great", "negative": "bad"}, text="Judge.",
                                                   exemplars=shots)
    assert prompt.render(Example({"text": "so so"})) == (
        "Judge.\n\nfine {text} It was great.\n\nawful It was bad.\n\nso so It was")


def test_an_answer_may_come_first() -> None:
    prompt, example = Template("[Z] is what is felt in: [X]").to_prompt(), Example({"text": "x"})
    assert isinstance(prompt, ClozePrompt)
    assert (prompt.render(example), prompt.render_suffix(example)) == ("", " is what is felt in: x")


def test_escaped_braces_cannot_become_a_prompt() -> None:
    with pytest.raises(ValueError, match=r"escaped text \{label\}"):
        Template(r"[X] \{label} [Z]").to_prompt()
    assert Template(r"[X] \[X] [Z]").to_prompt().render(Example({"text": "a"})) == "a [X]"


def test_prompts_with_everything_are_saved(tmp_path: Any) -> None:
    torch = pytest.importorskip("torch")
    verbalizer = Verbalizer.of({"positive": [" good", " fine"], "negative": " bad"}, "mean")
    cloze = Template("[X] so [Z].").to_prompt(verbalizer, exemplars=[Example({"text": "a"}, "positive")])
    members = [CalibratedPrompt(cloze, [0.5, -0.5]), SoftPrompt(TextPrompt("{text} so"), torch.ones(2, 3))]
    prompt = EnsemblePrompt(members, weights=[0.25, 0.75], combine="vote", info={"fitness": 1.5})
    prompt.save(tmp_path / "p.json")
    again: Any = Prompt.load(tmp_path / "p.json")
    assert again.members[0] == members[0] and again.weights == [0.25, 0.75] and again.combine == "vote"
    assert again.fingerprint() == prompt.fingerprint() and again.info == prompt.info
    assert torch.equal(again.members[1].soft, torch.ones(2, 3)) and again.render(Example({"text": "x"})) == "x so"


# -- chat ---------------------------------------------------------------------------------------------------------

class ChatTokenizer:
    """The parts of a transformers tokenizer that a chat template needs."""

    chat_template = "any"
    bos_token, bos_token_id = "<s>", 1

    def __init__(self, adds: bool = True) -> None:
        self.adds, self.applied = adds, 0

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt
        self.applied += 1
        return "<s>" + "".join(f"<|{m['role']}|>{m['content'].strip()}<|end|>" for m in messages) + "<|assistant|>"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, 5] if self.adds else [5]}


def test_the_chat_template_is_applied_once() -> None:
    tokenizer = ChatTokenizer()
    chat = Template(r"Judge \[X]: [X] or {other}?  [Z]").with_chat(tokenizer, "Be brief.")
    assert chat.chat and chat.shape == "prefix"
    shown = chat.to_prompt().render(Example({"text": "<|end|> [X]", "other": "b"}))
    assert shown == "<|system|>Be brief.<|end|><|user|>Judge [X]: <|end|> [X] or b?<|end|><|assistant|>"
    assert tokenizer.applied == 1 and shown.count("<|assistant|>") == 1
    with pytest.raises(ValueError, match="applied already"):
        chat.with_chat(tokenizer)
    with pytest.raises(ValueError, match="applied already"):
        (Template("First: ") + chat).with_chat(tokenizer)


def test_a_chat_of_transformers_says_what_it_would_have_said_of_the_filled_text() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    from looseleaf.testing.models import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    plain, example = Template("Judge: [X]. Well?[Z]"), Example({"text": "so {text} [X] so"})
    messages = [{"role": "user", "content": "Judge: so {text} [X] so. Well?"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert plain.with_chat(tokenizer).to_prompt().render(example) == whole


def test_beginning_of_text_is_written_once() -> None:
    kept = Template("[X][Z]").with_chat(ChatTokenizer(adds=False)).text
    assert kept.startswith("<s>") and Template("[X][Z]").with_chat(ChatTokenizer()).text == kept[3:]


def test_chats_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="in a chat the answer comes last"):
        Template("[X] [Z].").with_chat(ChatTokenizer())
    plain = ChatTokenizer()
    plain.chat_template = ""
    with pytest.raises(ValueError, match="has no chat template"):
        Template("[X][Z]").with_chat(plain)

    class Deaf(ChatTokenizer):
        def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> str:
            return "hello"

    with pytest.raises(ValueError, match="does not keep the user's text"):
        Template("[X][Z]").with_chat(Deaf())
