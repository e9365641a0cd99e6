"""
requests, its sessions hearing the current token.

Mount its adapter in your session. Run with requests 2.34 and urllib3 2.8 on Linux.
"""

# Where requests is not installed, nothing here has a type.
# pyright: basic, reportMissingImports=false, reportMissingModuleSource=false

from __future__ import annotations

from typing import Any

import requests.adapters

from fastpool.blocking.with_urllib3 import use_our_pools

__all__ = ["HTTPAdapter"]


class HTTPAdapter(requests.adapters.HTTPAdapter):
    """
    An adapter of requests by which a session's requests hear the current token.

    Mount it for both, `session.mount("http://", HTTPAdapter())` and the same for `"https://"`, or
    a redirect from one to the other is followed by requests' own.
    What is interrupted, and what becomes of the connections, is as for
    `fastpool.blocking.with_urllib3.PoolManager`: `iter_content` and its like are, on each read, by
    the token that is current there. Through a SOCKS proxy nothing is.

    Args:
        pool_connections: As for `requests.adapters.HTTPAdapter`, like all the rest.

    Raises:
        Cancelled: From requests and reads, as soon as the token is set. A response that was
            cut short is never taken for a whole one.

    Threads:
        As a session of requests: one for each thread is what its authors advise.

    Source:
        `requests.adapters.HTTPAdapter`. Run with requests 2.34 and urllib3 2.8 on Linux.
    """

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:  # Any: handed on
        super().init_poolmanager(*args, **kwargs)
        use_our_pools(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:  # Any: as requests has it
        manager = super().proxy_manager_for(proxy, **kwargs)
        if not proxy.lower().startswith("socks"):  # whose pools make connections of their own
            use_our_pools(manager)
        return manager
