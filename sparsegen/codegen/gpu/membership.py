"""Ask of pairs whether they are listed, where attention walks a range instead of lists.

A list of distances i - j has keys of its own for every query, so that the rows of a tile share
none of them. Where all queries of a sequence read the same lists, the range that holds all keys is
walked instead. A map with a bit for each item, made first, answers for a pair, or for 64
neighbouring keys at a time. It does not count: what has an item twice is for another kernel.

A map has a word that is 1 if an item is listed twice, then words of bits, with words of zeros at
either end, where keys lie whose items do not exist.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from sparsegen.codegen.cpu.lists import list_number, shared
from sparsegen.codegen.cpu.rows import Arguments, Sequence
from sparsegen.codegen.cpu.select_task import is_slash
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.gpu.launch import Place, atomic_or, bit_of, device, launch, sync
from sparsegen.codegen.gpu.view import ThreadView
from sparsegen.codegen.tvm import (
    T,
    Value,
    cast,
    const,
    equal,
    load,
    maximum,
    minimum,
    store,
)
from sparsegen.ir.axes import Named
from sparsegen.ir.expr import Const, Expr, Member, Pos, Stop, apply, walk
from sparsegen.lowering.tasks import AttendTask, Buffer, Clause, KeySource, Rows

WINDOW = 64  # keys that are answered for at once
_FRONT = 1 + WINDOW // 32  # words before the bits
_SPARE = _FRONT + 7  # and those after them: a window may start 64 items behind the last
_THREADS = 256
_REVERSED = """
__device__ __forceinline__ unsigned sparsegen_reversed(unsigned x) { return __brev(x); }
"""


def spread(task: AttendTask) -> AttendTask:
    """Return the task with a range instead of each source's lists, where they have diagonals."""
    return replace(task, sources=tuple(_spread(s, task) for s in task.sources))


def _spread(source: KeySource, task: AttendTask) -> KeySource:
    keys, lists = [c.keys for c in source.clauses], dict(task.lists)
    if not any(k is not None and k.slash for k in keys):
        return source
    plain = all(k is not None and shared(lists[k.member]) and _steps(k.member) for k in keys)
    first = source.clauses[0].hull
    if not plain or any(c.hull != first for c in source.clauses):
        return source
    clause = Clause(hull=first, full=None, keys=None, residual=source.where)
    return replace(source, clauses=(clause,))


def members_of(task: AttendTask) -> list[Member]:
    """Return the selections that have maps: of which pairs of a range are asked."""
    lists = dict(task.lists)
    residuals = [c.residual for s in task.sources for c in s.clauses if c.keys is None]
    found = [e for r in residuals for e in walk(r) if isinstance(e, Member)]
    return [m for m in dict.fromkeys(found) if shared(lists[m]) and _steps(m)]


def _steps(member: Member) -> bool:
    """Tell whether the next key asks for the next item, or for the one before."""
    last = member.keys[-1]
    named = all(isinstance(p.axis, Named) for p in _positions(member))
    return named and (is_slash(last) or (isinstance(last, Pos) and last.role == "key"))


def _positions(member: Member) -> list[Pos]:
    return [e for e in walk(member.keys[-1]) if isinstance(e, Pos)]


def map_buffers(task: AttendTask) -> list[tuple[Buffer, Expr]]:
    """Return the memory of the maps, one for each selection that pairs are asked of."""
    lists, found = dict(task.lists), []
    for n, member in enumerate(members_of(task)):
        buffer = Buffer(
            name=f"{task.name}_map_{n}", dtype="int32",
            shape=(prod(lists[member].groups), -1), rows=Rows(space="batch"),
        )  # fmt: skip
        found.append((buffer, _words(member)))
    return found


def _words(member: Member) -> Expr:
    """Return the words of a map: its items are keys, or distances of queries from keys."""
    items: Expr = Const(0)
    for position in _positions(member):
        items = apply("max", items, Stop(position.role, position.axis))
    return apply("add", apply("floordiv", items, Const(32)), Const(_SPARE))


