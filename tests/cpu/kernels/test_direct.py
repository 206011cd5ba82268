"""The shortest way into the driver, through each version of Triton that is known; and what is left to Triton."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from flashtile.kernels import direct
from tests.cpu.kernels.fake_kernel import SM90, FakeKernel, spec_of

BINARY = {
    "target": SM90, "num_warps": 4, "num_ctas": 1, "shared": 1000, "launch_pdl": True, "launch_cooperative_grid": False,
}  # fmt: skip


@pytest.fixture
def binary_takes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What ``kernel_of`` makes of a binary whose parameters have these sizes."""

    def kernel_of(sizes: list[int], run: Any = None, **metadata: Any) -> Any:
        monkeypatch.setattr(direct, "parameter_sizes", lambda cubin: sizes)
        compiled = SimpleNamespace(function=1234, metadata=SimpleNamespace(**(BINARY | metadata)), asm={"cubin": b""})
        return direct.kernel_of(compiled, run or SimpleNamespace(), spec_of())

    return kernel_of


def test_a_kernel_is_launched_directly_where_its_binary_takes_what_we_pass(binary_takes: Callable[..., Any]) -> None:
    sizes = [8, 8, 4, 4, 8, 8]  # x.ptr, x.stride, y.view.stride, n, and Triton's two
    assert binary_takes(sizes) == (1234, 128, 1000, True, False, (("*bf16", "i64"), ((None, "i32"), None), "i32", None), 2)
    assert binary_takes(sizes[:-1]) is None
    assert binary_takes([8, *sizes]) is None
    assert binary_takes(sizes, num_ctas=2) is None
    assert binary_takes(sizes, target=GPUTarget("hip", "gfx942", 64)) is None
    assert binary_takes(sizes, run=SimpleNamespace(global_scratch_size=128)) is None
    assert binary_takes(sizes, run=SimpleNamespace(profile_scratch_size=128)) is None


def test_a_triton_that_names_its_facts_otherwise_launches_itself() -> None:
    assert direct.kernel_of(SimpleNamespace(metadata=SimpleNamespace(target=SM90)), SimpleNamespace(), spec_of()) is None


BY_TRITON = [("triton", ((7, 3, 1), 99, ((10, 20), None, 5)))]


@pytest.mark.parametrize("version", ["3.6.0", "3.6.1+git1234", "3.7.0", "3.7.1"])
def test_known_tritons_are_launched_directly(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    ((way, args),) = FakeKernel().launched()
    assert way == "direct"
    assert args[:7] == (7, 3, 1, 99, 1234, False, True)


@pytest.mark.parametrize("version", ["3.5.1", "3.8.0", "4.0.0", "3.70.0"])
def test_unknown_tritons_are_asked_to_launch(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    assert FakeKernel().launched() == BY_TRITON


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
def test_kernels_that_need_more_than_a_launch_are_left_to_triton(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    assert FakeKernel(global_scratch_size=128).launched() == BY_TRITON
    assert FakeKernel(profile_scratch_size=128).launched() == BY_TRITON
    assert FakeKernel().launched(GPUTarget("hip", "gfx942", 64)) == BY_TRITON
    other = FakeKernel()
    del other.run.launch
    assert other.launched() == BY_TRITON


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_that_listens_later_hears_every_launch(version: str, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    kernel = FakeKernel()
    run = direct.raw_launch(kernel, kernel.run, SM90)

    def listener(*_: Any) -> None:
        pass

    for _ in range(2):
        run(1, 1, 0)
        getattr(triton.knobs.runtime, hook).add(listener)
        try:
            run(1, 1, 0)
        finally:
            getattr(triton.knobs.runtime, hook).remove(listener)
    assert [way for way, _ in kernel.calls] == ["direct", "triton"] * 2


def test_the_installed_triton_is_launched_as_it_launches_itself() -> None:
    """Fails at a Triton whose launcher takes other arguments, or that nobody has looked at yet."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    assert version in ((3, 6), (3, 7)), (
        f"teach direct.py how Triton {triton.__version__} launches, or accept the slower way, and list it here"
    )
    from triton.backends.nvidia.driver import CudaLauncher

    calls: list[tuple[Any, ...]] = []
    launcher = object.__new__(CudaLauncher)
    launcher.launch = lambda *args: calls.append(args)
    launcher.num_ctas, launcher.launch_cooperative_grid, launcher.launch_pdl = 1, "cooperative", "pdl"
    launcher.global_scratch_size = launcher.profile_scratch_size = 0
    launcher.global_scratch_align = launcher.profile_scratch_align = 1
    if version == (3, 7):
        launcher.arg_annotations, launcher.kernel_signature = "annotations", "signature"
    # what its constructor sets, and what a compiled kernel holds
    assert set(vars(launcher)) <= set(CudaLauncher.__init__.__code__.co_names)
    assert {"_run", "function", "packed_metadata"} <= set(CompiledKernel.__init__.__code__.co_names)
    kernel = object.__new__(CompiledKernel)
    kernel.module, kernel._run, kernel.function, kernel.packed_metadata = "module", launcher, "function", "metadata"
    kernel.name, kernel.src = "name", None

    kernel[7, 3, 1]((10, 20), None, 5, stream=99)
    launched = direct.raw_launch(kernel, kernel.run, SM90)
    assert launched.__name__ == f"by_launcher_{version[0]}{version[1]}"
    launched(7, 3, 99, (10, 20), None, 5)
    by_triton, ours = calls
    assert len(by_triton) == len(ours)
    hooks = (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook)
    for theirs, mine in zip(by_triton, ours):
        if theirs in hooks or type(theirs).__name__ == "LazyDict":
            assert mine is None
        else:
            assert mine == theirs
