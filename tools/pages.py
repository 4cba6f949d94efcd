"""What mkdocs calls while it builds the site: the README as first page, the commands, links to files outside docs/.

The README is not copied into docs/: its page is made here. A link to a file of the repository that is no page leads to
that file in the repository; a link to nothing stops the build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\(|(?:src|srcset)=\")(?!\w+:|#)([^)\s\"#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made from other files."""
    readme = re.sub(r"(\]\(|(?:src|srcset)=\")docs/", r"\1", (ROOT / "README.md").read_text(encoding="utf-8"))
    files.append(File.generated(config, "index.md", content=re.sub(r"(\]\()(?!docs/|\w+:|#)", r"\1", readme)))
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Leads links to files outside docs/ to the repository."""
    home = ROOT if page.file.src_uri == "index.md" else (ROOT / "docs" / page.file.src_uri).parent

    def link(found: re.Match[str]) -> str:
        target = found[2]
        if page.file.src_uri == "index.md" and (ROOT / "docs" / target).exists():
            return found[0]
        path = (home / target).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return found[0]  # mkdocs checks it
        if not path.exists() or not path.is_relative_to(ROOT):
            raise PluginError(f"{page.file.src_uri}: '{target}' is not a file of the repository")
        kind = "tree" if path.is_dir() else "blob"
        return f"{found[1]}{config.repo_url.rstrip('/')}/{kind}/main/{path.relative_to(ROOT)}"

    fences = re.split(r"(^ *```.*?^ *```$)", markdown, flags=re.S | re.M)
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(fences))


def commands() -> str:
    """The page of all commands and options, from the command line itself."""
    import typer

    from msd.cli import app

    group = typer.main.get_command(app)
    lines = ["# Commands", "", "Made from `msd --help`. Results go to stdout, everything else to stderr.", ""]
    for name, command in _leaves("msd", group):
        lines += [f"## {name}", "", " ".join((command.help or "").split()), ""]
        rows = [row for parameter in command.params if (row := _row(parameter))]
        if rows:
            lines += ["| option | meaning | default |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _leaves(name: str, command: Any) -> list[tuple[str, Any]]:
    """(full name, command) of every command below a group."""
    if not hasattr(command, "commands"):
        return [(name, command)]
    return [leaf for part, below in command.commands.items() for leaf in _leaves(f"{name} {part}", below)]


def _row(parameter: Any) -> str | None:
    """One option as a line of a table; None for `--help`."""
    if parameter.name == "help":
        return None
    named = parameter.opts[0].startswith("-")
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts]) if named else ""
    shown = names or f"`{(parameter.metavar or parameter.name).upper()}`"
    default = parameter.default
    unnamed = default is False or callable(default) or "Sentinel" in type(default).__name__
    unnamed = unnamed or default is None or default in ("", [])
    value = "required" if parameter.required else "" if unnamed else "yes" if default is True else f"`{default}`"
    meaning = " ".join((getattr(parameter, "help", None) or "").split()).replace("|", "\\|")
    return f"| {shown} | {meaning} | {value} |"
