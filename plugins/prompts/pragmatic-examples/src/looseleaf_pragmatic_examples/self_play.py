"""Self-play: a speaker and a listener learn from examples that rational speech acts choose among their samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np

from looseleaf.plugin import In, check_fields
from looseleaf.progress import track
from looseleaf.resume import SearchState, StateError, digest
from looseleaf_pragmatic_examples.regexes import Utterance
from looseleaf_pragmatic_examples.speech_acts import TIE, rsa

Spec = Sequence[Utterance]
ListenerRow = tuple[Spec, str]
"""A spec and its program."""
SpeakerRow = tuple[str, Spec, Utterance]
"""A program, what was said of it so far, and what is said next."""


class Listener(Protocol):
    """Proposes programs for specs. :class:`looseleaf_pragmatic_examples.ModelListener` is one."""

    def propose(self, specs: Sequence[Spec], n: int, seed: int) -> list[list[str]]:
        """``n`` samples for each spec; they may be wrong, repeated, or no programs."""

    def train(self, rows: Sequence[ListenerRow], seed: int) -> Listener:
        """Another listener, trained from this one, which stays as it is."""

    def save(self, path: Path) -> None:
        """Write what training has changed."""

    def load(self, path: Path) -> Listener:
        """Another listener with what :meth:`save` wrote."""


class Speaker(Protocol):
    """Proposes the next example of a program. :class:`looseleaf_pragmatic_examples.ModelSpeaker` is one."""

    def propose(self, said: Sequence[tuple[str, Spec]], n: int, seed: int) -> list[list[Utterance]]:
        """``n`` samples for each program and what was said of it so far."""

    def train(self, rows: Sequence[SpeakerRow], seed: int) -> Speaker:
        """Another speaker, trained from this one, which stays as it is."""

    def save(self, path: Path) -> None:
        """Write what training has changed."""

    def load(self, path: Path) -> Speaker:
        """Another speaker with what :meth:`save` wrote."""


@dataclasses.dataclass
class Played:
    """What self-play gave.

    Attributes:
        listener, speaker: trained.
        specs: of each round the targets and the examples chosen for them, in order.
    """

    listener: Any
    speaker: Any
    specs: list[list[tuple[str, list[Utterance]]]]


def allowed(utterance: Utterance) -> bool:
    """At most 25 characters and no white space, as the paper's code has it."""
    return len(utterance[0]) <= 25 and not any(map(str.isspace, utterance[0]))


