# ruff: noqa
# Asks for all memory.
def solve(xs):
    hoard = []
    while True:
        hoard.append(bytearray(50_000_000))
print(solve([]))
