"""JSON over HTTP to one server: time-outs, retries with back-off, and errors in a sentence.

The standard library's client: it follows no proxy from the environment, so that what is meant for loopback stays there.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import random
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds; doubled from one attempt to the next
_jitter = random.SystemRandom()  # not the global generator: a run seeds it for the user's rewards


class _Failed(Exception):
    """An attempt that another one may mend."""


def api_key(url: str, variable: str | None) -> str | None:
    """The key in the environment variable; None is allowed for a server on loopback alone.

    raises  ValueError where the variable is not set, or none is named and the server is elsewhere
    """
    if variable is not None:
        if not (key := os.environ.get(variable)):
            raise ValueError(f"rollout.api_key_env names {variable}, which is not set in the environment")
        return key
    if not loopback(url):
        raise ValueError(
            f"rollout.url must be on loopback, such as http://127.0.0.1:8000, or have its key's environment variable in "
            f"rollout.api_key_env, got {url} and none"
        )
    return None


def loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


class Client:
    """One server.

    timeout  seconds for a connection, and for any silence of the server: a reply comes whole, so generation counts
    retries  further attempts after a refused or broken connection, a time-out, a reply that is no JSON, 408, 429 or 5xx
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout: float = 600.0,
        retries: int = 4,
        sleep: Callable[[float], None] = time.sleep,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ValueError(f"a server's address must look like http://127.0.0.1:8000, got {url!r}")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self.timeout, self.retries, self.sleep = timeout, retries, sleep
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._address = (parts.hostname, parts.port)
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    def get(self, path: str) -> Any:
        return self._call("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The reply's JSON, None where it is empty.

        raises  RuntimeError where the server refuses, or every attempt fails
        """
        return self._call("POST", path, json.dumps(body).encode())

    def _call(self, method: str, path: str, body: bytes | None) -> Any:
        for attempt in range(self.retries + 1):
            try:
                return self._attempt(method, path, body)
            except _Failed as failed:
                reason = str(failed)
            if attempt < self.retries:
                self.sleep(min(FIRST_DELAY * 2**attempt, LONGEST_DELAY) * _jitter.uniform(0.5, 1.0))
        raise RuntimeError(
            f"{method} {self.url}{path}: no answer in {self.retries + 1} attempts, the last one: {reason}; "
            "is the server up, and rollout.timeout long enough for a whole response?"
        )

    def _attempt(self, method: str, path: str, body: bytes | None) -> Any:
        connection = self._connection(*self._address, timeout=self.timeout)
        try:
            connection.request(method, path, body=body, headers=self._headers)
            reply = connection.getresponse()
            status, content = reply.status, reply.read()
        except TimeoutError as error:
            raise _Failed(f"nothing came for {self.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Failed(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
        said = content[:300].decode(errors="replace")
        if status in (408, 429) or status >= 500:
            raise _Failed(f"status {status}: {said}")
        if status in (401, 403):
            raise RuntimeError(
                f"{method} {self.url}{path}: status {status}, the server does not take the key; "
                "rollout.api_key_env must name the environment variable that holds it"
            )
        if status != 200:
            raise RuntimeError(f"{method} {self.url}{path}: expected status 200, got {status}: {said}")
        try:
            return json.loads(content) if content else None
        except ValueError as error:
            raise _Failed(f"expected JSON, got {said!r}") from error
