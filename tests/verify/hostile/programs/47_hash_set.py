# ruff: noqa
def solve(xs):
    return {number * (2**61 - 1) for number in range(20_000)}
