"""Training a model to think without words: continuous thoughts, internalised steps, and pauses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from looseleaf.modes import evaluating
from looseleaf.plugin import In, check_fields
from looseleaf.unwrap import unwrapped
from looseleaf_implicit_reasoning.data import Problem
from looseleaf_implicit_reasoning.decoding import known_token, within
from looseleaf_implicit_reasoning.states import residual_stream
from looseleaf_text.batching import device_of
from looseleaf_text.encoding import Encoding

IGNORED = -100
"""Label of a token that is not learned."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids of a problem: question, each step, and the answer with the end of the text."""

    question: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    answer: tuple[int, ...]


def encode(problems: Sequence[Problem], tokenizer: Any, separator: str = "\n") -> list[Encoded]:
    """Token ids of problems; the separator stands behind the question and behind each step."""
    encoding = Encoding(tokenizer)
    end = [] if getattr(tokenizer, "eos_token_id", None) is None else [tokenizer.eos_token_id]

    def ids(text: str) -> tuple[int, ...]:
        return tuple(encoding.alone(text))

    return [Encoded((*encoding.begin, *encoding.bare([p.question + separator])[0]),
                    tuple(ids(step + separator) for step in p.steps), (*ids(p.answer), *end)) for p in problems]


def collate(rows: Sequence[tuple[Sequence[int], int, int, Sequence[int]]], device: Any = None) -> dict[str, Tensor]:
    """Rows in one batch, padded so that what comes after the questions begins in one column.

    Args:
        rows: ids of the question, how many slots come after it, an id that stands for a slot, and the text after them.
        device: of the batch.

    Returns:
        ``input_ids``, ``attention_mask``, ``position_ids``, which count from the true start of each row, and
        ``labels``, those of the text after the slots alone, all (B, L); ``slots`` (B,), and ``column``, (), where the
        slots begin.
    """
    column = max(len(question) for question, *_ in rows)
    width = column + max(slots + len(text) for _, slots, _, text in rows)
    out = {name: torch.full((len(rows), width), fill) for name, fill in (
        ("input_ids", 0), ("attention_mask", 0), ("position_ids", 0), ("labels", IGNORED))}
    for n, (question, slots, token, text) in enumerate(rows):
        start, end = column - len(question), column + slots + len(text)
        out["input_ids"][n, start:end] = torch.tensor([*question, *[token] * slots, *text])
        out["attention_mask"][n, start:end] = 1
        out["position_ids"][n, start:end] = torch.arange(end - start)
        out["labels"][n, column + slots:end] = torch.tensor(list(text))
    out |= {"slots": torch.tensor([row[1] for row in rows]), "column": torch.tensor(column)}
    return {name: value.to(device) for name, value in out.items()}


def text_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the labelled tokens, nats per token; the logits at i predict the label at i + 1."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(),
                                       ignore_index=IGNORED)


class Trainable:
    """What the four methods that train share.

    ``batch`` makes the tensors of a few problems, ``logits`` runs a model on them, and ``loss`` is what is trained.
    """

    def __post_init__(self) -> None:
        check_fields(self)

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Logits (B, L, V) of a batch."""
        out: Tensor = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")},
                            use_cache=False).logits
        return out

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of the text after the question and what stands in for its steps, nats per token."""
        return text_loss(self.logits(model, batch), batch["labels"])

    @torch.no_grad()
    def answer(self, model: nn.Module, batch: dict[str, Tensor], max_tokens: int, end: int | None = None,
               ) -> list[list[int]]:
        """Greedy answers to a batch without text behind the slots, as ids without the end of the text.

        Args:
            model: left in the mode it was in.
            batch: of :func:`collate`, with as many slots in each row.
            max_tokens: of each answer.
            end: id at which an answer ends.
        """
        if batch["input_ids"].shape[1] != int(batch["column"]) + int(batch["slots"].min()):
            raise ValueError("batch: expected questions with as many slots and nothing behind them, got rows of "
                             f"{batch['slots'].tolist()} slots and {batch['input_ids'].shape[1]} columns: make it "
                             "with questions(...)")
        answers: list[list[int]] = [[] for _ in batch["slots"]]
        over = torch.zeros_like(batch["slots"], dtype=torch.bool)
        with evaluating(model):
            for _ in range(max_tokens):
                token = self.logits(model, batch)[:, -1].argmax(-1)
                over |= token == (-1 if end is None else end)
                for row, value, done in zip(answers, token.tolist(), over.tolist(), strict=True):
                    row.extend([] if done else [value])
                if bool(over.all()):
                    break
                batch = {**batch, "input_ids": torch.cat([batch["input_ids"], token[:, None]], 1),
                         "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1),
                         "position_ids": torch.cat([batch["position_ids"], batch["position_ids"][:, -1:] + 1], 1)}
        return answers