class Maps:
    """The maps of a task whose lists are spread."""

    def __init__(self, task: AttendTask, arguments: Arguments) -> None:
        self.arguments, self.lists = arguments, dict(task.lists)
        names = [buffer.name for buffer, _ in map_buffers(task)]
        self.members = dict(zip(members_of(task), names, strict=True))

    def emit(self) -> None:
        """Emit the launches that fill the maps."""
        for member in self.members:
            with device():
                self._fill(member)

    def answers(self, view: ThreadView, query: Value, head: Value, key: Value) -> dict[Expr, Value]:
        """Tell for each selection whether it has a pair."""
        return {member: self._has(view, member, query, head, key) for member in self.members}

    def _has(
        self, view: ThreadView, member: Member, query: Value, head: Value, key: Value
    ) -> Value:
        item = view.value(member.keys[-1], query, head, key)
        near = minimum(maximum(item, const(-1, "int32")), self._items(member, view.sequence))
        place = T.bind(near + WINDOW)
        at = self._base(view, member, head) + cast(place // 32 + 1, "int64")
        word = T.bind(T.reinterpret("uint32", load(self._flat(member), at)))
        return T.bind(T.bitwise_and(word, bit_of(place % 32)) > const(0, "uint32"))

    def window(
        self, view: ThreadView, member: Member, query: Value, head: Value, key: Value
    ) -> list[Value]:
        """Return two words: whether a list has the items of 64 keys, from `key` on."""
        flat, size = self._flat(member), self._items(member, view.sequence)
        item = view.value(member.keys[-1], query, head, key)
        down = is_slash(member.keys[-1])
        last = minimum(item, size + WINDOW)
        first = T.bind(maximum(last, const(-1, "int32")) - (WINDOW - 1) if down else last)
        place = T.bind(first + WINDOW)
        at = T.bind(self._base(view, member, head) + cast(place // 32 + 1, "int64"))
        words = [T.bind(T.reinterpret("uint32", load(flat, at + n))) for n in range(3)]
        shift = T.bind(place % 32)
        found = [_bits(words[n], words[n + 1], shift) for n in range(2)]
        return [_reversed(w) for w in found[::-1]] if down else found

    def twice(self, view: ThreadView, head: Value) -> Value:
        """Tell whether a list that a head reads has an item twice."""
        found = const(0, "int32")
        for member in self.members:
            flag = load(self._flat(member), self._base(view, member, head))
            found = T.bitwise_or(found, flag)
        return T.bind(found > 0)

    def _flat(self, member: Member) -> Value:
        return self.arguments.tensors[self.members[member]].flat

    def _words(self, member: Member) -> Value:
        return self.arguments.tensors[self.members[member]].shape[-1]

    def _base(self, view: ThreadView, member: Member, head: Value) -> Value:
        """Return where the map of a head starts (int64)."""
        number = list_number(member, self.lists[member], view.sequence, view._env(head=head))
        return T.bind(number * self._words(member))

    def _items(self, member: Member, sequence: Sequence) -> Value:
        """Return how many items a map has: those of longer distances and further keys are none."""
        if not is_slash(member.keys[-1]):
            return sequence.n_k
        return T.bind(maximum(sequence.n_k, sequence.q_off + sequence.n_q))

    def _fill(self, member: Member) -> None:
        """Mark what a list has; a block for each list."""
        arguments, groups = self.arguments, prod(self.lists[member].groups)
        place = launch(arguments.batch * groups, _THREADS, entered=True)
        with T.If(place.block < arguments.batch * groups), T.Then():
            self._mark(member, place)

    def _mark(self, member: Member, place: Place) -> None:
        arguments, lists = self.arguments, self.lists[member]
        groups, flat = prod(lists.groups), self._flat(member)
        sequence = Sequence.at(arguments, T.bind(place.block // groups))
        items = self._items(member, sequence)
        base = T.bind(place.block * self._words(member))
        word = cell("int32", place.thread)
        with T.While(get(word) < items // 32 + _SPARE):
            store(flat, const(0, "int32"), base + cast(get(word), "int64"))
            put(word, get(word) + _THREADS)
        sync()
        indices = arguments[lists.buffer]
        width = T.bind(cast(indices.shape[-1], "int64"))
        slot = cell("int64", cast(place.thread, "int64"))
        with T.While(get(slot) < width):
            x = T.bind(load(indices.flat, place.block * width + get(slot)))
            with T.If(T.And(x >= 0, x < items)), T.Then():
                bit = bit_of(x % 32)
                at = T.bind(base + cast(x // 32 + _FRONT, "int64"))
                before = T.bind(atomic_or(flat.ptr_to([at]), bit))
                with T.If(T.Not(equal(T.bitwise_and(before, bit), const(0, "uint32")))), T.Then():
                    store(flat, const(1, "int32"), base)
            put(slot, get(slot) + _THREADS)


def seen(words: list[Value], key: int) -> Value:
    """Tell whether a window has the item of a key, by its number in the window."""
    bit = const(1 << key % 32, "uint32")
    return T.bitwise_and(words[key // 32], bit) > const(0, "uint32")


def _bits(low: Value, high: Value, shift: Value) -> Value:
    """Return the 32 bits of two words that lie behind `shift` of them."""
    both = T.bitwise_or(
        T.shift_left(cast(high, "uint64"), const(32, "uint64")), cast(low, "uint64")
    )
    return T.bind(cast(T.shift_right(both, cast(shift, "uint64")), "uint32"))


def _reversed(x: Value) -> Value:
    return T.bind(
        T.cuda.func_call("sparsegen_reversed", x, source_code=_REVERSED, return_type="uint32")
    )
