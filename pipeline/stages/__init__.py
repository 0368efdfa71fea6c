"""The stages by name, in the order in which data flows."""

from pipeline.stages.build import Build
from pipeline.stages.convert import Convert
from pipeline.stages.fetch import Fetch
from pipeline.stages.kit import MakeKit
from pipeline.stages.quantize import Quantize
from pipeline.stages.serve import Serve
from pipeline.stages.stage import Stage
from pipeline.stages.verify import Verify

_ALL: tuple[Stage, ...] = (Fetch(), Quantize(), Convert(), Build(), Verify(), Serve(), MakeKit())

STAGES: dict[str, Stage] = {stage.name: stage for stage in _ALL}

__all__ = ["STAGES", "Stage"]
