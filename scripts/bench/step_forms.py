"""The forms of Bigbatch's step that `scripts.bench.step` measures."""

from __future__ import annotations

from dataclasses import dataclass

from retriever.loss.strategies import STRATEGIES
from retriever.retention import EVERYTHING, Retention


@dataclass(frozen=True)
class Form:
    """A way to run Bigbatch's step: the condition named in its case, and the settings that make it."""

    condition: str
    settings: tuple[str, ...] = ()
    retention: Retention | None = None  # None: as preflight decides


ALL_GRAPHS = Retention(graphs=EVERYTHING)
_LIBRARY = ("model.fused=false", "model.compile=false")
PLAIN = ("model.attention=packed", *_LIBRARY)
PADDED = ("model.attention=padded", *_LIBRARY)
_MEASURED = "run.preflight=only"
AUTO = Form("", (_MEASURED, "batch.retain=auto", "batch.retain_products=auto"))  # chunks of the best measured size
FORMS = {
    "graphs": Form("graphs", (_MEASURED, "batch.retain=auto")),
    "unretained": Form("nothing kept", (_MEASURED,)),
    "compiled": Form("packed,compiled", ("model.attention=packed", "model.fused=false", "model.compile=true")),
    "packed": Form("packed", PLAIN),
    "padded": Form("padded", PADDED),
    "offload": Form("offload", (_MEASURED, "batch.offload=true")),
    **{name: Form(name, (_MEASURED, f"loss.strategy={name}")) for name in STRATEGIES if name != "tiled"},
}
# The same batch, packed and uncompiled: activations recomputed layer by layer, chunk by chunk, or (cost of neither) all
# kept.
RECOMPUTING = (
    Form("checkpointing", (*PLAIN, "model.gradient_checkpointing=true"), ALL_GRAPHS),
    Form("cache", PLAIN),
)
