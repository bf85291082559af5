"""Whatever comes in is answered with a status and a sentence, by a server that goes on."""

import gc
import logging
import threading
from contextlib import suppress

import grpc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2ft_peft.dlora.cloud import micro_batch_run
from d2ft_peft.dlora.wire import frames
from d2ft_peft.dlora.wire.compression import PACKINGS
from d2ft_peft.dlora.wire.frames import Reader, Writer
from d2ft_peft.dlora.wire.messages import DTYPES, Message, WireError, decode, encode

from .cases import adapter, edge_like, ragged, serve, step, tiny_base, whole
from .fuzzer import Fuzzer
from .raw_edge import RawEdge, frame_of, framed, message_of, numbered


OK, INVALID = grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT
DAMAGED, UNKNOWN_SESSION = grpc.StatusCode.ABORTED, grpc.StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    base = tiny_base(tmp_path_factory.mktemp("llama"), num_hidden_layers=2, max_position_embeddings=64)
    with serve(base) as (cloud, address):
        yield base, cloud, address


@pytest.fixture
def edge(llama, caplog):
    """A raw edge with a session; nothing that it does may surprise the server."""
    _, cloud, address = llama
    with RawEdge(address, cloud.base) as raw:
        assert raw.open().status is OK
        yield raw
        assert raw.stream(raw.forward("infer")).kinds == ["output"]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert cloud.room.used == cloud.arriving.used == 0


def check_refused(answer, *statuses):
    assert answer.status in (statuses or (INVALID,)), answer
    assert answer.sentence and len(answer.sentence) <= 500
    for internal in ("Traceback", ".py", "/work", "site-packages", "could not run"):
        assert internal not in answer.sentence


NESTED = "[" * 20_000 + "]" * 20_000
JSON = [
    None, True, -1, 0, 1, 1.5, 1 << 31, 1 << 64, 10**300, float("nan"), float("inf"), "", "x", "x" * 5000,
    "\x00\ud800\n", "../../etc/passwd", [], [[]], [None], [0, 0], [1 << 70, 1], ["x"], [["q"]], {},
    {"a": []}, [0] * 5000,
]  # fmt: skip


VALID = {
    "protocol": [1, True], "base": [], "edge_blocks": [[0, 0]], "targets": [[]], "rank": [None, 1],
    "with_head": [True], "packing": [], "edge": ["../../etc/passwd"],
}  # fmt: skip


@pytest.mark.quick(3)
@pytest.mark.parametrize("field", VALID)
def test_a_session_is_opened_with_what_makes_sense_only(edge, field):
    for value in JSON:
        answer = edge.call("Open", [framed(Message("open", edge.wish(**{"edge": "f" * 32, field: value})))])
        if answer.status is not OK:
            check_refused(answer, INVALID, grpc.StatusCode.FAILED_PRECONDITION)
        else:
            assert value in VALID[field]


@pytest.mark.parametrize("part", ["config", "weights", "dtype"])
def test_a_base_model_is_named_by_hashes(edge, part):
    for value in JSON:
        base = {**edge.model.prints, "dtype": "f64", part: value}
        answer = edge.call("Open", [framed(Message("open", edge.wish(base=base, edge="f" * 32)))])
        if not (part == "dtype" and value is None):
            check_refused(answer, INVALID, grpc.StatusCode.FAILED_PRECONDITION)


FRAMES = {
    "nothing": b"", "short": b"D2FT", "only a prefix": frame_of(b""), "wrong magic": frame_of(b"{}", magic=b"HTTP"),
    "random": bytes(range(256)), "like protobuf": b"\x0a\x05hello\x12\x96\x01\x08\x01" * 9,
    "another number": frame_of(b"{}", number=7), "damaged": frame_of(b"{}")[:-1] + b"!",
}  # fmt: skip


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("method", ["Open", "Close", "Decide", "Factors", "Install", "MicroBatch"])
def test_what_is_no_frame_is_refused(edge, method, name):
    check_refused(edge.call(method, [FRAMES[name]]), DAMAGED, INVALID)


def test_a_single_wrong_bit_is_noticed(edge):
    frame = framed(edge.forward("infer", (1, 1)))
    for place in (*range(24), *range(24, len(frame), 16)):
        damaged = frame[:place] + bytes([frame[place] ^ 4]) + frame[place + 1 :]
        check_refused(edge.call("MicroBatch", [damaged]), DAMAGED)


