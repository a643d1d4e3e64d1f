"""Kills `cloq quantize` at random moments until it has been killed ten times, lets it finish, and compares every byte with a run that
was left alone.

    python scripts/bench_resume.py MODEL --calib train.txt --kills 10

Unknown flags go to `cloq quantize`.

The kill is SIGKILL, at a moment drawn uniformly from the time that the undisturbed run took. Prints where each kill
struck and exits with 1 if a single exported byte differs.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def digest(out: Path) -> dict[str, str]:
    """SHA-256 of every file of the base and the adapter; the adapter's config names its base by path, which is put aside."""
    found = {}
    for path in sorted([*(out / "model").rglob("*"), *(out / "adapter").rglob("*")]):
        if path.is_file():
            content = path.read_bytes().replace(str(out.resolve()).encode(), b"OUT")
            found[str(path.relative_to(out))] = hashlib.sha256(content).hexdigest()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--samples", default="4")
    parser.add_argument("--seq-len", default="256")
    parser.add_argument("--seed", type=int, default=0)
    args, further = parser.parse_known_args()
    work = Path(tempfile.mkdtemp(prefix="cloq-resume-"))
    command = [sys.executable, "-m", "cloq", "quantize", args.model, "--bits", "2", "--calib", args.calib, "--calib-samples", args.samples]
    command += ["--seq-len", args.seq_len, "--quiet", *further, "--out"]

    began = time.perf_counter()
    subprocess.run([*command, str(work / "alone")], check=True)
    whole = time.perf_counter() - began
    expected = digest(work / "alone")
    print(f"undisturbed: {whole:.0f} s, {len(expected)} files")

    draw = random.Random(args.seed)
    killed = 0
    while killed < args.kills:
        process = subprocess.Popen([*command, str(work / "killed")])
        moment = draw.uniform(0, whole)
        try:
            process.wait(moment)
            shutil.rmtree(work / "killed")  # it finished before the kill: start over, this one does not count
            continue
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        killed += 1
        blocks = len(list((work / "killed" / ".cloq" / "blocks").glob("[0-9]*.safetensors")))
        print(f"kill {killed} after {moment:.1f} s, {blocks} blocks finished", flush=True)
    subprocess.run([*command, str(work / "killed")], check=True)
    found = digest(work / "killed")
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    print("same bytes" if not differing else f"DIFFERENT: {', '.join(differing)}")
    shutil.rmtree(work)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
