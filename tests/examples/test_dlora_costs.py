"""What the formulas of a step foresee, against bytes and FLOPs that a real edge and cloud counted."""

import dlora_arithmetic
import pytest

from d2ft_peft.simulate.dlora_step import LLAMA_7B, HomeLink, LlamaShape, Phase, Placement, crossing, edge_flops


FRAMES = 0.02
"""Headers of frames and messages, of a few hundred bytes each, as a share of what crosses here."""


@pytest.fixture(scope="module")
def counted():
    rows = dlora_arithmetic.counted(width=64, rows=4, length=64, depth=3)
    return {row["placement"]: row for row in rows}


def test_bytes_of_a_real_step_are_those_foreseen_but_for_headers(counted):
    for name, row in counted.items():
        share = FRAMES if "cores" not in name else 0.06  # as many messages, for fewer bytes
        for way in ("sent", "received"):
            assert row[f"{way}_foreseen"] < row[way] < (1 + share) * row[f"{way}_foreseen"], (name, way)


def test_flops_of_the_edge_are_those_foreseen(counted):
    for name, row in counted.items():
        if name == "U-shaped":  # norms, the adapters' own and what the lowest block leaves out
            assert row["flops"] == pytest.approx(row["flops_foreseen"], rel=0.1)
        else:
            assert row["flops"] == row["flops_foreseen"], name


def test_a_table_is_made_of_what_was_counted(counted):
    assert "cores r = 4, int8" in dlora_arithmetic.counted_table(list(counted.values()))


def test_the_papers_placement_at_7b_moves_the_papers_bytes():
    alive = [(block, name) for block in range(32) for name in ("q_proj", "v_proj")]
    forward, backward = crossing(LLAMA_7B, Placement(alive))
    hidden = 2 * 4096
    assert forward.down == 33 * hidden
    assert forward.up == 65 * hidden
    assert backward.down == 64 * hidden
    assert backward.up == 32 * hidden  # the lowest input needs no gradient
    assert (forward.trips, backward.trips) == (33, 32)


def test_nothing_crosses_backward_where_nothing_below_the_last_blocks_trains():
    shape = LlamaShape(4, 8, 4, 16, 32)
    assert crossing(shape, Placement([], edge_blocks=(0, 1)))[1] == Phase(0, 0, 0)
    assert HomeLink(1, 1, 1).seconds(Phase(0, 0, 0)) == 0


def test_a_head_in_the_cloud_leaves_the_edge_its_adapters():
    shape = LlamaShape(4, 8, 4, 16, 32)
    work = edge_flops(shape, Placement([(1, "v_proj")], rank=2, head_in_cloud=True), 16)
    assert (work.head, work.blocks) == (0, 0)
    assert work.total == 2 * 2 * (2 * 8 + 3 * 4)


def test_parts_in_flight_hide_round_trips_but_never_bytes():
    link, phase = HomeLink(8, 8, 0.1), Phase(up=1e6, down=5e5, trips=20)
    assert link.seconds(phase, 1) == pytest.approx(20 * 0.1 + 1.5)
    assert link.seconds(phase, 3) == pytest.approx(20 * 0.1 + 0.5)
    assert link.seconds(phase, None) == pytest.approx(0.1 + 1)


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"alive=\[\(7, 'q_proj'\)\].*blocks 0 to 3"):
        crossing(LlamaShape(4, 8, 4, 16, 32), Placement([(7, "q_proj")]))


def test_tables_and_picture_of_large_models(capsys, tmp_path):
    dlora_arithmetic.main(["--png", str(tmp_path / "bytes.png")])
    assert "cores r = 16, all, int8" in capsys.readouterr().out
    assert (tmp_path / "bytes.png").stat().st_size > 10_000
