"""Every concept of the survey as an example that runs on your model: ``print(show(model))``.

``show(model, only=["calibration"])`` shows one. Causal models, local or behind a server, run all but the training
strategies, which need a local one; a masked model runs those that need no generation and no demonstrations in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from looseleaf import Example
from looseleaf.errors import did_you_mean
from looseleaf_prompting_survey.answers import PromptComposer, PromptDecomposer, search, shared_prompts, spans
from looseleaf_prompting_survey.augment import PromptAugmenter
from looseleaf_prompting_survey.ensemble import distil, fit_ensemble
from looseleaf_prompting_survey.templates import mine_templates, paraphrase
from looseleaf_prompting_survey.training import STRATEGIES, tune
from looseleaf_text import (
    CalibratedPrompt,
    LanguageModel,
    LocalModel,
    MaskedModel,
    Template,
    TextPrompt,
    TextTask,
    Verbalizer,
    calibrate,
)

GOOD = ("A wonderful evening, I laughed until I cried.", "The best cast of the year, and a story that moves.",
        "Warm, clever and beautifully shot.", "I would see it again tomorrow.")
BAD = ("Two hours that I will never get back.", "The plot is thin and the jokes are stale.",
       "A dull film with a worse ending.", "I left before the end and was glad of it.")
FILMS = TextTask(
    "films", train=[Example({"text": t}, label) for pair in zip(GOOD, BAD, strict=True)
                    for t, label in zip(pair, ("positive", "negative"), strict=True)],
    test=[Example({"text": "I loved every minute of it."}, "positive"),
          Example({"text": "It bored me to tears."}, "negative")],
    labels={"positive": " great", "negative": " bad"}, template="Review: {text}", answer_prefix="It was")
"""A small task, so that every example runs on nothing but a model."""

CLOZE = Template("[X] Overall, it was a [Z] film.")
PREFIX = Template("Review: [X]\nIn one word, the film was[Z]")
ANSWERS = Verbalizer.of({"positive": ["great", "good", "wonderful"], "negative": ["bad", "terrible", "boring"]})


def prompt_addition(model: LanguageModel) -> str:
    """x becomes x', a text with an answer slot; filled with an answer it is a filled prompt."""
    x = FILMS.test[0]
    prompt = CLOZE.fill(x)
    return f"x: {x.inputs['text']}\nx': {prompt}\nanswered: {prompt.fill(answers='great').filled}"


def answer_search(model: LanguageModel) -> str:
    """The likeliest answer of the answer space, and one drawn from it."""
    best = search(PREFIX, FILMS.test, model, ANSWERS)
    drawn = search(PREFIX, FILMS.test, model, ANSWERS, how="sample")
    return "\n".join(f"{x.inputs['text']} -> {b.answer} (argmax), {d.answer} (sampled)"
                     for x, b, d in zip(FILMS.test, best, drawn, strict=True))


def answer_mapping(model: LanguageModel) -> str:
    """Several answers stand for one label; their probabilities are added."""
    rows = FILMS.class_scores(PREFIX.to_prompt(ANSWERS).on(model), FILMS.test)
    return "\n".join(f"{x.inputs['text']} -> " + ", ".join(f"{label} {math.exp(v):.2f}" for label, v in
                                                 zip(FILMS.labels or {}, row, strict=True))
                     for x, row in zip(FILMS.test, rows, strict=True))


def cloze_prompt(model: LanguageModel) -> str:
    """The answer stands inside: a masked model sees both sides, a causal one scores what follows as well."""
    answers = search(CLOZE, FILMS.test, model, ANSWERS)
    return "\n".join(f"{CLOZE.fill(x, a.answer).filled} ({a.label})" for x, a in zip(FILMS.test, answers, strict=True))


def prefix_prompt(model: LanguageModel) -> str:
    """The answer ends the prompt and is not restricted: the model says what it likes."""
    template = Template("The capital of [X] is[Z]")
    france = Example({"text": "France"})
    return template.fill(france, search(template, [france], model, max_tokens=6)[0].answer).filled


def prompt_mining(model: LanguageModel) -> str:
    """Templates mined between inputs and answers in a text."""
    corpus = ["Paris is the capital of France.", "Rome is the capital of Italy.", "France, whose capital is Paris."]
    return "\n".join(t.text for t in mine_templates(corpus, [("France", "Paris"), ("Italy", "Rome")]))


def prompt_paraphrasing(model: LanguageModel) -> str:
    """The model rewrites the words of a template."""
    template = Template("Say in one word what this person thinks of the film.\n[X]\nAnswer:[Z]")
    return "\n--\n".join(t.text for t in paraphrase(template, model, 3)) or "(nothing new)"


def ensembling(model: LanguageModel) -> str:
    """Three wordings, averaged with weights fitted on a few examples; what they predict teaches another model."""
    members = [t.to_prompt(FILMS.labels) for t in (
        PREFIX, Template("[X]\nThe film was[Z]"), Template("A friend said: [X] So I think the film is[Z]"))]
    ensemble = fit_ensemble(members, FILMS, model, FILMS.train)
    labelled = distil(ensemble, model, [Example({"text": "What a treat."})])[0]
    return (f"weights {', '.join(f'{w:.2f}' for w in ensemble.weights or [])}; "
            f"distilled: {labelled.inputs['text']} -> {labelled.target}")


