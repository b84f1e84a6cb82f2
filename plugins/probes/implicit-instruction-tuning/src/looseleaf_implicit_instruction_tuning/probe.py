"""The probe: does this model rank, answer and end as if it had been tuned on instructions, and do three rules do it?"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from looseleaf import Paper, Probe, Report, Series
from looseleaf import progress as progress_
from looseleaf.modes import evaluating
from looseleaf.plugin import In
from looseleaf.probes.subject import parts
from looseleaf_implicit_instruction_tuning.battery import Item, Judged, items, judge
from looseleaf_implicit_instruction_tuning.data import PAIRS
from looseleaf_implicit_instruction_tuning.measures import ResponseRanking
from looseleaf_implicit_instruction_tuning.pairs import Response, Tags, respond
from looseleaf_text import LocalModel


@dataclasses.dataclass
class ImplicitTuningProbe(Probe):
    """Does a model follow instructions, and would three hand-written rules make it (arXiv 2409.14254)?

    Args:
        prompts: instructions of the built-in battery; 0 for all.
        max_new_tokens: after which a response is cut off; a response that is cut off did not end.
        others: responses that each is ranked against.
        eos_weight: rule 1, score of the end after eos_length tokens of response.
        eos_length: tokens of response after which the end has the score eos_weight.
        repeat: rule 3, score of each token that the response has already.
        variant: paper; or code, as the official code acts, see RuleAdapter.
        ablations: also decode with each rule left out.
        user_tag: plain text before an instruction.
        assistant_tag: plain text before a response.
        batch: prompts decoded together.
    """

    prompts: Annotated[int, In(">= 0")] = 0
    max_new_tokens: Annotated[int, In(">= 1")] = 128
    others: Annotated[int, In(">= 1")] = 5
    eos_weight: Annotated[float, In(">= 0")] = 15.0
    eos_length: Annotated[int, In(">= 1")] = 250
    repeat: float = -1.5
    variant: Literal["paper", "code"] = "paper"
    ablations: bool = True
    user_tag: str = Tags.user
    assistant_tag: str = Tags.assistant
    batch: Annotated[int, In(">= 1")] = 64
    paper: ClassVar[Paper] = Paper(
        title="Instruction Following without Instruction Tuning",
        authors=("John Hewitt", "Nelson F. Liu", "Percy Liang", "Christopher D. Manning"), year=2024,
        arxiv="2409.14254", code="https://github.com/john-hewitt/implicit-ins",
        summary="Does a model follow instructions, and would three hand-written decoding rules make it?")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: few prompts and tokens."""
        return {"make": lambda: cls(prompts=3, max_new_tokens=4, others=2, ablations=False)}

    def validate(self) -> None:
        """See :meth:`looseleaf.Plugin.validate`."""
        for name in ("user_tag", "assistant_tag"):
            self.check(name, isinstance(getattr(self, name), str) and bool(getattr(self, name).strip()), "a text")
        self.check("assistant_tag", self.assistant_tag != self.user_tag, "another text than user_tag")

    @property
    def tags(self) -> Tags:
        """The two tags."""
        return Tags(self.user_tag, self.assistant_tag)

    def rules(self, tokenizer: Any, **changes: Any) -> Any:
        """The :class:`RuleAdapter` of these settings; ``changes`` are arguments of it."""
        from looseleaf_implicit_instruction_tuning.adapter import RuleAdapter

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report has them
            return RuleAdapter(tokenizer, **{"eos_weight": self.eos_weight, "eos_length": self.eos_length,
                                             "repeat": self.repeat, "variant": self.variant, **changes})

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        """Rank responses, let the model answer the battery as it is and with the rules, and judge what it says.

        Args:
            subject: a ``(model, tokenizer)`` pair, a text pipeline or a LocalModel; any causal language model of
                transformers, tuned or not. Its chat template is not used.
            data: None: the built-in pairs and battery; or pairs for the ranking (see :func:`as_pairs`); or a mapping
                with ``pairs``, ``battery`` (:class:`Item`) or both.
            seed: which items and which comparisons.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            TypeError: another subject.
            ValueError: no tokenizer, one without an end-of-text token, or data of another form.
        """
        model, tokenizer = parts(subject, needs="tokenizer")
        pairs, battery = self._data(data, seed)
        rules = self.rules(tokenizer)
        report = Report("Instruction following without instruction tuning", {
            "model": type(model).__name__, "instructions": len(battery), "pairs ranked": len(pairs),
            "tokens of a response": self.max_new_tokens, "variant": self.variant, "seed": seed,
            "rules without a token": ", ".join(map(repr, rules.unmatched)) or None})
        with evaluating(model):
            local = LocalModel(model, tokenizer)
            self._rank(report, local, pairs, seed, progress)
            arms = {"as it is": None, "all rules": rules}
            if self.ablations:
                arms |= {"without EOS rule": self.rules(tokenizer, eos_weight=0.0),
                         "without uniform rule": self.rules(tokenizer, uniform={}),
                         "without repetition rule": self.rules(tokenizer, repeat=0.0)}
            responses, judged = {}, {}
            for name in progress_.track(arms, "answering", show=progress):
                responses[name] = respond(local, [item.instruction for item in battery], rules=arms[name],
                                          tags=self.tags, max_new_tokens=self.max_new_tokens, batch=self.batch)
                judged[name] = judge(battery, responses[name], self.tags)
            show_battery(report, judged)
            for n in range(min(3, len(battery))):
                for name in ("as it is", "all rules"):
                    report.examples.append((f"{battery[n].instruction} ({name})", responses[name][n].text))
            show_rules(report, local, battery, responses["all rules"], self.tags)
        report.facts |= {"follows instructions as it is": judged["as it is"].follows,
                         "follows instructions with the rules": judged["all rules"].follows}
        return report

    def _rank(self, report: Report, local: LocalModel, pairs: Any, seed: int, progress: bool | None) -> None:
        table = report.table("Ranking of responses", [
            "score", "right instruction", "low", "high", "empty instruction", "gain", "gain low", "gain high",
            "gain of a wrong instruction", "wrong low", "wrong high"],
            note="fraction of other responses that are less likely after the instruction, strictly; gain: over an "
                 "empty instruction, paired; 95 % bootstrap over instructions. A wrong instruction is the control")
        scores: tuple[Literal["sum", "mean"], ...] = ("sum", "mean")
        for score in scores:
            found = ResponseRanking(score, self.others, tags=self.tags)(local, pairs, seed=seed, progress=progress)
            table.add(score, *found.value, sum(found.empty) / len(found.empty), *found.gain, *found.shuffled_gain)

    def _data(self, data: Any, seed: int) -> tuple[Any, Sequence[Item]]:
        battery: Any = items(self.prompts, seed)
        if data is None:
            return PAIRS, battery
        if not isinstance(data, Mapping):
            return data, battery
        if not set(data) or set(data) - {"pairs", "battery"}:
            raise ValueError(f"data: expected 'pairs', 'battery' or both, got {', '.join(map(str, data)) or 'neither'}")
        battery = data.get("battery", battery)
        if not isinstance(battery, Sequence) or not battery or not all(isinstance(item, Item) for item in battery):
            raise ValueError("data: battery: expected a list of Item, one or more, got "
                             f"{type(battery[0]).__name__ if isinstance(battery, Sequence) and battery else battery!r}")
        return data.get("pairs", PAIRS), battery


