# ruff: noqa
# Uses no processor time.
import time
def solve(xs):
    time.sleep(10**6)
if __name__ == "__main__":
    solve([])
