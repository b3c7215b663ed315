"""Detects FAISS's GPU build and moves indexes to GPUs. The CPU build is the default: on GPUs torch searches exactly
(`engines.streaming`).
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Literal

from retriever.config import ConfigError

if TYPE_CHECKING:
    import faiss

GpuUse = Literal["off", "shard", "replicate"]
_MOST_ON_GPU = 2048  # FAISS's GPU indexes return no more passages a query


def check_faiss_build(gpu: GpuUse = "off") -> None:
    """Raises ConfigError where more than one build of FAISS is installed, or GPUs are asked for and cannot be used.

    The builds share one import name: the one installed last overwrites files of the other.
    """
    builds = sorted(
        {
            f"{d.name} {d.version}"
            for d in importlib.metadata.distributions()
            if (d.name or "").lower().startswith("faiss")
        }
    )
    if len(builds) != 1:
        how = "uninstall all of them, then install one" if builds else "install one: pip install faiss-cpu"
        raise ConfigError(f"expected exactly one build of FAISS; found {', '.join(builds) or 'none'}: {how}")
    if gpu == "off":
        return
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        raise ConfigError(
            f"--faiss-gpu {gpu}: {builds[0]} has no GPU code; expected one of faiss-gpu's builds, or --faiss-gpu off"
        )
    if faiss.get_num_gpus() == 0:
        raise ConfigError(f"--faiss-gpu {gpu}: FAISS sees no GPU; expected at least one, or --faiss-gpu off")


def to_gpus(index: faiss.Index, gpu: GpuUse, k: int) -> faiss.Index:
    """The index on all GPUs: `shard` divides its passages among them, `replicate` copies it to each, which divides the
    queries.

    Raises ConfigError where FAISS has no GPU form of this index (HNSW), or more than 2,048 passages a query are asked
    for.
    """
    if gpu == "off":
        return index
    import faiss

    if k > _MOST_ON_GPU:
        raise ConfigError(
            f"--k: expected at most {_MOST_ON_GPU:,} with --faiss-gpu {gpu}, received {k:,}; "
            "lower it, or use --faiss-gpu off"
        )
    options = faiss.GpuMultipleClonerOptions()
    options.shard = gpu == "shard"
    try:
        return faiss.index_cpu_to_all_gpus(index, co=options)
    except RuntimeError as error:
        raise ConfigError(
            f"--faiss-gpu {gpu}: FAISS cannot put {type(index).__name__} on GPUs ({error}); use --faiss-gpu off"
        ) from error
