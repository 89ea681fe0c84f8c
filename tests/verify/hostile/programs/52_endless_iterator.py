# ruff: noqa
import itertools
def solve(xs):
    return itertools.count()
for number in itertools.count():
    print(number)
    break
