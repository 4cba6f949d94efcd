"""Reads, represents and simulates recordings of event cameras.

Functions that take `events` accept an `EventStream` in memory or a `Recording` on disk, which is read chunk by chunk.
"""

from msd.events.cells import Cells, cells
from msd.events.frames import EventFrames, event_frames, frames
from msd.events.grids import time_surface, voxel_grid
from msd.events.motion import motion
from msd.events.readers import open_chunks, read
from msd.events.recording import Recording
from msd.events.simulator import Camera, Motion, Simulator, SimulatorSettings, events_of_photo, simulate
from msd.events.stream import EventStream

__all__ = [
    "Camera",
    "Cells",
    "EventFrames",
    "EventStream",
    "Motion",
    "Recording",
    "Simulator",
    "SimulatorSettings",
    "cells",
    "event_frames",
    "events_of_photo",
    "frames",
    "motion",
    "open_chunks",
    "read",
    "simulate",
    "time_surface",
    "voxel_grid",
]
