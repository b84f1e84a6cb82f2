"""A chat model of transformers that is given conversations, with pictures where its processor reads them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from looseleaf.errors import UnsupportedModelError
from looseleaf.fingerprint import fingerprint
from looseleaf.modes import own_random_state
from looseleaf.unwrap import unwrapped
from looseleaf_text.batching import device_of, expect_eval, same, tolerance
from looseleaf_text.conversations import ChatModel, Conversation, conversation, for_processor
from looseleaf_text.local import cut
from looseleaf_text.model import not_finite

Prompt = str | Conversation


class LocalChat(ChatModel):
    """A chat model of transformers, asked by whole conversations; its own chat template makes the text.

    Pictures are parts of messages (see :data:`looseleaf_text.conversations.Conversation`). What it answers does not
    depend on the other conversations of a batch: the first batch of several lengths is tried against one of its rows
    alone, and where they differ each conversation is read by itself from then on. A prompt that is a text is what
    the user says.

    Args:
        model: any ``AutoModelForImageTextToText`` or ``AutoModelForCausalLM``, wrapped by PEFT or not; its dropout must
            be off (``model.eval()``). Where it is and its mode are left as they are.
        processor: its processor, or the tokenizer of a model of texts; with a chat template.
        batch: conversations read together; >= 1.

    Raises:
        ValueError: the processor has no chat template.
        UnsupportedModelError: the model does not generate.

    Example:
        >>> model = LocalChat(llava, processor)                                          # doctest: +SKIP
        >>> model.chat([[{"role": "user", "content": [{"type": "image", "image": "cat.png"},
        ...                                           {"type": "text", "text": "What is this?"}]}]], 20)
    """

    def __init__(self, model: Any, processor: Any, *, batch: int = 8) -> None:
        if not getattr(processor, "chat_template", None):
            raise ValueError(f"LocalChat: expected a processor or tokenizer with a chat template, got "
                             f"{type(processor).__name__} without: set its chat_template, or use LocalModel")
        inner = unwrapped(model)
        if not hasattr(inner, "generate"):
            raise UnsupportedModelError(f"LocalChat: expected a model of transformers that generates, got "
                                        f"{type(inner).__name__}")
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"LocalChat.batch: expected an integer >= 1, got {batch!r}")
        self.model, self.processor, self.batch = model, processor, batch
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.pictures = hasattr(processor, "image_processor")
        self.calls = self.tokens = 0
        self.name = f"{type(inner).__name__}-{sum(p.numel() for p in model.parameters())}"
        self._tried = False

    def fingerprint(self) -> str:
        """Of the weights as they are now, see :func:`looseleaf.fingerprint.fingerprint`."""
        return fingerprint(self.model)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def detokenize(self, ids: list[int]) -> str:
        """The text of ``ids``; special tokens are kept."""
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    @torch.no_grad()
    def chat(self, conversations: Sequence[Conversation], max_tokens: int, temperature: float = 0.0, seed: int = 0,
             json_schemas: Sequence[dict[str, Any] | None] | None = None,
             keep: Callable[[int, str], None] = lambda number, text: None, stop: list[str] | None = None) -> list[str]:
        """See :meth:`ChatModel.chat`; JSON schemas constrain nothing here, the global generators are left as they were.

        Raises:
            ValueError: ``max_tokens`` below 1, a negative temperature, or something that is no conversation.
        """
        if max_tokens < 1 or temperature < 0:
            raise ValueError("chat: expected max_tokens >= 1 and temperature >= 0, got "
                             f"max_tokens={max_tokens!r}, temperature={temperature!r}")
        expect_eval(self.model)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        if stop:
            sampling |= {"stop_strings": stop, "tokenizer": self.tokenizer}
        out = [""] * len(conversations)
        with own_random_state(seed):
            for at in range(0, len(conversations), self.batch):
                rows = list(range(at, min(at + self.batch, len(conversations))))
                for group in self._groups([conversations[n] for n in rows]):
                    inputs = self._inputs([conversations[rows[g]] for g in group])
                    prompts, pad = inputs["input_ids"], self._padding()
                    written = self.model.generate(**inputs, max_new_tokens=max_tokens, num_beams=1, **sampling,
                                                  pad_token_id=pad)
                    length = prompts.shape[1]
                    whole = written.shape[1] > length and torch.equal(written[:, :length], prompts)
                    for g, ids, mask in zip(group, written[:, length * whole:].tolist(), inputs["attention_mask"],
                                            strict=True):
                        while ids and ids[-1] == pad:
                            ids.pop()
                        self.calls += 1
                        self.tokens += int(mask.sum()) + len(ids)
                        out[rows[g]] = cut(self.tokenizer.decode(ids, skip_special_tokens=True), stop).strip()
                        keep(rows[g], out[rows[g]])
        return out

    @torch.no_grad()
    def score(self, prefixes: Sequence[Prompt],  # type: ignore[override]
              continuations: Sequence[Sequence[str]]) -> list[list[float]]:
        """See :meth:`LanguageModel.score`; prefixes may be conversations, whose next turn the continuations begin.

        A conversation that ends with the assistant's own words is continued there.
        """
        if len(prefixes) != len(continuations) or any(not row or not all(row) for row in continuations):
            raise ValueError("score: expected one continuation or more for each prefix, none of them empty, got "
                             f"{len(prefixes)} prefixes and {continuations!r:.200}")
        expect_eval(self.model)
        out = []
        for number, (prefix, row) in enumerate(zip(prefixes, continuations, strict=True)):
            inputs = self._inputs([conversation(prefix)])
            ids = [self.tokenize(text) for text in row]
            self.calls += 1
            self.tokens += inputs["input_ids"].shape[1] + max(map(len, ids))
            # continuations that differ in their last token alone are read together
            known: dict[tuple[int, ...], Tensor] = {}
            totals = []
            for text, tokens in zip(row, ids, strict=True):
                if not tokens:
                    raise ValueError(f"score: expected continuations with tokens, got {text!r}")
                begin = tuple(tokens[:-1])
                if begin not in known:
                    logits = self._logits(_longer(inputs, begin), len(begin) + 1)
                    if not torch.isfinite(logits.amax(-1)).all():
                        raise not_finite(self.name, "logits", logits.max().item(), number, text)
                    known[begin] = torch.log_softmax(logits.float(), dim=-1)
                at = torch.tensor(tokens, device=known[begin].device)
                totals.append(float(known[begin].gather(1, at[:, None]).sum()))
            out.append(totals)
        return out

    # -- inputs ---------------------------------------------------------------------------------------------------

    def _padding(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def _inputs(self, conversations: Sequence[Conversation]) -> dict[str, Any]:
        """What the model reads: texts padded on the left, with the turn of the assistant begun."""
        made = [for_processor(messages, self.pictures) for messages in conversations]
        goes_on = [messages[-1]["role"] == "assistant" for messages in conversations]
        texts = [self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not on, continue_final_message=on)
            for (messages, _), on in zip(made, goes_on, strict=True)]
        pictures = [own for _, own in made]
        side, pad = self.tokenizer.padding_side, self.tokenizer.pad_token
        try:
            self.tokenizer.padding_side = "left"
            if pad is None and len(texts) > 1:
                self.tokenizer.pad_token = self.tokenizer.eos_token
            # the template has written the special tokens already
            options: dict[str, Any] = {"return_tensors": "pt", "padding": len(texts) > 1, "add_special_tokens": False}
            if self.pictures:
                inputs = self.processor(text=texts, images=pictures if any(pictures) else None, **options)
            else:
                inputs = self.processor(texts, **options)
        finally:
            self.tokenizer.padding_side = side
            if self.tokenizer.pad_token != pad:
                self.tokenizer.pad_token = pad
        device, dtype = device_of(self.model), next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return {name: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor)
                else value for name, value in inputs.items()}

    def _groups(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Which of the conversations are read together; decided once by trial."""
        every = list(range(len(conversations)))
        if len(every) > 1 and not self._tried:
            inputs = self._inputs(conversations)
            lengths = inputs["attention_mask"].sum(1)
            if int(lengths.min()) == int(lengths.max()):
                return [every]  # nothing was padded: nothing to learn from
            self._tried = True
            shortest = int(lengths.argmin())
            alone = self._logits(self._inputs([conversations[shortest]]), 1)[-1]
            together = self._logits(inputs, 1, shortest)[-1]
            if not same(together, alone, 10 * tolerance(self.model)):
                self.batch = 1
        return [every] if self.batch > 1 else [[n] for n in every]

    def _logits(self, inputs: dict[str, Any], keep: int, row: int = 0) -> Tensor:
        """Logits (keep, vocabulary) of the last ``keep`` positions of a row."""
        accepted = inspect.signature(unwrapped(self.model).forward).parameters
        more = {"logits_to_keep": keep} if "logits_to_keep" in accepted else {}
        logits: Tensor = self.model(**inputs, **more, use_cache=False).logits
        return logits[row, -keep:]


def _longer(inputs: dict[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """The inputs of one row with further tokens of text after them."""
    length, made = inputs["input_ids"].shape, dict(inputs)
    for name, value in inputs.items():
        if ids and isinstance(value, Tensor) and value.shape == length:  # kinds of tokens: 0 is text
            fill = list(ids) if name == "input_ids" else [int(name == "attention_mask")] * len(ids)
            made[name] = torch.cat([value, value.new_tensor([fill])], dim=1)
    return made


__all__ = ["LocalChat"]
