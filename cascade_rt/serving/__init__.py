"""HTTP: a bundle behind the interfaces that clients already speak.

request -> tokens (once) -> `batcher` (texts of all requests, regrouped before every member) -> response
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import AsyncClient, Classification, Client, ServerError

__all__ = ["AsyncClient", "Classification", "Client", "ServerError"]


def __getattr__(name: str) -> Any:
    """Import the client when it is asked for: the settings of a server need no extra."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import client  # noqa: PLC0415

    return getattr(client, name)
