"""Reads of registers that nothing has written, in NVIDIA's machine code as ``nvdisasm -c`` prints it.

An assembler that moves a computation ahead of a loop, and uses its result behind the loop too, leaves that result's register as it
was on the path past a loop without steps. What runs is then right for all other loops, and nothing else tells. So whatever reaches
memory, a product of tiles or a jump has to be written on every path from the kernel's start to there.

A number that is computed from one that nothing has written counts as unwritten too; it does no harm where nobody uses it. Paths are
all that the jumps allow: where one jump decides another, as in loops that are unrolled by a remainder, a finding may never happen.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LABEL = re.compile(r"^\s*(\.L\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?([\w.]+)\s*([^;]*);")
_REGISTER = re.compile(r"(?<![\w.])(UR|R|UP|P)(\d+)(?!\w)")
_PREDICATE = re.compile(r"!?(U?P)(\d+|T)")
_TARGET = re.compile(r"\.L\w+")
# what writes memory, or nothing: all its operands are read
_READERS = re.compile(
    r"(ST|STG|STS|STL|STSM|RED|BRA|BRX|BAR|UTMA\w*|BSSY|BSYNC|WARP\w*|DEPBAR|EXIT|RET|JMP|CCTL|MEMBAR|NANOSLEEP|UBLK\w*)\b"
)
_ALL = frozenset(f"{bank}{i}" for bank, count in (("R", 255), ("UR", 63), ("P", 7), ("UP", 7)) for i in range(count))
_PART_OF_ITSELF = ("PRMT", "LOP3")  # halves and bits of a register are written one after another


class Instruction(NamedTuple):
    """One instruction: its address and text, the registers that it reads and writes, whether it acts beyond them, where it may go."""

    address: str
    text: str
    reads: frozenset[str]
    writes: frozenset[str]
    acts: bool
    targets: tuple[str, ...]
    falls_through: bool


def unwritten_reads(listing: str) -> list[str]:
    """Instructions of a listing that act on a register which nothing has written on some path, each with these registers."""
    return [found for section in re.split(r"(?m)^\.text\.", listing) for found in _of_kernel(section)]


def _of_kernel(section: str) -> list[str]:
    code, labels = _parsed(section)
    everything = frozenset().union(*(one.reads | one.writes for one in code))
    # what is written on every path to each instruction; paths that are not known yet take nothing away
    written = [frozenset[str]() if i == 0 else everything for i in range(len(code))]
    waiting = [0] if code else []
    reached = set(waiting)
    while waiting:
        i = waiting.pop()
        known = code[i].acts or code[i].reads <= written[i]
        after = written[i] | code[i].writes if known else written[i] - code[i].writes
        following = [labels[name] for name in code[i].targets if name in labels] + [i + 1] * code[i].falls_through
        for to in (to for to in following if to < len(code)):
            both = written[to] & after
            if to not in reached or both != written[to]:
                written[to] = both
                reached.add(to)
                waiting.append(to)
    found = ((one, sorted(one.reads - written[i])) for i, one in enumerate(code) if i in reached)
    return [f"{one.address} {one.text}: {', '.join(missing)}" for one, missing in found if missing and one.acts]


def _parsed(section: str) -> tuple[list[Instruction], dict[str, int]]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in section.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append(_instruction(found[1], found[2], found[3], found[4].strip()))
    return code, labels


def _instruction(address: str, guard: str | None, name: str, rest: str) -> Instruction:
    kind = name.split(".")[0]
    # commas within brackets part no operands
    operands = [one.strip() for one in re.split(r",(?![^\[]*\])", rest)]
    writes: set[str] = set()
    if not _READERS.match(kind):
        while operands and (result := re.fullmatch(r"(U?P|UR|R)(\d+|T|Z)", operands[0])):
            operands.pop(0)
            if result[2].isdigit():
                writes |= {f"{result[1]}{int(result[2]) + i}" for i in range(_width(name) if "R" in result[1] else 1)}
            if "R" in result[1]:
                # carries and the like
                while kind in ("IADD3", "UIADD3", "LEA", "ULEA") and operands and re.fullmatch(r"U?P(\d|T)", operands[0]):
                    writes.add(operands.pop(0))
                break
    if kind == "CALL":
        writes |= _ALL  # whatever a small function of the assembler's own, such as a division, returns
    if kind in ("R2P", "UR2UP"):
        writes |= {f"{'U' * (kind == 'UR2UP')}P{i}" for i in range(7)}
    reads = _described(rest) | {bank + number for one in operands if "gdesc" not in one for bank, number in _REGISTER.findall(one)}
    if guard is not None and (condition := _PREDICATE.fullmatch(guard)) and condition[2] != "T":
        reads.add(condition[1] + condition[2])
    if kind in _PART_OF_ITSELF:
        reads -= writes
    jumps = kind in ("BRA", "BRX", "JMP", "WARPSYNC")
    conditional = guard is not None or (kind == "BRA" and _PREDICATE.match(rest) is not None) or kind == "WARPSYNC"
    ends = kind in ("BRA", "BRX", "JMP", "EXIT", "RET", "BPT")
    acts = _READERS.match(kind) is not None or "[" in rest
    return Instruction(
        address, f"{name} {rest}".strip(), frozenset(reads), frozenset(writes), acts, tuple(_TARGET.findall(rest)) if jumps else (),
        not ends or (conditional and kind != "BRX"),
    )  # fmt: skip


def _width(name: str) -> int:
    """Registers that an instruction writes, at most."""
    kind = name.split(".")[0]
    if product := re.search(r"GMMA\.64x(\d+)x", name):
        return int(product[1]) // 2
    if kind in ("HMMA", "IMMA") or ".128" in name or "88.4" in name:
        return 4
    wide = ".64" in name or "WIDE" in name or "88.2" in name or ".F64" in name or kind[0] == "D"
    return 2 if wide or (kind == "CS2R" and not name.endswith(".32")) else 1


def _described(rest: str) -> set[str]:
    """The uniform registers of an asynchronous product's descriptors: four, of which the first two are its first operand's, unless
    that one lies in registers."""
    if (described := re.search(r"gdesc\[UR(\d+)\]", rest)) is None:
        return set()
    first = int(described[1])
    from_registers = re.match(r"R\d+, R\d+", rest) is not None
    return {f"UR{first + i}" for i in range(2 if from_registers else 0, 4)}
