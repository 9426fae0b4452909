"""The prefix cache: whole KV pages found again by the tokens they hold.

A tree per root (a root is a tenant; today there is one), each edge one page of tokens. The key is
the tokens themselves, so a hash collision cannot share a page.
Least recently used leaves that nobody else refers to are dropped first.
"""

from collections.abc import Iterator, Sequence

from quantgate_serve.kv.pool import PagePool

DEFAULT_ROOT = ""


class _Node:
    __slots__ = ("children", "key", "page", "parent")

    def __init__(self, parent: "_Node | None", key: tuple[int, ...], page: int) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.children: dict[tuple[int, ...], _Node] = {}


class PrefixCache:
    """Keeps one reference on every page it remembers."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._roots: dict[str, _Node] = {}
        # Insertion order is the order of last use: the oldest first.
        self._by_use: dict[_Node, None] = {}
        self.hit_tokens = 0
        self.queried_tokens = 0

    def __len__(self) -> int:
        return len(self._by_use)

    def pages(self) -> Iterator[int]:
        """The pages the cache refers to."""
        return (node.page for node in self._by_use)

    def match(self, tokens: Sequence[int], *, root: str = DEFAULT_ROOT) -> list[int]:
        """Pages holding the longest known prefix of `tokens`; the caller gets a reference on each.

        At least one token is always left over, because its logits are wanted.
        """
        size = self._pool.page_size
        path = self._walk(tokens, root=root, limit=(len(tokens) - 1) // size)
        self._touch(path)
        pages = [node.page for node in path]
        self._pool.retain(pages)
        self.queried_tokens += len(tokens)
        self.hit_tokens += len(pages) * size
        return pages

    def insert(
        self, tokens: Sequence[int], pages: Sequence[int], *, root: str = DEFAULT_ROOT
    ) -> None:
        """Remember the full pages of `tokens`; `pages[i]` holds tokens i*size to (i+1)*size.

        A page whose tokens are known already is not replaced.
        """
        size = self._pool.page_size
        node = self._roots.setdefault(root, _Node(None, (), -1))
        path: list[_Node] = []
        for index in range(min(len(tokens) // size, len(pages))):
            key = tuple(tokens[index * size : (index + 1) * size])
            child = node.children.get(key)
            if child is None:
                child = _Node(node, key, pages[index])
                node.children[key] = child
                self._pool.retain_cached(child.page)
            path.append(child)
            node = child
        self._touch(path)

    def evict(self, count: int) -> int:
        """Free up to `count` pages that only the cache refers to; returns how many it freed."""
        freed = 0
        # A leaf is older than its parent (see _touch), so one pass frees whole branches.
        for node in list(self._by_use):
            if freed >= count:
                break
            if not node.children and self._pool.references(node.page) == 1:
                self._drop(node)
                freed += 1
        return freed

    def clear(self) -> None:
        """Forget everything (the weights changed, or a test wants a cold start)."""
        for node in self._by_use:
            self._pool.release_cached(node.page)
        self._by_use.clear()
        self._roots.clear()

    def _walk(self, tokens: Sequence[int], *, root: str, limit: int) -> list[_Node]:
        size = self._pool.page_size
        node = self._roots.get(root)
        path: list[_Node] = []
        for index in range(limit):
            if node is None:
                break
            node = node.children.get(tuple(tokens[index * size : (index + 1) * size]))
            if node is not None:
                path.append(node)
        return path

    def _touch(self, path: list[_Node]) -> None:
        for node in reversed(path):
            self._by_use.pop(node, None)
            self._by_use[node] = None

    def _drop(self, node: _Node) -> None:
        if node.parent is not None:
            del node.parent.children[node.key]
        del self._by_use[node]
        self._pool.release_cached(node.page)
