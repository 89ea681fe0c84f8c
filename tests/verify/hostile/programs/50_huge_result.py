# ruff: noqa
def solve(xs):
    return "x" * 60_000_000
print("x" * 60_000_000)
