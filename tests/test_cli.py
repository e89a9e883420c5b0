"""The command line: what it prints where, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import toys

from lowmem.__main__ import main
from lowmem.cli.offload import _Answers
from lowmem.events import Completion


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(toys.save_toy("llama", tmp_path_factory.mktemp("cli")))


@pytest.fixture(autouse=True)
def _no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime's own memory is measured by a child of several seconds; the default will do here."""
    monkeypatch.setattr("lowmem.cli.plan.measure_runtime_bytes", lambda: 0)


def test_plan_as_json_has_the_budget_share_by_share(folder, capsys):
    assert main(["plan", folder, "--ram", "2G", "--context", "256", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    ram = answer["budgets"]["ram"]
    assert ram["limit"] == 2_000_000_000
    assert (
        sum(ram[key] for key in ("weights", "kv", "activations", "scratch", "overhead")) == answer["predicted"]["ram"]
    )


def test_plan_without_a_model_recommends_one_that_is_here(capsys):
    assert main(["plan"]) == 0
    printed = capsys.readouterr().out
    assert "SmolLM2-135M-Instruct" in printed
    assert "GB RAM" in printed


def test_generate_prints_the_answer_and_the_receipt_apart(folder, capsys):
    assert main(["generate", folder, "--prompt", "Hello", "--greedy", "--max-new-tokens", "5", "--context", "64"]) == 0
    streams = capsys.readouterr()
    assert streams.out
    assert "peak: predicted" in streams.err
    assert "peak" not in streams.out


def test_json_leaves_nothing_but_the_receipt_on_standard_output(folder, capsys):
    assert main(["generate", folder, "--prompt", "Hello", "--greedy", "--max-new-tokens", "5", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    receipt = json.loads(lines[0])
    assert receipt["action"] == "generate"
    assert receipt["new_tokens"] == 5
    assert receipt["predicted"]["ram"] > 0


def test_a_file_of_prompts_gives_a_line_each(folder, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\nthree\n", encoding="utf-8")
    assert main(["generate", folder, "--prompts", str(file), "--greedy", "--max-new-tokens", "3", "--raw"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert sorted(row["prompt"] for row in rows) == ["one", "three", "two"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "nan"], "Temperature"),
        (["--max-new-tokens", "0"], "Max new tokens"),
        (["--top-p", "7"], "Top-p"),
        (["--context", "0"], "context of 0"),
        (["--ram", "5M"], "100 MB"),
        (["--precision", "fp16"], "fp16"),
    ],
)
def test_senseless_values_end_with_3_and_one_sentence(folder, capsys, arguments, words):
    assert main(["generate", folder, "--prompt", "Hello", *arguments]) == 3
    streams = capsys.readouterr()
    assert words in streams.err
    assert "Traceback" not in streams.err
    assert streams.out == ""


@pytest.mark.parametrize("model", ["no/such/model/at/all", "../../etc", "nowhere", "org/unknown-model"])
def test_unknown_models_end_with_3(capsys, model):
    assert main(["plan", model]) == 3
    assert capsys.readouterr().err.count("\n") <= 2


def test_over_the_budget_says_the_number_and_what_to_do(folder, capsys):
    assert main(["generate", folder, "--prompt", "Hello", "--ram", "100M", "--precision", "fp32"]) == 3
    error = capsys.readouterr().err
    assert "budget of 100 MB" in error
    assert "try anyway" in error


@pytest.mark.parametrize(
    "arguments", [["fly"], ["generate", "demo"], ["plan", "--ram", "lots"], ["generate", "demo", "--prompt"]]
)
def test_wrong_use_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_an_unreadable_file_of_prompts(folder, tmp_path: Path, capsys):
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    for path in (binary, tmp_path / "absent.txt"):
        assert main(["generate", folder, "--prompts", str(path)]) == 3
        assert "cannot be read as text" in capsys.readouterr().err


def test_a_reader_that_stops_early_is_no_error(folder):
    command = [sys.executable, "-m", "lowmem", "plan", folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0
    assert errors == ""


def test_identical_answers_are_printed_once(capsys):
    answers = _Answers()
    for index, text in enumerate(("blue.", "blue.", "grey.", "blue.")):
        answers.show(Completion(index, "The sky is", text))
    answers.finish()
    streams = capsys.readouterr()
    assert streams.out == "blue.\n\ngrey."
    assert streams.err.strip() == "3 of 4 answers are identical."


def test_plan_names_the_shares_as_the_page_does(folder, capsys):
    assert main(["plan", folder]) == 0
    printed = capsys.readouterr().out
    assert "KV cache" in printed
    assert " kv " not in printed


def test_plan_says_when_offloading_would_fit():
    # In a process of its own: what this one holds would be part of the estimate.
    command = [sys.executable, "-m", "lowmem", "plan", "demo", "--ram", "640M"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "over" in done.stdout
    assert "see lowmem offload --help" in done.stdout
