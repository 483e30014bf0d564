"""Laws of the draft control: the pace decides, hiccups do not, and what was switched off is tried again."""

from __future__ import annotations

import pytest

from glmctl.engine.draft_control import PROBES, REST_STEPS, DraftControl, Timed, loses, pace


def test_the_pace_is_tokens_of_one_request_over_the_typical_step() -> None:
    steps = [Timed(4, 8, 0.1), Timed(4, 4, 0.1), Timed(2, 3, 9.0)]
    assert pace(steps) == pytest.approx(15 / 10 / 0.1)


@pytest.mark.parametrize(
    ("tokens", "seconds", "expected"),
    [
        (1.8, 1.5, False),
        (1.2, 1.5, True),
        (1.0, 1.0, False),
        (1.0, 1.02, False),
        (1.0, 1.1, True),
        (3.0, 2.9, False),
    ],
)
def test_drafts_lose_where_they_cost_more_than_they_bring(tokens: float, seconds: float, expected: bool) -> None:
    plain = [Timed(10, 10, 0.01)] * 5
    drafted = [Timed(10, round(10 * tokens), 0.01 * seconds)] * 20
    assert loses(plain, drafted) is expected


def drive(control: DraftControl, steps: int, *, drafted: Timed, plain: Timed) -> int:
    """Feed what a machine of these costs would measure; returns the probes."""
    probes = 0
    for _ in range(steps):
        if not control.drafting:
            control.rested()
        elif control.probing:
            probes += 1
            control.timed(plain, plain=True)
        else:
            control.timed(drafted, plain=False)
    return probes


def test_probes_are_few_and_drafts_that_win_stay() -> None:
    control = DraftControl()
    probes = drive(control, 3200, drafted=Timed(1, 2, 1.2), plain=Timed(1, 1, 1.0))
    assert control.drafting
    assert probes == pytest.approx(200, abs=3)


def test_drafts_that_lose_rest_longer_each_time_and_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    control = DraftControl()
    on = 0
    for _ in range(10 * REST_STEPS):
        on += control.drafting
        drive(control, 1, drafted=Timed(1, 1, 1.4), plain=Timed(1, 1, 1.0))
    # 2000, 4000, 8000 and then some: four trials in 20000 steps
    assert on <= 4 * 20 * PROBES
    said = capsys.readouterr().err
    assert said.count("MTP drafts switched off") == 4
    assert "0.7 tokens/s a request with them, 1.0 without" in said