@dataclasses.dataclass
class SelfPlay:
    """Trains a listener and a speaker on examples that rational speech acts choose among their own proposals.

    In each round, for each new target program, turn by turn: the listener proposes programs for the examples so far
    (those consistent with all of them are kept, as a set, and the target is added), the speaker proposes examples of
    the target, and the example with the highest S1 joins the spec; ties go to the first in sorted order. A turn without
    a usable example is skipped. Then both are trained on all prefixes. [section on PraX; the authors' code]

    Ours: the speaker's last example is trained on, too, which the authors' code leaves out; in the first round, where
    current and literal models are the same, they propose once.

    Args:
        listener, speaker: the literal models, trained on random pairs; see :class:`Listener` and :class:`Speaker`.
        consistent: ``(program, utterance) -> bool``; False for a text that is no program.
        rounds: rounds of play and training. [paper: 10]
        programs_per_round: targets of a round. [paper: 1,024]
        turns: examples of a spec. [paper: 10]
        listener_samples, speaker_samples: proposals of each model in each turn. [paper: 250]
        from_scratch: train from the literal models on the data of all rounds; False: go on from the current ones, on
            the data of the last round.
        include_literal: the literal models propose beside the current ones.
        dedupe: ``"text"``: different texts are different programs, as in the authors' code, so that equivalent ones
            share probability; ``"language"``: those with one ``key`` are one program.
        key: for ``dedupe="language"``: program -> what equivalent programs share, such as ``RegexDomain().key``.
        usable: which examples may be chosen. [the authors' code: :func:`allowed`]
    """

    listener: Any
    speaker: Any
    consistent: Callable[[str, Utterance], bool]
    rounds: Annotated[int, In(">= 1")] = 10
    programs_per_round: Annotated[int, In(">= 1")] = 1024
    turns: Annotated[int, In(">= 1")] = 10
    listener_samples: Annotated[int, In(">= 1")] = 250
    speaker_samples: Annotated[int, In(">= 1")] = 250
    from_scratch: bool = True
    include_literal: bool = True
    dedupe: Literal["text", "language"] = "text"
    key: Callable[[str], Any] | None = None
    usable: Callable[[Utterance], bool] = allowed

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("listener", "speaker"):
            missing = [m for m in ("propose", "train", "save", "load") if not hasattr(getattr(self, name), m)]
            if missing:
                raise ValueError(f"SelfPlay.{name}: expected propose, train, save and load, got "
                                 f"{type(getattr(self, name)).__name__} without {', '.join(missing)}: wrap a model of "
                                 f"transformers in Model{name.capitalize()}(model, tokenizer)")
        if self.dedupe == "language" and self.key is None:
            raise ValueError("SelfPlay.key: expected a function for dedupe='language', such as RegexDomain().key, "
                             "got None")

    def run(self, sample: Callable[[int, int], list[str]], *, seed: int = 0, state_dir: str | Path | None = None,
            progress: bool | None = None) -> Played:
        """Play and train.

        Args:
            sample: ``(n, seed) -> programs``, such as ``RegexDomain().sample``: the targets of each round.
            seed: the only source of randomness.
            state_dir: finished rounds are kept there, with the models after the last; the same call goes on.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            StateError: the state on disk is damaged or of another run.
            ValueError: a round in which no example was found, for any target.
        """
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                   if isinstance(getattr(self, f.name), (int, str))}
        # probes of the literal models tell them from others; the functions cannot be told apart
        marks = [self.listener.propose([[]], 2, seed), sample(2, seed)]
        state = SearchState(state_dir, {"self-play": {k: v for k, v in options.items() if k != "rounds"},
                                        "seed": seed, "models": digest(marks)})
        saved = state.load() or {"specs": []}
        specs = [[(program, [(text, label) for text, label in spec]) for program, spec in one]
                 for one in saved["specs"]][:self.rounds]
        listener, speaker = self.listener, self.speaker
        if specs:
            listener, speaker = self._restored(Path(str(state_dir)), len(specs), specs, seed)
        for number in track(range(len(specs), self.rounds), "rounds", show=progress):
            targets = sample(self.programs_per_round, seed * 100_003 + number + 1)
            specs.append(self.play(targets, listener, speaker, seed=seed * 100_003 + number, progress=progress))
            listener, speaker = self._trained(listener, speaker, specs, seed)
            if state_dir is not None:
                folder = Path(state_dir)
                listener.save(folder / f"listener-{len(specs)}")
                speaker.save(folder / f"speaker-{len(specs)}")
                state.save({"specs": specs})
        return Played(listener, speaker, specs)

    def play(self, targets: Sequence[str], listener: Listener, speaker: Speaker, *, seed: int,
             progress: bool | None = None) -> list[tuple[str, list[Utterance]]]:
        """The examples chosen for each target, with these models; see the class."""
        contexts: list[list[Utterance]] = [[] for _ in targets]
        for turn in track(range(self.turns), "turns", show=progress):
            own = (seed * 1009 + turn) * 2
            programs = self._proposed(listener, self.listener, contexts, self.listener_samples, own)
            said = list(zip(targets, contexts, strict=True))
            examples = self._proposed(speaker, self.speaker, said, self.speaker_samples, own + 1)
            for target, context, some, more in zip(targets, contexts, programs, examples, strict=True):
                found = self.next_example(target, context, some, more)
                if found is not None:
                    context.append(found)
        if not any(contexts):
            raise ValueError(f"self-play: expected examples of some of {len(targets)} targets, got none that agrees "
                             "with its target: train the literal speaker longer, or raise speaker_samples")
        return list(zip(targets, contexts, strict=True))

    def next_example(self, target: str, context: Spec, programs: Sequence[str],
                     examples: Sequence[Utterance]) -> Utterance | None:
        """The most informative of ``examples`` of ``target`` after ``context``; None where none may be used.

        Args:
            target: a program.
            context: what was said before.
            programs: what the target might be taken for; inconsistent ones are left out.
            examples: to choose from; what disagrees with the target, was said or is not usable is left out.
        """
        options = sorted({u for u in examples if u not in context and self.usable(u) and self.consistent(target, u)})
        if not options:
            return None
        rivals = [p for p in sorted(set(programs)) if p != target and all(self.consistent(p, u) for u in context)]
        if self.dedupe == "language" and self.key is not None:
            rivals = list({self.key(p): p for p in [*reversed(rivals), target]}.values())
            rivals = [p for p in rivals if p != target]
        matrix = [[True] * len(options), *([self.consistent(p, u) for u in options] for p in rivals)]
        row = rsa(matrix).S1[0]
        return options[int(np.flatnonzero(row >= row.max() * (1 - TIE))[0])]

    def _proposed(self, current: Any, literal: Any, asked: Sequence[Any], n: int, seed: int) -> list[list[Any]]:
        out = current.propose(asked, n, seed)
        if self.include_literal and current is not literal:
            out = [[*a, *b] for a, b in zip(out, literal.propose(asked, n, seed), strict=True)]
        return out

    def _trained(self, listener: Any, speaker: Any, specs: Sequence[Sequence[tuple[str, list[Utterance]]]],
                 seed: int) -> tuple[Any, Any]:
        if self.from_scratch:
            listener, speaker = self.listener, self.speaker
        used = [pair for one in specs for pair in one] if self.from_scratch else list(specs[-1])
        return (listener.train(listener_rows(used), seed + len(specs)),
                speaker.train(speaker_rows(used), seed + len(specs)))

    def _restored(self, folder: Path, done: int, specs: Any, seed: int) -> tuple[Any, Any]:
        paths = folder / f"listener-{done}", folder / f"speaker-{done}"
        try:
            return self.listener.load(paths[0]), self.speaker.load(paths[1])
        except FileNotFoundError as error:
            if self.from_scratch:
                return self._trained(self.listener, self.speaker, specs, seed)
            raise StateError(f"{folder}: expected the models after round {done}, got none ({error}): remove the folder "
                             "to begin again") from error


