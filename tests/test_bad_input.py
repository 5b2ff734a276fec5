"""What commands do with questions that cannot be asked: exit status 2, one line on stderr that says why, no traceback.

A plan file that cannot be read as YAML, or is for another model, leaves nothing to judge: 2. A plan that can be read
and is wrong is judged: 1, with all findings.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from parallel_plans import lookup
from parallel_plans.cli import main, verify
from parallel_plans.cli.refusal import asking, one_line
from parallel_plans.errors import Finding
from parallel_plans.lookup import bundled_folder

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "models"
UNPLANNED = "the question cannot be answered, for a reason nobody thought of"
NO_PLAN = "version: 1\ntp_plan:\n"

FACTORIES = """
import sys
import torch
from torch import nn

print("read")
number = 3

def raises():
    raise RuntimeError("no such weights,\\nat all")

def ends():
    sys.exit(0)

def nothing():
    return None

def pair(width=8):
    print("made")
    return nn.Sequential(nn.Linear(width, 12), nn.Linear(12, width))

def odd():
    model = pair()
    model.config = {"model_type": "odd", "hidden_size": 8}
    return model

class Zoo:
    @staticmethod
    def pair():
        return pair()
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory with factories in it, which are forgotten afterwards."""
    (tmp_path / "own_models.py").write_text(FACTORIES, encoding="utf-8")
    (tmp_path / "broken_models.py").write_text("def pair(:\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_models", None)


def asked(*arguments: str) -> Result:
    """What `verify_tp_plan --json` does."""
    return CliRunner().invoke(verify.app, [*arguments, "--json"])


def shown(*arguments: str) -> Result:
    """What `parallel-plans show` does."""
    return CliRunner().invoke(main.app, ["show", *arguments])


def assert_refused(result: Result, words: str) -> None:
    """One line that holds the words, exit status 2, and nothing on stdout."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.splitlines()
    assert words in line, line
    assert len(line) < 700
    assert UNPLANNED not in line
    assert result.stdout == ""


