"""One rank of several engines: `python -m tests.mpi.sharded_worker JSON`, under mpirun.

The JSON is a list of cases: engine directory, mapping, tokens [W, T] in a .npy file, tokens per call,
and where the rank that gathers saves the logits [W, T, V].
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

from pipeline.engine.collectives import OverMpi
from pipeline.engine.sharded import ShardedNetwork


def main(argument: str) -> None:
    for case in json.loads(argument):
        collectives = OverMpi(case["tp"], case["pp"], case["moe_ep"])
        network = ShardedNetwork(Path(case["engine"]), collectives, num_threads=1)
        if case.get("killed") == collectives.mapping.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        tokens_WT = np.load(case["tokens"])
        chunks = list(network.logits(tokens_WT, case["call_len"]))
        if network.gathers:
            found = [chunk for chunk in chunks if chunk is not None]
            assert len(found) == len(chunks)
            np.save(case["out"], np.concatenate(found).reshape(*tokens_WT.shape, -1))
        else:
            assert all(chunk is None for chunk in chunks)


if __name__ == "__main__":
    main(sys.argv[1])
