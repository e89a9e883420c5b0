"""The page without a browser: its endpoints by gradio_client, its pieces by hand. The engine is a stub."""

from __future__ import annotations

import csv
import html
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from ui_stub import StubEngine, close

from lowmem.errors import BadInput, Cancelled, DoesNotFit
from lowmem.events import CancelToken, Chunk, Completion, Receipt
from lowmem.generate.options import GenerateOptions
from lowmem.models.catalog import find
from lowmem.settings import settings
from lowmem.ui.api.endpoints import RENAMED
from lowmem.ui.html import plan as render
from lowmem.ui.launch import launch_options
from lowmem.ui.page import build_ui
from lowmem.ui.parts.failures import explain
from lowmem.ui.parts.fields import read
from lowmem.ui.parts.worker import StopTokens, pump
from lowmem.ui.service import prompts
from lowmem.ui.service.engine import Choice
from lowmem.ui.tabs.chat import conversation

ENDPOINTS = {
    "/plan",
    "/plan_for",
    "/what_runs",
    "/load",
    "/generate",
    "/chat",
    "/batch",
    "/unload",
    "/verify",
    "/machine",
    "/receipt",
    "/stored",
    "/quantize",
    "/compare",
    "/delete",
    "/perplexity",
    "/hidden_states",
    "/recall",
    "/compare_strategies",
    "/models",
    "/estimate_quantize",
    "/sweep",
    "/inspect_weights",
    "/push",
    "/estimate_export",
    "/export",
    "/benchmark",
    "/offload_plan",
    "/offload",
    "/offload_compare",
}


@pytest.fixture(scope="module")
def engine() -> StubEngine:
    return StubEngine(delay=0.002)


@pytest.fixture(scope="module")
def client(engine: StubEngine) -> Iterator[Client]:
    demo = build_ui(engine)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield Client(url, verbose=False)
    close(demo)


@pytest.fixture
def loaded(client: Client) -> Client:
    client.predict("demo", api_name="/load")
    return client


# --- endpoints


def test_every_action_has_a_named_endpoint_and_the_plumbing_is_private(client: Client) -> None:
    info = client.view_api(return_format="dict", print_info=False)
    assert set(info["named_endpoints"]) == ENDPOINTS | {f"/{old}" for old in RENAMED}
    assert info["unnamed_endpoints"] == {}
    for name, endpoint in info["named_endpoints"].items():
        assert endpoint["description"].strip(), name
        for parameter in endpoint["parameters"]:
            assert parameter["python_type"]["type"] != "Any", (name, parameter)


def test_plan_is_estimated_for_the_given_budget(client: Client) -> None:
    free = client.predict("demo", api_name="/plan")
    assert free["verdict"] == "fits"
    assert free["budgets"]["ram"]["peak"] == sum(line["count"] for line in free["budgets"]["ram"]["lines"])
    tiny = client.predict("Qwen/Qwen2.5-7B-Instruct", ram="1G", api_name="/plan")
    assert tiny["verdict"] == "over"
    assert "more than the budget of 1.00 GB" in tiny["sentence"]


def test_load_generate_unload_and_their_receipts(client: Client) -> None:
    done = client.predict("demo", api_name="/load")
    assert done["receipt"]["action"] == "load"
    assert client.predict(api_name="/machine")["resident"]["model"] == "demo"
    answer = client.predict("The sky", {"max_new_tokens": 9, "num_return_sequences": 2}, api_name="/generate")
    assert len(answer["answers"]) == 2
    assert answer["new_tokens"] == 9
    assert answer["receipt"] == client.predict(api_name="/receipt")
    assert client.predict(api_name="/unload")["action"] == "unload"
    assert client.predict(api_name="/unload") == {}
    assert client.predict(api_name="/machine")["resident"] is None


def test_chat_streams(loaded: Client) -> None:
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]
    options = {"max_new_tokens": 300}
    frames = list(loaded.submit("And now?", history, "Be brief.", options, api_name="/chat"))
    assert len(frames) > 2
    assert frames[-1]["finish"] == "length"
    assert len(frames[0]["text"]) < len(frames[-1]["text"])