def listener_rows(specs: Sequence[tuple[str, Spec]]) -> list[ListenerRow]:
    """Training data of a listener: every prefix of length 1 to n -> the program."""
    return [(list(spec[:n + 1]), program) for program, spec in specs for n in range(len(spec))]


def speaker_rows(specs: Sequence[tuple[str, Spec]]) -> list[SpeakerRow]:
    """Training data of a speaker: the program and a prefix -> the next example."""
    return [(program, list(spec[:n]), spec[n]) for program, spec in specs for n in range(len(spec))]


def random_specs(programs: Sequence[str], examples: Callable[[str, int, int], list[Utterance]], most: int,
                 seed: int) -> list[tuple[str, list[Utterance]]]:
    """What literal models are trained on: each program with 1 to ``most`` random examples of it.

    Args:
        programs: texts.
        examples: ``(program, n, seed)`` -> at most n examples of each label; such as ``RegexDomain().examples``.
        most: longest spec.
        seed: decides lengths and examples.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, most + 1, len(programs))
    return [(program, examples(program, most, seed + n)[:int(length)])
            for n, (program, length) in enumerate(zip(programs, lengths, strict=True))]


__all__ = [
    "Listener",
    "Played",
    "SelfPlay",
    "Speaker",
    "Spec",
    "allowed",
    "listener_rows",
    "random_specs",
    "speaker_rows",
]
