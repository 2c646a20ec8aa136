"""Corrections of a plan: closed forms, and the end of a simulated run."""

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from latent_ddpm.training.plan import Plan

PHASES = [(0, 1.0), (10, 2.0), (30, 4.0)]


def plan(seconds, phases=PHASES, after=0.0):
    return Plan({}, seconds, after, phases)


def test_expected_seconds():
    made = plan(0)
    assert [made.expected(0, 5), made.expected(0, 10), made.expected(0, 20), made.expected(5, 40)] == [5, 10, 30, 85]
    assert made.expected(35, 35) == 0 and made.expected(40, 42) == 8


@given(st.integers(0, 50), st.floats(0, 500))
def test_steps_within_inverts_expected(first, seconds):
    steps = plan(0).steps_within(first, seconds)
    assert abs(plan(0).expected(first, first + steps) - seconds) <= 2  # half of the slowest step


def test_a_plan_that_comes_true_is_kept():
    made = plan(1000 + 130, after=130)  # 10 + 40 seconds, then 4 each
    steps = made.steps_within(0, 1000)
    assert steps == round(30 + 950 / 4)
    for step in (20, 60, 200):
        assert made.corrected(step, steps, made.expected(0, step), made.expected(0, step)) == steps


def test_too_early_nothing_is_corrected():
    assert plan(1000).corrected(3, 250, 45, 49) == 250
    assert plan(1000).corrected(3, 250, 45, 51) != 250


def test_a_correction_is_bounded():
    one_phase = plan(1000, [(0, 1.0)])
    assert one_phase.corrected(100, 900, 1000, 1000) == 500 and one_phase.corrected(100, 900, 1, 60) == 1700
    assert one_phase.corrected(899, 900, 1000, 2000) == 900  # a step is left
    assert plan(100).corrected(9, 40, 400, 400) == 31  # the last phase is reached


@settings(deadline=None)
@given(st.floats(0.4, 2.5), st.floats(0.1, 10), st.integers(1, 8))
def test_a_run_ends_in_time(wrong, late_rate, phase):
    """All steps take `wrong` times as long as planned, and those of the second phase `late_rate` times the first's."""
    planned = plan(1000.0, [(0, 0.5), (50 * phase, 0.5 * late_rate)])
    steps = planned.steps_within(0, 1000.0)
    assume(steps > 100 * phase)
    step, now, every = 0, 0.0, max(1, steps // 10)
    while step < steps:
        now += wrong * planned.expected(step, step + 1)
        step += 1
        if step % every == 0 and step < steps:
            steps = planned.corrected(step, steps, now, now)
    rest = wrong * planned.expected(step - every, step)  # steps of the last interval, which nothing corrects
    assert abs(now - 1000) <= max(10, 0.05 * rest + wrong * late_rate)
