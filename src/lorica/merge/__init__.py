"""An adapter and a model's files made one, or taken apart again, where the model need not fit into memory."""

from lorica.merge.extract import Change, Wanted, extract_files
from lorica.merge.stream import Progress, merge_files
from lorica.merge.traced import NotFollowedError

__all__ = ["Change", "NotFollowedError", "Progress", "Wanted", "extract_files", "merge_files"]
