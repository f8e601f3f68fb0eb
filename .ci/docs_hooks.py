"""What mkdocs and mkdocstrings cannot know of this repository; mkdocs.yml names this file twice.

As hooks of mkdocs: benchmarks/, which lies outside docs/, becomes measured/ in the site, and links to it are links
within the site. As an extension of griffe, which reads the source: functions that `takes_options` decorates are shown
with the signature and the docstring they have at run time, every option among them.
"""

import inspect
import pydoc
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted(BENCHMARKS.rglob("*")):
        if path.suffix in (".md", ".png"):
            name = Path("measured", path.relative_to(BENCHMARKS)).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    return markdown.replace("](../benchmarks/", "](measured/")


class ShowOptions(griffe.Extension):
    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if not any("takes_options" in str(decorator.value) for decorator in func.decorators):
            return
        function: Any = pydoc.locate(func.path)
        func.parameters = griffe.Parameters(*(_shown(p) for p in inspect.signature(function).parameters.values()))
        if func.docstring is not None:
            func.docstring.value = inspect.getdoc(function) or ""


def _shown(parameter: inspect.Parameter) -> griffe.Parameter:
    hint, default = parameter.annotation, parameter.default
    written = hint if isinstance(hint, str) else inspect.formatannotation(hint)
    return griffe.Parameter(
        parameter.name,
        annotation=None if hint is parameter.empty else written,
        kind=griffe.ParameterKind(parameter.kind.description),
        default=None if default is parameter.empty else repr(default),
    )
