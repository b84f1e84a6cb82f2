"""SA-ICL: schemas are written for solved examples once, and for each question written, retrieved, refined and used."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from looseleaf import Budget, BudgetExhausted, Example, Paper, Predictor, Prompt
from looseleaf.fingerprint import content_fingerprint
from looseleaf.plugin import In
from looseleaf.progress import bar
from looseleaf.prompts.optimizer import Search
from looseleaf.prompts.prompt import storable
from looseleaf_sa_icl.chat import Talk
from looseleaf_sa_icl.memory import ENCODERS, SchemaMemory, SolvedProblem
from looseleaf_sa_icl.problem import EXPLANATION, Option, choice, options, right_answer, show
from looseleaf_sa_icl.schema import TEMPLATES, Schema, SchemaTemplate
from looseleaf_text import LanguageModel, TextOptimizer, TextTask
from looseleaf_text.conversations import Conversation
from looseleaf_text.encoders import Choice, Encoder

if TYPE_CHECKING:
    Template = str | SchemaTemplate
else:
    Template = str  # all that the command line can be given

PAPER = Paper(
    title="Schema for In-Context Learning",
    authors=("Pan Chen", "S. Chen", "M. Wang", "S. X. Leong", "P. Fung", "V. Bernales", "A. Aspuru-Guzik"),
    year=2025, arxiv="2510.13905", code="https://github.com/ChenPanXYZ/schema-rssdat",
    summary="Uses one solved example more fully: as a schema by which the schema of your question is refined.")

RETRY_TEMPERATURE, VOTE_TEMPERATURE = 0.7, 0.7
"""Of further attempts at a schema that lacks fields (ours: at 0 the same text would come again), and of the paper's
self-consistency."""
ANSWER_TOKENS = 64
"""Longest choice that a server writes, beside the candidate's own tokens."""

ENDS = ('"}', '"\n}')
"""Where a schema ends that a local model writes."""

SOLVE = ("You are given a solved example with its schema, and then a new question with a preliminary schema. Refine "
         "the preliminary schema in view of the example, then give the best answer to the new question.")
SCHEMA_ONLY = ("You are given a solved example with its schema, and then a new question with its own schema. Use both "
               "to give the best answer to the new question.")
ONE_SHOT = "You are given a solved example, and then a new question. Give the best answer to the new question."
ZERO_SHOT = "You are given a question. Give the best answer to it."
REFINE_BELOW = "Refine the preliminary schema in view of the example below."
REFINE_ABOVE = "Refine the preliminary schema in view of the example above."


