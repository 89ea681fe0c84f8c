# ruff: noqa
# Right digits, wrong type.
def solve(xs):
    return str(sum(x**3 for x in xs) + len(xs))
