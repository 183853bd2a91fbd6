"""The best trial so far, over the number of trials."""

import pytest

from benchmarks import settling


def entry(*trials):
    names = ("score", "tested")
    return {"tuning": {"trials": [dict(zip(names, t, strict=True)) for t in trials]}}


def compared(**entries):
    return {"results": entries}


def test_the_best_trial_is_the_best_by_its_score():
    tried = entry((0.5, 0.7), (0.6, 0.4), (0.6, 0.9), (None, 0.1), (0.7, 0.8))
    fixed, old = entry(), {"tuning": {"trials": [{"score": 0.5}]}}
    known = settling.courses(compared(a=tried, fixed=fixed, old=old))
    assert known == {"a": [0.7, 0.4, 0.4, 0.4, 0.8]}


def rising(*tested):
    return entry(*((n, accuracy) for n, accuracy in enumerate(tested)))


def test_a_ranking_has_settled_when_the_last_half_agrees():
    a, c = rising(0.1, 0.9, 0.9, 0.9), rising(0.2, 0.2, 0.2, 0.2)
    early = rising(0.8, 0.3, 0.3, 0.3)  # first before the last half
    assert settling.settled(compared(c=c, a=a, early=early)) == ("a", "early")
    late = rising(0.3, 0.3, 0.3, 0.95)
    assert settling.settled(compared(a=a, late=late, c=c)) is None
    second = rising(0.3, 0.3, 0.3, 0.1)  # the first one stays, the second does not
    assert settling.settled(compared(a=a, second=second, c=c)) is None


def test_methods_of_fewer_trials_keep_their_last():
    assert settling.settled(compared(a=rising(0.1, 0.2, 0.3), b=rising(0.9))) == (
        "b",
        "a",
    )


@pytest.mark.parametrize(
    "result",
    [
        compared(a=rising(0.1, 0.2)),
        compared(a=rising(0.1, 0.2), b=entry()),
        compared(a=rising(0.1), b=rising(0.2)),
        compared(),
    ],
)
def test_nothing_is_said_of_what_does_not_tell(result):
    with pytest.raises(LookupError, match="no two tuned methods"):
        settling.settled(result)
