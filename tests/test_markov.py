"""The built-in Markov text: its sizes, its chain, and that it never changes."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

from methods import markov
from methods.sources import Locator

DIGEST = "118c3396503fcf7caa73a889c826b78fbc0f00dc190fc05e773926b59e1fb4ad"


def test_rows_have_39_symbols_and_the_splits_their_sizes() -> None:
    for split, count in (("train", 4096), ("valid", 256), ("noisy", 4096)):
        texts = [row["text"] for row in markov.rows(split)]
        assert len(texts) == count
        assert {len(text) for text in texts} == {39}
        assert set("".join(texts)) == set(markov.SYMBOLS)


def test_the_text_is_the_same_everywhere() -> None:
    assert Locator().digest("markov/train") == DIGEST


def test_validation_rows_are_not_trained_on() -> None:
    assert not {row["text"] for row in markov.rows("train")} & {row["text"] for row in markov.rows("valid")}


def test_the_next_symbol_follows_from_the_last_two() -> None:
    following: dict[str, Counter[str]] = defaultdict(Counter)
    for row in markov.rows("train"):
        for place in range(37):
            following[row["text"][place : place + 2]][row["text"][place + 2]] += 1
    pair, counts = max(following.items(), key=lambda item: sum(item[1].values()))
    first, last = (markov.SYMBOLS.index(symbol) for symbol in pair)
    cumulative = (0.0, *markov._chain()[first][last])
    shares = [b - a for a, b in pairwise(cumulative)]
    for symbol, share in zip(markov.SYMBOLS, shares, strict=True):
        assert abs(counts[symbol] / sum(counts.values()) - share) < 0.05


def test_a_fifth_of_the_noisy_symbols_is_drawn_anew() -> None:
    pairs = zip(markov.rows("train"), markov.rows("noisy"), strict=True)
    changed = sum(a != b for clean, noisy in pairs for a, b in zip(clean["text"], noisy["text"], strict=True))
    # Of the symbols drawn anew one in 32 is the old one.
    assert abs(changed / (4096 * 39) - 0.2 * 31 / 32) < 0.005


def test_a_symbol_has_between_one_and_two_nats() -> None:
    assert 1.0 < markov.entropy_nats() < 2.0
