"""Keyed random words, and permutations that need no memory: a run's random draws depend on keys alone."""

from collections.abc import Callable
from hashlib import blake2b

import numpy as np

_ROUNDS = 8  # of the Feistel network; even, so that its two halves end with the sizes they began with

_Network = Callable[[np.ndarray, int, np.ndarray, np.ndarray | None], np.ndarray]


def words(count: int, *parts: object) -> np.ndarray:
    """Returns `count` random uint64, keyed by `parts`: BLAKE2b hashes the key, Philox4x64 generates raw words.

    Raw words only: library shuffles may change between releases, and a resumed run must not.
    """
    digest = blake2b("/".join(str(part) for part in parts).encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(count)


def uniform(random_words: np.ndarray) -> np.ndarray:
    """Returns float64 in [0, 1) from uint64 words."""
    return (random_words >> np.uint64(11)) * 2.0**-53


def permute(positions: np.ndarray, size: int, *key: object) -> np.ndarray:
    """Returns where a permutation of 0..size-1, keyed by `key`, sends each position; int64, any shape.

    A Feistel network over the next power of two; results outside are sent through it again (cycle walking), at most
    twice on average. 8 rounds of a 64-bit mixer: no memory for 300M samples, about 1 us per sample.
    """
    round_keys = words(_ROUNDS, "v1", "permute", *key)
    return _walk(_feistel, positions, size, max(2, (size - 1).bit_length()), round_keys)


def unpermute(results: np.ndarray, size: int, *key: object) -> np.ndarray:
    """Returns the positions that `permute` sends to `results`; int64, any shape."""
    round_keys = words(_ROUNDS, "v1", "permute", *key)
    return _walk(_feistel_back, results, size, max(2, (size - 1).bit_length()), round_keys)


def visit(places: np.ndarray, size: int, *key: object) -> tuple[np.ndarray, np.ndarray]:
    """Returns (epoch, element) at places of an endless sequence of permutations of 0..size-1, one per epoch; int64."""
    epochs = places // size
    elements = np.empty_like(places)
    for epoch in np.unique(epochs):  # one, or a few where a step crosses epoch boundaries
        these = epochs == epoch
        elements[these] = permute(places[these] % size, size, *key, int(epoch))
    return epochs, elements


def unvisit(epochs: np.ndarray, elements: np.ndarray, size: int, *key: object) -> np.ndarray:
    """Returns the places at which `visit` has (epoch, element); int64."""
    places = np.empty_like(elements)
    for epoch in np.unique(epochs):
        these = epochs == epoch
        places[these] = epoch * size + unpermute(elements[these], size, *key, int(epoch))
    return places


def scatter(places: np.ndarray, sizes: np.ndarray, tweaks: np.ndarray, *key: object) -> np.ndarray:
    """Returns where many small permutations send places; all int64 [n].

    Element i lies at places[i] of the permutation of 0..sizes[i]-1 that `key` and tweaks[i] name.
    """
    return _scattered(places, sizes, tweaks, key, _feistel)


def unscatter(results: np.ndarray, sizes: np.ndarray, tweaks: np.ndarray, *key: object) -> np.ndarray:
    """Returns the places that `scatter` sends to `results`; all int64 [n]."""
    return _scattered(results, sizes, tweaks, key, _feistel_back)


def _scattered(
    places: np.ndarray, sizes: np.ndarray, tweaks: np.ndarray, key: tuple[object, ...], network: _Network
) -> np.ndarray:
    assert (places < sizes).all()  # otherwise the walk might never end
    result = np.empty_like(places)
    bits = np.maximum(2, np.frexp((sizes - 1).astype(np.float64))[1])  # exact: sizes lie below 2^53
    round_keys = words(_ROUNDS, "v1", "scatter", *key)
    for some in np.unique(bits):  # one, or a few where permutations are shorter than the others
        these = bits == some
        tweak = _mix(tweaks[these].astype(np.uint64))
        result[these] = _walk(network, places[these], sizes[these].astype(np.uint64), int(some), round_keys, tweak)
    return result


def _walk(
    network: _Network,
    positions: np.ndarray,
    size: int | np.ndarray,
    bits: int,
    round_keys: np.ndarray,
    tweak: np.ndarray | None = None,
) -> np.ndarray:
    """Applies the network until each position comes out below its size (cycle walking)."""
    result = network(positions.astype(np.uint64), bits, round_keys, tweak)
    while (outside := result >= size).any():
        result[outside] = network(result[outside], bits, round_keys, None if tweak is None else tweak[outside])
    return result.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, round_keys: np.ndarray, tweak: np.ndarray | None) -> np.ndarray:
    left_bits, right_bits = bits - bits // 2, bits // 2  # swap sizes each round where bits is odd
    left, right = values >> np.uint64(right_bits), values & _mask(right_bits)
    for round_key in round_keys if tweak is None else round_keys[:, None] + tweak:
        left, right = right, left ^ (_mix(right + round_key) & _mask(left_bits))
        left_bits, right_bits = right_bits, left_bits
    return left << np.uint64(right_bits) | right


def _feistel_back(values: np.ndarray, bits: int, round_keys: np.ndarray, tweak: np.ndarray | None) -> np.ndarray:
    left_bits, right_bits = bits - bits // 2, bits // 2  # as after an even number of rounds
    left, right = values >> np.uint64(right_bits), values & _mask(right_bits)
    for round_key in (round_keys if tweak is None else round_keys[:, None] + tweak)[::-1]:
        left_bits, right_bits = right_bits, left_bits
        left, right = right ^ (_mix(left + round_key) & _mask(left_bits)), left
    return left << np.uint64(right_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every input bit changes every output bit."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)
