"""How many samples each of several unequal processes runs, so that all of them are ready at the same time."""

import heapq

import numpy as np


def balance(total: int, fixed: np.ndarray, per_sample: np.ndarray, most: int) -> np.ndarray:
    """Shares out samples such that the last process is ready as early as possible.

    Process r with n samples is ready after fixed[r] + per_sample[r] * n. One sample at a time goes to the process that
    would be ready first with it. This is exact: if some choice is ready by time t, the processes have room for `total`
    samples by t, and a sample only goes beyond t once all of that room is taken.

    Args:
        total: samples to run in all processes.
        fixed: seconds that a process needs besides its samples, float [R].
        per_sample: seconds that it needs for each of them, positive, float [R].
        most: candidates of each process; each runs at least one of them.

    Returns:
        Samples of each process, int64 [R].

    Raises:
        ValueError: `total` does not lie within one and `most` samples for each process, or a time is no fit number.
    """
    fixed, per_sample = np.asarray(fixed, dtype=float), np.asarray(per_sample, dtype=float)
    processes = len(fixed)
    if not processes <= total <= processes * most:
        raise ValueError(
            f"total={total} must lie within {processes} and {processes * most}: {processes} processes run at least one "
            f"and at most {most} samples each"
        )
    times = np.concatenate([fixed, per_sample])
    if not np.isfinite(times).all() or times.min() < 0 or per_sample.min() == 0:
        raise ValueError(
            f"fixed={fixed} and per_sample={per_sample} must be finite seconds, not negative; not 0 a sample"
        )
    counts = np.ones(processes, dtype=np.int64)
    ready = [(fixed[r] + 2 * per_sample[r], r) for r in range(processes) if most > 1]
    heapq.heapify(ready)
    for _ in range(total - processes):
        r = heapq.heappop(ready)[1]
        counts[r] += 1
        if counts[r] < most:
            heapq.heappush(ready, (fixed[r] + per_sample[r] * (counts[r] + 1), r))
    return counts


def balanced_total(fixed: np.ndarray, per_sample: np.ndarray, most: int) -> int:
    """The most samples that can be shared out without a process that is through with all of its candidates and waits.

    Args:
        fixed, per_sample, most: as in `balance`.
    """
    fixed, per_sample = np.asarray(fixed, dtype=float), np.asarray(per_sample, dtype=float)
    first = (fixed + per_sample * most).min()
    return int(np.clip(np.floor((first - fixed) / per_sample * (1 + 1e-9)), 1, most).sum())
