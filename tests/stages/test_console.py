"""How a command ends when it is asked to stop."""

import signal

import pytest

from stages import console


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)],
    ids=lambda value: str(value),
)
def test_the_first_signal_lets_the_step_end_and_the_second_does_not(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with console.StopAtStepEnd() as signals:
        assert not signals.asked()
        signal.raise_signal(number)
        assert signals.asked()
        with pytest.raises(console.Interrupted) as ended:
            signal.raise_signal(number)
        assert ended.value.code == code
        with pytest.raises(console.Interrupted) as left:
            signals.leave()
        assert left.value.code == code
    assert signal.getsignal(number) == before