def show_battery(report: Report, judged: Mapping[str, Judged]) -> None:
    """How each way to decode does: a table and a figure."""
    table = report.table("Battery", [
        "decoding", "passed", "low", "high", "right content", "ended", "no tag written", "following", "following low",
        "following high", "repeated", "words"],
        note="passed: right content, ended and no tag. following: checks of its own instruction that a response "
             "passes, less checks of others; about 0 where the response does not depend on the instruction. "
             "repeated: fraction of words in runs of four that occur again; 95 % bootstrap over instructions")
    for name, found in judged.items():
        table.add(name, *found.score, *(sum(v) / len(v) for v in (found.content, found.ended, found.clean)),
                  *found.following, *(sum(v) / len(v) for v in (found.repeated, found.words)))
    xs = [float(n) for n in range(len(judged))]
    report.figure("Following instructions", x_label=", ".join(f"{n} {name}" for n, name in enumerate(judged)),
                  y_label="fraction of instructions", series=[
                      Series(label, xs, [i.value for i in found], [i.low for i in found], [i.high for i in found],
                             "points")
                      for label, found in (("passed", [j.score for j in judged.values()]),
                                           ("following", [j.following for j in judged.values()]),
                                           ("ended, no tag", [j.form for j in judged.values()]))])


def show_rules(report: Report, local: LocalModel, battery: Sequence[Item], responses: Sequence[Response],
               tags: Tags) -> None:
    """One response with the rules, the tokens marked that the model alone would not have chosen."""
    import torch

    n = next((n for n, response in enumerate(responses) if response.ids), None)
    if n is None:
        return
    head, = local.encode_pairs([tags.prompt(battery[n].instruction)], [["a"]])[0]
    ids = torch.tensor([[*head, *responses[n].ids]], device=local.device)
    with torch.no_grad():
        logits = local.model(input_ids=ids, use_cache=False).logits[0, len(head) - 1:-1].float()
    own = ids[0, len(head):]
    gaps = (logits.max(-1).values - logits.gather(1, own[:, None])[:, 0]).tolist()
    report.strip(f"What the rules changed: {battery[n].instruction}", [local.detokenize([int(i)]) for i in own], gaps,
                 [bool(choice != token) for choice, token in zip(logits.argmax(-1), own, strict=True)],
                 note="marked: another token than the model alone would have chosen there; shaded: by how much the "
                      "rules had to lift it, in nats")


__all__ = ["ImplicitTuningProbe", "show_battery", "show_rules"]