# what a config file holds, and words of what is said about it
BAD_CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "its config is empty; expected a JSON object"),
    "blank": (b" \n", "its config is empty"),
    "no json": (b'{"model_type": "llama",', "its config is not JSON: JSONDecodeError: Expecting property name"),
    "binary": (bytes(range(256)), "its config is not JSON"),
    "weights": (b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", "its config is not JSON"),
    "deep": (b"[" * 100_000, "its config is not JSON: RecursionError"),
    "list": (b"[1]", "its config is JSON, but a list; expected an object"),
    "number": (b"3", "its config is JSON, but a number; expected an object"),
    "null": (b"null", "its config is JSON, but null; expected an object"),
    "text": (b'"llama"', "its config is JSON, but text; expected an object"),
    "no type": (b"{}", "its config names no model_type"),
    "type is a number": (b'{"model_type": 3}', "its config has the model_type 3; expected the name"),
    "type is a list": (b'{"model_type": ["llama"]}', "its config has the model_type ['llama']; expected the name"),
    "unknown type": (b'{"model_type": "no_such"}', "its model_type no_such is none of transformers"),
    "wrong kind": (b'{"model_type": "llama", "hidden_size": "big"}', "hidden_size' expected int, got str"),
    "not a number": (b'{"model_type": "llama", "hidden_size": NaN}', "hidden_size' expected int, got float"),
    "no heads": (b'{"model_type": "llama", "num_attention_heads": 0}', "ZeroDivisionError"),
    "negative": (b'{"model_type": "llama", "vocab_size": -3}', "negative dimension"),
    "encoder": (b'{"model_type": "vit"}', "transformers has no causal language model of type vit"),
    "own code": (
        b'{"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Config"}}',
        "its model_type own is none of transformers; it is code of its own (auto_map), which is not run: make",
    ),
    "own model": (
        b'{"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "modeling_own.Model"}}',
        "transformers has no causal language model of type vit; it is code of its own (auto_map), which is not run",
    ),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_config_that_cannot_be_read_is_refused_in_a_file_and_in_a_folder(name: str, tmp_path: Path) -> None:
    data, words = BAD_CONFIGS[name]
    (tmp_path / "checkpoint").mkdir()
    for path, target in (("some.json", "some.json"), ("checkpoint/config.json", "checkpoint")):
        (tmp_path / path).write_bytes(data)
        for result in (asked(target), shown(target)):
            assert_refused(result, f"{target}: ")
            assert words in result.stderr


def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    fields = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Config"}}
    (tmp_path / "own" / "config.json").write_text(json.dumps(fields))
    (tmp_path / "own" / "configuration_own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    result = CliRunner().invoke(verify.app, ["own"], input="y\n")
    assert_refused(result, "which is not run")
    assert not (tmp_path / "was_run").exists()


TARGETS = {
    "/no/such/folder": "/no/such/folder: no such folder or file, and no model type of transformers",
    "no_such_type": "no_such_type: no such folder or file, and no model type of transformers",
    "": "(nothing): no such folder or file",
    "empty": "empty: there is no config.json in this folder",
    "dangling": "dangling: the link leads nowhere, and no model type of transformers",
    "loop": "loop: the link leads nowhere",
    "a" * 5000: "File name too long",
    "a\0b": "a\\x00b: no such folder or file",
    "vit": "vit: transformers has no causal language model of type vit",
    "t5": "t5: transformers has no causal language model of type t5",
    "bert": "there is no plan for model_type bert [PP704]; expected: parallel_plan.yaml beside the checkpoint",
    "gpt2": "there is no plan for model_type gpt2 [PP704]",
    "no_module:make": "no_module:make: ModuleNotFoundError: No module named 'no_module'",
    "broken_models:pair": "broken_models:pair: SyntaxError: invalid syntax (broken_models.py, line 1)",
    ":pair": ":pair: ValueError: Empty module name",
    "json:": "json:: AttributeError: module 'json' has no attribute ''",
    "json:no_such": "json:no_such: AttributeError: module 'json' has no attribute 'no_such'",
}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: repr(target)[:24])
def test_a_target_that_is_not_there_is_refused(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "bundled_types", lambda: ())
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for result in (asked(target), shown(target)):
        assert_refused(result, TARGETS[target])


@pytest.mark.parametrize(
    ("factory", "words"),
    [("raises", "RuntimeError: no such weights, at all"), ("ends", "SystemExit: 0"), ("no_such", "AttributeError"),
     ("nothing", "gives a NoneType, not a torch.nn.Module"), ("number", "TypeError: 'int' object is not callable")],
)  # fmt: skip
def test_a_factory_that_gives_no_model_is_refused_and_what_it_prints_is_no_answer(factory: str, words: str) -> None:
    for ask in (asked, shown):
        sys.modules.pop("own_models", None)
        result = ask(f"own_models:{factory}")
        assert (result.exit_code, result.stdout) == (2, "")
        printed, line = result.stderr.splitlines()
        assert printed == "read"
        assert line.startswith(f"own_models:{factory}")
        assert words in line


@pytest.mark.parametrize("factory", ["pair", "Zoo.pair", "odd"])
def test_a_factory_may_print_and_stdout_is_one_object_all_the_same(factory: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(NO_PLAN + '  "0": colwise\n  "1": rowwise\n', encoding="utf-8")
    result = asked(f"own_models:{factory}", "--plan", "plan.yaml", "--level", "geometry")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ok"] is True
    assert "made" in result.stderr
    refused = asked("own_models:pair", "--set", "height=3", "--plan", "plan.yaml")
    assert "TypeError: pair() got an unexpected keyword argument 'height'" in refused.stderr
    assert (refused.exit_code, refused.stdout) == (2, "")


SETTINGS = {
    "nonsense": "--set nonsense: expected key=value",
    "=3": "--set =3: expected key=value",
    "no_such_field=1": "llama: its config has no field no_such_field that could be set",
    "to_dict=1": "llama: its config has no field to_dict that could be set",
    "model_type=mixtral": "llama: its config has no field model_type that could be set",
    "hidden_size=big": "llama: hidden_size cannot be 'big': StrictDataclassFieldValidationError",
    "hidden_size=[1]": "llama: hidden_size cannot be [1]",
    "tie_word_embeddings=maybe": "llama: tie_word_embeddings cannot be 'maybe'",
    "per_layer_config=5": "llama: per_layer_config cannot be 5",
    "num_attention_heads=0": "no causal language model can be built from its config: ZeroDivisionError",
    "hidden_act=no_such": "no causal language model can be built from its config: KeyError: 'no_such'",
    "hidden_size=" + "9" * 5000: "llama: hidden_size cannot be '999",
    "rope_parameters=" + "[" * 100_000: "llama: rope_parameters cannot be '[[[",
}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting[:24])
def test_a_setting_that_the_config_does_not_take_is_refused(setting: str) -> None:
    assert_refused(asked("llama", "--set", setting), SETTINGS[setting])


@pytest.mark.parametrize(
    ("sizes", "words"),
    [(("--tp", "4", "--ep", "3"), "lie across each other [PP702]; expected: ep_size * etp_size a divisor"),
     (("--tp", "4", "--etp", "3"), "etp_size=3 does not divide tp_size=4 [PP702]; expected: etp_size a divisor")],
)  # fmt: skip
def test_sizes_that_do_not_fit_together_are_refused(sizes: tuple[str, ...], words: str) -> None:
    for result in (asked("mixtral", *sizes), shown("mixtral", *sizes)):
        assert_refused(result, words)


@pytest.mark.parametrize("axis", ["--tp", "--ep", "--etp"])
@pytest.mark.parametrize("size", ["0", "-1", "1000000000", "9" * 40, "two", "1.5", ""])
def test_a_size_that_is_none_is_refused_as_every_bad_option_is(axis: str, size: str) -> None:
    for result in (asked("mixtral", axis, size), shown("mixtral", axis, size)):
        assert (result.exit_code, result.stdout) == (2, "")
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert f"Invalid value for '{axis}'" in line


@pytest.mark.parametrize(
    "arguments", [(), ("llama", "--no-such"), ("llama", "--level", "wishes"), ("llama", "mistral"), ("llama", "--tp")]
)
def test_a_command_that_is_not_one_is_refused(arguments: tuple[str, ...]) -> None:
    result = asked(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr


# what lies where the plan should be, and words of what is said about it
UNREADABLE_PLANS: dict[str, tuple[bytes, str]] = {
    "binary": (bytes(range(256)), "plan.yaml:2: byte 0x80 is not UTF-8 [PP003]; fix: save the file as UTF-8"),
    "not yaml": (b"version: 1\ntp_plan: [", "plan.yaml:2: the plan is not YAML"),
    "unquoted star": (b"version: 1\ntp_plan:\n  *: replicate\n", "put a name that begins with * in quotes"),
    "too large": (b"#" * (2**20 + 1), "plan.yaml: the plan is larger than 1048576 bytes [PP002]"),
    "another model": (
        (bundled_folder() / "mixtral.yaml").read_bytes(),
        "plan.yaml: the plan is for model_type mixtral, the model is llama [PP106]; expected: model_type: llama",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE_PLANS)
def test_a_plan_file_that_holds_no_plan_for_the_model_is_refused(name: str, tmp_path: Path) -> None:
    data, words = UNREADABLE_PLANS[name]
    (tmp_path / "plan.yaml").write_bytes(data)
    for result in (asked("llama", "--plan", "plan.yaml"), shown("llama", "--plan", "plan.yaml")):
        assert_refused(result, words)


def test_a_plan_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for plan, words in (
        ("no.yaml", "no.yaml: the plan cannot be read: No such file or directory [PP001]; expected: a YAML file"),
        ("folder", "folder: the plan cannot be read: Is a directory [PP001]"),
        ("dangling", "dangling: the plan cannot be read: No such file or directory [PP001]"),
        ("builtin", "there is no plan for model_type gpt2 [PP704]"),
    ):
        target = "gpt2" if plan == "builtin" else "llama"
        for result in (asked(target, "--plan", plan), shown(target, "--plan", plan)):
            assert_refused(result, words)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "secret" / "config.json"
    config.parent.mkdir()
    config.write_text('{"model_type": "llama"}')
    config.chmod(0)
    assert_refused(asked("secret"), "secret: its config cannot be read: Permission denied")
    assert_refused(asked("llama", "--plan", str(config)), "the plan cannot be read: Permission denied [PP001]")
    config.parent.chmod(0)
    try:
        assert_refused(asked("secret/config.json"), "secret/config.json: it cannot be looked up: Permission denied")
    finally:
        config.parent.chmod(0o700)


def denied(*args: object, **kwargs: object) -> Any:
    raise PermissionError(13, "Permission denied")


def test_what_may_not_be_looked_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the last test, also where the tests run as root."""
    monkeypatch.setattr(Path, "exists", denied)
    assert_refused(asked("secret/config.json"), "secret/config.json: it cannot be looked up: Permission denied")


@pytest.mark.parametrize(
    ("text", "code"),
    [("", "PP008"), ("hello", "PP008"), ("- 1", "PP008"), ("version: 1\n", "PP008"), (NO_PLAN, "PP008"),
     (NO_PLAN + '  "**": relicate\n', "PP013"), (NO_PLAN + "  model.norm: replicate\n", "PP102")],
)  # fmt: skip
def test_a_plan_that_can_be_read_and_is_wrong_gives_1_and_findings(text: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text, encoding="utf-8")
    result = asked("llama", "--plan", "plan.yaml")
    assert result.exit_code == 1
    assert code in {finding["code"] for finding in json.loads(result.stdout)["findings"]}
    result = shown("llama", "--plan", "plan.yaml")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"[{code}]" in result.stderr


def test_experts_asked_for_of_a_dense_model_are_a_finding_about_its_plan() -> None:
    result = asked("llama", "--ep", "2")
    assert result.exit_code == 1
    (finding,) = json.loads(result.stdout)["findings"]
    assert finding["code"] == "PP108"


def answered(reason: BaseException) -> None:
    with asking("some_model"):
        print("not an answer")
        raise reason


@pytest.mark.parametrize("reason", [ValueError("two\nlines"), SystemExit(0), MemoryError()], ids=repr)
def test_what_nobody_thought_of_is_one_line_too(reason: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    """1 is what Python ends with after a traceback, and what a wrong plan ends with: the two must not be mixed up."""
    with pytest.raises(typer.Exit) as caught:
        answered(reason)
    assert caught.value.exit_code == 2
    result = capsys.readouterr()
    printed, line = result.err.splitlines()
    assert printed == "not an answer"
    assert line.startswith(f"some_model: {UNPLANNED}: {type(reason).__name__}: ")
    assert f"({__file__}:" in line
    assert result.out == ""


def test_a_finding_on_one_line_keeps_all_that_it_says() -> None:
    finding = Finding(
        code="PP702", message="tp_size is 0", file="a.yaml", line=3, name="x", found="[4]", expected="1", fix="pass 1"
    )
    assert one_line(finding) == "a.yaml:3: tp_size is 0 [PP702]; on: x [4]; expected: 1; fix: pass 1"


def ran(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=120, check=False, env=environment
    )


@pytest.mark.parametrize(
    "command", [("verify", "gpt2", "--plan", "builtin", "--json"), ("main", "show", "own_models:raises")]
)
def test_a_process_of_its_own_says_the_same(command: tuple[str, ...]) -> None:
    """With what transformers, torch and Python themselves put on stderr."""
    done = ran(f"parallel_plans.cli.{command[0]}", *command[1:])
    assert (done.returncode, done.stdout) == (2, "")
    # not what torchao, where it is installed, has to say of itself when transformers imports it
    lines = [
        each for each in done.stderr.splitlines() if each != "read" and not re.match(r"W\d{4} |Failed to load ", each)
    ]
    assert len(lines) == 1, done.stderr
    assert ("PP704" if command[0] == "verify" else "RuntimeError: no such weights, at all") in lines[0]


# Random damage: whatever a file holds, a command ends with one of its three statuses.

JUNK = (None, 0, -1, 1, 3, 64, 1.5, float("nan"), "", "abc", "\udc80", True, [], [1], {}, {"a": 1}, [[]])
SCRAPS = ("*", ":", "- ", "[", "{", '"', "&a ", "!!x ", "\t", "\n", "\0", "\ufeff", "true", "1", "null", "colwise")


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something can be replaced in what JSON holds."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*before, key)
        yield from places(item, (*before, key))


def assert_ends_well(result: Result, damage: object) -> None:
    assert result.exit_code in (0, 1, 2), damage
    assert result.exception is None or isinstance(result.exception, SystemExit), (damage, result.exception)
    assert UNPLANNED not in result.stderr, (damage, result.stderr)
    assert len(result.stdout.splitlines()) == (0 if result.exit_code == 2 else 1), damage
    if result.exit_code == 2:
        assert len(result.stderr.splitlines()) == 1, (damage, result.stderr)


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_config_is_read_or_refused(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    fields = json.loads(chance.choice(sorted(CONFIGS.glob("*.json"))).read_text(encoding="utf-8"))
    damaged = copy.deepcopy(fields)
    *outer, last = place = chance.choice(list(places(fields)))
    within = damaged
    for key in outer:
        within = within[key]
    junk = chance.choice(JUNK)
    within[last] = junk
    (tmp_path / "damaged.json").write_text(json.dumps(damaged), encoding="utf-8")
    assert_ends_well(asked("damaged.json", "--level", "geometry"), (fields["model_type"], place, junk))


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_plan_is_read_or_refused(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    path = chance.choice(sorted(bundled_folder().glob("*.yaml")))
    text = path.read_text(encoding="utf-8")
    for _ in range(chance.choice((1, 1, 3))):
        at = chance.randrange(len(text))
        text = text[:at] + chance.choice(SCRAPS) + text[at + chance.choice((0, 1, 8)) :]
    (tmp_path / "damaged.yaml").write_text(text, encoding="utf-8")
    assert_ends_well(asked(path.stem, "--plan", "damaged.yaml", "--level", "geometry"), text)
