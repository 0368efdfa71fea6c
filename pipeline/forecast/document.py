"""A forecast as plain data for `--json`: every number that the tables show, and those they do not."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.forecast.changes import Change
from pipeline.forecast.device import RankMemory
from pipeline.forecast.from_config import Forecast
from pipeline.forecast.host import StageForecast
from pipeline.forecast.judgement import HostForecast
from pipeline.forecast.rates import RATES


def forecast_json(found: Forecast) -> dict[str, Any]:
    """Sizes in bytes."""
    fullest = found.fullest
    return {
        "source_bytes": found.source_bytes,
        "rank_bytes": list(found.rank_bytes),
        "rank_bytes_exact": found.exact,
        "kv_bytes_per_token": fullest.kv_bytes_per_token,
        "kv_bytes": fullest.kv_cache,
        "target_bytes": fullest.capacity,
        "free_bytes": found.free_bytes,
        "fits": fullest.verdict == "fits",
        "verdict": fullest.verdict,
        "ranks": [rank_json(rank) for rank in found.ranks],
        "advice": [asdict(one) for one in found.advice],
    }


def rank_json(rank: RankMemory) -> dict[str, Any]:
    """One GPU."""
    return {
        "rank": rank.rank,
        "weights": {**asdict(rank.weights), "total": rank.weights.total},
        "kv_bytes_per_token": rank.kv_bytes_per_token,
        "kv_cache": rank.kv_cache,
        "activations_estimate": rank.activations,
        "overhead_assumed": rank.overhead,
        "capacity": rank.capacity,
        "left": rank.left,
        "verdict": rank.verdict,
    }


def change_json(change: Change) -> dict[str, Any]:
    """One of the nearest builds that are possible."""
    return {
        "what": change.what,
        "doublings": round(change.distance, 3),
        "gpus": change.num_gpus,
        "fullest_rank": rank_json(change.fullest),
    }


def host_json(host: HostForecast) -> dict[str, Any]:
    """What the run takes on the machine; seconds from, to."""
    machine = host.machine
    return {
        "stages": [stage_json(stage) for stage in host.stages],
        "ram_peak": host.ram_peak,
        "disk_peak": host.disk.peak,
        "disk_kept": host.disk.kept,
        "seconds": list(host.seconds),
        "machine": {
            "cores": machine.cores,
            "memory_bytes": machine.memory_bytes,
            "free_memory_bytes": machine.free_memory_bytes,
            "free_disk_bytes": machine.free_disk_bytes,
        },
        "rates": {name: asdict(rate) for name, rate in RATES.items()},
    }


def stage_json(stage: StageForecast) -> dict[str, Any]:
    """One stage."""
    return {**asdict(stage), "ram_peak": stage.ram_peak}
