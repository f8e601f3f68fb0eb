"""Functions that take `**options: Unpack[SomeOptions]`: their signature, help text and completion list every option.

A TypedDict names the options once, each field `Annotated[type, "what it means"]`. `takes_options` expands them where a
person looks (`help`, `inspect.signature`, completion in IPython) and refuses keywords that are none of them. Nothing
here imports torch: the command line uses it as well.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args

Function = TypeVar("Function", bound=Callable[..., Any])
_KEYWORD, _REST = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD


def expand(function: Callable[..., Any], defaults: Mapping[str, Any]) -> tuple[inspect.Signature, dict[str, Any]]:
    """The signature with the fields of its `**options: Unpack[T]` in the place of `**options`, and those fields with
    their annotations. defaults: of fields, by name; the others' is None."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    rest = parameters.pop()
    assert rest.kind is _REST, f"{function.__qualname__} takes no **options"
    annotation = rest.annotation
    if isinstance(annotation, str):
        annotation = eval(annotation, function.__globals__)
    (options,) = get_args(annotation)
    fields = dict(options.__annotations__)  # those of the TypedDicts it extends are among them
    parameters += [
        inspect.Parameter(name, _KEYWORD, default=defaults.get(name), annotation=hint) for name, hint in fields.items()
    ]
    return signature.replace(parameters=parameters), fields


def takes_options(defaults: Mapping[str, Any]) -> Callable[[Function], Function]:
    """Decorates a function whose last parameter is `**options: Unpack[T]`, T a TypedDict of documented fields.

    A keyword that is neither a parameter nor a field raises a TypeError that names those near it.
    """

    def decorate(function: Function) -> Function:
        signature, fields = expand(function, defaults)
        names = signature.parameters.keys()

        @functools.wraps(function)
        def checked(*args: Any, **keywords: Any) -> Any:
            for name in keywords.keys() - names:
                raise TypeError(f"{function.__name__}() has no argument {name!r}{_near(name, names)}")
            return function(*args, **keywords)

        shown = [
            p.replace(annotation=get_args(fields[p.name])[0]) if p.name in fields else p
            for p in signature.parameters.values()
        ]
        checked.__signature__ = signature.replace(parameters=[_named(p) for p in shown])  # type: ignore[attr-defined]
        meanings = {name: get_args(hint)[1] for name, hint in fields.items()}
        checked.__doc__ = f"{inspect.getdoc(function)}\n\n{_listed(meanings)}"
        return checked  # type: ignore[return-value]

    return decorate


def _near(name: str, names: Any) -> str:
    near = difflib.get_close_matches(name, [n for n in names if n != "self"], n=3)
    return f"; near it: {', '.join(near)}" if near else ""


def _named(parameter: inspect.Parameter) -> inspect.Parameter:
    """Types as they are written in the source, not as ForwardRef('…')."""
    forward = getattr(parameter.annotation, "__forward_arg__", None)
    return parameter if forward is None else parameter.replace(annotation=forward)


def _listed(meanings: Mapping[str, str]) -> str:
    lines = [
        textwrap.fill(f"{name}: {meaning}", 100, initial_indent="    ", subsequent_indent="        ")
        for name, meaning in meanings.items()
    ]
    return "\n".join(["Keyword Args:", *lines])
