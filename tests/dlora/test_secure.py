"""Who may talk to a server, and who may listen."""

import signal
import socket
import subprocess
import sys

import grpc
import pytest
import torch

from d2ft_peft.dlora import BaseModel, Certificates, Cloud, CloudError, connect
from d2ft_peft.dlora.cloud.__main__ import main
from d2ft_peft.dlora.wire.credentials import is_loopback, read_tokens
from d2ft_peft.dlora.wire.messages import Message

from .cases import adapter, ragged, step, tiny_base
from .certificates import Authority
from .raw_edge import RawEdge, framed


FIRST, SECOND = "first-token-of-an-edge", "second-token-of-an-edge"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    base = tiny_base(tmp_path_factory.mktemp("llama"), num_hidden_layers=2)
    return base, BaseModel.load(base, torch.float64)


@pytest.fixture(scope="module")
def authorities(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    return Authority(folder, "ours"), Authority(folder, "theirs")


@pytest.fixture
def serving(llama):
    """Starts servers, and ends them."""
    clouds = []

    def start(tokens=None, **options):
        clouds.append(Cloud(llama[1], tokens=tokens))
        return f"localhost:{clouds[-1].start(**options)}"

    yield start
    for cloud in clouds:
        cloud.stop()


def trains(address, base, patience=60, **options):
    """Whether an edge gets through."""
    edge = connect(address, base, adapter(), dtype=torch.float64, patience=patience, **options)
    loss, _ = step(edge, ragged())
    edge.disconnect()
    return bool(torch.isfinite(loss))


def test_with_tls_an_edge_trusts_its_authority_only(llama, authorities, serving):
    base, _ = llama
    ours, theirs = authorities
    address = serving(certificates=Certificates(None, *ours.sign("server")))
    assert trains(address, base, certificates=Certificates(ours.path))
    for wrong in (Certificates(theirs.path), Certificates(), None):
        with pytest.raises(CloudError, match="(?i)gave no answer.*(ssl|tls|certificate|handshake|socket closed)"):
            trains(address, base, certificates=wrong, patience=0.1)


def test_a_server_that_is_not_who_it_says_is_not_trusted(llama, authorities, serving):
    ours, theirs = authorities
    address = serving(certificates=Certificates(None, *theirs.sign("server")))
    with pytest.raises(CloudError, match="(?i)gave no answer.*(ssl|tls|certificate|handshake|socket closed)"):
        trains(address, llama[0], certificates=Certificates(ours.path), patience=0.1)


def test_with_mutual_tls_an_edge_needs_a_certificate_of_the_authority(llama, authorities, serving):
    base, _ = llama
    ours, theirs = authorities
    address = serving(certificates=Certificates(ours.path, *ours.sign("server")))
    assert trains(address, base, certificates=Certificates(ours.path, *ours.sign("edge")))
    for wrong in (Certificates(ours.path), Certificates(ours.path, *theirs.sign("edge"))):
        with pytest.raises(CloudError, match="(?i)gave no answer.*(ssl|tls|certificate|handshake|socket closed)"):
            trains(address, base, certificates=wrong, patience=0.1)


def test_certificates_that_are_not_there_are_named(tmp_path, authorities):
    certificate, key = authorities[0].sign("server")
    for halves in ((None, certificate, None), (None, None, key)):
        with pytest.raises(ValueError, match="belong together; give both"):
            Certificates(*halves)
    with pytest.raises(ValueError, match="needs a certificate and its key"):
        Certificates(authorities[0].path).of_server()
    with pytest.raises(ValueError, match="is no file; give the path of a PEM file"):
        Certificates(str(tmp_path / "missing"), certificate, key).of_server()


@pytest.mark.parametrize("token", [None, "", "wrong-token-of-an-edge", FIRST[:-1], FIRST + "x", "Bearer " + FIRST])
def test_a_token_must_be_one_that_the_server_knows(llama, serving, token):
    address = serving(frozenset({FIRST, SECOND}))
    with pytest.raises(CloudError, match="give token=.*UNAUTHENTICATED"):
        trains(address, llama[0], token=token)


def test_with_a_token_that_the_server_knows_an_edge_trains(llama, serving):
    address = serving(frozenset({FIRST, SECOND}))
    assert trains(address, llama[0], token=FIRST) and trains(address, llama[0], token=SECOND)


def test_another_edges_session_cannot_be_reached(llama, serving):
    address = serving(frozenset({FIRST, SECOND}))
    with RawEdge(address, llama[1], FIRST) as first, RawEdge(address, llama[1], SECOND) as second:
        assert first.open().status is grpc.StatusCode.OK
        calls = {
            "MicroBatch": first.forward("infer"), "Install": Message("copies", {"names": [], "version": 1}),
            "Decide": Message("decide"), "Factors": Message("factors", {"names": []}), "Close": Message("close"),
        }  # fmt: skip
        for method, message in calls.items():
            assert second.call(method, [framed(message)], first.session).status is grpc.StatusCode.NOT_FOUND
            stranger = RawEdge(address, llama[1])
            assert stranger.call(method, [framed(message)], first.session).status is grpc.StatusCode.UNAUTHENTICATED
            stranger.channel.close()
        assert second.open().status is grpc.StatusCode.OK  # by the same name of an edge, and not in its place
        assert first.stream(first.forward("infer")).kinds == ["output"]


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "example.org"])
def test_without_tls_only_this_machine_is_listened_to(llama, host):
    with pytest.raises(ValueError, match="is not loopback, and without TLS everyone on the way can read"):
        Cloud(llama[1]).start(host=host)
    assert not is_loopback(host)


