"""Read stored selections: the list of a token, and whether a key lies in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from sparsegen.codegen.cpu.rows import Arguments, Sequence
from sparsegen.codegen.cpu.stream import Chunk, cell, get, put
from sparsegen.codegen.exprs import Env, emit
from sparsegen.codegen.tvm import Memory, T, Value, cast, const, equal, load, scratch, store
from sparsegen.ir.expr import Expr, Head, Member, Pos, walk
from sparsegen.lowering.tasks import Lists


def mentions(expr: Expr, leaf: type, role: str | None = None) -> bool:
    """Tell whether an expression has a leaf of a type, of a role if one is given."""
    return any(
        isinstance(e, leaf) and (role is None or getattr(e, "role", None) == role)
        for e in walk(expr)
    )


def shared(lists: Lists) -> bool:
    """Tell whether all queries of a sequence read one list."""
    return lists.buffer.rows.space == "batch"


def list_number(member: Member, lists: Lists, sequence: Sequence, env: Env) -> Value:
    """Return the number (int64) of the list that a member reads, of all that are stored."""
    group: Value = const(0, "int64")
    position: Value = const(0, "int32")
    for stored, key in zip(lists.keys, member.keys[:-1], strict=True):
        if mentions(stored, Head):
            n = sum(mentions(k, Head) for k in lists.keys[: lists.keys.index(stored)])
            group = group * lists.groups[n] + cast(emit(key, env), "int64")
        else:
            position = emit(key, env)
    return sequence.row(lists.buffer.rows, position) * prod(lists.groups) + group


@dataclass(frozen=True)
class TokenLists:
    """The lists that the tokens of a tile read for one selection.

    bases   int64 [tokens]: where the list of a token starts in the flat buffer
    width   int32 number of slots
    """

    member: Member
    flat: Memory
    bases: Memory
    width: Value

    @staticmethod
    def find(
        member: Member,
        lists: Lists,
        arguments: Arguments,
        sequence: Sequence,
        env: Env,
        first: Value,
        tokens: int,
        present: Value,
    ) -> TokenLists:
        """Find the lists of `present` tokens (int32) from absolute position `first` on.

        `env` says what keys may mention, except the query position.
        """
        argument = arguments[lists.buffer]
        width = argument.shape[-1]
        bases = scratch(tokens, "int64")
        with T.serial(present) as t:
            here = replace(env, query=first + t)
            store(bases, list_number(member, lists, sequence, here) * width, t)
        return TokenLists(member, argument.flat, bases, T.bind(cast(width, "int32")))

    def item(self, token: Value, slot: Value) -> Value:
        """Return an item of the list of a token."""
        return load(self.flat, load(self.bases, token) + cast(slot, "int64"))

    def look_up(
        self, chunk: Chunk, count: Value, env: Env, first: Value, present: Value, *, one: bool
    ) -> Memory:
        """Return, for each key of a chunk, the tokens whose list holds it: bit t for token t.

        Lists are ascending and padded with -1 on the right, so each look-up is a binary search.

        Args:
            one: all tokens read one list and ask for one item, so one search serves them.
        """
        last = self.member.keys[-1]
        bits = T.alloc_buffer((chunk.size,), "int32")
        # Neighbouring keys often ask for the same item, a block.
        repeat = not mentions(last, Pos, "query")
        before = cell("int32", const(-1, "int32"))
        with T.serial(count) as slot:
            key = T.bind(load(chunk.position, slot))
            mask = cell("int32", const(0, "int32"))

            def search(slot: Value = slot, key: Value = key, mask: Memory = mask) -> None:
                with T.serial(1 if one else present) as t:
                    item = T.bind(emit(last, replace(env, query=first + t, key=key)))
                    bit = const(-1, "int32") if one else T.shift_left(const(1, "int32"), t)
                    with T.If(self._holds(t, item)), T.Then():
                        put(mask, T.bitwise_or(get(mask), bit))
                store(bits, get(mask), slot)

            if repeat:
                item = T.bind(emit(last, replace(env, query=first, key=key)))
                with T.If(T.And(slot > 0, equal(item, get(before)))):
                    with T.Then():
                        store(bits, load(bits, slot - 1), slot)
                    with T.Else():
                        search()
                put(before, item)
            else:
                search()
        return bits

    def holds(self, item: Value) -> Value:
        """Tell whether the list of the first token has an item."""
        return T.bind(self._holds(const(0, "int32"), item))

    def _holds(self, token: Value, item: Value) -> Value:
        low, high = cell("int32", const(0, "int32")), cell("int32", self.width)
        with T.While(get(low) < get(high)):
            middle = T.bind((get(low) + get(high)) // 2)
            x = T.bind(self.item(token, middle))
            with T.If(T.And(x >= 0, x < item)):
                with T.Then():
                    put(low, middle + 1)
                with T.Else():
                    put(high, middle)
        found = cell("int32", const(-1, "int32"))
        with T.If(get(low) < self.width), T.Then():
            put(found, self.item(token, get(low)))
        return T.And(item >= 0, equal(get(found), item))
