"""Say of a select task which rows share lanes, what its keys enumerate, and what is not lowered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from sparsegen.codegen.cpu.attend import shared_heads
from sparsegen.codegen.cpu.lists import mentions, shared
from sparsegen.codegen.cpu.tile import Tile
from sparsegen.ir.axes import Entries
from sparsegen.ir.expr import (
    TRUE,
    Apply,
    BlockOf,
    Const,
    Expr,
    Head,
    Member,
    Pos,
    apply,
    rebuild,
    show,
    walk,
)
from sparsegen.lowering.tasks import Rows, SelectTask, Stage

# More vectors than this leave too few registers for keys.
MOST_VECTORS = 8


def granule(key: Expr) -> tuple[int, int] | None:
    """Return (n, c) of a key (x + c) // n of a position or head x; None for other keys."""
    match key:
        case Pos() | Head():
            return 1, 0
        case Apply("floordiv", (Pos() | Head(), Const(int(n)))):
            return n, 0
        case Apply("floordiv", (Apply("add", (Pos(), Const(int(c)))), Const(int(n)))):
            return n, c
    return None


def is_slash(key: Expr) -> bool:
    """Tell whether a key is the distance i - j."""
    match key:
        case Apply("sub", (Pos("query"), Pos("key"))):
            return True
    return False