def augmentation(model: LanguageModel) -> str:
    """Answered prompts first: two of each class, in the order with the most even predictions."""
    augmenter = PromptAugmenter(shots=4, order="entropy", permutations=4)
    prompt = augmenter.augment(TextPrompt.for_task(FILMS), FILMS, model)
    assert isinstance(prompt, TextPrompt)
    return prompt.render(FILMS.test[0])


def composition(model: LanguageModel) -> str:
    """Two sub-prompts in one text; a rule makes one output of both answers."""
    first = (Template("[X]\nThe speaker is[Z:mood]"), Verbalizer.of({"happy": " happy", "unhappy": " angry"}))
    second = (Template(" and will[Z:plan]"), Verbalizer.of({"again": " come again", "never": " never come back"}))
    composer = PromptComposer.of([first, second], lambda z: "praise" if z["mood"] == "happy" and z["plan"] == "again"
                                 else "blame" if z["mood"] == "unhappy" and z["plan"] == "never" else "unclear")
    return "\n".join(f"{x.inputs['text']} -> " + ", ".join(
        f"{y} {p:.2f}" for y, p in composer.outputs(x, model).items()) for x in FILMS.test)


def decomposition(model: LanguageModel) -> str:
    """One question about every span of a sentence."""
    decomposer = PromptDecomposer(Template("Sentence: [X]\nIn this sentence, {span} is a[Z]"), Verbalizer.of(
        {"person": " person", "place": " place", "other": " thing"}), spans(longest=1))
    return ", ".join(f"{part['span']}: {label}" for part, label, _ in decomposer.run(
        Example({"text": "Mary flew to Paris"}), model))


def sharing(model: LanguageModel) -> str:
    """Two tasks whose prompts begin alike."""
    templates = shared_prompts(Template("You read reviews of films.\n[X]\n"), {
        "sentiment": Template("Feeling:[Z]"), "length": Template("Length of the review:[Z]")})
    return "\n--\n".join(f"{task}: {template.text!r}" for task, template in templates.items())


def calibration(model: LanguageModel) -> str:
    """A prompt's bias on content-free inputs, and predictions before and after removing it."""
    plain = PREFIX.to_prompt(FILMS.labels)
    calibrated = calibrate(plain, FILMS, model)
    assert isinstance(calibrated, CalibratedPrompt)
    before, after = (FILMS.evaluate(p.on(model)).predictions for p in (plain, calibrated))
    leaning = ", ".join(f"{label} {math.exp(v):.2f}" for label, v in
                        zip(FILMS.labels or {}, calibrated.offsets, strict=True))
    return f"without content: {leaning}\nbefore {before}, after {after}"


def training_strategies(model: LanguageModel) -> str:
    """Five strategies, told apart by what moves; soft tokens alone are trained here, for two steps."""
    assert isinstance(model, LocalModel)
    lines = [f"{s.name}: prompt {'yes' if s.prompt else 'no'}, model {'moves' if s.model_moves else 'stays'}, "
             f"soft tokens {'move' if s.prompt_moves else 'none'}" for s in STRATEGIES.values()]
    losses = tune("fixed-LM prompt tuning", model, FILMS, steps=2, lr=0.01, soft_tokens=2).losses
    return "\n".join([*lines, f"fixed-LM prompt tuning, losses of two steps: {losses[0]:.3f}, {losses[1]:.3f}"])


CONCEPTS: dict[str, Callable[[LanguageModel], str]] = {
    f.__name__.replace("_", " "): f for f in (
        prompt_addition, answer_search, answer_mapping, cloze_prompt, prefix_prompt, prompt_mining, prompt_paraphrasing,
        ensembling, augmentation, composition, decomposition, sharing, calibration, training_strategies)}
"""Name -> example."""

GENERATING = ("prefix prompt", "prompt paraphrasing")
LOCAL = ("training strategies",)


def _runs_on(name: str, model: LanguageModel) -> bool:
    return (name not in GENERATING or not isinstance(model, MaskedModel)) and (
        name not in LOCAL or isinstance(model, LocalModel))


def run(model: LanguageModel, only: Sequence[str] | None = None) -> dict[str, str]:
    """Concept -> the text of its example, for all concepts that can run on this model or those named.

    Raises:
        ValueError: an unknown concept, or one that cannot run on this model.
    """
    for name in only or ():
        if name not in CONCEPTS:
            raise ValueError(f"concept: expected {', '.join(CONCEPTS)}, got {name!r}."
                             + did_you_mean(name, CONCEPTS))
        if not _runs_on(name, model):
            raise ValueError(f"the example of {name!r}: expected "
                             + ("a LocalModel" if name in LOCAL else "a model that generates")
                             + f", got a {type(model).__name__}")
    names = [name for name in CONCEPTS if _runs_on(name, model)] if only is None else list(only)
    return {name: CONCEPTS[name](model) for name in names}


def show(model: LanguageModel, only: Sequence[str] | None = None) -> str:
    """The examples as one text, each under its name and what it shows."""
    return "\n\n".join(f"## {name}\n{(CONCEPTS[name].__doc__ or '').strip()}\n{text}"
                       for name, text in run(model, only).items())
