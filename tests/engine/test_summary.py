"""What a run says of itself when it begins."""

from engine import summary


def test_an_average_that_reaches_too_far_back_is_told():
    usual = "Evaluated is the average of the weights over about 5,000 steps (--ema 0.9998)"
    assert summary.describe_average(0.9998, 439_680) == usual
    assert summary.describe_average(0.9998, 400) == (
        usual + "; after the 400 of this run 92% of it are still those of the first: lower --ema"
    )
    assert summary.describe_average(0.5, 8) == "Evaluated is the average of the weights over about 2 steps (--ema 0.5)"
    assert "50% of it" in summary.describe_average(0.5, 2)
