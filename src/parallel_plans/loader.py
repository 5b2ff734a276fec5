"""From a plan file, or a mapping, to a `Plan`. Every mistake of a file is found and raised at once, in its order.

The format is `plans/SPEC.md`. This step knows no model: what a plan means for one is found out by resolving it.
"""

from __future__ import annotations

import difflib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

from parallel_plans.errors import Finding, PlanError
from parallel_plans.matching import pattern_problem
from parallel_plans.nodes import Fields, Node, Scalar, read_text, shown, shown_path, text_node, value_node
from parallel_plans.options import OptionError, described, integer, option_value
from parallel_plans.plan import SECTIONS, Plan, Rule
from parallel_plans.styles import Style, get_style, style_names

VERSION = 1
TOP_LEVEL_KEYS = ("version", "model_type", *SECTIONS)
UNIVERSAL_OPTIONS = {"optional": "flag"}

_RULE_NAME = "the name of a rule"
_A_NAME = "segments joined by dots; a segment is letters, digits and _, or `*`, or one `**`"
_A_RULE = "a style name, or a mapping with `style` and its options"
_A_PLAN = "a mapping of " + ", ".join(TOP_LEVEL_KEYS)


def load_plan(source: str | os.PathLike[str] | Mapping[str, object]) -> Plan:
    """The plan in a YAML file, or in a mapping: a whole plan, or only the rules of its `tp_plan`.

    Raises:
        PlanError: with everything that is wrong with the plan by itself (PP0xx), in the order of the file.
    """
    if isinstance(source, Mapping):
        is_whole = any(key in TOP_LEVEL_KEYS for key in source)
        root = value_node(source if is_whole or not source else {"tp_plan": source})
        return _Reader(None).plan(root, needs_version=False)
    file = shown_path(source)
    node, findings = text_node(read_text(source, file), file)
    return _Reader(file, findings).plan(node, needs_version=True)


