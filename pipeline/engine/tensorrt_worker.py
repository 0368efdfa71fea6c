"""Compiles one rank of a build kit, with numpy, ml_dtypes and tensorrt alone.

python -m pipeline.engine.tensorrt_worker REQUEST NETWORK_DIR OUT_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.engine.tensorrt_build import bindings, build_plan
from pipeline.engine.tensorrt_request import TensorRtRequest
from pipeline.errors import PipelineError
from pipeline.network.export import read_checkpoint_spec, tensorrt_graph_path


def main(argument: str, network_dir: Path, out_dir: Path) -> int:
    """Build rank{r}.engine into `out_dir`; the exit code is that of what went wrong, or 0."""
    request = TensorRtRequest.from_json(argument)
    rank = request.rank
    try:
        spec = read_checkpoint_spec(network_dir / "checkpoint", rank, request.limits)
        trt = bindings()
        build_plan(
            trt,
            tensorrt_graph_path(network_dir, rank),
            out_dir / f"rank{rank}.engine",
            spec,
            request.limits,
            request.options,
            out_dir / "timing.cache",
            out_dir / f"rank{rank}.tensorrt.log",
        )
    except PipelineError as error:
        print(error, file=sys.stderr, flush=True)
        return int(error.exit_code)
    print(f"rank {rank}: built with TensorRT {trt.__version__}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