@pytest.mark.parametrize("method", ["Open", "MicroBatch"])
def test_another_version_is_named(edge, method):
    answer = edge.call(method, [frame_of(message_of({"kind": "x", "tensors": []}), version=9)])
    check_refused(answer, grpc.StatusCode.FAILED_PRECONDITION)
    assert "version 9" in answer.sentence and "version 1" in answer.sentence


def tensors(*specs):
    return {"kind": "forward", "mode": "infer", "tensors": list(specs)}


MESSAGES = {
    "nothing": b"", "too short": b"\x01", "a header that is longer": message_of({}, length=1 << 31),
    "no JSON": message_of(b"\xff\xfe"), "deep JSON": message_of(NESTED.encode()),
    "wide numbers": message_of(b'{"kind":"forward","tensors":[],"n":' + b"9" * 60_000 + b"}"), "a list": message_of([]),
    "no kind": message_of({"tensors": []}), "a kind that is a number": message_of({"kind": 1, "tensors": []}),
    "no list": message_of({"kind": "forward", "tensors": {}}),
    "a thousand tensors": message_of(tensors(*[["a", "f32", [0], "none"]] * 1025)),
    "a huge tensor": message_of(tensors(["hidden", "f64", [1 << 20, 1 << 20], "none"])),
    "a tensor beyond all bounds": message_of(tensors(["hidden", "f64", [1 << 62, 1 << 62], "none"])),
    "nothing of a huge tensor": message_of(tensors(["hidden", "f64", [0, 1 << 70], "none"])),
    "a negative size": message_of(tensors(["hidden", "f64", [-1, -1], "none"])),
    "a size that is true": message_of(tensors(["hidden", "f64", [True], "none"]), bytes(8)),
    "five axes": message_of(tensors(["hidden", "f64", [1] * 5, "none"]), bytes(8)),
    "an unknown type": message_of(tensors(["hidden", "c128", [1], "none"]), bytes(16)),
    "an unknown packing": message_of(tensors(["hidden", "f64", [1], "zip"]), bytes(8)),
    "packed integers": message_of(tensors(["hidden", "i64", [1, 1], "int8"]), bytes(5)),
    "the same name twice": message_of(tensors(*[["a", "bool", [1], "none"]] * 2), bytes(2)),
    "bytes of nobody": message_of(tensors(), bytes(1)), "bytes that are missing": message_of(tensors(
        ["hidden", "f64", [1, 5, 32], "none"]), bytes(5)),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize("method", ["Decide", "Install", "MicroBatch"])
def test_what_is_no_message_is_refused(edge, method, name):
    check_refused(edge.call(method, [frame_of(MESSAGES[name])]), INVALID, DAMAGED)


def test_a_message_that_is_declared_huge_allocates_nothing(edge, llama):
    _, cloud, _ = llama
    check_refused(edge.call("MicroBatch", [frame_of(b"x" * 64, total=1 << 60)]))
    check_refused(edge.call("MicroBatch", [frame_of(b"x" * 64, total=1 << 29)]), DAMAGED)
    assert cloud.arriving.used == 0


def longs(*shape, value=0):
    return torch.full(shape, value, dtype=torch.int64)


FORWARDS = {
    "no mode": {"mode": None}, "a mode of a list": {"mode": []}, "nothing hidden": {"tensors": {"hidden": longs(0)}},
    "integers": {"tensors": {"hidden": longs(2, 5, 32)}}, "one axis": {"tensors": {"hidden": torch.ones(32)}},
    "another width": {"tensors": {"hidden": torch.ones(2, 5, 31)}}, "no rows": {"shape": (0, 5)},
    "more positions than there are": {"shape": (1, 65)}, "alive of a number": {"alive": 3},
    "alive of lists": {"alive": [[], {}]}, "unknown modules": {"alive": ["model.layers.9.mlp.up_proj"]},
    "copies that nobody sent": {"copies": ["model.layers.0.mlp.up_proj"], "version": 0},
    "copies of lists": {"copies": [[]], "version": 0}, "skipped words": {"skipped": ["0"]},
    "skipped of true": {"skipped": [True]}, "a mask of numbers": {"tensors": {"mask": longs(2, 5)}},
    "a mask of others": {"tensors": {"mask": torch.ones(3, 5, dtype=torch.bool)}},
    "a long mask": {"tensors": {"mask": torch.ones(2, 6, dtype=torch.bool)}},
    "a longer mask for a cache": {"mode": "cached", "tensors": {"mask": torch.ones(2, 500, dtype=torch.bool)}},
    "positions too high": {"tensors": {"positions": longs(2, 5, value=64)}},
    "positions below zero": {"tensors": {"positions": longs(1, 5, value=-1)}},
    "positions of others": {"tensors": {"positions": longs(2, 4)}},
    "unknown tensors": {"tensors": {"x": torch.ones(1)}},
    "given of a word": {"given": "0"}, "given of nobody": {"given": 99}, "given but not there": {
        "given": 0, "alive": ["model.layers.0.self_attn.q_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("name", FORWARDS)
def test_what_makes_no_sense_is_not_computed(edge, name, mode):
    check_refused(edge.stream(edge.forward(**{"mode": mode, **FORWARDS[name]})))


@pytest.mark.quick(2)
@pytest.mark.parametrize("field", ["mode", "alive", "copies", "skipped", "version", "given", "hidden_gradient", "rows"])
def test_every_field_of_every_type_is_answered(edge, field):
    for value in JSON:
        for mode in ("train", "infer", "cached"):
            answer = edge.stream(edge.forward(**{"mode": mode, field: value}))
            if answer.status is not OK:
                check_refused(answer, INVALID, UNKNOWN_SESSION)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e308])
def test_numbers_that_are_none_are_computed_with(edge, value):
    hidden = torch.full((1, 3, 32), value, dtype=torch.float64)
    answer = edge.stream(Message("forward", {"mode": "infer", "alive": []}, {"hidden": hidden}))
    assert answer.kinds == ["output"]


CACHED = {
    "rows of others": {"rows": [0, 2], "length": 5}, "rows below": {"rows": [0, -1], "length": 5},
    "a row too few": {"rows": [0], "length": 5}, "rows of words": {"rows": ["0", "1"], "length": 5},
    "longer than it is": {"rows": [0, 1], "length": 6}, "below zero": {"rows": [0, 1], "length": -1},
    "a length of a word": {"rows": [0, 1], "length": "5"}, "no rows": {"length": 5}, "no length": {"rows": [0, 1]},
}  # fmt: skip


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_is_what_it_was(edge, name):
    first = edge.forward("cached")
    answer = edge.stream(first, edge.forward("cached", (2, 1), **CACHED[name]))
    assert answer.kinds == ["output"]
    check_refused(answer)
    assert edge.stream(first, edge.forward("cached", (2, 1), rows=[1, 1], length=3)).kinds == ["output"] * 2
    check_refused(edge.stream(first, edge.forward("train")))


def test_messages_come_in_their_order(edge):
    alive = ["model.layers.1.self_attn.q_proj"]
    forward = edge.forward(alive=alive)
    answer = Message("answer", {}, {"0": torch.zeros(2, 5, 32, dtype=torch.float64)})
    backward = Message("backward", {}, {"out": torch.ones(2, 5, 32, dtype=torch.float64)})
    whole = edge.stream(forward, answer, backward)
    assert whole.kinds == ["exchange", "output", "gradient", "done"]
    conversation = [forward, answer, backward]
    for place in range(3):
        for wrong in (forward, answer, backward, Message("done"), Message("")):
            if wrong is not conversation[place]:
                check_refused(edge.stream(*conversation[:place], wrong))
    for wrong in ((1, 5, 32), (2, 5), (2, 5, 33), ()):
        bad = {"0": torch.zeros(wrong, dtype=torch.float64)}
        check_refused(edge.stream(forward, Message("answer", {}, bad)))
        check_refused(edge.stream(forward, answer, Message("backward", {}, bad)))
    check_refused(edge.stream(forward, Message("answer", {}, {"0": longs(2, 5, 32)})))
    check_refused(edge.stream(forward, Message("answer")))
    check_refused(edge.stream(forward), DAMAGED)
    sent = list(numbered(conversation))
    for again in ([sent[0], sent[0]], [sent[1], sent[0]], [sent[0], sent[2]], [*sent, sent[2]]):
        check_refused(edge.call("MicroBatch", again), DAMAGED)


LABELS = {
    "no labels": {}, "floats": {"labels": torch.ones(2, 5)}, "others": {"labels": longs(2, 4)},
    "beyond the vocabulary": {"labels": longs(2, 5, value=64)}, "below zero": {"labels": longs(2, 5, value=-1)},
}  # fmt: skip


def test_labels_are_of_the_vocabulary(edge):
    assert edge.open(with_head=True).status is OK
    right = {"labels": longs(2, 5, value=-100).index_fill(1, torch.tensor([1]), 63)}
    assert edge.stream(edge.forward(tensors=right, items=2)).kinds == ["output"]
    for wrong in LABELS.values():
        check_refused(edge.stream(edge.forward(tensors=wrong, items=1)))
    for items in JSON:
        answer = edge.stream(edge.forward(tensors=right, items=items))
        if answer.status is not OK:
            check_refused(answer)
    for keep in JSON:
        answer = edge.stream(edge.forward("infer", keep=keep))
        if answer.status is not OK:
            check_refused(answer)
    edge.open()


def test_copies_fit_their_modules(edge):
    name = "model.layers.0.self_attn.q_proj"
    a, b = torch.ones(4, 32), torch.ones(32, 4)

    def install(names=(name,), version=1, kind="copies", **factors):
        return edge.call("Install", [framed(Message(kind, {"names": names, "version": version}, factors))])

    assert install(a0=a, b0=b).status is OK
    for wrong in (
        {}, {"a0": a}, {"a0": a, "b0": a}, {"a0": a.long(), "b0": b}, {"a0": a[:3], "b0": b}, {"a0": a[:0], "b0": b},
        {"a0": torch.ones(2000, 32), "b0": torch.ones(32, 2000)}, {"a0": a, "b0": b, "a1": a, "b1": b},
    ):  # fmt: skip
        check_refused(install(**wrong))
    for value in JSON:
        check_refused(install(names=value, a0=a, b0=b))
        if value != 1 or value is True:
            answer = install(version=value, a0=a, b0=b)
            assert answer.status is OK if type(value) is int and value > 0 else check_refused(answer) is None
    check_refused(install(kind="forward", a0=a, b0=b))
    check_refused(install(names=[name, name], a0=a, b0=b, a1=a, b1=b))
    check_refused(edge.stream(edge.forward(copies=[name], version=77)), UNKNOWN_SESSION)


def test_factors_are_of_a_rank_and_of_targets(edge):
    check_refused(edge.call("Factors", [framed(Message("factors", {"names": []}))]))
    edge.open(rank=4)
    for names in [*JSON[:-1], ["lm_head"], edge.targets[:1] * 2]:
        answer = edge.call("Factors", [framed(Message("factors", {"names": names}))])
        assert names == [] or check_refused(answer) is None
    edge.open()


def test_questions_of_any_shape_are_answered(edge):
    for part in ("rule", "state", "observations"):
        for value in JSON[:-1]:
            question = {"rule": {}, "state": {}, "observations": {}, part: value}
            check_refused(edge.call("Decide", [framed(Message("decide", question))]))


def test_sessions_that_nobody_opened_are_unknown(edge):
    sent = {"MicroBatch": edge.forward(), "Install": Message("copies"), "Close": Message("close")}
    for name in ("", "x", "0" * 32, "x" * 4000):
        for method, message in sent.items():
            check_refused(edge.call(method, [framed(message)], session=name), UNKNOWN_SESSION)


def test_unknown_calls_are_none_of_ours(edge):
    assert edge.call("Shutdown", [b"x"]).status is grpc.StatusCode.UNIMPLEMENTED


def test_frames_longer_than_any_are_not_taken(edge):
    assert edge.call("MicroBatch", [bytes(frames.CHUNK_BYTES + 5000)]).status is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError, OSError, MemoryError])
