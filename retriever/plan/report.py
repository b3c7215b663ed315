"""A forecast as text: two lines before a run, or a table of sizes, seconds by stage and bytes by part."""

from __future__ import annotations

from retriever.config import Config, ModelConfig
from retriever.plan.forecast import Forecast
from retriever.wording import counted


def layers_of(model: ModelConfig) -> str:
    """Whose layers compute."""
    return (
        "fused layers"
        if model.fused is True
        else "compiled layers"
        if model.compile is True
        else "the library's layers"
    )


def plan_lines(forecast: Forecast, total: int) -> str:
    """The forecast of a step in two lines, from one rank's figures."""
    passes = forecast.first_pass_s, forecast.second_pass_s
    stages = f"{passes[0]:.3g} + {forecast.loss.seconds:.2g} + {passes[1]:.3g} + {forecast.update_s:.2g} s"
    peak = f"; at most {size(forecast.peak_bytes)} a GPU" if forecast.working_bytes else ""
    return (
        f"plan    a step of {forecast.workload.tokens:,} tokens a rank in {counted(len(forecast.costs), 'chunk')}, "
        f"{forecast.share('graph'):.0%} encoded once, {forecast.share('products'):.0%} again in part{peak}\n"
        f"        first pass, loss, second pass, update {stages}: {forecast.pairs_per_s:,.0f} pairs/s, "
        f"{duration(total * forecast.step_s)} for {counted(total, 'step')}"
    )


def plan_table(forecast: Forecast, config: Config, total: int, usable_bytes: float | None) -> str:
    """The whole plan: sizes, seconds by stage, bytes by part."""
    workload, memory, padding = forecast.workload, forecast.memory, forecast.computed - forecast.workload.tokens
    rows = [
        *(
            (
                name,
                f"{len(workload.lengths[side]):,}",
                f"{workload.lengths[side].sum():,} tokens in {counted(len(chunks), 'chunk')}",
            )
            for (side, chunks), name in zip(workload.chunks.items(), ("queries", "passages"), strict=True)
        ),
        (
            "tokens in a chunk",
            f"{workload.tokens_per_chunk:,}",
            f"at most; {config.model.attention}, {layers_of(config.model)}",
        ),
        ("padding", f"{padding:,}", f"{padding / forecast.computed:.0%} of what is computed"),
        (
            "encoded once",
            f"{forecast.share('graph'):.0%}",
            f"of the tokens: graphs of {counted(forecast.count('graph'), 'chunk')} are kept",
        ),
        (
            "again in part",
            f"{forecast.share('products'):.0%}",
            f"of the tokens: products of the layers are kept of {counted(forecast.count('products'), 'chunk')}",
        ),
        ("", "", ""),
        ("first pass", f"{forecast.first_pass_s:.3f} s", ""),
        ("loss", f"{forecast.loss.seconds:.3f} s", ""),
        ("second pass", f"{forecast.second_pass_s:.3f} s", ""),
        ("update", f"{forecast.update_s:.3f} s", ""),
        ("a step", f"{forecast.step_s:.3f} s", f"{forecast.pairs_per_s:,.0f} pairs/s"),
        (
            "the run",
            duration(total * forecast.step_s),
            f"{counted(total, 'step')}; evaluations and checkpoints not counted",
        ),
        ("", "", ""),
        ("weights", size(memory.weights), "and what else is there before step 1"),
        ("gradients", size(memory.gradients), ""),
        ("optimizer", size(memory.optimizer), ""),
        ("representations", size(memory.representations), "and as much for their gradients")
        if not memory.host
        else ("host memory", size(memory.host), "representations, their gradients, and copies of them"),
    ]
    if memory.bank:
        rows.append(("bank", size(memory.bank), "when it is full"))
    if usable_bytes is None:
        rows.append(("activations", "unknown", "measured on a GPU only"))
    else:
        rows += [
            ("loss at its peak", size(forecast.loss.peak_bytes), ""),
            ("kept between passes", size(forecast.retained_bytes.sum()), ""),
            ("a chunk at work", size(forecast.working_bytes), ""),
            ("peak", size(forecast.peak_bytes), f"of {size(usable_bytes)} that can be used; not all parts at once"),
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(f"{name:{widths[0]}}  {value:>{widths[1]}}  {note}".rstrip() for name, value, note in rows)


def size(count: float) -> str:
    """Bytes as GiB, or MiB where that is less than one."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    hours, minutes, rest = int(seconds) // 3600, int(seconds) // 60 % 60, int(seconds) % 60
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
