"""The Quantize tab without a browser: its endpoints, its refusals, its pieces. The stub quantizes nothing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from ui_stub import StubEngine, close

from lowmem.errors import BadInput, NotAllowed, Unsupported
from lowmem.events import CancelToken, Receipt, Step
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.rates import save_rate
from lowmem.measure.rows import Row
from lowmem.plots.weights import by_block, losses
from lowmem.quant import METHODS
from lowmem.quant.layers import check_model
from lowmem.quant.request import QuantizeRequest
from lowmem.settings import settings
from lowmem.ui.html import quantize as render_quantize
from lowmem.ui.html.quantize import comparison
from lowmem.ui.launch import launch_options
from lowmem.ui.page import build_ui
from lowmem.ui.service.access import Access
from lowmem.ui.service.compare import CompareService
from lowmem.ui.service.engine import Engine
from lowmem.ui.service.quantize import QuantizeService
from lowmem.ui.service.results import push_result
from lowmem.ui.service.services import Services
from lowmem.ui.tabs.quantize_form import _bits, _groups
from lowmem.units import GB, MB

DETAILS = {
    "bits_per_quantized_weight": 4.36,
    "original_bytes": 538 * MB,
    "predicted_bytes": 116 * MB,
    "loss": 0.0123,
    "losses": {"model.layers.0.mlp.up_proj": 0.01, "model.layers.1.mlp.up_proj": 0.03},
    "resumed_blocks": 1,
}


def receipt(folder: str = "/nowhere/made") -> Receipt:
    return Receipt(
        "quantize", "Toy", "GPTQ, 4 bits", "cpu", 9.0, {"ram": 500 * MB}, {"ram": 480 * MB}, disk_bytes=116 * MB,
        notes=("One <note>.",), details=DETAILS | {"folder": folder},
    )  # fmt: skip


class StubQuantizeService(QuantizeService):
    """Estimates are real; the work is a few steps, watched for Stop."""

    stopped = 0

    def quantize(self, request: QuantizeRequest, cancel: CancelToken) -> Iterator[Step | Receipt]:
        self.estimate(request)
        for number in range(60):
            if cancel.cancelled:
                self.stopped += 1
            cancel.wait(0.01)
            yield Step(number, 60, f"Block {number}")
        yield receipt()


class StubCompareService(CompareService):
    def compare(self, ref: str, variants: Any, *given: Any) -> Iterator[Step | Row | Receipt]:
        super().compare(ref, variants, *given)  # refuses what cannot be compared
        for number, name in enumerate(variants):
            yield Step(number, len(variants), name)
            yield Row(name, perplexity=9.0, decode_tps=10.0, ram_bytes=900 * MB, predicted_ram_bytes=950 * MB)
        yield Receipt("compare", "Toy", ", ".join(variants), "cpu", 1.0)


@pytest.fixture(scope="module")
def service() -> StubQuantizeService:
    return StubQuantizeService(StubEngine())


@pytest.fixture(scope="module")
def client(service: StubQuantizeService) -> Iterator[Client]:
    demo = build_ui(services=Services(service.engine, quantize=service, compare=StubCompareService(service.engine)))
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield Client(url, verbose=False)
    close(demo)


def test_quantize_streams_steps_and_ends_in_the_receipt(client: Client) -> None:
    frames = list(client.submit("demo", "rtn", api_name="/quantize"))
    assert frames[0]["note"] == "Block 0"
    assert frames[-1]["receipt"]["details"]["bits_per_quantized_weight"] == 4.36


def test_a_caller_who_leaves_stops_the_work(client: Client, service: StubQuantizeService) -> None:
    before = service.stopped
    job = client.submit("demo", "rtn", api_name="/quantize")
    next(iter(job))
    job.cancel()
    deadline = time.monotonic() + 5
    while service.stopped == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(client.submit("demo", "rtn", api_name="/quantize"))[-1]["receipt"]


def test_compare_streams_rows(client: Client) -> None:
    frames = list(client.submit("demo", ["fp32", "hqq:4:64"], api_name="/compare"))
    assert [frame["variant"] for frame in frames if "variant" in frame] == ["fp32", "hqq:4:64"]
    assert "receipt" in frames[-1]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (("/quantize", "demo", "magic"), "There is no quantization method 'magic'."),
        (("/quantize", "demo", "awq", 3), "AWQ stores 4 bits, not 3."),
        (("/quantize", "demo", "rtn", 5), "Weights cannot be stored in 5 bits."),
        (("/quantize", "demo", "rtn", 4, 100), "Groups of 100 do not divide the 576 inputs"),
        (("/quantize", "demo", "int8_dynamic", 4), "Bits is 4."),
        (("/quantize", "a b"), "'a b' is not the name of a model."),
        (("/quantize", "demo", "gptq", 4, 64, False, "manual", 0), "Samples is 0."),
        (("/quantize", "demo", "gptq", 4, 64, False, "manual", 64, 512, {"colour": 1}), "There is no option 'colour'."),
        (("/quantize", "demo", "rtn", 4, 64, False, "manual", 64, 512, {}, "lots"), "'lots' is not a size."),
        (("/compare", "demo", []), "There are no variants to compare."),
        (("/compare", "demo", ["int3"]), "There is no variant 'int3'."),
        (("/compare", "demo", ["fp32"], "/etc/passwd"), "There is no text '/etc/passwd'."),
        (("/compare", "demo", ["fp32"], "manual", {"tokens": 1}), "Tokens of text is 1."),
    ],
)
def test_bad_input_gets_a_sentence(client: Client, call: tuple[Any, ...], sentence: str) -> None:
    endpoint, *values = call
    with pytest.raises(AppError) as caught:
        client.predict(*values, api_name=endpoint)
    assert str(caught.value).startswith(sentence)


# --- the estimate


def test_what_needs_more_than_the_budget_is_said_with_the_number(service: StubQuantizeService) -> None:
    big = service.request("Qwen/Qwen2.5-7B-Instruct", "gptq", budget=MemoryBudget.parse("2G"))
    expected = service.estimate(big)
    assert expected.verdict == "over"
    assert "more than the" in expected.sentence()
    small = service.estimate(service.request("Qwen/Qwen2.5-7B-Instruct", "rtn", budget=MemoryBudget.parse("4G")))
    assert small.verdict == "fits"
    assert 3.5 * GB < small.output_bytes < 6 * GB


def test_the_time_is_shown_once_this_machine_is_measured(
    service: StubQuantizeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = service.request("demo", "rtn")
    assert service.estimate(request).seconds is None
    assert "not measured yet" in render_quantize.card(service.estimate(request))
    work = f"quantizing with rtn {request.options} on cpu"
    save_rate(work, service.engine.spec("demo").parameters / 100)
    assert service.estimate(request).seconds == pytest.approx(100)
    assert "1 to 3 min" in render_quantize.card(service.estimate(request))
    (settings().home / "rates.json").write_text("[")
    assert service.estimate(request).seconds is None


def test_only_the_owner_of_a_page_starts_measuring(
    service: StubQuantizeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def measuring() -> Iterator[Step]:
        ran.append("measured")
        yield Step(0, 0, "")

    Engine.measure(service.engine, measuring())
    assert ran == ["measured"]
    monkeypatch.setattr(service.engine, "access", Access(public=True))
    Engine.measure(service.engine, measuring())
    assert ran == ["measured"]


def test_a_quantized_model_or_another_family_is_refused(service: StubQuantizeService) -> None:
    spec, request = service.engine.spec("demo"), service.request("demo", "gptq")
    with pytest.raises(Unsupported, match="already quantized with gptq"):
        check_model(dataclasses.replace(spec, quantization="gptq"), request)
    entangled = dataclasses.replace(spec, blocks=dataclasses.replace(spec.blocks, not_apart="shared"))
    with pytest.raises(Unsupported, match=r"GPTQ runs one block at a time, .*: its blocks share layers"):
        check_model(entangled, request)
    check_model(entangled, service.request("demo", "rtn"))


def test_results_go_below_the_outputs_and_never_over_each_other(service: StubQuantizeService) -> None:
    request = service.request("demo", "rtn", {"bits": 3})
    first = service.output(request)
    assert first == settings().outputs / "SmolLM2-135M-Instruct-rtn-3bit-g64"
    first.mkdir(parents=True)
    assert service.output(request).name == f"{first.name}-2"


# --- a page that strangers use


@pytest.fixture
def public() -> Services:
    engine = StubEngine()
    engine.access = Access(public=True)
    return Services(engine)


def test_strangers_name_no_files(public: Services, tmp_path: Path) -> None:
    text = tmp_path / "secret.txt"
    text.write_text("secret")
    with pytest.raises(BadInput, match="no calibration text"):
        public.quantize.request("demo", "gptq", calibration={"text": str(text)})
    with pytest.raises(BadInput, match="outside the folders"):
        public.engine.spec(str(tmp_path))
    options = SimpleNamespace(tokens=1_000_000)
    with pytest.raises(BadInput, match="more than the 65,536"):
        public.compare.compare("demo", ["fp32"], "manual", options, UNLIMITED, CancelToken())  # type: ignore[arg-type]


def test_strangers_push_nothing_and_owners_only_results(
    public: Services, service: QuantizeService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hosts-own")
    made = settings().outputs / "made"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    with pytest.raises(NotAllowed, match="reserved for the owner"):
        next(push_result(public.engine.access, str(made), "ada/made", "typed", True, CancelToken()))
    with pytest.raises(BadInput, match="Only results"):
        next(push_result(service.engine.access, str(tmp_path), "ada/made", "typed", True, CancelToken()))


# --- pieces


def test_the_form_offers_only_what_a_method_can_store() -> None:
    offered = {method: [bits for _, bits in _bits(method)] for method in METHODS}
    assert offered["awq"] == [4]
    assert offered["bnb"] == [4, 8]
    assert offered["int8_dynamic"] == [8]
    assert offered["gptq"] == [2, 3, 4, 8]
    assert _bits("gptq")[0][0] == "2 (experimental)"
    assert _groups("int8_dynamic") == [("A whole row", -1)]


def test_the_receipt_has_the_courses_table_and_the_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    page = render_quantize.receipt(receipt(str(tmp_path)))
    for words in ("Bits", "Original size", "Quantized size", "Relative loss", "4.36", "538 MB", "116 MB", "1.23%"):
        assert words in page
    assert f'href="gradio_api/file={tmp_path}/model.safetensors" download="model.safetensors"' in page
    assert "One &lt;note&gt;." in page


def test_a_failed_variant_keeps_its_line_with_the_reason() -> None:
    table = render_quantize.comparison([Row("fp32", perplexity=9.0), Row("nf4", error="It <failed>.")])
    assert '<td colspan="9" class="lm-failed">It &lt;failed&gt;.</td>' in table


def test_losses_are_drawn_block_by_block() -> None:
    assert by_block(DETAILS["losses"]) == [0.01, 0.03]  # type: ignore[arg-type]
    assert [bar.get_height() for bar in losses([0.01, 0.03], "t", "u").axes[0].patches] == [0.01, 0.03]


def test_a_comparison_says_in_words_which_way_a_peak_was_off_and_which_bits_are_meant() -> None:
    row = Row(
        "rtn:4:64", bits_per_parameter=8.8, bits_per_quantized_weight=4.36, ram_bytes=1136, predicted_ram_bytes=1000
    )
    html = comparison([row, Row("fp32", bits_per_parameter=32.0, ram_bytes=900, predicted_ram_bytes=1000)])
    assert "13.6% above the prediction" in html
    assert "10.0% below the prediction" in html
    assert "8.8 (4.36)" in html
    assert "Bits per parameter (per quantized weight)" in html
    assert "-12" not in html