def test_what_goes_wrong_inside_stays_there(llama, monkeypatch, caplog, error):
    def fails(*args):
        raise error("/home/somebody/model.py, line 3")

    _, cloud, address = llama
    monkeypatch.setattr(micro_batch_run.MicroBatchRun, "_forward", fails)
    with RawEdge(address, cloud.base) as raw:
        raw.open()
        answer = raw.stream(raw.forward("infer"))
        assert (answer.status, answer.sentence) == (INVALID, f"the server could not run this ({error.__name__})")
    assert "/home/somebody/model.py" in caplog.text


def test_many_connections_and_streams_that_say_nothing(llama, edge):
    many(llama, 20, 40)


@pytest.mark.slow
def test_thousands_of_connections_and_of_streams(llama, edge):
    many(llama, 1000, 3000)


def many(llama, connections, streams):
    """Open them all, say nothing, and have a batch computed meanwhile; afterwards nothing of them is in use."""
    _, cloud, address = llama
    held = []
    for number in range(connections):
        raw = RawEdge(address, cloud.base)
        raw.channel = grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        assert raw.call("Close", [framed(Message("close"))]).status is UNKNOWN_SESSION
        held.append(raw)
        assert number % 100 or raw.open(edge=f"{number:032}").status is OK
    with RawEdge(address, cloud.base) as flood:
        assert flood.open(edge="g" * 32).status is OK
        ended = threading.Event()
        silent = (iter(ended.wait, True) for _ in range(streams))
        call = flood.channel.stream_stream("/d2ft_peft.dlora.v1.Cloud/MicroBatch")
        metadata = [("d2ft-session", flood.session)]
        calls = [call(frames, metadata=metadata) for frames in silent]
        assert held[0].stream(held[0].forward("infer")).kinds == ["output"]
        for one in calls:
            one.cancel()
        ended.set()
    for raw in held:
        raw.channel.close()
    cloud.sessions.close_idle()


