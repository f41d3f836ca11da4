"""Moved to lorica.files.atomic; import from there. This page goes away."""

from lorica.files.atomic import *  # noqa: F403
from lorica.files.atomic import MARKER  # noqa: F401
