"""The parameters of a launch in one piece of memory: where they lie, and that the compiler's binary takes them so."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import pytest

from flashtile.problem import Problem
from flashtile.testing.cases import SMALL_CASES
from flashtile.testing.inputs import make_inputs

pytest.importorskip("triton")

from flashtile.kernels.block import Kernel, NotReplayable, block_of, sizes_of
from flashtile.kernels.spec import Arg, Descriptor, Spec
from tests.cpu.kernels.uninterpreted import answers


class View(NamedTuple):
    ptr: Any
    stride: Any


def test_parameters_lie_at_their_own_alignment() -> None:
    kernel = Kernel(1, 32, 0, False, False, ("i32", View("*bf16", None), None, (("i64", "i8"), "fp32")))
    block = block_of(kernel, (5, (0x1000, None), 64, ((-2, 3), 1.5)))
    assert sizes_of(kernel) == [4, 8, 8, 1, 4, 8, 8]
    assert block.offsets == (0, 8, 16, 24, 28, 32, 40)
    assert block.pointers == ((8, 0x1000, False),)
    assert struct.unpack("<i4xQqb3xfQQ", block.bytes) == (5, 0x1000, -2, 3, 1.5, 0, 0)
    with pytest.raises(NotReplayable, match="fp16"):
        sizes_of(Kernel(1, 32, 0, False, False, ("fp16",)))


COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from flashtile.kernels import combine, decode, launch
from flashtile.kernels.block import Kernel, sizes_of
from flashtile.kernels.cubin import parameter_sizes
from flashtile.planner.after_append import append_programs
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.problem import Problem

problem = Problem.from_json(json.load(sys.stdin))
plan = plan_decode(problem, Device.named("a100"), num_splits=2)
for spec in (decode.decode_spec(problem, plan), combine.combine_spec(problem, plan)):
    compiled = launch.compile_spec(spec, GPUTarget("cuda", 80, 32))
    print(json.dumps([parameter_sizes(compiled.asm["cubin"]), sizes_of(Kernel(1, 32, 0, False, False, spec.parameters(None)))]))
"""


@pytest.mark.parametrize("name", ["length_17_bf16", "everything"])
def test_the_compilers_binary_takes_the_parameters_that_we_pass(name: str) -> None:
    """Fails at a Triton that appends other parameters than the two scratch pointers, or drops or reorders any."""
    (case,) = (case for case in SMALL_CASES if case.name == name)
    problem = Problem.decode(**{name: value for name, value in make_inputs(case).args.items() if value is not None}, lse=True)
    pairs = answers(COMPILE, problem.to_json())
    assert len(pairs) == 2
    for in_binary, passed in pairs:
        assert in_binary == passed
        assert len(passed) > 10


def test_a_descriptor_is_a_map_with_shape_and_strides() -> None:
    class Anything(NamedTuple):
        arg_names: tuple[str, ...]

    spec = Spec(Anything(("x", "n", "SIZE")), {"x": Descriptor("bf16", (1, 64, 1, 64)), "n": Arg("i32")}, {"SIZE": 1}, {})
    described, number, constant = spec.parameters(["meta"])
    assert (described.rank, number, constant) == (4, "i32", None)
    assert sizes_of(Kernel(1, 32, 0, False, False, (described, number, constant))) == [128, 4, 4, 4, 4, 8, 8, 8, 8, 4, 8, 8]
