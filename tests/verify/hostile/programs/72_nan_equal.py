# ruff: noqa
def solve(xs):
    return float("nan")
print(float("nan"))