@storable
@dataclasses.dataclass
class SAICL(TextOptimizer):
    """Schema-activated in-context learning: one solved example, used through its schema.

    ``optimize`` lets the model write a schema of every training example, the answer in view, and embeds it. The prompt
    made of that asks three times for each question: (1) a preliminary schema; the example whose schema is nearest is
    retrieved; (2) the schema refined in view of that example; (3) the answer, example and refined schema in view.
    [paper, section on the method; what a message says, and how it is read, after the authors' code, in our words]

    Without ``activate`` the second call is left out; without ``use_schema`` the first two are, which is one-shot
    prompting with retrieval by the question's own text. Not here: associations of schemas with decaying weights, which
    no experiment of the paper uses.

    Args:
        template: fields of a schema: schema, physics, fact, step-back, least-to-most, chain-of-thought, or a
            :class:`SchemaTemplate` of your own. [the fields of "schema": code; the others after its templates]
        use_schema: write, retrieve by and show schemas; False is one-shot.
        activate: refine the question's schema in view of the example.
        top_k: examples shown; >= 1. [code]
        min_similarity: the lowest cosine at which an example is taken, in [-1, 1]. [code, which always reads 0]
        max_similarity: the highest, in [-1, 1]. [code, which always reads 1]
        include_answer: show the example's answer with it.
        fallback: where nothing is retrieved, answer without an example; False: no answer, which counts as wrong.
        self_consistency: so many refined schemas are drawn at temperature 0.7, and the answers to them vote (the paper
            draws 5); 0: one, at temperature 0. Drawing schemas and not answers is ours.
        max_reattempts: further attempts at a schema that lacks fields, or at an answer that is no candidate. [code]
        max_schema_tokens: longest schema; >= 1, and at most half of what the model can read. [code]
        encoder: what embeds schemas. "minilm": the sentence encoder of looseleaf-sa-icl[minilm]; "model": the language
            model's own ``embed``, each text a call; "auto": MiniLM where it is installed, else the model; any name of
            sentence-transformers (the code: Alibaba-NLP/gte-base-en-v1.5); or a function from texts to vectors.
        score: what a model that scores is scored on: the "number" of a candidate, or its "text", per token, which is
            nearer to the code (it restricts the output to the candidates' texts) and better for small models, many of
            which prefer one number whatever the question. [ours]
        batch: questions asked together. [ours]
    """

    template: Template = "schema"
    use_schema: bool = True
    activate: bool = True
    top_k: Annotated[int, In(">= 1")] = 1
    min_similarity: Annotated[float, In("[-1, 1]")] = 0.0
    max_similarity: Annotated[float, In("[-1, 1]")] = 1.0
    include_answer: bool = True
    fallback: bool = False
    self_consistency: Annotated[int, In(">= 0")] = 0
    max_reattempts: Annotated[int, In(">= 0")] = 3
    max_schema_tokens: Annotated[int, In(">= 1")] = 4096
    encoder: Choice = "auto"
    score: Literal["number", "text"] = "number"
    batch: Annotated[int, In(">= 1")] = 8
    paper: ClassVar[Paper] = PAPER

    def validate(self) -> None:
        """See :meth:`looseleaf.Plugin.validate`."""
        self.check("template", isinstance(self.template, SchemaTemplate) or self.template in TEMPLATES,
                   f"{', '.join(TEMPLATES)} or a SchemaTemplate")
        self.check("max_similarity", self.max_similarity >= self.min_similarity,
                   f"a number from min_similarity={self.min_similarity} on")
        self.check("encoder", isinstance(self.encoder, str) or callable(self.encoder), "a name or a function")
        self.check("self_consistency", not self.self_consistency or (self.activate and self.use_schema),
                   "0 where no schema is refined (activate and use_schema)")

    @property
    def fields(self) -> SchemaTemplate:
        """The template in use."""
        return self.template if isinstance(self.template, SchemaTemplate) else TEMPLATES[self.template]

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: embeddings of the toy model itself, which writes no schemas."""
        return {**super().conformance(),
                "make": lambda: cls(encoder="model", max_reattempts=1, max_schema_tokens=16, batch=2)}

    def identity(self, task: Any, model: Any, start: Prompt | None, seed: int) -> dict[str, Any]:
        """See :meth:`looseleaf.PromptOptimizer.identity`; a function that embeds is known by its name."""
        name, _ = ENCODERS.resolve(self.encoder, Talk(model)) if callable(self.encoder) else (self.encoder, None)
        identity = super().identity(task, model, start, seed)
        return {**identity, "parameters": {**identity["parameters"], "encoder": name, "template": repr(self.fields)}}

    def optimize(self, task: TextTask, model: LanguageModel, *, budget: Budget | None = None,
                 start: SchemaPrompt | None = None, seed: int = 0, state_dir: str | os.PathLike[str] | None = None,
                 progress: bool | None = None) -> SchemaPrompt:
        """Write and embed the schema of every training example; see :meth:`looseleaf.PromptOptimizer.optimize`.

        Examples are shown through the task's template; the input ``candidates`` holds what can be chosen (see
        :func:`multiple_choice`), ``explanation`` a worked one that is shown with the answer. ``start`` is a prompt
        whose memory is extended. Only ``task.train`` is read. ``info["fitness"]`` is the fraction of schemas with all
        fields: whether the model can write them at all.

        Raises:
            ValueError: no training examples; candidates that repeat, or a target that is not among them.
        """
        if start is not None and not isinstance(start, SchemaPrompt):
            raise ValueError(f"SAICL.start: expected None or a SchemaPrompt, got a {type(start).__name__}")
        self.check_model(model)
        task.validate(model)
        problems = [_solved(task, n, example) for n, example in enumerate(task.train)]
        folder = None if state_dir is None else Path(state_dir)
        search = Search(self, task, model, budget=budget, start=start, seed=seed, state_dir=folder, progress=progress)
        talk = Talk(search.model, folder and folder / "answers", remember=True)
        name, encode = ENCODERS.resolve(self.encoder, talk)
        memory = SchemaMemory(list(start.memory.items), start.memory.vectors) if start else SchemaMemory()
        writer = _Writer(self, talk)

        def add(items: Sequence[SolvedProblem]) -> None:
            try:
                texts, solved = [p.question for p in items], list(items)
                if self.use_schema:
                    schemas = writer.write([self._memory_request(p) for p in items])
                    texts = list(map(self.fields.text, schemas))
                    solved = [dataclasses.replace(p, schema=s) for p, s in zip(items, schemas, strict=True)]
                memory.add(solved, encode(texts))
            except BudgetExhausted:
                if len(items) == 1:
                    raise
                for item in items:  # as many as the rest of the budget pays for
                    add([item])

        with search:
            parts = [problems[at:at + self.batch] for at in range(0, len(problems), self.batch)]
            for part in parts[:search.done]:  # a run before this one asked for them: all is on disk
                add(part)
            for n in search.steps(len(parts)):
                add(parts[n])
        complete = [not self.fields.missing(item.schema) for item in memory.items] if self.use_schema else [True]
        prompt = SchemaPrompt(
            memory, dataclasses.replace(self, encoder=name), task.template, task.labels, task.max_tokens,
            tuple(task.stop), info=search.info(sum(complete) / max(1, len(complete)), max(1, len(memory)), encoder=name,
                             incomplete=complete.count(False), reattempts=writer.counts["reattempts"]))
        prompt.encode = encode if callable(self.encoder) else None
        return prompt

    def _memory_request(self, problem: SolvedProblem) -> Conversation:
        return [{"role": "system", "content": self.fields.system()},
                {"role": "user", "content": f"{problem.question}\n{_answer(problem)}"}]


@dataclasses.dataclass
class SchemaPrompt(Prompt):
    """A memory of solved problems with schemas; it makes the prompt of each question when it is asked.

    Attributes:
        memory: the problems.
        method: the parameters it works by.
        shown: how a question is shown, with slots, see :class:`looseleaf_text.TextTask`.
        labels: label -> answer; None: candidates stand for themselves, or the answer is free text.
        max_tokens, stop: of an answer in free text.
    """

    memory: SchemaMemory
    method: SAICL = dataclasses.field(default_factory=SAICL)
    shown: str = "{text}"
    labels: dict[str, str] | None = None
    max_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)

    def __post_init__(self) -> None:
        self.encode: Encoder | None = None

    def on(self, model: LanguageModel, *, encoder: Encoder | None = None,
           cache: str | os.PathLike[str] | None = None, progress: bool | None = False) -> SchemaPredictor:
        """See :meth:`looseleaf.Prompt.on`.

        Args:
            model: asked three times for each question; metered, if it is.
            encoder: the function that embedded the memory, where it was one and the prompt was loaded from disk.
            cache: a folder that keeps every answer of the model: a run that was stopped goes on, and is not paid twice.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: the memory is empty and there is no ``fallback``.
        """
        if not len(self.memory) and not self.method.fallback:
            raise ValueError("SchemaPrompt.memory: expected solved examples, got none (did the budget end before the "
                             "first?): give more budget, or fallback=True to answer without examples")
        talk = Talk(model, cache)
        known = encoder or self.encode
        if known is None and ":" in str(self.method.encoder):
            raise ValueError(f"encoder: expected the function {self.method.encoder} that embedded the memory, got "
                             "none: give it as prompt.on(model, encoder=...)")
        encode = known or ENCODERS.resolve(self.method.encoder, talk)[1]
        scored = self.labels is not None and self.method.fallback and not talk.serves
        return (ScoringPredictor if scored else SchemaPredictor)(self, talk, encode, progress)


@dataclasses.dataclass(frozen=True)
class Answer:
    """How one question was answered.

    Attributes:
        prediction: a label, a candidate or free text; None (of a task with labels) or "": no answer.
        schema, refined: the preliminary and the refined schema, where they were written.
        shown: numbers of the examples in the memory.
        similarities: their cosines; empty where the examples were given.
        messages: the last conversation, to which the model gave the answer; empty: it was not asked.
        scores: log-probability of each choice (with ``score="text"`` its mean over the tokens); None where the answer
            was written.
    """

    prediction: Any
    schema: Schema
    refined: Schema
    shown: tuple[int, ...]
    similarities: tuple[float, ...]
    messages: Conversation
    scores: list[float] | None = None


class SchemaPredictor(Predictor):
    """A :class:`SchemaPrompt` and a model.

    Attributes:
        counts: ``reattempts``, ``incomplete`` schemas, ``unread`` answers (no candidate), ``unanswered`` questions
            (nothing retrieved), examples that were ``shortened``.
    """

    def __init__(self, prompt: SchemaPrompt, talk: Talk, encode: Encoder, progress: bool | None = False) -> None:
        self.prompt, self.method, self.talk, self.encode = prompt, prompt.method, talk, encode
        self.classes = None if prompt.labels is None else list(prompt.labels)
        self.progress = progress
        self._writer = _Writer(prompt.method, talk)
        self.counts = self._writer.counts

    def predict(self, examples: Sequence[Example]) -> list[Any]:
        """What is answered to each example, see :attr:`Answer.prediction`."""
        return [answer.prediction for answer in self.answers(examples)]

    def answers(self, examples: Sequence[Example], shown: Sequence[Sequence[int]] | None = None) -> list[Answer]:
        """How each example is answered.

        Args:
            examples: n questions.
            shown: for each the examples of the memory, by number: nothing is retrieved then, as in most experiments of
                the paper, which pair each question with a relative.
        """
        out: list[Answer] = []
        with bar("SA-ICL", len(examples), self.progress) as progress_bar:
            for at in range(0, len(examples), self.method.batch):
                part = slice(at, at + self.method.batch)
                out += self._answers(examples[part], None if shown is None else shown[part])
                progress_bar.update(len(examples[part]))
        return out

    def _answers(self, examples: Sequence[Example], shown: Sequence[Sequence[int]] | None) -> list[Answer]:
        method, labels = self.method, self.prompt.labels
        choices = [options(e, labels) for e in examples]
        questions = [show(self.prompt.shown, e, c) for e, c in zip(examples, choices, strict=True)]
        schemas: list[Schema] = [{} for _ in questions]
        if method.use_schema:
            schemas = self._writer.write([self._first(q) for q in questions])
        if shown is None:
            texts = [method.fields.text(s) for s in schemas] if method.use_schema else questions
            found = self._retrieve(texts, [_identity(e) for e in examples])
        else:
            found = [[(n, math.nan) for n in row] for row in shown]
        todo = [n for n, row in enumerate(found) if row or method.fallback]
        self.counts["unanswered"] += len(examples) - len(todo)
        refined: list[Schema] = [{} for _ in examples]
        messages: list[Conversation] = [[] for _ in examples]
        draws: list[list[_Reply]] = [[] for _ in examples]
        for draw in range(max(1, method.self_consistency)):
            again = [n for n in todo if found[n] and method.activate and method.use_schema]
            temperature = VOTE_TEMPERATURE if method.self_consistency else 0.0
            for n, schema in zip(again, self._writer.write(
                    [self._second(questions[n], schemas[n], found[n]) for n in again], temperature, draw), strict=True):
                refined[n] = schema
            for n in todo:
                messages[n] = self._third(questions[n], schemas[n], refined[n], found[n], choices[n])
            replies = self._reply([messages[n] for n in todo], [choices[n] for n in todo])
            for n, reply in zip(todo, replies, strict=True):
                draws[n].append(reply)
        votes = [_vote(row, c) for row, c in zip(draws, choices, strict=True)]
        none = "" if labels is None else None
        return [Answer(none if vote.said is None else vote.said, s, r, tuple(n for n, _ in f),
                       tuple(c for _, c in f) if shown is None else (), m, vote.scores)
                for vote, s, r, f, m in zip(votes, schemas, refined, found, messages, strict=True)]

    def _retrieve(self, texts: list[str], identities: list[str]) -> list[list[tuple[int, float]]]:
        if not len(self.prompt.memory):
            return [[] for _ in texts]
        method = self.method
        return self.prompt.memory.search(self.encode(texts), method.top_k, method.min_similarity, method.max_similarity,
                                         identities)

    # -- the three conversations ----------------------------------------------------------------------------------

    def _first(self, question: str) -> Conversation:
        return [{"role": "system", "content": self.method.fields.system()}, {"role": "user", "content": question}]

    def _second(self, question: str, schema: Schema, found: Sequence[tuple[int, float]]) -> Conversation:
        head = f"{_new(question, self.method.fields.text(schema), 'a preliminary schema')}\n\n{REFINE_BELOW}\n\n"
        return self._fitted(lambda example: [{"role": "system", "content": self.method.fields.system()},
                                             {"role": "user", "content": head + example}],
                            found, self._writer.max_tokens)

    def _third(self, question: str, schema: Schema, refined: Schema, found: Sequence[tuple[int, float]],
               choices: Sequence[Option] | None) -> Conversation:
        method = self.method
        ask = "Answer the new question." if choices is None else "Choose the best answer to the new question."
        if choices is not None and not self.talk.serves:
            ask += f" Give its {method.score if choices[0].number else 'name'} alone."
        system = ZERO_SHOT if not found else ONE_SHOT if not method.use_schema else SOLVE if refined else SCHEMA_ONLY
        if not found or not method.use_schema:
            body = f"Below is the new question.\n\n{question}"
        else:
            body = _new(question, method.fields.text(schema), "a preliminary schema" if refined else "its schema")

        def build(example: str) -> Conversation:
            user = f"{example}\n\n{body}" if example else body
            head = {"role": "system", "content": system}
            if not refined:
                return [head, {"role": "user", "content": f"{user}\n\n{ask}"}]
            return [head, {"role": "user", "content": f"{user}\n\n{REFINE_ABOVE}"},
                    {"role": "assistant", "content": method.fields.text(refined)}, {"role": "user", "content": ask}]

        return self._fitted(build, found, self.prompt.max_tokens if choices is None else ANSWER_TOKENS)

    def _fitted(self, build: Callable[[str], Conversation], found: Sequence[tuple[int, float]],
                max_tokens: int) -> Conversation:
        """A conversation around the examples found; these are cut where the model could not read all."""
        example = "\n\n---\n\n".join(self._example(self.prompt.memory.items[n]) for n, _ in found)
        messages, window, model = build(example), self.talk.window, self.talk.model
        whole = len(example)
        while window is not None and example:
            over = self.talk.length(messages) + max_tokens - window
            if over <= 0:
                break
            ids = model.tokenize(example)
            example = model.detokenize(ids[:max(0, len(ids) - over)]).rstrip()
            messages = build(example)
        self.counts["shortened"] += len(example) < whole
        return messages

    def _example(self, problem: SolvedProblem) -> str:
        parts = ["Below is an example.", "", problem.question]
        parts += [_answer(problem)] if self.method.include_answer else []
        return "\n".join(parts + (["", self.method.fields.text(problem.schema)] if self.method.use_schema else []))

    # -- answers --------------------------------------------------------------------------------------------------

    def _reply(self, conversations: Sequence[Conversation], choices: Sequence[Sequence[Option] | None]) -> list[_Reply]:
        out = [_Reply(None) for _ in conversations]
        free = [n for n, c in enumerate(choices) if c is None]
        for n, text in zip(free, self.talk.write([conversations[n] for n in free], self.prompt.max_tokens,
                                                 stop=self.prompt.stop) if free else [], strict=True):
            out[n] = _Reply(text)
        chosen = {n: c for n, c in enumerate(choices) if c is not None}
        if self.talk.serves:
            self._choose(conversations, chosen, out)
        elif chosen:
            texts = self.method.score == "text"
            said = [[o.text if texts and o.number else o.reply for o in c] for c in chosen.values()]
            rows = self.talk.score([conversations[n] for n in chosen], said)
            if texts:  # per token: else the shortest candidate would be preferred
                rows = [[v / max(1, self.talk.model.count_tokens(t)) for v, t in zip(row, replies, strict=True)]
                        for row, replies in zip(rows, said, strict=True)]
            for (n, c), row in zip(chosen.items(), rows, strict=True):
                out[n] = _Reply(c[row.index(max(row))].label, row)
        return out

    def _choose(self, conversations: Sequence[Conversation], choices: Mapping[int, Sequence[Option]],
                out: list[_Reply]) -> None:
        """Let a server write which candidate it chooses, again where what it wrote is none of them."""
        todo = list(choices)
        for attempt in range(self.method.max_reattempts + 1):
            if not todo:
                return
            forms = [{"type": "object", "additionalProperties": False, "required": ["final_answer"], "properties": {
                "final_answer": {"type": "string", "enum": [o.text for o in choices[n]]}}} for n in todo]
            longest = max(self.talk.model.count_tokens(o.text) for n in todo for o in choices[n])
            texts = self.talk.write([conversations[n] for n in todo], ANSWER_TOKENS + longest, seed=attempt,
                                    temperature=RETRY_TEMPERATURE if attempt else 0.0, json_schemas=forms)
            for n, text in zip(todo, texts, strict=True):
                picked = choice(_final(text), choices[n])
                out[n] = _Reply(None if picked is None else choices[n][picked].label)
            todo = [n for n in todo if out[n].said is None]
            self.counts["reattempts"] += len(todo) if attempt < self.method.max_reattempts else 0
        self.counts["unread"] += len(todo)


class ScoringPredictor(SchemaPredictor):
    """A predictor that always has an answer and its log-probabilities: with ``fallback``, on a model that scores."""

    def scores(self, examples: Sequence[Example]) -> list[list[float]]:
        """(examples, labels) log-probabilities, not normalised; -inf for a label without a candidate."""
        count = len(self.classes or ())
        rows = [answer.scores or [] for answer in self.answers(examples)]
        return [[*row, *[-math.inf] * (count - len(row))] for row in rows]


@dataclasses.dataclass(frozen=True)
class _Reply:
    """What was said (None: nothing that could be read), and the log-probability of each choice."""

    said: Any
    scores: list[float] | None = None


class _Writer:
    """Asks for schemas, again where fields are missing."""

    def __init__(self, method: SAICL, talk: Talk) -> None:
        self.method, self.talk = method, talk
        self.counts: collections.Counter[str] = collections.Counter()
        window = talk.window
        self.max_tokens = min(method.max_schema_tokens, max(1, window // 2) if window else method.max_schema_tokens)

    def write(self, conversations: Sequence[Conversation], temperature: float = 0.0, draw: int = 0) -> list[Schema]:
        """One schema for each conversation; of several attempts the one that lacks the fewest fields."""
        template = self.method.fields
        best: list[Schema] = [{} for _ in conversations]
        todo = list(range(len(conversations)))
        for attempt in range(self.method.max_reattempts + 1):
            if not todo:
                break
            self.counts["reattempts"] += len(todo) if attempt else 0
            texts = self.talk.write([conversations[n] for n in todo], self.max_tokens, seed=1000 * draw + attempt,
                                    temperature=RETRY_TEMPERATURE if attempt else temperature,
                                    json_schemas=[template.json_schema()] * len(todo), begin=template.begin,
                                    stop=ENDS)
            for n, text in zip(todo, texts, strict=True):
                # some models begin again, and some write no JSON
                schema = min((template.parse(t) for t in (text, template.begin + text)),
                             key=lambda schema: len(template.missing(schema)))
                if not best[n] or len(template.missing(schema)) < len(template.missing(best[n])):
                    best[n] = schema
            todo = [n for n in todo if template.missing(best[n])]
        self.counts["incomplete"] += len(todo)
        return [{**dict.fromkeys(template.names, ""), **schema} for schema in best]


def _vote(replies: Sequence[_Reply], choices: Sequence[Option] | None) -> _Reply:
    """The reply given most often; of equals the likelier on average, then the first."""
    if len(replies) < 2:
        return replies[0] if replies else _Reply(None)
    votes: collections.Counter[Any] = collections.Counter()
    first: dict[Any, Any] = {}
    for reply in replies:
        key = reply.said.strip().casefold() if choices is None and reply.said is not None else reply.said
        if key is not None:
            votes[key] += 1
            first.setdefault(key, reply.said)
    if choices is None or any(reply.scores is None for reply in replies):
        return _Reply(first[votes.most_common(1)[0][0]]) if votes else _Reply(None)
    rows = [reply.scores or [] for reply in replies]
    probabilities = [[math.exp(v - max(row)) for v in row] for row in rows]
    means = [sum(p[k] / sum(p) for p in probabilities) / len(rows) for k in range(len(choices))]
    # a mean is at most one vote, so it decides between equals only
    scores = [math.log((votes[o.label] + 0.999 * m) / (len(rows) + 0.999)) for o, m in zip(choices, means, strict=True)]
    return _Reply(choices[scores.index(max(scores))].label, scores)


def _new(question: str, schema: str, what: str) -> str:
    return f"Below is the new question with {what}.\n\n{question}\n\nBelow is {what}.\n\n{schema}"


def _answer(problem: SolvedProblem) -> str:
    answer = f"The answer is: {problem.answer}"
    return f"{answer}\nExplanation: {problem.explanation}" if problem.explanation else answer


def _solved(task: TextTask, number: int, example: Example) -> SolvedProblem:
    try:
        choices = options(example, task.labels)
        answer = right_answer(example, choices)
    except ValueError as error:
        raise ValueError(f"task {task.name!r}, train[{number}]: {error}") from None
    return SolvedProblem(show(task.template, example, choices), answer, str(example.inputs.get(EXPLANATION, "")),
                         identity=_identity(example))


def _identity(example: Example) -> str:
    """Which problem it is: all of its inputs count (an ``id`` among them), not the question's text alone."""
    return content_fingerprint({k: v for k, v in example.inputs.items() if k != EXPLANATION})


def _final(text: str) -> str:
    """The answer in what a server wrote under a schema; the text itself, where it is no JSON."""
    try:
        return str(json.loads(text)["final_answer"])
    except (ValueError, KeyError, TypeError):
        return text


__all__ = ["SAICL", "Answer", "SchemaPredictor", "SchemaPrompt", "ScoringPredictor"]