def test_batch_answers_every_prompt(loaded: Client) -> None:
    answered = loaded.predict(["one", " ", "two"], api_name="/batch")
    assert [row["prompt"] for row in answered["results"]] == ["one", "two"]
    assert answered["receipt"]["action"] == "batch"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": 1e9}, "Temperature is 1000000000.0. Use a value from 0.05 to 5."),
        ({"temperature": "nan"}, "Temperature is nan. Use a value from 0.05 to 5."),
        ({"max_new_tokens": 2.5}, "Max new tokens: 2.5 is not a whole number. Use a value from 1 to 1000000."),
        ({"max_new_tokens": -1}, "Max new tokens is -1. Use a value from 1 to 1000000."),
        ({"stop": [1]}, "Stop strings: [1] is not a list of texts."),
        ({"kv": "fp3"}, "KV cache type: there is no 'fp3'. Choose one of same, int8, int4, int2, ram."),
        ({"colour": "red"}, "There is no option 'colour'."),
    ],
)
def test_absurd_options_get_a_sentence_and_the_app_goes_on(
    loaded: Client, options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(AppError) as caught:
        loaded.predict("The sky", options, api_name="/generate")
    assert str(caught.value).startswith(sentence)
    assert loaded.predict("The sky", {"max_new_tokens": 2}, api_name="/generate")["new_tokens"] == 2


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (("/generate", ""), "There is nothing to send."),
        (("/generate", "x" * 200_001), "The text has 200,001 characters"),
        (("/chat", "hi", [{"role": "wizard", "content": "x"}]), "A message in the history is malformed."),
        (("/batch", []), "There are no prompts."),
        (("/plan", "a b"), "'a b' is not the name of a model."),
        (("/plan", "demo", "int3"), "Precision: there is no 'int3'."),
        (("/plan", "demo", "auto", 10**9), "Context is 1000000000."),
        (("/plan", "demo", "auto", 512, "cuda:9"), "There is no device 'cuda:9' here."),
        (("/plan", "demo", "auto", 512, "auto", "same", "lots"), "'lots' is not a size."),
        (("/load", "Qwen/Qwen2.5-7B-Instruct", "auto", 512, "auto", "same", "1G"), "Needs "),
    ],
)
def test_bad_input_gets_a_sentence(loaded: Client, call: tuple[object, ...], sentence: str) -> None:
    endpoint, *values = call
    with pytest.raises(AppError) as caught:
        loaded.predict(*values, api_name=endpoint)
    assert str(caught.value).startswith(sentence)


def test_generating_without_a_model_says_so(client: Client) -> None:
    client.predict(api_name="/unload")
    with pytest.raises(AppError, match="No model is loaded"):
        client.predict("The sky", api_name="/generate")


def test_a_bug_is_logged_under_the_id_that_the_person_sees(loaded: Client, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AppError, match="Something went wrong inside lowmem") as caught:
        loaded.predict("boom", api_name="/generate")
    record = next(record for record in caplog.records if record.exc_info)
    assert record.getMessage().split()[-1] in str(caught.value)
    assert "a bug" not in str(caught.value)


def test_a_caller_who_leaves_stops_the_work(loaded: Client, engine: StubEngine) -> None:
    stopped, engine.stub.delay = engine.stub.cancelled, 0.05
    job = loaded.submit("The sky", {"max_new_tokens": 2000}, api_name="/generate")
    next(iter(job))
    job.cancel()
    _wait(lambda: engine.stub.cancelled > stopped, seconds=5)
    engine.stub.delay = 0.002


