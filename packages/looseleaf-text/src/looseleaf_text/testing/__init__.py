"""What tests of prompts need: a toy model and task, and servers around them (:mod:`looseleaf_text.testing.servers`)."""

from looseleaf_text.testing.toy import ASKED, BAD, FILLER, GOOD, ToyLanguageModel, toy_task

__all__ = ["ASKED", "BAD", "FILLER", "GOOD", "ToyLanguageModel", "toy_task"]
