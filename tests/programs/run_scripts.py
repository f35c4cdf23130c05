"""Runs scripts one after the other in one process, so that starting it is paid for once.

Arguments: JSON, a list of [script, its arguments...]; a name without .py is that of a module.
Prints RESULT and a list, one [exit code, standard output, standard error] a run. An error goes
through sys.excepthook, as at the end of a process of its own.
"""

import contextlib
import io
import json
import runpy
import sys


def run(script: str):
    """The script as `python SCRIPT` or `python -m SCRIPT` would run it."""
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def code_of(script: str) -> int:
    """Run it; the exit code that its process would end with."""
    try:
        try:
            run(script)
        except SystemExit:
            raise
        except BaseException:
            sys.excepthook(*sys.exc_info())
            return 1
    except SystemExit as stop:
        # a sentence instead of a number is printed, and means 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    return 0


results = []
for script, *words in json.loads(sys.argv[1]):
    sys.argv = [script, *words]
    sys.excepthook = sys.__excepthook__
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = code_of(script)
    # a script that was stopped would have this process end with its code
    if interrupts := sys.modules.get("lib.interrupts"):
        interrupts.ENDING.clear()
    results.append([code, out.getvalue(), err.getvalue()])
print("RESULT" + json.dumps(results))
