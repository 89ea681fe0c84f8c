# ruff: noqa
# A result whose keys all fall into one place of a hash table.
def solve(xs):
    return {number * (2**61 - 1): number for number in range(20_000)}
