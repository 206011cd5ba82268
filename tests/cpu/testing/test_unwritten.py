"""Reads of registers that nothing has written are found on the path on which they happen, and nowhere else."""

from __future__ import annotations

from flashtile.testing.unwritten import unwritten_reads


def listing(*lines: str) -> str:
    """As the disassembler prints it: labels stand by themselves, and instructions have addresses."""
    text = [line if line.startswith(".") else f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines)]
    return "\n.text.kernel:\n" + "\n".join(text) + "\n"


PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0"
DESCRIBED = ("UMOV UR9, 0x40000040", "UMOV UR10, 0x10", "UMOV UR11, 0x40000040")


def loop(ahead_of_it: bool, behind: str) -> str:
    """A loop that may have no step; what says where a product's first operand lies is computed ahead of the jump past it, or behind."""
    address, jump = "UIADD3 UR8, UP0, UR6, 0x2, URZ", "@!P0 BRA `(.L_x_1)"
    start = ("UMOV UR6, 0x4", *DESCRIBED, "ISETP.LT.AND P0, PT, RZ, 0x1, PT")
    return listing(
        *start, *((address, jump) if ahead_of_it else (jump, address)),
        ".L_x_0:", PRODUCT, "@P0 BRA `(.L_x_0)", ".L_x_1:", behind, "EXIT",
    )  # fmt: skip


def test_a_number_computed_ahead_of_a_loop_alone_is_missed_behind_it() -> None:
    assert unwritten_reads(loop(True, PRODUCT)) == []
    (found,) = unwritten_reads(loop(False, PRODUCT))
    assert found.endswith(": UR8") and "HGMMA" in found
    assert unwritten_reads(loop(False, "NOP")) == []


def test_what_is_computed_of_it_is_missed_too_and_only_where_it_is_used() -> None:
    read = "UIADD3.64 UR8, UR8, 0x80, URZ"
    assert unwritten_reads(loop(False, read)) == []
    text = listing("S2R R1, SR_TID.X", "IMAD.IADD R3, R1, 0x1, R2", "STG.E desc[UR4][R4.64], R3", "EXIT")
    assert [found.split(": ")[1] for found in unwritten_reads(text)] == ["R3, R4, UR4"]


def test_results_of_several_registers_and_guards_are_known() -> None:
    text = listing(
        "LDC.64 R4, c[0x0][0x210]", "ULDC.64 UR4, c[0x0][0x208]", "LDG.E.128 R8, desc[UR4][R4.64]", "STG.E desc[UR4][R4.64], R11",
        "@P1 BRA `(.L_x_0)", ".L_x_0:", "EXIT",
    )  # fmt: skip
    assert [found.split(": ")[1] for found in unwritten_reads(text)] == ["P1"]


def test_a_first_operand_in_registers_has_no_descriptor() -> None:
    product = "HGMMA.64x128x16.F32.BF16 R24, R184, gdesc[UR8].tnspB, RZ, gsb0"
    text = listing("UMOV UR10, 0x10", "UMOV UR11, 0x10", "LDS.128 R184, [RZ]", product, "EXIT")
    assert unwritten_reads(text) == []
    assert unwritten_reads(text.replace("R184, gdesc", "R188, gdesc"))
