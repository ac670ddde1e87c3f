"""Offer a compiled plan as a callable."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

from sparsegen.arch import Arch
from sparsegen.errors import BundleError, InputError, UnsupportedError
from sparsegen.lowering.plan import Plan
from sparsegen.runtime.build import Built, build
from sparsegen.runtime.catalog import Overrides, Schedule
from sparsegen.runtime.describe import describe
from sparsegen.runtime.standalone.errors import Errors
from sparsegen.runtime.standalone.load import load_library
from sparsegen.runtime.standalone.runner import Runner
from sparsegen.runtime.standalone.spec import Spec

ERRORS = Errors(input=InputError, unsupported=UnsupportedError, bundle=BundleError)


class Kernel(Runner):
    """A compiled pattern: call it with tensors.

    Takes the inputs of the pattern, in order or by name, shaped as its layout says:

        sequence  as declared
        dense     those on a sequence axis have a batch axis in front
        ragged    sequences one after the other, with `cu_seqlens_q` and `cu_seqlens_k`, int32
                  [batch + 1]: where each sequence starts, and where the last one ends
        paged     queries as in ragged, with `cu_seqlens_q`; inputs on the key axis are
                  [pages, page_size, ...], with `page_table` int32 [batch, max_pages] and
                  `seqlens_k` int32 [batch]

    `q_offset`, an integer or int32 [batch], is the position of each sequence's first query among
    its keys. By default the queries are the last positions, keys - queries; with fewer keys than
    queries that is negative, and the early queries see nothing.

    A row that sees nothing, or belongs to no sequence, is 0, its lse -inf, its list all -1.
    Metadata that names rows or pages that do not exist is refused. Runs on as many threads as
    torch, `torch.set_num_threads`. There is no backward yet.

    Raises:
        InputError: a tensor does not fit; the message says which, what was found and expected.
        UnsupportedError: an input requires a gradient, and gradients are enabled.
    """

    def __init__(self, plan: Plan, arch: Arch, built: Built, asked: Overrides = None) -> None:
        spec = specify(plan, arch, built)
        load = functools.partial(load_library, built.path, ERRORS)
        super().__init__(spec, load() if arch.kind == "cpu" else load, ERRORS)
        self.plan = plan
        self.arch = arch
        self.built = built
        self.asked = asked

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """Return the schedule of each task, by name."""
        return MappingProxyType(dict(self.built.schedules))

    def __repr__(self) -> str:
        binding = self.plan.binding
        sizes = "".join(f", {letter}={size}" for letter, size in binding.sizes)
        return (
            f"<Kernel {self.spec.name}: {binding.layout}, {binding.dtype}{sizes}, {self.arch.name}>"
        )


def compile_plan(
    plan: Plan, arch: Arch, overrides: Overrides = None, asked: Overrides = None
) -> Kernel:
    """Return the kernel of a plan, from the cache or newly compiled.

    Args:
        plan: what `partition` made.
        arch: the processor to compile for; it must be this machine's or less.
        overrides: one schedule, or schedules by task name or by family.
        asked: those among them that the user asked for, whatever the processor.

    Raises:
        UnsupportedError, BindingError, CompileError, CacheError: see `build`.
    """
    return Kernel(plan, arch, build(plan, arch, overrides), asked)


def specify(plan: Plan, arch: Arch, built: Built) -> Spec:
    """Return what a built plan takes, allocates, runs and returns."""
    name = op_name(plan, built)
    return describe(plan, name, arch, built.scratch, built.codes, built.shared)


def op_name(plan: Plan, built: Built) -> str:
    """Return the name of a kernel's torch operator: the pattern's, and a hash of what makes it."""
    return f"{plan.program.name}_{built.key[:12]}"
