"""What a server admits: whoever is refused is told why and when to come back, and comes back."""

import threading
import time

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM

from d2ft_peft.dlora import BaseModel, Cloud, CloudError, Limits, connect
from d2ft_peft.dlora.cloud import micro_batch_run
from d2ft_peft.dlora.cloud.turns import NeverFits, Refused, Room, Turns
from d2ft_peft.dlora.edge import link
from d2ft_peft.dlora.wire import frames, protocol

from .cases import adapter, edge_like, eventually, ragged, serve, step, tiny_base, whole
from .raw_edge import RawEdge, frame_of, numbered


OK, FULL, NEVER = grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION
TOKENS = ragged()["input_ids"].numel()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    base = tiny_base(tmp_path_factory.mktemp("llama"), num_hidden_layers=2)
    return base, BaseModel.load(base, torch.float64)


class Waited(list):
    """After how many seconds the server asked to come back, each time."""

    def __init__(self):
        self.refused = threading.Event()

    def then(self, do):
        """Do something as soon as somebody was refused."""
        thread = threading.Thread(target=lambda: (self.refused.wait(20), do()))
        thread.start()
        return thread


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Whoever is told to come back after seconds comes back after moments, and says so."""
    waited = Waited()
    asked = link._asked_seconds

    def briefly(error):
        seconds = asked(error)
        waited.append(seconds)
        waited.refused.set()
        return seconds and min(seconds, 0.02)

    monkeypatch.setattr(link, "_asked_seconds", briefly)
    return waited


def start(model, **options):
    cloud = Cloud(model, **options)
    return cloud, f"localhost:{cloud.start()}"


def test_an_edge_too_many_waits_for_a_session(llama, quick):
    base, model = llama
    cloud, address = start(model, limits=Limits(sessions=1))
    first = connect(address, base, adapter(), dtype=torch.float64)
    with RawEdge(address, model) as raw:
        refused = raw.open()
        assert refused.status is FULL
        assert refused.sentence == "1 edges have a session, which is the limit; try again in 5 s"
    leaves = quick.then(first.disconnect)
    second = connect(address, base, adapter(), dtype=torch.float64)
    assert 5.0 in quick and step(second, ragged())[0] > 0
    leaves.join()
    cloud.stop()


def test_an_edge_that_opens_again_has_one_session(llama):
    _, model = llama
    cloud, address = start(model, limits=Limits(sessions=1))
    with RawEdge(address, model) as raw:
        assert [raw.open().status for _ in range(3)] == [OK] * 3 and len(cloud.sessions) == 1
    cloud.stop()


def test_streams_are_bounded(llama, quick):
    base, model = llama
    cloud, address = start(model, limits=Limits(streams=1))
    edge = connect(address, base, adapter(), dtype=torch.float64, in_flight=3)
    expected = step(edge_like(edge, address, base, adapter()), ragged())
    found = step(edge, ragged())
    torch.testing.assert_close(found[0], expected[0])
    assert edge.remote_span.link.traffic.replays > 0 and 1.0 in quick
    cloud.stop()


def test_a_batch_waits_until_others_have_left(llama, quick):
    base, model = llama
    cloud, address = start(model, limits=Limits(tokens=TOKENS))
    one, other = (connect(address, base, adapter(), dtype=torch.float64) for _ in range(2))
    out = one(**ragged())
    assert cloud.room.used == TOKENS
    with RawEdge(address, model) as raw:
        raw.open()
        refused = raw.stream(raw.forward("infer", (1, 1)))
        assert refused.status is FULL and refused.sentence == (
            f"{TOKENS} of {TOKENS} tokens in flight are in use, 1 more asked for; try again in 1 s"
        )
    backward = quick.then(out.loss.backward)
    assert step(other, ragged())[0] > 0 and 1.0 in quick
    backward.join()
    assert eventually(lambda: cloud.room.used == 0)
    cloud.stop()


def test_parts_of_a_batch_that_wait_for_each_other_let_go(llama, quick):
    base, model = llama
    cloud, address = start(model, limits=Limits(tokens=TOKENS - 1))  # room for each part, and not for both
    local = whole(base, adapter())
    expected = step(local, ragged())
    edge = edge_like(local, address, base, adapter(), in_flight=2)
    found = step(edge, ragged())
    assert 1.0 in quick
    torch.testing.assert_close(found[0], expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
    assert eventually(lambda: cloud.room.used == 0)
    cloud.stop()


@pytest.mark.parametrize(
    "options", [{"limits": Limits(tokens=TOKENS - 1)}, {"memory_bytes": None}], ids=["tokens", "memory"]
)
def test_a_batch_that_never_fits_is_refused_at_once(llama, quick, options):
    base, model = llama
    if "memory_bytes" in options:
        options = {"memory_bytes": TOKENS * model.bytes_per_token - 1}
    cloud, address = start(model, **options)
    edge = connect(address, base, adapter(), dtype=torch.float64)
    with pytest.raises(CloudError, match=f"{TOKENS} tokens in flight at once; this server holds {TOKENS - 1}: send sm"):
        edge(**ragged())
    assert quick == [] and edge.remote_span.link.traffic.replays == 0
    cloud.stop()


def test_memory_that_holds_no_token_is_refused(llama):
    with pytest.raises(ValueError, match="memory_bytes=10 holds no token: one takes .* bytes; give more"):
        Cloud(llama[1], memory_bytes=10)


def test_a_cache_counts_all_its_tokens_as_often_as_its_rows_are_repeated(llama):
    _, model = llama
    cloud, address = start(model, limits=Limits(tokens=24))
    with RawEdge(address, model) as raw:
        raw.open()
        first = raw.forward("cached", (1, 5))
        repeated = raw.forward("cached", (4, 1), rows=[0] * 4, length=5)
        assert raw.stream(first, repeated).kinds == ["output"] * 2
        refused = raw.stream(first, repeated, raw.forward("cached", (4, 1), rows=[0, 1, 2, 3], length=6))
        assert refused.status is NEVER and "28 tokens in flight at once; this server holds 24" in refused.sentence
    assert eventually(lambda: cloud.room.used == 0)
    cloud.stop()


def test_messages_are_bounded(llama):
    base, model = llama
    cloud, address = start(model, limits=Limits(message_bytes=2000))
    edge = connect(address, base, adapter(), dtype=torch.float64)
    with pytest.raises(CloudError, match="a message of .* bytes; at most 2000 are accepted"):
        edge(**ragged())
    cloud.stop()


def test_messages_on_their_way_are_bounded_together(llama):
    _, model = llama
    cloud, address = start(model, limits=Limits(message_bytes=1000))
    ended = threading.Event()
    with RawEdge(address, model) as raw:
        raw.open()

        def unfinished():
            yield frame_of(bytes(900), total=1000)
            ended.wait()

        call = raw.channel.stream_stream(protocol.method("MicroBatch"))
        held = [call(unfinished(), metadata=[(protocol.SESSION_KEY, raw.session)]) for _ in range(4)]
        assert eventually(lambda: cloud.arriving.used >= 4 * 900)
        refused = raw.call("MicroBatch", unfinished())
        assert refused.status is FULL and "bytes of messages on their way" in refused.sentence
        for one in held:
            one.cancel()
        ended.set()
        assert eventually(lambda: cloud.arriving.used == 0)
    cloud.stop()


@pytest.mark.thorough
def test_an_edge_that_does_not_read_is_not_computed_for(llama, monkeypatch):
    _, model = llama
    computed = []
    forward = micro_batch_run.MicroBatchRun._forward
    monkeypatch.setattr(micro_batch_run.MicroBatchRun, "_forward", lambda *args: (computed.append(1), forward(*args)))
    cloud, address = start(model)
    with RawEdge(address, model) as raw:
        raw.open()
        messages = [raw.forward("infer", (8, 20))] * 400  # 40 kB of answer each
        call = raw.channel.stream_stream(protocol.method("MicroBatch"))
        unread = call(numbered(messages), metadata=[(protocol.SESSION_KEY, raw.session)])
        assert eventually(lambda: computed)
        time.sleep(1)
        assert len(computed) < 200  # what fits into the buffers between
        unread.cancel()
    cloud.stop()


@pytest.mark.thorough
def test_silent_sessions_and_streams_are_let_go(llama):
    base, model = llama
    cloud, address = start(model, limits=Limits(idle_seconds=0.2))
    edge = connect(address, base, adapter(), dtype=torch.float64)
    loss, gradients = step(edge, ragged())
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    silent = threading.Event()
    with RawEdge(address, model) as raw:
        assert raw.open().status is OK
        call = raw.channel.stream_stream(protocol.method("MicroBatch"))
        install = raw.channel.stream_unary(protocol.method("Install"))
        metadata = [(protocol.SESSION_KEY, raw.session)]
        calls = [
            call(iter(silent.wait, True), metadata=metadata),
            install.future(iter(silent.wait, True), metadata=metadata),
        ]
        for one in calls:
            assert eventually(lambda one=one: one.code() is grpc.StatusCode.CANCELLED)
        silent.set()
    out = edge(**ragged())  # whoever holds a graph and says nothing is let go too, and makes it again
    assert eventually(lambda: cloud.room.used == 0 and len(cloud.sessions) == 0)
    edge.zero_grad()
    out.loss.backward()
    assert torch.equal(out.loss, loss)
    for name, parameter in edge.named_parameters():
        assert name not in gradients or torch.equal(parameter.grad, gradients[name]), name
    cloud.stop()


@pytest.mark.thorough
def test_a_server_that_computes_for_long_is_waited_for(llama, monkeypatch):
    base, model = llama
    monkeypatch.setattr(protocol, "FIRST_ANSWER_SECONDS", 0.2)
    cloud, address = start(model, limits=Limits(idle_seconds=0.1))
    edge = connect(address, base, adapter(), dtype=torch.float64)
    with cloud.turns.held("somebody else"):
        results = []
        trains = threading.Thread(target=lambda: results.append(step(edge, ragged())))
        trains.start()
        time.sleep(0.8)
        assert not results
    trains.join()
    assert results and edge.remote_span.link.traffic.replays == 0
    cloud.stop()


def test_turns_go_round_among_edges_not_among_micro_batches():
    turns, order = Turns(), []
    turns.take("first")

    def wait(edge):
        with turns.held(edge):
            order.append(edge)

    threads = []
    for edge, count in (("many", 6), ("one", 1), ("two", 2)):
        for _ in range(count):
            threads.append(threading.Thread(target=wait, args=(edge,)))
            threads[-1].start()
            assert eventually(lambda: sum(map(len, turns._waiting.values())) == len(threads))
    turns.give_back()
    for thread in threads:
        thread.join()
    assert order == ["many", "one", "two", "many", "two", "many", "many", "many", "many"]


def test_a_lent_turn_is_taken_again_whatever_happens():
    turns = Turns(2)
    with pytest.raises(KeyError), turns.held("one"), turns.lent("one"):
        raise KeyError
    assert turns._free == 2 and not turns._waiting


def test_room_is_given_back_and_never_promised_twice():
    room = Room("seats", 3)
    room.take(2)
    with pytest.raises(Refused, match="2 of 3 seats are in use, 2 more asked for; try again in 1 s"):
        room.take(2)
    with pytest.raises(NeverFits, match="4 seats at once; this server holds 3"):
        room.take(2, already=2)
    with room.held():
        assert room.used == 3
    assert room.used == 2


def test_a_port_that_is_taken_is_refused(llama):
    cloud, address = start(llama[1])
    port = int(address.rpartition(":")[2])
    with pytest.raises(ValueError, match=f"host='localhost', port={port}: cannot listen there .*; take another port"):
        Cloud(llama[1]).start(port)
    cloud.stop()


def other_weights(folder, base):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    model.save_pretrained(folder)
    return str(folder)


def test_an_edge_with_another_base_model_is_refused_by_name(llama, tmp_path):
    base, model = llama
    _, address = cloud, address = start(model)
    for part, other in (
        ("config", tiny_base(tmp_path / "a", num_hidden_layers=2, rms_norm_eps=1e-3)),
        ("weights", other_weights(tmp_path / "b", base)),
    ):
        with pytest.raises(CloudError, match=f"the server holds {model.name!r}, the edge another model: their {part}"):
            connect(address, other, adapter(), dtype=torch.float64)
    assert len(cloud.sessions) == 0
    cloud.stop()


def test_an_edge_of_another_version_is_refused_by_name(llama, monkeypatch):
    base, model = llama
    with serve(base) as (_, address):
        monkeypatch.setattr(frames, "VERSION", 2)
        with RawEdge(address, model) as raw:
            assert raw.call("Open", [frame_of(b"{}", version=1)]).status is NEVER
            sentence = raw.call("Open", [frame_of(b"{}", version=1)]).sentence
            assert sentence == "a frame of version 1 of the protocol; this is version 2"
            assert raw.open(protocol=7).status is NEVER


def test_a_server_that_is_not_there_is_given_up_after_a_while(llama):
    with pytest.raises(CloudError, match=r"localhost:1 gave no answer for 0.2 s .*; start the server again and resume"):
        connect("localhost:1", llama[0], adapter(), dtype=torch.float64, patience=0.2)


@pytest.mark.parametrize("name", ["sessions", "streams", "tokens", "message_bytes", "idle_seconds"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_limits_are_above_zero(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be above zero"):
        Limits(**{name: value})
