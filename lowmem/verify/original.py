"""Jobs on the original model, in a process of their own: its predictions, and the parity check of a graph.

The original runs with one layer in memory at a time, so it fits beside the set-up that is compared with it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from lowmem.events import CancelToken, Step
from lowmem.fields import build
from lowmem.models.source import read_spec
from lowmem.planning.graph_options import ExportOptions
from lowmem.runtime.onnx.manifest import PREFILL, read_manifest
from lowmem.verify.actions import passage_of
from lowmem.verify.claims import VerifyOptions


def write_reference(folder: str, out: str, context: int, options: Mapping[str, Any]) -> Generator[Step, None, None]:
    """Write the predictions of the model in `folder` to the file `out`, see `measure.divergence`.

    Args:
        context: tokens that the set-up supports.
        options: fields of `VerifyOptions`.
    """
    import torch
    from transformers import AutoTokenizer

    from lowmem.export.reference import streamed_model
    from lowmem.measure import divergence
    from lowmem.models.checkpoint import Checkpoint

    path, cancel = Path(folder), CancelToken()  # never set: Stop kills the process
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    read = passage_of(tokenizer, context, build(VerifyOptions, options))
    with Checkpoint(path) as checkpoint, torch.inference_mode():
        model = streamed_model(path, checkpoint, read_spec(folder).stored)
        yield from divergence.write_reference(model, read, Path(out), cancel=cancel)


def check_parity(folder: str, graph: str) -> Generator[Step, None, dict[str, Any]]:
    """Check the graph in `graph` against the model in `folder`; returns the fields of `ParityCheck` and its "sentence"."""
    from lowmem.export.parity import check_decoder

    manifest = read_manifest(Path(graph))
    options = ExportOptions(
        precision=manifest.precision,
        group_size=manifest.group_size,
        fast_prefill="on" if PREFILL in manifest.files else "off",
    )
    checked = yield from check_decoder(Path(folder), Path(graph), read_spec(folder).stored, options, CancelToken())
    return checked.as_dict() | {"sentence": checked.sentence()}
