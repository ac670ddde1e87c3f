"""Trace a function into a Program by calling it once with lazy values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

from sparsegen.dsl.index import is_tensor
from sparsegen.dsl.tensor import Declaration, declaration
from sparsegen.dsl.trace import active, tracing
from sparsegen.dsl.values import Attention, Indices, Lse, Value
from sparsegen.errors import BindingError, PatternError, Site, did_you_mean
from sparsegen.ir.node import Input, Node, Output
from sparsegen.ir.program import Program
from sparsegen.ir.verify import verify

Hyper = int | float | bool | str | None


class Pattern:
    """A function that says what an attention variant is.

    Positional parameters are inputs, annotated with `sg.Tensor[...]`; keyword-only parameters are
    hyperparameters. Inside another pattern a pattern can be called and is inlined.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.name = fn.__name__
        self.site = Site(fn.__code__.co_filename, fn.__code__.co_firstlineno, fn.__name__)
        self.__doc__ = fn.__doc__
        self.__name__ = fn.__name__
        self.__module__ = fn.__module__
        self._traces: dict[tuple[tuple[str, str, Hyper], ...], Program] = {}
        _refuse_captured(fn, self.site)
        self.inputs, self.hyper = _signature(fn, self.site)

    def trace(self, **hyper: Hyper) -> Program:
        """Return the program for these hyperparameters (defaults for those left out)."""
        for name in hyper:
            if name not in self.hyper:
                raise BindingError(
                    f"{self.name} has no hyperparameter {name!r}",
                    at=Site.caller(),
                    hint=did_you_mean(name, self.hyper) if self.hyper else "it has none",
                )
        values = {**self.hyper, **hyper}
        missing = [n for n, v in values.items() if v is inspect.Parameter.empty]
        if missing:
            raise BindingError(
                f"{self.name} needs a value for {', '.join(missing)}",
                at=Site.caller(),
                hint=f"pass {missing[0]}=...",
            )
        key = tuple((n, type(v).__name__, v) for n, v in values.items())  # 1 == 1.0 == True
        if key not in self._traces:
            self._traces[key] = self._trace(values)
        return self._traces[key]

    @cached_property
    def program(self) -> Program:
        """Return the program for the default hyperparameters."""
        return self.trace()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Inline this pattern into the one being traced."""
        if not active():
            raise PatternError(
                f"{self.name} is a pattern, and says what to compute; it does not compute",
                at=Site.caller(),
                hint=f"kernel = sg.compile({self.name}, target='cpu'), then call the kernel",
            )
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<pattern {self.name}({', '.join(n.name for n in self.inputs)})>"

    def _trace(self, hyper: dict[str, Any]) -> Program:
        with tracing(self.name) as trace:
            result = self.fn(*(Value(n) for n in self.inputs), **hyper)
        single = not isinstance(result, tuple | list)
        outputs = tuple(self._output(r) for r in ([result] if single else result))
        if trace.query is None or trace.key is None:
            raise PatternError(
                f"{self.name} attends and scores nothing",
                at=self.site,
                hint="return sg.attend(q, k, v), or what is computed from it",
            )
        program = Program(
            name=self.name,
            inputs=self.inputs,
            hyper=tuple(hyper.items()),
            outputs=outputs,
            single=single,
            query=trace.query,
            key=trace.key,
        )
        verify(program, self.site)
        return program

    def _output(self, value: Any) -> Output:
        node: Node | None = getattr(value, "node", None) if isinstance(value, Value) else None
        if isinstance(value, Lse):
            return Output(node=value.node, what="lse")
        if isinstance(value, Indices):
            return Output(node=value.node, what="indices")
        if isinstance(value, Attention):
            return Output(node=value.node, what="o")
        if node is not None and node.op == "project":
            return Output(node=node, what="o")
        shown = repr(value)
        raise PatternError(
            f"{self.name} returns {shown}",
            at=self.site,
            hint="return attend() or merge() results, projections of them, .lse or .indices",
        )


def pattern(fn: Callable[..., Any]) -> Pattern:
    """Turn a function over lazy values into a pattern."""
    if not inspect.isfunction(fn):
        raise PatternError(
            f"@sg.pattern decorates a function, not {fn!r}",
            at=Site.caller(),
            hint="write def name(q: sg.Tensor[...], ...): below it",
        )
    return Pattern(fn)


def _signature(fn: Callable[..., Any], site: Site) -> tuple[tuple[Input, ...], dict[str, Any]]:
    inputs: list[Input] = []
    hyper: dict[str, Any] = {}
    for name, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            value = parameter.default
            if value is not inspect.Parameter.empty and not isinstance(
                value, int | float | bool | str | None
            ):
                raise PatternError(
                    f"the hyperparameter {name!r} has a default of type {type(value).__name__}",
                    at=site,
                    hint="hyperparameters are numbers, strings, booleans or None",
                )
            hyper[name] = value
        elif parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise PatternError(
                f"{fn.__name__} takes a variable number of inputs, *{name}",
                at=site,
                hint="name each input and annotate it with sg.Tensor[...]",
            )
        else:
            declared = _declared(fn, name, parameter.annotation, site)
            inputs.append(Input(name=name, axes=declared.axes, kind=declared.kind, site=site))
    if not inputs:
        raise PatternError(
            f"{fn.__name__} has no inputs",
            at=site,
            hint='declare them before the *, as in q: sg.Tensor["T Hq D"]',
        )
    return tuple(inputs), hyper


def _declared(fn: Callable[..., Any], name: str, annotation: Any, site: Site) -> Declaration:
    if annotation is inspect.Parameter.empty:
        raise PatternError(
            f"the input {name!r} has no axes",
            at=site,
            hint=f'annotate it: {name}: sg.Tensor["S Hk D"]; hyperparameters go after a *',
        )
    if isinstance(annotation, str):
        annotation = _evaluated(fn, annotation)
    if isinstance(annotation, Declaration):
        return annotation
    return declaration(annotation, "float", site)


def _evaluated(fn: Callable[..., Any], text: str) -> Any:
    """Read an annotation of text: axes, or source under `from __future__ import annotations`."""
    scope = {**fn.__globals__, **inspect.getclosurevars(fn).nonlocals}
    if set(text) & set("['\"."):
        return eval(text, scope)
    named = scope.get(text)
    return named if isinstance(named, Declaration) else text


def _refuse_captured(fn: Callable[..., Any], site: Site) -> None:
    captured = inspect.getclosurevars(fn)
    for name, value in {**captured.globals, **captured.nonlocals}.items():
        if is_tensor(value):
            raise PatternError(
                f"{fn.__name__} captures the tensor {name!r} of shape {tuple(value.shape)}",
                at=site,
                hint=f"make {name} a parameter of the pattern, annotated with sg.Tensor[...]",
            )
