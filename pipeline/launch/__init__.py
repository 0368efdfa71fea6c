"""Runs one process per rank: in turn, or under mpirun. The only package that knows about MPI."""

from pipeline.launch.hosts import hostfile_problem, started_too_often
from pipeline.launch.job import RankJob
from pipeline.launch.mpirun import Mpirun, find_mpirun
from pipeline.launch.progress import ProgressFiles, RankProgress, RanksView
from pipeline.launch.ranks import processes_that_fit, run_at_once, run_in_view, run_ranks

__all__ = [
    "Mpirun",
    "ProgressFiles",
    "RankJob",
    "RankProgress",
    "RanksView",
    "find_mpirun",
    "hostfile_problem",
    "processes_that_fit",
    "run_at_once",
    "run_in_view",
    "run_ranks",
    "started_too_often",
]
