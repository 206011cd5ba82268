"""Device: names, figures, and GPUs that no table lists."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashtile.errors import ArgumentError, UnsupportedError
from flashtile.planner.device import Device, nearest_architecture


def properties(name: str, major: int = 9, minor: int = 0, **more: object) -> SimpleNamespace:
    return SimpleNamespace(name=name, major=major, minor=minor, **more)


@pytest.mark.parametrize("name", ["T4", "A100", "L40S", "RTX 4090", "RTX 5090", "H100", "H200", "B200", "MI300X", "cpu"])
def test_known_names_have_whole_figures(name: str) -> None:
    device = Device.named(name)
    assert name in Device.names()
    assert min(device.num_sms, device.smem_per_block, device.max_warps_per_sm, device.warp_size, device.l2_bytes) > 0
    assert min(device.bandwidth, device.matrix_rate, device.vector_rate, device.exp_rate, device.launch_us) > 0
    assert device.smem_per_block <= device.smem_per_sm


@pytest.mark.parametrize("spelling", ["RTX 4090", "rtx-4090", "rtx4090", "Rtx_4090"])
def test_spelling_does_not_count(spelling: str) -> None:
    assert Device.named(spelling) is Device.named("RTX 4090")


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match=r"H200.*'h2000'"):
        Device.named("h2000")


@pytest.mark.parametrize(
    ("name", "kilobytes"), [("T4", 64), ("A100", 163), ("L40S", 99), ("RTX 5090", 99), ("H200", 227), ("B200", 227), ("MI300X", 64)]
)
def test_shared_memory_a_block(name: str, kilobytes: int) -> None:
    assert Device.named(name).smem_per_block == kilobytes * 1024


def test_turing_has_no_matrix_instruction_and_its_matrix_rate_is_its_fma_rate() -> None:
    device = Device.named("T4")
    assert not device.has_mma
    assert device.matrix_rate == device.vector_rate


@pytest.mark.parametrize(("name", "first"), [("A100", "mma.sync"), ("H200", "wgmma"), ("B200", "tcgen05.mma"), ("MI300X", "mfma")])
def test_preferred_matrix_instruction(name: str, first: str) -> None:
    assert Device.named(name).mma_shapes[0].name == first


def test_dependent_launch_starts_with_hopper() -> None:
    able = {name for name in Device.names() if Device.named(name).dependent_launch}
    assert able == {"RTX 5090", "H100", "H200", "B200"}


def test_driver_name_finds_the_table() -> None:
    device = Device.from_properties(properties("NVIDIA H200", multi_processor_count=132), "cuda")
    listed = Device.named("H200")
    assert (device.bandwidth, device.matrix_rate, device.num_sms) == (listed.bandwidth, listed.matrix_rate, 132)


def test_drivers_figures_win() -> None:
    device = Device.from_properties(
        properties("NVIDIA H200", multi_processor_count=66, L2_cache_size=123, shared_memory_per_block_optin=1000), "cuda"
    )
    assert (device.num_sms, device.l2_bytes, device.smem_per_block) == (66, 123, 1000)
    assert device.matrix_rate == pytest.approx(Device.named("H200").matrix_rate / 2)


def test_same_name_with_other_memory_takes_the_drivers_bandwidth() -> None:
    told = properties("NVIDIA A100-PCIE-40GB", 8, 0, multi_processor_count=108, memory_clock_rate=1_215_000, memory_bus_width=5120)
    assert Device.from_properties(told, "cuda").bandwidth == pytest.approx(1.555e12 * 0.92, rel=1e-2)


@pytest.mark.parametrize(
    ("arch", "row"),
    [("sm_90", "sm_90"), ("sm_103", "sm_100"), ("sm_121", "sm_120"), ("sm_70", "sm_75"), ("sm_999", "sm_120"), ("gfx943", "gfx942"),
     ("gfx1201", "gfx1100"), ("gfx900", "gfx90a"), ("gfxodd", "gfx90a")],
)  # fmt: skip
def test_an_architecture_never_seen_gets_the_nearest_older_one(arch: str, row: str) -> None:
    assert nearest_architecture(arch) == row


@pytest.mark.parametrize(("major", "minor"), [(7, 0), (8, 6), (10, 3), (12, 1), (42, 7)])
def test_an_unlisted_gpu_is_scaled_from_its_relative(major: int, minor: int) -> None:
    small = Device.from_properties(properties("NVIDIA Thing", major, minor, multi_processor_count=10), "cuda")
    large = Device.from_properties(properties("NVIDIA Thing", major, minor, multi_processor_count=20), "cuda")
    assert small.arch == f"sm_{major}{minor}"
    assert large.bandwidth == pytest.approx(2 * small.bandwidth)
    assert large.matrix_rate == pytest.approx(2 * small.matrix_rate)


def test_an_unlisted_rocm_gpu() -> None:
    told = SimpleNamespace(name="AMD Thing", gcnArchName="gfx1151:sramecc+", multi_processor_count=40, warp_size=32)
    device = Device.from_properties(told, "hip")
    assert (device.arch, device.backend, device.num_sms, device.warp_size) == ("gfx1151", "hip", 40, 32)


def test_of_a_cpu_tensor_follows_torch_threads() -> None:
    device = Device.of(torch.zeros(1))
    assert (device.backend, device.is_gpu, device.num_sms) == ("cpu", False, torch.get_num_threads())


def test_of_a_device_without_kernels() -> None:
    with pytest.raises(UnsupportedError, match="meta"):
        Device.of("meta")


@pytest.mark.parametrize("where", ["nowhere", 3, None])
def test_what_is_no_device_of_torchs(where: Any) -> None:
    with pytest.raises(ArgumentError, match="device: expected a tensor, or a device of torch's"):
        Device.of(where)


def test_a_gpu_that_is_not_here() -> None:
    with pytest.raises(UnsupportedError, match=r"device: expected one of the [0-9]+ GPUs that torch finds here, got cuda:99"):
        Device.of("cuda:99")
