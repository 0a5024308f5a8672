"""What the process holds: freed heap goes back to the system, and the peak is what it was at most."""

from __future__ import annotations

import subprocess
import sys

import pytest

from compress import memory

_PROGRAM = """
import torch
from compress.memory import give_back_freed_memory, peak_memory_bytes

def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

give_back_freed_memory()
before = resident()
kept, freed = [], []
for _ in range(6000):  # blocks that glibc takes from its heap, with something small between them
    freed.append(torch.ones(25_000))
    kept.append(torch.ones(100))
full = resident()
freed.clear()
held = resident()
give_back_freed_memory()
print(before, full, held, resident(), peak_memory_bytes(torch.device("cpu")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_and_the_peak_stays() -> None:
    """In a process of its own: the heap of this one holds other tests' leftovers."""
    done = subprocess.run([sys.executable, "-P", "-c", _PROGRAM], capture_output=True, text=True, check=True)
    before, full, held, after, peak = map(int, done.stdout.split())
    assert full - before > 550e6 and held - before > 400e6, "the heap keeps what is freed"
    assert after - before < 100e6
    assert peak > 0.99 * full  # the two counters are not read at one moment


def test_without_glibc_it_only_collects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    memory.give_back_freed_memory()


def test_where_nobody_keeps_a_record_the_peak_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resource", None)
    assert memory.peak_memory_bytes(memory.torch.device("cpu")) is None
