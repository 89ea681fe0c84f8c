# ruff: noqa
import sys
if hasattr(sys, "set_int_max_str_digits"):
    sys.set_int_max_str_digits(0)
def solve(xs):
    return 1 << 3_000_000
print("9" * 1_000_000)
