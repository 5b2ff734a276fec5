"""One mutant after another: the truth about it, the verdict on it, and what comes of both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mutants import mutants_of
from mutants.mutant import Mutant
from mutants.pool import Pool
from mutants.truth import Model, Outcome, Row
from mutants.verdict import Theirs, Verdict, is_loadable, spec_of, verdict_on
from parallel_plans.lookup import bundled_folder

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A mutant on a row of ranks.

    Args:
        loads: whether ranks would load it; what does not load counts as caught.
        outcome: what real ranks made of it; None where it does not load.
        theirs: whether transformers' own verifier warns of it; None where it cannot be said in a plan of theirs.
    """

    mutant: Mutant
    loads: bool
    outcome: Outcome | None
    verdict: Verdict
    theirs: bool | None

    @property
    def result(self) -> str:
        """`caught`, `missed`, `passed`, `false alarm`; `refused` for a mutant that does not load."""
        if not self.loads:
            return "false alarm" if self.mutant.sound else "refused"
        assert self.outcome is not None
        if self.outcome.wrong:
            return "caught" if self.verdict.refused else "missed"
        return "false alarm" if self.verdict.refused else "passed"

    def record(self) -> Record:
        """The trial as plain data."""
        mutant = asdict(self.mutant)
        text = mutant.pop("text")
        return {
            "key": key_of(text),
            **mutant,
            "loads": self.loads,
            "truth": None if self.outcome is None else asdict(self.outcome),
            "verdict": asdict(self.verdict),
            "theirs": self.theirs,
            "result": self.result,
        }


def key_of(text: str) -> str:
    """A short name of a plan's text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Bench:
    """One model type: its plan, its mutants, its truths."""

    def __init__(self, model_type: str, *, tied: bool = False) -> None:
        self.model = Model(model_type, tied=tied)
        self.text = (bundled_folder() / f"{model_type}.yaml").read_text()
        self.spec = spec_of(self.model.config)
        self._path = str(Path(self.model.folder).parent / "mutant.yaml")

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.model.close()

    def mutants(self, row: Row) -> Iterator[Mutant]:
        """Every mutant of the section that says how things lie on a row; none where the plan lacks it."""
        if all(f"\n{section}:" in self.text for section in (row.section, row.experts) if section is not None):
            yield from mutants_of(self.text, self.spec, row.section)

    def trials(self, mutants: list[Mutant], row: Row, pool: Pool, known: Mapping[str, Outcome]) -> Iterator[Trial]:
        """A trial for every mutant; `known` are truths by key, found before."""
        theirs = Theirs(self.spec, self.text, row)
        for mutant in mutants:
            Path(self._path).write_text(mutant.text)
            loads = is_loadable(self._path, self.spec, row)
            outcome = known.get(key_of(mutant.text)) if loads else None
            if loads and outcome is None:
                outcome = self.model.outcome(pool, row, mutant.text)
            verdict = verdict_on(mutant, self.model.config, row, self._path)
            yield Trial(mutant=mutant, loads=loads, outcome=outcome, verdict=verdict, theirs=theirs.refuses(mutant))
