"""`eventgpt`: cross-model drafting by a model that sees an event camera's recording (docs/events.md)."""

from msd.drafters.eventgpt.config import METHOD, EventGPTConfig
from msd.drafters.eventgpt.drafter import EventGPTDrafter
from msd.drafters.eventgpt.network import EventGPT
from msd.drafters.eventgpt.vocabulary import Pieces, VocabularyMap

__all__ = ["METHOD", "EventGPT", "EventGPTConfig", "EventGPTDrafter", "Pieces", "VocabularyMap"]
