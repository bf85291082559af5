"""What the formulas of a step foresee, against bytes and FLOPs that a real edge and cloud counted."""

import json
from io import StringIO
from types import SimpleNamespace

import dlora_arithmetic
import dlora_load
import dlora_network
import dlora_peers
import pytest
import torch

from d2ft_peft.dlora import BaseModel, Cloud
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


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    base = str(tmp_path_factory.mktemp("base"))
    dlora_load.save_model(base, 64, 3)
    cloud = Cloud(BaseModel.load(base, torch.float32))
    yield f"localhost:{cloud.start()}", base
    cloud.stop()


@pytest.mark.parametrize(("placement", "trips"), [("all", [13, 12]), ("eighth", [4, 3]), ("u_shaped", [1, 1])])
def test_a_row_of_the_network_benchmark_counts_each_phase(network, placement, trips):
    variant = {"placement": placement, "packing": "none", "in_flight": 2, "tokens": 128, "steps": 1, "warm_up": 0}
    row = dlora_network.measure(*network, variant)
    assert [phase[2] for phase in row["phases"]] == trips
    assert all(up > 128 * 64 * 4 and down > 0 for up, down, _ in row["phases"])
    key = dlora_network.Key(8.0, 1000.0, 0.0, "cubic", placement, "none", 2)
    row = dlora_network.with_limits({**variant, **row, "key": key, "free": 0.1, "load": 1.0})
    assert row["limit"] >= row["limit_any"] >= 2 * 1.0
    assert placement in dlora_network.table([row])


def test_edges_of_the_load_benchmark_count_what_they_finish(network, monkeypatch, capsys):
    arguments = SimpleNamespace(
        address=network[0], base=network[1], edges=[2], layers=3, in_flight=1, rows=1, length=8, seconds=0.2
    )
    monkeypatch.setattr("sys.stdin", StringIO("begin\n"))
    dlora_load.be_edges(arguments)
    ready, found = capsys.readouterr().out.splitlines()
    assert ready == "ready"
    found = json.loads(found)
    assert len(found["took"]) == 2
    row = {"edges": 2, "seconds": 0.2, "finished": [9, 10], "p50": 0.1, "p95": 0.2}
    assert "1.111" in dlora_load.table([row])


def test_a_prompt_is_all_that_trains_of_a_prompted_model():
    model = dlora_peers.Prompted(dlora_arithmetic.tiny_llama(2, 64))
    ids = torch.randint(0, 500, (2, 8))
    model(ids, ids).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["prompt"]


def test_the_table_of_peers_says_what_a_home_link_would_take():
    row = {
        "row": "x", "sent": 1_250_000, "received": 6_250_000, "trips": 50, "seconds": 1, "parameters": 3,
        "edge_bytes": 1, "loss": 2.0,
    }  # fmt: skip
    assert "| 3 " in dlora_peers.table([row])  # a second up, a second down, a second of round trips