@dataclass(frozen=True)
class Facts:
    """What a task computes, in the positions its kernel counts: those of its own operands."""

    task: SelectTask

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Return the reductions, at least one, their keys over the positions of the operands."""
        task = self.task
        stages = task.stages or (Stage(how="max", keys=task.keys, norm=False),)
        return tuple(
            Stage(how=s.how, keys=tuple(map(self.local, s.keys)), norm=s.norm) for s in stages
        )

    def local(self, key: Expr) -> Expr:
        """Say a key in the positions of the operands: an entry of n positions is position // n."""

        def rule(e: Expr) -> Expr | None:
            if not isinstance(e, Pos):
                return None
            theirs = self._entries(self.task.q.rows if e.role == "query" else self.task.k.rows)
            mine = e.axis if isinstance(e.axis, Entries) else None
            if theirs == mine or (theirs is not None and mine is not None):
                return None
            if mine is not None:
                return apply("floordiv", Pos(e.role, mine.parent), Const(mine.stride))
            assert theirs is not None
            return apply("mul", Pos(e.role, theirs), Const(theirs.stride))

        return _divided(rebuild(key, rule))

    @staticmethod
    def _entries(rows: Rows) -> Entries | None:
        return rows.entries if rows.space == "entry" else None

    # --- lists ----------------------------------------------------------------------------------

    @cached_property
    def query_key(self) -> Expr | None:
        """Return the key of a list that follows the query."""
        return _query_key(self.stages[-1])

    @cached_property
    def block(self) -> int:
        """Return how many queries share a list; 0 for all of a sequence."""
        found = None if self.query_key is None else granule(self.query_key)
        return 0 if found is None else found[0]

    @cached_property
    def heads(self) -> int:
        """Return how many query heads share a list."""
        return self._heads_of(self.stages[-1])

    def _heads_of(self, stage: Stage) -> int:
        """Return how many heads a group of a stage takes in."""
        for key in stage.keys[:-1]:
            if mentions(key, Head):
                n, _ = granule(key) or (1, 0)
                return min(n, self.task.q.heads)
        return self.task.q.heads

    # --- the first stage ------------------------------------------------------------------------

    @cached_property
    def inner(self) -> int:
        """Return how many queries share a group of the first stage; 0 for all."""
        key = _query_key(self.stages[0])
        found = None if key is None else granule(key)
        return 0 if found is None else found[0]

    @cached_property
    def head_rows(self) -> int:
        """Return how many groups of heads the first stage keeps apart inside one list."""
        return -(-self.heads // self._heads_of(self.stages[0]))

    @cached_property
    def head_step(self) -> int:
        """Return how many heads a group of the first stage takes in."""
        return min(self._heads_of(self.stages[0]), self.heads)

    @cached_property
    def shareable(self) -> int:
        """Return how many neighbouring heads share keys, lists, and groups unless these are heads.

        Tiles hold a divisor of it.
        """
        heads = math.gcd(self.heads, shared_heads(self.task))
        return heads if self.head_step == 1 else math.gcd(heads, self.head_step)

    @cached_property
    def merges_tokens(self) -> bool:
        """Tell whether all queries of a tile add to the same groups."""
        return self.inner == 0 and not any(is_slash(s.keys[-1]) for s in self.stages[:1])

    def per_head(self, tile: Tile) -> bool:
        """Tell whether the heads of a tile add to different groups."""
        return self.head_step == 1 and tile.heads > 1

    @cached_property
    def token_lists(self) -> bool:
        """Tell whether a selection that drives the iteration differs between the queries."""
        lists = dict(self.task.lists)
        keys = [c.keys for c in self.task.clauses if c.keys is not None]
        return any(k.slash or not shared(lists[k.member]) for k in keys)

    @cached_property
    def looked_up(self) -> bool:
        """Tell whether a selection is looked up key by key, which takes a bit per token."""
        residuals = [c.residual for c in self.task.clauses]
        return any(isinstance(e, Member) for r in residuals for e in walk(r))

    # --- tiles ----------------------------------------------------------------------------------

    def tile(self, tokens: int, heads: int, width: int) -> Tile:
        """Return the tile of `tokens` by `heads`."""
        return Tile(tokens, heads, width, -(-tokens * heads // width))

    def default_tile(self, width: int, vectors: int) -> Tile:
        """Return a tile that wastes the fewest lanes, of `vectors` vectors where it may."""
        best: tuple[float, int, Tile] | None = None
        for heads in range(1, self.shareable + 1):
            if self.shareable % heads or heads > MOST_VECTORS * width:
                continue
            # Tokens that differ in their lists share a tile only to fill the lanes.
            room = width if self.token_lists else vectors * width
            tokens = self.fitting(max(1, room // heads))
            if self.token_lists or self.looked_up:
                tokens = min(tokens, 32)
            tile = self.tile(tokens, heads, width)
            idle = tile.rows / (tokens * heads)
            if best is None or (idle, -heads) < best[:2]:
                best = idle, -heads, tile
        assert best is not None
        return best[2]

    def fitting(self, tokens: int) -> int:
        """Return the most tokens up to `tokens` that divide groups of queries or are divided."""
        if self.inner <= 1:
            return tokens
        if tokens >= self.inner:
            return tokens // self.inner * self.inner
        return max(n for n in range(1, tokens + 1) if self.inner % n == 0)

    # --- what is not lowered --------------------------------------------------------------------

    def refusal(self) -> str | None:
        """Return why the task is not lowered, or None."""
        task = self.task
        if len(self.stages) > 2:
            return f"{len(self.stages)} reductions follow each other; two are lowered"
        if len(self.stages) == 2 and isinstance(self.stages[0].keys[-1], BlockOf):
            return "a reduction to blocks of overlapping entries is reduced again"
        for stage in self.stages:
            reason = _refused_keys(stage)
            if reason is not None:
                return reason
        if task.weights is not None and task.weights.rows != task.q.rows:
            return "weights that do not lie on the axis of the queries"
        for member in (e for c in task.clauses for e in walk(c.residual) if isinstance(e, Member)):
            last = member.keys[-1]
            if isinstance(last, BlockOf) and last.axis.overlaps:
                return "an entry that overlaps several blocks is looked up in a selection of blocks"
        return None


def _query_key(stage: Stage) -> Expr | None:
    return next((k for k in stage.keys[:-1] if mentions(k, Pos, "query")), None)


def _divided(key: Expr) -> Expr:
    """Simplify x * m // n, and (x // m) // n."""
    match key:
        case Apply("floordiv", (Apply("mul", (x, Const(int(m)))), Const(int(n)))) if n % m == 0:
            return apply("floordiv", x, Const(n // m))
        case Apply(
            "floordiv",
            (Apply("add", (Apply("mul", (x, Const(int(m)))), Const(int(c)))), Const(int(n))),
        ) if n % m == 0:
            return apply("floordiv", apply("add", x, Const(c // m)), Const(n // m))
        case Apply("floordiv", (Apply("floordiv", (x, Const(int(m)))), Const(int(n)))):
            return apply("floordiv", x, Const(m * n))
    return key


def _refused_keys(stage: Stage) -> str | None:
    *groups, last = stage.keys
    known = isinstance(last, BlockOf) or is_slash(last)
    if not known and (not mentions(last, Pos, "key") or granule(last) is None):
        return f"the key {show(last)}, where a key position, a block or i - j is expected"
    if any(granule(k) is None or mentions(k, Pos, "key") for k in groups):
        return f"the keys ({', '.join(map(show, groups))}) before the last; heads and queries are"
    for kind, of in (("head", Head), ("query", Pos)):
        if sum(mentions(k, of) for k in groups) > 1:
            return f"a reduction with two {kind} keys"
    return None


def weakened(expr: Expr) -> Expr:
    """Return what a predicate asks of the query alone: true where it holds for some key."""
    match expr:
        case Apply("and" | "or" as op, args):
            first, *rest = (weakened(a) for a in args)
            for other in rest:
                first = apply(op, first, other)
            return first
    bound = any(
        isinstance(e, Member | Head | BlockOf) or (isinstance(e, Pos) and e.role == "key")
        for e in walk(expr)
    )
    return TRUE if bound else expr
