"""When a dead engine is started again."""

from quantgate_serve.restarts import FIRST_PAUSE_S, LAST_PAUSE_S, STEADY_S, Restarts


def test_each_death_in_a_row_doubles_the_pause() -> None:
    restarts = Restarts(max_restarts=4)
    assert [restarts.die(0.0) for _ in range(4)] == [FIRST_PAUSE_S * 2**n for n in range(4)]


def test_the_death_after_the_last_restart_gives_up() -> None:
    restarts = Restarts(max_restarts=2)
    assert [restarts.die(float(n)) is None for n in range(3)] == [False, False, True]


def test_no_restart_is_allowed_with_zero() -> None:
    assert Restarts(max_restarts=0).die(0.0) is None


def test_the_pause_has_a_bound() -> None:
    restarts = Restarts(max_restarts=100)
    assert max(restarts.die(0.0) or 0.0 for _ in range(100)) == LAST_PAUSE_S


def test_steady_service_starts_a_new_count_and_a_shorter_one_does_not() -> None:
    restarts = Restarts(max_restarts=1)
    restarts.serve(0.0)
    assert restarts.die(STEADY_S) == FIRST_PAUSE_S
    restarts.serve(100.0)
    assert restarts.die(100.0 + STEADY_S) == FIRST_PAUSE_S
    restarts.serve(200.0)
    assert restarts.die(200.0 + STEADY_S - 0.001) is None


def test_an_engine_that_never_served_again_was_not_steady() -> None:
    restarts = Restarts(max_restarts=1)
    restarts.serve(0.0)
    restarts.die(STEADY_S)
    assert restarts.die(10 * STEADY_S) is None
