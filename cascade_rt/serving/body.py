"""The body of a request on its way in: its limits, its compression, and the rest that nobody reads."""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import Awaitable, Mapping
from time import perf_counter

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

_DISCARDED = 2**30  # bytes that are read and dropped after a response, so that a client that still sends gets it
_PAUSE = 5.0  # seconds between two parts of what is dropped
_WINDOWS = {b"gzip": 16 + zlib.MAX_WBITS, b"x-gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}


class Body:
    """Receives the body of one request, decompressed."""

    def __init__(self, headers: Mapping[bytes, bytes], receive: Receive, most: int, seconds: float) -> None:
        """`most`: bytes, as sent and decompressed; `seconds`: until its end, and again for the rest after an answer."""
        length = headers.get(b"content-length", b"0")
        self._announced = int(length) if length.isdigit() else 0
        self._complete = not self._announced and b"transfer-encoding" not in headers
        self._expects = headers.get(b"expect", b"").lower() == b"100-continue"
        self._encodings = [name.strip().lower() for name in headers.get(b"content-encoding", b"").split(b",")]
        self._decompressor: _Decompressor | None = None
        self._receive = receive
        self._most = most
        self._seconds = seconds
        self._until = perf_counter() + seconds
        self._received = 0
        self._size = 0
        self._refused = False

    @property
    def is_complete(self) -> bool:
        """True if nothing of it is left."""
        return self._complete

    @property
    def ends_connection(self) -> bool:
        """True if the connection is of no use after an answer: its rest may be long, or may never be sent."""
        return not self._complete and (self._refused or self._is_awaited)

    @property
    def _is_awaited(self) -> bool:
        """True if the client waits for a word before it sends the body."""
        return self._expects and not self._received

    async def receive(self) -> Message:
        """Return the next part; raise HTTPException for a body that is too large, too slow or not as encoded."""
        if self._complete:  # what comes now is the end of the connection, whenever that is
            return await self._receive()
        if not self._received:
            self._decompressor = _decompressor(self._encodings)
        self._refuse_over(self._announced)
        try:
            message = await _within(max(0.001, self._until - perf_counter()), self._receive())
        except asyncio.TimeoutError as error:
            self._refused = True
            raise HTTPException(408, "the body did not arrive in time") from error
        if not self._counted(message):
            return message
        self._refuse_over(self._received)
        if self._complete and self._received < self._announced:
            counts = f"found {self._received:,} bytes of a body of {self._announced:,}"
            raise HTTPException(400, f"{counts}; a proxy lost the rest, as some do after an Upgrade header: send none")
        if self._decompressor is None:
            return message
        data = self._decompressor.decompress(message.get("body", b""), self._most - self._size)
        self._size += len(data)
        self._refuse_over(self._size)
        if self._complete and not self._decompressor.is_complete:
            raise HTTPException(400, "found compressed data that ends too early in the body")
        return {**message, "body": data}

    async def discard(self) -> None:
        """Read the rest and drop it, within limits: a client that still sends would find the connection reset."""
        until, most = perf_counter() + self._seconds, self._received + _DISCARDED
        while not (self._complete or self._is_awaited or self._received > most):
            try:
                message = await _within(max(0.001, min(_PAUSE, until - perf_counter())), self._receive())
            except asyncio.TimeoutError:
                return
            if not self._counted(message):
                return

    def _counted(self, message: Message) -> bool:
        """Count a part of the body; return whether it is one."""
        if message["type"] != "http.request":
            return False
        self._received += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        return True

    def _refuse_over(self, size: int) -> None:
        if size > self._most:
            self._refused = True
            raise HTTPException(413, f"the body is over {self._most:,} bytes; send several requests")


if sys.version_info >= (3, 11):

    async def _within(seconds: float, received: Awaitable[Message]) -> Message:
        """Return what is received; raise TimeoutError if it takes longer."""
        async with asyncio.timeout(seconds):
            return await received

else:

    async def _within(seconds: float, received: Awaitable[Message]) -> Message:
        return await asyncio.wait_for(received, seconds)  # by a task, which costs more than what it waits for


def _decompressor(encodings: list[bytes]) -> _Decompressor | None:
    found = [name for name in encodings if name not in (b"", b"identity")]
    if not found:
        return None
    if len(found) > 1 or found[0] not in _WINDOWS:
        names = b", ".join(found)[:80].decode("latin-1")
        message = f"`Content-Encoding`: found {names}, expected gzip, deflate or none"
        raise HTTPException(415, message, {"Accept-Encoding": "gzip, deflate"})
    return _Decompressor(found[0])


class _Decompressor:
    """Decompresses what arrives, no more than there is room for."""

    def __init__(self, encoding: bytes) -> None:
        self._encoding = encoding
        self._bits = _WINDOWS[encoding]
        self._stream: zlib._Decompress | None = None

    @property
    def is_complete(self) -> bool:
        """True if the data may end here."""
        return self._stream is None or self._stream.eof

    def decompress(self, data: bytes, room: int) -> bytes:
        """Return what the data holds; more than `room` bytes say that there is more than that."""
        found = bytearray()
        while data and len(found) <= room:
            if self._stream is None or self._stream.eof:  # gzip files may follow each other
                if self._encoding == b"deflate" and data[0] & 0x0F != zlib.DEFLATED:  # without zlib's header
                    self._bits = -zlib.MAX_WBITS
                self._stream = zlib.decompressobj(self._bits)
            try:
                found += self._stream.decompress(data, room + 1 - len(found))
            except zlib.error as error:
                name = self._encoding.decode()
                raise HTTPException(400, f"the body is not {name}, as `Content-Encoding` says ({error})") from error
            data = self._stream.unused_data
        return bytes(found)
