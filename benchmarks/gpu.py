"""All that is worth measuring on a GPU, in parts, the most important first.

    python benchmarks/gpu.py --list
    python benchmarks/gpu.py
    python benchmarks/gpu.py --seconds 120 --parts stacks sizes

Each part is a process of its own, which gets its share of ``--seconds``, ten minutes at most, and
leaves two files in ``--out``: ``NAME.txt``, all that it printed, and ``NAME.json``, with everything
measured, and with the GPU, its driver, the versions and the commit. A part that fails or runs out
of time leaves what it had, and the next goes on with the time that is left. With ``--device cpu``
everything is small: a rehearsal, whose times say nothing.

It needs matplotlib and rich; peers take part where they are installed:

    pip install --no-deps memcnn revtorch revlib
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import gpu_parts
import torch

ALL = sum(part.share for part in gpu_parts.PARTS.values())
LONGEST = 600  # seconds of a part
SCRIPT = (sys.executable, "-u", "-X", "utf8", gpu_parts.__file__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts in turn; gives 0 if all of them ended well."""
    flags = parse(arguments)
    if flags.list:
        for name, part in gpu_parts.PARTS.items():
            print(f"{name:15}{part.share / ALL:4.0%} of the time: {part.what}")
        return 0
    flags.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + flags.seconds
    ends = {}
    for i, name in enumerate(flags.parts):
        shares = [gpu_parts.PARTS[later].share for later in flags.parts[i:]]
        seconds = min(LONGEST, (end - time.monotonic()) * shares[0] / sum(shares))
        # The rest is for importing torch, and for what takes longer than it should.
        words = (name, flags.device, str(flags.out), f"{0.8 * seconds:.0f}")
        ends[name] = run([*SCRIPT, *words], seconds, flags.out / f"{name}.txt")
    print("\n" + "\n".join(f"{name:15}{how}" for name, how in ends.items()))
    return any(how.startswith("failed") for how in ends.values())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(gpu_parts.PARTS)
    parser.add_argument("--list", action="store_true", help="say what the parts are, and end")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART")
    parser.add_argument("--seconds", type=float, default=1800, help="for all of them together")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu")
    return parser.parse_args(arguments)


def run(command: Sequence[str], seconds: float, text: Path) -> str:
    """Runs a command, shows what it prints and keeps it in a file; how it ended."""
    start = time.monotonic()
    with (
        text.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            process_group=0,  # so that workers of a compiler end with it
        ) as process,
    ):
        timer = threading.Timer(seconds, _end, (process,))
        timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
                file.flush()
        except BaseException:  # interrupted
            _end(process)
            raise
        finally:
            timer.cancel()
        code = process.wait()
        took = time.monotonic() - start
        if code == -signal.SIGKILL and took >= seconds:
            how = "out of time"
        else:
            how = f"failed with status {code}" if code else "done"
        file.write(f"{how} after {took:.0f} s\n")
    return f"{how} after {took:.0f} s"


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
