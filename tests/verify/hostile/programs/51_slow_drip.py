# ruff: noqa
import sys, time
def solve(xs):
    while True:
        sys.stdout.write("x")
        sys.stdout.flush()
        time.sleep(0.01)
solve([])
