"""Events of event cameras: files, frames, voxel grids, time surfaces, cells, a simulator, and pictures of them."""

from msd.events.readers import open_chunks, read
from msd.events.recording import Recording
from msd.events.stream import EventStream

__all__ = ["EventStream", "Recording", "open_chunks", "read"]
