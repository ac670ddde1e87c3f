"""Render the templates: each has a frozen dataclass of everything it may mention."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import jinja2

if TYPE_CHECKING:
    pass


class Context(Protocol):
    """A dataclass that fills one template."""

    template: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]


@functools.cache
def environment() -> jinja2.Environment:
    """Return the environment: an undefined name is an error, and text is never escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("sparsegen.templates", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render(context: Context) -> str:
    """Return the text of a context's template."""
    template = environment().get_template(context.template)
    names = [f.name for f in dataclasses.fields(context)]
    return template.render({name: getattr(context, name) for name in names})
