"""Translate the inline assembly of a CUDA source into calls of the emulator.

A statement `asm volatile("{ ...; }" : outputs : inputs : clobbers);` becomes a C++ block that has
one statement per PTX instruction: operands are the C++ expressions themselves, predicates are
variables, labels stay labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

_ASM = re.compile(r"\basm(?:\s+volatile)?\s*\(")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_LABEL = re.compile(r"(\w+):(?!:)")
_TYPES = {
    "pred": "bool", "b8": "uint8_t", "b16": "uint16_t", "b32": "uint32_t", "b64": "uint64_t",
    "u8": "uint8_t", "u16": "uint16_t", "u32": "uint32_t", "u64": "uint64_t",
    "s8": "int8_t", "s16": "int16_t", "s32": "int32_t", "s64": "int64_t",
    "f32": "float", "f64": "double",
}  # fmt: skip
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@dataclass(frozen=True)
class Instruction:
    """An instruction whose operands are C++ expressions.

    operands  without braces, brackets and what is thrown away (`_`)
    text      as it was written
    """

    name: str
    operands: tuple[str, ...]
    text: str

    def call(self, function: str, *flags: bool, take: int | None = None) -> str:
        """Return a call with flags and the first `take` operands."""
        given = [*(str(int(f)) for f in flags), *self.operands[:take]]
        return f"emu::{function}({', '.join(given)});"


def translate_assembly(source: str) -> str:
    """Return a source in which every assembly statement is C++."""
    parts, at, numbers = [], 0, count()
    for found in _ASM.finditer(source):
        if found.start() < at:
            continue
        end = _close(source, found.end())
        parts += [source[at : found.start()], _block(source[found.end() : end], next(numbers))]
        at = source.index(";", end) + 1
    return "".join([*parts, source[at:]])


def _close(source: str, start: int) -> int:
    """Return the place of the bracket that closes the one before `start`."""
    depth, at = 1, start
    while True:
        if source[at] == '"':
            string = _STRING.match(source, at)
            assert string is not None
            at = string.end()
            continue
        depth += {"(": 1, ")": -1}.get(source[at], 0)
        if not depth:
            return at
        at += 1


def _sections(text: str) -> Iterator[str]:
    """Split a statement at the colons between its template, outputs, inputs and clobbers."""
    depth, start, at = 0, 0, 0
    while at < len(text):
        if text[at] == '"':
            string = _STRING.match(text, at)
            assert string is not None
            at = string.end()
            continue
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if text[at] == ":" and not depth:
            yield text[start:at]
            start = at + 1
        at += 1
    yield text[start:]


def _arguments(section: str) -> Iterator[str]:
    """Yield the expressions of `"=r"(a), "r"(b)`."""
    for found in re.finditer(r'"[^"]*"\s*\(', section):
        yield section[found.end() : _close(section, found.end())]


def _block(statement: str, number: int) -> str:
    template, *sections = _sections(statement)
    arguments = [a for section in sections[:2] for a in _arguments(section)]
    text = "".join(_STRING.findall(template)).replace("\\n", "\n").replace("\\t", " ").strip()
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    text = re.sub(r"%(\d+)", lambda m: f"({arguments[int(m[1])]})", text)
    text = text.replace("%%", "")
    lines = []
    for piece in text.split(";"):
        rest = piece.strip()
        while (label := _LABEL.match(rest)) and not rest.startswith("@"):
            lines.append(f"{label[1]}_{number}: ;")
            rest = rest[label.end() :].strip()
        if rest:
            lines.append(_statement(rest, number))
    return "{ " + " ".join(lines) + " }"


def _statement(text: str, number: int) -> str:
    guard = re.match(r"@(!?)(\w+)\s+", text)
    if guard:
        text = text[guard.end() :]
    if declared := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL):
        return f"{_TYPES[declared[1]]} {declared[2]}; (void)({declared[2]});"
    if jump := re.fullmatch(r"bra(?:\.uni)?\s+(\w+)", text):
        done = f"goto {jump[1]}_{number};"
    else:
        name, rest = (*text.split(None, 1), "")[:2]
        operands = tuple(o for o in _operands(rest) if o != "_")
        done = _emit(Instruction(name, operands, text))
    return f"if ({guard[1]}{guard[2]}) {{ {done} }}" if guard else done


def _operands(text: str) -> Iterator[str]:
    """Yield operands without the braces and brackets around them."""
    depth, start = 0, 0
    for at, letter in enumerate(text + ","):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if not depth and letter in ",|[]{}":
            if piece := text[start:at].strip():
                yield piece
            start = at + 1


def _emit(one: Instruction) -> str:
    for pattern, emit in _TABLE:
        if found := re.fullmatch(pattern, one.name):
            return emit(found, one)
    raise NotImplementedError(f"the emulator has no {one.text}")


_Emit = Callable[[re.Match[str], Instruction], str]


def _nothing(found: re.Match[str], one: Instruction) -> str:
    return ";"


def _named(function: str, take: int | None = None) -> _Emit:
    return lambda found, one: one.call(function, take=take)


def _mma(found: re.Match[str], one: Instruction) -> str:
    return one.call("mma", found[1] == "bf16")


def _matrices(function: str) -> _Emit:
    return lambda found, one: one.call(function, found[1] is not None)


def _copy(found: re.Match[str], one: Instruction) -> str:
    # Of the policy that may come last nothing is kept.
    return one.call("copy", take=len(one.operands) - ("cache_hint" in one.name))


def _wgmma(found: re.Match[str], one: Instruction) -> str:
    columns, dtype = int(found[1]), found[2]
    half = columns // 2
    accumulators, rest = one.operands[:half], one.operands[half:]
    registers = ", ".join(f"&{a}" for a in accumulators)
    shared = len(rest) == 7  # two descriptors, scale-d, two scales, two transpositions
    a, (b, scale_d, *more) = (rest[:1], rest[1:]) if shared else (rest[:4], rest[4:])
    *scales, transpose_b = (*more[:2], *more[3:]) if shared else more
    transpose_a = more[2] if shared else "0"
    flags = ", ".join([str(columns), str(int(dtype == "bf16")), transpose_a, transpose_b])
    rows, descriptor = ("0, 0, 0, 0", a[0]) if shared else (", ".join(a), "0")
    return (
        f"float* registers[] = {{{registers}}}; emu::wgmma({{{flags}, {int(not shared)}}}, "
        f"registers, {{{rows}}}, {descriptor}, {b}, {scale_d}, {', '.join(scales)});"
    )


def _tensor(function: str, fixed: int) -> _Emit:
    """Emit a copy of a box: `fixed` operands beside the coordinates, cache policies dropped."""

    def emit(found: re.Match[str], one: Instruction) -> str:
        rank = int(found[1])
        first = 1 if function == "tensor_store" else 2
        place = ", ".join(one.operands[first : first + rank])
        before, after = one.operands[:first], one.operands[first + rank : fixed + rank]
        return (
            f"int place[] = {{{place}}}; "
            f"emu::{function}({', '.join([str(rank), *before, 'place', *after])});"
        )

    return emit


def _moved(found: re.Match[str], one: Instruction) -> str:
    """Emit a load or a store, of a vector perhaps."""
    space = "shared" if "shared" in one.name else "global"
    lanes = int(found["lanes"] or 1)
    values = one.operands[:lanes] if found["kind"] == "ld" else one.operands[1 : lanes + 1]
    address = one.operands[lanes if found["kind"] == "ld" else 0]
    polls = any(p in one.name for p in (".volatile", ".acquire", ".relaxed"))
    poll = "emu::poll(); " if polls and found["kind"] == "ld" else ""
    kind = _TYPES[found["type"]]
    return f"{poll}emu::{found['kind']}_{space}<{kind}>({', '.join((address, *values))});"


def _compared(found: re.Match[str], one: Instruction) -> str:
    to, a, b = one.operands
    return f"{to} = {a} {_COMPARISONS[found[1]]} {b};"


def _assigned(found: re.Match[str], one: Instruction) -> str:
    to, value = one.operands
    return f"{to} = {_SPECIAL.get(value, value)};"


def _written(expression: str) -> _Emit:
    return lambda found, one: expression.format(*one.operands)


# Registers that say who a thread is.
_SPECIAL = {"cluster_ctarank": "emu::here"}
_SHARED = r"\.shared(?:::cta)?"
_HINTS = r"(?:\.L1::\w+)?(?:\.L2::cache_hint)?(?:\.L2::\d+B)?"
_SYNC = r"\.sync\.aligned"
_BOX = r"(?:\.tile)?(?:\.mbarrier::complete_tx::bytes)"

_TABLE: tuple[tuple[str, _Emit], ...] = (
    (rf"mma{_SYNC}\.m16n8k16\.row\.col\.f32\.(bf16|f16)\..*", _mma),
    (rf"ldmatrix{_SYNC}\.m8n8\.x4(\.trans)?{_SHARED}\.b16", _matrices("ldmatrix")),
    (rf"stmatrix{_SYNC}\.m8n8\.x4(\.trans)?{_SHARED}\.b16", _matrices("stmatrix")),
    (rf"cp\.async\.c[ag]{_SHARED}\.global{_HINTS}", _copy),
    (r"cp\.async\.commit_group", _named("copy_commit")),
    (r"cp\.async\.wait_group", _named("copy_wait")),
    (r"cp\.async\.wait_all", _named("copy_wait_all")),
    (rf"cp\.async\.mbarrier\.arrive\.noinc{_SHARED}\.b64", _named("mbarrier_arrive_copies")),
    (rf"mbarrier\.init{_SHARED}\.b64", _named("mbarrier_init")),
    (rf"mbarrier\.inval{_SHARED}\.b64", _named("mbarrier_inval")),
    (rf"mbarrier\.arrive\.expect_tx(?:\.release\.cta)?{_SHARED}\.b64",
     _named("mbarrier_arrive_expect")),
    (rf"mbarrier\.expect_tx(?:\.relaxed\.cta)?{_SHARED}\.b64", _named("mbarrier_expect")),
    (rf"mbarrier\.arrive(?:\.release\.cta)?{_SHARED}\.b64", _named("mbarrier_arrive")),
    (rf"mbarrier\.try_wait\.parity(?:\.\w+\.(?:cta|cluster))?{_SHARED}\.b64",
     _named("mbarrier_wait", 3)),
    (rf"mbarrier\.test_wait\.parity(?:\.\w+\.(?:cta|cluster))?{_SHARED}\.b64",
     _named("mbarrier_test")),
    (r"(?:bar|barrier)(?:\.cta)?\.sync(?:\.aligned)?", _named("barrier_sync")),
    (r"(?:bar|barrier)(?:\.cta)?\.arrive(?:\.aligned)?", _named("barrier_arrive")),
    (r"bar\.warp\.sync", _named("warp_sync")),
    (rf"setmaxnreg\.(?:inc|dec){_SYNC}\.u32", _nothing),
    (r"fence\..*|membar\..*|nanosleep.*|griddepcontrol\..*", _nothing),
    (r"cp\.async\.bulk\.prefetch\.L2\.global.*", _nothing),
    (rf"wgmma\.mma_async{_SYNC}\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2", _wgmma),
    (rf"wgmma\.fence{_SYNC}", _named("wgmma_fence")),
    (rf"wgmma\.commit_group{_SYNC}", _named("wgmma_commit")),
    (rf"wgmma\.wait_group{_SYNC}", _named("wgmma_wait")),
    (r"elect\.sync", _named("elect")),
    (rf"cp\.async\.bulk\.tensor\.([2-5])d\.shared::(?:cluster|cta)\.global{_BOX}{_HINTS}",
     _tensor("tensor_load", 3)),
    (rf"cp\.async\.bulk\.tensor\.([2-5])d\.shared::cluster\.global{_BOX}\.multicast::cluster{_HINTS}",
     _tensor("tensor_load_cluster", 4)),
    (r"mapa\.shared::cluster\.u32", _named("cluster_address")),
    (r"mbarrier\.arrive\.release\.cluster\.shared::cluster\.b64",
     _named("mbarrier_arrive_cluster")),
    (r"barrier\.cluster\.arrive(?:\.release)?(?:\.aligned)?", _named("cluster_arrive")),
    (r"barrier\.cluster\.wait(?:\.acquire)?(?:\.aligned)?", _named("cluster_wait")),
    (rf"cp\.async\.bulk\.tensor\.([2-5])d\.global{_SHARED}(?:\.tile)?\.bulk_group{_HINTS}",
     _tensor("tensor_store", 2)),
    (r"cp\.async\.bulk\.commit_group", _named("bulk_commit")),
    (r"cp\.async\.bulk\.wait_group(?:\.read)?", _named("bulk_wait")),
    (r"cp\.async\.bulk\.prefetch\..*|prefetch.*|discard\..*", _nothing),
    (r"ex2\.approx\.ftz\.f32", _named("exp2_flushed")),
    (r"fma\.rn\.f32", _written("{0} = std::fma({1}, {2}, {3});")),
    (r"redux\.sync\.(\w+)\.\w+", lambda found, one: one.call(f"redux_{found[1]}")),
    (r"(?P<kind>ld|st)(?:\.\w+(?:::\w+)?)*?(?:\.v(?P<lanes>[248]))?\.(?P<type>[busf]\d+)", _moved),
    (r"setp\.(\w+)\.\w+", _compared),
    (r"selp\.\w+", _written("{0} = {3} ? {1} : {2};")),
    (r"mov\.\w+", _assigned),
    (r"cvt\.u32\.u64", _written("{0} = (uint32_t){1};")),
    (r"cvta\.to\.shared\.u64", _written("{0} = emu::address_of((const void*){1});")),
    (r"trap", _written('emu::fail("trap");')),
)  # fmt: skip
