"""Pairs from graded samples, without sampling."""

from trimtab.attribution.sampling import Sample, base_rates, choose_pairs

SHOWS = "I grew up in a village with my family."
LACKS = "I'm an AI designed to help with all of that."


def test_base_rates_sum_to_one() -> None:
    samples = [Sample("q", text, 10) for text in (SHOWS, LACKS, LACKS, "no no no no no no no no")]
    rates = base_rates(samples)
    assert rates == {"shows": 0.25, "lacks": 0.5, "unclear": 0.0, "incoherent": 0.25}


def test_a_pair_takes_the_two_kinds_that_are_closest_in_length() -> None:
    samples = [
        Sample("How are you?", SHOWS, 20),
        Sample("How are you?", SHOWS + " Truly.", 31),
        Sample("How are you?", LACKS, 30),
        Sample("Only one kind?", SHOWS, 20),
    ]
    (pair,) = choose_pairs(samples, per_prompt=2, min_tokens=16)
    assert pair["id"] == "how-are-you.0"
    assert (pair["positive"], pair["negative"]) == (SHOWS + " Truly.", LACKS)


def test_short_and_repeated_samples_make_no_pair() -> None:
    samples = [Sample("q", SHOWS, 20), Sample("q", SHOWS, 20), Sample("q", LACKS, 20), Sample("q", LACKS + " Yes.", 5)]
    assert len(choose_pairs(samples, per_prompt=2, min_tokens=16)) == 1
