"""Names of trees: one per tenant and server."""

from quantgate_serve.kv.roots import CacheRoots


def test_a_tenant_keeps_its_root_and_shares_it_with_nobody() -> None:
    roots = CacheRoots()
    assert roots.of("a") == roots.of("a")
    assert len({roots.of(tenant) for tenant in ("", "a", "b", "ab", "é")}) == 5


def test_another_server_has_other_roots() -> None:
    assert CacheRoots().of("a") != CacheRoots().of("a")
