"""pragmatic-examples: choose examples as a cooperative speaker would, and train models that reckon with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from looseleaf.lazy import lazy
from looseleaf_pragmatic_examples.choose import Shown, diverse_examples, random_examples, which_examples
from looseleaf_pragmatic_examples.optimizer import PragmaticExamples
from looseleaf_pragmatic_examples.regexes import Domain, MatchesRegex, RegexDomain, strings
from looseleaf_pragmatic_examples.self_play import (
    Listener,
    Played,
    SelfPlay,
    Speaker,
    listener_rows,
    random_specs,
    speaker_rows,
)
from looseleaf_pragmatic_examples.speech_acts import ExactListener, ExactSpeaker, agreement, rsa

if TYPE_CHECKING:
    from looseleaf_pragmatic_examples.models import ModelListener, ModelSpeaker, rank, rank_by_rsa

__all__ = ["Domain", "ExactListener", "ExactSpeaker", "Listener", "MatchesRegex", "ModelListener", "ModelSpeaker",
           "Played", "PragmaticExamples", "RegexDomain", "SelfPlay", "Shown", "Speaker", "agreement",
           "diverse_examples", "listener_rows", "random_examples", "random_specs", "rank", "rank_by_rsa", "rsa",
           "speaker_rows", "strings", "which_examples"]
__getattr__ = lazy(__name__, dict.fromkeys(("ModelListener", "ModelSpeaker", "rank", "rank_by_rsa"), "models"))
