# ruff: noqa
import os, subprocess
def solve(xs):
    os.system("touch @CANARY@/shell; cat /etc/passwd")
    return subprocess.run("id; touch @CANARY@/shell", shell=True, capture_output=True).stdout
solve([])
