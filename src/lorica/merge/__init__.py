"""Merging an adapter into the files of a model that need not fit into memory."""

from lorica.merge.stream import Progress, merge_files
from lorica.merge.traced import NotFollowedError

__all__ = ["NotFollowedError", "Progress", "merge_files"]
