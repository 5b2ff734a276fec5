"""Plans broken in every way a person would break them, and changed in ways that keep them right; what is true of each.

text -> mutants (`breaking`, `sound`) -> truth on real ranks (`pool`, `truth`), verdict without any (`verdict`)
"""

from __future__ import annotations

from collections.abc import Iterator

from mutants.breaking import BREAKERS
from mutants.mutant import Mutant, Subject
from mutants.sequences import BREAKING, KEEPING
from mutants.sound import SOUND
from mutants.text import PlanText
from parallel_plans.model_spec import ModelSpec


def mutants_of(text: str, spec: ModelSpec, section: str) -> Iterator[Mutant]:
    """Every change to the rules of a section, each text once: those that are meant to be right come first."""
    subject = Subject(plan=PlanText(text), spec=spec)
    seen = {text}
    for maker in (*SOUND, *KEEPING, *BREAKING, *BREAKERS):
        for mutant in maker(subject, section):
            if mutant.text not in seen:
                seen.add(mutant.text)
                yield mutant
