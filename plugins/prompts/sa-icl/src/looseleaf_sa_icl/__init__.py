"""sa-icl: a schema of each question, refined by one retrieved solved example, and the answer with both in view."""

from looseleaf_sa_icl.memory import SchemaMemory, SolvedProblem
from looseleaf_sa_icl.optimizer import SAICL, Answer, SchemaPredictor, SchemaPrompt
from looseleaf_sa_icl.problem import multiple_choice
from looseleaf_sa_icl.schema import TEMPLATES, SchemaTemplate

__all__ = ["SAICL", "TEMPLATES", "Answer", "SchemaMemory", "SchemaPredictor", "SchemaPrompt",
           "SchemaTemplate", "SolvedProblem", "multiple_choice"]
