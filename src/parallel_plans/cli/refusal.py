"""How a command ends where the question could not be asked: one line on stderr, nothing on stdout, exit status 2."""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import NoReturn

import typer
from transformers.utils import logging

from parallel_plans.cli.target import TargetError
from parallel_plans.errors import Finding, ParallelPlansError, PlanError
from parallel_plans.verify.page import PageError

# findings after which there is no plan to judge: a file that cannot be read as YAML, or is for another model
UNASKABLE = ("PP001", "PP002", "PP003", "PP004", "PP106")

LABEL = re.compile(r"^  (rule|on|found|expected|fix) +")  # as a finding writes them


@contextmanager
def asking(subject: str) -> Iterator[None]:
    """Within it everything that stands in the way of an answer ends the command with 2 and one line, never a traceback.

    What code of others prints there goes to stderr, since stdout is the answer's alone. A wrong plan ends it with 1 and
    all that is wrong.
    """
    try:
        with redirect_stdout(sys.stderr), _without_remarks():
            yield
    except typer.Exit:
        raise
    except (TargetError, PageError) as error:
        refuse(error)
    except PlanError as error:
        refuse_unaskable(error.findings)
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    except ParallelPlansError as error:
        refuse(error)
    except (Exception, SystemExit) as error:
        # an uncaught exception would end Python with 1, which says that the plan is wrong
        place = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        refuse(f"{subject}: the question cannot be answered, for a reason nobody thought of: {told}")


def refuse_unaskable(findings: Sequence[Finding]) -> None:
    """Ends the command with 2 where the findings say that there is no plan to judge."""
    for finding in findings:
        if finding.code in UNASKABLE:
            refuse(finding)


def refuse(reason: object) -> NoReturn:
    """Ends the command with 2 and the reason on one line."""
    print(one_line(reason), file=sys.stderr)
    raise typer.Exit(2)


def one_line(reason: object) -> str:
    """The text of an error or a finding on one line.

    >>> one_line("tp_size is 0 [PP702]\\n  expected  1 or more\\n  fix       pass tp_size=1")
    'tp_size is 0 [PP702]; expected: 1 or more; fix: pass tp_size=1'
    """
    lines = [" ".join(LABEL.sub(r"\1: ", line).split()) for line in str(reason).splitlines()]
    return "; ".join(line for line in lines if line).replace(":; ", ": ")


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Inside the block neither transformers nor Python's warnings put remarks of their own among ours."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