@dataclasses.dataclass
class ContinuousThought(Trainable):
    """Coconut: slots after the question, each of which reads the last hidden state before it (2412.06769).

    The hidden state is that behind the final norm, and is put in the place of the slot's embedding. Training goes in
    stages: in stage s the first s steps of the reasoning are gone and s x ``c`` slots stand in their place; beyond the
    last stage all steps are gone.

    Args:
        c: slots for each step; 2 on GSM8K, 1 on ProsQA in the paper.
        stages: 3 on GSM8K, 6 on ProsQA.
        epochs: of each stage; 3 on GSM8K, 5 on ProsQA.
        pad: all rows have ``stages`` x ``c`` slots in the end, those of fewer steps too.
        cache: keys and values of what is before a slot are kept; False: everything is run again for each slot.
    """

    c: Annotated[int, In(">= 0")] = 2
    stages: Annotated[int, In(">= 0")] = 3
    epochs: Annotated[int, In(">= 1")] = 3
    pad: bool = False
    cache: bool = True

    def slots(self, steps: int, stage: int) -> int:
        """How many slots a problem of so many steps has in a stage."""
        return self.c * (min(stage, self.stages) if self.pad or stage <= self.stages else min(steps, self.stages))

    def batch(self, examples: Sequence[Encoded], stage: int, device: Any = None) -> dict[str, Tensor]:
        """Questions, slots, the steps that are left in a stage, and answers."""
        rows = []
        for e in examples:
            gone = min(stage, len(e.steps)) if stage <= self.stages else len(e.steps)
            rows.append((e.question, self.slots(len(e.steps), stage), e.question[-1],
                         [t for s in e.steps[gone:] for t in s] + list(e.answer)))
        return collate(rows, device)

    def questions(self, examples: Sequence[Encoded], slots: int, device: Any = None) -> dict[str, Tensor]:
        """Questions with so many slots each and nothing after them, for :meth:`answer`."""
        return collate([(e.question, slots, e.question[-1], ()) for e in examples], device)

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Logits (B, L, V), as many forwards as the longest run of slots, and one; without slots the model's own.

        Raises:
            ValueError: more positions than the model has.
        """
        slots, column = batch["slots"], int(batch["column"])
        count, width = int(slots.max()), batch["input_ids"].shape[1]
        within(model, int(batch["position_ids"].max()) + 1)
        if count == 0:
            return super().logits(model, batch)
        inner: Any = unwrapped(model)
        # a model that saves memory by running its layers again keeps no cache
        again = any(module.training and getattr(module, "gradient_checkpointing", False) for module in inner.modules())
        cached = self.cache and not again
        embedded = list(inner.get_input_embeddings()(batch["input_ids"]).split(1, 1))
        parts: list[Tensor] = []
        cache, begin = None, 0
        ends = [*range(column, column + count), width]
        with residual_stream(model) as stream:
            for n, end in enumerate(ends):
                out = model(inputs_embeds=torch.cat(embedded[begin:end], 1),
                            attention_mask=batch["attention_mask"][:, :end],
                            position_ids=batch["position_ids"][:, begin:end], past_key_values=cache, use_cache=cached)
                parts.append(out.logits[:, -(end - (ends[n - 1] if n else 0)):])
                if cached and out.past_key_values is not None:
                    cache, begin = out.past_key_values, end
                if n < count:
                    assert stream.final is not None
                    thought = stream.final[:, -1:]
                    has = (slots > n)[:, None, None]
                    embedded[end] = torch.where(has, thought.to(embedded[end].dtype), embedded[end])
        return torch.cat(parts, 1)

    def train(self, model: nn.Module, tokenizer: Any, problems: Sequence[Problem], *, args: Any,
              separator: str = "\n") -> list[float]:
        """Train a model with transformers' Trainer, stage after stage, each with a new optimiser.

        Args:
            model, tokenizer: a causal language model, PEFT's too, trained in place.
            problems: with steps.
            args: :class:`transformers.TrainingArguments`; epochs are those of this object.
            separator: behind the question and each step.

        Returns:
            The loss of each micro batch.
        """
        examples = encode(problems, tokenizer, separator)
        losses: list[float] = []
        for stage in range(self.stages + 2):
            def make(part: Sequence[Encoded], step: int, stage: int = stage) -> dict[str, Tensor]:
                return self.batch(part, stage, device_of(model))

            losses += run_trainer(self, model, examples, args, self.epochs, make)
        return losses


@dataclasses.dataclass
class Internalize(Trainable):
    """ICoT-SI: the steps are taken away token by token, from the left, while the model is trained (2405.14838).

    Args:
        per_epoch: tokens that are taken away over an epoch.
        smoothing: lambda of the jitter o, more tokens taken away than it is time for: P(o) = (1 - e^-lambda) e^(-lambda
            o).
        bound: once so many tokens are due to be gone, all are.
    """

    per_epoch: Annotated[int, In(">= 0")] = 8
    smoothing: Annotated[float, In("> 0", infinite=True)] = 4.0
    bound: Annotated[int, In(">= 0")] = 1000

    def due(self, step: int, steps_per_epoch: int) -> int:
        """How many tokens are gone at a training step, before the jitter: one more every 1 / ``per_epoch`` epoch."""
        return self.per_epoch * step // steps_per_epoch

    def jitter(self, count: int, generator: torch.Generator) -> list[int]:
        """Draws of o, 0 or more."""
        if math.isinf(self.smoothing):
            return [0] * count
        u = 1 - torch.rand(count, dtype=torch.float64, generator=generator)  # in (0, 1]
        return [int(o) for o in (-u.log() / self.smoothing).floor()]

    def batch(self, examples: Sequence[Encoded], removed: int, generator: torch.Generator | None = None,
              device: Any = None) -> dict[str, Tensor]:
        """Questions, what is left of the steps, and answers; with jitter where there is a generator."""
        extra = [0] * len(examples) if generator is None else self.jitter(len(examples), generator)
        rows = []
        for e, o in zip(examples, extra, strict=True):
            steps = [t for s in e.steps for t in s]
            gone = removed + o if removed < self.bound else len(steps)
            rows.append((e.question, 0, 0, [*steps[gone:], *e.answer]))
        return collate(rows, device)

    def questions(self, examples: Sequence[Encoded], device: Any = None) -> dict[str, Tensor]:
        """Questions alone, for :meth:`answer`."""
        return collate([(e.question, 0, 0, ()) for e in examples], device)

    def train(self, model: nn.Module, tokenizer: Any, problems: Sequence[Problem], *, args: Any,
              separator: str = "\n") -> list[float]:
        """Train a model with transformers' Trainer; the optimiser is reset whenever one more token goes.

        Args and result as of :meth:`ContinuousThought.train`; the epochs are those of ``args``.
        """
        examples, draw = encode(problems, tokenizer, separator), torch.Generator().manual_seed(args.seed)
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        per_epoch = math.ceil(len(examples) / size)
        return run_trainer(self, model, examples, args, None,
                           lambda part, step: self.batch(part, self.due(step, per_epoch), draw, device_of(model)),
                           phase=lambda step: self.due(step, per_epoch))


@dataclasses.dataclass
class Pauses(Trainable):
    """Pause tokens between the prompt and the answer (2310.02226), or filler tokens (2404.15758).

    What the model says before the last of them is ignored, and there is no loss on them.

    Args:
        n: how many; 0 changes nothing.
        token: "learned": a new token, whose embedding is all that is trained; "filler": one that the model knows.
        filler: the token's text; where it is learned, its name.
    """

    n: Annotated[int, In(">= 0")] = 10
    token: Literal["learned", "filler"] = "learned"
    filler: str = ""

    @property
    def text(self) -> str:
        """The pause token's text."""
        return self.filler or ("<pause>" if self.token == "learned" else ".")

    def prepare(self, model: nn.Module, tokenizer: Any) -> tuple[nn.Module, int]:
        """The model to train and the pause token's id.

        A learned token is added to tokenizer and model where it is new, and the model comes back wrapped by PEFT with
        that one embedding trainable. For fillers, and for n=0, the model comes back as it is.

        Raises:
            ValueError: a filler that is not one token.
        """
        if self.n == 0 or self.token == "filler":
            return model, known_token(tokenizer, self.text) if self.n else 0
        try:
            import peft
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"learned pauses need the package {error.name}: "
                                      "pip install 'looseleaf-implicit-reasoning[train]'") from error
        inner: Any = unwrapped(model)
        if self.text not in tokenizer.get_vocab():
            tokenizer.add_tokens([self.text], special_tokens=True)
        index = int(tokenizer.convert_tokens_to_ids(self.text))
        if index >= inner.get_input_embeddings().weight.shape[0]:
            inner.resize_token_embeddings(index + 1)
        name = next(name for name, module in inner.named_modules() if module is inner.get_input_embeddings())
        config = peft.TrainableTokensConfig(token_indices=[index], target_modules=[name.rpartition(".")[2]])
        return peft.get_peft_model(inner, config), index

    def batch(self, examples: Sequence[Encoded], token: int, device: Any = None) -> dict[str, Tensor]:
        """Questions, pauses and answers; the steps are left out."""
        return collate([(e.question, self.n, token, e.answer) for e in examples], device)

    def questions(self, examples: Sequence[Encoded], token: int, device: Any = None) -> dict[str, Tensor]:
        """Questions and pauses, for :meth:`answer`."""
        return collate([(e.question, self.n, token, ()) for e in examples], device)

    def train(self, model: nn.Module, tokenizer: Any, problems: Sequence[Problem], *, args: Any,
              separator: str = "\n") -> tuple[nn.Module, list[float]]:
        """Train the pause token, or all of a model that reads fillers, with transformers' Trainer.

        Args as of :meth:`ContinuousThought.train`; the epochs are those of ``args``.

        Returns:
            What :meth:`prepare` gave, and the loss of each micro batch.
        """
        prepared, token = self.prepare(model, tokenizer)
        examples = encode(problems, tokenizer, separator)
        return prepared, run_trainer(self, prepared, examples, args, None,
                                     lambda part, step: self.batch(part, token, device_of(prepared)))


