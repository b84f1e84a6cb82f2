"""Listeners and speakers that are models of transformers, and how programs are ranked with them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looseleaf.files import load_tensors, save_tensors
from looseleaf.modes import evaluating, own_random_state
from looseleaf.unwrap import unwrapped
from looseleaf_pragmatic_examples.regexes import Utterance
from looseleaf_pragmatic_examples.self_play import ListenerRow, SpeakerRow, Spec
from looseleaf_pragmatic_examples.speech_acts import TIE, rsa

IGNORED = -100
FORMAT = "looseleaf.pragmatic-examples/1"
TRAINING = {"learning_rate": 5e-5, "lr_scheduler_type": "constant", "num_train_epochs": 1,
            "per_device_train_batch_size": 32}
"""The paper's training in self-play."""
Ranked = list[tuple[str, float]]
"""Programs with scores, the best first."""


class Seq2Text:
    """A model of transformers that writes one text after another: encoder-decoder or causal.

    An encoder-decoder reads the source and writes the target; a causal model reads the source and goes on with it. The
    loss is on the target and its end alone.

    Args:
        model: with a head for generation; PEFT models too. It stays as it is: training trains a copy.
        tokenizer: of the model.
        top_p, temperature: of the samples. [paper: 0.9 and 1]
        max_new_tokens: of a sample.
        batch_size: texts generated or scored at a time.
        training: arguments of :class:`transformers.TrainingArguments` that replace :data:`TRAINING`.

    Raises:
        ValueError: a model that cannot generate, or a tokenizer without a token for the end.
    """

    def __init__(self, model: Any, tokenizer: Any, *, top_p: float = 0.9, temperature: float = 1.0,
                 max_new_tokens: int = 40, batch_size: int = 1024, training: dict[str, Any] | None = None) -> None:
        inner = unwrapped(model)
        if not hasattr(inner, "generate") or not hasattr(inner, "config"):
            raise ValueError(f"model: expected a model of transformers with generate(), got {type(model).__name__}")
        if getattr(tokenizer, "eos_token_id", None) is None:
            raise ValueError(f"tokenizer: expected one with an end-of-text token, got {type(tokenizer).__name__} "
                             "without: set tokenizer.eos_token")
        if not 0 < top_p <= 1 or not temperature > 0:
            raise ValueError(f"expected top_p in (0, 1] and temperature > 0, got {top_p!r} and {temperature!r}")
        self.model, self.tokenizer = model, tokenizer
        self.options: dict[str, Any] = {"top_p": top_p, "temperature": temperature, "max_new_tokens": max_new_tokens,
                        "batch_size": batch_size, "training": training}
        self.encoder_decoder = bool(inner.config.is_encoder_decoder)
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def write(self, sources: Sequence[str], n: int, seed: int) -> list[list[str]]:
        """``n`` samples for each source, without special tokens."""
        if not sources:
            return []
        per_batch = max(1, self.options["batch_size"] // n)
        out: list[list[str]] = []
        with own_random_state(seed), evaluating(self.model), torch.inference_mode():
            for at in range(0, len(sources), per_batch):
                batch = self._padded([self._source(s) for s in sources[at:at + per_batch]])
                made = self.model.generate(
                    **batch, do_sample=True, num_return_sequences=n, pad_token_id=self.pad, num_beams=1,
                    eos_token_id=self.tokenizer.eos_token_id, top_k=0,
                    **{k: self.options[k] for k in ("top_p", "temperature", "max_new_tokens")})
                start = 0 if self.encoder_decoder else batch["input_ids"].shape[1]
                texts = self.tokenizer.batch_decode(made[:, start:], skip_special_tokens=True)
                out += [texts[k:k + n] for k in range(0, len(texts), n)]
        return out

    def log_probs(self, sources: Sequence[str], targets: Sequence[str]) -> list[float]:
        """Natural log-probability of each target and its end after its source; padding does not count."""
        rows = [self._row(s, t) for s, t in zip(sources, targets, strict=True)]
        out: list[float] = []
        with evaluating(self.model), torch.inference_mode():
            for at in range(0, len(rows), max(1, self.options["batch_size"] // 4)):
                batch = self.collate(rows[at:at + max(1, self.options["batch_size"] // 4)])
                labels = batch.pop("labels").to(self.device)
                batch = {k: v.to(self.device) for k, v in batch.items()}
                if self.encoder_decoder:
                    shifted = self._shifted(labels)
                    logits = self.model(**batch, decoder_input_ids=shifted).logits
                else:
                    logits, labels = self.model(**batch).logits[:, :-1], labels[:, 1:]
                picked = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
                out += picked.masked_fill(labels == IGNORED, 0.0).sum(1).tolist()
        return out

    def trained(self, pairs: Sequence[tuple[str, str]], seed: int) -> Any:
        """A copy of this trained on (source, target) pairs by transformers' ``Trainer``.

        Raises:
            ValueError: no pairs.
        """
        from transformers import PrinterCallback, Trainer, TrainingArguments

        if not pairs:
            raise ValueError("training: expected pairs of source and target, got none")
        with own_random_state(seed), torch.inference_mode(False), tempfile.TemporaryDirectory() as folder:
            # an uncompiled copy: a compiled one would be compiled anew for every length
            model = copy.deepcopy(getattr(self.model, "_orig_mod", self.model))
            arguments = TrainingArguments(output_dir=folder, seed=seed % 2 ** 32, report_to=[], save_strategy="no",
                                          logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
                                          **{"use_cpu": self.device.type == "cpu", **TRAINING,
                                             **(self.options["training"] or {})})
            modes = [module.training for module in model.modules()]
            rows: Any = [self._row(*pair) for pair in pairs]
            trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=self.collate)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            for module, mode in zip(model.modules(), modes, strict=True):
                module.training = mode
            for parameter in model.parameters():
                parameter.grad = None
        return self.with_model(model)

    def with_model(self, model: Any) -> Any:
        """The same with another model."""
        return type(self)(model, self.tokenizer, **self.options)

    def save(self, path: Path) -> None:
        """Write the weights to one file."""
        save_tensors(path, self.model.state_dict(), format=FORMAT)

    def load(self, path: Path) -> Any:
        """The same with a copy of the model that has the weights of :meth:`save`."""
        tensors, _ = load_tensors(path, format=FORMAT)
        model = copy.deepcopy(self.model)
        model.load_state_dict(tensors)
        return self.with_model(model)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer as transformers does."""
        unwrapped_model = getattr(self.model, "_orig_mod", self.model)
        unwrapped_model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def device(self) -> Any:
        """Where the model's first weights are."""
        return next(self.model.parameters()).device

    def collate(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Rows of ids, padded on the right; labels are -100 there."""
        fills = {"input_ids": self.pad, "attention_mask": 0, "labels": IGNORED}
        return {name: torch.nn.utils.rnn.pad_sequence([torch.tensor(r[name]) for r in rows], batch_first=True,
                                                      padding_value=fill) for name, fill in fills.items()}

    def _source(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=self.encoder_decoder)["input_ids"]
        start = getattr(self.tokenizer, "bos_token_id", None)
        return ids if self.encoder_decoder or start is None else [start, *ids]

    def _row(self, source: str, target: str) -> dict[str, list[int]]:
        read = self._source(source)
        written = [*self.tokenizer(target, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        if self.encoder_decoder:
            return {"input_ids": read, "attention_mask": [1] * len(read), "labels": written}
        return {"input_ids": [*read, *written], "attention_mask": [1] * len(read + written),
                "labels": [IGNORED] * len(read) + written}

    def _padded(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """Rows padded for generation: a causal model goes on where they end, so on the left."""
        longest = max(map(len, rows))
        ids, mask = [], []
        for row in rows:
            fill = longest - len(row)
            left, right = (0, fill) if self.encoder_decoder else (fill, 0)
            ids.append([self.pad] * left + row + [self.pad] * right)
            mask.append([0] * left + [1] * len(row) + [0] * right)
        return {"input_ids": torch.tensor(ids, device=self.device),
                "attention_mask": torch.tensor(mask, device=self.device)}

    def _shifted(self, labels: Tensor) -> Tensor:
        config = unwrapped(self.model).config
        start = getattr(config, "decoder_start_token_id", None)
        first = torch.full_like(labels[:, :1], self.pad if start is None else start)
        return torch.cat([first, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, self.pad)], 1)


class ModelListener(Seq2Text):
    """A listener: reads ``[U]`` and the examples as ``[1]`` string label, and writes the program after ``[P]``."""

    @staticmethod
    def source(spec: Spec) -> str:
        """What the model reads. [the authors' code; that ``[P]`` ends the source is ours]"""
        return "[U]" + "".join(f"[{n}]{text}{label}" for n, (text, label) in enumerate(spec, 1)) + "[P]"

    def propose(self, specs: Sequence[Spec], n: int, seed: int) -> list[list[str]]:
        """See :class:`looseleaf_pragmatic_examples.Listener`."""
        return self.write([self.source(spec) for spec in specs], n, seed)

    def train(self, rows: Sequence[ListenerRow], seed: int) -> ModelListener:
        """See :class:`looseleaf_pragmatic_examples.Listener`."""
        trained: ModelListener = self.trained([(self.source(spec), program) for spec, program in rows], seed)
        return trained

    def score(self, spec: Spec, programs: Sequence[str]) -> list[float]:
        """Natural log-probability of each program."""
        return self.log_probs([self.source(spec)] * len(programs), programs)

    def rank(self, spec: Spec, consistent: Callable[[str, Utterance], bool], n: int = 500, seed: int = 0) -> Ranked:
        """Different programs that agree with every example, of ``n`` samples, by log-probability. [paper: n = 500]"""
        return rank(self, [spec], consistent, n, seed)[0]


class ModelSpeaker(Seq2Text):
    """A speaker: reads ``[P]`` program ``[U]`` and the examples as ``[1]`` label string, and writes the next."""

    @staticmethod
    def source(program: str, spec: Spec) -> str:
        """What the model reads. [the authors' code]"""
        said = "".join(f"[{n}]{label}{text}" for n, (text, label) in enumerate(spec, 1))
        return f"[P]{program}[U]{said}[{len(spec) + 1}]"

    def propose(self, said: Sequence[tuple[str, Spec]], n: int, seed: int) -> list[list[Utterance]]:
        """See :class:`looseleaf_pragmatic_examples.Speaker`; what is no example is left out."""
        written = self.write([self.source(*one) for one in said], n, seed)
        return [[(text[1:], text[0]) for text in texts if text[:1] in ("+", "-")] for texts in written]

    def train(self, rows: Sequence[SpeakerRow], seed: int) -> ModelSpeaker:
        """See :class:`looseleaf_pragmatic_examples.Speaker`."""
        trained: ModelSpeaker = self.trained([(self.source(program, spec), label + text)
                                              for program, spec, (text, label) in rows], seed)
        return trained


def rank(listener: ModelListener, specs: Sequence[Spec], consistent: Callable[[str, Utterance], bool], n: int = 500,
         seed: int = 0) -> list[Ranked]:
    """:meth:`ModelListener.rank` for many specs at once."""
    kept = [[p for p in sorted(set(some)) if all(consistent(p, u) for u in spec)]
            for spec, some in zip(specs, listener.propose(specs, n, seed), strict=True)]
    scores = iter(listener.log_probs([listener.source(s) for s, some in zip(specs, kept, strict=True) for _ in some],
                                     [p for some in kept for p in some]))
    return [sorted(((p, next(scores)) for p in some), key=lambda pair: -pair[1]) for some in kept]


def rank_by_rsa(listener: ModelListener, speaker: ModelSpeaker, specs: Sequence[Spec],
                consistent: Callable[[str, Utterance], bool], n: int = 500, seed: int = 0,
                heard: int = 20) -> list[Ranked]:
    """The baseline "RSA at inference": programs by L1 of the last example, among sampled programs and examples.

    Programs are the consistent ones of ``n`` samples; examples those that the speaker proposes for the first ``heard``
    of them after all but the last example, and the last itself. Ties, which are many, go by log-probability [ours].

    Args:
        listener, speaker: literal models.
        specs: with an example or more each.
        consistent: ``(program, utterance) -> bool``.
        n: samples of the listener, and of the speaker in all.
        seed: of the samples.
        heard: programs that the speaker is asked about.
    """
    ranked = rank(listener, specs, consistent, n, seed)
    asked = [(place, program) for place, programs in enumerate(ranked) for program, _ in programs[:heard]]
    said = speaker.propose([(program, list(specs[place][:-1])) for place, program in asked], max(1, n // heard), seed)
    options: list[set[Utterance]] = [set() for _ in specs]
    for (place, _), some in zip(asked, said, strict=True):
        options[place].update(u for u in some if u not in specs[place])
    out = []
    for spec, programs, examples in zip(specs, ranked, options, strict=True):
        columns = [spec[-1], *sorted(examples)]
        matrix = np.array([[consistent(p, u) for u in columns] for p, _ in programs], dtype=bool)
        last = rsa(matrix).L1[:, 0] if programs else np.zeros(0)
        scores = np.round(last / TIE) * TIE
        order = sorted(range(len(programs)), key=lambda k: (-scores[k], -programs[k][1]))
        out.append([(programs[k][0], float(last[k])) for k in order])
    return out


__all__ = ["ModelListener", "ModelSpeaker", "Ranked", "Seq2Text", "rank", "rank_by_rsa"]
