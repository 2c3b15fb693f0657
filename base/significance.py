"""How sure an accuracy is, and a difference of two accuracies on the same images."""

from statistics import NormalDist

Z_95 = NormalDist().inv_cdf(0.975)


def wilson_interval(hits: float, images: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, from 0 to 1. hits: images that are right.

    Source: Wilson 1927. Unlike the normal approximation it stays inside [0, 1] and has a width
    above 0 where all images are right.
    Raises ValueError without images.
    """
    if images < 1:
        raise ValueError(f"an interval of {images} images: give at least one")
    share, spread = hits / images, Z_95**2 / images
    centre = (share + spread / 2) / (1 + spread)
    half = (spread * (share * (1 - share) + spread / 4)) ** 0.5 / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the p-value, 0 to 1, of McNemar's exact two-sided test of two networks.

    only_first, only_second: images that only this one of the two has right. The p-value is the
    probability of a split at least this unequal if both were equally good.
    Source: McNemar 1947; the binomial distribution is summed exactly at every count.
    """
    trials, least = only_first + only_second, min(only_first, only_second)
    ways = total = 1  # to choose `i` of `trials` images, and the sum up to `i`
    for i in range(least):
        ways = ways * (trials - i) // (i + 1)
        total += ways
    return min(1.0, 2 * total / 2**trials)
