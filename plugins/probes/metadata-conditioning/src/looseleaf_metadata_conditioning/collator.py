"""Batches in which a part of the documents has its metadata in front, for ``transformers.Trainer`` or any loop."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""Label of tokens that no loss is taken of."""


@dataclass
class MetadataCollator:
    """Prepend metadata to a part of the documents; the prefix is read, and never learned to be written.

    ```python
    collator = MetadataCollator(("domain",), tokenizer=tokenizer, template="{domain}\\n\\n", share=0.9)
    Trainer(model, args, train_dataset=rows, data_collator=collator)     # args: remove_unused_columns=False
    ```

    A row has ``input_ids`` or ``text``, and a value for each field. The prefix is made of tokens, one for each field:
    those of the first ``depth`` fields, then mask tokens, or mask tokens alone, so that the positions of a document are
    the same either way. Or it is made of text, by ``template``; without metadata there is then nothing in front (mask
    tokens where ``length`` is given).

    Args:
        fields: names of the metadata, from the first shown to the last.
        depth: how many fields are shown; None: all. Fields behind them are masked. Not with a template.
        share: fraction of documents that have their metadata, in [0, 1], drawn anew in each batch.
        mask_token: what stands where there is no metadata: a token number, or a token of the tokenizer. It must not be
            part of a document.
        tokens: field -> value -> token number. None: :func:`token_name` says which token of the tokenizer a value has;
            :func:`add_metadata_tokens` adds them.
        template: text of the prefix, such as ``"URL: {url}\\n"``. None: a prefix of tokens.
        length: tokens of a prefix of text: shorter ones are filled up with mask tokens in front, longer ones lose
            their end. None: as many as the text has.
        tokenizer: needed for text, and to find tokens by name.
        max_length: longest sequence, prefix included; documents lose their end.
        pad_token_id: None: the tokenizer's, or 0.
        seed: random seed of the draws. Workers of a data loader draw differently.

    Raises:
        ValueError: values that are out of range or do not go together; later, from a call, rows that cannot be used.
    """

    fields: Sequence[str]
    depth: int | None = None
    share: float = 0.5
    mask_token: int | str | None = None
    tokens: Mapping[str, Mapping[Any, int]] | None = None
    template: str | None = None
    length: int | None = None
    tokenizer: Any = field(default=None, repr=False)
    max_length: int | None = None
    pad_token_id: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.fields = (self.fields,) if isinstance(self.fields, str) else tuple(self.fields)
        if not self.fields:
            raise ValueError("fields: expected the name of one field or more, got none")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: expected a number in [0, 1], got {self.share!r}")
        if self.depth is not None and not 0 <= self.depth <= len(self.fields):
            raise ValueError(f"depth: expected an integer in [0, {len(self.fields)}], as there are {len(self.fields)} "
                             f"fields, got {self.depth!r}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length: expected None or an integer >= 2, got {self.max_length!r}")
        if self.template is None:
            self._check_tokens()
        else:
            self._check_template()
        self._generator: torch.Generator | None = None

    def _check_tokens(self) -> None:
        if self.length is not None:
            raise ValueError(f"length: expected None without a template, as the prefix has one token for each of "
                             f"{len(self.fields)} fields, got {self.length!r}")
        if self.mask_token is None:
            raise ValueError("mask_token: expected a token for fields that are not shown, got None")
        if self.tokens is None and self.tokenizer is None:
            raise ValueError("tokens: expected field -> value -> token number, or a tokenizer that has the tokens, "
                             "got neither")
        if self.tokens is not None:
            missing = [name for name in self.fields if name not in self.tokens]
            if missing:
                raise ValueError(f"tokens: expected an entry for each field, got none for {', '.join(missing)}")
            numbers = [token for name in self.fields for token in self.tokens[name].values()]
            if len({*numbers, self.mask_id}) <= len(numbers):
                raise ValueError("tokens: expected a token of its own for each value of each field, none of them the "
                                 f"mask token {self.mask_id}, got {dict(self.tokens)!r}")

    def _check_template(self) -> None:
        assert self.template is not None
        if self.tokenizer is None:
            raise ValueError("tokenizer: expected one with a template, got None")
        if self.depth is not None or self.tokens is not None:
            raise ValueError("template: expected depth=None and tokens=None with it, as it says itself which fields "
                             f"are shown, got depth={self.depth!r}, tokens={self.tokens!r}")
        named = {name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None}
        if not named or not named <= set(self.fields):
            raise ValueError(f"template: expected text with one or more of {', '.join(f'{{{n}}}' for n in self.fields)}"
                             f", got {self.template!r}")
        if self.length is not None and (self.length < 1 or self.mask_token is None):
            raise ValueError("length: expected None, or an integer >= 1 together with a mask_token, got "
                             f"length={self.length!r}, mask_token={self.mask_token!r}")

    @property
    def mask_id(self) -> int | None:
        """Number of the mask token; None where there is none."""
        if self.mask_token is None or isinstance(self.mask_token, int):
            return self.mask_token
        return _token(self.tokenizer, self.mask_token)

    def prefix(self, row: Mapping[str, Any] | None) -> list[int]:
        """Tokens of the prefix of a document; None: of one whose metadata are not shown.

        Raises:
            ValueError: a field that the row lacks, or a value without a token.
        """
        mask = self.mask_id
        if self.template is not None:
            if row is None:
                return [mask] * self.length if self.length is not None and mask is not None else []
            text = self.template.format(**{name: self._value(row, name) for name in self.fields})
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if self.length is None or mask is None:
                return ids
            return [mask] * (self.length - len(ids)) + ids[:self.length]
        assert mask is not None
        shown = self.fields[:self.depth] if row is not None else ()
        return [self._token(name, self._value(row, name)) for name in shown] + [mask] * (len(self.fields) - len(shown))

    def document(self, row: Mapping[str, Any]) -> list[int]:
        """Tokens of a document: ``input_ids``, or ``text`` as the tokenizer reads it.

        Raises:
            ValueError: the row has neither, or no token, or the mask token is part of it.
        """
        if "input_ids" in row:
            ids = [int(i) for i in row["input_ids"]]
        elif "text" in row and self.tokenizer is not None:
            ids = list(self.tokenizer(row["text"])["input_ids"])
        else:
            raise ValueError("a row: expected input_ids, or text and a collator with a tokenizer, got "
                             f"{', '.join(row) or 'nothing'}")
        if not ids:
            raise ValueError("a row: expected a document of one token or more, got none: leave empty documents out")
        if self.mask_id in ids:
            raise ValueError(f"mask_token: expected a token that is part of no document, got {self.mask_id}, which is: "
                             "choose another")
        return ids

    def sequence(self, row: Mapping[str, Any], shown: bool) -> tuple[list[int], int]:
        """Tokens of prefix and document, and the place of the document's first token behind the prefix.

        A token for the beginning of a sequence stays in front of the prefix.
        """
        ids, start = self.document(row), self.prefix(row if shown else None)
        begin = 1 if ids[0] == getattr(self.tokenizer, "bos_token_id", None) else 0
        if self.max_length is not None and len(start) + begin >= self.max_length:
            raise ValueError(f"max_length: expected more than the {len(start) + begin} tokens of the prefix, got "
                             f"{self.max_length}")
        return [*ids[:begin], *start, *ids[begin:]][:self.max_length], begin + len(start)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch: ``input_ids``, ``attention_mask`` and ``labels``, int64 (rows, longest), padded on the right.

        Labels are -100 on the prefix and on padding. A row takes one random number, whatever ``share`` and ``depth``
        are, so that collators of one seed agree on which documents are drawn.
        """
        if not len(rows):
            raise ValueError("rows: expected one row or more, got none")
        draws = torch.rand(len(rows), generator=self._random())
        sequences = [self.sequence(row, bool(draw < self.share)) for row, draw in zip(rows, draws, strict=True)]
        pad = self.pad_token_id if self.pad_token_id is not None else getattr(self.tokenizer, "pad_token_id", None)
        shape = len(sequences), max(len(ids) for ids, _ in sequences)
        input_ids = torch.full(shape, pad if pad is not None else 0)
        attention_mask, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
        for n, (ids, start) in enumerate(sequences):
            input_ids[n, :len(ids)] = torch.tensor(ids)
            attention_mask[n, :len(ids)] = 1
            labels[n, start:len(ids)] = input_ids[n, start:len(ids)]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _random(self) -> torch.Generator:
        if self._generator is None:
            worker = torch.utils.data.get_worker_info()
            self._generator = torch.Generator().manual_seed(self.seed + (1_000_003 * (worker.id + 1) if worker else 0))
        return self._generator

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generator": None}  # a generator cannot be sent to a worker

    def _value(self, row: Mapping[str, Any] | None, name: str) -> Any:
        if row is None or name not in row:
            raise ValueError(f"a row: expected the field {name!r}, got {', '.join(row or ()) or 'nothing'}. Trainer "
                             "removes columns that the model does not know: TrainingArguments("
                             "remove_unused_columns=False)")
        return row[name]

    def _token(self, name: str, value: Any) -> int:
        if self.tokens is None:
            return _token(self.tokenizer, token_name(name, value))
        if value not in self.tokens[name]:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, self.tokens[name]))}, got {value!r}: give "
                             "every value a token")
        return self.tokens[name][value]


def token_name(name: str, value: Any) -> str:
    """The token that stands for a value of a field, such as ``<genre=news>``."""
    return f"<{name}={value}>"


def add_metadata_tokens(tokenizer: Any, rows: Iterable[Mapping[str, Any]], fields: Sequence[str],
                        mask_token: str = "<metadata>", model: Any = None) -> int:
    """Add a token for the mask and for each value of each field to a tokenizer, in place; returns how many were new.

    Args:
        tokenizer: of transformers.
        rows: all values that occur.
        fields: names of the metadata.
        mask_token: stands where there is no metadata.
        model: its embeddings are enlarged where the tokenizer outgrows them.
    """
    names = {token_name(name, row[name]): None for row in rows for name in fields}
    added: int = tokenizer.add_tokens([mask_token, *sorted(names)], special_tokens=True)
    if model is not None and len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return added


def _token(tokenizer: Any, token: str) -> int:
    number = tokenizer.convert_tokens_to_ids(token) if tokenizer is not None else None
    if number is None or (number == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise ValueError(f"expected a tokenizer that has the token {token!r}, got one that has not: call "
                         "add_metadata_tokens(tokenizer, rows, fields, model=model)")
    return int(number)


__all__ = ["MetadataCollator", "add_metadata_tokens", "token_name"]
