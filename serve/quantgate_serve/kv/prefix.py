"""The prefix cache: whole KV pages found again by the tokens they hold.

A tree per root (a root is a tenant, see `roots.py`), each edge one page of tokens. The key is the
tokens themselves, so a hash collision cannot share a page.
Least recently used leaves that nobody else refers to are dropped first.
"""

import heapq
from collections.abc import Iterator, Sequence

from quantgate_serve.kv.pool import PageIntegrityError, PagePool

DEFAULT_ROOT = ""


class _Node:
    """A page, and whose it is. The node of a root itself has page -1."""

    __slots__ = ("children", "key", "last_use", "owner", "page", "parent", "root")

    def __init__(
        self, parent: "_Node | None", key: tuple[int, ...], page: int, *, root: str, owner: str
    ) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.root = root
        self.owner = owner
        self.last_use = 0
        self.children: dict[tuple[int, ...], _Node] = {}


class PrefixCache:
    """Keeps one reference on every page it remembers; beyond `max_pages` only those in use.

    A page is *idle* when only the cache refers to it. Whoever lets go of pages that may be in the
    cache does it through `release`, or the cache would not know which leaves it may drop.
    """

    def __init__(self, pool: PagePool, *, max_pages: int | None = None) -> None:
        self.max_pages = pool.num_pages if max_pages is None else max_pages
        self._pool = pool
        self._roots: dict[str, _Node] = {}
        self._by_page: dict[int, _Node] = {}
        # A heap of idle leaves as (last use, page). An entry is stale when its leaf was used since,
        # got a child, or is gone: cheaper to skip at the top than to find in the middle.
        self._idle: list[tuple[int, int]] = []
        self._prune_at = 64
        self._uses = 0
        self.hit_tokens = 0
        self.queried_tokens = 0
        # A page that its root would have given to somebody else than its owner: must stay 0.
        self.cross_tenant_hits = 0

    def __len__(self) -> int:
        return len(self._by_page)

    def pages(self) -> Iterator[int]:
        """The pages the cache refers to."""
        return iter(self._by_page)

    def match(
        self, tokens: Sequence[int], *, root: str = DEFAULT_ROOT, owner: str = ""
    ) -> list[int]:
        """Pages holding the longest known prefix of `tokens`; the caller gets a reference on each.

        At least one token is always left over, because its logits are wanted.
        """
        size = self._pool.page_size
        node = self._roots.get(root)
        pages: list[int] = []
        self._uses += 1
        for index in range((len(tokens) - 1) // size):
            if node is None:
                break
            node = node.children.get(tuple(tokens[index * size : (index + 1) * size]))
            if node is None:
                break
            if node.owner != owner:
                self.cross_tenant_hits += 1
                break
            node.last_use = self._uses
            pages.append(node.page)
        self._pool.retain(pages)
        self.queried_tokens += len(tokens)
        self.hit_tokens += len(pages) * size
        return pages

    def insert(
        self,
        tokens: Sequence[int],
        pages: Sequence[int],
        *,
        root: str = DEFAULT_ROOT,
        owner: str = "",
    ) -> None:
        """Remember the full pages of `tokens`; `pages[i]` holds tokens i*size to (i+1)*size.

        The caller still holds the pages. A page whose tokens are known already is not replaced.
        """
        size = self._pool.page_size
        count = min(len(tokens) // size, len(pages))
        if count == 0:
            return
        node = self._roots.get(root)
        if node is None:
            node = self._roots[root] = _Node(None, (), -1, root=root, owner=owner)
        self._uses += 1
        for index in range(count):
            key = tuple(tokens[index * size : (index + 1) * size])
            child = node.children.get(key)
            if child is None:
                child = _Node(node, key, pages[index], root=root, owner=owner)
                node.children[key] = child
                self._by_page[child.page] = child
                self._pool.retain_cached(child.page)
            elif child.owner != owner:
                self.cross_tenant_hits += 1
                break
            child.last_use = self._uses
            node = child
        # The last one may be an idle leaf that another request left here and this one did not
        # match (a match leaves out the last token): its entry is stale now.
        self._offer(node)
        self._keep_budget()

    def release(self, pages: Sequence[int]) -> None:
        """Drop the caller's reference on `pages`, some of which the cache may refer to as well."""
        self._pool.release(pages)
        for page in pages:
            node = self._by_page.get(page)
            if node is not None:
                self._offer(node)
        self._keep_budget()

    def evict(self, count: int) -> int:
        """Free up to `count` idle pages, the least recently used first; returns how many."""
        freed = 0
        while freed < count and self._idle:
            node = self._current(heapq.heappop(self._idle))
            if node is not None:
                self._drop(node)
                freed += 1
        return freed

    def clear(self) -> None:
        """Forget everything (the weights changed, or a test wants a cold start)."""
        for page in self._by_page:
            self._pool.release_cached(page)
        self._by_page.clear()
        self._roots.clear()
        self._idle.clear()

    def check_integrity(self) -> None:
        """Raise PageIntegrityError unless the trees, the pages and the idle leaves agree."""
        entries = set(self._idle)
        found = 0
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            if node.page < 0:
                if not node.children:
                    raise PageIntegrityError(f"root {node.root!r} is kept without a page")
                continue
            found += 1
            if self._by_page.get(node.page) is not node:
                raise PageIntegrityError(f"page {node.page} is in the tree but not in the books")
            parent = node.parent
            if parent is None or (node.root, node.owner) != (parent.root, parent.owner):
                raise PageIntegrityError(f"page {node.page} hangs in another tenant's tree")
            if self._idles(node) and (node.last_use, node.page) not in entries:
                raise PageIntegrityError(f"page {node.page} is idle but could never be dropped")
        if found != len(self._by_page):
            raise PageIntegrityError(f"{len(self._by_page)} pages are in the books, {found} found")

    def _idles(self, node: _Node) -> bool:
        return not node.children and self._pool.references(node.page) == 1

    def _current(self, entry: tuple[int, int]) -> _Node | None:
        """The idle leaf that `entry` means; None when the entry is stale."""
        last_use, page = entry
        node = self._by_page.get(page)
        if node is None or node.last_use != last_use or not self._idles(node):
            return None
        return node

    def _offer(self, node: _Node) -> None:
        """Let `node` be dropped in its turn, if it is an idle leaf."""
        if not self._idles(node):
            return
        heapq.heappush(self._idle, (node.last_use, node.page))
        if len(self._idle) >= self._prune_at:
            self._idle = sorted({e for e in self._idle if self._current(e) is not None})
            self._prune_at = 64 + 2 * len(self._idle)

    def _keep_budget(self) -> None:
        if len(self._by_page) > self.max_pages:
            self.evict(len(self._by_page) - self.max_pages)

    def _drop(self, node: _Node) -> None:
        parent = node.parent
        if parent is None:
            raise PageIntegrityError("a root has no page to drop")
        del self._by_page[node.page]
        self._pool.release_cached(node.page)
        del parent.children[node.key]
        if parent.page >= 0:
            self._offer(parent)
        elif not parent.children:
            del self._roots[parent.root]
