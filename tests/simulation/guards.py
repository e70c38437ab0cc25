#!/usr/bin/env python3
"""Switches off the guards of the engine, one at a time. The simulation, or the test binary in `by`, must then fail.

  guards.py check         checks that each edit of guards.toml fits the sources
  guards.py run [NAME]    builds a copy of the crate for each guard whose name contains NAME, and runs its test

Needs no packages. The copy and its build folder are in the folder of CARGO_TARGET_DIR.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tomllib

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PARTS = ["Cargo.toml", "Cargo.lock", "README.md", "clippy.toml", "benches", "build.rs", "docs", "examples", "src", "tests"]
SEEDS = 3000
# Seconds for the tests of one guard.
LIMIT = 300


def read():
    guards = tomllib.loads((HERE / "guards.toml").read_text())["guard"]
    for guard in guards:
        text = (ROOT / guard["file"]).read_text()
        count = text.count(guard["from"])
        if count != 1:
            sys.exit(f"guards.toml: the text of the guard '{guard['name']}' is {count} times in {guard['file']}, and must be there once")
        if "unseen" in guard and "by" not in guard:
            sys.exit(f"guards.toml: the guard '{guard['name']}' needs `by`, the name of the test that shows it")
    return guards


def copy_of_the_crate(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part)
        elif source.exists():
            shutil.copy(source, folder / part)


def run(folder, target, guard):
    """Builds the copy and runs the tests of a guard. A copy that does not compile ends the program."""
    test = guard.get("by", "simulation")
    command = ["cargo", "test", "--quiet", "--all-features", "--test", test]
    environment = {**os.environ, "CARGO_TARGET_DIR": str(target), "SIMULATIONS": str(guard.get("seeds", SEEDS))}
    built = subprocess.run([*command, "--no-run"], cwd=folder, env=environment, capture_output=True, text=True)
    if built.returncode:
        sys.exit(f"The copy for the guard '{guard['name']}' does not compile:\n{built.stderr[-3000:]}")
    only = [] if "by" in guard else ["no_guarantee_is_violated_under_any_fault", "plans_that_once_violated_a_guarantee_are_correct"]
    return finished([*command, "--", *only], cwd=folder, env=environment)


def finished(command, **options):
    """Runs tests. Without a guard, a test may never end; it then counts as failed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **options)
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        output += f"\na test did not end within {LIMIT} s: FAILED"
    return subprocess.CompletedProcess(command, process.returncode, output, "")


def fails(folder, target, guard):
    """Whether the tests fail without the guard, and the first lines that show it."""
    file = folder / guard["file"]
    original = file.read_text()
    file.write_text(original.replace(guard["from"], guard["to"]))
    ran = run(folder, target, guard)
    file.write_text(original)
    output = (ran.stdout + ran.stderr).splitlines()
    shown = [line for line in output if line.startswith(("I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8", "I9", "I10", "I11"))]
    shown += [line.strip() for line in output if line.startswith("seed ") or line.endswith("FAILED")]
    return ran.returncode != 0, shown[:2]


def main():
    if sys.argv[1:2] not in (["check"], ["run"]):
        sys.exit(__doc__)
    guards = read()
    if sys.argv[1] == "check":
        print(f"{len(guards)} guards")
        return
    part = sys.argv[2] if len(sys.argv) > 2 else ""
    base = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve() / "guards"
    copy_of_the_crate(base / "crate")
    guards = [guard for guard in guards if part in guard["name"]]
    # Without an edit, every test must pass. Otherwise a guard would count as found for another reason.
    for test, guard in {guard.get("by", "simulation"): guard for guard in guards}.items():
        ran = run(base / "crate", base / "target", guard)
        if ran.returncode:
            sys.exit(f"The test `{test}` fails without an edit:\n{(ran.stdout + ran.stderr)[-3000:]}")
    not_found = []
    for guard in guards:
        is_found, shown = fails(base / "crate", base / "target", guard)
        by = f" by the test `{guard['by']}`" if "by" in guard else ""
        print(("found" if is_found else "NOT FOUND") + f"{by}: {guard['name']} {shown}", flush=True)
        if not is_found:
            not_found.append(guard["name"])
    if not_found:
        sys.exit(f"No test fails without these {len(not_found)} guards: {not_found}")


main()
