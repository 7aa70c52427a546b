"""The most rows whose program fits, by a bisection that compiles as few programs as it can."""


def largest_that_fits(peak_of, limit, start):
    """The most rows whose program fits, 0 if not even one row does. peak_of(rows): its bytes, or None if refused.

    Bisection with better guesses. Memory grows by nearly the same for each row, so the line through the last two
    programs that fit gives the next guess. Near the limit the compiler trades memory for time and the line is flat, or
    falls: so a guess is at most 64 or twice what fits, and after one that was refused comes two thirds of the way, not
    half, because the compiler takes a sixth of the time to refuse that it takes to finish.
    """
    known, low, high, rows = {}, 0, None, start
    while high is None or high - low > 1:
        peak = peak_of(rows)
        fits = peak is not None and peak <= limit
        if fits:
            known[rows], low = peak, rows
        else:
            high = rows
        between = low + 2 * (high - low) // 3 if high else 2 * low
        rows = (extrapolate_rows(known, limit) if fits else None) or between
        most = high - 1 if high else max(64, 2 * low)
        rows = min(max(rows, low + 1), most)
    return low


def extrapolate_rows(known, limit):
    """Rows at which the line through the two largest of known {rows: bytes} meets the limit; None if it does not."""
    if len(known) < 2:
        return None
    (r1, p1), (r2, p2) = sorted(known.items())[-2:]
    return r2 + int((limit - p2) * (r2 - r1) / (p2 - p1)) if p2 > p1 else None
