"""The HTTP client against a real server that is dead, slow, broken, or asks for a key."""

import socket
import time

import pytest

from r1v2_fast import config
from r1v2_fast.rollout.choose import engine_of
from r1v2_fast.rollout.http import FIRST_DELAY, LONGEST_DELAY, Client, api_key
from r1v2_fast.rollout.vllm import VLLMEngine

SETTINGS = {"group_size": 2, "max_new_tokens": 6, "temperature": 0.8, "seeds": [3]}


class Delays(list):
    """What a client would have slept."""

    __call__ = list.append


def generate(context, prompts, server, delays=None, **options):
    client = Client(server.url, **{"timeout": 30, "sleep": Delays() if delays is None else delays, **options})
    return VLLMEngine(context.policy, client).generate(prompts[:1], **SETTINGS)


def failing(times, fail):
    """`before` of a server: the first `times` requests end in `fail`."""

    def before(handler, number):
        if number <= times:
            fail(handler)
        return number <= times

    return before


def drop(handler):
    """The connection breaks before a word is said."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def cut(handler):
    """The server dies in the middle of its reply."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"model": "toy", "choi')
    handler.close_connection = True


FAILURES = {
    "500": (lambda handler: handler.answer(500, {"error": "a worker died"}), "status 500: .*a worker died"),
    "503": (lambda handler: handler.answer(503, b""), "status 503"),
    "429": (lambda handler: handler.answer(429, b"too many"), "status 429: too many"),
    "garbage": (
        lambda handler: handler.answer(200, b"<html>gateway</html>"),
        "expected JSON, got '<html>gateway</html>'",
    ),
    "dropped": (drop, "RemoteDisconnected|ConnectionResetError"),
    "cut": (cut, r"IncompleteRead\(22 bytes read, 978 more expected\)"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_tried_again_and_named_if_it_stays(kind, context, prompts, serve):
    fail, message = FAILURES[kind]
    server, delays = serve(), Delays()
    expected = generate(context, prompts, server)
    server.asked.clear()
    server.before = failing(2, fail)
    got = generate(context, prompts, server, delays, retries=2)
    assert [r.ids for r in got] == [r.ids for r in expected]
    assert len(server.asked) == 3 and server.asked[0] == server.asked[1] == server.asked[2]
    assert len(delays) == 2
    server.asked.clear()
    server.before = failing(9, fail)
    with pytest.raises(RuntimeError, match=f"POST {server.url}/v1/completions: no answer in 3 attempts, .*({message})"):
        generate(context, prompts, server, retries=2)
    assert len(server.asked) == 3


def test_the_back_off_doubles_up_to_its_bound_with_jitter(serve):
    server, delays = serve(), Delays()
    server.before = failing(99, lambda handler: handler.answer(500, b""))
    with pytest.raises(RuntimeError, match="no answer in 11 attempts"):
        Client(server.url, retries=10, sleep=delays).post("/v1/completions", {})
    bounds = [min(FIRST_DELAY * 2**attempt, LONGEST_DELAY) for attempt in range(10)]
    assert bounds[0] == 0.5 and bounds[-1] == 30
    assert all(bound / 2 <= delay <= bound for delay, bound in zip(delays, bounds, strict=True))
    assert len({delay / bound for delay, bound in zip(delays, bounds, strict=True)}) > 5


def test_a_dead_server_is_named_with_what_to_look_at(context, prompts, serve):
    server = serve()
    server.shutdown()
    server.server_close()
    delays = Delays()
    message = (
        f"GET {server.url}/version: no answer in 4 attempts, the last one: ConnectionRefusedError.*is the server up"
    )
    with pytest.raises(RuntimeError, match=message):
        generate(context, prompts, server, delays, retries=3)
    assert len(delays) == 3


def test_a_slow_server_is_given_up_after_the_time_out(context, prompts, serve):
    server = serve()
    server.before = failing(1, lambda handler: time.sleep(1.5))
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="no answer in 1 attempts, the last one: nothing came for 0.3 s"):
        generate(context, prompts, server, timeout=0.3, retries=0)
    assert time.monotonic() - started < 1.4
    assert len(generate(context, prompts, server, retries=0)) == 2


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_refusal_is_not_tried_again(status, context, prompts, serve):
    server = serve()
    server.before = failing(
        9, lambda handler: handler.answer(status, {"error": {"message": "no --enable-prompt-embeds"}})
    )
    with pytest.raises(RuntimeError, match=f"expected status 200, got {status}: .*no --enable-prompt-embeds"):
        generate(context, prompts, server, retries=5)
    assert len(server.asked) == 1


def test_a_key_is_sent_and_a_wrong_one_is_named(context, prompts, serve):
    server = serve(key="secret")
    for key in (None, "guess"):
        with pytest.raises(
            RuntimeError, match="/v1/models: status 401, the server does not take the key; .*api_key_env"
        ):
            generate(context, prompts, server, key=key, retries=5)
    assert server.paths.count("/v1/models") == 2, "not tried again"
    assert len(generate(context, prompts, server, key="secret")) == 2


def test_only_loopback_goes_without_a_key(context, monkeypatch):
    def opened(**settings):
        return engine_of(config.Rollout(engine="vllm", **settings), context.policy)

    for url in ("http://127.0.0.1:8000", "http://localhost:1", "http://[::1]:8000"):
        assert opened(url=url).client.url == url
    for url in (
        "http://10.0.0.7:8000",
        "https://gpu.example.com",
        "http://localhost.example.com:8000",
        "http://0.0.0.0:80",
    ):
        with pytest.raises(
            ValueError, match="rollout.url must be on loopback.*rollout.api_key_env, got http.* and none"
        ):
            opened(url=url)
        monkeypatch.delenv("SERVER_KEY", raising=False)
        with pytest.raises(ValueError, match="rollout.api_key_env names SERVER_KEY, which is not set"):
            opened(url=url, api_key_env="SERVER_KEY")
        monkeypatch.setenv("SERVER_KEY", "secret")
        assert opened(url=url, api_key_env="SERVER_KEY").client.url == url
        assert api_key(url, "SERVER_KEY") == "secret"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://127.0.0.1:8000/v1", "http://"])
def test_an_address_must_look_like_one(url):
    with pytest.raises(ValueError, match="must look like http://127.0.0.1:8000, got"):
        Client(url)


def test_a_proxy_of_the_environment_is_not_followed(context, prompts, serve, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert len(generate(context, prompts, serve())) == 2