def test_loopback_is_what_never_leaves_the_machine():
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.8.8.8", "[::1]", "::1", "unix:/tmp/x"]))


def test_listening_without_tls_can_be_asked_for_by_name(llama, serving):
    address = serving(host="0.0.0.0", insecure=True)
    assert trains(address.replace("localhost", "127.0.0.1"), llama[0])


@pytest.mark.parametrize("text", ["", "\n\n", "short", f"{FIRST}\nshort"])
def test_short_tokens_are_refused(tmp_path, text):
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ValueError, match="at least 16 characters a line"):
        read_tokens(str(path))


def test_tokens_are_read_a_line_each(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"{FIRST}\n\n  {SECOND}  \n")
    assert read_tokens(str(path)) == {FIRST, SECOND}


def test_the_command_refuses_before_it_serves(llama, tmp_path):
    with pytest.raises(ValueError, match="insecure=True, --insecure"):
        main([llama[0], "--host", "0.0.0.0", "--port", "0"])
    with pytest.raises(ValueError, match="is no file"):
        main([llama[0], "--port", "0", "--token-file", str(tmp_path / "missing")])
    with pytest.raises(ValueError, match="sessions=0 must be above zero"):
        main([llama[0], "--port", "0", "--sessions", "0"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_with_all_of_it_until_it_is_told_to_end(llama, authorities, tmp_path, number):
    base, _ = llama
    ours, _ = authorities
    certificate, key = ours.sign("server")
    tokens = tmp_path / "tokens"
    tokens.write_text(FIRST)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "d2ft_peft.dlora.cloud", base, "--port", str(port), "--host", "0.0.0.0",
        "--certificate", certificate, "--key", key, "--client-authority", ours.path, "--token-file", str(tokens),
        "--dtype", "float64", "--sessions", "2", "--idle-seconds", "60", "--memory-gib", "0.5",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as cloud:
        assert "serving" in cloud.stdout.readline()
        address, mutual = f"localhost:{port}", Certificates(ours.path, *ours.sign("edge"))
        assert trains(address, base, certificates=mutual, token=FIRST)
        with pytest.raises(CloudError, match="UNAUTHENTICATED"):
            trains(address, base, certificates=mutual, token=SECOND)
        with pytest.raises(CloudError, match="(?i)gave no answer.*(ssl|tls|certificate|handshake|socket closed)"):
            trains(address, base, token=FIRST, patience=0.1)
        cloud.send_signal(number)
        assert cloud.wait(60) == 0
