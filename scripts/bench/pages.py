"""The pages of the benchmarks: what each says, and the columns of its tables."""

from __future__ import annotations

from dataclasses import dataclass

Columns = dict[str, tuple[str, str]]  # metric -> heading and format; the first metric decides which rows are shown


@dataclass(frozen=True)
class Page:
    """A benchmark's page. `tables` maps what stands above a table to its columns."""

    title: str
    text: str
    tables: dict[str, Columns]


_ERRORS = {
    "## Error against float64\n\n"
    "`gradient` is the larger of ‖Δ‖/‖reference‖ for dQ and dP; `loss` is the relative error of the loss.": {
        "gradient_error": ("gradient", "{:.1e}"),
        "loss_error": ("loss", "{:.1e}"),
    }
}
_TIME = {"forward_backward_ms": ("ms", "{:,.2f}"), "lead": ("Bigbatch is", "{:.2f}×")}
PAGES = {
    "loss": Page(
        "The loss alone",
        """\
InfoNCE over bf16 unit vectors with one positive per query, at temperature 0.02. `ms` is the median time of a forward
and a backward pass. `share` is the fraction of the matmul rate of the same run, counting 8·b²·d operations. The loss
needs 6·b²·d where a row of similarities fits the workspace, so a share can exceed 100%. `MiB` is the peak memory that
a call adds to its inputs, including gradients and cuBLAS's workspaces. `Bigbatch is` gives Bigbatch's speed as a
multiple of the method's.""",
        {
            "": {
                **_TIME,
                "share": ("share", "{:.0%}"),
                "forward_ms": ("forward, ms", "{:,.2f}"),
                "peak_extra_mb": ("MiB", "{:,.0f}"),
            },
            **_ERRORS,
        },
    ),
    "ring": Page(
        "The loss over several GPUs",
        """\
InfoNCE over bf16 unit vectors with one positive per query, at temperature 0.02; b counts the pairs of all ranks. `ms`
is the median time of a forward and a backward pass on the slowest rank. `MiB per rank` is the peak memory that a call
adds to its inputs, including gradients. `predicted` is the estimate of `retriever/parallel/cost.py` at that commit.
`exposed` is (time − time with local copies in place of transfers) / time. `Bigbatch is` gives Bigbatch's speed as a
multiple of the method's.""",
        {
            "": {
                **_TIME,
                "predicted_ms": ("predicted", "{:,.1f}"),
                "mb_per_rank": ("MiB per rank", "{:,.0f}"),
                "predicted_mb": ("predicted", "{:,.0f}"),
                "exposed_share": ("exposed", "{:.1%}"),
            },
            **_ERRORS,
        },
    ),
    "step": Page(
        "The whole training step",
        """\
BERT-base, or the shape that the command names as `--model`, with random weights and its own dropout (BERT's 0.1),
bf16 autocast, AdamW, temperature 0.02. Pairs have MS MARCO's lengths (queries around 9 tokens, passages around 76)
and come from a token store through the loader's threads. Bigbatch's times are means over whole steps, waits included;
a peer's time is that of its fastest step. `dense`, `local` and `disco` are strategies of the loss, which on one GPU
differ in what they hold at once only; the others are tiled. `floor` is one pass: every chunk is encoded once with its
graph, and a fixed gradient is propagated back. `MFU` is 6 · parameters without embeddings · real tokens, divided by the
matmul rate of the same run. Values in parentheses are the prediction made before the run. `graphs` and `products` are
the shares of tokens whose chunks keep their graphs or their saved activations between the passes. `data` (weights,
optimizer, embeddings), `loss` and `encoder` (a chunk's activations, parameters' and embeddings' gradients) are parts of
the predicted peak, in GiB: it is about data + max(loss, encoder) where nothing is kept. `waited` is the share of the
step spent waiting for data. `Bigbatch is` gives the speed of Bigbatch's best form as a multiple of the
method's. Every form of Bigbatch is checked before it is timed: its gradient against fp32, and replayed chunks against
kept ones, bitwise (except embedding tables, whose gradients torch may sum by atomics).""",
        {
            "": {
                "pairs_per_s": ("pairs/s", "{:,.0f}"),
                "lead": ("Bigbatch is", "{:.2f}×"),
                "tokens_per_s": ("tokens/s", "{:,.0f}"),
                "mfu": ("MFU", "{:.3f}"),
                "peak_gib": ("peak GiB", "{:.1f}"),
                "data_gib": ("data", "{:.1f}"),
                "loss_gib": ("loss", "{:.1f}"),
                "encoder_gib": ("encoder", "{:.1f}"),
                "retained": ("graphs", "{:.0%}"),
                "products": ("products", "{:.0%}"),
                "waited": ("waited", "{:.2%}"),
            }
        },
    ),
    "largest": Page(
        "The largest batch",
        """\
A training step over the pairs of `scripts.bench.step`: random weights, bf16 autocast, AdamW, fp32 weights. `pairs` is
the largest batch found, of all ranks; `out of memory at` is the smallest batch above it that was tried and did not fit.
`W` is the number of ranks; with more than one, the GPU is one of them, and local copies of the same size replace
transfers. `nothing kept` is the gradient cache, `all graphs` encodes every chunk once and keeps its graph. Except for
`all graphs`, steps are shortened: the encoder's first chunk of each side, the tiled loss's first and last blocks;
everything is allocated in full. The second table compares this with a whole step. In the third one, embeddings and
their gradients are in host memory: `host GiB` is what they take there, as the plan counts it.""",
        {
            "": {
                "largest": ("pairs", "{:,.0f}"),
                "fails_at": ("out of memory at", "{:,.0f}"),
                "peak_gib": ("peak GiB", "{:.1f}"),
            },
            "## Whole steps and shortened ones": {
                "whole_peak_gib": ("whole, GiB", "{:.2f}"),
                "shortened_peak_gib": ("shortened, GiB", "{:.2f}"),
            },
            "## With batch.offload": {
                "offload_peak_gib": ("peak GiB", "{:.2f}"),
                "host_gib": ("host GiB", "{:.2f}"),
            },
        },
    ),
    "encode": Page(
        "Encoding a corpus",
        """\
BERT-base with random weights, bf16, passages of 76 tokens on average. `ids`: from token ids to embeddings in host
memory. `text`: from text to shards on disk (for sentence-transformers, to host memory). `worst cosine` is the lowest
cosine between a passage's embedding and that of the padded fp32 encoder, over a sample. cuDNN's attention is off,
because it builds a plan for every new shape of padded texts. `Bigbatch is` gives Bigbatch's speed as a multiple of
the method's.""",
        {
            "": {
                "passages_per_s": ("passages/s", "{:,.0f}"),
                "lead": ("Bigbatch is", "{:.2f}×"),
                "peak_gib": ("peak GiB", "{:.1f}"),
            },
            "## Exactness": {"cosine_min": ("worst cosine", "{:.6f}")},
        },
    ),
    "accuracy": Page(
        "Accuracy by method",
        """\
Training by several methods over the same data, evaluated after the last step. A line without a seed is the mean over
seeds; its note has the least and the most. `gradient` is ‖g − g*‖/‖g*‖ at the first batch, where g* has one graph over
all chunks; `other masks` is the same for a g* under other dropout masks. `replayed`: the second pass repeats the masks
of the first one; `redrawn`: it draws its own; `undropped`: without dropout. `accumulated` adds the gradients of small
batches, whose queries have the negatives of their small batch only. `small` updates after each small batch; `moco` and
`contaccum` do so with a memory bank that makes up for the size.""",
        {
            "": {
                "nDCG@10": ("nDCG@10", "{:.4f}"),
                "gradient_error": ("gradient", "{:.1e}"),
                "other_masks": ("other masks", "{:.1e}"),
                "seconds": ("s a step", "{:.3f}"),
            }
        },
    ),
}
