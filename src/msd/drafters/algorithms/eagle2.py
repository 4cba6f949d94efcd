"""`eagle2`: one decoder layer over [emb(y_{i+1}); h_i] (EAGLE-2, arXiv 2406.16858; the layer is EAGLE's, 2401.15077).

x_i = fc([emb; h]) with bias, a layer without a norm before its attention, the target's frozen embedding and output
layer. The tree is dynamic: each of k frontier nodes per level gets k children, the k likeliest children form the next
frontier, and the likeliest of all nodes are kept, a parent before its child.
"""

from __future__ import annotations

from msd.drafters.registry import learned
from msd.drafters.toolkit.levels import EagleNetwork
from msd.train.losses.published import eagle_loss


@learned("eagle2", loss=eagle_loss)
class Eagle2(EagleNetwork):
    """Ignores modality: image positions are like any other, with the projector's output as embedding."""
