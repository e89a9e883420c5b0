"""The receipt of a quantization, and the model card made from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from lowmem.events import Receipt
from lowmem.fields import arguments
from lowmem.messages import msg
from lowmem.models.source import record
from lowmem.quant.card import write_card
from lowmem.quant.journal import Journal
from lowmem.quant.layers import wide_layers
from lowmem.quant.prepared import PreparedQuantization
from lowmem.quant.request import QuantizeRequest, changed


def quantize_receipt(
    prepared: PreparedQuantization, part: Path, journal: Journal, peak: dict[str, int], resumed: int
) -> Receipt:
    """The receipt of a quantization whose weights are in `part`.

    Args:
        peak: measured bytes by memory.
        resumed: blocks that an earlier run had finished.
    """
    method, options, losses = prepared.request.method, prepared.request.options, journal.losses
    groups = (
        msg("one group per row")
        if options.group_size == -1
        else msg("groups of {group_size}", group_size=options.group_size)
    )
    return Receipt(
        action="quantize",
        model=prepared.spec.name,
        precision=msg("{label}, {bits} bits, {groups}", label=method.label, bits=options.bits, groups=groups),
        device=str(prepared.device),
        seconds=journal.seconds,
        predicted={"ram": prepared.estimate.ram_bytes},
        measured={"ram": peak["ram"]},
        disk_bytes=sum(file.stat().st_size for file in part.glob("*.safetensors")),
        notes=tuple(_notes(prepared, journal, resumed)),
        snippet=_snippet(prepared.request),
        details={
            "method": method.name,
            "bits": options.bits,
            "group_size": options.group_size,
            "original_bytes": prepared.spec.size_on_disk,
            "predicted_bytes": prepared.estimate.output_bytes,
            "bits_per_quantized_weight": prepared.estimate.bits_per_quantized_weight,
            "bits_per_weight": prepared.estimate.bits_per_quantized_weight,  # its name in the last release
            "loss": sum(losses.values()) / max(1, len(losses)),
            "losses": losses,
            "embedding_bits": prepared.request.embedding_bits,
            "bits_per_parameter": 8
            * sum(file.stat().st_size for file in part.glob("*.safetensors"))
            / prepared.spec.parameters,
            "resumed_blocks": resumed,
        },
    )


def _notes(prepared: PreparedQuantization, journal: Journal, resumed: int) -> Iterator[str]:
    options = prepared.request.options
    if wide := wide_layers(prepared.spec, options):
        yield msg("These layers stay as they are: {layers}.", layers=", ".join(wide))
    if journal.tables:
        yield msg(
            "Embedding and output head are stored in {bits} bits, in a layout that lowmem reads.",
            bits=prepared.request.embedding_bits,
        )
    if journal.shared:
        yield msg(
            "{shared:,} of {experts:,} experts saw too little of the calibration text and share the statistics of all.",
            shared=journal.shared,
            experts=len(prepared.blocks) * prepared.spec.experts,
        )
    if options.bits == 2:
        yield msg("2 bits are experimental: most models of this size produce nonsense.")
    if resumed:
        yield msg("The first {resumed} blocks are from an earlier run.", resumed=resumed)


def _snippet(request: QuantizeRequest) -> str:
    return (
        "from pathlib import Path\n"
        "import lowmem\n\n"
        f"request = lowmem.QuantizeRequest.validated(\n"
        f"    {request.model!r},\n"
        f"    {request.method.name!r},\n"
        f"    dict({arguments(changed(request.options))}),\n"
        f"    dict({arguments(changed(request.calibration))}),\n"
        f"    embedding_bits={request.embedding_bits},\n"
        "    out=Path('quantized'),\n"
        f"    budget=lowmem.MemoryBudget({arguments(request.budget.as_dict())}),\n"
        ")\n"
        "for event in lowmem.quantize(request):\n"
        "    print(event)\n"
    )


def write_model_card(prepared: PreparedQuantization, part: Path, receipt: Receipt) -> None:
    """Write the model card of a quantization into `part`."""
    method, options, text = prepared.request.method, prepared.request.options, prepared.request.calibration
    write_card(
        part,
        receipt,
        asdict(options),
        format=method.config(options)["quant_method"],
        licence=record(prepared.folder).licence,
        calibration=msg(
            "{samples} x {length} tokens of {text}", samples=text.samples, length=text.length, text=text.text
        )
        if method.calibrated
        else "",
        serving=method.serving(options),
    )
