"""Say what an attention variant is in a few lines; get tuned kernels for it.

>>> import sparsegen as sg
>>> @sg.pattern
... def window(q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk D"], *, W=512):
...     i, j = sg.index(q, k)
...     return sg.attend(q, k, v, where=(j <= i) & (i - j < W))
>>> kernel = sg.compile(window, target="cpu", W=256)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsegen.dsl.functions import (
    abs,
    exp,
    log,
    maximum,
    minimum,
    relu,
    sigmoid,
    sqrt,
    tanh,
    where,
)
from sparsegen.dsl.pattern import Pattern, pattern
from sparsegen.dsl.tensor import Tensor
from sparsegen.dsl.verbs import (
    attend,
    cat,
    compress,
    head,
    index,
    max,
    mean,
    merge,
    min,
    project,
    reduce,
    score,
    select,
    softmax,
    sum,
)
from sparsegen.errors import (
    BindingError,
    BundleError,
    CacheError,
    CompileError,
    InputError,
    PatternError,
    SparsegenError,
    TuningError,
    UnsupportedError,
)
from sparsegen.ir.program import Program

if TYPE_CHECKING:
    from sparsegen.api import compile, partition, tune
    from sparsegen.bundle import load
    from sparsegen.exporting import export
    from sparsegen.oracle import reference
    from sparsegen.report import explain
    from sparsegen.runtime.catalog import Schedule
    from sparsegen.runtime.kernel import Kernel

__version__ = "0.1.0"

# Imported on first use: they load torch, TVM or sympy, and `import sparsegen` stays quick.
_LAZY = {
    "Kernel": "sparsegen.runtime.kernel",
    "Schedule": "sparsegen.runtime.catalog",
    "compile": "sparsegen.api",
    "explain": "sparsegen.report",
    "export": "sparsegen.exporting",
    "load": "sparsegen.bundle",
    "partition": "sparsegen.api",
    "reference": "sparsegen.oracle",
    "tune": "sparsegen.api",
}

__all__ = [
    "BindingError", "BundleError", "CacheError", "CompileError", "InputError", "Kernel", "Pattern",
    "PatternError", "Program", "Schedule", "SparsegenError", "Tensor", "TuningError",
    "UnsupportedError", "abs", "attend", "cat", "compile", "compress", "exp", "explain",
    "export",
    "head", "index", "load", "log", "max", "maximum", "mean", "merge", "min", "minimum",
    "partition", "pattern", "project", "reduce", "reference", "relu", "score", "select", "sigmoid",
    "softmax", "sqrt", "sum", "tanh", "tune", "where",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sparsegen' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
