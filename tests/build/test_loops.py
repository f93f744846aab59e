# SPDX-License-Identifier: Apache-2.0
"""The report on kernels whose machine code is known: compiled here, or written by hand."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from build import kernel_rows, loops, resources, sass
from build.kernel_rows import Row

PLANTED = Path(__file__).with_name("planted.cu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    if resources.cuobjdump() is None or shutil.which("c++filt") is None:
        pytest.skip("cuobjdump comes with the CUDA toolkit or Triton, c++filt with binutils")
    cubin = tmp_path_factory.mktemp("planted") / "planted.cubin"
    command = ["nvcc", "-O3", "-lineinfo", "-cubin", "-arch=sm_90a", "-o", cubin, PLANTED]
    subprocess.run(command, check=True, capture_output=True)
    used = {k.name: k for k in resources.read(cubin)}
    found = {}
    for function in sass.disassemble(cubin):
        (name,) = resources.demangled([function.symbol]).values()
        kernel = used[name]
        found[name] = kernel_rows.of(function, kernel, threads=kernel.threads, dynamic=0)
    return found


def line_of(text: str) -> str:
    """Where planted.cu says something."""
    (number,) = [n for n, line in enumerate(PLANTED.read_text().splitlines(), 1) if text in line]
    return f"planted.cu:{number}"


class TestPlanted:
    @pytest.mark.parametrize(
        ("kernel", "narrowest", "widest", "moved", "loads"),
        [
            ("scalar_loop", 4, 4, 8, 1),
            ("pack_loop", 16, 16, 32, 1),
            ("four_loads", 16, 16, 80, 4),
            ("chain", 4, 4, 16, 1),
            ("nested", 2, 16, 2, 1),  # 16 bytes in the outer loop, which is not the main one
            ("no_loop", 1, 1, 2, 1),
            ("static_shared", 4, 4, 4, 1),
        ],
    )
    def test_accesses(
        self,
        rows: dict[str, Row],
        kernel: str,
        narrowest: int,
        widest: int,
        moved: int,
        loads: int,
    ) -> None:
        row = rows[kernel]
        assert (row.narrowest, row.widest, row.bytes) == (narrowest, widest, moved)
        assert row.loads == loads
        # The widest access of each is also the one that waits.
        waiting = loads * (2 if kernel == "nested" else widest)
        assert row.flight == waiting * row.threads * row.blocks

    def test_instructions_of_an_element(self, rows: dict[str, Row]) -> None:
        one, pack = rows["scalar_loop"], rows["pack_loop"]
        # Three more products; all else of an iteration is the same.
        assert pack.instructions - one.instructions == 3
        assert one.per_element == one.instructions / 2
        assert pack.per_element == round(pack.instructions / 8, 2)

    def test_share_that_issue_allows(self, rows: dict[str, Row]) -> None:
        one = rows["scalar_loop"]
        a_second = 132 * 4 * 1.755e9 / one.instructions * 32 * 8
        assert one.issue == pytest.approx(a_second / 3.35e12, abs=1e-3)

    def test_the_line_of_the_main_loop(self, rows: dict[str, Row]) -> None:
        assert rows["scalar_loop"].loop == line_of("y[i] = 2.0f * x[i]")
        assert rows["nested"].loop == line_of("sum += x[r * columns + c]")
        assert rows["nested"].narrow == {"2": [rows["nested"].loop]}
        assert rows["no_loop"].loop == "no loop"

    def test_spills_and_shared_memory(self, rows: dict[str, Row]) -> None:
        assert rows["spilling"].stack >= 256
        assert all(row.stack == 0 for name, row in rows.items() if name != "spilling")
        held = rows["static_shared"]
        assert (held.static, held.blocks, held.occupancy) == (40_000, 5, 5 * 8 / 64)
        assert rows["scalar_loop"].static == 0


def function(*lines: str) -> sass.Function:
    """A kernel from lines of a listing: labels end in a colon, places begin with two slashes."""
    text = ["\t.target\tsm_90a", '\t.section\t.text.k,"ax",@progbits']
    text += [
        x if x.endswith(":") or x.startswith("//") else f"        /*0000*/  {x} ;" for x in lines
    ]
    (found,) = sass._functions("\n".join(text))
    return found


def main_loop(*lines: str) -> loops.Loop:
    found = loops.main(loops.find(function(*lines)))
    assert found is not None
    return found


BACK = ("@P0 BRA `(.L_1)", "EXIT")


class TestPath:
    @pytest.mark.parametrize("short_first", [False, True])
    def test_of_equal_bytes_the_shorter_way(self, short_first: bool) -> None:
        ways = [
            [f"STG.E desc[UR4][R2.64+{4 * i:#x}], R{8 + i}" for i in range(4)],
            ["STG.E.128 desc[UR4][R2.64], R8"],
        ]
        first, second = reversed(ways) if short_first else ways
        loop = main_loop(
            ".L_1:", "@P1 BRA `(.L_2)", *first, "BRA `(.L_3)", ".L_2:", *second, ".L_3:", *BACK
        )
        assert (loop.bytes, loop.instructions) == (16, 4 if short_first else 3)
        assert sorted(i.width for i in loop.accesses) == [4, 4, 4, 4, 16]

    def test_a_longer_way_that_moves_more(self) -> None:
        loop = main_loop(
            ".L_1:", "@P1 BRA `(.L_2)", "IADD3 R1, R1, R2, R3", "LDG.E R4, [R2.64]", ".L_2:", *BACK
        )
        assert (loop.bytes, loop.instructions) == (4, 4)

    def test_slow_ways_of_a_parted_warp_are_left_out(self) -> None:
        loop = main_loop(
            ".L_1:",
            "LDG.E R4, [R2.64]",
            "BRA.DIV ~URZ, `(.L_9)",
            ".L_2:",
            *BACK,
            ".L_9:",
            "LDG.E.128 R8, [R2.64]",
            "BRA `(.L_2)",
        )
        assert (loop.bytes, loop.instructions) == (4, 3)

    def test_what_is_called_counts(self) -> None:
        loop = main_loop(
            ".L_1:",
            "LDG.E R4, [R2.64]",
            "CALL.REL.NOINC `($divide)",
            *BACK,
            "$divide:",
            "@P2 BRA `(.L_8)",
            "FMUL R1, R1, R1",
            "FMUL R1, R1, R1",
            ".L_8:",
            "RET.REL.NODEC R2 `(k)",
        )
        assert loop.instructions == 3 + 2  # the short way through the function

    def test_inner_loops_count_once_and_keep_their_bytes(self) -> None:
        found = loops.find(
            function(
                ".L_1:", "LDG.E.128 R4, [R2.64]",
                ".L_2:", "LDG.E.U8 R8, [R2.64]", "@P1 BRA `(.L_2)",
                *BACK,
            )
        )  # fmt: skip
        (outer,), (inner,) = found, found[0].inside
        assert (outer.depth, outer.bytes, outer.instructions) == (1, 16, 1 + 2 + 1)
        assert (inner.depth, inner.bytes, inner.instructions) == (2, 1, 2)
        assert loops.main(found) is inner

    def test_what_an_inner_loop_moves_decides_nothing_outside(self) -> None:
        (outer,) = loops.find(
            function(
                ".L_1:", "@P1 BRA `(.L_3)",
                ".L_2:", "LDG.E.128 R8, [R2.64]", "@P2 BRA `(.L_2)", "BRA `(.L_4)",
                ".L_3:", "LDG.E R4, [R2.64]",
                ".L_4:", *BACK,
            )
        )  # fmt: skip
        assert (outer.bytes, outer.inside[0].bytes) == (4, 16)

    def test_lines_of_helpers_are_their_callers(self) -> None:
        loop = main_loop(
            ".L_1:",
            '//## File "/src/cuda/vec.cuh", line 42 inlined at "/src/cuda/edit.cuh", line 65',
            '//## File "/src/cuda/edit.cuh", line 65 inlined at "/src/cuda/edit.cuh", line 90',
            '//## File "/src/cuda/edit.cuh", line 90',
            "LDG.E R4, [R2.64]",
            '//## File "/src/cuda/edit.cuh", line 91',
            *BACK,
        )
        assert [i.source for i in loop.path] == ["edit.cuh:65", "edit.cuh:91"]
        assert loop.source == "edit.cuh:65"

    def test_tables_of_branches(self) -> None:
        loop = main_loop(
            ".L_1:",
            'BRX R2 -0x10 (*"BRANCH_TARGETS .L_2,.L_3"*)',
            ".L_2:",
            "LDG.E R4, [R2.64]",
            ".L_3:",
            *BACK,
        )
        assert loop.bytes == 4
        with pytest.raises(RuntimeError, match="k: expected the targets of BRX"):
            function("BRX R2 -0x10", "EXIT")

    def test_code_behind_the_end_is_no_loop(self) -> None:
        assert loops.find(function("EXIT", ".L_1:", "LDG.E R4, [R2.64]", "BRA `(.L_1)")) == []


class TestLoadsInFlight:
    def test_a_result_that_is_read_ends_the_wait(self) -> None:
        loop = main_loop(
            ".L_1:",
            "LDG.E.128 R4, desc[UR4][R2.64]",
            "LDG.E.128 R8, desc[UR4][R2.64+0x10]",
            "FADD R7, R7, R11",  # the last quarter of both
            "LDG.E.128 R12, desc[UR4][R2.64+0x20]",
            *BACK,
        )
        # The third is still on its way when the next iteration begins.
        assert loop.in_flight == (3, 48)

    def test_an_address_is_a_use(self) -> None:
        loop = main_loop(
            ".L_1:", "LDG.E.64 R4, [R2.64]", "LDG.E R8, [R4.64]", "IADD3 R8, R8, R8, R8", *BACK
        )
        assert loop.in_flight == (1, 8)

    def test_stores_read_what_they_write(self) -> None:
        loop = main_loop(
            ".L_1:",
            "LDG.E R4, [R2.64]",
            "STG.E [R2.64], R5",
            "LDG.E R6, [R2.64]",
            "STG.E.64 [R2.64], R4",  # R4 and R5
            "IADD3 R6, R6, R6, R6",
            *BACK,
        )
        assert loop.in_flight == (2, 8)

    def test_asynchronous_copies_wait_by_group(self) -> None:
        copy = "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]"
        stages = (copy, copy, "LDGDEPBAR", "DEPBAR.LE SB0, {}")
        one_behind = main_loop(".L_1:", *(s.format("0x1") for s in stages), *BACK)
        assert one_behind.in_flight == (4, 64)
        none_behind = main_loop(".L_1:", *(s.format("0x0") for s in stages), *BACK)
        assert none_behind.in_flight == (2, 32)


@pytest.mark.parametrize(
    ("name", "size"),
    [("tap_kernel<__half, 8>", 2), ("edit<float, 4>", 4), ("table<4>", 4), ("csc_scan_kernel", 4)],
)
def test_size_of_an_element(name: str, size: int) -> None:
    assert kernel_rows.element_size(name) == size