@dataclasses.dataclass
class DynamicPauses(Trainable):
    """DIT: a pause before each of the answer's tokens that the model finds least likely (2506.03616).

    Likelihood is that of a token after everything before it, and the lowest are chosen, as the paper has it; the
    authors' code sorts losses upwards and compares logits with labels one place off.

    Args:
        n: how many; 0 changes nothing.
        steps: the steps of the reasoning are part of the answer.
    """

    n: Annotated[int, In(">= 0")] = 3
    steps: bool = True

    def batch(self, examples: Sequence[Encoded], model: nn.Module, token: int) -> dict[str, Tensor]:
        """Questions, and answers with pauses in them; no loss on the pauses [ours, as for other pauses]."""
        device = device_of(model)
        texts = [[t for s in (e.steps if self.steps else ()) for t in s] + list(e.answer) for e in examples]
        rows = [(e.question, 0, 0, text) for e, text in zip(examples, texts, strict=True)]
        if self.n == 0:
            return collate(rows, device)
        likely = self.log_probs(model, collate(rows, device))
        paused = []
        for e, text, values in zip(examples, texts, likely, strict=True):
            lowest = set(sorted(range(len(text)), key=lambda at: (float(values[at]), at))[:self.n])
            paused.append((e.question, 0, 0, [t for at, own in enumerate(text)
                                              for t in ((token, own) if at in lowest else (own,))]))
        batch = collate(paused, device)
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == token, IGNORED)
        return batch

    @torch.no_grad()
    def log_probs(self, model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
        """Log-probability of each labelled token after everything before it, one tensor a row."""
        with evaluating(model):
            values = torch.log_softmax(self.logits(model, batch)[:, :-1].float(), -1)
        labels = batch["labels"][:, 1:]
        picked = values.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return [row[at != IGNORED].cpu() for row, at in zip(picked, labels, strict=True)]

    def train(self, model: nn.Module, tokenizer: Any, problems: Sequence[Problem], *, args: Any, pause: str = "<pause>",
              separator: str = "\n") -> list[float]:
        """Train a model with transformers' Trainer; where the pauses go is asked of the model as it is by then.

        Args as of :meth:`ContinuousThought.train`; ``pause`` is added to tokenizer and model where it is new.
        """
        token = 0
        if self.n:
            if pause not in tokenizer.get_vocab():
                tokenizer.add_tokens([pause], special_tokens=True)
            token, inner = int(tokenizer.convert_tokens_to_ids(pause)), unwrapped(model)
            if token >= inner.get_input_embeddings().weight.shape[0]:
                inner.resize_token_embeddings(token + 1)
        return run_trainer(self, model, encode(problems, tokenizer, separator), args, None,
                           lambda part, step: self.batch(part, model, token))


Batch = Callable[[Sequence[Encoded], int], dict[str, Tensor]]


def run_trainer(part: Trainable, model: nn.Module, examples: Sequence[Encoded], args: Any, epochs: int | None,
                make: Batch, phase: Callable[[int], int] | None = None) -> list[float]:
    """Train ``model`` in place with transformers' Trainer, a new optimiser, and the loss of a method.

    Args:
        part: whose loss.
        model: what is trained.
        examples: the problems.
        args: of the trainer, which are left as they are.
        epochs: in the place of those of ``args``.
        make: problems and step -> batch.
        phase: step -> a number; the optimiser's moments are forgotten when it changes.

    Returns:
        The loss of each micro batch.

    Raises:
        ValueError: no problems.
    """
    from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

    if not examples:
        raise ValueError("problems: expected one or more, got none")
    losses: list[float] = []

    class Method(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
                         num_items_in_batch: Any = None) -> Any:
            loss = part.loss(model, make(inputs["examples"], self.state.global_step))
            losses.append(float(loss.detach()))
            return (loss, None) if return_outputs else loss

    class Reset(TrainerCallback):
        last = phase(0) if phase else 0

        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **more: Any) -> None:
            if phase is not None and phase(state.global_step) != self.last:
                self.last = phase(state.global_step)
                getattr(optimizer, "optimizer", optimizer).state.clear()

    own = dataclasses.replace(args, remove_unused_columns=False, **({} if epochs is None else {
        "num_train_epochs": float(epochs)}))
    trainer = Method(model=model, args=own, train_dataset=list(examples), callbacks=[Reset()],
                     data_collator=lambda few: {"examples": few})
    trainer.args._n_gpu = min(1, trainer.args.n_gpu)  # no DataParallel: batches are made whole
    if own.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
    trainer.train()
    return losses
