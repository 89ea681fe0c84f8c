# ruff: noqa
import sys
print("ok")
sys.exit(0)
