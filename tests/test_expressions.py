"""Size expressions: what they are worth, and what is no size."""

import pickle

import pytest

from parallel_plans.expressions import MAX_CHARACTERS, MAX_NESTING, ExpressionError, evaluate_size, parse

FIELDS = {"heads": 9, "kv_heads": 3, "head_dim": 64, "zero": 0, "ffn_config.experts": 8}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("head_dim", 64),
        ("heads * head_dim / kv_heads", 192),
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("20 - 3 - 4", 13),
        ("64 / 4 / 2", 8),
        ("64 / (4 / 2)", 32),
        ("7 // 2", 3),
        ("7//2*2", 6),
        ("\t head_dim  ", 64),
        ("heads * ffn_config.experts", 72),
        ("1 - 2 + 3", 2),
        ("999999999999", 999_999_999_999),
    ],
)
def test_value_follows_the_usual_precedence(text: str, value: int) -> None:
    assert parse(text).evaluate(FIELDS) == value


def test_names_are_the_fields_it_needs() -> None:
    assert parse("heads * head_dim / kv_heads + 2 * heads").names == {"heads", "head_dim", "kv_heads"}
    assert parse("config.heads / config.inner.size").names == {"config.heads", "config.inner.size"}
    assert parse("2 * 3").names == frozenset()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "ends where"),
        ("   ", "ends where"),
        ("heads *", "ends where"),
        ("* heads", "`\\*` stands where a number"),
        ("-1", "`-` stands where a number"),
        ("heads head_dim", "`head_dim` stands where an operator"),
        ("2heads", "`heads` stands where an operator"),
        ("(heads", "not closed"),
        ("heads)", "`\\)` stands where an operator"),
        ("()", "`\\)` stands where a number"),
        ("heads ** 2", "`\\*` stands where a number"),
        ("heads % 2", "'%' is no part"),
        ("1.5", "'.' is no part"),
        ("config.", "'.' is no part"),
        (".heads", "'.' is no part"),
        ("config..heads", "'.' is no part"),
        ("config. heads", "'.' is no part"),
        ("config.2", "'.' is no part"),
        ("heads\n", r"'\\n' is no part"),
        ("t\u00eate", r"'\\xea' is no part"),
        ("\u0663", r"'\\u0663' is no part"),
        ("__import__('os').getpid()", "stands where an operator|is no part"),
        ("1234567890123", "13 digits"),
    ],
)
def test_what_is_no_expression_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ExpressionError, match=reason):
        parse(text)


def test_length_is_bounded() -> None:
    fitting = "1" + "+1" * 99 + " "
    assert len(fitting) == MAX_CHARACTERS
    assert parse(fitting).evaluate({}) == 100
    with pytest.raises(ExpressionError, match="201 characters"):
        parse(fitting + " ")


def test_nesting_is_bounded() -> None:
    def nested(depth: int) -> str:
        return "(" * depth + "8" + ")" * depth

    assert parse(nested(MAX_NESTING)).evaluate({}) == 8
    with pytest.raises(ExpressionError, match=f"deeper than {MAX_NESTING}"):
        parse(nested(MAX_NESTING + 1))


def test_slash_divides_exactly_or_not_at_all() -> None:
    assert parse("head_dim / 4").evaluate(FIELDS) == 16
    with pytest.raises(ExpressionError, match="64 / 3 is not a whole number"):
        parse("head_dim / 3").evaluate(FIELDS)


@pytest.mark.parametrize("text", ["heads / zero", "heads // zero", "heads / (3 - kv_heads)"])
def test_division_by_zero_is_an_error(text: str) -> None:
    with pytest.raises(ExpressionError, match="divides by zero"):
        parse(text).evaluate(FIELDS)


@pytest.mark.parametrize(("text", "value"), [("zero", 0), ("kv_heads - heads", -6), ("1 // 2", 0)])
def test_a_size_is_at_least_1(text: str, value: int) -> None:
    with pytest.raises(ExpressionError, match=f"is {value}, and a size is at least 1"):
        parse(text).evaluate(FIELDS)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ExpressionError, match="`ffn` is not known") as caught:
        parse("heads * ffn").evaluate(FIELDS)
    assert caught.value.missing == "ffn"


def test_other_errors_miss_no_field() -> None:
    with pytest.raises(ExpressionError) as caught:
        parse("zero").evaluate(FIELDS)
    assert caught.value.missing is None


def test_what_is_true_counts_as_one_and_what_is_false_as_nothing() -> None:
    expression = parse("switch * heads + (1 - switch) * 2 * heads")
    assert [expression.evaluate({"heads": 9, "switch": switch}) for switch in (True, False)] == [9, 18]
    with pytest.raises(ExpressionError, match="is 0, and a size is at least 1"):
        parse("switch * heads").evaluate({"heads": 9, "switch": False})
    assert parse("switch * heads").evaluate({"heads": 9, "switch": False}, least=0) == 0


@pytest.mark.parametrize("value", [None, 1.0, "64"])
def test_a_field_that_is_no_integer_is_an_error(value: object) -> None:
    with pytest.raises(ExpressionError, match="not an integer"):
        parse("heads").evaluate({"heads": value})  # type: ignore[dict-item]


def test_a_size_is_an_integer_or_an_expression() -> None:
    assert evaluate_size(8, FIELDS) == 8
    assert evaluate_size("heads * 2", FIELDS) == 18
    for wrong in (0, -3, True):
        with pytest.raises(ExpressionError, match="at least 1"):
            evaluate_size(wrong, FIELDS)


def test_errors_travel_between_processes_whole() -> None:
    with pytest.raises(ExpressionError) as caught:
        parse("ffn").evaluate(FIELDS)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.missing) == (str(caught.value), "ffn")
