"""Programs that stand in for those of a GPU host: TensorRT-LLM does not install without one.

`trtllm-build` notes how it was called, and writes what TensorRT-LLM 1.2 writes: config.json with rank 0,
then an engine for each rank, here the sha256 of the rank's weights. None of our code is used.
"""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

_TOOL = '''#!{python}
import hashlib, json, os, pathlib, sys, time

here = pathlib.Path(__file__).parent
mode = (here / "mode.txt").read_text()
flags = """{flags}""".split()
if "--help" in sys.argv:
    if mode == "no libraries":
        sys.exit("libnvinfer.so.10: cannot open shared object file")
    print("usage: trtllm-build [-h] " + " ".join("[" + flag + " VALUE]" for flag in flags))
    sys.exit(0)
with (here / "calls.jsonl").open("a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
def value(name):
    return sys.argv[sys.argv.index(name) + 1]
checkpoint, out = pathlib.Path(value("--checkpoint_dir")), pathlib.Path(value("--output_dir"))
out.mkdir(exist_ok=True)
config = json.loads((checkpoint / "config.json").read_text())
version = "9.9.9" if mode == "other version" else "{version}"
build = {{"max_batch_size": int(value("--max_batch_size"))}}
text = json.dumps({{"version": version, "pretrained_config": config, "build_config": build}})
(out / "config.json").write_text(text)
world_size = config["mapping"]["world_size"]
if mode == "fails":
    sys.exit("no kernel for this shape")
for rank in range(world_size - 1 if mode == "lacks a rank" else world_size):
    weights = (checkpoint / ("rank%d.safetensors" % rank)).read_bytes()
    (out / ("rank%d.engine" % rank)).write_text(hashlib.sha256(weights).hexdigest())
    if mode == "hangs":
        (here / "hanging").write_text(str(os.getpid()))
        time.sleep(600)
pathlib.Path(value("--output_timing_cache")).write_text("times")
'''
FLAGS = """--checkpoint_dir --output_dir --workers --input_timing_cache --output_timing_cache
--max_batch_size --max_input_len --max_seq_len --max_num_tokens --opt_num_tokens --max_beam_width
--kv_cache_type --tokens_per_block --gpt_attention_plugin --gemm_plugin --gemm_swiglu_plugin
--low_latency_gemm_plugin --low_latency_gemm_swiglu_plugin --moe_plugin --logits_dtype
--profiling_verbosity --log_level --context_fmha --use_paged_context_fmha --use_fp8_context_fmha
--remove_input_padding --use_fused_mlp --multiple_profiles --reduce_fusion --user_buffer
--pp_reduce_scatter --streamingllm --gather_context_logits --gather_generation_logits --strip_plan
--fast_build --weight_streaming --weight_sparsity --monitor_memory"""
"""Of trtllm-build 1.2, as far as its documentation names them and we use them."""


class GpuHost:
    """A directory of programs, for PATH: trtllm-build under an interpreter that has tensorrt_llm."""

    def __init__(self, root: Path, version: str = "1.2.1", sm: str = "9.0") -> None:
        self.venv = root / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.venv], check=True)
        self.bin = self.venv / "bin"
        self._install(version)
        python = self.bin / "python"
        self.program("trtllm-build", _TOOL.format(python=python, flags=FLAGS, version=version))
        self.program("nvidia-smi", _SMI.format(name="NVIDIA H100", sm=sm))
        self.behave("works")

    def program(self, name: str, text: str) -> None:
        """Put an executable beside the others."""
        path = self.bin / name
        path.write_text(text, "utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def behave(self, mode: str) -> None:
        """works, fails, hangs, lacks a rank, other version, no libraries."""
        (self.bin / "mode.txt").write_text(mode, "utf-8")

    def calls(self) -> list[list[str]]:
        """Arguments of every build so far."""
        path = self.bin / "calls.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def environment(self) -> dict[str, str]:
        """With its programs, and otherwise those of any host."""
        return {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.venv.parent)}

    def _install(self, version: str) -> None:
        (site,) = self.venv.glob("lib/python3*/site-packages")
        info = site / f"tensorrt_llm-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata, "utf-8")


_SMI = """#!/bin/sh
case "$1" in
  *name*) echo "{name}, {sm}, 580.65.06" ;;
  *) echo "{sm}" ;;
esac
"""

DOCKER = """#!/bin/bash
# docker run: the same paths inside as outside, and the image's programs are those of this host.
echo "$@" >> "$(dirname "$0")/docker.txt"
while [[ $1 != example/image:* ]]; do shift; done
shift
exec "$@"
"""
SRUN = """#!/bin/bash
echo "$@" >> "$(dirname "$0")/srun.txt"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SBATCH = """#!/bin/bash
cd "${1#--chdir=}" && shift && exec bash "$@"
"""


def mapping_config(world_size: int, tp: int) -> dict[str, Any]:
    """config.json of a checkpoint, as far as the mapping goes."""
    mapping = {"world_size": world_size, "tp_size": tp, "pp_size": world_size // tp}
    return {"architecture": "LlamaForCausalLM", "mapping": mapping, "quantization": {}}
