# ruff: noqa
# Prints for ever.
def solve(xs):
    while True:
        print("x" * 100_000)
solve([])
