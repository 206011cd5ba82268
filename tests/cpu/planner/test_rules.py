"""Rules and footprints: what fits, what is chosen, and what is refused with the number that decided."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtile.band import Band
from flashtile.planner.catalog import GLUON_SM90, TRITON
from flashtile.planner.choose import plan_decode, plan_for_tile
from flashtile.planner.cost import predict_us
from flashtile.planner.device import Device
from flashtile.planner.feasible import infeasible
from flashtile.planner.fitting import fitting_tiles
from flashtile.planner.footprint import footprint_of, mma_name, mma_of, padded, registers_per_thread, shared_memory_bytes
from flashtile.planner.plans import DecodePlan
from flashtile.planner.resources import registers_limit
from flashtile.planner.rules import choose_tile_and_splits
from flashtile.planner.splits import MAX_SPLITS, MAX_STREAM_TILES, Splits, choose_splits, combine_shape
from flashtile.planner.tiles import CANDIDATES, LIMITS, SHAPES, Tile
from flashtile.problem import Problem

H200 = Device.named("H200")
GPUS = [Device.named(name) for name in Device.names() if name != "cpu"]
LLAMA = Problem(seqlen_k=4096, num_heads_q=32, num_heads_kv=8)


def choose_tile(problem: Problem, device: Device, kernel: str, block_m: int | None = None) -> Tile | None:
    chosen = choose_tile_and_splits(problem, device, kernel, block_m)
    return chosen[0] if chosen else None


problems = st.builds(
    lambda group, num_heads_kv, **facts: Problem(num_heads_q=group * num_heads_kv, num_heads_kv=num_heads_kv, **facts),
    group=st.sampled_from([1, 2, 5, 8, 16]),
    num_heads_kv=st.sampled_from([1, 2, 8, 32]),
    batch=st.integers(0, 300),
    seqlen_q=st.sampled_from([0, 1, 2, 4, 7, 64, 2048]),
    seqlen_k=st.sampled_from([0, 1, 63, 64, 777, 4096, 131072, 1 << 20]),
    head_dim=st.sampled_from([8, 64, 72, 96, 128, 192, 256]),
    head_dim_v=st.sampled_from([8, 64, 128, 256]),
    dtype_q=st.sampled_from(["float16", "bfloat16", "float32"]),
    band=st.sampled_from([Band(None, 0), Band(), Band(1023, 0), Band(0, 0)]),
    page_size=st.sampled_from([0, 1, 16]),
    alibi=st.booleans(),
    softcap=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(problem=problems, device=st.sampled_from([*GPUS, Device.named("cpu")]))
def test_every_planned_decode_is_feasible_and_covers_its_keys(problem: Problem, device: Device) -> None:
    plan = plan_decode(problem, device)
    assert infeasible(problem, plan, device) == []
    assert plan.num_splits * plan.keys_per_split >= problem.keys_read
    assert 0 < plan.min_keys_per_split <= plan.keys_per_split
    assert predict_us(problem, plan, device).total_us > 0
    if device.is_gpu:
        assert plan.keys_per_split % plan.block_n == 0
        assert plan.min_keys_per_split % plan.block_n == 0
        assert shared_memory_bytes(problem, plan, device) <= device.smem_per_block
        assert registers_per_thread(problem, plan, device) <= registers_limit(plan.num_warps, device)
        assert plan.kernel == TRITON or device.arch == "sm_90"
        resident = device.num_sms * footprint_of(problem, plan, device).resident
        assert plan.num_programs <= resident or (plan.kernel == GLUON_SM90 and plan.num_programs <= MAX_SPLITS)
        assert problem.batch > 1 or plan.num_programs == 0


@pytest.mark.parametrize(("dim", "held"), [(8, 16), (16, 16), (64, 64), (72, 128), (192, 256)])
def test_head_dims_are_padded_to_powers_of_two(dim: int, held: int) -> None:
    assert padded(dim) == held


@pytest.mark.parametrize(
    ("device", "tile", "name"),
    [
        ("H200", Tile(16, False, 64, 4, 3), "mma.sync m16n8k16"),
        ("H200", Tile(64, False, 64, 4, 3), "wgmma m64n64k16"),
        ("H200", Tile(64, False, 64, 2, 3), "mma.sync m16n8k16"),
        ("H200", Tile(8, True, 64, 4, 3), "mma.sync m16n8k16"),
        ("H200", Tile(16, True, 64, 4, 3), "wgmma m64n16k16"),
        ("H200", Tile(1, False, 64, 8, 3), "the vector units"),
        ("H200", Tile(8, False, 128, 4, 2, GLUON_SM90), "mma.sync m16n8k16"),
        ("H200", Tile(16, False, 64, 4, 3, GLUON_SM90), "mma.sync m16n8k16"),
        ("H200", Tile(64, False, 128, 4, 2, GLUON_SM90), "wgmma m64n128k16"),
        ("H200", Tile(128, False, 64, 8, 2, GLUON_SM90), "wgmma m64n64k16"),
        ("A100", Tile(64, False, 64, 4, 3), "mma.sync m16n8k16"),
        ("T4", Tile(16, False, 32, 4, 2), "FMA on the vector units"),
        ("MI300X", Tile(16, False, 32, 4, 2), "mfma m16n16k16"),
    ],
)
def test_matrix_instruction(device: str, tile: Tile, name: str) -> None:
    assert mma_name(LLAMA, tile, Device.named(device)) == name


def test_ieee_float32_has_no_matrix_instruction_on_nvidia_unless_tf32_is_allowed() -> None:
    tile = Tile(16, False, 32, 4, 2)
    ieee = LLAMA.with_(dtype_q="float32", dtype_k="float32", dtype_v="float32", dtype_out="float32")
    assert mma_of(ieee, tile, H200) is None
    assert mma_name(ieee.with_(allow_tf32=True), tile, H200) == "mma.sync m16n8k8"
    assert mma_of(ieee, tile, Device.named("MI300X")) is not None


def test_shared_memory_grows_with_stages_and_keys() -> None:
    small, deep, wide = (shared_memory_bytes(LLAMA, Tile(16, False, n, 4, s), H200) for n, s in ((32, 3), (32, 4), (64, 3)))
    assert deep - small == 32 * 128 * 2 * 2
    assert wide > small


@pytest.mark.parametrize(("rows", "block_m"), [(1, 16), (4, 16), (16, 16), (17, 64), (32, 64), (64, 64), (256, 128)])
def test_rows_choose_the_portable_tile(rows: int, block_m: int) -> None:
    tile = choose_tile(Problem(seqlen_q=rows, seqlen_k=32768, num_heads_q=8, num_heads_kv=8), H200, TRITON)
    assert tile is not None
    assert tile.block_m == block_m


@pytest.mark.parametrize(
    ("rows", "block_m"), [(0, 8), (1, 8), (8, 8), (9, 16), (16, 16), (17, 64), (64, 64), (65, 64), (128, 64), (256, 64)]
)
def test_rows_choose_hoppers_tile(rows: int, block_m: int) -> None:
    tile = choose_tile(Problem(seqlen_q=rows, seqlen_k=32768, num_heads_q=8, num_heads_kv=8), H200, GLUON_SM90)
    assert tile is not None
    assert tile.block_m == block_m


def test_single_tokens_beside_one_long_chunk_keep_a_small_tile() -> None:
    packed = Problem(batch=64, seqlen_q=512, total_q=575, seqlen_k=8192, num_heads_q=32, num_heads_kv=8, ragged_q=True)
    assert plan_decode(packed, H200).block_m == 64
    assert plan_decode(packed.with_(total_q=80), H200).block_m == 16


@pytest.mark.parametrize(
    ("units", "rows", "shape"),
    [
        (1, 8, (64, 4, 3)), (44, 8, (64, 4, 3)), (45, 8, (128, 4, 3)), (80, 8, (128, 4, 3)), (81, 8, (64, 4, 3)), (132, 8, (64, 4, 3)),
        (133, 8, (64, 2, 2)), (512, 8, (64, 4, 3)), (1024, 8, (64, 2, 2)),
        (44, 16, (64, 4, 3)), (45, 16, (128, 4, 2)), (132, 16, (128, 4, 2)), (133, 16, (64, 2, 2)),
    ],
)  # fmt: skip
def test_units_choose_hoppers_shape(units: int, rows: int, shape: tuple[int, int, int]) -> None:
    plan = plan_decode(Problem(seqlen_k=32768, num_heads_q=units * rows, num_heads_kv=units), H200)
    assert (plan.kernel, plan.block_m) == (GLUON_SM90, rows)
    assert (plan.block_n, plan.num_warps, plan.num_stages) == shape
    assert plan.num_splits * plan.keys_per_split >= 32768
    tiles_each = -(-(32768 // plan.block_n) // (132 // units if units <= 44 else 1))
    assert plan.keys_per_split == tiles_each * plan.block_n


def test_every_candidate_is_within_its_kernels_limits() -> None:
    for kernel, variants in CANDIDATES.items():
        assert tuple(variants) == LIMITS[kernel].variants
        for tiles in variants.values():
            for tile in tiles:
                fields = {name: getattr(tile, name) for name in Tile._fields}
                against = infeasible(LLAMA, DecodePlan(**fields), H200)
                assert not [reason for reason in against if "shared memory" not in reason and "spill" not in reason], tile


@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)])
@pytest.mark.parametrize("page_size", [0, 8, 16, 64])
def test_hopper_has_every_tile_for_every_head_dim(dims: tuple[int, int], page_size: int) -> None:
    for units in (8, 64, 132, 512):
        problem = Problem(
            seqlen_k=8192, num_heads_q=units * 4, num_heads_kv=units, head_dim=dims[0], head_dim_v=dims[1], page_size=page_size
        )
        tall = {tile.block_m for tile, _ in fitting_tiles(problem, H200, GLUON_SM90) if tile.block_m >= 64}
        assert tall == {64, 128}, units
        assert plan_decode(problem, H200).kernel == GLUON_SM90


def test_shapes_are_ordered_by_units() -> None:
    for variants in SHAPES.values():
        for regimes in variants.values():
            bounds = [regime.most_units_percent for regime in regimes]
            assert bounds == sorted(set(bounds))
            assert bounds[-1] > 10**9


def test_less_shared_memory_gives_a_shallower_ring() -> None:
    tile = choose_tile(LLAMA, H200, TRITON)
    small = choose_tile(LLAMA, replace(H200, smem_per_block=48 * 1024), TRITON)
    assert tile is not None
    assert small is not None
    assert shared_memory_bytes(LLAMA, small, H200) <= 48 * 1024 < shared_memory_bytes(LLAMA, tile, H200)


@pytest.mark.parametrize(("keys", "heads_kv", "splits"), [(4096, 8, 16), (131072, 8, 16), (131072, 1, 128), (64, 8, 1), (512, 8, 8)])
def test_splits_of_a_lone_sequence_fill_one_wave(keys: int, heads_kv: int, splits: int) -> None:
    problem = Problem(seqlen_k=keys, num_heads_q=4 * heads_kv, num_heads_kv=heads_kv)
    assert choose_splits(problem, H200, Tile(16, False, 64, 4, 3))[2] == splits


def test_more_sms_give_more_splits() -> None:
    tile = Tile(16, False, 64, 4, 3)
    assert choose_splits(LLAMA, replace(H200, num_sms=66), tile)[2] < choose_splits(LLAMA, H200, tile)[2]


def test_one_full_wave_is_not_split() -> None:
    assert choose_splits(LLAMA.with_(batch=32, total_q=32), H200, Tile(16, False, 64, 4, 3))[2] == 1


@pytest.mark.parametrize(
    ("batch", "tile"), [(128, Tile(16, False, 64, 4, 3)), (64, Tile(16, False, 64, 4, 3)), (64, Tile(8, False, 64, 4, 3, GLUON_SM90))]
)
def test_many_sequences_are_shared_by_what_is_resident(batch: int, tile: Tile) -> None:
    many = LLAMA.with_(batch=batch, total_q=batch)
    assert choose_splits(many, H200, tile).num_programs == 132 * footprint_of(many, tile, H200).resident
    assert choose_splits(many, H200, tile).num_splits == 1


def test_hoppers_kernel_has_a_program_for_each_unit_of_many_waves() -> None:
    many = LLAMA.with_(batch=128, total_q=128)
    assert choose_splits(many, H200, Tile(8, False, 64, 2, 2, GLUON_SM90)).num_programs == 128 * 8


@pytest.mark.parametrize(("page_size", "programs"), [(16, 1), (64, 1), (1, 2), (24, 2)])
def test_gathered_keys_have_two_programs_an_sm(page_size: int, programs: int) -> None:
    tile = Tile(8, False, 64, 4, 3, GLUON_SM90)
    assert choose_splits(LLAMA.with_(page_size=page_size), H200, tile).num_splits == programs * choose_splits(LLAMA, H200, tile).num_splits


@pytest.mark.parametrize(("page_size", "block_n"), [(0, 128), (128, 128), (64, 128), (16, 128), (24, 64), (8, 64), (1, 64)])
def test_gathered_tiles_stay_small(page_size: int, block_n: int) -> None:
    tile = choose_tile(LLAMA.with_(batch=8, total_q=8, page_size=page_size), H200, GLUON_SM90)
    assert tile is not None
    assert tile.block_n == block_n


def test_few_sequences_are_shared_by_as_many_programs_as_a_grid_has() -> None:
    tile = Tile(8, False, 128, 4, 2, GLUON_SM90)
    splits = choose_splits(LLAMA.with_(batch=4, total_q=4), H200, tile)
    assert splits == (1024, 128, 4, 128)
    assert choose_splits(LLAMA, H200, tile) == (256, 128, 16, 0)


def test_what_a_batch_cannot_share_is_a_grid() -> None:
    tile = Tile(8, False, 64, 2, 2, GLUON_SM90)
    one_tile = LLAMA.with_(batch=64, total_q=64, seqlen_k=64)
    assert choose_splits(one_tile, H200, tile) == (64, 64, 1, 0)
    countless = LLAMA.with_(batch=1 << 17, total_q=1 << 17, seqlen_k=1 << 17)
    assert choose_splits(countless, H200, tile).num_programs == 0
    assert plan_decode(countless, H200).num_programs == 0
    (reason,) = infeasible(countless, plan_decode(countless, H200).with_(num_programs=132), H200)
    assert str(MAX_STREAM_TILES) in reason


def test_combine_takes_whole_rows_where_there_are_many() -> None:
    problem = LLAMA.with_(batch=128, total_q=128)
    assert combine_shape(problem, H200, Splits(4096, 64, 1, 396)) == (128, 1)
    assert combine_shape(LLAMA, H200, Splits(256, 64, 16)) == (32, 1)
    assert combine_shape(problem, H200, Splits(4096, 64, 65, 65)) == (32, 4)


def test_programs_that_merge_what_they_share_launch_no_combine() -> None:
    problem = LLAMA.with_(batch=64, total_q=64)
    plan = DecodePlan(GLUON_SM90, 8, num_programs=264)

    def merging_us(problem: Problem, plan: DecodePlan) -> float:
        return predict_us(problem, plan, H200).combine_us

    assert 0 < merging_us(problem, plan) < H200.launch_us  # 512 units: most programs begin or end within one
    assert merging_us(problem, plan.with_(num_programs=256)) == 0  # two whole units each
    long = problem.with_(head_dim=256, head_dim_v=256)
    combined = [(problem, plan.with_(kernel=TRITON)), (problem, plan.with_(num_splits=2)), (long, plan.with_(block_m=64))]
    assert all(merging_us(problem, plan) > H200.launch_us for problem, plan in combined)
    assert merging_us(problem, plan.with_(kernel=TRITON, num_programs=1)) == 0


def test_a_window_counts_and_not_the_cache() -> None:
    problem = LLAMA.with_(seqlen_k=131072, band=Band(1023, 0))
    keys_per_split, _, splits, _ = choose_splits(problem, H200, Tile(16, False, 64, 4, 3))
    assert 1024 <= keys_per_split * splits < 2048


def plan(**changes: object) -> DecodePlan:
    return DecodePlan("triton.decode", 16).with_(**changes)


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"block_m": 48}, "48"),
        ({"block_m": 8}, "at least"),
        ({"block_m": 32, "swapped": True}, "block_m 32 swapped"),
        ({"block_n": 48}, "48"),
        ({"block_n": 8}, "8"),
        ({"num_warps": 3}, "3"),
        ({"num_warps": 64}, "64"),
        ({"num_stages": 0}, "0"),
        ({"num_splits": 0}, "0"),
        ({"num_splits": MAX_SPLITS + 1}, str(MAX_SPLITS)),
        ({"combine_warps": 5}, "5"),
        ({"combine_block_d": 12}, "12"),
        ({"keys_per_split": 64, "min_keys_per_split": 128}, "128"),
        ({"keys_per_split": -1}, "-1"),
        ({"block_n": 256, "num_stages": 8}, str(227 * 1024)),
        ({"num_programs": -1}, "-1"),
        ({"kernel": GLUON_SM90, "block_m": 32}, "block_m 8, 16, 64 and 128"),
        ({"kernel": GLUON_SM90, "swapped": True}, "block_m 16 swapped"),
        ({"kernel": GLUON_SM90, "block_n": 16}, "16"),
        ({"kernel": GLUON_SM90, "num_warps": 8}, "fewer than 16 keys"),
        ({"kernel": GLUON_SM90, "num_warps": 16}, "(1, 2, 4, 8)"),
        ({"kernel": GLUON_SM90, "block_m": 64, "num_warps": 8}, "not 4"),
        ({"kernel": GLUON_SM90, "block_m": 128, "num_warps": 4}, "not 8"),
        ({"kernel": GLUON_SM90, "num_stages": 1}, "within 2 and 8"),
    ],
)
def test_infeasible_quotes_the_number(changes: dict[str, object], number: str) -> None:
    reasons = infeasible(LLAMA, plan(**changes), H200)
    assert reasons
    assert number in " ".join(reasons)


def test_spills_are_infeasible() -> None:
    wide = LLAMA.with_(head_dim=256, head_dim_v=256)
    (reason,) = infeasible(wide, plan(block_m=64, block_n=64, num_warps=4, num_stages=2), H200)
    assert "255" in reason
    assert "spill" in reason


def test_a_cpu_shares_no_tiles() -> None:
    (reason,) = infeasible(LLAMA, DecodePlan("cpu.decode", 16, num_programs=4), Device.named("cpu"))
    assert "num_programs 4" in reason


def test_dependent_launch_needs_hopper() -> None:
    (reason,) = infeasible(LLAMA, plan(dependent_launch=True), Device.named("A100"))
    assert "sm_80" in reason


@pytest.mark.parametrize(
    ("batch", "keys", "heads", "block_m", "measured_us"),
    [
        (1, 4096, (32, 8), 16, 10.4), (1, 4096, (32, 8), 64, 10.6), (1, 32768, (32, 8), 16, 36.8), (1, 32768, (32, 8), 64, 37.3),
        (1, 131072, (32, 8), 16, 125.4), (8, 2048, (32, 8), 16, 22.1), (32, 4096, (32, 8), 16, 122.0), (128, 4096, (32, 8), 64, 480.3),
        (128, 4096, (32, 32), 16, 1890.1), (1, 131072, (16, 1), 16, 24.3), (128, 1024, (16, 1), 16, 21.3),
    ],
)  # fmt: skip
def test_the_model_is_near_what_an_h200_measured(batch: int, keys: int, heads: tuple[int, int], block_m: int, measured_us: float) -> None:
    problem = Problem(batch=batch, seqlen_k=keys, num_heads_q=heads[0], num_heads_kv=heads[1])
    tile = choose_tile(problem, H200, TRITON, block_m)
    assert tile is not None
    predicted = predict_us(problem, plan_for_tile(problem, H200, tile), H200).total_us
    assert predicted == pytest.approx(measured_us, rel=0.15)


@pytest.mark.parametrize(
    ("batch", "seqlen_q", "keys", "heads", "measured_us"),
    [
        (1, 1, 512, (32, 8), 4.04), (1, 1, 4096, (32, 8), 7.76), (1, 4, 4096, (32, 8), 8.27), (1, 1, 32768, (16, 1), 8.78),
        (8, 1, 2048, (32, 8), 18.52), (1, 1, 32768, (32, 8), 33.56), (32, 1, 4096, (32, 8), 119.7), (17, 1, 2048, (32, 8), 35.6),
        (128, 1, 1024, (32, 8), 123.1), (1, 1, 512, (32, 32), 5.57),
    ],
)  # fmt: skip
def test_the_model_is_near_what_a_prototype_of_hoppers_kernel_measured(
    batch: int, seqlen_q: int, keys: int, heads: tuple[int, int], measured_us: float
) -> None:
    problem = Problem(batch=batch, seqlen_q=seqlen_q, seqlen_k=keys, num_heads_q=heads[0], num_heads_kv=heads[1])
    predicted = predict_us(problem, plan_decode(problem, H200), H200).total_us
    assert predicted == pytest.approx(measured_us, rel=0.2)


def test_resident_programs_follow_from_shared_memory() -> None:
    tile = Tile(16, False, 64, 4, 3)
    assert footprint_of(LLAMA, tile, H200).resident == 228 * 1024 // shared_memory_bytes(LLAMA, tile, H200)


@pytest.mark.parametrize(
    ("batch", "seqlen_q", "group", "splits", "programs"),
    [
        (8, 8, 4, 2, 128),  # 64 units of one block: a program for each SM
        (8, 16, 8, 2, 256),  # two blocks each: two for each SM
        (8, 32, 8, 1, 256),
        (8, 32, 16, 1, 512),  # beyond what is resident, one for each unit rather than two programs in a unit
        (16, 8, 4, 1, 128),
    ],
)
def test_tall_tiles_have_as_many_programs_as_compute_in_the_time_of_a_read(
    batch: int, seqlen_q: int, group: int, splits: int, programs: int
) -> None:
    """The tile of 64 rows computes for as long as an SM's share of a read takes (benchmarks/results/study.json)."""
    plan = plan_decode(Problem(batch=batch, seqlen_q=seqlen_q, seqlen_k=8192, num_heads_q=8 * group, num_heads_kv=8), H200)
    assert (plan.kernel, plan.block_m, plan.num_splits, plan.num_programs) == (GLUON_SM90, 64, splits, programs)


@pytest.mark.parametrize("device", [H200, Device.named("A100")], ids=lambda device: device.name)
@pytest.mark.parametrize("batch", [8, 64])
def test_short_units_are_handed_out_whole(batch: int, device: Device) -> None:
    """What the line costs them is about what it could even out; not so where keys are split, or queries are of unlike number."""
    short = Problem(batch=batch, seqlen_k=512, num_heads_q=64, num_heads_kv=8)
    assert plan_decode(short, device).num_programs == 0 or plan_decode(short, device).num_splits > 1
    assert plan_decode(short.with_(seqlen_k=1024), device).num_programs > 0
    windowed = short.with_(seqlen_k=100_000, band=Band(400, 0))
    assert plan_decode(windowed, H200).num_programs == 0
    chunk = Problem(batch=batch, seqlen_q=256, total_q=batch + 255, seqlen_k=512, num_heads_q=64, num_heads_kv=8, ragged_q=True)
    assert plan_decode(chunk, H200).num_programs > 0
