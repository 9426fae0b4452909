"""The order inside one class: tenants take turns by the tokens they were given, and by weight.

Start-time fair queueing: a tenant's next request may start when, in tokens, the tenant has had its
share. A tenant that was idle starts at the class's clock, so that it neither saves up turns nor
pays for old ones. So ahead of a request whose tenant has nothing else here, and no more than its
share behind it, goes at most one request of each other tenant. A tenant's own keep their order.
Source: Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996; in tokens as in Sheng et al.,
"Fairness in Serving Large Language Models", OSDI 2024.
"""

import heapq
from collections import OrderedDict

from quantgate_serve.request import Request


class _Share:
    """One tenant's requests here, and how far its share is used."""

    __slots__ = ("finish", "is_listed", "refunded", "requests")

    def __init__(self) -> None:
        self.requests: OrderedDict[int, Request] = OrderedDict()
        # Both in tokens per weight.
        self.finish = 0.0
        self.refunded = 0.0
        self.is_listed = False


class FairQueue:
    """Requests of one class. Every operation costs O(log tenants)."""

    def __init__(self) -> None:
        self._shares: dict[str, _Share] = {}
        # A heap of (start, tie-break, tenant): whose turn comes when the clock shows `start`.
        self._turns: list[tuple[float, int, str]] = []
        self._num_turns = 0
        self._clock = 0.0
        self._prune_at = 64
        self._arrivals: OrderedDict[int, Request] = OrderedDict()

    def __len__(self) -> int:
        return len(self._arrivals)

    @property
    def requests(self) -> list[Request]:
        """All of them, in order of arrival."""
        return list(self._arrivals.values())

    @property
    def oldest(self) -> Request | None:
        """The one that has been here longest."""
        return next(iter(self._arrivals.values()), None)

    def push(self, request: Request) -> None:
        share = self._shares.get(request.tenant)
        if share is None:
            share = self._shares[request.tenant] = _Share()
        share.requests[request.id] = request
        self._arrivals[request.id] = request
        self._list(request.tenant, share)

    def head(self) -> Request | None:
        """Whose turn it is; it stays in the queue."""
        while self._turns:
            share = self._shares[self._turns[0][2]]
            if share.requests:
                return next(iter(share.requests.values()))
            # Its requests were discarded before their turn.
            heapq.heappop(self._turns)
            share.is_listed = False
        return None

    def take(self) -> Request:
        """Remove the head and charge its tenant."""
        if self.head() is None:
            raise IndexError("take from an empty queue")
        self._clock, _, tenant = heapq.heappop(self._turns)
        share = self._shares[tenant]
        share.is_listed = False
        _, request = share.requests.popitem(last=False)
        del self._arrivals[request.id]
        share.finish = self._clock + request.cost / request.weight
        if share.requests:
            self._list(tenant, share)
        self._prune()
        return request

    def discard(self, request: Request) -> None:
        """Remove a request that will not be computed."""
        del self._arrivals[request.id]
        del self._shares[request.tenant].requests[request.id]

    def refund(self, request: Request, tokens: int) -> None:
        """`request`, taken from here, ended `tokens` short of its cost: they are its tenant's."""
        share = self._shares.get(request.tenant)
        if share is not None:  # else the tenant would start at the clock anyway
            share.refunded += tokens / request.weight

    def _list(self, tenant: str, share: _Share) -> None:
        if share.is_listed:
            return
        start = max(self._clock, share.finish - share.refunded)
        share.refunded = 0
        share.is_listed = True
        self._num_turns += 1
        heapq.heappush(self._turns, (start, self._num_turns, tenant))

    def _prune(self) -> None:
        """Forget tenants that would start at the clock anyway."""
        if not self._arrivals:
            # Nobody was kept waiting by what others took, so nobody owes anything.
            self._shares.clear()
            self._turns.clear()
            self._clock = 0.0
        elif len(self._shares) >= self._prune_at:
            self._shares = {
                tenant: share
                for tenant, share in self._shares.items()
                if share.is_listed or share.finish - share.refunded > self._clock
            }
            self._prune_at = 64 + 2 * len(self._shares)
