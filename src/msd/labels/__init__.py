"""Labels the tokens of an answer with modalities, by the influence of the image or the events on each token.

Answers about images are labelled with `IMAGE_MODALITIES`, answers about recordings of event cameras with
`EVENT_MODALITIES`. `import msd` imports this module, so that these names are always registered.
"""

from msd.core.modality import FUSION, LANGUAGE, VISION, register

EVENT_SPARSE = register("event_sparse", 0.35)
EVENT_DENSE = register("event_dense", 0.5)
VIDEO_REASONING = register("video_reasoning", 0.65)

IMAGE_MODALITIES = (LANGUAGE, VISION, FUSION)
EVENT_MODALITIES = (LANGUAGE, EVENT_SPARSE, EVENT_DENSE, VIDEO_REASONING)
CELL_KINDS = (EVENT_SPARSE, EVENT_DENSE)
