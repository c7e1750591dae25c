"""HTTP/1.1 for clients that offer another protocol with their request.

Java's HttpClient, Spring, Ktor and `curl --http2` send `Upgrade: h2c` with the first request of a connection. A server
may ignore that, but httptools ends such a request at its headers and leaves its body to the other protocol.
"""

from __future__ import annotations

from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Http11Protocol(HttpToolsProtocol):
    """Uvicorn's protocol, which answers every request over HTTP/1.1, whatever else its client offers."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Take the arguments of uvicorn's protocol."""
        super().__init__(*args, **options)
        self.parser: Any = _Parser(self)

    def on_headers_complete(self) -> None:
        """Wait for the same request without its offer."""
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Wait for the same request without its offer."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def head_without_upgrade(self) -> bytes:
        """Return the first line and the headers of the request that was read last, without `Upgrade`."""
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        headers = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([b"%b %b HTTP/%b" % (method, self.url, version), *headers, b"", b""])


class _Parser:
    """Httptools' parser, which reads a request with an offer a second time without it."""

    def __init__(self, protocol: Http11Protocol) -> None:
        self._protocol = protocol
        self._parser = self._new()

    def _new(self) -> Any:
        parser = httptools.HttpRequestParser(self._protocol)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's: the data is another request's
        return parser

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    def feed_data(self, data: bytes) -> None:
        """Call the protocol for what has arrived."""
        while True:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self._parser.get_method() == b"CONNECT":
                    raise httptools.HttpParserInvalidMethodError("this is no proxy") from upgrade
                data = self._protocol.head_without_upgrade() + data[upgrade.args[0] :]
                self._parser = self._new()  # the one before takes no data if the connection ends after its request
