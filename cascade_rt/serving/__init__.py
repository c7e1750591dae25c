"""HTTP: a bundle behind the interfaces that clients already speak.

request -> tokens (once) -> `batcher` (texts of all requests, regrouped before every member) -> response
"""

from __future__ import annotations

from .client import AsyncClient, Classification, Client, ServerError

__all__ = ["AsyncClient", "Classification", "Client", "ServerError"]
