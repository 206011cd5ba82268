"""Tensors that a Gluon kernel reads by the copy engine: how they are compiled for, kept as tensor maps, and passed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc
from triton.compiler import CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.language import NVMMASharedLayout

from flashtile.kernels import direct
from flashtile.kernels.direct import tensor_maps
from flashtile.kernels.spec import Arg, Descriptor, Spec
from flashtile.kernels.tile.views import LseView

SM90 = GPUTarget("cuda", 90, 32)
VERSIONS = ("3.6.0", "3.7.1")
KEYS, VALUES = Descriptor("bf16", (1, 64, 1, 128)), Descriptor("fp16", (1, 16, 1, 32))


def device_function(n, k, lse, v, SIZE):  # type: ignore[no-untyped-def]
    """Stands for a kernel with two tensors that are read by tensor maps."""


SPEC = Spec(
    GluonJITFunction(device_function),
    {"n": Arg("i32"), "k": KEYS, "lse": LseView(None, None, None, None), "v": VALUES},
    {"SIZE": 64},
    {"num_warps": 4},
)


def test_a_kernel_with_descriptors_is_gluons() -> None:
    source = SPEC.source()
    assert type(source) is GluonASTSource
    assert source.signature["n"] == "i32"
    assert source.signature["k"] == f"tensordesc<bf16[1, 64, 1, 128],{KEYS.layout!r}>"
    assert source.signature["v"] == f"tensordesc<fp16[1, 16, 1, 32],{VALUES.layout!r}>"
    assert source.constants == {(2, 0): None, (2, 1): None, (2, 2): None, (2, 3): None, (4,): 64}
    assert SPEC.descriptors() == (1, 3)


def test_a_box_is_swizzled_as_wide_as_it_is() -> None:
    assert isinstance(KEYS.layout, NVMMASharedLayout)
    assert (KEYS.layout.swizzle_byte_width, KEYS.layout.element_bitwidth, KEYS.layout.rank) == (128, 16, 4)
    assert VALUES.layout.swizzle_byte_width == 64


def test_another_box_is_another_kernel() -> None:
    other = Spec(SPEC.kernel, {**SPEC.args, "k": Descriptor("bf16", (1, 32, 1, 128))}, SPEC.constants, SPEC.options)
    same = Spec(SPEC.kernel, {**SPEC.args, "k": Descriptor("bf16", (1, 64, 1, 128))}, SPEC.constants, SPEC.options)
    assert same.key() == SPEC.key() != other.key()


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """What was encoded: (what Triton says of the descriptor, the tensor's address)."""
    made: list[tuple[Any, int]] = []

    def encode(meta: Any, tensor: torch.Tensor) -> tuple[Any, ...]:
        made.append((meta, tensor.data_ptr()))
        return (f"map {len(made)}", *tensor.shape, *tensor.stride())

    monkeypatch.setattr(direct, "encoded", encode)
    return made


def test_maps_stand_where_the_tensors_stood(encoded: list[tuple[Any, int]]) -> None:
    k, v = torch.empty(2, 3), torch.empty(4, 5, 6)
    mapped = tensor_maps(("of k", "of v"), (1, 3))
    assert mapped((7, k, (None, 2), v, 64)) == (7, "map 1", 2, 3, 3, 1, (None, 2), "map 2", 4, 5, 6, 30, 6, 1, 64)
    assert encoded == [("of k", k.data_ptr()), ("of v", v.data_ptr())]
    assert tensor_maps(("of k", "of v"), (0, 1))((k, v)) == ("map 3", 2, 3, 3, 1, "map 4", 4, 5, 6, 30, 6, 1)


def test_a_map_is_kept_for_its_place_address_shape_and_strides(encoded: list[tuple[Any, int]]) -> None:
    cache = torch.empty(4, 6)
    mapped = tensor_maps(("of k", "of v"), (0, 1))
    first = mapped((cache, cache))
    assert first[0] != first[5], "one tensor in two places has a map of each, as boxes may differ"
    assert mapped((cache.view(4, 6), cache[:])) == first
    assert len(encoded) == 2
    unlike = [cache[1:], cache[:3], cache.view(6, 4), cache.t(), torch.empty(4, 6)]
    for number, tensor in enumerate(unlike, 1):
        assert mapped((tensor, cache))[1:5] == (*tensor.shape, *tensor.stride())
        assert len(encoded) == 2 + number
    mapped((cache, cache))
    assert len(encoded) == 2 + len(unlike)


def test_no_more_maps_are_kept_than_an_engine_needs(encoded: list[tuple[Any, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_CACHED_MAPS", 8)
    cache = torch.empty(100, 4)
    mapped = tensor_maps(("of k",), (0,))
    (kept,) = [cell.cell_contents for cell in mapped.__closure__ or () if isinstance(cell.cell_contents, dict)]
    for row in range(100):
        assert mapped((cache[row:],))[1] == 100 - row
        assert 1 <= len(kept) <= 8
    assert len(encoded) == 100


def test_a_map_is_triton_s_own_of_the_tensor_with_zeros_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    fill_with(monkeypatch, lambda *args: asked.append(args) or "map")
    cache = torch.empty(3, 64, 2, 128, dtype=torch.bfloat16).transpose(1, 2)
    meta = META | {"block_size": [1, 1, 64, 64]}
    assert direct.encoded(meta, cache) == ("map", 3, 2, 64, 128, *cache.stride())
    ((address, swizzle, element, _, box, shape, strides, padding),) = asked
    assert (address, swizzle, element, box) == (cache.data_ptr(), 3, 2, [1, 1, 64, 64])
    assert (list(shape), list(strides), padding) == ([3, 2, 64, 128], [64 * 256, 128, 256, 1], 0)


META: dict[str, Any] = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [64, 64], "fp4_padded": False}


def fill_with(monkeypatch: pytest.MonkeyPatch, fill: Callable[..., Any]) -> None:
    """A driver without a GPU, whose encoder of tensor maps is ``fill``."""
    utils = SimpleNamespace(fill_tma_descriptor=fill, fill_tma_descriptor_tiled=fill)
    driver = SimpleNamespace(utils=utils, get_current_target=lambda: SM90)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver, raising=False)
    monkeypatch.setattr(triton.runtime.driver, "_default", driver, raising=False)


class FakeKernel:
    """A compiled kernel that reads parameters 1 and 3 by tensor maps, and notes how it is launched."""

    function = 1234
    packed_metadata = (4, 1, 0)
    metadata = SimpleNamespace(target=SM90, tensordesc_meta=["of k", "of v"])

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

        def by_c(*args: Any) -> None:
            self.calls.append(("direct", args))

        def wrapped(launcher: Callable[..., None]) -> Callable[..., None]:
            def encoding_anew(*args: Any) -> None:
                self.calls.append(("encoding anew", args))
                launcher(*args)

            return encoding_anew

        self.run = SimpleNamespace(
            launch=wrapped(by_c), launch_cooperative_grid=False, launch_pdl=True, arg_annotations="annotations", kernel_signature=b"",
        )  # fmt: skip

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args, stream: self.calls.append(("triton", (*grid, stream, *args)))


@pytest.mark.parametrize("version", VERSIONS)
def test_known_tritons_are_handed_maps_that_are_kept(version: str, encoded: list[tuple[Any, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    kernel = FakeKernel()
    run = direct.raw_launch(kernel, kernel.run, SM90, SPEC.descriptors())
    k, v = torch.empty(2, 3), torch.empty(4, 5)
    for _ in range(2):
        run(7, 3, 99, 5, k, (None,) * 4, v, 64)
    assert len(encoded) == 2
    for way, args in kernel.calls:
        assert way == "direct"
        assert args[:7] == (7, 3, 1, 99, 1234, False, True)
        given = args[13:] if version.startswith("3.6") else args[-1]
        assert given == (5, "map 1", 2, 3, 3, 1, (None,) * 4, "map 2", 4, 5, 5, 1, 64)
    assert len(kernel.calls) == 2


def test_other_tritons_are_handed_the_tensors_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.8.0")
    kernel = FakeKernel()
    k, v = torch.empty(2, 3).t(), torch.empty(4, 5)
    direct.raw_launch(kernel, kernel.run, SM90, SPEC.descriptors())(7, 3, 99, 5, k, None, v, 64)
    ((way, args),) = kernel.calls
    assert way == "triton"
    *start, described_k, none, described_v, end = args
    assert (*start, none, end) == (7, 3, 1, 99, 5, None, 64)
    for described, tensor in ((described_k, k), (described_v, v)):
        assert described.base is tensor
        assert (described.shape, described.strides) == (list(tensor.shape), list(tensor.stride()))
        assert described.padding == "zero"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_codes_of_one_byte_are_described_in_pairs(dtype: torch.dtype) -> None:
    cache = torch.zeros(3, 4, 50, 64).to(dtype).transpose(1, 2)[:, :, ::2]
    pairs = direct._described(cache)
    as_pairs = cache.view(torch.int16)
    assert pairs.base is cache
    assert (pairs.shape, pairs.strides) == (list(as_pairs.shape), list(as_pairs.stride()))


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_profiler_is_served_with_descriptions(version: str, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    kernel = FakeKernel()
    run = direct.raw_launch(kernel, kernel.run, SM90, SPEC.descriptors())

    def listener(*_: Any) -> None:
        pass

    getattr(triton.knobs.runtime, hook).add(listener)
    try:
        run(1, 1, 0, 5, torch.empty(2, 2), None, torch.empty(2, 2))
    finally:
        getattr(triton.knobs.runtime, hook).remove(listener)
    ((way, args),) = kernel.calls
    assert way == "triton"
    assert args[5].padding == args[7].padding == "zero"


def test_the_installed_triton_passes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails at a Triton that wraps its launcher otherwise where there are tensor descriptors, or passes other parameters."""
    fill_with(monkeypatch, lambda address, *_: f"map of {address}")
    calls: list[tuple[Any, ...]] = []
    launcher = object.__new__(CudaLauncher)
    metas = [META, META]
    launcher.launch = wrap_handle_tensordesc(lambda *args: calls.append(args), SPEC.source().signature, metas)
    launcher.num_ctas, launcher.launch_cooperative_grid, launcher.launch_pdl = 1, False, True
    launcher.global_scratch_size = launcher.profile_scratch_size = 0
    launcher.global_scratch_align = launcher.profile_scratch_align = 1
    if triton.__version__.startswith("3.7"):
        launcher.arg_annotations, launcher.kernel_signature = "annotations", "signature"
    kernel = object.__new__(CompiledKernel)
    kernel.module, kernel._run, kernel.function, kernel.packed_metadata = "module", launcher, "function", "metadata"
    kernel.name, kernel.src, kernel.metadata = "name", None, SimpleNamespace(tensordesc_meta=metas)
    k, v = torch.empty(2, 3), torch.empty(4, 5)

    launched = direct.raw_launch(kernel, kernel.run, SM90, SPEC.descriptors())
    assert launched.__name__.startswith("by_launcher_")
    launched(7, 3, 99, 5, k, (None,) * 4, v, 64)
    described = SimpleNamespace(base=k, shape=[2, 3], strides=[3, 1], padding="zero", round_f32_to_tf32=False)
    other = SimpleNamespace(base=v, shape=[4, 5], strides=[5, 1], padding="zero", round_f32_to_tf32=False)
    kernel[7, 3, 1](5, described, (None,) * 4, other, 64, stream=99)
    ours, tritons = calls
    wanted = (5, f"map of {k.data_ptr()}", 2, 3, 3, 1, (None,) * 4, f"map of {v.data_ptr()}", 4, 5, 5, 1, 64)
    for given in calls:
        assert wanted == (tuple(given[-1]) if triton.__version__.startswith("3.7") else given[13:])
    assert len(ours) == len(tritons)