@pytest.mark.thorough
def test_a_well_behaved_edge_is_not_disturbed(llama, edge):
    fuzz(llama, 600)


@pytest.mark.slow
def test_a_hundred_thousand_messages(llama, edge):
    fuzz(llama, 100_000)


def fuzz(llama, messages):
    """Send mutated conversations while another edge trains; memory does not grow, and its bits are right."""
    base, cloud, address = llama
    local = whole(base, adapter())
    expected = step(edge_like(local, address, base, adapter()), ragged())
    good = edge_like(local, address, base, adapter())
    stop, wrong, steps = threading.Event(), [], [0]

    def train():
        while not stop.is_set():
            found = step(good, ragged())
            if found[0] != expected[0] or any(not torch.equal(found[1][n], g) for n, g in expected[1].items()):
                wrong.append(found)
            steps[0] += 1
            stop.wait(0.1)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        fuzzer = Fuzzer(address, cloud.base, seed=messages)
        with fuzzer:
            fuzzer.send(messages // 4)
            warm = resident_bytes(), objects()
            fuzzer.send(messages - messages // 4)
    finally:
        stop.set()
        trainer.join()
    grown, things = resident_bytes() - warm[0], objects() - warm[1]
    print(f"{fuzzer.sent} messages, {fuzzer.seconds:.0f} s, answers {dict(fuzzer.answers)}, {steps[0]} steps beside")
    print(f"resident memory {warm[0] >> 20} MiB, {grown / 2**20:+.1f} MiB after; {things:+} tensors")
    assert fuzzer.sent >= messages and not wrong and steps[0] > 0
    assert not fuzzer.leaks
    assert grown < 100 << 20 and things < 200
    good.disconnect()


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def objects():
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@st.composite
def some_message(draw):
    shape = st.lists(st.integers(0, 5), max_size=4)
    made = {}
    for name in draw(st.sets(st.text(max_size=5), max_size=3)):
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        made[name] = torch.randn(draw(shape)).to(dtype)
    fields = draw(st.dictionaries(st.text(max_size=9).filter(lambda n: n not in ("kind", "tensors")), st.integers()))
    return Message(draw(st.text(max_size=9)), fields, made)


@pytest.mark.thorough
@given(some_message(), st.integers(1, 80))
def test_messages_arrive_as_they_were_sent(message, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "CHUNK_BYTES", chunk)
        reader, writer = Reader(1 << 20), Writer()
        for _ in range(2):
            (found,) = [m for frame in writer.frames(message) if (m := reader.take(frame)) is not None]
            assert (found.kind, found.fields) == (message.kind, message.fields)
            assert list(found.tensors) == list(message.tensors)
            for name, tensor in message.tensors.items():
                assert found.tensors[name].dtype is tensor.dtype and torch.equal(found.tensors[name], tensor)


@pytest.mark.thorough
@given(some_message(), st.sampled_from(PACKINGS))
def test_packed_tensors_keep_type_and_shape(message, packing):
    found = decode(bytearray(b"".join(encode(message, packing))))
    for name, tensor in message.tensors.items():
        assert (found.tensors[name].dtype, found.tensors[name].shape) == (tensor.dtype, tensor.shape)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_message_or_a_wire_error(data):
    with suppress(WireError):
        decode(bytearray(data))
    for frame in (data, frame_of(data)):
        with suppress(WireError):
            Reader(1000).take(frame)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=20))
def test_any_specification_of_a_tensor_is_one_or_a_wire_error(spec):
    with suppress(WireError):
        decode(bytearray(message_of({"kind": "x", "tensors": [spec, ["a", "f32", spec, "int8"]]})))
