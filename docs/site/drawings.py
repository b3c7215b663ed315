"""Draws the pictures of docs/how.md: `python docs/site/drawings.py` writes docs/drawings/*.svg."""

from __future__ import annotations

from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "drawings"
_STYLE = """
svg { --ink: #1a1a1a; --faint: #6a717a; --encode: #b9d4ef; --loss: #f3cf9c; --again: #bfe0c4; --line: #8a919a; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6e6e6; --faint: #9aa3ad; --encode: #24486b; --loss: #6b4a17; --again: #23512c; --line: #77808a; }
}
text { font: 14px system-ui, sans-serif; fill: var(--ink); } .faint { fill: var(--faint); font-size: 12px; }
rect { stroke: var(--line); } .encode { fill: var(--encode); } .loss { fill: var(--loss); }
.again { fill: var(--again); }
.empty { fill: none; stroke-dasharray: 3 3; } path { stroke: var(--line); fill: none; } .ends { fill: var(--line); }
"""


def drawings() -> dict[str, str]:
    """File name -> SVG."""
    return {"step.svg": step(), "tiles.svg": tiles(), "ring.svg": ring()}


def step(chunks: int = 4) -> str:
    """The three phases of a step, and what is in memory at each moment."""
    phases = (  # kind, title, boxes, height of the memory, what it is
        ("encode", "encode", chunks, 28, "no graph: embeddings remain"),
        ("loss", "loss and its gradient", 3, 22, "no similarity matrix"),
        ("again", "encode again, backpropagate", chunks, 56, "one chunk's activations"),
    )
    parts, x, width = [text(20, 106, "GPU memory", "faint")], 20, 62
    for kind, title, count, height, memory in phases:
        parts += [text(x, 24, title), text(x, 196, memory, "faint")]
        for i in range(count):
            left = x + i * width
            parts += [box(left, 36, width, 40, kind), box(left + 4, 176 - height, width - 8, height, kind)]
            if kind != "loss":
                parts.append(text(left + width / 2, 61, f"chunk {i + 1}", "faint", "middle"))
        x += count * width + 24
    parts.append(f"<path d='M20 176 H{x - 24}'/>")
    return svg(x, 208, "A step encodes chunks, computes the loss, and encodes the chunks again", parts)


def tiles(rows: int = 4, columns: int = 8) -> str:
    """The similarity matrix, of which a tile is computed at a time."""
    parts, size, left, top = list[str](), 40, 120, 44
    for i in range(rows):
        for j in range(columns):
            kind = "loss" if (i, j) == (1, 3) else "encode" if (i, j) < (1, 3) else "empty"
            parts.append(box(left + j * size, top + i * size, size, size, kind))
    right = left + columns * size + 30
    parts += [text(left, 28, "passages of all GPUs"), text(20, top + rows * size / 2, "queries")]
    parts += [box(right, top, 24, rows * size, "again"), text(right + 36, top + 20, "one log-sum-exp a query")]
    parts.append(text(right + 36, top + 46, "is updated by each tile", "faint"))
    for row, (kind, meaning) in enumerate((("encode", "done, forgotten"), ("loss", "in memory"), ("empty", "to come"))):
        y = top + 84 + 24 * row
        parts += [box(right + 36, y, 16, 16, kind), text(right + 60, y + 13, meaning, "faint")]
    return svg(right + 230, top + rows * size + 16, "The loss sees the similarity matrix tile by tile", parts)


def ring(ranks: int = 4) -> str:
    """Ranks that pass blocks of passages on."""
    parts, width = list[str](), 170
    for rank in range(ranks):
        x = 20 + rank * width
        parts += [box(x, 40, 120, 84, "empty"), text(x + 60, 30, f"GPU {rank}", anchor="middle")]
        parts += [box(x + 10, 50, 100, 26, "encode"), text(x + 60, 68, f"queries {rank}", "faint", "middle")]
        parts += [box(x + 10, 88, 100, 26, "again"), text(x + 60, 106, f"passages {rank}", "faint", "middle")]
        if rank < ranks - 1:
            parts.append(f"<path d='M{x + 122} 101 H{x + width - 4}' marker-end='url(#end)'/>")
    end = 20 + (ranks - 1) * width + 60
    parts.append(f"<path d='M{end} 126 V148 H80 V128' marker-end='url(#end)'/>")
    parts.append(
        text(20, 172, f"After {ranks} turns every query has met every passage. No GPU holds more than two blocks.")
    )
    return svg(20 + ranks * width, 188, "Blocks of passages go round a ring of GPUs", parts)


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rectangle."""
    return f"<rect class='{kind}' x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}'/>"


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text."""
    return f"<text class='{kind}' x='{x:g}' y='{y:g}' text-anchor='{anchor}'>{escape(content)}</text>"


def svg(width: float, height: float, title: str, parts: list[str]) -> str:
    """A whole picture."""
    size = f"width='{width:g}' height='{height:g}' viewBox='0 0 {width:g} {height:g}'"
    end = "<path class='ends' d='M0 0 L8 4 L0 8 Z'/>"
    marker = f"<marker id='end' markerWidth='8' markerHeight='8' refX='7' refY='4' orient='auto'>{end}</marker>"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img'><title>{escape(title)}</title>"
    return "\n".join((head, f"<style>{_STYLE}</style><defs>{marker}</defs>", *parts, "</svg>\n"))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, drawing in drawings().items():
        (FOLDER / name).write_text(drawing, encoding="utf-8")
