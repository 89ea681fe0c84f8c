# ruff: noqa
# Text that cannot be written as UTF-8, and bytes that are no text.
import sys
sys.stdout.buffer.write(b"\xff\xfe\x00 39")
def solve(xs):
    return "\udcff\ud800 39"
