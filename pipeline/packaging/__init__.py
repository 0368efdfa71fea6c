"""What is carried to another machine: build kits."""

from pipeline.packaging.kit import CheckpointKit, Kit, NetworkKit, write_kit

__all__ = ["CheckpointKit", "Kit", "NetworkKit", "write_kit"]
