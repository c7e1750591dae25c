"""When do member pools pay? The price of a million texts by where each member runs.

    python benchmarks/pool_costs.py --costs benchmarks/results/cluster.json --gpu-speedup 10 60 --core-price 0.05 \
        --gpu-price 1.5

A text costs what every member that it reaches takes: of member i, its share of the texts r_i times its seconds c_i on a
core, or c_i / s_i on a GPU that is s_i times as fast. One pool runs all members in one place. Member pools let each run
where it is cheapest, and pay for sending on the texts that have not left.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from common import RESULTS, run_command

CPU, GPU = "CPU", "GPU"


@dataclass(frozen=True)
class Prices:
    """Prices of an hour, in any currency."""

    core: float
    gpu: float
    """With what its machine costs besides."""


def price(
    seconds: Sequence[float], speedups: Sequence[float], places: Sequence[str], prices: Prices, sending: float
) -> float:
    """Return the price of a million texts.

    Args:
        seconds: Of each member on a core, per text of the input: r_i c_i.
        speedups: How many times as fast a GPU is as a core, for each member: s_i.
        places: CPU or GPU for each member.
        prices: Of an hour.
        sending: Seconds of a core, per text of the input, that it takes to send on what has not left.
    """
    hour = sum(
        one * prices.core if place == CPU else one / speedup * prices.gpu
        for one, speedup, place in zip(seconds, speedups, places, strict=True)
    )
    return (hour + (sending * prices.core if len(set(places)) > 1 else 0.0)) * 1e6 / 3600


def placements(
    seconds: Sequence[float], speedups: Sequence[float], prices: Prices, sending: float
) -> list[tuple[float, tuple[str, ...]]]:
    """Return the price of every placement of the members, the cheapest first."""
    every = product((CPU, GPU), repeat=len(seconds))
    return sorted((price(seconds, speedups, places, prices, sending), places) for places in every)


def main() -> None:
    """Print the placements."""
    options = _parser().parse_args()
    report = json.loads(options.costs.read_text("utf-8"))
    costs = report["costs"]
    seconds = [share * ms / 1000 for share, ms in zip(costs["reached"], costs["member_ms"], strict=True)]
    seconds[0] += costs["tokenization_ms"] / 1000
    if len(options.gpu_speedup) != len(seconds):
        raise SystemExit(f"found {len(options.gpu_speedup)} speed-ups, expected one for each of {len(seconds)} members")
    prices = Prices(options.core_price, options.gpu_price)
    names = [member.partition(" ")[0] for member in report["members"]]
    for total, places in placements(seconds, options.gpu_speedup, prices, options.sending_ms / 1000):
        kind = "member pools" if len(set(places)) > 1 else "one pool"
        where = ", ".join(f"{name} on {place}" for name, place in zip(names, places, strict=True))
        print(f"{total:8.4f}  {kind:12}  {where}")
    print(f"A GPU costs as much as {prices.gpu / prices.core:.0f} cores.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", type=Path, default=RESULTS / "cluster.json", help="what cluster.py wrote")
    parser.add_argument("--gpu-speedup", type=float, nargs="+", required=True, help="over a core, for each member")
    parser.add_argument("--core-price", type=float, required=True, help="of an hour of a core")
    parser.add_argument("--gpu-price", type=float, required=True, help="of an hour of a GPU, with its machine")
    parser.add_argument("--sending-ms", type=float, default=0.0, help="of a core per text, for sending texts on")
    return parser


if __name__ == "__main__":
    run_command(main)
