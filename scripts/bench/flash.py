"""FlashAttention-2 for sentence-transformers: the installed package, or a stand-in that calls torch's copy of the
kernels.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.metadata
import importlib.util
import sys
import tempfile
from functools import cache
from pathlib import Path

_VERSION = "2.8.3"  # whose functions the stand-in has; transformers asks for 2.3.3 or newer
_PACKAGE = '''
import torch


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1),
):
    """Attention of texts that lie one behind another: q, k, v [T, heads, D] to [T, heads, D], differentiable."""
    left, right = (None if side < 0 else side for side in window_size)
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k), dropout_p, causal, False,
        scale=softmax_scale, window_size_left=left, window_size_right=right,
    )[0]


def flash_attn_func(*args, **options):
    raise NotImplementedError("the benchmark's stand-in for flash_attn has flash_attn_varlen_func alone")


flash_attn_with_kvcache = flash_attn_func
'''
_FILES = {
    "flash_attn/__init__.py": _PACKAGE,
    "flash_attn/bert_padding.py": "from flash_attn import flash_attn_func as pad_input\nunpad_input = pad_input\n",
    f"flash_attn-{_VERSION}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {_VERSION}\n",
    f"flash_attn-{_VERSION}.dist-info/top_level.txt": "flash_attn\n",
}


@cache
def provide() -> str:
    """Makes `import flash_attn` work in this process. Returns a note that names the package behind it."""
    if importlib.util.find_spec("flash_attn") is not None:
        return f"flash-attn {importlib.metadata.version('flash-attn')}"
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    for name, content in _FILES.items():
        path = Path(folder.name, name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    sys.path.append(folder.name)
    forget_packages()
    return "flash-attn is not installed: torch's own FlashAttention-2 kernels"


def forget_packages() -> None:
    """Clears transformers' record of the installed packages, which it makes once when it is imported."""
    from transformers.utils import import_utils

    importlib.invalidate_caches()
    for function in list(vars(import_utils).values()):
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    if hasattr(import_utils, "PACKAGE_DISTRIBUTION_MAPPING"):  # before transformers 5.20 or so a dictionary
        import_utils.PACKAGE_DISTRIBUTION_MAPPING.update(importlib.metadata.packages_distributions())
