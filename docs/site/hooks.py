"""Pages that are made while the documentation is built, and links that lead out of docs/."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
OF_THE_REPOSITORY = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
_COMMAND = re.compile(r"^@(evaluation_)?command\(", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)#]*)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the repository's top level, and the help of every command."""
    for name, page in OF_THE_REPOSITORY.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, "commands.md", content=commands()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links between the top level and docs/ to pages; a link to source code becomes its text."""
    from_top = page.file.src_uri in OF_THE_REPOSITORY.values()
    folder = ROOT if from_top else (ROOT / "docs" / page.file.src_uri).parent

    def led(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = (folder / target).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return link[0]  # a generated page, or broken: the build says which
        name = path.relative_to(ROOT).as_posix()
        if name in OF_THE_REPOSITORY:
            depth = page.file.src_uri.count("/")
            return f"[{text}]({'../' * depth}{OF_THE_REPOSITORY[name]}{anchor})"
        if not name.startswith("docs/"):
            return text
        return f"[{text}]({name.removeprefix('docs/')}{anchor})" if from_top else link[0]

    return _LINK.sub(led, markdown)


def commands() -> str:
    """A page with the help of every command."""
    sys.path.insert(0, str(ROOT))
    files = [path for package in ("retriever", "eval", "scripts") for path in sorted((ROOT / package).rglob("*.py"))]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = {module: name for name, module in project["scripts"].items()}
    parts = ["# Commands\n", "What each command prints with `--help`. `--debug` adds the traceback of an error.\n"]
    for path in files:
        if _COMMAND.search(path.read_text(encoding="utf-8")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            parser = importlib.import_module(module).main.parser
            short = f"Installed as `{installed[f'{module}:main']}`.\n\n" if f"{module}:main" in installed else ""
            parts.append(f"## {parser.prog}\n\n{short}```text\n{parser.format_help()}```\n")
    return "\n".join(parts)