def _wait(condition: object, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- binding


def test_pump_yields_everything_in_order_and_few_times_a_second() -> None:
    def work() -> Iterator[int]:
        for number in range(100):
            time.sleep(0.003)
            yield number

    frames = list(pump(work(), CancelToken()))
    assert [number for frame in frames for number in frame] == list(range(100))
    assert 2 <= len(frames) <= 6


def test_pump_raises_what_the_engine_raised_after_what_it_yielded() -> None:
    def work() -> Iterator[int]:
        yield 1
        raise BadInput("No.")

    frames = pump(work(), CancelToken())
    assert next(frames) == [1]
    with pytest.raises(BadInput):
        list(frames)


def test_abandoning_pump_sets_the_token() -> None:
    token = CancelToken()

    def work() -> Iterator[int]:
        while not token.cancelled:
            time.sleep(0.01)
            yield 1

    frames = pump(work(), token)
    next(frames)
    frames.close()
    assert token.cancelled


def test_stop_reaches_work_that_still_waits_in_the_queue() -> None:
    stop_tokens, page = StopTokens(), SimpleNamespace(session_hash="page")
    stop_tokens.begin(page, "chat")  # type: ignore[arg-type]
    stop_tokens.stop(page, "chat")  # type: ignore[arg-type]
    with stop_tokens.running(page, "chat") as token, pytest.raises(Cancelled):  # type: ignore[arg-type]
        list(pump(iter([1]), token))


def test_closing_a_page_stops_its_work_and_nobody_elses() -> None:
    stop_tokens, one, other = StopTokens(), SimpleNamespace(session_hash="one"), SimpleNamespace(session_hash="other")
    mine, theirs = stop_tokens.begin(one, "chat"), stop_tokens.begin(other, "chat")  # type: ignore[arg-type]
    stop_tokens.leave(one)  # type: ignore[arg-type]
    assert mine.cancelled
    assert not theirs.cancelled


def test_explain_keeps_the_sentence_of_a_failure_and_hides_a_bug() -> None:
    assert explain(DoesNotFit("Needs 5 GB.", "Use 3 bits.")) == ("Needs 5 GB.", "Use 3 bits.")
    message, hint = explain(KeyError("secret"))
    assert "secret" not in message + hint


# --- pieces


def test_controls_become_options_again() -> None:
    names = ("max_new_tokens", "stop", "greedy", "top_p")
    options = read(GenerateOptions, names, [64.0, "END\n\nUser:", True, 0.5])
    assert options == GenerateOptions(max_new_tokens=64, stop=("END", "User:"), greedy=True, top_p=0.5)


def test_the_models_own_sampling_options_are_shown() -> None:
    from lowmem.ui.tabs.generate import SAMPLING, GenerateTab

    spec = replace(find("demo").spec(), sampling=(("eos_token_id", 2), ("temperature", 0.6), ("top_k", 20)))
    resident = SimpleNamespace(spec=spec, cache_type="same")
    tab = SimpleNamespace(
        engine=SimpleNamespace(resident=resident), setup=SimpleNamespace(view=lambda _choosing: []), context=None
    )
    shown = GenerateTab._view(tab, False)[-len(SAMPLING) :]
    assert dict(zip(SAMPLING, (one.value for one in shown), strict=True)) == {
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.0,
    }  # fmt: skip


def test_conversation_flattens_what_gradio_sends() -> None:
    history = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert conversation(history, " Be brief. ") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "\ufeffone\n\ntwo, with comma\n"),
        ("p.csv", 'id,Prompt\n1,one\n2,"two, with comma"\n'),
        ("p.csv", 'one\n"two, with comma"\n'),
        ("p.jsonl", '{"prompt": "one"}\n\n"two, with comma"\n'),
    ],
)
def test_prompt_files(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert prompts.gather("", str(path)) == ["one", "two, with comma"]


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("p.txt", b"x" * 2_000_001, "p.txt is 2.00 MB, more than the 2.00 MB allowed."),
        ("p.txt", b"x\n" * 1001, "1,001 prompts are more than the 1,000 allowed in one batch."),
        ("p.txt", b"\xff\xfe\x00", "p.txt is not UTF-8 text."),
        ("p.pdf", b"x", "p.pdf is not a .txt, .csv or .jsonl file."),
        ("p.jsonl", b'{"prompt": "x"}\n{"prompt": 3}', "Line 2 has no prompt."),
        ("p.jsonl", b"{", "Line 1 is not JSON."),
    ],
)
def test_prompt_files_that_cannot_be_used(tmp_path: Path, name: str, data: bytes, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(BadInput) as caught:
        prompts.gather("", str(path))
    assert caught.value.message == sentence


def test_results_are_written_whole_in_the_order_of_the_prompts() -> None:
    rows = [Completion(1, "b", "two\nlines"), Completion(0, "a", 'say "1"')]
    table, lines = prompts.write_results(rows)
    assert table.parent.parent == settings().outputs
    with table.open(newline="", encoding="utf-8") as file:
        assert [row["text"] for row in csv.DictReader(file)] == ['say "1"', "two\nlines"]
    assert [json.loads(line)["prompt"] for line in lines.read_text().splitlines()] == ["a", "b"]
    assert {path.name for path in table.parent.iterdir()} == {"results.csv", "results.jsonl"}


def test_html_escapes_what_comes_from_outside() -> None:
    evil = "<script>alert(1)</script>"
    receipt = Receipt("load", evil, evil, "cpu", 1.0, notes=(evil,))
    pages = [
        render.receipt(receipt),
        render.table([Completion(0, evil, evil)]),
        render.unknown_card(evil),
        render.refusals([(evil, evil)], "x"),
        render.resident(None, evil),
    ]
    assert all("<script" not in page and "&lt;script" in page for page in pages)


def test_budget_bar_says_its_shares_to_a_screen_reader_and_its_verdict_in_words() -> None:
    engine = StubEngine(vram_gb=6)
    over = render.budget(engine.plan(Choice(model="Qwen/Qwen2.5-7B-Instruct", precision="fp16")))
    assert 'data-verdict="over"' in over
    assert "Doesn't fit" in html.unescape(over)
    assert 'role="img" aria-label="' in over
    assert over.index("GPU memory") < over.index("RAM")  # the computing device's budget first


def test_the_context_of_a_resident_model_is_called_planned() -> None:
    plan = StubEngine().plan(Choice(model="demo"))
    assert "planned for 2,048 tokens" in render.slim(plan, None)
    assert "planned for 2,048 tokens" in render.resident(plan, "")


def test_live_line_counts_the_context() -> None:
    line = render.live(Chunk("x", 0, 90, 10, 2048, 0.4, 600.0, 29.8))
    assert "Context: 100 of 2,048 tokens" in line
    assert "29.8" in line


# --- launch


def test_the_page_is_built_without_torch() -> None:
    code = "import sys, app; assert app.demo; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert done.stdout.strip().endswith("[]"), done.stderr
