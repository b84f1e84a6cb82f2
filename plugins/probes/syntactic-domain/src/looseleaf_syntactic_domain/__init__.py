"""Spurious correlations between part-of-speech patterns and domains in language models (arXiv 2509.21155)."""

from looseleaf_syntactic_domain.audit import cues, spurious, template_rate, templates, templates_per_token
from looseleaf_syntactic_domain.controls import PlantedModel
from looseleaf_syntactic_domain.facts import DomainFacts, Fact, build, countries
from looseleaf_syntactic_domain.probe import SyntacticDomainProbe, summarise
from looseleaf_syntactic_domain.refusals import RefusalProbe
from looseleaf_syntactic_domain.scores import ask, behaviour, domain_risk, select_templates
from looseleaf_syntactic_domain.tagging import LexiconTagger
from looseleaf_syntactic_domain.training import fine_tune
from looseleaf_syntactic_domain.variants import Variants, wordnet_words

__all__ = ["DomainFacts", "Fact", "LexiconTagger", "PlantedModel", "RefusalProbe", "SyntacticDomainProbe", "Variants",
           "ask", "behaviour", "build", "countries", "cues", "domain_risk", "fine_tune", "select_templates",
           "spurious", "summarise", "template_rate", "templates", "templates_per_token", "wordnet_words"]
