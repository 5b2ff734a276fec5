"""Rules that fit each by itself and are wrong together: what names and shapes alone can prove."""

from __future__ import annotations

from parallel_plans.accounting import Report, one_per_form
from parallel_plans.counted import report_counts
from parallel_plans.errors import Finding, PlanError
from parallel_plans.pairing import Pairing
from parallel_plans.sum_rules import report_unsummed, report_whole
from parallel_plans.table import Table


def wrong_sums(table: Table) -> list[Finding]:
    """The findings about values that are summed though they are whole, and sums that stay partial."""
    report = Report(table.plan)
    report_whole(report, table)
    report_unsummed(report, table)
    return in_order(report)


def wrong_cuts(table: Table) -> list[Finding]:
    """The findings about weights that work together and are cut differently."""
    report = Report(table.plan)
    Pairing(report, table).check()
    report_counts(report, table)
    return in_order(report)


def in_order(report: Report) -> list[Finding]:
    """A report's findings in the order of the file, those that differ in the layer alone told once."""
    return one_per_form(sorted(report.findings, key=lambda finding: finding.line or 0))


def check_together(table: Table) -> Table:
    """The table; raises `PlanError` where its rules are wrong together."""
    if findings := [*wrong_sums(table), *wrong_cuts(table)]:
        raise PlanError(sorted(findings, key=lambda finding: finding.line or 0))
    return table
