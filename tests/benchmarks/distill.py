"""What forward KL in blocks of tokens costs beside the same with all logits at once, in memory and time.

    python tests/benchmarks/distill.py [--quick] [--block TOKENS]

4,096 tokens, a vocabulary of 128,000 and width 256, student and teacher with a head of their own, one forward and
backward pass each in a process of its own: at most 0.2 times the memory and 1.2 times the time, with the same
gradients. With all logits at once it takes about 10 GB. One thread; processor time, so that what else runs on the
machine counts little.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from methods.data import Part
from methods.distill._mixture import Mixture
from methods.distill._sources import Live
from methods.term import of
from methods.terms import total

MEMORY_LIMIT, TIME_LIMIT = 0.2, 1.2
# How near the gradients of the two have to be: float32, added up in another order.
NEAR = 1e-4
ROWS, SIZE, QUICK = 8, (4096, 128_000, 256), (4096, 16_000, 256)


def main() -> int:
    """Print the comparison; exit code 1 where a limit is exceeded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="16,000 entries, at which the limits do not hold"
    )
    parser.add_argument("--block", type=int, help="tokens in a block; default: what the methods take")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        print(json.dumps(child(**json.loads(arguments.child))))
        return 0
    size = QUICK if arguments.quick else SIZE
    print("{:,} tokens, {:,} entries, width {}; one thread".format(*size))
    empty, naive, blocks = (ask(name, size, arguments.block) for name in ("nothing", "naive", "blocks"))
    memory = (blocks["peak"] - empty["peak"]) / (naive["peak"] - empty["peak"])
    slower, apart = blocks["seconds"] / naive["seconds"], difference(naive["marks"], blocks["marks"])
    for name, found in (("all logits at once", naive), ("in blocks", blocks)):
        beyond = (found["peak"] - empty["peak"]) / 2**20
        print(
            f"{name:20}{beyond:10,.0f} MiB{found['seconds']:8.2f} s, {found['user']:.2f} s of them outside the kernel"
        )
    print(
        f"memory {memory:.3f} (<= {MEMORY_LIMIT}), time {slower:.2f} (<= {TIME_LIMIT}), gradients {apart:.1e} apart"
    )
    if arguments.quick:
        return 0
    return int(memory > MEMORY_LIMIT or slower > TIME_LIMIT or apart > NEAR)


def difference(one: list[float], other: list[float]) -> float:
    """The largest relative one."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def ask(name: str, size: tuple[int, int, int], block: int | None) -> dict[str, Any]:
    """What a process of its own measures: ``peak`` in bytes, ``seconds``, and marks of the gradients."""
    request = json.dumps({"name": name, "size": size, "block": block})
    command = [sys.executable, __file__, "--child", request]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# --- in a process of its own ------------------------------------------------------------------------------------


class Headed(nn.Module):
    """States that are given and a head: what is left of a model when its decoder has run."""

    def __init__(self, tokens: int, classes: int, width: int, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        states = torch.randn(ROWS, tokens // ROWS + 1, width, generator=random)
        self.states = nn.Parameter(states)
        self.head = nn.Linear(width, classes, bias=False, device="meta")
        self.head.weight = nn.Parameter(torch.randn(classes, width, generator=random).mul_(0.1))
        self.config = SimpleNamespace()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.head(self.states))


def child(name: str, size: tuple[int, int, int], block: int | None) -> dict[str, Any]:
    """One forward and backward pass, after one at a small size that loads what is loaded once."""
    run = {"naive": naive, "blocks": blocks, "nothing": nothing}[name]
    run(Headed(16, 64, 8, 0), Headed(16, 64, 8, 1).requires_grad_(False), block)
    student, teacher = Headed(*size, 0), Headed(*size, 1).requires_grad_(False)
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    run(student, teacher, block)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = time.process_time() - begun
    return {
        "seconds": seconds,
        "user": usage.ru_utime - before,
        "peak": 1024.0 * usage.ru_maxrss,
        "marks": marks(student),
    }


def marks(model: nn.Module) -> list[float]:
    """Lengths of the gradients, and of what is left of them in a few directions."""
    found = []
    for weight in model.parameters():
        if weight.grad is not None:
            norms = weight.grad.double().flatten(0, -2).norm(dim=-1)
            found += [float(norms.norm()), *norms[:: max(1, len(norms) // 8)].tolist()[:8]]
    return found


def nothing(student: Headed, teacher: Headed, block: int | None) -> None:
    """What the process has before it begins."""


def blocks(student: Headed, teacher: Headed, block: int | None) -> None:
    """As a stage computes it."""
    labels = torch.zeros(student.states.shape[:2], dtype=torch.int64)
    part = Part(input_ids=labels, attention_mask=torch.ones_like(labels), labels=labels, name="train")
    mixture = Mixture([of("forward_kl")], block_tokens=block)
    batch = SimpleNamespace(train=part, step=0, steps=1, values={})
    total(mixture.terms(student, Live(teacher), batch)).backward()


def naive(student: Headed, teacher: Headed, block: int | None) -> None:
    """All logits at once."""
    log_q = student.head(student.states[:, :-1]).log_softmax(-1)
    with torch.no_grad():
        log_p = teacher.head(teacher.states[:, :-1]).log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()


if __name__ == "__main__":
    sys.exit(main())
