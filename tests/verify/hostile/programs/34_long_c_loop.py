# ruff: noqa
def solve(xs):
    return 9**9**9
solve([])
