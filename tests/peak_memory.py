"""How much memory a process has used at most: a line of Python for a subprocess to run at its end.

`ru_maxrss` is handed down from the process that started this one (Linux keeps it across exec), so a large test runner
would be measured instead. VmHWM belongs to the program alone; where there is no /proc, `ru_maxrss` has to do.
"""

PRINT_PEAK_BYTES = """
import re, resource, sys
try:
    print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
except OSError:
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""