class _Reader:
    """Reads nodes as a plan and keeps what is wrong with them."""

    def __init__(self, file: str | None, findings: Iterable[Finding] = ()) -> None:
        self.file = file
        self.findings = list(findings)

    def plan(self, root: Node | None, needs_version: bool) -> Plan:
        """The plan, or a `PlanError` with all findings."""
        top = self._top_level(root)
        sections = {key: self._section(key, top[key]) for key in SECTIONS if key in top}
        model_type = self._model_type(top["model_type"]) if "model_type" in top else None
        if root is not None and (needs_version or "version" in top):
            self._check_version(root, top.get("version"))
        if self.findings:
            raise PlanError(sorted(self.findings, key=lambda finding: finding.line or 0))
        return Plan(source=self.file or "<mapping>", file=self.file, model_type=model_type, sections=sections)

    def _top_level(self, root: Node | None) -> dict[str, Node]:
        if not isinstance(root, Fields):
            found = "the plan is empty" if root is None else f"the plan is {described(root)}, not a mapping"
            self._add("PP008", found, root, expected=_A_PLAN)
            raise PlanError(self.findings)
        known_before = len(self.findings)
        top: dict[str, Node] = {}
        for key, value in self._entries(root, "a key of the plan format"):
            if key.text in TOP_LEVEL_KEYS:
                top[key.text] = value
            else:
                self._add_unknown("PP010", f"`{shown(key.text)}` is not a key of a plan", key, TOP_LEVEL_KEYS)
        # an unknown key is likely the section that seems to be missing
        if not any(section in top for section in SECTIONS) and len(self.findings) == known_before:
            self._add("PP008", "the plan has no section", root, expected="at least one of " + ", ".join(SECTIONS))
        return top

    def _check_version(self, root: Node, node: Node | None) -> None:
        if node is None:
            self._add("PP011", "the plan has no version", root, fix=f"add `version: {VERSION}`")
        elif integer(node) != VERSION:
            is_text = isinstance(node, Scalar) and node.kind == "str"
            message = f"the plan's version is {'the text ' if is_text else ''}{described(node)}"
            self._add("PP011", message, node, expected=f"the integer {VERSION}", fix=f"write `version: {VERSION}`")

    def _model_type(self, node: Node) -> str | None:
        return self._text(node, "`model_type`", "the model type, as text")

    def _section(self, section: str, node: Node) -> tuple[Rule, ...]:
        if not isinstance(node, Fields):
            message = f"`{section}` is {described(node)}, not a mapping"
            self._add("PP008", message, node, expected="a mapping from names to styles")
            return ()
        rules = []
        for key, value in self._entries(node, _RULE_NAME):
            problem = pattern_problem(key.text)
            if problem is not None:
                self._add_bad_name(key, shown(problem))
            rule = self._rule(section, key, value)
            if rule is not None:
                rules.append(rule)
        return tuple(rules)

    def _add_bad_name(self, key: Scalar, problem: str) -> None:
        fix = "`*` stands for a whole segment; write one rule per name" if "*` is not a segment" in problem else None
        self._add("PP016", f"`{shown(key.text)}` is not {_RULE_NAME}: {problem}", key, expected=_A_NAME, fix=fix)

    def _rule(self, section: str, key: Scalar, value: Node) -> Rule | None:
        pattern = shown(key.text)
        options = self._rule_entries(key, value, pattern)
        if options is None:
            return None
        style_node = options.pop("style")[1]
        style = self._style(section, style_node, pattern)
        if style is None:
            return None
        assert isinstance(style_node, Scalar)
        values = self._options(style, style_node.text, options, pattern)
        optional = bool(values.pop("optional", False))
        return Rule(
            section=section,
            pattern=key.text,
            style=style_node.text,
            options=values,
            optional=optional,
            file=self.file,
            line=key.line,
        )

    def _rule_entries(self, key: Scalar, value: Node, pattern: str) -> dict[str, tuple[Scalar, Node]] | None:
        """What a rule says, by name: `style` and the options; None, and a finding, where it has no style."""
        if isinstance(value, Scalar):
            return {"style": (key, value)}
        if not isinstance(value, Fields):
            self._add("PP008", "the rule is a list", value, pattern, expected=_A_RULE)
            return None
        entries = {name.text: (name, node) for name, node in self._entries(value, "the name of an option", pattern)}
        if "style" not in entries:
            self._add("PP008", "the rule has no `style`", key, pattern, expected=_A_RULE)
            return None
        return entries

    def _style(self, section: str, node: Node, pattern: str) -> Style | None:
        name = self._text(node, "the style", "a style name, such as `replicate`", pattern)
        if name is None:
            return None
        try:
            return get_style(name)
        except KeyError:
            self._add_unknown("PP013", f"`{shown(name)}` in {section} is not a style", node, style_names(), pattern)
            return None

    def _options(
        self, style: Style, written: str, options: Mapping[str, tuple[Scalar, Node]], pattern: str
    ) -> dict[str, object]:
        kinds = {**style.options, **UNIVERSAL_OPTIONS}
        values: dict[str, object] = {}
        for name, (key, node) in options.items():
            if name not in kinds:
                message = f"the style `{shown(written)}` takes no option `{shown(name)}`"
                self._add_unknown("PP014", message, key, sorted(kinds), pattern)
            elif self._has_names_for_keys(node, f"a key of `{name}`", pattern):
                try:
                    values[name] = option_value(kinds[name], node)
                except OptionError as error:
                    self._add_bad_value(name, error, pattern)
        return values

    def _has_names_for_keys(self, node: Node, what: str, pattern: str) -> bool:
        """Whether the keys of a value are names and each given once; findings where not. A value may have no keys."""
        known_before = len(self.findings)
        if isinstance(node, Fields):
            deque(self._entries(node, what, pattern), maxlen=0)
        return len(self.findings) == known_before

    def _add_bad_value(self, name: str, error: OptionError, pattern: str) -> None:
        found = described(error.node)
        if error.reason is None:
            self._add("PP015", f"the option `{name}` cannot hold {found}", error.node, pattern, error.expected)
        else:
            message = f"the size {found} of the option `{name}` cannot be read: {error.reason}"
            self._add("PP017", message, error.node, pattern, error.expected)

    def _entries(self, node: Fields, what: str, pattern: str | None = None) -> Iterator[tuple[Scalar, Node]]:
        """The entries with a name for a key, each name once; the others are findings."""
        lines: dict[str, int | None] = {}
        for key, value in node.entries:
            if not isinstance(key, Scalar):
                expected = _A_NAME if what == _RULE_NAME else None
                self._add("PP008", f"{described(key)} stands where {what} is due", key, pattern, expected)
            elif key.kind != "str":
                self._add_no_name(key, what, pattern)
            elif key.text in lines:
                message = f"`{shown(key.text)}` is given twice, on lines {lines[key.text]} and {key.line}"
                self._add("PP009", message, key, pattern, fix="remove one of them")
            else:
                lines[key.text] = key.line
                yield key, value

    def _text(self, node: Node, what: str, expected: str, pattern: str | None = None) -> str | None:
        """The text of a scalar that must be text; None, and a finding, where it is anything else."""
        if not isinstance(node, Scalar):
            self._add("PP008", f"{what} is {described(node)}", node, pattern, expected)
        elif node.kind != "str" or not node.text:
            self._add("PP012", f"{what} is {described(node) if node.text else 'empty'}", node, pattern, expected)
        else:
            return node.text
        return None

    def _add_no_name(self, key: Scalar, what: str, pattern: str | None) -> None:
        is_name = what == _RULE_NAME and self.file is not None and pattern_problem(key.text) is None
        expected = _A_NAME if what == _RULE_NAME else None
        fix = f'put it in quotes: "{shown(key.text)}"' if is_name else None
        self._add("PP012", f"{described(key)} stands where {what} is due", key, pattern, expected, fix)

    def _add_unknown(
        self, code: str, message: str, node: Node, known: Iterable[str], pattern: str | None = None
    ) -> None:
        """A finding about a name that is not among the known ones, with the nearest of them."""
        names = tuple(known)
        near = difflib.get_close_matches(node.text, names, n=1) if isinstance(node, Scalar) else []
        fix = f"did you mean `{near[0]}`?" if near else None
        expected = None if near and code == "PP013" else "one of " + ", ".join(names)
        self._add(code, message, node, pattern, expected, fix)

    def _add(
        self,
        code: str,
        message: str,
        node: Node | None,
        pattern: str | None = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        """Keeps a finding at the node's line, unless the node itself was refused already."""
        if isinstance(node, Scalar) and node.kind == "refused":
            return
        line = None if node is None else node.line
        finding = Finding(
            code=code, message=message, file=self.file, line=line, rule=pattern, expected=expected, fix=fix
        )
        self.findings.append(finding)
