"""`eventgpt`: an independent model that reads event recordings drafts for the target (docs/events.md)."""

from msd.drafters.algorithms.eventgpt.drafter import EventGPTDrafter, load, save
from msd.drafters.algorithms.eventgpt.network import METHOD, EventGPT, EventGPTConfig
from msd.drafters.algorithms.eventgpt.vocabulary import Pieces, VocabularyMap

__all__ = ["METHOD", "EventGPT", "EventGPTConfig", "EventGPTDrafter", "Pieces", "VocabularyMap", "load", "save"]
